"""The difference between two models on the same records: interval, and the test of "not worse by the margin or more".

Records of a session are alike, so counts are deflated by the design effect before Tango's score test, and the critical
value is Student's t with one degree fewer than there are sessions. Measured error rates: tests/test_quality.py (exact
enumeration) and tests/lab/audit.py (sessions).
Sources: Tango, Statistics in Medicine 17(8), 1998; Miller, arXiv 2411.00640 (clustered standard errors of evaluations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.quality.distributions import NORMAL, t_quantile, t_tail, wilson

ALPHA = 0.025
"""One-sided level of every test; intervals are two-sided at twice that, 95 %."""
FEWEST_SESSIONS = 30
"""Below so many sessions the test is not used to say "not worse": its error rate is no longer what it claims."""

BEFOREHAND = 2.0
"""Flips assumed before any was seen that take their whole session along; many real ones outweigh them."""


def tango_score(b: Floats, c: Floats, n: Floats, difference: float | Floats) -> Floats:
    """Tango's score statistic, in standard errors, of the hypothesis that the true difference is ``difference``.

    ``b``: pairs in which the candidate alone was right, ``c``: the current model alone, of ``n`` pairs; any shape, may
    be fractions. Above 0 where (b - c) / n is larger than ``difference``. At difference 0 its square is McNemar's.
    """
    big_b = -b - c + (2 * n - b + c) * difference
    product = -c * difference * (1 - difference)
    q = (np.sqrt(np.maximum(big_b**2 - 8 * n * product, 0.0)) - big_b) / (4 * n)
    variance = np.maximum(n * (2 * q + difference * (1 - difference)), 0.0)
    gap = b - c - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.abs(gap) < 1e-12 * n, 0.0, gap / np.sqrt(variance))


def tango_interval(b: float, c: float, n: float, z: float) -> tuple[float, float]:
    """Differences (candidate - current) that `tango_score` does not reject at ``z`` standard errors."""
    if math.isinf(z):
        return -1.0, 1.0
    counts = np.array([b]), np.array([c]), np.array([n])
    found = (b - c) / n

    def end(inner: float, outer: float, target: float) -> float:
        for _ in range(60):
            middle = (inner + outer) / 2
            score = float(tango_score(*counts, middle)[0])
            inner, outer = (middle, outer) if abs(score) < target else (inner, middle)
        return (inner + outer) / 2

    return (-1.0 if found <= -1 else end(found, -1.0, z)), (1.0 if found >= 1 else end(found, 1.0, z))


def newcombe_interval(a: float, b: float, c: float, d: float, z: float) -> tuple[float, float]:
    """Interval of the difference (b - c) / n from Wilson's intervals of both shares and their correlation.

    ``a``: both right, ``b``: the first alone, ``c``: the second alone, ``d``: neither. Beside Tango's, as a check.
    Source: Newcombe, Statistics in Medicine 17(22), 1998, method 10.
    """
    n = a + b + c + d
    first, second = (a + b) / n, (a + c) / n
    (low_1, high_1), (low_2, high_2) = wilson(a + b, n, z), wilson(a + c, n, z)
    margins = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    cross = a * d - b * c
    phi = 0.0 if margins == 0 else (max(cross - n / 2, 0.0) if cross > 0 else cross) / margins

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    return first - second - reach(first - low_1, high_2 - second), first - second + reach(
        high_1 - first, second - low_2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """The share of accepted answers of a candidate less that of the current model, over records graded on both sides.

    All shares are of the records' weight. Swapping the models turns the sign of all that has one.
    """

    n: int
    """Records."""
    sessions: int
    current: float
    candidate: float
    """Shares of accepted answers, 0 to 1."""
    helpful: float
    """Mean gain over records where the candidate was accepted more often: for single answers the share that flipped."""
    harmful: float
    """The same where the current model was: right before, wrong now."""
    discordance: float
    """Mean squared difference; for single answers the share of records on which the models differ."""
    design_effect: float
    """How many records are worth one independent record of weight 1; at least 1."""

    @property
    def difference(self) -> float:
        """Candidate - current, -1 to 1."""
        return self.candidate - self.current

    @property
    def effective(self) -> tuple[float, float, float]:
        """(b, c, n) of independent pairs of single answers with this mean and this spread of differences."""
        n, spread = self.n / self.design_effect, max(self.discordance, abs(self.difference))
        return n * (spread + self.difference) / 2, n * (spread - self.difference) / 2, n

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Ends of the difference, each missed with probability ``alpha``; (-1, 1) for a single session."""
        return tango_interval(*self.effective, t_quantile(1 - alpha, self.sessions - 1))

    def newcombe(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The same by Newcombe's method 10, as a check on `interval`."""
        b, c, n = self.effective
        both = max(n * self.current - c, 0.0)
        return newcombe_interval(both, b, c, max(n - both - b - c, 0.0), t_quantile(1 - alpha, self.sessions - 1))

    def p_worse_by(self, margin: float) -> float:
        """p-value of "the candidate is worse by ``margin`` or more", one-sided: small proves that it is not."""
        return t_tail(self._score(-margin), self.sessions - 1)

    def p_as_good(self) -> float:
        """p-value of "the candidate is as good or better", one-sided: small proves that it is worse."""
        return t_tail(-self._score(0.0), self.sessions - 1)

    def discordance_limit(self, confidence: float = 0.8) -> float:
        """One-sided upper limit of the discordance, the prudent one for a sample size."""
        n = self.n / self.design_effect
        return wilson(n * min(self.discordance, 1.0), n, NORMAL.inv_cdf(confidence))[1]

    def _score(self, difference: float) -> float:
        b, c, n = (np.array([x]) for x in self.effective)
        return float(tango_score(b, c, n, difference)[0])


def paired(current: Floats, candidate: Floats, session: Ints, weight: Floats | None = None) -> Paired | None:
    """The comparison over records with both grades; None where there is none.

    ``current``, ``candidate``: grade of each record, 0 to 1 (a mean over repeats), NaN where it could not be graded.
    ``session``: any integer, the same for records of a session. ``weight``: above 0, default 1.
    The design effect is that of the residuals by session, with `BEFOREHAND` flips more that take their whole session
    along: few discordant pairs, or none, say little of how flips cluster. Raises ValueError for shapes that differ.
    """
    if not current.shape == candidate.shape == session.shape:
        raise ValueError(f"grades and sessions differ in length: {current.shape}, {candidate.shape}, {session.shape}")
    known = np.isfinite(current) & np.isfinite(candidate)
    n = int(known.sum())
    if not n:
        return None
    w = np.ones(n) if weight is None else weight[known]
    a, c = current[known], candidate[known]
    groups, place = np.unique(session[known], return_inverse=True)
    total, d = float(w.sum()), c - a
    share_current, share_candidate = float(w @ a) / total, float(w @ c) / total
    mean, psi = share_candidate - share_current, float(w @ d**2) / total
    whole = n * float((np.bincount(place, weights=w) ** 2).sum()) / total**2
    seen = whole
    if len(groups) > 1 and psi > mean**2 + 1e-12:
        residuals = np.bincount(place, weights=w * (d - mean))
        variance = len(groups) / (len(groups) - 1) * float(residuals @ residuals) / total**2
        seen = max(1.0, variance / ((psi - mean**2) / n))
    flips = n * psi
    return Paired(
        n=n, sessions=len(groups), current=share_current, candidate=share_candidate,
        helpful=float(w @ np.maximum(d, 0)) / total, harmful=float(w @ np.maximum(-d, 0)) / total,
        discordance=psi, design_effect=max(1.0, (flips * seen + BEFOREHAND * whole) / (flips + BEFOREHAND)),
    )  # fmt: skip


def like_another_run(candidate: Paired, again: Paired) -> bool:
    """Whether the candidate differs no more from the current model than that model from itself (``again``: A/A).

    By the upper 97.5 % limit of the latter: batches and order alone change grades, at temperature 0, too.
    """
    return candidate.discordance <= again.discordance_limit(1 - ALPHA)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being one of a family, in the order given: reject where it is at most the level.

    Source: Holm, Scandinavian Journal of Statistics 6(2), 1979.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, (len(p_values) - rank) * p_values[k])
        adjusted[k] = min(1.0, largest)
    return adjusted
