"""Non-negative least squares with a block bootstrap, for a handful of unknowns.

With at most four columns every set of columns that could be in use is solved at once, for all resamples: exact, and
without a solver that iterates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.stats.intervals import RESAMPLES, ends_of_resamples


@dataclass(frozen=True, slots=True, kw_only=True)
class NonNegativeFit:
    """Coefficients >= 0 that bring ``columns @ coefficients`` closest to the response."""

    coefficients: Floats
    draws: Floats
    """The same from each resample of the rows, shape (RESAMPLES, k)."""
    spread: Floats
    """Ends of the 95 % interval of each coefficient, shape (2, k)."""
    residual: float
    """Root mean square of what is left over the root mean square of the response."""
    condition: float
    """Condition number of the columns, each scaled to length 1; inf when one is empty."""
    blocks: int

    def ends(self, draws: Floats, value: float) -> tuple[float, float]:
        """95 % interval of a figure from its value in each resample."""
        return ends_of_resamples(draws, value, self.blocks)


def fit_non_negative(response: Floats, columns: Floats, *, block: int = 1, seed: int = 0) -> NonNegativeFit:
    """Fit ``response`` (n) by ``columns`` (n, k), k <= 4; resample blocks of ``block`` neighbouring rows (circular)."""
    n, k = columns.shape
    length = np.linalg.norm(columns, axis=0)
    scale = np.where(length > 0, length, 1.0)
    scaled = columns / scale
    gram = scaled[:, :, None] * scaled[:, None, :]
    cross = scaled * response[:, None]
    blocks = math.ceil(n / block)
    starts = np.random.default_rng(seed).integers(n, size=(RESAMPLES, blocks))
    row = (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1) % n
    counts = np.zeros((RESAMPLES, n))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], row), 1.0)
    coefficients = _solve(gram.sum(axis=0)[None], cross.sum(axis=0)[None])[0] / scale
    draws = _solve(np.einsum("rn,nij->rij", counts, gram), counts @ cross) / scale
    left = response - columns @ coefficients
    size = math.sqrt(float((response**2).mean()))
    ends = [ends_of_resamples(draws[:, j], float(coefficients[j]), blocks) for j in range(k)]
    return NonNegativeFit(
        coefficients=coefficients,
        draws=draws,
        spread=np.array(ends).T,
        residual=math.sqrt(float((left**2).mean())) / size if size > 0 else 0.0,
        condition=float(np.linalg.cond(scaled)) if (length > 0).all() else math.inf,
        blocks=blocks,
    )


def solve_non_negative(response: Floats, columns: Floats) -> Floats:
    """Coefficients >= 0 that bring ``columns @ coefficients`` closest to ``response``; columns (n, k), k <= 4."""
    length = np.linalg.norm(columns, axis=0)
    scale = np.where(length > 0, length, 1.0)
    scaled = columns / scale
    return np.asarray(_solve((scaled.T @ scaled)[None], (scaled.T @ response)[None])[0] / scale)


def _solve(gram: Floats, cross: Floats) -> Floats:
    """Non-negative solutions of the normal equations, shape (m, k): of every set of columns, the best that is feasible.

    The best non-negative fit is the plain least squares fit on the columns it uses, so it is among these.
    """
    m, k = cross.shape
    best, found = np.zeros(m), np.zeros((m, k))  # no column at all leaves the whole response: gain 0
    for size in range(1, k + 1):
        for used in itertools.combinations(range(k), size):
            pick = list(used)
            part = gram[:, pick][:, :, pick] + 1e-14 * np.eye(size)
            solution = np.linalg.solve(part, cross[:, pick][:, :, None])[:, :, 0]
            gain = (solution * cross[:, pick]).sum(axis=1)
            better = (solution >= 0).all(axis=1) & (gain > best)
            best[better] = gain[better]
            found[better] = 0.0
            found[np.ix_(better, pick)] = solution[better]
    return found
