"""Closed loops of answers with a heavy tail: how often rates, prices and latencies of one run hold the long-run value.

A draw is a run as `harness saturate` makes it: so many requests in flight for 60 or 300 s, then nothing more is sent
and what is in flight ends. Truth is a loop of the same concurrency over 10^6 requests, its start and its end left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from harness.analysis.stats.intervals import Quantity, distribution, rate, share
from harness.analysis.stats.relaxation import ClosedLoop
from harness.analysis.steady import steady_rate, steady_window
from harness.cluster.simulator.fleet import Outcomes, Workload, simulate
from tests.lab import truths
from tests.lab.intervals import PRINTED, coverage, outside, together
from tests.lab.processes import LIMITS, STEP, Floats
from tests.lab.series import BINS, binned, in_flight, tokens_of_steps
from tests.lab.table import Coverage, Row

CONCURRENCY = (4, 8, 16)
"""Below, at and above the slots of the engine."""
SECONDS = (60.0, 300.0)
SPREAD = 1.2
"""Of the logarithm of the answers' lengths: the longest 1 % make a seventh of all tokens."""
KEPT = (0.9, 0.99)
"""Limits on e2e and on ttft that these shares of all requests keep."""
FIGURES = (
    "output tokens/s", "tokens/s", "output tokens/s, steady", "tokens/s, steady", "e2e mean", "e2e p50", "e2e p95",
    "e2e p99", "ttft p50", "ttft p95", "tpot p50", "tpot p95", "tpot p99", "e2e attainment 90 %", "e2e attainment 99 %",
    "ttft attainment 90 %", "ttft attainment 99 %",
)  # fmt: skip
EVIDENCE = "simulated"


@dataclass(frozen=True, slots=True)
class Loop:
    """One closed loop."""

    concurrency: int
    seconds: float


def answers(requests: int, seed: int) -> Workload:
    """``requests`` requests in the order in which slots take them."""
    rng = np.random.default_rng([seed, 77])
    outputs = np.maximum(1, np.rint(rng.lognormal(np.log(16), SPREAD, requests))).astype(np.int64)
    inputs = np.maximum(1, np.rint(rng.lognormal(np.log(200), 0.8, requests))).astype(np.int64)
    return Workload(arrival_s=np.zeros(requests), input_tokens=inputs, output_tokens=outputs)


def first(load: Workload, n: int) -> Workload:
    """Its first ``n`` requests."""
    return Workload(
        arrival_s=load.arrival_s[:n], input_tokens=load.input_tokens[:n], output_tokens=load.output_tokens[:n]
    )


def one_run(loop: Loop, seed: int) -> tuple[Workload, Outcomes]:
    """What a run of so many seconds sent, and what became of it."""
    load = answers(round(14 * loop.seconds) + 200, seed)
    sent = simulate(load, LIMITS, [STEP], concurrency=loop.concurrency, until_s=loop.seconds).replica >= 0
    assert not sent.all()
    load = first(load, int(sent.sum()))
    return load, simulate(load, LIMITS, [STEP], concurrency=loop.concurrency)


def latencies(load: Workload, outcome: Outcomes) -> dict[str, Floats]:
    """s, NaN where it is not defined."""
    later = load.output_tokens - 1
    decode_s = outcome.finished_s - outcome.first_token_s
    return {
        "e2e": outcome.finished_s - outcome.due_s, "ttft": outcome.first_token_s - outcome.due_s,
        "tpot": np.where(later > 0, decode_s / np.maximum(later, 1), np.nan),
    }  # fmt: skip


def long_run(case: tuple[int, int, int]) -> truths.Figures:
    """Of (concurrency, requests, seed): `FIGURES` without the attainments, and the limits that `KEPT` keep."""
    concurrency, requests, seed = case
    load = answers(requests, seed)
    outcome = simulate(load, LIMITS, [STEP], concurrency=concurrency)
    start = requests // 10
    begin_s, end_s = float(outcome.due_s[start]), float(outcome.due_s[-1])
    ends_s, tokens = tokens_of_steps(load, outcome)
    out = float(tokens[(ends_s > begin_s) & (ends_s <= end_s)].sum())
    read = (outcome.first_token_s > begin_s) & (outcome.first_token_s <= end_s)
    into = float(load.input_tokens[read].sum())
    found = {"output tokens/s": out / (end_s - begin_s), "tokens/s": (out + into) / (end_s - begin_s)}
    for name, values in latencies(load, outcome).items():
        known = values[start:][np.isfinite(values[start:])]
        found[f"{name} mean"] = float(known.mean())
        for p in (0.5, 0.95, *KEPT):
            found[f"{name} p{100 * p:.4g}"] = float(np.quantile(known, p))
    return found


def figures(load: Workload, outcome: Outcomes, concurrency: int, truth: truths.Figures) -> dict[str, Quantity]:
    """What a report says of the run; limits are those of the truth."""
    end_s = float(outcome.finished_s.max())
    edges = np.linspace(0.0, end_s, BINS + 1)
    bin_s, n = end_s / BINS, len(load)
    out = binned(*tokens_of_steps(load, outcome), edges)
    every = out + binned(outcome.first_token_s, load.input_tokens, edges)
    steady = steady_window(in_flight(outcome.due_s, outcome.finished_s, edges), every, start_s=0.0, bin_s=bin_s)
    found = {}
    for name, per_bin in (("output tokens/s", out), ("tokens/s", every)):
        found[name] = rate(per_bin, bin_s, n=n, unit="tokens/s", evidence=EVIDENCE)
        if steady.found:
            part = per_bin[steady.first : steady.last]
            found[f"{name}, steady"] = steady_rate(part, bin_s, n=n, unit="tokens/s", evidence=EVIDENCE)
    queue = ClosedLoop(concurrency=concurrency)
    for name, values in latencies(load, outcome).items():
        of = distribution(values, unit="s", evidence=EVIDENCE, owners=np.arange(n), queue=queue, waits=name == "ttft")
        found |= {f"{name} mean": of.mean, f"{name} p50": of.p50, f"{name} p95": of.p95, f"{name} p99": of.p99}
        for kept in KEPT:
            met = ~(values > truth[f"{name} p{100 * kept:.4g}"])
            found[f"{name} attainment {kept:.0%}".replace("%", " %")] = share(
                met, unit="share", evidence=EVIDENCE, queue=queue
            )
    return found


def true_value(name: str, truth: truths.Figures) -> float:
    """The long-run value of a figure."""
    if "attainment" in name:
        return int(name.split()[2]) / 100
    return truth[name.removesuffix(", steady")]


def held(loop: Loop, truth: truths.Figures, seed: int) -> dict[str, bool]:
    """By figure with an interval: whether it holds the truth. A price has the ends of its rate, turned over."""
    found = {}
    for name, q in figures(*one_run(loop, seed), loop.concurrency, truth).items():
        if q.value is not None and (q.low is not None or q.high is not None):
            true = true_value(name, truth)
            found[name] = (q.low is None or q.low <= true) and (q.high is None or true <= q.high)
    return found


def known_truths(concurrencies: Sequence[int], mapper: truths.Mapper = map) -> dict[int, truths.Figures]:
    """Of each concurrency, from `truths.REQUESTS` requests."""
    engine = f"{truths.REQUESTS} requests, spread {SPREAD:g}, seed {truths.SEED}, {STEP}, {LIMITS}"
    cases = {f"closed loop, {one} in flight, {engine}": (one, truths.REQUESTS, truths.SEED) for one in concurrencies}
    return dict(zip(concurrencies, truths.long_run_values(cases, long_run, mapper), strict=True))


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """A line for each concurrency and length, and one for all together."""
    runs = range(1000 * seed + 1, 1000 * seed + 1 + draws)
    found = {}
    with ProcessPoolExecutor(jobs) as pool:
        of = known_truths(CONCURRENCY, pool.map)
        for concurrency, seconds in itertools.product(CONCURRENCY, SECONDS):
            loop = Loop(concurrency, seconds)
            each = list(pool.map(partial(held, loop, of[concurrency]), runs, chunksize=10))
            found[loop] = {name: coverage([one[name] for one in each if name in one]) for name in FIGURES}
    made = [_row(loop, cover, draws) for loop, cover in found.items()]
    pooled = together(one for cover in found.values() for one in cover.values())
    low, high = pooled.band
    made.append(
        Row(
            item="4", claim="95 % intervals of one closed loop, all cells and figures pooled", truth="long-run value",
            claimed=str(pooled), draws=draws * len(found), holds=low >= 0.93 and high <= 0.99,
        )
    )  # fmt: skip
    return made


def _row(loop: Loop, found: dict[str, Coverage], draws: int) -> Row:
    money = together(one for name, one in found.items() if "tokens/s" in name)
    rest = together(one for name, one in found.items() if "tokens/s" not in name)
    seldom = ", ".join(f"{name} {one.draws / draws:.0%}" for name, one in found.items() if one.draws < PRINTED * draws)
    missed = outside(found, draws)
    return Row(
        item="4",
        claim=f"95 % intervals of one closed loop of {loop.seconds:.0f} s, {loop.concurrency} in flight (8 slots)",
        truth="long-run value",
        claimed=f"rates and prices: {money}; latencies and attainments: {rest}; printed in 95 % of runs or more"
        + (f" but {seldom}" if seldom else "")
        + ("; outside: " + ", ".join(missed) if missed else ""),
        draws=draws,
        holds=not missed,
    )
