"""The guard: a small process that outlives its owner just long enough to end what the owner started.

`cluster.process.process.Process` runs this file as a script. It uses the standard library only, so it is up at once::

    guard.py CONTROL_FD STATUS_FD GRACE_S CPUS NICE COMMAND ARGUMENT...

The owner holds the other ends of two pipes. CONTROL closes when the owner dies, however it dies, or orders a stop (it
may write another grace first). STATUS carries ``pid N``, ``left N ...`` if something outlived SIGKILL, and as the last
line ``exit N`` (negative: a signal), unless the command itself is still there.

- The guard is not a child of its owner but of a stand-in that only waits: what kills the children of a process (Ray
  does when a worker exits) hits the stand-in, and the process tree still shows who started what.
- It is the reaper of every descendant of the command (PR_SET_CHILD_SUBREAPER), also of those that made their own
  session, so "no child left to wait for" proves that nothing is left.
- Should the guard itself be killed, the kernel kills the command (PR_SET_PDEATHSIG), and the owner, seeing STATUS end
  without ``exit``, sweeps the rest. PR_SET_PDEATHSIG could not replace the guard: it is sent when the *thread* that
  forked exits (the guard has only one), and it does not reach grandchildren.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_S = 30.0
"""How long processes may take to vanish after SIGKILL (a driver call that cannot be interrupted) before we give up."""


def main(argv: list[str]) -> None:
    """Start the command, wait for its end or an order to end it, leave nothing behind."""
    control, status, grace_s, command = int(argv[1]), int(argv[2]), float(argv[3]), argv[6:]
    if guard := os.fork():
        os.closerange(0, max(control, status) + 1)  # the stand-in holds no pipe, only the place in the tree
        os.waitpid(guard, 0)
        os._exit(0)
    os.setsid()
    for fd in (control, status):
        os.set_inheritable(fd, False)
    wake, wake_end = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_end, False)
    signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    # Handlers, not SIG_IGN: a handler is reset by exec, an ignored signal would stay ignored in the command.
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    prctl(PR_SET_CHILD_SUBREAPER)
    child = os.fork()
    if child == 0:
        become(command, cpus=argv[4], nice=argv[5])
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    tell(status, f"pid {child}\n")
    reaped: dict[int, int] = {}
    grace_s = wait_for_end(child, control, wake, reaped, grace_s)
    gone = end_all(child, wake, reaped, grace_s)
    if not gone:
        left = descendants(os.getpid())
        print(f"guard: still there {KILL_S:g} s after SIGKILL: {left}", file=sys.stderr, flush=True)
        tell(status, f"left {' '.join(map(str, left))}\n")
    if child in reaped:
        tell(status, f"exit {os.waitstatus_to_exitcode(reaped[child])}\n")
    os._exit(0 if gone else 1)


def prctl(option: int, value: int = 1) -> None:
    """Linux's prctl; elsewhere the guard does without (it still ends the process group)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def become(command: list[str], cpus: str, nice: str) -> None:
    """Turn this process into the command, in a session of its own, on these processors ("0,1"; "-": any), at this nice
    value ("-": as it is), or as near to it as this user may.
    """
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # an order to end that comes before the exec must not be swallowed
    guard = os.getppid()
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(137)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if nice != "-":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, int(nice))
    try:
        if cpus != "-":
            os.sched_setaffinity(0, map(int, cpus.split(",")))
        os.execvp(command[0], command)  # noqa: S606 - an argument list, no shell
    except OSError as e:
        print(f"cannot start {command[0]}: {e.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def wait_for_end(child: int, control: int, wake: int, reaped: dict[int, int], grace_s: float) -> float:
    """Return, with the grace to give, once the command has ended or is to be ended."""
    order = b""
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready and signal.SIGTERM in os.read(wake, 4096):
            return grace_s
        reap(reaped)
        if child in reaped:
            return grace_s
        if control in ready:
            data = os.read(control, 64)
            if not data:
                return float(order) if order else grace_s
            order += data


def end_all(child: int, wake: int, reaped: dict[int, int], grace_s: float) -> bool:
    """SIGTERM to every process of ours, SIGKILL after the grace. True when nothing is left."""
    start = time.monotonic()
    send(child, signal.SIGTERM)
    while reap(reaped):
        waited = time.monotonic() - start
        if waited > grace_s + KILL_S:
            return False
        if waited >= grace_s:
            send(child, signal.SIGKILL)
        select.select([wake], [], [], min(0.1, max(grace_s - waited, 0.02)))
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
    return True


def reap(reaped: dict[int, int]) -> bool:
    """Collect ended children; False when no child is left at all."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        reaped[pid] = status


def send(child: int, number: int) -> None:
    """A signal to the command and every descendant of it, also outside its process group."""
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):  # it ended by itself, or runs as another user: then the report names it
            os.kill(pid, number)
    if sys.platform != "linux":
        with contextlib.suppress(OSError):
            os.killpg(child, number)


def children() -> dict[int, list[int]]:
    """The children of every process that has any, from /proc; empty where there is no /proc."""
    found: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")  # noqa: PTH208 - pathlib would double the guard's start-up time
    except OSError:
        return found
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended while we looked
            found.setdefault(parent, []).append(int(name))
    return found


def descendants(root: int, tree: Mapping[int, Sequence[int]] | None = None) -> list[int]:
    """Every process below ``root``, from `children` (null: those of now)."""
    tree = children() if tree is None else tree
    found: list[int] = []
    queue = [root]
    while queue:
        queue.extend(below := tree.get(queue.pop(), ()))
        found.extend(below)
    return found


def tell(status: int, line: str) -> None:
    """A line to the owner, who may be gone."""
    with contextlib.suppress(OSError):
        os.write(status, line.encode())


if __name__ == "__main__":
    main(sys.argv)
