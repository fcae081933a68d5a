"""What runs inside Ray actors: the owner of a host's servers, the owner of one load worker, the watcher of one host.

Plain classes without ray in them until they are made remote, so their behaviour can be tested in-process. Methods run
in threads (max_concurrency), so `ServersActor.stop` overtakes a `ServersActor.start` that still waits.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.deploy.job import read_piece
from cluster.deploy.placement import choose_cpus
from cluster.deploy.replica import Failed, Look, ReplicaOwner, Started
from cluster.engines.protocol import WHOLE, Engine, Part
from cluster.process.cpu_times import CpuTimesSampler
from cluster.process.process import GRACE_S, NO_SECRETS, Process
from cluster.process.registry import name_orphans, work_folder
from cluster.process.reservations import exclusively, holders, release, reservations, reserve, visible_gpus
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.record.samples import HostMetrics


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
        host = host or node_address()
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
        """Sample what the servers run and wait from now on; `look` tells.

        ``start_unix_ns``: the common start by this host's clock.
        """
        self.end_samples()
        self._sampler = CpuTimesSampler(self._owners, start_unix_ns)
        self._sampler.start()

    def end_samples(self) -> None:
        """No more."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.stop()

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
        try:
            return self._reserve(vcpu, gpus)
        except HarnessError as e:
            return Failed(f"{self._owners[0].name}: {e}")

    def _reserve(self, vcpu: int | None, gpus: bool) -> Reserved | Failed:
        with exclusively():
            others = [one for one in reservations() if one.owner.pid != os.getpid()]
            if gpus:
                mine = visible_gpus()
                if taken := [one for one in others if set(one.gpus) & set(mine)]:
                    return Failed(
                        f"{self._owners[0].name}: its GPUs are held: {holders(taken)}; harness stop ends them"
                    )
                self._reserved.append(reserve(self._owners[0].name, self._run_dir, gpus=mine))
            if vcpu is None:
                return Reserved([None] * len(self._owners), None)
            every = sorted(os.sched_getaffinity(0))
            in_the_way = [one for one in others if set(one.cpus) & set(every)]
            free = [cpu for cpu in every if not any(cpu in one.cpus for one in in_the_way)]
            for rank, owner in enumerate(self._owners):
                owner.cpus = choose_cpus(free or every, vcpu, rank, len(self._owners))
                self._reserved.append(reserve(owner.name, self._run_dir, cpus=owner.cpus))
        if in_the_way and 0 < len(free) < vcpu * len(self._owners):
            self._owners[0].say(f"has {len(free)} processors to itself of this host's {len(every)}: "
                                f"{holders(in_the_way)}")  # fmt: skip
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
        self._folder = work_folder()

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
        self, argv: Sequence[str], env: dict[str, str | None], name: str, spec: str, log: str, cpus: list[int] | None,
        nice: int | None = None,
    ) -> str | None:  # fmt: skip
        """Start it on a spec file of the folder; what went wrong, or null."""
        command = [*argv, str(self._folder / spec)]
        try:
            self._process = Process.start(
                command, name=name, env={**NO_SECRETS, **env}, log=self._folder / log, pipes=True, cpus=cpus,
                nice=nice,
            )  # fmt: skip
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
    """Samples the counters of one host (`harness.record.samples`) for as long as a run lasts."""

    def __init__(self) -> None:
        self._folder = work_folder()
        self._file = self._folder / "host.arrows"
        self._metrics: HostMetrics | None = None

    def clock_ns(self) -> int:
        """Wall clock of this host, ns since 1970."""
        return time.time_ns()

    def begin(self, start_unix_ns: int) -> None:
        """Sample from now on; ``start_unix_ns`` is the common start by this host's clock."""
        from harness.record.samples import HostMetrics  # Arrow: not in every actor

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


def node_address() -> str:
    """Address of this host in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())
