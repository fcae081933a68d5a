"""A plan that joins several windows from different parts of its trace: what a probe of a search for capacity sends.

The first rows of a trace are not the trace: its mix may drift, and bursts come when they come. A plan of ``count``
windows takes a stretch from each of as many equal parts of the trace's time, all at the same place u of their part.
u starts where a hash of the trace puts it and moves by the golden ratio from one draw of the search to the next, so
that draws fall between those before them and soon cover the trace evenly, whatever seed each plan has. The plan's own
seed decides the order in which its windows are laid, one after the other without a pause; inside a window rows and
gaps are the trace's.

The trace is taken for periodic (period: its span and one mean gap), so a window may run over its end, and a trace that
is shorter than the plan is one window that repeats it, with new prompts each time. What a window cuts off is not there:
a turn whose predecessor lies before its window begins a conversation.

In plans whose sessions wait another rate moves when sessions begin (`session_windows`), not the pace within one: a user
who comes twice as often does not think twice as fast. So on a clock ``speed`` times as fast sessions begin ``speed``
times as often, and each of their turns stays as long after the beginning as in the trace. With that the requests/s of a
window are those asked for, from its first second on and at any rate: it holds the turns that are due in it, those of
sessions that began before it among them. These go on from a turn that is not sent, so they wait for nothing and come at
their own time. Turns that are due after the trace's end are so at its beginning. In memory are about 50 bytes a row
while the plan is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from harness.errors import UsageError
from harness.plan.arrivals import Times
from harness.plan.file import PlannedWindow, Windows
from harness.trace.edit import Arrangement, Bools, TracePass
from harness.trace.spool import blocks, empty, filled

GOLDEN = 0.6180339887498949
"""Fraction of the golden ratio: its multiples, mod 1, are spread the most evenly of all."""


class Joined(NamedTuple):
    """Windows that were laid one after the other."""

    arrangement: Arrangement
    windows: list[PlannedWindow]
    trace_share: float
    """Of the trace's rows, those that are sent at least once."""
    cycles: int
    """How often a row is sent at most."""


class Stretch(NamedTuple):
    """Rows of the trace from ``first`` up to, not including, ``end``, counted on when the trace begins again."""

    first: int
    end: int


def windows_in_time(
    arrivals: Times, asked: Windows, *, lasts_ns: float, speed: float, trace_sha256: str, seed: int, most: int | None
) -> Joined:
    """Windows that last ``lasts_ns`` together, on the clock of ``arrivals`` (ns, ascending), at most ``most`` requests.

    ``speed``: factor on that clock that the plan will apply, for what is said of the windows. With
    ``asked.busiest`` each window is the stretch of its length with the most requests.

    Raises `UsageError` when all rows arrive at one instant, when nothing falls into the windows, and for a time that
    64-bit nanoseconds do not hold.
    """
    n, period = len(arrivals), period_of(arrivals)
    stretches, shifts, length = stretches_in_time(
        arrivals, period, asked, lasts_ns=lasts_ns, trace_sha256=trace_sha256, seed=seed, most=most
    )
    scheduled = empty(sum(s.end - s.first for s in stretches), np.int64)
    at = 0
    for stretch, shift in zip(stretches, shifts, strict=True):
        for part in blocks(stretch.end - stretch.first):
            rows = np.arange(stretch.first + part.start, stretch.first + part.stop)
            scheduled[at : at + len(rows)] = rows // n * period + arrivals[rows % n] + shift
            at += len(rows)
    lasts_s = length / speed / 1e9
    begins = [which * lasts_s for which in range(len(stretches))]
    return _joined(scheduled, stretches, n, begins, lasts_s, again=asked.busiest)


def period_of(arrivals: Times) -> int:
    """Time from one beginning of the trace to the next, ns: its span and one mean gap.

    Raises `UsageError` when all rows arrive at one instant.
    """
    n, span = len(arrivals), int(arrivals[-1])
    if n < 2 or not span:
        raise UsageError("all rows arrive at one instant: there is no time to cut windows from")
    return span + max(span // (n - 1), 1)


def stretches_in_time(
    times: Times, period: int, asked: Windows, *, lasts_ns: float, trace_sha256: str, seed: int, most: int | None
) -> tuple[list[Stretch], list[int], int]:
    """What each window takes of ``times`` (ns, ascending), in the order of the plan; by how much it is moved, ns; and
    how long each lasts, ns, all on the trace's clock. Raises as `windows_in_time` does.
    """
    if lasts_ns >= 2**62:
        raise UsageError("windows would last more than 146 years on the trace's clock: a shorter time, or a lower rate")
    count = _count(asked, lasts_ns > period)
    length = max(round(lasts_ns / count), 1)
    if asked.busiest:
        starts = [_busiest_start(times, period, length)] * count
    else:
        starts = [round(period * place) % period for place in _places(asked.draw, count, trace_sha256)]
    stretches, shifts = [], list[int]()
    left = most
    for at, which in enumerate(_order(count, seed)):
        start = starts[which]
        first, end = (_rows_before(times, period, time) for time in (start, start + length))
        if left is not None:
            end = min(end, first + left)
            left -= end - first
        stretches.append(Stretch(first, end))
        shifts.append(at * length - start)
    if not any(stretch.end > stretch.first for stretch in stretches):
        raise UsageError("not one request of the trace falls into the plan's windows: a longer time, or a higher rate")
    return stretches, shifts, length


def windows_of_rows(
    rows: int, requests: int, asked: Windows, *, arrivals: Times, scheduled: Times | None, trace_sha256: str, seed: int
) -> Joined:
    """Blocks of a trace of ``rows`` rows, ``requests`` together, for a plan whose times are not the trace's.

    ``scheduled``: those times, ns; None in a closed loop. ``arrivals`` is needed for ``asked.busiest`` alone: each
    block is the one that came in the least time. Raises `UsageError` when there are none.
    """
    count = min(_count(asked, requests + asked.count > rows), requests)
    sizes = [requests // count + (at < requests % count) for at in range(count)]
    if asked.busiest:
        if len(arrivals) != rows:
            raise UsageError("the trace has no arrival times, so it has no busiest stretch")
        starts = [_densest_start(arrivals, sizes[0])] * count
    else:
        starts = [int(rows * place) % rows for place in _places(asked.draw, count, trace_sha256)]
    stretches = [
        Stretch(starts[which], starts[which] + size) for which, size in zip(_order(count, seed), sizes, strict=True)
    ]
    begins = [None] * count if scheduled is None else [int(scheduled[at]) / 1e9 for at in np.cumsum([0, *sizes[:-1]])]
    none = empty(0, np.int64) if scheduled is None else scheduled
    return _joined(none, stretches, rows, begins, None, again=asked.busiest)


def first_place(trace_sha256: str) -> float:
    """Place of the first draw's windows in their parts of the trace: 0 to 1, the same for every plan of a trace."""
    digest = hashlib.blake2b(f"windows {trace_sha256}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _places(draw: int, count: int, trace_sha256: str) -> list[float]:
    """Where each window begins, as a share of the trace."""
    u = (first_place(trace_sha256) + draw * GOLDEN) % 1
    return [(k + u) / count for k in range(count)]


def _count(asked: Windows, overlap: bool) -> int:
    """Windows that would overlap, because the plan is as long as the trace, are one."""
    return 1 if overlap and not asked.busiest else asked.count


def _order(count: int, seed: int) -> list[int]:
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"windows"]))
    order: list[int] = generator.permutation(count).tolist()
    return order


def _rows_before(arrivals: Times, period: int, time: int) -> int:
    """Rows that arrive before a time, counted on when the trace begins again."""
    return time // period * len(arrivals) + int(np.searchsorted(arrivals, time % period))


def _busiest_start(arrivals: Times, period: int, length: int) -> int:
    """When the stretch of that length with the most requests begins: with an arrival; the first of equals."""
    n, best, found = len(arrivals), -1, 0
    for part in blocks(n):
        ends = arrivals[part] + length
        counts = ends // period * n + np.searchsorted(arrivals, ends % period) - np.arange(part.start, part.stop)
        at = int(counts.argmax())
        if counts[at] > best:
            best, found = int(counts[at]), int(arrivals[part][at])
    return found


def _densest_start(arrivals: Times, rows: int) -> int:
    """Which row begins the block of so many rows that came in the least time; the first of equals."""
    if rows >= len(arrivals):
        return 0
    spans = filled(
        len(arrivals) - rows + 1,
        lambda part: arrivals[part.start + rows - 1 : part.stop + rows - 1] - arrivals[part],
        np.int64,
    )
    return int(spans.argmin())


def _joined(
    scheduled: Times,
    stretches: Sequence[Stretch],
    n: int,
    begins: Sequence[float | None],
    lasts_s: float | None,
    *,
    again: bool,
) -> Joined:
    """``again``: each stretch holds the rows of those before it, which need prompts of their own."""
    parts: list[TracePass] = []
    sizes: list[int] = []
    taken: dict[tuple[int, int], Bools] = {}
    for which, (first, end) in enumerate(stretches):
        for pass_, low, high in _passes(first, end, n):
            if (low, high) not in taken:  # ends with the last row taken, and so does the reading
                taken[low, high] = filled(high, _from(low), np.bool_)
            repeats = pass_ - first // n if end - first > n else 0
            parts.append(
                TracePass(len(parts), taken[low, high], prompts=repeats + (which * (1 + end // n) if again else 0))
            )
            sizes.append(high - low)
    part = np.repeat(np.arange(len(parts), dtype=np.uint32), sizes)
    return Joined(
        Arrangement(scheduled, part, parts, overlap=False),
        [
            PlannedWindow(
                first_row=s.first % n, last_row=(s.end - 1) % n, starts_s=starts_s, requests=s.end - s.first,
                lasts_s=lasts_s,
            )
            for s, starts_s in zip(stretches, begins, strict=True)
        ],
        _covered(taken) / n,
        max(-(-(s.end - s.first) // n) for s in stretches) * (len(stretches) if again else 1),
    )  # fmt: skip


def _from(low: int) -> Callable[[slice], Bools]:
    return lambda part: np.arange(part.start, part.stop) >= low


def _passes(first: int, end: int, n: int) -> Iterator[tuple[int, int, int]]:
    """The passes over the trace that a stretch goes through: which, from which row, up to, not including, which."""
    while first < end:
        stop = min(end, (first // n + 1) * n)
        yield first // n, first % n, stop - first // n * n
        first = stop


def _covered(ranges: dict[tuple[int, int], Bools]) -> int:
    """Rows that lie in at least one of the ranges."""
    covered = reached = 0
    for low, high in sorted(ranges):
        covered += max(0, high - max(low, reached))
        reached = max(reached, high)
    return covered


def session_windows(
    arrivals: Times, starts: Times, asked: Windows, *, lasts_ns: float, speed: float, trace_sha256: str, seed: int,
    most: int | None,
) -> Joined:  # fmt: skip
    """Windows as `windows_in_time` makes them, of turns at their session's own pace.

    ``starts``: of each row, when its session's first arrived, ns. Rows of a window (`PlannedWindow`) are counted in the
    order in which turns are due at this speed. Raises `UsageError` as `windows_in_time` does.
    """
    n, period = len(arrivals), period_of(arrivals)
    due = starts + np.rint((arrivals - starts) * speed).astype(np.int64)
    order = np.argsort(due % period, kind="stable")
    times, late = due[order] % period, due[order] // period
    stretches, shifts, length = stretches_in_time(
        times, period, asked, lasts_ns=lasts_ns, trace_sha256=trace_sha256, seed=seed, most=most
    )
    parts: list[TracePass] = []
    scheduled, part_of, rows = [], [], []
    for which, (stretch, shift) in enumerate(zip(stretches, shifts, strict=True)):
        places = np.arange(stretch.first, stretch.end)
        taken = order[places % n]
        scheduled.append(places // n * period + times[places % n] + shift)
        begun = places // n - late[places % n]  # in which pass over the trace its session began
        passes, group = np.unique(begun, return_inverse=True)
        part_of.append(len(parts) + group)
        rows.append(taken)
        for k, pass_ in enumerate(passes.tolist()):
            repeats = pass_ - int(passes[0]) if stretch.end - stretch.first > n else 0
            again = which * (2 + int(passes[-1] - passes[0])) if asked.busiest else 0
            parts.append(TracePass(len(parts), _mask(taken[group == k]), prompts=repeats + again))
    lasts_s, every = length / speed / 1e9, np.concatenate(rows)
    return Joined(
        Arrangement(
            np.concatenate(scheduled), np.concatenate(part_of).astype(np.uint32), parts, overlap=True, rows=every
        ),
        [
            PlannedWindow(
                first_row=s.first % n, last_row=(s.end - 1) % n, starts_s=at * lasts_s, requests=s.end - s.first,
                lasts_s=lasts_s,
            )
            for at, s in enumerate(stretches)
        ],
        len(np.unique(every)) / n,
        max(-(-(s.end - s.first) // n) for s in stretches) * (len(stretches) if asked.busiest else 1),
    )  # fmt: skip


def _mask(rows: Times) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each row of the trace is among these; it ends with the last of them."""
    taken = np.zeros(int(rows.max()) + 1, dtype=np.bool_)
    taken[rows] = True
    return taken
