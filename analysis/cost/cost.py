"""What the tokens of a run cost: the bill of its window over the tokens served in it.

Assumption, stated in every summary: one replica is one whole instance of its tier, paid for the whole window, or for
the part of it in which it was rented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness.analysis.cost.simulated import Within, widened
from harness.analysis.cost.split import Split, TokenMix, by_ratio, not_identifiable
from harness.analysis.stats.intervals import MIN_SAMPLES, Quantity, at_list_price
from harness.errors import UsageError
from harness.record.manifest import RunManifest, Tier

OUTPUT_ONLY = "output (which carry the whole bill)"
DEFAULT_RATIO = 4.0
DEFAULT_UTILISATION = 0.3
"""Share of the capacity that is used around the clock, where nothing else is said."""
HOURS_PER_YEAR = 8760.0
HOURS_PER_MONTH = HOURS_PER_YEAR / 12


def bill_usd(usd_per_hour: float, replicas: float, duration_s: float) -> float:
    """Cost of the window, USD: usd_per_hour x replicas x hours."""
    return usd_per_hour * replicas * duration_s / 3600


def paid_replicas(run: RunManifest, start_s: float | None, end_s: float | None) -> float:
    """Servers that are paid for between two moments, s after the common start: on average where they come and go.

    Each that has a page of its own counts, among those behind one address. One that starts or drains is paid, too.
    """
    if run.lives and start_s is not None and end_s is not None:
        return run.rented(start_s, end_s)
    return sum(len(r.metrics_urls) or 1 for r in run.replicas) or len(run.spec.base_urls)


def paid_words(run: RunManifest) -> str:
    """What a bill takes for granted."""
    if run.lives:
        return "one replica is one whole instance, paid from when it is asked for until it is given back or fails"
    return (
        "one replica is one whole instance, paid from the first scheduled request to the last finish; idle hours, "
        "standby and start-up are not in the price"
    )


def usd_per_1m(usd: float, tokens: float) -> float:
    """USD per 1M tokens when ``usd`` paid for ``tokens``. Raises ZeroDivisionError without tokens."""
    return usd / tokens * 1e6


def at_rate(
    usd_per_s: float | None,
    rate: Quantity,
    per: str,
    *,
    why: str | None = None,
    share: float = 1.0,
    within: Within | None = None,
) -> Quantity:
    """USD per 1M ``per`` tokens of servers that cost ``usd_per_s`` and serve ``rate`` tokens/s, dear when slow.

    The interval is the rate's, where it has one, and holds the simulator's own error (``within``). ``share``: of the
    bill that these tokens carry. Null with the reason ``why`` without a price, and without a rate.
    """
    unit, evidence = f"USD per 1M {per} tokens", at_list_price(rate.evidence)
    if usd_per_s is None or not rate.value:
        why = why or rate.note or "no tokens were served"
        return Quantity(value=None, n=rate.n, unit=unit, note=why, evidence=evidence)
    usd = usd_per_s * share
    found = Quantity(
        value=usd_per_1m(usd, rate.value), low=usd_per_1m(usd, rate.high) if rate.high else None,
        high=usd_per_1m(usd, rate.low) if rate.low else None, n=rate.n, unit=unit, note=rate.note, evidence=evidence,
    )  # fmt: skip
    return widened(found, within)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the tokens of this run cost. Values are None with the reason in ``reason``; ``note`` warns about a price."""

    usd_per_1m_total: Quantity
    usd_per_1m_output_only: Quantity
    split: Split
    """By the declared ratio."""
    splits: Sequence[Split]
    bill_usd: float | None
    usd_per_hour: float | None
    replicas: int
    purchase: str | None
    region: str | None
    source: str | None
    date: str | None
    reason: str | None
    note: str | None
    rented: float | None = None
    """Mean number of servers that are paid for, where they come and go; None: ``replicas`` all the time."""

    @property
    def paid(self) -> float:
        """Servers that are paid for, on average."""
        return self.replicas if self.rented is None else self.rented


def check_ratio(ratio: float) -> None:
    """Raise `UsageError` unless ``ratio`` is a positive number."""
    if not (math.isfinite(ratio) and ratio > 0):
        raise UsageError(f"ratio {ratio}: an output token must cost a positive number of input tokens")


def cost(
    tier: Tier | None, replicas: float, duration_s: float | None, *, total_rate: Quantity, output_rate: Quantity,
    weighted_rate: Quantity, ratio: float, reason: str | None, note: str | None, splits: Sequence[Split] = (),
    within: Within | None = None,
) -> Cost:  # fmt: skip
    """Prices from token rates (tokens/s) of one window: USD per second over tokens per second.

    ``weighted_rate`` is input / ratio + output tokens per second, the denominator of the split. ``reason`` (not None)
    withholds every price; so do a missing tier, a tier price that is not a positive number, fewer than `MIN_SAMPLES`
    requests, and a rate that is not known or 0. ``splits``: other divisions of the same bill; withheld with the prices.
    ``within``: the simulator's own error.
    """
    hourly = tier.usd_per_hour if tier is not None and math.isfinite(tier.usd_per_hour) else None
    if reason is None:
        if tier is None:
            reason = "no tier: say which hardware this ran on (--tier), with its price"
        elif hourly is None or hourly <= 0:
            reason = f"tier {tier.name} has no positive price"
        elif total_rate.value is not None and total_rate.n < MIN_SAMPLES:
            reason = f"a price needs {MIN_SAMPLES} requests: has {total_rate.n}"
    usd_per_s = hourly * replicas / 3600 if hourly is not None and reason is None else None
    bill = bill_usd(hourly, replicas, duration_s) if hourly is not None and duration_s else None
    if usd_per_s is None:
        why, evidence = reason or "no price", total_rate.evidence
        splits = [
            not_identifiable(s.method, why, evidence=evidence, n=s.usd_per_1m_output.n, facts=s.facts) for s in splits
        ]
    return Cost(
        usd_per_1m_total=at_rate(usd_per_s, total_rate, "input + output", why=reason, within=within),
        usd_per_1m_output_only=at_rate(usd_per_s, output_rate, OUTPUT_ONLY, why=reason, within=within),
        split=_declared(
            bill, duration_s, total_rate, output_rate, ratio,
            at_rate(usd_per_s, weighted_rate, "input", why=reason, share=1 / ratio, within=within),
            at_rate(usd_per_s, weighted_rate, "output", why=reason, within=within),
        ),
        splits=[_widened(split, within) for split in splits], bill_usd=bill, usd_per_hour=hourly,
        replicas=replicas if isinstance(replicas, int) else max(1, round(replicas)),
        rented=None if isinstance(replicas, int) else replicas,
        purchase=tier.purchase if tier else None, region=tier.region if tier else None,
        source=tier.source if tier else None, date=tier.date if tier else None, reason=reason, note=note,
    )  # fmt: skip


def _widened(split: Split, within: Within | None) -> Split:
    cached = widened(split.usd_per_1m_cached_input, within)
    return replace(
        split, usd_per_1m_input=widened(split.usd_per_1m_input, within), usd_per_1m_cached_input=cached,
        usd_per_1m_output=widened(split.usd_per_1m_output, within),
    )  # fmt: skip


def _declared(
    bill: float | None, duration_s: float | None, total_rate: Quantity, output_rate: Quantity, ratio: float,
    into: Quantity, out: Quantity,
) -> Split:  # fmt: skip
    """The declared split: prices with the interval of the weighted rate, parts from the tokens of the window."""
    evidence = total_rate.evidence
    if out.value is None or bill is None or not duration_s or total_rate.value is None or output_rate.value is None:
        split = not_identifiable("declared ratio", out.note or "tokens were not counted", evidence=evidence, n=out.n)
    else:
        input_rate = max(0.0, total_rate.value - output_rate.value)
        tokens = TokenMix(
            uncached_input=input_rate * duration_s, cached_input=None, output=output_rate.value * duration_s
        )
        split = by_ratio(bill, tokens, ratio, evidence=evidence, n=out.n)
    return replace(split, ratio=split.ratio or ratio, usd_per_1m_input=into, usd_per_1m_output=out)
