"""A run of any length gives the same figures, read in one pass or two, in memory that follows its requests."""

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from bench.analysis_speed import make_run
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, bad, good, watch, write_run

from harness.analysis.report.run import render_json
from harness.analysis.rows import columns
from harness.analysis.rows import itl_histogram as gaps
from harness.analysis.rows import read as load
from harness.analysis.rows.itl_histogram import EDGES, cell_of, count_in
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.record.manifest import RunDir


def mixed(tmp_path, name="run", **options):
    """400 requests on two workers, of every kind: warm-up, failures, lost rows, repeated rows, turns that waited."""
    draw = random.Random(3)
    rows = [
        good(k, ttft_ms=draw.uniform(20, 900), itl_ms=draw.uniform(2, 40), tokens=draw.randint(1, 9), lag_ms=0.5)
        if k % 17 else bad(k, draw.choice(["server", "stall"]), chunks_ms=(5, 9), took_ms=50, detail="no\nway")
        for k in range(400) if k % 41
    ]  # fmt: skip
    draw.shuffle(rows)
    rows.insert(200, rows[3])
    plan = {k: {"phase": "warmup"} for k in range(20)} | {9: {"after": 8, "scheduled_ns": None}}
    spec = replace(SPEC, slo={"ttft": 0.5, "tpot_p95": 0.05}, warmup_s=4.0)
    return write_run(tmp_path / name, rows, plan=plan, workers=2, requests=400, spec=spec, seen=watch(rows), **options)


def test_one_pass_and_two_give_the_same(tmp_path, monkeypatch):
    path = mixed(tmp_path)
    with monkeypatch.context() as patched:
        patched.delattr(load, "_read_rows")  # what reads a run the long way
        once = read_run(path)
    monkeypatch.setattr(load, "_read_through", lambda *_: None)
    twice = read_run(path)
    assert render_json(summarise(once)) == render_json(summarise(twice))
    for side in ("rows", "warmup"):
        for name in load.Rows.__dataclass_fields__:
            ours, theirs = (getattr(getattr(run, side), name) for run in (once, twice))
            assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("harm", ["torn", "impossible"])
def test_an_odd_run_is_read_the_long_way(tmp_path, monkeypatch, harm):
    rows = [good(k) for k in range(50)]
    if harm == "impossible":
        rows[7].finished_ns = rows[7].sent_ns + 1  # before its own chunks: no fact but the stamps shows it
    path = write_run(tmp_path / "run", rows)
    if harm == "torn":
        file = RunDir(path).results(0)
        file.write_bytes(file.read_bytes()[:-60])
    run = read_run(path)
    assert (run.impossible, run.lost) == ((0, 50) if harm == "torn" else (1, 1))
    monkeypatch.delattr(load, "_read_rows")
    with pytest.raises(NameError, match="_read_rows"):
        read_run(path)


def test_memory_grows_with_the_requests_and_not_with_their_tokens(tmp_path, monkeypatch):
    """A million requests of 200 tokens in 3 GB, two million in 6."""
    for owner, name, size in (
        (gaps, "EXACT", 1000), (gaps, "UNITS", 2), (columns, "PART_ROWS", 2048), (columns, "PART_CHUNKS", 4096),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, size)
    most = {}
    for requests, tokens in ((2000, 2), (10_000, 2), (10_000, 12), (30_000, 2)):  # the first one loads modules
        path = tmp_path / f"{requests}x{tokens}"
        make_run(path, requests, tokens)
        tracemalloc.start()
        summarise(read_run(path))
        most[requests, tokens] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (most[30_000, 2] - most[10_000, 2]) / 20_000 < 1000  # bytes a request
    assert (most[10_000, 12] - most[10_000, 2]) / 100_000 < 4  # bytes a token: stamps alone are 8


@given(st.lists(st.floats(0, 1e6) | st.sampled_from(EDGES.tolist()), min_size=1, max_size=80))
def test_a_latency_lies_at_or_below_its_edge_and_above_the_one_before(values):
    values = np.array(values)
    for value, cell in zip(values, cell_of(values), strict=True):
        grid = np.zeros((1, len(EDGES)))
        count_in(grid, np.zeros(1, dtype=np.int64), np.array([value]), cells=np.array([cell]))
        place = int(np.flatnonzero(grid[0])[0])
        assert place == min(int(np.searchsorted(EDGES * (1 + 2e-11), value)), len(EDGES) - 1)
