"""What is running, here and on the nodes of the Ray cluster that RAY_ADDRESS names, and its end: ps, stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from harness.cli.options import JSON_OPTION
from harness.cli.output import print_json, print_table, say
from harness.cli.types import DURATION
from harness.cli.verb import command
from harness.errors import EXIT_FAILURE, EXIT_VALID, UsageError, unknown_name

if TYPE_CHECKING:
    from cluster.process.registry import Entry


ORDER = ("load worker", "replica", "Ray")
"""Kinds in the order they are ended: what depends on another before it. Anything else comes first."""

ASK_S = 30.0
"""A host that does not list its processes by then is left out, and named."""


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
    with _cluster():
        found = _found()
    if format_ == "json":
        print_json([asdict(one.entry) | {"orphan": one.orphan, "holds": one.holds} for one in found])
        return EXIT_VALID
    if not found:
        say("nothing is running")
        return EXIT_VALID
    now = time.time()
    print_table(
        ("ID", "what", "host", "pid", "age", "owner", "holds", "run"),
        [
            (
                entry.id, entry.name, entry.host, str(entry.command.pid), f"{max(0.0, now - entry.started):.0f} s",
                "gone: orphan" if orphan else str(entry.owner.pid), holds or "-", entry.run_dir or "-",
            )
            for entry, orphan, holds in found
        ],
    )  # fmt: skip
    return EXIT_VALID


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
def stop(ids: Sequence[str], everything: bool, grace_s: float) -> int:
    """End processes that 'harness ps' lists, with all that they started: SIGTERM, then SIGKILL after the grace.

    A process is ended only when its pid and its start time are those that were written down. A run whose server or
    load worker is ended this way is INVALID.
    """
    if everything == bool(ids):
        raise UsageError("say which: harness stop ID (harness ps lists them), or harness stop --all")
    with _cluster():
        found = {one.entry.id: one.entry for one in _found()}
        for wanted in ids:
            if wanted not in found:
                raise unknown_name("process", wanted, found)
        chosen = [entry for entry in found.values() if everything or entry.id in ids]
        ended = set[str]()
        for rank in sorted({_rank(entry) for entry in chosen}):
            now = [entry.id for entry in chosen if _rank(entry) == rank]
            ended.update(*_each_host(_end, now, grace_s, timeout_s=4 * grace_s + 60))
    for entry in chosen:
        where = f"{entry.name} ({entry.id}, pid {entry.command.pid} on {entry.host})"
        say(f"ended {where}" if entry.id in ended else f"not ended: {where}; is it stuck in the kernel (state D)?")
    if not chosen:
        say("nothing is running")
    return EXIT_VALID if len(ended) == len(chosen) else EXIT_FAILURE


class _Running(NamedTuple):
    """One process group."""

    entry: Entry
    orphan: bool
    holds: str | None
    """Processors and accelerators that no other run takes; null: none."""


def _rank(entry: Entry) -> int:
    return next((i + 1 for i, kind in enumerate(ORDER) if entry.name.startswith(kind)), 0)


def _cluster() -> AbstractContextManager[None]:
    """Connected to the cluster that RAY_ADDRESS names, if any."""
    if not os.environ.get("RAY_ADDRESS"):
        return nullcontext()
    from cluster.deploy.ray_session import joined

    return joined(say)


def _each_host(function: Callable[..., list[Any]], *args: Any, timeout_s: float = ASK_S) -> list[list[Any]]:
    """What ``function`` returned on every host that answers; on this machine alone without a cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        return [function(*args)]
    from cluster.deploy.ray_session import alive_nodes, on_each

    nodes = alive_nodes()
    answers = on_each(nodes, function, *args, timeout_s=timeout_s)
    for node, answer in zip(nodes, answers, strict=True):
        if answer is None:
            say(f"{node.address} does not answer")
    return [answer or [] for answer in answers]


def _found() -> list[_Running]:
    """What runs on every host."""
    by_id = {one.entry.id: one for found in _each_host(_running) for one in found}
    return list(by_id.values())


def _running() -> list[_Running]:
    """What runs on this host; orphans and reservations are told here, where the pids mean something."""
    from cluster.process.registry import running
    from cluster.process.reservations import reservations

    holds = {(one.owner, one.name): one.words for one in reservations()}
    return [_Running(entry, entry.orphan, holds.get((entry.owner, entry.name))) for entry in running()]


def _end(ids: list[str], grace_s: float) -> list[str]:
    """Of these ids those that were running on this host and are ended now."""
    from cluster.process.registry import end, running

    here = [entry for entry in running() if entry.id in ids]
    with ThreadPoolExecutor(max_workers=32) as pool:
        ended = list(pool.map(lambda entry: end(entry, grace_s), here))
    return [entry.id for entry, gone in zip(here, ended, strict=True) if gone]
