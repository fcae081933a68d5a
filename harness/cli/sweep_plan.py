"""What a sweep has still to do, its hours and dollars against the budget: harness sweep --dry-run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.cli.output import print_json, print_table
from harness.errors import EXIT_VALID
from harness.options import PlanOptions
from harness.record.manifest import Tier
from harness.sweep.cost import Survey, expect, start_s, usd_per_hour
from harness.sweep.state import SweepState


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
             f"{r.hours * 60:.1f}{' ?' if r.assumed else ''}", usd_words(r.usd))
            for r in total.runs
        ],
    )  # fmt: skip
    print_table(
        ("model", "tier", "replicas", "runs", "start-up min", "hours", "USD/h", "price read", "USD"),
        [
            (g.model or "-", g.tier or "-", str(g.replicas), str(g.runs),
             f"{g.start_up_hours * 60:.1f}", f"{g.hours:.2f}",
             f"{g.usd_per_hour:.4g}" if g.usd_per_hour is not None else "-", g.price_date or "-", usd_words(g.usd))
            for g in total.pairs
        ],
    )  # fmt: skip
    if any(r.assumed for r in total.runs):
        print("?: a closed loop without a duration is as fast as its server; 20 output tokens/s a request are assumed")
    print(f"{len(total.runs)} runs, {total.hours:.3g} h of servers, {usd_words(total.usd)} USD")
    if total.spent_hours:
        print(f"spent so far: {total.spent_hours:.3g} h, {usd_words(total.spent_usd)} USD")
    budgets = (
        ("h", total.budget_hours, total.hours + total.spent_hours),
        ("USD", total.budget_usd, (total.usd or 0.0) + (total.spent_usd or 0.0)),
    )
    for unit, budget, needed in budgets:
        if budget is not None:
            left = budget - needed
            what = f"budget {budget:g} {unit}"
            print(f"{what}: {'enough' if left >= 0 else f'{-left:.4g} short: what does not fit will be skipped'}")


def usd_words(value: float | None) -> str:
    """Dollars to the cent, below ten of them finer; - where there is no price."""
    return "-" if value is None else f"{value:,.4f}" if value < 10 else f"{value:,.2f}"
