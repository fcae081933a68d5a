"""What a server's processes ran and waited for a processor, by the kernel's own count of each thread.

``/proc/PID/task/TID/schedstat`` holds, since the thread began: ns on a processor, ns ready to run without one (run
delay). Source: Linux, Documentation/scheduler/sched-stats.rst.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import psutil

from harness.cluster.process.guard import children
from harness.record.samples import ProcessorSecond

EVERY_S = 1.0
WORK_SHARE = 0.1
"""Of an interval, that a thread ran or waited: below it, it has no work. vLLM has dozens of threads that wake up a
hundred times a second to find nothing. They wait for many times what they run, and nothing waits for them."""


class Times(NamedTuple):
    """Of one thread or many, ns."""

    run_ns: int
    delay_ns: int


def read_threads(pids: Sequence[int]) -> dict[int, Times]:
    """What each thread of these processes has run and waited since it began; empty where the kernel does not count.

    A thread, or process, that ended while we looked is left out.
    """
    found: dict[int, Times] = {}
    for pid in pids:
        try:
            threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - as in cluster/process/guard.py: there may be thousands
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:  # noqa: PTH123
                    run, delay = file.read().split()[:2]
                found[int(thread)] = Times(int(run), int(delay))
            except (OSError, ValueError):
                continue
    return found


class HostTimes(NamedTuple):
    """Of all processors of this host since it started, ns; null: its system does not say."""

    busy_ns: int | None
    stolen_ns: int | None


def host_times() -> HostTimes:
    """What ran on this host, and what was taken from it."""
    times = psutil.cpu_times()
    busy_s = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    stolen_s = getattr(times, "steal", None)
    return HostTimes(round(busy_s * 1e9), None if stolen_s is None else round(stolen_s * 1e9))


def grown(now: int | None, before: int | None) -> int | None:
    """By how much a counter has grown; null when it is not known, 0 when it fell (the kernel corrects itself)."""
    return None if now is None or before is None else max(0, now - before)


class Meter:
    """What one server ran and waited between two readings of its threads, which come and go."""

    def __init__(self) -> None:
        self._before: Mapping[int, Times] | None = None
        self._root: int | None = None

    def take(self, root: int, threads: Mapping[int, Times], length_ns: int) -> tuple[int, int, int, int] | None:
        """Run and delay since the last reading, ``length_ns`` ago, of all threads and of those with work
        (`WORK_SHARE`), ns; null when there was none, or it was of another ``root`` process, before a new start.

        A thread that is new, or has the number of one that ended, counts from its own beginning; the last moments of
        one that ended are not known.
        """
        before, self._before = self._before, threads
        known, self._root = self._root == root, root
        if before is None or not known:
            return None
        run = delay = work_run = work_delay = 0
        for thread, now in threads.items():
            then = before.get(thread, Times(0, 0))
            if now.run_ns < then.run_ns or now.delay_ns < then.delay_ns:
                then = Times(0, 0)
            ran, waited = now.run_ns - then.run_ns, now.delay_ns - then.delay_ns
            works = ran + waited >= WORK_SHARE * length_ns
            run, delay = run + ran, delay + waited
            work_run, work_delay = work_run + works * ran, work_delay + works * waited
        return run, delay, work_run, work_delay

    def forget(self) -> None:
        """The next reading is the first again."""
        self._before = None


class SampledServer(Protocol):
    """Whose processor time is sampled: a replica's owner."""

    def processes(self, tree: Mapping[int, Sequence[int]]) -> list[int]:
        """Its processes, the one it was started as first, from the children of every process; none: not serving."""

    def note_second(self, second: ProcessorSecond) -> None:
        """What it ran and waited."""


class CpuTimesSampler:
    """Samples the servers of one host each second, from a thread of its own, until it is stopped."""

    def __init__(self, servers: Sequence[SampledServer], start_unix_ns: int) -> None:
        """``start_unix_ns``: the common start by this host's clock."""
        self._servers = [(server, Meter()) for server in servers]
        # One reading of both clocks, so that a wall clock that is set during the run moves nothing.
        self._start_mono_ns = time.monotonic_ns() + start_unix_ns - time.time_ns()
        self._before_ns: int | None = None
        self._host = HostTimes(None, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="processor times", daemon=True)
        self.start = self._thread.start

    def stop(self) -> None:
        """After one more sample."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            self.sample()
            if self._stop.is_set():
                return
            due = max(due + EVERY_S, time.monotonic())
            self._stop.wait(max(0.0, due - time.monotonic()))

    def sample(self) -> None:
        """Once; a server that serves now, and did the last time, gets a row of what was between."""
        tree = children()
        now_ns, host = time.monotonic_ns(), host_times()
        length_ns = now_ns - (self._before_ns or now_ns)
        for server, meter in self._servers:
            pids = server.processes(tree)
            threads = read_threads(pids)
            if not threads:
                meter.forget()
            elif (used := meter.take(pids[0], threads, length_ns)) and length_ns:
                counted = dict(zip(("run_ns", "delay_ns", "work_run_ns", "work_delay_ns"), used, strict=True))
                server.note_second(
                    ProcessorSecond(
                        t_ns=now_ns - self._start_mono_ns, length_ns=length_ns, threads=len(threads), **counted,
                        host_busy_ns=grown(host.busy_ns, self._host.busy_ns),
                        host_stolen_ns=grown(host.stolen_ns, self._host.stolen_ns),
                    )
                )  # fmt: skip
        self._before_ns, self._host = now_ns, host
