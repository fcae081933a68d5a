"""On a real vLLM server: its prefix cache finds what the trace says there is to be found.

The ideal is an unlimited cache that meets one request after the other, so the server is asked for just that: one
request in flight at a time, and no more different tokens than its cache keeps (46,592 of this model in 1 GiB, as its
``vllm:cache_config_info`` says). Then not one hit is left to chance.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import harness

from analysis.fidelity.questions import fidelity, fidelity_text
from analysis.rows.read import read_run
from harness.records import open_trace
from harness.traces.shape import measure

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "mooncake-conversation.jsonl"
SMALLER = 4
"""Blocks of 512 tokens become blocks of 128, vLLM's own on a CPU."""
CACHE_TOKENS = 46_592

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs a vLLM engine: pip install -e '.[cpu]'"),
]


def smaller(path: Path, rows: int = 60, longest: int = 4096) -> Path:
    """The shorter requests of a real Mooncake trace at a quarter of their length, block for block."""
    kept = [row for row in map(json.loads, TRACE.read_text().splitlines()) if row["input_length"] <= longest][:rows]
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


def test_the_servers_prefix_cache_hits_what_the_trace_says(tmp_path: Path) -> None:
    trace = smaller(tmp_path / "trace.jsonl")
    prefix = measure(open_trace(trace)).prefix
    assert prefix is not None
    assert prefix.hit_rate_tokens > 0.1, "a trace without reuse proves nothing"
    assert prefix.tokens - prefix.hit_tokens + prefix.rows * (128 + 4) < CACHE_TOKENS
    done = harness("replay", trace, "--out", tmp_path / "runs", "--concurrency", "1", "--workers", "1", timeout=800)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "runs").iterdir()
    run = read_run(path)
    answers = {answer.name: answer for answer in fidelity(run)}
    print(fidelity_text(list(answers.values())))
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
