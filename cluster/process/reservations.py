"""What servers hold of this host, so that a second run places itself elsewhere or says who is in its way.

``$XDG_STATE_HOME/harness/claims`` holds ``<id>.json`` for every server of this user's harness: the processors it is
pinned to and its accelerators. A reservation counts as long as the process that made it lives (`registry.Identity`),
however that ends. Ports need none: the owner of a server keeps its port bound (`cluster.deploy.servers.hold_port`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from cluster.process.registry import Identity, identify, place
from harness import state_dir
from harness.errors import ServerError

LOCK_S = 30.0
NVIDIA = Path("/proc/driver/nvidia/gpus")
"""One entry for each accelerator of this host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What one server holds."""

    id: str
    name: str
    """As in the registry: "replica 0"."""
    place: str
    owner: Identity
    run_dir: str
    cpus: list[int]
    gpus: list[str]
    """By index or UUID, as CUDA_VISIBLE_DEVICES has them."""

    @property
    def words(self) -> str:
        """What is held, for a person."""
        held = [f"cpus {ranges(self.cpus)}"] if self.cpus else []
        return ", ".join([*held, *([f"GPUs {','.join(self.gpus)}"] if self.gpus else [])])


def folder() -> Path:
    """Where the reservations are."""
    return state_dir() / "claims"


@contextmanager
def exclusively() -> Iterator[None]:
    """One harness at a time looks at what is free and reserves it. Without a writable disk everyone is alone.

    The lock is held for one listing of a folder, and let go when its holder dies. Raises `ServerError` when another
    process keeps it for `LOCK_S`.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder().mkdir(parents=True, exist_ok=True, mode=0o700)
            _lock(stack.enter_context((folder() / ".lock").open("ab")))
        yield


def _lock(file: IO[bytes]) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ServerError(f"{file.name}: another process keeps this lock ({LOCK_S:g} s): harness ps") from None
            time.sleep(0.05)


def reservations() -> list[Reservation]:
    """Those of living processes on this host; the others are taken away."""
    found, here = [], place()
    for file in sorted(folder().glob("*.json")):
        try:
            one = msgspec.json.decode(file.read_bytes(), type=Reservation)
        except OSError:
            continue
        except msgspec.DecodeError:
            one = None
        if one is not None and one.place != here:
            continue  # a home that several hosts share
        if one is not None and one.owner.alive:
            found.append(one)
        else:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    return found


def reserve(name: str, run_dir: Path, *, cpus: Sequence[int] = (), gpus: Sequence[str] = ()) -> str | None:
    """Write a reservation of this process; its id. Null when that cannot be done: a full disk must not stop a run."""
    made = Reservation(
        id=secrets.token_hex(4), name=name, place=place(), owner=identify(os.getpid()), run_dir=str(run_dir),
        cpus=list(cpus), gpus=list(gpus),
    )  # fmt: skip
    temporary = folder() / f".{made.id}"
    try:
        temporary.write_bytes(msgspec.json.encode(made) + b"\n")
        temporary.replace(folder() / f"{made.id}.json")
    except OSError:
        return None
    return made.id


def release(ids: Iterable[str | None]) -> None:
    """Take reservations away."""
    for reserved in ids:
        if reserved:
            with contextlib.suppress(OSError):
                (folder() / f"{reserved}.json").unlink(missing_ok=True)


def holders(of: Sequence[Reservation]) -> str:
    """Who holds what, for a person."""
    return "; ".join(f"{one.words} by {one.name} of {one.run_dir} (pid {one.owner.pid})" for one in of)


def visible_gpus() -> list[str]:
    """The accelerators this process may use, as CUDA_VISIBLE_DEVICES says, else all of the host."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [word.strip() for word in said.split(",") if word.strip() not in ("", "-1", "NoDevFiles")]
    try:
        return [str(i) for i, _ in enumerate(NVIDIA.iterdir())]
    except OSError:
        return []


def ranges(numbers: Iterable[int]) -> str:
    """0,1,2,5 as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
