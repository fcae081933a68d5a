"""Hosted APIs and gateways: what every request carries, where it goes, and how long one waits for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import StartServer, harness
from test_client import spec_of

from harness.errors import ServerError, UsageError
from harness.plan.file import Request
from harness.record.run_spec import RunSpec
from harness.scenarios.client.client import Client
from harness.scenarios.plan_reader import prepare
from harness.server import probe
from harness.server.access import Access, Patience, check_key_header
from harness.server.question import retry_after_s
from harness.server.warmup import ask


def test_the_key_is_a_bearer_or_alone_in_another_header() -> None:
    headers = {"X-Tenant": "t1"}
    assert Access(headers=headers).lines() == headers
    assert Access(api_key="k", headers=headers).lines() == {"X-Tenant": "t1", "Authorization": "Bearer k"}
    assert Access(api_key="k", key_header="authorization").lines() == {"authorization": "Bearer k"}
    assert Access(api_key="k", key_header="api-key").lines() == {"api-key": "k"}
    secret = Access(api_key="secret", headers=headers, secret_headers={"X-Sub": "secret"})
    assert "secret" not in repr(secret) and secret.lines()["X-Sub"] == "secret"
    assert secret.at("http://b/metrics", "http://a/v1").lines() == headers
    for bad in ("Host", "a b", "", "x-tenant"):
        with pytest.raises(UsageError, match="key-header"):
            check_key_header(bad, headers)


def body(lengths: dict[str, Any], **extra: object) -> dict[str, object]:
    request = Request(
        request_id=0, phase="measured", scheduled_ns=0, slice=0, after=None, think_ns=None, input_tokens=None,
        output_tokens=7, prompt_token_ids=None, prompt_text="a", messages=None,
    )  # fmt: skip
    raw = prepare(request, spec_of(model="m", stream=False, extra_body=extra, **lengths))
    sent: dict[str, object] = json.loads(raw.partition(b"\r\n\r\n")[2])
    assert (sent.pop("model"), sent.pop("prompt"), sent.pop("stream")) == ("m", "a", False)
    return sent


def test_how_lengths_are_asked_for() -> None:
    assert body({}) == {"max_tokens": 7, "ignore_eos": True, "temperature": 0}
    assert body({"output_lengths": "cap"}) == {"max_tokens": 7, "temperature": 0}
    assert body({"output_lengths": "free"}) == {"temperature": 0}
    hosted = {"length_field": "max_completion_tokens", "output_lengths": "cap"}
    assert body(hosted) == {"max_completion_tokens": 7}
    assert body(hosted, temperature=1) == {"max_completion_tokens": 7, "temperature": 1}
    assert body({"length_field": "max_new_tokens"}) == {"max_new_tokens": 7, "ignore_eos": True, "temperature": 0}


def test_the_query_of_a_base_url_goes_with_every_request() -> None:
    client = Client(
        RunSpec(mode="open", model="m", base_urls=["http://127.0.0.1:1/x?api-version=1"], key_header="api-key"),
        lambda row: None, api_key="k",
    )  # fmt: skip
    head = client._endpoints[0].head.decode()
    client.close()
    assert head.startswith("POST /x/completions?api-version=1 HTTP/1.1\r\n")
    assert "\r\napi-key: k\r\n" in head and "Authorization" not in head


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("15", 15.0), (" 0 ", 0.0), ("1.5", 1.5), ("Mon, 30 Nov 2026 10:00:10 GMT", 10.0),
     ("Mon, 30 Nov 2026 09:00:00 GMT", 0.0), ("soon", None), ("-5", None), ("", None), (None, None), ("1e9", None)],
)  # fmt: skip
def test_retry_after(said: str | None, seconds: float | None) -> None:
    assert retry_after_s(said, 1796032800.0) == seconds


def test_a_server_is_waited_for_as_long_as_a_start_may_take(fake_server: StartServer) -> None:
    url = f"{fake_server('--busy', '1.5').url}/completions"
    ask = {"model": "fake", "prompt": "a", "max_tokens": 1}
    slept: list[float] = []
    impatient = Access(patience=Patience(lambda words: None, 1.9, slept.append))
    with pytest.raises(ServerError, match=r"429.*come back in 2 s.*later than a start may take"):
        probe.fetch(url, impatient, ask)
    assert slept == []
    told: list[str] = []
    patience = Patience(told.append, 60.0)
    assert b"choices" in probe.fetch(url, Access(patience=patience), ask)
    assert 56 <= patience.left_s < 60 and "come back in 2 s" in told[0]
    with pytest.raises(ServerError, match="429"):
        probe.fetch(f"{fake_server('--busy', '5').url}/completions", "k", ask)


@pytest.mark.parametrize(
    ("field", "lengths", "extra", "refused"),
    [("max_tokens", "cap", {}, "max_tokens"), ("max_completion_tokens", "forced", {}, "ignore_eos"),
     ("max_completion_tokens", "cap", {"temperature": 1}, "temperature"), ("max_completion_tokens", "cap", {}, None)],
)  # fmt: skip
def test_the_first_request_asks_as_the_others_will(
    fake_server: StartServer, field: str, lengths: Any, extra: dict[str, object], refused: str | None
) -> None:
    url = fake_server("--hosted").url.replace("/v1", "/openai/deployments/fake?api-version=1")
    spec = RunSpec(
        mode="open", base_urls=[url], endpoint="chat", model="fake", length_field=field, output_lengths=lengths,
        extra_body=extra,
    )  # fmt: skip
    access, hello = Access(headers={"X-Tenant": "t1"}), {"messages": [{"role": "user", "content": "Hello"}]}
    if refused is None:
        ask(spec, url, access, hello, 1, 10.0)
    else:
        with pytest.raises(probe.RefusalError, match=f"HTTP 400.*{refused}"):
            ask(spec, url, access, hello, 1, 10.0)


def write_trace(path: Path, n: int) -> Path:
    line = '{{"arrival_s": {}, "messages": [{{"role": "user", "content": "hi there"}}], "output_tokens": 6}}\n'
    path.write_text("".join(line.format(i / 50) for i in range(n)))
    return path


def test_a_hosted_api_from_a_pasted_url(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--hosted", "--busy", "0.5", "--ttft", "0.01", "--itl", "0.001", FAKE_SERVER_API_KEY="key-77")
    url = server.url.replace("/v1", "/openai/deployments/fake/chat/completions?api-version=2024-10-21")
    trace, out = write_trace(tmp_path / "t.jsonl", 20), tmp_path / "runs"
    args = ["replay", trace, "--base-url", url, "--model", "fake", "--out", out,
            "--key-header", "api-key", "--length-field", "max_completion_tokens", "--format", "json"]  # fmt: skip
    for key in ("HARNESS_API_KEY", "OPENAI_API_KEY"):
        assert key not in os.environ
    refused = harness(*args, OPENAI_API_KEY="key-77")
    assert refused.returncode == 1 and "X-Tenant" in refused.stderr, "a first request shows it"
    done = harness(*args, "--header", "X-Tenant: t1", OPENAI_API_KEY="key-77")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["requests"]["succeeded"], report["tokens"]["output"]) == (20, 60)
    (lengths,) = (c for c in report["checks"] if c["name"] == "output_tokens")
    assert lengths["ok"] and "3 output tokens a request for 6 planned" in lengths["observed"]
    for words in ("OPENAI_API_KEY", "HTTP 404", "as --model says", "Retry-After"):
        assert words in done.stderr
    assert "key-77" not in done.stderr + done.stdout
    assert not any(b"key-77" in file.read_bytes() for file in tmp_path.rglob("*.json*"))
