"""`--slow N`: servers and clients in slow motion, and a run directory that says what N = 1 would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conftest import StartServer

from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.cli import cli
from harness.cli.runner.slow import scale
from harness.cli.runner.targets import Servers, UrlTarget, choose_target
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import SimulatedServer
from harness.errors import UsageError
from harness.options import ReplayOptions, ServeOptions
from harness.plan.file import plan_sha256
from harness.record.manifest import RunDir, read_manifest
from harness.record.results import read_results
from harness.record.samples import read_server_metrics

MODEL, TIER, SLOW = "llama-3.1-8b-instruct", "lambda-h100", 4.0
N = 60


def run_of(folder: Path, *words: str) -> Path:
    done = CliRunner().invoke(cli, [*words, "-o", str(folder)], standalone_mode=False)
    assert done.exception is None, (done.output, done.exception)
    (run,) = folder.iterdir()
    return run


def test_a_slow_run_over_http_says_what_virtual_time_does(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [{"arrival_s": k * 0.04, "input_tokens": 200 + 7 * (k % 9), "output_tokens": 12 + k % 5} for k in range(N)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = fake_server("--model", MODEL, "--simulate", MODEL, TIER, "--slow", str(SLOW))

    class Slowed(UrlTarget):
        @contextmanager
        def open(self, run: RunDir) -> Iterator[Servers]:
            with super().open(run) as servers:
                yield replace(servers, slow=SLOW)

    monkeypatch.setattr("harness.cli.runner.targets.choose_target",
                        lambda *_, **__: Slowed([server.url], MODEL, get_tier(TIER)))  # fmt: skip
    words = ("--slo", "ttft=1s", "--min-requests", "5")
    slow = run_of(tmp_path / "slow", "replay", str(trace), "--seed", "1", "--workers", "1", *words)
    virtual = run_of(tmp_path / "virtual", "simulate", str(trace), "--model", MODEL, "--tier", TIER, *words)

    found = [read_results(run / "results-0.arrows") for run in (slow, virtual)]
    for name in ("request_id", "scheduled_ns", "input_tokens", "output_tokens"):
        one, other = (table.sort_by("request_id").column(name).to_pylist() for table in found)
        assert one == other, name
    first_s, last_s = ([], [])
    for table in found:
        table = table.sort_by("request_id")
        assert table.column("error").null_count == N
        gaps = table.column("chunk_gap_ns").to_pylist()
        first_s.append(np.array([one[0] / 1e9 for one in gaps]))
        last_s.append(np.array([sum(one[1:]) / 1e9 for one in gaps]))
    for slowly, at_once in (first_s, last_s):  # unscaled they would differ by four, whatever this machine adds
        assert 0.5 < np.median(slowly / at_once) < 2

    manifest = read_manifest(slow)
    assert manifest.plan_sha256 == plan_sha256(slow / "plan.arrow"), "the plan is the one that was made"
    assert manifest.end_ns is not None and 2.3e9 < manifest.end_ns < 2 * 2.4e9
    assert manifest.spec.timeout_s == 600 and manifest.spec.slo == {"ttft": 1.0}
    seconds = read_server_metrics(slow / "server-metrics-0.arrows")
    stamps = np.diff(seconds.column("t_ns").to_numpy()) / 1e9
    assert np.median(stamps) == pytest.approx(1 / SLOW, rel=0.3)
    said = summarise(read_run(slow))
    assert said.verdict == "VALID", said.reasons
    assert sorted(path.name for path in slow.glob(".*")) == []


def test_scaling_and_back_leaves_a_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.arrows"
    table = pa.table({
        "t_ns": [4, None, 8], "chunk_gap_ns": pa.array([[4, 8], [], [400]], pa.list_(pa.int64())), "rows": [1, 2, 3],
    })  # fmt: skip
    with pa.ipc.new_stream(path, table.schema) as sink:
        sink.write_table(table.slice(0, 1))
        sink.write_table(table.slice(1))
    for factor, first in ((0.25, 1), (4.0, 4)):
        scale(path, factor)
        found = pa.ipc.open_stream(path).read_all()
        assert found.column("t_ns").to_pylist() == [first, None, 2 * first]
        assert found.column("chunk_gap_ns").to_pylist() == [[first, 2 * first], [], [100 * first]]
    assert found.equals(table)


def test_slow_motion_is_of_a_simulated_engine_over_http() -> None:
    server = SimulatedServer(model=get_model(MODEL), tier=get_tier(TIER), slow=8.0)
    argv = server.command("127.0.0.1", 8000, "key").argv
    assert argv[argv.index("--slow") :][:2] == ["--slow", "8.0"] and "8 times as slow" in server.facts()["clock"]
    for serve, words in (
        (ServeOptions(slow=2.0), "add --engine simulated"),
        (ServeOptions(slow=2.0, engine="simulated", clock="virtual", model=MODEL, tier=TIER), "--slow: virtual time"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            choose_target(ReplayOptions(serve=serve))
