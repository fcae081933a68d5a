"""The verbs of capacity: capacity (how much can one fleet carry at a promise) and plan-fleet (how large must it be)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli import runs
from harness.cli.options import (
    ATTAIN_OPTION,
    ENVIRONMENT,
    ONE_TRACE_ARGUMENT,
    READ_OPTIONS,
    SWEEPS_OPTION,
    format_option,
    html_option,
    resume_option,
)
from harness.cli.types import DURATION, GROWTH, POSITIVE, SHARE, SLO
from harness.cli.verb import command
from harness.errors import UsageError
from harness.options import ReadOptions, ReplayOptions, taken

NEWEST = ""
"""--resume without a folder."""
DECIDED = frozenset({"rate", "speed", "concurrency", "stages", "duration_s", "limit", "repeat", "rescale", "grow",
                     "slo", "attain", "ratio", "format_", "out"})  # fmt: skip
"""Options of replay that the search decides itself, or has of its own."""


def replay_options() -> list[click.Option]:
    """The options of ``harness replay`` that a search takes as they are."""
    return [p for p in runs.replay.params if isinstance(p, click.Option) and p.name not in DECIDED]


@command(
    short_help="Find the highest load that keeps a promise, in few runs.",
    epilog=f"""\b
Examples:
  harness capacity trace.jsonl --slo ttft_p99=2s,tpot_p95=80ms --max-usd 5
  harness capacity trace.jsonl --slo ttft=2s,tpot=100ms --base-url http://10.0.0.5:8000/v1 --tier aws-g6.xlarge
  harness report sweeps/20261122T021500Z-capacity-trace --html report.html

\b
Exit status:
  0  capacity was found, or lies beyond what could be sent
  1  something failed; the message says what
  2  the command line is wrong
  3  no run was VALID
  5  no run was VALID or INVALID: all were TOO SMALL
  4  not even the lowest load keeps the promise
  130  stopped by Ctrl-C; --resume goes on
{ENVIRONMENT}""",
)
@ONE_TRACE_ARGUMENT
@click.option(
    "--slo",
    type=SLO,
    required=True,
    metavar="KEY=TIME,...",
    help="What is promised: ttft_p99=2s,tpot_p95=80ms, or ttft=2s,tpot=100ms with --attain (also e2e, itl_max).",
)
@ATTAIN_OPTION
@click.option("--max-usd", type=POSITIVE, help="Stop when this much is spent on servers, their start among it.")
@click.option("--max-hours", type=POSITIVE, help="Stop when servers were up for this long.")
@click.option(
    "--probe",
    "probe_s",
    type=DURATION,
    default=60.0,
    show_default="60s",
    help="Length of a probe; longer by itself where it would send too few requests.",
)
@click.option(
    "--tolerance",
    type=SHARE,
    default="10%",
    show_default=True,
    help="Stop when the 95 % interval reaches this far to either side of capacity.",
)
@click.option("--busiest", is_flag=True, help="Probe the busiest stretch of TRACE instead of all its parts.")
@resume_option(
    "Go on with the search in FOLDER (default: the newest of TRACE): say the rest of the command again.", NEWEST
)
@SWEEPS_OPTION
@html_option("the probes, compared,")
@format_option("text", "md", "json")
def capacity(
    trace: Path, out: Path, max_usd: float | None, max_hours: float | None, probe_s: float, tolerance: float,
    busiest: bool, resume: str | None, html: Path | None, **options: Any,
) -> int:  # fmt: skip
    """Find the highest request rate at which the promise is kept, and what a million tokens costs there.

    Servers are started once. A closed-loop ladder (1, 4, 16 ... in flight) finds the ceiling; then windows from all
    parts of TRACE, other ones in each probe, are replayed at one rate after the other, until the interval is narrow
    enough. A probe whose backlog only grows keeps no promise. Every probe has prompts of its own, is printed with its
    verdict and cost, and is kept as a run in one sweep folder.
    """
    from harness.commands.capacity import capacity as find

    if str(trace) == "-":
        raise UsageError("a search reads its trace many times: name a file instead of standard input")
    return find(
        trace, out, ReplayOptions.of(options), max_usd=max_usd, max_hours=max_hours, probe_s=probe_s,
        tolerance=tolerance, busiest=busiest, resume=resume, html=html,
    )  # fmt: skip


capacity.params[1:1] = [p for p in replay_options() if p.name not in {q.name for q in capacity.params}]


@command(
    short_help="How many instances, of which tier, carry a demand at a promise.",
    epilog="""\b
Examples:
  harness plan-fleet trace.jsonl sweeps/20261122T021500Z-capacity-trace
  harness plan-fleet year.csv.gz sweeps/l4 sweeps/h100 --grow 3x --headroom 1.2 --availability 99.9%
  harness plan-fleet trace.jsonl sweeps/l4 --slo ttft_p99=2s --slo ttft_p99=1s --format csv

\b
Exit status:
  0  there is a fleet
  1  something failed, or nothing can be planned with; the message says what
  2  the command line is wrong
  3  no fleet, because runs are INVALID; their reasons are in the output
  5  no fleet, because runs are TOO SMALL
  4  no measured tier keeps the promise
""",
)
@ONE_TRACE_ARGUMENT
@click.argument("measured", nargs=-1, required=True, metavar="FOLDER...")
@READ_OPTIONS
@click.option("--grow", type=GROWTH, default="1x", show_default=True, help="The forecast: this many times the trace.")
@click.option(
    "--headroom",
    type=GROWTH,
    default="1x",
    show_default=True,
    help="Room for a forecast that is too low: the demand times this, on top of --grow. Bursts need none, they are "
    "replayed.",
)
@click.option("--availability", type=SHARE, help="Spare instances so that enough are up this share of the time.")
@click.option(
    "--node-availability",
    type=SHARE,
    default="99.5%",
    show_default=True,
    help="Share of the time one instance is up: an assumption, take it from your provider.",
)
@click.option("--start", "start_s", type=DURATION, help="Start-up time of a replica instead of the measured one.")
@click.option(
    "--replicas-per-instance",
    type=click.IntRange(min=1),
    help="Default: as many as the instance's accelerators hold, 1 without any.",
)
@click.option(
    "--slo",
    type=SLO,
    multiple=True,
    metavar="KEY=TIME,...",
    help="Judge by this promise instead of the runs' own; repeat: the others show what a promise costs.",
)
@ATTAIN_OPTION
@html_option("the plan")
@format_option("text", "md", "json", "csv")
def plan_fleet(
    trace: Path, measured: tuple[str, ...], grow: float, headroom: float, availability: float | None,
    node_availability: float, start_s: float | None, replicas_per_instance: int | None,
    slo: tuple[dict[str, float], ...], attain: float, html: Path | None, format_: str, **reading: Any,
) -> int:  # fmt: skip
    """How many whole instances of each measured tier carry the demand of TRACE, and what they cost.

    FOLDER is what 'harness capacity' or 'harness sweep' left (rates in an open loop, with an SLO and a tier). TRACE is
    replayed in virtual time on an engine fitted to those runs: the fleet is the smallest that keeps the promise in
    every minute, and is marked as simulated. Beside it stands the fluid answer (worst minute over capacity), alone
    where no engine can be fitted. Spare instances for availability; fixed against autoscaled over the trace's own
    time; what growth, price and promise change; the cheapest tier and the runner-up.
    """
    from harness.commands.fleet import plan_fleet as plan

    return plan(
        trace, measured, taken(ReadOptions, reading), grow=grow, headroom=headroom, availability=availability,
        node_availability=node_availability, start_s=start_s, replicas_per_instance=replicas_per_instance, slo=slo,
        attain=attain, format_=format_, html=html,
    )  # fmt: skip
