"""What runs inside Ray actors: the owner of one server, the owner of one load worker, the watcher of one host.

Plain classes without ray in them until they are made remote, so their behaviour can be tested in-process. Methods run
in threads (max_concurrency), so `stop` overtakes a `start` that still waits.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engine import WHOLE, Engine, Part
from cluster.job import read_piece
from cluster.placement import choose_cpus
from cluster.process import GRACE_S, NO_SECRETS, Process, describe_exit, wait_ready
from cluster.registry import end_orphans
from harness import probe
from harness.errors import HarnessError, ServerError

if TYPE_CHECKING:
    from harness.host_metrics import HostMetrics

TRIES = 3
"""Starts with a new port when another process was faster to take it."""
HEALTH_EVERY_S = 10.0
HEALTH_ANSWER_S = 30.0
"""Long, because a server that is short of processors under load answers late, and lives."""
UNHEALTHY_S = 60.0
"""A server whose /health has failed for this long is dead, though its process runs."""


@dataclass(frozen=True, slots=True)
class Started:
    """A server that answers (or a part of one that has joined it)."""

    base_url: str
    ready_s: float
    cpus: list[int] | None
    """Processors it may use; null: all."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is none; a value, because exceptions lose their type between Ray processes."""

    message: str


@dataclass(frozen=True, slots=True)
class Look:
    """What a replica's owner has to say since the last look."""

    state: str
    messages: list[str]
    ended: str | None
    log: bytes
    """The next piece of the log; empty when the driver can read it itself."""


class ReplicaActor:
    """Owns one server process, or one host's part of a server."""

    def __init__(self, engine: Engine, name: str, log: str, api_key: str, host: str) -> None:
        """``host``: the address to listen on; empty: this node's own in the cluster."""
        self._engine, self._name, self._api_key = engine, name, api_key
        self._log = Path(log)
        self._remote_log = not self._log.parent.is_dir()  # another host, no shared storage: `look` brings it home
        if self._remote_log:
            self._log = Path(tempfile.mkdtemp(prefix="harness-")) / self._log.name
        self._host = host or node_address()
        self._process: Process | None = None
        self._cpus: list[int] | None = None
        self._port: int | None = None
        self._held: socket.socket | None = None
        self._part = WHOLE
        self._stopped = False
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._state = "queued"
        self._read = 0  # of the log, for states
        self._unhealthy: str | None = None

    def node_id(self) -> str:
        """The Ray node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def look(self, log_offset: int = 0) -> Look:
        """State, words for the person since the last call, how the server ended, and its log from ``log_offset``."""
        messages = []
        while not self._messages.empty():
            messages.append(self._messages.get_nowait())
        self._follow_log()
        log = read_piece(self._log, log_offset) if self._remote_log else b""
        return Look(self._state, messages, self.ended(), log)

    def _follow_log(self) -> None:
        if self._process is None or self._state == "ready":
            return
        piece = read_piece(self._log, self._read)
        whole = piece[: piece.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._state = self._engine.state(line) or self._state

    def prepare(self) -> Failed | None:
        """Whatever takes long before a server can start: orphans' memory, its weights on this host."""
        self._state = "starting"
        try:
            end_orphans(self._messages.put)
            self._engine.prepare(self._messages.put)
        except HarnessError as e:
            return Failed(f"{self._name}: {e}")
        return None

    def meeting_point(self) -> tuple[str, int]:
        """Address and a free port where the parts of one server can meet."""
        return self._host, free_port(self._host)

    def start(self, ready_s: float, vcpu: int | None, rank: int, count: int, part: Part = WHOLE) -> Started | Failed:
        """Start the server and wait until it has answered one real request (a part that is not the first: has started).

        On a CPU tier ``vcpu`` is its size, and this server is number ``rank`` of ``count`` on this host.
        """
        self._cpus = choose_cpus(sorted(os.sched_getaffinity(0)), vcpu, rank, count) if vcpu else None
        self._part = part
        deadline = time.monotonic() + ready_s
        for attempt in range(1, TRIES + 1):
            self._hold_port()
            try:
                return self._start_once(deadline - time.monotonic())
            except HarnessError as e:
                self._end(0)
                clash = "port in use" in str(e) and attempt < TRIES and not self._stopped and part == WHOLE
                if not clash:
                    return Failed(str(e))
                self._messages.put("its port was taken meanwhile; trying another one")
        raise AssertionError("unreachable")

    def _hold_port(self) -> None:
        """Choose a port and keep it: nobody else is given it, also not while the server is dead and started again."""
        if self._held is not None:
            self._held.close()
        self._held = hold_port(self._host)
        self._port = int(self._held.getsockname()[1])

    def restart(self, ready_s: float) -> Started | Failed:
        """Start the server again, at the same address, after it died."""
        self._end(0)
        self._unhealthy = None
        try:
            return self._start_once(ready_s)
        except HarnessError as e:
            self._end(0)
            return Failed(str(e))

    def _start_once(self, ready_s: float) -> Started:
        assert self._port is not None
        command = self._engine.command(self._host, self._port, self._api_key, self._part)
        before = time.monotonic()
        self._state = "starting"
        process = self._process = Process.start(
            command.argv, name=self._name, env={**NO_SECRETS, **command.env}, log=self._log, cpus=self._cpus
        )
        if self._stopped:  # looked at after the start: a `stop` before it found nothing to end
            raise ServerError(f"{self._name}: stopped before it was ready")
        base_url = f"http://{bracketed(self._host)}:{self._port}/v1"
        if self._part.rank == 0:
            answers = ready_check(base_url, self._engine.served_model, self._api_key)
            wait_ready(answers, process, ready_s, explain=self._engine.explain)
            threading.Thread(target=self._watch_health, args=(base_url, process), daemon=True).start()
        self._state = "ready"
        return Started(base_url, time.monotonic() - before, self._cpus)

    def _watch_health(self, base_url: str, process: Process) -> None:
        """Thread: notice a server that runs and does not answer."""
        url = f"{probe.server_root(base_url)}/health"
        well = time.monotonic()
        while process.wait(HEALTH_EVERY_S) is None and process is self._process:
            try:
                probe.fetch(url, self._api_key, deadline_s=HEALTH_ANSWER_S)
                well, self._unhealthy = time.monotonic(), None
            except ServerError as e:
                silent_s = time.monotonic() - well
                # A server that was ended meanwhile says nothing about the one that was started after it.
                if silent_s > UNHEALTHY_S and process.poll() is None and process is self._process:
                    self._unhealthy = f"/health has failed for {silent_s:.0f} s ({str(e).rpartition(': ')[2]})"

    def ended(self) -> str | None:
        """How the server ended, with its last words; null while it runs and answers."""
        process = self._process
        if process is None:
            return None
        if (code := process.poll()) is None:
            return self._unhealthy
        cause = self._engine.explain(process.tail(400))
        return describe_exit(code) + (f": {cause}" if cause else "")

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End the server and everything it started."""
        self._stopped = True
        self._end(grace_s)
        if self._held is not None:
            self._held.close()

    def clean(self) -> None:
        """Take the folder of a log that came home away."""
        if self._remote_log:
            shutil.rmtree(self._log.parent, ignore_errors=True)

    def _end(self, grace_s: float) -> None:
        if self._process is not None:
            self._process.stop(grace_s)


@dataclass(frozen=True, slots=True)
class Report:
    """What a load worker's owner has seen since the last look."""

    code: int | None
    """Exit code; null while it runs."""
    lines: list[str]
    pieces: dict[str, bytes]
    """The next piece of each file it writes."""


class WorkerActor:
    """Owns one load worker process and the folder it works in."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="harness-"))

    def folder(self) -> str:
        """Where its files are."""
        return str(self._folder)

    def put(self, name: str, data: bytes) -> str | None:
        """Append to a file of the folder; what went wrong, or null."""
        try:
            with (self._folder / name).open("ab") as file:
                file.write(data)
        except OSError as e:
            return f"{self._folder / name}: cannot write ({e.strerror})"
        return None

    def begin(
        self, argv: Sequence[str], env: dict[str, str | None], name: str, spec: str, log: str, cpus: list[int] | None
    ) -> str | None:
        """Start it on a spec file of the folder; what went wrong, or null."""
        command = [*argv, str(self._folder / spec)]
        try:
            self._process = Process.start(
                command, name=name, env={**NO_SECRETS, **env}, log=self._folder / log, pipes=True, cpus=cpus
            )
        except HarnessError as e:
            return str(e)
        return None

    def host(self) -> str:
        """Name of the host it runs on."""
        return socket.gethostname()

    def clock_ns(self) -> int:
        """Wall clock of this host, ns since 1970."""
        return time.time_ns()

    def look(self, offsets: dict[str, int]) -> Report:
        """Exit code and lines since the last look (all once it has ended), and its files from these offsets."""
        code, lines = None, []
        if self._process is not None:
            code = self._process.poll()  # before the lines and the files: all is there once it has ended
            lines = self._process.lines()
        return Report(code, lines, {name: read_piece(self._folder / name, at) for name, at in offsets.items()})

    def write_line(self, line: str) -> bool:
        """A line to its stdin."""
        return self._process is not None and self._process.write_line(line)

    def stop(self, grace_s: float) -> int | None:
        """End it."""
        return self._process.stop(grace_s) if self._process is not None else None

    def clean(self) -> None:
        """Take its folder away."""
        shutil.rmtree(self._folder, ignore_errors=True)


class HostActor:
    """Samples the counters of one host (`harness.host_metrics`) for as long as a run lasts."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="harness-"))
        self._file = self._folder / "host.arrows"
        self._metrics: HostMetrics | None = None

    def clock_ns(self) -> int:
        """Wall clock of this host, ns since 1970."""
        return time.time_ns()

    def begin(self, start_unix_ns: int) -> None:
        """Sample from now on; ``start_unix_ns`` is the common start by this host's clock."""
        from harness.host_metrics import HostMetrics  # Arrow: not in every actor

        self._metrics = HostMetrics(self._file, start_unix_ns)
        self._metrics.__enter__()

    def look(self, offset: int) -> bytes:
        """The next piece of its file."""
        return read_piece(self._file, offset)

    def stop(self) -> None:
        """No more samples; the file is whole."""
        if self._metrics is not None:
            self._metrics.__exit__(None, None, None)

    def clean(self) -> None:
        """Take its folder away."""
        shutil.rmtree(self._folder, ignore_errors=True)


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


def hold_port(host: str) -> socket.socket:
    """A socket on a port that the kernel gives to nobody else while it is open.

    It does not listen, so a server that sets SO_REUSEADDR (as good as all do) can. Two vLLM servers with the same port
    would not even fail: they set SO_REUSEPORT, and the kernel would deal requests to either.
    """
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
    except OSError:
        held.close()
        raise
    return held


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    with hold_port(host) as held:
        return int(held.getsockname()[1])


def node_address() -> str:
    """Address of this host in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


def bracketed(host: str) -> str:
    """An address as a URL has it."""
    return f"[{host}]" if ":" in host else host
