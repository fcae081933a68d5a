"""All chunks of a run in one pass: the gaps between tokens, pooled, and output tokens by time, in memory of one size.

Up to `EXACT` gaps are kept as they are. Beyond that they are counted in fine cells, apart for each of
`UNITS` stretches of the run, because neighbours are alike and intervals must see that. A cell stands for the
mean of what is in it: counts and the overall mean stay exact, a percentile is off by 0.1 % at most.

Latencies of requests are counted into bins, so that a picture of a million is as small as one of a hundred.

Fine cells are 1/1024 of an octave wide (as HdrHistogram's): a float's own bits, shifted, are its cell. The bins of
pictures are 2.3 % wide, 100 to a decade: read from them, a value is at most that much too high.
Source: log-linear histograms, G. Tene, HdrHistogram.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.rows.run import BINS, ChunkRows, Chunks, Rows, bin_of, binned, window

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
_FLOORS: Floats = ((np.arange(CELLS) + FIRST) << SHIFT).view(np.float64)
_BIN = np.minimum(np.searchsorted(_REACHED, _FLOORS), len(EDGES) - 1)
"""Bin of the lower end of each cell; a cell is so narrow that no more than one edge lies in it."""
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
    place = _BIN[cells]
    place += values_s > _EDGE[cells]
    place += time * len(EDGES)
    grid += np.bincount(place, weights=weights, minlength=grid.size).reshape(grid.shape)


CLUMP_BOUND, CLUMP_FLOOR_S = 0.25, 0.005
"""Share of chunks that come together with the one before, and time between those that do not, from which on an answer
was delivered in clumps."""
EXACT = 1_000_000
UNITS = 500


def clumped(rows: Rows) -> Bools:
    """Answers that were delivered in clumps, so that their gaps are the transport's and not the engine's.

    More than `CLUMP_BOUND` of the chunks have the time of the one before, and the times that differ lie farther apart
    (where none does: the first from sending) than our own loop stood still meanwhile, so that it was not we who read
    them together.
    """
    later = rows.chunks - 1
    apart = later - rows.shared
    spacing = np.divide(rows.decode_s, apart, out=rows.first_gap_s.copy(), where=apart > 0)
    together = (later > 0) & (rows.shared > CLUMP_BOUND * later)
    found: Bools = together & (spacing > np.maximum(CLUMP_FLOOR_S, rows.held_s))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Pooled inter-token gaps, one entry per chunk: ``seconds`` per token, standing for ``tokens`` tokens.

    ``tokens`` is 0 where a chunk ends no gap between tokens: a request's first, and those of failed requests.
    """

    seconds: Floats
    tokens: Floats


def itl(rows: ChunkRows) -> Gaps:
    """itl, s: gaps between token arrivals of successful requests that did not come in clumps, pooled.

    A chunk of k tokens that came g after the chunk before it counts as k samples of g / k; a request's first chunk is
    ttft and counts none. So the samples of a request add up to last chunk - first chunk.
    """
    parts = _parts(rows)
    tokens = np.repeat((rows.success & ~clumped(rows)).astype(np.float64), rows.chunks)
    tokens[rows.offsets[:-1][rows.chunks > 0]] = 0.0
    if parts is None:
        return Gaps(seconds=rows.gap_s, tokens=tokens)
    return Gaps(seconds=rows.gap_s / parts, tokens=parts * tokens)


def _parts(rows: ChunkRows) -> Floats | None:
    """Tokens per chunk, 1 where the server did not say; None when it is 1 throughout, as it mostly is."""
    if (np.isnan(rows.stated_tokens) | (rows.stated_tokens == rows.chunks)).all():
        return None
    return np.where(np.isnan(rows.chunk_tokens), 1.0, rows.chunk_tokens)


def chunk_output_tokens(rows: ChunkRows) -> Floats:
    """Output tokens of each chunk: ``usage`` of successful requests spread over their chunks.

    By the chunks' own token counts where known, else evenly; 0 for chunks of other requests.
    """
    parts = _parts(rows)
    whole = rows.stated_tokens
    whole = np.where(np.isnan(whole), rows.chunks, whole)
    sold = rows.success & np.isfinite(rows.output_tokens)
    scale = np.divide(rows.output_tokens, whole, out=np.zeros(len(rows)), where=sold & (rows.chunks > 0))
    each = np.repeat(scale, rows.chunks)
    return each if parts is None else parts * each


def unstreamed_output_events(rows: Rows) -> tuple[Floats, Floats]:
    """(time s, output tokens) of successful requests without chunks: all at the finish."""
    at_end = rows.success & np.isfinite(rows.output_tokens) & (rows.chunks == 0)
    return rows.finished_s[at_end], rows.output_tokens[at_end]


def pool_chunks(rows: Rows, parts: Iterable[ChunkRows]) -> Chunks:
    """Pool the chunks of ``parts``, which are those of ``rows``."""
    within = window(rows)
    pool = ItlHistogram(len(rows))
    output, grid = np.zeros(BINS), np.zeros((BINS, len(EDGES)))
    for part in parts:
        gaps = itl(part)
        cells = cell_of(gaps.seconds)
        pool.add(gaps.seconds, gaps.tokens, part.rank, part.chunks, cells)
        if within is not None:
            time = bin_of(part.chunk_s, within)
            output += np.bincount(time, weights=chunk_output_tokens(part), minlength=BINS)
            count_in(grid, time, gaps.seconds, gaps.tokens, cells)
    if within is not None:
        output += binned(*unstreamed_output_events(rows), within)
    timed = rows.success & ~clumped(rows) & (rows.chunks > 1)
    later = int((rows.chunks[timed] - 1).sum())
    seconds, tokens, owners, median_s = pool.take()
    return Chunks(
        gap_s=seconds, gap_tokens=tokens, gap_owner=owners, median_itl_s=median_s, output_tokens=output, itl_grid=grid,
        shared_stamps=int(rows.shared[timed].sum()) / later if later else None,
    )  # fmt: skip


class ItlHistogram:
    """Gaps, each with the tokens it stands for and the place in time (0 to ``requests`` - 1) of its request."""

    def __init__(self, requests: int) -> None:
        self._requests, self._units = requests, max(1, min(UNITS, requests))
        self._kept: list[tuple[Floats, Floats, Ints]] = []
        self._cells: npt.NDArray[np.uint32] | None = None
        self._sums = np.zeros(CELLS)

    def add(
        self, seconds: Floats, tokens: Floats, owner: Ints, each: npt.NDArray[np.int32], cells: Ints | None = None
    ) -> None:
        """Add some gaps: whole numbers of tokens, of which 0 adds nothing; each ``owner`` has ``each`` gaps in turn.

        ``cells``: the gaps' `cell_of`, where they are known already.
        """
        if self._cells is not None:
            self._count(
                seconds, tokens, np.repeat(self._row(owner), each), cell_of(seconds) if cells is None else cells
            )
            return
        some = tokens > 0
        self._kept.append((seconds[some], tokens[some], np.repeat(owner, each)[some]))
        if sum(len(gaps) for gaps, _, _ in self._kept) > EXACT:
            self._cells = np.zeros(self._units * CELLS, np.uint32)
            while self._kept:
                gaps, counts, owners = self._kept.pop(0)
                self._count(gaps, counts, self._row(owners), cell_of(gaps))

    def _row(self, owner: Ints) -> Ints:
        return owner * self._units // self._requests * CELLS

    def _count(self, seconds: Floats, tokens: Floats, row: Ints, place: Ints) -> None:
        assert self._cells is not None
        self._sums += np.bincount(place, weights=seconds * tokens, minlength=CELLS)
        row += place
        np.add.at(self._cells, row, tokens.astype(np.uint32))

    def take(self) -> tuple[Floats, Floats, Ints, float | None]:
        """(seconds, tokens, owner) of the samples, or of the bins that hold any, and their median."""
        if self._cells is None:
            if not self._kept:
                return np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64), None
            seconds, tokens, owner = (np.concatenate(column) for column in zip(*self._kept, strict=True))
            return seconds, tokens, owner, _median(seconds, tokens)
        grid = self._cells.reshape(-1, CELLS)
        total = grid.sum(axis=0, dtype=np.float64)
        used = np.flatnonzero(total)  # gaps fill a few octaves of all: the others are not looked at again
        mean = self._sums[used] / total[used]
        owner, place = np.nonzero(part := grid[:, used[0] : used[-1] + 1])
        counts = part[owner, place].astype(np.float64)
        where = np.zeros(CELLS, np.int64)
        where[used] = np.arange(len(used))
        return mean[where[place + used[0]]], counts, owner, _median(mean, total[used])


def _median(seconds: Floats, tokens: Floats) -> float | None:
    if not len(seconds):
        return None
    order = np.argsort(seconds)
    running = np.cumsum(tokens[order])
    return float(seconds[order[np.searchsorted(running, running[-1] / 2)]])
