"""Runs elsewhere: spans that a collector reads, and runs of MLflow with the report's own figures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from run_files import SPEC, bad, good, write_run

from harness.analysis.api import load
from harness.analysis.report.otel import BATCH
from harness.cli import cli
from harness.errors import HarnessError, UsageError

START_NS = 1_790_000_000_000_000_000


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    spec = replace(SPEC, slo={"ttft": 1.0})
    rows = [*(good(i) for i in range(BATCH + 40)), bad(BATCH + 40, "server"), bad(BATCH + 41, "unsent", sent=False)]
    one = write_run(tmp_path / "runs" / "one", rows, spec=spec, start_unix_ns=START_NS)
    broken = [*(good(i) for i in range(50)), *(bad(50 + i) for i in range(60))]
    return [one, write_run(tmp_path / "runs" / "two", broken, spec=spec, start_unix_ns=START_NS)]


def send(*args: str | Path) -> int:
    status = cli.main(["export", *map(str, args)], standalone_mode=False)
    assert isinstance(status, int)
    return status


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *said: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield got
    server.shutdown()
    server.server_close()


def test_every_request_is_a_span_linked_to_its_run(runs: list[Path], collector: list[bytes]) -> None:
    wire = pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the otel extra has it"
    )
    assert send(*runs, "--to", "otel") == 0
    spans = [
        span for body in collector for resource in wire.ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans for span in scope.spans
    ]  # fmt: skip
    assert len(collector) == 3, "in batches: 512 and 42 of the first run, 111 of the second"

    def of(span: Any) -> dict[str, Any]:
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}

    roots = {of(span)["harness.run"]: span for span in spans if not span.links}
    assert roots.keys() == {"one", "two"} and of(roots["two"])["harness.verdict"] == "INVALID"
    assert of(roots["one"])["harness.ttft_p50"] == load(runs[0]).summary().metrics.ttft.p50.value
    assert "harness.ttft_p50" not in of(roots["two"]), "figures of an INVALID run prove nothing"
    requests = {of(s)["harness.request_id"]: s for s in spans if s.links and of(s)["harness.run"] == "one"}
    assert requests.keys() == {*range(BATCH + 41)}, "what was never sent is none"
    assert {s.links[0].span_id for s in requests.values()} == {roots["one"].span_id}
    assert len({s.trace_id for s in spans}) == len(spans), "each a trace: one of a whole run is too big to look at"
    row = load(runs[0]).table().to_pylist()[7]
    span, said = requests[7], of(requests[7])
    assert span.start_time_unix_nano == START_NS + row["sent_ns"]
    assert span.end_time_unix_nano == START_NS + row["finished_ns"]
    assert said["harness.ttft_s"] == row["ttft_s"] and said["gen_ai.usage.output_tokens"] == row["output_tokens"]
    assert of(requests[BATCH + 40])["error.type"] == "server" and requests[BATCH + 40].status.code == 2


def test_a_collector_that_refuses_is_said(
    runs: list[Path], collector: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the otel extra has it")

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] + "/elsewhere")
    with pytest.raises(HarnessError, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
        send(runs[0], "--to", "otel")


def test_a_run_of_mlflow_has_the_figures_of_the_report(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the mlflow extra has it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for _ in range(2):  # what is there already is not sent again
        assert send(*runs, "--to", "mlflow") == 0
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "harness"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {"one", "two"}
    one, two = found["one"], found["two"]
    p50 = load(runs[0]).summary().metrics.ttft.p50
    assert [one.data.metrics[f"ttft_p50{end}"] for end in ("", "_low", "_high")] == [p50.value, p50.low, p50.high]
    assert one.data.params["slo_ttft"] == "1.0" and one.data.params["mode"] == "open"
    assert one.info.start_time == START_NS // 10**6 <= one.info.end_time
    assert two.data.tags["harness.verdict"] == "INVALID" and two.data.metrics == {} and two.info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(one.info.run_id)} == {"report.html", "report.json", "run.json"}


def test_one_place_is_named(runs: list[Path], tmp_path: Path) -> None:
    for args in ((), ("-o", str(tmp_path / "rows.csv"), "--to", "otel")):
        with pytest.raises(UsageError, match="say where to"):
            send(*runs, *args)
