"""The verbs that read run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import EXIT_STATUS, REPORT_OPTIONS, Slo


@click.command(
    short_help="Report on a run directory; compare several in a page.",
    epilog=f"""\b
Examples:
  harness report runs/20261121T234654Z-trace-smollm2-135m
  harness report runs/20261121T234654Z-trace-smollm2-135m --html report.html
  harness report runs/*-sweep-* --slo ttft=2s --html sweep.html

{EXIT_STATUS}
Of several runs the worst counts, INVALID first.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--slo", type=Slo(), help="Judge against this SLO instead of the one of the run.")
@REPORT_OPTIONS
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained page instead; several runs are compared in it.",
)
def report(**options: Any) -> int:
    """Report on a run directory: verdict, price, latency under load, throughput, errors."""
    from harness import commands

    return commands.report(**options)
