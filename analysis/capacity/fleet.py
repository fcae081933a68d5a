"""The fleet: how many whole instances of a tier carry a demand, and what they cost in an hour, a month and a year.

Capacity is that of one replica at the SLO (`analysis.capacity.sweep`), demand is requests/s, or tokens/s,
over time. A fleet of N replicas is taken to carry N times one: routing may cost prefix-cache hits, which only a run of
N replicas shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.cost.cost import HOURS_PER_MONTH, HOURS_PER_YEAR

MINUTE_S = 60.0
MOST_SPARES = 1_000_000
HOLD_MINUTES = 10
"""An autoscaler keeps what the busiest of the last so many minutes needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficDemand:
    """Requests/s over time, or tokens/s."""

    per_minute: Floats
    """Mean rate of each minute from the first arrival; the last minute counts as a whole one."""
    mean: float
    worst_minute: float
    """Highest rate of any 60 s, wherever they begin."""
    requests: int
    """Requests, or tokens, in all."""
    span_s: float
    """First to last arrival; 60 s at least, so that a handful of requests is no huge rate."""

    def grown(self, factor: float) -> TrafficDemand:
        """The same day with ``factor`` times the requests at every moment."""
        return replace(
            self, per_minute=self.per_minute * factor, mean=self.mean * factor, worst_minute=self.worst_minute * factor,
            requests=round(self.requests * factor),
        )  # fmt: skip


def demand(arrival_s: Floats, amounts: Floats | None = None) -> TrafficDemand:
    """The demand of a trace from its arrival times in seconds, in any order. Raises ValueError without arrivals.

    ``amounts``: what each arrival asks for, such as its tokens; None: one request.
    """
    times = np.asarray(arrival_s, dtype=np.float64)
    order = np.argsort(times, kind="stable")
    times = times[order]
    each = np.ones(len(times)) if amounts is None else np.asarray(amounts, dtype=np.float64)[order]
    if not len(times) or not np.all(np.isfinite(times)):
        raise ValueError("a demand needs arrival times: at least one, all finite")
    times = times - times[0]
    span_s = max(MINUTE_S, float(times[-1]))
    minutes = np.bincount((times // MINUTE_S).astype(np.int64), weights=each)
    # of what comes in the 60 s that begin with each request, the most
    running = np.concatenate(([0.0], np.cumsum(each)))
    worst = float((running[np.searchsorted(times, times + MINUTE_S, side="left")] - running[:-1]).max())
    return TrafficDemand(
        per_minute=minutes / MINUTE_S, mean=float(each.sum()) / span_s, worst_minute=worst / MINUTE_S,
        requests=round(float(each.sum())), span_s=span_s,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandRates:
    """A demand in four numbers."""

    mean: float
    worst_minute: float
    total: int
    span_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOffer:
    """One way to serve: a model on a tier, as it was measured."""

    name: str
    usd_per_hour: float
    """Of one instance."""
    capacity: float
    """Requests/s (or tokens/s, as the demand) that one replica carries at the SLO."""
    replicas_per_instance: int = 1
    start_s: float | None = None
    """From asking for a replica until it answers; None when not measured."""
    node_availability: float = 1.0
    """Share of the time an instance is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Whole instances for one steady demand."""

    request_rate: float
    replicas: int
    instances: int
    spares: int
    """Of the instances, those that stand in for failed ones."""
    usd_per_hour: float
    usd_per_month: float
    """730 hours."""
    usd_per_year: float
    """8,760 hours."""
    utilisation: float | None
    """Mean demand over what all instances, spares too, carry as many times one replica; None where that is above 1."""


def fleet(
    offer: TierOffer, request_rate: float, *, replicas: int | None = None, mean: float | None = None,
    headroom: float = 1.0, availability: float | None = None,
) -> Fleet:  # fmt: skip
    """The smallest fleet of whole instances that carries ``request_rate`` x ``headroom``; or one of so many
    ``replicas``.

    ``mean``: of the whole demand, for its utilisation; None: ``request_rate`` all the time. ``availability``: with at
    least this probability enough instances are up, when each is up independently for ``offer.node_availability`` of the
    time. Raises ValueError for a capacity, price or share that makes no sense.
    """
    per_instance = offer.replicas_per_instance
    if not (offer.capacity > 0 and offer.usd_per_hour >= 0 and per_instance >= 1):
        raise ValueError(f"{offer.name}: capacity, price and replicas per instance must be positive")
    if replicas is None:
        replicas = max(1, math.ceil(request_rate * headroom / offer.capacity - 1e-9))
    needed = math.ceil(replicas / per_instance)
    spares = 0 if availability is None else spare_instances(needed, offer.node_availability, availability)
    usd_per_hour = (needed + spares) * offer.usd_per_hour
    carried = (needed + spares) * per_instance * offer.capacity
    return Fleet(
        request_rate=request_rate, replicas=replicas, instances=needed + spares, spares=spares,
        usd_per_hour=usd_per_hour, usd_per_month=usd_per_hour * HOURS_PER_MONTH,
        usd_per_year=usd_per_hour * HOURS_PER_YEAR,
        utilisation=share_or_none((request_rate if mean is None else mean) / carried),
    )  # fmt: skip


def share_or_none(ratio: float) -> float | None:
    """A ratio that is a share; None above 1, but for rounding."""
    return None if ratio > 1 + 1e-9 else min(1.0, ratio)


def spare_instances(needed: int, node_availability: float, availability: float) -> int:
    """How many instances beyond ``needed`` make it that at least ``needed`` are up with probability ``availability``.

    Negative binomial law of independent failures, exact. Raises ValueError for shares outside (0, 1].
    """
    if not (0 < node_availability <= 1 and 0 < availability <= 1):
        raise ValueError("availabilities are shares above 0 and at most 1")
    if node_availability == 1:
        return 0
    if availability == 1:
        raise ValueError("no number of instances that can fail is always enough: ask for less than 100 %")
    # P(at most s of needed + s are down) = P(at most s failures before the needed-th success): one term more for each s
    log_term, enough, spares = needed * math.log(node_availability), 0.0, 0
    while spares < MOST_SPARES:
        enough += math.exp(log_term)
        if enough >= availability:
            return spares
        spares += 1
        log_term += math.log1p(-node_availability) + math.log((needed - 1 + spares) / spares)
    raise ValueError(f"instances up for {node_availability} of the time: {spares} spares cannot give {availability}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """How a fleet that follows the demand meets the SLO, by replay. Simulated, never measured."""

    share: float
    """Of the replayed requests, those that kept the criterion that came off worst."""
    worst_minute: float
    """The lowest such share of any judged minute."""
    promised: bool
    """Every criterion of the SLO was kept by as many as it wants, over all requests; a key of the plan's JSON."""
    replayed: int
    """Requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaled:
    """A fleet that follows the demand minute by minute."""

    instance_hours: float
    usd: float
    """Over the demand's own span."""
    usd_per_hour: float
    peak_instances: int
    short_share: float
    """Fluid: share of requests that came while the instances that were up had more to do than they could, in a minute
    that asks for more than they carry, or before the backlog of those before was worked off. It knows no bursts within
    a minute, and a request that waits may still meet the SLO: ``kept`` says how many do."""
    backlog_s: float
    """Longest time that a request waited for those before it, by that count."""
    kept: Kept | None = None
    """None: not replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How many instances an autoscaler wants in each minute, and how long new ones take."""

    target: Ints
    """By the minute from the first arrival, without spares; paid from the minute on."""
    start_s: float
    """Until what is new answers; 0 where it is asked for ahead."""
    fails_s: float | None = None
    """Mean time between failures of an instance that answers; None: none fails."""

    def up(self, since_s: Floats) -> Ints:
        """Instances that answer at moments after the first arrival, s: those wanted all through the last ``start_s``.
        What the first minute wants is up from the beginning.
        """
        minute = np.minimum((since_s // MINUTE_S).astype(np.int64), len(self.target) - 1)
        oldest = np.maximum(0, ((since_s - self.start_s) // MINUTE_S).astype(np.int64))
        found = self.target[minute]
        for back in range(1, math.ceil(self.start_s / MINUTE_S) + 1):
            before = minute - back
            found = np.where(before >= oldest, np.minimum(found, self.target[np.maximum(before, 0)]), found)
        return np.asarray(found, dtype=np.int64)


def schedule(offer: TierOffer, wanted: TrafficDemand, *, headroom: float = 1.0, ahead: bool = False) -> Schedule:
    """What an autoscaler asks for over the demand's own time.

    Policy: at the end of each minute it asks for what the busiest of the last `HOLD_MINUTES` minutes needed (times
    ``headroom``); what is new answers the offer's ``start_s`` later (at once when not measured) and is paid from the
    request on; what is too much is given back at once. It begins with what the first minute needs. ``ahead``: it knows
    the day (a schedule) and asks so early that what a minute needs answers when it begins.
    """
    start_s = offer.start_s or 0.0
    per_instance = offer.capacity * offer.replicas_per_instance
    asked = np.maximum(1, np.ceil(wanted.per_minute * headroom / per_instance - 1e-9)).astype(np.int64)
    known = math.ceil(start_s / MINUTE_S) + 1 if ahead else 0  # minutes from the present one on
    target = [asked[max(0, t - HOLD_MINUTES) : max(1, t + known)].max() for t in range(len(asked))]
    return Schedule(target=np.array(target, dtype=np.int64), start_s=0.0 if ahead else start_s)


def failing(offer: TierOffer, wanted: TrafficDemand, instances: int) -> Schedule | None:
    """Always as many instances, each down for its start-up so often that it is up for ``offer.node_availability``.

    None where the start-up time is not known or nothing fails, and where replicas share an instance, and so fail
    together, which is not replayed.
    """
    down_s, up = offer.start_s, offer.node_availability
    if not down_s or up == 1 or offer.replicas_per_instance > 1:
        return None
    target = np.full(len(wanted.per_minute), instances, dtype=np.int64)
    return Schedule(target=target, start_s=down_s, fails_s=down_s * up / (1 - up))


def autoscaled(
    offer: TierOffer, wanted: TrafficDemand, *, headroom: float = 1.0, spares: int = 0, ahead: bool = False
) -> Autoscaled:
    """What an autoscaler (`schedule`) would have cost over the demand's own time."""
    plan = schedule(offer, wanted, headroom=headroom, ahead=ahead)
    # fluid: by whole minutes, in which what is not up at their beginning counts as not up
    up = plan.up(MINUTE_S * np.arange(len(plan.target), dtype=np.float64))
    paid = plan.target + spares
    behind, waited_s = _behind(
        wanted.per_minute, offer.capacity * np.asarray((up + spares) * offer.replicas_per_instance, dtype=np.float64)
    )
    hours = float(paid.sum()) * MINUTE_S / 3600
    return Autoscaled(
        instance_hours=hours, usd=hours * offer.usd_per_hour, usd_per_hour=float(paid.mean()) * offer.usd_per_hour,
        peak_instances=int(paid.max()),
        short_share=float((behind * wanted.per_minute).sum() / wanted.per_minute.sum()), backlog_s=waited_s,
    )  # fmt: skip


def _behind(asked: Floats, carried: Floats) -> tuple[Floats, float]:
    """Of each minute the share in which there is a backlog, and the longest wait in it, s; rates by the minute.

    Fluid: demand and service are even within a minute. What a minute does not carry is the next one's to work off.
    """
    behind, backlog, waited_s = np.zeros(len(asked)), 0.0, 0.0
    for k, (rate, most) in enumerate(zip(asked.tolist(), carried.tolist(), strict=True)):
        waited_s = max(waited_s, backlog / most)
        if rate > most * (1 + 1e-9):
            behind[k] = 1.0
        elif backlog > 0:
            behind[k] = min(1.0, backlog / ((most - rate) * MINUTE_S)) if most > rate else 1.0
        backlog = max(0.0, backlog + (rate - most) * MINUTE_S)
        waited_s = max(waited_s, backlog / most)
    return behind, waited_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """The peak fleet when one assumption is another."""

    changed: str
    instances: int
    usd_per_month: float
    end: Literal["low", "high"] | None = None
    """Which end of the interval of the capacity it is; None: another SLO."""
