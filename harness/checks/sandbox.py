"""Runs a program that a model wrote where it can do no harm, or not at all.

A guard process (`harness/checks/sandbox_guard.py`) makes the place: namespaces of its own for users, network,
processes, IPC and mounts; Landlock (read the standard library and nothing else, write nothing); no new process, by
seccomp; limits of time, memory and output; an empty environment. Where any of it is missing the program is not run.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

from harness.checks.spec import Code
from harness.checks.structured import unfenced

GUARD = Path(__file__).with_name("sandbox_guard.py")
SPARE_S = 30.0
"""What the guard may take beside the program's own time, on a machine that is busy."""
REFUSED, TIMED_OUT = 201, 202
"""Exit statuses of the guard itself; below 128 it is the program's."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended."""

    how: Literal["ended", "timed out", "refused"]
    """refused: it did not run, since the sandbox could not be made."""
    status: int = 0
    """Exit status; 128 and the signal where one ended it."""
    output: str = ""
    """The end of what it printed; why, where it was refused."""


class Sandbox(Protocol):
    """Runs programs."""

    def run(self, source: str, timeout_s: float, memory_mib: int) -> Ended:
        """Run Python source to its end."""
        ...


def program(check: Code, answer: str) -> tuple[str, str]:
    """(source, what it prints last when all of it ran): a token of its own, so that an early exit(0) is no success."""
    token = secrets.token_hex(16)
    code = unfenced(answer) if check.fenced else answer
    return f"{check.before}\n{code}\n{check.test}\nprint('\\n{token}')\n", token


class LinuxSandbox:
    """The guard on this machine."""

    def run(self, source: str, timeout_s: float, memory_mib: int) -> Ended:
        """Run Python source to its end, its limit or its refusal."""
        with TemporaryDirectory(prefix="harness-check-") as folder:
            place = Path(folder, "program.py")
            try:
                place.write_text(source, encoding="utf-8")
            except UnicodeEncodeError:  # half of a surrogate pair
                return Ended("ended", 1)
            try:
                guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", GUARD, folder, f"{timeout_s:g}", str(memory_mib)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/",
                )  # fmt: skip
            except OSError as e:
                return Ended("refused", output=str(e.strerror))
            with guard:
                try:  # its stdin stays open: where we die it reads the end and ends the program
                    assert guard.stdout is not None
                    output = _read(guard, timeout_s + SPARE_S)
                finally:
                    with suppress(OSError):
                        guard.kill()
                status = guard.wait()
        if output is None or status < 0 or status == REFUSED:
            return Ended("refused", output="the guard did not end in time" if output is None else output)
        if status == TIMED_OUT:
            return Ended("timed out", output=output)
        return Ended("ended", status, output)


def _read(guard: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    """All that the guard prints, which is bounded; None where it takes longer."""
    try:
        guard.wait(timeout_s)  # its output fits a pipe, so it never waits for us
    except subprocess.TimeoutExpired:
        return None
    assert guard.stdout is not None
    return guard.stdout.read().decode(errors="replace")


@lru_cache(maxsize=1)
def refusal() -> str | None:
    """Why programs are not run on this machine; None where they are. Runs one."""
    ended = LinuxSandbox().run("print('ran')", 20.0, 512)
    if ended.how == "ended" and ended.status == 0 and ended.output.strip() == "ran":
        return None
    return ended.output.strip() or f"a program that prints one word ended with {ended.status} ({ended.how})"
