"""What there is: this machine, tiers and prices, models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from harness import doctor as examination
from harness.cli.output import print_json, print_table, say
from harness.errors import (
    EXIT_FAILURE,
    EXIT_VALID,
    unknown_name,
)
from harness.record.manifest import Tier


def hot_path() -> str:
    """How load workers of this installation read: "compiled", or "python" where that could not be built."""
    try:
        import scenarios.client._reader  # type: ignore  # noqa: F401
    except ImportError:
        return "python"
    return "python" if os.environ.get("HARNESS_INTERPRETED") else "compiled"


def doctor(format_: str) -> int:
    """Findings about this machine."""
    from harness.paths import cache_dir

    findings = examination.examine(cache_dir(), hot_path())
    can = examination.abilities(findings)
    if format_ == "json":
        print_json({"findings": findings, "can": can})
    else:
        marks = {"ok": "ok     ", "limit": "limit  ", "missing": "missing"}
        for f in findings:
            print(f"{marks[f.level]}  {f.name}: {f.found}" + (f"\n         -> {f.advice}" if f.advice else ""))
        print("\nThis machine can:")
        for what, possible in can.items():
            print(f"  {'yes' if possible else 'no '}  {what}")
    return EXIT_VALID if any(can.values()) else EXIT_FAILURE


def tiers(accelerator: str | None, provider: str | None, purchase: str | None, format_: str) -> int:
    """The tiers with their prices, those that match; `UsageError` when none does."""
    from cluster.catalogue.tiers import full_note, list_tiers, price_age_days, price_note, usd_per_accelerator_hour

    known = list_tiers()
    if accelerator is not None:
        known = _only(known, "accelerator", accelerator, lambda t: t.accelerator or "cpu")
    if provider is not None:
        known = _only(known, "provider", provider, lambda t: t.provider)
    if purchase is not None:
        known = _only(known, "purchase", purchase, lambda t: t.purchase)
    if format_ == "json":
        print_json(
            [
                {**msgspec.to_builtins(t), "note": full_note(t), "price_age_days": price_age_days(t),
                 "usd_per_accelerator_hour": usd_per_accelerator_hour(t), "old": price_note(t) is not None}
                for t in known
            ]
        )  # fmt: skip
        return EXIT_VALID
    columns = ("tier", "accelerators", "vCPU", "GiB", "USD/h", "each", "bought", "region", "date")
    print_table(
        columns,
        [
            (
                t.name,
                f"{t.accelerator_count} x {t.accelerator}" if t.accelerator else "-",
                str(t.vcpu),
                f"{t.memory_gib:g}",
                f"{t.usd_per_hour:g}",
                "-" if (each := usd_per_accelerator_hour(t)) is None else f"{each:.4g}",
                t.purchase,
                t.region,
                t.date + (" old" if price_note(t) else ""),
            )
            for t in known
        ],
    )
    print("each: USD per accelerator hour. Price sources:")
    for t in known:
        note = full_note(t)
        print(f"  {t.name}: {t.source}" + (f"\n      {note}" if note else ""))
    return EXIT_VALID


def _only(tiers: list[Tier], what: str, wanted: str, of: Callable[[Tier], str]) -> list[Tier]:
    """Those of which ``of`` is ``wanted``, whatever its case; `UsageError` with what there is when none is."""
    found = [tier for tier in tiers if of(tier).lower() == wanted.lower()]
    if not found:
        raise unknown_name(f"{what} of these tiers", wanted, {of(tier) for tier in tiers})
    return found


def refresh_tiers(
    names: tuple[str, ...], region: str | None, spot: bool, spot_days: float, out: Path | None, dry_run: bool,
    format_: str,
) -> int:  # fmt: skip
    """Today's AWS prices into the user's own tiers file."""
    from cluster.catalogue.prices import refresh
    from cluster.catalogue.tiers import own_file, write_tiers

    file = out or own_file()
    changes = refresh(names, region=region, spot=spot, spot_days=spot_days, files=[own_file(), file])
    new = [change.after for change in changes if change.after is not None]
    if new and not dry_run:
        write_tiers(file, new)
    if format_ == "json":
        print_json([msgspec.to_builtins(c) | {"change": c.ratio} for c in changes])
    else:
        rows: list[tuple[str, ...]] = [
            (
                c.name,
                f"{c.before.usd_per_hour:g}" if c.before else "-",
                f"{c.after.usd_per_hour:g}" if c.after else "-",
                f"{c.ratio:+.1%}" if c.ratio is not None else "-",
                c.problem or (c.after.source if c.after else ""),
            )
            for c in changes
        ]
        print_table(("tier", "USD/h was", "now", "change", "source"), rows)
    where = "; nothing written (--dry-run)" if dry_run else f", in {file}" if new else ""
    say(f"{len(new)} of {len(changes)} prices read{where}")
    return EXIT_VALID if len(new) == len(changes) else EXIT_FAILURE


def models(fetch: str | None, format_: str) -> int:
    """The models, or the weights of one."""
    from cluster.catalogue.models import (
        get_model,
        list_models,
        model_config,
        model_kv_bytes_per_token,
        model_weight_bytes,
    )
    from cluster.catalogue.weights import ensure_weights

    if fetch:
        print(ensure_weights(get_model(fetch), say=say))
        return EXIT_VALID
    known = list_models()
    if format_ == "json":
        facts = [
            {"weight_bytes": model_weight_bytes(m), "kv_bytes_per_token": model_kv_bytes_per_token(m),
             "config": model_config(m)}
            for m in known
        ]  # fmt: skip
        print_json([msgspec.to_builtins(m) | fact for m, fact in zip(known, facts, strict=True)])
        return EXIT_VALID

    def scaled(value: int | None, unit: float, digits: int) -> str:
        return "-" if value is None else f"{value / unit:,.{digits}f}"

    print_table(
        ("model", "parameters (1e9)", "format", "GiB", "KV KiB/token", "longest", "weights", "licence"),
        [
            (
                m.name,
                scaled(m.parameters, 1e9, 2),
                m.quantization or m.dtype,
                scaled(model_weight_bytes(m), 2**30, 1),
                scaled(model_kv_bytes_per_token(m), 1024, 1),
                str(m.max_model_len),
                m.source + (" (gated)" if m.gated else ""),
                m.licence,
            )
            for m in known
        ],
    )
    for m in known:
        print(f"  {m.name}: {m.note}")
    print("Any of them as NAME:dummy: the same architecture with random weights, nothing to download, speed only.")
    return EXIT_VALID
