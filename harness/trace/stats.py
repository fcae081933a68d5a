"""What a plan keeps of its trace, so that the plan and the run can be judged by it: some hundred numbers, no requests.

==========================  ==========================================================================================
dispersion                  variance / mean of the number of arrivals in windows of 1, 10 and 60 s, laid from the first
                            arrival to the last, the rest of a window at the end left out. Poisson arrivals have 1
worst minute                most arrivals in any 60 s (begun by an arrival), over the mean of the whole
gap cv                      standard deviation / mean of the gaps between arrivals. Poisson arrivals have 1
mean rate                   (n - 1) / span, requests/s
==========================  ==========================================================================================

Functions here take sorted times as integer ns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

WINDOWS_S = (1, 10, 60)
FEWEST_WINDOWS = 10
POINTS = 51
"""A distribution is kept as so many quantiles, evenly from the smallest to the largest value."""
PERIODS = 60
"""Equal parts of the span in which arrivals are counted: the shape over time."""

_MOST_WINDOWS = 20_000_000
_MOST_GAPS = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalStats:
    """Arrivals in time."""

    requests: int
    span_s: float
    rate: float | None
    """Requests/s; null when all arrive at one instant."""
    dispersion: dict[str, float | None]
    """"1s", "10s", "60s"; null below ten windows."""
    worst_minute: float | None
    """null when the span is below a minute."""
    gap_cv: float | None
    """null below two gaps or when all arrive at one instant."""
    gap_quantiles_s: list[float]
    """`POINTS` of them (of at most a million gaps, evenly chosen)."""
    counts: list[int]
    """Arrivals in `PERIODS` equal parts of the span; empty when all arrive at one instant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStats:
    """Token lengths of one side."""

    rows: int
    mean: float
    quantiles: list[int]
    part_sd: float | None = None
    """Standard deviation of the means of 60 to 120 equal parts of the rows, in their order (`part_sd`): how far the
    mean of one stretch is from that of the whole. null below 60 rows, where not asked, in plans of older versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStats:
    """What an unlimited prefix cache would have found, at the trace's own blocks."""

    block_tokens: list[int]
    rows: int
    hit_rate_blocks: float
    hit_rate_tokens: float
    sampled: int
    """1: every block was counted; k: one in k, chosen by hash, and counts are multiplied by k."""
    continued_turns: int | None = None
    """Turns of sessions that continue the one before them (`harness.trace.prefix`); null without such sessions."""
    independent_turns: int | None = None
    """Later turns of sessions that do not: their prompts share nothing with those before."""
    blocks: int | None = None
    """null, as the three below, in plans of older versions."""
    hit_blocks: int | None = None
    tokens: int | None = None
    hit_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCache:
    """What production's prompt cache found, by the rows that state both their input and their cached tokens."""

    rows: int
    input_tokens: int
    cached_tokens: int

    @property
    def share(self) -> float:
        return self.cached_tokens / max(self.input_tokens, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStats:
    """Of the rows a plan was made from, as the trace records them."""

    requests: int
    arrivals: ArrivalStats | None
    """null when the trace has no times."""
    input_tokens: LengthStats | None
    """Of rows that say lengths only; the length of a text is the server's to count."""
    output_tokens: LengthStats | None
    sessions: int
    session_rows: int
    most_turns: int
    unit_rows: float
    """Rows of the session (1 without one) of a row, on average over rows: how unequal a draw of whole sessions is."""
    prefix: PrefixStats | None
    grid_s: float | None
    """Step of the coarse clock its times are on; null when there is none to be seen."""
    text_tokens: float | None = None
    """Mean input tokens that production counted of rows with a text; null where one of them has no count."""
    recorded_cache: RecordedCache | None = None
    """null where no row states its cached tokens, and in plans of older versions."""

    @property
    def requests_per_session(self) -> float:
        """Mean number of requests in a session; a row without one is one of its own."""
        return self.requests / max(self.requests - self.session_rows + self.sessions, 1)


def part_sd(values: Sequence[int]) -> float | None:
    """Standard deviation of the means of 60 to 120 equal parts of ``values``, in their order; None below 60."""
    size = 1
    while len(values) // size >= 2 * PERIODS:
        size *= 2
    parts = len(values) // size
    if parts < PERIODS:
        return None
    return float(np.std(np.array(values)[: parts * size].reshape(parts, size).sum(axis=1) / size, ddof=1))


def arrival_stats(times: Ints) -> ArrivalStats | None:
    """Of ``times`` (ns, ascending); None of none."""
    if not len(times):
        return None
    span_ns = int(times[-1] - times[0])
    rate = mean_rate(times)
    worst_minute, gap_cv = worst(times, 60), None
    if span_ns and len(times) > 2:
        mean_ns = span_ns / (len(times) - 1)
        gap_cv = float(np.sqrt((((np.diff(times) - mean_ns) / mean_ns) ** 2).sum() / (len(times) - 1)))
    return ArrivalStats(
        requests=len(times),
        span_s=span_ns / 1e9,
        rate=rate,
        dispersion={f"{w}s": dispersion(times, w) for w in WINDOWS_S},
        worst_minute=None if worst_minute is None or rate is None else worst_minute[0] / (rate * 60),
        gap_cv=gap_cv,
        gap_quantiles_s=_gap_quantiles_s(times),
        counts=counts_between(times, int(times[0]), span_ns).tolist() if span_ns else [],
    )


def mean_rate(times: Ints) -> float | None:
    """Mean arrival rate, req/s: (n - 1) / span; None below two rows or when all arrive at one instant.

    n - 1, because n arrivals have n - 1 gaps: k requests a second apart arrive at 1 req/s, not at k / (k - 1).
    """
    if len(times) < 2 or times[-1] == times[0]:
        return None
    return (len(times) - 1) * 1e9 / int(times[-1] - times[0])


def dispersion(times: Ints, window_s: int) -> float | None:
    """Variance / mean of the arrivals in whole windows; None below `FEWEST_WINDOWS` of them."""
    if not len(times):
        return None
    window_ns = window_s * 1_000_000_000
    windows = int(times[-1] - times[0]) // window_ns
    if not FEWEST_WINDOWS <= windows <= _MOST_WINDOWS:
        return None
    at = (times - times[0]) // window_ns
    counts = np.bincount(at[at < windows], minlength=windows)
    return float(counts.var() / counts.mean())


def worst(times: Ints, window_s: int) -> tuple[int, int] | None:
    """(most arrivals in any window begun by an arrival, which arrival); None when the span is shorter than it."""
    window_ns = window_s * 1_000_000_000
    if len(times) < 2 or times[-1] - times[0] < window_ns:
        return None
    counts = np.searchsorted(times, times + window_ns, side="left") - np.arange(len(times))
    at = int(counts.argmax())
    return int(counts[at]), at


def _gap_quantiles_s(times: Ints) -> list[float]:
    every = -(-len(times) // _MOST_GAPS)
    after = times[1::every]
    some = after - times[:-1:every][: len(after)]
    if not len(some):
        return []
    return (np.quantile(some, np.linspace(0, 1, POINTS), method="inverted_cdf") / 1e9).tolist()  # type: ignore[no-any-return]


def counts_between(times: Ints, start_ns: int, span_ns: int, periods: int = PERIODS) -> Ints:
    """Arrivals in ``periods`` equal parts of the time from ``start_ns`` on; the end itself is in the last part."""
    inside = times[(times >= start_ns) & (times <= start_ns + span_ns)] - start_ns
    at = np.minimum(inside * (periods / span_ns), periods - 1).astype(np.int64)
    return np.bincount(at, minlength=periods)


def length_stats(counts: Mapping[int, int], part_sd: float | None = None) -> LengthStats | None:
    """Of lengths, given as length -> rows; None of none."""
    if not counts:
        return None
    values = np.array(sorted(counts), dtype=np.int64)
    reached = np.cumsum([counts[int(value)] for value in values])
    rows = int(reached[-1])
    wanted = np.clip(np.ceil(np.linspace(0, 1, POINTS) * rows), 1, rows)
    total = sum(length * count for length, count in counts.items())
    quantiles = values[np.searchsorted(reached, wanted)].tolist()
    return LengthStats(rows=rows, mean=total / rows, quantiles=quantiles, part_sd=part_sd)
