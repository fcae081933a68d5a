"""What comes to the engine of the laboratory: Poisson, bursty, diurnal and drifting arrivals, sessions that wait.

Times are on the trace's own clock, where a process has ``RATE`` requests/s in the mean; `at_rate` plays it faster or
slower, as a replay does, with everything in it, bursts too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from harness.cluster.simulator.fleet import Outcomes, Workload, simulate
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import LinearStep

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEP = LinearStep(base_s=0.020, per_sequence_s=0.0015, per_prompt_token_s=0.00002)
LIMITS = Limits(max_num_seqs=8)
"""The engine: 8 slots, a step of 20 ms + 1.5 ms for each sequence + 0.02 ms for each prompt token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What serves in the laboratory."""

    limits: Limits
    step: LinearStep


ENGINE = Engine(limits=LIMITS, step=STEP)
WIDE = Engine(
    limits=Limits(max_num_seqs=64),
    step=LinearStep(base_s=0.012, per_sequence_s=0.0004, per_prompt_token_s=0.00003),
)  # fmt: skip
"""Another: 64 slots, a step of 12 ms + 0.4 ms for each sequence + 0.03 ms for each prompt token."""

RATE = 4.0
Process = Literal["poisson", "bursty", "diurnal", "drifting"]
PROCESSES: tuple[Process, ...] = get_args(Process)

BURST = (3.0, 5.0)
"""Rate in a burst as a multiple of the mean, and the mean length of a burst on the trace's clock, s."""
QUIET = (0.5, 20.0)
SWING = 0.4
"""Of the diurnal rate about its mean; one period is the whole trace."""
TURNS = 5
"""Of a session."""
EASY = 0.15
"""Of a drifting trace, so much comes first, with answers a quarter as long as the rest's."""


def workload(process: Process, requests: int, seed: int, median_output: float = 16.0) -> Workload:
    """``requests`` requests of a process."""
    rng = np.random.default_rng([seed, PROCESSES.index(process)])
    arrival_s = _ARRIVALS[process](rng, requests)
    outputs = np.maximum(1, np.rint(rng.lognormal(np.log(median_output), 0.7, requests))).astype(np.int64)
    if process == "drifting":
        outputs[int(EASY * requests) :] *= 4
    inputs = np.maximum(1, np.rint(rng.lognormal(np.log(200), 0.8, requests))).astype(np.int64)
    return Workload(arrival_s=arrival_s, input_tokens=inputs, output_tokens=outputs)


def at_rate(load: Workload, rate: float, own_rate: float = RATE) -> Workload:
    """The same requests on another clock, so that a process of ``own_rate`` requests/s has ``rate``."""
    return replace(load, arrival_s=load.arrival_s * (own_rate / rate))


def serve(load: Workload, until_s: float = np.inf, engine: Engine = ENGINE) -> Outcomes:
    """What an engine of the laboratory makes of it."""
    return simulate(load, engine.limits, [engine.step], until_s=until_s)


def sessions(requests: int, seed: int, turns: int = TURNS, think_s: float = 2.0) -> Workload:
    """Sessions of ``turns`` requests that wait for each other, their first turns Poisson."""
    rng = np.random.default_rng([seed, 99])
    load = workload("poisson", requests, seed)
    starts = np.cumsum(rng.exponential(turns / RATE, -(-requests // turns)))
    number = np.arange(requests) % turns
    after = np.where(number == 0, -1, np.arange(requests) - 1)
    arrival_s = np.repeat(starts, turns)[:requests]
    return replace(load, arrival_s=arrival_s, after=after, think_s=rng.exponential(think_s, requests))


def recorded(load: Workload) -> Workload:
    """Sessions that wait as a trace has them: in the order in which the laboratory's engine got their turns."""
    assert load.after is not None and load.think_s is not None
    arrival_s = serve(load).due_s
    order = np.argsort(arrival_s, kind="stable")
    place = np.argsort(order)
    after = np.where(load.after[order] >= 0, place[load.after[order]], -1)
    return Workload(
        arrival_s=arrival_s[order], input_tokens=load.input_tokens[order], output_tokens=load.output_tokens[order],
        after=after, think_s=load.think_s[order],
    )  # fmt: skip


def _poisson(rng: np.random.Generator, n: int) -> Floats:
    return np.cumsum(rng.exponential(1 / RATE, n))


def _bursty(rng: np.random.Generator, n: int) -> Floats:
    """Two states, each of exponential length; rates are multiples that average to 1 over both."""
    times: list[Floats] = []
    count, now_s, state = 0, 0.0, int(rng.random() < BURST[1] / (BURST[1] + QUIET[1]))
    while count < n:
        multiple, mean_s = (QUIET, BURST)[state]
        length_s = rng.exponential(mean_s)
        arrivals = rng.poisson(multiple * RATE * length_s)
        times.append(now_s + np.sort(rng.random(arrivals)) * length_s)
        count, now_s, state = count + arrivals, now_s + length_s, 1 - state
    return np.concatenate(times)[:n]


def _diurnal(rng: np.random.Generator, n: int) -> Floats:
    """A sine over the whole trace, from its trough on, by inversion of the cumulated rate."""
    span_s = n / RATE
    grid = np.linspace(0, span_s, 20_001)
    phase = 2 * np.pi * grid / span_s
    cumulated = RATE * (grid - SWING * np.sin(phase) * span_s / (2 * np.pi))
    return np.interp(np.cumsum(rng.exponential(1, n)), cumulated, grid, right=span_s)


_ARRIVALS: dict[Process, Callable[[np.random.Generator, int], Floats]] = {
    "poisson": _poisson, "bursty": _bursty, "diurnal": _diurnal, "drifting": _poisson,
}  # fmt: skip
