"""A value and how far to trust it: sample-size rules, percentiles, means, rates, shares. Everything is 95 %.

How much neighbours in time are alike is asked in `analysis.stats.autocorrelation`, which ranks bracket a percentile in
`analysis.stats.order_statistics`. How often the intervals cover: INTERVALS.md, tests/test_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.stats.autocorrelation import (
    ALPHA,
    CRITICAL,
    FEWEST_UNITS,
    Z,
    autocorrelation,
    effective_n,
    long_run_variance,
    share_variance,
    skew_of,
    student_t,
)
from harness.analysis.stats.order_statistics import percentile_ends
from harness.analysis.stats.relaxation import ClosedLoop, Memory, Relaxation

RESAMPLES = 1000
MAX_UNITS = 1000
"""Longer series are first summed into this many equal parts in time."""
MAX_FLAGS = 1_000_000
ROUNDING = 1e-9
"""By so large a share may two ways to the same figure differ."""
TAIL_ALIKE = 1.5
"""A run understates how alike its requests are by up to so much: it is judged about its own mean."""
WAITING = 0.25
"""Likeness of slow requests that the queue decides, at the least: a run may have seen none that waited for others."""
FEW = 20
"""Fewer flags of one kind say little of how alike they are: in an open loop the queue then counts in full."""
MIN_SAMPLES = 5
"""Below this many samples a mean or rate has no interval."""
Evidence = Literal["measured", "simulated", "plan", "measured x list price", "simulated x list price"]
"""Where a figure comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure: value in ``unit`` with its 95 % interval [low, high] from ``n`` samples.

    None is "not known", never 0; ``note`` then says why. A value outside its own interval raises ValueError, so that no
    report can show one.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    unit: str
    note: str | None = None
    evidence: Evidence
    needed: int | None = None
    """Samples that the figure needs, where there are too few for it; else None."""
    worth: int | None = None
    """Independent samples that the ``n`` are worth, where there are too few for that alone; else None."""

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a quantity in {self.unit} is {number}; not known must be None")
        if self.value is not None:
            low, high = (self.value if end is None else end for end in (self.low, self.high))
            if max(low - self.value, self.value - high) > ROUNDING * abs(self.value):
                raise ValueError(f"{self.value} {self.unit} lies outside its own interval, {self.low} to {self.high}")


def without_interval(q: Quantity, why: str | None) -> Quantity:
    """The quantity without ends, ``why`` in its note; as it is when that is None."""
    if why is None or q.value is None:
        return q
    return replace(q, low=None, high=None, note="; ".join(filter(None, (q.note, why))))


def at_list_price(evidence: Evidence) -> Evidence:
    """Where a price comes from that was made of a figure and a list price."""
    return "simulated x list price" if evidence.startswith("simulated") else "measured x list price"


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
    values: Floats,
    *,
    unit: str,
    evidence: Evidence,
    owners: Ints,
    weights: Floats | None = None,
    noun: str = "requests",
    queue: Memory | None = None,
    waits: bool = False,
) -> Distribution:
    """Mean and percentiles of ``values``, NaN left out, each with interval.

    ``owners`` gives the place in time of the request each value belongs to; values of one request are kept together
    when spread is judged. ``weights``: a value counts as that many equal samples. A percentile is an observed value:
    the smallest with at least the share p of all samples at or below it. ``queue``: the memory of the run that the
    values come from; where the run is too short for that no figure has an interval. ``waits``: what is slow waited for
    others, as a late first token did.

    The first requests of a closed loop come all at once, as none does later: intervals of values by request, one each,
    hold with and without them.
    """
    known = np.isfinite(values)
    if not known.all():
        values, owners = values[known], owners[known]
        weights = None if weights is None else weights[known]

    def of(values: Floats, owners: Ints) -> Distribution:
        return _distribution(values, unit, evidence, owners, weights, noun, queue, waits)

    whole = of(values, owners)
    if isinstance(queue, ClosedLoop) and weights is None and len(values) > 2 * queue.concurrency:
        later = owners >= queue.concurrency
        part = of(values[later], owners[later])
        return Distribution(
            unit=unit, mean=holding_both(whole.mean, part.mean), p50=holding_both(whole.p50, part.p50),
            p90=holding_both(whole.p90, part.p90), p95=holding_both(whole.p95, part.p95),
            p99=holding_both(whole.p99, part.p99),
        )  # fmt: skip
    return whole


def holding_both(whole: Quantity, part: Quantity) -> Quantity:
    """The whole run's figure with an interval that holds that of a part of it, too; ends as they are where a part has
    none.
    """
    low = whole.low if whole.low is None or part.low is None else min(whole.low, part.low)
    high = whole.high if whole.high is None or part.high is None else max(whole.high, part.high)
    return replace(whole, low=low, high=high)


def _distribution(
    values: Floats, unit: str, evidence: Evidence, owners: Ints, weights: Floats | None, noun: str,
    queue: Memory | None, waits: bool,
) -> Distribution:  # fmt: skip
    n = len(values) if weights is None else round(float(weights.sum()))
    blank = Quantity(value=None, n=n, unit=unit, evidence=evidence, note=f"no {noun} to measure")
    if not n:
        return Distribution(unit=unit, mean=blank, p50=blank, p90=blank, p95=blank, p99=blank)
    units, total = _units(owners)
    quantile, beyond = _sample(values, units, total, weights)
    count = np.bincount(units, weights=weights, minlength=total).astype(np.float64)

    short = None if queue is None else queue.note
    # units may be several requests each; likeness of slow requests is that of the middle at least: the tail shows less
    alike = 0.0 if short else _alike_units(queue, total, int(owners.max()) + 1)

    def deviations(value: float) -> Floats:
        below = count - beyond(value)
        apart: Floats = below - count * (below.sum() / n)
        return apart

    middle = autocorrelation(deviations(quantile(0.5))) if alike else 0.0

    @cache
    def seen(value: float, p: float) -> float:
        return share_variance(deviations(value), p, n, queue is not None)

    @cache
    def variance(value: float, p: float) -> float:
        if not alike:
            return seen(value, p)
        each, least = deviations(value), WAITING if waits and p > 0.5 else middle
        return max(seen(value, p), float(each @ each) / n**2 * (1 + max(middle, least, autocorrelation(each)) * alike))

    def percentile(p: float, below: Quantity | None = None) -> Quantity:
        """``below``: the next lower percentile. Without that one there is none: they need ever more samples."""
        needed = samples_needed(p)
        if n < needed:
            return replace(blank, note=f"needs {needed} {noun}, has {n}", needed=needed)
        if below is not None and below.value is None:
            return replace(blank, note=below.note, needed=below.needed, worth=below.worth)
        value = quantile(p)
        worth = effective_n(seen(value, p), p, n)
        if worth * (1 - p) < 1:
            why = f"needs {needed} independent {noun}: these {n:,} are worth about {worth:.0f}"
            return replace(blank, note=why, needed=needed, worth=round(worth))
        if short:
            return replace(blank, value=value, note=short)
        low, high = percentile_ends(quantile, variance, p, n) if total >= MIN_SAMPLES else (None, None)
        note = None if low is not None and high is not None else f"too few independent {noun} for both ends"
        # the value is an observed one, at or above its share; of very few independent samples the share of the lower
        # end may lie above it, and then the value itself is the safe one
        low, high = None if low is None else min(value, low), None if high is None else max(value, high)
        return replace(blank, value=value, low=low, high=high, note=note)

    p90 = percentile(0.90, p50 := percentile(0.50))
    p99 = percentile(0.99, p95 := percentile(0.95, p90))

    each = values if weights is None else weights * values
    sums = np.bincount(units, weights=each, minlength=total).astype(np.float64)
    mean = float(sums.sum() / count.sum())
    low, high = ratio_interval(sums, count, alike)
    note = None if low is not None else f"interval needs {MIN_SAMPLES} requests"
    return Distribution(
        unit=unit,
        mean=without_interval(replace(blank, value=mean, low=low, high=high, note=note), short),
        p50=p50, p90=p90, p95=p95, p99=p99,
    )  # fmt: skip


def _alike_units(queue: Memory | None, units: int, requests: int) -> float:
    """Units that an open loop's queue makes alike. A closed loop's shows in what its neighbours have in common."""
    return TAIL_ALIKE * queue.alike * units / requests if isinstance(queue, Relaxation) else 0.0


Sample = tuple[Callable[[float], float], Callable[[float], Floats]]
"""The value at a share of a sample, and how many of each unit's samples lie beyond a value."""


def _sample(values: Floats, units: Ints, total: int, weights: Floats | None) -> Sample:
    order = np.argsort(values)
    ranked, ranked_units, ranked_weights = values[order], units[order], None if weights is None else weights[order]
    # 1, 2, 3 ... without weights
    cumulative = np.arange(1, len(values) + 1) if ranked_weights is None else np.cumsum(ranked_weights)

    def quantile(p: float) -> float:
        """Smallest value with at least the share ``p`` of all weight at or below it."""
        target = float(cumulative[-1]) * p * (1 - 1e-12)
        return float(ranked[min(len(ranked) - 1, int(np.searchsorted(cumulative, target)))])

    def beyond(value: float) -> Floats:
        first = int(np.searchsorted(ranked, value, side="right"))
        more = None if ranked_weights is None else ranked_weights[first:]
        return np.bincount(ranked_units[first:], weights=more, minlength=total).astype(np.float64)

    return quantile, beyond


def _units(owners: Ints) -> tuple[Ints, int]:
    """Unit of each value, numbered in time without a gap, at most `MAX_UNITS`, and how many units there are."""
    present = np.zeros(int(owners.max()) + 1, np.bool_)
    present[owners] = True
    place = np.cumsum(present)
    total = int(place[-1])
    parts = min(total, MAX_UNITS)
    return ((place[owners] - 1) * parts // total), parts


def rate(per_bin: Floats, bin_s: float, *, n: int, unit: str, evidence: Evidence, note: str | None = None) -> Quantity:
    """Events or tokens per second over equal time bins of ``bin_s``, with interval; ``n`` events were counted.

    The interval says what another run of the same length and shape could have shown, ramp and drain as in this one.
    """
    value = float(per_bin.sum() / (bin_s * len(per_bin)))
    low, high = ratio_interval(per_bin, np.full(len(per_bin), bin_s)) if n >= MIN_SAMPLES else (None, None)
    if low is None:
        note = "; ".join(filter(None, (note, f"interval needs {MIN_SAMPLES} requests")))
    return Quantity(value=value, low=low, high=high, n=n, unit=unit, note=note, evidence=evidence)


def share(flags: Bools, *, unit: str, evidence: Evidence, queue: Memory | None = None) -> Quantity:
    """Share of True among ``flags`` (in time order), Wilson interval at the effective sample size.

    ``queue``: the memory of the run. With it flags that hardly differ count as alike as the queue makes them, and a run
    too short for it has no interval.
    Source: Wilson, Journal of the American Statistical Association 22(158), 1927. It stays honest at 0 % and 100 %,
    where a bootstrap would claim certainty.
    """
    n = len(flags)
    if not n:
        return Quantity(value=None, n=0, unit=unit, evidence=evidence, note="no requests")
    p = int(flags.sum()) / n
    if queue is not None and queue.note:
        return Quantity(value=p, n=n, unit=unit, evidence=evidence, note=queue.note)
    low, high = _share_ends(flags, p, queue)
    if isinstance(queue, ClosedLoop) and 0 < p < 1 and n > 2 * queue.concurrency:
        # its first requests come all at once, as none does later: the interval holds with and without them
        rest = flags[queue.concurrency :]
        later_low, later_high = _share_ends(rest, int(rest.sum()) / len(rest), queue)
        low, high = min(low, later_low), max(high, later_high)
    return Quantity(value=p, low=low, high=high, n=n, unit=unit, evidence=evidence)


def _share_ends(flags: Bools, p: float, queue: Memory | None) -> tuple[float, float]:
    """Wilson's interval of the share ``p`` of True at the effective size."""
    n, true = len(flags), int(flags.sum())
    alike, size = 0.0 if queue is None else queue.alike, float(n)
    if 0 < p < 1:
        beyond = _beyond_share(flags, p)
        seen, few = autocorrelation(beyond), min(true, n - true) < FEW
        if few:  # an open loop may have missed its bad stretch; those of a closed loop show less of it than there is
            seen = 1.0 if isinstance(queue, Relaxation) else min(1.0, 2 * seen)
        alike *= seen * len(beyond) / n
        size = effective_n(
            max(share_variance(beyond, p, n, queue is not None), float(beyond @ beyond) / n**2 * (1 + alike)), p, n
        )
    elif alike:
        size = max(1.0, n / (1 + alike))
    centre = (p + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(p * (1 - p) / size + Z**2 / (4 * size**2))
    # the ends are exact at 0 and 1, where rounding could put them past the value
    low, high = (min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))
    return low, high


def _beyond_share(flags: Bools, p: float) -> Floats:
    """What each flag, or each of `MAX_FLAGS` equal parts of a longer series, adds beyond the share ``p``."""
    if len(flags) <= MAX_FLAGS:
        return flags.astype(np.float64) - p
    return np.bincount(np.arange(len(flags)) * MAX_FLAGS // len(flags), weights=flags - p).astype(np.float64)


def ratio_interval(numerator: Floats, denominator: Floats, alike: float = 0.0) -> tuple[float | None, float | None]:
    """95 % interval of sum(numerator) / sum(denominator) of a series in time order.

    ``alike``: units that a queue makes alike.

    Batch means of what each unit adds beyond the ratio. Where nothing is negative the interval is one of logarithms: it
    stays positive, and the inverse (a price) has the inverse ends. The end on the side of the skew lies farther out by
    Johnson's shift; the other stays, since few blocks know the skew only roughly. Below `FEWEST_UNITS` units Student's
    t of independent units. (None, None) below `MIN_SAMPLES` units or without a denominator.
    Source: Johnson, Journal of the American Statistical Association 73(363), 1978.
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
        if alike:
            variance = max(
                variance, float(beyond @ beyond) * (1 + autocorrelation(beyond) * alike) * (Z / CRITICAL) ** 2
            )
    error = math.sqrt(variance) / total
    if error <= 1e-12 * abs(value):
        return value, value
    skew, shift = skew_of(beyond, variance), error * (1 + 2 * critical**2) / 6
    below, above = shift * max(0.0, -skew), shift * max(0.0, skew)
    if value > 0 and numerator.min() >= 0:
        reach = math.exp(min(critical * error / value, 50.0))
        return value / (reach + below / value), value * reach + above
    return value - critical * error - below, value + critical * error + above


def ends_of_resamples(draws: Floats, value: float, blocks: int) -> tuple[float, float]:
    """95 % interval of a figure from its bootstrap ``draws`` over ``blocks`` blocks; the value lies inside.

    Percentiles of the draws, widened by Student's t: that few blocks know their own spread only roughly.
    """
    low, high = (float(q) for q in np.quantile(draws, (ALPHA / 2, 1 - ALPHA / 2)))
    widen = math.sqrt(blocks / (blocks - 1)) * student_t(blocks - 1) / Z if blocks > 1 else math.inf
    return min(value, value - (value - low) * widen), max(value, value + (high - value) * widen)
