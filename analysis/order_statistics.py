"""Which places of an ordered sample bracket a percentile, by the binomial law: no shape of the data is assumed.

Of n independent samples the number below percentile p is binomial: x_(l) > percentile happens when fewer than l lie
below it, x_(u) < percentile when at least u do. Between two ranks the tail is interpolated, so that an interval covers
95 % and not "95 % or up to 99 %, as the ranks fall". A size may be an effective one; it is rounded down.
Sources: David and Nagaraja, Order Statistics, section 7.1; Nyblom, Statistics and Probability Letters 14(2), 1992.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.arrays import Floats


def beyond_all(size: float, p: float) -> float:
    """Probability that percentile ``p`` lies beyond all of ``size`` independent samples."""
    return math.pow(p, max(1, int(size)))


def upper_share(size: float, p: float, tail: float, most: float) -> float | None:
    """Share of the ordered sample that lies below percentile ``p`` with probability ``tail`` only.

    Of a small sample the largest may do so more often: up to ``most`` it is taken for the end, beyond there is none.
    """
    n, missed = max(1, int(size)), beyond_all(size, p)
    if missed > most:
        return None
    k, mass = _binomial(n, p)
    at_least = np.cumsum(mass[::-1])[::-1]
    return float(np.interp(-max(tail, missed) * (1 + 1e-9), -at_least, k)) / n


def lower_share(size: float, p: float, tail: float) -> float | None:
    """Share of the ordered sample that lies above percentile ``p`` with probability ``tail`` only; None: none does."""
    n = max(1, int(size))
    k, mass = _binomial(n, p)
    at_most = np.cumsum(mass)
    return float(np.interp(tail, at_most, k + 1.0)) / n if at_most[0] <= tail else None


def _binomial(n: int, p: float) -> tuple[Floats, Floats]:
    """How many of ``n`` samples may lie below percentile ``p``, and the probability of each number."""
    centre, reach = n * p, 12 * math.sqrt(n * p * (1 - p)) + 20
    k = np.arange(max(0, int(centre - reach)), min(n, math.ceil(centre + reach)) + 1)
    steps = np.log((n - k[:-1]) / (k[:-1] + 1)) + math.log(p / (1 - p))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    mass = np.exp(logs - logs.max())
    return k.astype(np.float64), mass / mass.sum()
