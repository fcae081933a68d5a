"""When to read: at once, or, while very many tokens arrive, a moment later and many together.

A wake-up costs as much as some reads, and the kernel stamps bytes when they come, not when they are read. So a busy
client reads only so often: four times in the time between two tokens of a stream, and every 2.5 ms at least. Sends are
not held back; but that an answer has ended is known that much later, which a closed loop sees as lag. Where few
events come in a period it depends on the machine whether that saves anything: a wake-up may be dear, and a processor
that has slept is slow at first. There both ways are tried, and the one that costs less is kept.

Two events that come between two reads share a stamp. Where that becomes more than rare, since some streams are faster
than others or tokens come in bursts, periods get shorter; where the kernel gives no stamps there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns, thread_time_ns
from typing import Any

import gevent

from scenarios.alarm import Ticker
from scenarios.hot_path import Reader

MOST_NS, _LEAST_NS = 2_500_000, 500_000
_READS = 4  # between two tokens of a stream
_WINDOW_S = 0.1
_FEW, _MANY = 30, 80  # events in a period: not worth it; worth it on every machine so far
_TRIAL = 32  # windows, of which the last two are spent on the way that cost more
_NEWEST = 0.4  # what a window counts for in the cost of its way
_RARE = 500  # of so many events one may share its stamp: far from what a 99th percentile of gaps would show
_GROWTH_NS = MOST_NS // 16  # of the longest period, per window without that


class Pace:
    """Calls ``reader.read`` on gevent's event loop when it should be; ``streams`` says how many answers are open."""

    def __init__(self, reader: Reader, streams: Callable[[], int]) -> None:
        self._reader = reader
        self._streams = streams
        loop: Any = gevent.get_hub().loop
        self._ready: Any = loop.io(reader.fileno(), 1)
        self._ready.start(reader.read)  # while it returns True, the same watcher still has cause
        self._ticker = Ticker(reader.read)
        self._period_ns = 0  # 0: at once
        self._most_ns = MOST_NS
        # When it began; until then processor time, events, shared ones, reads without a stamp
        self._window = monotonic_ns(), thread_time_ns(), 0, 0, 0
        self._costs: list[float | None] = [None, None]  # processor time of an event: read at once, in rounds
        self._tried = 0
        self._looker: Any = loop.timer(_WINDOW_S, _WINDOW_S)
        self._looker.start(self._look)

    def _look(self) -> None:
        """How often to read, by what came of late."""
        reader = self._reader
        since, spent, seen, shared, unstamped = self._window
        now, cpu, events = monotonic_ns(), thread_time_ns(), reader.events
        self._window = now, cpu, events, reader.shared, reader.unstamped
        if (reader.shared - shared) * _RARE > events - seen:
            self._most_ns = max(self._most_ns // 2, _LEAST_NS // 2)
        else:
            self._most_ns = min(self._most_ns + _GROWTH_NS, MOST_NS)
        came = max(events - seen, 1)
        ns_per_event = (now - since) / came
        period_ns = min(self._most_ns, int(ns_per_event * self._streams() / _READS))
        if period_ns < _LEAST_NS or not self._ticker.precise or reader.unstamped != unstamped:
            worth = False
        elif _FEW * ns_per_event <= period_ns < _MANY * ns_per_event:
            worth = self._try((cpu - spent) / came)
        else:
            worth = period_ns >= _MANY * ns_per_event
        self._every(period_ns if worth else 0)

    def _try(self, cost: float) -> bool:
        """Whether to read in rounds, after a window in which an event has cost so much."""
        rounds = bool(self._period_ns)
        known = self._costs[rounds]
        self._costs[rounds] = cost if known is None else known + (cost - known) * _NEWEST
        self._tried = (self._tried + 1) % _TRIAL
        at_once, in_rounds = self._costs
        if at_once is None or in_rounds is None:
            return not rounds
        return (in_rounds < at_once) != (self._tried >= _TRIAL - 2)

    def _every(self, period_ns: int) -> None:
        if period_ns == self._period_ns:
            return
        self._period_ns = period_ns
        if period_ns:
            self._ready.stop()
            self._ticker.every(period_ns)
        else:
            self._ticker.stop()
            self._ready.start(self._reader.read)

    def close(self) -> None:
        """Read no more; the reader is closed by its owner."""
        for watcher in (self._ready, self._looker):
            watcher.stop()
            watcher.close()
        self._ticker.close()
