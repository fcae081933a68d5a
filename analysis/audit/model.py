"""One model of an audit: what was measured of it, and that as arrays with one entry a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from harness.analysis.arrays import Bools, Floats
from harness.analysis.quality.bill import (
    Attempts,
    CostedModel,
    Costs,
    Policy,
    Rented,
    ServedRequests,
    Stated,
    serve_each,
)
from harness.analysis.quality.cascade import Cascade, cascade
from harness.analysis.quality.estimate import Bounded
from harness.analysis.quality.judging import JudgeTrust
from harness.analysis.quality.slices import RecordFacts, slices
from harness.analysis.quality.verdict import MATTERS, Evidence
from harness.checks.grade import HALF
from harness.slo import criteria


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrice:
    """List prices, USD per 1M tokens."""

    input: float
    output: float
    cached: float | None = None
    """None: cached input costs what input costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of each record as the trace has them, for a model that nobody asked."""

    input_tokens: Floats
    output_tokens: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredModel:
    """What is known of one model on the records of the audit."""

    name: str
    grades: tuple[pa.Table, ...] = ()
    """Of `harness.audit.grades`, a row a record in their order, each time that it was asked; empty: it has none."""
    again: tuple[pa.Table, ...] = ()
    """The same model asked as often once more: the noise floor."""
    problem: str | None = None
    evidence: Evidence = "measured"
    slo_met: bool | None = None
    price: TokenPrice | None = None
    fleet: Rented | None = None
    """Rented instances; None: calls have a price, or nothing is known of its cost."""
    capacity_searched: bool = False
    load: str = ""
    """How the load pass went."""
    judge: JudgeTrust | None = None
    """Of the judge, on answers of this model and the current one; None: no check asks a judge."""
    sharpness: float = 1.0
    """Of its grades (`analysis.quality.judging.sharpness`)."""
    lengths: Lengths | None = None
    """Of a model that was simulated; None: it was asked."""
    at_least: bool = False
    """What it costs is a lower bound, by the chip's data sheet: it is held against nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One model in figures; intervals by session."""

    name: str
    accepted: Bounded | None
    """Share of the records whose check tells something."""
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
    calls: float | None
    """Of this model, per request."""
    escalated: float | None
    """Share of requests that the current model answers in the end."""
    slo_met: bool | None
    load: str
    problem: str | None
    evidence: Evidence = "measured"
    at_least: bool = False
    """Every cost is a lower bound, and the capacity an upper one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A model as arrays, one entry a record."""

    grades: Floats
    """Of what the policy serves."""
    attempts: Attempts
    """NaN: not graded."""
    served: ServedRequests | None
    """None: its calls have no price, or a token count is missing."""
    tokens: Floats
    """Per answer."""
    score: Floats
    """Mean log-probability of the first answer; NaN: the server gave none."""


def column(table: pa.Table, name: str) -> Floats:
    """Numbers of a column, NaN for null."""
    found: Floats = np.array([np.nan if x is None else float(x) for x in table.column(name).to_pylist()], np.float64)
    return found


def accepted(table: pa.Table) -> Floats:
    """Grades: 1, 0, a half where two answers are as good as each other, NaN for what was not graded."""
    half = np.array([reason in HALF for reason in table.column("reason").to_pylist()], np.bool_)
    found: Floats = np.where(half, 0.5, column(table, "accepted"))
    return found


def failed(table: pa.Table) -> Bools:
    """Requests without an answer."""
    return np.array([e2e is None for e2e in table.column("e2e_s").to_pylist()], np.bool_)


def side_of(
    tables: Sequence[pa.Table], one: MeasuredModel, facts: RecordFacts, policy: Policy, current: Side | None = None,
    *, blameless: bool = False,
) -> Side | None:  # fmt: skip
    """The model on its answers in ``tables``; ``current``: whom its gate escalates to. ``blameless``:
    what its server failed is not graded (of the current model, whose failures must not speak for a candidate). None
    without answers.
    """
    if not tables:
        return None if one.lengths is None else _unasked(one, one.lengths)

    def stacked(name: str) -> Floats:
        return np.stack([column(table, name) for table in tables], axis=1)

    lost = np.stack([failed(table) for table in tables], axis=1)
    grades = np.stack([accepted(table) for table in tables], axis=1)
    gate, output = stacked("gate"), stacked("output_tokens")
    gated = np.ones(len(gate), np.bool_) if facts.gated is None else facts.gated
    if blameless:
        grades = np.where(lost, np.nan, grades)
    if facts.gated is not None:
        grades = np.where(gated[:, None] & np.isnan(gate) & ~lost, np.nan, grades)  # who knows what is served then
    usd = np.zeros(gate.shape)
    if one.fleet is None:
        usd = np.stack([_usd(table, one.price) for table in tables], axis=1)
    attempts = Attempts(
        usd=usd, gate=np.where(lost, 0.0, np.where(np.isnan(gate), 1.0, gate)), accepted=grades, gated=gated,
        ttft_s=stacked("ttft_s"), e2e_s=stacked("e2e_s"),
    )  # fmt: skip
    up = current.attempts if policy.escalate and current is not None else None
    served = serve_each(_filled(attempts), policy, None if up is None else _filled(up))
    said = np.isfinite(output).sum(axis=1)
    return Side(
        grades=serve_each(attempts, policy, up).accepted if policy.asks_again else grades.mean(axis=1),
        attempts=attempts, served=served if np.isfinite(served.usd).all() else None,
        tokens=np.where(said > 0, np.nansum(output, axis=1) / np.maximum(said, 1), np.nan),
        score=column(tables[0], "mean_logprob"),
    )  # fmt: skip


def _unasked(one: MeasuredModel, lengths: Lengths) -> Side:
    """A model that answers each record once, nobody knows how well."""
    n, price = len(lengths.input_tokens), one.price
    usd, nothing, unknown = np.zeros(n), np.zeros(n), np.full(n, np.nan)
    if one.fleet is None:
        usd = unknown if price is None else (
            lengths.input_tokens * price.input + lengths.output_tokens * price.output
        ) / 1e6  # fmt: skip
    served = ServedRequests(
        calls=np.ones(n), usd=usd, escalated=nothing, rejected=nothing, undetected=nothing, accepted=nothing
    )
    return Side(
        grades=unknown, attempts=Attempts(usd=usd[:, None], gate=np.ones((n, 1)), accepted=unknown[:, None]),
        served=served if np.isfinite(usd).all() else None, tokens=lengths.output_tokens, score=unknown,
    )  # fmt: skip


def _filled(attempts: Attempts) -> Attempts:
    """Ungraded answers as good as the others: they cost what others cost."""
    known = attempts.accepted[np.isfinite(attempts.accepted)]
    usual = float(known.mean()) if len(known) else 0.0
    return replace(attempts, accepted=np.where(np.isfinite(attempts.accepted), attempts.accepted, usual))


def _usd(table: pa.Table, price: TokenPrice | None) -> Floats:
    """Of each call at list prices; a request that failed has no bill. NaN: no price, or no count."""
    output = column(table, "output_tokens")
    if price is None:
        return np.full(len(output), np.nan)
    into, cached = column(table, "input_tokens"), np.nan_to_num(column(table, "cached_tokens"))
    dear = price.input if price.cached is None else price.cached
    usd: Floats = ((into - cached) * price.input + cached * dear + output * price.output) / 1e6
    return np.where(failed(table), 0.0, usd)


def costs_of(
    current: MeasuredModel, base: Side | None, one: MeasuredModel, side: Side | None, stated: Stated,
    facts: RecordFacts, rate: float,
) -> Costs | None:  # fmt: skip
    """The bill of one candidate beside the current model; None: one of them has none, or but a lower bound."""
    if current.at_least or one.at_least:
        return None
    if base is None or side is None or base.served is None or side.served is None:
        return None
    return Costs(
        current=CostedModel(served=base.served, fleet=current.fleet),
        candidate=CostedModel(served=side.served, fleet=one.fleet),
        stated=stated, session=facts.session, weight=facts.weight, requests_per_s=rate,
    )  # fmt: skip


def within(
    ttft_s: Floats, e2e_s: Floats, weight: Floats, slo: Mapping[str, float], attain: float
) -> bool | None:  # fmt: skip
    """Whether added latencies, shape (records, any), keep what an SLO says of ttft and e2e; NaN is not within.

    None: nothing is known of them. Time per token is each model's own, and not asked here.
    """
    if not np.isfinite(e2e_s).any():
        return None
    known = {"ttft": ttft_s, "e2e": e2e_s}
    share = weight / weight.sum()
    for criterion in criteria(slo, attain):
        kept = np.ones(e2e_s.shape, np.bool_)
        for metric, limit in criterion.limits.items():
            if metric in known:
                kept &= np.nan_to_num(known[metric], nan=np.inf) <= limit
        if float(share @ kept.mean(axis=1)) < criterion.wanted - 1e-12:
            return False
    return True


def all_of(*found: bool | None) -> bool | None:
    """False where one is, else None where one is not known."""
    return False if False in found else None if None in found else True


def slo_of(
    one: MeasuredModel, side: Side | None, current: MeasuredModel, policy: Policy, slo: Mapping[str, float],
    attain: float, weight: Floats,
) -> bool | None:  # fmt: skip
    """Whether a model keeps the SLO as it is asked: its own load, that of whom it escalates to, and all calls."""
    if not policy.asks_again or side is None or side.served is None:
        return one.slo_met
    served = side.served
    if served.ttft_s is None or served.e2e_s is None:
        return None
    other = current.slo_met if policy.escalate else True
    return all_of(one.slo_met, other, within(served.ttft_s, served.e2e_s, weight, slo, attain))


def cascade_of(
    one: MeasuredModel, side: Side, current: MeasuredModel, base: Side, costs: Costs | None, facts: RecordFacts,
    *, margin: float, slo: Mapping[str, float], attain: float, blind: Bools | None = None,
) -> Cascade | None:  # fmt: skip
    """The candidate first and the current model where its first answer seems unsure; None: the server gave no score.

    An answer is shown once it is whole, for only then it has its score.
    """
    if not np.isfinite(side.score).any():
        return None
    mine, theirs = side.attempts, base.attempts
    if mine.e2e_s is None or theirs.e2e_s is None or theirs.ttft_s is None:
        return None
    own, more, first = mine.e2e_s[:, :1], theirs.e2e_s[:, :1], theirs.ttft_s[:, :1]

    def slo_met(escalated: Bools) -> bool | None:
        up = escalated[:, None]
        both = within(np.where(up, own + first, own), np.where(up, own + more, own), facts.weight, slo, attain)
        return all_of(one.slo_met, current.slo_met, both)

    first_grades = side.attempts.accepted[:, 0]
    total = float(facts.weight.sum())
    large = {
        name: part.mask for name, part in slices(facts).items() if float(facts.weight @ part.mask) >= MATTERS * total
    }
    return cascade(
        side.score, base.grades, first_grades if blind is None else np.where(blind, np.nan, first_grades),
        facts.session, facts.weight, margin=margin * one.sharpness, slo_met=slo_met, parts=large,
        bill=lambda escalated: None if costs is None else costs.cascade(escalated),
    )  # fmt: skip
