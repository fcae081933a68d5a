"""A program that a model wrote, at its worst: what it may not do, what becomes of it, and that an honest one runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.checks import sandbox
from harness.checks.grade import Grader
from harness.checks.sandbox import GUARD, LinuxSandbox, refusal
from harness.checks.spec import parse_check

needed = pytest.mark.skipif(refusal() is not None, reason=f"no sandbox here: {refusal()}")
LIMIT_S, MEMORY_MIB = 60.0, 512


def run(source: str, seconds: float = LIMIT_S) -> sandbox.Ended:
    return LinuxSandbox().run(source, seconds, MEMORY_MIB)


@needed
def test_an_honest_program_runs() -> None:
    source = (
        "import json, math, re, random, collections, itertools, functools, threading\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "print(math.comb(5, 2), json.dumps([1]), 'caf\\u00e9')"
    )
    assert run(source) == sandbox.Ended("ended", 0, "thread\n10 [1] caf\u00e9\n")


ATTACKS = {
    "read a file": "open('/etc/passwd').read()",
    "list the home": "import os; os.listdir(os.path.expanduser('~')), os.listdir('/root')",
    "read a process": "open('/proc/self/environ').read()",
    "write in its folder": "open('x', 'w')",
    "write elsewhere": "open('/tmp/harness-evil', 'w')",
    "network": "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
    "socket in the file system": "import socket; socket.socket(socket.AF_UNIX).connect('/tmp/x')",
    "fork": "import os; os.fork()",
    "start a program": "import subprocess; subprocess.run(['/bin/true'])",
    "daemon by ctypes": "import ctypes; assert ctypes.CDLL(None).syscall(57) > 0",
    "signal the guard": "import os, signal; os.kill(os.getppid() or 2, signal.SIGKILL)",
    "signal all": "import os, signal; os.kill(-1, signal.SIGTERM)",
    "memory": "x = bytearray(2 << 30)",
    "shared memory": "import ctypes; l = ctypes.CDLL(None); assert l.syscall(29, 0, 1 << 30, 0o1600) >= 0",
    "file in memory": "import os; os.memfd_create('x')",
    "no death with the guard": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0",
    "more rights": "import os; os.setuid(0)",
    "mount": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "new namespaces": "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "raise its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
}


@needed
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_fails(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = run(ATTACKS[name].replace("PORT", str(server.getsockname()[1])) + "\nprint('LEAK')")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert found.how == "ended" and found.status != 0 and "LEAK" not in found.output, found
    assert not Path("/tmp/harness-evil").exists()


@needed
def test_nothing_of_ours_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_API_KEY", "secret")
    found = run("import os, sys; print(dict(os.environ), sys.argv, os.getpid(), os.getuid())")
    assert found.status == 0 and "secret" not in found.output and "1 65534" in found.output


@needed
def test_a_program_without_end_is_ended() -> None:
    assert run("while True: pass", 0.5).how == "timed out"
    assert run("import time; time.sleep(1000)", 0.5).how == "timed out"
    assert run("import os, time; os.close(1); os.close(2); time.sleep(1000)", 0.5).how == "timed out"


@needed
def test_a_flood_is_cut() -> None:
    found = run("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert found.status != 0 and len(found.output) <= 4000


@needed
def test_a_program_cannot_pass_for_the_guard() -> None:
    for status in (sandbox.REFUSED, sandbox.TIMED_OUT, 255):
        assert run(f"import os; os.write(1, b'{status} x'); os._exit({status})").how == "ended"


@needed
def test_code_is_graded() -> None:
    one = parse_check('{"type": "code", "test": "assert add(2, 3) == 5", "timeout_s": 60}')
    grader = Grader(sandbox=LinuxSandbox())
    assert grader.grade(one, "```python\ndef add(a, b): return a + b\n```").accepted is True
    for wrong in (
        "def add(a, b): return a - b",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "print('''",
        "\ud800 = 1",
    ):
        assert grader.grade(one, wrong).accepted is False


@needed
def test_it_ends_with_us(tmp_path: Path) -> None:
    """SIGKILL of the process that asked: its end of the leash closes, and the program goes with it."""
    (tmp_path / "program.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(1000)")
    command = [sys.executable, "-I", "-S", "-B", str(GUARD), str(tmp_path), "900", "512"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, cwd="/")
    assert guard.stdin is not None
    children = Path(f"/proc/{guard.pid}/task/{guard.pid}/children")
    deadline = time.monotonic() + 60
    while not children.read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = children.read_text().split()
    for kind in ("net", "pid", "ipc", "user", "mnt"):
        assert os.readlink(f"/proc/{child}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115
    guard.stdin.close()
    assert guard.wait(60) == 137
    assert not Path(f"/proc/{child}").exists()
    guard.stdout.close()  # type: ignore[union-attr]


def test_where_it_cannot_be_made_nothing_runs(tmp_path: Path) -> None:
    """Without the right to make namespaces, as in many containers, the guard refuses, and a check has no grade."""
    (tmp_path / "program.py").write_text("open('ran', 'w')")
    cut = GUARD.read_text().replace('"unshare", NEW', '"unshare", -1')
    (tmp_path / "guard.py").write_text(cut)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", tmp_path / "guard.py", tmp_path, "20", "512"],
        stdin=subprocess.PIPE, capture_output=True, env={}, timeout=60,
    )  # fmt: skip
    assert done.returncode == sandbox.REFUSED and b"namespaces" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_a_guard_that_does_not_start_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "GUARD", Path("/nowhere/guard.py"))
    assert run("print(1)").how in ("refused", "ended")
    one = parse_check('{"type": "code", "test": "assert True"}')
    assert Grader(sandbox=LinuxSandbox()).grade(one, "x = 1").accepted is not True
    assert os.path.exists(GUARD)  # noqa: PTH110
