"""From the grades, tokens and loads of several models to the document of an audit: ``harness.audit/1``.

All that decides is in `analysis.quality`; here its inputs are put together from what was measured, record by record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from analysis.arrays import Bools, Floats, Ints
from analysis.quality.bill import (
    Attempts,
    BreakEven,
    CostedModel,
    Costs,
    Rented,
    ServedRequests,
    Stated,
    bill,
    break_even,
    by_record,
    serve,
)
from analysis.quality.claims import Claim, usual_claims
from analysis.quality.estimate import Bounded, given, mean, ratio
from analysis.quality.paired import ALPHA, Paired, like_another_run, paired
from analysis.quality.slices import RecordFacts, depth_slope, slices
from analysis.quality.verdict import AuditVerdict, CandidateModel, Evidence, GradedRecords, decide

SCHEMA = "harness.audit/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrice:
    """List prices, USD per 1M tokens."""

    input: float
    output: float
    cached: float | None = None
    """None: cached input costs what input costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What is known of one model on the records of the audit."""

    name: str
    grades: pa.Table | None
    """Of `harness.audit.grades`, a row a record in their order; None: it has none."""
    again: pa.Table | None = None
    """The same model asked once more in another order."""
    problem: str | None = None
    evidence: Evidence = "measured"
    slo_met: bool | None = None
    price: TokenPrice | None = None
    fleet: Rented | None = None
    """Rented instances; None: calls have a price, or nothing is known of its cost."""
    capacity_searched: bool = False
    load: str = ""
    """How the load pass went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model in figures; intervals by session."""

    name: str
    accepted: Bounded | None
    ungraded: float | None
    """Share of records."""
    failed: float | None
    """Share of requests that the server failed; they count as rejected."""
    cut: float | None
    """Share of answers that ended at their cap."""
    output_tokens: Bounded | None
    """Per answer."""
    usd_per_request: Bounded | None
    """Of calls, or of whole instances at the trace's volume; with what the user stated of review and failures."""
    usd_per_accepted: Bounded | None
    usd_per_request_full: Bounded | None
    """Of an instance that is as full as the SLO allows: what the next request costs. None: no capacity was searched."""
    usd_per_accepted_full: Bounded | None
    usd_per_1m: Bounded | None
    """Per 1M tokens of the *current* model for the same requests: tokenizers differ."""
    instances: Bounded | None
    capacity: Bounded | None
    """Requests/s of one instance at the SLO; None: not searched."""
    slo_met: bool | None
    load: str
    problem: str | None


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


@dataclass(frozen=True, slots=True)
class _Side:
    """A model as arrays, one entry a record."""

    grades: Floats | None
    served: ServedRequests | None
    """None: its calls have no price, or a token count is missing."""
    tokens: Floats


def audit_report(
    facts: RecordFacts, measured: Sequence[MeasuredModel], *, margin: float, slo: Mapping[str, float],
    requests_per_s: float,
    stated: Stated, unmeasurable: frozenset[str], made: str, folder: str, trace: str, records: int, checks_sha256: str,
    notes: Sequence[str] = (),
) -> AuditReport:  # fmt: skip
    """The whole of it; ``measured``: the current model first."""
    current, *others = measured
    session, weight = facts.session, facts.weight
    sides = [_side(one, len(session)) for one in measured]
    base = sides[0]
    own = base.grades if base.grades is not None else np.full(len(session), np.nan)
    broken = None if current.problem is None else f"the current model: {current.problem}"
    bills = [_costs(current, base, one, side, stated, facts, requests_per_s)
             for one, side in zip(others, sides[1:], strict=True)]  # fmt: skip

    def bill_of(costs: Costs | None, mask: Bools) -> Bounded | None:
        return None if costs is None else costs.routed(mask)

    candidates = [
        CandidateModel(
            name=one.name, grades=side.grades, bill=partial(bill_of, costs),
            slo_met=one.slo_met, evidence=one.evidence if current.evidence == "measured" else current.evidence,
            problem=broken or one.problem,
        )
        for one, side, costs in zip(others, sides[1:], bills, strict=True)
    ]  # fmt: skip
    asked = GradedRecords(current=own, session=session, weight=weight, slices=slices(facts, unmeasurable))
    verdicts = decide(asked, candidates, margin)
    rows = [_row(one, side, stated, facts, requests_per_s) for one, side in zip(measured, sides, strict=True)]
    rows = [_per_1m(row, rows[0], current, weight) for row in rows]
    again = (
        None if current.again is None or broken else paired(own, _column(current.again, "accepted"), session, weight)
    )
    answers = tuple(
        _answer(verdict, row, rows[0], (base, side), costs, facts, again)
        for verdict, row, side, costs in zip(verdicts, rows[1:], sides[1:], bills, strict=True)
    )
    return AuditReport(
        schema=SCHEMA, made=made, folder=folder, trace=trace, records=records, graded=len(session),
        sessions=len(np.unique(session)), margin=margin, slo=dict(slo), requests_per_s=requests_per_s,
        checks_sha256=checks_sha256, noise=again, noise_difference=_difference(again), models=tuple(rows),
        answers=answers, notes=tuple(notes),
    )  # fmt: skip


def _column(table: pa.Table, name: str) -> Floats:
    found: Floats = np.array([np.nan if x is None else float(x) for x in table.column(name).to_pylist()], np.float64)
    return found


def _side(one: MeasuredModel, n: int) -> _Side:
    """``usd`` is 0 where the server is rented by the hour."""
    nothing = np.full(n, np.nan)
    if one.grades is None:
        return _Side(None, None, nothing)
    table, grades = one.grades, _column(one.grades, "accepted")
    tokens = _column(table, "output_tokens")
    gate = _column(table, "gate")
    failed = _failed(table)
    passes = np.where(failed, 0.0, np.where(np.isnan(gate), 1.0, gate))
    usd: Floats = np.zeros(n)
    if one.fleet is None:
        usd = _usd(table, tokens, failed, one.price)
    if not np.isfinite(usd).all():
        return _Side(grades, None, tokens)
    known = grades[np.isfinite(grades)]
    filled = np.where(np.isfinite(grades), grades, known.mean() if len(known) else 0.0)
    attempts = Attempts(usd=usd[:, None], gate=passes[:, None], accepted=filled[:, None])
    return _Side(grades, serve(attempts, 1), tokens)


def _failed(table: pa.Table) -> Bools:
    return np.array([e2e is None for e2e in table.column("e2e_s").to_pylist()], np.bool_)


def _usd(table: pa.Table, output: Floats, failed: Bools, price: TokenPrice | None) -> Floats:
    """Of each call at list prices; a request that failed has no bill. NaN: no price, or no count."""
    if price is None:
        return np.full(len(output), np.nan)
    into, cached = _column(table, "input_tokens"), np.nan_to_num(_column(table, "cached_tokens"))
    dear = price.input if price.cached is None else price.cached
    usd: Floats = ((into - cached) * price.input + cached * dear + output * price.output) / 1e6
    return np.where(failed, 0.0, usd)


def _costs(
    current: MeasuredModel,
    base: _Side,
    one: MeasuredModel,
    side: _Side,
    stated: Stated,
    facts: RecordFacts,
    rate: float,
) -> Costs | None:
    if base.served is None or side.served is None:
        return None
    return Costs(
        current=CostedModel(served=base.served, fleet=current.fleet),
        candidate=CostedModel(served=side.served, fleet=one.fleet),
        stated=stated, session=facts.session, weight=facts.weight, requests_per_s=rate,
    )  # fmt: skip


def _row(one: MeasuredModel, side: _Side, stated: Stated, facts: RecordFacts, rate: float) -> ModelRow:
    session, weight, table = facts.session, facts.weight, one.grades
    row = ModelRow(
        name=one.name, accepted=None, ungraded=None, failed=None, cut=None, output_tokens=None, usd_per_request=None,
        usd_per_accepted=None, usd_per_request_full=None, usd_per_accepted_full=None, usd_per_1m=None, instances=None,
        capacity=one.fleet.capacity if one.fleet and one.capacity_searched else None,
        slo_met=one.slo_met, load=one.load, problem=one.problem,
    )  # fmt: skip
    if table is None or side.grades is None:
        return row
    known, said = np.isfinite(side.grades), np.isfinite(side.tokens)
    ends = np.array([x == "length" for x in table.column("finish_reason").to_pylist()], np.bool_)
    row = replace(
        row, ungraded=float(np.average(~known, weights=weight)),
        failed=float(np.average(_failed(table), weights=weight)), cut=float(np.average(ends, weights=weight)),
        accepted=_bounded(mean(side.grades[known], session[known], weight[known])) if known.any() else None,
        output_tokens=mean(side.tokens[said], session[said], weight[said]) if said.any() else None,
    )  # fmt: skip
    if side.served is None:
        return row
    found = bill(side.served, stated, session, weight)
    if one.fleet is None:
        return replace(row, usd_per_request=found.per_request, usd_per_accepted=found.per_accepted)
    extra = _not_below_0(found.per_request)
    whole, full = one.fleet.usd_per_request(rate) + extra, None
    if one.capacity_searched and (hour := given(one.fleet.usd_per_hour / 3600).over(one.fleet.capacity)) is not None:
        full = hour + extra
    return replace(
        row, instances=one.fleet.instances(rate), usd_per_request=whole, usd_per_accepted=_over(whole, row.accepted),
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
    into = np.zeros(0) if current.grades is None else _column(current.grades, "input_tokens")
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
    verdict: AuditVerdict, row: ModelRow, first: ModelRow, sides: tuple[_Side, _Side], costs: Costs | None,
    facts: RecordFacts,
    again: Paired | None,
) -> CandidateAnswer:  # fmt: skip
    base, side = sides
    session, weight, pair = facts.session, facts.weight, verdict.paired
    results = tokens = per_accepted = slope = None
    whole = None if costs is None else costs.routed(np.ones(len(session), np.bool_))
    if pair is not None and base.grades is not None and side.grades is not None:
        known = np.isfinite(base.grades) & np.isfinite(side.grades)
        results = ratio([side.grades[known]], [base.grades[known]], session[known], weight[known])
        said = np.isfinite(base.tokens) & np.isfinite(side.tokens)
        tokens = ratio([side.tokens[said]], [base.tokens[said]], session[said], weight[said]) if said.any() else None
        slope = depth_slope(base.grades, side.grades, facts)
    if costs is not None and whole is not None:
        if costs.current.fleet is None and costs.candidate.fleet is None and not costs.stated.fixed_usd_per_month:
            per_accepted = _per_accepted(costs, session, weight)
        elif results is not None:
            per_accepted = whole.over(results)
    worse = verdict.word == "do not switch: worse"
    proven = verdict.not_worse is not None and verdict.not_worse <= ALPHA
    return CandidateAnswer(
        verdict=verdict, sentence=sentence(verdict, row, first), difference=_difference(pair), usd_per_request=whole,
        usd_per_accepted=per_accepted, output_tokens=tokens,
        like_another_run=None if pair is None or again is None else like_another_run(pair, again), depth_slope=slope,
        claims=usual_claims(results, whole, False if worse else proven or None),
        break_even=None if costs is None else _break_even(costs),
    )  # fmt: skip


def _break_even(costs: Costs) -> BreakEven | None:
    """With the rent of whole instances by request, of both at the end that saves less; None where that has none."""
    sides = []
    for model, dearer in ((costs.current, False), (costs.candidate, True)):
        usd = 0.0
        if model.fleet is not None:
            rent = model.fleet.usd_per_request(costs.requests_per_s)
            usd = rent.high if dearer else rent.low
        if not math.isfinite(usd):
            return None
        sides.append(replace(model.served, usd=model.served.usd + usd))
    return break_even(sides[0], sides[1], costs.stated, costs.session, costs.weight)


def _per_accepted(costs: Costs, session: Ints, weight: Floats) -> Bounded | None:
    a, c = costs.current.served, costs.candidate.served
    return ratio(
        [by_record(c, costs.stated), a.accepted], [by_record(a, costs.stated), c.accepted], session, weight
    )  # fmt: skip


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
            f". Accepted {100 * verdict.paired.candidate:.1f} % against {100 * verdict.paired.current:.1f} %: "
            f"{100 * verdict.paired.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    now, then = first.usd_per_accepted, row.usd_per_accepted
    if now is not None and then is not None and verdict.word != "INVALID":
        said += f"; USD per 1,000 accepted answers {1000 * now.value:.4g} now, {1000 * then.value:.4g} then"
    return said + "."
