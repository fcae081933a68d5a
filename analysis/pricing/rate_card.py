"""What to charge: the measured cost of a tier and model, turned into prices by stated terms. Nothing is measured here.

``cost at 100 %`` is the cost at the highest load that keeps the SLO, with every paid hour as busy as that.
``cost at u`` = cost at 100 % / u: only the share u of the capacity one pays for is sold.
``price`` = cost at u / (1 - m) with the gross margin m = (price - cost) / price; a markup is another thing (40 % margin
is 66.7 % markup). One bill is laid on input, cached input and output by relative weights and adds up again exactly.

Build or buy: the same traffic at an API's list prices, against running the fleet oneself (cost, without margin).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date

from harness.analysis.capacity.system import System, describe, grouped, slo_words, system_of
from harness.analysis.cost.cost import HOURS_PER_MONTH, usd_per_1m
from harness.analysis.cost.split import TokenMix
from harness.analysis.price_age import OLD_DAYS
from harness.analysis.pricing.list_prices import ListPrice
from harness.analysis.pricing.operating_point import OperatingPoint, operating_point
from harness.analysis.pricing.terms import (
    PriceBasis,
    Terms,
    TokenWeights,
    UnitPrices,
    basis_of,
    bill_parts,
    from_split,
    unit_prices,
)
from harness.analysis.stats.intervals import Quantity, scaled
from harness.analysis.summary import Summary
from harness.record.manifest import Tier

SCHEMA = "harness.price/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiComparison:
    """The same traffic at an API's list price, against running the fleet oneself (cost, without margin)."""

    price: ListPrice
    same_model: bool
    usd_per_1m_total: float
    """Blend of this trace at the API's prices."""
    own_share: Quantity
    """Own cost at the stated utilisation / API price."""
    break_even_utilisation: Quantity
    """Own cost at 100 % / API price: from this share of the capacity on, owning is cheaper. Above 1: never."""
    break_even_tokens_per_month: float | None
    """Tokens a month at which the fleet costs what the API would; None: more than the fleet can serve."""
    verdict: str
    """build, buy, too close to call, or not known: the end of the interval that would decide is missing."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceOffer:
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
class RateCard(System):
    """The decision for one tier and model. Without a price everything that rests on it is None or empty: ``reason``."""

    quoted_at: str
    """"capacity": the highest load that keeps the SLO, between two measured ones; or "a measured load"."""
    load: str
    offered: Quantity | None
    """The load as a number, requests/s or requests in flight, with its interval where it is capacity."""
    runs: tuple[str, ...]
    """What it rests on: the runs of that load, or of the two around it."""
    measured: str
    """Day of the (oldest) run, ISO 8601."""
    slo: str | None
    slo_met: bool | None
    window: str | None
    window_s: float | None
    denominator: str
    basis: PriceBasis | None
    structure: TokenWeights
    mix: TokenMix | None
    """Of those runs; at capacity of one hour there."""
    bill_nanousd: tuple[int, int, int] | None = None
    """What uncached input, cached input and output carry of the bill for these tokens; adds up to it."""
    cost_full: UnitPrices | None = None
    cost: UnitPrices | None = None
    floor: UnitPrices | None = None
    """Cost at the highest throughput of any VALID run: it meets no SLO. Unless that load saturated the servers, a
    higher one may cost less."""
    floor_load: float | None
    offers: tuple[PriceOffer, ...] = ()
    """Standard first, then volume tiers, then batch."""
    fleet_usd_per_month: float | None = None
    capacity_tokens_per_month: float | None = None
    """All tokens the fleet serves in 730 h at the measured load."""
    break_even_tokens_per_month: float | None = None
    """Tokens a month at which the standard price pays for the fleet."""
    against: tuple[ApiComparison, ...] = ()
    reason: str | None
    caution: str | None
    """What a reader must know before any figure; None when there is nothing."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceReport:
    """``harness.price/1``: what to charge, for every tier and model that was asked about."""

    schema: str
    made: str
    """UTC, ISO 8601: when these prices were worked out. The measurements have their own days."""
    terms: Terms
    structure: TokenWeights
    charges: list[RateCard]
    refused: list[tuple[str, tuple[str, ...]]]
    list_prices: dict[str, str]
    """Source, date and licence of the API list prices."""
    assumptions: tuple[str, ...]


def charge(
    summaries: Sequence[Summary], terms: Terms, structure: TokenWeights, *, today: date,
    split_method: str | None = None, new_prices: Mapping[str, Tier] | None = None,
) -> list[RateCard]:  # fmt: skip
    """One decision for each `system_of`, cheapest first; only VALID summaries may come in.

    Quoted at the highest load that keeps the SLO (`operating_point`). ``today``: by which prices are old.
    ``split_method``: weights by that split of the bill where it is identifiable, else ``structure``, with a note.
    ``new_prices``: tiers by name whose price replaces the run's own. Raises `UsageError` when a new price is for other
    hardware.
    """
    for s in summaries:
        if s.verdict != "VALID":
            raise ValueError(f"{s.run} is {s.verdict}: it has no price")
    made = []
    for runs in grouped(summaries, system_of).values():
        found = operating_point(runs)
        weights = structure if split_method is None else _measured_weights(found.runs, structure, split_method)
        made.append(_charge(found, terms, weights, basis_of(runs[0].tier, new_prices or {}, today)))
    return sorted(made, key=lambda c: math.inf if c.cost_full is None else c.cost_full.total.value or math.inf)


def _charge(found: OperatingPoint, terms: Terms, structure: TokenWeights, basis: PriceBasis | None) -> RateCard:
    first, full, mix, reason = found.runs[0], found.total, found.mix, found.reason
    if reason is None and (full.value is None or mix is None or basis is None or not mix.total):
        reason = full.note or first.cost.reason or "no tokens were served"
    if reason is None and first.costs_at_least:
        least = full.value if full.low is None else full.low
        reason = (
            f"a lower bound, by the chip's data sheet: it costs at least {least:.3g} USD per 1M tokens at this load"
        )
    system = replace(describe(first), evidence=full.evidence)
    made = RateCard(
        **{f.name: getattr(system, f.name) for f in fields(system)},
        quoted_at=found.at, load=found.words, offered=found.load, runs=tuple(s.run for s in found.runs),
        measured=min(s.created for s in found.runs)[:10], slo=slo_words(first), slo_met=found.kept,
        window=first.window.rule if first.window else None,
        window_s=sum(s.window.duration_s for s in found.runs if s.window) or None, denominator=found.denominator,
        basis=basis, structure=structure, mix=mix, floor_load=found.floor.load if found.floor else None,
        reason=reason,
        caution=next((s.caution for s in found.runs if s.caution), None),
        notes=(*found.notes, *_notes(found, structure, basis)),
    )  # fmt: skip
    if reason is not None or mix is None or basis is None or full.value is None:
        return made
    again = 1.0 if basis.measured_with is None else basis.usd_per_hour / basis.measured_with.usd_per_hour
    full, floor = scaled(full, again), found.floor.usd_per_1m_total if found.floor else None
    assert full.value is not None
    cost_full = unit_prices(full, mix, structure)
    offers = _offers(cost_full, terms)
    month = basis.usd_per_hour * first.cost.replicas * HOURS_PER_MONTH
    capacity = month / full.value * 1e6
    return replace(
        made, bill_nanousd=bill_parts(full.value, mix, structure), cost_full=cost_full,
        cost=cost_full.times(1 / terms.utilisation),
        floor=None if floor is None or floor.value is None else unit_prices(scaled(floor, again), mix, structure),
        offers=offers, fleet_usd_per_month=month, capacity_tokens_per_month=capacity,
        break_even_tokens_per_month=capacity * offers[0].break_even_utilisation,
    )  # fmt: skip


def _measured_weights(runs: Sequence[Summary], declared: TokenWeights, method: str) -> TokenWeights:
    """Weights by ``method`` of the first run where it is identifiable; else the declared."""
    splits = [split for s in runs for split in s.cost.splits if split.method == method]
    split = next((split for split in splits if split.usd_per_1m_output.value is not None), None)
    if split is None:
        why = next((split.reason for split in splits if split.reason), "these runs have no such split")
        return replace(declared, note=f"{method}: not identifiable ({why}); the declared ratio is used instead")
    q = split.usd_per_1m_output
    ends = "" if q.low is None or q.high is None else f"; output 95 %: {q.low:.3g} to {q.high:.3g} for {q.value:.3g}"
    facts = [f"{name} {split.facts[name]:.3g}" for name in ("rows", "condition", "residual") if name in split.facts]
    rests = f"divided by {method}: {', '.join(facts) or 'no fit'}{ends} USD per 1M; the bill is taken as it is"
    return replace(from_split(split), note=rests)


def _notes(found: OperatingPoint, structure: TokenWeights, basis: PriceBasis | None) -> list[str]:
    runs, mix = found.runs, found.mix
    said = [structure.note] if structure.note else []
    if mix is not None and mix.cached_input is None:
        said.append("the server did not say which input came from its cache: cached input has no price of its own")
    elif mix is not None and structure.cached_input is None and mix.cached_input:
        said.append("cached input is priced like the rest of the input: declare its weight (--ratio IN:OUT:CACHED)")
    if basis is not None and basis.old:
        said.append(f"OLD: the price of the hardware was read on {basis.date}, over {OLD_DAYS} days ago")
    limits = {c.name: c for s in runs for c in s.checks if not c.gate and c.ok is False and c.name != "price_date"}
    # what to do about it says which way a price is off; the bound alone does not
    said += [f"limit of the measurement, {c.name}: {c.observed}; {c.advice or c.bound}" for c in limits.values()]
    if found.at == "capacity":
        return said  # that the load above it missed the SLO is what capacity means
    return said + sorted({s.cost.note for s in runs if s.cost.note and found.kept is False})


def _offers(cost_full: UnitPrices, terms: Terms) -> tuple[PriceOffer, ...]:
    listed = [("standard", 0.0, 0.0)]
    listed += [
        (f"beyond {v.from_tokens:,.0f} tokens a month", v.from_tokens, v.discount) for v in terms.volume if v.discount
    ]
    listed += [] if terms.batch_discount is None else [("batch", 0.0, terms.batch_discount)]
    factor = 1 / terms.utilisation / (1 - terms.margin)
    return tuple(
        PriceOffer(
            name=name, from_tokens=from_tokens, discount=discount, prices=cost_full.times(factor * (1 - discount)),
            margin=1 - (1 - terms.margin) / (1 - discount),
            break_even_utilisation=terms.utilisation * (1 - terms.margin) / (1 - discount),
        )
        for name, from_tokens, discount in listed
    )  # fmt: skip


def api_usd(price: ListPrice, mix: TokenMix) -> float:
    """Bill for ``mix`` at an API's list prices, USD. No cached price listed: cached input at the full input price."""
    cached = price.usd_per_1m_input if price.usd_per_1m_cached_input is None else price.usd_per_1m_cached_input
    return (
        mix.uncached_input * price.usd_per_1m_input
        + (mix.cached_input or 0) * cached
        + mix.output * price.usd_per_1m_output
    ) / 1e6


def compare_with_api(made: RateCard, terms: Terms, prices: Sequence[ListPrice], family: str) -> RateCard:
    """``made`` with what its traffic would cost at each of ``prices``; ``family``: of the model that was measured."""
    if made.cost_full is None or made.mix is None or made.fleet_usd_per_month is None:
        return made
    mix, full, month, found = made.mix, made.cost_full.total, made.fleet_usd_per_month, []
    for price in prices:
        blend = usd_per_1m(api_usd(price, mix), mix.total)
        at_full = replace(scaled(full, 1 / blend), unit="share of the paid capacity")
        own = replace(scaled(at_full, 1 / terms.utilisation), unit="share of the API's price")
        if own.high is not None and own.high < 1:
            verdict = "build"
        elif own.low is not None and own.low > 1:
            verdict = "buy"
        else:
            verdict = "not known" if own.low is None or own.high is None else "too close to call"
        notes = [] if price.family == family else ["another model: its tokenizer and its answers differ"]
        if mix.cached_input and price.usd_per_1m_cached_input is None:
            notes.append("no cached price is listed: cached input at full price")
        if price.dearer_when_long:
            notes.append("long prompts cost more there; only the base price is used")
        found.append(
            ApiComparison(
                price=price, same_model=price.family == family, usd_per_1m_total=blend, own_share=own,
                break_even_utilisation=at_full,
                break_even_tokens_per_month=month / blend * 1e6 if (at_full.value or 0.0) <= 1 else None,
                verdict=verdict, notes=tuple(notes),
            )
        )  # fmt: skip
    return replace(made, against=tuple(sorted(found, key=lambda a: (not a.same_model, a.usd_per_1m_total))))
