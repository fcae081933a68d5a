"""Models x tiers x load levels x repeats on one trace: read what is asked, say what it costs, run it, sum it up."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import print_json, print_table, say
from harness.cli.runner.sweep import Session
from harness.cli.runner.targets import rented
from harness.cli.select_runs import refused_exit
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, TraceError, UsageError
from harness.options import PlanOptions, ReplayOptions
from harness.record.manifest import Tier, now_utc
from harness.server.access import normalise_base_url
from harness.store.copies import come_home
from harness.store.objects import as_url, is_url
from harness.sweep.cost import Survey, expect, start_s, survey, usd_per_hour
from harness.sweep.spec import SweepSpec, levels, make_points, pairs, read_sweep, seeded
from harness.sweep.state import SweepState, create_folder, differences, find_folder, lock, read_state, write_state
from harness.trace.files import open_asked

if TYPE_CHECKING:
    from cluster.catalogue.models import Model

LOCAL_SWEEPS = Path("sweeps")
"""Where the folders of sweeps are that go to S3 as well."""
Resolve = Callable[[Mapping[str, object], str, Path], ReplayOptions]
"""Turns the options of a sweep file into those of a replay; (options, file for messages, folder of its paths)."""


def sweep(
    file: Path | None,
    *,
    resume: bool,
    folder: Path | None,
    dry_run: bool,
    out: Path,
    format_: str,
    names: Collection[str],
    instead: Mapping[str, str],
    resolve: Resolve,
) -> int:
    """Run a sweep, or go on with one; 0: all points are VALID, 3: some INVALID, 5: some TOO SMALL, 1: not all done."""
    spec = read_sweep(file, names, instead) if file is not None else None
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
    from harness.plan.build import asked_plan
    from harness.plan.rules import check_spec

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


# --- before ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run that is still to be done, and what it is expected to take."""

    name: str
    model: str | None
    tier: str | None
    replicas: int | None
    request_rate: float | None
    concurrency: int | None
    repeat: int
    seed: int
    requests: int
    hours: float
    usd: float | None
    assumed: bool
    """The pace of the server decides, which is assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPair:
    """The runs of one model on one tier, with the start of its servers."""

    model: str | None
    tier: str | None
    replicas: int | None
    runs: int
    start_up_hours: float
    hours: float
    usd_per_hour: float | None
    """Of all replicas; null without a price."""
    usd: float | None
    price_date: str | None
    price_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """``harness.sweep-plan/1``: what a sweep has still to do, against its budget."""

    schema: str
    name: str
    runs: list[PlannedRun]
    pairs: list[PlannedPair]
    hours: float
    usd: float | None
    spent_hours: float
    spent_usd: float | None
    budget_hours: float | None
    budget_usd: float | None
    fits: bool


def show_plan(state: SweepState, asked: PlanOptions, found: Survey, tiers: Sequence[Tier | None], format_: str) -> int:
    """Every run still to be done with its hours and dollars, per pair and in all, against the budget."""
    expected = expect(state.points, asked, found)
    todo = [point for point in state.points if point.state != "done"]
    runs: list[PlannedRun] = []
    groups: list[PlannedPair] = []
    for k, (pair, tier) in enumerate(zip(state.pairs, tiers, strict=True)):
        usd = usd_per_hour(pair, tier)
        mine = [point for point in todo if point.pair == k]
        for point in mine:
            guess = expected[point.name]
            runs.append(
                PlannedRun(
                    name=point.name, model=pair.model, tier=pair.tier, replicas=pair.replicas,
                    request_rate=point.level.request_rate, concurrency=point.level.concurrency, repeat=point.repeat,
                    seed=point.seed, requests=guess.requests, hours=guess.seconds / 3600,
                    usd=guess.seconds / 3600 * usd if tier else None, assumed=guess.assumed,
                )
            )  # fmt: skip
        starts = sum(turn == k for turn, _ in itertools.groupby(point.pair for point in todo))  # in turns: each time
        begin_h = starts * start_s(pair, tier) / 3600
        hours = begin_h + sum(expected[point.name].seconds for point in mine) / 3600
        groups.append(
            PlannedPair(
                model=pair.model, tier=pair.tier, replicas=pair.replicas, runs=len(mine), start_up_hours=begin_h,
                hours=hours, usd_per_hour=usd if tier else None, usd=hours * usd if tier else None,
                price_date=tier.date if tier else None, price_source=tier.source if tier else None,
            )
        )  # fmt: skip
    priced = any(tiers)
    spent_usd, spent_hours = state.spent(time.time())
    hours, spec = sum(g.hours for g in groups), state.spec
    usd_in_all = sum(g.usd or 0.0 for g in groups) if priced else None
    total = SweepPlan(
        schema="harness.sweep-plan/1", name=state.name, runs=runs, pairs=groups, hours=hours, usd=usd_in_all,
        spent_hours=spent_hours, spent_usd=spent_usd if priced else None,
        budget_hours=spec.budget_hours, budget_usd=spec.budget_usd,
        fits=(spec.budget_hours is None or hours + spent_hours <= spec.budget_hours)
        and (spec.budget_usd is None or usd_in_all is None or usd_in_all + spent_usd <= spec.budget_usd),
    )  # fmt: skip
    if format_ == "json":
        print_json(total)
    else:
        _print_plan(state, total)
    return EXIT_VALID


def _print_plan(state: SweepState, total: SweepPlan) -> None:
    words = {point.name: point.level.words for point in state.points}
    print_table(
        ("run", "load", "repeat", "requests", "minutes", "USD"),
        [
            (r.name, words[r.name], str(r.repeat), f"{r.requests:,}",
             f"{r.hours * 60:.1f}{' ?' if r.assumed else ''}", _usd(r.usd))
            for r in total.runs
        ],
    )  # fmt: skip
    print_table(
        ("model", "tier", "replicas", "runs", "start-up min", "hours", "USD/h", "price read", "USD"),
        [
            (g.model or "-", g.tier or "-", str(g.replicas), str(g.runs),
             f"{g.start_up_hours * 60:.1f}", f"{g.hours:.2f}",
             f"{g.usd_per_hour:.4g}" if g.usd_per_hour is not None else "-", g.price_date or "-", _usd(g.usd))
            for g in total.pairs
        ],
    )  # fmt: skip
    if any(r.assumed for r in total.runs):
        print("?: a closed loop without a duration is as fast as its server; 20 output tokens/s a request are assumed")
    print(f"{len(total.runs)} runs, {total.hours:.3g} h of servers, {_usd(total.usd)} USD")
    if total.spent_hours:
        print(f"spent so far: {total.spent_hours:.3g} h, {_usd(total.spent_usd)} USD")
    budgets = (
        ("h", total.budget_hours, total.hours + total.spent_hours),
        ("USD", total.budget_usd, (total.usd or 0.0) + (total.spent_usd or 0.0)),
    )
    for unit, budget, needed in budgets:
        if budget is not None:
            left = budget - needed
            what = f"budget {budget:g} {unit}"
            print(f"{what}: {'enough' if left >= 0 else f'{-left:.4g} short: what does not fit will be skipped'}")


# --- after -----------------------------------------------------------------------------------------------------------


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
        cost = _usd(usd if any(rental.tier for rental in state.rentals) else None)
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


def _usd(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if value < 10 else f"{value:,.2f}"


def _count(state: SweepState, which: str) -> int:
    return sum(point.state == which for point in state.points)
