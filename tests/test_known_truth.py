"""The whole path against servers whose truth is known: command line in, figures out."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, StartServer, descendants, gone, harness, interrupt, start_harness, wait_for

from harness.record.results import ERRORS, read_results


def write_trace(path: Path, n: int, gap_s: float, input_tokens: int = 20, output_tokens: int = 20) -> Path:
    path.write_text(
        "".join(
            json.dumps({"arrival_s": round(i * gap_s, 6), "input_tokens": input_tokens, "output_tokens": output_tokens})
            + "\n"
            for i in range(n)
        )
    )
    return path


def report_of(done: Any) -> dict[str, Any]:
    assert done.stdout.strip(), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def rows_of(out: Path) -> list[dict[str, Any]]:
    (run,) = out.iterdir()
    return [row for file in run.glob("results-*.arrows") for row in read_results(file).to_pylist()]


def quantiles(samples: list[float], *ps: float) -> list[float]:
    return [float(q) for q in np.quantile(np.array(samples), ps)]


def samples_of(out: Path) -> dict[str, list[float]]:
    """By metric, s, straight from the rows."""
    found: dict[str, list[float]] = {name: [] for name in ("service_ttft", "ttft", "lag", "itl", "tpot")}
    for row in rows_of(out):
        first, *gaps = (gap / 1e9 for gap in row["chunk_gap_ns"])
        lag = (row["sent_ns"] - row["scheduled_ns"]) / 1e9
        found["service_ttft"].append(first)
        found["ttft"].append(first + lag)
        found["lag"].append(lag)
        found["itl"] += gaps
        found["tpot"].append(sum(gaps) / len(gaps))
    return found


@pytest.mark.alone
@pytest.mark.parametrize("workers", [1, 2])
def test_the_truth_is_reported(fake_server: StartServer, tmp_path: Path, workers: int) -> None:
    server = fake_server("--ttft", "0.05", "--itl", "0.01")
    trace = write_trace(tmp_path / "trace.jsonl", 100, 0.03)
    done = harness(
        "replay",
        trace,
        "--base-url",
        server.url,
        "--out",
        tmp_path / "runs",
        "--workers",
        str(workers),
        "--format",
        "json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(done)
    assert report["verdict"] == "VALID"
    assert report["requests"]["succeeded"] == report["requests"]["planned"] == 100
    truth = server.truth()
    assert len(truth) == 100
    assert sum(t["tokens"] for t in truth) == 2000
    assert sum(t["prompt_tokens"] for t in truth) == 2000

    # Against what the server did, not against what it was told to do: to 1 ms at low load.
    ttft = [(t["chunk_ns"][0] - t["received_ns"]) / 1e9 for t in truth]
    itl = [gap / 1e9 for t in truth for gap in np.diff(t["chunk_ns"])]
    tpot = [(t["chunk_ns"][-1] - t["chunk_ns"][0]) / 1e9 / (t["tokens"] - 1) for t in truth]
    metrics = report["metrics"]
    for name, samples in (("service_ttft", ttft), ("ttft", ttft), ("itl", itl), ("tpot", tpot)):
        p50, p90 = quantiles(samples, 0.5, 0.9)
        room = 0.001 if name != "ttft" else 0.003  # ttft also holds the lag of the schedule
        assert abs(metrics[name]["p50"]["value"] - p50) < room, name
        seen = metrics[name]["p90"]["value"]
        if seen is None:  # noise was alike for requests on end, so few count; the rows hold it all the same
            (seen,) = quantiles(samples_of(tmp_path / "runs")[name], 0.9)
        assert abs(seen - p90) < 2 * room, name
    for q in ("mean", "p50"):
        quantity = metrics["service_ttft"][q]
        assert quantity["low"] <= quantity["value"] <= quantity["high"]
        assert quantity["n"] == 100
    assert metrics["service_ttft"]["p99"]["value"] is None, "100 requests cannot support a p99"
    assert metrics["lag"]["p50"]["value"] < 0.005
    # No tier was named, so there is a throughput and no price, and the reason is said.
    assert report["cost"]["usd_per_1m_total"]["value"] is None
    assert report["cost"]["reason"]


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="kernels elsewhere give no such stamps")
def test_the_truth_begins_when_the_request_came_however_late_it_is_read(fake_server: StartServer) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.001")
    body = json.dumps({"model": "fake", "prompt": "a b c", "max_tokens": 2, "stream": True}).encode()
    url = urllib.parse.urlsplit(server.url)
    with socket.create_connection((str(url.hostname), int(url.port or 0)), timeout=10) as there:
        for k, late_s in enumerate((0.0, 0.5)):
            server.process.send_signal(signal.SIGSTOP)
            before_ns = time.monotonic_ns()
            there.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            sent_ns = time.monotonic_ns()
            time.sleep(late_s)
            server.process.send_signal(signal.SIGCONT)
            answer = b""
            while not answer.endswith(b"0\r\n\r\n"):
                answer += there.recv(65536)
            wait_for(lambda k=k: len(server.truth()) > k, 120, "the truth, which is written after the answer")
            truth = server.truth()[k]
            assert before_ns - 1_000_000 <= truth["received_ns"] <= sent_ns + 1_000_000
            assert truth["chunk_ns"][0] - truth["received_ns"] >= (0.02 + late_s) * 0.95e9


def test_a_named_tier_gives_a_price(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 80, 0.02)
    done = harness(
        "replay", trace, "--base-url", server.url, "--tier", "aws-m7a.large",
        "--out", tmp_path / "runs", "--concurrency", "8",
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(done)
    total = report["cost"]["usd_per_1m_total"]
    hours = report["window"]["duration_s"] / 3600
    assert total["value"] == pytest.approx(0.11592 * hours / (80 * 40) * 1e6, rel=1e-6)
    assert total["low"] < total["value"] < total["high"]
    split = report["cost"]["split"]
    bill = (split["usd_per_1m_input"]["value"] * 80 * 20 + split["usd_per_1m_output"]["value"] * 80 * 20) / 1e6
    assert bill == pytest.approx(0.11592 * hours, rel=1e-9)


@pytest.mark.alone
def test_a_starved_client_is_shown_and_has_no_price(fake_server: StartServer, tmp_path: Path) -> None:
    """8 places at 40 req/s, 0.43 s an answer: from 'sent' all looks well, from 'scheduled' it does not."""
    server = fake_server("--ttft", "0.05", "--itl", "0.02")
    trace = write_trace(tmp_path / "trace.jsonl", 120, 0.025)
    done = harness(
        "replay", trace, "--base-url", server.url, "--tier", "aws-m7a.large", "--max-concurrency", "8",
        "--out", tmp_path / "runs", "--format", "json",
    )  # fmt: skip
    report = report_of(done)
    assert done.returncode == 3
    assert report["verdict"] == "INVALID"
    (lag,) = [c for c in report["checks"] if c["name"] == "lag"]
    assert not lag["ok"]
    assert lag["advice"]
    assert report["cost"]["usd_per_1m_total"]["value"] is None
    metrics = report["metrics"]
    assert metrics["ttft"]["p50"]["value"] > 1.0
    # From the rows: where noise is alike for requests on end too few count, and the report has no p95.
    p95 = {name: quantiles(samples, 0.95)[0] for name, samples in samples_of(tmp_path / "runs").items()}
    assert p95["service_ttft"] < 0.15
    assert p95["ttft"] > 1.0
    assert p95["lag"] > 1.0


@pytest.mark.alone
def test_a_slow_server_is_the_servers_fault(fake_server: StartServer, tmp_path: Path) -> None:
    """The same overload without a cap on the client: lag stays small, the queue is the server's, the run is VALID."""
    server = fake_server("--ttft", "0.05", "--itl", "0.02", "--slots", "8")
    trace = write_trace(tmp_path / "trace.jsonl", 120, 0.025)
    done = harness(
        "replay", trace, "--base-url", server.url, "--out", tmp_path / "runs", "--slo", "ttft=500ms", "--format", "json"
    )
    report = report_of(done)
    assert report["verdict"] == "VALID", report["reasons"]
    assert done.returncode == 4, "VALID, but the SLO is missed"
    p95 = {name: quantiles(samples, 0.95)[0] for name, samples in samples_of(tmp_path / "runs").items()}
    assert p95["service_ttft"] > 1.0
    assert p95["lag"] < 0.1
    goodput, throughput = report["rates"]["goodput"]["value"], report["rates"]["request_throughput"]["value"]
    assert goodput < 0.7 * throughput


@pytest.mark.parametrize(("fault", "error"), [("http500", "server"), ("hang", "stall"), ("cut", "cut")])
def test_a_fault_is_a_row_with_its_class(fake_server: StartServer, tmp_path: Path, fault: str, error: str) -> None:
    """The class of each: `tests/test_client.py`."""
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 4, 0.01)
    done = harness(
        "replay", trace, "--base-url", server.url, "--extra-body", json.dumps({"fault": fault}), "--stall", "1s",
        "--tier", "aws-m7a.large", "--out", tmp_path / "runs", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    rows = rows_of(tmp_path / "runs")
    assert [r["error"] for r in rows] == [error] * 4
    report = report_of(done)
    assert report["errors"][0]["error"] == error
    assert report["errors"][0]["count"] == 4
    assert report["errors"][0]["meaning"] == ERRORS[error]
    assert report["requests"]["succeeded"] == 0
    assert report["metrics"]["ttft"]["p50"]["value"] is None
    assert report["cost"]["usd_per_1m_total"]["value"] is None


def test_a_redirect_is_named_before_the_load_and_not_followed(fake_server: StartServer, tmp_path: Path) -> None:
    """During a load it is a row of class redirect (`tests/test_client.py`)."""
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 4, 0.01)
    fault = json.dumps({"fault": "redirect"})
    done = harness("replay", trace, "--base-url", server.url, "--extra-body", fault, "--out", tmp_path / "runs")
    assert done.returncode == 1, done.stdout
    assert "it points to http://127.0.0.1:9/" in done.stderr


@pytest.mark.parametrize("fault", ["bundle", ""])
def test_good_streams_of_other_shapes_are_successes(fake_server: StartServer, tmp_path: Path, fault: str) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 4, 0.01)
    done = harness(
        "replay", trace, "--base-url", server.url, "--extra-body", json.dumps({"fault": fault}),
        "--out", tmp_path / "runs", "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path / "runs")
    assert [r["error"] for r in rows] == [None] * 4
    assert [r["output_tokens"] for r in rows] == [20] * 4
    if fault == "bundle":
        assert [len(r["chunk_gap_ns"]) for r in rows] == [10] * 4
        assert [r["chunk_tokens"] for r in rows] == [None] * 4, "two tokens a chunk: how many is not known, so not said"


def test_fewer_tokens_than_asked_are_said_and_priced(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 4, 0.01)
    done = harness(
        "replay", trace, "--base-url", server.url, "--extra-body", '{"fault": "short"}', "--out", tmp_path / "runs",
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0
    said = report_of(done)
    assert [c["ok"] for c in said["checks"] if c["name"] == "output_tokens"] == [False]
    assert said["tokens"]["output"] < sum(r["output_tokens"] for r in map(json.loads, trace.read_text().splitlines()))


def test_server_killed_in_mid_run_loses_nothing_measured(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    trace = write_trace(tmp_path / "trace.jsonl", 200, 0.02)
    process = start_harness("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs", "--format", "json")
    wait_for(lambda: len(server.truth()) > 40, 60, "40 answers")
    server.process.kill()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    rows = rows_of(tmp_path / "runs")
    assert sorted(r["request_id"] for r in rows) == list(range(200))
    assert report["requests"]["succeeded"] >= 40
    assert {r["error"] for r in rows} <= {None, "cut", "connect"}
    assert {e["error"] for e in report["errors"]} >= {"connect"}


def test_ctrl_c_reports_what_there_is_and_leaves_nothing(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    trace = write_trace(tmp_path / "trace.jsonl", 3000, 0.02)
    process = start_harness("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs", "--format", "json")
    wait_for(lambda: len(server.truth()) > 40, 60, "40 answers")
    left = descendants(process.pid)
    assert left
    interrupt(process)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert report["verdict"] == "INVALID"
    assert any("stopped" in reason for reason in report["reasons"])
    rows = rows_of(tmp_path / "runs")
    assert sorted(r["request_id"] for r in rows) == list(range(3000))
    assert sum(r["error"] is None for r in rows) >= 40
    assert {r["error"] for r in rows} <= {None, "unsent", "stopped"}
    assert report["metrics"]["ttft"]["p50"]["value"] is not None
    wait_for(lambda: all(gone(p) for p in left), 120, "workers ended")


def test_sigkill_leaves_no_worker(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    trace = write_trace(tmp_path / "trace.jsonl", 3000, 0.02)
    process = start_harness("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs")
    wait_for(lambda: len(server.truth()) > 40, 60, "40 answers")
    left = descendants(process.pid)
    assert len(left) >= 2, "a guard and a worker at least"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    wait_for(lambda: all(gone(p) for p in left), 120, "workers ended")
    rows = rows_of(tmp_path / "runs")
    assert sum(r["error"] is None for r in rows) >= 1, "what was flushed is there"


def test_a_full_disk_ends_the_run_and_keeps_what_was_written(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.001")
    trace = write_trace(tmp_path / "trace.jsonl", 2400, 0.002, input_tokens=2, output_tokens=40)
    # Of each worker's file the first flush fits, and the second does not.
    small = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (81920, 81920)); from harness.cli import main; main()"
    args = ("replay", trace, "--base-url", server.url, "--workers", "2", "--out", tmp_path / "runs", "--format", "json")
    done = subprocess.run(
        [sys.executable, "-c", small, *args],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    report = report_of(done)
    (workers,) = [c for c in report["checks"] if c["name"] == "workers"]
    assert "cannot write results" in workers["observed"]
    assert 0 < report["requests"]["succeeded"] < 2400
    assert len(rows_of(tmp_path / "runs")) == report["requests"]["succeeded"]


def test_steps_alone_give_the_same_plan(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = write_trace(tmp_path / "trace.jsonl", 10, 0.02)
    plan = tmp_path / "plan.arrow"
    done = harness("plan", trace, "--base-url", server.url, "-o", plan, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] == 10
    done = harness("run", plan, "--base-url", server.url, "--out", tmp_path / "runs", "--format", "json")
    assert done.returncode == 0, done.stderr
    first = report_of(done)
    (run,) = (tmp_path / "runs").iterdir()
    again = harness("report", run, "--format", "json")
    assert again.returncode == 0
    assert report_of(again) == first
    for form in ("text", "md"):
        shown = harness("report", run, "--format", form)
        assert shown.returncode == 0
        assert "VALID" in shown.stdout
        assert run.name in shown.stdout.replace("\n", "")
