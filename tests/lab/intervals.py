"""Intervals of one run, from half busy to the brink: how often they hold the long-run value of the same process.

A draw is what a run is: it starts at an idle server, requests come for 60 or 300 s, the server finishes them. Its
figures are those that a report makes, from the same arrays (`tests/test_relaxation.py` holds both against each other).
Truth is one long realisation of the process at the same rate, its start left out. Where the run is too short for its
queue there is no interval; coverage counts those that are printed, and their share stands beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis.intervals import Quantity, distribution, share
from analysis.relaxation import Relaxation, relaxation
from cluster.simulator.replica import Outcome, Workload
from tests.lab.processes import Floats, Process, at_rate, serve, workload
from tests.lab.table import Coverage, Row

BUSY = (0.5, 0.7, 0.85, 0.95)
"""Of the rate that the engine does with 64 in flight, `FULL`."""
FULL = 11.53
SECONDS = (60.0, 300.0)
KINDS: tuple[Process, ...] = ("poisson", "bursty")
BINS = 200
KEPT = (0.9, 0.968)
"""Limits on ttft that these shares of all requests keep."""
FIGURES = ("ttft p50", "ttft p95", "ttft p99", "e2e p50", "e2e p95", "e2e p99", "attainment 90 %", "attainment 97 %")
"""Rates and prices of an open loop have no interval."""
FEWEST = 0.06
"""A cell that prints less often than this is one where intervals are withheld: too few of them to be judged alone."""
MOST_BUSY, PRINTED = 0.7, 0.95
EVIDENCE = "simulated"


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of arrivals, load and length of run."""

    kind: Process
    busy: float
    seconds: float

    @property
    def rate(self) -> float:
        """Requests/s."""
        return self.busy * FULL


@dataclass(frozen=True, slots=True)
class Truth:
    """Sorted latencies of the long run, s."""

    ttft: Floats
    e2e: Floats

    def figure(self, name: str) -> float:
        """The long-run value of one of `FIGURES`."""
        metric, _, what = name.partition(" ")
        if metric == "attainment":
            return KEPT[what != "90 %"]
        values = self.ttft if metric == "ttft" else self.e2e
        return float(np.quantile(values, int(what[1:]) / 100))

    @property
    def limits(self) -> list[float]:
        """The limits on ttft that `KEPT` of all requests keep, s."""
        return [float(np.quantile(self.ttft, kept)) for kept in KEPT]


def long_run(kind: Process, busy: float, requests: int, seed: int) -> Truth:
    """One long realisation, its first tenth left out."""
    outcome = serve(at_rate(workload(kind, requests, seed), busy * FULL))
    start = requests // 10
    ttft, e2e = (at[start:] - outcome.due_s[start:] for at in (outcome.first_token_s, outcome.finished_s))
    return Truth(np.sort(ttft), np.sort(e2e))


def one_run(cell: Cell, seed: int) -> tuple[Workload, Outcome]:
    """What comes within the time of the cell, and what the engine makes of it."""
    many = round(1.6 * cell.rate * cell.seconds) + 400
    load = at_rate(workload(cell.kind, many, seed), cell.rate)
    n = int(np.searchsorted(load.arrival_s, cell.seconds))
    load = Workload(
        arrival_s=load.arrival_s[:n], input_tokens=load.input_tokens[:n], output_tokens=load.output_tokens[:n]
    )
    return load, serve(load)


def queue_and_figures(
    load: Workload, outcome: Outcome, limits: list[float]
) -> tuple[Relaxation | None, dict[str, Quantity]]:
    """What a report says of the run: the memory of its queue, and `FIGURES`."""
    due_s, finished_s = outcome.due_s, outcome.finished_s
    edges = np.linspace(due_s[0], finished_s.max(), BINS + 1)
    bin_s = float(edges[1] - edges[0])
    ends = np.asarray(outcome.step_end_s[0])
    begun = np.bincount(outcome.first_step, minlength=len(ends) + 1)
    over = np.bincount(outcome.first_step + load.output_tokens, minlength=len(ends) + 1)
    tokens_of_step = np.cumsum(begun[: len(ends)] - over[: len(ends)])
    queue = relaxation(
        in_flight=_in_flight(due_s, finished_s, edges),
        came=_binned(due_s, None, edges),
        work_came=_binned(due_s, load.output_tokens, edges),
        work_done=_binned(ends, tokens_of_step, edges),
        bin_s=bin_s,
    )
    ttft, e2e = outcome.first_token_s - due_s, finished_s - due_s
    owners = np.arange(len(due_s))
    found: dict[str, Quantity] = {}
    for name, values in (("ttft", ttft), ("e2e", e2e)):
        of = distribution(values, unit="s", evidence=EVIDENCE, owners=owners, queue=queue)
        found |= {f"{name} p50": of.p50, f"{name} p95": of.p95, f"{name} p99": of.p99}
    for name, limit in zip(("attainment 90 %", "attainment 97 %"), limits, strict=True):
        found[name] = share(ttft <= limit, unit="share of requests", evidence=EVIDENCE, queue=queue)
    return queue, found


def _binned(times_s: Floats, amounts: Floats | None, edges: Floats) -> Floats:
    place = ((times_s - edges[0]) / (edges[1] - edges[0])).astype(np.int64)
    return np.bincount(np.minimum(place, BINS - 1), weights=amounts, minlength=BINS).astype(np.float64)


def _in_flight(due_s: Floats, finished_s: Floats, edges: Floats) -> Floats:
    def passed(events_s: Floats) -> Floats:
        ordered = np.sort(events_s)
        count = np.searchsorted(ordered, edges, side="right")
        return edges * count - np.concatenate(([0.0], np.cumsum(ordered)))[count]

    return np.maximum(0.0, np.diff(passed(due_s) - passed(finished_s)) / (edges[1] - edges[0]))


def held(cell: Cell, truth: Truth, seed: int) -> dict[str, bool]:
    """By figure, where an interval is printed: whether it holds the truth."""
    _, found = queue_and_figures(*one_run(cell, seed), truth.limits)
    return {
        name: (q.low is None or q.low <= truth.figure(name)) and (q.high is None or truth.figure(name) <= q.high)
        for name, q in found.items()
        if q.value is not None and (q.low is not None or q.high is not None)
    }


def covered(draws: int, seed: int, jobs: int, requests: int) -> dict[Cell, dict[str, Coverage]]:
    """Coverage by cell and figure."""
    runs = range(seed + 1, seed + 1 + draws)
    kinds = list(itertools.product(KINDS, BUSY))
    found: dict[Cell, dict[str, Coverage]] = {}
    with ProcessPoolExecutor(jobs) as pool:
        truths = dict(zip(kinds, pool.map(partial(_long_run, requests=requests, seed=seed), kinds), strict=True))
        for (kind, busy), seconds in itertools.product(kinds, SECONDS):
            cell = Cell(kind, busy, seconds)
            each = list(pool.map(partial(held, cell, truths[kind, busy]), runs, chunksize=10))
            found[cell] = {name: _coverage([one[name] for one in each if name in one]) for name in FIGURES}
    return found


def _long_run(kind_busy: tuple[Process, float], requests: int, seed: int) -> Truth:
    return long_run(*kind_busy, requests, seed)


def _coverage(held: list[bool]) -> Coverage:
    return Coverage(sum(held), len(held))


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """A line for each kind of arrivals and length of run, and one for all together."""
    found = covered(draws, seed, jobs, requests=max(100_000, 2500 * draws))
    made = [_row(kind, seconds, found, draws) for kind, seconds in itertools.product(KINDS, SECONDS)]
    pooled = _coverage([])
    for cell in found.values():
        for one in cell.values():
            pooled = Coverage(pooled.held + one.held, pooled.draws + one.draws)
    low, high = pooled.band
    made.append(
        Row(
            item="4", claim="95 % intervals of one run, all cells and figures pooled", truth="long-run value",
            claimed=str(pooled), draws=draws * len(found), holds=low >= 0.93 and high <= 0.99,
        )
    )  # fmt: skip
    return made


def _row(kind: Process, seconds: float, found: dict[Cell, dict[str, Coverage]], draws: int) -> Row:
    cells = {cell: of for cell, of in found.items() if cell.kind == kind and cell.seconds == seconds}
    said, holds, judged = [], True, False
    for cell, of in cells.items():
        printed = max(one.draws for one in of.values()) / draws
        if printed < FEWEST:
            said.append(f"{cell.busy:.0%} busy: {printed:.0%} printed, withheld")
            continue
        judged = True
        outside = [f"{name} {one}" for name, one in of.items() if one.draws >= FEWEST * draws and not one.overlaps()]
        together = Coverage(sum(one.held for one in of.values()), sum(one.draws for one in of.values()))
        said.append(f"{cell.busy:.0%} busy: {printed:.0%} printed, {together.share:.1%} hold")
        if outside:
            said.append("outside: " + ", ".join(outside))
        holds &= not outside
        if kind == "poisson" and seconds == max(SECONDS) and cell.busy <= MOST_BUSY:
            holds &= printed >= PRINTED
    return Row(
        item="4", claim=f"95 % intervals of one run of {seconds:.0f} s, {kind}", truth="long-run value",
        claimed="; ".join(said), draws=draws * len(cells), holds=holds and judged,
    )  # fmt: skip


def main() -> Iterator[str]:
    """The rows of 300 draws, in words, and every cell."""
    for row in rows(300, 0, 2):
        yield f"{row.claim}: {row.claimed}: {row.holds}"


if __name__ == "__main__":
    print(*main(), sep="\n")
