from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest
from conftest import StartServer

from harness.errors import ServerError, UsageError
from harness.server import counters, probe
from harness.server.access import normalise_base_url

TEXT = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 12288.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 12.0
vllm:request_success_total{finished_reason="stop",model_name="a b"} 1.0
vllm:request_success_total{finished_reason="length",model_name="a b"} 47.0
vllm:num_requests_running{model_name="m"} 3.0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 7.0
vllm:request_prefill_time_seconds_sum{model_name="m"} 1.5e-01
vllm:broken_total{model_name="m"} many
python_gc_objects_collected_total{generation="0"} 1.0
"""


def test_counters_are_summed_over_their_labels() -> None:
    assert counters.parse_counters(TEXT) == {
        "vllm:prompt_tokens_total": 12300.0,
        "vllm:request_success_total": 48.0,
        "vllm:request_prefill_time_seconds_sum": 0.15,
    }
    assert counters.parse_counters("") == {}


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://[::1]:8000/openai/v1", "https://[::1]:8000/openai/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("http://h/v1/completions/", "http://h/v1"),
        ("http://h/v1/models", "http://h/v1"),
        ("http://h/chat/completions", "http://h"),
        ("http://h/x/?api-version=2024-10-21", "http://h/x?api-version=2024-10-21"),
        (
            "https://h/openai/deployments/g/chat/completions?api-version=1#top",
            "https://h/openai/deployments/g?api-version=1",
        ),
    ],
)
def test_base_urls(given: str, url: str) -> None:
    assert normalise_base_url(given) == url


@pytest.mark.parametrize("query", ["api-key=1", "key=AIza", "subscription-key=", "sig=x", "a=b&access_token=1"])
def test_a_key_in_a_base_url_is_refused_without_being_shown(query: str) -> None:
    with pytest.raises(UsageError, match="--key-header") as e:
        normalise_base_url(f"http://h/v1?{query}")
    assert "AIza" not in str(e.value)


@pytest.mark.parametrize("given", ["", "127.0.0.1:8000", "ftp://a/v1", "http://", "http://u:p@a/v1"])
def test_what_is_no_base_url(given: str) -> None:
    with pytest.raises(UsageError):
        normalise_base_url(given)


def test_what_a_server_tells(fake_server: StartServer) -> None:
    server = fake_server("--model", "m")
    found = probe.find_model(server.url, None, None)
    assert (found.id, found.max_model_len) == ("m", 32768)
    assert len(probe.ordinary_token_ids(server.url, None, "m")) >= 50
    assert probe.engine_version(server.url, None) == "fake-1"
    found = counters.counters(server.url, None)
    assert found is not None
    assert found["vllm:prompt_tokens_total"] == 0.0
    told: list[str] = []
    assert probe.find_model(server.url, None, "mm", told.append).id == "mm"
    assert "did you mean m" in told[0]


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answers[self.path]  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[http.server.HTTPServer]:
    """A server that is something else."""
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        server.answers = {  # type: ignore[attr-defined]
            "/v1/models": (200, b"<html>login</html>"),
            "/tokenize": (200, b'{"tokens": [1, 2]}'),
            "/version": (200, b"[]"),
            "/metrics": (200, b"up 1\n"),
            "/two/models": (200, b'{"data": [{"id": "a"}, {"id": "b"}]}'),
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_of_another_kind(other_server: http.server.HTTPServer) -> None:
    root = f"http://127.0.0.1:{other_server.server_port}"
    with pytest.raises(ServerError, match="not an OpenAI-compatible answer"):
        probe.find_model(f"{root}/v1", None, None)
    with pytest.raises(ServerError, match="--tokenizer"):
        probe.ordinary_token_ids(f"{root}/v1", None, "m")
    with pytest.raises(UsageError, match="choose one with --model"):
        probe.find_model(f"{root}/two", None, None)
    assert probe.engine_version(f"{root}/v1", None) is None
    assert counters.counters(f"{root}/v1", None) is None, "no vLLM counters is null, not an empty book"


def test_a_server_that_dies_in_the_middle_of_its_answer_is_not_there() -> None:
    for said in (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nvllm:a_total 1", b"nonsense\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer(listener: socket.socket = listener, said: bytes = said) -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(said)

            threading.Thread(target=answer, daemon=True).start()
            assert counters.counters(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", None) is None


def test_nobody_there() -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        probe.find_model("http://127.0.0.1:9/v1", None, None)
    assert counters.counters("http://127.0.0.1:9/v1", None) is None
