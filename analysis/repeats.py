"""Several runs as one figure: what differs from run to run is in no run's own interval, only between runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.intervals import Quantity
from analysis.likeness import student_t

FEWEST_PAIRS = 3
"""From so many pairs of runs on, intervals of a comparison are those of run to run."""


def over_repeats(quantities: Sequence[Quantity], weights: Sequence[float] | None = None) -> Quantity:
    """One figure over repeats of one point: the mean of the runs' values by weight (default: all alike), with interval.

    What differs from run to run (caches, placement, neighbours) is in no run's own interval; between runs it is. So the
    interval is Student's t of the runs' values, and never narrower than what the runs' own intervals say together. One
    run: its own figure. A run without a value: there is none, for to leave out what failed flatters the rest.
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
    mean = float(shares @ values)
    # the variance of a ratio of sums, by its linear part; with equal weights that of a mean
    between = student_t(runs - 1) * math.sqrt(float(shares**2 @ (values - mean) ** 2) * runs / (runs - 1))

    def reach(ends: Sequence[float | None]) -> float:
        known = [abs(end - value) for end, value in zip(ends, values.tolist(), strict=True) if end is not None]
        own = math.sqrt(float(shares**2 @ np.square(known))) if len(known) == runs else 0.0
        return max(between, own)

    low, high = mean - reach([q.low for q in quantities]), mean + reach([q.high for q in quantities])
    return replace(
        first,
        value=mean,
        low=max(0.0, low) if values.min() >= 0 else low,
        high=high,
        n=n,
        note=f"mean of {runs} runs, interval between runs",
    )


def over_pairs(
    values: Sequence[float], ends: Sequence[tuple[float | None, float | None]]
) -> tuple[float, float | None, float | None]:
    """Mean over pairs of runs with its 95 % interval.

    One or two pairs: from the lowest to the highest end of theirs, which knows nothing of what changes from run to run.
    From three: Student's t over the pairs, which does.
    """
    mean = float(np.mean(values))
    if len(values) >= FEWEST_PAIRS:
        half = student_t(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return mean, mean - half, mean + half
    lows, highs = zip(*ends, strict=True)
    return (
        mean,
        None if None in lows else min(low for low in lows if low is not None),
        None if None in highs else max(high for high in highs if high is not None),
    )
