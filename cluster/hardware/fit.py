"""Step times fitted to runs of one's own, by simulating those runs (`fit`).

Each load is served again in virtual time as it was sent: slot by slot in a closed loop, at the times of sending in an
open one. What is compared is the logarithm of every request's TTFT and of its time from first to last token. The
numbers sought are positive, so they are moved in their logarithms: Gauss and Newton's steps with central differences,
each load and metric of equal weight, outliers held back (soft L1). Standard errors are those of a jackknife over
blocks of requests that followed each other, which share steps, or those of the fitted engine measured again and again,
whichever are larger. A number whose standard error is too large is not told by the runs: it is left where it was, and
said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.step_time import NoisyStep

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MOVED = 0.05
"""How far a number is moved to either side to see what it does, relative."""
ROUNDS, KEPT = 14, 8
"""Of these rounds the last few are averaged: who meets whom in a busy engine changes with every number a little, so
that the answers jump, and the rounds never come to rest. How far they still differ is part of the standard error.
"""
CLOSE = 1e-4
"""Of a logarithm: a round that moves every number by less is at rest."""
LARGEST_MOVE = 0.7
"""Of a logarithm in one round."""
SCALES = (0.02, 0.3)
"""Least and largest spread that a load's residuals are taken to have: what a perfect load may weigh, and a poor one."""
BLOCKS = 10
"""Of each load, for the jackknife, at most; as many as have `GENERATIONS` of its slots, and at least `FEWEST_BLOCKS`.
"""
GENERATIONS, FEWEST_BLOCKS = 3, 5
DRAWS, NOISE = 10, 0.05
"""Times that the fitted engine is measured, with steps that are so noisy."""
MOST_ERROR = 0.35
"""Standard error of a logarithm from which on a number counts as not told."""
MOST_CONDITION = 30.0
"""Of the sensitivities, each scaled to length 1 (Belsley, Kuh, Welsch 1980), as for every fit here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One measured run: what was sent, and what came of it. Arrays by request, in the order in which they were due."""

    name: str
    sent_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    concurrency: int | None
    """Slots of a closed loop; None: an open loop, which sends at ``sent_s``."""
    ttft_s: Floats
    """From sending to the first token; NaN: not measured, or warm-up."""
    decode_s: Floats
    """From the first token to the last; NaN: not measured, or of one token."""
    finished_s: Floats
    """End of each answer, on the clock of ``sent_s``; NaN: not measured."""
    replicas: int = 1
    keys: Sequence[Sequence[int]] | None = None
    """Of each prompt, its blocks that others share (`blocks.block_keys`)."""

    def __len__(self) -> int:
        return len(self.sent_s)

    @property
    def logarithms(self) -> Floats:
        """Logarithms of both, [2, request]."""
        return _logs(self.ttft_s, self.decode_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a simulated engine makes of a load."""

    due_s: Floats
    ttft_s: Floats
    decode_s: Floats
    finished_s: Floats


Build = Callable[[Mapping[str, float]], HardwareEngine]
"""The engine with these numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number to find."""

    name: str
    start: float
    """Where the search begins; positive."""
    otherwise: float
    """What it is taken to be where the runs do not tell it."""
    needed: bool = False
    """Never given up; its standard error may then be larger than `MOST_ERROR`, which is for the caller to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What was found."""

    values: dict[str, float]
    """Of every number, those that are not told among them."""
    errors: dict[str, float]
    """Relative standard errors of those that are told."""
    not_told: dict[str, float]
    """Relative standard errors of the others, when they were given up; inf: others did the same as it."""
    condition: float
    """Of the sensitivities to those that are told; `MOST_CONDITION` at most, unless the needed ones are so."""


def serve(load: Load, engine: HardwareEngine) -> Served:
    """The load on the engine, in virtual time."""
    delays = engine.arrival_s or engine.arrival_per_token_s
    found = simulate(
        Workload(
            arrival_s=load.sent_s, input_tokens=load.input_tokens, output_tokens=load.output_tokens, keys=load.keys,
            delay_s=np.asarray(engine.arrival_s + engine.arrival_per_token_s * load.input_tokens) if delays else None,
        ),
        engine.limits, [engine.step_time] * load.replicas, router="least in flight", concurrency=load.concurrency,
    )  # fmt: skip
    return Served(
        due_s=found.due_s, ttft_s=found.first_token_s - found.due_s, finished_s=found.finished_s,
        decode_s=found.finished_s - found.first_token_s,
    )  # fmt: skip


def fit(loads: Sequence[Load], build: Build, numbers: Sequence[Number]) -> Fit:
    """The numbers with which the simulated loads are most like the measured ones."""
    values = {one.name: one.start for one in numbers}
    sought = list(numbers)
    not_told: dict[str, float] = {}
    while True:
        values, jumps, slopes, left = _search(loads, build, values, [one.name for one in sought])
        square, _ = _totals(_sums(slopes, left, [1] * len(loads)))
        engine = build(values)
        spread = np.maximum(_jackknife(loads, slopes, left), _drawn_again(loads, engine, slopes, left))
        spread, condition = np.hypot(spread, jumps), _condition(square)
        poor = [k for k, one in enumerate(sought) if not one.needed]
        if condition > MOST_CONDITION and poor:
            # that one without which the others are told apart best; by itself it is not told at all
            worst = min(poor, key=lambda k: _condition(np.delete(np.delete(square, k, 0), k, 1)))
            spread[worst] = np.inf
        elif poor := [k for k in poor if not spread[k] <= MOST_ERROR]:
            worst = max(poor, key=spread.__getitem__)
        else:
            break
        given_up = sought.pop(worst)
        not_told[given_up.name] = float(spread[worst])
        values |= {one.name: one.start for one in sought} | {given_up.name: given_up.otherwise}
    errors = {one.name: float(s) for one, s in zip(sought, spread, strict=True)}
    return Fit(values=values, errors=errors, not_told=not_told, condition=condition)


def _condition(square: Floats) -> float:
    """Condition number of sensitivities, each scaled to length 1, whose products are ``square``."""
    lengths = np.sqrt(np.maximum(np.diag(square), 1e-300))
    values = np.linalg.eigvalsh(square / lengths / lengths[:, None]) if len(square) else np.ones(1)
    return float(np.sqrt(values[-1] / max(values[0], 1e-18)))


def _search(
    loads: Sequence[Load], build: Build, values: Mapping[str, float], names: Sequence[str]
) -> tuple[dict[str, float], Floats, list[Floats], list[Floats]]:
    """Values at the best place and how far the rounds still differ (standard error of a logarithm, [number]); of each
    load d log(answer) / d log(number), [number, 2, request], and what is left of the measured logarithms, [2, request].
    """
    at = dict(values)

    def answers(changed: Mapping[str, float]) -> list[Floats]:
        engine = build({**at, **changed})
        return [_logs(found.ttft_s, found.decode_s) for found in (serve(load, engine) for load in loads)]

    width = np.log((1 + MOVED) / (1 - MOVED))
    kept: list[tuple[Floats, list[Floats], list[Floats]]] = []
    for k in range(ROUNDS):
        left = [load.logarithms - found for load, found in zip(loads, answers({}), strict=True)]
        ends = [[answers({name: at[name] * (1 + sign * MOVED)}) for sign in (1, -1)] for name in names]
        slopes = [
            np.array([(high[j] - low[j]) / width for high, low in ends]).reshape(len(names), *left[j].shape)
            for j in range(len(loads))
        ]
        kept = [*kept[1 - KEPT :], (np.log([at[name] for name in names]), slopes, left)]
        if not names or k + 1 == ROUNDS:
            break
        move = np.clip(_solve(slopes, left), -LARGEST_MOVE, LARGEST_MOVE)
        if np.abs(move).max() < CLOSE:
            kept = kept[-1:]
            break
        at.update({name: at[name] * float(np.exp(step)) for name, step in zip(names, move, strict=True)})
    places = np.array([place for place, _, _ in kept])
    at.update(zip(names, np.exp(places.mean(axis=0)).tolist(), strict=True))
    jumps = places.std(axis=0, ddof=1) / np.sqrt(len(kept)) if len(kept) > 1 else np.zeros(len(names))
    slopes, left = ([np.mean(one, axis=0) for one in zip(*(found[j] for found in kept), strict=True)] for j in (1, 2))
    return at, jumps, slopes, left


def _logs(ttft_s: Floats, decode_s: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.array([ttft_s, decode_s]))
    return np.where(np.isfinite(logs), logs, np.nan)


def _weights(left: Sequence[Floats]) -> list[Floats]:
    """Of each residual; 0 for one that was not measured."""
    found = []
    for part in left:
        weights = np.zeros_like(part)
        for k, residuals in enumerate(part):
            good = np.isfinite(residuals)
            if good.any():
                spread = 1.4826 * np.median(np.abs(residuals[good] - np.median(residuals[good])))
                scale = float(np.clip(spread, *SCALES))
                soft = 1 / np.sqrt(1 + (residuals[good] / (2 * scale)) ** 2)
                weights[k, good] = soft / scale**2 / np.count_nonzero(good)
        found.append(weights)
    return found


def _sums(
    slopes: Sequence[Floats], left: Sequence[Floats], blocks: Sequence[int], weights: Sequence[Floats] | None = None
) -> list[tuple[Floats, Floats]]:
    """Of each load the two sides of the normal equations, [block, number, number] and [block, number].

    ``weights``: of each residual; None: those that ``left`` makes.
    """
    found = []
    for slope, residuals, weight, count in zip(slopes, left, weights or _weights(left), blocks, strict=True):
        n = residuals.shape[1]
        good = np.isfinite(residuals) & np.isfinite(slope).all(axis=0)
        weight = np.where(good, weight, 0.0)
        slope, residuals = np.where(good, slope, 0.0), np.where(good, residuals, 0.0)
        edges = np.arange(count) * n // count
        squares = np.add.reduceat(np.einsum("akr,bkr,kr->abr", slope, slope, weight), edges, axis=2)
        sides = np.add.reduceat(np.einsum("akr,kr,kr->ar", slope, residuals, weight), edges, axis=1)
        found.append((np.moveaxis(squares, 2, 0), sides.T))
    return found


def _solve(slopes: Sequence[Floats], left: Sequence[Floats]) -> Floats:
    return _solved(*_totals(_sums(slopes, left, [1] * len(left))))


def _totals(sums: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.sum([one.sum(axis=0) for one, _ in sums], axis=0), np.sum([two.sum(axis=0) for _, two in sums], axis=0)


def _solved(square: Floats, side: Floats) -> Floats:
    small = 1e-9 * np.trace(square) / max(1, len(side))
    return np.asarray(np.linalg.lstsq(square + small * np.eye(len(side)), side, rcond=None)[0])


def _jackknife(loads: Sequence[Load], slopes: Sequence[Floats], left: Sequence[Floats]) -> Floats:
    """Standard errors of the logarithms: how the solution moves when a block of a load is left out.

    Larger for few blocks, so that 2 of them are 95 % whatever their number.
    """
    blocks = [
        min(len(load), max(FEWEST_BLOCKS, min(BLOCKS, len(load) // (GENERATIONS * (load.concurrency or 1)))))
        for load in loads
    ]
    sums = _sums(slopes, left, blocks)
    square, side = _totals(sums)
    variance = np.zeros(len(side))
    for squares, sides in sums:
        n = len(sides)
        moves = np.array([_solved(square - squares[k], side - sides[k]) for k in range(n)])
        variance += _student(n - 1) ** 2 * (n - 1) / n * ((moves - moves.mean(axis=0)) ** 2).sum(axis=0)
    return np.asarray(np.sqrt(variance))


def _drawn_again(
    loads: Sequence[Load], engine: HardwareEngine, slopes: Sequence[Floats], left: Sequence[Floats]
) -> Floats:  # fmt: skip
    """Standard errors of the logarithms by another way: how the solution moves when the fitted engine is measured.

    Its steps are noisy, so who meets whom is drawn anew each time. Blocks of one run have that in common.
    """
    if not slopes or not len(slopes[0]):
        return np.zeros(0)
    draws: list[list[Floats]] = [[] for _ in loads]
    for k in range(DRAWS):
        noisy = replace(engine, step_time=NoisyStep(engine.step_time, NOISE, k))
        for found, load in zip(draws, loads, strict=True):
            served = serve(load, noisy)
            found.append(np.where(np.isfinite(load.logarithms), _logs(served.ttft_s, served.decode_s), np.nan))
    centres = [np.mean(found, axis=0) for found in draws]
    weights, moves = _weights(left), []
    for k in range(DRAWS):
        apart = [found[k] - centre for found, centre in zip(draws, centres, strict=True)]
        moves.append(_solved(*_totals(_sums(slopes, apart, [1] * len(loads), weights))))
    return np.asarray(_student(DRAWS - 1) * np.std(moves, axis=0, ddof=1))


def _student(free: int) -> float:
    """How many times wider 95 % of Student's distribution are than those of the normal one (Abramowitz, Stegun
    26.7.5), at 2 degrees of freedom and more.
    """
    z, n = 1.96, max(2, free)
    return 1 + (z**2 + 1) / (4 * n) + (5 * z**4 + 16 * z**2 + 3) / (96 * n**2)
