"""The document of an audit, ``harness.audit/1``: what decides, put together record by record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.audit.model import (
    MeasuredModel,
    ModelRow,
    Side,
    cascade_of,
    column,
    costs_of,
    failed,
    side_of,
    slo_of,
)
from harness.analysis.quality.bill import BreakEven, Costs, Policy, Rented, Stated, bill, break_even, by_record
from harness.analysis.quality.cascade import Cascade
from harness.analysis.quality.claims import Claim, payroll_and_churn, usual_claims
from harness.analysis.quality.estimate import Bounded, given, mean, ratio
from harness.analysis.quality.judging import JudgeTrust, corrected
from harness.analysis.quality.paired import ALPHA, Paired, like_another_run, paired
from harness.analysis.quality.slices import RecordFacts, depth_slope, sessions_hit, slices
from harness.analysis.quality.verdict import (
    AuditVerdict,
    CandidateModel,
    GradedRecords,
    Word,
    decide,
    settled,
)

SCHEMA = "harness.audit/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateAnswer:
    """One candidate against the current model."""

    verdict: AuditVerdict
    sentence: str
    difference: Bounded | None
    """Share accepted, candidate - current, 95 % interval."""
    usd_per_request: Bounded | None
    """Over that of the current model."""
    usd_per_accepted: Bounded | None
    """The same per accepted answer."""
    output_tokens: Bounded | None
    """Per answer, over the current model's."""
    like_another_run: bool | None
    """It differs no more from the current model than that from itself."""
    depth_slope: Bounded | None
    """Of the difference, per turn of a conversation; None: all graded records are of one turn."""
    sessions_hit: Bounded | None
    """Share of sessions with a rejected answer, candidate - current; None: every session has one record."""
    judge: JudgeTrust | None
    judged: Bounded | None
    """Share accepted, corrected by the judge's errors on labels; None: no judge, or one that tells nothing."""
    cascade: Cascade | None
    claims: tuple[Claim, ...]
    break_even: BreakEven | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """``harness.audit/1``."""

    schema: str
    made: str
    folder: str
    trace: str
    records: int
    graded: int
    sessions: int
    margin: float
    slo: Mapping[str, float]
    requests_per_s: float
    checks_sha256: str
    noise: Paired | None
    """The current model against itself; None: not measured."""
    noise_difference: Bounded | None
    models: tuple[ModelRow, ...]
    """The current one first."""
    answers: tuple[CandidateAnswer, ...]
    notes: tuple[str, ...]


def audit_report(
    facts: RecordFacts, measured: Sequence[MeasuredModel], *, margin: float, slo: Mapping[str, float],
    requests_per_s: float,
    stated: Stated, unmeasurable: frozenset[str], made: str, folder: str, trace: str, records: int, checks_sha256: str,
    notes: Sequence[str] = (), policy: Policy | None = None, attain: float = 0.99,
    blind: Bools | None = None,
) -> AuditReport:  # fmt: skip
    """The whole of it; ``measured``: the current model first. ``policy``: what production does with its gate.

    ``blind``: records whose check tells nothing.
    """
    policy = policy or Policy()
    current, *others = measured
    session, weight = facts.session, facts.weight
    seen = np.ones(len(session), np.bool_) if blind is None else ~blind
    base = side_of(current.grades, current, facts, replace(policy, escalate=False), blameless=True)
    again = side_of(current.again, current, facts, replace(policy, escalate=False), blameless=True)
    sides = [side_of(one.grades, one, facts, policy, base) for one in others]
    broken = None if current.problem is None else f"the current model: {current.problem}"
    bills = [costs_of(current, base, one, side, stated, facts, requests_per_s)
             for one, side in zip(others, sides, strict=True)]  # fmt: skip

    def bill_of(costs: Costs | None, mask: Bools) -> Bounded | None:
        return None if costs is None else costs.routed(mask)

    candidates = [
        CandidateModel(
            name=one.name, grades=None if side is None else side.grades, bill=partial(bill_of, costs),
            slo_met=slo_of(one, side, current, policy, slo, attain, weight),
            evidence=one.evidence if current.evidence == "measured" else current.evidence,
            problem=broken or one.problem, sharpness=one.sharpness,
            cascade=None if side is None or base is None or costs is None or policy.asks_again else cascade_of(
                one, side, current, base, costs, facts, margin=margin, slo=slo, attain=attain, blind=blind
            ),
        )
        for one, side, costs in zip(others, sides, bills, strict=True)
    ]  # fmt: skip
    own = np.full(len(session), np.nan) if base is None else base.grades
    asked = GradedRecords(current=own, session=session, weight=weight, slices=slices(facts, unmeasurable),
                          blind=blind)  # fmt: skip
    verdicts = decide(asked, candidates, margin)
    rows = [
        _row(one, side, current.fleet, stated, facts, requests_per_s, seen)
        for one, side in zip(measured, [base, *sides], strict=True)
    ]
    rows = [replace(row, slo_met=met) for row, met in
            zip(rows, [current.slo_met, *(one.slo_met for one in candidates)], strict=True)]  # fmt: skip
    rows = [_per_1m(row, rows[0], current, weight) for row in rows]
    noise = None
    if again is not None and base is not None and not broken:
        noise = paired(_of(seen, own), again.grades, session, weight)
    answers = tuple(
        _answer(verdict, row, rows[0], (base, side), costs, facts, noise, candidate, one.judge, seen)
        for verdict, row, side, costs, candidate, one
        in zip(verdicts, rows[1:], sides, bills, candidates, others, strict=True)
    )  # fmt: skip
    return AuditReport(
        schema=SCHEMA, made=made, folder=folder, trace=trace, records=records, graded=len(session),
        sessions=len(np.unique(session)), margin=margin, slo=dict(slo), requests_per_s=requests_per_s,
        checks_sha256=checks_sha256, noise=noise, noise_difference=_difference(noise), models=tuple(rows),
        answers=answers, notes=(*_unseen(seen, measured, [base, *sides], facts), *notes),
    )  # fmt: skip


def _unseen(
    seen: Bools, measured: Sequence[MeasuredModel], sides: Sequence[Side | None], facts: RecordFacts
) -> list[str]:
    """What is said of the records whose check tells nothing, and the shares accepted with them; empty: all tell."""
    if seen.all():
        return []
    with_them = []
    for one, side in zip(measured, sides, strict=True):
        known = np.zeros(len(seen), np.bool_) if side is None else np.isfinite(side.grades)
        if side is not None and known.any():
            share = float(np.average(side.grades[known], weights=facts.weight[known]))
            with_them.append(f"{one.name} {100 * share:.1f} %")
    return [
        f"The checks of {int((~seen).sum()):,} records tell nothing (garbage passes, or the current model is no better "
        "than one constant answer): they are neither in the test nor in any share accepted"
        + (f". With them accepted: {', '.join(with_them)}." if with_them else ".")
    ]


def _of(seen: Bools, grades: Floats) -> Floats:
    """Grades of the records whose check tells something, NaN for the others."""
    only: Floats = np.where(seen, grades, np.nan)
    return only


def settled_by_quality(
    facts: RecordFacts, current: MeasuredModel, one: MeasuredModel, *, margin: float, family: int,
    slo: Mapping[str, float], unmeasurable: frozenset[str], blind: Bools, policy: Policy, attain: float,
) -> Word | None:  # fmt: skip
    """The word that the grades of one of ``family`` candidates settle before it is loaded; None: none yet."""
    base = side_of(current.grades, current, facts, replace(policy, escalate=False), blameless=True)
    side = side_of(one.grades, one, facts, policy, base)
    if base is None or side is None or current.problem is not None or current.evidence != "measured":
        return None
    mixed = None if policy.asks_again else cascade_of(
        replace(one, slo_met=True), side, replace(current, slo_met=True), base, None, facts, margin=margin, slo=slo,
        attain=attain, blind=blind,
    )  # fmt: skip
    candidate = CandidateModel(
        name=one.name, grades=side.grades, bill=lambda _: None, slo_met=None, evidence=one.evidence,
        problem=one.problem, cascade=mixed, sharpness=one.sharpness,
    )  # fmt: skip
    asked = GradedRecords(current=base.grades, session=facts.session, weight=facts.weight,
                          slices=slices(facts, unmeasurable), blind=blind)  # fmt: skip
    return settled(asked, candidate, margin, family)


def _row(
    one: MeasuredModel, side: Side | None, current: Rented | None, stated: Stated, facts: RecordFacts, rate: float,
    seen: Bools,
) -> ModelRow:  # fmt: skip
    session, weight, tables = facts.session, facts.weight, one.grades
    row = ModelRow(
        name=one.name, accepted=None, ungraded=None, failed=None, cut=None, output_tokens=None, usd_per_request=None,
        usd_per_accepted=None, usd_per_request_full=None, usd_per_accepted_full=None, usd_per_1m=None, instances=None,
        capacity=one.fleet.capacity if one.fleet and one.capacity_searched else None, calls=None, escalated=None,
        slo_met=one.slo_met, load=one.load, problem=one.problem, evidence=one.evidence, at_least=one.at_least,
    )  # fmt: skip
    if side is None:
        return row
    known, said = np.isfinite(side.grades), np.isfinite(side.tokens)
    told = known & seen
    if tables:
        ends = np.mean([[x == "length" for x in table.column("finish_reason").to_pylist()] for table in tables], axis=0)
        row = replace(
            row, ungraded=float(np.average(~known, weights=weight)),
            failed=float(np.average(np.mean([failed(table) for table in tables], axis=0), weights=weight)),
            cut=float(np.average(ends, weights=weight)),
        )  # fmt: skip
    row = replace(
        row,
        accepted=_bounded(mean(side.grades[told], session[told], weight[told])) if told.any() else None,
        output_tokens=mean(side.tokens[said], session[said], weight[said]) if said.any() else None,
    )  # fmt: skip
    if side.served is None:
        return row
    found = bill(side.served, stated, session, weight)
    calls, up = (float(np.average(x, weights=weight)) for x in (side.served.calls, side.served.escalated))
    row = replace(row, calls=calls, escalated=up)
    fleets = [(fleet, share) for fleet, share in ((one.fleet, calls), (current, up)) if fleet is not None and share > 0]
    if not fleets:
        tells, all_ = seen.astype(np.float64), np.ones(len(seen))
        per_accepted = ratio(
            [by_record(side.served, stated), tells], [side.served.accepted * tells, all_], session, weight
        )
        return replace(row, usd_per_request=found.per_request, usd_per_accepted=per_accepted)
    whole = _not_below_0(found.per_request)
    full = whole if one.capacity_searched else None
    for fleet, share in fleets:
        whole = whole + fleet.usd_per_request(rate, share)
        hour = given(share * fleet.usd_per_hour / 3600).over(fleet.capacity)
        full = None if full is None or hour is None else full + hour
    return replace(
        row, instances=None if one.fleet is None else one.fleet.instances(rate * calls),
        usd_per_request=whole, usd_per_accepted=_over(whole, row.accepted),
        usd_per_request_full=full, usd_per_accepted_full=_over(full, row.accepted),
    )  # fmt: skip


def _over(usd: Bounded | None, accepted: Bounded | None) -> Bounded | None:
    return None if usd is None or accepted is None else usd.over(accepted)


def _not_below_0(found: Bounded) -> Bounded:
    """Of a cost, which is not below 0."""
    return Bounded(max(0.0, found.value), max(0.0, found.low), max(0.0, found.high))


def _bounded(share: Bounded) -> Bounded:
    return Bounded(share.value, max(0.0, share.low), min(1.0, share.high))


def _per_1m(row: ModelRow, first: ModelRow, current: MeasuredModel, weight: Floats) -> ModelRow:
    into = column(current.grades[0], "input_tokens") if current.grades else np.zeros(0)
    if current.lengths is not None:
        into = current.lengths.input_tokens
    said = np.isfinite(into)
    if row.usd_per_request is None or first.output_tokens is None or not said.any():
        return row
    tokens = float(np.average(into[said], weights=weight[said])) + first.output_tokens.value
    return replace(row, usd_per_1m=row.usd_per_request.times(1e6 / tokens))


def _difference(pair: Paired | None) -> Bounded | None:
    return None if pair is None else _around(pair.difference, *pair.interval())


def _around(value: float, low: float, high: float) -> Bounded:
    """An interval with its value, which rounding may have put a hair outside."""
    return Bounded(value, min(low, value), max(high, value))


def _answer(
    verdict: AuditVerdict, row: ModelRow, first: ModelRow, sides: tuple[Side | None, Side | None], costs: Costs | None,
    facts: RecordFacts, again: Paired | None, candidate: CandidateModel, judge: JudgeTrust | None, seen: Bools,
) -> CandidateAnswer:  # fmt: skip
    base, side = sides
    session, weight, pair = facts.session, facts.weight, verdict.paired
    results = tokens = per_accepted = slope = hit = None
    whole = None if costs is None else costs.routed(np.ones(len(session), np.bool_))
    if pair is not None and base is not None and side is not None:
        known = np.isfinite(base.grades) & np.isfinite(side.grades) & seen
        results = ratio([side.grades[known]], [base.grades[known]], session[known], weight[known])
        said = np.isfinite(base.tokens) & np.isfinite(side.tokens)
        tokens = ratio([side.tokens[said]], [base.tokens[said]], session[said], weight[said]) if said.any() else None
        slope = depth_slope(_of(seen, base.grades), side.grades, facts)
        hit = sessions_hit(_of(seen, base.grades), side.grades, session)
    if costs is not None and whole is not None:
        if costs.current.fleet is None and costs.candidate.fleet is None and not costs.stated.fixed_usd_per_month:
            per_accepted = _per_accepted(costs, session, weight, seen.astype(np.float64))
        elif results is not None:
            per_accepted = whole.over(results)
    worse = verdict.word == "do not switch: worse"
    proven = verdict.not_worse is not None and verdict.not_worse <= ALPHA
    even = None if costs is None or row.evidence == "simulated" else _break_even(costs)
    claims = (
        *usual_claims(results, whole, False if worse else proven or None),
        *payroll_and_churn(whole, Stated() if costs is None else costs.stated, even),
    )
    return CandidateAnswer(
        verdict=verdict, sentence=sentence(verdict, row, first), difference=_difference(pair), usd_per_request=whole,
        usd_per_accepted=per_accepted, output_tokens=tokens,
        like_another_run=None if pair is None or again is None else like_another_run(pair, again), depth_slope=slope,
        judge=judge, judged=None if judge is None or pair is None or "prefer" in facts.kinds else corrected(
            pair.candidate, pair.n, judge, judge.right, judge.wrong
        ),
        cascade=candidate.cascade, claims=claims, break_even=even, sessions_hit=hit,
    )  # fmt: skip


def _break_even(costs: Costs) -> BreakEven | None:
    """With the rent of whole instances by request, of both at the end that saves less; None where that has none."""
    sides = []
    for model, dearer in ((costs.current, False), (costs.candidate, True)):
        usd, served = 0.0, model.served
        for fleet, calls in ((model.fleet, served.calls), (costs.current.fleet if dearer else None, served.escalated)):
            share = float(np.average(calls, weights=costs.weight))
            if fleet is not None and share > 0:
                rent = fleet.usd_per_request(costs.requests_per_s, share)
                usd += rent.high if dearer else rent.low
        if not math.isfinite(usd):
            return None
        sides.append(replace(model.served, usd=model.served.usd + usd))
    return break_even(sides[0], sides[1], costs.stated, costs.session, costs.weight)


def _per_accepted(costs: Costs, session: Ints, weight: Floats, told: Floats) -> Bounded | None:
    a, c = costs.current.served, costs.candidate.served
    over, under = [by_record(c, costs.stated), a.accepted * told], [by_record(a, costs.stated), c.accepted * told]
    return ratio(over, under, session, weight)


def sentence(verdict: AuditVerdict, row: ModelRow, first: ModelRow) -> str:
    """One candidate's answer in words."""
    said = f"{verdict.candidate}: {verdict.word}"
    if verdict.named:
        said += f" ({', '.join(verdict.named)})"
    if verdict.word == "not decided":
        if verdict.needed is not None:
            said += f": needs about {verdict.needed:,} graded records in all"
            if verdict.needed_as_seen is None:
                said += ", and no number would do were the difference the one that was seen"
        said += f"; open: {', '.join(verdict.open)}" if verdict.open else ""
    if verdict.why:
        said += f": {verdict.why}"
    if verdict.paired is not None and verdict.word != "INVALID":
        low, high = verdict.paired.interval()
        said += (
            f". Accepted {_share(row, verdict.paired.candidate)} against {_share(first, verdict.paired.current)}: "
            f"{100 * verdict.paired.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    if row.evidence == "simulated":
        said += f"; simulated, not measured{_simulated_bill(first, row)}"
    now, then = first.usd_per_accepted, row.usd_per_accepted
    if now is not None and then is not None and verdict.word != "INVALID":
        said += f"; USD per 1,000 accepted answers {1000 * now.value:.4g} now, {1000 * then.value:.4g} then"
    return said + "."


def _simulated_bill(first: ModelRow, row: ModelRow) -> str:
    """What both cost where no answer was graded; empty where one is not known."""
    now, then = first.usd_per_request, row.usd_per_request
    if now is None or then is None:
        return ""
    usd = [cost.low if one.at_least else cost.value for one, cost in ((first, now), (row, then))]
    least = ["at least " if one.at_least else "" for one in (first, row)]
    return (f": USD per 1,000 requests {least[0]}{1000 * usd[0]:.4g} now, {least[1]}{1000 * usd[1]:.4g} then, "
            "with equally long answers")  # fmt: skip


def _share(row: ModelRow, among_pairs: float) -> str:
    """Accepted, as the model's row has it: where some answers were not graded, pairs alone have another."""
    return f"{100 * (among_pairs if row.accepted is None else row.accepted.value):.1f} %"
