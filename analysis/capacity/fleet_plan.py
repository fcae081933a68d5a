"""From a demand and measured capacities to fleets, what they cost, and the cheapest one that meets the SLO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal, Protocol

from harness.analysis.capacity.fitted_engine import FittedEngine, NotFittedError
from harness.analysis.capacity.fleet import (
    HOLD_MINUTES,
    Autoscaled,
    DemandRates,
    Fleet,
    Kept,
    Schedule,
    Sensitivity,
    TierOffer,
    TrafficDemand,
    autoscaled,
    failing,
    fleet,
    schedule,
    share_or_none,
)
from harness.analysis.capacity.serving_config import ServingConfig, drain_words
from harness.analysis.capacity.simulated_fleet import SimulatedFleet
from harness.analysis.cost.cost import HOURS_PER_MONTH, usd_per_1m
from harness.analysis.price_age import OLD_DAYS, is_old
from harness.analysis.stats.intervals import Evidence, Quantity
from harness.slo import percent

SCHEMA = "harness.fleet/1"
LARGEST_LENGTH_CHANGE = 0.1
"""Of the mean tokens of a request, between what was measured and what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the fleet is planned for."""

    requests: TrafficDemand
    """Requests/s, growth included."""
    tokens: TrafficDemand | None
    """Input + output tokens/s, growth included; None when rows do not say their lengths."""
    grow: float = 1.0
    headroom: float = 1.0
    """The fleet is planned for this many times the demand: how wrong the forecast may be. Bursts are no reason."""
    availability: float | None = None
    node_availability: float = 1.0
    start_s: float | None = None
    """Instead of what was measured."""
    replicas_per_instance: int | None = None
    """Instead of what the accelerators hold."""

    def usd_per_1m(self, usd_per_hour: float) -> float | None:
        """USD per 1M tokens of the demand at its mean rate; None when tokens are not known."""
        if self.tokens is None or self.tokens.mean <= 0:
            return None
        return usd_per_1m(usd_per_hour / 3600, self.tokens.mean)


class Replays(Protocol):
    """The demand, replayed in virtual time; whoever asks need not know how."""

    def fleet(self, system: ServingConfig, factor: float, likely: int) -> SimulatedFleet:
        """The fleet of a system for ``factor`` times the demand, from a likely number of replicas on. Raises
        `NotFittedError` where the fluid answer must stand alone.
        """

    def scaled(
        self, system: ServingConfig, fitted: FittedEngine, factor: float, plan: Schedule, spares: int, per_instance: int
    ) -> Kept:
        """How instances that come and go as ``plan`` says, each of ``per_instance`` replicas, meet the SLO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFleet:
    """The fleets of one model on one tier."""

    name: str
    model: str
    tier: str | None
    slo: str | None
    evidence: Evidence
    replicas_measured: int
    capacity: float
    """Of one replica, in ``unit``."""
    capacity_low: float | None
    capacity_high: float | None
    at_least: bool
    """The measured loads did not reach capacity: the figure is a lower bound, and the fleet may be smaller."""
    binding: Literal["requests", "tokens"]
    """Which of the two needs more replicas."""
    unit: str
    replicas_per_instance: int
    start_s: float | None
    usd_per_hour: float
    """Of one instance."""
    price_basis: str
    mean: Fleet
    worst_minute: Fleet
    peak: Fleet
    """The fleet to buy when nothing scales, spare instances included: by replay where there is one, else ``fluid``."""
    fluid: Fleet
    """Worst minute x headroom over capacity, spare instances included. Capacity was measured with the traffic's bursts
    in it, and the worst minute has them again: rather too large where traffic has bursts."""
    simulated: SimulatedFleet | None
    """The replay behind ``peak``; None: it is the fluid answer."""
    not_simulated: str | None
    """Why there was no replay."""
    failures: Kept | None
    """``peak`` when its instances fail as often as their availability says; None: not asked for, or not replayed."""
    reactive: Autoscaled
    scheduled: Autoscaled
    no_utilisation: str | None
    """Why ``peak`` has no utilisation; None: it has one."""
    usd_per_1m_served: float | None
    """Peak fleet around the clock over the tokens of the demand."""
    usd_per_1m_scheduled: float | None
    sensitivities: tuple[Sensitivity, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """``harness.fleet/1``."""

    schema: str
    made: str
    trace: str
    sentence: str
    requests: DemandRates
    """Requests/s, growth included."""
    tokens: DemandRates | None
    """Input + output tokens/s, growth included; None when the trace does not say."""
    grow: float
    headroom: float
    availability: float | None
    node_availability: float
    tiers: tuple[TierFleet, ...]
    """Cheapest peak fleet first."""
    excluded: tuple[tuple[str, str], ...]
    """(model on tier, or an INVALID run; why it cannot be planned with)."""
    assumptions: tuple[str, ...]


def grown(wanted: Wanted, factor: float) -> Wanted:
    """The same with ``factor`` times the demand."""
    return replace(
        wanted, requests=wanted.requests.grown(factor), tokens=wanted.tokens.grown(factor) if wanted.tokens else None,
        grow=wanted.grow * factor,
    )  # fmt: skip


def plan_fleets(
    systems: Sequence[ServingConfig], wanted: Wanted, *, made: str, trace: str, others: Sequence[ServingConfig] = (),
    refused: Sequence[tuple[str, str]] = (), replays: Replays | None = None,
) -> FleetPlan:  # fmt: skip
    """Fleets of every system that has a capacity in an open loop and a price, cheapest peak fleet first.

    ``others``: the same systems under other SLOs, for sensitivity alone. ``refused``: runs that are no evidence,
    each with the reason; they are listed with what was left out. ``replays``: None: fluid alone.
    """
    opened = {s.name for s in systems if s.loop != "closed"}
    # beside an open loop the closed one is the ladder of a search that went on
    asked = [(s, _unfit(s)) for s in systems if s.loop != "closed" or s.name not in opened]
    excluded = [(s.name, why) for s, why in asked if why is not None]
    today = date.fromisoformat(made[:10])
    found = [_tier_fleet(s, wanted, others, today, replays) for s, why in asked if why is None]
    found.sort(key=lambda f: (f.peak.usd_per_hour, f.name))

    def rates(of: TrafficDemand) -> DemandRates:
        return DemandRates(mean=of.mean, worst_minute=of.worst_minute, total=of.requests, span_s=of.span_s)

    return FleetPlan(
        schema=SCHEMA, made=made, trace=trace, sentence=_sentence(found, excluded, refused),
        requests=rates(wanted.requests), tokens=rates(wanted.tokens) if wanted.tokens else None, grow=wanted.grow,
        headroom=wanted.headroom, availability=wanted.availability, node_availability=wanted.node_availability,
        tiers=tuple(found), excluded=(*excluded, *refused), assumptions=_assumptions(wanted),
    )  # fmt: skip


def _unfit(system: ServingConfig) -> str | None:
    found, top = system.capacity, system.top_token_throughput
    if found is None:
        return "no SLO: say what the servers must keep (--slo)"
    if system.loop == "closed":
        return "measured in a closed loop alone, which has no capacity for arrivals: sweep request rates"
    if found.state in ("not reached", "unknown"):
        return found.load.note or found.state
    if not system.usd_per_hour:
        return "no price: say its tier when it is measured (--tier)"
    if top is not None and top.value is not None and top.low is None:
        return "too few requests: its throughput has no interval"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding:
    """What binds a system, requests or tokens: the demand and what one replica carries of it."""

    offer: TierOffer
    demand: TrafficDemand
    name: Literal["requests", "tokens"]
    ends: Mapping[Literal["low", "high"], float]
    """Of the interval of the capacity of one replica, where they are known."""
    tokens: Quantity | None
    """Tokens/s of all measured replicas at capacity, or at the highest load where capacity lies beyond it."""


def _binding(system: ServingConfig, wanted: Wanted) -> _Binding:
    found, count, rate = system.capacity, system.replicas, system.requests_per_s
    assert found is not None and rate is not None
    beyond = found.state == "beyond"
    tokens = system.top_token_throughput if beyond else found.rates.get("total_token_throughput")
    demand, capacity, at = wanted.requests, rate, found.load
    name: Literal["requests", "tokens"] = "requests"
    if system.loop == "sessions":
        at = found.rates.get("sent_rate", at)
    if wanted.tokens is not None and tokens is not None and tokens.value:
        per_replica = tokens.value / count
        if wanted.tokens.worst_minute / per_replica > wanted.requests.worst_minute / rate * (1 + 1e-9):
            demand, name, capacity, at = wanted.tokens, "tokens", per_replica, tokens
    offer = TierOffer(
        name=system.name, usd_per_hour=system.usd_per_hour or 0.0, capacity=capacity,
        replicas_per_instance=wanted.replicas_per_instance or system.replicas_per_instance,
        start_s=system.start_s if wanted.start_s is None else wanted.start_s,
        node_availability=wanted.node_availability,
    )  # fmt: skip
    ends: dict[Literal["low", "high"], float] = {} if at.low is None else {"low": at.low / count}
    ends |= {} if at.high is None or beyond else {"high": at.high / count}
    return _Binding(offer=offer, demand=demand, name=name, ends=ends, tokens=tokens)


def _tier_fleet(
    system: ServingConfig, wanted: Wanted, others: Sequence[ServingConfig], today: date, replays: Replays | None
) -> TierFleet:
    assert system.capacity is not None
    bound, head, up = _binding(system, wanted), wanted.headroom, wanted.availability
    offer, demand = bound.offer, bound.demand
    fluid = peak = fleet(offer, demand.worst_minute, mean=demand.mean, headroom=head, availability=up)
    replayed, why = None, "no replay was asked for"
    if replays is not None and system.loop != "open":
        why = "measured with sessions that wait: their requests do not come at times of their own"
    elif replays is not None:
        try:
            replayed = replays.fleet(system, wanted.grow * head, fluid.replicas)
            peak = fleet(offer, demand.worst_minute, replicas=replayed.replicas, mean=demand.mean, availability=up)
        except NotFittedError as e:
            why = str(e)

    def follows(*, ahead: bool) -> Autoscaled:
        made = autoscaled(offer, demand, headroom=head, spares=peak.spares, ahead=ahead)
        if replays is None or replayed is None:
            return made
        plan = schedule(offer, demand, headroom=head, ahead=ahead)
        per_instance = offer.replicas_per_instance
        return replace(made, kept=replays.scaled(system, replayed.engine, wanted.grow, plan, peak.spares, per_instance))

    cases: list[tuple[str, TierOffer, TrafficDemand, Literal["low", "high"] | None]] = [
        (f"capacity at its {end} end", replace(offer, capacity=capacity), demand, end)
        for end, capacity in bound.ends.items()
        if capacity
    ]
    strict = [(o.slo, _binding(o, wanted)) for o in others if o.same_under_other_slo(system) and _unfit(o) is None]
    cases += [(f"SLO {slo}", other.offer, other.demand, None) for slo, other in strict]
    changed = []
    for name, other_offer, asked, end in cases:
        size = fleet(other_offer, asked.worst_minute, headroom=head, availability=up)
        changed.append(Sensitivity(changed=name, instances=size.instances, usd_per_month=size.usd_per_month, end=end))
    fluid, _ = _utilised(fluid, bound, system, wanted)
    peak, no_utilisation = _utilised(peak, bound, system, wanted)
    reactive, scheduled = follows(ahead=False), follows(ahead=True)
    failures, down = None, failing(offer, demand, peak.instances) if up is not None else None
    if replays is not None and replayed is not None and down is not None:
        failures = replays.scaled(system, replayed.engine, wanted.grow, down, 0, 1)
    return TierFleet(
        name=offer.name, model=system.model, tier=system.tier, slo=system.slo, evidence=system.evidence,
        replicas_measured=system.replicas, capacity=offer.capacity, capacity_low=bound.ends.get("low"),
        capacity_high=bound.ends.get("high"), at_least=system.capacity.state == "beyond", binding=bound.name,
        unit="req/s" if bound.name == "requests" else "tokens/s",
        replicas_per_instance=offer.replicas_per_instance, start_s=offer.start_s, usd_per_hour=offer.usd_per_hour,
        price_basis=f"{system.purchase}, {system.region}, read {system.price_date}"
        f"{' (OLD)' if is_old(system.price_date or '', today) else ''}; {system.price_source}",
        mean=fleet(offer, demand.mean), worst_minute=fleet(offer, demand.worst_minute), peak=peak, fluid=fluid,
        simulated=replayed, not_simulated=why if replayed is None else None, reactive=reactive, scheduled=scheduled,
        failures=failures, no_utilisation=no_utilisation, usd_per_1m_served=wanted.usd_per_1m(peak.usd_per_hour),
        usd_per_1m_scheduled=wanted.usd_per_1m(scheduled.usd_per_hour), sensitivities=tuple(changed),
        notes=tuple(_notes(system, bound, wanted, today)),
    )  # fmt: skip


def _utilised(size: Fleet, bound: _Binding, system: ServingConfig, wanted: Wanted) -> tuple[Fleet, str | None]:
    """The fleet with the utilisation at which `harness price` makes of the same runs what its tokens cost: the cost at
    100 % (one full replica, one instance) over USD per 1M served. Or without one, and why.
    """
    if bound.offer.replicas_per_instance > 1:
        return replace(size, utilisation=None), (
            "harness price counts a whole instance for each replica, and here several share one"
        )
    served, share = wanted.usd_per_1m(size.usd_per_hour), size.utilisation
    if served and bound.tokens is not None and bound.tokens.value:
        full = usd_per_1m(bound.offer.usd_per_hour * system.replicas / 3600, bound.tokens.value)
        share = share_or_none(full / served)
    return replace(size, utilisation=share), None if share is not None else (
        "the fleet serves its tokens at less than the cost at 100 % of one replica, which harness price goes by: "
        "together replicas carry more than as many times one; runs of several replicas would tell how much"
    )


def _notes(system: ServingConfig, bound: _Binding, wanted: Wanted, today: date) -> Iterator[str]:
    assert system.capacity is not None
    if is_old(system.price_date or "", today):
        yield f"OLD: the price of the hardware was read on {system.price_date}, over {OLD_DAYS} days ago"
    if system.capacity.state == "beyond":
        yield "capacity lies beyond the highest measured load: a lower bound, so the fleet is an upper one"
    if system.drained:
        yield f"{drain_words(system.drained, system.unit)}: the fleet may be smaller"
    if (shared := bound.offer.replicas_per_instance) > 1:
        yield f"{shared} replicas share an instance: that they do not slow each other is assumed, not measured"
    if bound.offer.start_s is None:
        yield "start-up was not measured (servers that were there already): autoscaling counts it as 0 (--start)"
    if bound.demand.span_s < 0.99 * 86_400:
        hours = bound.demand.span_s / 3600
        yield f"the trace spans {hours:.2g} h, no whole day: what autoscaling saves over a day is not in it"
    flow, rate = (system.capacity.rates.get(f"{name}_throughput") for name in ("request", "total_token"))
    if flow is None or rate is None or not flow.value or not rate.value or wanted.tokens is None:
        return
    measured = rate.value / flow.value
    asked = wanted.tokens.mean / wanted.requests.mean if wanted.requests.mean else 0.0
    if abs(asked / measured - 1) > LARGEST_LENGTH_CHANGE:
        yield (
            f"a request of the demand has {asked:,.0f} tokens on average, one of those that were measured "
            f"{measured:,.0f}: whether the SLO is kept for the others, only a run of them tells"
        )


def _sentence(
    found: Sequence[TierFleet], excluded: Sequence[tuple[str, str]], refused: Sequence[tuple[str, str]]
) -> str:
    """The answer in one line: the cheapest tier and the runner-up, or why there is none."""
    whys = [f"{name}: {why}" for name, why in excluded]
    if not found:
        return f"No tier can be planned with: {'; '.join(whys) or f'every run is INVALID ({len(refused)})'}."
    best = found[0]
    said = f"Cheapest: {best.name}, {_size(best)} for {best.slo}."
    if len(found) > 1:
        second = found[1]
        more = second.peak.usd_per_hour / best.peak.usd_per_hour - 1 if best.peak.usd_per_hour else math.inf
        return f"{said} Runner-up: {second.name}, {_size(second)} ({more:+.0%})."
    return f"{said} No runner-up: {'; '.join(whys)}." if whys else f"{said} Nothing else was measured."


def _size(one: TierFleet) -> str:
    """Instances and USD a month; of the fluid answer those at the ends of its capacity too, where they are known."""
    peak = one.peak
    said = f"{peak.instances} instance{'' if peak.instances == 1 else 's'}, {peak.usd_per_month:,.0f} USD a month"
    if one.simulated is not None:
        return f"{said} (simulated; fluid: {one.fluid.instances:,}, {one.fluid.usd_per_month:,.0f} USD)"
    said = f"at most {said}" if one.at_least else said
    ends = {s.end: s for s in one.sensitivities if s.end is not None}
    if not ends:
        return said
    few, many = ends.get("high"), ends.get("low")
    if few is not None and many is not None:
        return (
            f"{said} (95 %: {few.instances:,} to {many.instances:,}, {few.usd_per_month:,.0f} to "
            f"{many.usd_per_month:,.0f} USD)"
        )
    ((end, known),) = ends.items()
    return f"{said} (95 %: {'up to' if end == 'low' else 'from'} {known.instances:,}, {known.usd_per_month:,.0f} USD)"


def _assumptions(wanted: Wanted) -> tuple[str, ...]:
    """What a plan takes for granted."""
    said = [
        f"demand is the trace's, {wanted.grow:g} times, x {wanted.headroom:g} for what the forecast may miss",
        "a simulated fleet is the smallest that keeps the SLO in every minute of the demand, replayed on an engine "
        "that was fitted to the measured runs; replicas take requests in turn. The fluid one is the worst minute over "
        "measured capacity",
        "fluid, N replicas carry N times one; what routing costs in prefix-cache hits, only a run of N shows",
        f"a month has {HOURS_PER_MONTH:g} h, a year 12 of them; staff, network, storage and tax are not in the price",
        "autoscaling: what it costs is counted by the minute. Reactive: after each minute it asks for what "
        f"the busiest of the last {HOLD_MINUTES} needed; new instances answer after their start-up time and are paid "
        "from the request on. Scheduled: it knows the day and asks early enough. New ones take their share of what "
        "comes from then on, and nothing of what waits elsewhere",
        "no instance fails: say --availability for spare ones" if wanted.availability is None else
        f"availability {percent(wanted.availability)}: with that probability enough instances are up, each being "
        f"up {percent(wanted.node_availability)} of the time by itself (an assumption, --node-availability)",
    ]  # fmt: skip
    if wanted.tokens is None:
        said.append("the trace does not say all token lengths: sized by requests alone, no cost per token")
    return tuple(said)
