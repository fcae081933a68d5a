"""How much sums over a run really vary when requests that follow each other are alike, as those that share a queue are.

n such requests hold less news than n independent ones. All intervals allow for that in one way: sums over overlapping
blocks of the run show how much the data vary, and the critical value knows that few blocks know their own spread only
roughly. Blocks are as short as the likeness of neighbours allows, from a fortieth to a fifth of the run; without any
likeness requests count one by one.
Sources: overlapping batch means, Meketon and Schmeiser, WSC 1984 (their variance is that of the moving-block
bootstrap, Kuensch, Annals of Statistics 17(3), 1989); correction for blocks that are too short, Vats and Flegal,
Biometrika 109(3), 2022; critical values for a fixed share of the run per block, Kiefer and Vogelsang, Econometric
Theory 21(6), 2005; when neighbours are alike at all, Politis and White, Econometric Reviews 23(1), 2004.
"""

from __future__ import annotations

import math

import numpy as np

from harness.analysis.arrays import Floats

ALPHA = 0.05
Z = 1.959963984540054
LONG, CRITICAL = 0.2, 2.6
"""Share of a run per block, and the 97.5 % point of sum / square root of `long_run_variance` for white noise."""
BLOCKS = ((0.025, 2.08), (0.1, 2.30), (LONG, 2.68))
"""The same for shares, 3 % higher since neighbours are alike where these are used. Blocks as short as see samples
nearly independent: more blocks know their own spread better."""
HARDLY_ALIKE = 1.5
"""Nearly independent: up to this many times the variance of independent samples."""
LAGS = 5
"""Neighbours up to so many places apart are asked whether they are alike."""
FEWEST_UNITS = 20
"""Below this many units blocks tell nothing about correlation: they count as independent."""
LARGEST_SKEW = 1.0
"""Of a sum whose spread comes from one block alone; what is beyond is noise."""


def long_run_variance(deviations: Floats, block_share: float = LONG) -> float:
    """Variance of the sum of a series in time order that adds up to zero, neighbours being alike.

    Overlapping blocks of ``block_share`` of the series; the larger of that and of the same with its bias taken out by
    blocks half as long.
    """
    length = max(2, round(len(deviations) * block_share))
    whole, half = (_block_power(deviations, size, 2) for size in (length, length // 2))
    return max(whole, 2 * whole - half)


def share_variance(deviations: Floats, p: float, n: int, queue: bool = False) -> float:
    """Variance of a share ``p`` of ``n`` samples, from per-unit sums of (sample counts - share) in time order.

    Enlarged so that a normal interval from it has the width that a variance from few blocks deserves. Of fewer than
    `FEWEST_UNITS` units: as if these were independent. Units whose neighbours are not alike: as they are, one by one;
    never where they are known to share a ``queue``, whose likeness is small at each distance and large in sum.
    """
    units = len(deviations)
    if units < FEWEST_UNITS:
        independent = p * (1 - p) / n
        if units in (1, n):
            return independent
        between = float(deviations @ deviations) * units / (units - 1) / n**2
        return max(independent, between * (student_t(units - 1) / Z) ** 2)
    one_by_one = float(deviations @ deviations)
    if not queue and not _alike(deviations, one_by_one):
        return one_by_one / n**2
    for block_share, critical in BLOCKS:
        found = long_run_variance(deviations, block_share)
        enlarged = found * (critical / Z) ** 2
        if found < HARDLY_ALIKE * one_by_one:
            break
    return enlarged / n**2


def _alike(deviations: Floats, one_by_one: float) -> bool:
    """Whether any of the first `LAGS` autocorrelations is more than chance would show: beyond 2 sqrt(log10 n / n)."""
    size = len(deviations)
    bound = 2 * math.sqrt(math.log10(size) / size) * one_by_one
    return any(abs(float(deviations[k:] @ deviations[:-k])) >= bound > 0 for k in range(1, LAGS + 1))


def autocorrelation(deviations: Floats) -> float:
    """Mean autocorrelation of the first `LAGS` neighbours, 0 to 1: what part of the spread a queue explains."""
    one_by_one = float(deviations @ deviations)
    if one_by_one <= 0 or len(deviations) <= LAGS:
        return 1.0
    found = [float(deviations[k:] @ deviations[:-k]) / one_by_one for k in range(1, LAGS + 1)]
    return min(1.0, max(0.0, float(np.mean(found))))


def _block_power(deviations: Floats, length: int, power: int) -> float:
    """Mean of block sums to a power, scaled to the whole series."""
    sums = _moving_sums(deviations, length)
    return float((sums**power).mean()) * len(deviations) / length


def skew_of(deviations: Floats, variance: float) -> float:
    """Skewness of the sum of a series, from blocks of a twentieth; within `LARGEST_SKEW`.

    Half as much again as these blocks show: few of them seldom hold a fair share of the largest values.
    """
    third = _block_power(deviations / math.sqrt(variance), max(1, len(deviations) // 20), 3)
    return max(-LARGEST_SKEW, min(LARGEST_SKEW, 1.5 * third))


def _moving_sums(values: Floats, length: int) -> Floats:
    running: Floats = np.concatenate(([0.0], np.cumsum(values)))
    sums: Floats = running[length:] - running[:-length]
    return sums


def student_t(degrees: int) -> float:
    """97.5 % quantile of Student's t, within 0.5 %. Source: Abramowitz and Stegun, table 26.10 and 26.7.5."""
    if degrees <= 3:
        return (12.706, 4.303, 3.182)[degrees - 1]
    z = Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def effective_n(variance: float, p: float, n: int) -> float:
    """Independent samples that would know a share ``p`` as well as these ``n`` with that variance do; at most n."""
    return float(n) if variance <= 0 else min(float(n), max(1.0, p * (1 - p) / variance))
