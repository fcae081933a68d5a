"""What there is: this machine, tiers and prices, models: doctor, tiers, models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from harness import doctor as examination
from harness.cli.hot_path import hot_path
from harness.cli.options import JSON_OPTION
from harness.cli.output import print_json, print_table, say
from harness.cli.verb import Group, command
from harness.errors import (
    EXIT_FAILURE,
    EXIT_VALID,
    unknown_name,
)
from harness.record.manifest import Tier

PURCHASES = ("on-demand", "spot", "reserved", "owned")


@command(short_help="Say what this machine can and cannot run, and why.")
@JSON_OPTION
def doctor(format_: str) -> int:
    """Say what this machine can and cannot run, and why."""
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


@click.group(
    cls=Group, short_help="List hardware tiers and their prices, or read today's.", invoke_without_command=True
)
@click.option("--accelerator", metavar="NAME", help="Only these, like H100; cpu: those without one.")
@click.option("--provider", metavar="NAME", help="Only those of one provider, like aws.")
@click.option("--purchase", type=click.Choice(PURCHASES), help="Only those bought in this way.")
@JSON_OPTION
@click.pass_context
def tiers(
    ctx: click.Context, /, accelerator: str | None, provider: str | None, purchase: str | None, format_: str,
) -> int:  # fmt: skip
    """List the hardware tiers with their prices, each with source and date."""
    if ctx.invoked_subcommand:
        return EXIT_VALID
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


@tiers.command(
    short_help="Read today's AWS prices into your own tiers file.",
    epilog="""\b
Examples:
  harness tiers refresh --dry-run
  harness tiers refresh --tier aws-p5.48xlarge --spot
  harness tiers refresh --tier aws-g6.xlarge --region eu-central-1
""",
)
@click.option("--tier", "names", multiple=True, metavar="NAME", help="This tier (several: repeat). Default: AWS's all.")
@click.option("--region", metavar="REGION", help="Price it here; another region becomes a tier NAME-REGION.")
@click.option("--spot", is_flag=True, help="Also a spot tier NAME-spot for each on-demand one.")
@click.option(
    "--spot-days",
    type=click.FloatRange(0, 90, min_open=True),
    default=7.0,
    show_default=True,
    help="Days of spot prices to take the mean of, each weighted by how long it held.",
)
@click.option(
    "-o",
    "--output",
    "--out",
    "out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Tiers file to write. Default: HARNESS_TIERS, else ~/.config/harness/tiers.toml.",
)
@click.option("--dry-run", is_flag=True, help="Show old and new prices; write nothing.")
@JSON_OPTION
def refresh(
    names: tuple[str, ...], region: str | None, spot: bool, spot_days: float, out: Path | None, dry_run: bool,
    format_: str,
) -> int:  # fmt: skip
    """Read today's AWS prices into your own tiers file, whose entries replace the shipped ones.

    On-demand prices come from the AWS Price List API, spot prices from EC2's history, zone by zone. Needs AWS
    credentials (environment, profile or role) that may call pricing:GetProducts and ec2:DescribeSpotPriceHistory.
    The shipped prices are never changed; without credentials or network nothing is.
    """
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


@command(short_help="List models, or fetch the weights of one.")
@click.option(
    "--fetch", metavar="NAME", help="Get this model's weights now (checked and kept; a second time costs nothing)."
)
@JSON_OPTION
def models(fetch: str | None, format_: str) -> int:
    """List the models that can be served, or fetch the weights of one.

    Your own models file, HARNESS_MODELS or ~/.config/harness/models.toml, adds entries and replaces those of the same
    name; cluster/catalogue/models.toml shows the fields. A folder with config.json and weights
    needs no entry: --model ./FOLDER.
    """
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
