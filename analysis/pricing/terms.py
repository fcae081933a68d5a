"""What is decided and not measured: margin, utilisation, volume tiers, and how one bill is laid on kinds of tokens.

One bill as prices of uncached input, cached input and output by relative weights; it adds up again exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from analysis.cost.split import Split, TokenMix, divide
from analysis.stats.intervals import Quantity, scaled
from harness.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPrices:
    """USD per 1M tokens of each kind; ``total`` is the blend of this trace. Their intervals move together."""

    input: Quantity
    """Uncached input; all input when ``cached_input`` has no price of its own."""
    cached_input: Quantity
    output: Quantity
    total: Quantity


def unit_prices(total: Quantity, mix: TokenMix, structure: TokenWeights) -> UnitPrices:
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


def _weighed(mix: TokenMix, structure: TokenWeights) -> tuple[float, float, float]:
    """Tokens of each kind times their weight."""
    cached = structure.input if structure.cached_input is None else structure.cached_input
    weighed = (mix.uncached_input * structure.input, (mix.cached_input or 0) * cached, mix.output * structure.output)
    if sum(weighed) <= 0:
        raise UsageError("the structure gives no weight to any token of this trace: change --ratio")
    return weighed


def bill_parts(usd_per_1m: float, mix: TokenMix, structure: TokenWeights) -> tuple[int, int, int]:
    """What uncached input, cached input and output carry of the bill, in whole billionths of a USD."""
    into, cached, out = divide(usd_per_1m * mix.total / 1e6, _weighed(mix, structure))
    return into, cached, out


def times(prices: UnitPrices, factor: float) -> UnitPrices:
    """All prices and their intervals times a constant."""
    return UnitPrices(
        input=scaled(prices.input, factor), cached_input=scaled(prices.cached_input, factor),
        output=scaled(prices.output, factor), total=scaled(prices.total, factor),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """What an uncached input, a cached input and an output token weigh against each other in one bill."""

    method: str
    input: float
    cached_input: float | None
    """None: cached input tokens weigh like the rest of the input and have no price of their own."""
    output: float
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Half width of each weight's own 95 % interval as a share of it; 0 for what is declared."""
    note: str | None = None

    def __post_init__(self) -> None:
        weights = (self.input, self.output, self.cached_input or 0.0)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or self.input + self.output <= 0:
            raise UsageError(
                f"structure {weights}: weights cannot be negative, and input or output must weigh something"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeTier:
    """From ``from_tokens`` a month on, tokens beyond that threshold cost ``discount`` less."""

    from_tokens: float
    discount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is decided, not measured. Shares, not percent."""

    margin: float
    """Gross margin, of the price."""
    utilisation: float
    """Of the capacity that is paid for."""
    volume: tuple[VolumeTier, ...] = ()
    batch_discount: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1:
            raise UsageError(f"margin {self.margin:g}: a gross margin is a share of the price, from 0 % to below 100 %")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"utilisation {self.utilisation:g}: a share of the paid capacity, above 0 % to 100 %")
        if self.batch_discount is not None and not 0 <= self.batch_discount < 1:
            raise UsageError(f"batch discount {self.batch_discount:g}: from 0 % to below 100 %")
        if any(a.from_tokens >= b.from_tokens for a, b in pairwise(self.volume)):
            raise UsageError("volume tiers: write thresholds in rising order, each once, like 0,1e9:-10%,1e10:-20%")
        if any(not (0 <= v.discount < 1 and v.from_tokens >= 0) for v in self.volume):
            raise UsageError("volume tiers: thresholds from 0 tokens, discounts from 0 % to below 100 %")


def declared(output: float, input: float = 1.0, cached_input: float | None = None) -> TokenWeights:  # noqa: A002
    """Weights that somebody declared: an opinion. ``cached_input`` None: priced like the rest of the input."""
    return TokenWeights(method="declared ratio", input=input, cached_input=cached_input, output=output)


def from_split(split: Split) -> TokenWeights:
    """The weights that a split of the bill found, with its own intervals. Raises `UsageError` when it found none."""
    into, cached, out = split.usd_per_1m_input, split.usd_per_1m_cached_input, split.usd_per_1m_output
    if into.value is None or out.value is None:
        raise UsageError(f"{split.method}: not identifiable: {split.reason or into.note or 'no price'}; use --ratio")
    unit = into.value or 1.0  # in input tokens, as a declared ratio is
    return TokenWeights(
        method=split.method,
        input=into.value / unit,
        cached_input=None if cached.value is None else cached.value / unit,
        output=out.value / unit,
        spread=(_half_width(into), _half_width(cached), _half_width(out)),
    )


def _half_width(q: Quantity) -> float:
    if not q.value or q.low is None or q.high is None:
        return 0.0
    return max(q.value - q.low, q.high - q.value) / q.value


def parse_volume(text: str) -> tuple[VolumeTier, ...]:
    """Volume tiers from ``0,1e9:-10%,1e10:-20%``. Raises `UsageError`."""
    tiers = []
    for part in text.split(","):
        threshold, colon, change = part.strip().partition(":")
        try:
            tokens, percent = float(threshold), float(change.strip().removesuffix("%")) if colon else 0.0
        except ValueError:
            tokens, percent = math.nan, 0.0
        if not math.isfinite(tokens) or not math.isfinite(percent) or (colon and not change.strip().endswith("%")):
            raise UsageError(f"volume tier {part.strip()!r}: write tokens a month and a discount, like 1e9:-10%")
        if percent > 0:
            raise UsageError(f"volume tier {part.strip()!r}: a discount is negative, like -{percent:g}%")
        tiers.append(VolumeTier(from_tokens=tokens, discount=-percent / 100))
    return tuple(tiers)
