"""Models x tiers x load levels x repeats on one trace: what is asked, what it costs, running it, its sum: sweep."""

from __future__ import annotations

import copy
import itertools
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.documents import PlannedPair, PlannedRun, SweepPlan, numbered
from harness.cli.output import print_json, print_rows, say
from harness.cli.replay import replay
from harness.cli.select_runs import refused_exit
from harness.cli.verb import (
    ENVIRONMENT,
    EXIT_STATUS,
    JSON_OPTION,
    NEWEST,
    as_default,
    command,
    out_option,
    resume_option,
    takes,
)
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, TraceError, UsageError
from harness.option_types import PATH, made, options_of
from harness.options import LoadOptions, PlanOptions, ReplayOptions
from harness.store.objects import as_url, is_url

if TYPE_CHECKING:
    from harness.cluster.catalogue.models import Model
    from harness.record.manifest import Tier
    from harness.sweep.cost import TraceLoad
    from harness.sweep.spec import SweepSpec
    from harness.sweep.state import SweepState

LOCAL_SWEEPS = Path("sweeps")
"""Where the folders of sweeps are that go to S3 as well."""
DECIDED = {
    "rate": "loads = { request_rate = [...] }",
    "concurrency": "loads = { concurrency = [...] }",
    "stages": "loads: a sweep holds one load at a time",
    "speed": "loads = { request_rate = [...] }",
}
"""Options of replay that a sweep decides itself, and what to write instead."""
OWN = frozenset({*DECIDED, "model", "tier", "base_url", "metrics_url", "replicas", "seed", "out", "format", "ratio",
                 "live", "junit"})  # fmt: skip


def _unset(option: click.Option) -> click.Option:
    """The option of a sweep file: no variable counts, so that a sweep goes on as it began."""
    twin = copy.copy(option)
    twin.envvar = None
    return twin


OPTIONS: dict[str, click.Option] = {
    max(option.opts, key=len).removeprefix("--").replace("-", "_"): _unset(option)
    for option in replay.params
    if isinstance(option, click.Option)
}


def resolve(values: Mapping[str, object], file: str, folder: Path) -> ReplayOptions:
    """The options of ``harness replay`` with the defaults of the command line and these values from a sweep file.

    Paths count from ``folder``. Raises `UsageError` with file and key.
    """
    given: dict[str, object] = {}
    for key, value in values.items():
        try:
            given[OPTIONS[key].name or ""] = as_default(OPTIONS[key], value, folder)
        except (TypeError, ValueError) as e:  # a date or an infinity in a table, which JSON does not have
            raise UsageError(f"{file}: {key}: {e}") from None
    try:
        context = click.Command("sweep", params=[*OPTIONS.values()]).make_context("sweep", [], default_map=given)
    except click.UsageError as e:
        option = getattr(e, "param", None)
        where = next((f"{name}: " for name, known in OPTIONS.items() if known is option), "")
        raise UsageError(f"{file}: {where}{e.message}") from e
    except ValueError as e:  # a path with a NUL in it
        raise UsageError(f"{file}: {e}") from e
    return made(ReplayOptions, context.params)


@command(
    epilog=f"""\b
Examples:
  harness sweep sweep.toml --dry-run
  harness sweep sweep.toml
  harness sweep --resume sweeps/20261122T021500Z-sweep
  harness sweep sweep.toml --resume
  harness sweep sweep.toml --out s3://bucket/sweeps
  harness sweep --resume s3://bucket/sweeps/20261122T021500Z-sweep
  harness report sweeps/20261122T021500Z-sweep --html report.html

{EXIT_STATUS}
{ENVIRONMENT}""",
)
@click.argument("spec", required=False, metavar="[SWEEP.TOML]", type=PATH)
@click.option("--dry-run", is_flag=True, help="Print every run, its hours and dollars; start and write nothing.")
@resume_option("Go on with the sweep in FOLDER (default: the newest of SWEEP.TOML): keep what is whole, do the rest.")
@takes(LoadOptions, options_of(LoadOptions, "live"), to="shown")
@out_option("sweeps", "sweep folders")
@JSON_OPTION
def sweep(spec: Path | None, resume: str | None, dry_run: bool, out: Path, format_: str, shown: LoadOptions) -> int:
    """Run models x tiers x load levels x repeats on one trace, and keep all of it in one folder.

    SWEEP.TOML says what; scenarios/sweep.example.toml explains every key. The points of one model on one tier share
    their servers and come in random order. Prompts differ between load levels and repeats, so that no prefix cache
    answers; their seeds are the same on every model and tier, so that those can be compared.

    With --out s3://BUCKET/PREFIX every step and every row goes there as well, while the sweep runs; --resume with that
    folder's URL goes on, here or on another machine.

    Ctrl-C ends the point at hand in order, a second one at once. After that, or after any crash, --resume goes on.
    """
    from harness.sweep.cost import survey
    from harness.sweep.spec import levels, read_sweep, seeded
    from harness.sweep.state import lock, read_state
    from harness.trace.io import open_asked

    file = spec
    if resume is not None and file is None and Path(resume).is_file():
        file, resume = Path(resume), NEWEST
    if file is None and resume in (None, NEWEST):
        raise UsageError("say which sweep: harness sweep SWEEP.TOML, or harness sweep --resume FOLDER")
    asked = read_sweep(file, OPTIONS.keys() - OWN, DECIDED) if file is not None else None
    root, url = sweeps_root(out)
    folder = None if resume is None else begun(resume, root, file.stem if file else "")
    state = read_state(folder) if folder else new_state(file.stem, file.resolve(), seeded(asked))  # type: ignore[union-attr, arg-type]
    if folder and asked is not None and file is not None:
        take_over(state, seeded(asked, state.spec), folder)
        state.file = str(file.resolve())
    named = str(file or state.file)
    options = resolve(state.spec.options, named, Path(state.file).parent)
    try:
        tiers = check(state.spec, options)
        trace = open_asked(Path(state.spec.trace), options.plan)
        found = survey(trace, levels(state.spec), options.plan)
    except UsageError as e:
        raise UsageError(f"{named}: {e}") from e
    except TraceError as e:
        if folder is None:
            raise
        again = shlex.join(["harness", "sweep", named, "--resume", str(folder)])
        raise UsageError(f"{e}. When it only moved, say where to in the sweep file, and: {again}") from e
    same_trace(state, trace.sha256, trace.path)
    if dry_run:
        return show_plan(state, options.plan, found, tiers, format_)
    resumed = folder is not None
    folder = folder or new_folder(root, url, state)
    with lock(folder):
        if resumed:  # as it is now that nobody else can write it, with what the sweep file changed about it
            fresh = read_state(folder)
            fresh.spec, fresh.file = state.spec, state.file
            state = fresh
        say(f"sweep folder: {folder}")
        from harness.cli.runner.sweep import Session

        options = replace(options, load=replace(options.load, live=shown.live))
        session = Session(folder, state, options, trace, tiers, found)
        try:
            session.run()
        except (HarnessError, KeyboardInterrupt):
            again = shlex.join(["harness", "sweep", "--resume", str(folder)])
            say(f"{_count(state, 'done')} of {len(state.points)} points done; go on: {again}")
            raise
    return sum_up(folder, state, format_)


def sweeps_root(out: Path) -> tuple[Path, str | None]:
    """(local folder of sweeps, URL they go to or null) of what ``--out`` says."""
    return (LOCAL_SWEEPS, as_url(out)) if is_url(out) else (out, None)


def begun(resume: str, root: Path, name: str) -> Path:
    """The folder to go on with, which may be on S3; the newest of this name where none is named."""
    from harness.store.copies import come_home
    from harness.sweep.state import find_folder

    if resume == NEWEST:
        return find_folder(root, name)
    return come_home(resume, root, say) if is_url(resume) else Path(resume)


def new_state(name: str, file: Path, spec: SweepSpec, *, search: bool = False) -> SweepState:
    """Nothing of it is done yet; a search chooses its points as it goes."""
    from harness.record.manifest import now_utc
    from harness.sweep.spec import make_points, pairs
    from harness.sweep.state import SweepState

    return SweepState(
        name=name, created=now_utc(), file=str(file), spec=spec, trace_sha256="", pairs=pairs(spec),
        points=[] if search else make_points(spec),
    )  # fmt: skip


def new_folder(root: Path, url: str | None, state: SweepState) -> Path:
    """The folder of a state that begins, written with where it is kept as well."""
    from harness.sweep.state import create_folder, write_state

    folder = create_folder(root, state)
    if url:
        state.store_url = f"{url}/{folder.name}"
        write_state(folder, state)
    return folder


def take_over(state: SweepState, spec: SweepSpec, folder: Path) -> None:
    """Go on with ``spec``, said again. Raises `UsageError` when it asks for something else."""
    from harness.sweep.state import differences

    if changed := differences(state.spec, spec):
        raise UsageError(
            f"{folder}: was asked something else:\n  " + "\n  ".join(changed)
            + "\nask the same again (budgets and on_failure may change), or begin anew without --resume"
        )  # fmt: skip
    state.spec = spec


def same_trace(state: SweepState, sha256: str, path: Path) -> None:
    """Raises `UsageError` for another trace than it began with."""
    if state.trace_sha256 not in ("", sha256):
        raise UsageError(
            f"{path}: is not the trace that this began with (its SHA-256 differs): put that one back, or begin anew"
        )
    state.trace_sha256 = sha256


def check(spec: SweepSpec, options: ReplayOptions) -> list[Tier | None]:
    """Refuse before anything is rented what can be known to be wrong; the tier of every pair."""
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.tiers import get_tier
    from harness.plan.spec import asked_plan, check_spec
    from harness.server.access import normalise_base_url
    from harness.sweep.spec import levels, pairs

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
    from harness.cli.runner.targets import rented
    from harness.cluster.catalogue.models import for_tier
    from harness.cluster.engines.vllm import check_fit, hosts_per_replica

    check_fit(model, tier)
    return rented(tier, hosts_per_replica(for_tier(model, tier.accelerator), tier))


def sum_up(folder: Path, state: SweepState, format_: str) -> int:
    """What became of every point, on stdout, and the exit code: 0 VALID, 3 some INVALID, 5 TOO SMALL, 1 not done."""
    if format_ == "json":
        print_json(numbered("harness.sweep/1", state))
    else:
        kind = "simulated, " if state.spec.options.get("engine") == "simulated" else ""
        rows = [
            {"run": point.name, "verdict": f"{kind}{point.verdict or point.state} {slo_words(point.slo_met)}".strip(),
             **{name: point.figures.get(name) for name in FIGURES}, "reason": (point.reason or "")[:90]}
            for point in state.points
        ]  # fmt: skip
        print_rows(rows, f"run verdict {' '.join(FIGURES)} reason")
        usd, hours = state.spent(time.time())
        cost = _usd(usd if any(rental.tier for rental in state.rentals) else None)
        print(f"{_count(state, 'done')} of {len(state.points)} points done; {hours:.3g} h of servers, {cost} USD")
        print(f"sweep folder: {folder}")
        if state.spec.order == "abba" and state.spec.repeats > 1:
            print(f"A against B: {shlex.join(['harness', 'compare', str(folder)])}")
    if _count(state, "done") < len(state.points):
        return EXIT_FAILURE
    return refused_exit(point.verdict for point in state.points)


FIGURES = ("request_throughput", "ttft_p50_s", "tpot_p50_s", "usd_per_1m_total")


def slo_words(met: bool | None) -> str:
    """A few letters on an SLO that was kept or not; empty where there is none."""
    return "" if met is None else "SLO met" if met else "SLO missed"


def _count(state: SweepState, which: str) -> int:
    return sum(point.state == which for point in state.points)


def show_plan(
    state: SweepState, asked: PlanOptions, found: TraceLoad, tiers: Sequence[Tier | None], format_: str
) -> int:
    """Every run still to be done with its hours and dollars, per pair and in all, against the budget; the document is
    ``harness.sweep-plan/1``.
    """
    from harness.sweep.cost import expect, start_s, usd_per_hour

    expected = expect(state.points, asked, found)
    todo = [point for point in state.points if point.state != "done"]
    rates = [usd_per_hour(pair, tier) if tier else None for pair, tier in zip(state.pairs, tiers, strict=True)]

    def usd(hours: float, k: int) -> float | None:
        rate = rates[k]
        return None if rate is None else hours * rate

    runs = [
        PlannedRun(
            name=point.name, model=(pair := state.pairs[point.pair]).model, tier=pair.tier, replicas=pair.replicas,
            request_rate=point.level.request_rate, concurrency=point.level.concurrency, repeat=point.repeat,
            seed=point.seed, requests=guess.requests, hours=guess.seconds / 3600,
            usd=usd(guess.seconds / 3600, point.pair), assumed=guess.assumed,
        )
        for point in todo
        if (guess := expected[point.name])
    ]  # fmt: skip
    groups: list[PlannedPair] = []
    for k, (pair, tier) in enumerate(zip(state.pairs, tiers, strict=True)):
        mine = [expected[point.name].seconds for point in todo if point.pair == k]
        starts = sum(turn == k for turn, _ in itertools.groupby(point.pair for point in todo))  # in turns: each time
        start_h = starts * start_s(pair, tier) / 3600
        hours = start_h + sum(mine) / 3600
        groups.append(PlannedPair(
            model=pair.model, tier=pair.tier, replicas=pair.replicas, runs=len(mine), start_up_hours=start_h,
            hours=hours, usd_per_hour=rates[k], usd=usd(hours, k), price_date=tier.date if tier else None,
            price_source=tier.source if tier else None,
        ))  # fmt: skip
    all_hours, all_usd = sum(group.hours for group in groups), sum(group.usd or 0.0 for group in groups)
    spent_usd, spent_hours = state.spent(time.time())
    priced, spec = any(tiers), state.spec
    budgets = (("h", spec.budget_hours, all_hours + spent_hours),
               ("USD", spec.budget_usd, all_usd + spent_usd if priced else 0.0))  # fmt: skip
    if format_ == "json":
        print_json(SweepPlan(
            name=state.name, runs=runs, pairs=groups, hours=all_hours, usd=all_usd if priced else None,
            spent_hours=spent_hours, spent_usd=spent_usd if priced else None, budget_hours=spec.budget_hours,
            budget_usd=spec.budget_usd, fits=all(budget is None or needed <= budget for _, budget, needed in budgets),
        ))  # fmt: skip
        return EXIT_VALID
    print_rows([asdict(run) for run in runs], "name request_rate concurrency repeat requests hours usd assumed")
    print_rows(
        [asdict(group) for group in groups], "model tier replicas runs start_up_hours hours usd_per_hour price_date usd"
    )
    if any(run.assumed for run in runs):
        print("assumed: a closed loop without a duration is as fast as its server; 20 output tokens/s a request")
    print(f"{len(runs)} runs, {all_hours:.3g} h of servers, {_usd(all_usd if priced else None)} USD")
    if spent_hours:
        print(f"spent so far: {spent_hours:.3g} h, {_usd(spent_usd if priced else None)} USD")
    for unit, budget, needed in budgets:
        if budget is not None:
            short = "enough" if needed <= budget else f"{needed - budget:.4g} short: what does not fit will be skipped"
            print(f"budget {budget:g} {unit}: {short}")
    return EXIT_VALID


def _usd(value: float | None) -> str:
    """Dollars to the cent, below ten of them finer; - where there is no price."""
    return "-" if value is None else f"{value:,.4f}" if value < 10 else f"{value:,.2f}"
