"""A server dies in mid-run, through the whole command line: the run stops now, or is restarted and marked."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, descendants, wait_for

from harness.record.manifest import read_manifest
from harness.record.results import read_results

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install -e '.[cluster]'"),
]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Any]:
    """Starts a replay of 200 requests on two fake replicas and kills one of them after its first rows."""
    started: list[subprocess.Popen[bytes]] = []

    def drive(rate: int, *options: str) -> tuple[int, float, str]:
        trace = tmp_path / "trace.jsonl"
        lines = [{"arrival_s": i / rate, "input_tokens": 20, "output_tokens": 20} for i in range(200)]
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": f"{ROOT}/tests:{ROOT}", "HARNESS_CACHE": str(tmp_path / "cache")}
        argv = [
            sys.executable, "-m", "hosts.driver", "replay", str(trace), "--out", str(tmp_path / "runs"),
            "--replicas", "2", "--workers", "1", *options,
        ]  # fmt: skip
        with (tmp_path / "said").open("wb") as out:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=out)
        started.append(process)

        def rows() -> bool:
            assert process.poll() is None, (tmp_path / "said").read_text()
            return any(read_results(f).num_rows for f in tmp_path.glob("runs/*/results-0.arrows") if f.stat().st_size)

        wait_for(rows, 200, "rows")
        servers = [
            p for p in descendants(process.pid) if p.cmdline()[1:3] == ["-m", "harness.cluster.engines.fake.server"]
        ]
        assert len(servers) == 2
        servers[0].kill()
        killed = time.monotonic()
        code = process.wait(250)
        return code, time.monotonic() - killed, (tmp_path / "said").read_text()

    yield drive
    for process in started:
        for left in [*descendants(process.pid), *([psutil.Process(process.pid)] if process.poll() is None else [])]:
            left.kill()


def test_a_dead_replica_stops_the_run_now(driver: Any, tmp_path: Path) -> None:
    code, took_s, said = driver(1)
    assert code == 3, said
    assert took_s < 100, "not at the end of the plan"
    assert "INVALID" in said
    (run,) = (tmp_path / "runs").iterdir()
    manifest = read_manifest(run)
    assert manifest.status == "stopped"
    assert "is gone: killed by SIGKILL" in (manifest.reason or "")
    assert sum(r.exit is not None for r in manifest.replicas) == 1
    assert read_results(run / "results-0.arrows").num_rows == 200, "a row for every request, sent or not"


def test_a_restarted_replica_marks_the_run(driver: Any, tmp_path: Path) -> None:
    code, _, said = driver(25, "--on-replica-death", "restart")
    assert code == 3, said
    (run,) = (tmp_path / "runs").iterdir()
    manifest = read_manifest(run)
    (restart,) = manifest.restarts
    assert restart.ready is not None
    assert "killed by SIGKILL" in restart.how
    assert [r.exit for r in manifest.replicas] == [None, None]
    assert manifest.status == "complete"
    assert "server_restarts" in said
