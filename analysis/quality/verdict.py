"""May a candidate replace the current model? One word of a closed set for each, from grades, bills and an SLO.

All is decided here and nothing is measured: grades by record, a bill as a function of what is sent where, whether the
SLO is kept. Holm's adjustment is over the candidates, and over the slices of each. Nothing that is left out, shuffled,
renamed or added beside a candidate can turn its verdict into a switch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.quality.cascade import Cascade
from harness.analysis.quality.estimate import Bounded
from harness.analysis.quality.paired import ALPHA, FEWEST_SESSIONS, Paired, holm, paired
from harness.analysis.quality.power import records_needed

MOST_UNGRADED = 0.02
"""Share of pairs without a grade above which the audit is INVALID: what cannot be graded is not so at random."""
MOST_BLIND = 0.5
"""Share of the traffic whose checks tell nothing above which quality was not measured."""
MATTERS = 0.05
"""Share of the traffic from which on a slice that got worse forbids a switch."""
Word = Literal[
    "switch", "switch for slices", "switch as a cascade", "do not switch: worse", "do not switch: not cheaper",
    "do not switch: misses the SLO", "not decided", "quality not measured", "INVALID",
]  # fmt: skip
Evidence = Literal["measured", "simulated", "dummy"]
Open = Literal["quality", "sessions", "money", "SLO"]
"""What is not decided: too few records, fewer than `FEWEST_SESSIONS` sessions, bills that overlap, no SLO judged."""
State = Literal["not worse", "worse", "not decided", "not measurable"]
SWITCHES: tuple[Word, ...] = ("switch", "switch for slices", "switch as a cascade")
BillOf = Callable[[Bools], Bounded | None]
"""What is sent to the candidate -> the whole bill then, hidden costs and whole instances included, over today's bill.

None: not measured.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of the trace."""

    mask: Bools
    routable: bool
    """Production can tell its requests before it answers them (a tag, a length; not "the last fifth")."""
    measurable: bool = True
    """False: its checks cannot tell, since the current model is no better there than one constant answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedRecords:
    """What every model was asked, one entry a record, in the order of the trace."""

    current: Floats
    """Grades of the current model: 0 to 1, NaN where it could not be graded."""
    session: Ints
    weight: Floats
    slices: Mapping[str, Slice]
    """Parts of the trace that are judged by themselves; they may overlap."""
    blind: Bools | None = None
    """Records whose check tells nothing: not in the test, which they would only dilute. None: there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateModel:
    """One candidate, of which all was measured that can be."""

    name: str
    grades: Floats | None
    """As `GradedRecords.current`; None where no check was there to grade by."""
    bill: BillOf
    slo_met: bool | None
    """At the load of the trace and with its own answer lengths; None: not judged."""
    evidence: Evidence = "measured"
    problem: str | None = None
    """Why its figures prove nothing: its server died, a judge that fell for an injection. INVALID then."""
    cascade: Cascade | None = None
    sharpness: float = 1.0
    """Of its grades, above 0: a judge that errs sees only so much of a difference, so the margin is taken times it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceVerdict:
    """A candidate on a part of the trace."""

    name: str
    share: float
    """Of the weight of the trace."""
    paired: Paired
    not_worse: float
    worse: float
    """p-values over the family of slices: of being worse by the margin, and of being as good. Small ones decide."""
    state: State
    missing: int | None
    """More graded records of this slice that would decide, were both models equal there; None where none would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """The answer for one candidate."""

    candidate: str
    word: Word
    paired: Paired | None
    not_worse: float | None
    """p-value of being worse by the margin or more, adjusted for the number of candidates."""
    slices: tuple[SliceVerdict, ...]
    named: tuple[str, ...] = ()
    """Slices to switch, or those that are worse."""
    bill: Bounded | None = None
    """Of what the verdict advises, or of the whole switch where it advises none; over today's bill."""
    open: tuple[Open, ...] = ()
    """What is not decided, where that is the word."""
    needed: int | None = None
    """Graded records in all that would decide, were both models equal; None where that is not what is missing."""
    needed_as_seen: int | None = None
    """The same were the difference the one that was seen; None beside ``needed``: no number would."""
    why: str | None = None
    """Of an INVALID, or where quality was not measured in spite of checks."""

    @property
    def switches(self) -> bool:
        """It advises to send some of the traffic to the candidate."""
        return self.word in SWITCHES


def decide(
    records: GradedRecords, candidates: Sequence[CandidateModel], margin: float, alpha: float = ALPHA
) -> list[AuditVerdict]:
    """A verdict for each candidate, in their order. ``margin``: what may be lost, a share, stated beforehand.

    Raises ValueError for a margin outside (0, 1) and for arrays that differ in length.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin}: a share between 0 and 1, such as 0.02 for 2 points")
    seen = np.ones(len(records.session), np.bool_) if records.blind is None else ~records.blind
    pairs = [None if c.grades is None else _paired(records, c.grades, seen) for c in candidates]
    adjusted = holm([1.0 if pair is None else pair.p_worse_by(margin * c.sharpness)
                     for c, pair in zip(candidates, pairs, strict=True)])  # fmt: skip
    return [
        _decide(records, c, pair, p, margin * c.sharpness, alpha, len(candidates))
        for c, pair, p in zip(candidates, pairs, adjusted, strict=True)
    ]


def settled(
    records: GradedRecords, candidate: CandidateModel, margin: float, family: int, alpha: float = ALPHA
) -> Word | None:
    """The word that quality alone has settled, "do not switch: worse" or "INVALID"; None: the rest may still matter.

    It is what `decide` says at the best bill, within the SLO, and with a p-value that Holm's adjustment over ``family``
    candidates leaves alone: with what will be measured, and whatever the others do, no switch can come of it (at most
    "do not switch: misses the SLO"). So its load need not be measured.
    """
    nothing = Bounded(0.0, 0.0, 0.0)
    best = replace(candidate, bill=lambda _: nothing, slo_met=True)
    if best.cascade is not None:
        best = replace(best, cascade=replace(best.cascade, bill=nothing, slo_met=True))
    pair = None if best.grades is None else _paired(records, best.grades, np.ones(len(records.session), np.bool_))
    margin *= candidate.sharpness
    p = 1.0 if pair is None else pair.p_worse_by(margin)
    word = _decide(records, best, pair, p, margin, alpha, family).word
    return word if word in ("do not switch: worse", "INVALID") else None


def ungraded(records: GradedRecords, grades: Floats) -> float:
    """Share of pairs of which a side could not be graded."""
    return float(np.mean(~(np.isfinite(records.current) & np.isfinite(grades)))) if len(grades) else 0.0


def _paired(records: GradedRecords, grades: Floats, mask: Bools) -> Paired | None:
    """Over the records of the mask whose check tells something."""
    mask = mask if records.blind is None else mask & ~records.blind
    return paired(records.current[mask], grades[mask], records.session[mask], records.weight[mask])


def _unseen(records: GradedRecords, pair: Paired | None, margin: float) -> str | None:
    """Why the grades say nothing of quality; None: they do."""
    if records.blind is not None:
        share = float(records.weight @ records.blind) / float(records.weight.sum())
        if share > MOST_BLIND:
            return f"the checks of {share:.0%} of the records tell nothing"
    if pair is not None and pair.current <= margin:
        return f"the current model is right on {pair.current:.1%}, all of which the margin would give away"
    return None


def _decide(
    records: GradedRecords,
    candidate: CandidateModel,
    pair: Paired | None,
    p: float,
    margin: float,
    alpha: float,
    family: int,
) -> AuditVerdict:
    blank = AuditVerdict(candidate=candidate.name, word="INVALID", paired=pair, not_worse=p, slices=())
    if candidate.problem is not None:
        return replace(blank, why=candidate.problem)
    if candidate.grades is None or candidate.evidence != "measured":
        return replace(blank, word="quality not measured")
    if (lost := ungraded(records, candidate.grades)) > MOST_UNGRADED:
        return replace(blank, why=f"{lost:.1%} of pairs could not be graded, more than {MOST_UNGRADED:.0%}")
    if pair is None or (unseen := _unseen(records, pair, margin)):
        return replace(blank, word="quality not measured", why=None if pair is None else unseen)
    parts = _slices(records, candidate.grades, margin, alpha)
    bill = candidate.bill(np.ones(len(records.session), np.bool_))
    whole = replace(blank, slices=parts, bill=bill)
    worse = tuple(part.name for part in parts if part.state == "worse" and part.share >= MATTERS)
    proven, sessions = p <= alpha, pair.sessions >= FEWEST_SESSIONS
    good = proven and sessions and not worse
    cheaper, dearer = bill is not None and bill.high < 1, bill is not None and bill.low >= 1
    if candidate.slo_met is False:
        return replace(whole, word="do not switch: misses the SLO")
    if good and cheaper and candidate.slo_met:
        return replace(whole, word="switch")
    if not good and candidate.slo_met and (part := _in_part(records, candidate, parts, margin, alpha, family)):
        word, named, partly = part
        return replace(whole, word=word, named=named, bill=partly)
    high = pair.interval(alpha)[1]
    if not good and (worse or high < -margin or (high < 0 and pair.difference <= -margin)):
        return replace(whole, word="do not switch: worse", named=worse)
    if dearer:
        return replace(whole, word="do not switch: not cheaper")
    lacking: dict[Open, bool] = {
        "quality": not proven, "sessions": not sessions, "money": not cheaper, "SLO": candidate.slo_met is None
    }  # fmt: skip
    undecided = replace(whole, word="not decided", open=tuple(what for what, lacks in lacking.items() if lacks))
    if proven and sessions:
        return undecided
    needed, seen = (
        records_needed(
            pair.discordance_limit(), margin, difference=difference, alpha=alpha / family,
            design_effect=pair.design_effect, per_session=pair.n / pair.sessions,
        )
        for difference in (0.0, min(0.0, pair.difference))
    )  # fmt: skip
    return replace(undecided, needed=needed, needed_as_seen=seen)


def _in_part(
    records: GradedRecords,
    candidate: CandidateModel,
    parts: Sequence[SliceVerdict],
    margin: float,
    alpha: float,
    family: int,
) -> tuple[Word, tuple[str, ...], Bounded] | None:
    """(word, slices, bill) of a switch for a part of the traffic: routed by slice, else by a score. None: neither."""
    masks = {name: one.mask for name, one in records.slices.items()}
    named = tuple(part.name for part in parts if part.state == "not worse" and records.slices[part.name].routable)
    if named and candidate.grades is not None:
        routed = np.logical_or.reduce([masks[name] for name in named])
        for part in parts:
            if part.state == "worse" and records.slices[part.name].routable:
                routed = routed & ~masks[part.name]
        pair = _paired(records, candidate.grades, routed)
        good = pair is not None and pair.sessions >= FEWEST_SESSIONS and pair.p_worse_by(margin) <= alpha / family
        bill = candidate.bill(routed) if good else None
        if bill is not None and bill.high < 1:
            return "switch for slices", named, bill
    found = candidate.cascade
    if found is not None and found.bill is not None and found.passes(margin, alpha / family):
        return "switch as a cascade", (), found.bill
    return None


def _slices(records: GradedRecords, grades: Floats, margin: float, alpha: float) -> tuple[SliceVerdict, ...]:
    found: list[tuple[str, float, Paired]] = []
    total = float(records.weight.sum())
    for name, one in records.slices.items():
        mask = one.mask
        pair = paired(records.current[mask], grades[mask], records.session[mask], records.weight[mask])
        if pair is not None:
            found.append((name, float(records.weight[mask].sum()) / total, pair))
    not_worse = holm([pair.p_worse_by(margin) for _, _, pair in found])
    worse = holm([pair.p_as_good() for _, _, pair in found])
    family = max(1, len(found))

    def state(
        name: str, pair: Paired, good: float, bad: float
    ) -> Literal["not worse", "worse", "not decided", "not measurable"]:
        if bad <= alpha:
            return "worse"
        if not records.slices[name].measurable:
            return "not measurable"
        return "not worse" if good <= alpha and pair.sessions >= FEWEST_SESSIONS else "not decided"

    def missing(pair: Paired, is_open: bool) -> int | None:
        if not is_open:
            return None
        needed = records_needed(
            pair.discordance_limit(), margin, alpha=alpha / family, design_effect=pair.design_effect,
            per_session=pair.n / pair.sessions,
        )  # fmt: skip
        return None if needed is None else max(1, needed - pair.n)

    verdicts = []
    for (name, share, pair), good, bad in zip(found, not_worse, worse, strict=True):
        how = state(name, pair, good, bad)
        verdicts.append(
            SliceVerdict(
                name=name, share=share, paired=pair, not_worse=good, worse=bad, state=how,
                missing=missing(pair, how == "not decided"),
            )
        )  # fmt: skip
    return tuple(verdicts)
