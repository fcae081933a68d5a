"""The verbs for what is running: ps, stop."""

from __future__ import annotations

from typing import Any

import click

from harness.cli.options import JSON_OPTION
from harness.cli.types import DURATION
from harness.cli.verb import command


@command(
    short_help="List the servers, load workers and Ray that are running.",
    epilog="""\b
Examples:
  harness ps
  RAY_ADDRESS=10.0.0.1:6379 harness ps --format json
""",
)
@JSON_OPTION
def ps(format_: str) -> int:
    """List what the harness started as this user and is running: servers, load workers, Ray.

    Of this machine, and of every node of the Ray cluster when RAY_ADDRESS names one. "orphan" is what nobody waits for
    any more: the next run says so, 'harness stop' ends it.
    """
    from harness.commands import processes

    return processes.ps(format_)


@command(
    short_help="End what 'harness ps' lists, one by its ID or all.",
    epilog="""\b
Examples:
  harness stop 3fa1c02b
  harness stop --all
""",
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that 'harness ps' lists.")
@click.option(
    "--grace",
    "grace_s",
    type=DURATION,
    default=5.0,
    show_default=True,
    help="Time between asking a process to end and killing it.",
)
def stop(ids: tuple[str, ...], **options: Any) -> int:
    """End processes that 'harness ps' lists, with all that they started: SIGTERM, then SIGKILL after the grace.

    A process is ended only when its pid and its start time are those that were written down. A run whose server or
    load worker is ended this way is INVALID.
    """
    from harness.commands import processes

    return processes.stop(ids, **options)
