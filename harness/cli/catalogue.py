"""What there is to run on and to run: hardware tiers and their prices, models: tiers, models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from harness.cli.verb import JSON_OPTION, Group, command, takes
from harness.errors import EXIT_FAILURE, EXIT_VALID, unknown_name
from harness.option_types import NEW_FILE, opt

Purchase = Literal["on-demand", "spot", "reserved", "owned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFilter:
    """Which tiers are listed."""

    accelerator: str | None = opt("Only these, like H100; cpu: those without one.", metavar="NAME")
    provider: str | None = opt("Only those of one provider, like aws.", metavar="NAME")
    purchase: Purchase | None = opt("Only those bought in this way.", kind=Purchase)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshOptions:
    """What ``harness tiers refresh`` takes."""

    names: tuple[str, ...] = opt("This tier (several: repeat). Default: AWS's all.", (), flag="--tier", metavar="NAME")
    region: str | None = opt("Price it here; another region becomes a tier NAME-REGION.", metavar="REGION")
    spot: bool = opt("Also a spot tier NAME-spot for each on-demand one.", False)
    spot_days: float = opt(
        "Days of spot prices to take the mean of, each weighted by how long it held.",
        7.0, kind=click.FloatRange(0, 90, min_open=True),
    )  # fmt: skip
    out: Path | None = opt(
        "Tiers file to write. Default: HARNESS_TIERS, else ~/.config/harness/tiers.toml.",
        kind=NEW_FILE, flag="-o --output --out",
    )  # fmt: skip
    dry_run: bool = opt("Show old and new prices; write nothing.", False)


@click.group(cls=Group, invoke_without_command=True)
@takes(TierFilter)
@JSON_OPTION
@click.pass_context
def tiers(ctx: click.Context, /, format_: str, asked: TierFilter) -> int:
    """List the hardware tiers with their prices, each with source and date."""
    if ctx.invoked_subcommand:
        return EXIT_VALID
    import msgspec

    from cluster.catalogue.tiers import full_note, list_tiers, price_age_days, price_note, usd_per_accelerator_hour
    from harness.cli.output import print_json, print_table

    known = list_tiers()
    for what, wanted in (
        ("accelerator", asked.accelerator),
        ("provider", asked.provider),
        ("purchase", asked.purchase),
    ):
        there = [str(getattr(tier, what) or "cpu") for tier in known]
        if wanted is not None:
            known = [tier for tier, one in zip(known, there, strict=True) if one.lower() == wanted.lower()]
            if not known:
                raise unknown_name(f"{what} of these tiers", wanted, set(there))
    if format_ == "json":
        print_json(
            [
                {**msgspec.to_builtins(t), "note": full_note(t), "price_age_days": price_age_days(t),
                 "usd_per_accelerator_hour": usd_per_accelerator_hour(t), "old": price_note(t) is not None}
                for t in known
            ]
        )  # fmt: skip
        return EXIT_VALID
    print_table(
        ("tier", "accelerators", "vCPU", "GiB", "USD/h", "each", "bought", "region", "date"),
        [
            (t.name, f"{t.accelerator_count} x {t.accelerator}" if t.accelerator else "-", str(t.vcpu),
             f"{t.memory_gib:g}", f"{t.usd_per_hour:g}",
             "-" if (each := usd_per_accelerator_hour(t)) is None else f"{each:.4g}",
             t.purchase, t.region, t.date + (" old" if price_note(t) else ""))
            for t in known
        ],
    )  # fmt: skip
    print("each: USD per accelerator hour. Price sources:")
    for t in known:
        note = full_note(t)
        print(f"  {t.name}: {t.source}" + (f"\n      {note}" if note else ""))
    return EXIT_VALID


@tiers.command(
    short_help="Read today's AWS prices into your own tiers file.",
    epilog="""\b
Examples:
  harness tiers refresh --dry-run
  harness tiers refresh --tier aws-p5.48xlarge --spot
  harness tiers refresh --tier aws-g6.xlarge --region eu-central-1
""",
)
@takes(RefreshOptions)
@JSON_OPTION
def refresh(format_: str, asked: RefreshOptions) -> int:
    """Read today's AWS prices into your own tiers file, whose entries replace the shipped ones.

    On-demand prices come from the AWS Price List API, spot prices from EC2's history, zone by zone. Needs AWS
    credentials (environment, profile or role) that may call pricing:GetProducts and ec2:DescribeSpotPriceHistory.
    The shipped prices are never changed; without credentials or network nothing is.
    """
    import msgspec

    from cluster.catalogue.prices import refresh
    from cluster.catalogue.tiers import own_file, write_tiers
    from harness.cli.output import print_json, print_table, say

    file = asked.out or own_file()
    changes = refresh(
        asked.names, region=asked.region, spot=asked.spot, spot_days=asked.spot_days, files=[own_file(), file]
    )
    new = [change.after for change in changes if change.after is not None]
    if new and not asked.dry_run:
        write_tiers(file, new)
    if format_ == "json":
        print_json([msgspec.to_builtins(c) | {"change": c.ratio} for c in changes])
    else:
        print_table(
            ("tier", "USD/h was", "now", "change", "source"),
            [
                (c.name, f"{c.before.usd_per_hour:g}" if c.before else "-",
                 f"{c.after.usd_per_hour:g}" if c.after else "-", f"{c.ratio:+.1%}" if c.ratio is not None else "-",
                 c.problem or (c.after.source if c.after else ""))
                for c in changes
            ],
        )  # fmt: skip
    where = "; nothing written (--dry-run)" if asked.dry_run else f", in {file}" if new else ""
    say(f"{len(new)} of {len(changes)} prices read{where}")
    return EXIT_VALID if len(new) == len(changes) else EXIT_FAILURE


@command()
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
    import msgspec

    from cluster.catalogue import models as catalogue
    from cluster.catalogue.weights import ensure_weights
    from harness.cli.output import print_json, print_table, say

    if fetch:
        print(ensure_weights(catalogue.get_model(fetch), say=say))
        return EXIT_VALID
    known = [
        (m, catalogue.model_weight_bytes(m), catalogue.model_kv_bytes_per_token(m)) for m in catalogue.list_models()
    ]
    if format_ == "json":
        print_json(
            [
                {**msgspec.to_builtins(m), "weight_bytes": weights, "kv_bytes_per_token": kv,
                 "config": catalogue.model_config(m)}
                for m, weights, kv in known
            ]
        )  # fmt: skip
        return EXIT_VALID

    def scaled(value: int | None, unit: float, digits: int) -> str:
        return "-" if value is None else f"{value / unit:,.{digits}f}"

    print_table(
        ("model", "parameters (1e9)", "format", "GiB", "KV KiB/token", "longest", "weights", "licence"),
        [
            (m.name, scaled(m.parameters, 1e9, 2), m.quantization or m.dtype, scaled(weights, 2**30, 1),
             scaled(kv, 1024, 1), str(m.max_model_len), m.source + (" (gated)" if m.gated else ""), m.licence)
            for m, weights, kv in known
        ],
    )  # fmt: skip
    for m, _, _ in known:
        print(f"  {m.name}: {m.note}")
    print("Any of them as NAME:dummy: the same architecture with random weights, nothing to download, speed only.")
    return EXIT_VALID
