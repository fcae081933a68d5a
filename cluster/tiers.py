"""Hardware tiers: what can be rented, and a price that says where and when it was read."""

from __future__ import annotations

import math
import os
import re
from datetime import UTC, date, datetime
from pathlib import Path

from cluster.catalogue import read_catalogue
from harness.errors import UsageError, unknown_name
from harness.run import Tier

CATALOGUE = Path(__file__).with_name("tiers.toml")
DEFAULT_TIER = "aws-m7a.large"
OLD_PRICE_DAYS = 180
"""A price read longer ago than this gets a note wherever it is used."""

PURCHASES = ("on-demand", "spot", "reserved", "owned")


def list_tiers(file: Path | None = None) -> list[Tier]:
    """Every tier: the built-in ones, then those of ``file`` (default: $HARNESS_TIERS), which replace same names.

    Raises `UsageError` for a file that cannot be read or holds a price without source or date.
    """
    own = file or (Path(os.environ["HARNESS_TIERS"]).expanduser() if os.environ.get("HARNESS_TIERS") else None)
    tiers: dict[str, Tier] = {}
    for path in (CATALOGUE, own):
        if path is not None:
            entries = read_catalogue(path, Tier)
            for tier in entries.values():
                _check(path, tier)
            tiers |= entries
    return list(tiers.values())


def get_tier(name: str, file: Path | None = None) -> Tier:
    """The tier of this name. Raises `UsageError` naming the nearest ones when there is none."""
    tiers = {tier.name: tier for tier in list_tiers(file)}
    if name not in tiers:
        raise unknown_name("tier", name, tiers)
    return tiers[name]


def price_age_days(tier: Tier, today: date | None = None) -> int:
    """Days since the price was read; a date that names only a month counts from its first day."""
    return ((today or datetime.now(UTC).date()) - _day(tier.date)).days


def price_note(tier: Tier, today: date | None = None) -> str | None:
    """A sentence for a price older than `OLD_PRICE_DAYS`; null while it is fresh."""
    age = price_age_days(tier, today)
    if age <= OLD_PRICE_DAYS:
        return None
    return (
        f"the price of {tier.name} ({tier.usd_per_hour:g} USD/h) was read {age} days ago ({tier.date}); "
        f"check it and put today's into your own tiers file"
    )


def _check(path: Path, tier: Tier) -> None:
    """Refuse what would make a price that nobody can trace or that is not one."""
    where = f"{path}: [{tier.name}]"
    if not tier.source.strip() or not tier.date.strip():
        raise UsageError(f"{where}: a price needs source and date; say where and when it was read")
    try:
        day = _day(tier.date)
    except ValueError:
        raise UsageError(f"{where}: date {tier.date!r} is not a day (2026-11-09) or a month (2026-11)") from None
    if day > datetime.now(UTC).date():
        raise UsageError(f"{where}: date {tier.date!r} is in the future")
    if not (math.isfinite(tier.usd_per_hour) and tier.usd_per_hour > 0):
        raise UsageError(f"{where}: usd_per_hour is {tier.usd_per_hour:g}; it has to be above 0")
    if tier.purchase not in PURCHASES:
        raise unknown_name(f"{where}: purchase", tier.purchase, PURCHASES)
    if (tier.accelerator is None) != (tier.accelerator_count == 0) or tier.accelerator_count < 0:
        raise UsageError(f"{where}: accelerator and accelerator_count go together (a CPU tier has none and 0)")
    if tier.vcpu < 1 or not tier.memory_gib > 0:
        raise UsageError(f"{where}: vcpu and memory_gib have to be above 0")


def _day(text: str) -> date:
    """The day, or the first day of a month. Raises ValueError."""
    return date.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
