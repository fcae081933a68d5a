"""How a fleet that follows the demand keeps a promise, by replay on an engine fitted to runs: simulated, not measured.

New instances take their share of what comes from when they answer; what waits elsewhere stays where it is. One that is
given back takes nothing more and ends what it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.arrays import Bools
from analysis.sizing.fitted_engine import Engine, FittedEngine, Requests, delayed, within
from analysis.sizing.fleet import Kept, Schedule
from analysis.sizing.simulated_fleet import STRETCH_S, even_s, resampled, share_by_minute, steps_of
from harness.slo import Criterion

MOST_STEPS = 20_000_000
"""Of one replay."""


def follow(
    fitted: FittedEngine, demand: Requests, factor: float, criteria: Sequence[Criterion], engine: Engine,
    plan: Schedule, *, spares: int = 0, per_instance: int = 1, seed: int = 0,
) -> Kept:  # fmt: skip
    """``factor`` times the demand on the instances that ``plan`` has up, and ``spares`` beside them.

    Of a demand that would take more than `MOST_STEPS`, half hours evenly spread over it are replayed.
    """
    began_s = demand.arrival_s[0]
    requests = demand.chosen(_affordable(demand, fitted, factor, per_instance * int(plan.target.max() + spares)))
    if factor != 1:
        requests = resampled(requests, factor, even_s(requests.arrival_s), np.random.default_rng([seed, 0]))
    replicas = (plan.up(requests.arrival_s - began_s) + spares) * per_instance
    owner = np.arange(len(requests)) % replicas
    served = delayed(engine(fitted, requests, int(replicas.max(initial=1)), owner), fitted.overhead_s)
    found = [(within(requests, served, one), one.wanted) for one in criteria]
    kept, wanted = min(found, key=lambda pair: float(pair[0].mean()) - pair[1])
    return Kept(
        share=float(kept.mean()), worst_minute=float(share_by_minute(requests.arrival_s, kept, wanted).min()),
        promised=all(bool(one.mean() >= least) for one, least in found), replayed=len(requests),
    )  # fmt: skip


def _affordable(demand: Requests, fitted: FittedEngine, factor: float, replicas: int) -> Bools:
    stretch = ((demand.arrival_s - demand.arrival_s[0]) // STRETCH_S).astype(np.int64)
    every = math.ceil(steps_of(demand, fitted, factor, replicas) / MOST_STEPS)
    return np.asarray(stretch % every == 0)
