"""Answers made to exhaust the client: work grows with their size alone, and what has no end is hung up on."""

from __future__ import annotations

import contextlib
import time

import pytest
from test_client import Run, Server, request, spec_of

from harness.record.results import ERRORS, Result
from harness.scenarios.client.fast_path import Template
from harness.scenarios.client.http1 import Response
from harness.scenarios.client.in_flight import InFlight
from harness.scenarios.client.reader import ReceiveBuffer
from harness.scenarios.plan_reader import most_tokens, prepare

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def cpu_s(media: bytes, body: bytes, step: int) -> float:
    """To take ``body`` in reads of ``step`` bytes, in one chunk."""
    response = Response()
    response.feed(HEAD % media, 0)
    data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    begun = time.process_time()
    for at in range(0, len(data), step):
        response.feed(data[at : at + step], at)
    spent = time.process_time() - begun
    assert response.done and response.fill(Result(0, 0)).error is None
    return spent


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"], ids=["LF", "CRLF", "CR"])
def test_work_is_linear_in_the_size_of_an_event(end: bytes) -> None:
    def event(size: int) -> bytes:
        return b'data: {"choices":[{"text":"%b"}]}%b' % (b"x" * size, end) + END.replace(b"\n\n", end)

    cpu_s(b"text/event-stream", event(1000), 500)
    small, large = (min(cpu_s(b"text/event-stream", event(n << 10), 500) for _ in range(3)) for n in (256, 2048))
    assert large < 20 * small + 0.01, "eight times the size; the square of that is 64"


def test_work_is_linear_in_the_size_of_a_json_body() -> None:
    def body(size: int) -> bytes:
        return b'{"choices":[{"text":"%b","finish_reason":"stop"}]}' % (b"x" * size)

    small, large = (min(cpu_s(b"application/json", body(n << 10), 500) for _ in range(3)) for n in (256, 4096))
    assert large < 40 * small + 0.01, "sixteen times the size; the square of that is 256"


def test_reads_of_any_size_mean_the_same_however_an_event_ends() -> None:
    events = b"".join(
        b'data: {"choices":[{"text":"%b"}]}%b' % (b"x" * size, end)
        for size in (1, 10, 100) for end in (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\n\n\n")
    )  # fmt: skip
    seen = set()
    for step in (1, 2, 3, 7, 50, 10_000):
        response = Response()
        response.feed(HEAD % b"text/event-stream", 0)
        data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(events + END), events + END)
        for at in range(0, len(data), step):
            response.feed(data[at : at + step], 0)
        facts = response.fill(Result(0, 0))
        assert facts.error is None
        seen.add(len(facts.chunk_ns))
    assert seen == {19}


def test_an_event_of_countless_lines_or_texts_costs_no_time() -> None:
    response = Response()
    response.feed(HEAD % b"text/event-stream" + b"f0000\r\n" + b"data:\n" * (0xF0000 // 6) + b"\n\n", 0)
    begun = time.process_time()
    many = b'data: {"choices":[{"text":"a","finish_reason":"x"}],"y":[%b]}\n\n'
    assert Template.learn(many % b",".join([b'{"text":""}'] * 20_000)) is None
    assert Template.learn(many % b",".join([b'{"text":""}'] * 1_000)) is None
    response.feed(b"\r\n", 0)
    assert time.process_time() - begun < 1.0
    assert response.fill(Result(0, 0)).error == "protocol"


def test_blanks_before_a_body_are_looked_at_once() -> None:
    response = Response()
    response.feed(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", 0)
    begun = time.process_time()
    for _ in range(2000):
        response.feed(b" " * 2000, 0)
    assert time.process_time() - begun < 1.0


EVENT = b'data: {"id":"x","choices":[{"index":0,"text":" a"}]}\n\n'


@pytest.mark.parametrize("event", [EVENT, b'data: {"choices":[{"text":"%b"}]}\n\n' % (b"x" * 60_000), b": ping\n\n"],
                         ids=["plain", "large", "no output at all"])  # fmt: skip
def test_a_stream_without_end_is_hung_up_on(event, monkeypatch) -> None:
    monkeypatch.setattr("harness.scenarios.client.in_flight._BYTES_MORE", 1 << 17)

    def talk(connection, nth):
        connection.recv(65536)
        connection.sendall(HEAD % b"text/event-stream")
        with contextlib.suppress(OSError):
            while True:
                connection.sendall((b"%x\r\n%b\r\n" % (len(event), event)) * (1 + 20_000 // len(event)))

    server = Server(talk)
    sender = Run(server.url, timeout_s=20.0)
    try:
        payload = prepare(request(), spec_of())
        sender.client.send(Result(0, 0), payload, most_tokens=2)
        sender.sent = 1
        (row,) = sender.wait()
    finally:
        sender.client.close()
        server.socket.close()
    assert (row.error, row.detail) == (
        "too_long", "it went on far beyond the 2 output tokens that were asked for"
    )  # fmt: skip
    assert row.error in ERRORS


@pytest.mark.parametrize(
    ("most", "events", "size", "too_long"),
    [(None, 10**6, 1 << 40, False), (100, 500, 10**6, False), (100, 1100, 10**6, True), (0, 200, 10**6, False),
     (100, 1, 1 << 25, True), (10**5, 1, 1 << 25, False)],
    ids=["no bound", "characters", "events", "no tokens asked", "bytes", "log-probabilities"],
)  # fmt: skip
def test_how_long_is_too_long(most, events, size, too_long) -> None:
    stream = InFlight.__new__(InFlight)
    stream.most_tokens, stream.buffer, stream.response = most, ReceiveBuffer(), Response()
    stream.response._completion._stamps.extend([0] * events)
    stream.response._size = size
    assert stream.too_long is too_long


@pytest.mark.parametrize(
    ("planned", "extra", "most"),
    [(20, {}, 20), (None, {}, None), (None, {"max_tokens": 7}, 7), (20, {"max_completion_tokens": 90}, 90),
     (20, {"n": 3}, 60), (20, {"max_tokens": None}, None), (20, {"n": "x"}, 20)],
)  # fmt: skip
def test_how_much_a_request_asks_for(planned, extra, most) -> None:
    assert most_tokens(request(output_tokens=planned), spec_of(extra_body=extra)) == most


def test_lengths_that_are_not_sent_bound_nothing() -> None:
    assert most_tokens(request(output_tokens=20), spec_of(output_lengths="free")) is None
    assert most_tokens(request(output_tokens=20), spec_of(length_field="length", output_lengths="cap")) == 20
