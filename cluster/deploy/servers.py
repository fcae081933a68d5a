"""Model servers on their own host: their ports, start, health and end, and the Ray actor that owns them.

Plain classes without Ray in them until they are made remote, so their behaviour can be tested in-process. Methods are
called from several threads, so that a ``stop`` overtakes a ``start`` that still waits.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from harness.cluster.deploy.load_workers import read_piece
from harness.cluster.deploy.placement import choose_cpus
from harness.cluster.engines.protocol import WHOLE, Engine, Part, State
from harness.cluster.process.cpu_times import CpuTimesSampler
from harness.cluster.process.guard import descendants
from harness.cluster.process.process import GRACE_S, NO_SECRETS, PortTakenError, Process, describe_exit, wait_ready
from harness.cluster.process.registry import (
    exclusively,
    holders,
    name_orphans,
    release,
    reservations,
    reserve,
    visible_gpus,
    work_folder,
)
from harness.errors import HarnessError, ServerError
from harness.record.samples import ProcessorSecond
from harness.server import probe
from harness.server.access import page_beside

TRIES = 3
"""Starts with a new port when another process was faster to take it."""
HEALTH_EVERY_S = 10.0
HEALTH_ANSWER_S = 30.0  # long, because a server that is short of processors under load answers late, and lives
UNHEALTHY_S = 60.0
"""A server whose /health has failed for this long is dead, though its process runs."""


@dataclass(frozen=True, slots=True)
class Started:
    """A server that answers (or a part of one that has joined it)."""

    base_url: str
    ready_s: float
    nice: int | None = None  # its nice value; null when not known


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there is none; a value, because exceptions lose their type between Ray processes."""

    message: str
    clash: bool = False  # another process was faster to take its port


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
        self._held: dict[str, socket.socket] = {}
        self._part = WHOLE
        self._stopped, self._start = False, 1
        self._messages: deque[str] = deque()
        self._seconds: deque[ProcessorSecond] = deque()
        self._state: State = "queued"
        self._read, self._port = 0, 0  # of the log, for states; of the server
        self._unhealthy: str | None = None

    def look(self, log_offset: int = 0) -> Look:
        """State, words for the person since the last call, how the server ended, and its log from ``log_offset``."""
        messages = [self._messages.popleft() for _ in range(len(self._messages))]
        seconds = [self._seconds.popleft() for _ in range(len(self._seconds))]
        if self._process is not None and self._state != "ready":
            piece = read_piece(self._log, self._read)
            whole = piece[: piece.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self._state = self._engine.state(line) or self._state
        log = read_piece(self._log, log_offset) if self._remote_log else b""
        start = self._start  # before the question how it ended: an end must not be taken for that of a later start
        return Look(self._state, messages, self.ended(), log, start, seconds)

    def say(self, words: str) -> None:
        """For the person; heard with the next `look`."""
        self._messages.append(words)

    def processes(self, tree: Mapping[int, Sequence[int]]) -> list[int]:
        """The server's processes, the one that was started first; none while it is not ready."""
        process = self._process
        if process is None or self._state != "ready" or process.pid is None or process.guard is None:
            return []
        found = descendants(process.guard, tree)
        return [process.pid, *(pid for pid in found if pid != process.pid)] if process.pid in found else []

    def note_second(self, second: ProcessorSecond) -> None:
        """What they ran and waited; told with the next `look`."""
        self._seconds.append(second)

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
            found = self._start_once(deadline - time.monotonic())
            clash = isinstance(found, Failed) and found.clash
            if not clash or attempt == TRIES or part != WHOLE:  # parts agree on a port: they start again together
                break
            self.say("its port was taken meanwhile; trying another one")
        return found

    def _hold(self, what: str) -> int:
        """Choose a port for this and keep it."""
        if what in self._held:
            self._held[what].close()
        self._held[what] = hold_port(self._host)
        return int(self._held[what].getsockname()[1])

    def restart(self, ready_s: float) -> Started | Failed:
        """Start the server again, at the same address, after it died."""
        self.end(0)
        return self._start_once(ready_s, self._start + 1)

    def _start_once(self, ready_s: float, number: int = 1) -> Started | Failed:
        try:
            return self._started(ready_s, number)
        except HarnessError as e:
            self.end(0)
            return Failed(str(e), clash=isinstance(e, PortTakenError) and not self._stopped)

    def _started(self, ready_s: float, number: int) -> Started:
        before = time.monotonic()
        command = self._engine.command(self._host, self._port, self._api_key, self._part)
        self._state = "starting"
        process = self._process = Process.start(
            command.argv, name=self.name, env={**NO_SECRETS, **command.env}, log=self._log, cpus=self.cpus,
            nice=self.nice,
        )  # fmt: skip
        self._unhealthy, self._start = None, number  # last: `look` asks for them in the other order
        if self._stopped:  # looked at after the start: a `stop` before it found nothing to end
            raise ServerError(f"{self.name}: stopped before it was ready")
        base_url = f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}/v1"
        if self._part.rank == 0:
            answers = partial(_answers, base_url, self._engine.served_model, self._api_key)
            wait_ready(answers, process, ready_s, explain=self._engine.explain)
            threading.Thread(target=self._watch_health, args=(base_url, process), daemon=True).start()
        self._state = "ready"
        nice = None
        with contextlib.suppress(OSError):  # it is gone
            nice = os.getpriority(os.PRIO_PROCESS, process.pid or -1)
        return Started(base_url, time.monotonic() - before, nice)

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
        if process is None or (code := process.poll()) is None:
            return None if process is None else self._unhealthy
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


def _answers(base_url: str, model: str, api_key: str) -> bool:
    """Whether /health answers and one real one-token completion came back.

    Raises `ServerError` when the server is up but refuses that completion: waiting would not help.
    """
    body = {"model": model, "prompt": [1], "max_tokens": 1, "temperature": 0}
    well = False
    try:
        probe.fetch(page_beside(base_url, "/health"), api_key, deadline_s=5.0)
        well = True
        probe.fetch(f"{base_url}/completions", api_key, body, deadline_s=120.0)
    except ServerError as e:
        if well and isinstance(e, probe.RefusalError) and 400 <= e.status < 500:
            raise ServerError(f"the server is up but refuses a completion: {e}") from e
        return False
    return True


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


@dataclass(frozen=True, slots=True)
class Reserved:
    """What the servers of one host may use of it."""

    cpus: list[list[int] | None]
    """Processors of each; null: all."""
    shared_with: str | None
    """Who else runs on these processors; null: nobody of this user's harness."""


class ServersActor:
    """Owns the servers of one deployment on one host (with accelerators: one server, or one host's part of it).

    One actor, not one each: a Ray worker process wakes a hundred times a second also when it does nothing, so that
    dozens of them take a fair share of a core (`tests/bench/supervise.py`).
    """

    def __init__(
        self, engine: Engine, servers: Sequence[tuple[str, str]], api_key: str, host: str, nice: int | None = None
    ) -> None:
        """``servers``: name and log of each. ``host``: the address to listen on; empty: this node's in the cluster.
        ``nice``: what the load workers run at: servers that run at more look slower beside them than they are.
        """
        if not host:
            import ray

            host = str(ray.util.get_node_ip_address())
        self._owners = [ReplicaOwner(engine, name, log, api_key, host) for name, log in servers]
        for owner in self._owners:
            owner.nice = nice
        self._run_dir = Path(servers[0][1]).parent
        self._reserved: list[str | None] = []
        self._sampler: CpuTimesSampler | None = None

    def node_id(self) -> str:
        """The Ray node it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def look(self, log_offsets: Sequence[int]) -> list[Look]:
        """News of every server."""
        return [owner.look(at) for owner, at in zip(self._owners, log_offsets, strict=True)]

    def clock_ns(self) -> int:
        """Wall clock of this host, ns since 1970."""
        return time.time_ns()

    def sample(self, start_unix_ns: int) -> None:
        """Sample what servers run and wait from now on. ``start_unix_ns``: the common start by this host's clock."""
        self.end_samples()
        self._sampler = CpuTimesSampler(self._owners, start_unix_ns)
        self._sampler.start()

    def end_samples(self) -> None:
        """No more."""
        if self._sampler is not None:
            self._sampler.stop()
        self._sampler = None

    def prepare(self) -> Failed | None:
        """Whatever takes long before servers can start: orphans' memory, weights on this host."""
        try:
            name_orphans(self._owners[0].say)
            for owner in self._owners:
                owner.prepare()
        except HarnessError as e:
            return Failed(f"{owner.name}: {e}")
        return None

    def reserve(self, vcpu: int | None, gpus: bool) -> Reserved | Failed:
        """Reserve what the servers will run on; call it once. Processors that another run holds are left to it.

        ``vcpu``: of the tier, when it has no accelerators. ``gpus``: this actor's accelerators were given by a Ray of
        our own, which knows of no other run (a cluster's Ray gives each to one job).
        """
        first = self._owners[0]
        try:
            with exclusively():
                others = [one for one in reservations() if one.owner.pid != os.getpid()]
                if gpus:
                    mine = visible_gpus()
                    if taken := [one for one in others if set(one.gpus) & set(mine)]:
                        return Failed(f"{first.name}: its GPUs are held: {holders(taken)}; harness stop ends them")
                    self._reserved.append(reserve(first.name, self._run_dir, gpus=mine))
                if vcpu is None:
                    return Reserved([None] * len(self._owners), None)
                every = sorted(os.sched_getaffinity(0))
                in_the_way = [one for one in others if set(one.cpus) & set(every)]
                free = [cpu for cpu in every if not any(cpu in one.cpus for one in in_the_way)]
                for rank, owner in enumerate(self._owners):
                    owner.cpus = choose_cpus(free or every, vcpu, rank, len(self._owners))
                    self._reserved.append(reserve(owner.name, self._run_dir, cpus=owner.cpus))
        except HarnessError as e:
            return Failed(f"{first.name}: {e}")
        if in_the_way and 0 < len(free) < vcpu * len(self._owners):
            first.say(f"has {len(free)} processors to itself of this host's {len(every)}: {holders(in_the_way)}")
        shared = holders(in_the_way) if in_the_way and not free else None
        return Reserved([list(owner.cpus or ()) for owner in self._owners], shared)

    def meeting_point(self) -> tuple[str, int]:
        """Address and port where the parts of one server can meet."""
        return self._owners[0].meeting_point()

    def start(self, place: int, ready_s: float, part: Part = WHOLE) -> Started | Failed:
        """Start server number ``place`` of this actor and wait until it answers."""
        return self._owners[place].start(ready_s, part)

    def restart(self, place: int, ready_s: float) -> Started | Failed:
        """Start it again, at the same address, after it died."""
        return self._owners[place].restart(ready_s)

    def end(self, place: int) -> None:
        """End what runs of it; it may be started again."""
        self._owners[place].end(0)

    def stop(self, grace_s: float = GRACE_S) -> None:
        """End all servers and everything they started."""
        with ThreadPoolExecutor(max_workers=len(self._owners)) as pool:
            list(pool.map(lambda owner: owner.stop(grace_s), self._owners))
        release(self._reserved)

    def clean(self) -> None:
        """Take the folders of logs that came home away."""
        for owner in self._owners:
            owner.clean()
