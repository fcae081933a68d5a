"""When to read: at once, or, while very many tokens arrive, a moment later and many together.

A wake-up costs as much as some reads, and the kernel stamps bytes when they come, not when they are read. So a busy
client pauses between two rounds of reading: a fifth of the time between two tokens of a stream, and 2 ms at most. Sends
are not held back; but that an answer has ended is known that much later, which a closed loop sees as lag.

Two events that come between two reads share a stamp. Where that becomes more than rare, since some streams are faster
than others or tokens come in bursts, pauses get shorter; where the kernel gives no stamps there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import gevent

from scenarios.alarm import Timer
from scenarios.hot_path import Reader

MOST_NS, _LEAST_NS = 2_000_000, 500_000
_SHARE = 5
_WINDOW_NS = 100_000_000
_FEW = 16  # events that come in a pause: not worth it
_RARE = 500  # of so many events one may share its stamp: far from what a 99th percentile of gaps would show
_GROWTH_NS = MOST_NS // 16  # of the longest pause, per window without that


class Pace:
    """Calls ``reader.read`` on gevent's event loop when it should be; ``streams`` says how many answers are open."""

    def __init__(self, reader: Reader, streams: Callable[[], int]) -> None:
        self._reader = reader
        self._streams = streams
        loop: Any = gevent.get_hub().loop
        self._ready: Any = loop.io(reader.fileno(), 1)
        self._ready.start(self._read)
        self._timer = Timer()
        self._resume: Any = loop.io(self._timer.fd, 1) if self._timer.fd >= 0 else None
        self._pause_ns = 0
        self._most_ns = MOST_NS
        self._window = monotonic_ns(), 0, 0, 0  # when it began; until then events, shared ones, reads without a stamp

    def _read(self) -> None:
        if self._reader.read():
            return  # and go on at the next turn of the loop: the same watcher still has cause
        now = monotonic_ns()
        if now - self._window[0] > _WINDOW_NS:
            self._look(now, self._reader.events)
        if self._pause_ns:
            self._timer.set(now + self._pause_ns)
            if not self._resume.active:
                self._ready.stop()
                self._resume.start(self._read)
        elif not self._ready.active:
            self._resume.stop()
            self._ready.start(self._read)

    def _look(self, now: int, events: int) -> None:
        """How long a pause may be, by what came of late."""
        reader = self._reader
        since, seen, shared, unstamped = self._window
        self._window = now, events, reader.shared, reader.unstamped
        if (reader.shared - shared) * _RARE > events - seen:
            self._most_ns = max(self._most_ns // 2, _LEAST_NS // 2)
        else:
            self._most_ns = min(self._most_ns + _GROWTH_NS, MOST_NS)
        ns_per_event = (now - since) / max(events - seen, 1)
        pause_ns = min(self._most_ns, int(ns_per_event * self._streams() / _SHARE))
        worth = pause_ns >= max(_LEAST_NS, _FEW * ns_per_event)
        can = self._resume is not None and reader.unstamped == unstamped
        self._pause_ns = pause_ns if worth and can else 0

    def close(self) -> None:
        """Read no more; the reader is closed by its owner."""
        for watcher in (self._ready, self._resume):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._timer.close()
