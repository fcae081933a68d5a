"""The worker's own metrics, once a second: how late its event loop runs, how busy it is, what it reads.

Off the hot path: a 10 ms tick measures the loop, and the client's counters are read once a second. Rows:
`harness.record.samples`. Plain Python on purpose: for a hundred numbers a second NumPy costs more cache misses
than it saves.
"""

from __future__ import annotations

import gc
import math
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import monotonic_ns

import psutil

from harness.record.samples import Observation
from harness.scenarios.client.client import Client
from harness.scenarios.client.timers import Ticker
from harness.scenarios.dispatch import Dispatcher

TICK_NS = 10_000_000
EVERY_NS = 1_000_000_000
_UNWRITTEN = 3600  # most rows held while the disk takes none; then the oldest are dropped


class Observer:
    """Samples this process from `begin` until `end`; `rows` holds what `take` has not returned yet."""

    def __init__(self, client: Client, dispatcher: Dispatcher, done: Callable[[], int]) -> None:
        self.rows: deque[Observation] = deque(maxlen=_UNWRITTEN)
        self._client = client
        self._dispatcher, self._done = dispatcher, done
        self._process = psutil.Process()
        self._gc_ns = self._gc_began = 0
        self._all = array("q", [0]) * _BUCKETS
        self._lags: list[int] = []
        self._in_flight = 0  # sum over ticks
        self._ticker: Ticker | None = None
        self._due_ns = 0
        self._counts = (0, 0, 0, 0)
        self._at_ns = self._cpu_ns = self._began_ns = self._began_cpu_ns = 0
        self.loop_lag_p99_s: float | None = None
        """99th percentile of the lag of the event loop over the whole run, seconds; null before the first tick."""
        self.cpu_share: float | None = None
        """CPU time per wall time over the whole run."""
        self.unstamped_share: float | None = None
        """As `Client.unstamped_share`, over the whole run."""

    def begin(self) -> None:
        """Start sampling."""
        gc.callbacks.append(self._on_gc)
        self._at_ns = self._began_ns = monotonic_ns()
        self._cpu_ns = self._began_cpu_ns = time.process_time_ns()
        self._counts = self._count()
        self._due_ns = self._at_ns + TICK_NS
        self._ticker = Ticker(self._tick)
        self._ticker.every(TICK_NS)

    def end(self) -> None:
        """Stop: the last row, and the figures of the whole run."""
        if self._ticker is None:
            return
        self._ticker.close()
        self._ticker = None
        self._observe()
        gc.callbacks.remove(self._on_gc)
        self.unstamped_share = self._client.unstamped_share
        wall = max(self._at_ns - self._began_ns, 1)
        self.cpu_share = (self._cpu_ns - self._began_cpu_ns) / wall
        self.loop_lag_p99_s = _from_histogram(self._all, 0.99)

    def take(self) -> list[Observation]:
        """Remove and return the rows; from any thread."""
        taken: list[Observation] = []
        while self.rows:
            taken.append(self.rows.popleft())
        return taken

    # -- the ticks ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Measure how late the loop is. Ticks missed in a stall count, too, or the stall would be one late tick."""
        now = monotonic_ns()
        while self._due_ns <= now:
            self._lags.append(now - self._due_ns)
            self._in_flight += self._client.in_flight
            self._due_ns += TICK_NS
        if now - self._at_ns >= EVERY_NS:
            self._observe()

    def _observe(self) -> None:
        now, cpu = monotonic_ns(), time.process_time_ns()
        lags = sorted(self._lags)
        counts = self._count()
        deltas = [after - before for before, after in zip(self._counts, counts, strict=True)]
        self.rows.append(
            Observation(
                t_ns=now - self._client.start_mono_ns,
                loop_lag_max_ns=lags[-1] if lags else None,
                loop_lag_p99_ns=lags[_rank(0.99, len(lags))] if lags else None,
                cpu_share=(cpu - self._cpu_ns) / max(now - self._at_ns, 1),
                gc_pause_ns=self._gc_ns,
                events=deltas[0], bytes=deltas[1], sent=deltas[2], done=deltas[3],
                in_flight=self._in_flight / len(lags) if lags else None,
                backlog=len(self._client.parse_queue),
                rss_bytes=self._process.memory_info().rss,
                prepared=self._dispatcher.schedule.prepared,
            )
        )  # fmt: skip
        for lag in lags:
            self._all[_bucket(lag)] += 1
        self._at_ns, self._cpu_ns, self._counts = now, cpu, counts
        self._lags, self._in_flight, self._gc_ns = [], 0, 0

    def _count(self) -> tuple[int, int, int, int]:
        return (*self._client.read, self._dispatcher.sent, self._done())

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began = monotonic_ns()
        elif self._gc_began:
            self._gc_ns += monotonic_ns() - self._gc_began
            self._gc_began = 0


# A histogram of lags in steps of 1 %, so that memory does not grow with the length of the run.
_BUCKETS = 3000


def _bucket(lag_ns: int) -> int:
    return min(int(math.log(max(lag_ns, 1)) * 100), _BUCKETS - 1)


def _rank(p: float, n: int) -> int:
    """Index of percentile ``p`` in ``n`` sorted values (inverse of the empirical distribution function)."""
    return max(math.ceil(p * n) - 1, 0)


def _from_histogram(counts: Sequence[int], p: float) -> float | None:
    """Upper edge of the bucket with percentile ``p``, seconds; None without values."""
    upto = list(accumulate(counts))
    return math.exp((bisect_right(upto, _rank(p, upto[-1])) + 1) / 100) / 1e9 if upto[-1] else None
