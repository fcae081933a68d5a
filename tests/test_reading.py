"""The reading options are the same for every verb that reads a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import TraceError, UsageError
from harness.options import ReadOptions
from harness.trace.io import open_asked

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"


def test_nothing_asked_is_the_file_as_it_is():
    trace = open_asked(SAMPLES / "azure-conv-2023.csv", ReadOptions())
    assert len(list(trace)) == 600
    assert trace.format == "azure"


def test_one_of_several_recordings():
    rows = [len(list(open_asked(SAMPLES / "ragpulse" / "0_trace.jsonl", ReadOptions(part=part)))) for part in (1, 2)]
    assert sum(rows) == 60
    assert min(rows) > 0


def test_rows_in_order_of_arrival(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_s": 5, "prompt": "b"}\n{"arrival_s": 1, "prompt": "a"}\n')
    with pytest.raises(TraceError, match="goes forward in time"):
        list(open_asked(path, ReadOptions()))
    assert [r.text for r in open_asked(path, ReadOptions(sort=True))] == ["a", "b"]
    assert [r.text for r in open_asked(path, ReadOptions(skip_bad=True))] == ["b"]


def test_lengths_of_a_log_that_has_arrivals_only():
    log = SAMPLES / "nginx-constructed.log"
    with pytest.raises(TraceError, match="--input-tokens"):
        list(open_asked(log, ReadOptions()))
    asked = ReadOptions(input_tokens="uniform:low=5,high=9", output_tokens="7", seed=3)
    first, again = (list(open_asked(log, asked)) for _ in range(2))
    assert first == again
    assert {r.output_tokens for r in first} == {7}
    assert {r.input_tokens for r in first} <= set(range(5, 10))
    assert [r.input_tokens for r in first] != [r.input_tokens for r in open_asked(log, replace(asked, seed=4))]
    with pytest.raises(UsageError, match="go together"):
        open_asked(log, ReadOptions(input_tokens="7"))
