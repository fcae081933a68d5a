"""Fleets that follow the demand, on the true engine: an autoscaler that knows nothing of the planner.

Policy, as `harness plan-fleet` states it. After each minute it counts what came, and wants what the busiest of the last
ten minutes needed; a new replica answers ``start_s`` later; what is too much goes at once, the newest first. Scheduled:
the same with the whole day known, asked for so early that it answers in time.
"""

from __future__ import annotations

import math

import numpy as np

from harness.cluster.simulator.elastic import Elastic, PlannedReplicas
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import NoisyStep, StepTime

HOLD = 10
DRAWS = 5
"""Of the engine's noise."""


def kept(
    load: Workload, each: float, amounts: np.ndarray, start_s: float, limits: Limits, step: StepTime, spread: float,
    ttft_s: float, *, ahead: bool,
) -> float:  # fmt: skip
    """Share of requests whose first token came within ``ttft_s``, mean over `DRAWS`.

    ``each``: what one replica carries, per second, in the unit of ``amounts``, which each request asks for.
    """
    wanted = _wanted(load.arrival_s, each, amounts, start_s, ahead=ahead)
    began_s = float(load.arrival_s[0])
    fleet = Elastic(
        start_s=0.0 if ahead else start_s,
        scaling=PlannedReplicas(at_s=[began_s + 60.0 * m for m in range(len(wanted))], replicas=wanted),
    )  # fmt: skip
    shares = []
    for draw in range(DRAWS):
        steps = [NoisyStep(step, spread, 5000 + 1000 * draw + r) for r in range(wanted[0])]
        served = simulate(load, limits, steps, elastic=fleet)
        shares.append(float(np.mean(served.first_token_s - load.arrival_s <= ttft_s)))
    return float(np.mean(shares))


def _wanted(arrival_s: np.ndarray, each: float, amounts: np.ndarray, start_s: float, *, ahead: bool) -> list[int]:
    """Replicas in each minute from the first arrival on."""
    since_s = arrival_s - arrival_s[0]
    minutes = int(since_s[-1] // 60) + 1
    needed = []
    for minute in range(minutes):
        here = (since_s >= 60 * minute) & (since_s < 60 * (minute + 1))
        needed.append(max(1, math.ceil(float(amounts[here].sum()) / 60 / each - 1e-9)))
    early = math.ceil(start_s / 60)
    first = max(needed[: early + 1]) if ahead else needed[0]
    seen = [needed[max(0, m - HOLD) : m + early + 1 if ahead else m] for m in range(1, minutes)]
    return [first, *(max(one) for one in seen)]
