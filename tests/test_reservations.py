"""Two runs on one host: the second goes elsewhere or says who is in its way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, harness

from harness.cluster.deploy.servers import Failed, Reserved, ServersActor
from harness.cluster.engines.protocol import CommandEngine
from harness.cluster.process import registry
from harness.errors import ServerError

ENGINE = CommandEngine(name="fake", served_model="fake", argv=("sleep", "600"))
CPUS = {2, 3, 4, 5}


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that claims what it is told on stdin: {"cpus": [...], "gpus": [...]}."""
    code = """
import json, sys
from pathlib import Path
from harness.cluster.process import registry
for line in sys.stdin:
    with registry.exclusively():
        print(registry.reserve("replica 0", Path("/runs/first"), **json.loads(line)), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait(120)


def hold(process: subprocess.Popen[str], **what: list[int] | list[str]) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()
    assert len(process.stdout.readline().strip()) == 8


def servers(tmp_path: Path, count: int = 1) -> ServersActor:
    names = [(f"replica {i}", str(tmp_path / f"server-{i}.log")) for i in range(count)]
    return ServersActor(ENGINE, names, "key", "127.0.0.1")


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: CPUS)


def test_a_second_run_takes_the_processors_that_are_left(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    hold(other_run, cpus=[2, 3])
    actor = servers(tmp_path)
    assert actor.reserve(2, gpus=False) == Reserved([[4, 5]], None)
    assert actor.look([0])[0].messages == [], "it has all it wants"
    mine = [one for one in registry.reservations() if one.owner.pid == os.getpid()]
    assert [(one.name, one.cpus, one.words) for one in mine] == [("replica 0", [4, 5], "cpus 4-5")]
    actor.stop()
    assert [one.name for one in registry.reservations()] == ["replica 0"]
    assert registry.reservations()[0].owner.pid == other_run.pid


def test_a_run_that_finds_too_little_says_who_has_the_rest(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    hold(other_run, cpus=[2, 3, 4])
    actor = servers(tmp_path)
    assert actor.reserve(2, gpus=False) == Reserved([[5]], None)
    (said,) = actor.look([0])[0].messages
    assert said == (
        f"has 1 processors to itself of this host's 4: cpus 2-4 by replica 0 of /runs/first (pid {other_run.pid})"
    )


def test_a_run_that_finds_nothing_free_shares_and_is_marked(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    hold(other_run, cpus=[2, 3, 4, 5])
    found = servers(tmp_path, 2).reserve(2, gpus=False)
    assert isinstance(found, Reserved)
    assert found.cpus == [[2, 3], [4, 5]]
    assert found.shared_with == f"cpus 2-5 by replica 0 of /runs/first (pid {other_run.pid})"


def test_accelerators_of_a_ray_of_our_own_are_not_given_twice(
    tmp_path: Path, other_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(other_run, gpus=["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    failed = servers(tmp_path).reserve(None, gpus=True)
    assert isinstance(failed, Failed)
    assert f"its GPUs are held: GPUs 0,1 by replica 0 of /runs/first (pid {other_run.pid})" in failed.message
    assert servers(tmp_path).reserve(None, gpus=False) == Reserved([None], None), "a cluster's Ray has seen to it"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert servers(tmp_path).reserve(None, gpus=True) == Reserved([None], None)


def test_a_ray_of_our_own_does_not_see_accelerators_that_are_held(
    tmp_path: Path, other_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    from harness.cluster.deploy.ray_session import free_gpus

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "gpus").mkdir()
    for name in "abc":
        (tmp_path / "gpus" / name).mkdir()
    monkeypatch.setattr(registry, "NVIDIA", tmp_path / "gpus")
    said: list[str] = []
    assert free_gpus(said.append) == {}
    hold(other_run, gpus=["1"])
    assert free_gpus(said.append) == {"CUDA_VISIBLE_DEVICES": "0,2"}
    assert said == [f"GPUs 1 by replica 0 of /runs/first (pid {other_run.pid}); this run has GPUs 0,2"]


def test_a_dead_run_holds_nothing(tmp_path: Path, other_run: subprocess.Popen[str]) -> None:
    hold(other_run, cpus=[2, 3, 4, 5])
    assert len(registry.reservations()) == 1
    other_run.kill()
    other_run.wait(120)
    assert registry.reservations() == []
    assert not list(registry.folder("claims").glob("*.json")), "it is taken away"
    assert servers(tmp_path).reserve(2, gpus=False) == Reserved([[2, 3]], None)


def test_two_runs_that_begin_together_do_not_take_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []

    def run(name: str) -> None:
        with registry.exclusively():
            free = CPUS - {cpu for one in registry.reservations() for cpu in one.cpus}
            mine = sorted(free)[:1]
            registry.reserve(name, tmp_path, cpus=mine)
            taken.append(mine)

    threads = [threading.Thread(target=run, args=(f"replica {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(taken) == [[2], [3], [4], [5]]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"id": 1}', b"\xff\xfe"])
def test_a_damaged_claim_is_none(damage: bytes) -> None:
    registry.folder("claims").mkdir(parents=True)
    (registry.folder("claims") / "deadbeef.json").write_bytes(damage)
    assert registry.reservations() == []


def test_a_state_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    actor = servers(tmp_path)
    assert actor.reserve(2, gpus=False) == Reserved([[2, 3]], None)
    actor.stop()


def test_ps_shows_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.cluster.process.process import Process

    with Process.start(["sleep", "60"], name="replica 0", log=tmp_path / "server-0.log") as process:
        with registry.exclusively():
            registry.reserve("replica 0", tmp_path, cpus=[0, 1])
        while process.pid is None:
            process.wait(0.05)
        process.wait(0.3)
        (one,) = json.loads(harness("ps", "--format", "json").stdout)["processes"]
        assert (one["name"], one["holds"]) == ("replica 0", "cpus 0-1")
        assert "cpus 0-1" in harness("ps", COLUMNS="200").stdout


def test_ranges() -> None:
    assert registry.ranges([7, 0, 1, 2, 5]) == "0-2,5,7"


def test_a_lock_that_is_kept_is_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(registry, "LOCK_S", 0.1)
    with registry.exclusively(), pytest.raises(ServerError, match="keeps this lock"), registry.exclusively():
        pass
    with registry.exclusively():
        pass
