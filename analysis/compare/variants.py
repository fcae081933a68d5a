"""The same rows by the definitions of other tools, by name, so that a figure can be compared with theirs.

Every tool here counts latency from its own send, not from the planned time, and leaves failed requests out. Formula,
release and source of each metric: the table in METRICS.md. These figures are for comparing; none decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.rows.read import Rows, Run
from harness.errors import unknown_name

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequests:
    """Successful requests as every tool sees them; seconds, one entry per request."""

    ttft: Floats
    """First chunk - sent; NaN without output."""
    last: Floats
    """Last chunk - sent."""
    ended: Floats
    """End of the response - sent."""
    n_in: Floats
    n_out: Floats
    gaps: Floats | None
    """Between the chunks of all, first chunks left out; None: not read."""
    until_all_ended: float
    """First send to last end, of failed requests too."""
    until_last_chunk: float
    """First send to last chunk of successes."""

    @property
    def itl(self) -> Floats:
        """(last chunk - first chunk) / (output tokens - 1); NaN below two tokens."""
        return np.asarray((self.last - self.ttft) / np.where(self.n_out > 1, self.n_out - 1, np.nan))


Percentile = Callable[[Floats, Floats | None, float], float]
Values = dict[str, Floats | tuple[Floats, Floats]]
"""Of each metric the values, or values and weights where a tool weighs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFigures:
    """One metric as that tool would print it; None without a single value."""

    n: int
    mean: float | None
    percentiles: dict[int, float | None]


def variant(name: str, rows: Rows, gaps_s: Floats | None = None) -> dict[str, MetricFigures]:
    """All metrics of one tool over these rows; s, except rates. Raises `UsageError` for a tool that is not known.

    ``gaps_s``: between the chunks of successes, first chunks left out; without, metrics of single chunks are left out.
    No percentile is withheld for want of samples: the tools print them too.
    """
    if name not in VARIANTS:
        raise unknown_name("tool", name, VARIANTS)
    percentile, metrics = VARIANTS[name]
    ok, went = rows.success, np.isfinite(rows.sent_s) & np.isfinite(rows.finished_s)
    sent, ended = rows.sent_s[ok], rows.finished_s[ok]
    ttft = np.where(rows.chunks[ok] > 0, rows.first_gap_s[ok], np.nan)
    last = ttft + np.nan_to_num(rows.decode_s[ok])
    served = ServedRequests(
        ttft=ttft, last=last, ended=ended - sent, n_in=rows.input_tokens[ok], n_out=rows.output_tokens[ok], gaps=gaps_s,
        until_all_ended=_span(rows.sent_s[went], rows.finished_s[went]), until_last_chunk=_span(sent, sent + last),
    )  # fmt: skip
    return {metric: _figures(found, percentile) for metric, found in metrics(served).items()}


def variant_of(name: str, run: Run) -> dict[str, MetricFigures]:
    """`variant` of a run directory that was read, with the gaps of its chunks: 32 bytes of memory a chunk."""
    rows = run.whole()
    later = np.repeat(rows.success, rows.chunks)
    later[rows.offsets[:-1][rows.chunks > 0]] = False
    return variant(name, rows, rows.gap_s[later])


def _span(begin: Floats, end: Floats) -> float:
    return float(np.nanmax(end) - begin.min()) if np.isfinite(end).any() else 0.0


def _figures(found: Floats | tuple[Floats, Floats], percentile: Percentile) -> MetricFigures:
    values, weights = found if isinstance(found, tuple) else (found, None)
    known = np.isfinite(values)
    values = values[known]
    weights = None if weights is None else np.nan_to_num(weights[known])
    if not len(values) or (weights is not None and weights.sum() <= 0):
        return MetricFigures(n=0, mean=None, percentiles=dict.fromkeys(PERCENTILES))
    return MetricFigures(
        n=len(values),
        mean=float(np.average(values, weights=weights)),
        percentiles={p: float(percentile(values, weights, p / 100)) for p in PERCENTILES},
    )


def linear(values: Floats, weights: Floats | None, p: float) -> float:
    """Straight line between the two nearest of n values at place p (n - 1): numpy's own, which most tools use."""
    return float(np.percentile(values, 100 * p))


def by_weight(values: Floats, weights: Floats | None, p: float) -> float:
    """Smallest value with at least the share p of all weight at or below it."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum((np.ones(len(values)) if weights is None else weights)[order])
    return float(values[order][min(len(values) - 1, int(np.searchsorted(running / running[-1], p)))])


def _rates(s: ServedRequests, window_s: float, *names: str) -> Values:
    """Successes, output tokens, input + output tokens per second of a window, ramp and drain included."""
    out = float(np.nansum(s.n_out))
    amounts = (len(s.ttft), out, out + float(np.nansum(s.n_in))) if len(s.ttft) and window_s > 0 else ()
    return {name: np.array([amount / window_s for amount in amounts[k : k + 1]]) for k, name in enumerate(names)}


def _gaps(s: ServedRequests, name: str) -> Values:
    return {} if s.gaps is None else {name: s.gaps}


def _vllm_bench(s: ServedRequests) -> Values:
    rates = ("request_throughput", "output_throughput", "total_token_throughput")
    return {"ttft": s.ttft, "tpot": s.itl, **_gaps(s, "itl"), "e2el": s.last, **_rates(s, s.until_all_ended, *rates)}


def _guidellm(s: ServedRequests) -> Values:
    n = np.nan_to_num(s.n_out)
    return {
        "time_to_first_token": np.nan_to_num(s.ttft),
        "time_per_output_token": (np.nan_to_num(np.where(n > 0, s.last / np.where(n > 0, n, 1.0), 0.0)), n),
        "inter_token_latency": (np.nan_to_num(s.itl), np.where(s.n_out > 0, s.n_out, 1.0) - 1.0),
        "request_latency": s.ended,
    }


def _aiperf(s: ServedRequests) -> Values:
    return {
        "time_to_first_token": s.ttft,
        "inter_token_latency": s.itl,
        **_gaps(s, "inter_chunk_latency"),
        "request_latency": s.last,
        **_rates(s, s.until_last_chunk, "request_throughput", "output_token_throughput"),
    }


VARIANTS: Mapping[str, tuple[Percentile, Callable[[ServedRequests], Values]]] = {
    "vllm-bench": (linear, _vllm_bench), "guidellm": (by_weight, _guidellm), "aiperf": (linear, _aiperf),
}  # fmt: skip
"""Tool -> how it takes a percentile, and its metrics."""
