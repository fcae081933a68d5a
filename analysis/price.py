"""USD per 1M tokens: the bill of the window over the tokens served in it. Nothing else decides a price here.

Assumption, stated in every summary: one replica is one whole instance of its tier, paid for the whole window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.intervals import Quantity
from harness.errors import UsageError
from harness.run import Tier

DEFAULT_RATIO = 4.0
SPLIT_METHOD = "declared ratio"


def bill_usd(usd_per_hour: float, replicas: int, duration_s: float) -> float:
    """Cost of the window, USD: usd_per_hour x replicas x hours."""
    return usd_per_hour * replicas * duration_s / 3600


def usd_per_1m(usd: float, tokens: float) -> float:
    """USD per 1M tokens when ``usd`` paid for ``tokens``. Raises ZeroDivisionError without tokens."""
    return usd / tokens * 1e6


def split_by_ratio(usd: float, input_tokens: float, output_tokens: float, ratio: float) -> tuple[float, float]:
    """(USD per 1M input, USD per 1M output) when an output token is declared to cost ``ratio`` input tokens.

    input x price_in + output x price_out is the whole bill again. The ratio is an opinion, not a measurement.
    Source: Google GKE Inference Quickstart, out = usd / (input / ratio + output), in = out / ratio, ratio 4.
    """
    output = usd_per_1m(usd, input_tokens / ratio + output_tokens)
    return output / ratio, output


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """An input and an output price that add up to the bill."""

    method: str
    ratio: float
    usd_per_1m_input: Quantity
    usd_per_1m_output: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the tokens of this run cost. Values are None with the reason in ``reason``; ``note`` warns about a price."""

    usd_per_1m_total: Quantity
    usd_per_1m_output_only: Quantity
    split: Split
    bill_usd: float | None
    usd_per_hour: float | None
    replicas: int
    purchase: str | None
    region: str | None
    source: str | None
    date: str | None
    reason: str | None
    note: str | None


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless ``ratio`` is a positive number."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise UsageError(f"ratio {ratio}: an output token must cost a positive number of input tokens")


def cost(
    tier: Tier | None,
    replicas: int,
    duration_s: float | None,
    *,
    total_rate: Quantity,
    output_rate: Quantity,
    weighted_rate: Quantity,
    ratio: float,
    reason: str | None,
    note: str | None,
) -> Cost:
    """Prices from token rates (tokens/s) of one window: USD per second over tokens per second.

    ``weighted_rate`` is input / ratio + output tokens per second, the denominator of the split. The interval comes from
    the rate's: dear when slow. ``reason`` (not None) withholds every price; so do a missing tier, a tier price that is
    not a positive number, and a rate that is not known or 0.
    """
    if reason is None and tier is None:
        reason = "no tier: say which hardware this ran on (--tier), with its price"
    elif reason is None and tier is not None and not (math.isfinite(tier.usd_per_hour) and tier.usd_per_hour > 0):
        reason = f"tier {tier.name} has no positive price"
    known = tier is not None and duration_s is not None and math.isfinite(tier.usd_per_hour)
    usd_per_s = tier.usd_per_hour * replicas / 3600 if tier is not None and reason is None else None

    def per_1m(rate: Quantity, per: str, factor: float = 1.0) -> Quantity:
        unit = f"USD per 1M {per} tokens"
        evidence = f"{rate.evidence} x list price"
        if usd_per_s is None or not rate.value:
            why = reason or rate.note or "no tokens were served"
            return Quantity(value=None, n=rate.n, unit=unit, note=why, evidence=evidence)
        usd = usd_per_s * factor
        return Quantity(
            value=usd_per_1m(usd, rate.value),
            low=usd_per_1m(usd, rate.high) if rate.high else None,
            high=usd_per_1m(usd, rate.low) if rate.low else None,
            n=rate.n,
            unit=unit,
            note=rate.note,
            evidence=evidence,
        )

    return Cost(
        usd_per_1m_total=per_1m(total_rate, "input + output"),
        usd_per_1m_output_only=per_1m(output_rate, "output (which carry the whole bill)"),
        split=Split(
            method=SPLIT_METHOD,
            ratio=ratio,
            usd_per_1m_input=per_1m(weighted_rate, "input", 1 / ratio),
            usd_per_1m_output=per_1m(weighted_rate, "output"),
        ),
        bill_usd=bill_usd(tier.usd_per_hour, replicas, duration_s) if known and tier and duration_s else None,
        usd_per_hour=tier.usd_per_hour if tier and math.isfinite(tier.usd_per_hour) else None,
        replicas=replicas,
        purchase=tier.purchase if tier else None,
        region=tier.region if tier else None,
        source=tier.source if tier else None,
        date=tier.date if tier else None,
        reason=reason,
        note=note,
    )
