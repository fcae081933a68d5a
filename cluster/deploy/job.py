"""One load worker to start, here or on another host, and the files it reads and writes.

On another host the worker works in a folder of its own. What it reads is sent there before; what it writes (rows,
observations, log) comes back in pieces while it runs, as it is flushed, so that what it had written before its host
died is in the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from cluster.process.process import GRACE_S, Process
from harness.errors import WorkerError
from harness.record.run_spec import WorkerSpec

READS = ("plan", "tls_ca")
"""Fields of a worker's spec that name files it reads."""
WRITES = ("results", "observations", "answers", "captured")
"""Fields that name files it writes."""
PIECE_BYTES = 4 << 20
"""Of a file that travels."""


class Child(Protocol):
    """A running process with pipes: `cluster.process.process.Process`, or one on another host."""

    @property
    def host(self) -> str: ...  # noqa: D102
    @property
    def trouble(self) -> str | None: ...  # noqa: D102
    def poll(self) -> int | None: ...  # noqa: D102
    def wait(self, timeout_s: float) -> int | None: ...  # noqa: D102
    def stop(self, grace_s: float = GRACE_S) -> int | None: ...  # noqa: D102
    def lines(self) -> list[str]: ...  # noqa: D102
    def write_line(self, line: str) -> bool: ...  # noqa: D102
    def tail(self, n: int = 20) -> list[str]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A load worker: ``argv`` and the path of its spec file are its command line."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str | None]
    spec: WorkerSpec
    """With absolute paths of this host."""
    spec_file: Path
    log: Path

    def reads(self) -> dict[str, Path]:
        """Files it needs, by field of the spec."""
        return {field: Path(name) for field in READS if (name := getattr(self.spec, field))}

    def writes(self) -> dict[str, Path]:
        """Files it makes, by field of the spec, and its log."""
        files = {field: Path(name) for field in WRITES if (name := getattr(self.spec, field))}
        return {**files, "log": self.log}

    def spec_in(self, folder: str) -> bytes:
        """The spec with its files in a folder of another host."""
        moved = {field: f"{folder}/{file.name}" for field, file in {**self.reads(), **self.writes()}.items()}
        del moved["log"]
        return msgspec.json.encode({**msgspec.to_builtins(self.spec), **moved})


class Launch(Protocol):
    """Starts a job; `start_here` and `Deployment.launch` are two."""

    def __call__(self, job: Job) -> Child: ...  # noqa: D102


def start_here(job: Job, cpus: Sequence[int] | None = None) -> Process:
    """Start it as a child of this process, on these processors only if any are named. Raises `WorkerError`."""
    try:
        job.spec_file.write_bytes(msgspec.json.encode(job.spec))
    except OSError as e:
        raise WorkerError(f"{job.spec_file}: cannot write ({e.strerror})") from e
    command = [*job.argv, str(job.spec_file)]
    return Process.start(command, name=job.name, env=job.env, log=job.log, pipes=True, cpus=cpus)


def read_piece(file: Path, offset: int) -> bytes:
    """What the file holds from ``offset``, at most `PIECE_BYTES`; nothing when it is not there (yet)."""
    try:
        with file.open("rb") as source:
            source.seek(offset)
            return source.read(PIECE_BYTES)
    except OSError:
        return b""


def append_piece(file: Path, piece: bytes) -> None:
    """Append what came from another host. A file that this makes is its owner's alone, as captured answers have to be.

    Raises `OSError`.
    """
    with open(file, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as target:
        target.write(piece)
