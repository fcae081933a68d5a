"""Parsing put off until the event loop has nothing else to do: the next requests go out first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from harness.results import Result
from scenarios.client.capture import ToldResponse
from scenarios.client.in_flight import Stream

# Answers wait until there are so many, or until the next sweep: each by itself would find cold caches. Beyond the
# backlog one is parsed on the spot for each that ends.
_TOGETHER, _BACKLOG = 32, 4096
_IDLE_NS = 200_000  # parsed at a time, before the loop turns again


def parse(stream: Stream) -> None:
    """Parse what a stream holds; one that turns out to be over (junk behind its end, no HTTP) ends."""
    if stream.connection is None:
        stream.parse()
    else:
        stream.connection.look(stream)


class Later:
    """Streams that wait to be parsed, in order; ``record`` gets the row of each that ended, once.

    ``loop``: libev's. ``timed``: rows have the times of chunks. Its length: how many wait.
    """

    def __init__(self, loop: Any, record: Callable[[Result], None], *, timed: bool) -> None:
        self._record = record
        self._timed = timed
        self._waiting: deque[Stream] = deque()
        self._idle: Any = loop.idle()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream) -> None:
        """Parse what this stream holds soon, and hand over its row if it ended."""
        if stream.queued:
            return
        stream.queued = True
        self._waiting.append(stream)
        if len(self._waiting) >= _TOGETHER:
            self.begin()
            while len(self._waiting) > _BACKLOG:
                self._next()

    def begin(self) -> None:
        """As soon as the loop is idle, however few wait."""
        if self._waiting and not self._idle.active:
            self._idle.start(self._some)

    def _some(self) -> None:
        """Some, and then a turn of the loop: a request may be due."""
        end_ns = monotonic_ns() + _IDLE_NS
        while self._waiting:
            self._next()
            if monotonic_ns() > end_ns:
                break
        if not self._waiting:
            self._idle.stop()

    def _next(self) -> None:
        stream = self._waiting.popleft()
        if not stream.queued:
            return  # it was handed over before its turn
        if stream.result.finished_ns is None:
            parse(stream)  # this may end it
        stream.queued = False
        if stream.result.finished_ns is not None:
            self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        """Parse, hand over the row, and then what was said to whoever wants to know."""
        stream.fill(timed=self._timed)
        self._record(stream.result)
        if isinstance(stream.response, ToldResponse):
            stream.response.answered(stream.result, stream.response.answer)

    def hand_over(self, stream: Stream) -> None:
        """Parse an answer that ended now, before its turn, and hand over its row, unless that was done."""
        if stream.queued and stream.result.finished_ns is not None:
            stream.queued = False
            self._finish(stream)

    def settle(self) -> None:
        """Parse and hand over all that wait."""
        while self._waiting:
            self._next()
        self._idle.stop()

    def close(self) -> None:
        """Settle, and stop."""
        self.settle()
        self._idle.close()
