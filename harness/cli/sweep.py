"""Models x tiers x load levels x repeats on one trace: read what is asked, run it, sum it up: sweep."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.options import ENVIRONMENT, JSON_OPTION, SWEEPS_OPTION, resume_option
from harness.cli.output import print_json, print_table, say
from harness.cli.replay import replay
from harness.cli.runner.sweep import Session
from harness.cli.runner.targets import rented
from harness.cli.select_runs import refused_exit
from harness.cli.sweep_plan import show_plan, usd_words
from harness.cli.verb import command
from harness.errors import EXIT_FAILURE, HarnessError, TraceError, UsageError
from harness.options import ReplayOptions
from harness.record.manifest import Tier, now_utc
from harness.server.access import normalise_base_url
from harness.store.copies import come_home
from harness.store.objects import as_url, is_url
from harness.sweep.cost import survey
from harness.sweep.spec import SweepSpec, levels, make_points, pairs, read_sweep, seeded
from harness.sweep.state import SweepState, create_folder, differences, find_folder, lock, read_state, write_state
from harness.trace.files import open_asked

if TYPE_CHECKING:
    from cluster.catalogue.models import Model


LOCAL_SWEEPS = Path("sweeps")
"""Where the folders of sweeps are that go to S3 as well."""

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
    for option in replay.params
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
        context = replay.make_context("sweep", argv)
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
def sweep(spec: Path | None, resume: str | None, dry_run: bool, out: Path, format_: str) -> int:
    """Run models x tiers x load levels x repeats on one trace, and keep all of it in one folder.

    SWEEP.TOML says what; scenarios/sweep.example.toml explains every key. The points of one model on one tier share
    their servers and come in random order. Prompts differ between load levels and repeats, so that no prefix cache
    answers; their seeds are the same on every model and tier, so that those can be compared.

    With --out s3://BUCKET/PREFIX every step and every row goes there as well, while the sweep runs; --resume with that
    folder's URL goes on, here or on another machine.

    Ctrl-C ends the point at hand in order, a second one at once. After that, or after any crash, --resume goes on.
    """
    if resume is not None and spec is None and Path(resume).is_file():
        spec, resume = Path(resume), NEWEST
    if spec is None and resume in (None, NEWEST):
        raise UsageError("say which sweep: harness sweep SWEEP.TOML, or harness sweep --resume FOLDER")
    folder = None if resume in (None, NEWEST) else Path(resume or "")
    return run_sweep(spec, resume=resume is not None, folder=folder, dry_run=dry_run, out=out, format_=format_)


def run_sweep(file: Path | None, *, resume: bool, folder: Path | None, dry_run: bool, out: Path, format_: str) -> int:
    """Run a sweep, or go on with one; 0: all points are VALID, 3: some INVALID, 5: some TOO SMALL, 1: not all done."""
    spec = read_sweep(file, OPTIONS.keys() - OWN, DECIDED) if file is not None else None
    root, url = (LOCAL_SWEEPS, as_url(out)) if is_url(out) else (out, None)
    if resume:
        folder = begun(folder, root, file.stem if file else "")
        state = read_state(folder)
        if spec is not None and file is not None:
            _take_over(state, spec, file, folder)
    else:
        assert spec is not None
        assert file is not None
        spec = seeded(spec)
        state = SweepState(
            name=file.stem, created=now_utc(), file=str(file.resolve()), spec=spec, trace_sha256="",
            pairs=pairs(spec), points=make_points(spec),
        )  # fmt: skip
    asked = Path(state.file)
    options = resolve(state.spec.options, str(file or asked), asked.parent)
    try:
        tiers = check(state.spec, options)
        trace = open_asked(Path(state.spec.trace), options.plan)
        found = survey(trace, levels(state.spec), options.plan)
    except UsageError as e:
        raise UsageError(f"{file or asked}: {e}") from e
    except TraceError as e:
        if not resume:
            raise
        again = shlex.join(["harness", "sweep", str(file or asked), "--resume", str(folder)])
        raise UsageError(f"{e}. When it only moved, say where to in the sweep file, and: {again}") from e
    if not state.trace_sha256:
        state.trace_sha256 = trace.sha256
    elif trace.sha256 != state.trace_sha256:
        raise UsageError(
            f"{trace.path}: is not the trace this sweep began with (its SHA-256 differs): put that one back, or "
            "begin a new sweep"
        )
    if dry_run:
        return show_plan(state, options.plan, found, tiers, format_)
    if not resume:
        folder = create_folder(root, state)
        state.store_url = f"{url}/{folder.name}" if url else None
        write_state(folder, state)
    assert folder is not None
    with lock(folder):
        if resume:
            state = _newest(folder, state)
        say(f"sweep folder: {folder}")
        session = Session(folder, state, options, trace, tiers, found)
        try:
            session.run()
        except (HarnessError, KeyboardInterrupt):
            again = shlex.join(["harness", "sweep", "--resume", str(folder)])
            say(f"{_count(state, 'done')} of {len(state.points)} points done; go on: {again}")
            raise
    return sum_up(folder, state, format_)


def begun(folder: Path | None, root: Path, name: str) -> Path:
    """The folder of the sweep to go on with, which may be on S3; without one the newest of this name."""
    if folder is None:
        return find_folder(root, name)
    return come_home(folder, root, say) if is_url(folder) else folder


def _newest(folder: Path, state: SweepState) -> SweepState:
    """The state as it is now that nobody else can write it, with what the sweep file changed about it."""
    fresh = read_state(folder)
    fresh.spec, fresh.file = state.spec, state.file
    return fresh


def _take_over(state: SweepState, spec: SweepSpec, file: Path, folder: Path) -> None:
    """Resume with the file said again. Raises `UsageError` when it asks for other points."""
    spec = seeded(spec, state.spec)
    if changed := differences(state.spec, spec):
        raise UsageError(
            f"{file}: is not the sweep that was begun in {folder}:\n  " + "\n  ".join(changed)
            + "\nput that back, or begin a new sweep without --resume (budgets and on_failure may change)"
        )  # fmt: skip
    state.spec, state.file = spec, str(file.resolve())


def check(spec: SweepSpec, options: ReplayOptions) -> list[Tier | None]:
    """Refuse before anything is rented what can be known to be wrong; the tier of every pair."""
    from cluster.catalogue.models import get_model
    from cluster.catalogue.tiers import get_tier
    from harness.plan.spec import asked_plan, check_spec

    for level in levels(spec)[:1]:
        one = options.at(rate=level.request_rate, concurrency=level.concurrency)
        for pair in pairs(spec):
            replace(one, serve=replace(one.serve, base_urls=pair.base_urls)).check()
        check_spec(asked_plan(one.plan, closed=one.load.closed))
    found: list[Tier | None] = []
    unfit: list[str] = []
    for pair in pairs(spec):
        tier = get_tier(pair.tier) if pair.tier else None
        for url in pair.base_urls:
            normalise_base_url(url)
        if not pair.base_urls:
            assert tier is not None
            model = get_model(pair.model or "")
            try:
                tier = _fit(model, tier)
            except UsageError as e:
                unfit.append(str(e))
        found.append(tier)
        if tier is None and spec.budget_usd is not None:
            raise UsageError(f"a budget in USD needs a price: name the tier of {pair.name}, or set a budget in hours")
    if unfit:
        raise UsageError("\n  ".join([*unfit, "name the pairs that fit as [[pair]] instead of models and tiers"]))
    return found


def _fit(model: Model, tier: Tier) -> Tier:
    """What one replica of this model rents of the tier. Raises `UsageError` for a model that does not fit."""
    from cluster.catalogue.models import for_tier
    from cluster.engines.vllm import check_fit, hosts_per_replica

    check_fit(model, tier)
    return rented(tier, hosts_per_replica(for_tier(model, tier.accelerator), tier))


def sum_up(folder: Path, state: SweepState, format_: str) -> int:
    """What became of every point, on stdout, and the exit code."""
    if format_ == "json":
        print_json(state)
    else:
        print_table(
            ("run", "", "req/s", "ttft p50 ms", "tpot p50 ms", "USD per 1M", "reason"),
            [
                (point.name, " ".join(filter(None, (point.verdict or point.state, slo_words(point.slo_met)))),
                 _figure(point.figures, "request_throughput", 1.0), _figure(point.figures, "ttft_p50_s", 1e3),
                 _figure(point.figures, "tpot_p50_s", 1e3), _figure(point.figures, "usd_per_1m_total", 1.0),
                 (point.reason or "")[:90])
                for point in state.points
            ],
        )  # fmt: skip
        usd, hours = state.spent(time.time())
        cost = usd_words(usd if any(rental.tier for rental in state.rentals) else None)
        print(f"{_count(state, 'done')} of {len(state.points)} points done; {hours:.3g} h of servers, {cost} USD")
        print(f"sweep folder: {folder}")
        if state.spec.order == "abba" and state.spec.repeats > 1:
            print(f"A against B: {shlex.join(['harness', 'compare', str(folder)])}")
    if _count(state, "done") < len(state.points):
        return EXIT_FAILURE
    return refused_exit(point.verdict for point in state.points)


def slo_words(met: bool | None) -> str:
    """A few letters on a promise kept or not; empty when none was made."""
    return "" if met is None else "SLO met" if met else "SLO missed"


def _figure(figures: Mapping[str, float | None], name: str, scale: float) -> str:
    value = figures.get(name)
    return "-" if value is None else f"{value * scale:,.4g}"


def _count(state: SweepState, which: str) -> int:
    return sum(point.state == which for point in state.points)
