"""What runs inside Ray actors: the owner of one server, and the owner of one load worker.

Plain classes without ray in them until they are made remote, so their behaviour can be tested in-process. Methods run
in threads (max_concurrency), so `stop` overtakes a `start` that still waits.
"""

from __future__ import annotations

import os
import queue
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.process import GRACE_S, Process, describe_exit, wait_ready
from harness import probe
from harness.errors import HarnessError, ServerError, WorkerError

TRIES = 3
"""Starts with a new port when another process was faster to take it."""
LOG_BYTES = 8 << 20
"""How much of a remote log is brought home."""
ASK_S = 15.0


class _Command(Protocol):
    argv: list[str]
    env: dict[str, str | None]


@dataclass(frozen=True, slots=True)
class Started:
    """A server that answers."""

    base_url: str
    ready_s: float
    cpus: list[int] | None
    """Processors it may use; null: all."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is none; a value, because exceptions lose their type between Ray processes."""

    message: str


class ReplicaActor:
    """Owns one server process."""

    def __init__(self, engine: Any, name: str, log: str, api_key: str, loopback: bool) -> None:
        self._engine, self._name, self._api_key = engine, name, api_key
        self._log = Path(log)
        if not self._log.parent.is_dir():  # another host, no shared storage: keep it here, `log_bytes` brings it home
            self._log = Path(tempfile.mkdtemp(prefix="harness-")) / self._log.name
        self._host = "127.0.0.1" if loopback else node_address()
        self._process: Process | None = None
        self._cpus: list[int] | None = None
        self._stopped = False
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()

    def node_id(self) -> str:
        """The Ray node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def messages(self) -> list[str]:
        """Words for the person since the last call."""
        found = []
        while not self._messages.empty():
            found.append(self._messages.get_nowait())
        return found

    def prepare(self) -> Failed | None:
        """Whatever takes long before a server can start: its weights, on this host."""
        try:
            self._engine.prepare(self._messages.put)
        except HarnessError as e:
            return Failed(f"{self._name}: {e}")
        return None

    def start(self, ready_s: float, vcpu: int | None, rank: int, count: int) -> Started | Failed:
        """Start the server and wait until it has answered one real request.

        On a CPU tier ``vcpu`` is its size, and this server is number ``rank`` of ``count`` on this host.
        """
        self._cpus = choose_cpus(sorted(os.sched_getaffinity(0)), vcpu, rank, count) if vcpu else None
        deadline = time.monotonic() + ready_s
        for attempt in range(1, TRIES + 1):
            try:
                return self._start_once(deadline - time.monotonic())
            except HarnessError as e:
                self._end(0)
                clash = "port in use" in str(e) and attempt < TRIES and not self._stopped
                if not clash:
                    return Failed(str(e))
                self._messages.put("its port was taken meanwhile; trying another one")
        raise AssertionError("unreachable")

    def _start_once(self, ready_s: float) -> Started:
        port = free_port(self._host)
        command: _Command = self._engine.command(self._host, port, self._api_key)
        before = time.monotonic()
        self._process = Process.start(
            command.argv, name=self._name, env=command.env, log=self._log, cpus=self._cpus
        )  # fmt: skip
        if self._stopped:  # looked at after the start: a `stop` before it found nothing to end
            raise ServerError(f"{self._name}: stopped before it was ready")
        base_url = f"http://{self._host}:{port}/v1"
        answers = ready_check(base_url, self._engine.served_model, self._api_key)
        wait_ready(answers, self._process, ready_s, explain=self._engine.explain)
        return Started(base_url, time.monotonic() - before, self._cpus)

    def ended(self) -> str | None:
        """How the server ended, with its last words; null while it runs."""
        process = self._process
        if process is None or (code := process.poll()) is None:
            return None
        cause = self._engine.explain(process.tail(400))
        return describe_exit(code) + (f": {cause}" if cause else "")

    def log_bytes(self) -> bytes:
        """The end of the log, for a driver on another host."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
                return file.read()
        except OSError:
            return b""

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End the server and everything it started."""
        self._stopped = True
        self._end(grace_s)

    def _end(self, grace_s: float) -> None:
        if self._process is not None:
            self._process.stop(grace_s)


class WorkerActor:
    """Owns one load worker process."""

    def __init__(self) -> None:
        self._process: Process | None = None

    def begin(self, argv: Sequence[str], env: dict[str, str | None], name: str, log: str, pipes: bool) -> str | None:
        """Start it; what went wrong, or null."""
        try:
            self._process = Process.start(argv, name=name, env=env, log=Path(log), pipes=pipes)
        except HarnessError as e:
            return str(e)
        return None

    def host(self) -> str:
        """Name of the host it runs on."""
        return socket.gethostname()

    def look(self) -> tuple[int | None, list[str]]:
        """Exit code (null while it runs), and lines since the last look; all lines once it has ended."""
        if self._process is None:
            return None, []
        code = self._process.poll()
        return code, self._process.lines()

    def write_line(self, line: str) -> bool:
        """A line to its stdin."""
        return self._process is not None and self._process.write_line(line)

    def stop(self, grace_s: float) -> int | None:
        """End it."""
        return self._process.stop(grace_s) if self._process is not None else None

    def tail(self, n: int) -> list[str]:
        """The end of its log."""
        return self._process.tail(n) if self._process is not None else []


class RemoteProcess:
    """A `cluster.process.Process` on another host, as far as a load worker's owner needs it."""

    def __init__(self, actor: Any, name: str, log: Path) -> None:
        self.name, self.log = name, log
        self.host = ""
        self._actor = actor
        self._code: int | None = None
        self._lines: list[str] = []

    def begin(self, argv: list[str], env: dict[str, str | None], pipes: bool) -> None:
        """Start it. Raises `WorkerError`."""
        problem = self._ask(self._actor.begin.remote(argv, env, self.name, str(self.log), pipes), "no answer", 120.0)
        if problem:
            raise WorkerError(f"{self.name}: {problem}")
        self.host = str(self._ask(self._actor.host.remote(), ""))

    def _ask(self, ref: Any, lost: Any, timeout_s: float = ASK_S) -> Any:
        """The answer; ``lost`` when the actor or its host is gone (then the process counts as killed)."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            return ray.get(ref, timeout=timeout_s)
        except GetTimeoutError:
            return lost
        except RayError:
            self._code = -9
            return lost

    def _look(self) -> None:
        if self._code is None:
            code, lines = self._ask(self._actor.look.remote(), (None, []))
            self._lines += lines
            if code is not None:
                self._code = code

    def poll(self) -> int | None:
        """Exit code; null while it runs."""
        self._look()
        return self._code

    def wait(self, timeout_s: float) -> int | None:
        """`poll` after the end or ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(min(0.2, timeout_s))
        return self._code

    def lines(self) -> list[str]:
        """Lines since the last call."""
        self._look()
        found, self._lines = self._lines, []
        return found

    def write_line(self, line: str) -> bool:
        """A line to its stdin; False when nobody reads it."""
        return bool(self._ask(self._actor.write_line.remote(line), False))

    def stop(self, grace_s: float = GRACE_S) -> int | None:
        """End it, then its actor."""
        import ray

        self._look()
        code = self._ask(self._actor.stop.remote(grace_s), self._code, grace_s + 45)
        self._look()
        self._code = code if self._code is None else self._code
        ray.kill(self._actor)
        return self._code

    def tail(self, n: int = 20) -> list[str]:
        """The end of its log."""
        found: list[str] = self._ask(self._actor.tail.remote(n), [])
        return found


def ready_check(base_url: str, model: str, api_key: str) -> Callable[[], bool]:
    """True once /health answers and one real one-token completion came back.

    The check raises `ServerError` when the server is up but refuses that completion: waiting would not help.
    """
    root = probe.server_root(base_url)
    body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}

    def check() -> bool:
        try:
            probe.fetch(f"{root}/health", api_key, deadline_s=5.0)
        except ServerError:
            return False
        try:
            probe.fetch(f"{base_url}/completions", api_key, body, deadline_s=120.0)
        except ServerError as e:
            if ": HTTP 4" in str(e):
                raise ServerError(f"the server is up but refuses a completion: {e}") from e
            return False
        return True

    return check


def choose_cpus(cpus: Sequence[int], vcpu: int, rank: int, count: int) -> list[int]:
    """Processors for replica ``rank`` of ``count`` on a host: as many as the tier has, no two replicas on the same.

    On a host with fewer than all of them need, each gets its even share, at least one (then shared).
    """
    if len(cpus) < count:
        return [cpus[rank % len(cpus)]]
    each = min(vcpu, len(cpus) // count)
    return list(cpus[rank * each : (rank + 1) * each])


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe_socket:
        probe_socket.bind((host, 0))
        return int(probe_socket.getsockname()[1])


def node_address() -> str:
    """Address of this host in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())
