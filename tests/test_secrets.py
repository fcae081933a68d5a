"""Secrets are in no file, no command line and no message; what users wrote is for their owner's eyes alone."""

from __future__ import annotations

import http.server
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import harness

from harness.errors import UsageError
from harness.record.manifest import create_run_dir
from harness.record.results import read_results
from harness.scenarios.client.completion import clean
from harness.server.access import from_environment, parse_header_env, parse_headers

VALUE = "tenant-7-very-secret"
TRACE = '{"arrival_s": 0, "output_tokens": 2, "messages": [{"role": "user", "content": "a b"}]}\n'
MODELS = b'{"data": [{"id": "m"}]}'


class Echo(http.server.BaseHTTPRequestHandler):
    """A gateway that wants a header, and repeats it in its refusals."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("X-Gate")))  # type: ignore[attr-defined]
        self.answer(200, MODELS) if self.path == "/v1/models" else self.answer(404, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("X-Gate")))  # type: ignore[attr-defined]
        self.answer(400, f"no budget for {self.headers.get('X-Gate')}".encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_header_from_the_environment_is_sent_and_written_nowhere(gateway, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(TRACE)
    done = harness(
        "replay", trace, "--base-url", f"http://127.0.0.1:{gateway.server_port}", "--header-env", "X-Gate=GATE_KEY",
        "--out", tmp_path / "runs", GATE_KEY=VALUE,
    )  # fmt: skip
    (run,) = (tmp_path / "runs").iterdir()
    assert ("/v1/chat/completions", VALUE) in gateway.seen
    assert VALUE not in done.stdout + done.stderr
    for file in run.iterdir():
        assert VALUE.encode() not in file.read_bytes(), file.name
    (row,) = read_results(run / "results-0.arrows").to_pylist()
    assert (row["error"], row["detail"]) == ("rejected", "HTTP 400: no budget for [api key]")
    assert b"GATE_KEY" in (run / "run.json").read_bytes()
    assert stat.S_IMODE(run.stat().st_mode) == 0o700


def test_what_no_header_env_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATE_KEY", "a\nb")
    monkeypatch.delenv("NOT_THERE", raising=False)
    for words, why in (
        (["X-Gate"], "NAME=VARIABLE"), (["X Gate=A"], "NAME=VARIABLE"), (["X-Gate=a b"], "NAME=VARIABLE"),
        (["X-Gate=NOT_THERE"], "no NOT_THERE"), (["X-Gate=GATE_KEY"], "one line"), (["Host=HOME"], "client itself"),
        (["X=HOME", "x=HOME"], "twice"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why) as caught:
            parse_header_env(words)
        assert "b" not in str(caught.value).partition("X-Gate")[2].replace("be printable", "") or why != "one line"
    monkeypatch.setenv("GATE_KEY", VALUE)
    assert from_environment(parse_header_env(["X-Gate=GATE_KEY"])) == {"X-Gate": VALUE}


@pytest.mark.parametrize("line", ["X-Tenant: blue", "Idempotency-Key: 7", "X-Keyboard: us", "X-Trace: 00-ab-cd-01",
                                  "X-Model: sk-1", "User-Agent: hf_x", "Referer: http://host/a@b"])  # fmt: skip
def test_what_is_no_secret_may_be_a_header(line: str) -> None:
    parse_headers([line])


def test_several_secrets_are_cut_out_of_details() -> None:
    assert clean("a key-1 b key-2", ("key-1", "key-2", "")) == "a [api key] b [api key]"


def test_folders_and_plans_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = create_run_dir(tmp_path / "runs", "x")
        trace = tmp_path / "t.jsonl"
        trace.write_text(TRACE)
        assert harness("plan", trace, "-o", tmp_path / "p.arrow").returncode == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "p.arrow").stat().st_mode) == 0o600
