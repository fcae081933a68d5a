"""A server from which no request has a byte, and that answers no question, ends the run; one that queues does not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from rich.console import Console
from test_client import Run, Server, request, spec_of
from test_question import OK, server

from harness.cli.runner.steps import StopRequest, watch
from harness.cli.runner.targets import Servers
from harness.cluster.deploy.load_workers import LoadWorkers, _Progress, _State
from harness.console import LoadProgress
from harness.errors import ServerError
from harness.record.manifest import RunDir
from harness.scenarios.plan_reader import prepare
from harness.server import probe
from harness.server.access import Access, Patience
from harness.server.probe import ASK_AFTER_S, ASK_AGAIN_S, SILENT_S, Silence


class Book:
    """A silence with a clock of its own, whose questions are answered when the test says so."""

    def __init__(self, answers: Callable[[int], bool]) -> None:
        self.now = 0.0
        self.asked: list[tuple[float, int]] = []
        self.work: list[Callable[[], None]] = []

        def ask(k: int) -> bool:
            self.asked.append((self.now, k))
            return answers(k)

        self.silence = Silence(ask, clock=lambda: self.now, start=self.work.append)

    def look(self, at_s: float, quiet_s: dict[int, float], *, answer: bool = True) -> int | None:
        self.now = at_s
        if answer:
            while self.work:
                self.work.pop()()
        return self.silence.look(quiet_s)


def test_a_server_that_says_nothing_at_all_is_silent_after_30_s() -> None:
    book = Book(lambda k: False)
    ended = next(s for s in range(200) if book.look(s, {0: float(s)}) is not None)
    assert ended == SILENT_S
    assert [at for at, _ in book.asked] == [ASK_AFTER_S + 1], "asked once, and early enough to answer late"


def test_a_server_that_queues_answers_questions_and_goes_on() -> None:
    book = Book(lambda k: True)
    assert not any(book.look(s, {0: float(s)}) is not None for s in range(121))
    assert len(book.asked) == (120 - ASK_AFTER_S) // ASK_AGAIN_S


def test_a_question_that_is_still_open_decides_nothing() -> None:
    book = Book(lambda k: False)
    assert not any(book.look(s, {0: float(s)}, answer=False) is not None for s in range(60))
    assert book.look(60, {0: 60.0}) == 0


def test_a_byte_ends_the_matter_and_the_next_time_it_is_asked_anew() -> None:
    book = Book(lambda k: False)
    for s in range(25):
        assert book.look(s, {0: float(s)}) is None
    assert book.look(25, {}) is None
    assert book.look(54, {0: 29.0}) is None
    assert book.look(55, {0: 30.0}) == 0
    assert len(book.asked) == 2


def test_of_several_servers_the_silent_one_is_named_and_a_question_that_fails_is_no_answer() -> None:
    def answers(k: int) -> bool:
        if k == 2:
            raise RuntimeError
        return True

    book = Book(answers)
    for s in range(30):
        assert book.look(s, {1: float(s), 2: float(s)}) is None
    assert book.look(30, {1: 30.0, 2: 30.0}) == 2


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        (OK + b"Content-Length: 0\r\n\r\n", True),
        (b"", False),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 302 Go\r\nLocation: x\r\nContent-Length: 0\r\n\r\n", True),
    ],
)
def test_any_answer_is_an_answer(said: bytes, answers: bool) -> None:
    gate = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.sendall(said) if said else gate.wait(5)

    with server(talk) as url:
        assert probe.answers(f"{url}/v1", Access(), 0.2 if not said else 5.0) is answers
    gate.set()


def test_the_run_ends_with_the_word_and_the_progress_line_says_what_it_waits_for(capsys) -> None:
    class Load:
        """Quiet from the start; over once it was told which server is."""

        def __init__(self) -> None:
            self.told: list[tuple[bool, int | None]] = []
            self.polls = 0

        @property
        def done(self) -> bool:
            return bool(self.told)

        def poll(self, timeout_s: float) -> dict[str, object]:
            self.polls += 1
            return {"sent": 4, "done": 0, "failed": 0, "in_flight": 4, "quiet_s": {0: float(self.polls)}}

        def stop(self, at_once: bool = False, silent: int | None = None) -> None:
            self.told.append((at_once, silent))

    load = Load()
    silence = Silence(lambda k: False, start=lambda work: work())
    progress = LoadProgress(Console(stderr=True), total=9, span_s=None)
    servers = Servers(engine="url", model="m", replicas=[], tier=None, api_key=None)
    cut, lost = watch(load, servers, StopRequest(), progress, silence=silence)
    assert cut is not None and "silent" in cut and not lost
    assert load.told == [(True, 0)]
    assert "no byte for 12 s" in progress.line({"quiet_s": {0: 12.0}}, 0.0, 80)
    assert "no byte" not in progress.line({"quiet_s": {0: 2.0}}, 0.0, 80)


def test_a_worker_that_dies_with_a_traceback_is_told_in_a_line(tmp_path) -> None:
    class Child:
        def tail(self, n: int) -> list[str]:
            return ["Traceback (most recent call last):", '  File "x.py", line 3, in <module>', "MemoryError"]

    load = LoadWorkers.__new__(LoadWorkers)
    load._states, load._run = [_State(Child(), 0.0)], RunDir(tmp_path)  # type: ignore[arg-type]
    said = str(load._failure(0, "ended before it was ready"))
    assert "Traceback" not in said and "File" not in said
    assert said.endswith("worker-0.log\n  MemoryError")


def test_what_several_workers_heard_is_put_together() -> None:
    def states(*said: _Progress) -> dict[int, float]:
        load = LoadWorkers.__new__(LoadWorkers)
        child: Any = SimpleNamespace(poll=lambda: None, lines=list, trouble=None)
        load._states = [_State(child, time.monotonic(), progress=one) for one in said]
        load._deadline, load._silence_s = None, 600.0
        quiet_s = load.poll(0.0)["quiet_s"]
        assert isinstance(quiet_s, dict)
        return quiet_s

    assert states(_Progress(quiet_s={0: 40.0, 1: 9.0}), _Progress(quiet_s={1: 12.0}, heard=[0])) == {1: 12.0}
    assert states(_Progress(quiet_s={0: 40.0}), _Progress()) == {0: 40.0}


def test_the_client_knows_how_long_a_server_has_sent_nothing(monkeypatch) -> None:
    monkeypatch.setattr("harness.scenarios.client.client._QUIET_NS", 50_000_000)
    go_on, over = threading.Event(), threading.Event()

    def talk(connection, nth):
        connection.recv(65536)
        if nth == 1:
            go_on.wait(120)
            connection.sendall(OK + b"Content-Type: text/event-stream\r\n\r\n")
            time.sleep(0.05)
        else:
            over.wait(120)

    listener = Server(talk)
    sender = Run(listener.url, timeout_s=20.0)
    try:
        assert sender.client.quiet_s() == ({}, [])
        sender.send(prepare(request(), spec_of()))
        gevent.sleep(0.1)
        quiet, heard = sender.client.quiet_s()
        assert 0.05 < quiet[0] < 5 and heard == []
        go_on.set()
        sender.wait()
        assert sender.client.quiet_s() == ({}, [])
        sender.send(prepare(request(), spec_of()))
        gevent.sleep(0.1)
        sender.client.abort("stall", "the server was silent", replica=1)
        assert sender.client.in_flight == 1
        sender.client.abort("stall", "the server was silent", replica=0)
        sender.client.parse_queue.settle()
        assert [row.error for row in sender.rows][1:] == ["stall"]
    finally:
        over.set()
        sender.client.close()
        listener.socket.close()


def test_a_server_that_always_says_come_back_at_once_is_not_asked_for_ever() -> None:
    asked = []

    def talk(connection: socket.socket) -> None:
        asked.append(1)
        connection.sendall(b"HTTP/1.1 429 No\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n")

    patience = Patience(lambda words: None, left_s=20.0, sleep=lambda s: None)
    with server(talk) as url, pytest.raises(ServerError, match="429"):
        probe.fetch(url, Access(patience=patience))
    assert len(asked) <= 21
