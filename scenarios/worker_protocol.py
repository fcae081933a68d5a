"""How a load worker is controlled: a spec file, commands on stdin, JSON lines on stdout.

The worker prepares the first requests of its slice of the plan, opens connections, then writes::

    {"event": "ready", "requests": 120, "fd_limit": 65536, "host": "node-7"}

and waits for ``start <unix_ns>`` (the common start of all workers) or ``stop``. While it runs, about twice a second,
unless nobody reads::

    {"event": "progress", "t_s": 1.5, "sent": 40, "done": 31, "failed": 0, "in_flight": 9, "output_tokens": 512,
     "ttft_s": [0.05], "e2e_s": [0.31], "tpot_s": [0.01], "quiet_s": {}, "heard": [0]}

``ttft_s``, ``e2e_s`` (from the planned time) and ``tpot_s`` sample requests that ended since the last line; ``quiet_s``
is how long requests have waited for a byte, by server, where that is long; ``heard`` lists servers that sent one.
``silent K``: server K is dead, so what is in flight there has stalled, and nothing more is sent. ``stop``, SIGTERM,
Ctrl-C or the end of stdin: nothing more is sent, and what is in flight has ``drain_s``; a second ``stop`` or SIGTERM
ends that at once. The last line is::

    {"event": "end", "rows": 120, "cpu_share": 0.41, "loop_lag_p99_s": 0.0004, "unstamped_share": 0.0, "exit": null,
     "end_ns": 60123456789}

``exit`` is null when it ended as asked, otherwise the reason.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections import deque
from pathlib import Path
from time import monotonic_ns
from typing import Any

import gevent
import gevent.monkey
import msgspec
from gevent.event import Event

from harness.errors import UsageError, WorkerError
from harness.record.run_spec import WorkerSpec

START_WAIT_S = 600.0
"""How long a ready worker waits for ``start``."""
_poll: Any = gevent.monkey.get_original("select", "poll")


def read_spec(path: Path) -> WorkerSpec:
    """The spec in a file. Raises `UsageError` when it is not one or makes no sense."""
    try:
        spec = msgspec.json.decode(path.read_bytes(), type=WorkerSpec)
    except OSError as e:
        raise UsageError(f"{path}: cannot read the worker's spec ({e.strerror})") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: not a worker's spec ({e})") from e
    if spec.concurrency is None and spec.mode == "closed":
        raise UsageError(f"{path}: a closed loop needs a concurrency")
    if spec.concurrency is not None and spec.concurrency < 1:
        raise UsageError(f"{path}: concurrency {spec.concurrency}: must be at least 1")
    for name in ("timeout_s", "stall_s", "duration_s", "drain_s"):
        value = getattr(spec, name)
        if value is not None and not (0 < value < 1e9 or (name == "drain_s" and value == 0)):
            raise UsageError(f"{path}: {name} {value}: must be a positive number of seconds")
    return spec


class Commands:
    """Lines on stdin, SIGTERM and SIGHUP, as they arrive, without ever blocking the event loop."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque()
        self.arrived = Event()
        self._rest = b""
        self._watcher: Any = gevent.get_hub().loop.io(0, 1)
        self._watcher.start(self._read)
        self._signals: list[Any] = []
        # Ctrl-C may reach a whole process group, and the harness then says "stop" as well: that must not count twice.
        for number, line in ((signal.SIGTERM, "stop"), (signal.SIGHUP, "stop"), (signal.SIGINT, "eof")):
            watcher = gevent.get_hub().loop.signal(number)
            watcher.start(self._put, line)
            self._signals.append(watcher)

    def _put(self, line: str) -> None:
        self.lines.append(line)
        self.arrived.set()

    def _read(self) -> None:
        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._put(line.decode("utf-8", "replace").strip())
        if not data or len(self._rest) > 4096:
            self._watcher.stop()
            self._put("eof")

    def next(self, timeout_s: float | None) -> str | None:
        """The next command, or None after ``timeout_s``."""
        if not self.lines:
            self.arrived.clear()
            self.arrived.wait(timeout_s)
        return self.lines.popleft() if self.lines else None


def say(event: str, *, must: bool = True, **fields: object) -> bool:
    """Write one JSON line; False when the reader does not take it (a progress line then is left out)."""
    line = msgspec.json.encode({"event": event, **fields}) + b"\n"
    poll = _poll()
    poll.register(1, select.POLLOUT)
    # A pipe polls writable when it takes 4096 bytes (PIPE_BUF) in one piece; our lines are shorter.
    deadline = monotonic_ns() + (5_000_000_000 if must else 0)
    while not poll.poll(0):
        if monotonic_ns() > deadline:
            return False
        gevent.sleep(0.01)
    try:
        os.write(1, line)
    except OSError:
        return False
    return True


def start_ns(commands: Commands) -> int | None:
    """The common start, unix ns; None after ``stop``."""
    line = commands.next(START_WAIT_S)
    if line is None:
        raise WorkerError(f"nobody said when to start within {START_WAIT_S:g} s")
    if line in ("stop", "eof"):
        return None
    word, _, number = line.partition(" ")
    if word != "start" or not number.isdigit():
        raise UsageError(f"{line!r} is not a command: start <unix_ns> or stop")
    if abs(int(number) - time.time_ns()) > START_WAIT_S * 1e9:
        raise UsageError(f"the start is more than {START_WAIT_S:g} s away from this host's clock: are the clocks set?")
    return int(number)
