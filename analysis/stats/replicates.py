"""Several runs as one figure: what differs from run to run is in no run's own interval, only between runs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.stats.autocorrelation import student_t
from harness.analysis.stats.intervals import Quantity

FEWEST_PAIRS = 3
"""From so many pairs of runs on a comparison is judged: fewer do not know how much two runs of one system differ."""


def over_replicates(
    quantities: Sequence[Quantity], weights: Sequence[float] | None = None, plans: Sequence[Hashable] | None = None
) -> Quantity:
    """One figure over repeats of one point: the mean of the runs' values by weight (default: all alike), with interval.

    ``plans``: what each run was asked; equal ones had the same arrivals and lengths (None: all differ). What differs
    from run to run (caches, placement, neighbours) is in no run's own interval; between runs it is. What runs of one
    plan share is in each run's own interval and in none of the differences between them: it does not shrink, however
    often the plan is repeated, and where it is not known there is no interval. So the half-width is the larger of
    Student's t between plans, and the runs' own intervals (together for other plans, as they are for one plan) with
    Student's t between runs of one plan.

    One run: its own figure. A run without a value: there is none, for to leave out what failed flatters the rest.
    Raises ValueError without any quantity or when units differ.
    """
    units = {q.unit for q in quantities}
    if len(units) != 1:
        raise ValueError(f"repeats of one figure have one unit, not {sorted(units)}")
    first, runs, n = quantities[0], len(quantities), sum(q.n for q in quantities)
    missing = [q for q in quantities if q.value is None]
    if runs == 1:
        return first
    if missing:
        note = f"{len(missing)} of {runs} repeats have no value: {missing[0].note or 'not known'}"
        return replace(first, value=None, low=None, high=None, n=n, note=note)
    values = np.array([q.value for q in quantities], dtype=np.float64)
    shares = np.ones(runs) if weights is None else np.array(weights, dtype=np.float64)
    shares = shares / shares.sum()
    asked = list(range(runs)) if plans is None else list(plans)
    groups = [np.flatnonzero([one == plan for one in asked]) for plan in dict.fromkeys(asked)]
    mean = float(shares @ values)

    def reach(ends: Sequence[float | None]) -> float | None:
        known = np.array([np.nan if end is None else abs(end - q) for end, q in zip(ends, values, strict=True)])
        own = math.sqrt(sum(float(shares[group] @ known[group]) ** 2 for group in groups))
        if not math.isfinite(own) and len(groups) == 1:
            return None
        alike = math.hypot(own, _within(values, shares, groups)) if math.isfinite(own) else 0.0
        return max(_between(values, shares, groups), alike)

    below, above = reach([q.low for q in quantities]), reach([q.high for q in quantities])
    low, high = (None if below is None else mean - below), (None if above is None else mean + above)
    note = f"mean of {runs} runs, interval between runs"
    if len(groups) == 1:
        note = f"mean of {runs} runs of one plan: what they share is in the interval as in that of one"
        note = note if below is not None or above is not None else f"mean of {runs} runs of one plan"
    return replace(
        first, value=mean, low=low if low is None or values.min() < 0 else max(0.0, low), high=high, n=n, note=note
    )


def _between(values: Floats, shares: Floats, groups: Sequence[Ints]) -> float:
    """Half-width of the mean by what plans differ in; 0 for one plan."""
    if len(groups) == 1:
        return 0.0
    weight = np.array([shares[group].sum() for group in groups])
    each = np.array([shares[group] @ values[group] for group in groups]) / weight
    # the variance of a ratio of sums, by its linear part; with equal weights that of a mean
    spread = float(weight**2 @ (each - weight @ each) ** 2)
    return student_t(len(groups) - 1) * math.sqrt(spread * len(groups) / (len(groups) - 1))


def _within(values: Floats, shares: Floats, groups: Sequence[Ints]) -> float:
    """Half-width of the mean by what runs of one plan differ in; 0 where each plan was run once."""
    degrees = sum(len(group) - 1 for group in groups)
    spread = 0.0
    for group in groups:
        size, weight = len(group), float(shares[group].sum())
        if size > 1:
            about = values[group] - shares[group] @ values[group] / weight
            spread += float(shares[group] ** 2 @ about**2) * size / (size - 1)
    return student_t(degrees) * math.sqrt(spread) if degrees else 0.0


def over_pairs(
    values: Sequence[float], ends: Sequence[tuple[float | None, float | None]], spread: float = 0.0
) -> tuple[float, float | None, float | None]:
    """Mean over pairs of runs with its 95 % interval; ``ends`` are those of each pair, which know its requests alone.

    From `FEWEST_PAIRS` on Student's t over the pairs, of a standard deviation of ``spread`` at least, and never
    narrower than what the pairs' own ends say together: three pairs that happen to agree know no more than their
    requests do. Fewer have no interval: what changes from run to run (restarts, a busy machine) is in none of theirs.
    """
    n, mean = len(values), float(np.mean(values))
    if n < FEWEST_PAIRS:
        return mean, None, None
    between = student_t(n - 1) * max(spread, float(np.std(values, ddof=1))) / math.sqrt(n)
    known = [
        (value - low, high - value)
        for value, (low, high) in zip(values, ends, strict=True)
        if low is not None and high is not None
    ]
    below, above = (float(np.linalg.norm(side)) / n for side in zip(*known, strict=True)) if known else (0.0, 0.0)
    return mean, mean - max(between, below), mean + max(between, above)
