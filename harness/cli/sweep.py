"""The verb for many runs: sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from harness.cli import runs
from harness.cli.options import ENVIRONMENT, JSON_OPTION, SWEEPS_OPTION, resume_option
from harness.cli.verb import command
from harness.errors import UsageError
from harness.options import ReplayOptions

NEWEST = "newest"
"""--resume without a folder."""
DECIDED = {
    "rate": "loads = { request_rate = [...] }",
    "concurrency": "loads = { concurrency = [...] }",
    "stages": "loads: a sweep holds one load at a time",
    "speed": "loads = { request_rate = [...] }",
}
"""Options of replay that a sweep decides itself, and what to write instead."""
OWN = frozenset({*DECIDED, "model", "tier", "base_url", "metrics_url", "replicas", "seed", "out", "format", "ratio"})
"""Options of replay that are no options of a sweep file."""

OPTIONS: dict[str, click.Option] = {
    max(option.opts, key=len).removeprefix("--").replace("-", "_"): option
    for option in runs.replay.params
    if isinstance(option, click.Option)
}
"""Every option of ``harness replay`` by the key it has in a sweep file."""


def resolve(values: Mapping[str, object], file: str, folder: Path) -> ReplayOptions:
    """The options of ``harness replay`` with the defaults of the command line and these values from a sweep file.

    Paths count from ``folder``. Raises `UsageError` with file and key.
    """
    argv = ["trace"]
    for key, value in values.items():
        try:
            argv += _arguments(OPTIONS[key], value, folder)
        except (TypeError, ValueError) as e:  # a date or an infinity in a table, which JSON does not have
            raise UsageError(f"{file}: {key}: {e}") from None
    try:
        context = runs.replay.make_context("sweep", argv)
    except click.UsageError as e:
        option = getattr(e, "param", None)
        where = next((f"{name}: " for name, known in OPTIONS.items() if known is option), "")
        raise UsageError(f"{file}: {where}{e.message}") from e
    except ValueError as e:  # a path with a NUL in it
        raise UsageError(f"{file}: {e}") from e
    return ReplayOptions.of({name: value for name, value in context.params.items() if name not in ("trace", "out")})


def _arguments(option: click.Option, value: object, folder: Path) -> list[str]:
    """One key as the words of a command line. Raises ValueError."""
    flag = max(option.opts, key=len)
    if option.is_flag:
        if not isinstance(value, bool):
            raise ValueError("is true or false")
        return [flag] if value else []
    if isinstance(value, bool) or (isinstance(value, list) and not option.multiple):
        raise ValueError(f"{json.dumps(value)} is not what {flag} takes")
    if isinstance(value, list):
        return [word for item in value for word in _arguments(option, item, folder)]
    if isinstance(value, dict):
        slo = ",".join(f"{k}={v}" for k, v in value.items())
        return [f"{flag}={slo if option.name == 'slo' else json.dumps(value, allow_nan=False)}"]
    if isinstance(option.type, click.Path):
        value = folder / Path(str(value)).expanduser()
    return [f"{flag}={value}"]


@command(
    short_help="Models x tiers x load levels x repeats on one trace.",
    epilog=f"""\b
Examples:
  harness sweep sweep.toml --dry-run
  harness sweep sweep.toml
  harness sweep --resume sweeps/20261122T021500Z-sweep
  harness sweep sweep.toml --resume
  harness sweep sweep.toml --out s3://bucket/sweeps
  harness sweep --resume s3://bucket/sweeps/20261122T021500Z-sweep
  harness report sweeps/20261122T021500Z-sweep --html report.html

\b
Exit status:
  0    every point is done and VALID (a missed SLO is a result)
  1    some point failed or was skipped; the table says why
  2    the command line or the sweep file is wrong, or the file is not the one that was begun
  3    every point is done, some are INVALID
  5    every point is done, none is INVALID, some are TOO SMALL (min_requests)
  130  stopped by Ctrl-C; --resume goes on
{ENVIRONMENT}""",
)
@click.argument("spec", required=False, metavar="[SWEEP.TOML]", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print every run, its hours and dollars; start and write nothing.")
@resume_option(
    "Go on with the sweep in FOLDER (default: the newest of SWEEP.TOML): keep what is whole, do the rest.", NEWEST
)
@SWEEPS_OPTION
@JSON_OPTION
def sweep(spec: Path | None, resume: str | None, **options: Any) -> int:
    """Run models x tiers x load levels x repeats on one trace, and keep all of it in one folder.

    SWEEP.TOML says what; scenarios/sweep.example.toml explains every key. The points of one model on one tier share
    their servers and come in random order. Prompts differ between load levels and repeats, so that no prefix cache
    answers; their seeds are the same on every model and tier, so that those can be compared.

    With --out s3://BUCKET/PREFIX every step and every row goes there as well, while the sweep runs; --resume with that
    folder's URL goes on, here or on another machine.

    Ctrl-C ends the point at hand in order, a second one at once. After that, or after any crash, --resume goes on.
    """
    from harness.commands.sweep import sweep as run_sweep

    if resume is not None and spec is None and Path(resume).is_file():
        spec, resume = Path(resume), NEWEST
    if spec is None and resume in (None, NEWEST):
        raise UsageError("say which sweep: harness sweep SWEEP.TOML, or harness sweep --resume FOLDER")
    folder = None if resume in (None, NEWEST) else Path(resume or "")
    return run_sweep(
        spec,
        resume=resume is not None,
        folder=folder,
        names=OPTIONS.keys() - OWN,
        instead=DECIDED,
        resolve=resolve,
        **options,
    )
