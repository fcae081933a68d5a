"""Quantiles and tails of the normal and of Student's t distribution, and Wilson's interval of a share."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

NORMAL = NormalDist()
_MANY = 1e7
"""Degrees of freedom from which Student's t is the normal distribution to within 1e-7."""


def t_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's t with ``degrees`` of freedom, within 1e-10; 0 degrees or fewer: 1, nothing is known.

    Source: Abramowitz and Stegun 26.7.1, by the continued fraction of the incomplete beta function (DLMF 8.17.22).
    """
    if degrees <= 0 or math.isnan(t):
        return 1.0
    if degrees >= _MANY or math.isinf(t):
        return NORMAL.cdf(-t)
    tail = 0.5 * _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)
    return tail if t >= 0 else 1 - tail


@lru_cache(maxsize=4096)
def t_quantile(p: float, degrees: float) -> float:
    """The t with P(T <= t) = p, for 0 < p < 1, within 1e-9 of itself; 0 degrees or fewer: infinite."""
    if degrees <= 0:
        return math.inf
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    t = NORMAL.inv_cdf(p)
    log_front = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    for _ in range(100):  # Newton's, from below: the tail is convex, so it never passes the root
        density = math.exp(log_front - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (t_tail(t, degrees) - (1 - p)) / density
        t += step
        if abs(step) <= 1e-10 * (1 + t):
            break
    return t


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny, c, d = 1e-300, 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = fraction
        for step in (even, odd):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            fraction *= c * d
        if abs(fraction - before) <= 1e-15 * abs(fraction):
            break
    return front * fraction


def wilson(accepted: float, n: float, z: float) -> tuple[float, float]:
    """Ends of the interval of a share at ``z`` standard errors; counts may be fractions; (0, 1) where n is 0.

    Source: Wilson, Journal of the American Statistical Association 22(158), 1927.
    """
    if n <= 0 or math.isinf(z):
        return 0.0, 1.0
    p = accepted / n
    centre, reach, whole = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)), 1 + z * z / n
    return max(0.0, min(p, (centre - reach) / whole)), min(1.0, max(p, (centre + reach) / whole))
