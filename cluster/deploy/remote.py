"""The driver's side of what runs on other hosts: a load worker, and the counters of a host.

Nothing here waits for a host that may be gone: a question is left open, and a host that leaves one open for `LOST_S`
is lost. What it had written and flushed until then is in the run directory: files come home in pieces all the time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.deploy.actors import HostActor, Report, WorkerActor
from cluster.deploy.job import PIECE_BYTES, Job, append_piece
from cluster.deploy.placement import ACTOR_CPUS, Node
from cluster.deploy.ray_session import LOST_S, Question, end_actor, last_line, on
from cluster.process.process import GRACE_S, tail
from harness.errors import HarnessError, WorkerError

BEGIN_S = 120.0
"""Placing an actor and sending it one piece of a file."""
CLOCK_READINGS = 5
LOST_CODE = -9


class RemoteWorker:
    """A load worker on another host, as a `cluster.deploy.job.Child`."""

    def __init__(self, node: Node, job: Job, cpus: list[int] | None = None) -> None:
        self.name, self.log = job.name, job.log
        self.host = node.address
        self.trouble: str | None = None
        self._job, self._cpus = job, cpus
        self._actor = ray.remote(num_cpus=ACTOR_CPUS, max_concurrency=8, scheduling_strategy=on(node.node_id))(
            WorkerActor
        ).remote()  # fmt: skip
        self._files = {file.name: file for file in job.writes().values()}
        self._offsets = dict.fromkeys(self._files, 0)
        self._question = Question(lambda: self._actor.look.remote(dict(self._offsets)))
        self._clock_offset_ns = 0
        self._code: int | None = None
        self._lines: list[str] = []

    def begin(self) -> None:
        """Send what it reads and start it. Raises `WorkerError`."""
        self.log.touch()  # a log that stays empty is there, too
        folder = self._get(self._actor.folder.remote())
        for file in self._job.reads().values():
            self._send(file)
        spec = self._job.spec_file.name
        problem = self._get(self._actor.put.remote(spec, self._job.spec_in(folder)))
        problem = problem or self._get(
            self._actor.begin.remote(
                list(self._job.argv),
                dict(self._job.env),
                self.name,
                spec,
                self.log.name,
                self._cpus,
                os.getpriority(os.PRIO_PROCESS, 0),
            )
        )
        if problem:
            raise WorkerError(f"{self.name} on {self.host}: {problem}")
        self._clock_offset_ns = clock_offset_ns(lambda: self._get(self._actor.clock_ns.remote()))

    def _send(self, file: Path) -> None:
        try:
            with file.open("rb") as source:
                while piece := source.read(PIECE_BYTES):
                    if problem := self._get(self._actor.put.remote(file.name, piece)):
                        raise WorkerError(f"{self.name} on {self.host}: {problem}")
        except OSError as e:
            raise WorkerError(f"{file}: cannot read ({e.strerror})") from e

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref, timeout=BEGIN_S)
        except (RayError, GetTimeoutError) as e:
            raise WorkerError(f"{self.name}: its host {self.host} does not take it: {last_line(e)}") from e

    def poll(self) -> int | None:
        """Exit code once it has ended and all it wrote is here; null while it runs. Never waits."""
        if self._code is None:
            self._question.send()
            report = self._question.answer()
            if report is not None:
                self._take(report)
            elif self._question.lost:
                self._lose(self._question.lost)
        return self._code

    def _take(self, report: Report) -> None:
        self._lines += report.lines
        for name, piece in report.pieces.items():
            if piece:
                try:
                    append_piece(self._files[name], piece)
                except OSError as e:
                    self._lose(f"{self._files[name]}: cannot write ({e.strerror})")
                    return
                self._offsets[name] += len(piece)
        if report.code is not None and not any(report.pieces.values()):
            self._code = report.code
            self._release()

    def _lose(self, trouble: str) -> None:
        self.trouble, self._code = f"host {self.host}: {trouble}", LOST_CODE
        self._release()

    def _release(self) -> None:
        """Nothing more is to be had of its actor, which takes folder and process with it."""
        if self.trouble is None:
            with contextlib.suppress(RayError):
                ray.get(self._actor.clean.remote(), timeout=LOST_S)
        end_actor(self._actor)

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
                self._lose("did not end")
        return self._code

    def tail(self, n: int = 20) -> list[str]:
        """The end of its log."""
        return tail(self.log, n)


class RemoteHost:
    """The counters of another host, coming home while a run lasts."""

    def __init__(self, node: Node, file: Path) -> None:
        self._file, self._offset, self._started, self._full = file, 0, False, False
        self._actor = ray.remote(num_cpus=0, max_concurrency=4, scheduling_strategy=on(node.node_id))(
            HostActor
        ).remote()  # fmt: skip
        self._question = Question(lambda: self._actor.look.remote(self._offset))

    def begin(self, start_unix_ns: int) -> None:
        """Sample from now on. A host that does not answer has no counters, which stops no run."""
        with contextlib.suppress(RayError, GetTimeoutError):
            offset_ns = clock_offset_ns(lambda: ray.get(self._actor.clock_ns.remote(), timeout=LOST_S))
            self._actor.begin.remote(start_unix_ns + offset_ns)
            self._started = True

    def fetch(self) -> bool:
        """Take what has come; true while there may be more at once."""
        if not self._started or self._full or self._question.lost:
            return False
        self._question.send()
        piece = self._question.answer()
        if piece:
            try:
                with self._file.open("ab") as file:
                    file.write(piece)
            except OSError:  # half of a piece must not be followed by the same one
                self._full = True
            self._offset += len(piece)
        return piece is None or bool(piece)

    def end(self) -> None:
        """No more samples; the rest comes home."""
        with contextlib.suppress(RayError, GetTimeoutError):
            if self._started and not self._question.lost:
                ray.get(self._actor.stop.remote(), timeout=LOST_S)
                deadline = time.monotonic() + LOST_S
                while self.fetch() and time.monotonic() < deadline:
                    time.sleep(0.02)
                ray.get(self._actor.clean.remote(), timeout=LOST_S)
        end_actor(self._actor)


def clock_offset_ns(read: Callable[[], int]) -> int:
    """How far another host's wall clock is ahead of ours, ns: the reading with the shortest way there and back."""
    best: tuple[int, int] | None = None
    for _ in range(CLOCK_READINGS):
        before = time.time_ns()
        there = read()
        after = time.time_ns()
        if best is None or after - before < best[0]:
            best = after - before, there - (before + after) // 2
    if best is None:
        raise HarnessError("no reading of the other clock")
    return best[1]
