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

In plans whose sessions wait another rate moves when sessions begin, not the pace within one: a user
who comes twice as often does not think twice as fast. So on a clock ``speed`` times as fast sessions begin ``speed``
times as often, and each of their turns stays as long after the beginning as in the trace. With that the requests/s of a
window are those asked for, from its first second on and at any rate: it holds the turns that are due in it, those of
sessions that began before it among them. These go on from a turn that is not sent, so they wait for nothing and come at
their own time. Turns that are due after the trace's end are so at its beginning. In memory are about 50 bytes a row
while the plan is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from harness.errors import UsageError
from harness.plan.arrivals import Arrangement, Times, TracePass, period_of
from harness.plan.file import PlannedWindow, Windows
from harness.trace.spool import blocks, filled

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


class _Stretch(NamedTuple):
    """Rows of the trace from ``first`` up to, not including, ``end``, counted on when the trace begins again."""

    first: int
    end: int


def windows_in_time(
    arrivals: Times, asked: Windows, *, starts: Times | None = None, lasts_ns: float, speed: float, trace_sha256: str,
    seed: int, most: int | None,
) -> Joined:  # fmt: skip
    """Windows that last ``lasts_ns`` together, on the clock of ``arrivals`` (ns, ascending), at most ``most`` requests.

    ``speed``: factor on that clock that the plan will apply. ``starts``: of each row, when its session's first arrived,
    ns; then turns keep their session's pace whatever the speed, and rows of a window (`PlannedWindow`) are counted in
    the order in which turns are due at this speed. With ``asked.busiest`` each window is the stretch of its length with
    the most requests.

    Raises `UsageError` when all rows arrive at one instant, when nothing falls into the windows, and for a time that
    64-bit nanoseconds do not hold.
    """
    n, period = len(arrivals), period_of(arrivals)
    if lasts_ns >= 2**62:
        raise UsageError("windows would last more than 146 years on the trace's clock: a shorter time, or a lower rate")
    times, order, late = arrivals, None, None
    if starts is not None:
        due = starts + np.rint((arrivals - starts) * speed).astype(np.int64)
        order = np.argsort(due % period, kind="stable")
        times, late = due[order] % period, due[order] // period

    def rows_before(time: int) -> int:
        return time // period * n + int(np.searchsorted(times, time % period))

    count = _count(asked, lasts_ns > period)
    length = max(round(lasts_ns / count), 1)
    if asked.busiest:
        begins = [_busiest_start(times, period, length)] * count
    else:
        begins = [round(period * place) % period for place in _places(asked.draw, count, trace_sha256)]
    stretches, scheduled, left = [], [], most
    for at, which in enumerate(_order(count, seed)):
        first, end = rows_before(begins[which]), rows_before(begins[which] + length)
        if left is not None:
            end = min(end, first + left)
            left -= end - first
        stretches.append(_Stretch(first, end))
        places = np.arange(first, end)
        scheduled.append(places // n * period + times[places % n] + (at * length - begins[which]))
    if not any(stretch.end > stretch.first for stretch in stretches):
        raise UsageError("not one request of the trace falls into the plan's windows: a longer time, or a higher rate")
    lasts_s = length / speed / 1e9
    begin_s = [at * lasts_s for at in range(count)]
    return _joined(
        np.concatenate(scheduled), stretches, n, begin_s, lasts_s, again=asked.busiest, order=order, late=late
    )


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
        _Stretch(starts[which], starts[which] + size) for which, size in zip(_order(count, seed), sizes, strict=True)
    ]
    begins = [None] * count if scheduled is None else [int(scheduled[at]) / 1e9 for at in np.cumsum([0, *sizes[:-1]])]
    none = np.empty(0, np.int64) if scheduled is None else scheduled
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
    scheduled: Times, stretches: Sequence[_Stretch], n: int, begin_s: Sequence[float | None], lasts_s: float | None, *,
    again: bool, order: Times | None = None, late: Times | None = None,
) -> Joined:  # fmt: skip
    """Each pass over the trace that a stretch goes through becomes a part.

    ``again``: each stretch holds the rows of those before it, which need prompts of their own. ``order``: rows of the
    trace in the order of its clock, where that is another; ``late``: passes after its session's first that each is due.
    """
    parts: list[TracePass] = []
    part_of, rows, prompts = [], [], 0
    for first, end in stretches:
        places = np.arange(first, end)
        taken = places % n if order is None else order[places % n]
        passes, group = np.unique(places // n - (0 if late is None else late[places % n]), return_inverse=True)
        part_of.append(len(parts) + group)
        rows.append(taken)
        for k, pass_ in enumerate(passes.tolist()):
            mine = taken[group == k]
            mask = np.zeros(int(mine.max()) + 1, dtype=np.bool_)
            mask[mine] = True
            parts.append(TracePass(len(parts), mask, prompts + (pass_ - int(passes[0]) if end - first > n else 0)))
        if again and len(passes):
            prompts += 1 + int(passes[-1] - passes[0])
    every, most = np.concatenate(rows), max(-(-(s.end - s.first) // n) for s in stretches)
    arranged = Arrangement(
        scheduled, np.concatenate(part_of).astype(np.uint32), parts, rows=None if order is None else every,
    )  # fmt: skip
    windows = [
        PlannedWindow(
            first_row=s.first % n, last_row=(s.end - 1) % n, starts_s=at_s, requests=s.end - s.first, lasts_s=lasts_s
        )
        for s, at_s in zip(stretches, begin_s, strict=True)
    ]
    return Joined(arranged, windows, len(np.unique(every)) / n, most * (len(stretches) if again else 1))
