"""What is usually claimed of smaller models, as ratios with intervals: each holds, fails, or is not decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.analysis.quality.bill import BreakEven, Stated
from harness.analysis.quality.estimate import Bounded

Outcome = Literal["holds", "fails", "not decided", "not measured", "not stated"]
ROUNDING = 1e-9
"""Of a ratio: list prices of 10 and 1 USD are one tenth, whatever their sums are in binary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, what became of it, and the figures that decided."""

    text: str
    outcome: Outcome
    results: Bounded | None
    """Accepted answers of the candidate over those of the current model."""
    cost: Bounded | None
    """Bill of the candidate over that of the current model."""
    false_above: Bounded | None = None
    """Of what the claim leaves to the user, in ``unit``: above it the saving is gone, whatever was stated. None: the
    bill was not measured, or nothing turns the claim (more of them are not surely there)."""
    unit: str = ""


def results_for_cost(results: Bounded | None, cost: Bounded | None, at_least: float, at_most: float) -> Claim:
    """Whether "90 % of the results for 10 % of the cost" holds: by the worse end of both; one better end fails it."""
    text = f"{100 * at_least:g} % of the results for {100 * at_most:g} % of the cost"
    at_least, at_most = at_least * (1 - ROUNDING), at_most * (1 + ROUNDING)
    outcome: Outcome = "not decided"
    if (results is not None and results.high < at_least) or (cost is not None and cost.low > at_most):
        outcome = "fails"
    elif results is None or cost is None:
        outcome = "not measured"
    elif results.low >= at_least and cost.high <= at_most:
        outcome = "holds"
    return Claim(text=text, outcome=outcome, results=results, cost=cost)


def times_cheaper(
    results: Bounded | None, cost: Bounded | None, not_worse: bool | None, at_least: float = 3.0
) -> Claim:  # fmt: skip
    """Whether "3x to 10x cheaper without regression" holds: by the worse end, and where the test at the margin passed.

    ``not_worse``: True passed, False proven worse, None not decided. Cheaper still than 10x holds as well.
    """
    outcome: Outcome = "not decided"
    if not_worse is False or (cost is not None and cost.low > 1 / at_least):
        outcome = "fails"
    elif cost is None:
        outcome = "not measured"
    elif not_worse and cost.high <= 1 / at_least:
        outcome = "holds"
    return Claim(text=f"{at_least:g} to 10 times cheaper", outcome=outcome, results=results, cost=cost)


def stays_cheaper(what: str, cost: Bounded | None, stated: bool, false_above: Bounded | None, unit: str) -> Claim:
    """Whether it is cheaper with ``what`` the user stated in the bill, which ``cost`` then holds.

    Never judged by what was not stated; ``false_above``, the break-even in ``unit``, says from where on it is false.
    """
    outcome: Outcome = "not decided"
    if not stated:
        outcome = "not stated"
    elif cost is None:
        outcome = "not measured"
    elif cost.high < 1:
        outcome = "holds"
    elif cost.low >= 1:
        outcome = "fails"
    text = f"cheaper, {what} counted"
    return Claim(text=text, outcome=outcome, results=None, cost=cost, false_above=false_above, unit=unit)


def payroll_and_churn(cost: Bounded | None, stated: Stated, even: BreakEven | None) -> tuple[Claim, ...]:
    """Review by people, and wrong answers that go out: thresholds always, judged where the user stated their price.

    Without a wage review has its threshold in USD.
    """
    paid = stated.wage_usd_per_hour
    review = None if even is None else even.review_usd_per_100 if not paid else even.minutes_per_100
    each = "review minutes per 100 answers" if paid else "USD of review per 100 answers"
    wrong = None if even is None else even.failure_usd
    return (
        stays_cheaper("review", cost, bool(paid and stated.review_minutes), review, each),
        stays_cheaper("wrong answers", cost, bool(stated.failure_usd), wrong, "USD per wrong answer that goes out"),
    )


def usual_claims(results: Bounded | None, cost: Bounded | None, not_worse: bool | None) -> tuple[Claim, ...]:
    """The three that users ask about."""
    return (
        results_for_cost(results, cost, 0.9, 0.1),
        results_for_cost(results, cost, 0.8, 0.2),
        times_cheaper(results, cost, not_worse),
    )
