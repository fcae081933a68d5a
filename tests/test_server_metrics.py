from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from conftest import StartServer, wait_for

from harness.record.samples import GAUGES, SERVER_SCHEMA, ServerMetrics, read_gauges, read_server_metrics

TEXT = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.125
process_start_time_seconds 1.7e+09
vllm:num_preemptions_total{engine="0"} nonsense
"""


def page(server: Any) -> list[tuple[str, str | None]]:
    return [(f"{server.url.removesuffix('/v1')}/metrics", None)]


def test_gauges_are_summed_and_what_is_missing_is_null() -> None:
    found = read_gauges(TEXT)
    assert set(found) == set(GAUGES)
    assert found["running"] == 5.0
    assert found["kv_cache_usage"] == 0.1875, "a share is no count: the mean of both engines"
    assert found["process_start_s"] == 1.7e9
    assert found["waiting"] is None, "another metric whose name begins alike is not this one"
    assert found["preemptions_total"] is None


def rows_of(path: Path) -> int:
    """How many samples are there so far."""
    table = read_server_metrics(path) if path.exists() else None
    return 0 if table is None else len(table)


def test_a_torn_file_keeps_what_is_whole(tmp_path: Path) -> None:
    """Wherever it is torn: the samples up to there, and never fewer for more bytes."""
    path = tmp_path / "server-metrics-0.arrows"
    batch = pa.RecordBatch.from_pylist([dict.fromkeys(SERVER_SCHEMA.names, 1)], SERVER_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as stream:
        for _ in range(4):
            stream.write_batch(batch)
    raw, found = path.read_bytes(), []
    for end in range(0, len(raw) + 1, 7):
        path.write_bytes(raw[:end])
        found.append(rows_of(path))
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3, 4}


def test_a_server_is_sampled_on_the_run_clock(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()
    path = tmp_path / "server-metrics-0.arrows"
    began = time.time_ns()
    with ServerMetrics(page(server), path, began) as metrics:
        wait_for(lambda: rows_of(path) >= 3, 120, "three samples")
    lasted_ns = time.time_ns() - began
    assert metrics.trouble is None
    table = pa.ipc.open_stream(path).read_all()
    assert table.schema.equals(SERVER_SCHEMA)
    times = table.column("t_ns").to_pylist()
    assert 3 <= len(times) <= lasted_ns / 1e9 + 1, "one a second"
    assert times == sorted(times)
    assert times[0] >= 0 and times[-1] <= lasted_ns, "on the clock of the run"
    assert table.column("running").to_pylist() == [0.0] * len(times)
    assert table.column("kv_cache_usage").null_count == len(times)


def test_a_server_that_dies_ends_the_rows_not_the_run(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()
    path = tmp_path / "m.arrows"
    with ServerMetrics(page(server), path, time.time_ns()) as metrics:
        wait_for(lambda: rows_of(path) >= 1, 120, "a sample")
        server.process.kill()
        server.process.wait(120)
        before = rows_of(path)
        time.sleep(1.2)
    assert metrics.trouble is None
    assert rows_of(path) == before


def test_nowhere_to_write(fake_server: StartServer, tmp_path: Path) -> None:
    with ServerMetrics(page(fake_server()), tmp_path / "no" / "folder", time.time_ns()) as metrics:
        wait_for(lambda: metrics.trouble is not None, 120, "it is told")
    assert metrics.trouble is not None
    assert "cannot write" in metrics.trouble
