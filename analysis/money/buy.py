"""Build or buy: the same traffic at an API's list prices, against running the fleet oneself (cost, without margin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from analysis.intervals import Quantity, scaled
from analysis.money.listprices import ListPrice
from analysis.money.split import TokenMix
from analysis.money.terms import Terms

if TYPE_CHECKING:
    from analysis.money.charge import Charge


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
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


def compare_with_api(made: Charge, terms: Terms, prices: Sequence[ListPrice], family: str) -> Charge:
    """``made`` with what its traffic would cost at each of ``prices``; ``family``: of the model that was measured."""
    if made.cost_full is None or made.mix is None or made.fleet_usd_per_month is None:
        return made
    found = tuple(_against(made, terms, price, price.family == family) for price in prices)
    return replace(made, against=tuple(sorted(found, key=lambda a: (not a.same_model, a.usd_per_1m_total))))


def api_usd(price: ListPrice, mix: TokenMix) -> float:
    """Bill for ``mix`` at an API's list prices, USD. No cached price listed: cached input at the full input price."""
    cached = price.usd_per_1m_input if price.usd_per_1m_cached_input is None else price.usd_per_1m_cached_input
    return (
        mix.uncached_input * price.usd_per_1m_input
        + (mix.cached_input or 0) * cached
        + mix.output * price.usd_per_1m_output
    ) / 1e6


def _against(made: Charge, terms: Terms, price: ListPrice, same_model: bool) -> Against:
    assert made.cost_full is not None and made.mix is not None and made.fleet_usd_per_month is not None
    blend = api_usd(price, made.mix) / made.mix.total * 1e6
    full = made.cost_full.total
    at_full = replace(scaled(full, 1 / blend), unit="share of the API's price")
    own = scaled(at_full, 1 / terms.utilisation)
    assert at_full.value is not None
    if own.high is not None and own.high < 1:
        verdict = "build"
    elif own.low is not None and own.low > 1:
        verdict = "buy"
    else:
        verdict = "not known" if own.low is None or own.high is None else "too close to call"
    notes = [] if same_model else ["another model: its tokenizer and its answers differ"]
    if made.mix.cached_input and price.usd_per_1m_cached_input is None:
        notes.append("no cached price is listed: cached input at full price")
    if price.dearer_when_long:
        notes.append("long prompts cost more there; only the base price is used")
    return Against(
        price=price,
        same_model=same_model,
        usd_per_1m_total=blend,
        own_share=own,
        break_even_utilisation=replace(at_full, unit="share of the paid capacity"),
        break_even_tokens_per_month=made.fleet_usd_per_month / blend * 1e6 if at_full.value <= 1 else None,
        verdict=verdict,
        notes=tuple(notes),
    )
