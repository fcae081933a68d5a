"""A question to a server that nobody vouches for: bounded in all, never sent on, and Ctrl-C is heard."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_worker import write_plan

from harness.errors import ServerError, UsageError
from harness.record.manifest import Replica
from harness.record.run_spec import RunSpec
from harness.server import probe, question, warmup
from harness.server.access import Access, normalise_base_url
from harness.server.counters import check_metrics_urls, count_before

OK = b"HTTP/1.1 200 OK\r\n"
Talk = Callable[[socket.socket], None]


@contextmanager
def server(talk: Talk) -> Iterator[str]:
    """Says ``talk`` to everyone; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(1 << 16)
                talk(connection)
            except OSError:
                pass

    threading.Thread(target=answer, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def drip(start: bytes) -> Talk:
    def talk(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b"x")
            time.sleep(0.01)

    return talk


@pytest.mark.parametrize(
    "start", [b"", OK + b"X: ", OK + b"Content-Length: 100000\r\n\r\n", OK + b"\r\n",
              OK + b"Transfer-Encoding: chunked\r\n\r\nfffff\r\n"],
    ids=["status line", "header", "body", "body until it closes", "chunk"],
)  # fmt: skip
def test_a_byte_now_and_then_does_not_stretch_the_deadline(start: bytes) -> None:
    with server(drip(start)) as url:
        begun = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer within 0\.2 s|cannot be reached"):
            probe.fetch(f"{url}/metrics", None, deadline_s=0.2)
        assert time.monotonic() - begun < 60, "it would go on for ever"


def test_a_name_that_is_never_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question.socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(5))
    with pytest.raises(ServerError, match=r"no answer within 0\.05 s"):
        probe.fetch("http://nowhere.example/v1", None, deadline_s=0.05)


def test_an_answer_without_end_is_refused() -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(OK + b"\r\n")
        while True:
            connection.sendall(b" " * 65536)

    with server(talk) as url, pytest.raises(ServerError, match="larger than 1 MiB"):
        question.ask(url, headers={}, deadline_s=10.0, most_bytes=1 << 20)


def redirected(elsewhere: str) -> Talk:
    said = f"HTTP/1.1 307 Go\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n".encode()
    return lambda connection: connection.sendall(said)


def test_no_redirect_is_followed_and_the_key_stays(tmp_path: Path) -> None:
    asked: list[bytes] = []

    def thief(connection: socket.socket) -> None:
        asked.append(b"")
        connection.sendall(OK + b'Content-Length: 21\r\n\r\n{"data":[{"id":"m"}]}')

    with server(thief) as elsewhere, server(redirected(f"{elsewhere}/v1/models")) as url:
        with pytest.raises(ServerError, match=f"points to {elsewhere}"):
            probe.find_model(f"{url}/v1", "secret", None)
        with pytest.raises(ServerError, match=f"points to {elsewhere}"):
            check_metrics_urls([f"{url}/metrics"], [f"{url}/v1"], "secret")
        said: list[str] = []
        replica = Replica(index=0, base_url=f"{url}/v1")
        count_before([replica], "secret", said.append)
        assert replica.counters_before is None
        assert elsewhere in said[0] and "counters" in said[0]
        assert not asked


def test_a_refusal_never_repeats_the_key_and_is_cut() -> None:
    body = b"you said Bearer secret " + b"x" * 100_000
    head = b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\n" % len(body)
    with server(lambda connection: connection.sendall(head + body)) as url, pytest.raises(ServerError) as caught:
        probe.fetch(url, "secret")
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://h:99999/v1", "http://h:x/", "http://a b/v1", "http://\u2100.x/", "http://a\x1b[m/",
            "http://" + "a" * 300, "http://h:0", "ftp://h/", "h:8000", "", "http://u:p@h/", "http:///v1"],
)  # fmt: skip
def test_a_malformed_url_is_a_sentence(url: str) -> None:
    for what in (normalise_base_url, lambda url: check_metrics_urls([url], ["http://h/v1"], None)):
        with pytest.raises(UsageError, match=r"expected something like|no user or password"):
            what(url)


def test_many_models_with_long_names_are_a_short_message() -> None:
    names = [f"model-{i}-" + "x" * 1000 for i in range(3000)]
    body = b'{"data":[' + ",".join(f'{{"id":"{name}"}}' for name in names).encode() + b"]}"
    head = OK + b"Content-Length: %d\r\n\r\n" % len(body)
    with server(lambda connection: connection.sendall(head + body)) as url:
        with pytest.raises(UsageError) as caught:
            probe.find_model(f"{url}/v1", None, None)
        told: list[str] = []
        assert probe.find_model(f"{url}/v1", None, "gpt", told.append).id == "gpt"
        assert len(str(caught.value)) < 3500 and len(told[0]) < 3500


@pytest.mark.parametrize("body", [b'{"data":' + b"[" * 100_000, b'{"x":' + b"[" * 100_000, b"\xff", b'{"data":[{}]}'])
def test_json_of_any_kind_is_a_sentence(body: bytes) -> None:
    head = OK + b"Content-Length: %d\r\n\r\n" % len(body)
    with server(lambda connection: connection.sendall(head + body)) as url, pytest.raises(ServerError, match="answer"):
        probe.find_model(f"{url}/v1", None, None)


def hear_signals() -> None:
    """Under nohup a process inherits that SIGHUP is ignored, in the background of a shell SIGINT, and so do these
    tests."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_question_is_broken_off_by_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    heard, over = threading.Event(), threading.Event()

    def talk(connection: socket.socket) -> None:
        heard.set()
        over.wait(60)

    trace = tmp_path / "t.jsonl"
    trace.write_text('{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n')
    with server(talk) as url:
        command = [sys.executable, "-m", "harness", "replay", str(trace), "--base-url", url, "--out", str(tmp_path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True,
                                   preexec_fn=hear_signals)  # fmt: skip
        assert heard.wait(60)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        over.set()
    assert (process.returncode, said.decode().strip()) == (130, "harness: stopped")


def test_a_warm_up_hears_a_signal_that_interrupts_no_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for its threads, and they for a server that says nothing."""

    class HeardError(Exception): ...

    def handler(number: int, frame: object) -> None:
        raise HeardError

    asked, over, gave_up = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(warmup, "WARM_S", 250)

    def talk(connection: socket.socket) -> None:
        asked.set()
        if not over.wait(100):
            gave_up.set()

    def send() -> None:
        asked.wait(60)
        time.sleep(0.1)  # the wait for the threads has begun
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    plan = write_plan(tmp_path / "plan.arrow", n=1)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with server(talk) as url:
            threading.Thread(target=send, daemon=True).start()
            spec = RunSpec(mode="open", base_urls=[f"{url}/v1"], model="m")
            with pytest.raises(HeardError):
                warmup.warm_up(spec, Access(), plan, lambda words: None)
            over.set()
            assert not gave_up.is_set(), "it was heard while they waited"
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_heard_that_interrupts_no_system_call() -> None:
    """One that comes just before the call, or to another thread, sets Python's flag and wakes nobody."""

    class HeardError(Exception): ...

    def handler(number: int, frame: object) -> None:
        raise HeardError

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:

            def send() -> None:
                connection, _ = silent.accept()
                with connection:
                    connection.recv(1)  # asked: the wait for the answer begins
                    time.sleep(0.1)
                    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
                    over.wait(60)

            over = threading.Event()
            threading.Thread(target=send, daemon=True).start()
            begun = time.monotonic()
            with pytest.raises(HeardError):
                question.ask(f"http://127.0.0.1:{silent.getsockname()[1]}/", headers={}, deadline_s=60)
            assert time.monotonic() - begun < 30
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)
