"""More, fewer or finer arrivals from a trace's own, on the trace's own clock.

**Thinning** (below the source's rate) draws whole sessions, and requests without one, each with the same probability p.
The shape over time stays; bursts thin out with the rest (variance / mean of counts D becomes 1 + p (D - 1), or stays
nearer to D where sessions make the bursts); requests that shared a prefix lose partners.

**Superposition** (above it) adds copies of all sessions and requests, each copy as a whole a little later, wrapped
over the trace's end to its beginning. The fraction of a copy is a thinned copy. A copy keeps its own bursts, and as
copies are shifted by different times, bursts do not fall onto bursts: demand grows by more users, not by bigger
bursts. The shift is at most half an hour and a twentieth of the trace, so that the time of day stays where it was; in
windows longer than the shift copies do rise and fall together. A session begins at its shifted time and all its turns
follow as they did, over the end if need be. Made-up prompts of a copy come from a seed of its own: copies share no
prefix with one another, so the ideal hit rate is that of the trace (real growth shares its system prompts: this is
the careful side). Texts are sent word for word, so a prefix cache knows those of the copy before.

**Spreading** moves each arrival of a coarse clock to a uniform place within its step; order stays.

**Compression** is none of these: it plays the same requests on a faster clock (`harness.build`), and sessions, bursts
and thinking times shrink with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.arrivals import Times
from harness.errors import UsageError

MOST_SHIFT_NS = 1800 * 1_000_000_000
MOST_SHIFT = 20
"""A shift is at most the span over this: what a session hangs over the end is missing at the beginning."""
MOST_GROWTH = 100
"""A plan of more copies than this says nothing about any demand."""

Bools = npt.NDArray[np.bool_]


class Units(NamedTuple):
    """What stays together, for each row: its session, or the row alone."""

    starts: Times
    """First arrival of its unit, ns."""
    places: npt.NDArray[np.uint64]
    """A random number, the same for all rows of a unit."""


class Part(NamedTuple):
    """One reading of the trace for a plan: which copy its requests belong to, and the rows it takes."""

    copy: int
    rows: bytes
    """1 for each row taken, in trace order."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Requests of a plan that is not the trace in its order."""

    scheduled: Times
    """On the trace's clock, ascending."""
    part: npt.NDArray[np.uint16]
    """Which of ``parts`` the request comes from: its next row."""
    parts: list[Part]


def parse_growth(text: str) -> float:
    """Demand as a multiple of the trace's from ``3x``, ``0.5``, ``+200%`` or ``-20%``. Raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)x?|([+-]\d+(?:\.\d+)?)%", text.strip(), re.ASCII)
    growth = 0.0 if match is None else float(match[1]) if match[1] else round(1 + float(match[2]) / 100, 9)
    if not 0 < growth <= MOST_GROWTH:
        raise UsageError(f"growth {text!r}: write 3x, 0.5x, +200% or -20% (above 0, at most {MOST_GROWTH}x)")
    return growth


def arrange(arrivals: Times, units: Units, growth: float, seed: int) -> Arrangement:
    """The requests of a demand ``growth`` times the trace's: thinned below 1, superposed above.

    Raises `UsageError` for a growth of no meaning, when nothing is left, and when all arrive at one instant.
    """
    if not 0 < growth <= MOST_GROWTH:
        raise UsageError(f"demand times {growth:g}: must be above 0 and at most {MOST_GROWTH}")
    n, span = len(arrivals), int(arrivals[-1])
    if growth > 1 and not span:
        raise UsageError("all rows arrive at one instant: there is no time to lay copies over")
    period = span + max(span // max(n - 1, 1), 1)  # the wrap leaves one mean gap between the end and the beginning
    copies = math.ceil(round(growth, 9))
    shifts = _shifts(copies, period, seed)
    parts: list[Part] = []
    times: list[Times] = []
    for copy in range(copies):
        share = growth - copy
        kept = np.ones(n, dtype=np.bool_) if share >= 1 - 1e-9 else units.places < np.uint64(share * 2**64)
        for rows, shift in _wrapped(units.starts, shifts[copy], period):
            taken = kept & rows
            if taken.any():
                parts.append(Part(copy, taken.tobytes()))
                times.append(arrivals[taken] + shift)
    if not times:
        raise UsageError(f"thinning to {growth:g} of the demand left no request: keep more, or another seed")
    scheduled = np.concatenate(times)
    part = np.repeat(np.arange(len(times), dtype=np.uint16), [len(each) for each in times])
    order = np.argsort(scheduled, kind="stable")
    return Arrangement(scheduled[order], part[order], parts)


def _shifts(copies: int, period: int, seed: int) -> list[int]:
    """How much later each copy is, ns: one in each of as many equal ranges, so that no two are close; the first not."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"copies"]))
    width = longest_shift_ns(period) / copies
    return [0] + [round((copy + float(generator.random())) * width) for copy in range(1, copies)]


def longest_shift_ns(span_ns: int) -> int:
    """The most that a copy of a trace of this span is shifted by, ns."""
    return min(span_ns // MOST_SHIFT, MOST_SHIFT_NS)


def _wrapped(starts: Times, shift: int, period: int) -> Iterator[tuple[Bools, int]]:
    """(rows, their shift): those of units that begin within the period, and those that go round to its beginning."""
    over = starts + shift >= period
    yield over, shift - period
    yield ~over, shift


def spread(arrivals: Times, grid_s: float, seed: int) -> Times:
    """Arrivals moved from each instant to uniform places before the next step of the clock; ascending, order kept."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"spread"]))
    instants, group = np.unique(arrivals, return_inverse=True)
    # A clock's jitter makes a step now and then a little short: nothing may move past the next instant.
    grid_ns = round(grid_s * 1e9)
    room = np.minimum(np.diff(instants, append=instants[-1] + grid_ns), grid_ns)
    places = generator.random(len(arrivals))
    places = places[np.lexsort((places, group))]
    moved: Times = arrivals + (places * room[group]).astype(np.int64)
    return moved
