"""How often the audit says "not worse" of a candidate that is worse by the margin: records that come in sessions.

A flip takes its neighbours in the session along with the likeness of the case: with that probability a record follows
the session's own draw, else one of its own. Truth is the margin itself, where at most 2.5 % may be called not worse.
Weights, repeats of each record and a candidate that flips whole sessions are cases of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.quality.paired import ALPHA, Paired, paired
from tests.lab.table import Coverage, Row

MOST = 0.035
"""Claimed for 30 sessions and more."""


@dataclass(frozen=True, slots=True)
class Case:
    """Sessions, records in each (skewed: geometric of that mean), likeness, share of pairs that differ, margin."""

    sessions: int
    records: int
    alike: float
    discordance: float
    margin: float
    skewed: bool = False
    repeats: int = 1
    weighted: bool = False

    def __str__(self) -> str:
        kind = "".join(f", {name}" for name, on in (("skewed", self.skewed), ("weighted", self.weighted)) if on)
        more = f", {self.repeats} repeats" if self.repeats > 1 else ""
        return (
            f"{self.sessions} sessions of {self.records}, alike {self.alike:g}, {self.discordance:.0%} differ, "
            f"margin {100 * self.margin:g}{kind}{more}"
        )


CASES = (
    Case(30, 10, 0.3, 0.12, 0.05), Case(100, 3, 0.3, 0.06, 0.02), Case(100, 10, 0.3, 0.06, 0.02),
    Case(300, 1, 0.0, 0.06, 0.02), Case(60, 7, 0.3, 0.1, 0.03, skewed=True), Case(40, 20, 0.1, 0.15, 0.05),
    Case(100, 10, 1.0, 0.02, 0.02), Case(200, 10, 0.3, 0.02, 0.02), Case(40, 20, 0.3, 0.2, 0.05),
    Case(60, 10, 0.2, 0.15, 0.04, repeats=3), Case(60, 10, 0.2, 0.15, 0.04, weighted=True),
    Case(30, 30, 1.0, 0.02, 0.02),
)  # fmt: skip


def draw(case: Case, rng: np.random.Generator, difference: float) -> tuple[Floats, Floats, Ints, Floats | None]:
    """Grades of both models, session and weight of each record, of a candidate that differs by ``difference``."""
    sizes = np.full(case.sessions, case.records)
    if case.skewed:
        sizes = rng.geometric(1 / case.records, case.sessions)
    session = np.repeat(np.arange(case.sessions), sizes)
    n, shape = len(session), (case.repeats, len(session))
    worse, better = (case.discordance - difference) / 2, (case.discordance + difference) / 2
    shared = rng.random(shape) < np.sqrt(case.alike)
    luck = np.where(shared, rng.random((case.repeats, case.sessions))[:, session], rng.random(shape))
    flip = np.where(luck < worse, -1.0, np.where(luck < worse + better, 1.0, 0.0))
    current = np.where(flip < 0, 1.0, np.where(flip > 0, 0.0, rng.random(n) < 0.6))
    weight = rng.choice([0.5, 1.0, 4.0], n) if case.weighted else None
    return current.mean(axis=0), (current + flip).mean(axis=0), session, weight


def compared(case: Case, seed: int, difference: float) -> Paired:
    """One audit of the case."""
    found = paired(*draw(case, np.random.default_rng(seed), difference))
    assert found is not None
    return found


def called_not_worse(case: Case, draws: int, seed: int) -> Coverage:
    """How many of ``draws`` audits at the margin call the candidate not worse."""
    each = (compared(case, hash((seed, k)) & 0xFFFFFFFF, -case.margin) for k in range(draws))
    return Coverage(sum(one.p_worse_by(case.margin) <= ALPHA for one in each), draws)


def covered(case: Case, draws: int, seed: int) -> Coverage:
    """How many of ``draws`` intervals hold the true difference, half of the margin."""
    held = 0
    for k in range(draws):
        low, high = compared(case, hash((seed, k)) & 0xFFFFFFFF, -case.margin / 2).interval()
        held += low <= -case.margin / 2 <= high
    return Coverage(held, draws)


def rows(draws: int, seed: int, jobs: int) -> Sequence[Row]:
    """A line per case: error rate at the margin, and coverage."""
    with ProcessPoolExecutor(jobs) as pool:
        wrong = list(pool.map(partial(called_not_worse, draws=draws, seed=seed), CASES))
        held = list(pool.map(partial(covered, draws=draws, seed=seed), CASES))
    return [
        Row(
            item="12", claim=f"audit: not worse, {case}", truth=f"at most {MOST:.1%} wrong at the margin",
            claimed=f"wrong in {error}; intervals hold {cover}", draws=draws,
            holds=error.band[0] <= MOST and cover.band[1] >= 0.94,
        )
        for case, error, cover in zip(CASES, wrong, held, strict=True)
    ]  # fmt: skip
