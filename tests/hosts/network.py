"""Hosts that can be cut off and killed: one network namespace each, joined by a bridge in a namespace of its own.

A host has its own address, its own loopback and (for the folders it is given) its own files. The process table is
shared, so a test sees whether anything is left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]


def why_not() -> str | None:
    """Why namespaces cannot be made here; null when they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"hx{os.getpid()}t"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "two")
            ip("-n", name, "link", "add", "name", "br", "type", "bridge")
        finally:
            ip("netns", "del", name)
    except (OSError, subprocess.SubprocessError) as e:
        said = getattr(e, "stderr", "") or str(e)
        return f"network namespaces cannot be made here: {said.strip()}"
    return None


def ip(*words: str) -> str:
    """Run iproute2's ip."""
    done = subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
    return done.stdout


@dataclass
class HostOnBridge:
    """One host."""

    name: str
    address: str
    switch: str
    port: str
    """Its end of the cable at the bridge."""
    private: list[Path] = field(default_factory=list)
    """Folders that are empty and its own here."""

    def start(self, argv: Sequence[str | Path], *, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        """A process on this host, in a session of its own."""
        hide = "".join(f"mount -t tmpfs tmpfs '{folder}' && " for folder in self.private)
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "sh", "-c", f'{hide}exec "$@"', "sh", *map(str, argv)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        """Put it back."""
        ip("-n", self.switch, "link", "set", self.port, "up")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs here."""
        found = []
        for pid in ip("netns", "pids", self.name).split():
            try:
                process = psutil.Process(int(pid))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """The power fails: all its processes end at once, the network does not say goodbye."""
        self.cut()
        deadline = time.monotonic() + 20
        while processes := self.processes():
            for process in processes:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < deadline, processes
            time.sleep(0.05)


@contextmanager
def hosts(count: int) -> Iterator[list[HostOnBridge]]:
    """``count`` hosts that reach each other, and nothing else; gone afterwards with all that runs on them."""
    tag = f"hx{os.getpid() % 100_000}"
    switch = f"{tag}s"
    made: list[HostOnBridge] = []
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "name", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for i in range(count):
            host = HostOnBridge(f"{tag}h{i}", f"10.213.7.{i + 1}", switch, f"p{i}")
            ip("netns", "add", host.name)
            made.append(host)
            ip(
                "-n",
                switch,
                "link",
                "add",
                "name",
                host.port,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                host.name,
            )
            ip("-n", switch, "link", "set", host.port, "master", "br0")
            ip("-n", switch, "link", "set", host.port, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "link", "set", "eth0", "up")
            # Everything else is nowhere, at once, instead of being waited for.
            ip("-n", host.name, "route", "add", "unreachable", "default")
        yield made
    finally:
        for host in made:
            host.kill()
            ip("netns", "del", host.name)
        ip("netns", "del", switch)
