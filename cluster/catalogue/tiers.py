"""Hardware tiers: what can be rented or owned, and a price that says where and when it was read."""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cluster.catalogue import own_catalogue, read_catalogue
from harness.errors import HarnessError, ServerError, UsageError, unknown_name
from harness.record.manifest import Ownership, Tier

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

CATALOGUE = Path(__file__).with_name("tiers.toml")
DEFAULT_TIER = "aws-m7a.large"
OLD_PRICE_DAYS = 180
"""A price read longer ago than this gets a note wherever it is used."""

OTHER_SIZE = 0.1
"""An accelerator whose memory differs by more is another product; drivers keep less than that back."""

PURCHASES = ("on-demand", "spot", "reserved", "owned")
HOURS_PER_YEAR = 8760.0


def own_file() -> Path:
    """Where the user's own tiers are kept: $HARNESS_TIERS, else ``harness/tiers.toml`` in the configuration folder."""
    return own_catalogue("tiers")


def list_tiers(file: Path | None = None) -> list[Tier]:
    """Every tier: the built-in ones, then those of the user's own ``file``, which replace same names.

    The default file may be missing; one that was named (here or by $HARNESS_TIERS) may not. Raises `UsageError` for a
    file that cannot be read or holds a price without source or date.
    """
    own = file or own_file()
    tiers = read_tiers(CATALOGUE)
    if file or os.environ.get("HARNESS_TIERS") or own.exists():
        tiers |= read_tiers(own)
    return list(tiers.values())


def read_tiers(path: Path) -> dict[str, Tier]:
    """Tiers of one file by name, every price checked. Raises `UsageError` with the file and the entry."""
    tiers = read_catalogue(path, Tier)
    for tier in tiers.values():
        _check(path, tier)
    return tiers


def get_tier(name: str, file: Path | None = None) -> Tier:
    """The tier of this name. Raises `UsageError` naming the nearest ones when there is none."""
    tiers = {tier.name: tier for tier in list_tiers(file)}
    if name not in tiers:
        raise unknown_name("tier", name, tiers)
    return tiers[name]


def usd_per_accelerator_hour(tier: Tier) -> float | None:
    """USD for an hour of one accelerator; None for a tier without any."""
    return tier.usd_per_hour / tier.accelerator_count if tier.accelerator_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTier(Tier):
    """A tier, and what its entry does not say itself."""

    price_age_days: int
    usd_per_accelerator_hour: float | None
    old: bool


def listed(tier: Tier) -> ListedTier:
    """With its age, its price per accelerator, and all that a reader of the price must know in ``note``."""
    entry = {f.name: getattr(tier, f.name) for f in fields(tier)} | {"note": full_note(tier)}
    return ListedTier(
        **entry, price_age_days=price_age_days(tier), usd_per_accelerator_hour=usd_per_accelerator_hour(tier),
        old=price_note(tier) is not None,
    )  # fmt: skip


def price_age_days(tier: Tier, today: date | None = None) -> int:
    """Days since the price was read; a date that names only a month counts from its first day."""
    return ((today or datetime.now(UTC).date()) - _day(tier.date)).days


def price_note(tier: Tier, today: date | None = None) -> str | None:
    """A sentence for a price older than `OLD_PRICE_DAYS`; null while it is fresh."""
    age = price_age_days(tier, today)
    if age <= OLD_PRICE_DAYS:
        return None
    advice = (
        "'harness tiers refresh' reads today's" if tier.provider == "aws" else "put today's into your own tiers file"
    )
    return f"the price of {tier.name} ({tier.usd_per_hour:g} USD/h) was read {age} days ago ({tier.date}); {advice}"


def full_note(tier: Tier, today: date | None = None) -> str | None:
    """All that a reader of the price must know: the entry's own note, then that it is old; null: nothing."""
    return "; ".join(filter(None, (tier.note, price_note(tier, today)))) or None


def owned_usd_per_hour(ownership: Ownership) -> float:
    """Cost of one hour of an owned machine, USD: purchase and upkeep spread over all hours, busy or not, and power."""
    yearly = ownership.purchase_usd / ownership.years + ownership.upkeep_usd_per_year + ownership.space_usd_per_year
    return yearly / HOURS_PER_YEAR + ownership.power_kw * ownership.pue * ownership.usd_per_kwh


def write_tiers(path: Path, tiers: Sequence[Tier]) -> None:
    """Put these tiers into a tiers file; its other entries, comments and order stay. All of it in one step, or nothing.

    Raises `UsageError` for the shipped catalogue or a file that is no tiers file, `HarnessError` when it cannot be
    written.
    """
    import tomlkit

    path = path.expanduser()
    target = path.resolve()
    if target == CATALOGUE.resolve():
        raise UsageError(f"{path}: the shipped catalogue is not written; choose a file of your own (--out)")
    try:
        exists = target.exists()
        if exists:
            read_tiers(target)  # what is wrong in it now is not ours to carry on
        document = tomlkit.parse(target.read_text(encoding="utf-8")) if exists else tomlkit.document()
        if not exists:
            document.add(tomlkit.comment("Own hardware tiers; entries here replace shipped ones of the same name."))
        for tier in tiers:
            _put(document, tier)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, tomlkit.dumps(document))
    except OSError as e:
        raise HarnessError(f"{e.filename or path}: cannot write ({e.strerror}); nothing was changed") from e


def check_accelerators(tier: Tier) -> None:
    """Raises `ServerError` when this host's accelerators have another memory than the tier's.

    Ray tells models apart, not sizes: to it an A100 of 40 GB is one of 80 GB. Without a driver nothing is known.
    """
    wanted = tier.accelerator_memory_gib
    if not tier.accelerator_count or wanted is None:
        return
    from harness.record.host import Gpus  # Arrow: not for tiers without accelerators

    gpus = Gpus()
    found = gpus.memory_gib()
    gpus.close()
    if found and all(abs(size / wanted - 1) > OTHER_SIZE for size in found):
        raise ServerError(
            f"{socket.gethostname()}: its accelerators have {found[0]:.0f} GiB each, those of tier {tier.name} "
            f"{wanted:g}: choose the tier that this cluster has"
        )


def _put(document: TOMLDocument, tier: Tier) -> None:
    import tomlkit

    values = {key: value for key, value in asdict(tier).items() if value is not None and key != "name"}
    table = document.get(tier.name)
    if table is None:
        table = tomlkit.table()
        document.add(tomlkit.nl())
        document.add(tier.name, table)
    for key, value in values.items():
        # An entry that is right stays as its owner wrote it (0.50, 2_048).
        if key not in table or table[key] != value:
            table[key] = value
    for key in [key for key in table if key not in values]:
        del table[key]


def _replace(target: Path, text: str) -> None:
    """Write beside the file, read it back as tiers, then swap the names."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".toml")
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        read_tiers(partial)
        partial.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o644)
        partial.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


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
    _check_hardware(where, tier)
    if tier.ownership is not None:
        _check_ownership(where, tier, tier.ownership)


def _check_hardware(where: str, tier: Tier) -> None:
    if (tier.accelerator is None) != (tier.accelerator_count == 0) or tier.accelerator_count < 0:
        raise UsageError(f"{where}: accelerator and accelerator_count go together (a CPU tier has none and 0)")
    if tier.vcpu < 1 or not tier.memory_gib > 0:
        raise UsageError(f"{where}: vcpu and memory_gib have to be above 0")
    if (memory := tier.accelerator_memory_gib) is not None and (not memory > 0 or tier.accelerator is None):
        raise UsageError(f"{where}: accelerator_memory_gib is {memory:g}; leave it out, or give one accelerator's GiB")


def _check_ownership(where: str, tier: Tier, ownership: Ownership) -> None:
    """The price has to follow from its assumptions: otherwise one of the two was changed and not the other."""
    if tier.purchase != "owned":
        raise UsageError(f"{where}: ownership explains an owned machine, but purchase is {tier.purchase!r}")
    if not (ownership.years > 0 and ownership.pue >= 1 and ownership.purchase_usd > 0):
        raise UsageError(f"{where}: ownership needs purchase_usd and years above 0 and pue of at least 1")
    costs = (ownership.upkeep_usd_per_year, ownership.space_usd_per_year, ownership.power_kw, ownership.usd_per_kwh)
    if any(not (math.isfinite(cost) and cost >= 0) for cost in costs):
        raise UsageError(f"{where}: no cost of ownership can be below 0")
    follows = owned_usd_per_hour(ownership)
    if not math.isclose(follows, tier.usd_per_hour, rel_tol=0.001):
        raise UsageError(
            f"{where}: usd_per_hour is {tier.usd_per_hour:g}, but its ownership makes {follows:.4f}; write that"
        )


def _day(text: str) -> date:
    """The day, or the first day of a month. Raises ValueError."""
    return date.fromisoformat(f"{text}-01" if re.fullmatch(r"\d{4}-\d{2}", text) else text)
