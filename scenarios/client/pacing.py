"""When to read: as soon as bytes arrive or, while very many tokens arrive, in batches at fixed intervals.

A wake-up costs as much as several reads, and the kernel stamps bytes when they arrive, not when they are read. So a
busy client reads at intervals: four times between two tokens of a stream, and every 2.5 ms at least. Sends are not held
back, but the client learns that much later that an answer has ended, which a closed loop reports as lag.

Batches pay off from a number of events per interval that depends on the machine: a wake-up may be expensive, and a
processor that has slept is slow at first. `BATCH_READS_FROM` holds on every machine measured so far; ``harness
calibrate`` measures whether this one profits earlier (`harness.calibration.Calibration.batch_reads_from`). Nothing is
tried out during a run that is measured.

Two events of a stream that arrive between two reads share a stamp. When that becomes more than rare, because some
streams are faster than the mean or tokens come in bursts, the interval shrinks; without kernel stamps there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import gevent

from harness.record.run_spec import BATCH_READS_FROM
from scenarios.client.reader import Reader
from scenarios.client.timers import Ticker

MAX_INTERVAL_NS, _MIN_INTERVAL_NS = 2_500_000, 500_000
_READS_PER_TOKEN = 4
_WINDOW_S = 0.1
_SHARED_LIMIT = 500  # one event in so many may share its stamp: far from what a 99th percentile of ITL would show
_GROWTH_NS = MAX_INTERVAL_NS // 16  # of the longest interval, per window in which sharing was rare


class ReadPacer:
    """Calls ``reader.read`` on gevent's event loop when it is due. ``streams`` returns how many answers are open;
    ``batch_from`` is the number of events per interval from which reads are batched.
    """

    def __init__(self, reader: Reader, streams: Callable[[], int], batch_from: int = BATCH_READS_FROM) -> None:
        self._reader = reader
        self._streams = streams
        self._batch_from = batch_from
        loop: Any = gevent.get_hub().loop
        self._ready: Any = loop.io(reader.fileno(), 1)
        self._ready.start(reader.read)  # level-triggered: it is called again while reads are left over
        self._ticker = Ticker(reader.read)
        self._interval_ns = 0  # 0: read as bytes arrive
        self._max_ns = MAX_INTERVAL_NS
        # At the start of the window: time, events, events that share a stamp, reads without a kernel stamp.
        self._window = monotonic_ns(), 0, 0, 0
        self._timer: Any = loop.timer(_WINDOW_S, _WINDOW_S)
        self._timer.start(self._adapt)

    def _adapt(self) -> None:
        """Choose the interval for the next window from what arrived in the last one."""
        reader = self._reader
        since, seen, shared, unstamped = self._window
        now, events = monotonic_ns(), reader.events
        self._window = now, events, reader.shared, reader.unstamped
        if (reader.shared - shared) * _SHARED_LIMIT > events - seen:
            self._max_ns = max(self._max_ns // 2, _MIN_INTERVAL_NS // 2)
        else:
            self._max_ns = min(self._max_ns + _GROWTH_NS, MAX_INTERVAL_NS)
        ns_per_event = (now - since) / max(events - seen, 1)
        interval_ns = min(self._max_ns, int(ns_per_event * self._streams() / _READS_PER_TOKEN))
        pays_off = interval_ns >= max(_MIN_INTERVAL_NS, self._batch_from * ns_per_event)
        possible = self._ticker.precise and reader.unstamped == unstamped
        self._set_interval(interval_ns if pays_off and possible else 0)

    def _set_interval(self, interval_ns: int) -> None:
        if interval_ns == self._interval_ns:
            return
        self._interval_ns = interval_ns
        if interval_ns:
            self._ready.stop()
            self._ticker.every(interval_ns)
        else:
            self._ticker.stop()
            self._ready.start(self._reader.read)

    def close(self) -> None:
        """Stop reading; the owner closes the reader."""
        for watcher in (self._ready, self._timer):
            watcher.stop()
            watcher.close()
        self._ticker.close()
