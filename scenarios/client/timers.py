"""Timers on gevent's event loop that are more precise than its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from time import monotonic_ns
from typing import Any

import gevent
from gevent.hub import Waiter

_CLOCK_MONOTONIC, _ABSOLUTE = 1, 1
_libc: Any = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Timer:
    """A Linux timerfd: its descriptor (-1 on other systems) becomes readable when it expires."""

    def __init__(self) -> None:
        self.fd = -1
        spec = _Itimerspec()  # made once: the timer is set for every request
        self._value, self._interval, self._reference = spec.value, spec.interval, ctypes.byref(spec)
        if hasattr(_libc, "timerfd_create"):
            self.fd = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)

    def set(self, due_ns: int, every_ns: int = 0) -> None:
        """Expire at ``due_ns``, a `time.monotonic_ns` value, and then every ``every_ns`` if that is not 0."""
        self._value.s, self._value.ns = divmod(due_ns, 10**9)
        self._interval.s, self._interval.ns = divmod(every_ns, 10**9)
        _libc.timerfd_settime(self.fd, _ABSOLUTE, self._reference, None)

    def clear(self) -> None:
        """Acknowledge: not readable until it expires again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        """Close the file descriptor. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Ticker:
    """Calls a function periodically on gevent's event loop; periods missed while the loop was busy are one call.

    Where it is ``precise``, a call that returns True is repeated in the next iteration of the loop.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._timer = Timer()
        self._watcher: Any = None
        self.precise = self._timer.fd >= 0
        """Whether periods of less than a few milliseconds are possible."""

    def every(self, period_ns: int) -> None:
        """Start, or change the period."""
        self.stop()
        loop: Any = gevent.get_hub().loop
        if self.precise:
            self._timer.set(monotonic_ns() + period_ns, period_ns)
            self._watcher = loop.io(self._timer.fd, 1)
            self._watcher.start(self._tick)
        else:
            self._watcher = loop.timer(period_ns / 1e9, period_ns / 1e9)
            self._watcher.start(self._call, update=True)

    def _tick(self) -> None:
        if not self._call():
            self._timer.clear()

    def stop(self) -> None:
        """Stop calling."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None

    def close(self) -> None:
        """Stop, and close the file descriptor. Safe to call twice."""
        self.stop()
        self._timer.close()


class WakeTimer:
    """Lets one greenlet wait until a time of the monotonic clock, or until it is woken.

    libev's timers have a resolution of a millisecond; they are used where there is no timerfd.
    """

    def __init__(self) -> None:
        self._loop: Any = gevent.get_hub().loop
        self._woken = False
        self._waiter: Any = None
        self._timer = Timer()
        self._watcher: Any = self._loop.io(self._timer.fd, 1) if self._timer.fd >= 0 else None

    def wait_until(self, due_ns: int | None) -> None:
        """Return at ``due_ns`` (a `time.monotonic_ns` value; None: never), or as soon as `wake` is or was called."""
        if self._woken or (due_ns is not None and due_ns <= monotonic_ns()):
            self._woken = False
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
            self._woken = False
            if watcher is not None:
                watcher.stop()
                if watcher is not self._watcher:
                    watcher.close()

    def _arm(self, due_ns: int) -> Any:
        if self._watcher is None:
            self._loop.update_now()
            return self._loop.timer(max((due_ns - monotonic_ns()) / 1e9, 0.0))
        self._timer.set(due_ns)
        return self._watcher

    def wake(self) -> None:
        """Wake the waiting greenlet, after pending reads were stamped."""
        if not self._woken:
            self._woken = True
            if self._waiter is not None:
                self._loop.run_callback(self._switch)

    def _switch(self) -> None:
        if self._waiter is not None:
            self._waiter.switch(None)

    def close(self) -> None:
        """Close the file descriptor."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
            self._watcher = None
        self._timer.close()
