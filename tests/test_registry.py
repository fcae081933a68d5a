"""What runs is written down; an orphan is named, and ended when asked for; a pid of someone else's is never hit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner
from conftest import ROOT, gone, wait_for

from harness.cli import machines as verbs
from harness.cluster.process.process import Process, registry
from harness.cluster.process.registry import Identity, RunningGroup, end, identify, name_orphans, running, work_folder


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "state" / "harness" / "processes"


def sleeps(entry: RunningGroup) -> list[psutil.Process]:
    """The grandchildren of a group."""
    return [p for p in entry.members() if p.name() == "sleep"]


def start(
    tmp_path: Path, code: str = "import time; time.sleep(600)", name: str = "replica 0"
) -> tuple[Process, RunningGroup]:
    process = Process.start([sys.executable, "-c", code], name=name, log=tmp_path / "log")
    wait_for(lambda: any(e.command.pid == process.pid for e in running()), 120, "the entry")
    (entry,) = (e for e in running() if e.command.pid == process.pid)
    return process, entry


def test_a_process_is_listed_while_it_runs(tmp_path: Path, own_state: Path) -> None:
    process, entry = start(tmp_path)
    assert entry.name == "replica 0"
    assert entry.owner == identify(os.getpid())
    assert entry.run_dir == str(tmp_path)
    assert not entry.orphan
    assert name_orphans(print) == 0
    assert own_state.stat().st_mode & 0o077 == 0, "nobody else reads it"
    process.stop()
    assert running() == []
    assert list(own_state.iterdir()) == []


def test_a_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = textwrap.dedent(f"""
        import tempfile, time
        from harness.cluster.process.registry import work_folder
        tempfile.tempdir = {str(tmp_path)!r}
        folder = work_folder()
        (folder / "plan.arrow").write_bytes(b"x")
        print(folder, flush=True)
        time.sleep(600)
    """)
    strangers = tmp_path / "harness-of-a-stranger"
    strangers.mkdir()
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        theirs = Path(process.stdout.readline().strip())
        mine = work_folder()
        assert (theirs / "plan.arrow").exists(), "its process lives"
        process.kill()
        process.wait(120)
    more = work_folder()
    assert not theirs.exists()
    assert mine.is_dir() and more.is_dir() and mine != more
    assert strangers.is_dir(), "not one of ours"


def test_stop_ends_the_whole_group_and_its_owner_sees_it(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    process, entry = start(tmp_path, code)
    wait_for(lambda: len(psutil.Process(entry.guard.pid).children(recursive=True)) == 2, 120, "the grandchild")
    family = psutil.Process(entry.guard.pid).children(recursive=True)
    assert end(entry)
    assert all(gone(p.pid) for p in family)
    assert process.wait(120) == -signal.SIGTERM


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    process, entry = start(tmp_path, code)
    wait_for(lambda: "x" in (tmp_path / "log").read_text(), 120, "the handler")
    os.kill(entry.guard.pid, signal.SIGSTOP)  # even when its guard hangs
    begin = time.monotonic()
    assert end(entry, grace_s=0.5)
    assert time.monotonic() - begin < 120, "it would sleep on"
    assert gone(entry.command.pid)
    process.wait(120)


def test_orphans_of_a_killed_owner_and_a_killed_guard_are_named_and_ended_when_asked_for(tmp_path: Path) -> None:
    owner = textwrap.dedent("""
        import sys, time
        from harness.cluster.process.process import Process
        code = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
        p = Process.start([sys.executable, "-c", code], name="replica 7")
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], cwd=ROOT, env=os.environ)
    wait_for(lambda: any(e.name == "replica 7" and sleeps(e) for e in running()), 120, "the group")
    (entry,) = running()
    members = entry.members()
    (grandchild,) = sleeps(entry)
    assert not entry.orphan
    # The guard first, so that nobody is left to end the group; the kernel ends the command alone.
    os.kill(process.pid, signal.SIGSTOP)
    os.kill(entry.guard.pid, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(120)
    wait_for(lambda: gone(entry.command.pid), 120, "the command, killed by the kernel")
    assert not gone(grandchild.pid)
    (left,) = running()
    assert left.orphan
    said: list[str] = []
    assert name_orphans(said.append) == 1
    assert f"harness stop {left.id}" in said[0] and "replica 7" in said[0]
    assert not gone(grandchild.pid), "a run ends nothing that it did not start"
    assert end(left)
    assert all(gone(p.pid) for p in members)
    assert running() == []


def test_a_pid_used_again_is_never_hit(tmp_path: Path, own_state: Path) -> None:
    """An old entry whose pids now belong to strangers: nothing is signalled, the entry is taken away."""
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    process, entry = start(tmp_path)
    now = identify(stranger.pid)
    boot, _, ticks = now.began.rpartition(":")
    earlier = Identity(stranger.pid, f"{boot}:{int(ticks) - 1}")
    old = replace(entry, id="0123abcd", owner=earlier, guard=earlier, command=earlier, mark="of another time")
    (own_state / "0123abcd.json").write_bytes(msgspec.json.encode(old))
    assert old.orphan
    assert old.members() == []
    assert end(old)
    assert name_orphans(print) == 0
    assert [e.id for e in running()] == [entry.id]
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait(120)
    process.stop()


@pytest.mark.parametrize("boot", ["an earlier boot", "this boot"])
def test_a_session_number_used_again_by_a_shell_that_has_ended_is_never_hit(tmp_path: Path, boot: str) -> None:
    """A stranger's jobs outlive the shell that led their session; the shell's pid is the one in an old entry."""
    process, entry = start(tmp_path)
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!"], start_new_session=True, stdout=subprocess.PIPE)
    assert shell.stdout is not None
    job = psutil.Process(int(shell.stdout.readline()))
    shell.wait(120)
    assert os.getsid(job.pid) == shell.pid
    now = entry.command.began.partition(":")[0]
    was = Identity(shell.pid, f"{now if boot == 'this boot' else boot}:1")
    old = replace(entry, id="0123abcd", owner=was, guard=was, command=was, mark="of another time")
    assert old.members() == []
    assert end(old)
    assert job.is_running()
    job.kill()
    process.stop()


def test_the_grace_that_was_asked_for_is_given_whatever_the_guard_was_started_with(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import pathlib, signal, sys, time
        def tidy(*_):
            time.sleep(1.5)
            pathlib.Path({str(tmp_path / "tidied")!r}).touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, tidy)
        print("x", flush=True)
        time.sleep(600)
    """)
    process = Process.start([sys.executable, "-c", code], name="slow to end", log=tmp_path / "log", grace_s=0.2)
    wait_for(lambda: "x" in (tmp_path / "log").read_text() and bool(running()), 120, "the handler")
    (entry,) = running()
    assert end(entry, grace_s=15)
    assert (tmp_path / "tidied").exists()
    assert process.wait(120) == 0


def test_entries_of_other_hosts_and_broken_ones(tmp_path: Path, own_state: Path) -> None:
    process, entry = start(tmp_path)
    elsewhere = replace(entry, id="eeee0000", place="another host")
    (own_state / "eeee0000.json").write_bytes(msgspec.json.encode(elsewhere))
    (own_state / "broken.json").write_bytes(b'{"id": "x"')
    assert [e.id for e in running()] == [entry.id]
    assert (own_state / "eeee0000.json").exists(), "another host's business"
    assert not (own_state / "broken.json").exists()
    process.stop()


def test_a_state_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    process = Process.start(["true"], name="p")
    assert process.wait(120) == 0
    assert running() == []


def test_entries_hold_no_environment(tmp_path: Path, own_state: Path) -> None:
    process = Process.start(["sleep", "600"], name="p", env={"VLLM_API_KEY": "top-secret"})
    wait_for(lambda: len(running()) == 1, 120, "the entry")
    assert all("top-secret" not in file.read_text() for file in own_state.iterdir())
    process.stop()


# --- ps and stop ------------------------------------------------------------------------------------------------------


def test_ps_and_stop(tmp_path: Path) -> None:
    one, entry = start(tmp_path, name="replica 0")
    two, other = start(tmp_path, name="load worker 0")
    runner = CliRunner()
    listed = runner.invoke(verbs.ps, ["--format", "json"], standalone_mode=False)
    rows = {row["id"]: row for row in json.loads(listed.stdout)["processes"]}
    assert rows[entry.id]["name"] == "replica 0"
    assert rows[entry.id]["orphan"] is False
    table = runner.invoke(verbs.ps, [], standalone_mode=False).stdout
    assert entry.id in table
    assert "load worker 0" in table

    unknown = runner.invoke(verbs.stop, ["zzz"], standalone_mode=False)
    assert "unknown process 'zzz'" in str(unknown.exception)
    for arguments in ([], [entry.id, "--all"]):
        assert "say which" in str(runner.invoke(verbs.stop, arguments, standalone_mode=False).exception)
    assert runner.invoke(verbs.stop, [entry.id], standalone_mode=False).return_value == 0
    assert one.wait(120) == -signal.SIGTERM
    assert two.poll() is None
    assert runner.invoke(verbs.stop, ["--all"], standalone_mode=False).return_value == 0
    assert two.wait(120) is not None
    assert gone(other.command.pid)
    assert registry.running() == []
