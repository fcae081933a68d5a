from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from conftest import StartServer

from harness.server_metrics import GAUGES, SCHEMA, ServerMetrics, read_gauges

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


def test_a_server_is_sampled_on_the_run_clock(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()
    path = tmp_path / "server-metrics-0.arrows"
    with ServerMetrics(page(server), path, time.time_ns()) as metrics:
        time.sleep(2.5)
    assert metrics.trouble is None
    table = pa.ipc.open_stream(path).read_all()
    assert table.schema.equals(SCHEMA)
    times = table.column("t_ns").to_pylist()
    assert 2 <= len(times) <= 4
    assert times == sorted(times)
    assert 0 <= times[0] < 1.5e9
    assert table.column("running").to_pylist() == [0.0] * len(times)
    assert table.column("kv_cache_usage").null_count == len(times)


def test_a_server_that_dies_ends_the_rows_not_the_run(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()
    path = tmp_path / "m.arrows"
    with ServerMetrics(page(server), path, time.time_ns()) as metrics:
        time.sleep(0.5)
        server.process.kill()
        time.sleep(1.2)
    assert metrics.trouble is None
    assert pa.ipc.open_stream(path).read_all().num_rows == 1


def test_nowhere_to_write(fake_server: StartServer, tmp_path: Path) -> None:
    with ServerMetrics(page(fake_server()), tmp_path / "no" / "folder", time.time_ns()) as metrics:
        time.sleep(0.2)
    assert metrics.trouble is not None
    assert "cannot write" in metrics.trouble
