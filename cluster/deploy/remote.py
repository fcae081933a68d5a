"""What runs on hosts without this process: a load worker, and the counters of a host.

An actor there owns a folder. What a load worker reads is sent into it before; what is written there (rows,
observations, logs) comes back in pieces while it runs, as it is flushed, so that what a host had written before it died
is in the run directory. Nothing here waits for a host that may be gone: a question is left open, and a host that leaves
one open for `LOST_S` is lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cluster.deploy.load_workers import PIECE_BYTES, READS, WRITES, Job, read_piece
from harness.cluster.deploy.placement import ACTOR_CPUS, Node
from harness.cluster.deploy.ray_session import LOST_S, Question, end_actor, last_line, on
from harness.cluster.process.process import GRACE_S, NO_SECRETS, Process, tail
from harness.cluster.process.registry import work_folder
from harness.errors import HarnessError, WorkerError

import ray  # isort: skip  # after harness.cluster.deploy.ray_session, which sets what Ray reads when it is imported
from ray.exceptions import GetTimeoutError, RayError  # isort: skip

if TYPE_CHECKING:
    from harness.record.samples import HostMetrics

BEGIN_S = 120.0
"""Placing an actor and sending it one piece of a file."""
CLOCK_READINGS = 5
LOST_CODE = -9
HOST_FILE = "host.arrows"


# --- there -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What an actor has seen since the last look."""

    code: int | None
    """Exit code of the load worker; null while it runs."""
    lines: list[str]
    pieces: dict[str, bytes]
    """The next piece of each file of the folder that was asked for."""


class FolderActor:
    """Owns a folder of its host, and one load worker or the sampling of the host's counters."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._metrics: HostMetrics | None = None
        self._folder = work_folder()

    def folder(self) -> str:
        """Where its files are."""
        return str(self._folder)

    def clock_ns(self) -> int:
        """Wall clock of this host, ns since 1970."""
        return time.time_ns()

    def put(self, name: str, data: bytes) -> str | None:
        """Append to a file of the folder; what went wrong, or null."""
        try:
            with (self._folder / name).open("ab") as file:
                file.write(data)
        except OSError as e:
            return f"{self._folder / name}: cannot write ({e.strerror})"
        return None

    def begin(
        self, argv: Sequence[str], env: Mapping[str, str | None], name: str, spec: str, log: str, nice: int
    ) -> str | None:
        """Start a load worker on a spec file of the folder; what went wrong, or null."""
        try:
            self._process = Process.start(
                [*argv, str(self._folder / spec)], name=name, env={**NO_SECRETS, **env}, log=self._folder / log,
                pipes=True, nice=nice,
            )  # fmt: skip
        except HarnessError as e:
            return str(e)
        return None

    def sample(self, start_unix_ns: int) -> None:
        """Sample the host from now on; ``start_unix_ns`` is the common start by this host's clock."""
        from harness.record.samples import HostMetrics  # Arrow: not in every actor

        self._metrics = HostMetrics(self._folder / HOST_FILE, start_unix_ns)
        self._metrics.__enter__()

    def look(self, offsets: Mapping[str, int]) -> Report:
        """Exit code and lines since the last look (all once it has ended), and its files from these offsets."""
        code, lines = None, []
        if self._process is not None:
            code = self._process.poll()  # before the lines and the files: all is there once it has ended
            lines = self._process.lines()
        return Report(code, lines, {name: read_piece(self._folder / name, at) for name, at in offsets.items()})

    def write_line(self, line: str) -> bool:
        """A line to its stdin."""
        return self._process is not None and self._process.write_line(line)

    def stop(self, grace_s: float) -> None:
        """End what runs; its files are whole."""
        if self._process is not None:
            self._process.stop(grace_s)
        if self._metrics is not None:
            self._metrics.__exit__(None, None, None)

    def clean(self) -> None:
        """Take its folder away."""
        shutil.rmtree(self._folder, ignore_errors=True)


# --- here ------------------------------------------------------------------------------------------------------------


class RemoteFolder:
    """The driver's side of a `FolderActor`: its files come home."""

    def __init__(self, node: Node, files: Mapping[str, Path], *, cpus: float) -> None:
        """``files``: where each file of its folder goes."""
        self.host = node.address
        self.trouble: str | None = None
        """Why nothing more comes; null while something may."""
        self._files, self._offsets = files, dict.fromkeys(files, 0)
        options = {"num_cpus": cpus, "max_concurrency": 8, "scheduling_strategy": on(node.node_id)}
        self._actor: Any = ray.remote(**options)(FolderActor).remote()
        self._question = Question(lambda: self._actor.look.remote(dict(self._offsets)))

    def fetch(self) -> Report | None:
        """What has come, its pieces appended to their files; null when nothing has. Never waits."""
        if self.trouble is not None:
            return None
        self._question.send()
        report: Report | None = self._question.answer()
        if report is not None:
            self.keep(report.pieces)
        elif self._question.lost:
            self.trouble = f"host {self.host}: {self._question.lost}"
        return report

    def keep(self, pieces: Mapping[str, bytes]) -> None:
        """Append what came. A file that this makes is its owner's alone, as captured answers have to be."""
        for name, piece in pieces.items():
            if piece:
                file = self._files[name]
                try:
                    with open(file, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as target:
                        target.write(piece)
                except OSError as e:  # half of a piece must not be followed by the same one
                    self.trouble = f"{file}: cannot write ({e.strerror})"
                    return
                self._offsets[name] += len(piece)

    def release(self) -> None:
        """Nothing more is to be had of its actor, which takes folder and process with it."""
        if self.trouble is None:
            with contextlib.suppress(RayError):
                ray.get(self._actor.clean.remote(), timeout=LOST_S)
        end_actor(self._actor)


class RemoteWorker(RemoteFolder):
    """A load worker on another host, as a `cluster.deploy.load_workers.Child`."""

    def __init__(self, node: Node, job: Job) -> None:
        super().__init__(node, {file.name: file for file in [*job.files(WRITES).values(), job.log]}, cpus=ACTOR_CPUS)
        self.name, self._job = job.name, job
        self._clock_offset_ns = 0
        self._code: int | None = None
        self._lines: list[str] = []

    def begin(self) -> None:
        """Send what it reads and start it. Raises `WorkerError`."""
        job = self._job
        job.log.touch()  # a log that stays empty is there, too
        folder = self._get(self._actor.folder.remote())
        try:
            for file in job.files(READS).values():
                with file.open("rb") as source:
                    while piece := source.read(PIECE_BYTES):
                        self._done(self._actor.put.remote(file.name, piece))
        except OSError as e:
            raise WorkerError(f"{e.filename}: cannot read ({e.strerror})") from e
        spec, nice = job.spec_file.name, os.getpriority(os.PRIO_PROCESS, 0)
        self._done(self._actor.put.remote(spec, job.spec_in(folder)))
        self._done(self._actor.begin.remote(list(job.argv), dict(job.env), self.name, spec, job.log.name, nice))
        self._clock_offset_ns = clock_offset_ns(lambda: self._get(self._actor.clock_ns.remote()))

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=BEGIN_S)
        except (RayError, GetTimeoutError) as e:
            raise WorkerError(f"{self.name}: its host {self.host} does not take it: {last_line(e)}") from e

    def _done(self, ref: Any) -> None:
        if problem := self._get(ref):
            raise WorkerError(f"{self.name} on {self.host}: {problem}")

    def poll(self) -> int | None:
        """Exit code once it has ended and all it wrote is here; null while it runs. Never waits."""
        if self._code is None:
            report = self.fetch()
            if report is not None:
                self._lines += report.lines
            if self.trouble is not None:
                self._end(LOST_CODE)
            elif report is not None and report.code is not None and not any(report.pieces.values()):
                self._end(report.code)
        return self._code

    def _end(self, code: int) -> None:
        self._code = code
        self.release()

    def wait(self, timeout_s: float) -> int | None:
        """`poll` after the end or ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(min(0.1, timeout_s))
        return self._code

    def lines(self) -> list[str]:
        """Lines since the last call."""
        found, self._lines = self._lines, []
        return found

    def write_line(self, line: str) -> bool:
        """A line to its stdin, a start time turned into its host's clock; false when its host is lost."""
        if self._code is not None:
            return False
        word, _, value = line.partition(" ")
        if word == "start" and value.isdigit():
            line = f"start {int(value) + self._clock_offset_ns}"
        self._actor.write_line.remote(line)  # not waited for: a lost host shows in `poll`
        return True

    def stop(self, grace_s: float = GRACE_S) -> int | None:
        """End it, take what it wrote, end its actor. Takes ``grace_s`` and `LOST_S` at most when its host is gone."""
        if self._code is None:
            self._actor.stop.remote(grace_s)
            if self.wait(grace_s + LOST_S) is None:
                self.trouble = f"host {self.host}: did not end"
                self._end(LOST_CODE)
        return self._code

    def tail(self, n: int = 20) -> list[str]:
        """The end of its log."""
        return tail(self._job.log, n)


class RemoteHost(RemoteFolder):
    """The counters of another host, coming home while a run lasts. One that does not answer has none."""

    def __init__(self, node: Node, file: Path) -> None:
        super().__init__(node, {HOST_FILE: file}, cpus=0)

    def begin(self, start_unix_ns: int) -> None:
        """Sample from now on."""
        try:
            offset_ns = clock_offset_ns(lambda: ray.get(self._actor.clock_ns.remote(), timeout=LOST_S))
            self._actor.sample.remote(start_unix_ns + offset_ns)
        except (RayError, GetTimeoutError) as e:
            self.trouble = last_line(e)

    def end(self) -> None:
        """No more samples; the rest comes home."""
        with contextlib.suppress(RayError, GetTimeoutError):
            if self.trouble is None:
                ray.get(self._actor.stop.remote(0.0), timeout=LOST_S)
                deadline, asked = time.monotonic() + LOST_S, 0
                # An answer without a piece may be of a question that was asked before the end.
                while self.trouble is None and asked < 2 and time.monotonic() < deadline:
                    report = self.fetch()
                    asked = 0 if report and report.pieces[HOST_FILE] else asked + (report is not None)
                    time.sleep(0.02)
        self.release()


def clock_offset_ns(read: Callable[[], int]) -> int:
    """How far another host's wall clock is ahead of ours, ns: the reading with the shortest way there and back."""
    readings = []
    for _ in range(CLOCK_READINGS):
        before = time.time_ns()
        there = read()
        after = time.time_ns()
        readings.append((after - before, there - (before + after) // 2))
    return min(readings)[1]
