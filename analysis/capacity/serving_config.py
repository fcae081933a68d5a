"""A sweep's runs as capacity and cost at an SLO: a `ServingConfig` per tier, model, engine arguments, kind of load.

From VALID runs only. Throughput is interpolated, cost is derived from it, nothing is extrapolated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from harness.analysis.capacity.search_answer import Answer, kept_answer
from harness.analysis.capacity.sweep import Capacity, LoadPoint, capacity, little, merged, pool, saturation
from harness.analysis.capacity.system import (
    System,
    describe,
    grouped,
    has_load,
    load_words,
    offered,
    plan_of,
    system_of,
)
from harness.analysis.cost.cost import DEFAULT_UTILISATION, OUTPUT_ONLY, at_rate, bill_usd
from harness.analysis.cost.simulated import own_error
from harness.analysis.rates import LOAD_UNIT, LoadKind
from harness.analysis.stats.intervals import Distribution, Quantity, scaled
from harness.analysis.summary import Summary
from harness.analysis.validity.prefix_cache import NAME as WARM
from harness.slo import Criterion

SCHEMA = "harness.capacity/1"
LITTLE_BOUND = 0.10
RATES = (
    "request_rate", "request_throughput", "input_token_throughput", "output_token_throughput",
    "total_token_throughput", "goodput", "concurrency",
)  # fmt: skip
LATENCIES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The highest token throughput of any VALID run: it meets no SLO, and a higher load may beat it."""

    load: float
    total_token_throughput: Quantity
    usd_per_1m_total: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactive:
    """What one user sees at one load, and what it costs there."""

    load: float
    tokens_per_s_per_user: Quantity
    """1 / tpot p50."""
    usd_per_1m_total: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig(System):
    """One tier, model and engine under one kind of load: what it carries and what that costs."""

    slo: str | None
    criteria: tuple[Criterion, ...]
    unit: str
    """Of loads: req/s, in flight, or sessions/s started."""
    loads: tuple[float, ...]
    runs: tuple[str, ...]
    capacity: Capacity | None
    """Of all replicas together; None without an SLO."""
    top_sent_rate: float | None
    """Requests/s that sessions which wait really sent at the highest measured load; None for other kinds of load."""
    top_token_throughput: Quantity | None
    """Tokens/s (input + output) at the highest measured load; None when they were not counted."""
    usd_per_1m_total: Quantity
    """At capacity."""
    usd_per_1m_output_only: Quantity
    """At capacity; output alone carries the whole bill."""
    utilisation: float
    usd_per_1m_total_utilised: Quantity
    """At capacity, when that share of it is sold."""
    floor: Floor | None
    usd_per_hour: float | None
    """Of one replica's instance."""
    replicas_per_instance: int
    """Whole ones that fit by accelerators; 1 on a CPU tier."""
    purchase: str | None
    region: str | None
    price_source: str | None
    price_date: str | None
    saturated_from: float | None
    """The lowest measured load that the server did not follow; None: it followed all."""
    drained: tuple[float, ...]
    """Loads of which a run was drain to a good part (check ``drain``): their tokens/s are low, their costs high."""
    little: Mapping[str, float]
    """By load: requests in flight over throughput x mean e2e latency."""
    interactivity: tuple[Interactive, ...]
    start_s: float | None
    """From starting a replica until it answered: the slowest seen; None when the servers were there already."""
    notes: tuple[str, ...]

    def same_under_other_slo(self, other: ServingConfig) -> bool:
        """Whether ``other`` is the same hardware, software and traffic, judged by another SLO."""
        same = (*(f.name for f in fields(System)), "usd_per_hour")
        return self.slo != other.slo and all(getattr(self, name) == getattr(other, name) for name in same)

    @property
    def requests_per_s(self) -> float | None:
        """Capacity of one replica in requests/s, but for a closed loop; a floor when it lies beyond the highest load;
        else None. Of sessions that wait: what was really sent at that rate of sessions.
        """
        if self.capacity is None or self.loop == "closed":
            return None
        beyond = self.capacity.state == "beyond"
        if self.loop == "open":
            rate = self.loads[-1] if beyond else self.capacity.load.value
        else:
            sent = self.capacity.rates.get("sent_rate")
            rate = self.top_sent_rate if beyond else sent.value if sent is not None else None
        return None if rate is None else rate / self.replicas


def serving_configs(
    summaries: Sequence[Summary], utilisation: float = DEFAULT_UTILISATION, answer: Answer | None = None
) -> list[ServingConfig]:
    """Capacity and cost of every system, cheapest at its SLO first; runs that are not VALID are left out. Costs
    that are but lower bounds come last.

    ``answer``: of the search that these runs are of; None: as it lies beside them, where it does.
    """
    found = []
    for group in grouped(summaries, system_of).values():
        left_out = [why for s in group if (why := _left_out(s)) is not None]
        if runs := [s for s in group if _left_out(s) is None]:
            found.append(_system(runs, utilisation, left_out, answer))

    def place(one: ServingConfig) -> tuple[bool, bool, float]:
        cost = one.usd_per_1m_total.value
        return one.costs_at_least, cost is None, cost or 0.0

    return sorted(found, key=place)


def _left_out(s: Summary) -> str | None:
    """Why a run says nothing of capacity; None: it does."""
    if s.verdict != "VALID":
        return "not VALID"
    if any(c.name == WARM and c.ok is False for c in s.checks):
        return "answered from a warm prefix cache"
    return None if has_load(s) else "without a rate of their load"


def point_of(s: Summary) -> LoadPoint:
    """One VALID run as a point: its load, what it kept, its rates and latencies."""
    rates: dict[str, Quantity] = {name: getattr(s.sampled, name) for name in RATES}
    rates["sent_rate"] = s.offered.sent_rate
    for metric in LATENCIES:
        found: Distribution = getattr(s.metrics, metric)
        rates |= {f"{metric}_{name}_s": getattr(found, name) for name in ("mean", "p50", "p99")}
    kept = tuple(one.attainment for one in s.slo.criteria) if s.slo is not None else ()
    unstable = any(check.name == "backlog" and check.ok is False for check in s.checks)
    return LoadPoint(load=offered(s), kept=kept, rates=rates, runs=(s.run,), unstable=unstable)


def _points(runs: Sequence[Summary]) -> list[LoadPoint]:
    """A point for each load. Repeats of one plan are one point first: what they share is as uncertain as in one run, so
    to `pool`, which takes points for independent, they must not look like several.
    """
    return pool(
        merged([point_of(s) for s in same], ["one plan"] * len(same))
        for same in grouped(runs, lambda s: (offered(s), plan_of(s))).values()
    )


def _system(
    runs: Sequence[Summary], utilisation: float, left_out: Sequence[str], answer: Answer | None
) -> ServingConfig:  # fmt: skip
    first = runs[0]
    system, kind, tier = describe(first), first.offered.kind, first.tier
    points = _points(runs)
    judged = first.slo.criteria if first.slo is not None else []
    criteria = tuple(Criterion(name=one.name, wanted=one.wanted, limits=one.limits) for one in judged)
    found = None
    if criteria:
        answer = None if kind == "closed" else answer or kept_answer(runs, criteria)
        found = capacity(points, criteria, LOAD_UNIT[kind]) if answer is None else answer.capacity
    total, output = (_cost(first, found, name) for name in ("total_token_throughput", "output_token_throughput"))
    ratios = {f"{p.load:g}": r for p in points if (r := little(p, p.rates["e2e_mean_s"].value)) is not None}
    drained = tuple(sorted({offered(s) for s in runs for c in s.checks if c.name == "drain" and c.ok is False}))
    return ServingConfig(
        **{f.name: getattr(system, f.name) for f in fields(system)},
        slo=" and ".join(c.name for c in criteria) or None, criteria=criteria, unit=LOAD_UNIT[kind],
        loads=tuple(p.load for p in points), runs=tuple(run for p in points for run in p.runs), capacity=found,
        top_sent_rate=points[-1].rates["sent_rate"].value if kind == "sessions" else None,
        top_token_throughput=points[-1].rates["total_token_throughput"], usd_per_1m_total=total,
        usd_per_1m_output_only=replace(output, unit=f"USD per 1M {OUTPUT_ONLY} tokens"),
        utilisation=utilisation, usd_per_1m_total_utilised=scaled(total, 1 / utilisation), floor=_floor(first, points),
        usd_per_hour=tier.usd_per_hour if tier else None, replicas_per_instance=_fitting(first),
        purchase=first.cost.purchase, region=first.cost.region, price_source=first.cost.source,
        price_date=first.cost.date, saturated_from=_saturated_from(kind, points), drained=drained, little=ratios,
        interactivity=_interactivity(first, points),
        start_s=max((r.ready_s for s in runs for r in s.server.replicas if r.ready_s is not None), default=None),
        notes=tuple(_notes(runs, points, found, ratios, drained, left_out)),
    )  # fmt: skip


def _saturated_from(kind: LoadKind, points: Sequence[LoadPoint]) -> float | None:
    """The lowest load that the servers did not follow. Sessions that wait ask for their planned requests/s: what they
    really send follows the server, and would always look followed.
    """
    asked = [(p.rates["request_rate"].value if kind == "sessions" else p.load, p) for p in points]
    known = [(replace(p, load=load), p.load) for load, p in asked if load is not None]
    at = saturation([p for p, _ in known], closed=kind == "closed")
    return next((load for p, load in known if p.load == at), None)


def _fitting(s: Summary) -> int:
    """Replicas that one instance holds by its accelerators, from the engine's own parallel sizes."""
    if s.tier is None or not s.tier.accelerator_count:
        return 1
    needed = 1
    words = [word for arg in s.server.args for word in arg.split("=", 1)]
    for flag, size in itertools.pairwise(words):
        if flag in ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp") and size.isdigit():
            needed *= int(size)
    return max(1, s.tier.accelerator_count // max(1, needed))


def cost_at(s: Summary, rate: Quantity, per: str = "input + output") -> Quantity:
    """USD per 1M tokens at a token throughput, from the price of the run's own tier: dear when slow."""
    if s.tier is None or not (usd_per_hour := s.cost.usd_per_hour or 0.0) > 0:
        return at_rate(None, rate, per, why="no tier, so no price (--tier)")
    usd_per_s = bill_usd(usd_per_hour, max(1, s.cost.paid), 1.0)
    within = own_error(s.server.model_facts)
    return at_rate(usd_per_s, rate, per, why=rate.note or "no tokens were counted", within=within)


def _cost(s: Summary, found: Capacity | None, name: str) -> Quantity:
    why = "no SLO was given (--slo)"
    if found is not None:
        if name in found.rates:
            return cost_at(s, found.rates[name])
        why = found.load.note or found.state
        why = "tokens were not counted at every load" if found.state == "found" else why
    return cost_at(s, Quantity(value=None, n=0, unit="tokens/s", evidence=s.evidence, note=why))


def _floor(s: Summary, points: Sequence[LoadPoint]) -> Floor | None:
    point = max(points, key=lambda p: p.rates["total_token_throughput"].value or 0.0)
    rate = point.rates["total_token_throughput"]
    if not rate.value:
        return None
    if s.offered.kind != "closed":  # the load was given, and no estimate of the most that the servers can do
        rate = replace(rate, low=None, high=None)
    return Floor(load=point.load, total_token_throughput=rate, usd_per_1m_total=cost_at(s, rate))


def _interactivity(s: Summary, points: Sequence[LoadPoint]) -> tuple[Interactive, ...]:
    found = []
    for p in points:
        tpot = p.rates["tpot_p50_s"]
        if not tpot.value:
            continue
        speed = replace(
            tpot, value=1 / tpot.value, low=1 / tpot.high if tpot.high else None,
            high=1 / tpot.low if tpot.low else None, unit="output tokens/s per user",
        )  # fmt: skip
        cost = cost_at(s, p.rates["total_token_throughput"])
        found.append(Interactive(load=p.load, tokens_per_s_per_user=speed, usd_per_1m_total=cost))
    return tuple(found)


def drain_words(loads: Sequence[float], unit: str) -> str:
    """What drain does to the figures of these loads."""
    where = ", ".join(f"{load:g}" for load in loads)
    return (
        f"drain: at {where} {unit} more than a tenth of the window lies after the last request was due; tokens/s come "
        "out low and costs high there, and longer runs would tell"
    )


def _notes(
    runs: Sequence[Summary], points: Sequence[LoadPoint], found: Capacity | None, ratios: Mapping[str, float],
    drained: Sequence[float], left_out: Sequence[str],
) -> Iterator[str]:  # fmt: skip
    kind = runs[0].offered.kind
    for why, n in sorted(Counter(left_out).items()):
        yield f"{n} runs are {why} and left out" if n > 1 else f"1 run is {why} and left out"
    for age in sorted({c.observed for s in runs for c in s.checks if c.name == "price_date" and c.ok is False}):
        yield f"OLD: age of the hardware's price when it was measured: {age}"
    if kind == "closed":
        yield ("closed loop: a slow server slows its own load here, so this is no capacity for arrivals; replay the "
               "trace's own times for that")  # fmt: skip
    if kind == "sessions":
        yield ("sessions that wait: the load is sessions started per second; a turn waits for the answer before it, so "
               "fewer requests than planned are sent where answers are slow (session lag)")  # fmt: skip
    off = [f"{load} ({ratio:.2f})" for load, ratio in ratios.items() if abs(ratio - 1) > LITTLE_BOUND]
    if off:
        yield f"Little's law does not balance at load {', '.join(off)}: failures, or mostly ramp and drain"
    if drained:
        yield drain_words(drained, LOAD_UNIT[kind])
    if found is not None and found.load.note:
        yield found.load.note
    if len(points) == 1:
        yield (f"one load was measured ({load_words(runs[0])}): capacity needs one that keeps the SLO and one that "
               "misses it")  # fmt: skip
