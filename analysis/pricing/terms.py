"""What is decided, not measured: hourly price, margin, utilisation, volume tiers, and how a bill is laid on tokens.

One bill as prices of uncached input, cached input and output by relative weights; it adds up again exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise

from harness.analysis.cost.split import Split, TokenMix, divide
from harness.analysis.price_age import is_old
from harness.analysis.stats.intervals import Quantity, scaled
from harness.errors import UsageError
from harness.record.manifest import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBasis:
    """The hourly price of the hardware, where and when it was read; ``measured_with`` was the run's own."""

    usd_per_hour: float
    purchase: str
    region: str
    source: str
    date: str
    old: bool
    """Read more than `analysis.price_age.OLD_DAYS` ago."""
    note: str | None = None
    """What a reader of the price must know besides: term, condition, assumption."""
    measured_with: PriceBasis | None = None
    """Set when an old run was priced again: the measurement is the old one, only the price is new."""


def basis_of(tier: Tier | None, new_prices: Mapping[str, Tier], today: date) -> PriceBasis | None:
    """The price of a run's tier, or the new one under its name; None without a tier.

    Raises `UsageError` when the new price is for other hardware.
    """
    if tier is None:
        return None
    new = new_prices.get(tier.name)
    own, *newer = (
        PriceBasis(
            usd_per_hour=t.usd_per_hour, purchase=t.purchase, region=t.region, source=t.source, date=t.date,
            old=is_old(t.date, today), note=t.note,
        )
        for t in (tier, new) if t is not None
    )  # fmt: skip
    if new is None:
        return own
    hardware = ("instance", "provider", "accelerator", "accelerator_count", "vcpu")
    other = [name for name in hardware if getattr(new, name) != getattr(tier, name)]
    if other:
        raise UsageError(
            f"tier {new.name}: the new price is for other hardware than the run was measured on ({', '.join(other)} "
            "differ); a price can be replaced, a measurement cannot"
        )
    return replace(newer[0], measured_with=own)


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

    def on(self, mix: TokenMix) -> tuple[float, float, float]:
        """Tokens of each kind times their weight. Raises `UsageError` where none weighs anything."""
        cached = self.input if self.cached_input is None else self.cached_input
        weighed = (mix.uncached_input * self.input, (mix.cached_input or 0) * cached, mix.output * self.output)
        if sum(weighed) <= 0:
            raise UsageError("the structure gives no weight to any token of this trace: change --ratio")
        return weighed


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
        method=split.method, input=into.value / unit,
        cached_input=None if cached.value is None else cached.value / unit, output=out.value / unit,
        spread=(_half_width(into), _half_width(cached), _half_width(out)),
    )  # fmt: skip


def _half_width(q: Quantity) -> float:
    if not q.value or q.low is None or q.high is None:
        return 0.0
    return max(q.value - q.low, q.high - q.value) / q.value


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPrices:
    """USD per 1M tokens of each kind; ``total`` is the blend of this trace. Their intervals move together."""

    input: Quantity
    """Uncached input; all input when ``cached_input`` has no price of its own."""
    cached_input: Quantity
    output: Quantity
    total: Quantity

    def times(self, factor: float) -> UnitPrices:
        """All prices and their intervals times a constant."""
        return UnitPrices(
            input=scaled(self.input, factor), cached_input=scaled(self.cached_input, factor),
            output=scaled(self.output, factor), total=scaled(self.total, factor),
        )  # fmt: skip


def unit_prices(total: Quantity, mix: TokenMix, structure: TokenWeights) -> UnitPrices:
    """Prices of the three kinds that make the same bill as ``total`` per 1M of all tokens does.

    uncached x input + cached x cached_input + output x output = total x all tokens; ends of intervals likewise, as long
    as the weights are declared. A kind without a weight of its own is None with the reason.
    """
    whole = total.value
    assert whole is not None
    per_weight = whole * mix.total / sum(structure.on(mix))

    def price(kind: str, weight: float, spread: float) -> Quantity:
        value = weight * per_weight
        down, up = (
            None if end is None else math.hypot((end - whole) / whole, spread) for end in (total.low, total.high)
        )
        return replace(
            total, value=value, low=None if down is None else max(0.0, value * (1 - down)),
            high=None if up is None else value * (1 + up), unit=f"USD per 1M {kind} tokens",
        )  # fmt: skip

    if apart := mix.cached_input is not None and structure.cached_input is not None:
        cached = price("cached input", structure.cached_input or 0.0, structure.spread[1])
    else:
        why = "the server did not say which input came from its cache"
        if mix.cached_input is not None:
            why = "no weight was declared: priced like the rest of the input"
        cached = replace(total, value=None, low=None, high=None, note=why, unit="USD per 1M cached input tokens")
    return UnitPrices(
        input=price("uncached input" if apart else "input", structure.input, structure.spread[0]), cached_input=cached,
        output=price("output", structure.output, structure.spread[2]), total=total,
    )  # fmt: skip


def bill_parts(usd_per_1m: float, mix: TokenMix, structure: TokenWeights) -> tuple[int, int, int]:
    """What uncached input, cached input and output carry of the bill, in whole billionths of a USD."""
    into, cached, out = divide(usd_per_1m * mix.total / 1e6, structure.on(mix))
    return into, cached, out


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeTier:
    """From ``from_tokens`` a month on, tokens beyond that threshold cost ``discount`` less."""

    from_tokens: float
    discount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is decided, not measured. Shares, not percent."""

    margin: float
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


def parse_volume(text: str) -> tuple[VolumeTier, ...]:
    """Volume tiers from ``0,1e9:-10%,1e10:-20%``. Raises `UsageError`."""
    tiers = []
    for part in map(str.strip, text.split(",")):
        said = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e\d{1,2})?)\s*(?::\s*-(\d+(?:\.\d+)?)%)?", part)
        if said is None:
            raise UsageError(f"volume tier {part!r}: write tokens a month and a discount below 0, like 1e9:-10%")
        tiers.append(VolumeTier(from_tokens=float(said[1]), discount=float(said[2] or 0) / 100))
    return tuple(tiers)
