"""What is spooled to files gives the same figures and plans as what is held, and memory stays where it is."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.plan.build import build_plan
from harness.plan.file import Windows
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.trace import spool
from harness.trace.edit import Selection, anonymize, sample
from harness.trace.io import open_trace
from harness.trace.prefix import Turns
from harness.trace.shape import measure
from harness.trace.spool import Sessions
from harness.trace.survey import Survey


class Pair(NamedTuple):
    number: int
    more: tuple[int, ...] | None


@pytest.fixture
def in_files(monkeypatch):
    """All that can lies in files."""

    def switch() -> None:
        monkeypatch.setattr(spool, "HELD_SESSIONS", 3)

    return switch


def test_every_process_has_the_same_place_for_a_session():
    """Else two plans of one seed could differ, if ever so rarely."""
    ask = [sys.executable, "-c", "from harness.trace.spool import _place; print(_place((1, 'a session')))"]
    said = [
        subprocess.run(
            ask, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] != b""


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 30), st.integers(-(2**62), 2**62), st.none() | st.just((1, 2)))),
    held=st.integers(1, 8),
)
def test_sessions_are_a_dict(steps, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "HELD_SESSIONS", held)
        found, truth = Sessions(Pair), {}
        for session, number, more in steps:
            assert found.get(("copy", session)) == truth.get(session)
            truth[session] = Pair(number, more)
            found.set(("copy", session), truth[session])
        assert [found.get(("copy", session)) for session in truth] == list(truth.values())


def trace_of(path: Path, rows: int = 300) -> Path:
    draw = random.Random(5)
    at, lines = 0.0, []
    for i in range(rows):
        at += draw.choice([0.0, 0.25, draw.expovariate(1)])
        row = {"arrival_s": at, "input_tokens": draw.randrange(20, 400), "output_tokens": draw.randrange(1, 30)}
        if draw.random() < 0.8:
            row["session_id"] = f"s{max(0, i - draw.randrange(120)) // 4}"
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


SPECS = [
    {}, {"speed": 3.7}, {"sessions": "wait"}, {"grow": 2.4}, {"grow": 0.6},
    {"conversation": "live", "sessions": "wait"}, {"cancel": (0.3, 1.0)},
    {"grow": 1.5, "limit": 200}, {"repeat": True, "limit": 800}, {"repeat": True, "duration_s": 500.0},
    {"arrivals": "poisson", "rate": 3.0}, {"arrivals": "gamma", "rate": 3.0, "burstiness": 0.5, "repeat": True,
    "duration_s": 150.0},
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_plan_is_the_same_from_files(tmp_path, in_files, spec):
    trace = trace_of(tmp_path / "t.jsonl")

    def plan(name: str) -> bytes:
        asked = PlanSpec(**({"closed": False} | spec))
        build_plan(open_trace(trace), tmp_path / name, asked, Vocabulary.from_ids(range(100, 900)))
        return (tmp_path / name).read_bytes()

    held = plan("held")
    in_files()
    assert plan("files") == held


def test_a_shape_is_the_same_from_files(tmp_path, in_files):
    trace = trace_of(tmp_path / "t.jsonl")
    held = asdict(measure(open_trace(trace)))
    in_files()
    files = asdict(measure(open_trace(trace)))
    assert files == held


def grown_by(of, sessions: int) -> int:
    """Bytes of Python's and NumPy's that are in use after so many sessions."""
    tracemalloc.start()
    try:
        kept = of(sessions)
        return tracemalloc.get_traced_memory()[0] if kept is not None else 0
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "spec",
    [
        {"repeat": True}, {"repeat": True, "sessions": "wait"},
        {"repeat": True, "conversation": "live", "sessions": "wait"},
        {"windows": Windows(count=1, draw=0), "duration_s": 500.0, "limit": None},
    ],
    ids=str,
)  # fmt: skip
def test_the_sessions_of_a_pass_are_forgotten_when_the_next_begins(tmp_path, monkeypatch, spec):
    """Else a trace that is repeated for days fills the disk with sessions that no row asks for again."""
    monkeypatch.setattr(spool, "HELD_SESSIONS", 3)
    kept: list[int] = []
    real = Sessions._store

    def store(self, some):
        real(self, some)
        if self._file is not None:
            kept.append(self._file.execute("SELECT count(*) FROM kept").fetchone()[0])

    monkeypatch.setattr(Sessions, "_store", store)
    trace = trace_of(tmp_path / "t.jsonl", rows=120)
    sessions = len({row.session_id for row in open_trace(trace)})
    asked = PlanSpec(**({"closed": False, "limit": 1200} | spec))
    build_plan(open_trace(trace), tmp_path / "plan", asked, Vocabulary.from_ids(range(100, 900)))
    assert 10 < max(kept) <= sessions, "of one pass"


@pytest.mark.parametrize("kind", ["turns", "shape"])
def test_sessions_cost_no_memory(monkeypatch, kind, tmp_path):
    monkeypatch.setattr(spool, "HELD_SESSIONS", 300)

    def turns(sessions: int) -> Turns:
        found = Turns()
        for i in range(sessions):
            found.place(f"session-{i}", i, 1000 + i % 7, 100)
        return found

    def shape(sessions: int) -> Survey:
        trace = tmp_path / f"{sessions}.jsonl"
        trace.write_text(
            "".join(
                f'{{"arrival_s": {i / 8}, "input_tokens": {1 + i % 99}, "output_tokens": 3, "session_id": "s{i}"}}\n'
                for i in range(sessions)
            )
        )
        columns = Survey()
        for record in open_trace(trace):
            columns.add(record)
        return columns

    of = {"turns": turns, "shape": shape}[kind]
    of(1)  # what is imported and cached by the first use is not what is measured
    few, many = grown_by(of, 1500), grown_by(of, 10_000)
    numbers = 24 * 8500 if kind == "shape" else 0  # of the rows: an arrival, two lengths, and room to grow
    assert many < 1.5 * few + numbers


@pytest.mark.parametrize("verb", ["anonymize", "window", "limit"])
def test_no_verb_holds_all_sessions(monkeypatch, tmp_path, verb):
    monkeypatch.setattr(spool, "HELD_SESSIONS", 200)

    def read(sessions: int) -> int:
        trace = tmp_path / f"{sessions}.jsonl"
        trace.write_text(
            "".join(
                f'{{"arrival_s": {i}, "input_tokens": 9, "output_tokens": 3, "session_id": "s{i // 2}"}}\n'
                for i in range(2 * sessions)
            )
        )
        read = open_trace(trace)
        records = {
            "anonymize": lambda: anonymize(read, salt=bytes(16), tokenizer=None),
            "window": lambda: sample(read, Selection(window_s=(0.0, 1e6))),
            "limit": lambda: sample(read, Selection(limit=100)),
        }[verb]()
        tracemalloc.start()
        try:
            count = sum(1 for _ in records)
            assert count == (100 if verb == "limit" else 2 * sessions)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    read(100)
    few, many = read(1000), read(8000)
    assert many < 1.5 * few


def test_a_full_disk_is_said(monkeypatch, tmp_path):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "HELD_BYTES", 40)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    rows = spool.Sorter(lambda i: i, lambda i: 10)
    with pytest.raises(HarnessError, match=r"No space left on device.*TMPDIR"):
        for i in range(9):
            rows.add(i)

    class Full:
        def __getattr__(self, name: str) -> object:
            raise sqlite3.OperationalError("database or disk is full")

    sessions = Sessions(Pair)
    sessions._asked(lambda: None)
    with pytest.raises(HarnessError, match="disk is full"):
        sessions._asked(lambda: Full().execute)
