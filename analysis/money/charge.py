"""What to charge: the measured cost of a tier and model, turned into prices by stated terms. Nothing is measured here.

``cost at 100 %`` is the cost of the cheapest measured load that kept the SLO, with every paid hour as busy as that.
``cost at u`` = cost at 100 % / u: only the share u of the capacity one pays for is sold.
``price`` = cost at u / (1 - m) with the gross margin m = (price - cost) / price; a markup is another thing (40 % margin
is 66.7 % markup). One bill is laid on input, cached input and output by relative weights and adds up again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from analysis.intervals import Quantity, scaled
from analysis.money.basis import OLD_PRICE_DAYS, PriceBasis, basis_of
from analysis.money.buy import Against
from analysis.money.terms import Structure, Terms, from_split
from analysis.money.unit_prices import Mix, UnitPrices, bill_parts, times, unit_prices
from analysis.repeats import over_repeats
from analysis.summary import Summary
from harness.run import Tier

HOURS_PER_MONTH = 730.0
"""8,760 h / 12."""
LARGEST_MIX_CHANGE = 0.05
"""Loads whose share of output differs by more were not measured on the same traffic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One line of a price list: prices after a discount, and the gross margin left at the stated utilisation."""

    name: str
    """"standard", "batch" or "from <tokens> tokens a month"."""
    from_tokens: float
    discount: float
    prices: UnitPrices
    margin: float
    """Negative: below cost at the stated utilisation."""
    break_even_utilisation: float
    """Share of the paid capacity to sell at this price so that the fleet is paid for; above 1: it never is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """The decision for one tier and model. Without a price everything that rests on it is None or empty: ``reason``."""

    tier: str | None
    model: str
    engine: str
    args: tuple[str, ...]
    replicas: int
    evidence: str
    trace: str
    load: str
    runs: tuple[str, ...]
    measured: str
    """Day of the (oldest) run, ISO 8601."""
    slo: str | None
    slo_met: bool | None
    window: str | None
    window_s: float | None
    """Sum over the runs."""
    denominator: str
    basis: PriceBasis | None
    structure: Structure
    mix: Mix | None
    bill_nanousd: tuple[int, int, int] | None
    """What uncached input, cached input and output carry of the runs' bill; adds up to it."""
    cost_full: UnitPrices | None
    cost: UnitPrices | None
    offers: tuple[Offer, ...]
    """Standard first, then volume tiers, then batch."""
    fleet_usd_per_month: float | None
    capacity_tokens_per_month: float | None
    """All tokens the fleet serves in 730 h at the measured load."""
    break_even_tokens_per_month: float | None
    """Tokens a month at which the standard price pays for the fleet."""
    against: tuple[Against, ...]
    reason: str | None
    caution: str | None
    """What a reader must know before any figure; None when there is nothing."""
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------ decision


def charge(
    summaries: Sequence[Summary],
    terms: Terms,
    structure: Structure,
    *,
    today: date,
    split_method: str | None = None,
    new_prices: Mapping[str, Tier] | None = None,
) -> list[Charge]:
    """One decision for each `system_of`, cheapest first; only VALID summaries may come in.

    Of several loads the cheapest that kept the SLO counts; repeats of one load are added up, with the interval of
    `over_repeats`. ``today``: by which prices are old. ``split_method``: weights by that split of the runs' own bill
    where it is identifiable, else ``structure``, with a note. ``new_prices``: tiers by name whose price replaces the
    run's own. Raises `UsageError` when a new price is for other hardware.
    """
    systems: dict[tuple[object, ...], list[Summary]] = {}
    for s in summaries:
        if s.verdict != "VALID":
            raise ValueError(f"{s.run} is {s.verdict}: it has no price")
        systems.setdefault(system_of(s), []).append(s)
    made = [_charge(runs, terms, structure, split_method, new_prices or {}, today) for runs in systems.values()]
    return sorted(made, key=lambda c: math.inf if c.cost_full is None else c.cost_full.total.value or math.inf)


def system_of(s: Summary) -> tuple[object, ...]:
    """What is priced as one: everything but the load, that is hardware, software, SLO, traffic and kind of loop.

    A closed loop is apart: it slows down with its server, so of two loops it would always look the cheaper. So is a cap
    on output lengths or another body: that is other traffic.
    """
    limits = None if s.slo is None else (tuple(sorted(s.slo.limits.items())), s.slo.attain)
    tier = (s.tier.name, s.tier.usd_per_hour) if s.tier else None
    asked = (s.load.mode, s.load.endpoint, s.load.stream, str(sorted(s.load.extra_body.items(), key=str)),
             s.plan.sessions, s.plan.max_output_tokens)  # fmt: skip
    return (tier, s.cost.replicas, s.model, s.engine, s.server.version, tuple(s.server.args), s.evidence, limits,
            s.plan.trace_sha256, asked)  # fmt: skip


def load_of(s: Summary) -> tuple[object, ...]:
    """The load that was asked for, without the seed: runs that agree in it are repeats of each other."""
    plan, load = s.plan, s.load
    if load.mode == "closed":
        return ("closed", load.concurrency, plan.requests)
    # drawn arrivals of one rate differ a little with the seed in the rate they come to
    drawn = tuple((stage.duration_s, stage.rate, stage.end_rate) for stage in plan.stages)
    return ("open", plan.arrivals, drawn, plan.burstiness, None if drawn else plan.speed, load.concurrency,
            None if drawn else plan.requests)  # fmt: skip


def load_words(s: Summary) -> str:
    """The load in words."""
    if s.load.mode == "closed":
        return f"closed loop, {s.load.concurrency} in flight"
    rate = s.plan.planned_rate
    return (
        "open loop"
        + (f", {rate:.3g} req/s planned" if rate is not None else "")
        + (f" ({s.plan.arrivals} arrivals)" if s.plan.arrivals != "trace" else "")
    )


def slo_words(s: Summary) -> str | None:
    """The SLO in words, criterion by criterion; None without."""
    return None if s.slo is None else ", ".join(sorted(one.name for one in s.slo.criteria))


def _charge(
    runs: Sequence[Summary],
    terms: Terms,
    structure: Structure,
    split_method: str | None,
    new_prices: Mapping[str, Tier],
    today: date,
) -> Charge:
    chosen, reason, notes = _choose(runs)
    first = chosen[0]
    structure = _structure(chosen, structure, split_method)
    basis = basis_of(first.tier, new_prices, today)
    full = _pooled_cost(chosen)
    mix = _mix(chosen)
    if reason is None and (full.value is None or mix is None or basis is None or not mix.total):
        reason = full.note or first.cost.reason or "no tokens were served"
    made = Charge(
        tier=first.tier.name if first.tier else None,
        model=first.model,
        engine=f"{first.engine} {first.server.version or ''}".strip(),
        args=tuple(first.server.args),
        replicas=first.cost.replicas,
        evidence=full.evidence,
        trace=first.plan.trace,
        load=load_words(first),
        runs=tuple(s.run for s in chosen),
        measured=min(s.created for s in chosen)[:10],
        slo=slo_words(first),
        slo_met=None if first.slo is None else all(s.slo is not None and s.slo.met for s in chosen),
        window=first.window.rule if first.window else None,
        window_s=sum(s.window.duration_s for s in chosen if s.window) or None,
        denominator="input + output tokens of successful requests, as the server counted them",
        basis=basis,
        structure=structure,
        mix=mix,
        bill_nanousd=None, cost_full=None, cost=None, offers=(), fleet_usd_per_month=None,
        capacity_tokens_per_month=None, break_even_tokens_per_month=None, against=(),
        reason=reason,
        caution=next((s.caution for s in chosen if s.caution), None),
        notes=(*notes, *_notes(chosen, mix, structure, basis)),
    )  # fmt: skip
    if reason is not None or mix is None or basis is None or full.value is None:
        return made
    if basis.measured_with is not None:
        full = scaled(full, basis.usd_per_hour / basis.measured_with.usd_per_hour)
    assert full.value is not None
    cost_full = unit_prices(full, mix, structure)
    offers = _offers(cost_full, terms)
    month = basis.usd_per_hour * first.cost.replicas * HOURS_PER_MONTH
    capacity = month / full.value * 1e6
    return replace(
        made,
        bill_nanousd=bill_parts(full.value, mix, structure),
        cost_full=cost_full,
        cost=times(cost_full, 1 / terms.utilisation),
        offers=offers,
        fleet_usd_per_month=month,
        capacity_tokens_per_month=capacity,
        break_even_tokens_per_month=capacity * offers[0].break_even_utilisation,
    )


def _choose(runs: Sequence[Summary]) -> tuple[list[Summary], str | None, list[str]]:
    """The runs of the cheapest load that kept the SLO in all of its repeats; why there is none; what to know of it."""
    loads: dict[tuple[object, ...], list[Summary]] = {}
    for s in runs:
        loads.setdefault(load_of(s), []).append(s)
    points = list(loads.values())
    kept = [p for p in points if all(s.slo is None or s.slo.met for s in p)]
    if not kept:
        shares = [s.slo.attainment.value for s in runs if s.slo is not None and s.slo.attainment.value is not None]
        best = f" (best: {max(shares):.1%} of requests)" if shares else ""
        return list(runs), f"no measured load kept the SLO{best}; measure a lower load", []
    priced = [p for p in kept if _pooled_cost(p).value is not None]
    if not priced:
        return kept[0], None, []
    cheapest = min(priced, key=lambda p: _pooled_cost(p).value or math.inf)
    return cheapest, None, _choice_notes(cheapest, points, kept)


def _choice_notes(best: list[Summary], points: list[list[Summary]], kept: list[list[Summary]]) -> list[str]:
    """What a reader must know of the load that was chosen."""
    notes = []
    if len(points) > 1:
        notes.append(f"the cheapest of {len(kept)} measured loads that kept the SLO; {len(points)} were measured")
    if best[0].slo is None:
        notes.append("no SLO was given: nothing says that anyone would accept this latency (--slo)")
    elif any(_height(p) < _height(best) for p in points if p not in kept):
        notes.append("a LOWER load missed the SLO: chance decides here; repeat both (--seed) before selling at this")
    if _height(best) == max(_height(p) for p in points):
        notes.append("no higher load was measured: 100 % means as busy as this, and the hardware may carry more")
    doubtful = {one.name: one for s in best if s.slo for one in s.slo.criteria
                if one.attainment.low is not None and one.attainment.low < one.wanted}  # fmt: skip
    for name, one in doubtful.items():
        notes.append(f"kept, but not beyond doubt: {name}, by {one.attainment.value or 0:.2%} of requests here "
                     f"(95 %: from {one.attainment.low or 0:.2%}); more requests would tell")  # fmt: skip
    if len(best) > 1:
        notes.append(f"{len(best)} repeats added up; the interval is that between them")
    else:
        notes.append(
            "one run: the interval knows how requests vary, not how days and restarts do; repeats would (--seed)"
        )
    if best[0].load.mode == "closed":
        notes.append("closed loop: a slow server slows its own load, so users who arrive when they like are not priced "
                     "here; replay the trace's own times for that")  # fmt: skip
    shares = [mix.output / mix.total for p in kept if (mix := _mix(p)) is not None and mix.total]
    if len(shares) > 1 and max(shares) > min(shares) * (1 + LARGEST_MIX_CHANGE):
        notes.append(f"the loads were measured on other parts of the trace: output is {min(shares):.1%} to "
                     f"{max(shares):.1%} of their tokens, and that alone moves the price")  # fmt: skip
    return notes


def _height(runs: Sequence[Summary]) -> float:
    """How high a load is: requests in flight, or requests/s that were planned."""
    s = runs[0]
    return float((s.load.concurrency if s.load.mode == "closed" else s.plan.planned_rate) or 0.0)


def _structure(runs: Sequence[Summary], declared: Structure, method: str | None) -> Structure:
    """Weights of the first run whose own split by ``method`` is identifiable; else the declared ones, saying so."""
    if method is None:
        return declared
    splits = [split for s in runs for split in s.cost.splits if split.method == method]
    found = next((split for split in splits if split.usd_per_1m_output.value is not None), None)
    if found is not None:
        return from_split(found)
    why = next((split.reason for split in splits if split.reason), "these runs have no such split")
    return replace(declared, note=f"{method}: not identifiable ({why}); the declared ratio is used instead")


def _notes(runs: Sequence[Summary], mix: Mix | None, structure: Structure, basis: PriceBasis | None) -> list[str]:
    said = [structure.note] if structure.note else []
    if mix is not None and mix.cached_input is None:
        said.append("the server did not say which input came from its cache: cached input has no price of its own")
    elif mix is not None and structure.cached_input is None and mix.cached_input:
        said.append("cached input is priced like the rest of the input: declare its weight (--ratio IN:OUT:CACHED)")
    if basis is not None and basis.old:
        said.append(f"OLD: the price of the hardware was read on {basis.date}, over {OLD_PRICE_DAYS} days ago")
    limits = {c.name: c for s in runs for c in s.checks if not c.gate and c.ok is False and c.name != "price_date"}
    said += [f"limit of the measurement, {c.name}: {c.observed} (wanted: {c.bound})" for c in limits.values()]
    return said + sorted({s.cost.note for s in runs if s.cost.note and s.slo is not None and not s.slo.met})


def _pooled_cost(runs: Sequence[Summary]) -> Quantity:
    """USD per 1M total tokens: the runs' bills over their tokens."""
    tokens = [(s.tokens.input or 0) + (s.tokens.output or 0) for s in runs]
    return over_repeats([s.cost.usd_per_1m_total for s in runs], tokens)


def _mix(runs: Sequence[Summary]) -> Mix | None:
    if any(s.tokens.input is None or s.tokens.output is None for s in runs):
        return None
    into, out = sum(s.tokens.input or 0 for s in runs), sum(s.tokens.output or 0 for s in runs)
    known = [s.tokens.cached_input for s in runs]
    cached = None if None in known else min(into, sum(c or 0 for c in known))
    return Mix(uncached_input=into - (cached or 0), cached_input=cached, output=out)


def _offers(cost_full: UnitPrices, terms: Terms) -> tuple[Offer, ...]:
    factor = 1 / terms.utilisation / (1 - terms.margin)

    def offer(name: str, from_tokens: float, discount: float) -> Offer:
        share = 1 - discount
        return Offer(
            name=name,
            from_tokens=from_tokens,
            discount=discount,
            prices=times(cost_full, factor * share),
            margin=1 - (1 - terms.margin) / share,
            break_even_utilisation=terms.utilisation * (1 - terms.margin) / share,
        )

    made = [offer("standard", 0.0, 0.0)]
    made += [
        offer(f"beyond {v.from_tokens:,.0f} tokens a month", v.from_tokens, v.discount)
        for v in terms.volume
        if v.discount
    ]
    if terms.batch_discount is not None:
        made.append(offer("batch", 0.0, terms.batch_discount))
    return tuple(made)
