"""The same rows by the definitions of other tools, by name, so that a figure can be compared with theirs.

Every tool here counts latency from its own send, not from the planned time, and leaves failed requests out. Formula and
source of each: `VARIANTS`, and the table in METRICS.md. These figures are for comparing; none of them decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from analysis.arrays import Floats
from analysis.rows.read import Rows, Run
from harness.errors import unknown_name

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkGaps:
    """Gaps between the chunks of successful requests, first chunks left out, and the tokens in each; NaN: not said."""

    seconds: Floats
    tokens: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Successful requests as every tool sees them; seconds, one entry per request."""

    ttft: Floats
    """First chunk - sent; NaN without output."""
    last: Floats
    """Last chunk - sent."""
    ended: Floats
    """End of the response - sent."""
    chunks: Floats
    n_in: Floats
    n_out: Floats
    gaps: ChunkGaps | None
    duration: float
    """First send to last end of successes."""
    duration_all: float
    """The same of all requests that were sent, failed ones too."""
    duration_chunks: float
    """First send to last chunk of successes."""


Values = tuple[Floats, Floats | None]
"""Values, and their weights where a tool weighs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One metric of one tool: formula in words, where it is defined, and the function."""

    formula: str
    source: str
    values: Callable[[Served], Values | None]
    """None: it needs chunk gaps, and there are none here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The definitions of one tool and the way it takes a percentile."""

    read: str
    """What was read: release or commit."""
    percentile: Callable[[Floats, Floats | None, float], float]
    metrics: Mapping[str, Definition]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One metric as that tool would print it; None without a single value."""

    n: int
    mean: float | None
    percentiles: dict[int, float | None]


def variant(name: str, rows: Rows, gaps: ChunkGaps | None = None) -> dict[str, Figures]:
    """All metrics of one tool over these rows; s, except rates. Raises `UsageError` for a tool that is not known.

    ``gaps``: needed for metrics of single chunks; without, those are left out. No percentile is withheld for want of
    samples: the tools print them too.
    """
    if name not in VARIANTS:
        raise unknown_name("tool", name, VARIANTS)
    chosen, served = VARIANTS[name], _served(rows, gaps)
    found = {}
    for metric, definition in chosen.metrics.items():
        taken = definition.values(served)
        if taken is not None:
            found[metric] = _figures(*taken, chosen.percentile)
    return found


def variant_of(name: str, run: Run) -> dict[str, Figures]:
    """`variant` of a run directory that was read, with the gaps of its chunks: 32 bytes of memory a chunk."""
    rows = run.whole()
    later = np.repeat(rows.success, rows.chunks)
    later[rows.offsets[:-1][rows.chunks > 0]] = False
    return variant(name, rows, ChunkGaps(seconds=rows.gap_s[later], tokens=rows.chunk_tokens[later]))


def _served(rows: Rows, gaps: ChunkGaps | None) -> Served:
    ok, went = rows.success, np.isfinite(rows.sent_s) & np.isfinite(rows.finished_s)
    sent, ended = rows.sent_s[ok], rows.finished_s[ok]
    ttft = np.where(rows.chunks[ok] > 0, rows.first_gap_s[ok], np.nan)
    last = ttft + np.nan_to_num(rows.decode_s[ok])
    return Served(
        ttft=ttft,
        last=last,
        ended=ended - sent,
        chunks=rows.chunks[ok].astype(np.float64),
        n_in=rows.input_tokens[ok],
        n_out=rows.output_tokens[ok],
        gaps=gaps,
        duration=_span(sent, ended),
        duration_all=_span(rows.sent_s[went], rows.finished_s[went]),
        duration_chunks=_span(sent, sent + last),
    )


def _span(begin: Floats, end: Floats) -> float:
    return float(np.nanmax(end) - begin.min()) if np.isfinite(end).any() else 0.0


def _figures(
    values: Floats, weights: Floats | None, percentile: Callable[[Floats, Floats | None, float], float]
) -> Figures:
    known = np.isfinite(values)
    values = values[known]
    weights = None if weights is None else np.nan_to_num(weights[known])
    if not len(values) or (weights is not None and weights.sum() <= 0):
        return Figures(n=0, mean=None, percentiles=dict.fromkeys(PERCENTILES))
    return Figures(
        n=len(values),
        mean=float(np.average(values, weights=weights)),
        percentiles={p: float(percentile(values, weights, p / 100)) for p in PERCENTILES},
    )


# ------------------------------------------------------------------------------------------------- percentiles


def linear(values: Floats, weights: Floats | None, p: float) -> float:
    """Straight line between the two nearest of n values at place p (n - 1): numpy's own, which most tools use."""
    return float(np.percentile(values, 100 * p))


def by_weight(values: Floats, weights: Floats | None, p: float) -> float:
    """Smallest value with at least the share p of all weight at or below it."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum((np.ones(len(values)) if weights is None else weights)[order])
    return float(values[order][min(len(values) - 1, int(np.searchsorted(running / running[-1], p)))])


# ------------------------------------------------------------------------------------------------- the formulas


def _plain(function: Callable[[Served], Floats]) -> Callable[[Served], Values]:
    return lambda s: (function(s), None)


def _per_token(spent: Callable[[Served], Floats]) -> Callable[[Served], Floats]:
    """Seconds of each request over its output tokens less one; NaN below two."""

    def values(s: Served) -> Floats:
        per_token: Floats = spent(s) / np.where(s.n_out > 1, s.n_out - 1, np.nan)
        return per_token

    return values


_ttft = _plain(lambda s: s.ttft)
_last = _plain(lambda s: s.last)
_ended = _plain(lambda s: s.ended)
_decode = _plain(_per_token(lambda s: s.last - s.ttft))


def _itl_per_chunk(s: Served) -> Values | None:
    return None if s.gaps is None else (s.gaps.seconds, None)


def _guidellm_tpot(s: Served) -> Values:
    n = np.nan_to_num(s.n_out)
    return np.nan_to_num(np.where(n > 0, s.last / np.where(n > 0, n, 1.0), 0.0)), n


def _guidellm_itl(s: Served) -> Values:
    values, _ = _decode(s)
    return np.nan_to_num(values), np.where(s.n_out > 0, s.n_out, 1.0) - 1.0


_AMOUNTS: dict[str, Callable[[Served], float]] = {
    "successes": lambda s: float(len(s.ttft)),
    "output tokens": lambda s: float(np.nansum(s.n_out)),
    "input + output tokens": lambda s: float(np.nansum(s.n_out) + np.nansum(s.n_in)),
}
_WINDOWS: dict[str, Callable[[Served], float]] = {
    "last end - first send, failures too": lambda s: s.duration_all,
    "last chunk - first send": lambda s: s.duration_chunks,
}


def _rate(amount: Callable[[Served], float], window: Callable[[Served], float]) -> Callable[[Served], Values]:
    return lambda s: (np.array([amount(s) / window(s)] if len(s.ttft) and window(s) > 0 else []), None)


TTFT = "first chunk - sent"
LAST = "last chunk - sent"
DECODE = "(last chunk - first chunk) / (output tokens - 1), requests of two tokens or more"


def _rates(source: str, *names: str, window: str) -> dict[str, Definition]:
    """Requests, output tokens and (where a third name is given) all tokens per second of a window."""
    return {
        name: Definition(
            formula=f"{amount} / ({window}), ramp and drain included", source=source,
            values=_rate(_AMOUNTS[amount], _WINDOWS[window]),
        )
        for name, amount in zip(names, _AMOUNTS, strict=False)
    }  # fmt: skip


_VLLM, _VLLM_CLIENT = "vllm/benchmarks/serve.py: calculate_metrics", "vllm/benchmarks/lib/endpoint_request_func.py"
_GUIDE, _GUIDE_SUM = "guidellm/schemas/base/request_stats.py", "guidellm/benchmark/schemas/metrics.py"
_AIPERF = "aiperf/metrics/types/"


def _define(formula: str, source: str, values: Callable[[Served], Values | None]) -> Definition:
    return Definition(formula=formula, source=source, values=values)


VARIANTS: Mapping[str, Variant] = {
    "vllm-bench": Variant(
        read="0.32",
        percentile=linear,
        metrics={
            "ttft": _define(TTFT, _VLLM_CLIENT, _ttft),
            "tpot": _define(DECODE + "; one chunk gives 0", _VLLM, _decode),
            "itl": _define("gaps between chunks, pooled, one sample a chunk", _VLLM, _itl_per_chunk),
            "e2el": _define(LAST, _VLLM_CLIENT, _last),
            **_rates(_VLLM, "request_throughput", "output_throughput", "total_token_throughput",
                     window="last end - first send, failures too"),
        },
    ),
    "guidellm": Variant(
        read="0.8.1",
        percentile=by_weight,
        metrics={
            "time_to_first_token": _define(
                TTFT + "; 0 when unknown", _GUIDE, _plain(lambda s: np.nan_to_num(s.ttft))
            ),
            "time_per_output_token": _define(
                "(last chunk - sent) / output tokens, ttft inside; weighted by tokens; 0 when unknown",
                f"{_GUIDE}; {_GUIDE_SUM}", _guidellm_tpot,
            ),
            "inter_token_latency": _define(
                "(last chunk - first chunk) / (output tokens - 1) of a request; weighted by tokens - 1",
                f"{_GUIDE}; {_GUIDE_SUM}", _guidellm_itl,
            ),
            "request_latency": _define("end of response - sent", _GUIDE, _ended),
        },
    ),
    "aiperf": Variant(
        read="0.13.0",
        percentile=linear,
        metrics={
            "time_to_first_token": _define(TTFT, _AIPERF + "ttft_metric.py", _ttft),
            "inter_token_latency": _define(
                DECODE + " (without --per-chunk-usage), mean of requests; GenAI-Perf's too",
                _AIPERF + "inter_token_latency_metric.py", _decode,
            ),
            "inter_chunk_latency": _define(
                "gaps between chunks, pooled", _AIPERF + "inter_chunk_latency_metric.py", _itl_per_chunk
            ),
            "request_latency": _define(LAST, _AIPERF + "request_latency_metric.py", _last),
            **_rates(_AIPERF + "output_token_throughput_metrics.py",
                     "request_throughput", "output_token_throughput", window="last chunk - first send"),
        },
    ),
}  # fmt: skip
"""Tool -> its definitions."""
