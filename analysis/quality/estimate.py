"""A figure over records that come in sessions, with its 95 % interval: means, and ratios of sums and of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.quality.distributions import t_quantile
from harness.analysis.quality.paired import ALPHA


@dataclass(frozen=True, slots=True)
class Bounded:
    """A value and both ends of its interval, infinite where nothing bounds it; both the value where it was stated."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.value} lies outside its own interval, {self.low} to {self.high}")

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, -self.high, -self.low)

    def __add__(self, other: Bounded) -> Bounded:
        """The sum with the worst of both ends, whatever they have in common."""
        return Bounded(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Bounded:
        """Times a constant of at least 0."""
        return Bounded(self.value * factor, self.low * factor, self.high * factor)

    def over(self, other: Bounded) -> Bounded | None:
        """A ratio of two positive figures with the worst of both ends; None where the divisor may be 0."""
        if other.low <= 0 or self.low < 0:
            return None
        return Bounded(self.value / other.value, self.low / other.high, self.high / other.low)


def given(value: float) -> Bounded:
    """What was stated, not measured."""
    return Bounded(value, value, value)


def mean(values: Floats, session: Ints, weight: Floats, alpha: float = ALPHA) -> Bounded:
    """Weighted mean, Student's t over sessions (CR1); no bounds for a single session. Raises ValueError without any."""
    centre = float(weight @ values) / float(weight.sum())
    reach = _reach(weight * (values - centre) / float(weight.sum()), session, alpha)
    return Bounded(centre, centre - reach, centre + reach)


def ratio(
    over: Sequence[Floats], under: Sequence[Floats], session: Ints, weight: Floats, alpha: float = ALPHA
) -> Bounded | None:
    """Product of the weighted sums ``over`` divided by those ``under``, all of figures that are 0 or more by record.

    USD per accepted answer is ([usd], [accepted]); that of one model over that of another has two of each. Interval by
    Student's t over sessions on the logarithm, so that the inverse has the inverse ends. None where a sum is 0.
    """
    sums = [[float(weight @ one) for one in side] for side in (over, under)]
    if any(total <= 0 for side in sums for total in side):
        return None
    value = math.exp(sum(map(math.log, sums[0])) - sum(map(math.log, sums[1])))
    influence = np.zeros(len(session))
    for sign, side, totals in ((1, over, sums[0]), (-1, under, sums[1])):
        for one, total in zip(side, totals, strict=True):
            influence += sign * weight * (one / total - 1 / float(weight.sum()))
    reach = _reach(influence, session, alpha)
    return Bounded(value, value * math.exp(-reach), value * math.exp(reach) if reach < 700 else math.inf)


def quotient(over: Floats, under: Floats, session: Ints, weight: Floats, alpha: float = ALPHA) -> Bounded | None:
    """A ratio of two means of any sign, by Fieller's interval; None where the divisor is not surely above 0.

    Source: Fieller, Journal of the Royal Statistical Society B 16(2), 1954.
    """
    total = float(weight.sum())
    top, bottom = float(weight @ over) / total, float(weight @ under) / total
    if mean(under, session, weight, alpha).low <= 0:
        return None

    def covariance(one: Floats, other: Floats) -> float:
        groups, place = np.unique(session, return_inverse=True)
        sums = [np.bincount(place, weights=weight * (x - float(weight @ x) / total)) for x in (one, other)]
        return len(groups) / (len(groups) - 1) * float(sums[0] @ sums[1]) / total**2

    t2 = t_quantile(1 - alpha, len(np.unique(session)) - 1) ** 2
    a = bottom**2 - t2 * covariance(under, under)
    b = top * bottom - t2 * covariance(over, under)
    reach = math.sqrt(max(b**2 - a * (top**2 - t2 * covariance(over, over)), 0.0))
    value = top / bottom
    return Bounded(value, min(value, (b - reach) / a), max(value, (b + reach) / a))


def _reach(influence: Floats, session: Ints, alpha: float) -> float:
    """Half of an interval whose estimate is the sum of what each record adds."""
    groups, place = np.unique(session, return_inverse=True)
    if len(groups) < 2:
        return math.inf
    sums = np.bincount(place, weights=influence)
    sums = sums - sums.mean()
    error = math.sqrt(len(groups) / (len(groups) - 1) * float(sums @ sums))
    return t_quantile(1 - alpha, len(groups) - 1) * error
