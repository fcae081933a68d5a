"""How many graded records prove that a candidate is not worse by the margin, and which margin so many can prove."""

from __future__ import annotations

import math

import numpy as np

from harness.analysis.quality.distributions import NORMAL, t_quantile
from harness.analysis.quality.paired import ALPHA, FEWEST_SESSIONS, tango_score

POWER = 0.8
MOST_RECORDS = 10**9


def power(
    n: float, discordance: float, margin: float, *, difference: float = 0.0, alpha: float = ALPHA,
    sessions: float = math.inf,
) -> float:  # fmt: skip
    """Probability that ``n`` independent records prove "not worse by ``margin`` or more", 0 to 1.

    ``difference``: the true one, candidate - current; ``discordance``: the true share of pairs that differ. Asymptotic,
    with the score's own variance at the margin; within 0.03 of the exact one from 5 expected discordant pairs on.
    Source: Nam, Biometrics 53(4), 1997.
    """
    spread = max(discordance, abs(difference))
    critical = t_quantile(1 - alpha, sessions - 1) if math.isfinite(sessions) else NORMAL.inv_cdf(1 - alpha)
    b, c = np.array([(spread + difference) / 2]), np.array([(spread - difference) / 2])
    score = float(tango_score(b, c, np.ones(1), -margin)[0])  # of one pair; that of n is sqrt(n) times it
    if score <= 0:
        return NORMAL.cdf(-critical)
    at_margin = (margin + difference) / score
    spread_now = math.sqrt(max(spread - difference**2, 0.0))
    lead = (margin + difference) * math.sqrt(n) - critical * at_margin
    return float(lead >= 0) if spread_now == 0 else NORMAL.cdf(lead / spread_now)


def records_needed(
    discordance: float, margin: float, *, difference: float = 0.0, alpha: float = ALPHA, wanted: float = POWER,
    design_effect: float = 1.0, per_session: float = 1.0,
) -> int | None:  # fmt: skip
    """Graded records that prove "not worse by ``margin`` or more" with probability ``wanted``.

    Ask with the upper limit of the discordance (`Paired.discordance_limit`). None: no number of records will, since the
    difference assumed is the margin or worse. At least `FEWEST_SESSIONS` sessions of ``per_session`` records each.
    Raises ValueError for a margin outside (0, 1).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: a share between 0 and 1, such as 0.02 for 2 points")
    if difference <= -margin:
        return None

    def enough(n: float) -> bool:
        sessions = max(2.0, n / per_session)
        return (
            power(
                n / design_effect, discordance, margin, difference=difference, alpha=alpha, sessions=sessions
            ) >= wanted
        )  # fmt: skip

    low, high = 0, 1
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_RECORDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return max(high, math.ceil(FEWEST_SESSIONS * per_session))


def provable_margin(
    n: float, discordance: float, *, alpha: float = ALPHA, wanted: float = POWER, sessions: float = math.inf
) -> float | None:
    """The smallest margin that ``n`` independent records prove with probability ``wanted`` when nothing is worse.

    A share, 0.05 for 5 points. None: not even a margin of 99 points.
    """
    low, high = 0.0, 0.99
    if power(n, discordance, high, alpha=alpha, sessions=sessions) < wanted:
        return None
    while high - low > 1e-5:
        middle = (low + high) / 2
        proves = power(n, discordance, middle, alpha=alpha, sessions=sessions) >= wanted
        low, high = (low, middle) if proves else (middle, high)
    return high
