"""What a killed worker, a full disk or a deleted folder cost: the rows of the last second at most, and it is said."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from conftest import StartServer, harness, start_harness, wait_for
from run_files import good

from harness.cluster.process import registry
from harness.record.results import FLUSH_S, ResultWriter, read_results
from harness.scenarios.client import client


def test_a_full_disk_leaves_the_file_whole_and_loses_nothing_when_there_is_room_again(
    tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "results-0.arrows"
    writer = ResultWriter(file, 0)
    writer.append(good(0))
    writer.flush()
    room = [100]
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: room[0]]
        room[0] -= len(part)
        return real(fd, part, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    writer.append(good(1))
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            writer.flush()
        assert read_results(file)["request_id"].to_pylist() == [0]
        assert writer.rows == 1
    room[0] = 10**6
    writer.append(good(2))
    writer.close()
    assert read_results(file)["request_id"].to_pylist() == [0, 1, 2]
    assert writer.rows == 3


def test_rows_wait_less_than_a_second() -> None:
    """Until they are parsed (a part of a sweep) and then for the next flush."""
    assert FLUSH_S + client._SWEEP_S / client._SLICES < 0.8


def trace_of(path: Path, n: int, every_s: float) -> Path:
    lines = [{"arrival_s": k * every_s, "input_tokens": 4, "output_tokens": 4} for k in range(n)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_of(runs: Path) -> Path:
    (run,) = runs.iterdir()
    return run


def test_a_killed_worker_costs_a_second_of_rows_and_the_manifest_says_lost(fake_server: StartServer, tmp_path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = trace_of(tmp_path / "t.jsonl", 400, 0.02)
    args = ("--base-url", server.url, "--workers", "1", "--out", tmp_path / "runs", "--format", "json")
    process = start_harness("replay", trace, *args)
    wait_for(lambda: len(server.truth()) > 150, 60, "150 answers")
    before, at = len(server.truth()), time.monotonic()
    (load,) = [p for p in psutil.Process(process.pid).children(recursive=True)
               if "harness.scenarios.worker" in p.cmdline() and "guard.py" not in " ".join(p.cmdline())]  # fmt: skip
    load.kill()
    said, words = process.communicate(timeout=120)
    assert process.returncode == 3, words
    run = run_of(tmp_path / "runs")
    manifest = json.loads((run / "run.json").read_bytes())
    assert manifest["status"] == "lost" and "killed by SIGKILL" in manifest["reason"]
    assert manifest["workers"][0]["exit"].startswith("lost: killed by SIGKILL")
    rows = read_results(run / "results-0.arrows").num_rows
    assert rows >= before - 60, f"{rows} rows of {before} answers, 50 a second, {time.monotonic() - at:.1f} s"
    assert "lost" in json.loads(said)["checks"][1]["observed"] or "lost" in said


def test_a_deleted_run_directory_is_noticed_while_the_run_goes_on(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = trace_of(tmp_path / "t.jsonl", 3000, 0.02)
    process = start_harness("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs")
    wait_for(lambda: len(server.truth()) > 10, 60, "10 answers")
    shutil.rmtree(run_of(tmp_path / "runs"))
    _, words = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the run directory is gone" in words and "was deleted or moved" in words
    assert "Traceback" not in words


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's processes and files")
def test_another_users_entries_and_processes_are_never_touched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    import subprocess

    theirs = subprocess.Popen(["sleep", "60"], env={registry.MARK: "x", "PATH": os.environ["PATH"]}, user=65534,
                              start_new_session=True)  # fmt: skip
    try:
        command = registry.identify(theirs.pid)
        gone = registry.Identity(2**22 - 1, "never")
        entry = registry.RunningGroup(
            id="00c0ffee", name="replica 0", place=registry.place(), host="h", started=0.0, owner=gone, guard=gone,
            command=command, mark="x", argv=["sleep"], run_dir=None,
        )  # fmt: skip
        assert entry.orphan and entry.members() == []
        registry.folder().mkdir(parents=True)
        file = registry.folder() / "00c0ffee.json"
        file.write_bytes(msgspec.json.encode(entry))
        os.chown(file, 65534, 65534)
        assert registry.running() == []
        assert registry.name_orphans(print) == 0
        assert file.exists(), "nor is it taken away"
        assert harness("stop", "--all").returncode == 0
        assert theirs.poll() is None
    finally:
        theirs.send_signal(signal.SIGKILL)
        theirs.wait(120)
