"""Latencies counted into bins, so that a million samples and a hundred become the same few thousand numbers.

Fine cells are 1/1024 of an octave wide (as HdrHistogram's): a float's own bits, shifted, are its cell. The bins of
pictures are 2.3 % wide, 100 to a decade: read from them, a value is at most that much too high.
Source: log-linear histograms, G. Tene, HdrHistogram.
"""

from __future__ import annotations

import numpy as np

from analysis.arrays import Floats, Ints

STEPS = 10
"""Cells per octave, as a power of two."""
SHIFT = 52 - STEPS
FIRST_S, OCTAVES = 2.0**-30, 44
"""A nanosecond, and up to 4.5 hours; what is outside lies in the cell at that end."""
FIRST = int(np.float64(FIRST_S).view(np.int64)) >> SHIFT
CELLS = OCTAVES << STEPS

PER_DECADE = 100
EDGES: Floats = np.logspace(-5, 4, 9 * PER_DECADE + 1)
"""Upper edges of the latency bins, s. The first bin holds all that is shorter, the last all that is longer."""
_REACHED = EDGES * (1 + 2e-11)
"""A value on an edge belongs below it, also when it was rounded."""
_JOIN = 4
"""Cells are looked up 16 at a time, so that the tables stay in the processor's nearest cache."""
_FLOORS: Floats = ((np.arange(0, CELLS, 1 << _JOIN) + FIRST) << SHIFT).view(np.float64)
_BIN = np.minimum(np.searchsorted(_REACHED, _FLOORS), len(EDGES) - 1)
"""Bin of the lower end of 16 cells; they are 1.6 % wide at most, so that no more than one edge lies in them."""
_EDGE = np.where(len(EDGES) - 1 > _BIN, _REACHED[_BIN], np.inf)


def cell_of(values_s: Floats) -> Ints:
    """The fine cell of each value."""
    cell = np.ascontiguousarray(values_s).view(np.int64) >> SHIFT
    cell -= FIRST
    return np.clip(cell, 0, CELLS - 1, out=cell)


def count_in(
    grid: Floats, time: Ints, values_s: Floats, weights: Floats | None = None, cells: Ints | None = None
) -> None:
    """Add latencies to a grid of shape (times, len(EDGES)): ``values_s`` in the time bins ``time``, NaN left out.

    Each counts as often as its weight says. ``cells``: the values' `cell_of`, where they are known already.
    """
    if cells is None:
        known = np.isfinite(values_s)
        if not known.all():
            time, values_s = time[known], values_s[known]
            weights = None if weights is None else weights[known]
        cells = cell_of(values_s)
    joined = cells >> _JOIN
    place = _BIN[joined]
    place += values_s > _EDGE[joined]
    place += time * len(EDGES)
    grid += np.bincount(place, weights=weights, minlength=grid.size).reshape(grid.shape)
