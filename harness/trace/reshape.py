"""Smaller traces from a trace: a window of time, a number of requests, or thinner. Sessions stay whole.

What the choice does to the shape differs: a window or the first N requests keep rate and burstiness, but prefixes that
were warm before are cold; thinning keeps the shape over time at a lower rate (burstiness D of counts becomes 1 + p (D
- 1)), but requests that shared a prefix lose partners. So `harness trace sample` prints the shape before and after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from harness.errors import TraceError, UsageError
from harness.trace.io import Trace, TraceRecord
from harness.trace.spool import Sessions

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
