"""Which places of an ordered sample bracket a percentile, by the binomial law: no shape of the data is assumed.

Of n independent samples the number below percentile p is binomial: x_(l) > percentile happens when fewer than l lie
below it, x_(u) < percentile when at least u do. Between two ranks the tail is interpolated, so that an interval covers
95 % and not "95 % or up to 99 %, as the ranks fall". A size may be an effective one; it is rounded down.
Sources: David and Nagaraja, Order Statistics, section 7.1; Nyblom, Statistics and Probability Letters 14(2), 1992.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.stats.autocorrelation import ALPHA, effective_n

TAIL_FROM = (0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares at which the likeness of slow requests is read, to follow it into the tail."""


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


def tail_variances(
    quantile: Callable[[float], float], variance: Callable[[float, float], float], p: float, n: int
) -> tuple[float, float]:
    """Variance of the share below percentile ``p`` for its lower and its upper end; arguments as of `percentile_ends`.

    Beyond p90 few samples tell how slow requests cluster. Likeness (the variance in that of independent samples) goes
    as a power of the share beyond, which in a queue stays level into the tail and in normal noise fades: it is read
    along a straight line of logarithms from `TAIL_FROM` on. A run that saw no bad burst shows fading that is not there:
    the upper end follows none beyond the last share read. Source: Ledford and Tawn, Biometrika 83(1), 1996.
    """
    if p <= TAIL_FROM[-2]:
        found = variance(quantile(p), p)
        return found, found
    shares = [q for q in TAIL_FROM if q < p]
    likeness = [math.log(max(1 / n, variance(quantile(q), q) / (q * (1 - q)))) for q in shares]
    slope, start = np.polyfit([math.log(1 - q) for q in shares], likeness, 1)
    followed, held = (
        p * (1 - p) * max(1 / n, math.exp(start + slope * math.log(1 - q))) for q in (p, min(p, TAIL_FROM[-1]))
    )
    return followed, max(followed, held)


def percentile_ends(
    quantile: Callable[[float], float], variance: Callable[[float, float], float], p: float, n: int
) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of percentile ``p`` of ``n`` samples; None where the sample cannot give that end.

    ``quantile`` gives the sample's value at a share, ``variance`` the `share_variance` at or below a value. An end lies
    between two ranks: to take the next one would let the lower end of few samples miss up to twice as often. It is
    judged by the variance there as well as at the percentile: slow requests come in bursts, and at a percentile that
    missed some of them they look rarer than they are. Far out, where more lies beyond the lower end than 1 - p, that
    alone is no news: there likeness is compared. The upper end comes first: near the smallest supported sample it is
    the maximum, and the lower one gets what is left of the 5 %; all of it where there is no upper end.
    """
    for_low, for_high = tail_variances(quantile, variance, p, n)

    def between(share: float) -> float:
        place = round(share * n, 6)
        low, high = (quantile(min(n, max(1, rank)) / n) for rank in (math.floor(place), math.ceil(place)))
        return low + place % 1 * (high - low)

    def end_of(rank_share: Callable[[float], float | None], middle: float) -> float | None:
        worst, end, alike = middle, None, middle >= 2 * p * (1 - p) / n
        for _ in range(2):
            share = rank_share(effective_n(worst, p, n))
            if share is None:
                return None
            end, there = between(share), variance(quantile(share), p)
            if TAIL_FROM[-1] < p and share < p:
                there *= p * (1 - p) / (share * (1 - share))
            if there <= worst:
                break
            worst = there if alike else math.sqrt(there * worst)
        return end

    sizes: list[float] = []

    def upper(size: float) -> float | None:
        sizes.append(size)
        return upper_share(size, p, ALPHA / 2, ALPHA)

    high = end_of(upper, for_high)
    tail = ALPHA - max(ALPHA / 2, beyond_all(sizes[-1], p)) if high is not None else ALPHA
    return end_of(lambda size: lower_share(size, p, tail), for_low), high
