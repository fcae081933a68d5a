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

**Compression** is none of these: it plays the same requests on a faster clock (`harness.plan.build`), and sessions,
bursts and thinking times shrink with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.plan.arrivals import Times
from harness.trace.spool import BLOCK, blocks, empty, filled

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
    rows: Bools
    """Whether each row is taken, in trace order; none after its end."""
    prompts: int | None = None
    """Copies with the same number here share made-up prefixes; null: the number is that of the copy."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Requests of a plan that is not the trace in its order."""

    scheduled: Times
    """On the trace's clock, ascending."""
    part: npt.NDArray[np.unsignedinteger[Any]]
    """Which of ``parts`` the request comes from: its next row."""
    parts: list[Part]
    overlap: bool = True
    """Copies lie over each other; else one is over when the next begins, and so are its sessions."""
    rows: Times | None = None
    """Row of the trace of each request, where a part's are not sent in the order of the trace."""


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
        least = None if growth - copy >= 1 - 1e-9 else np.uint64((growth - copy) * 2**64)
        for round_the_end in (True, False):
            taken = filled(n, _taken(units, least, shifts[copy], period, round_the_end), np.bool_)
            if taken.any():
                parts.append(Part(copy, taken))
                times.append(_shifted(arrivals, taken, shifts[copy] - (period if round_the_end else 0)))
    if not times:
        raise UsageError(f"thinning to {growth:g} of the demand left no request: keep more, or another seed")
    return Arrangement(*_merged(times), parts)


def _taken(
    units: Units, least: np.uint64 | None, shift: int, period: int, round_the_end: bool
) -> Callable[[slice], Bools]:
    """Which rows of a copy are drawn (``least``: whose place is below) and go round the trace's end, or do not."""

    def rows(part: slice) -> Bools:
        taken: Bools = (units.starts[part] + shift >= period) == round_the_end
        return taken if least is None else taken & (units.places[part] < least)

    return rows


def _shifted(arrivals: Times, taken: Bools, shift: int) -> Times:
    made, at = empty(int(np.count_nonzero(taken)), np.int64), 0
    for part in blocks(len(arrivals)):
        some = arrivals[part][taken[part]] + shift
        made[at : at + len(some)] = some
        at += len(some)
    return made


def _merged(times: list[Times]) -> tuple[Times, npt.NDArray[np.uint16]]:
    """All ``times`` (each ascending) in order, and which list each is from; equal ones in the order of the lists.

    A stretch at a time: between two bounds no list has more than its share of a block.
    """
    every = max(1, BLOCK // len(times))
    bounds = np.unique(np.concatenate([each[::every] for each in times]))
    n = sum(len(each) for each in times)
    scheduled, part, at = empty(n, np.int64), empty(n, np.uint16), 0
    begins = [0] * len(times)
    for bound in [*bounds[1:].tolist(), None]:
        ends = [len(each) if bound is None else int(np.searchsorted(each, bound)) for each in times]
        some = np.concatenate([each[a:b] for each, a, b in zip(times, begins, ends, strict=True)])
        order = np.argsort(some, kind="stable")
        scheduled[at : at + len(some)] = some[order]
        sizes = np.subtract(ends, begins)
        part[at : at + len(some)] = np.repeat(np.arange(len(times), dtype=np.uint16), sizes)[order]
        at, begins = at + len(some), ends
    return scheduled, part


def _shifts(copies: int, period: int, seed: int) -> list[int]:
    """How much later each copy is, ns: one in each of as many equal ranges, so that no two are close; the first not."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"copies"]))
    width = longest_shift_ns(period) / copies
    return [0] + [round((copy + float(generator.random())) * width) for copy in range(1, copies)]


def longest_shift_ns(span_ns: int) -> int:
    """The most that a copy of a trace of this span is shifted by, ns."""
    return min(span_ns // MOST_SHIFT, MOST_SHIFT_NS)


def spread(arrivals: Times, grid_s: float, seed: int) -> Times:
    """Arrivals moved from each instant to uniform places before the next step of the clock; ascending, order kept."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"spread"]))
    grid_ns = round(grid_s * 1e9)
    n, start = len(arrivals), 0
    moved = empty(n, np.int64)
    while start < n:  # a block at a time, up to the end of an instant
        end = int(np.searchsorted(arrivals, arrivals[min(start + BLOCK, n) - 1], side="right"))
        block = arrivals[start:end]
        after = int(arrivals[end] if end < n else block[-1] + grid_ns)
        instants, group = np.unique(block, return_inverse=True)
        # A clock's jitter makes a step now and then a little short: nothing may move past the next instant.
        room = np.minimum(np.diff(instants, append=after), grid_ns)
        places = generator.random(end - start)
        places = places[np.lexsort((places, group))]
        moved[start:end] = block + (places * room[group]).astype(np.int64)
        start = end
    return moved
