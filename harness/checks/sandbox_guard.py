"""The process that makes a sandbox, runs one Python program in it, and outlives it: FOLDER SECONDS MEMORY_MIB.

Runs by itself (``python -I -S -B``), so it imports the standard library alone. Standard input is the leash: at its end
the program is ended. Prints the last part of what the program printed and exits with its status, or with one of two of
its own. `harness.checks.sandbox` says what the place is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import NoReturn

REFUSED, TIMED_OUT = 201, 202
OUTPUT_BYTES, KEPT_BYTES = 1 << 20, 4000
LIBC = ctypes.CDLL(None, use_errno=True)
NEW = 0x10000000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x00020000  # users, processes, network, IPC, mounts
RULESET, RULE, RESTRICT = 444, 445, 446
READ_FILE, READ_DIR, EXECUTE = 1 << 2, 1 << 3, 1 << 0
# audit architecture; numbers of clone, clone3 and prctl; those refused: socket (a socket in the file system is in no
# namespace), unshare, setns, ptrace, shmget, msgget, memfd_create, io_uring_setup, bpf, userfaultfd, add_key, keyctl,
# perf_event_open; fork and vfork where there are such
MACHINES = {
    "x86_64": (0xC000003E, 56, 435, 157, (41, 272, 308, 101, 29, 68, 319, 425, 321, 323, 248, 250, 298, 57, 58)),
    "aarch64": (0xC00000B7, 220, 435, 167, (198, 97, 268, 117, 194, 186, 279, 425, 280, 282, 217, 219, 241)),
}


class SandboxError(Exception):
    """The sandbox cannot be made here."""


def call(what: str, *arguments: object) -> int:
    """A system call by its name in libc, or by number; raises `SandboxError` with ``what`` where it fails."""
    name, *rest = arguments
    found = LIBC.syscall(name, *rest) if isinstance(name, int) else getattr(LIBC, str(name))(*rest)
    if found < 0:
        raise SandboxError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return int(found)


def namespaces() -> None:
    """New ones for this process and its children, who are nobody in them."""
    uid, gid = os.geteuid(), os.getegid()
    call("namespaces of users, processes and networks", "unshare", NEW)
    for file, words in (("setgroups", "deny"), ("gid_map", f"65534 {gid} 1"), ("uid_map", f"65534 {uid} 1")):
        with open(f"/proc/self/{file}", "w") as place:  # noqa: PTH123
            place.write(words)


def limit(seconds: float, memory_mib: int) -> None:
    """Time, memory, files; no core, no file written."""
    whole = max(1, int(seconds) + 1)
    for kind, most in (
        (resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, memory_mib << 20), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_MEMLOCK, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def landlock(folder: str) -> None:
    """Read the interpreter, its library and ``folder``; write nothing, use no TCP, signal nobody outside."""
    version = call("Landlock", RULESET, 0, 0, 1)
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    asked = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    rules = call("Landlock", RULESET, asked, 8 if version < 4 else 16 if version < 6 else 24, 0)
    base = sys.base_prefix
    readable = [
        base,
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/urandom",
        folder,
    ]
    for path in readable:
        if not os.path.exists(path):  # noqa: PTH110
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)  # noqa: PTH112
        call(f"Landlock on {path}", RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    call("no new privileges", "prctl", 38, 1, 0, 0, 0)
    call("Landlock", RESTRICT, rules, 0)


def no_more_processes() -> None:
    """Threads may be started, processes not; nor may what would escape the limits of memory."""
    if platform.machine() not in MACHINES:
        raise SandboxError(f"seccomp: not known for {platform.machine()}")
    machine, clone, clone3, prctl, refused = MACHINES[platform.machine()]
    allow, deny, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06

    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, deny)]  # the other calling convention of x86-64
    for number in refused:
        code += [(equal, 0, 1, number), (give, 0, 0, deny)]
    code += [(equal, 0, 1, clone3), (give, 0, 0, missing)]  # its flags cannot be seen: libc then uses clone
    # it must die with its guard: prctl may not take PR_SET_PDEATHSIG back
    code += [(equal, 0, 4, prctl), (load, 0, 0, 16), (equal, 0, 1, 1), (give, 0, 0, deny), (give, 0, 0, allow)]
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, 0x10000), (give, 0, 0, deny), (give, 0, 0, allow)]
    raw = b"".join(struct.pack("HBBI", *one) for one in code)
    held = ctypes.create_string_buffer(raw, len(raw))
    filtering = struct.pack("HxxxxxxP", len(code), ctypes.addressof(held))
    call("seccomp", "prctl", 22, 2, filtering, 0, 0)


def child(folder: str, seconds: float, memory_mib: int, output: int, told: int) -> NoReturn:
    """Become the program; why not goes to ``told``, which it does not inherit."""
    try:
        call("death with the guard", "prctl", 1, signal.SIGKILL, 0, 0, 0)
        empty = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((empty, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, told)
        os.closerange(told + 1, 1024)
        os.chdir(folder)
        landlock(folder)
        limit(seconds, memory_mib)
        no_more_processes()
        python = os.path.realpath(sys.executable)
        os.execve(python, [python, "-I", "-S", "-B", f"{folder}/program.py"], {})  # noqa: S606
    except BaseException as e:
        os.write(told, str(e).encode())
        os._exit(1)


def watch(pid: int, output: int, seconds: float) -> tuple[bool, int, bytes]:
    """(out of time, exit status, end of its output); it is ended at its time, at too much output or with the leash."""
    deadline, kept, total = time.monotonic() + seconds, b"", 0
    timed_out = False
    waiting = [output, 0]
    while output in waiting:
        left = deadline - time.monotonic()
        ready = select.select(waiting, [], [], max(0.0, left))[0] if left > 0 else []
        if not ready:
            timed_out = True
            break
        if 0 in ready:  # nobody writes to it: this is its end
            break
        part = os.read(output, 65536)
        kept, total = (kept + part)[-KEPT_BYTES:], total + len(part)
        if not part or total > OUTPUT_BYTES:
            break
    ended, status = 0, 0
    while not timed_out and total <= OUTPUT_BYTES and time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)  # it may close its output and go on
        if ended or select.select([0], [], [], 0.002)[0]:
            break
    if not ended:
        timed_out = timed_out or time.monotonic() >= deadline
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    return timed_out or code == 128 + signal.SIGXCPU, code, kept


def main() -> int:
    """Make the place, run the program, tell how it ended."""
    folder, seconds, memory_mib = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    try:
        output, inner = os.pipe()
        why, told = os.pipe()
        namespaces()
        pid = os.fork()
    except (SandboxError, OSError) as e:
        print(e, end="")
        return REFUSED
    if pid == 0:
        child(folder, seconds, memory_mib, inner, told)
    os.close(inner)
    os.close(told)
    timed_out, status, kept = watch(pid, output, seconds)
    refused = os.read(why, 1000)
    sys.stdout.buffer.write(refused or kept)
    sys.stdout.flush()
    return REFUSED if refused else TIMED_OUT if timed_out else min(status, 200)


if __name__ == "__main__":
    sys.exit(main())
