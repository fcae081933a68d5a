"""The benchmark's server is itself measured against what a plain socket sees."""

import json
import os
import socket
import time

import numpy as np
import psutil
import pytest
from measure import Cores, FastServer, fast_server

from harness.record.results import Result
from harness.scenarios.client.http1 import Response

ANYWHERE = Cores(frozenset(os.sched_getaffinity(0)), frozenset(os.sched_getaffinity(0)))


@pytest.fixture
def server():
    with fast_server(ANYWHERE, ttft_s=0.03, itl_s=0.01) as one:
        yield one


def connect(server: FastServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


def ask(sock: socket.socket, tokens: int, *, stream: bool = True, path: str = "/v1/chat/completions") -> None:
    body = json.dumps({"model": "fake", "max_tokens": tokens, "stream": stream}).encode()
    sock.sendall(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body))


def answer(sock: socket.socket) -> tuple[Response, float]:
    """The whole answer, and how long it took from now."""
    response, began = Response(), time.monotonic()
    while not response.done:
        data = sock.recv(65536)
        assert data, "the server closed the connection"
        response.feed(data, time.monotonic_ns())
    return response, time.monotonic() - began


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_an_answer_is_one_event_per_token_on_time(server, path, tokens):
    sock = connect(server)
    for _ in range(2):  # keep-alive
        ask(sock, tokens, path=path)
        response, seconds = answer(sock)
        facts = response.fill(Result(0, 0))
        assert (facts.error, facts.output_tokens, facts.finish_reason) == (None, tokens, "length")
        assert list(facts.chunk_tokens or ()) == [1] * tokens
        assert seconds >= 0.03 + 0.01 * (tokens - 1) - 0.001
        assert response.keep_alive


def test_chunks_have_the_size_of_real_ones(server):
    sock = connect(server)
    ask(sock, 3)
    data = b""
    while not data.endswith(b"\r\n0\r\n\r\n"):
        data += sock.recv(65536)
    assert data.count(b"\r\nfa\r\ndata: ") == 2, "two of three chunks hold 250 bytes; the last one ends the answer"


def test_the_truth_is_that_of_its_own_writes(server):
    server.tell("mark")
    sock = connect(server)
    ask(sock, 20)
    answer(sock)
    truth = server.truth()
    assert (truth.requests, truth.finished, truth.events, truth.dropped) == (1, 1, 20, 0)
    assert truth.ttft_ns[0] >= 30_000_000
    assert len(truth.itl_ns) == 19
    # A busy machine makes it late, never early: the schedule is absolute, so the sum is right within the lateness.
    assert truth.ttft_ns[0] + truth.itl_ns.sum() >= 30_000_000 + 19 * 10_000_000
    assert truth.stretch[0] >= 1
    assert np.all(truth.late_ns >= 0)


def test_a_request_has_arrived_when_it_came_not_when_it_was_read(server):
    """What the server is late by is in its own times, not in the error of its clients."""
    with connect(server) as sock:
        ask(sock, 2)  # the kernel begins to stamp a moment after it was asked
        answer(sock)
        time.sleep(0.1)
        server.tell("mark")
        process = psutil.Process(server.processes[0].pid)
        process.suspend()
        sent_ns = time.monotonic_ns()
        ask(sock, 2)
        time.sleep(1)
        process.resume()
        answer(sock)
    truth = server.truth()
    assert 0 <= truth.arrival_ns[0] - sent_ns < 800_000_000
    assert truth.ttft_ns[0] >= 1_000_000_000 - (truth.arrival_ns[0] - sent_ns)


def test_a_reader_that_stops_loses_no_byte(server):
    server.pace(0, 0)
    sock = connect(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    ask(sock, 40_000)  # ten megabytes: more than any socket buffer
    time.sleep(0.5)
    assert server.tell("count")[0]["blocked"] > 0
    response, _ = answer(sock)
    assert response.fill(Result(0, 0)).output_tokens == 40_000
    assert response.fill(Result(0, 0)).error is None


def test_a_client_that_hangs_up_is_dropped_from_the_books(server):
    server.tell("mark")
    for wait in (0.0, 0.05):  # before its first token, and after it
        sock = connect(server)
        ask(sock, 1000)
        time.sleep(wait)
        sock.close()
    server.wait_closed()
    assert server.truth().dropped == 2


def test_the_first_wave_of_a_closed_loop_is_spread_out(server):
    server.tell("mark 4 0.2")
    socks = [connect(server) for _ in range(4)]
    for sock in socks:
        ask(sock, 2)
    for sock in socks:
        answer(sock)
    ttft_ms = np.sort(server.truth().ttft_ns) / 1e6
    assert np.all(ttft_ms >= [80, 130, 180, 230])


def test_without_a_stream_the_answer_comes_whole_and_as_late(server):
    sock = connect(server)
    ask(sock, 5, stream=False)
    response, seconds = answer(sock)
    assert response.fill(Result(0, 0)).output_tokens == 5
    assert seconds >= 0.03 + 4 * 0.01 - 0.001


def test_processes_share_a_port_and_are_one_truth():
    with fast_server(ANYWHERE, ttft_s=0.01, itl_s=0.01, processes=2) as server:
        server.tell("mark")
        for _ in range(24):
            with connect(server) as sock:
                ask(sock, 2)
                answer(sock)
        truth = server.truth()
        assert (truth.requests, truth.events) == (24, 48)
        assert np.all(np.diff(truth.arrival_ns) > 0)
        assert all(one["requests"] for one in server.tell("count")), "the kernel gave both some"


def test_it_ends_when_its_owner_is_gone(server):
    process = server.processes[0]
    process.stdin.close()
    assert process.wait(10) == 0
