"""Traces made smaller or larger than they are, with their sessions whole.

**A sample** is a window of time, a number of requests, or thinner. What the choice does to the shape differs: a window
or the first N requests keep rate and burstiness, but prefixes that were warm before are cold; thinning keeps the shape
over time at a lower rate (burstiness D of counts becomes 1 + p (D - 1)), but requests that shared a prefix lose
partners. So `harness trace sample` prints the shape before and after.

**Another rate** is reached by more, fewer or finer arrivals from the trace's own, on the trace's own clock:

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

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import TraceError, UsageError
from harness.plan.arrivals import Times
from harness.trace.formats.record import TraceRecord
from harness.trace.spool import BLOCK, Sessions, blocks, empty, filled

if TYPE_CHECKING:
    from harness.trace.io import Trace

Records = Callable[[], Iterable[TraceRecord]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What to keep. All that are given apply: the window first, then thinning, then the limit."""

    window_s: tuple[float, float] | None = None
    """From this second of the trace to before that one: requests without a session that arrive in it, and sessions that
    begin in it with all their turns, also those after its end."""
    thin: float | None = None
    """Probability with which each session, or request without one, is kept."""
    limit: int | None = None
    """At most this many requests: whole sessions in order of their beginning, up to the first that does not fit."""
    cut_sessions: bool = False
    """Let window and limit cut through sessions: all requests in the window, exactly the first N."""
    seed: int = 0


def sample(trace: Trace, how: Sample) -> Iterator[TraceRecord]:
    """The records of ``trace`` that ``how`` keeps, in order.

    Raises `UsageError` for choices that make no sense, `TraceError` when a window is asked of a trace without times, or
    a limit is smaller than its first session.
    """
    _check(how)

    def chosen() -> Iterator[TraceRecord]:
        records: Iterable[TraceRecord] = trace
        if how.window_s is not None:
            records = _window(trace, how.window_s, how.cut_sessions)
        threshold = None if how.thin is None else int(how.thin * 2**64)
        for record in records:
            if threshold is None or place(record, how.seed) < threshold:
                yield record

    return chosen() if how.limit is None else _limited(trace, chosen, how.limit, how.cut_sessions)


def _check(how: Sample) -> None:
    if how.window_s is None and how.thin is None and how.limit is None:
        raise UsageError("say what to keep: --window, --thin or --limit")
    if how.window_s is not None and not 0 <= how.window_s[0] < how.window_s[1]:
        raise UsageError(f"window {how.window_s[0]:g} s to {how.window_s[1]:g} s: must begin before it ends")
    if how.thin is not None and not 0 < how.thin <= 1:
        raise UsageError(f"thin is {how.thin:g}, must be above 0 and at most 1")
    if how.limit is not None and how.limit < 1:
        raise UsageError(f"limit is {how.limit}, must be at least 1")


def place(record: TraceRecord, seed: int) -> int:
    """64 random bits that depend on the seed and the session (or the line) alone."""
    unit = f"line {record.line}" if record.session_id is None else f"session {record.session_id}"
    digest = hashlib.blake2b(f"{seed} {unit}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _window(trace: Trace, window_s: tuple[float, float], cut_sessions: bool) -> Iterator[TraceRecord]:
    start_s, end_s = window_s
    began_inside = Sessions(bool)
    for record in trace:
        if record.arrival_s is None:
            raise TraceError(trace.source.name, record.line, "the trace has no times, so no window can be cut from it")
        inside = start_s <= record.arrival_s < end_s
        if record.session_id is not None and not cut_sessions:
            begun = began_inside.get(record.session_id)
            inside = inside if begun is None else begun
            began_inside.set(record.session_id, inside)
        elif record.arrival_s >= end_s and cut_sessions:
            return
        if inside:
            yield record


def _limited(trace: Trace, chosen: Records, limit: int, cut_sessions: bool) -> Iterator[TraceRecord]:
    sizes = Sessions(int)
    for record in () if cut_sessions else chosen():
        if record.session_id is not None:
            sizes.set(record.session_id, (sizes.get(record.session_id) or 0) + 1)
    taken = 0
    full = False
    admitted: set[str] = set()
    for record in chosen():
        if record.session_id in admitted:
            yield record
            continue
        if full:
            continue
        session = None if cut_sessions else record.session_id
        size = 1 if session is None else sizes.get(session) or 0
        if taken + size > limit:
            if not taken:
                raise TraceError(
                    trace.source.name,
                    record.line,
                    f"its first session has {size} requests, more than the limit of {limit}; --cut-sessions cuts it",
                )
            full = True
            if not admitted:
                return
            continue
        taken += size
        if session is not None:
            admitted.add(session)
        yield record


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


class TracePass(NamedTuple):
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
    parts: list[TracePass]
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
    parts: list[TracePass] = []
    times: list[Times] = []
    for copy in range(copies):
        least = None if growth - copy >= 1 - 1e-9 else np.uint64((growth - copy) * 2**64)
        for round_the_end in (True, False):
            taken = filled(n, _taken(units, least, shifts[copy], period, round_the_end), np.bool_)
            if taken.any():
                parts.append(TracePass(copy, taken))
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
