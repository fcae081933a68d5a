"""May a judge's verdicts be used? Held against a labelled part: agreement, equal errors, corrected shares.

The dangerous judge is not the one that errs but the one that errs more kindly for the candidate. Labels are a person's,
of answers of both models; canaries are answers known to be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.quality.distributions import NORMAL, wilson
from harness.analysis.quality.estimate import Bounded, mean
from harness.analysis.quality.paired import ALPHA

FEWEST_LABELS = 50
LOWEST_KAPPA = 0.4
"""The lower end of Cohen's kappa: below it agreement is "fair" at best (Landis and Koch, Biometrics 33(1), 1977)."""
MOST_UNGRADED = 0.02
MOST_FLIPS = 0.2
"""Share of pairs whose verdict turned with the order in which both answers were shown."""
FEWEST_CANARIES = 20
Fault = Literal[
    "too few labels", "agreement not shown", "kinder to one model", "accepted a canary", "too few canaries",
    "turns with the order", "too often no verdict",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Answers that a person and the judge both graded; one entry an answer, 1 accepted, 0 not."""

    judged: Floats
    """NaN: the judge gave no verdict."""
    label: Floats
    candidate: Floats
    """1 for the candidate's answers, 0 for the current model's."""
    session: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTrust:
    """What is known of a judge."""

    labels: int
    right: int
    wrong: int
    """Labels of either kind."""
    kappa: Bounded | None
    """None: fewer than two sessions, or all labels alike."""
    sensitivity: float | None
    """Share of right answers that it accepts; None without any."""
    specificity: float | None
    """Share of wrong answers that it rejects; None without any."""
    kinder: Bounded | None
    """Errors in the candidate's favour, less those in the current model's: mean of (judged - label) of both."""
    faults: tuple[Fault, ...]
    """Why its verdicts may not be used; empty: they may."""


def trust(
    labelled: Labelled, margin: float, *, canaries: int, canaries_accepted: int, flips: float | None = None
) -> JudgeTrust:
    """Hold a judge against labels and canaries. ``margin``: the audit's, which a bias must not reach.

    ``flips``: of pairs that were shown in both orders, the share whose verdict turned; None: it saw no pairs.
    """
    known = np.isfinite(labelled.judged)
    judged, label = labelled.judged[known], labelled.label[known]
    candidate, session = labelled.candidate[known], labelled.session[known]
    n, lost = int(known.sum()), 1 - float(known.mean()) if len(known) else 0.0
    agreement = kappa(judged, label, session) if n else None
    kinder = _kinder(judged - label, candidate, session)
    faults: list[Fault] = []
    if n < FEWEST_LABELS:
        faults.append("too few labels")
    if agreement is None or agreement.low < LOWEST_KAPPA:
        faults.append("agreement not shown")
    if kinder is None or not (kinder.low <= 0 <= kinder.high) or abs(kinder.value) > margin:
        faults.append("kinder to one model")
    if canaries_accepted:
        faults.append("accepted a canary")
    if canaries < FEWEST_CANARIES:
        faults.append("too few canaries")
    if flips is not None and flips > MOST_FLIPS:
        faults.append("turns with the order")
    if lost > MOST_UNGRADED:
        faults.append("too often no verdict")
    right, wrong = judged[label == 1], judged[label == 0]
    return JudgeTrust(
        labels=n, right=len(right), wrong=len(wrong), kappa=agreement,
        sensitivity=float(right.mean()) if len(right) else None,
        specificity=1 - float(wrong.mean()) if len(wrong) else None, kinder=kinder, faults=tuple(faults),
    )  # fmt: skip


def sharpness(trusted: JudgeTrust, alpha: float = ALPHA) -> float:
    """How much of a difference between two models the judge sees at least: sensitivity + specificity - 1, 0 to 1.

    By the lower ends (Wilson) of both. Errors that are alike for both models shrink their difference by it, so a margin
    is to be taken times it; 0: the judge was not shown to tell right from wrong.
    """
    if trusted.sensitivity is None or trusted.specificity is None:
        return 0.0
    z = NORMAL.inv_cdf(1 - alpha)
    right = wilson(trusted.sensitivity * trusted.right, trusted.right, z)[0]
    wrong = wilson(trusted.specificity * trusted.wrong, trusted.wrong, z)[0]
    return max(0.0, right + wrong - 1)


def kappa(one: Floats, other: Floats, session: Ints, alpha: float = ALPHA) -> Bounded | None:
    """Cohen's kappa of two graders, agreement beyond chance, with an interval by session (jackknife).

    None: a single session, or both always give the same one verdict, where chance explains all.
    Source: Cohen, Educational and Psychological Measurement 20(1), 1960.
    """
    groups, place = np.unique(session, return_inverse=True)
    columns = ((one == other).astype(np.float64), one, other, np.ones(len(one)))
    by_group = [np.bincount(place, weights=x).astype(np.float64) for x in columns]

    def of(both: Floats, first: Floats, second: Floats, count: Floats) -> Floats:
        p, q = first / count, second / count
        chance = p * q + (1 - p) * (1 - q)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (both / count - chance) / (1 - chance)

    sums = [np.array([x.sum()]) for x in by_group]
    value = float(of(*sums)[0])
    if len(groups) < 2 or not np.isfinite(value):
        return None
    left_out = of(*(whole - x for whole, x in zip(sums, by_group, strict=True)))
    left_out = np.where(np.isfinite(left_out), left_out, value)
    pseudo = len(groups) * value - (len(groups) - 1) * left_out
    spread = mean(pseudo, np.arange(len(groups)), np.ones(len(groups)), alpha)
    reach = spread.high - spread.value
    return Bounded(value, value - reach, value + reach)


def _kinder(errors: Floats, candidate: Floats, session: Ints) -> Bounded | None:
    """Mean error on the candidate's answers less that on the current model's, by session; None where one has none."""
    mine, theirs = candidate == 1, candidate == 0
    if not mine.any() or not theirs.any():
        return None
    # both means as one sum over answers, so that what a session has in common is in it once
    n = len(errors)
    error_mine, error_theirs = float(errors[mine].mean()), float(errors[theirs].mean())
    share = np.where(mine, (errors - error_mine) / mine.sum(), -(errors - error_theirs) / theirs.sum()) * n
    difference = error_mine - error_theirs
    return mean(share + difference, session, np.ones(n))


def corrected(
    judged: float, n: int, trusted: JudgeTrust, right: int, wrong: int, alpha: float = ALPHA
) -> Bounded | None:
    """The true share accepted, from the judge's share over ``n`` answers and its errors on labels.

    p = (p_judged + specificity - 1) / (sensitivity + specificity - 1), within 0 to 1; ``right`` and ``wrong``: how many
    labels the errors come from, whose uncertainty widens the interval. None where the judge does not tell right from
    wrong. Source: Rogan and Gladen, American Journal of Epidemiology 107(1), 1978.
    """
    se, sp = trusted.sensitivity, trusted.specificity
    if se is None or sp is None or se + sp <= 1 or not (n and right and wrong):
        return None
    power = se + sp - 1
    value = (judged + sp - 1) / power
    known = judged * (1 - judged) / n
    errors = value**2 * se * (1 - se) / right + (1 - value) ** 2 * sp * (1 - sp) / wrong
    reach = NORMAL.inv_cdf(1 - alpha) * ((known + errors) / power**2) ** 0.5
    low, middle, high = (min(1.0, max(0.0, x)) for x in (value - reach, value, value + reach))
    return Bounded(middle, low, high)
