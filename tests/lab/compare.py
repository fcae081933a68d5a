"""Item 10: what `harness compare` says of one system measured twice, where each run has a speed of its own.

The truth is planted: every run's engine is faster or slower by a lognormal factor of 1 % (restarts, neighbours, the
day), each of its steps by one of 5 %. A is B, so each difference that is shown is false.
"""

from __future__ import annotations

import functools
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harness.analysis.compare.compare import JUDGED, compare, parse_gate
from harness.analysis.compare.paired import PairedRun
from harness.analysis.metrics import Window
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.cluster.simulator.fleet import simulate
from harness.cluster.simulator.step_time import LinearStep, NoisyStep
from tests.lab.processes import LIMITS, STEP, at_rate, workload
from tests.lab.table import Coverage, Row
from tests.run_files import SPEC, TIER, good, write_run

RUN_TO_RUN = 0.01
STEP_TO_STEP = 0.05
REQUESTS = 320
RATE = 6.0
"""Requests/s of the open loop: this engine is then about half busy."""
MOVED = 1.05
"""How slow B is where there is something to find."""


@functools.cache
def template(mode: str) -> Summary:
    """A summary to fill: its tier, its SLO and its kind of loop."""
    spec = replace(SPEC, mode=mode, concurrency=8 if mode == "closed" else None, slo={"ttft": 5.0})
    with tempfile.TemporaryDirectory() as folder:
        path = write_run(Path(folder) / "run", [good(i) for i in range(40)], spec=spec, tier=TIER)
        found = summarise(read_run(path))
    return replace(found, verdict="VALID", reasons=[])


def run(mode: str, seed: int, name: str, slower: float = 1.0) -> PairedRun:
    """One run of the system. ``seed``: of its requests, which both sides of a pair share; ``name``: of all else."""
    rng = np.random.default_rng([seed, *name.encode()])
    factor = slower * float(np.exp(RUN_TO_RUN * rng.standard_normal()))
    step = NoisyStep(
        LinearStep(STEP.base_s * factor, STEP.per_sequence_s * factor, STEP.per_prompt_token_s * factor),
        STEP_TO_STEP, int(rng.integers(2**31)),
    )  # fmt: skip
    load = at_rate(workload("poisson", REQUESTS, seed), RATE)
    served = simulate(load, LIMITS, [step], concurrency=8 if mode == "closed" else None)
    due, first, end = served.due_s, served.first_token_s, served.finished_s
    later = np.maximum(load.output_tokens - 1, 1)
    tpot = np.where(load.output_tokens > 1, (end - first) / later, np.nan)
    begin, over = float(due.min()), float(end.max())
    summary = template(mode)
    every = np.ones(REQUESTS, dtype=np.bool_)
    return PairedRun(
        summary=replace(
            summary, run=name, plan=replace(summary.plan, seed=seed),
            window=Window(rule="whole", start_s=begin, end_s=over, duration_s=over - begin),
        ),
        request_id=np.arange(REQUESTS), finished_s=end,
        tokens=(load.input_tokens + load.output_tokens).astype(float),
        planned_input_tokens=load.input_tokens.astype(float), planned_output_tokens=load.output_tokens.astype(float),
        offered=every, success=every, met=first - due <= 5.0,
        latency={"ttft": first - due, "tpot": tpot, "e2e": end - due},
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one comparison said."""

    judged: int
    """Figures that were judged."""
    shown: tuple[str, ...]
    """Those that show a difference."""
    gate: str
    """What became of ``cost > +2%`` or, in an open loop, ``e2e_p50 > +2%``."""


def compared(mode: str, pairs: int, draw: int, slower: float = 1.0) -> Found:
    """One comparison of ``pairs`` pairs; B is ``slower`` times as slow as A."""
    seeds = [draw * 100 + k for k in range(pairs)]
    sides = [[run(mode, seed, f"{who}{seed}", by) for seed in seeds] for who, by in (("a", 1.0), ("b", slower))]
    gate = parse_gate("cost > +2%" if mode == "closed" else "e2e_p50 > +2%")
    made = compare(*sides, [gate])
    assert made.comparable, made.reasons
    (load,) = made.loads
    judged = [f for f in load.figures if f.verdict in JUDGED]
    shown = tuple(f.name for f in judged if f.verdict != "no difference shown")
    return Found(judged=len(judged), shown=shown, gate=load.gates[0].outcome)


def draw_all(mode: str, pairs: int, draws: int, seed: int, jobs: int, slower: float = 1.0) -> list[Found]:
    """Many comparisons, on ``jobs`` processes."""
    one = functools.partial(compared, mode, pairs, slower=slower)
    which = range(seed * draws, (seed + 1) * draws)
    if jobs <= 1:
        return [one(k) for k in which]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(one, which, chunksize=4))


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """Comparisons of a system with itself, and of one with another that is 5 % slower."""
    return [*closed_rows(draws, seed, jobs), *_rows("open", draws, seed, jobs)]


def closed_rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """Those of closed loops, where cost is judged, too."""
    return _rows("closed", draws, seed, jobs)


def _rows(mode: str, draws: int, seed: int, jobs: int) -> list[Row]:
    single = draw_all(mode, 1, draws, seed, jobs)
    same = draw_all(mode, 3, draws, seed, jobs)
    other = draw_all(mode, 3, draws, seed, jobs, slower=MOVED)
    figures = Coverage(sum(len(found.shown) for found in same), sum(found.judged for found in same))
    any_ = Coverage(sum(bool(found.shown) for found in same), draws)
    failed = Coverage(sum(found.gate == "fails" for found in same), draws)
    seen = Coverage(sum(bool(found.shown) for found in other), draws)
    where = f"{mode} loop"
    no_difference = "A is B, 1 % from run to run"
    return [
        Row(
            item="10", claim=f"{where}: one pair has no verdict", truth=no_difference, draws=draws,
            claimed=f"{sum(found.judged for found in single)} verdicts", holds=not any(f.judged for f in single),
        ),
        Row(
            item="10", claim=f"{where}: three pairs, comparisons in which any figure shows a difference",
            truth=f"{no_difference}: at most about 5 %", claimed=str(any_), draws=draws, holds=any_.band[0] <= 0.05,
        ),
        Row(
            item="10", claim=f"{where}: three pairs, figures that show a difference",
            truth=f"{no_difference}: at most about 5 %", claimed=str(figures), draws=draws, holds=figures.share <= 0.05,
        ),
        Row(
            item="10", claim=f"{where}: three pairs, --fail-if '... > +2%' fails", truth=no_difference,
            claimed=str(failed), draws=draws, holds=failed.band[0] <= 0.025,
        ),
        Row(
            item="10", claim=f"{where}: three pairs show a difference", truth="B takes 5 % longer", claimed=str(seen),
            draws=draws, holds=seen.share >= 0.5,
        ),
    ]  # fmt: skip
