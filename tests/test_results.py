from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ResultsError
from harness.record.results import SCHEMA, Result, ResultWriter, iter_results, read_results


def rows(n: int, start: int = 0) -> list[Result]:
    return [
        Result(
            request_id=start + i, scheduled_ns=i * 1000, replica=0, sent_ns=i * 1000 + 5,
            chunk_ns=[i * 1000 + 50 + 10 * k for k in range(i % 7)], chunk_tokens=[1] * (i % 7) if i % 2 else None,
            finished_ns=i * 1000 + 500, input_tokens=i, output_tokens=i % 7, finish_reason="length", http_status=200,
        )
        for i in range(n)
    ]  # fmt: skip


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "results-3.arrows"
    writer = ResultWriter(path, worker=3)
    for row in rows(20):
        writer.append(row)
    writer.append(Result(request_id=20, scheduled_ns=7, error="unsent"))
    writer.close()
    writer.close()
    table = read_results(path)
    assert table.schema.equals(SCHEMA)
    assert table["request_id"].to_pylist() == list(range(21))
    assert set(table["worker"].to_pylist()) == {3}
    fifth = table.slice(5, 1).to_pylist()[0]
    assert fifth["chunk_gap_ns"] == [45, 10, 10, 10, 10]
    assert fifth["chunk_tokens"] == [1] * 5
    assert table["chunk_tokens"].to_pylist()[4] is None
    unsent = table.slice(20, 1).to_pylist()[0]
    assert unsent["sent_ns"] is None
    assert unsent["chunk_gap_ns"] == []
    assert unsent["error"] == "unsent"


def test_what_was_flushed_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "results-0.arrows"
    code = f"""
import time, pathlib
from harness.record.results import Result, ResultWriter
w = ResultWriter(pathlib.Path({str(path)!r}), 0)
for b in range(4):
    for i in range(100):
        w.append(Result(request_id=b * 100 + i, scheduled_ns=0))
    if b < 3:
        w.flush()
print("flushed", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flushed\n"
        os.kill(process.pid, signal.SIGKILL)
    assert read_results(path)["request_id"].to_pylist() == list(range(300))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_torn_file_gives_back_every_complete_batch(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("torn") / "results-0.arrows"
    writer = ResultWriter(path, worker=0)
    ends = []
    for b in range(5):
        for row in rows(30, start=b * 30):
            writer.append(row)
        writer.flush()
        ends.append(path.stat().st_size)
    writer.close()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = sum(end <= cut for end in ends)
    if cut and cut < ends[0]:
        # Not even the schema may be there; either way no row is invented and nothing but our own error is raised.
        with contextlib.suppress(ResultsError):
            assert read_results(path).num_rows == 0
    else:
        assert read_results(path)["request_id"].to_pylist() == list(range(30 * complete))


def test_not_a_result_file(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such"):
        read_results(tmp_path / "none.arrows")
    html = tmp_path / "results-0.arrows"
    html.write_text("<html>")
    with pytest.raises(ResultsError, match="not a file of results"):
        read_results(html)
    other = pa.schema([("a", pa.int64())], metadata={"harness.results": "99"})
    with pa.ipc.new_stream(str(html), other) as stream:
        stream.write_batch(pa.record_batch([pa.array([1])], schema=other))
    with pytest.raises(ResultsError, match="schema 99"):
        list(iter_results(html))


def test_size_on_disk_per_token(tmp_path: Path) -> None:
    """At most 5 bytes a streamed token, with gaps as irregular as a real server's."""
    import random

    rng = random.Random(1)
    path = tmp_path / "results-0.arrows"
    writer = ResultWriter(path, worker=0)
    tokens = 0
    for i in range(400):
        now = i * 10_000_000
        stamps = []
        for _ in range(128):
            now += int(rng.lognormvariate(17.0, 0.4))  # about 25 ms
            stamps.append(now)
        tokens += len(stamps)
        writer.append(
            Result(request_id=i, scheduled_ns=i, sent_ns=i * 10_000_000, chunk_ns=stamps, chunk_tokens=[1] * 128)
        )
        if i % 50 == 49:
            writer.flush()
    writer.close()
    assert path.stat().st_size / tokens <= 5


def test_flush_keeps_up_with_a_fast_server(tmp_path: Path) -> None:
    """A second of 100,000 tokens/s is written in a small part of that second (bound with room: half)."""
    writer = ResultWriter(tmp_path / "results-0.arrows", worker=0)
    for i in range(800):
        writer.append(
            Result(request_id=i, scheduled_ns=0, sent_ns=0, chunk_ns=list(range(1, 126)), chunk_tokens=[1] * 125)
        )
    started = time.process_time()
    writer.flush()
    assert time.process_time() - started < 0.5
    writer.close()
