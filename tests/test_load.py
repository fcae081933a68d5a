"""Load workers start together, are followed to their end, and never hang the run, whatever they do."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import gone
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.deploy.load_workers import LoadWorkers, share, worker_spec
from harness.errors import UsageError, WorkerError
from harness.record.manifest import RunDir, create_run_dir
from harness.record.run_spec import RunSpec, WorkerSpec

EARLIER: set[psutil.Process] = set()


@pytest.fixture(autouse=True)
def earlier() -> None:
    """Processes that tests of other files left to this one, like the resource tracker of multiprocessing."""
    EARLIER.clear()
    EARLIER.update(psutil.Process().children(recursive=True))


def started() -> list[psutil.Process]:
    """What the test has started and is still there."""
    return [one for one in psutil.Process().children(recursive=True) if one not in EARLIER]


# Speaks the worker protocol; extra_body says how worker 0 misbehaves.
WORKER = """
import json, os, sys, time
spec = json.load(open(sys.argv[1]))
act = spec["extra_body"].get("act", "") if spec["worker"] == 0 else ""
def say(**event): print(json.dumps(event), flush=True)
if act == "no start": sys.exit("cannot read the plan")
if act == "never ready": time.sleep(600)
print("a stray line, then half a JSON: {", flush=True)
say(event="ready", requests=10, unknown_field=1)
word, start_ns = sys.stdin.readline().split()
assert word == "start"
time.sleep(max(0, int(start_ns) / 1e9 - time.time()))
late_s = time.time() - int(start_ns) / 1e9
say(event="progress", t_s=0.1, sent=4, done=2, failed=1, in_flight=2, ttft_s=[0.1, 0.2], output_tokens=20)
if act == "crash": sys.exit("worker blew up")
if act == "kill": os.kill(os.getpid(), 9)
if act == "hang": time.sleep(600)
if act == "wait for stop": assert sys.stdin.readline().strip() in ("stop", "")
if act == "deaf":
    while True:
        say(event="progress", sent=4); time.sleep(0.1)
say(event="progress", t_s=0.2, sent=10, done=9, failed=1, in_flight=0, ttft_s=[0.3], output_tokens=90)
key = os.environ.get("HARNESS_API_KEY")
print("key" if key else "no key", file=sys.stderr)
said = "lost a connection pool" if act == "says so" else None
say(event="end", rows=10, cpu_share=0.25, loop_lag_p99_s=max(0.0, late_s), unstamped_share=0.125, exit=said,
    end_ns=1000 + spec["worker"])
if act == "lingers": time.sleep(600)
if act == "fails late": sys.exit(5)
"""


def make(tmp_path: Path, act: str = "", workers: int = 2, **options: Any) -> LoadWorkers:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    spec_options: dict[str, Any] = {"mode": "open", **options.pop("spec", {})}
    spec = RunSpec(
        model="m", base_urls=["http://127.0.0.1:9/v1"], workers=workers, extra_body={"act": act}, **spec_options
    )
    return LoadWorkers(
        spec, create_run_dir(tmp_path / "runs", "t"), api_key=options.pop("api_key", "secret"),
        worker=(sys.executable, str(script)), **options,
    )  # fmt: skip


def follow(load: LoadWorkers, deadline_s: float = 30) -> dict[str, Any]:
    """Poll to the end; the last counts, with every TTFT sample."""
    samples: list[float] = []
    end = time.monotonic() + deadline_s
    while True:
        counts: dict[str, Any] = load.poll(0.5)
        samples += counts["ttft_s"]
        if load.done:
            return {**counts, "ttft_s": samples}
        assert time.monotonic() < end, "the load never ended"


def exits(load: LoadWorkers) -> list[str | None]:
    return [worker.exit for worker in load.workers]


def test_all_is_well(tmp_path: Path) -> None:
    with make(tmp_path) as load:
        before = time.time_ns()
        start_ns = load.start()
        assert 0 < start_ns - before < 3e9
        counts = follow(load)
    assert {k: counts[k] for k in ("sent", "done", "failed", "in_flight", "output_tokens")} == {
        "sent": 20, "done": 18, "failed": 2, "in_flight": 0, "output_tokens": 180,
    }  # fmt: skip
    assert sorted(counts["ttft_s"]) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert load.end_ns == 1001
    for worker in load.workers:
        assert (worker.exit, worker.rows, worker.cpu_share) == (None, 10, 0.25)
        assert worker.host
        assert worker.loop_lag_p99_s is not None
        assert worker.unstamped_share == 0.125


def test_the_api_key_travels_in_the_environment_only(tmp_path: Path) -> None:
    with make(tmp_path, workers=1) as load:
        run = load._run
        assert "secret" not in (run.path / "worker-0.json").read_text()
        arguments = [word for p in started() for word in p.cmdline()]
        assert arguments
        assert not any("secret" in word for word in arguments)
        load.start()
        follow(load)
    assert "key" in run.worker_log(0).read_text().splitlines()


def test_without_a_key_none_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_API_KEY", "of someone else")
    with make(tmp_path, workers=1, api_key=None) as load:
        load.start()
        follow(load)
    assert "no key" in load._run.worker_log(0).read_text()


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("crash", "exit code 1: worker blew up"),
        ("kill", "lost: killed by SIGKILL"),
        ("says so", "lost a connection pool"),
        ("fails late", "exit code 5 after its last row"),
    ],
)
def test_a_lost_worker_is_a_fact_not_a_hang(tmp_path: Path, act: str, expected: str) -> None:
    with make(tmp_path, act) as load:
        load.start()
        counts = follow(load)
    lost, well = load.workers
    assert lost.exit is not None
    assert lost.exit.startswith(expected)
    assert (well.exit, well.rows) == (None, 10)
    assert counts["done"] >= 11, "what it had done still counts"
    if act in ("crash", "kill"):
        assert lost.rows is lost.cpu_share is lost.loop_lag_p99_s is None


def test_a_worker_that_falls_silent_is_ended(tmp_path: Path) -> None:
    with make(tmp_path, "hang", silence_s=1.0) as load:
        load.start()
        members = started()
        follow(load)
    assert exits(load) == ["hung: said nothing for 1 s", None]
    assert len(members) >= 2 and all(gone(p) for p in members), "guards and workers"


def test_a_worker_that_does_not_leave_after_its_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cluster.deploy.load_workers.EXIT_S", 0.5)
    with make(tmp_path, "lingers") as load:
        load.start()
        follow(load)
    assert exits(load) == [None, None], "its rows are complete"


def test_stop_lets_workers_end_themselves(tmp_path: Path) -> None:
    with make(tmp_path, "wait for stop") as load:
        load.start()
        load.poll(1.5)
        assert not load.done
        load.stop()
        follow(load)
    assert exits(load) == [None, None]


def test_stop_at_once_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cluster.deploy.load_workers.AT_ONCE_S", 0.5)
    with make(tmp_path, "deaf") as load:
        load.start()
        load.poll(1.5)
        load.stop()
        load.stop(at_once=True)
        follow(load, 5)
    assert exits(load) == ["did not stop when asked to", None]


def test_a_worker_deaf_to_stop_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cluster.deploy.load_workers.SLACK_S", 0.5)
    with make(tmp_path, "deaf", spec={"drain_s": 0.5}) as load:
        load.start()
        load.poll(1.2)
        load.stop()
        follow(load, 10)
    assert exits(load) == ["did not stop when asked to", None]


def test_a_timed_run_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cluster.deploy.load_workers.SLACK_S", 0.3)
    with make(tmp_path, "deaf", spec={"duration_s": 0.3, "drain_s": 0.2}) as load:
        load.start()
        follow(load, 10)
    assert exits(load) == ["did not end in time", None]


def test_a_worker_that_does_not_start_stops_the_run_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught, make(tmp_path, "no start"):
        pass
    assert "load worker 0 ended before it was ready (exit code 1)" in str(caught.value)
    assert "cannot read the plan" in str(caught.value)
    assert not started()


def test_a_worker_that_is_never_ready_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="was not ready after 1 s"), make(tmp_path, "never ready", ready_s=1.0):
        pass
    assert not started()


def test_leaving_early_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path, "wait for stop") as load:
        load.start()
        raise KeyboardInterrupt
    assert not started()


def test_more_workers_than_requests_in_flight_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 workers cannot share 2"):
        make(tmp_path, workers=3, spec={"mode": "closed", "concurrency": 2})


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_shares_add_up_and_differ_by_one_at_most(concurrency: int, workers: int) -> None:
    shares = [share(concurrency, workers, i) for i in range(workers)]
    assert sum(s or 0 for s in shares) == concurrency
    assert max(s or 0 for s in shares) - min(s or 0 for s in shares) <= 1
    assert share(None, workers, 0) is None


def test_the_spec_file_holds_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = RunSpec(
        mode="closed", concurrency=5, workers=2, model="m", base_urls=["u"],
        duration_s=3.0, timeout_s=9.0, stall_s=8.0, drain_s=7.0,
    )  # fmt: skip
    made = worker_spec(spec, RunDir(Path("runs/x")), 0)
    assert made == WorkerSpec(
        worker=0, workers=2, plan=str(tmp_path / "runs/x/plan.arrow"),
        results=str(tmp_path / "runs/x/results-0.arrows"), observations=str(tmp_path / "runs/x/worker-0.arrows"),
        answers=str(tmp_path / "runs/x/answers-0.jsonl"), mode="closed", concurrency=3, base_urls=["u"], model="m",
        duration_s=3.0, drain_s=7.0, timeout_s=9.0, stall_s=8.0,
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(made), type=WorkerSpec) == made
