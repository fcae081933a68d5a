"""Which spans are one model call: one rule for OpenTelemetry, Langfuse and whatever else sees a call more than once.

A call is often seen by a framework, by the SDK under it and by a gateway behind that. Two spans are the same call when
they name the same response, whatever trace they are in; or when one is an ancestor of the other, its interval holds the
other's, no second call lies under it, and they do not name different responses.

Of the spans of a call the innermost counts; counts, session and model that it does not state are taken from those
around it. A span that holds several calls and names no response of its own adds them up: it is not a call. A later turn
of a conversation may well be a child of the turn before it, but not within its time. The order of the spans in the file
plays no part: they are sorted by trace, in temporary files where they are many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from harness.trace.formats.record import (
    FailedCallError,
    Item,
    LeftOutError,
    Place,
    Reader,
    RowError,
    TraceRecord,
    memory_bytes,
)
from harness.trace.spool import Sorter

SAME = "another span of the same call"
SUM = "a span that adds up the calls under it"
COPY = "same span id as an earlier row (a copy)"

_ROUNDED_NS = 1_000_000
"""Spans of one call are rounded to milliseconds by some, and not by others."""
_HELD = 500_000
"""Spans of one trace that are looked at together; more are not the trace of one request."""
_DEEPEST = 1000
_STATED = ("input_tokens", "output_tokens", "session_id", "model", "cached_tokens")


class Span(NamedTuple):
    """One span, or observation. Those that are not model calls count for their place in the tree."""

    trace_id: str
    id: str
    """Empty: it has none, and is on its own."""
    parent: str
    start_ns: int = 0
    end_ns: int | None = None
    response_id: str | None = None
    item: Item | None = None
    """What the span says of a call; counts may be missing. None: it is about something else."""
    agent: bool = False
    """It is the run of an agent: the calls of its trace are turns of one session, where they name no other."""
    session_id: str | None = None
    """Session of all calls of the trace that name no other."""


class SpanReader(Reader):
    """A format whose records are spans."""

    in_order = False

    def __init__(self) -> None:
        self._spans: Sorter[tuple[Place, Span]] = Sorter(_by_trace, lambda placed: _weigh(placed[1].item))

    def spans(self, record: Any) -> Iterator[Span | RowError | LeftOutError]:
        """The spans of one record; what cannot be read as a value. Raises `RowError`."""
        raise NotImplementedError

    def rows(self, records: Any) -> Iterator[tuple[Place, Item]]:
        for place, record in records:
            try:
                for span in self.spans(record):
                    if isinstance(span, Span):
                        self._spans.add((place, span))
                    else:
                        yield place, span
            except RowError as e:
                yield place, e

    def end(self) -> Iterator[tuple[Place | None, Item]]:
        return calls(iter(self._spans))


class _Call(NamedTuple):
    """A call, and what is needed to choose between two views of it."""

    place: Place
    item: Item
    response_id: str = ""
    key: tuple[Any, ...] = ()


def calls(spans: Iterator[tuple[Place, Span]]) -> Iterator[tuple[Place, Item]]:
    """What the spans come to, which are sorted by trace: each call once, and for each other model span why not."""
    named: Sorter[_Call] = Sorter(lambda call: (call.response_id, call.key), lambda call: _weigh(call.item))
    for trace_id, group in groupby(spans, lambda placed: placed[1].trace_id):
        session: str | None = None
        while some := list(islice(group, _HELD)):
            session = session or some[0][1].session_id
            run = session or (trace_id if any(span.agent for _, span in some) else None)
            for call in _Tree(some).calls():
                if run and isinstance(call.item, TraceRecord) and call.item.session_id is None:
                    call = call._replace(item=call.item._replace(session_id=run))
                if call.response_id:
                    named.add(call)
                else:
                    yield call.place, call.item
    for _, views in groupby(named, lambda call: call.response_id):
        best, *others = views
        yield best.place, best.item
        yield from ((other.place, LeftOutError(SAME)) for other in others)


_Views = list[list[int]]


class _Tree:
    def __init__(self, placed: list[tuple[Place, Span]]) -> None:
        self._spans: list[tuple[Place, Span]] = []
        self._copies: list[Place] = []
        self._at: dict[str, int] = {}
        for place, span in sorted(placed, key=lambda each: _fullest_first(each[1])):
            if span.id and span.id in self._at:
                self._copies += [place] if span.item is not None else []
                continue
            if span.id:
                self._at[span.id] = len(self._spans)
            self._spans.append((place, span))

    def calls(self) -> Iterator[_Call]:
        """Each call, and each span that is none of its own, with the reason."""
        yield from (_Call(place, LeftOutError(COPY)) for place in self._copies)
        around = {at: self._around(at) for at, (_, span) in enumerate(self._spans) if span.item is not None}
        depth = _depths(around)
        below: defaultdict[int | None, tuple[_Views, _Views]] = defaultdict(lambda: ([], []))
        """Span -> the calls within it that were answered, and those that failed."""
        for at in sorted(around, key=lambda at: depth[at], reverse=True):
            answered, failed = below.pop(at, ([], []))
            some = answered or failed
            span = self._spans[at][1]
            names = {self._spans[each][1].response_id for each in (at, *(some[0] if some else ()))} - {None}
            # Around several calls it is one of its own when it names a response, or none of them has one.
            own = span.response_id is not None or (isinstance(span.item, TraceRecord) and not answered)
            if len(some) == 1 and len(names) < 2:
                some[0].append(at)  # another view of the one call under it
            elif some and not own:
                yield _Call(self._spans[at][0], LeftOutError(SUM))
            else:
                (answered if isinstance(span.item, TraceRecord) else failed).append([at])
            beside = below[around[at]]
            below[around[at]] = _joined(beside[0], answered), _joined(beside[1], failed)
            for call in chain(*below.pop(None, ())):
                yield from self._said(call, depth)

    def _around(self, at: int) -> int | None:
        """The nearest model span up the tree whose interval holds this one; none on a ring of parents."""
        span = self._spans[at][1]
        found, above = None, self._at.get(span.parent)
        for _ in range(_DEEPEST):
            if above is None:
                return found
            if above == at:
                return None
            outer = self._spans[above][1]
            if found is None and outer.item is not None and _holds(outer, span):
                found = above
            above = self._at.get(outer.parent)
        return None

    def _said(self, call: list[int], depth: dict[int, int]) -> Iterator[_Call]:
        """One call, from its spans, innermost first; and the spans that are other views of it."""
        best = next((at for at in call if isinstance(self._spans[at][1].item, TraceRecord)), call[0])
        place, span = self._spans[best]
        item = span.item
        assert item is not None
        if isinstance(item, TraceRecord):
            for outer in (self._spans[at][1].item for at in call if at != best):  # what only one around it states
                if isinstance(outer, TraceRecord):
                    item = item._replace(**{n: getattr(outer, n) for n in _STATED if getattr(item, n) is None})
            if item.input_tokens is None and item.text is None and item.messages is None:
                item = RowError("no token counts", "the call has no input tokens and no text: nothing to send")
            elif item.input_tokens == 0 or item.output_tokens == 0:
                item = FailedCallError()
        name = next((name for at in call if (name := self._spans[at][1].response_id)), "")
        key = (
            not isinstance(item, TraceRecord), isinstance(item, TraceRecord) and item.output_tokens is None,
            -depth[best], -span.start_ns, span.end_ns or 0, span.trace_id, span.id,
        )  # fmt: skip
        yield _Call(place, item, name, key)
        yield from (_Call(self._spans[at][0], LeftOutError(SAME)) for at in call if at != best)


def _joined(some: _Views, others: _Views) -> _Views:
    small, large = sorted((others, some), key=len)
    large += small
    return large


def _depths(around: dict[int, int | None]) -> dict[int, int]:
    depth: dict[int, int] = {}
    for at in around:
        path = []
        above: int | None = at
        while above is not None and above not in depth:
            path.append(above)
            above = around[above]
        start = -1 if above is None else depth[above]
        depth |= {each: start + steps for steps, each in enumerate(reversed(path), 1)}
    return depth


def _holds(outer: Span, inner: Span) -> bool:
    end_ns = inner.start_ns if inner.end_ns is None else inner.end_ns
    ends = outer.end_ns is None or end_ns <= outer.end_ns + _ROUNDED_NS
    return ends and inner.start_ns >= outer.start_ns - _ROUNDED_NS


def _fullest_first(span: Span) -> tuple[Any, ...]:
    """Copies may differ, as a span is written again when more is known; of equal ones any will do."""
    row = span.item if isinstance(span.item, TraceRecord) else None
    counts = (0, 0) if row is None else (-(row.input_tokens or 0), -(row.output_tokens or 0))
    return (row is None, span.item is None, *counts, -(span.end_ns or 0), span.start_ns, span.id, span.parent)


def _by_trace(placed: tuple[Place, Span]) -> tuple[str, bool, Place]:
    """What names the session of a trace comes first."""
    place, span = placed
    return span.trace_id, span.session_id is None, place


def _weigh(item: Item | None) -> int:
    return memory_bytes(item) if isinstance(item, TraceRecord) else 500
