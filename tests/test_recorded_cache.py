"""What production's prompt cache found, as the trace records it, beside what the replay's found."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console
from run_files import good, write_run

from harness.analysis.report.page import render_page
from harness.analysis.report.run import render_json, render_markdown, render_text
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.cli.trace import trace as verbs
from harness.record.manifest import Replica
from harness.trace.io import open_trace
from harness.trace.stats import RecordedCache, TraceStats
from harness.trace.survey import survey

ROWS = [(1000, 600), (20, None), (500, 0), (300, 300), (None, 64)]
"""Input and cached tokens: 900 of 1,800 on the three rows that say both."""


def trace_of(tmp_path: Path, carrier: str) -> Path:
    rows = [
        {"arrival_s": k * 0.5, "input_tokens": 7 if into is None else into, "output_tokens": 5, "cached_tokens": cached}
        for k, (into, cached) in enumerate(ROWS[:4])
    ]
    path = tmp_path / "trace"
    if carrier == "jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    elif carrier == "csv":
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        path.write_text("\ufeff" + ",".join(rows[0]) + "\n" + "\n".join(lines) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("carrier", ["jsonl", "csv", "parquet"])
def test_inspect_shows_the_recorded_share(tmp_path: Path, carrier: str) -> None:
    path = trace_of(tmp_path, carrier)
    said = CliRunner().invoke(verbs, ["inspect", str(path)]).output
    assert "cached    50.0% of input: 900 of 1,800 tokens on the 3 of 4 rows that say it" in said
    found = json.loads(CliRunner().invoke(verbs, ["inspect", str(path), "--format", "json"]).output)
    assert found["recorded_cache"] == {"rows": 3, "input_tokens": 1800, "cached_tokens": 900}


def test_a_trace_that_says_nothing_of_a_cache_shows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"input_tokens": 5, "output_tokens": 5}\n{"prompt": "x", "cached_tokens": 3}\n')
    said = CliRunner().invoke(verbs, ["inspect", str(path)]).output
    assert "cached " not in said
    found = json.loads(CliRunner().invoke(verbs, ["inspect", str(path), "--format", "json"]).output)
    assert found["recorded_cache"] is None


def test_a_plan_keeps_the_recorded_share(tmp_path: Path) -> None:
    found = survey(open_trace(trace_of(tmp_path, "jsonl")), made_up=True)
    assert found.stats.recorded_cache == RecordedCache(rows=3, input_tokens=1800, cached_tokens=900)
    assert found.stats.recorded_cache.share == 0.5


# --- beside the replay ---------------------------------------------------------------------------------------------


def source(recorded: RecordedCache | None) -> TraceStats:
    return TraceStats(
        requests=4, arrivals=None, input_tokens=None, output_tokens=None, sessions=0, session_rows=0, most_turns=0,
        unit_rows=1.0, prefix=None, grid_s=None, recorded_cache=recorded,
    )  # fmt: skip


RECORDED = RecordedCache(rows=3, input_tokens=1800, cached_tokens=900)
QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"


def run_of(tmp_path: Path, recorded: RecordedCache | None, cached: int | None, **facts: object) -> Path:
    rows = [replace(good(k), cached_tokens=cached) for k in range(20)]
    return write_run(tmp_path / "run", rows, source=source(recorded), **facts)


def shown(path: Path) -> tuple[Summary, dict[str, str]]:
    run = read_run(path)
    s = summarise(run)
    out = io.StringIO()
    render_text(s, Console(file=out, width=300, highlight=False))
    page = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", render_page([view_run(run, s, "x")]), flags=re.DOTALL)
    return s, {"text": out.getvalue(), "md": render_markdown(s), "html": page}


@pytest.mark.parametrize(
    ("cached", "counters", "replay", "words"),
    [
        (2, None, 0.25, "replay 25.0% (usage of each request)"),
        (0, None, 0.0, "replay 0% (usage of each request)"),
        (None, None, None, "replay not measured"),
        (None, (160.0, 40.0), 0.25, "replay 25.0% (the servers' counters)"),
        (None, (160.0, None), None, "replay not measured"),
    ],
)
def test_the_report_shows_both_shares(tmp_path: Path, cached, counters, replay, words) -> None:
    replicas = [Replica(index=0, base_url="http://127.0.0.1:1/v1")]
    if counters is not None:
        replicas = [replace(replicas[0], counters_before={QUERIES: 0.0, HITS: 0.0},
                            counters_after=dict(zip((QUERIES, HITS), counters, strict=True)))]  # fmt: skip
    s, written = shown(run_of(tmp_path, RECORDED, cached, replicas=replicas))
    tree = json.loads(render_json(s))["cache"]
    assert (tree["recorded_share"], tree["recorded_rows"], tree["replay_share"]) == (0.5, 3, replay)
    said = f"prompt cache: recorded 50.0% of input cached (3 of 4 rows say it), {words}"
    for name, text in written.items():
        plain = " ".join(re.sub(r"<[^>]+>", " ", text).replace("&#39;", "'").replace("\\", "").split())
        assert said in plain, name


def test_a_trace_without_it_is_null_and_not_said(tmp_path: Path) -> None:
    s, written = shown(run_of(tmp_path, None, 2))
    tree = json.loads(render_json(s))["cache"]
    assert tree == {"recorded_share": None, "recorded_rows": None, "replay_share": 0.25, "replay_source": "usage"}
    assert "prompt cache: recorded" not in written["text"]
