"""From a demand and measured capacities to fleets, what they cost, and the cheapest one that meets the SLO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Protocol

from analysis.capacity.fitted_engine import FittedEngine, NotFittedError
from analysis.capacity.fleet import (
    Autoscaled,
    Fleet,
    Kept,
    Schedule,
    Sensitivity,
    TierOffer,
    TrafficDemand,
    autoscaled,
    fleet,
    fleet_of,
    schedule,
    sensitivities,
    share_or_none,
)
from analysis.capacity.fleet_words import assumptions, sentence
from analysis.capacity.serving_config import ServingConfig, drain_words
from analysis.capacity.simulated_fleet import SimulatedFleet
from analysis.cost.cost import usd_per_1m
from analysis.price_age import OLD_DAYS, is_old
from analysis.stats.intervals import Quantity

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
    no_utilisation: str | None
    """Why ``peak`` has no utilisation; None: it has one."""
    usd_per_1m_served: float | None
    """Peak fleet around the clock over the tokens of the demand."""
    usd_per_1m_scheduled: float | None
    sensitivities: tuple[Sensitivity, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandRates:
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


def plan_fleets(
    systems: Sequence[ServingConfig],
    wanted: Wanted,
    *,
    made: str,
    trace: str,
    others: Sequence[ServingConfig] = (),
    refused: Sequence[tuple[str, str]] = (),
    replays: Replays | None = None,
) -> FleetPlan:
    """Fleets of every system that has a capacity in an open loop and a price, cheapest peak fleet first.

    ``others``: the same systems under other SLOs, for sensitivity alone. ``refused``: runs that are no evidence,
    each with the reason; they are listed with what was left out. ``replays``: None: fluid alone.
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
            found.append(_tier_fleet(system, wanted, promises, date.fromisoformat(made[:10]), replays))
    found.sort(key=lambda f: (f.peak.usd_per_hour, f.name))
    return FleetPlan(
        schema=SCHEMA, made=made, trace=trace, sentence=sentence(found, excluded, refused),
        requests=_rates(wanted.requests), tokens=_rates(wanted.tokens) if wanted.tokens else None, grow=wanted.grow,
        headroom=wanted.headroom, availability=wanted.availability, node_availability=wanted.node_availability,
        tiers=tuple(found), excluded=(*excluded, *refused), assumptions=assumptions(wanted),
    )  # fmt: skip


def _rates(demand: TrafficDemand) -> DemandRates:
    return DemandRates(
        mean=demand.mean, worst_minute=demand.worst_minute, total=demand.requests, span_s=demand.span_s
    )  # fmt: skip


def _unfit(system: ServingConfig) -> str | None:
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


def _offer(
    system: ServingConfig, wanted: Wanted
) -> tuple[TierOffer, TrafficDemand, str, tuple[float | None, float | None]]:
    """The offer in the unit that binds, the demand in that unit, which it is, and the ends of its capacity."""
    assert system.capacity is not None
    found, count = system.capacity, system.replicas
    rate = system.requests_per_s
    assert rate is not None
    at = found.rates.get("sent_rate", found.load) if system.loop == "sessions" else found.load
    ends = (at.low, at.high if found.state == "found" else None)
    token_rate = _token_rate(system)
    demand, binding, capacity = wanted.requests, "requests", rate
    if wanted.tokens is not None and token_rate is not None and token_rate.value:
        per_replica = token_rate.value / count
        if wanted.tokens.worst_minute / per_replica > wanted.requests.worst_minute / rate * (1 + 1e-9):
            demand, binding, capacity = wanted.tokens, "tokens", per_replica
            ends = (token_rate.low, token_rate.high if found.state == "found" else None)
    offer = TierOffer(
        name=system.name, usd_per_hour=system.usd_per_hour or 0.0, capacity=capacity,
        replicas_per_instance=wanted.replicas_per_instance or system.replicas_per_instance,
        start_s=system.start_s if wanted.start_s is None else wanted.start_s,
        node_availability=wanted.node_availability,
    )  # fmt: skip
    low, high = (None if end is None else end / count for end in ends)
    return offer, demand, binding, (low, high)


def _token_rate(system: ServingConfig) -> Quantity | None:
    """Tokens/s of all measured replicas at capacity, or at the highest load where capacity lies beyond it."""
    assert system.capacity is not None
    beyond = system.capacity.state == "beyond"
    return system.top_token_throughput if beyond else system.capacity.rates.get("total_token_throughput")


def _by_replay(
    system: ServingConfig, wanted: Wanted, likely: int, replays: Replays | None
) -> tuple[SimulatedFleet | None, str | None]:
    if replays is None:
        return None, "no replay was asked for"
    if system.loop != "open":
        return None, "measured with sessions that wait: their requests do not come at times of their own"
    try:
        return replays.fleet(system, wanted.grow * wanted.headroom, likely), None
    except NotFittedError as e:
        return None, str(e)


def _tier_fleet(
    system: ServingConfig, wanted: Wanted, others: Sequence[ServingConfig], today: date, replays: Replays | None
) -> TierFleet:
    assert system.capacity is not None
    offer, demand, binding, (low, high) = _offer(system, wanted)
    head, up = wanted.headroom, wanted.availability
    fluid = peak = fleet(offer, demand.worst_minute, mean=demand.mean, headroom=head, availability=up)
    replayed, why = _by_replay(system, wanted, fluid.replicas, replays)
    if replayed is not None:
        peak = fleet_of(offer, replayed.replicas, demand.worst_minute, mean=demand.mean, availability=up)
    served = _per_1m(peak.usd_per_hour, wanted)
    fluid, _ = _priced(fluid, offer, system, wanted)
    peak, why_none = _priced(peak, offer, system, wanted)
    reactive, scheduled = (
        _follows(system, wanted, offer, demand, peak.spares, replays, replayed, ahead=ahead) for ahead in (False, True)
    )
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
        no_utilisation=why_none, usd_per_1m_served=served,
        usd_per_1m_scheduled=_per_1m(scheduled.usd_per_hour, wanted),
        sensitivities=tuple(changed), notes=(*_notes(system, offer, demand, today), *_other_traffic(system, wanted)),
    )  # fmt: skip


def _follows(
    system: ServingConfig, wanted: Wanted, offer: TierOffer, demand: TrafficDemand, spares: int,
    replays: Replays | None, found: SimulatedFleet | None, *, ahead: bool,
) -> Autoscaled:  # fmt: skip
    made = autoscaled(offer, demand, headroom=wanted.headroom, spares=spares, ahead=ahead)
    if replays is None or found is None:
        return made
    plan = schedule(offer, demand, headroom=wanted.headroom, ahead=ahead)
    return replace(
        made, kept=replays.scaled(system, found.engine, wanted.grow, plan, spares, offer.replicas_per_instance)
    )


def _other_promise(system: ServingConfig, wanted: Wanted) -> Sensitivity:
    offer, demand, _, _ = _offer(system, wanted)
    size = fleet(offer, demand.worst_minute, headroom=wanted.headroom, availability=wanted.availability)
    return Sensitivity(changed=f"SLO {system.slo}", instances=size.instances, usd_per_month=size.usd_per_month)


def _per_1m(usd_per_hour: float, wanted: Wanted) -> float | None:
    """USD per 1M tokens of the demand at its mean rate; None when tokens are not known."""
    if wanted.tokens is None or wanted.tokens.mean <= 0:
        return None
    return usd_per_1m(usd_per_hour / 3600, wanted.tokens.mean)


def _priced(size: Fleet, offer: TierOffer, system: ServingConfig, wanted: Wanted) -> tuple[Fleet, str | None]:
    """The fleet with the utilisation at which `harness price` makes of the same runs what its tokens cost: the cost at
    100 % (one full replica, one instance) over USD per 1M served. Or without one, and why.
    """
    if offer.replicas_per_instance > 1:
        return replace(size, utilisation=None), (
            "harness price counts a whole instance for each replica, and here several share one"
        )
    served, rate = _per_1m(size.usd_per_hour, wanted), _token_rate(system)
    if served and rate is not None and rate.value:
        full = usd_per_1m(offer.usd_per_hour * system.replicas / 3600, rate.value)
        share = share_or_none(full / served)
    else:
        share = size.utilisation
    if share is None:
        return replace(size, utilisation=None), (
            "the fleet serves its tokens at less than the cost at 100 % of one replica, which harness price goes by: "
            "together replicas carry more than as many times one; runs of several replicas would tell how much"
        )
    return replace(size, utilisation=share), None


def _notes(system: ServingConfig, offer: TierOffer, demand: TrafficDemand, today: date) -> tuple[str, ...]:
    assert system.capacity is not None
    said = []
    if is_old(system.price_date or "", today):
        said.append(f"OLD: the price of the hardware was read on {system.price_date}, over {OLD_DAYS} days ago")
    if system.capacity.state == "beyond":
        said.append("capacity lies beyond the highest measured load: a lower bound, so the fleet is an upper one")
    if system.drained:
        said.append(f"{drain_words(system.drained, system.unit)}: the fleet may be smaller")
    if offer.replicas_per_instance > 1:
        shared = offer.replicas_per_instance
        said.append(f"{shared} replicas share an instance: that they do not slow each other is assumed, not measured")
    if offer.start_s is None:
        said.append("start-up was not measured (servers that were there already): autoscaling counts it as 0 (--start)")
    if demand.span_s < 0.99 * 86_400:
        hours = demand.span_s / 3600
        said.append(f"the trace spans {hours:.2g} h, no whole day: what autoscaling saves over a day is not in it")
    return tuple(said)


def _other_traffic(system: ServingConfig, wanted: Wanted) -> tuple[str, ...]:
    """Whether the demand's requests are longer or shorter than those of the runs that the SLO was judged on."""
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


def grown(wanted: Wanted, factor: float) -> Wanted:
    """The same with ``factor`` times the demand."""
    return replace(
        wanted, requests=wanted.requests.grown(factor), tokens=wanted.tokens.grown(factor) if wanted.tokens else None,
        grow=wanted.grow * factor,
    )  # fmt: skip
