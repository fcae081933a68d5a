"""The search for capacity against the truth: its own decisions and estimates, the planner's windows, the lab's engine.

Truth: the rate at which the wanted share of all requests of a process keeps the SLO, from a dozen long realisations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np

from harness.analysis.capacity.backlog import Demand
from harness.analysis.capacity.crossing import Evidence
from harness.analysis.capacity.probes import window_of, worked_between
from harness.analysis.capacity.search import Estimate, Probe, Step, Worked, estimate, next_load, settling_s
from harness.analysis.capacity.sweep import LoadPoint
from harness.analysis.stats.intervals import Quantity
from harness.analysis.steady import only_grew
from harness.cli.runner.capacity import RUNG, WARMUP, WINDOWS, window_count
from harness.cluster.simulator.fleet import Outcomes, Workload, simulate
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import LinearStep
from harness.plan.file import Windows
from harness.plan.windows import windows_in_time
from harness.slo import Criterion
from harness.trace.stats import mean_rate
from tests.lab.processes import (
    ENGINE,
    WIDE,
    Engine,
    Floats,
    Ints,
    Process,
    at_rate,
    recorded,
    serve,
    sessions,
    workload,
)
from tests.lab.table import Coverage, Row

LIMIT_S = 1.0
P95 = Criterion(name="ttft_p95 <= 1 s", wanted=0.95, limits={"ttft": LIMIT_S})
PROBE_S = 60.0
REQUESTS = 20_000


SLOW = Engine(
    limits=Limits(max_num_seqs=32, max_num_batched_tokens=2048),
    step=LinearStep(base_s=0.030, per_sequence_s=0.0008, per_prompt_token_s=0.0001),
)  # fmt: skip
"""Prompts are dear: 32 slots, 2,048 tokens in a step of 30 ms + 0.8 ms a sequence + 0.1 ms a prompt token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is searched: traces of one kind before one engine, and the capacity that is true."""

    trace: Callable[[int], Workload]
    """By seed."""
    true: float
    """req/s, from `truth`; tests/test_lab.py makes one of them again."""
    whole: Callable[[int], Workload] | None = None
    """A realisation for the truth, where it is no trace; None: the same."""
    engine: Engine = ENGINE


def _process(process: Process, true: float) -> Case:
    return Case(trace=partial(workload, process, REQUESTS), true=true)


def sessions_trace(seed: int) -> Workload:
    """Sessions that wait, as a trace has them."""
    return recorded(sessions(REQUESTS, seed))


CASES = {
    "poisson": _process("poisson", 9.654),
    "bursty": _process("bursty", 3.612),
    "diurnal": _process("diurnal", 7.414),
    "drifting": _process("drifting", math.nan),
    "sessions": Case(trace=sessions_trace, whole=partial(sessions, REQUESTS), true=9.548),
    "slow": Case(trace=partial(workload, "bursty", REQUESTS, median_output=50.0), true=2.386, engine=SLOW),
    "wide": Case(trace=partial(workload, "poisson", REQUESTS, median_output=100.0), true=11.005, engine=WIDE),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one search said, and what it took."""

    found: Estimate | None
    server_s: float
    probes: int
    narrow: bool


def kept_share(case: Case, rate: float, seeds: range) -> float:
    """Share of all requests of long realisations that keep the limit at a rate."""
    kept = total = 0
    for seed in seeds:
        load = (case.whole or case.trace)(seed)
        found = serve(at_rate(load, rate), engine=case.engine)
        kept += int(np.sum(found.first_token_s - found.due_s <= LIMIT_S))
        total += len(load)
    return kept / total


def truth(case: Case, realisations: int = 12) -> float:
    """The rate at which 95 % of all requests keep the limit, req/s."""
    low, high = 1.0, 24.0
    for _ in range(13):
        middle = (low + high) / 2
        kept = kept_share(case, middle, range(900, 900 + realisations))
        low, high = (middle, high) if kept >= P95.wanted else (low, middle)
    return (low + high) / 2


def rows_of(load: Workload, rows: Ints, arrival_s: Floats) -> Workload:
    """Some requests of a trace at times of their own."""
    return Workload(arrival_s=arrival_s, input_tokens=load.input_tokens[rows], output_tokens=load.output_tokens[rows])


def windows(load: Workload, rate: float, seconds: float, draw: int, rng: np.random.Generator) -> tuple[Workload, Ints]:
    """A probe's requests and the window of each, as the planner takes them from the trace."""
    arrivals = np.rint((load.arrival_s - load.arrival_s[0]) * 1e9).astype(np.int64)
    own, n = mean_rate(arrivals), len(arrivals)
    assert own is not None
    speed = rate / own
    joined = windows_in_time(
        arrivals, Windows(count=window_count(seconds, waits=load.after is not None), draw=draw),
        starts=None if load.after is None else arrivals[first_turns(load)], lasts_ns=seconds * 1e9 * speed, speed=speed,
        trace_sha256=hashlib.sha256(arrivals.tobytes()).hexdigest(), seed=int(rng.integers(2**31)), most=None,
    )  # fmt: skip
    rows = joined.arrangement.rows
    if rows is None:
        rows = np.concatenate([(w.first_row + np.arange(w.requests)) % n for w in joined.windows])
    sent = rows_of(load, rows, joined.arrangement.scheduled / speed / 1e9)
    if load.after is not None and load.think_s is not None:
        sessions = joined.arrangement.part.astype(np.int64) * n + first_turns(load)[rows]
        sent = replace(sent, after=previous(sessions), think_s=load.think_s[rows])
    return sent, window_of(sent.arrival_s, [window.starts_s or 0.0 for window in joined.windows])


def first_turns(load: Workload) -> Ints:
    """Of each request, the one that its session begins with."""
    first = np.arange(len(load))
    while load.after is not None and np.any(waits := load.after[first] >= 0):
        first = np.where(waits, load.after[first], first)
    return first


def previous(sessions: Ints) -> Ints:
    """Of each request, the one before it of its session; -1: none."""
    order = np.argsort(sessions, kind="stable")
    before = np.full(len(sessions), -1)
    same = sessions[order][1:] == sessions[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    return before


def quantity(value: float, n: int = 1) -> Quantity:
    return Quantity(value=value, low=value, high=value, n=n, unit="", evidence="simulated")


def probe(
    load: Workload,
    step: Step,
    draw: int,
    rng: np.random.Generator,
    limit_s: float = LIMIT_S,
    engine: Engine = ENGINE,
    settles_s: float = 0.0,
) -> tuple[Probe, float]:
    """One probe as `harness capacity` makes it, and the seconds it took of the server."""
    if step.concurrency is not None:
        return rung(load, step.concurrency, rng, limit_s, engine)
    assert step.rate is not None
    warm_s = max(WARMUP * PROBE_S, settles_s)
    end_s = PROBE_S + warm_s
    sent, window = windows(load, step.rate, end_s, draw, rng)
    found = serve(sent, engine=engine)
    kept = found.first_token_s - found.due_s <= limit_s
    measured = (sent.arrival_s >= warm_s) & (found.due_s < end_s)
    unstable = only_grew(sent.arrival_s, found.finished_s, warm_s, end_s)
    done = (found.finished_s >= warm_s) & (found.finished_s < end_s)
    share = float(kept[measured].mean()) if measured.any() else 1.0
    evidence = Evidence(
        rate=step.rate, sent=demand_of(sent), measured=measured, kept=(kept[measured],), window=window[measured],
        unstable=unstable,
    )  # fmt: skip
    point = LoadPoint(
        load=step.rate, kept=(quantity(share),), unstable=unstable,
        rates={"request_throughput": quantity(float(done.sum()) / PROBE_S)},
    )  # fmt: skip
    worked = worked_of(sent, found, warm_s, end_s)
    took_s = min(float(np.nanmax(found.finished_s)), end_s + 10) if len(sent) else end_s
    return Probe(rate=step.rate, concurrency=None, point=point, used=1.0, evidence=evidence, worked=worked), took_s


def rung(
    load: Workload, slots: int, rng: np.random.Generator, limit_s: float, engine: Engine
) -> tuple[Probe, float]:  # fmt: skip
    """A rung of the ladder, with rows from all parts of the trace."""
    seconds, ramp_s, count = RUNG * PROBE_S, 3.0, 1 + 60 * slots
    first = np.linspace(0, len(load) - count // WINDOWS - 1, WINDOWS).astype(np.int64)
    first = np.maximum(0, first - int(rng.integers(0, len(load) // WINDOWS)))
    rows = np.concatenate([np.arange(a, min(a + -(-count // WINDOWS), len(load))) for a in first])
    rng.shuffle(rows)
    sent = rows_of(load, rows, np.zeros(len(rows)))
    found = simulate(sent, engine.limits, [engine.step], concurrency=slots, until_s=2 * seconds)
    came = found.due_s < seconds  # those in flight then are answered, too
    done = (found.finished_s >= ramp_s) & (found.finished_s < seconds)
    kept = found.first_token_s[came] - found.due_s[came] <= limit_s
    rate = float(done.sum()) / (seconds - ramp_s)
    point = LoadPoint(load=slots, kept=(quantity(float(kept.mean())),), rates={"request_throughput": quantity(rate)})
    used = float(np.nanquantile((found.first_token_s - found.due_s)[came], P95.wanted)) / max(limit_s, 1e-9)
    worked = worked_of(sent, found, ramp_s, seconds)
    return Probe(rate=None, concurrency=slots, point=point, used=used, worked=worked), seconds


def demand_of(load: Workload) -> Demand:
    return Demand(
        arrival_s=load.arrival_s, input_tokens=load.input_tokens.astype(float),
        output_tokens=load.output_tokens.astype(float),
        into_session_s=None if load.after is None else load.arrival_s - load.arrival_s[first_turns(load)],
        after=load.after,
    )  # fmt: skip


def worked_of(load: Workload, found: Outcomes, first_s: float, last_s: float) -> Worked:
    return worked_between(
        first_s, last_s, found.first_token_s, found.finished_s, load.input_tokens.astype(float),
        load.output_tokens.astype(float),
    )  # fmt: skip


def search(case: Case, seed: int, budget_s: float = math.inf, tolerance: float = 0.1) -> Answer:
    """One whole search on a trace of its own; ``budget_s``: of server time."""
    load, rng = case.trace(seed), np.random.default_rng([seed, 7])
    demand, probes, spent_s, opened = demand_of(load), [], 0.0, 0
    while True:
        step = next_load(probes, (P95,), tolerance, demand)
        if (step.rate is None and step.concurrency is None) or spent_s + PROBE_S > budget_s:
            return Answer(estimate(probes, (P95,), demand), spent_s, len(probes), step.narrow)
        found, took_s = probe(load, step, opened, rng, engine=case.engine, settles_s=settling_s(probes))
        opened += step.rate is not None
        probes.append(found)
        spent_s += took_s


def _search(asked: tuple[Case, int, float, float]) -> Answer:
    return search(*asked)


def searches(case: Case, draws: int, seed: int, budget_s: float, tolerance: float, jobs: int) -> list[Answer]:
    """Many searches, each on a trace of its own."""
    asked = [(case, 1000 * seed + k, budget_s, tolerance) for k in range(draws)]
    if jobs == 1:
        return [_search(one) for one in asked]
    with get_context("spawn").Pool(jobs) as pool:
        return pool.map(_search, asked, chunksize=4)


def judge(answers: list[Answer], true: float) -> dict[str, float | Coverage]:
    """Error of the point, coverage of the interval, its width and what it took."""
    found = [a.found for a in answers if a.found is not None]
    off = np.array([f.rate / true - 1 for f in found])
    closed = [f for f in found if f.low is not None and f.high is not None]
    widths = [f.half_width for f in closed if f.half_width is not None]
    return {
        "answered": len(found) / len(answers), "with interval": len(closed) / len(answers),
        "mean error": float(off.mean()), "rms error": float(np.sqrt((off**2).mean())),
        "coverage": Coverage(sum(bool(f.low <= true <= f.high) for f in closed), len(closed)),
        "too high": float(np.mean([f.low > true for f in closed])) if closed else math.nan,
        "half width": float(np.median(widths)) if widths else math.nan,
        "server s": float(np.mean([a.server_s for a in answers])),
        "probes": float(np.mean([a.probes for a in answers])),
    }  # fmt: skip


def done_rate(case: Case) -> float:
    """What the engine gets done when it never idles, req/s: without the tenth that fills it and the one that drains."""
    load = case.trace(900)
    slots = 4 * case.engine.limits.max_num_seqs
    found = simulate(replace(load, after=None), case.engine.limits, [case.engine.step], concurrency=slots)
    first_s, last_s = np.quantile(found.finished_s, [0.1, 0.9])
    return float(0.8 * len(load) / (last_s - first_s))


def row(
    item: str, claim: str, case: Case, draws: int, seed: int, jobs: int, per: float = 1.0, unit: str = "req/s"
) -> Row:
    """A line of the table. ``per``: ``unit`` in a request/s."""
    answers = searches(case, draws, seed, math.inf, 0.1, jobs)
    told, done = judge(answers, case.true), done_rate(case)
    covered, error, width = told["coverage"], told["mean error"], told["half width"]
    assert isinstance(covered, Coverage) and isinstance(error, float) and isinstance(width, float)
    highest = max(one.found.rate for one in answers if one.found is not None)
    good = covered.overlaps() and abs(error) <= 0.03 and width <= 0.15 and highest <= done
    return Row(
        item=item, claim=claim, truth=f"{case.true * per:.4g} {unit}",
        claimed=(
            f"95 % intervals hold it in {covered}; mean error {error:+.1%}, rms "
            f"{told['rms error']:.1%}; half-width {width:.1%} (median), "
            f"{told['with interval']:.0%} have one; the highest is {highest * per:.4g} of {done * per:.4g} that the "
            f"engine gets done; {told['server s']:.0f} s of servers"
        ),
        draws=draws, holds=good,
    )  # fmt: skip


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """Lines of the table."""
    made = [
        row("3", f"capacity of a search, {name}", CASES[name], draws, seed, jobs)
        for name in ("poisson", "bursty", "diurnal")
    ]
    return [
        *made,
        row("3", "capacity of a search, another engine (64 slots)", CASES["wide"], draws, seed, jobs),
        row("3", "capacity of a search, bursty, dear prompts (32 slots)", CASES["slow"], draws, seed, jobs),
    ]
