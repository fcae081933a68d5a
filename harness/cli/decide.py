"""The verbs that decide: price (what to charge) and compare (A against B)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from harness.cli.options import Slo


class Share(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A share from ``40%`` or ``0.4``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share, 0 to 1; a bare number above 1 is refused, for nobody knows what it means."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", str(value).strip())
        share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r}: write a share like 40% or 0.4", param, ctx)
        return share


class Ratio(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """(input, output, cached input or None) from ``4``, ``1:4`` or ``1:4:0.25``."""

    name = "ratio"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float | None]:
        """The three weights."""
        if isinstance(value, tuple):
            return value
        try:
            parts = [float(part) for part in str(value).split(":")]
        except ValueError:
            parts = []
        if not 1 <= len(parts) <= 3 or any(not 0 <= part < 1e6 for part in parts):
            self.fail(f"{value!r}: write OUT, IN:OUT or IN:OUT:CACHED, like 4, 1:4 or 1:4:0.25", param, ctx)
        if len(parts) == 1:
            parts = [1.0, *parts]
        if parts[0] + parts[1] <= 0:
            self.fail(f"{value!r}: input or output must weigh something", param, ctx)
        return parts[0], parts[1], parts[2] if len(parts) == 3 else None


_JUDGE = (
    click.option("--slo", type=Slo(), help="Judge against this SLO instead of the one of the runs."),
    click.option(
        "--attain", type=Share(), default="99%", show_default=True, help="Share of requests that must meet the SLO."
    ),
)


def _judged(function: Any) -> Any:
    for option in reversed(_JUDGE):
        function = option(function)
    return function


@click.command(
    short_help="What to charge: cost, margin, utilisation, against API list prices.",
    epilog="""\b
Examples:
  harness price runs/20261121T234654Z-trace-smollm2-135m
  harness price runs/sweep --margin 40% --utilisation 30% --volume 0,1e9:-10%,1e10:-20%
  harness price runs/sweep --tier-price "aws-g6.xlarge=0.62@our contract@2026-11-20@reserved"
  harness price runs/* --against gpt-5-mini --format csv -o prices.parquet

\b
Exit status:
  0  there is a price
  1  something failed, or nothing could be priced; the reason is in the output
  2  the command line is wrong
  3  an INVALID run was among them: it has no price, its reasons are in the output
  4  no measured load kept the SLO
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN_OR_FOLDER...")
@click.option("--margin", type=Share(), help="Gross margin, of the price (not a markup on cost). Default: 40%.")
@click.option(
    "--utilisation", type=Share(), help="Share of the paid capacity that is sold, around the clock. Default: 30%."
)
@click.option(
    "--ratio",
    type=Ratio(),
    default="4",
    show_default=True,
    metavar="[IN:]OUT[:CACHED]",
    help="What tokens weigh against each other in the bill: 4 or 1:4 is output at four times input, 1:4:0.25 also "
    "cached input at a quarter.",
)
@click.option(
    "--split",
    type=click.Choice(["declared", "phase-time", "step-model"]),
    default="declared",
    show_default=True,
    help="How the bill is laid on input, cached input and output: by --ratio, or as the runs' own servers measured it "
    "(where that can be told; else by --ratio, and it is said).",
)
@click.option(
    "--volume",
    metavar="TOKENS:-PERCENT,...",
    help="Discounts from so many tokens a month on, on what is beyond: 0,1e9:-10%,1e10:-20%.",
)
@click.option("--batch-discount", type=Share(), help="Discount for batch work, e.g. 50%.")
@click.option(
    "--re-price",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Tiers file whose prices replace those of the runs. Nothing is measured again; both dates are shown.",
)
@click.option(
    "--tier-price",
    "tier_prices",
    multiple=True,
    metavar="NAME=USD@SOURCE@DATE",
    help="One new price (several: repeat); @spot, @reserved ... at the end when it was bought another way.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME",
    help="Also compare with this API model of the price map. Those of the same model always are.",
)
@click.option(
    "--list-prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="LiteLLM's model_prices_and_context_window.json instead of the dated extract that is shipped.",
)
@_judged
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "md", "json", "csv"]),
    default="text",
    show_default=True,
    help="How to print it.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the flat table for a spreadsheet or warehouse: .parquet or .csv; .json is the whole document.",
)
def price(**options: Any) -> int:
    """What to charge for a million tokens, from VALID runs: cost at 100 % and your utilisation, price at your margin.

    RUN_OR_FOLDER is a run directory, a folder of runs or a quoted pattern. Of several loads of one tier and model the
    cheapest that kept the SLO counts.
    """
    from harness.commands import decide

    return decide.price(**options)


@click.command(
    short_help="A against B: paired intervals and a plain verdict; fails a CI job on request.",
    epilog="""\b
Examples:
  harness compare runs/20261121T234654Z-h100 runs/20261121T235904Z-l40s
  harness compare 'runs/*-before' 'runs/*-after' --fail-if 'cost > +5%' --fail-if 'ttft_p99 > +20ms'

\b
Figures: cost, throughput, goodput, attainment, error_rate, ttft_p50 _p95 _p99, tpot_p50 ..., e2e_p50 ...
A condition fails only when the whole 95 % interval of the change lies beyond the bound. An interval on
both sides of it is undecided and does not fail: more requests or repeats would decide.

\b
Exit status:
  0  compared; no condition fails
  1  not comparable (the reasons are in the output), or a condition cannot be judged
  2  the command line is wrong
  4  a condition of --fail-if fails
""",
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--fail-if", multiple=True, metavar="'FIGURE > +5%'", help="End with status 4 when B is that much worse; repeat."
)
@_judged
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "md", "json"]),
    default="text",
    show_default=True,
    help="How to print it.",
)
def compare(**options: Any) -> int:
    """A against B, each a run directory, a folder of repeats or a quoted pattern.

    Same trace, load, seed, SLO and evidence, or there is no comparison. Tier, price, model, engine and its arguments
    may differ and are named. Requests are paired by id, repeats by seed.
    """
    from harness.commands import decide

    return decide.compare(**options)
