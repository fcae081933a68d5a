"""The whole bill of a request, and of an accepted answer: calls, retries, escalation, checks, review, failures.

From observed attempts, never from 1/p: what is asked again, escalated or handed to a person is decided by the gate,
which is what production can test; whether the answer was right, by the check. What the user did not state (wages, the
price of a failure) is not invented: its part is left out, and the break-even says where it would turn the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.cost.cost import HOURS_PER_MONTH
from harness.analysis.quality.estimate import Bounded, given, mean, quotient, ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """What a model answered, shape (records, attempts), in the order asked. NaN: not asked."""

    usd: Floats
    """Of the call, by its tokens; 0 where the server is rented by the hour."""
    gate: Floats
    """1 where production's own test passes, or where there is none; 0 where it fails or the server did."""
    accepted: Floats
    """By the check: 0 to 1. A failure of the server is 0."""
    gated: Bools | None = None
    """By record, whether it has a gate to test; None: all have."""
    ttft_s: Floats | None = None
    e2e_s: Floats | None = None
    """From sending to the first token, and to the end. NaN or None: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What production does when its gate rejects an answer."""

    tries: int = 1
    """Calls of a model at most."""
    escalate: bool = False
    """Then the current model is asked, in place of a person."""

    @property
    def asks_again(self) -> bool:
        """It may cost more than one call."""
        return self.tries > 1 or self.escalate


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequests:
    """What became of each request in the end; arrays with one entry a record."""

    calls: Floats
    """Of this model."""
    usd: Floats
    """Of those calls, and of the escalation."""
    escalated: Floats
    """1 where the current model was asked in the end."""
    rejected: Floats
    """1 where the gate let nothing through: a person's."""
    undetected: Floats
    """Let through, and wrong: 0 to 1."""
    accepted: Floats
    """Let through, and right: 0 to 1."""
    gate_calls: Floats | None = None
    """None: one for each call."""
    ttft_s: Floats | None = None
    e2e_s: Floats | None = None
    """Of all calls together, shape (records, any); None: not known. A gated answer is shown once it is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What only the user knows. None: not stated, so not in the bill."""

    wage_usd_per_hour: float | None = None
    review_minutes: float | None = None
    """Of a person, per answer that the gate rejects or that is looked at."""
    review_share: float = 0.0
    """Of the answers that the gate lets through, those that a person looks at all the same."""
    failure_usd: float | None = None
    """Per answer that was wrong and went out: rework, churn."""
    gate_usd: float = 0.0
    """Per call of the gate: a judge's tokens."""
    engineering_hours: float = 0.0
    """Once, for the change."""
    months: float = 12.0
    """Over which it is written off."""
    requests_per_month: float | None = None

    @property
    def fixed_usd_per_month(self) -> float:
        """Of the engineering; 0 without a wage."""
        return self.engineering_hours * (self.wage_usd_per_hour or 0.0) / self.months


def serve(attempts: Attempts, most: int, escalate_to: Attempts | None = None) -> ServedRequests:
    """Ask up to ``most`` times until the gate passes, then escalate or hand over.

    ``escalate_to``: the current model's own answers; None: no escalation, a person has it. The escalated answer goes
    through the gate, too.
    """
    n, columns = attempts.usd.shape
    calls, usd, accepted = np.zeros(n), np.zeros(n), np.zeros(n)
    waiting = np.ones(n, np.bool_)
    let_through = np.zeros(n, np.bool_)
    spent = np.zeros(n)
    shown = np.full(n, np.nan)
    gated = np.ones(n, np.bool_) if attempts.gated is None else attempts.gated

    def wait(one: Attempts, asked: Bools, k: int) -> None:
        if one.e2e_s is None or one.ttft_s is None:
            spent[asked] = np.nan
            return
        shown[asked] = spent[asked] + np.where(gated, one.e2e_s[:, k], one.ttft_s[:, k])[asked]
        spent[asked] += one.e2e_s[asked, k]

    for k in range(min(most, columns)):
        asked = waiting & np.isfinite(attempts.gate[:, k])
        calls[asked] += 1
        usd[asked] += attempts.usd[asked, k]
        wait(attempts, asked, k)
        passes = asked & (attempts.gate[:, k] >= 0.5)
        accepted[passes] = attempts.accepted[passes, k]
        let_through |= passes
        waiting &= ~passes
    escalated = np.zeros(n)
    if escalate_to is not None:
        escalated[waiting] = 1
        usd[waiting] += escalate_to.usd[waiting, 0]
        wait(escalate_to, waiting, 0)
        passes = waiting & (escalate_to.gate[:, 0] >= 0.5)
        accepted[passes] = escalate_to.accepted[passes, 0]
        let_through |= passes
    return ServedRequests(
        calls=calls, usd=usd, escalated=escalated, rejected=(~let_through).astype(np.float64),
        undetected=np.where(let_through, 1 - accepted, 0.0), accepted=accepted, gate_calls=(calls + escalated) * gated,
        ttft_s=shown[:, None], e2e_s=spent[:, None],
    )  # fmt: skip


def serve_each(attempts: Attempts, policy: Policy, escalate_to: Attempts | None = None) -> ServedRequests:
    """`serve` from each attempt on in turn, and the mean of that: none of the answers is the first by nature."""

    def turned(one: Attempts, by: int) -> Attempts:
        usd, gate, accepted = (np.roll(x, -by, axis=1) for x in (one.usd, one.gate, one.accepted))
        ttft_s, e2e_s = (None if x is None else np.roll(x, -by, axis=1) for x in (one.ttft_s, one.e2e_s))
        return replace(one, usd=usd, gate=gate, accepted=accepted, ttft_s=ttft_s, e2e_s=e2e_s)

    each = [
        serve(
            turned(attempts, k), policy.tries,
            turned(escalate_to, k) if policy.escalate and escalate_to is not None else None,
        )
        for k in range(attempts.usd.shape[1])
    ]  # fmt: skip
    means = ("calls", "usd", "escalated", "rejected", "undetected", "accepted", "gate_calls")
    return ServedRequests(
        **{name: np.mean([getattr(one, name) for one in each], axis=0) for name in means},
        ttft_s=np.hstack([one.ttft_s for one in each if one.ttft_s is not None]),
        e2e_s=np.hstack([one.e2e_s for one in each if one.e2e_s is not None]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """USD per request of a model, part by part, with intervals by session."""

    calls: Bounded
    gate: Bounded
    review: Bounded | None
    failures: Bounded | None
    """None: the price of it was not stated."""
    per_request: Bounded
    """Of all parts that are known; engineering apart."""
    per_accepted: Bounded | None
    """None: no answer was accepted."""
    accepted: Bounded
    calls_per_request: Bounded


def by_record(served: ServedRequests, stated: Stated) -> Floats:
    """USD of each record: calls, gate, review, failures."""
    review, failures = _review(served, stated), _failures(served, stated)
    usd: Floats = served.usd + _gate_calls(served) * stated.gate_usd
    return usd + (0.0 if review is None else review) + (0.0 if failures is None else failures)


def bill(served: ServedRequests, stated: Stated, session: Ints, weight: Floats) -> Bill:
    """The parts and the sum, per request and per accepted answer."""

    def average(values: Floats) -> Bounded:
        return mean(values, session, weight)

    total = by_record(served, stated)
    review, failures = _review(served, stated), _failures(served, stated)
    return Bill(
        calls=average(served.usd), gate=average(_gate_calls(served) * stated.gate_usd),
        review=None if review is None else average(review), failures=None if failures is None else average(failures),
        per_request=average(total), per_accepted=ratio([total], [served.accepted], session, weight),
        accepted=average(served.accepted), calls_per_request=average(served.calls),
    )  # fmt: skip


def _gate_calls(served: ServedRequests) -> Floats:
    return served.calls + served.escalated if served.gate_calls is None else served.gate_calls


def _looked_at(served: ServedRequests, stated: Stated) -> Floats:
    looked: Floats = served.rejected + (1 - served.rejected) * stated.review_share
    return looked


def _review(served: ServedRequests, stated: Stated) -> Floats | None:
    if stated.wage_usd_per_hour is None or stated.review_minutes is None:
        return None
    return _looked_at(served, stated) * (stated.review_minutes / 60 * stated.wage_usd_per_hour)


def _failures(served: ServedRequests, stated: Stated) -> Floats | None:
    return None if stated.failure_usd is None else served.undetected * stated.failure_usd


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """Where the candidate stops being the cheaper one. None: what it depends on was not stated, or nothing turns it."""

    failure_rate: Bounded | None
    """Share of wrong answers that go out at which the saving is gone; needs the price of a failure."""
    failure_usd: Bounded | None
    """Price of a failure above which the current model wins; None where the candidate does not surely fail more."""
    minutes_per_failure: Bounded | None
    """Minutes of a person per failure more; the same, in time; needs a wage."""
    review_usd_per_100: Bounded
    """Of a person's time, per 100 answers, that the saving pays for. Negative: there is no saving."""
    minutes_per_100: Bounded | None
    """The same in minutes; needs a wage."""
    requests_per_month: Bounded | None
    """Volume from which on the engineering is repaid; None where there is none or no sure saving."""


def break_even(
    current: ServedRequests, candidate: ServedRequests, stated: Stated, session: Ints, weight: Floats
) -> BreakEven:
    """Closed forms with ends, by session. Each leaves out of the saving the part that it asks for."""

    def saving(without: Stated) -> Floats:
        return by_record(current, without) - by_record(candidate, without)

    more_failures: Floats = candidate.undetected - current.undetected
    wage = stated.wage_usd_per_hour
    no_failures, no_review = replace(stated, failure_usd=None), replace(stated, review_minutes=None)
    rate = usd_at = minutes = volume = None
    if stated.failure_usd:
        rate = mean(current.undetected + saving(no_failures) / stated.failure_usd, session, weight)
    usd_at = quotient(saving(no_failures), more_failures, session, weight)
    if wage:
        minutes = None if usd_at is None else usd_at.times(60 / wage)
    per_100 = mean(saving(no_review) * 100, session, weight)
    kept = mean(saving(stated), session, weight)
    if stated.fixed_usd_per_month > 0 and kept.low > 0:
        volume = given(stated.fixed_usd_per_month).over(kept)
    return BreakEven(
        failure_rate=rate, failure_usd=usd_at, minutes_per_failure=minutes, review_usd_per_100=per_100,
        minutes_per_100=per_100.times(60 / wage) if wage else None, requests_per_month=volume,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rented:
    """Rented instances of one kind that serve one model."""

    usd_per_hour: float
    """Of one instance."""
    capacity: Bounded
    """Requests/s of one instance at the SLO, with this model's own answer lengths."""

    def instances(self, requests_per_s: float) -> Bounded:
        """Whole ones, by either end of the capacity; 0 for no requests. Infinite where the capacity may be 0."""

        def whole(capacity: float) -> float:
            return math.inf if capacity <= 0 else float(math.ceil(requests_per_s / capacity - 1e-9))

        if requests_per_s <= 0:
            return given(0.0)
        return Bounded(whole(self.capacity.value), whole(self.capacity.high), whole(self.capacity.low))

    def usd_per_request(self, requests_per_s: float, calls: float = 1.0) -> Bounded:
        """Rent of the whole instances for so many ``calls`` a request; ``requests_per_s`` above 0."""
        return self.instances(requests_per_s * calls).times(self.usd_per_hour / 3600 / requests_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostedModel:
    """What a model costs: by record, and its fleet where it runs on rented instances (None: calls have list prices)."""

    served: ServedRequests
    fleet: Rented | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The whole monthly bill of sending some records to a candidate, over that of sending all to the current model."""

    current: CostedModel
    candidate: CostedModel
    stated: Stated
    session: Ints
    weight: Floats
    requests_per_s: float
    """Of the trace, at which instances are counted; a month has `HOURS_PER_MONTH` of it."""

    def routed(self, mask: Bools) -> Bounded | None:
        """The candidate answers the records of the mask, the current model the others."""
        sent = mask.astype(np.float64)
        own, theirs = self.candidate.served, self.current.served
        records = np.where(mask, by_record(own, self.stated), by_record(theirs, self.stated))
        return self._over_today(
            records, sent * own.calls, sent * own.escalated + (1 - sent) * theirs.calls, changes=bool(mask.any())
        )  # fmt: skip

    def cascade(self, escalated: Bools) -> Bounded | None:
        """The candidate answers all, the current model once more those that are escalated."""
        up = escalated.astype(np.float64)
        own, theirs = self.candidate.served, self.current.served
        calls_only = Stated(gate_usd=self.stated.gate_usd)
        records = np.where(
            escalated, by_record(own, calls_only) + by_record(theirs, self.stated), by_record(own, self.stated)
        )
        return self._over_today(records, own.calls, up * theirs.calls + (1 - up) * own.escalated, changes=True)

    def _over_today(self, records: Floats, candidate: Floats, current: Floats, *, changes: bool) -> Bounded | None:
        today = by_record(self.current.served, self.stated)
        fixed = self.stated.fixed_usd_per_month if changes else 0.0
        rented = self.current.fleet is not None or self.candidate.fleet is not None
        if not rented and not fixed:
            return ratio([records], [today], self.session, self.weight)
        requests = self.requests_per_s * 3600 * HOURS_PER_MONTH
        then, now = self._average(records).times(requests) + given(fixed), self._average(today).times(requests)
        for model, calls in ((self.candidate, candidate), (self.current, current)):
            then = then + self._rent(model, calls)
        now = now + self._rent(self.current, self.current.served.calls)
        return then.over(now)

    def _average(self, usd: Floats) -> Bounded:
        """Of figures that are 0 or more."""
        found = mean(usd, self.session, self.weight)
        return Bounded(found.value, max(0.0, found.low), found.high)

    def _rent(self, model: CostedModel, calls: Floats) -> Bounded:
        """USD per month of the instances that carry so many calls per record."""
        if model.fleet is None:
            return given(0.0)
        rate = self.requests_per_s * float(self.weight @ calls) / float(self.weight.sum())
        return model.fleet.instances(rate).times(model.fleet.usd_per_hour * HOURS_PER_MONTH)
