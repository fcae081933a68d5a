"""Questions to runs in SQL."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from harness.cli.output import print_json, print_table
from harness.cli.select_runs import find_runs
from harness.cli.verb import command, format_option
from harness.errors import EXIT_VALID
from harness.option_types import PATH


@command(
    epilog="""\b
Examples:
  harness sql runs -c 'select run, verdict, ttft_p99, usd_per_1m_total from runs order by created'
  harness sql runs/* -c 'select floor(scheduled_ns / 60e9) as minute, count(*), max(ttft_s) from requests group by all'
  harness sql sweeps/azure -c "from figures where figure = 'goodput'" --format csv
  harness sql runs -c 'describe requests'

\b
Views, of which only those that a query names are read:
  requests  a row for each request, as 'harness export' writes it
  chunks    a row for each chunk of an answer: gap_s since the one before it (of the first: since sending), tokens
  runs      a row for each run: what it was, its verdict, the value of every figure
  figures   a row for each figure of each run, with its 95 % interval
  workers   a row for each load worker and second;  servers: each server;  hosts: each machine""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-c", "--command", "query", required=True, metavar="SQL", help="One SELECT, in DuckDB's SQL.")
@format_option("text", "csv", "json")
def sql(runs: Sequence[Path], query: str, format_: str) -> int:
    """Ask run directories, folders of them, sweeps and searches in SQL (DuckDB). They are only read."""
    from harness.analysis.report.sql import Runs
    from harness.analysis.report.sql import query as ask

    names, rows = ask(Runs(find_runs(*runs)), query)
    if format_ == "json":
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    elif format_ == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        print_table(tuple(names), [tuple(_words(value) for value in row) for row in rows])
    return EXIT_VALID


def _words(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
