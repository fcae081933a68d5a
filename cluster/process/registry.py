"""What this user's harness runs on this host: one small file per process group, so that nothing is ever forgotten.

``$XDG_STATE_HOME/harness/processes`` (default ``~/.local/state/...``) holds ``<id>.json`` for every server, load worker
and Ray that `cluster.process.process.Process` started. Its owner takes the file away when the group has ended. A file
whose owner is gone is an orphan: `name_orphans` says so, and `harness stop` ends what is left of it; a run ends nothing
that it did not start. Entries hold no secret: command lines never do.

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
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import psutil

from harness import state_dir

MARK = "HARNESS_GROUP"
"""Environment variable by which members of a group are found should its guard be killed."""
GRACE_S = 5.0
"""Between SIGTERM and SIGKILL, as in cluster/process/process.py."""
WORD_CHARS = 300
"""What is kept of one word of a command line."""
GONE_S = 5.0
"""From SIGKILL until the last member has vanished."""


_held: list[IO[bytes]] = []
"""Locks of this process's `work_folder`s, let go at its end."""


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
class Entry:
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


def folder() -> Path:
    """Where the entries are."""
    return state_dir() / "processes"


def began(pid: int) -> str | None:
    """When this process began, as `Identity` has it; null when there is none (a zombie has ended)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{_boot()}:{fields[19]}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        return None
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
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
    """Write an entry; its id. Null when that cannot be done: a full disk must not stop a run."""
    entry = Entry(
        id=secrets.token_hex(4), name=name, place=place(), host=socket.gethostname(), started=round(time.time(), 3),
        owner=identify(owner), guard=identify(guard), command=identify(command), mark=mark,
        argv=[word[:WORD_CHARS] for word in argv],
        run_dir=str(log.parent) if log else None,
    )  # fmt: skip
    home = folder()
    temporary = home / f".{entry.id}"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_bytes(msgspec.json.encode(entry) + b"\n")
        temporary.replace(home / f"{entry.id}.json")
    except OSError:
        return None
    return entry.id


def forget(entry_id: str | None) -> None:
    """Take an entry away."""
    if entry_id:
        with contextlib.suppress(OSError):
            (folder() / f"{entry_id}.json").unlink(missing_ok=True)


def running() -> list[Entry]:
    """What runs on this host, oldest first. Entries of groups that have ended are taken away."""
    found = []
    here = place()
    for file in sorted(folder().glob("*.json")):
        try:
            if file.lstat().st_uid != os.geteuid():
                continue  # of another user, who shares this folder
            entry = msgspec.json.decode(file.read_bytes(), type=Entry)
        except OSError:
            continue  # its owner was faster
        except msgspec.DecodeError:
            with contextlib.suppress(OSError):
                file.unlink()  # not one of ours, or of another version: nothing can be done with it
            continue
        if entry.place != here:
            continue  # a home that several hosts share
        if entry.alive:
            found.append(entry)
        else:
            forget(entry.id)
    return sorted(found, key=lambda entry: entry.started)


def end(entry: Entry, grace_s: float = GRACE_S) -> bool:
    """End a group: SIGTERM, after the grace SIGKILL, and by its guard what else it started. True: nothing is left.

    Takes at most ``grace_s`` and some seconds.
    """
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
    gone = not entry.alive
    if gone:
        forget(entry.id)
    return gone


def name_orphans(say: Callable[[str], None]) -> int:
    """Say what a killed harness left behind on this host, and how to end it; how many groups."""
    orphans = [entry for entry in running() if entry.orphan]
    for entry in orphans:
        where = f"pid {entry.command.pid}, {entry.run_dir or 'no log'}"
        say(f"still running: {entry.name} ({where}), whose owner is gone: harness stop {entry.id} ends it")
    return len(orphans)


def work_folder() -> Path:
    """A folder for files of this process, which removes it when it is done.

    One whose process was killed before (with the plan and rows it held) is removed by the next that makes one.
    """
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


def _guards(entry: Entry) -> set[int]:
    """Its guard and the guard's stand-in, which have its mark as well."""
    if not entry.guard.alive:
        return set()
    try:
        return {entry.guard.pid, psutil.Process(entry.guard.pid).ppid()}
    except psutil.Error:
        return {entry.guard.pid}


def _send(entry: Entry, number: signal.Signals, spare: Collection[int] = ()) -> None:
    for process in entry.members():
        if process.pid in spare:
            continue
        with contextlib.suppress(psutil.Error):
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
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
