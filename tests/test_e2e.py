"""The main job on the real thing: Ray, a real vLLM server with real weights, a real production trace."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pytest
from conftest import descendants, gone, start_harness, wait_for

from harness.plan import read_plan_columns
from harness.results import read_results
from harness.run import read_manifest

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs a vLLM engine: pip install -e '.[cpu]'"),
]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if not gone(process)]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def start(out: Path, *args: str) -> subprocess.Popen[str]:
    return start_harness("replay", TRACE, "--out", out, "--format", "json", *args)


def test_a_real_trace_on_a_real_server_gives_a_price(tmp_path: Path) -> None:
    process = start(tmp_path, "--limit", "24", "--concurrency", "8", "--slo", "ttft=60s,tpot=5s")
    seen: dict[int, psutil.Process] = {}
    commands: set[str] = set()
    try:
        while process.poll() is None:
            seen.update({p.pid: p for p in descendants(process.pid)})
            commands |= {command_line(p) for p in seen.values()}
            try:
                process.wait(1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, stderr
    report = json.loads(stdout)
    assert report["verdict"] == "VALID", report["reasons"]
    assert report["requests"]["planned"] == report["requests"]["succeeded"] == 24

    # The rows, the plan and the server's own books agree to the token.
    (run,) = tmp_path.iterdir()
    manifest = read_manifest(run)
    plan = read_plan_columns(run / "plan.arrow", ["input_tokens", "output_tokens"])
    planned_in, planned_out = (pc.sum(plan.column(c)).as_py() for c in ("input_tokens", "output_tokens"))
    tables = [read_results(file) for file in run.glob("results-*.arrows")]
    assert sum(pc.sum(t.column("input_tokens")).as_py() for t in tables) == planned_in
    assert sum(pc.sum(t.column("output_tokens")).as_py() for t in tables) == planned_out
    (replica,) = manifest.replicas
    assert replica.counters_before is not None
    assert replica.counters_after is not None
    (starved,) = (c for c in report["checks"] if c["name"] == "starved")
    assert starved["ok"] is True and starved["gate"], starved
    assert replica.nice == os.getpriority(os.PRIO_PROCESS, 0)
    before, after = replica.counters_before, replica.counters_after
    assert after["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"] == planned_in
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == planned_out

    cost = report["cost"]["usd_per_1m_total"]
    hours = report["window"]["duration_s"] / 3600
    assert cost["value"] == pytest.approx(
        manifest.tier.usd_per_hour * hours / (planned_in + planned_out) * 1e6, rel=1e-6
    )
    assert cost["low"] <= cost["value"] <= cost["high"]
    assert report["metrics"]["service_ttft"]["p50"]["value"] > 0
    assert report["evidence"] == "measured"
    assert manifest.engine_version
    assert manifest.versions["ray"]

    # Nothing is left: not the server, not its helpers, not the workers, not Ray.
    for name in ("vllm", "scenarios.worker", "guard.py", "raylet"):
        assert any(name in command for command in commands), f"{name} was never seen"
    wait_for(lambda: not alive(list(seen.values())), 120, f"ended: {alive(list(seen.values()))}")
    key = [
        line for line in (run / "server-0.log").read_text(errors="replace").splitlines() if "api_key=" in line.lower()
    ]
    assert not any("api_key=['" in line or 'api_key="' in line for line in key)


def test_sigkill_of_the_harness_ends_the_real_server(tmp_path: Path) -> None:
    process = start(tmp_path, "--limit", "24", "--concurrency", "8")

    def running() -> bool:
        assert process.poll() is None, "ended before it could be killed"
        return any(read_results(f).num_rows for f in tmp_path.glob("*/results-*.arrows"))

    try:
        wait_for(running, 400, "the first rows")
        tree = descendants(process.pid)
        assert any("vllm" in " ".join(p.cmdline()) for p in tree)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    wait_for(lambda: not alive(tree), 120, "all servers, workers and Ray processes ended")
