"""The owner of one model server: its port, its start, its health, its end; on the server's host.

Methods are called from several threads, so that `ReplicaOwner.stop` overtakes a `ReplicaOwner.start` that still waits.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from cluster.deploy.job import read_piece
from cluster.engines.protocol import WHOLE, Engine, Part, State
from cluster.process.guard import descendants
from cluster.process.process import GRACE_S, NO_SECRETS, PortTakenError, Process, describe_exit, wait_ready
from cluster.process.registry import work_folder
from harness.errors import HarnessError, ServerError
from harness.record.samples import ProcessorSecond
from harness.server import probe
from harness.server.access import page_beside

T = TypeVar("T")

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
    nice: int | None = None
    """Its nice value; null when not known."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is none; a value, because exceptions lose their type between Ray processes."""

    message: str
    clash: bool = False
    """Another process was faster to take its port."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a replica's owner has to say since the last look."""

    state: State
    messages: list[str]
    ended: str | None
    log: bytes
    """The next piece of the log; empty when the driver can read it itself."""
    start: int
    """Which start of the server this is about, from 1."""
    seconds: list[ProcessorSecond] = field(default_factory=list)
    """What its processes ran and waited since the last look, while that is sampled."""


class ReplicaOwner:
    """Owns one server process, or one host's part of a server."""

    def __init__(self, engine: Engine, name: str, log: str, api_key: str, host: str) -> None:
        """``host``: the address to listen on."""
        self.name = name
        self.cpus: Sequence[int] | None = None
        """Processors the server may use; null: all."""
        self.nice: int | None = None
        """Nice value to start the server at; null: this process's own."""
        self._engine, self._api_key, self._host = engine, api_key, host
        self._log = Path(log)
        self._remote_log = not self._log.parent.is_dir()  # another host, no shared storage: `look` brings it home
        if self._remote_log:
            self._log = work_folder() / self._log.name
        self._process: Process | None = None
        self._port: int | None = None
        self._held: dict[str, socket.socket] = {}
        self._part = WHOLE
        self._stopped = False
        self._start = 1
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._seconds: queue.SimpleQueue[ProcessorSecond] = queue.SimpleQueue()
        self._state: State = "queued"
        self._read = 0  # of the log, for states
        self._unhealthy: str | None = None

    def look(self, log_offset: int = 0) -> Look:
        """State, words for the person since the last call, how the server ended, and its log from ``log_offset``."""
        messages, seconds = drained(self._messages), drained(self._seconds)
        self._follow_log()
        log = read_piece(self._log, log_offset) if self._remote_log else b""
        start = self._start  # before the question how it ended: an end must not be taken for that of a later start
        return Look(self._state, messages, self.ended(), log, start, seconds)

    def say(self, words: str) -> None:
        """For the person; heard with the next `look`."""
        self._messages.put(words)

    def processes(self, tree: Mapping[int, Sequence[int]]) -> list[int]:
        """The server's processes, the one that was started first; none while it is not ready."""
        process = self._process
        if process is None or self._state != "ready" or process.pid is None or process.guard is None:
            return []
        found = descendants(process.guard, tree)
        return [process.pid, *(pid for pid in found if pid != process.pid)] if process.pid in found else []

    def note_second(self, second: ProcessorSecond) -> None:
        """What they ran and waited; told with the next `look`."""
        self._seconds.put(second)

    def _follow_log(self) -> None:
        if self._process is None or self._state == "ready":
            return
        piece = read_piece(self._log, self._read)
        whole = piece[: piece.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._state = self._engine.state(line) or self._state

    def prepare(self) -> None:
        """Whatever takes long before a server can start: its weights on this host. Raises `HarnessError`."""
        self._state = "starting"
        self._engine.prepare(self.say)

    def meeting_point(self) -> tuple[str, int]:
        """Address and port where the parts of one server can meet; nobody else is given that port until the end."""
        return self._host, self._hold("meeting")

    def start(self, ready_s: float, part: Part = WHOLE) -> Started | Failed:
        """Start the server and wait until it has answered one real request; of a later part: it runs."""
        self._part = part
        deadline = time.monotonic() + ready_s
        for attempt in range(1, TRIES + 1):
            self._port = self._hold("server")  # kept, also while the server is dead and started again
            try:
                return self._start_once(deadline - time.monotonic())
            except HarnessError as e:
                self.end(0)
                clash = isinstance(e, PortTakenError) and not self._stopped
                if not clash or attempt == TRIES or part != WHOLE:  # parts agree on a port: they start again together
                    return Failed(str(e), clash)
                self.say("its port was taken meanwhile; trying another one")
        raise AssertionError("unreachable")

    def _hold(self, what: str) -> int:
        """Choose a port for this and keep it."""
        if what in self._held:
            self._held[what].close()
        self._held[what] = hold_port(self._host)
        return int(self._held[what].getsockname()[1])

    def restart(self, ready_s: float) -> Started | Failed:
        """Start the server again, at the same address, after it died."""
        self.end(0)
        try:
            return self._start_once(ready_s, self._start + 1)
        except HarnessError as e:
            self.end(0)
            return Failed(str(e))

    def _start_once(self, ready_s: float, number: int = 1) -> Started:
        assert self._port is not None
        command = self._engine.command(self._host, self._port, self._api_key, self._part)
        before = time.monotonic()
        self._state = "starting"
        process = self._process = Process.start(
            command.argv, name=self.name, env={**NO_SECRETS, **command.env}, log=self._log, cpus=self.cpus,
            nice=self.nice,
        )  # fmt: skip
        self._unhealthy, self._start = None, number  # last: `look` asks for them in the other order
        if self._stopped:  # looked at after the start: a `stop` before it found nothing to end
            raise ServerError(f"{self.name}: stopped before it was ready")
        base_url = f"http://{bracketed(self._host)}:{self._port}/v1"
        if self._part.rank == 0:
            answers = ready_check(base_url, self._engine.served_model, self._api_key)
            wait_ready(answers, process, ready_s, explain=self._engine.explain)
            threading.Thread(target=self._watch_health, args=(base_url, process), daemon=True).start()
        self._state = "ready"
        return Started(base_url, time.monotonic() - before, nice_of(process.pid))

    def _watch_health(self, base_url: str, process: Process) -> None:
        """Thread: notice a server that runs and does not answer."""
        url = page_beside(base_url, "/health")
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
        return describe_exit(code) + (f": {cause.words}" if cause else "")

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End the server and everything it started; it cannot be started any more."""
        self._stopped = True
        self.end(grace_s)
        for held in self._held.values():
            held.close()

    def end(self, grace_s: float) -> None:
        """End what runs of the server, if anything."""
        if self._process is not None:
            self._process.stop(grace_s)

    def clean(self) -> None:
        """Take the folder of a log that came home away."""
        if self._remote_log:
            shutil.rmtree(self._log.parent, ignore_errors=True)


def drained(waiting: queue.SimpleQueue[T]) -> list[T]:
    """All that waits."""
    found = []
    while not waiting.empty():
        found.append(waiting.get_nowait())
    return found


def nice_of(pid: int | None) -> int | None:
    """Nice value of a process; null when it is gone."""
    try:
        return None if pid is None else os.getpriority(os.PRIO_PROCESS, pid)
    except OSError:
        return None


def ready_check(base_url: str, model: str, api_key: str) -> Callable[[], bool]:
    """True once /health answers and one real one-token completion came back.

    The check raises `ServerError` when the server is up but refuses that completion: waiting would not help.
    """
    body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}

    def check() -> bool:
        try:
            probe.fetch(page_beside(base_url, "/health"), api_key, deadline_s=5.0)
        except ServerError:
            return False
        try:
            probe.fetch(f"{base_url}/completions", api_key, body, deadline_s=120.0)
        except probe.RefusalError as e:
            if HTTPStatus.BAD_REQUEST <= e.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise ServerError(f"the server is up but refuses a completion: {e}") from e
            return False
        except ServerError:
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


def bracketed(host: str) -> str:
    """An address as a URL has it."""
    return f"[{host}]" if ":" in host else host
