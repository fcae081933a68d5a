"""Which load a price is quoted at: the highest one that keeps the SLO, and what its tokens cost there.

From several loads that is capacity: tokens/s are interpolated between the two measured loads around it and the cost is
derived from them; nothing is extrapolated. From one load, or where capacity has no figure, it is a load that was run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis.capacity.serving_config import Floor, ServingConfig, serving_configs
from harness.analysis.capacity.system import (
    all_met,
    arrival_words,
    grouped,
    has_load,
    load_of,
    load_words,
    offered,
    plan_of,
)
from harness.analysis.cost.cost import usd_per_1m
from harness.analysis.cost.simulated import at_least_as_wide, own_error
from harness.analysis.cost.split import TokenMix, token_mix
from harness.analysis.rates import GIVEN, KIND_WORDS, LOAD_UNIT, given_load_note
from harness.analysis.stats.intervals import Quantity
from harness.analysis.stats.replicates import over_replicates
from harness.analysis.summary import Summary

LARGEST_MIX_CHANGE = 0.05
"""Loads whose share of output differs by more were not measured on the same traffic."""
SUCCESSFUL = "input + output tokens of successful requests, as the server counted them"
AN_HOUR = (
    "input + output tokens of successful requests in an hour at this load, interpolated between what the server "
    "counted at the loads around it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One load of one system and its cost, at the price that its runs were measured with."""

    at: str
    words: str
    load: Quantity | None
    """Requests/s or requests in flight; None when the plan has no rate."""
    runs: tuple[Summary, ...]
    """Those of that load; at capacity those of the two loads around it, the lower first."""
    total: Quantity
    mix: TokenMix | None
    """The tokens of those runs; at capacity of one hour."""
    denominator: str
    floor: Floor | None
    kept: bool | None
    """Whether the SLO is kept; None without one."""
    reason: str | None
    notes: tuple[str, ...]


def operating_point(runs: Sequence[Summary]) -> OperatingPoint:
    """The load to quote from the VALID runs of one system (`system_of`)."""
    system = next(iter(serving_configs(runs)), None)
    made = None if system is None else _at_capacity(system, runs)
    return _measured(system, runs) if made is None else made


def _at_capacity(system: ServingConfig, runs: Sequence[Summary]) -> OperatingPoint | None:
    found, cost = system.capacity, system.usd_per_1m_total
    if found is None or found.load.value is None or cost.value is None:
        return None
    load = found.load.value
    if load < min(system.loads):  # nothing is extrapolated
        return None
    below = max(x for x in system.loads if x <= load)
    above = min((x for x in system.loads if x > load), default=below)
    around = [[s for s in runs if offered(s) == x] for x in dict.fromkeys((below, above))]
    into, out = (found.rates.get(f"{kind}_token_throughput") for kind in ("input", "output"))
    mixes = [mix for one in around if (mix := mix_of(one)) is not None]
    if into is None or out is None or into.value is None or out.value is None or len(mixes) < len(around):
        return None
    mix = _hour(into.value, out.value, mixes, 0.0 if above == below else (load - below) / (above - below))
    if not mix.total:
        return None
    # whole tokens: prices times tokens are the hour's bill
    exact = usd_per_1m((system.usd_per_hour or 0.0) * system.replicas, mix.total)
    ends = [None if end is None else end * exact / cost.value for end in (cost.low, cost.high)]
    q = found.load
    within = " to ".join("not known" if end is None else f"{end:.3g}" for end in (q.low, q.high))
    within = "" if q.low is None and q.high is None else f" (95 %: {within})"
    every = tuple(s for one in around for s in one)
    return OperatingPoint(
        at="capacity", load=q, runs=every, total=replace(cost, value=exact, low=ends[0], high=ends[1]), mix=mix,
        words=f"{KIND_WORDS[system.loop]}, capacity {load:.3g} {system.unit}{within}{arrival_words(runs[0])}",
        denominator=AN_HOUR, floor=system.floor, kept=True, reason=None,
        notes=(
            *_capacity_notes(system, around),
            *_common_notes(every, mixes, repeats=min(len(one) for one in around)),
        ),
    )  # fmt: skip


def _hour(into: float, out: float, mixes: Sequence[TokenMix], place: float) -> TokenMix:
    """Whole tokens of one hour; the cached share of input lies between those of the loads around it, too."""
    input_, output = round(into * 3600), round(out * 3600)
    shares = [mix.cached_input / max(1, mix.input) for mix in mixes if mix.cached_input is not None]
    if len(shares) < len(mixes):
        return token_mix(input_, None, output)
    return token_mix(input_, round(input_ * (shares[0] + place * (shares[-1] - shares[0]))), output)


def _capacity_notes(system: ServingConfig, around: Sequence[Sequence[Summary]]) -> list[str]:
    assert system.capacity is not None
    said = []
    for one, words in zip(around, ("kept", "missed"), strict=False):
        cost = pooled_cost(one).value
        costs = "no price" if cost is None else f"{cost:.3g} USD per 1M tokens"
        said.append(f"{offered(one[0]):g} {system.unit} ({words}): {costs}")
    notes = [
        f"the highest load that keeps the SLO, from {len(system.loads)} measured loads: tokens/s are interpolated "
        f"between {' and '.join(said)}; nothing is extrapolated, and a run there would confirm it"
    ]
    if system.capacity.limit is not None and len(system.criteria) > 1:
        notes.append(f"what breaks first beyond it: {system.capacity.limit.name}")
    if system.capacity.load.note:
        notes.append(f"capacity {system.capacity.load.note}")
    if system.usd_per_1m_total.low is None or system.usd_per_1m_total.high is None:
        notes.append("the cost has no whole interval, because capacity or tokens/s have none: more requests, or loads "
                     "further apart, would tell")  # fmt: skip
    return notes


def _measured(system: ServingConfig | None, runs: Sequence[Summary]) -> OperatingPoint:
    chosen, reason, notes = _choose(system, runs)
    first, last = chosen[0], chosen[-1]
    unit, load, words = LOAD_UNIT[first.offered.kind], None, load_words(first)
    if load_of(first) != load_of(last):  # none kept the SLO: no one of them is quoted
        words = f"{KIND_WORDS[first.offered.kind]}, {_height([first]):.3g} to {_height([last]):.3g} {unit}"
    elif has_load(first):
        load = Quantity(value=offered(first), n=len(chosen), unit=unit, evidence="plan")
    return OperatingPoint(
        at="a measured load", words=words, load=load, runs=tuple(chosen), total=pooled_cost(chosen),
        mix=mix_of(chosen), denominator=SUCCESSFUL, kept=all_met(chosen), reason=reason, notes=tuple(notes),
        floor=system.floor if system is not None and len(system.loads) > 1 else None,
    )  # fmt: skip


def _choose(system: ServingConfig | None, runs: Sequence[Summary]) -> tuple[list[Summary], str | None, list[str]]:
    """The runs of the load to quote, why there is none, and what to know of it.

    With an SLO the highest load of which all repeats kept it and below which none missed it; without one the cheapest.
    """
    points = sorted(grouped(runs, load_of).values(), key=_height)
    if all(s.cost.usd_per_1m_total.value is None for s in runs):
        return points[-1], runs[0].cost.usd_per_1m_total.note, []
    kept = [p for p in points if all(s.slo is None or s.slo.met for s in p)]
    state = system.capacity.state if system is not None and system.capacity is not None else "unknown"
    if not kept or state == "not reached":
        shares = [s.slo.attainment.value for s in runs if s.slo is not None and s.slo.attainment.value is not None]
        best = f" (best: {max(shares):.1%} of requests)" if shares else ""
        every = sorted(runs, key=lambda s: _height([s]))
        return every, f"no measured load kept the SLO{best}; measure a lower load", []
    priced = [p for p in kept if pooled_cost(p).value is not None]
    if not priced:
        return kept[-1], None, []
    highest = priced[-1] if runs[0].slo else min(priced, key=lambda p: pooled_cost(p).value or math.inf)
    return highest, None, _choice_notes(highest, points, kept)


def _choice_notes(best: list[Summary], points: list[list[Summary]], kept: list[list[Summary]]) -> list[str]:
    slo = best[0].slo is not None
    if len(points) == 1:
        notes = ["a quote of this one load, not of capacity: the highest load that keeps an SLO takes several "
                 "(harness capacity, harness sweep)"]  # fmt: skip
    elif slo:
        notes = [f"the highest of {len(kept)} measured loads that kept the SLO; {len(points)} were measured"]
    else:
        notes = [f"the cheapest of {len(points)} measured loads: without an SLO there is no capacity"]
    if not slo:
        notes.append("no SLO was given: nothing says that anyone would accept this latency (--slo)")
    if _height(best) == max(_height(p) for p in points):
        notes.append("no higher load was measured: 100 % means as busy as this, and the hardware may carry more")
    doubtful = {one.name: one for s in best if s.slo for one in s.slo.criteria
                if one.attainment.low is not None and one.attainment.low < one.wanted}  # fmt: skip
    for name, one in doubtful.items():
        notes.append(f"kept, but not beyond doubt: {name}, by {one.attainment.value or 0:.2%} of requests here "
                     f"(95 %: from {one.attainment.low or 0:.2%}); more requests would tell")  # fmt: skip
    given = best[0].offered.kind != "closed"
    mixes = [mix for p in kept if (mix := mix_of(p)) is not None]
    return [*notes, *_common_notes(best, mixes, repeats=len(best), given=given)]


def _common_notes(
    runs: Sequence[Summary], mixes: Sequence[TokenMix], repeats: int, *, given: bool = False
) -> list[str]:
    """``given``: the quote is of a load that was given, and no estimate of what the servers can do."""
    notes = []
    if repeats > 1:
        notes.append(f"{repeats} repeats added up" + ("" if given else "; the interval is that between them"))
    elif not given:
        notes.append(
            "one run: the interval knows how requests vary, not how days and restarts do; repeats would (--seed)"
        )
    if given:
        notes.append(given_load_note(runs[0].fullness))
    if runs[0].load.mode == "closed":
        notes.append("closed loop: a slow server slows its own load, so users who arrive when they like are not priced "
                     "here; replay the trace's own times for that")  # fmt: skip
    shares = [mix.output / mix.total for mix in mixes if mix.total]
    if len(shares) > 1 and max(shares) > min(shares) * (1 + LARGEST_MIX_CHANGE):
        notes.append(f"the loads were measured on other parts of the trace: output is {min(shares):.1%} to "
                     f"{max(shares):.1%} of their tokens, and that alone moves the price")  # fmt: skip
    return notes


def _height(runs: Sequence[Summary]) -> float:
    """How high a load is, in its own unit; 0 where it is no number."""
    s = runs[0]
    return offered(s) if has_load(s) else 0.0


def pooled_cost(runs: Sequence[Summary]) -> Quantity:
    """USD per 1M total tokens: the runs' bills over their tokens."""
    tokens = [(s.tokens.input or 0) + (s.tokens.output or 0) for s in runs]
    pooled = over_replicates([s.cost.usd_per_1m_total for s in runs], tokens, [plan_of(s) for s in runs])
    given = any(s.offered.kind != "closed" for s in runs) and pooled.value is not None
    pooled = replace(pooled, low=None, high=None, note=GIVEN) if given else pooled
    return at_least_as_wide(pooled, own_error(runs[0].server.model_facts))


def mix_of(runs: Sequence[Summary]) -> TokenMix | None:
    """The tokens that these runs served; None when one of them does not say."""
    if any(s.tokens.input is None or s.tokens.output is None for s in runs):
        return None
    into, out = sum(s.tokens.input or 0 for s in runs), sum(s.tokens.output or 0 for s in runs)
    known = [s.tokens.cached_input for s in runs]
    return token_mix(into, None if None in known else sum(c or 0 for c in known), out)
