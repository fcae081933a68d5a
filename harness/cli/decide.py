"""The verbs that decide: price (what to charge) and compare (A against B)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import JUDGE_OPTIONS, format_option, html_option
from harness.cli.types import RATIO, SHARE_OR_NONE
from harness.cli.verb import command


@command(
    short_help="What to charge: cost, margin, utilisation, against API list prices.",
    epilog="""\b
Examples:
  harness price runs/20261121T234654Z-trace-smollm2-135m
  harness price sweeps/20261122T021500Z-capacity-trace --margin 40% --utilisation 30% --volume 0,1e9:-10%,1e10:-20%
  harness price runs/sweep --tier-price "aws-g6.xlarge=0.62@our contract@2026-11-20@reserved"
  harness price runs/* --against gpt-5-mini --format csv -o prices.parquet

\b
Exit status:
  0  there is a price
  1  something failed, or nothing could be priced; the reason is in the output
  2  the command line is wrong
  3  an INVALID run was among them: it has no price, its reasons are in the output
  5  no run was INVALID, and one was TOO SMALL: it has no price either
  4  no measured load kept the SLO
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN_OR_FOLDER...")
@click.option("--margin", type=SHARE_OR_NONE, help="Gross margin, of the price (not a markup on cost). Default: 40%.")
@click.option(
    "--utilisation",
    type=SHARE_OR_NONE,
    help="Share of the paid capacity that is sold, around the clock; harness plan-fleet says it of a fleet. "
    "Default: 30%.",
)
@click.option(
    "--ratio",
    type=RATIO,
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
    help="How the bill is laid on input, cached input and output: by --ratio, or as the runs' own servers counted it "
    "(phase-time, step-model). Where that cannot be told: by --ratio, and it is said.",
)
@click.option(
    "--volume",
    metavar="TOKENS:-PERCENT,...",
    help="Discounts from so many tokens a month on, on what is beyond: 0,1e9:-10%,1e10:-20%.",
)
@click.option("--batch-discount", type=SHARE_OR_NONE, help="Discount for batch work, e.g. 50%.")
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
@JUDGE_OPTIONS
@html_option("the decision")
@format_option("text", "md", "json", "csv")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the flat table for a spreadsheet or warehouse: .parquet or .csv; .json is the whole document.",
)
def price(**options: Any) -> int:
    """What to charge for a million tokens, from VALID runs: cost at 100 % and your utilisation, price at your margin.

    RUN_OR_FOLDER is a run directory, a folder of runs (a sweep, a search for capacity) or a quoted pattern. Of several
    loads the price is quoted at the highest one that keeps the SLO, between two measured loads; of one, at that one.
    """
    from harness.commands import decide

    return decide.price(**options)


@command(
    short_help="A against B: paired intervals and a plain verdict; fails a CI job on request.",
    epilog="""\b
Examples:
  harness compare runs/20261121T234654Z-h100 runs/20261121T235904Z-l40s
  harness compare 'runs/*-before' 'runs/*-after' --fail-if 'cost > +5%' --fail-if 'ttft_p99 > +20ms'
  harness compare sweeps/20261122T021500Z-ab

\b
Figures: cost, throughput, goodput, attainment, error_rate, ttft_p50 _p95 _p99, tpot_p50 ..., e2e_p50 ...
From three pairs of runs on (repeats of each, paired by seed) figures are judged; fewer are shown. Make the
pairs in turns, A B B A: a sweep file with A and B, order = "abba" and repeats = 3. Cost and throughput of an
open loop are the load's own and not judged: compare capacity (harness capacity, harness price) instead.
A condition fails only when the whole 95 % interval of the change lies beyond the bound. An interval on
both sides of it is undecided and does not fail: more repeats would decide.

\b
Exit status:
  0  compared; no condition fails
  1  not comparable (the reasons are in the output)
  2  the command line is wrong
  4  a condition of --fail-if fails
  5  a condition is not judged: fewer than three pairs, cost in an open loop, or a figure that is not known
""",
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--fail-if", multiple=True, metavar="'FIGURE > +5%'", help="End with status 4 when B is that much worse; repeat."
)
@JUDGE_OPTIONS
@html_option("the comparison")
@format_option("text", "md", "json")
def compare(**options: Any) -> int:
    """A against B, each a run directory, a folder of repeats or a quoted pattern; or A alone, a sweep of two systems.

    Same trace, load, seed, SLO and evidence, or there is no comparison. Tier, price, model, engine and its arguments
    may differ and are named. Requests are paired by id, repeats by seed.
    """
    from harness.commands import decide

    return decide.compare(**options)
