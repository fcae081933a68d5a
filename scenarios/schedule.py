"""What goes out when: the order of a worker's requests, the clock they wait for, and what all users of a process share.

Nothing here knows Locust. The plan fixed every time before the clock started; a late request never moves a later one.
"""

from __future__ import annotations

import ctypes
import heapq
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any

import gevent
import psutil
from gevent.event import Event
from gevent.hub import Waiter

from harness.errors import PlanError
from harness.plan import Request
from harness.results import Result
from scenarios.client import Client
from scenarios.payload import prepare

_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1
_libc: Any = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request ready to be sent; times and links as in `harness.plan`."""

    request_id: int
    scheduled_ns: int | None
    after: int | None
    think_ns: int
    payload: bytes
    slice: int = 0
    cancel_after_ns: int | None = None


def prepare_all(
    requests: Iterable[Request], *, endpoint: str, model: str, extra_body: dict[str, object], stream: bool = True
) -> Iterator[Planned]:
    """Every request with its bytes.

    Raises `PlanError` before the bytes would fill this machine's memory, `UsageError` for prompts that do not fit.
    """
    for n, request in enumerate(requests):
        if n % 256 == 0:
            memory = psutil.virtual_memory()
            if memory.available < 0.05 * memory.total:
                raise PlanError(
                    f"the prompts do not fit in this machine's memory ({n} of them did): send a shorter plan, "
                    "or spread it over more machines"
                )
        payload = prepare(request, endpoint=endpoint, model=model, extra_body=extra_body, stream=stream)
        yield Planned(
            request.request_id, request.scheduled_ns, request.after, request.think_ns or 0, payload, request.slice,
            request.cancel_after_ns,
        )  # fmt: skip


class Schedule:
    """The order of one worker's requests, each handed out once.

    Timed (open loop): by the plan's times. Otherwise in the order of the plan, whenever one is asked for. A turn that
    waits for another (``after``) becomes due ``think_ns`` after that one finished, whatever became of it, but not
    before its own time. So a turn that waits for the server is not late: lag is the generator's alone.
    """

    def __init__(self, planned: Iterable[Planned], *, timed: bool) -> None:
        self._timed = timed
        self._free: deque[tuple[int, Planned]] = deque()
        self._waiting: dict[int, list[Planned]] = {}
        self._released: list[tuple[int, int, Planned]] = []
        self.left = 0
        ids = set()
        for one in planned:
            if timed and one.scheduled_ns is None:
                raise PlanError(
                    f"request {one.request_id} has no time: this plan is for a closed loop; run it as one, or make a "
                    "plan with arrivals"
                )
            ids.add(one.request_id)
            self.left += 1
            if one.after is None:
                self._free.append((one.scheduled_ns or 0 if timed else 0, one))
            else:
                self._waiting.setdefault(one.after, []).append(one)
        for after, turns in self._waiting.items():
            if after not in ids or any(turn.request_id <= after for turn in turns):
                raise PlanError(f"request {turns[0].request_id} waits for {after}, which does not come before it here")

    def next_due(self) -> int | None:
        """When the next request is due, ns of the run clock; null when none is before some answer has ended."""
        times = [queue[0][0] for queue in (self._free, self._released) if queue]
        return min(times) if times else None

    def take(self, now_ns: int) -> tuple[Planned, int]:
        """The next request and when it was due. Turns whose time has come go before new sessions."""
        self.left -= 1
        released = self._released
        if released and (not self._free or released[0][0] <= max(now_ns, self._free[0][0])):
            due, _, planned = heapq.heappop(released)
            return planned, due
        due, planned = self._free.popleft()
        return planned, due

    def finished(self, request_id: int, finished_ns: int) -> bool:
        """A request ended; True when that set the time of another."""
        turns = self._waiting.pop(request_id, ())
        for turn in turns:
            due = max(finished_ns + turn.think_ns, turn.scheduled_ns or 0 if self._timed else 0)
            heapq.heappush(self._released, (due, turn.request_id, turn))
        return bool(turns)

    def rest(self) -> list[Planned]:
        """Take everything that was not handed out, by id; of a timed turn that may go, with the time it was due."""
        rest = [one for _, one in self._free]
        rest += [replace(one, scheduled_ns=due) if self._timed else one for due, _, one in self._released]
        rest += [one for turns in self._waiting.values() for one in turns]
        self._free.clear()
        self._released.clear()
        self._waiting.clear()
        self.left = 0
        return sorted(rest, key=lambda one: one.request_id)


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Alarm:
    """Lets one greenlet wait until a moment of the monotonic clock, or until someone rings.

    libev's timers are a millisecond coarse (0.5 ms late in the mean, 1.1 ms at p99, measured). ``precise`` waits on a
    Linux timerfd instead (0.01 and 0.04 ms), which takes a file descriptor; elsewhere it is the same timer.
    """

    def __init__(self, *, precise: bool = False) -> None:
        self._loop: Any = gevent.get_hub().loop
        self._rung = False
        self._waiter: Any = None
        self._fd = -1
        if precise and hasattr(_libc, "timerfd_create"):
            self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._watcher: Any = self._loop.io(self._fd, 1) if self._fd >= 0 else None

    def wait_until(self, due_ns: int | None) -> None:
        """Return at ``due_ns`` (a `time.monotonic_ns` value; null: never), or at once when it rings or has rung."""
        if self._rung or (due_ns is not None and due_ns <= monotonic_ns()):
            self._rung = False
            return
        self._waiter = Waiter()
        watcher = None
        try:
            if due_ns is not None:
                watcher = self._arm(due_ns)
                watcher.start(self._waiter.switch, None)
            self._waiter.get()
        finally:
            self._waiter = None
            self._rung = False
            if watcher is not None:
                watcher.stop()
                if watcher is not self._watcher:
                    watcher.close()

    def _arm(self, due_ns: int) -> Any:
        if self._watcher is None:
            self._loop.update_now()
            return self._loop.timer(max((due_ns - monotonic_ns()) / 1e9, 0.0))
        # Setting the time also clears an expiry nobody read.
        spec = _Itimerspec(_Timespec(0, 0), _Timespec(due_ns // 10**9, due_ns % 10**9))
        _libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None)
        return self._watcher

    def ring(self) -> None:
        """Wake the waiting greenlet soon: after the reads that are ready now were stamped."""
        if not self._rung:
            self._rung = True
            if self._waiter is not None:
                self._loop.run_callback(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None:
            self._waiter.switch(None)

    def close(self) -> None:
        """Give the file descriptor back."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
            os.close(self._fd)


def slot_starts(ramp_s: float | None, slots: int, worker: int = 0, workers: int = 1) -> list[int]:
    """When each slot of a worker joins a closed loop, ns of the run clock: evenly over ``ramp_s``, the first at once.

    The slots of all workers take turns, so that the whole load climbs evenly, too.
    """
    return [round((ramp_s or 0.0) * 1e9 * (slot + worker / workers) / slots) for slot in range(slots)]


class Load:
    """What all users of one process share: the schedule, the client, the start, and the wish to stop.

    ``cap``: most requests in flight (open loop). ``starts``: when each slot joins (closed loop; default: at once).
    """

    def __init__(self, schedule: Schedule, client: Client, cap: int | None = None, starts: Iterable[int] = ()) -> None:
        self.schedule = schedule
        self.client = client
        self.cap = cap
        self._starts = deque(starts)
        self.stopping = False
        self.sent = 0
        self.started = Event()
        self.finished = Event()
        """Set when the last user has left: nothing more will be sent."""
        self._alarms: list[Alarm] = []
        if not schedule.left:
            self.finished.set()

    def begin(self, start_mono_ns: int) -> None:
        """The clock starts; call it at that moment."""
        self.client.start_mono_ns = start_mono_ns
        self.started.set()

    def now_ns(self) -> int:
        """The run clock."""
        return monotonic_ns() - self.client.start_mono_ns

    def join(self, *, precise: bool = False) -> Alarm:
        """A user comes to wait; returns what to wait on."""
        alarm = Alarm(precise=precise)
        self._alarms.append(alarm)
        return alarm

    def next_start(self) -> int:
        """When the next slot joins, ns of the run clock; each call is another slot."""
        return self._starts.popleft() if self._starts else 0

    def leave(self, alarm: Alarm) -> None:
        """A user has nothing more to send."""
        self._alarms.remove(alarm)
        alarm.close()
        if not self._alarms:
            self.finished.set()

    @property
    def over(self) -> bool:
        """True when nothing may or need be sent any more."""
        return self.stopping or not self.schedule.left

    def send_next(self, ended: Callable[[Result], None], free_ns: int | None = None) -> None:
        """Send the next request. It was due at its own time or, in a closed loop, when its slot was free."""
        planned, due = self.schedule.take(self.now_ns())
        self.sent += 1
        self.client.send(
            Result(planned.request_id, max(due, free_ns or 0)), planned.payload, ended, slice_=planned.slice,
            cancel_after_ns=planned.cancel_after_ns,
        )  # fmt: skip
        if not self.schedule.left:
            self._ring()  # that was the last: nobody has anything to wait for

    def ended(self, result: Result) -> None:
        """An answer ended: its session's next turn may now have a time, and under a cap there is room."""
        assert result.finished_ns is not None
        if self.schedule.finished(result.request_id, result.finished_ns) or self.cap is not None:
            self._ring()

    def stop(self) -> None:
        """Send nothing more; what is in flight goes on."""
        self.stopping = True
        self.started.set()
        self._ring()

    def _ring(self) -> None:
        for alarm in self._alarms:
            alarm.ring()
