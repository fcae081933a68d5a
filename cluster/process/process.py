"""One process group with an owner: start, readiness, log tail, stop; nothing is left behind, whoever dies first.

Every command runs under a guard (cluster/process/guard.py) that ends the command and all its descendants when the
owner orders it or dies. vLLM needs this: killing its first process leaves the engine running and holding memory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.cluster.process import registry
from harness.cluster.process.registry import MARK
from harness.errors import HarnessError, ServerError

GUARD = Path(__file__).with_name("guard.py")
GRACE_S = 5.0
"""Between SIGTERM and SIGKILL."""
NO_SECRETS: dict[str, str | None] = dict.fromkeys(
    (
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "HARNESS_API_KEY",
        "OPENAI_API_KEY",
        "VLLM_API_KEY",
        "HARNESS_JUDGE_API_KEY",
    )
)
"""Changes to an environment: what a server or load worker has no business with is taken away before it gets its own."""
TAIL_BYTES = 1 << 16
LINE_CHARS = 400
"""A log line longer than this is cut in messages."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a process ended, as its log has it."""

    words: str
    """The cause and what to do."""
    port_taken: bool = False
    """Another process has its port: on another one it may start."""


class PortTakenError(ServerError):
    """A server did not start because another process has its port."""


class Process:
    """A running command, its descendants and its log. Use `Process.start`; safe to use from several threads."""

    def __init__(
        self,
        name: str,
        log: Path | None,
        mark: str,
        argv: Sequence[str],
        control: int,
        status: int,
        popen: subprocess.Popen[bytes],
    ) -> None:
        self.name, self.log, self._mark, self._argv = name, log, mark, argv
        self.trouble: str | None = None
        """Why nothing is known of it any more; a process of this host always tells its end."""
        self.host = socket.gethostname()
        self.pid: int | None = None
        """Of the command itself (its group leader); null until it has started."""
        self.guard: int | None = None
        """Parent of it, and of what it started and left; null until it has started."""
        self.survivors: list[int] = []
        """What outlived SIGKILL: stuck in the kernel. `harness ps` goes on showing it."""
        self._control: int | None = control
        self._lock = threading.Lock()
        self._exit: int | None = None
        self._ended = threading.Event()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stdin, stdout = popen.stdin, popen.stdout
        self._stdin_lock = threading.Lock()
        self._reader: threading.Thread | None = None
        if stdout is not None:
            self._reader = threading.Thread(target=self._read_lines, args=(stdout,), name=f"{name} out", daemon=True)
            self._reader.start()
        threading.Thread(target=self._watch, args=(status, popen), name=f"{name} status", daemon=True).start()

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        name: str,
        env: Mapping[str, str | None] | None = None,
        log: Path | None = None,
        pipes: bool = False,
        grace_s: float = GRACE_S,
        cpus: Sequence[int] | None = None,
        nice: int | None = None,
    ) -> Process:
        """Run ``argv`` (no shell, no secrets: everyone on the host can read it) in a session of its own.

        ``env`` is added to this process's environment; None takes a variable away. ``log`` is appended with stderr and,
        without ``pipes``, stdout. With ``pipes`` stdin and stdout talk to `write_line` and `lines`. ``cpus``: run on
        these processors only. ``nice``: at this nice value, or as near to it as this user may; null: at this process's.
        Raises `HarnessError` when the log cannot be written or no process can be made. A command that does not exist
        ends with code 127 and says so in its log.
        """
        mark = f"{log or name}:{secrets.token_hex(8)}"
        control, control_end = os.pipe()
        status_end, status = os.pipe()
        where = ",".join(map(str, cpus)) if cpus else "-"
        place = [where, "-" if nice is None else str(nice)]
        guard = [sys.executable, "-I", "-S", str(GUARD), str(control), str(status), str(grace_s), *place, *argv]
        try:
            with (log or Path(os.devnull)).open("ab") as out:
                popen = subprocess.Popen(
                    guard,
                    stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if pipes else out,
                    stderr=out,
                    env=merged_environment({**(env or {}), MARK: mark}),
                    pass_fds=(control, status),
                    start_new_session=True,
                )
        except OSError as e:
            os.close(control_end)
            os.close(status_end)
            raise HarnessError(f"{name}: cannot start: {e.filename or argv[0]}: {e.strerror}") from e
        finally:
            os.close(control)
            os.close(status)
        return cls(name, log, mark, argv, control_end, status_end, popen)

    def _watch(self, status: int, popen: subprocess.Popen[bytes]) -> None:
        """Thread: follow the guard's status lines to their end."""
        text = ""
        entry: str | None = None
        with open(status, encoding="ascii", errors="replace") as lines:
            for line in lines:
                word, _, value = line.partition(" ")
                if word == "pid":
                    self.pid = int(value)
                    entry = self._register(self.pid)
                elif word == "left":
                    self.survivors = [int(pid) for pid in value.split()]
                elif word == "exit":
                    text = value
        if text:
            self._exit = int(text)
        elif self.survivors:
            self._exit = -signal.SIGKILL
        else:  # the guard was killed: the kernel ended the command, its other descendants are ours to find
            sweep(self.pid, self._mark)
            self._exit = -signal.SIGKILL
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=10)  # the stand-in follows the guard
        if self._reader is not None:
            self._reader.join(timeout=5)  # so that `lines` is complete once `poll` says it has ended
        self._close_control()
        if not self.survivors:
            registry.forget(entry)
        if self._stdin is not None:
            with self._stdin_lock, contextlib.suppress(OSError):
                self._stdin.close()
        self._ended.set()

    def _register(self, pid: int) -> str | None:
        """Note it down for `harness ps`, `harness stop` and the sweep for orphans."""
        try:
            self.guard = guard = psutil.Process(pid).ppid()
        except psutil.Error:
            return None  # it has ended already
        return registry.register(
            name=self.name, owner=os.getpid(), guard=guard, command=pid, mark=self._mark, argv=self._argv, log=self.log
        )

    def _read_lines(self, stdout: object) -> None:
        """Thread: stdout to the queue, line by line; a line without end is cut, not collected for ever."""
        readline = stdout.readline  # type: ignore[attr-defined]
        while raw := readline(1 << 20):
            self._lines.put(raw.decode(errors="replace").rstrip("\r\n"))

    def poll(self) -> int | None:
        """Exit code, negative for a signal; null while anything of the group still runs (but for ``survivors``)."""
        return self._exit if self._ended.is_set() else None

    def wait(self, timeout_s: float) -> int | None:
        """`poll` after the end or ``timeout_s``, whichever is first."""
        self._ended.wait(timeout_s)
        return self.poll()

    def stop(self, grace_s: float = GRACE_S) -> int | None:
        """SIGTERM, ``grace_s``, SIGKILL to all that is left; the exit code once nothing is. Idempotent.

        What is still there 30 s after SIGKILL is given up: then ``survivors`` and the log name it. Null: even the guard
        did not answer in time.
        """
        with self._lock:  # one order only: the guard reads what several callers write as one number
            if self._control is not None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._control, f"{grace_s}".encode())
                os.close(self._control)
                self._control = None
        return self.wait(grace_s + 40)

    def kill(self) -> int | None:
        """`stop` without a grace."""
        return self.stop(0)

    def _close_control(self) -> None:
        with self._lock:
            if self._control is not None:
                os.close(self._control)
                self._control = None

    def write_line(self, line: str) -> bool:
        """Send one line to stdin; False when the process does not read it any more."""
        if self._stdin is None:
            return False
        with self._stdin_lock:
            try:
                self._stdin.write(line.encode() + b"\n")
                self._stdin.flush()
            except (OSError, ValueError):
                return False
        return True

    def lines(self) -> list[str]:
        """Lines printed to stdout since the last call; never waits."""
        found: list[str] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._lines.get_nowait())
        return found

    def tail(self, n: int = 20) -> list[str]:
        """The last ``n`` lines of the log that say something, oldest first."""
        return tail(self.log, n) if self.log else []

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def merged_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of this process with ``changes``; None removes a variable."""
    merged = {**os.environ, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def describe_exit(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "still running"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (out of memory, or killed by someone)" if code == -signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    return f"exit code {code}"


def tail(log: Path, n: int) -> list[str]:
    """The last ``n`` non-empty lines of a log file, each cut to a readable length; empty when there is no file."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip()[:LINE_CHARS] for line in text.splitlines() if line.strip()]
    return lines[-n:]


def sweep(session: int | None, mark: str) -> list[int]:
    """Kill every process of this session or with this group mark; returns their pids.

    Both, because a process may leave the session, and may overwrite its environment (vLLM and Ray rename themselves).
    """
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            ours = os.getsid(process.pid) == session or process.environ().get(MARK) == mark
            if ours and process.pid != os.getpid():
                process.kill()
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue  # it ended, or belongs to someone else: not ours
    return found


def wait_ready(
    check: Callable[[], bool],
    process: Process,
    timeout_s: float,
    *,
    explain: Callable[[Sequence[str]], Cause | None] = lambda lines: None,
    poll_s: float = 0.25,
) -> float:
    """Seconds until ``check()`` was true.

    Raises `ServerError` (`PortTakenError`) with the last log lines, and what ``explain`` makes of the log, when the
    process ends first or ``timeout_s`` passes. The process is not stopped here: it is the caller's.
    """
    start = time.monotonic()
    while True:
        code = process.poll()
        waited = time.monotonic() - start
        if code is not None:
            problem = f"ended before it was ready: {describe_exit(code)} after {waited:.1f} s"
        elif check():
            return time.monotonic() - start
        elif waited > timeout_s:
            problem = f"was not ready after {waited:.0f} s"
        else:
            process.wait(poll_s)
            continue
        cause = explain(process.tail(400))
        where = f"; its log: {process.log}" if process.log else ""
        failure = PortTakenError if cause and cause.port_taken else ServerError
        raise failure(f"{process.name} {problem}{f': {cause.words}' if cause else ''}{where}", process.tail())
