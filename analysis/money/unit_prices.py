"""One bill as prices of uncached input, cached input and output by relative weights; it adds up again exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from analysis.intervals import Quantity, scaled
from analysis.money.split import TokenMix, divide
from analysis.money.terms import Structure
from harness.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPrices:
    """USD per 1M tokens of each kind; ``total`` is the blend of this trace. Their intervals move together."""

    input: Quantity
    """Uncached input; all input when ``cached_input`` has no price of its own."""
    cached_input: Quantity
    output: Quantity
    total: Quantity


def unit_prices(total: Quantity, mix: TokenMix, structure: Structure) -> UnitPrices:
    """Prices of the three kinds that make the same bill as ``total`` per 1M of all tokens does.

    uncached x input + cached x cached_input + output x output = total x all tokens; ends of intervals likewise, as long
    as the weights are declared. A kind without a weight of its own is None with the reason.
    """
    assert total.value is not None
    weighed = _weighed(mix, structure)
    per_weight = total.value * mix.total / sum(weighed)

    def price(kind: str, weight: float, spread: float) -> Quantity:
        assert total.value is not None
        down, up = (
            None if end is None else math.hypot((end - total.value) / total.value, spread)
            for end in (total.low, total.high)
        )
        value = weight * per_weight
        return replace(
            total,
            value=value,
            low=None if down is None else max(0.0, value * (1 - down)),
            high=None if up is None else value * (1 + up),
            unit=f"USD per 1M {kind} tokens",
        )

    if mix.cached_input is None or structure.cached_input is None:
        why = (
            "the server did not say which input came from its cache"
            if mix.cached_input is None
            else "no weight was declared: priced like the rest of the input"
        )
        cached = replace(total, value=None, low=None, high=None, note=why, unit="USD per 1M cached input tokens")
    else:
        cached = price("cached input", structure.cached_input, structure.spread[1])
    apart = cached.value is not None
    return UnitPrices(
        input=price("uncached input" if apart else "input", structure.input, structure.spread[0]),
        cached_input=cached,
        output=price("output", structure.output, structure.spread[2]),
        total=total,
    )


def _weighed(mix: TokenMix, structure: Structure) -> tuple[float, float, float]:
    """Tokens of each kind times their weight."""
    cached = structure.input if structure.cached_input is None else structure.cached_input
    weighed = (mix.uncached_input * structure.input, (mix.cached_input or 0) * cached, mix.output * structure.output)
    if sum(weighed) <= 0:
        raise UsageError("the structure gives no weight to any token of this trace: change --ratio")
    return weighed


def bill_parts(usd_per_1m: float, mix: TokenMix, structure: Structure) -> tuple[int, int, int]:
    """What uncached input, cached input and output carry of the bill, in whole billionths of a USD."""
    into, cached, out = divide(usd_per_1m * mix.total / 1e6, _weighed(mix, structure))
    return into, cached, out


def times(prices: UnitPrices, factor: float) -> UnitPrices:
    """All prices and their intervals times a constant."""
    return UnitPrices(
        input=scaled(prices.input, factor), cached_input=scaled(prices.cached_input, factor),
        output=scaled(prices.output, factor), total=scaled(prices.total, factor),
    )  # fmt: skip
