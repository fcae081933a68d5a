"""The hourly price that a decision rests on: the run's own, or a newer one for the same hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date

from analysis.price_age import is_old
from harness.errors import UsageError
from harness.record.manifest import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBasis:
    """The hourly price of the hardware, where and when it was read; ``measured_with`` was the run's own."""

    usd_per_hour: float
    purchase: str
    """on-demand, spot, reserved or owned."""
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
    own = _dated(tier, today)
    new = new_prices.get(tier.name)
    if new is None:
        return own
    hardware = ("instance", "provider", "accelerator", "accelerator_count", "vcpu")
    other = [name for name in hardware if getattr(new, name) != getattr(tier, name)]
    if other:
        raise UsageError(
            f"tier {new.name}: the new price is for other hardware than the run was measured on ({', '.join(other)} "
            "differ); a price can be replaced, a measurement cannot"
        )
    return replace(_dated(new, today), measured_with=own)


def _dated(tier: Tier, today: date) -> PriceBasis:
    return PriceBasis(
        usd_per_hour=tier.usd_per_hour, purchase=tier.purchase, region=tier.region, source=tier.source, date=tier.date,
        old=is_old(tier.date, today), note=tier.note,
    )  # fmt: skip
