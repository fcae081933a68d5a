"""Parts of a trace that are judged by themselves: what it is about, how it is checked, how long, how deep, how new.

An average hides opposite models. Two parts are always there: the last fifth by time, and the prompts least like the
rest, for "it has not seen this before" has an answer of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.quality.estimate import Bounded, mean
from harness.analysis.quality.paired import FEWEST_SESSIONS
from harness.analysis.quality.verdict import MATTERS, Slice

DEPTHS = ((1, 1), (2, 3), (4, 7), (8, None))
"""Turns of a conversation, first and last."""
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
LAST = 0.8
"""From this share of the records on, in order of time, is the last fifth."""
UNSEEN = ("last fifth", "least like the rest")
"""Slices of what a model may not have seen; always there."""
RARE = 0.05
"""A tag's value with less of the weight than this is rare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFacts:
    """What is known of each record before any model answers, in order of arrival."""

    tags: Sequence[Mapping[str, str]]
    kinds: Sequence[str]
    """Kind of check."""
    input_tokens: Floats
    """By the current model's tokenizer; NaN: not counted."""
    turn: Ints
    """Of its session, from 1."""
    shares_prefix: Bools
    """Its beginning occurs in another record."""
    session: Ints
    weight: Floats
    gated: Bools | None = None
    """It has a gate; None: not known."""


def slices(facts: RecordFacts, unmeasurable: frozenset[str] = frozenset()) -> dict[str, Slice]:
    """Slices by name: of `FEWEST_SESSIONS` sessions or `MATTERS` of the weight, and the two that are always there.

    ``unmeasurable``: names of those whose checks a constant answer passes (`harness.checks.lint`). A slice can be
    routed when production knows it before the answer: time and novelty are not such.
    """
    n = len(facts.session)
    total = float(facts.weight.sum())
    found: dict[str, tuple[Bools, bool]] = {}
    for name, value in sorted({item for tags in facts.tags for item in tags.items()}):
        found[f"{name} {value}".strip()] = np.array([tags.get(name) == value for tags in facts.tags], np.bool_), True
    for kind in sorted(set(facts.kinds)):
        found[f"check {kind}"] = np.array([one == kind for one in facts.kinds], np.bool_), True
    known = np.isfinite(facts.input_tokens)
    if known.any():
        ends = np.quantile(facts.input_tokens[known], (0.25, 0.5, 0.75))
        quarter = np.searchsorted(ends, facts.input_tokens, side="left")
        for k, name in enumerate(QUARTERS):
            found[f"input, {name}"] = known & (quarter == k), True
    for first, last in DEPTHS:
        name = f"turn {first}" if last == first else f"turns {first} to {last}" if last else f"turns from {first}"
        found[name] = (facts.turn >= first) & (facts.turn <= (last or np.inf)), True
    found[UNSEEN[0]] = np.arange(n) >= LAST * n, False
    found[UNSEEN[1]] = _unlike(facts, total), False

    def enough(mask: Bools, always: bool) -> bool:
        many = len(np.unique(facts.session[mask])) >= FEWEST_SESSIONS
        large = always or many or float(facts.weight[mask].sum()) >= MATTERS * total
        return large and bool(mask.any() and not mask.all())

    return {
        name: Slice(mask=mask, routable=routable, measurable=name not in unmeasurable)
        for name, (mask, routable) in found.items()
        if enough(mask, not routable)
    }


def _unlike(facts: RecordFacts, total: float) -> Bools:
    """Records with no shared beginning and a rare tag, or none; where those are few, with either."""
    weights: Counter[tuple[str, str]] = Counter()
    for tags, weight in zip(facts.tags, facts.weight.tolist(), strict=True):
        for item in tags.items():
            weights[item] += weight
    rare = [not tags or min(weights[item] for item in tags.items()) < RARE * total for tags in facts.tags]
    both = ~facts.shares_prefix & np.array(rare, np.bool_)
    return (
        both if float(facts.weight[both].sum()) >= MATTERS * total else ~facts.shares_prefix | np.array(rare, np.bool_)
    )


def depth_slope(current: Floats, candidate: Floats, facts: RecordFacts) -> Bounded | None:
    """Change of the difference (candidate - current) per turn, least squares with an interval by session.

    Below 0: the candidate loses the thread of a conversation. None where all graded records are of one turn.
    """
    known = np.isfinite(current) & np.isfinite(candidate)
    turn, weight, session = facts.turn[known].astype(np.float64), facts.weight[known], facts.session[known]
    difference = (candidate - current)[known]
    if not known.any() or np.ptp(turn) == 0:
        return None
    x = turn - float(weight @ turn) / float(weight.sum())
    spread = float(weight @ x**2) / float(weight.sum())
    y = difference - float(weight @ difference) / float(weight.sum())
    slope = float(weight @ (x * y)) / float(weight.sum()) / spread
    return mean(slope + x * (y - slope * x) / spread, session, weight)


def sessions_hit(current: Floats, candidate: Floats, session: Ints) -> Bounded | None:
    """Share of sessions with at least one rejected answer, candidate - current, a session counting once: users leave
    for the worst answer that they get. None where no session has two records with both grades.
    """
    known = np.isfinite(current) & np.isfinite(candidate)
    groups, place = np.unique(session[known], return_inverse=True)
    if len(groups) in (0, len(place)):
        return None
    worst = np.ones((2, len(groups)))
    for row, grades in zip(worst, (current, candidate), strict=True):
        np.minimum.at(row, place, grades[known])
    return mean(worst[0] - worst[1], groups, np.ones(len(groups)))
