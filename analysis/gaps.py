"""All chunks of a run in one pass: the gaps between tokens, pooled, and output tokens by time, in memory of one size.

Up to `EXACT` gaps are kept as they are. Beyond that they are counted in the fine cells of `analysis.grid`, apart for
each of `UNITS` stretches of the run, because neighbours are alike and intervals must see that. A cell stands for the
mean of what is in it: counts and the overall mean stay exact, a percentile is off by 0.1 % at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis import metrics
from analysis.arrays import Floats, Ints
from analysis.grid import CELLS, EDGES, cell_of, count_in
from analysis.load import ChunkRows, Run
from analysis.metrics import BINS

EXACT = 1_000_000
UNITS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What the figures need of all chunks of the measured rows."""

    gap_s: Floats
    """Gaps between tokens, s; each stands for ``gap_tokens`` tokens of the stretch of requests ``gap_owner``."""
    gap_tokens: Floats
    gap_owner: Ints
    """Place in time of the request, or of its stretch of requests."""
    median_itl_s: float | None
    shared_stamps: float | None
    """Share of the chunks after a request's first that have the stamp of the chunk before; None without any."""
    output_tokens: Floats
    """Output tokens per time bin of the window, shape (BINS,); zeros without a window."""
    itl_grid: Floats
    """Tokens per time bin and latency bin (`grid.EDGES`), by the time of the later token."""


def pool_chunks(run: Run, parts: Iterable[ChunkRows] | None = None) -> Chunks:
    """Pool every chunk of a run, from ``parts`` or read again. Raises `ResultsError` when a file has changed."""
    window = metrics.window(run.rows)
    pool = GapPool(len(run.rows))
    output, grid = np.zeros(BINS), np.zeros((BINS, len(EDGES)))
    timed = shared = 0
    for part in run.parts() if parts is None else parts:
        gaps = metrics.itl(part)
        cells = cell_of(gaps.seconds)
        counted = gaps.tokens > 0
        timed += int(counted.sum())
        shared += int((counted & (gaps.seconds == 0)).sum())
        pool.add(gaps.seconds, gaps.tokens, part.rank, part.chunks, cells)
        if window is not None:
            time = metrics.bin_of(part.chunk_s, window)
            output += np.bincount(time, weights=metrics.chunk_output_tokens(part), minlength=BINS)
            count_in(grid, time, gaps.seconds, gaps.tokens, cells)
    if window is not None:
        output += metrics.binned(*metrics.unstreamed_output_events(run.rows), window)
    seconds, tokens, owners, median_s = pool.take()
    return Chunks(
        gap_s=seconds, gap_tokens=tokens, gap_owner=owners, median_itl_s=median_s,
        shared_stamps=shared / timed if timed else None, output_tokens=output, itl_grid=grid,
    )  # fmt: skip


class GapPool:
    """Gaps, each with the tokens it stands for and the place in time (0 to ``requests`` - 1) of its request."""

    def __init__(self, requests: int) -> None:
        self._requests, self._units = requests, max(1, min(UNITS, requests))
        self._kept: list[tuple[Floats, Floats, Ints]] = []
        self._size = 0
        self._cells: Ints | None = None

    def add(
        self, seconds: Floats, tokens: Floats, owner: Ints, each: npt.NDArray[np.int32], cells: Ints | None = None
    ) -> None:
        """Add some gaps: whole numbers of tokens, of which 0 adds nothing; each ``owner`` has ``each`` gaps in turn.

        ``cells``: the gaps' `grid.cell_of`, where they are known already.
        """
        if self._cells is None:
            some = tokens > 0
            self._kept.append((seconds[some], tokens[some], np.repeat(owner, each)[some]))
            self._size += len(self._kept[-1][0])
            if self._size <= EXACT:
                return
            kept, self._kept = self._kept, []
            self._cells = np.zeros(self._units * CELLS, np.int64)
            self._sums = np.zeros(CELLS)
            self._used = CELLS, 0
            for gaps, counts, owners in kept:
                self._count(self._cells, gaps, counts, self._row(owners), cell_of(gaps))
            return
        cells = cell_of(seconds) if cells is None else cells
        self._count(self._cells, seconds, tokens, np.repeat(self._row(owner), each), cells)

    def _row(self, owner: Ints) -> Ints:
        return owner * self._units // self._requests * CELLS

    def _count(self, counts: Ints, seconds: Floats, tokens: Floats, row: Ints, place: Ints) -> None:
        lowest, highest = self._used
        self._used = min(lowest, int(place.min(initial=lowest))), max(highest, int(place.max(initial=highest)))
        np.add.at(self._sums, place, seconds * tokens)
        np.add.at(counts, place + row, tokens.astype(np.int64))

    def take(self) -> tuple[Floats, Floats, Ints, float | None]:
        """(seconds, tokens, owner) of the samples, or of the bins that hold any, and their median."""
        if self._cells is None:
            if not self._kept:
                return np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64), None
            seconds, tokens, owner = (np.concatenate(column) for column in zip(*self._kept, strict=True))
            return seconds, tokens, owner, _median(seconds, tokens)
        lowest, highest = self._used  # gaps fill a few octaves of all: the others are not even looked at
        grid = self._cells.reshape(-1, CELLS)[:, lowest : highest + 1]
        owner, place = np.nonzero(grid)
        counts = grid[owner, place].astype(np.float64)
        place += lowest
        total: Floats = np.bincount(place, weights=counts, minlength=CELLS).astype(np.float64)
        mean = np.divide(self._sums, total, out=np.zeros(CELLS), where=total > 0)
        return mean[place], counts, owner, _median(mean[total > 0], total[total > 0])


def _median(seconds: Floats, tokens: Floats) -> float | None:
    if not len(seconds):
        return None
    order = np.argsort(seconds)
    running = np.cumsum(tokens[order])
    return float(seconds[order[np.searchsorted(running, running[-1] / 2)]])
