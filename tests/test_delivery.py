"""What the transport made of an answer's rhythm is not taken for the engine's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import StartServer, harness
from run_files import MS, SPEC, S, good, watch, write_run

from harness.analysis import metrics
from harness.analysis.capacity.fitted_engine import observe
from harness.analysis.rows.read import read_run
from harness.analysis.rows.run import LoopStalls, WorkerSamples
from harness.analysis.summary import summarise
from harness.record.manifest import Worker

TOKENS = 24


def answer(k, clumps):
    """24 tokens, one each 10 ms from 50 ms on, that arrive in ``clumps``, each with its last token."""
    assert sum(clumps) == TOKENS
    row = good(k, k * 100 * MS, tokens=TOKENS)
    ends = np.cumsum(clumps) - 1
    row.chunk_ns = [row.chunk_ns[ends[np.searchsorted(ends, j)]] for j in range(TOKENS)]
    return row


def summary(tmp_path, rows, **options):
    run = read_run(write_run(tmp_path / "run", rows, seen=watch(rows, **options)))
    return run, summarise(run, slo={"tpot": 0.02})


def check(s, name):
    return next(c for c in s.checks if c.name == name)


@pytest.mark.parametrize(
    ("clumps", "known"),
    [
        ([1] * 24, True),
        ([24], False),  # held back to the end
        ([8, 8, 8], False),  # a proxy's buffer
        ([2] * 12, False),
        ([4, *[1] * 20], True),  # a hiccup
    ],
)
def test_clumps_have_no_rhythm_and_no_limit_on_it_is_judged(tmp_path, clumps, known):
    run, s = summary(tmp_path, [answer(k, clumps) for k in range(40)])
    assert np.isfinite(metrics.tpot(run.rows)).all() == known
    assert (s.metrics.itl.p50.value is not None) == known
    assert (s.slo.met is True) == known and (s.slo.attainment.value is None) != known
    said = check(s, "bulk_delivery")
    assert (said.ok, said.gate) == (known, False)
    assert ("proxy_buffering" in (said.advice or "")) is not known
    assert s.metrics.ttft.p50.value is not None and s.metrics.e2e.p50.value is not None
    assert len(observe(run, 1)) == (40 if known else 0), "no engine is fitted to a proxy"
    if known:
        assert s.metrics.tpot.p50.value == pytest.approx(0.01, rel=0.2)


def test_a_whole_answer_in_one_event_is_said_too(tmp_path):
    rows = [good(k, tokens=1) for k in range(40)]
    for row in rows:
        row.output_tokens, row.chunk_tokens = TOKENS, None
    _, s = summary(tmp_path, rows)
    assert check(s, "bulk_delivery").observed == "40 of 40 answers came in one event"
    assert s.slo.met is None


@pytest.mark.parametrize(("stood_still_ms", "ours"), [(1, False), (50, False), (200, True)])
def test_what_we_may_have_read_together_ourselves_is_no_clump(tmp_path, stood_still_ms, ours):
    """Tokens in three reads, 80 ms apart: only a loop that stood still for longer explains them."""
    run, s = summary(tmp_path, [answer(k, [8, 8, 8]) for k in range(40)], lag_ms=stood_still_ms)
    assert check(s, "bulk_delivery").ok is ours
    assert np.isfinite(metrics.tpot(run.rows)).all() == ours


def test_a_stall_excuses_the_answers_of_its_time_alone(tmp_path):
    rows = [answer(k, [24]) for k in range(100)]
    seen = [replace(one, loop_lag_max_ns=(900 if one.t_ns == 3 * S else 1) * MS) for one in watch(rows)]
    run = read_run(write_run(tmp_path / "run", rows, spec=SPEC, seen=seen))
    excused = np.flatnonzero(~metrics.clumped(run.rows))
    assert set(range(20, 30)) <= set(excused) <= set(range(16, 42))


def test_the_longest_stall_of_any_stretch_is_found():
    rng = np.random.default_rng(5)
    lags, workers = rng.random(300), rng.integers(0, 2, 300)
    none = np.full(300, np.nan)
    t_s = np.arange(1.0, 301.0)
    seconds = WorkerSamples(
        worker=workers, t_s=t_s - 1e-9, length_s=np.full(300, 1 - 2e-9), loop_lag_max_s=lags, cpu_share=none,
        in_flight=none, events=none, unwatched=[],
    )  # fmt: skip
    start = rng.random(500) * 300
    end = np.minimum(start + rng.exponential(20, 500), 299.5)
    held = LoopStalls(seconds, []).between(start, end)
    for got, a, b in zip(held, start, end, strict=True):
        assert got == lags[int(a) : int(b) + 1].max()
    assert LoopStalls(seconds, []).between(np.array([np.nan, 5.0]), np.array([1.0, np.nan])).tolist() == [0.0, 0.0]
    fields = ("t_s", "length_s", "loop_lag_max_s", "cpu_share", "in_flight", "events")
    alone = WorkerSamples(worker=workers[:0], unwatched=[0], **dict.fromkeys(fields, none[:0]))
    said = LoopStalls(alone, [Worker(index=0, loop_lag_p99_s=0.03)])
    assert said.between(np.array([7.0]), np.array([9.0])).tolist() == [0.03]


def test_a_server_behind_a_buffering_proxy_end_to_end(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.05", "--itl", "0.01")
    trace = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 0.05 * k, "input_tokens": 20, "output_tokens": 20} for k in range(12)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = harness(
        "replay", trace, "--base-url", server.url, "--extra-body", '{"fault": "bulk"}', "--slo", "tpot=20ms",
        "--out", tmp_path / "runs", "--format", "json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["verdict"] == "VALID", report["reasons"]
    assert (done.returncode, report["slo"]["met"]) == (5, None)
    assert report["metrics"]["tpot"]["p50"]["value"] is None and report["metrics"]["itl"]["p50"]["value"] is None
    assert [c["ok"] for c in report["checks"] if c["name"] == "bulk_delivery"] == [False]
