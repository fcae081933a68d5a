"""What a fleet plan says in words: its answer, and what it takes for granted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.capacity.fleet import HOLD_MINUTES
from analysis.cost.cost import HOURS_PER_MONTH
from harness.slo import percent

if TYPE_CHECKING:
    from analysis.capacity.fleet_plan import TierFleet, Wanted


def sentence(
    found: Sequence[TierFleet], excluded: Sequence[tuple[str, str]], refused: Sequence[tuple[str, str]]
) -> str:
    """The answer in one line: the cheapest tier and the runner-up, or why there is none."""
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


def assumptions(wanted: Wanted) -> tuple[str, ...]:
    """What a plan takes for granted."""
    said = [
        f"demand is the trace's, {wanted.grow:g} times, x {wanted.headroom:g} for what the forecast may miss",
        "a simulated fleet is the smallest that keeps the promise in every minute of the demand, replayed on an engine "
        "that was fitted to the measured runs; replicas take requests in turn. The fluid one is the worst minute over "
        "measured capacity",
        "fluid, N replicas carry N times one; what routing costs in prefix-cache hits, only a run of N shows",
        f"a month has {HOURS_PER_MONTH:g} h, a year 12 of them; staff, network, storage and tax are not in the price",
        "autoscaling: what it costs is counted by the minute. Reactive: after each minute it asks for what "
        f"the busiest of the last {HOLD_MINUTES} needed; new instances answer after their start-up time and are paid "
        "from the request on. Scheduled: it knows the day and asks early enough. New ones take their share of what "
        "comes from then on, and nothing of what waits elsewhere",
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
