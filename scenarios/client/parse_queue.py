"""Answers that wait to be parsed until the event loop is otherwise idle: the next requests go out first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

from harness.record.results import Result
from scenarios.client.capture import CapturingResponse
from scenarios.client.in_flight import InFlight

# Answers wait until there are so many, or until the next sweep: each by itself would find cold caches. Beyond the
# backlog, one is parsed on the spot for each that ends.
_TOGETHER, _BACKLOG = 32, 4096
_IDLE_NS = 200_000  # parsed at a time, before the loop turns again


def parse(request: InFlight) -> None:
    """Parse what a request has stored; one that turns out to be over (junk behind its end, not HTTP) ends."""
    if request.connection is None:
        request.parse()
    else:
        request.connection.look(request)


class ParseQueue:
    """Requests whose answers wait to be parsed, in order; ``record`` gets the row of each that has ended, once.

    ``loop``: libev's. ``timed``: rows have chunk times. Its length is how many wait.
    """

    def __init__(self, loop: Any, record: Callable[[Result], None], *, timed: bool) -> None:
        self._record = record
        self._timed = timed
        self._waiting: deque[InFlight] = deque()
        self._idle: Any = loop.idle()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: InFlight) -> None:
        """Parse what this request has stored soon, and hand over its row if it has ended."""
        if request.queued:
            return
        request.queued = True
        self._waiting.append(request)
        if len(self._waiting) >= _TOGETHER:
            self.begin()
            while len(self._waiting) > _BACKLOG:
                self._next()

    def begin(self) -> None:
        """Parse as soon as the loop is idle, however few wait."""
        if self._waiting and not self._idle.active:
            self._idle.start(self._some)

    def _some(self) -> None:
        """Parse some, then let the loop turn: a request may be due."""
        end_ns = monotonic_ns() + _IDLE_NS
        while self._waiting:
            self._next()
            if monotonic_ns() > end_ns:
                break
        if not self._waiting:
            self._idle.stop()

    def _next(self) -> None:
        request = self._waiting.popleft()
        if not request.queued:
            return  # it was handed over before its turn
        if request.result.finished_ns is None:
            parse(request)  # this may end it
        request.queued = False
        if request.result.finished_ns is not None:
            self._finish(request)

    def _finish(self, request: InFlight) -> None:
        request.fill(timed=self._timed)
        self._record(request.result)
        if isinstance(request.response, CapturingResponse):
            request.response.on_answer(request.result, request.response.answer)

    def hand_over(self, request: InFlight) -> None:
        """Parse an answer that has ended now, before its turn, and hand over its row, unless that was done."""
        if request.queued and request.result.finished_ns is not None:
            request.queued = False
            self._finish(request)

    def settle(self) -> None:
        """Parse everything that waits, and hand over the rows."""
        while self._waiting:
            self._next()
        self._idle.stop()

    def close(self) -> None:
        """Settle, and stop."""
        self.settle()
        self._idle.close()
