"""The constants of `cluster.hardware.kernels`, fitted by simulating.

Soft-L1 on the logarithms of TTFT and TPOT (scale 0.1), in the logarithms of the constants. Few Gauss-Newton steps, each
from one simulation of every row with every constant moved by a tenth; the sensitivities found for all rows serve for
fits that leave some of them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from harness.cluster.hardware.kernels import Constants

Floats = npt.NDArray[np.float64]
R = TypeVar("R")
NAMES = tuple(asdict(Constants()))
MOVED = 0.1
SCALE = 0.1
PRIOR = 0.5
"""Standard deviation of a constant's logarithm around where the fit begins: keeps one that the rows do not show."""

Simulate = Callable[[R, Constants], tuple[float, float]]
"""TTFT and TPOT of a row."""


def simulate_all(simulate: Simulate[R], rows: Sequence[R], constants: Constants, pool: ProcessPoolExecutor) -> Floats:
    """TTFT and TPOT of every row, [row, 2]."""
    return np.array(list(pool.map(partial(simulate, constants=constants), rows, chunksize=4)))


def sensitivities(simulate: Simulate[R], rows: Sequence[R], at: Constants, pool: ProcessPoolExecutor) -> Floats:
    """d log(TTFT, TPOT) / d log(constant), [constant, row, 2], and the values at ``at`` as the last."""
    base = np.log(simulate_all(simulate, rows, at, pool))
    found = []
    for name in NAMES:
        moved = Constants(**{**asdict(at), name: asdict(at)[name] * (1 + MOVED)})
        found.append((np.log(simulate_all(simulate, rows, moved, pool)) - base) / np.log1p(MOVED))
    return np.array([*found, base])


def step(found: Floats, measured: Floats, start: Constants, at: Constants) -> Constants:
    """The constants that fit the measured rows best, with answers linear around ``at``."""
    slopes = found[:-1].reshape(len(NAMES), -1)
    want = (np.log(measured) - found[-1]).ravel()
    here = np.log(np.array(list(asdict(at).values())))
    pull = np.log(np.array(list(asdict(start).values()))) - here
    move = np.zeros(len(NAMES))
    for _ in range(60):
        left = want - slopes.T @ move
        weight = 1 / np.sqrt(1 + (left / SCALE) ** 2) / SCALE**2
        normal = (slopes * weight) @ slopes.T + np.eye(len(NAMES)) / PRIOR**2
        move = np.linalg.solve(normal, (slopes * weight) @ want + pull / PRIOR**2)
    move = np.clip(move, -0.7, 0.7)
    return Constants(**dict(zip(NAMES, np.exp(here + move).tolist(), strict=True)))
