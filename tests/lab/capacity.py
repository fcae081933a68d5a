"""The search for capacity against the truth: its own decisions and estimates, the planner's windows, the lab's engine.

Truth: the rate at which the wanted share of all requests of a process keeps the SLO, from a dozen long realisations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np

from analysis.intervals import Quantity
from analysis.sizing.backlog import Demand
from analysis.sizing.capacity import Point
from analysis.sizing.crossing import Evidence
from analysis.sizing.search import Estimate, Probe, Step, Worked, estimate, next_load
from analysis.stability import only_grew
from cluster.simulator.replica import Workload, simulate
from harness.slo import Criterion
from tests.lab.processes import LIMITS, RATE, STEP, Floats, Ints, Process, at_rate, serve, workload
from tests.lab.table import Coverage, Row

LIMIT_S = 1.0
P95 = Criterion(name="ttft_p95 <= 1 s", wanted=0.95, limits={"ttft": LIMIT_S})
PROBE_S, WINDOWS, WARMUP = 60.0, 3, 0.15
SHORTEST_WINDOW_S = 15.0
REQUESTS = 20_000
TRUTHS = {"poisson": 9.654, "bursty": 3.612, "diurnal": 7.414}
"""req/s, from `truth`, which takes half a minute for each; tests/test_lab.py makes one of them again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one search said, and what it took."""

    found: Estimate | None
    server_s: float
    probes: int
    narrow: bool


def kept_share(process: Process, rate: float, seeds: range) -> float:
    """Share of all requests of long realisations that keep the limit at a rate."""
    kept = total = 0
    for seed in seeds:
        load = workload(process, REQUESTS, seed)
        found = serve(at_rate(load, rate))
        kept += int(np.sum(found.first_token_s - found.due_s <= LIMIT_S))
        total += len(load)
    return kept / total


@cache
def truth(process: Process, realisations: int = 12) -> float:
    """The rate at which 95 % of all requests keep the limit, req/s."""
    low, high = 1.0, 12.0
    for _ in range(12):
        middle = (low + high) / 2
        kept = kept_share(process, middle, range(900, 900 + realisations))
        low, high = (middle, high) if kept >= P95.wanted else (low, middle)
    return (low + high) / 2


def rows_of(load: Workload, rows: Ints, arrival_s: Floats) -> Workload:
    """Some requests of a trace at times of their own."""
    return Workload(arrival_s=arrival_s, input_tokens=load.input_tokens[rows], output_tokens=load.output_tokens[rows])


def windows(load: Workload, rate: float, seconds: float, draw: int, rng: np.random.Generator) -> tuple[Workload, Ints]:
    """A probe's requests and the window of each: stretches from all parts of the trace, each with its own gaps."""
    speed, span_s, place = rate / RATE, float(load.arrival_s[-1]), (0.5 + draw * 0.6180339887498949) % 1
    count = max(1, min(WINDOWS, int(seconds / SHORTEST_WINDOW_S)))
    length_s = seconds / count * speed
    starts = [min(span_s * (((k + place) / count) % 1), span_s - length_s) for k in range(count)]
    rng.shuffle(starts)
    times, rows, number = [], [], []
    for k, start_s in enumerate(starts):
        first, last = np.searchsorted(load.arrival_s, [start_s, start_s + length_s])
        times.append((load.arrival_s[first:last] - start_s) / speed + k * seconds / count)
        rows.append(np.arange(first, last))
        number.append(np.full(last - first, k))
    return rows_of(load, np.concatenate(rows), np.concatenate(times)), np.concatenate(number)


def quantity(value: float, n: int = 1) -> Quantity:
    return Quantity(value=value, low=value, high=value, n=n, unit="", evidence="simulated")


def probe(
    load: Workload, step: Step, draw: int, rng: np.random.Generator, limit_s: float = LIMIT_S
) -> tuple[Probe, float]:
    """One probe as `harness capacity` makes it, and the seconds it took of the server."""
    if step.concurrency is not None:
        return rung(load, step.concurrency, rng, limit_s)
    assert step.rate is not None
    warm_s = WARMUP * PROBE_S
    end_s = PROBE_S + warm_s
    sent, window = windows(load, step.rate, end_s, draw, rng)
    found = simulate(sent, LIMITS, [STEP])
    kept = found.first_token_s - found.due_s <= limit_s
    measured = sent.arrival_s >= warm_s
    unstable = only_grew(sent.arrival_s, found.finished_s, warm_s, end_s)
    done = (found.finished_s >= warm_s) & (found.finished_s < end_s)
    share = float(kept[measured].mean()) if measured.any() else 1.0
    evidence = Evidence(
        rate=step.rate, sent=demand_of(sent), measured=measured, kept=(kept[measured],), window=window[measured],
        unstable=unstable,
    )  # fmt: skip
    point = Point(
        load=step.rate, kept=(quantity(share),), unstable=unstable,
        rates={"request_throughput": quantity(float(done.sum()) / PROBE_S)},
    )  # fmt: skip
    worked = worked_of(sent, done, PROBE_S)
    took_s = min(float(np.nanmax(found.finished_s)), end_s + 10) if len(sent) else end_s
    return Probe(rate=step.rate, concurrency=None, point=point, used=1.0, evidence=evidence, worked=worked), took_s


def rung(load: Workload, slots: int, rng: np.random.Generator, limit_s: float) -> tuple[Probe, float]:
    """A rung of the ladder, with rows from all parts of the trace."""
    seconds, ramp_s, count = PROBE_S / 2, 3.0, 1 + 60 * slots
    first = np.linspace(0, len(load) - count // WINDOWS - 1, WINDOWS).astype(np.int64)
    first = np.maximum(0, first - int(rng.integers(0, len(load) // WINDOWS)))
    rows = np.concatenate([np.arange(a, min(a + -(-count // WINDOWS), len(load))) for a in first])
    rng.shuffle(rows)
    sent = rows_of(load, rows, np.zeros(len(rows)))
    found = simulate(sent, LIMITS, [STEP], concurrency=slots, until_s=seconds)
    came = np.isfinite(found.due_s)
    done = np.isfinite(found.finished_s) & (found.finished_s >= ramp_s)
    kept = found.first_token_s[came] - found.due_s[came] <= limit_s
    rate = float(done.sum()) / (seconds - ramp_s)
    point = Point(load=slots, kept=(quantity(float(kept.mean())),), rates={"request_throughput": quantity(rate)})
    used = float(np.nanquantile((found.first_token_s - found.due_s)[came], P95.wanted)) / max(limit_s, 1e-9)
    worked = worked_of(sent, done, seconds - ramp_s)
    return Probe(rate=None, concurrency=slots, point=point, used=used, worked=worked), seconds


def demand_of(load: Workload) -> Demand:
    return Demand(
        arrival_s=load.arrival_s, input_tokens=load.input_tokens.astype(float),
        output_tokens=load.output_tokens.astype(float),
    )  # fmt: skip


def worked_of(load: Workload, done: np.ndarray, seconds: float) -> Worked:
    return Worked(
        seconds=seconds, requests=int(done.sum()), input_tokens=float(load.input_tokens[done].sum()),
        output_tokens=float(load.output_tokens[done].sum()),
    )  # fmt: skip


def search(process: Process, seed: int, budget_s: float = math.inf, tolerance: float = 0.1) -> Answer:
    """One whole search on a trace of its own; ``budget_s``: of server time."""
    load, rng = workload(process, REQUESTS, seed), np.random.default_rng([seed, 7])
    demand, probes, spent_s, opened = demand_of(load), [], 0.0, 0
    while True:
        step = next_load(probes, (P95,), tolerance, demand)
        if (step.rate is None and step.concurrency is None) or spent_s + PROBE_S > budget_s:
            return Answer(estimate(probes, (P95,), demand), spent_s, len(probes), step.narrow)
        found, took_s = probe(load, step, opened, rng)
        opened += step.rate is not None
        probes.append(found)
        spent_s += took_s


def _search(asked: tuple[Process, int, float, float]) -> Answer:
    return search(*asked)


def searches(process: Process, draws: int, seed: int, budget_s: float, tolerance: float, jobs: int) -> list[Answer]:
    """Many searches, each on a trace of its own."""
    asked = [(process, 1000 * seed + k, budget_s, tolerance) for k in range(draws)]
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


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """Lines of the table."""
    made = []
    for process, true in TRUTHS.items():
        told = judge(searches(process, draws, seed, math.inf, 0.1, jobs), true)  # type: ignore[arg-type]
        covered = told["coverage"]
        assert isinstance(covered, Coverage)
        good = covered.overlaps() and abs(float(told["mean error"])) <= 0.03 and float(told["half width"]) <= 0.15  # type: ignore[arg-type]
        made.append(
            Row(
                item="3", claim=f"capacity of a search, {process}", truth=f"{true:g} req/s",
                claimed=(
                    f"95 % intervals hold it in {covered}; mean error {told['mean error']:+.1%}, rms "
                    f"{told['rms error']:.1%}; half-width {told['half width']:.1%} (median), "
                    f"{told['with interval']:.0%} have one; {told['server s']:.0f} s of servers"
                ),
                draws=draws, holds=bool(good),
            )
        )  # fmt: skip
    return made
