"""A run of any length gives the same figures: columns in files or in memory, blocks short or long, one pass or two."""

import os
import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from bench.analysis_speed import make_run
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, bad, good, watch, write_run

from analysis import arrays, columns, gaps, intervals, load
from analysis.grid import EDGES, cell_of, count_in
from analysis.load import read_run
from analysis.show.page import render_page
from analysis.show.report import render_json
from analysis.show.view import view_run
from analysis.summary import summarise
from harness.errors import ResultsError
from harness.run import RunDir
from harness.traces import stats


@pytest.fixture
def in_files(monkeypatch):
    """Every column lives in a file, and work goes by blocks of seven."""
    monkeypatch.setattr(arrays, "HELD", 1)
    monkeypatch.setattr(arrays, "BLOCK", 7)


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


def figures(path):
    run = read_run(path)
    summary = summarise(run)
    return render_json(summary), render_page([view_run(run, summary)])


def test_columns_in_files_change_no_figure(tmp_path, monkeypatch):
    path = mixed(tmp_path)
    in_memory = figures(path)
    monkeypatch.setattr(arrays, "HELD", 1)
    assert figures(path) == in_memory


def test_short_blocks_change_no_figure(tmp_path, monkeypatch):
    path = mixed(tmp_path)
    long = figures(path)
    monkeypatch.setattr(arrays, "BLOCK", 7)
    assert figures(path) == long


def test_one_pass_and_two_give_the_same(tmp_path, monkeypatch):
    path = mixed(tmp_path)
    once = read_run(path)
    assert "chunks" in vars(once)  # pooled as they were read
    monkeypatch.setattr(load, "_read_through", lambda *_: None)
    twice = read_run(path)
    assert "chunks" not in vars(twice)
    assert render_json(summarise(once)) == render_json(summarise(twice))
    for side in ("rows", "warmup"):
        for name in load.Rows.__dataclass_fields__:
            ours, theirs = (getattr(getattr(run, side), name) for run in (once, twice))
            assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("harm", ["torn", "impossible"])
def test_an_odd_run_is_read_the_long_way(tmp_path, harm):
    rows = [good(k) for k in range(50)]
    if harm == "impossible":
        rows[7].finished_ns = rows[7].sent_ns + 1  # before its own chunks: no fact but the stamps shows it
    path = write_run(tmp_path / "run", rows)
    if harm == "torn":
        file = RunDir(path).results(0)
        file.write_bytes(file.read_bytes()[:-60])
    run = read_run(path)
    assert (run.impossible, run.lost) == ((0, 50) if harm == "torn" else (1, 1))
    assert "chunks" not in vars(run)


def test_columns_leave_no_file_behind(tmp_path, monkeypatch, in_files):
    path = mixed(tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = read_run(path)
    summarise(run)
    assert list(scratch.iterdir()) == []


def test_no_array_in_memory_is_as_long_as_the_run(tmp_path, monkeypatch):
    """Ten million requests stream: what the analysis holds beside its files does not grow with them."""
    for owner, name, size in (
        (arrays, "HELD", 1), (arrays, "BLOCK", 2048), (gaps, "EXACT", 1000), (gaps, "UNITS", 2),
        (intervals, "MAX_FLAGS", 1000), (columns, "PART_ROWS", 2048), (columns, "PART_CHUNKS", 4096),
        (columns, "FIRST_ROOM", 2048), (stats, "_BLOCK", 2048),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, size)
    most = {}
    for requests in (2000, 20_000, 60_000):  # the first one loads what is loaded only once
        make_run(tmp_path / str(requests), requests, 2)
        tracemalloc.start()
        summarise(read_run(tmp_path / str(requests)))
        most[requests] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (most[60_000] - most[20_000]) / 40_000 < 3  # bytes a request; one column of numbers alone is 8


def test_a_full_disk_is_an_error_with_advice(monkeypatch, in_files):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResultsError, match=r"no room for .*No space left.*TMPDIR"):
        arrays.empty(100)


def test_what_is_forgotten_is_still_there(in_files):
    made = arrays.filled(100, lambda part: np.arange(part.start, part.stop, dtype=float))
    arrays.forget(made[10:20])
    assert made.tolist() == list(range(100))


@given(st.lists(st.tuples(st.floats(-10, 1e5), st.booleans()), max_size=60))
def test_kept_and_ranked_are_numpys(pairs):
    values, where = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs], dtype=bool)
    assert arrays.kept(values, where).tolist() == values[where].tolist()
    assert arrays.ranked(values, where).tolist() == sorted(values[where].tolist())


@given(st.lists(st.floats(0, 1e6) | st.sampled_from(EDGES.tolist()), min_size=1, max_size=80))
def test_a_latency_lies_at_or_below_its_edge_and_above_the_one_before(values):
    values = np.array(values)
    for value, cell in zip(values, cell_of(values), strict=True):
        grid = np.zeros((1, len(EDGES)))
        count_in(grid, np.zeros(1, dtype=np.int64), np.array([value]), cells=np.array([cell]))
        place = int(np.flatnonzero(grid[0])[0])
        assert place == min(int(np.searchsorted(EDGES * (1 + 2e-11), value)), len(EDGES) - 1)
