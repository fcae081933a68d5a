"""Runs that were too short for intervals say how long a run must be: one that is so long prints them, and they cover.

A draw is a run as in `tests.lab.intervals`; where it has no interval, another one as long as its note says, or of
`LONGEST_S` where that is shorter: what is enough then would be enough later. To leave long advice out would judge the
short alone, which is that of runs that saw a light load by luck. Advice that no length is enough is not enough.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tests.lab.intervals import (
    FIGURES,
    Cell,
    Truth,
    coverage,
    held,
    known_truths,
    one_run,
    outside,
    queue_and_figures,
    together,
)
from tests.lab.table import Coverage, Row

CELLS = (
    Cell("bursty", 0.5, 60.0), Cell("bursty", 0.7, 60.0), Cell("bursty", 0.7, 300.0), Cell("bursty", 0.85, 300.0),
    Cell("poisson", 0.85, 60.0), Cell("poisson", 0.95, 300.0),
)  # fmt: skip
"""Where most runs have no interval."""
LONGEST_S = 4 * 3600.0
"""Longer advice is followed for so long: most need less, and it counts as not enough where they do not."""
AS_ADVISED = 0.8
"""The advice is to be enough in four of five runs."""
APART = 500_000
"""Between the seeds of a run and of the longer one."""


@dataclass(frozen=True, slots=True)
class Told:
    """What came of one run without an interval."""

    needed_s: float
    """As printed; inf: no length was said to be enough."""
    held: dict[str, bool] | None
    """Of the longer run, by figure with an interval; None: it was not made, since no length was said to be enough."""


def followed(cell: Cell, truth: Truth, seed: int) -> Told | None:
    """One run and, where it has no interval, one as long as it says; None: it has intervals."""
    queue, _ = queue_and_figures(*one_run(cell, seed), truth.limits)
    if queue is None or queue.enough:
        return None
    if queue.needed_s is None:
        return Told(math.inf, None)
    needed_s = math.ceil(queue.needed_s / 60) * 60.0 if queue.needed_s >= 90 else queue.needed_s
    return Told(needed_s, held(replace(cell, seconds=min(needed_s, LONGEST_S)), truth, seed + APART))


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """A line for each of `CELLS`."""
    made = []
    with ProcessPoolExecutor(jobs) as pool:
        of = known_truths(list(dict.fromkeys((cell.kind, cell.busy) for cell in CELLS)), pool.map)
        for cell in CELLS:
            runs = range(1000 * seed + 1, 1000 * seed + 1 + draws)
            told = pool.map(partial(followed, cell, of[cell.kind, cell.busy]), runs, chunksize=5)
            made.append(_row(cell, [one for one in told if one is not None], draws))
    return made


def _row(cell: Cell, told: list[Told], draws: int) -> Row:
    made = [one.held for one in told if one.held is not None]
    found = {name: coverage([one[name] for one in made if name in one]) for name in FIGURES}
    printed = Coverage(sum(bool(one) for one in made), len(told))
    cut = sum(LONGEST_S < one.needed_s < math.inf for one in told)
    low, middle, high = (
        float(np.quantile([one.needed_s for one in told], q, method="nearest")) for q in (0.1, 0.5, 0.9)
    )
    missed = outside(found, len(made))
    return Row(
        item="4",
        claim=f"a run as long as one of {cell.seconds:.0f} s without intervals says, {cell.kind}, {cell.busy:.0%} busy",
        truth="long-run value",
        claimed=f"{len(told)} of {draws} had none and ask for {_minutes(middle)} (median; {_minutes(low)} to "
        f"{_minutes(high)} in 80 %); of all {len(told)}, run as long as they ask (the {cut} that ask for more than "
        f"{_minutes(LONGEST_S)} so long, and the {len(told) - len(made)} that take no length for enough not at all: "
        f"not printed), {printed.share:.0%} print, at least {AS_ADVISED:.0%} wanted; "
        f"{together(found.values()).share:.1%} hold" + ("; outside: " + ", ".join(missed) if missed else ""),
        draws=len(told),
        holds=printed.band[1] >= AS_ADVISED and not missed,
    )


def _minutes(seconds: float) -> str:
    return "any length in vain" if math.isinf(seconds) else f"{seconds / 60:,.0f} min"
