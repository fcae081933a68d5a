"""The verbs that read run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import EXIT_STATUS, MIN_REQUESTS_HELP, REPORT_OPTIONS
from harness.cli.types import SLO
from harness.cli.verb import command


@command(
    short_help="Report on a run directory; compare several in a page.",
    epilog=f"""\b
Examples:
  harness report runs/20261121T234654Z-trace-smollm2-135m
  harness report runs/20261121T234654Z-trace-smollm2-135m --html report.html
  harness report runs/*-sweep-* --slo ttft=2s --html sweep.html

{EXIT_STATUS}
Of several runs the worst counts: INVALID, then TOO SMALL.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--slo", type=SLO, metavar="KEY=TIME,...", help="Judge against this SLO instead of the one of the run.")
@click.option(
    "--min-requests", type=click.IntRange(min=1), help=f"{MIN_REQUESTS_HELP} Default: as the run was made, which is 30."
)
@REPORT_OPTIONS
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained page instead; several runs are compared in it.",
)
@click.option(
    "--variant",
    metavar="TOOL",
    help="This run's figures by another tool's definitions: vllm-bench, guidellm, aiperf.",
)
def report(**options: Any) -> int:
    """Report on a run directory: verdict, price, latency under load, throughput, errors."""
    from harness.commands import reports

    return reports.report(**options)


@command(
    short_help="Write result rows as Parquet, CSV or JSON.",
    epilog="""\b
Examples:
  harness export runs/20261121T234654Z-trace-smollm2-135m -o results.parquet
  harness export runs/*-sweep-* -o rows.csv

One line a request, of all runs: run, model, tier, the row as it was written (times in ns, lists of gaps), and
ttft_s, tpot_s, e2e_s, lag_s. The ending of the file says the format: .parquet, .csv, .json, .jsonl.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; an earlier one is replaced.",
)  # fmt: skip
def export(runs: tuple[Path, ...], output: Path) -> int:
    """Write the rows of run directories into one file that DuckDB, Polars, pandas and spreadsheets read as it is."""
    from harness.commands.results import export as export_rows

    return export_rows(runs, output)


@command(
    name="open",
    short_help="Browse a folder of runs on a local page.",
    epilog="""\b
Examples:
  harness open runs
  harness open sweeps/azure --port 8200

Only this machine can reach it (127.0.0.1), nothing is written, and Ctrl-C ends it. From another machine:
  ssh -L 8200:127.0.0.1:8200 HOST harness open runs --port 8200""",
)
@click.argument("folder", metavar="RESULTS", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (default: one that is free).")
def open_(folder: Path, port: int) -> int:
    """Serve a folder of runs as pages: a list to sort, a page for each run, several runs side by side."""
    from harness.commands.results import open_results

    return open_results(folder, port)
