"""The worker watches itself: how late its event loop runs, how busy it is, what it reads, once a second.

Nothing of this is on the hot path. A 10 ms tick measures the loop; what was read is asked of the client once a second.
Rows: `harness.observations`.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections import deque
from collections.abc import Callable
from time import monotonic_ns

import gevent
import numpy as np
import numpy.typing as npt
import psutil

from harness.observations import Observation
from scenarios.alarm import Alarm
from scenarios.client import Client
from scenarios.schedule import Load

TICK_NS = 10_000_000
EVERY_NS = 1_000_000_000
_UNWRITTEN = 3600  # rows kept for a disk that takes none; after that the oldest are gone


class Observer:
    """Watches this process from `begin` until `end`; `rows` are what was seen and not yet taken."""

    def __init__(self, client: Client, load: Load, done: Callable[[], int]) -> None:
        self.rows: deque[Observation] = deque(maxlen=_UNWRITTEN)
        self._client = client
        self._load, self._done = load, done
        self._process = psutil.Process()
        self._gc_ns = self._gc_began = 0
        self._all = np.zeros(_BUCKETS, dtype=np.int64)
        self._lags = array("q")
        self._in_flight = 0  # sum over ticks
        self._tick: gevent.Greenlet | None = None
        self._counts = (0, 0, 0, 0)
        self._at_ns = self._cpu_ns = self._began_ns = self._began_cpu_ns = 0
        self.loop_lag_p99_s: float | None = None
        """99th percentile of the lag of the event loop over the whole run, seconds; null before the first tick."""
        self.cpu_share: float | None = None
        """CPU time per wall time over the whole run."""
        self.unstamped_share: float | None = None
        """As `Client.unstamped_share`, over the whole run."""

    def begin(self) -> None:
        """The run starts now."""
        gc.callbacks.append(self._on_gc)
        self._at_ns = self._began_ns = monotonic_ns()
        self._cpu_ns = self._began_cpu_ns = time.process_time_ns()
        self._counts = self._count()
        self._tick = gevent.spawn(self._watch)

    def end(self) -> None:
        """The run is over: the last row and the figures of the whole."""
        if self._tick is None:
            return
        self._tick.kill()
        self._tick = None
        self._observe()
        gc.callbacks.remove(self._on_gc)
        self.unstamped_share = self._client.unstamped_share
        wall = max(self._at_ns - self._began_ns, 1)
        self.cpu_share = (self._cpu_ns - self._began_cpu_ns) / wall
        if self._all.any():
            self.loop_lag_p99_s = _from_histogram(self._all, 0.99) / 1e9

    def take(self) -> list[Observation]:
        """The rows since the last call; from any thread."""
        taken: list[Observation] = []
        while self.rows:
            taken.append(self.rows.popleft())
        return taken

    # -- the ticks ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """How late the loop runs each tick. A tick missed in a stall counts, too: that time was late for everyone."""
        alarm = Alarm(precise=True)
        due = monotonic_ns()
        try:
            while True:
                due += TICK_NS
                alarm.wait_until(due)
                now = monotonic_ns()
                self._lags.append(now - due)
                self._in_flight += self._client.in_flight
                if now - self._at_ns >= EVERY_NS and now - due < TICK_NS:  # after a stall: with all its ticks
                    self._observe()
        finally:
            alarm.close()

    def _observe(self) -> None:
        now, cpu = monotonic_ns(), time.process_time_ns()
        lags = np.frombuffer(self._lags, dtype=np.int64)
        counts = self._count()
        deltas = [after - before for before, after in zip(self._counts, counts, strict=True)]
        self.rows.append(
            Observation(
                t_ns=now - self._client.start_mono_ns,
                loop_lag_max_ns=int(lags.max()) if len(lags) else None,
                loop_lag_p99_ns=int(np.quantile(lags, 0.99, method="inverted_cdf")) if len(lags) else None,
                cpu_share=(cpu - self._cpu_ns) / max(now - self._at_ns, 1),
                gc_pause_ns=self._gc_ns,
                events=deltas[0], bytes=deltas[1], sent=deltas[2], done=deltas[3],
                in_flight=self._in_flight / len(lags) if len(lags) else None,
                backlog=self._client.backlog,
                rss_bytes=self._process.memory_info().rss,
                prepared=self._load.schedule.prepared,
            )
        )  # fmt: skip
        if len(lags):
            self._all += np.bincount(_bucket(lags), minlength=_BUCKETS)
        self._at_ns, self._cpu_ns, self._counts = now, cpu, counts
        self._lags, self._in_flight, self._gc_ns = array("q"), 0, 0

    def _count(self) -> tuple[int, int, int, int]:
        return (*self._client.read, self._load.sent, self._done())

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began = monotonic_ns()
        elif self._gc_began:
            self._gc_ns += monotonic_ns() - self._gc_began
            self._gc_began = 0


# A histogram of lags in steps of 1 %, so that a run of days needs no more memory than one of a minute.
_BUCKETS = 3000


def _bucket(lags: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    steps: npt.NDArray[np.int64] = (np.log(np.maximum(lags, 1)) * 100).astype(np.int64)
    return np.minimum(steps, _BUCKETS - 1)


def _from_histogram(counts: npt.NDArray[np.int64], p: float) -> float:
    """Upper edge of the bucket that holds percentile ``p``, ns."""
    index = int(np.searchsorted(np.cumsum(counts), p * counts.sum()))
    return float(np.exp((index + 1) / 100))
