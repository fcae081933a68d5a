"""The verbs that say what there is: doctor, tiers, models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import JSON_OPTION
from harness.cli.verb import Group, command
from harness.errors import EXIT_VALID

PURCHASES = ("on-demand", "spot", "reserved", "owned")


@command(short_help="Say what this machine can and cannot run, and why.")
@JSON_OPTION
def doctor(format_: str) -> int:
    """Say what this machine can and cannot run, and why."""
    from harness.commands import catalogue

    return catalogue.doctor(format_)


@click.group(
    cls=Group, short_help="List hardware tiers and their prices, or read today's.", invoke_without_command=True
)
@click.option("--accelerator", metavar="NAME", help="Only these, like H100; cpu: those without one.")
@click.option("--provider", metavar="NAME", help="Only those of one provider, like aws.")
@click.option("--purchase", type=click.Choice(PURCHASES), help="Only those bought in this way.")
@JSON_OPTION
@click.pass_context
def tiers(ctx: click.Context, /, **options: Any) -> int:
    """List the hardware tiers with their prices, each with source and date."""
    from harness.commands import catalogue

    return EXIT_VALID if ctx.invoked_subcommand else catalogue.tiers(**options)


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
def refresh(**options: Any) -> int:
    """Read today's AWS prices into your own tiers file, whose entries replace the shipped ones.

    On-demand prices come from the AWS Price List API, spot prices from EC2's history, zone by zone. Needs AWS
    credentials (environment, profile or role) that may call pricing:GetProducts and ec2:DescribeSpotPriceHistory.
    The shipped prices are never changed; without credentials or network nothing is.
    """
    from harness.commands import catalogue

    return catalogue.refresh_tiers(**options)


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
    from harness.commands import catalogue

    return catalogue.models(fetch, format_)
