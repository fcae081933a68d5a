"""From a demand and measured capacities to fleets, what they cost, and the cheapest one that keeps the promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from analysis.money.basis import OLD_PRICE_DAYS, is_old
from analysis.money.charge import HOURS_PER_MONTH
from analysis.money.price import usd_per_1m
from analysis.sizing.at_slo import System, drain_words
from analysis.sizing.fitted_engine import NotFittedError
from analysis.sizing.fleet import (
    HOLD_MINUTES,
    Autoscaled,
    Demand,
    Fleet,
    Offer,
    Sensitivity,
    autoscaled,
    fleet,
    fleet_of,
    sensitivities,
)
from analysis.sizing.simulated_fleet import SimulatedFleet
from harness.slo import percent

SCHEMA = "harness.fleet/1"
LARGEST_LENGTH_CHANGE = 0.1
"""Of the mean tokens of a request, between what was measured and what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the fleet is planned for."""

    requests: Demand
    """Requests/s, growth included."""
    tokens: Demand | None
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


Simulate = Callable[[System, float, int], SimulatedFleet]
"""The fleet of a system for so many times the demand, by replay, from a likely number of replicas on. Raises
`NotFittedError` where the fluid answer must stand alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFleet:
    """The fleets of one model on one tier."""

    name: str
    model: str
    tier: str | None
    slo: str | None
    evidence: str
    replicas_measured: int
    capacity: float
    """Of one replica, in ``unit``."""
    capacity_low: float | None
    capacity_high: float | None
    at_least: bool
    """The measured loads did not reach capacity: the figure is a lower bound, and the fleet may be smaller."""
    binding: str
    """requests or tokens: which of the two needs more replicas."""
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
    reactive: Autoscaled
    scheduled: Autoscaled
    usd_per_1m_served: float | None
    """Peak fleet around the clock over the tokens of the demand."""
    usd_per_1m_scheduled: float | None
    sensitivities: tuple[Sensitivity, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A demand in four numbers."""

    mean: float
    worst_minute: float
    total: int
    span_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """``harness.fleet/1``."""

    schema: str
    made: str
    trace: str
    sentence: str
    requests: Rates
    """Requests/s, growth included."""
    tokens: Rates | None
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


def plan_fleets(
    systems: Sequence[System],
    wanted: Wanted,
    *,
    made: str,
    trace: str,
    others: Sequence[System] = (),
    refused: Sequence[tuple[str, str]] = (),
    simulate: Simulate | None = None,
) -> FleetPlan:
    """Fleets of every system that has a capacity in an open loop and a price, cheapest peak fleet first.

    ``others``: the same systems under other promises, for sensitivity alone. ``refused``: runs that are no evidence,
    each with the reason; they are listed with what was left out. ``simulate``: finds fleets by replay; None: fluid
    alone.
    """
    found: list[TierFleet] = []
    excluded: list[tuple[str, str]] = []
    opened = {s.name for s in systems if s.loop != "closed"}
    for system in systems:
        if system.loop == "closed" and system.name in opened:
            continue  # the ladder of a search that went on in an open loop
        why = _unfit(system)
        if why is not None:
            excluded.append((system.name, why))
        else:
            promises = [o for o in others if o.same_but_promise(system)]
            found.append(_tier_fleet(system, wanted, promises, date.fromisoformat(made[:10]), simulate))
    found.sort(key=lambda f: (f.peak.usd_per_hour, f.name))
    return FleetPlan(
        schema=SCHEMA, made=made, trace=trace, sentence=_sentence(found, excluded, refused),
        requests=_rates(wanted.requests), tokens=_rates(wanted.tokens) if wanted.tokens else None, grow=wanted.grow,
        headroom=wanted.headroom, availability=wanted.availability, node_availability=wanted.node_availability,
        tiers=tuple(found), excluded=(*excluded, *refused), assumptions=_assumptions(wanted),
    )  # fmt: skip


def _rates(demand: Demand) -> Rates:
    return Rates(
        mean=demand.mean, worst_minute=demand.worst_minute, total=demand.requests, span_s=demand.span_s
    )  # fmt: skip


def _unfit(system: System) -> str | None:
    found = system.capacity
    if found is None:
        return "no SLO: say what is promised (--slo)"
    if system.loop == "closed":
        return "measured in a closed loop alone, which has no capacity for arrivals: sweep request rates"
    if found.state in ("not reached", "unknown"):
        return found.load.note or found.state
    if not system.usd_per_hour:
        return "no price: say its tier when it is measured (--tier)"
    top = system.top_token_throughput
    if top is not None and top.value is not None and top.low is None:
        return "too few requests: its throughput has no interval"
    return None


def _offer(system: System, wanted: Wanted) -> tuple[Offer, Demand, str, tuple[float | None, float | None]]:
    """The offer in the unit that binds, the demand in that unit, which it is, and the ends of its capacity."""
    assert system.capacity is not None
    found, count = system.capacity, system.replicas
    rate = system.requests_per_s
    assert rate is not None
    at = found.rates.get("sent_rate", found.load) if system.loop == "sessions" else found.load
    ends = (at.low, at.high if found.state == "found" else None)
    token_rate = found.rates.get("total_token_throughput")
    if found.state == "beyond":
        token_rate = system.top_token_throughput
    demand, binding, capacity = wanted.requests, "requests", rate
    if wanted.tokens is not None and token_rate is not None and token_rate.value:
        per_replica = token_rate.value / count
        if wanted.tokens.worst_minute / per_replica > wanted.requests.worst_minute / rate * (1 + 1e-9):
            demand, binding, capacity = wanted.tokens, "tokens", per_replica
            ends = (token_rate.low, token_rate.high if found.state == "found" else None)
    offer = Offer(
        name=system.name, usd_per_hour=system.usd_per_hour or 0.0, capacity=capacity,
        replicas_per_instance=wanted.replicas_per_instance or system.replicas_per_instance,
        start_s=system.start_s if wanted.start_s is None else wanted.start_s,
        node_availability=wanted.node_availability,
    )  # fmt: skip
    low, high = (None if end is None else end / count for end in ends)
    return offer, demand, binding, (low, high)


def _by_replay(
    system: System, wanted: Wanted, likely: int, simulate: Simulate | None
) -> tuple[SimulatedFleet | None, str | None]:
    if simulate is None:
        return None, "no replay was asked for"
    if system.loop != "open":
        return None, "measured with sessions that wait: their requests do not come at times of their own"
    try:
        return simulate(system, wanted.grow * wanted.headroom, likely), None
    except NotFittedError as e:
        return None, str(e)


def _tier_fleet(
    system: System, wanted: Wanted, others: Sequence[System], today: date, simulate: Simulate | None
) -> TierFleet:
    assert system.capacity is not None
    offer, demand, binding, (low, high) = _offer(system, wanted)
    head, up = wanted.headroom, wanted.availability
    fluid = peak = fleet(offer, demand.worst_minute, mean=demand.mean, headroom=head, availability=up)
    replayed, why = _by_replay(system, wanted, fluid.replicas, simulate)
    if replayed is not None:
        peak = fleet_of(offer, replayed.replicas, demand.worst_minute, mean=demand.mean, availability=up)
    reactive = autoscaled(offer, demand, headroom=head, spares=peak.spares)
    scheduled = autoscaled(offer, demand, headroom=head, spares=peak.spares, ahead=True)
    ends = [(f"capacity at its {name} end", end) for name, end in (("low", low), ("high", high)) if end]
    changed = sensitivities(offer, demand.worst_minute, headroom=head, availability=up, capacities=ends)
    changed += [_other_promise(o, wanted) for o in others if _unfit(o) is None]
    return TierFleet(
        name=offer.name, model=system.model, tier=system.tier, slo=system.slo, evidence=system.evidence,
        replicas_measured=system.replicas, capacity=offer.capacity, capacity_low=low, capacity_high=high,
        at_least=system.capacity.state == "beyond", binding=binding,
        unit="req/s" if binding == "requests" else "tokens/s",
        replicas_per_instance=offer.replicas_per_instance, start_s=offer.start_s, usd_per_hour=offer.usd_per_hour,
        price_basis=f"{system.purchase}, {system.region}, read {system.price_date}"
        f"{' (OLD)' if is_old(system.price_date or '', today) else ''}; {system.price_source}",
        mean=fleet(offer, demand.mean), worst_minute=fleet(offer, demand.worst_minute), peak=peak,
        fluid=fluid, simulated=replayed, not_simulated=why,
        reactive=reactive, scheduled=scheduled,
        usd_per_1m_served=_per_1m(peak.usd_per_hour, wanted),
        usd_per_1m_scheduled=_per_1m(scheduled.usd_per_hour, wanted),
        sensitivities=tuple(changed), notes=(*_notes(system, offer, demand, today), *_other_traffic(system, wanted)),
    )  # fmt: skip


def _other_promise(system: System, wanted: Wanted) -> Sensitivity:
    offer, demand, _, _ = _offer(system, wanted)
    size = fleet(offer, demand.worst_minute, headroom=wanted.headroom, availability=wanted.availability)
    return Sensitivity(changed=f"SLO {system.slo}", instances=size.instances, usd_per_month=size.usd_per_month)


def _per_1m(usd_per_hour: float, wanted: Wanted) -> float | None:
    """USD per 1M tokens of the demand at its mean rate; None when tokens are not known."""
    if wanted.tokens is None or wanted.tokens.mean <= 0:
        return None
    return usd_per_1m(usd_per_hour / 3600, wanted.tokens.mean)


def _notes(system: System, offer: Offer, demand: Demand, today: date) -> tuple[str, ...]:
    assert system.capacity is not None
    said = []
    if is_old(system.price_date or "", today):
        said.append(f"OLD: the price of the hardware was read on {system.price_date}, over {OLD_PRICE_DAYS} days ago")
    if system.capacity.state == "beyond":
        said.append("capacity lies beyond the highest measured load: a lower bound, so the fleet is an upper one")
    if system.drained:
        said.append(f"{drain_words(system.drained, system.unit)}: the fleet may be smaller")
    if offer.replicas_per_instance > 1:
        shared = offer.replicas_per_instance
        said.append(f"{shared} replicas share an instance: that they do not slow each other is assumed, not measured")
    if offer.start_s is None:
        said.append("start-up was not measured (servers that were there already): autoscaling counts it as 0 (--start)")
    if demand.span_s < 86_400:
        hours = demand.span_s / 3600
        said.append(f"the trace spans {hours:.2g} h, no whole day: what autoscaling saves over a day is not in it")
    return tuple(said)


def _other_traffic(system: System, wanted: Wanted) -> tuple[str, ...]:
    """Whether the demand's requests are longer or shorter than those that the promise was measured on."""
    assert system.capacity is not None
    found = system.capacity.rates
    flow, rate = found.get("request_throughput"), found.get("total_token_throughput")
    if flow is None or rate is None or not flow.value or not rate.value or wanted.tokens is None:
        return ()
    measured, asked = (
        rate.value / flow.value,
        wanted.tokens.mean / wanted.requests.mean if wanted.requests.mean else 0.0,
    )
    if abs(asked / measured - 1) <= LARGEST_LENGTH_CHANGE:
        return ()
    return (
        f"a request of the demand has {asked:,.0f} tokens on average, one of those that were measured {measured:,.0f}: "
        "whether the promise holds for the others, only a run of them tells",
    )


def _sentence(
    found: Sequence[TierFleet], excluded: Sequence[tuple[str, str]], refused: Sequence[tuple[str, str]]
) -> str:
    if not found:
        whys = [f"{name}: {why}" for name, why in excluded] or [f"every run is INVALID ({len(refused)})"]
        return f"No tier can be planned with: {'; '.join(whys)}."
    best = found[0]
    said = f"Cheapest: {best.name}, {_size(best)} for {best.slo}."
    if len(found) > 1:
        second = found[1]
        more = second.peak.usd_per_hour / best.peak.usd_per_hour - 1 if best.peak.usd_per_hour else math.inf
        said += f" Runner-up: {second.name}, {_size(second)} ({more:+.0%})."
    elif excluded:
        said += f" No runner-up: {'; '.join(f'{name}: {why}' for name, why in excluded)}."
    else:
        said += " Nothing else was measured."
    return said


def _size(one: TierFleet) -> str:
    peak = one.peak
    plural = "" if peak.instances == 1 else "s"
    at_most = "at most " if one.at_least and one.simulated is None else ""
    said = f"{at_most}{peak.instances} instance{plural}, {peak.usd_per_month:,.0f} USD a month"
    if one.simulated is None:
        return f"{said}{_within(one)}"
    return f"{said} (simulated; fluid: {one.fluid.instances:,}, {one.fluid.usd_per_month:,.0f} USD)"


def _within(one: TierFleet) -> str:
    """The same at the ends of the capacity of one replica; open where an end is not known."""
    dear, cheap = (
        next((s for s in one.sensitivities if s.changed == f"capacity at its {end} end"), None)
        for end in ("low", "high")
    )
    if dear is None and cheap is None:
        return ""
    if dear is None or cheap is None:
        (end,) = (s for s in (dear, cheap) if s is not None)
        word = "up to" if cheap is None else "from"
        return f" (95 %: {word} {end.instances:,}, {end.usd_per_month:,.0f} USD)"
    return (
        f" (95 %: {cheap.instances:,} to {dear.instances:,}, {cheap.usd_per_month:,.0f} to "
        f"{dear.usd_per_month:,.0f} USD)"
    )


def _assumptions(wanted: Wanted) -> tuple[str, ...]:
    said = [
        f"demand is the trace's, {wanted.grow:g} times, x {wanted.headroom:g} for what the forecast may miss",
        "a simulated fleet is the smallest that keeps the promise in every minute of the demand, replayed on an engine "
        "that was fitted to the measured runs; replicas take requests in turn. The fluid one is the worst minute over "
        "measured capacity",
        "a fleet of N replicas carries N times one: what routing costs in prefix-cache hits only a run of N shows",
        f"a month has {HOURS_PER_MONTH:g} h, a year 12 of them; staff, network, storage and tax are not in the price",
        "autoscaling is fluid: even demand in a minute, backlog carried. Reactive: after each minute it asks for what "
        f"the busiest of the last {HOLD_MINUTES} needed; new instances answer after their start-up time and are paid "
        "from the request on. Scheduled: it knows the day and asks early enough",
    ]
    if wanted.availability is not None:
        said.append(
            f"availability {percent(wanted.availability)}: with that probability enough instances are up, each being "
            f"up {percent(wanted.node_availability)} of the time by itself (an assumption, --node-availability)"
        )
    else:
        said.append("no instance fails: say --availability for spare ones")
    if wanted.tokens is None:
        said.append("the trace does not say all token lengths: sized by requests alone, no cost per token")
    return tuple(said)


def grown(wanted: Wanted, factor: float) -> Wanted:
    """The same with ``factor`` times the demand."""
    return replace(
        wanted, requests=wanted.requests.grown(factor), tokens=wanted.tokens.grown(factor) if wanted.tokens else None,
        grow=wanted.grow * factor,
    )  # fmt: skip
