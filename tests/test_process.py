"""A process group has an owner, and nothing of it outlives either of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, gone, wait_for

from harness.cluster.process import process
from harness.cluster.process.process import Cause, PortTakenError, Process, describe_exit, sweep, tail, wait_ready
from harness.cluster.process.registry import MARK, running
from harness.errors import HarnessError, ServerError

# Prints its own pid and that of a grandchild in a session of its own; both ignore SIGTERM when asked to.
FAMILY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def start_family(tmp_path: Path, *args: str) -> tuple[Process, list[int]]:
    process = Process.start([sys.executable, "-c", FAMILY, *args], name="family", log=tmp_path / "log", pipes=True)
    lines: list[str] = []
    wait_for(lambda: bool(lines.extend(process.lines()) or lines) and process.pid is not None, 120, "the family's pids")
    return process, [int(pid) for pid in lines[0].split()]


def test_talks_through_pipes_and_ends_with_its_code(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdin.readline().upper(), end=''); print('to the log', file=sys.stderr); sys.exit(3)"
    process = Process.start([sys.executable, "-c", code], name="p", log=tmp_path / "log", pipes=True)
    assert process.write_line("hello")
    assert process.wait(120) == 3
    assert process.lines() == ["HELLO"]
    assert process.tail() == ["to the log"]
    assert not process.write_line("anyone there?")
    assert process.stop() == 3  # again, and after its end


def test_the_last_line_is_there_once_poll_says_it_ended(tmp_path: Path) -> None:
    for _ in range(10):
        process = Process.start(["sh", "-c", "echo a; echo b; exit 0"], name="p", pipes=True)
        assert process.wait(120) == 0
        assert process.lines() == ["a", "b"]


def test_environment_is_added_and_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN_AWAY", "1")
    process = Process.start(
        ["sh", "-c", 'echo "$ADDED-${TAKEN_AWAY:-gone}"'], name="p", env={"ADDED": "x", "TAKEN_AWAY": None}, pipes=True
    )
    process.wait(120)
    assert process.lines() == ["x-gone"]


@pytest.mark.parametrize("more", [None, 0, 4])
def test_a_nice_value_is_that_of_all_it_starts(more: int | None) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    nice = None if more is None else own + more
    code = "import os; os.fork(); os.write(1, b'%d\\n' % os.getpriority(os.PRIO_PROCESS, 0))"
    with Process.start([sys.executable, "-c", code], name="p", pipes=True, nice=nice) as process:
        assert process.wait(120) == 0
        assert [int(line) for line in process.lines()] == [own + (more or 0)] * 2


def test_a_nice_value_that_may_not_be_had_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = "raise PermissionError"  # who is not root may not ask for less than it has
    code = f"import os\ndef no(*a): {refused}\nos.setpriority = no\nfrom harness.cluster.process import guard\n"
    code += "guard.become(['echo', 'it runs'], cpus='-', nice='-5')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "it runs\n", done.stderr


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    process = Process.start(["/no/such/command"], name="p", log=tmp_path / "log")
    assert process.wait(120) == 127
    assert "cannot start /no/such/command: No such file" in process.tail()[0]


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"p: cannot start: .*missing/log"):
        Process.start(["true"], name="p", log=tmp_path / "missing" / "log")


def test_stop_ends_the_group_and_the_grandchild_in_its_own_session(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    assert not any(gone(pid) for pid in pids)
    assert process.stop() == -signal.SIGTERM
    assert all(gone(pid) for pid in pids)


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path, "stubborn")
    assert process.stop(grace_s=0.5) == -signal.SIGKILL
    assert all(gone(pid) for pid in pids)


def test_stop_overtakes_from_another_thread(tmp_path: Path) -> None:
    process, _ = start_family(tmp_path)
    codes: list[int | None] = []
    threads = [threading.Thread(target=lambda: codes.append(process.stop())) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert process.wait(120) == -signal.SIGTERM
    for thread in threads:
        thread.join(120)
    assert codes == [-signal.SIGTERM] * 4


def test_a_command_that_ends_takes_what_it_left_behind_with_it(tmp_path: Path) -> None:
    process = Process.start(["sh", "-c", "setsid sleep 600 & echo $!; exit 4"], name="p", pipes=True)
    assert process.wait(120) == 4
    assert gone(int(process.lines()[0]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_of_the_owner_ends_the_family(tmp_path: Path, number: signal.Signals) -> None:
    owner = textwrap.dedent(f"""
        import sys, time
        from harness.cluster.process.process import Process
        p = Process.start([sys.executable, "-c", {FAMILY!r}], name="family", pipes=True)
        while not (lines := p.lines()): time.sleep(0.01)
        print(lines[0], flush=True)
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    below = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert set(pids) <= set(below), "the tree shows who started what"
    os.kill(process.pid, number)
    process.wait(120)
    wait_for(lambda: all(gone(pid) for pid in below), 120, "guard and family ended")


def test_killing_the_owners_direct_children_spares_the_command(tmp_path: Path) -> None:
    # Ray does this to its workers' children; the guard must live to end the command in order.
    process, pids = start_family(tmp_path)
    assert process.pid is not None
    guard = psutil.Process(process.pid).parent()
    assert guard is not None
    stand_in = guard.parent()
    assert stand_in is not None
    stand_in.kill()
    time.sleep(0.3)
    assert process.poll() is None
    assert not gone(pids[0])
    assert process.stop() == -signal.SIGTERM
    assert all(gone(pid) for pid in pids)


def test_a_killed_guard_leaves_nothing_either(tmp_path: Path) -> None:
    process, pids = start_family(tmp_path)
    assert process.pid is not None
    guard = psutil.Process(process.pid).parent()
    assert guard is not None
    guard.kill()
    assert process.wait(120) == -signal.SIGKILL
    wait_for(lambda: all(gone(pid) for pid in pids), 120, "command killed by the kernel, the rest swept")


def test_sweep_finds_a_process_by_session_though_it_hides_its_environment() -> None:
    child = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"]}, start_new_session=True)
    marked = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"], MARK: "only-this-test"})
    assert set(sweep(child.pid, "only-this-test")) == {child.pid, marked.pid}
    assert child.wait(120) == marked.wait(120) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processor affinity here")
def test_runs_on_the_processors_it_is_given() -> None:
    own = max(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    process = Process.start([sys.executable, "-c", code], name="p", pipes=True, cpus=[own])
    assert process.wait(120) == 0
    assert process.lines() == [f"[{own}]"]


def test_ready_is_when_the_check_says_so() -> None:
    with Process.start(["sleep", "600"], name="p") as process:
        answers = iter([False, False, True])
        assert 0 < wait_ready(lambda: next(answers), process, 250, poll_s=0.05) < 250
        with pytest.raises(ServerError, match="p was not ready after 0 s"):
            wait_ready(lambda: False, process, 0.2, poll_s=0.05)


def test_a_death_before_ready_is_told_with_its_cause_and_last_words(tmp_path: Path) -> None:
    process = Process.start(
        ["sh", "-c", "echo first >&2; echo 'address already in use' >&2; exit 7"], name="server 0", log=tmp_path / "log"
    )
    start = time.monotonic()
    taken = Cause("its port is taken", port_taken=True)
    with pytest.raises(PortTakenError) as caught:
        wait_ready(lambda: False, process, 600, explain=lambda lines: taken if "use" in lines[-1] else None)
    assert time.monotonic() - start < 250, "a death is not waited out"
    assert "server 0 ended before it was ready: exit code 7" in str(caught.value)
    assert "its port is taken" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    assert caught.value.log_tail == ["first", "address already in use"]


def test_tail_of_a_hostile_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log, 5) == []
    log.write_bytes(b"x" * 300_000 + b"\n\n\xff\xfe broken\n" + b"y" * 5000 + b"\nlast")
    lines = tail(log, 3)
    assert lines[-1] == "last"
    assert "broken" in lines[0]
    assert max(map(len, lines)) <= 400


def test_ends_are_told_in_words() -> None:
    assert describe_exit(2) == "exit code 2"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
    assert "out of memory" in describe_exit(-signal.SIGKILL)
    assert describe_exit(-200) == "killed by signal 200"


def test_what_outlives_sigkill_is_named_and_stays_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    powerless = tmp_path / "guard.py"  # nothing on a healthy machine outlives SIGKILL, so this guard's never arrives
    powerless.write_text(
        f"import importlib.util, sys\nspec = importlib.util.spec_from_file_location('guard', {str(process.GUARD)!r})\n"
        "guard = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(guard)\n"
        "guard.KILL_S, guard.send, guard.prctl = 0.3, lambda *a: None, lambda *a: None\nguard.main(sys.argv)\n"
    )
    monkeypatch.setattr(process, "GUARD", powerless)
    stuck = Process.start(["sleep", "600"], name="stuck", log=tmp_path / "log")
    wait_for(lambda: stuck.pid is not None, 120, "its pid")
    try:
        wait_for(lambda: bool(running()), 120, "its entry")
        assert stuck.stop(0.1) == -signal.SIGKILL
        assert stuck.survivors == [stuck.pid]
        assert f"still there 0.3 s after SIGKILL: [{stuck.pid}]" in (tmp_path / "log").read_text()
        assert [(one.name, one.alive) for one in running()] == [("stuck", True)]
    finally:
        os.kill(stuck.pid or 0, signal.SIGKILL)
    wait_for(lambda: not running(), 120, "it is forgotten once it has ended")
