"""The main job on the real thing: Ray, a real vLLM server with real weights, a real production trace."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.compute as pc
import pytest
from conftest import descendants, gone, harness, start_harness, wait_for

from harness.analysis.fidelity.questions import fidelity
from harness.analysis.rows.read import read_run
from harness.plan.file import read_plan_columns
from harness.record.manifest import read_manifest
from harness.record.results import read_results
from harness.trace.io import open_trace
from harness.trace.shape import measure

TRACES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
TRACE = TRACES / "azure-conv-2023.csv"
SMALLER = 4
"""Blocks of 512 tokens become blocks of 128, vLLM's own on a CPU."""
CACHE_TOKENS = 46_592
"""Of this model in 1 GiB, as the server's ``vllm:cache_config_info`` says."""
KEY = "of-the-server-that-tests-share"

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


def smaller(path: Path, rows: int = 60, longest: int = 4096) -> Path:
    """The shorter requests of a real Mooncake trace at a quarter of their length, block for block."""
    kept = [
        row
        for row in map(json.loads, (TRACES / "mooncake-conversation.jsonl").read_text().splitlines())
        if row["input_length"] <= longest
    ][:rows]
    lines = [
        {
            "arrival_s": row["timestamp"] / 1000,
            "input_tokens": -(-row["input_length"] // SMALLER),
            "output_tokens": 4,
            "prefix_ids": row["hash_ids"],
            "block_tokens": 512 // SMALLER,
        }
        for row in kept
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


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
    for name in ("vllm", "harness.scenarios.worker", "guard.py", "raylet"):
        assert any(name in command for command in commands), f"{name} was never seen"
    wait_for(lambda: not alive(list(seen.values())), 120, f"ended: {alive(list(seen.values()))}")
    key = [
        line for line in (run / "server-0.log").read_text(errors="replace").splitlines() if "api_key=" in line.lower()
    ]
    assert not any("api_key=['" in line or 'api_key="' in line for line in key)


@dataclass(frozen=True)
class Served:
    """A ``harness serve`` that is up."""

    url: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One real server for all tests that only need one; the last of them ends it."""
    folder = tmp_path_factory.mktemp("serve")
    process = start_harness(
        "serve", "--out", folder, HARNESS_API_KEY=KEY,
        XDG_STATE_HOME=str(folder / "state"), XDG_CONFIG_HOME=str(folder / "config"),
    )  # fmt: skip
    assert process.stdout is not None
    url = process.stdout.readline().strip()  # the harness itself has a deadline for a server to be up
    yield Served(url, process)
    process.kill()
    process.communicate()


def test_the_servers_prefix_cache_hits_what_the_trace_says(served: Served, tmp_path: Path) -> None:
    """The ideal is an unlimited cache that meets one request after the other, so the server is asked for just that: one
    request in flight at a time, and no more different tokens than its cache keeps. Then not one hit is left to chance.
    """
    trace = smaller(tmp_path / "trace.jsonl")
    prefix = measure(open_trace(trace)).prefix
    assert prefix is not None
    assert prefix.hit_rate_tokens > 0.1, "a trace without reuse proves nothing"
    assert prefix.tokens - prefix.hit_tokens + prefix.rows * (128 + 4) < CACHE_TOKENS
    assert served.process.poll() is None, served.process.communicate()[1]
    done = harness(
        "replay", trace, "--base-url", served.url, "--out", tmp_path / "runs", "--concurrency", "1", "--workers", "1",
        timeout=800, HARNESS_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    run = read_run(path)
    answers = {answer.name: answer for answer in fidelity(run)}
    print(*answers.values(), sep="\n")
    assert not [answer for answer in answers.values() if answer.ok is False], answers
    assert answers["planned: prefix reuse"].ok
    assert answers["sent: prefix reuse"].ok, answers["sent: prefix reuse"].said

    # And without a word of ours: the server's own counters against the trace's own ideal.
    (replica,) = run.manifest.replicas
    assert replica.counters_before is not None
    assert replica.counters_after is not None
    queries, hits = (
        replica.counters_after[name] - replica.counters_before.get(name, 0.0)
        for name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    )
    assert queries == pytest.approx(sum(run.rows.input_tokens))
    assert hits / queries == pytest.approx(prefix.hit_rate_tokens, abs=0.02)


def test_sigkill_of_the_harness_ends_the_real_server(served: Served) -> None:
    """Load workers under SIGKILL: `test_known_truth.py`."""
    assert served.process.poll() is None, "ended before it could be killed"
    tree = descendants(served.process.pid)
    assert any("vllm" in command_line(p) for p in tree)
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.communicate()
    wait_for(lambda: not alive(tree), 120, "all servers and Ray processes ended")
