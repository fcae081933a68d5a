"""A value and how far to trust it: sample-size rules, order statistics, batch means. Everything is 95 %.

Requests that follow each other are alike (they share a queue), so n requests hold less news than n independent ones.
All intervals allow for that in one way: sums over overlapping blocks of the run show how much the data really vary,
and the critical value knows that few blocks know their own spread only roughly. Blocks are as short as the likeness of
neighbours allows, from a fortieth to a fifth of the run; without any likeness requests count one by one.
Sources: overlapping batch means, Meketon and Schmeiser, WSC 1984 (their variance is that of the moving-block
bootstrap, Kuensch, Annals of Statistics 17(3), 1989); correction for blocks that are too short, Vats and Flegal,
Biometrika 109(3), 2022; critical values for a fixed share of the run per block, Kiefer and Vogelsang, Econometric
Theory 21(6), 2005; when neighbours are alike at all, Politis and White, Econometric Reviews 23(1), 2004. How often the
intervals cover: METRICS.md, tests/test_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from analysis import arrays
from analysis.arrays import Bools, Floats, Ints
from analysis.order_statistics import beyond_all, lower_share, upper_share

ALPHA = 0.05
Z = 1.959963984540054
RESAMPLES = 1000
MAX_UNITS = 1000
"""Longer series are first summed into this many equal parts in time."""
MAX_FLAGS = 1_000_000
LONG, CRITICAL = 0.2, 2.6
"""Share of a run per block, and the 97.5 % point of sum / square root of `long_run_variance` for white noise."""
SHORT, CRITICAL_SHORT = 0.1, 2.23
"""The same for data that are hardly alike: more blocks, so their spread is known better."""
BRIEF, CRITICAL_BRIEF = 0.025, 2.02
"""The same where short blocks already see nearly independent samples."""
HARDLY_ALIKE = 1.5
"""Up to this many times the variance of independent samples."""
LAGS = 5
"""Neighbours up to so many places apart are asked whether they are alike."""
FEWEST_UNITS = 20
"""Below this many units blocks tell nothing about correlation: they count as independent."""
LARGEST_SKEW = 2.0
MIN_SAMPLES = 5
"""Below this many samples a mean or rate has no interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure: value in ``unit`` with its 95 % interval [low, high] from ``n`` samples.

    None is "not known", never 0; ``note`` then says why. ``evidence`` says where it comes from: measured, simulated,
    list price.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    unit: str
    note: str | None = None
    evidence: str

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a quantity in {self.unit} is {number}; not known must be None")


def scaled(q: Quantity, factor: float) -> Quantity:
    """The quantity and its interval times a constant."""
    value, low, high = (None if x is None else x * factor for x in (q.value, q.low, q.high))
    return replace(q, value=value, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles of one metric."""

    unit: str
    mean: Quantity
    p50: Quantity
    p90: Quantity
    p95: Quantity
    p99: Quantity


def samples_needed(p: float) -> int:
    """Samples before percentile ``p`` (0.5 <= p < 1) is reported: ceil(ln 0.05 / ln p), so 5, 29, 59, 299.

    With that many, the largest sample lies above the true percentile with 95 % probability; with fewer, the "p99" of a
    sample is simply its maximum. Source: Wilks, Annals of Mathematical Statistics 12(1), 1941; MLPerf Inference sizes
    its runs by the same binomial argument (with a narrower margin).
    """
    return math.ceil(math.log(ALPHA) / math.log(p))


def distribution(
    values: Floats, *, unit: str, evidence: str, owners: Ints, weights: Floats | None = None, noun: str = "requests"
) -> Distribution:
    """Mean and percentiles of ``values``, NaN left out, each with interval.

    ``owners`` gives the place in time of the request each value belongs to; values of one request are kept together
    when spread is judged. ``weights``: a value counts as that many equal samples. A percentile is an observed value:
    the smallest with at least the share p of all samples at or below it.
    """
    known = arrays.finite(values)
    if not known.all():
        values, owners = arrays.kept(values, known), arrays.kept(owners, known)
        weights = None if weights is None else weights[known]
    n = len(values) if weights is None else round(float(weights.sum()))
    blank = Quantity(value=None, n=n, unit=unit, evidence=evidence, note=f"no {noun} to measure")
    if not n:
        return Distribution(unit=unit, mean=blank, p50=blank, p90=blank, p95=blank, p99=blank)
    units, total = _units(owners)
    quantile, beyond = _ordered(values, units, total) if weights is None else _weighted(values, units, total, weights)
    count = np.bincount(units, weights=weights, minlength=total).astype(np.float64)

    @cache
    def variance(value: float, p: float) -> float:
        below = count - beyond(value)
        return share_variance(below - count * (below.sum() / n), p, n)

    def percentile(p: float) -> Quantity:
        needed = samples_needed(p)
        if n < needed:
            return replace(blank, note=f"needs {needed} {noun}, has {n}")
        value = quantile(p)
        worth = effective_n(tail_variance(quantile, variance, p), p, n)
        if worth * (1 - p) < 1:
            return replace(blank, note=f"needs {needed} independent {noun}: these {n:,} are worth about {worth:.0f}")
        low, high = percentile_ends(quantile, variance, p, n) if total >= MIN_SAMPLES else (None, None)
        note = None if low is not None and high is not None else f"too few independent {noun} for both ends"
        high = None if high is None else max(value, high)  # the value is an observed one, at or above its share
        return replace(blank, value=value, low=low, high=high, note=note)

    each = values if weights is None else weights * values
    sums = np.bincount(units, weights=each, minlength=total).astype(np.float64)
    mean = float(sums.sum() / count.sum())
    low, high = ratio_interval(sums, count)
    note = None if low is not None else f"interval needs {MIN_SAMPLES} requests"
    return Distribution(
        unit=unit,
        mean=replace(blank, value=mean, low=low, high=high, note=note),
        p50=percentile(0.50), p90=percentile(0.90), p95=percentile(0.95), p99=percentile(0.99),
    )  # fmt: skip


Sample = tuple[Callable[[float], float], Callable[[float], Floats]]
"""The value at a share of a sample, and how many of each unit's samples lie beyond a value."""


def _ordered(values: Floats, units: Ints, total: int) -> Sample:
    ranked, n = arrays.ranked(values), len(values)

    def quantile(p: float) -> float:
        return float(ranked[min(n, max(1, math.ceil(n * p * (1 - 1e-12)))) - 1])

    def beyond(value: float) -> Floats:
        found = np.zeros(total)
        for part in arrays.blocks(n):
            found += np.bincount(units[part][values[part] > value], minlength=total)
        return found

    return quantile, beyond


def _weighted(values: Floats, units: Ints, total: int, weights: Floats) -> Sample:
    order = np.argsort(values, kind="stable")
    ranked, ranked_weights, ranked_units = values[order], weights[order], units[order]
    cumulative = np.cumsum(ranked_weights)

    def beyond(value: float) -> Floats:
        first = int(np.searchsorted(ranked, value, side="right"))
        found = np.bincount(ranked_units[first:], weights=ranked_weights[first:], minlength=total)
        return found.astype(np.float64)

    return lambda p: _quantile(ranked, cumulative, p), beyond


def _units(owners: Ints) -> tuple[Ints, int]:
    """Unit of each value, numbered in time without a gap, at most `MAX_UNITS`, and how many units there are."""
    present = arrays.zeros(int(owners.max()) + 1, np.bool_)
    present[owners] = True
    place = arrays.running(len(present), lambda part: present[part], np.int64)
    total = int(place[-1])
    parts = min(total, MAX_UNITS)
    return arrays.filled(len(owners), lambda part: (place[owners[part]] - 1) * parts // total, np.int64), parts


def rate(per_bin: Floats, bin_s: float, *, n: int, unit: str, evidence: str, note: str | None = None) -> Quantity:
    """Events or tokens per second over equal time bins of ``bin_s``, with interval; ``n`` events were counted.

    The interval says what another run of the same length and shape could have shown, ramp and drain as in this one.
    """
    value = float(per_bin.sum() / (bin_s * len(per_bin)))
    low, high = ratio_interval(per_bin, np.full(len(per_bin), bin_s)) if n >= MIN_SAMPLES else (None, None)
    if low is None:
        note = "; ".join(filter(None, (note, f"interval needs {MIN_SAMPLES} requests")))
    return Quantity(value=value, low=low, high=high, n=n, unit=unit, note=note, evidence=evidence)


def share(flags: Bools, *, unit: str, evidence: str) -> Quantity:
    """Share of True among ``flags`` (in time order), Wilson interval at the effective sample size.

    Source: Wilson, Journal of the American Statistical Association 22(158), 1927. It stays honest at 0 % and 100 %,
    where a bootstrap would claim certainty.
    """
    n = len(flags)
    if not n:
        return Quantity(value=None, n=0, unit=unit, evidence=evidence, note="no requests")
    p = float(flags.mean())
    size = effective_n(share_variance(_beyond_share(flags, p), p, n), p, n) if 0 < p < 1 else float(n)
    centre = (p + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(p * (1 - p) / size + Z**2 / (4 * size**2))
    # the ends are exact at 0 and 1, where rounding could put them past the value
    low, high = (min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))
    return Quantity(value=p, low=low, high=high, n=n, unit=unit, evidence=evidence)


def _beyond_share(flags: Bools, p: float) -> Floats:
    """What each flag, or each of `MAX_FLAGS` equal parts of a longer series, adds beyond the share ``p``."""
    if len(flags) <= MAX_FLAGS:
        return flags.astype(np.float64) - p
    sums = np.zeros(MAX_FLAGS)
    for part in arrays.blocks(len(flags)):
        place = np.arange(part.start, part.stop) * MAX_FLAGS // len(flags)
        sums[place[0] : place[-1] + 1] += np.bincount(place - place[0], weights=flags[part] - p)
    return sums


def ratio_interval(numerator: Floats, denominator: Floats) -> tuple[float | None, float | None]:
    """95 % interval of sum(numerator) / sum(denominator) of a series in time order.

    Batch means of what each unit adds beyond the ratio; the wider of a logarithmic interval and one with Hall's
    correction for skewed sums, since with few blocks the skew itself is only roughly known. Below `FEWEST_UNITS` units
    Student's t of independent units. (None, None) below `MIN_SAMPLES` units or without a denominator.
    Source: Hall, Journal of the Royal Statistical Society B 54(1), 1992.
    """
    if len(numerator) > MAX_UNITS:
        edges = np.linspace(0, len(numerator), MAX_UNITS, endpoint=False).astype(np.int64)
        numerator, denominator = np.add.reduceat(numerator, edges), np.add.reduceat(denominator, edges)
    units, total = len(numerator), float(denominator.sum())
    if units < MIN_SAMPLES or total <= 0:
        return None, None
    value = float(numerator.sum()) / total
    beyond = numerator - value * denominator
    if units < FEWEST_UNITS:
        variance, critical = float((beyond**2).sum()) * units / (units - 1), student_t(units - 1)
    else:
        variance, critical = long_run_variance(beyond), CRITICAL
    error = math.sqrt(variance) / total
    if error <= 1e-12 * abs(value):
        return value, value
    low, high = (value - error * _hall(t, _skew(beyond, variance)) for t in (critical, -critical))
    if value > 0 and numerator.min() >= 0:
        reach = math.exp(min(critical * error / value, 50.0))
        low, high = min(low, value / reach) if low > 0 else value / reach, max(high, value * reach)
    return min(value, low), max(value, high)


def long_run_variance(deviations: Floats, block_share: float = LONG) -> float:
    """Variance of the sum of a series in time order that adds up to zero, neighbours being alike.

    Overlapping blocks of ``block_share`` of the series; the larger of that and of the same with its bias taken out by
    blocks half as long.
    """
    length = max(2, round(len(deviations) * block_share))
    whole, half = (_block_power(deviations, size, 2) for size in (length, length // 2))
    return max(whole, 2 * whole - half)


def share_variance(deviations: Floats, p: float, n: int) -> float:
    """Variance of a share ``p`` of ``n`` samples, from per-unit sums of (sample counts - share) in time order.

    Enlarged so that a normal interval from it has the width that a variance from few blocks deserves. Of fewer than
    `FEWEST_UNITS` units: as if these were independent. Units whose neighbours are not alike: as they are, one by one.
    """
    units = len(deviations)
    if units < FEWEST_UNITS:
        independent = p * (1 - p) / n
        if units in (1, n):
            return independent
        between = float(deviations @ deviations) * units / (units - 1) / n**2
        return max(independent, between * (student_t(units - 1) / Z) ** 2)
    one_by_one = float(deviations @ deviations)
    if not _alike(deviations, one_by_one):
        return one_by_one / n**2
    for block_share, critical in ((BRIEF, CRITICAL_BRIEF), (SHORT, CRITICAL_SHORT)):
        found = long_run_variance(deviations, block_share)
        if found < HARDLY_ALIKE * one_by_one:
            return found / n**2 * (critical / Z) ** 2
    return long_run_variance(deviations) / n**2 * (CRITICAL / Z) ** 2


def _alike(deviations: Floats, one_by_one: float) -> bool:
    """Whether any of the first `LAGS` autocorrelations is more than chance would show: beyond 2 sqrt(log10 n / n)."""
    size = len(deviations)
    bound = 2 * math.sqrt(math.log10(size) / size) * one_by_one
    return any(abs(float(deviations[k:] @ deviations[:-k])) >= bound > 0 for k in range(1, LAGS + 1))


def _block_power(deviations: Floats, length: int, power: int) -> float:
    """Mean of block sums to a power, scaled to the whole series."""
    sums = _moving_sums(deviations, length)
    return float((sums**power).mean()) * len(deviations) / length


def _skew(deviations: Floats, variance: float) -> float:
    """Skewness of the sum of a series, from blocks of a tenth; within `LARGEST_SKEW`."""
    third = _block_power(deviations, max(1, len(deviations) // 10), 3)
    return max(-LARGEST_SKEW, min(LARGEST_SKEW, third / math.pow(variance, 1.5)))


def _hall(t: float, skew: float) -> float:
    """The quantile ``t`` of a symmetric statistic, as one of a statistic with that skewness."""
    if abs(skew) < 1e-6:
        return t
    return float((np.cbrt(1 + skew * (t - skew / 6)) - 1) * 3 / skew)


def _moving_sums(values: Floats, length: int) -> Floats:
    running: Floats = np.concatenate(([0.0], np.cumsum(values)))
    sums: Floats = running[length:] - running[:-length]
    return sums


def ends_of_resamples(draws: Floats, value: float, blocks: int) -> tuple[float, float]:
    """95 % interval of a figure from its bootstrap ``draws`` over ``blocks`` blocks; the value lies inside.

    Percentiles of the draws, widened by Student's t: that few blocks know their own spread only roughly.
    """
    low, high = (float(q) for q in np.quantile(draws, (ALPHA / 2, 1 - ALPHA / 2)))
    widen = math.sqrt(blocks / (blocks - 1)) * student_t(blocks - 1) / Z if blocks > 1 else math.inf
    return min(value, value - (value - low) * widen), max(value, value + (high - value) * widen)


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


def tail_variance(quantile: Callable[[float], float], variance: Callable[[float, float], float], p: float) -> float:
    """Variance of the share below percentile ``p``; arguments as of `percentile_ends`.

    Beyond p90 few samples tell how slow requests cluster: where p90 or p95 show more likeness than the percentile
    itself, the geometric mean of both counts. In a queue the likeness stays that high to the end of the tail; where it
    fades (normal noise) the interval comes out a little wide.
    """
    here = variance(quantile(p), p)
    below = max((variance(quantile(q), q) * p * (1 - p) / (q * (1 - q)) for q in (0.90, 0.95) if q < p), default=here)
    return math.sqrt(here * max(here, below))


def percentile_ends(
    quantile: Callable[[float], float], variance: Callable[[float, float], float], p: float, n: int
) -> tuple[float | None, float | None]:
    """Ends of the 95 % interval of percentile ``p`` of ``n`` samples; None where the sample cannot give that end.

    ``quantile`` gives the sample's value at a share, ``variance`` the `share_variance` at or below a value. An end lies
    between two ranks: to take the next one would let the lower end of few samples miss up to twice as often. It is
    judged by the variance there as well as at the percentile: slow requests come in bursts, and at a percentile that
    missed some of them they look rarer than they are. The upper end comes first: near the smallest supported sample it
    is the maximum, and the lower one gets what is left of the 5 %; all of it where there is no upper end.
    """
    middle = tail_variance(quantile, variance, p)
    alike = middle >= HARDLY_ALIKE * p * (1 - p) / n * (CRITICAL_SHORT / Z) ** 2

    def between(share: float) -> float:
        place = round(share * n, 6)
        low, high = (quantile(min(n, max(1, rank)) / n) for rank in (math.floor(place), math.ceil(place)))
        return low + place % 1 * (high - low)

    def end_of(rank_share: Callable[[float], float | None]) -> float | None:
        worst, end = middle, None
        for _ in range(2):
            share = rank_share(effective_n(worst, p, n))
            if share is None:
                return None
            end, there = between(share), variance(quantile(share), p)
            if there <= worst:
                break
            worst = there if alike else math.sqrt(there * worst)
        return end

    sizes: list[float] = []

    def upper(size: float) -> float | None:
        sizes.append(size)
        return upper_share(size, p, ALPHA / 2, ALPHA)

    high = end_of(upper)
    tail = ALPHA - max(ALPHA / 2, beyond_all(sizes[-1], p)) if high is not None else ALPHA
    return end_of(lambda size: lower_share(size, p, tail)), high


def _quantile(ranked: Floats, cumulative: Floats, p: float) -> float:
    """Smallest value with at least the share ``p`` of all weight at or below it."""
    target = float(cumulative[-1]) * p
    return float(ranked[min(len(ranked) - 1, int(np.searchsorted(cumulative, target * (1 - 1e-12))))])
