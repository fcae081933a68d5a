"""All chunks of a run in one pass: the gaps between tokens, pooled, and output tokens by time, in memory of one size.

Up to `EXACT` gaps are kept as they are. Beyond that they are counted in bins 1/1024 of an octave wide (as HdrHistogram
does), apart for each of `UNITS` stretches of the run, because neighbours are alike and intervals must see that. A bin
stands for the mean of what is in it: counts and the overall mean stay exact, a percentile is off by 0.1 % at most.
Source: log-linear histograms, G. Tene, HdrHistogram.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis import metrics
from analysis.load import Floats, Ints, Run
from analysis.metrics import BINS
from analysis.show.curves import EDGES, count_in

EXACT = 1_000_000
UNITS = 500
STEPS = 10
"""Bins per octave, as a power of two. A float's own bits, shifted, are its bin."""
SHIFT = 52 - STEPS
SMALLEST_S, OCTAVES = 2.0**-30, 44
"""A nanosecond, and up to 4.5 hours; what is outside lies in the bin at that end."""
FIRST = int(np.float64(SMALLEST_S).view(np.int64)) >> SHIFT
WIDTH = OCTAVES << STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What the figures need of all chunks of the measured rows."""

    gap_s: Floats
    """Gaps between tokens, s; each stands for ``gap_tokens`` tokens of the stretch of requests ``gap_owner``."""
    gap_tokens: Floats
    gap_owner: Ints
    """Place in time of the request, or of its stretch of requests."""
    median_itl_s: float | None
    output_tokens: Floats
    """Output tokens per time bin of the window, shape (BINS,); zeros without a window."""
    itl_grid: Floats
    """Tokens per time bin and latency bin (`curves.EDGES`), by the time of the later token."""


def pool_chunks(run: Run) -> Chunks:
    """Read every chunk of a run once. Raises `ResultsError` when the files are not what they were."""
    window = metrics.window(run.rows)
    pool = GapPool(len(run.rows))
    output, grid = np.zeros(BINS), np.zeros((BINS, len(EDGES)))
    for part in run.parts():
        gaps = metrics.itl(part)
        pool.add(gaps.seconds, gaps.tokens, part.rank, part.chunks)
        if window is not None:
            time = metrics.bin_of(part.chunk_s, window)
            output += np.bincount(time, weights=metrics.chunk_output_tokens(part), minlength=BINS)
            count_in(grid, time, gaps.seconds, gaps.tokens)
    if window is not None:
        output += metrics.binned(*metrics.unstreamed_output_events(run.rows), window)
    seconds, tokens, owners = pool.take()
    return Chunks(
        gap_s=seconds, gap_tokens=tokens, gap_owner=owners, median_itl_s=_median(seconds, tokens),
        output_tokens=output, itl_grid=grid,
    )  # fmt: skip


class GapPool:
    """Gaps, each with the tokens it stands for and the place in time (0 to ``requests`` - 1) of its request."""

    def __init__(self, requests: int) -> None:
        self._requests, self._units = requests, max(1, min(UNITS, requests))
        self._kept: list[tuple[Floats, Floats, Ints]] = []
        self._size = 0
        self._cells: Ints | None = None

    def add(self, seconds: Floats, tokens: Floats, owner: Ints, each: npt.NDArray[np.int32]) -> None:
        """Add some gaps: whole numbers of tokens, of which 0 adds nothing; each ``owner`` has ``each`` gaps in turn."""
        if self._cells is None:
            some = tokens > 0
            self._kept.append((seconds[some], tokens[some], np.repeat(owner, each)[some]))
            self._size += len(self._kept[-1][0])
            if self._size <= EXACT:
                return
            kept, self._kept = self._kept, []
            self._cells = np.zeros(self._units * WIDTH, dtype=np.int64)
            self._sums = np.zeros(WIDTH)
            for gaps, counts, owners in kept:
                self._count(self._cells, gaps, counts, self._row(owners))
            return
        self._count(self._cells, seconds, tokens, np.repeat(self._row(owner), each))

    def _row(self, owner: Ints) -> Ints:
        return owner * self._units // self._requests * WIDTH

    def _count(self, cells: Ints, seconds: Floats, tokens: Floats, row: Ints) -> None:
        place = np.clip((np.ascontiguousarray(seconds).view(np.int64) >> SHIFT) - FIRST, 0, WIDTH - 1)
        np.add.at(self._sums, place, seconds * tokens)
        np.add.at(cells, place + row, tokens.astype(np.int64))

    def take(self) -> tuple[Floats, Floats, Ints]:
        """(seconds, tokens, owner) of the samples, or of the bins that hold any."""
        if self._cells is None:
            if not self._kept:
                return np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64)
            seconds, tokens, owner = (np.concatenate(column) for column in zip(*self._kept, strict=True))
            return seconds, tokens, owner
        held = np.flatnonzero(self._cells)
        owner, place = np.divmod(held, WIDTH)
        counts = self._cells[held].astype(np.float64)
        total = np.bincount(place, weights=counts, minlength=WIDTH)
        mean = np.divide(self._sums, total, out=np.zeros(WIDTH), where=total > 0)
        return mean[place], counts, owner


def _median(seconds: Floats, tokens: Floats) -> float | None:
    if not len(seconds):
        return None
    order = np.argsort(seconds)
    running = np.cumsum(tokens[order])
    return float(seconds[order[np.searchsorted(running, running[-1] / 2)]])
