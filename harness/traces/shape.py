"""The shape of a trace: what `harness trace inspect` says. Columns of numbers, never the requests.

A record costs a few numbers here, and a session a few; for prefix ids see `harness.traces.prefix`.

==========================  ==========================================================================================
burstiness                  variance / mean of the number of arrivals in windows of 1, 10 and 60 s, laid from the first
                            arrival to the last, the rest of a window at the end left out. Poisson arrivals have 1
worst minute                most arrivals in any 60 s (begun by an arrival), and that over the mean of the whole trace
mean rate                   (n - 1) / span, requests/s
ideal prefix-cache hit      share of blocks, and of input tokens, that led some request before, token for token: what an
                            unlimited cache at the trace's own block size would have found. Of sessions that say
                            lengths only: what their made-up prompts share (`harness.traces.ideal`)
==========================  ==========================================================================================
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from harness.records import TraceRecord
from harness.traces.ideal import IdealReuse
from harness.traces.prefix import Prefix
from harness.traces.stats import WINDOWS_S, dispersion, worst

Ints = npt.NDArray[np.int64]

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 60


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token lengths of one side."""

    rows: int
    """Rows that say it."""
    total: int
    mean: float
    minimum: int
    maximum: int
    quantiles: dict[str, float]
    """"p50" -> tokens."""
    histogram: dict[str, int]
    """Power of two -> rows with lengths from it to below the next."""


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations, by their id."""

    sessions: int
    rows: int
    """Rows that belong to one."""
    turns_mean: float
    turns_max: int
    turns_quantiles: dict[str, float]
    gap_quantiles_s: dict[str, float] | None
    """Between the arrivals of a session's turns; null without times or second turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """All that is said of a trace; null where it does not say, or is too short to."""

    rows: int
    span_s: float | None
    mean_rate: float | None
    instants: int | None
    """Different arrival times."""
    longest_gap_s: float | None
    burstiness: dict[str, float | None]
    """"1s", "10s", "60s" -> variance / mean of counts; null below ten windows."""
    worst_second: dict[str, float] | None
    worst_minute: dict[str, float] | None
    """requests, start_s and ratio_to_mean."""
    rate_over_time: dict[str, list[float]] | None
    """start_s and rate (requests/s) of equal windows."""
    input_tokens: Lengths | None
    output_tokens: Lengths | None
    rank_correlation: float | None
    """Spearman's, of input and output lengths: 1 when longer prompts get longer answers."""
    joint: dict[str, list[list[int]] | list[int]] | None
    """rows by power of four of the input (down) and output tokens (across)."""
    sessions: Sessions | None
    prefix: Prefix | None
    rows_with_text: int


def measure(records: Iterable[TraceRecord]) -> Shape:
    """The shape of ``records``, which come in order of arrival."""
    columns = Columns()
    for record in records:
        columns.add(record)
    return columns.shape()


@dataclass(slots=True)
class Columns:
    """What is kept of each record until the shape is asked for."""

    arrival_ns: array[int] = field(default_factory=lambda: array("q"))
    input_tokens: array[int] = field(default_factory=lambda: array("i"))
    output_tokens: array[int] = field(default_factory=lambda: array("i"))
    """-1 where not given."""
    session: array[int] = field(default_factory=lambda: array("q"))
    """Hash of its id, 0 without."""
    rows: int = 0
    with_text: int = 0
    reuse: IdealReuse = field(default_factory=IdealReuse)

    def add(self, record: TraceRecord) -> None:
        """The next record."""
        self.rows += 1
        if record.arrival_s is not None:
            self.arrival_ns.append(round(record.arrival_s * 1e9))
        self.input_tokens.append(-1 if record.input_tokens is None else record.input_tokens)
        self.output_tokens.append(-1 if record.output_tokens is None else record.output_tokens)
        # hash() would do, but for its seed a run: two inspections must agree to the bit.
        self.session.append(0 if record.session_id is None else _hash(record.session_id))
        self.with_text += record.text is not None or record.messages is not None
        self.reuse.add(record)

    def shape(self) -> Shape:
        """The shape of all records added."""
        times = np.frombuffer(self.arrival_ns, dtype=np.int64)
        into = np.frombuffer(self.input_tokens, dtype=np.int32)
        out = np.frombuffer(self.output_tokens, dtype=np.int32)
        both = (into > 0) & (out > 0)
        span_s = int(times[-1] - times[0]) / 1e9 if len(times) else None
        rate = (len(times) - 1) / span_s if span_s else None
        gaps = np.diff(times)
        return Shape(
            rows=self.rows,
            span_s=span_s,
            mean_rate=rate,
            instants=1 + int(np.count_nonzero(gaps)) if len(times) else None,
            longest_gap_s=int(gaps.max()) / 1e9 if len(gaps) else None,
            burstiness={f"{w}s": dispersion(times, w) for w in WINDOWS_S},
            worst_second=_worst(times, 1, rate),
            worst_minute=_worst(times, 60, rate),
            rate_over_time=_rate_over_time(times),
            input_tokens=_lengths(into[into > 0]),
            output_tokens=_lengths(out[out > 0]),
            rank_correlation=_rank_correlation(into[both], out[both]),
            joint=_joint(into[both], out[both]),
            sessions=_sessions(np.frombuffer(self.session, dtype=np.int64), times),
            prefix=self.reuse.result(),
            rows_with_text=self.with_text,
        )


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


# --- arrivals ------------------------------------------------------------------------------------------------------


def _worst(times: Ints, window_s: int, rate: float | None) -> dict[str, float] | None:
    found = worst(times, window_s)
    if found is None or rate is None:
        return None
    requests, at = found
    return {
        "requests": requests,
        "start_s": int(times[at] - times[0]) / 1e9,
        "ratio_to_mean": requests / (rate * window_s),
    }


def _rate_over_time(times: Ints) -> dict[str, list[float]] | None:
    if len(times) < 2 or times[-1] == times[0]:
        return None
    counts, edges = np.histogram((times - times[0]) / 1e9, bins=min(_BINS, len(times)))
    return {"start_s": edges[:-1].tolist(), "rate": (counts / np.diff(edges)).tolist()}


# --- lengths and sessions ------------------------------------------------------------------------------------------


def _quantiles(values: npt.NDArray[np.generic]) -> dict[str, float]:
    found = np.quantile(values.astype(np.float64), QUANTILES)
    return {f"p{q * 100:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _lengths(tokens: npt.NDArray[np.int32]) -> Lengths | None:
    if not len(tokens):
        return None
    powers, counts = np.unique(np.frexp(tokens.astype(np.float64))[1] - 1, return_counts=True)
    return Lengths(
        rows=len(tokens),
        total=int(tokens.sum(dtype=np.int64)),
        mean=float(tokens.mean(dtype=np.float64)),
        minimum=int(tokens.min()),
        maximum=int(tokens.max()),
        quantiles=_quantiles(tokens),
        histogram={str(2 ** int(p)): int(c) for p, c in zip(powers, counts, strict=True)},
    )


def _ranks(values: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middles: npt.NDArray[np.float64] = ends - (counts - 1) / 2
    return middles[inverse]


def _rank_correlation(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> float | None:
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _joint(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> dict[str, list[list[int]] | list[int]] | None:
    if not len(a):
        return None
    rows, columns = ((np.frexp(x.astype(np.float64))[1] - 1) // 2 for x in (a, b))
    table = np.zeros((int(rows.max()) + 1, int(columns.max()) + 1), dtype=np.int64)
    np.add.at(table, (rows, columns), 1)
    first_row, first_column = int(rows.min()), int(columns.min())
    return {
        "input_from": [4**i for i in range(first_row, table.shape[0])],
        "output_from": [4**i for i in range(first_column, table.shape[1])],
        "rows": table[first_row:, first_column:].tolist(),
    }


def _sessions(ids: Ints, times: Ints) -> Sessions | None:
    inside = ids != 0
    if not inside.any():
        return None
    _, turns = np.unique(ids[inside], return_counts=True)
    gaps = None
    if len(times) == len(ids):
        order = np.lexsort((times, ids))
        same = (np.diff(ids[order]) == 0) & inside[order][1:]
        if same.any():
            gaps = _quantiles(np.diff(times[order])[same] / 1e9)
    return Sessions(
        sessions=len(turns),
        rows=int(inside.sum()),
        turns_mean=float(turns.mean()),
        turns_max=int(turns.max()),
        turns_quantiles=_quantiles(turns),
        gap_quantiles_s=gaps,
    )
