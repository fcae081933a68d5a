"""What this user's harness runs on this host, and what that holds of it: nothing is forgotten, and runs do not collide.

``$XDG_STATE_HOME/harness`` (default ``~/.local/state/...``) holds ``processes/<id>.json`` for every server, load worker
and Ray that `cluster.process.process.Process` started, and ``claims/<id>.json`` for what each server holds: the
processors it is pinned to and its accelerators. (Ports need no file: the owner of a server keeps its port bound.) The
owner takes the file away at the end. A group whose owner is gone is an orphan: `name_orphans` says so, and
`harness stop` ends what is left of it; a run ends nothing that it did not start. Files hold no secret: command lines
never do.

A process is known by its pid *and* its start time in this boot, so that a pid used again by someone else is never hit.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
import psutil

from harness import state_dir
from harness.errors import ServerError

MARK = "HARNESS_GROUP"
"""Environment variable by which members of a group are found should its guard be killed."""
GRACE_S = 5.0
"""Between SIGTERM and SIGKILL, as in cluster/process/process.py."""
GONE_S = 5.0
"""From SIGKILL until the last member has vanished."""
LOCK_S = 30.0
WORD_CHARS = 300  # what is kept of one word of a command line
NVIDIA, DEVICES = Path("/proc/driver/nvidia/gpus"), Path("/dev")
"""One entry for each accelerator; in sandboxes without the former (gVisor) nvidia0 and so on in the latter."""

_held: list[IO[bytes]] = []  # locks of this process's `work_folder`s, let go at its end


@dataclass(frozen=True, slots=True)
class Identity:
    """One process for ever: its pid and when it began."""

    pid: int
    began: str
    """Boot and clock ticks since then, where the kernel tells; else its Unix time."""

    @property
    def alive(self) -> bool:
        """It runs, and it is the same one."""
        return self.began != "" and began(self.pid) == self.began


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGroup:
    """One process group."""

    id: str
    name: str
    """What it is to a person: "replica 0", "load worker 1", "Ray"."""
    place: str
    """Host and pid namespace: elsewhere these pids mean nothing."""
    host: str
    started: float
    """Unix time, s."""
    owner: Identity
    guard: Identity
    command: Identity
    """The group's leader."""
    mark: str
    argv: list[str]
    run_dir: str | None
    """Folder of its log."""

    @property
    def orphan(self) -> bool:
        """Nobody waits for it any more."""
        return not self.owner.alive

    def members(self) -> list[psutil.Process]:
        """Its processes that are alive: of its session, or marked as its own."""
        leader = began(self.command.pid)
        led = leader is not None and leader == self.command.began
        # Without its leader the number alone proves nothing: after a reboot, or once all had ended, a stranger may have
        # led a session of this number (a login shell whose background jobs still run). A stranger has a whole
        # environment without our mark; a process of ours that has overwritten its own (vLLM, Ray) has none.
        left = leader is None and self.command.began.startswith(_boot())
        found = []
        for process in psutil.process_iter():
            try:
                if process.uids().effective != os.geteuid():
                    continue  # another user's, whatever it says: root sees them all
                inside = (led or left) and os.getsid(process.pid) == self.command.pid
                ours = inside and led
                if not ours:
                    environment = process.environ()
                    ours = environment.get(MARK) == self.mark or (inside and not environment)
                if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue  # it ended, or belongs to someone else: not ours
        return found

    @property
    def alive(self) -> bool:
        """Something of it runs."""
        return self.guard.alive or self.command.alive or bool(self.members())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What one server holds; it counts as long as the process that made it lives, however that ends."""

    id: str
    name: str
    """As in its entry: "replica 0"."""
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

    @property
    def alive(self) -> bool:
        """It counts."""
        return self.owner.alive


# -- the files ---------------------------------------------------------------------------------------------------------

_Filed = TypeVar("_Filed", RunningGroup, Reservation)


def folder(kind: str = "processes") -> Path:
    """Where the entries, or the reservations, are."""
    return state_dir() / kind


def _write(kind: str, made: RunningGroup | Reservation) -> str | None:
    """The id. Null when it cannot be written: a full disk must not stop a run."""
    home = folder(kind)
    temporary = home / f".{made.id}"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_bytes(msgspec.json.encode(made) + b"\n")
        temporary.replace(home / f"{made.id}.json")
    except OSError:
        return None
    return made.id


def _remove(kind: str, name: str | None) -> None:
    if name:
        with contextlib.suppress(OSError):
            (folder(kind) / f"{name}.json").unlink(missing_ok=True)


def _living(kind: str, of: type[_Filed]) -> list[_Filed]:
    """What of this host is alive; files of the rest, and those that are none, are taken away."""
    found: list[_Filed] = []
    here = place()
    for file in sorted(folder(kind).glob("*.json")):
        one = None
        try:
            if file.lstat().st_uid != os.geteuid():
                continue  # of another user, who shares this folder
            one = msgspec.json.decode(file.read_bytes(), type=of)
        except OSError:
            continue  # its owner was faster
        except msgspec.DecodeError:
            pass  # not one of ours, or of another version: nothing can be done with it
        if one is not None and one.place != here:
            continue  # a home that several hosts share
        if one is not None and one.alive:
            found.append(one)
        else:
            _remove(kind, file.stem)
    return found


def began(pid: int) -> str | None:
    """When this process began, as `Identity` has it; null when there is none (a zombie has ended)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    with contextlib.suppress(psutil.Error):
        return f"{psutil.Process(pid).create_time():.2f}"
    return None


def identify(pid: int) -> Identity:
    """The process with this pid now; one that is gone already is never ``alive``."""
    return Identity(pid, began(pid) or "")


def place() -> str:
    """Name of this host and its pid namespace."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def register(
    *, name: str, owner: int, guard: int, command: int, mark: str, argv: Iterable[str], log: Path | None
) -> str | None:
    """Write an entry; its id, null when that cannot be done."""
    return _write(
        "processes",
        RunningGroup(
            id=secrets.token_hex(4), name=name, place=place(), host=socket.gethostname(), started=round(time.time(), 3),
            owner=identify(owner), guard=identify(guard), command=identify(command), mark=mark,
            argv=[word[:WORD_CHARS] for word in argv], run_dir=str(log.parent) if log else None,
        ),
    )  # fmt: skip


def forget(entry_id: str | None) -> None:
    """Take an entry away."""
    _remove("processes", entry_id)


def running() -> list[RunningGroup]:
    """What runs on this host, oldest first. Entries of groups that have ended are taken away."""
    return sorted(_living("processes", RunningGroup), key=lambda entry: entry.started)


def end(entry: RunningGroup, grace_s: float = GRACE_S) -> bool:
    """End a group: SIGTERM, after the grace SIGKILL, and by its guard what else it started. True: nothing is left."""
    # The guard's turn comes last: it would give the grace that it was started with.
    guards = _guards(entry)
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, GONE_S)):
        _send(entry, number, spare=guards)
        _wait(lambda: all(process.pid in guards for process in entry.members()), patience_s)
    _signal(entry.guard, signal.SIGTERM)  # it knows descendants that left both session and mark
    _wait(lambda: not entry.guard.alive, GRACE_S + 2)
    if entry.guard.alive:  # it hangs
        _signal(entry.guard, signal.SIGKILL)
        _send(entry, signal.SIGKILL)
        _wait(lambda: not entry.alive, GONE_S)
    if entry.alive:
        return False
    forget(entry.id)
    return True


def name_orphans(say: Callable[[str], None]) -> int:
    """Say what a killed harness left behind on this host, and how to end it; how many groups."""
    orphans = [entry for entry in running() if entry.orphan]
    for entry in orphans:
        where = f"pid {entry.command.pid}, {entry.run_dir or 'no log'}"
        say(f"still running: {entry.name} ({where}), whose owner is gone: harness stop {entry.id} ends it")
    return len(orphans)


def work_folder() -> Path:
    """A folder for files of this process, which removes it at its end; if it was killed, the next to make one does."""
    for folder in Path(tempfile.gettempdir()).glob("harness-*"):
        with contextlib.suppress(OSError):  # it has no lock, or its process lives and holds it
            if folder.lstat().st_uid == os.geteuid():  # what others put there may be made to be opened for ever
                with (folder / ".lock").open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
    hidden = Path(tempfile.mkdtemp(prefix=".harness-"))
    held = (hidden / ".lock").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    _held.append(held)
    return hidden.rename(hidden.with_name(hidden.name.removeprefix(".")))  # seen from now on, and locked


def _guards(entry: RunningGroup) -> set[int]:
    """Its guard and the guard's stand-in, which have its mark as well."""
    found = set()
    with contextlib.suppress(psutil.Error):
        if entry.guard.alive:
            found.add(entry.guard.pid)
            found.add(psutil.Process(entry.guard.pid).ppid())
    return found


def _send(entry: RunningGroup, number: signal.Signals, spare: Collection[int] = ()) -> None:
    for process in entry.members():
        with contextlib.suppress(psutil.Error):
            if process.pid not in spare:
                process.send_signal(number)  # psutil looks at the start time before it sends


def _signal(process: Identity, number: signal.Signals) -> None:
    if process.alive:
        with contextlib.suppress(OSError):
            os.kill(process.pid, number)


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


@contextmanager
def exclusively() -> Iterator[None]:
    """One harness at a time looks at what is free and reserves it; without a writable disk everyone is alone.

    Raises `ServerError` when another process keeps the lock for `LOCK_S`.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder("claims").mkdir(parents=True, exist_ok=True, mode=0o700)
            lock(stack.enter_context((folder("claims") / ".lock").open("ab")), LOCK_S)
        yield


def lock(file: IO[Any], limit_s: float, waiting: Callable[[float], None] = lambda waited_s: None) -> None:
    """Lock this file until it is closed; ``waiting`` is called meanwhile. Raises `ServerError` after ``limit_s``."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - start > limit_s:
                raise ServerError(f"{file.name}: another process keeps this lock ({limit_s:g} s): harness ps") from None
            waiting(time.monotonic() - start)
            time.sleep(0.05)


def reservations() -> list[Reservation]:
    """Those of living processes on this host; the others are taken away."""
    return _living("claims", Reservation)


def reserve(name: str, run_dir: Path, *, cpus: Sequence[int] = (), gpus: Sequence[str] = ()) -> str | None:
    """Write a reservation of this process; its id, null when that cannot be done."""
    return _write(
        "claims",
        Reservation(
            id=secrets.token_hex(4), name=name, place=place(), owner=identify(os.getpid()), run_dir=str(run_dir),
            cpus=list(cpus), gpus=list(gpus),
        ),
    )  # fmt: skip


def release(ids: Iterable[str | None]) -> None:
    """Take reservations away."""
    for reserved in ids:
        _remove("claims", reserved)


def holders(of: Sequence[Reservation]) -> str:
    """Who holds what, for a person."""
    return "; ".join(f"{one.words} by {one.name} of {one.run_dir} (pid {one.owner.pid})" for one in of)


def visible_gpus() -> list[str]:
    """The accelerators this process may use, as CUDA_VISIBLE_DEVICES says, else all of the host."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word.strip() for word in said.split(",") if word.strip() not in ("", "-1", "NoDevFiles")]
    try:
        count = len(list(NVIDIA.iterdir()))
    except OSError:
        count = len(list(DEVICES.glob("nvidia[0-9]*")))
    return [str(i) for i in range(count)]


def ranges(numbers: Iterable[int]) -> str:
    """0,1,2,5 as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
