"""Two runs of one plan, request by request: each figure of both, and their difference with a paired 95 % interval.

Latencies and shares pair by request_id, token rates by block of time. Blocks of neighbouring requests (or bins) are
drawn with repetition, the *same* blocks for both runs, so what both share (the trace's hard minutes) cancels out.
Source: moving-block bootstrap, Kuensch, Annals of Statistics 17(3), 1989.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.cost.cost import bill_usd, usd_per_1m
from harness.analysis.rows.read import Run
from harness.analysis.stats.intervals import RESAMPLES, ends_of_resamples, samples_needed
from harness.analysis.summary import Summary

BLOCKS = 10
RATE_BLOCKS = 5
"""Fewer for rates: a queue makes neighbouring stretches of time alike for longer than neighbouring requests, and blocks
of a tenth then claim too much (coverage: tests/test_compare.py)."""
MAX_UNITS = 200
"""Neighbouring requests are drawn together in at most so many groups."""
MAX_RANKS = 10_000
"""Percentiles of resamples are exact up to so many distinct ranks, and to one in so many beyond."""
FEWEST_PAIRS = 20
"""Below this many paired requests nothing has an interval."""
FIGURES: dict[str, tuple[str, bool]] = {
    "cost": ("USD per 1M tokens", True),
    "throughput": ("tokens/s", False),
    "goodput": ("req/s", False),
    "attainment": ("share of requests", False),
    "error_rate": ("share of requests", True),
    **{f"{m}_p{p}": ("s", True) for m in ("ttft", "tpot", "e2e") for p in (50, 95, 99)},
}
"""What is compared: unit, and whether less is better."""
SHARES = ("attainment", "error_rate")


Ends = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRun:
    """What a comparison needs of one run, one entry per measured request, ordered by request_id."""

    summary: Summary
    request_id: Ints
    finished_s: Floats
    tokens: Floats
    """Input + output of a success, 0 of a failure; NaN when the server did not say."""
    planned_input_tokens: Floats
    planned_output_tokens: Floats
    offered: Bools
    success: Bools
    met: Bools
    """Within every limit of the SLO."""
    latency: dict[str, Floats]
    """ttft, tpot, e2e in s; NaN where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigure:
    """One figure of one pair of runs. Ends are of ``b - a`` and of ``b / a - 1``; None: not known."""

    a: float | None = None
    b: float | None = None
    n: int
    difference: Ends = (None, None)
    change: Ends = (None, None)
    note: str | None = None


def observe(run: Run, summary: Summary) -> PairedRun:
    """The columns of a run that comparisons use."""
    rows = run.rows
    order = np.argsort(rows.request_id, kind="stable")
    success = rows.success[order]
    limits = summary.slo.limits if summary.slo is not None else {}
    latency = {name: measure(rows)[order] for name, measure in _LATENCIES.items()}
    return PairedRun(
        summary=summary,
        request_id=rows.request_id[order],
        finished_s=rows.finished_s[order],
        tokens=np.where(success, (rows.input_tokens + rows.output_tokens)[order], 0.0),
        planned_input_tokens=rows.planned_input_tokens[order],
        planned_output_tokens=rows.planned_output_tokens[order],
        offered=~metrics.not_offered(run)[order],
        success=success,
        met=metrics.meets_slo(rows, limits)[order],
        latency=latency,
    )


_LATENCIES = {"ttft": metrics.ttft, "tpot": metrics.tpot, "e2e": metrics.e2e}


def pair_figures(a: PairedRun, b: PairedRun) -> tuple[dict[str, PairFigure], int, int]:
    """(`FIGURES` of two runs, requests that were paired, requests that only one of them has or was offered)."""
    _, in_a, in_b = np.intersect1d(a.request_id, b.request_id, assume_unique=True, return_indices=True)
    both = a.offered[in_a] & b.offered[in_b]
    in_a, in_b = in_a[both], in_b[both]
    n = len(in_a)
    figures = _rates(a, b) | {"error_rate": _share(~a.success[in_a], ~b.success[in_b])}
    unjudged = _not_judged(a, b)
    figures["attainment"] = PairFigure(n=n, note=unjudged) if unjudged else _share(a.met[in_a], b.met[in_b])
    for name in _LATENCIES:
        figures |= _percentiles(name, a.latency[name][in_a], b.latency[name][in_b])
    return {name: figures[name] for name in FIGURES}, n, int(a.offered.sum()) + int(b.offered.sum()) - 2 * n


@lru_cache(maxsize=8)
def block_counts(units: int, share: int = BLOCKS, seed: int = 0) -> Floats:
    """How often each of ``units`` units is in each resample, shape (RESAMPLES, units): circular blocks, ``share`` to a
    run.
    """
    length = max(1, round(units / share))
    blocks = math.ceil(units / length)
    starts = np.random.default_rng(seed).integers(units, size=(RESAMPLES, blocks))
    drawn = (starts[:, :, None] + np.arange(length)) % units
    row = np.repeat(np.arange(RESAMPLES), blocks * length)
    flat = np.bincount(row * units + drawn.ravel(), minlength=RESAMPLES * units)
    counts = flat.reshape(RESAMPLES, units).astype(np.float64)
    counts.flags.writeable = False  # every pair of runs is drawn alike
    return counts


def _unit_of(n: int) -> Ints:
    """Group of neighbours that each of ``n`` requests is drawn with."""
    return (np.arange(n) * min(n, MAX_UNITS) // n).astype(np.int64)


def _figure(a: float, b: float, drawn_a: Floats, drawn_b: Floats, n: int, blocks: int = BLOCKS) -> PairFigure:
    """Difference and change of two figures from what the same blocks make of both."""
    kept = np.isfinite(drawn_a) & np.isfinite(drawn_b)
    a_s, b_s = drawn_a[kept], drawn_b[kept]
    if not len(a_s):
        return PairFigure(a=a, b=b, n=n, note="no resample has this figure")
    ratio = a > 0 and bool((a_s > 0).all())
    return PairFigure(
        a=a,
        b=b,
        n=n,
        difference=ends_of_resamples(b_s - a_s, b - a, blocks),
        change=ends_of_resamples(b_s / a_s - 1, b / a - 1, blocks) if ratio else (None, None),
    )


def _percentiles(metric: str, a: Floats, b: Floats) -> dict[str, PairFigure]:
    """p50, p95 and p99 over the requests that have the metric in both runs."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b, n = a[known], b[known], int(known.sum())
    made: dict[str, PairFigure] = {}
    supported = {p: max(FEWEST_PAIRS, samples_needed(p / 100)) for p in (50, 95, 99)}
    for p, needed in supported.items():
        if n < needed:
            made[f"{metric}_p{p}"] = PairFigure(n=n, note=f"needs {needed} paired requests, has {n}")
    wanted = [p for p, needed in supported.items() if n >= needed]
    if not wanted:
        return made
    unit = _unit_of(n)
    counts = block_counts(int(unit[-1]) + 1)
    sides = [_drawn_percentiles(values, unit, counts, [p / 100 for p in wanted]) for values in (a, b)]
    for k, p in enumerate(wanted):
        (value_a, drawn_a), (value_b, drawn_b) = sides[0][k], sides[1][k]
        made[f"{metric}_p{p}"] = _figure(value_a, value_b, drawn_a, drawn_b, n)
    return made


def _drawn_percentiles(values: Floats, unit: Ints, counts: Floats, ps: Sequence[float]) -> list[tuple[float, Floats]]:
    """Each percentile and what it is in each resample: the smallest value with the share p at or below it."""
    n, units = len(values), counts.shape[1]
    order = np.argsort(values, kind="stable")
    ranks = min(n, MAX_RANKS)
    bin_of = np.arange(n) * ranks // n
    largest = values[order][np.flatnonzero(np.append(np.diff(bin_of), 1))]
    per_bin = np.bincount(unit[order] * ranks + bin_of, minlength=units * ranks).reshape(units, ranks) * 1.0
    drawn = [np.empty(len(counts)) for _ in ps]
    step = 100  # resamples at once: bounds the memory
    for start in range(0, len(counts), step):
        part = counts[start : start + step]
        below = np.cumsum(part[:, unit[order]] if ranks == n else part @ per_bin, axis=1)  # of one a rank: no product
        for k, p in enumerate(ps):
            target = below[:, -1:] * p * (1 - 1e-12)
            drawn[k][start : start + step] = largest[np.argmax(below >= target, axis=1)]
    ranked = values[order]
    return [(float(ranked[min(n - 1, math.ceil(n * p * (1 - 1e-12)) - 1)]), drawn[k]) for k, p in enumerate(ps)]


def _share(a: Bools, b: Bools) -> PairFigure:
    """Share of True in both. Where no resample differs the ends are those of n draws without an event (exact, 95 %)."""
    n = len(a)
    if n < FEWEST_PAIRS:
        return PairFigure(n=n, note=f"needs {FEWEST_PAIRS} paired requests, has {n}")
    unit = _unit_of(n)
    counts = block_counts(int(unit[-1]) + 1)
    sizes = counts @ np.bincount(unit)
    drawn_a, drawn_b = (counts @ np.bincount(unit, weights=flags) / sizes for flags in (a, b))
    made = _figure(float(a.mean()), float(b.mean()), drawn_a, drawn_b, n)
    assert made.a is not None and made.b is not None
    low, high = made.difference
    unseen = 1 - 0.025 ** (1 / n)
    if low == high and low is not None:
        low, high = low - unseen, low + unseen
    return PairFigure(a=made.a, b=made.b, n=n, difference=(low, high), change=made.change)


def _rates(a: PairedRun, b: PairedRun) -> dict[str, PairFigure]:
    """cost, throughput and goodput from what ended in each of the window's equal bins."""
    sides = [_binned(side) for side in (a, b)]
    windows_s = [window_s for _, _, window_s in sides if window_s is not None]
    if len(windows_s) < 2:
        return dict.fromkeys(("cost", "throughput", "goodput"), PairFigure(n=0, note="nothing was sent and ended"))
    counts = block_counts(metrics.BINS, RATE_BLOCKS)
    n = min(int(side.success.sum()) for side in (a, b))

    def rate(index: Literal[0, 1]) -> list[tuple[float, Floats]]:
        return [
            (float(side[index].sum()) / s, counts @ side[index] / counts.sum(axis=1) / (s / metrics.BINS))
            for side, s in zip(sides, windows_s, strict=True)
        ]

    def cost(side: PairedRun, value: float, drawn: Floats) -> tuple[float, Floats]:
        paid = side.summary.cost
        usd_per_s = bill_usd(paid.usd_per_hour or 0.0, paid.replicas, 1.0)
        nan = np.full(len(drawn), np.nan)
        return usd_per_1m(usd_per_s, value), np.divide(usd_per_s * 1e6, drawn, out=nan, where=drawn > 0)

    few = None if n >= FEWEST_PAIRS else f"needs {FEWEST_PAIRS} successes, has {n}"
    rates = [o.summary.rates.total_token_throughput for o in (a, b)]
    silent = next((q.note or "no tokens were served" for q in rates if not q.value), few)
    prices = [o.summary.cost.usd_per_1m_total for o in (a, b)]
    priceless = next((q.note or "no price" for q in prices if q.value is None), silent)
    tokens = rate(0)
    made = {}
    for name, why, values in (
        ("throughput", silent, tokens),
        ("cost", priceless, [cost(o, *one) for o, one in zip((a, b), tokens, strict=True)] if not priceless else []),
        ("goodput", _not_judged(a, b) or few, rate(1)),
    ):
        if why:
            made[name] = PairFigure(n=n, note=why)
        else:
            (value_a, drawn_a), (value_b, drawn_b) = values
            made[name] = _figure(value_a, value_b, drawn_a, drawn_b, n, RATE_BLOCKS)
    return made


def _not_judged(*both: PairedRun) -> str | None:
    """Why it is not known how many requests kept the SLO; None: it is."""
    for slo in (o.summary.slo for o in both):
        if slo is None or slo.attainment.value is None:
            return "no SLO given (--slo)" if slo is None else slo.attainment.note
    return None


def _binned(o: PairedRun) -> tuple[Floats, Floats, float | None]:
    """(tokens, requests within the SLO, window s) per bin, both at the time their request ended.

    The whole window's totals are those of the summary, where tokens are attributed by chunk.
    """
    window = o.summary.window
    if window is None:
        return np.zeros(0), np.zeros(0), None
    ended = np.isfinite(o.finished_s)
    tokens = metrics.binned(o.finished_s[ended], np.nan_to_num(o.tokens)[ended], window)
    good = metrics.binned(o.finished_s[ended & o.met], None, window)
    return tokens, good, window.duration_s
