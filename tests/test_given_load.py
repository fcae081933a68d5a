"""In an open loop the load is given: what was sold and paid at it is no estimate of what the server can do."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from run_files import SPEC, S, good, write_run

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.pricing.operating_point import operating_point
from harness.analysis.report.run import render_json, render_markdown
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.record.manifest import Replica, RunDir, read_manifest, write_manifest
from harness.record.samples import SERVER_SCHEMA


def run_of(path, *, mode="open", busy=400, quiet=0, **spec):
    """Answers of 0.53 s: ``busy`` of them begun each 50 ms, then ``quiet`` ones, one a second."""
    at = [*(k * 0.05 for k in range(busy)), *(busy * 0.05 + k for k in range(quiet))]
    rows = [good(k, round(t * S), ttft_ms=500) for k, t in enumerate(at)]
    return write_run(path, rows, spec=replace(SPEC, mode=mode, concurrency=11 if mode == "closed" else None, **spec))


@pytest.mark.parametrize(("mode", "known"), [("open", False), ("closed", True)])
def test_quiet_traffic_is_left_out_of_no_open_loop(tmp_path, mode, known):
    """The steady part of a closed loop is the server without ramp and drain; of arrivals it would be the busy hours
    alone, sold at their price, while the quiet ones are paid for, too.
    """
    s = summarise(read_run(run_of(tmp_path / "run", mode=mode, quiet=20)))
    assert s.steady.window is not None and s.steady.window.found
    assert s.steady.window.duration_s < 0.55 * s.window.duration_s
    assert (s.steady.usd_per_1m_total.value is not None) is known
    assert (s.steady.total_token_throughput.value is not None) is known
    if not known:
        assert s.steady.usd_per_1m_total.note == "not a closed loop: its quiet stretches are part of the load"
        assert "without ramp and drain" not in render_markdown(s)


GIVEN_RATES = (
    "request_throughput", "input_token_throughput", "output_token_throughput", "total_token_throughput", "goodput",
)  # fmt: skip


@pytest.mark.parametrize("mode", ["open", "closed"])
def test_throughput_and_cost_have_an_interval_in_a_closed_loop_alone(tmp_path, mode):
    s = summarise(read_run(run_of(tmp_path / "run", mode=mode, slo={"ttft": 1.0})))
    prices = [s.cost.usd_per_1m_total, s.cost.usd_per_1m_output_only, s.cost.split.usd_per_1m_input]
    known = [getattr(s.rates, name) for name in GIVEN_RATES] + prices
    assert all(q.value for q in known)
    assert all((q.low is None and q.high is None) is (mode == "open") for q in known)
    tree = json.loads(render_json(s))
    assert (tree["cost"]["usd_per_1m_total"]["low"] is None) is (mode == "open")
    # what the servers answered to the load is an estimate in every loop
    for q in (s.rates.concurrency, s.metrics.ttft.mean, s.slo.attainment):
        assert q.low is not None


def test_the_cost_at_a_given_load_says_what_it_is(tmp_path):
    s = summarise(read_run(run_of(tmp_path / "run")))
    said = "the cost at this load, which was given (10.4 requests in flight on average"
    assert said in (s.cost.note or "") and "harness capacity" in s.cost.note
    text = render_markdown(s)
    assert "not what a token costs on full servers" in text
    assert "the load is given" in text
    assert "not the cost when full" in view_run(read_run(tmp_path / "run"), s).sentence
    closed = summarise(read_run(run_of(tmp_path / "closed", mode="closed")))
    assert closed.cost.note is None


def gauges(path, replica, running, kv=0.5):
    """What a server said each second."""
    rows = [
        dict.fromkeys(SERVER_SCHEMA.names) | {"t_ns": k * S, "took_ns": 1, "running": r, "kv_cache_usage": kv}
        for k, r in enumerate(running)
    ]  # fmt: skip
    file = RunDir(path).server_metrics(replica)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=SERVER_SCHEMA))


def two_servers(path, args):
    run_of(path)
    manifest = read_manifest(path)
    manifest.replicas = [Replica(index=k, base_url=f"http://127.0.0.1:{k + 1}/v1") for k in range(2)]
    manifest.engine_args = args
    write_manifest(RunDir(path), manifest)
    gauges(path, 0, [4.0] * 20)
    gauges(path, 1, [4.0] * 10 + [0.0] * 10, kv=0.1)
    return path


@pytest.mark.parametrize("args", [["--max-num-seqs", "8"], ["--dtype", "auto", "--max-num-seqs=8"]])
def test_how_full_servers_were_is_named(tmp_path, args):
    """Two servers of 8 slots: 4 in one all the time, 4 in the other half of it."""
    s = summarise(read_run(two_servers(tmp_path / "run", args)))
    assert s.fullness.running == pytest.approx(6.0)
    assert (s.fullness.slots, s.fullness.slots_busy) == (16, pytest.approx(0.375))
    assert s.fullness.engine_busy == pytest.approx(0.75)
    assert s.fullness.kv_cache == pytest.approx(0.3)
    assert "38% of 16 slots busy" in (s.cost.note or "")
    assert '"fullness"' in render_json(s)


def test_what_is_not_known_of_fullness_is_null(tmp_path):
    s = summarise(read_run(two_servers(tmp_path / "run", [])))
    assert (s.fullness.slots, s.fullness.slots_busy) == (None, None)
    assert "engines at work 75% of the time, 6 requests in their batches" in (s.cost.note or "")
    RunDir(tmp_path / "run").server_metrics(1).unlink()
    s = summarise(read_run(tmp_path / "run"))
    assert (s.fullness.running, s.fullness.engine_busy, s.fullness.kv_cache) == (None, None, None)
    assert s.fullness.in_flight == pytest.approx(s.rates.concurrency.value)


def test_capacity_keeps_the_interval_of_its_cost(tmp_path, monkeypatch):
    """Between a load that keeps the SLO and one that misses it the cost is that at capacity: an estimate."""
    runs = []
    for k, (every_s, slow) in enumerate(((0.1, 4), (0.05, 200))):
        at = [j * every_s for j in range(400)]
        rows = [good(j, round(t * S), ttft_ms=900 if j % (400 // slow) == 0 else 50) for j, t in enumerate(at)]
        write_run(tmp_path / str(k), rows, spec=replace(SPEC, slo={"ttft_p90": 0.5}))
        manifest = read_manifest(tmp_path / str(k))
        manifest.plan = replace(manifest.plan, planned_rate=1 / every_s)
        write_manifest(RunDir(tmp_path / str(k)), manifest)
        runs.append(summarise(read_run(tmp_path / str(k))))
    (system,) = serving_configs(runs)
    assert system.capacity is not None and system.capacity.state == "found"
    assert system.usd_per_1m_total.low is not None and system.usd_per_1m_total.high is not None
    assert system.floor is not None and system.floor.usd_per_1m_total.low is None
    made = operating_point([runs[0]])
    assert made.at == "a measured load" and made.total.value is not None
    assert (made.total.low, made.total.high) == (None, None)
    assert any("the cost at this load, which was given" in note for note in made.notes)

    load = system.capacity.load
    below = replace(system, capacity=replace(system.capacity, load=replace(load, value=1.0, low=None, high=None)))
    monkeypatch.setattr("harness.analysis.pricing.operating_point.serving_configs", lambda runs: [below])
    assert operating_point(runs).at != "capacity", "below all that was measured: nothing is extrapolated"
