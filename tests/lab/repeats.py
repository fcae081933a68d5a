"""Repeats of one plan: identical arrivals and lengths, another engine noise each time. What they share must not shrink.

Truth is the long-run value of the process. Each draw is a plan of its own, run three times on engines whose speed
differ from run to run (1 %) and from step to step (5 %); its figures are put together by
`analysis.stats.replicates`, once as repeats of one plan and, to show what that changes, once as if each run had been
asked something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from harness.analysis.stats.intervals import Quantity, distribution, rate, share
from harness.analysis.stats.replicates import over_replicates
from harness.cluster.simulator.fleet import Outcomes, Workload, simulate
from harness.cluster.simulator.step_time import LinearStep, NoisyStep
from tests.lab.intervals import memory
from tests.lab.processes import LIMITS, STEP, at_rate, workload
from tests.lab.table import Coverage, Row

REQUESTS_PER_S = 7.0
"""About 60 % of what the engine can do."""
SECONDS = 300.0
E2E_S = 1.0
"""A limit that most requests keep."""
RUNS = 3
BINS = 200
SPEED_SPREAD, STEP_SPREAD = 0.01, 0.05
START = 500
"""Requests of the long run before the queue is what it always is."""
FIGURES = ("tokens/s", "e2e mean", "e2e p95", "attainment")
Figures = dict[str, Quantity]


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """How often the interval over 1, 2 and 3 runs of one plan holds the long-run value."""
    truth = long_run(seed, requests=max(100_000, 500 * draws))
    one_by_one = partial(covered, truth=truth)
    seeds = range(seed + 1, seed + 1 + draws)
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            found = list(pool.map(one_by_one, seeds, chunksize=8))
    else:
        found = [one_by_one(one) for one in seeds]
    made = []
    for name in FIGURES:
        held = {runs: _coverage(found, name, runs, "one plan") for runs in range(1, RUNS + 1)}
        apart = _coverage(found, name, RUNS, "apart")
        holds = all(one.overlaps() for one in held.values())
        made.append(
            Row(
                item="5", claim=f"{name}: 95 % interval over repeats of one trace", truth="long-run value",
                claimed="; ".join(f"{runs} runs: {found}" for runs, found in held.items())
                + f"; taken for independent: {apart}",
                draws=draws, holds=holds,
            )
        )  # fmt: skip
    return made


def _coverage(found: list[dict[tuple[str, int, str], bool]], name: str, runs: int, how: str) -> Coverage:
    held = [one[name, runs, how] for one in found if (name, runs, how) in one]
    return Coverage(sum(held), len(held))


def covered(seed: int, truth: dict[str, float]) -> dict[tuple[str, int, str], bool]:
    """Of one plan: by figure, number of runs and rule, whether the interval holds the truth, where there is one."""
    plan = _plan(seed, round(REQUESTS_PER_S * SECONDS))
    measured = [figures(plan, [seed, run]) for run in range(RUNS)]
    found = {}
    for name in FIGURES:
        for runs in range(1, RUNS + 1):
            some = [one[name] for one in measured[:runs]]
            for how, plans in (("one plan", [0] * runs), ("apart", list(range(runs)))):
                if any(q.value is None for q in some):
                    continue
                q = over_replicates(some, plans=plans)
                if q.low is not None or q.high is not None:
                    above, below = q.low is None or q.low <= truth[name], q.high is None or truth[name] <= q.high
                    found[name, runs, how] = above and below
    return found


def long_run(seed: int, requests: int) -> dict[str, float]:
    """The long-run values, from one run of so many requests, its start left out."""
    plan = _plan(seed, requests)
    outcome = _serve(plan, [seed, 0], spread=0.0)
    e2e = (outcome.finished_s - outcome.due_s)[START:]
    return {
        "tokens/s": REQUESTS_PER_S * float((plan.input_tokens + plan.output_tokens).mean()),
        "e2e mean": float(e2e.mean()), "e2e p95": float(np.quantile(e2e, 0.95)),
        "attainment": float((e2e <= E2E_S).mean()),
    }  # fmt: skip


def figures(plan: Workload, seed: list[int]) -> Figures:
    """What a report would say of one run of the plan."""
    outcome = _serve(plan, seed, SPEED_SPREAD)
    tokens, finished_s = (plan.input_tokens + plan.output_tokens).astype(np.float64), outcome.finished_s
    e2e, evidence, queue = finished_s - outcome.due_s, "simulated", memory(plan, outcome)
    bin_s = SECONDS / BINS
    kept = finished_s < SECONDS  # the drain at the end is another study's
    per_bin = np.bincount((finished_s[kept] // bin_s).astype(np.int64), weights=tokens[kept], minlength=BINS)
    found = distribution(e2e, unit="s", evidence=evidence, owners=np.arange(len(e2e)), queue=queue)
    return {
        "tokens/s": rate(per_bin, bin_s, n=len(e2e), unit="tokens/s", evidence=evidence),
        "e2e mean": found.mean, "e2e p95": found.p95,
        "attainment": share(e2e <= E2E_S, unit="share of requests", evidence=evidence, queue=queue),
    }  # fmt: skip


def _plan(seed: int, requests: int) -> Workload:
    return at_rate(workload("poisson", requests, seed), REQUESTS_PER_S)


def _serve(plan: Workload, seed: list[int], spread: float) -> Outcomes:
    """What became of each request on an engine that is a little faster or slower than another."""
    factor = float(np.exp(spread * np.random.default_rng(seed).standard_normal()))
    step = LinearStep(STEP.base_s * factor, STEP.per_sequence_s * factor, STEP.per_prompt_token_s * factor)
    return simulate(plan, LIMITS, [NoisyStep(step, STEP_SPREAD, seed=seed[0] * 10 + seed[1])])


def main() -> Iterator[str]:
    """The rows of 400 draws, in words."""
    for row in rows(400, 0, 2):
        yield f"{row.claim}: {row.claimed}: {row.holds}"


if __name__ == "__main__":
    print(*main(), sep="\n")
