import errno
import gc
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import gevent
import numpy as np
import pytest
from conftest import ROOT, FakeServer, StartServer

from harness.errors import ServerError, UsageError
from harness.plan.file import Request
from harness.record.results import ERRORS, Result
from harness.record.run_spec import RunSpec
from harness.scenarios.client.client import Client
from harness.scenarios.client.connection import Connection
from harness.scenarios.client.in_flight import InFlight
from harness.scenarios.plan_reader import prepare
from harness.server import probe
from harness.server.access import parse_headers

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def request(i=0, *, output_tokens=4, ids=(1, 2, 3), text=None, messages=None, model=None):
    return Request(
        request_id=i, phase="measured", scheduled_ns=0, slice=i, after=None, think_ns=None, input_tokens=None,
        output_tokens=output_tokens, prompt_token_ids=list(ids) if ids else None, prompt_text=text, messages=messages,
        model=model,
    )  # fmt: skip


def chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def answer(tokens=2):
    texts = b"".join(chunk(b'data: {"choices":[{"text":"a"}]}\n\n') for _ in range(tokens))
    counts = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % tokens
    return HEAD + texts + chunk(counts) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def read_request(connection):
    """The next request on a connection, whole; b"" at its end."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class Server:
    """A server of real threads; ``talk(connection, nth)`` speaks on each connection until it returns."""

    def __init__(self, talk, tls=None, family=socket.AF_INET):
        self.talk, self.tls, self.connections = talk, tls, 0
        self.socket = socket.create_server(("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(connection, self.connections), daemon=True).start()

    def serve(self, connection, nth):
        try:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            with connection:
                self.talk(connection, nth)
        except (OSError, IndexError):
            pass  # the client went away, as some tests want

    @property
    def url(self):
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"


@pytest.fixture
def serve():
    servers = []

    def start(talk, **options):
        servers.append(Server(talk, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


OWN = ("connect_timeout_s", "api_key", "secret_headers", "sampler")
"""What a client is given beside the spec of its run."""


def spec_of(*urls, **asked):
    return RunSpec(**{"mode": "open", "model": "fake", "base_urls": [*urls], **asked})


class Run:
    """A client and its rows."""

    def __init__(self, *urls, **options):
        self.rows: list[Result] = []
        own = {name: options.pop(name) for name in OWN if name in options}
        self.client = Client(spec_of(*urls, **options), self.rows.append, **own)
        self.sent = 0

    def send(self, payload=None, ended=None, session=0, cancel_after_ns=None, timeout_ns=None, **fields):
        payload = payload or prepare(request(**fields), spec_of())
        self.client.send(
            Result(self.sent, 0),
            payload,
            ended,
            session=session,
            cancel_after_ns=cancel_after_ns,
            timeout_ns=timeout_ns,
        )
        self.sent += 1

    def wait(self, deadline_s=120.0):
        end = time.monotonic() + deadline_s
        while len(self.rows) < self.sent:
            assert time.monotonic() < end, f"{len(self.rows)} of {self.sent} rows"
            gevent.sleep(0.005)
        return sorted(self.rows, key=lambda r: r.request_id)

    def one(self, **fields):
        self.send(**fields)
        return self.wait()[-1]

    def until(self, reached, what, deadline_s=120.0):
        """Let the event loop run until then."""
        end = time.monotonic() + deadline_s
        while not reached():
            assert time.monotonic() < end, what
            gevent.sleep(0.005)

    def all_have(self, events):
        """Whether of each request in flight so many events have come."""
        return all(s.response.taken[0] + len(s.buffer) >= events for s in self.client._active)


@pytest.fixture
def run():
    runs = []

    def start(*urls, **options):
        runs.append(Run(*urls, **options))
        return runs[-1]

    yield start
    for one in runs:
        one.client.close()


def repeat(data):
    def talk(connection, nth):
        while read_request(connection):
            connection.sendall(data)

    return talk


def once(data):
    def talk(connection, nth):
        read_request(connection)
        connection.sendall(data)

    return talk


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_a_request_is_what_the_server_gets(serve, run):
    got = []

    def talk(connection, nth):
        got.append(read_request(connection))
        connection.sendall(answer())

    server = serve(talk)
    row = run(server.url, api_key="sk-secret").one(output_tokens=7)
    head, _, body = got[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/completions HTTP/1.1"
    assert f"Host: 127.0.0.1:{server.port}" in lines
    assert "Authorization: Bearer sk-secret" in lines
    assert "Accept-Encoding: identity" in lines
    assert json.loads(body) == {
        "model": "fake", "prompt": [1, 2, 3], "max_tokens": 7, "ignore_eos": True, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert (row.error, row.output_tokens, list(row.chunk_tokens), row.replica) == (None, 2, [1, 1], 0)


def body_of(payload):
    return json.loads(payload.partition(b"\r\n\r\n")[2])


def test_prepare_fits_the_prompt_to_the_endpoint():
    text = request(ids=None, text="hi")
    chat = request(ids=None, messages='[{"role": "user", "content": "hi"}]')
    assert body_of(prepare(text, spec_of(model="m")))["prompt"] == "hi"
    assert body_of(prepare(text, spec_of(endpoint="chat")))["messages"] == [{"role": "user", "content": "hi"}]
    assert body_of(prepare(chat, spec_of(endpoint="chat")))["messages"] == [{"role": "user", "content": "hi"}]
    free = body_of(prepare(request(output_tokens=None), spec_of(model="m")))
    assert "max_tokens" not in free
    assert "ignore_eos" not in free
    extra = {"temperature": 0.7, "stream_options": None, "top_p": 0.9}
    changed = body_of(prepare(text, spec_of(endpoint="chat", extra_body=extra)))
    assert (changed["temperature"], changed["top_p"], "stream_options" in changed) == (0.7, 0.9, False)
    broken = request(ids=None, messages="{")
    for bad, endpoint in ((request(), "chat"), (chat, "completions"), (broken, "chat")):
        with pytest.raises(UsageError):
            prepare(bad, spec_of(endpoint=endpoint, model="m"))


@pytest.mark.parametrize(
    "url", ["ftp://x", "127.0.0.1:80", "http://", "http://host:port", "http://u:secret@127.0.0.1/v1"]
)
def test_what_is_no_base_url_is_refused(url):
    with pytest.raises(UsageError) as e:
        Client(spec_of(url), lambda row: None)
    assert "secret" not in str(e.value)


def test_long_prompts_go_out_whole_while_answers_come_in(serve, run):
    sizes = []

    def talk(connection, nth):
        while data := read_request(connection):
            sizes.append(len(data))
            connection.sendall(answer())

    server = serve(talk)
    sender = run(server.url)
    for _ in range(4):
        sender.send(ids=range(1_000_000, 1_300_000))  # 2.4 MB each, far more than a socket buffer
    assert [row.error for row in sender.wait()] == [None] * 4
    assert min(sizes) > 2_400_000


# -- connections ------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_and_used_again(serve, run):
    server = serve(repeat(answer()))
    sender = run(server.url)
    for _ in range(5):
        sender.one()
    assert [row.error for row in sender.rows] == [None] * 5
    assert server.connections == 1


def test_connections_are_opened_ahead(serve, run):
    server = serve(repeat(answer()))
    sender = run(server.url)
    assert sender.client.open_connections(8) is None
    for _ in range(8):
        sender.send()
    assert [row.error for row in sender.wait()] == [None] * 8
    assert server.connections == 8


def test_a_connection_closed_while_idle_is_not_used_again(serve, run):
    server = serve(once(answer()))
    sender = run(server.url)
    for _ in range(3):
        sender.one()
        gevent.sleep(0.05)
    assert [row.error for row in sender.rows] == [None] * 3
    assert server.connections == 3


def test_a_long_idle_connection_is_not_trusted(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.endpoint.IDLE_LIMIT_S", 0.05)
    server = serve(repeat(answer()))
    sender = run(server.url)
    sender.one()
    gevent.sleep(0.1)
    sender.one()
    assert server.connections == 2


def closing(times, first_byte=b""):
    """Answers once on each connection; on the first ``times`` it closes when the next request arrives, unread."""

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(answer())
        if nth <= times:
            connection.recv(1, socket.MSG_PEEK)
            connection.sendall(first_byte)
            if first_byte:
                connection.recv(65536)  # else what was sent would be lost with the connection
            return
        while read_request(connection):
            connection.sendall(answer())

    return talk


def test_a_connection_closed_as_it_is_used_costs_no_request(serve, run):
    server = serve(closing(1))
    sender = run(server.url)
    first = sender.one()
    second = sender.one()
    assert (first.error, first.retries, second.error, second.retries) == (None, 0, None, 1)
    assert server.connections == 2
    assert second.sent_ns < second.chunk_ns[0]
    sender.send()
    assert sender.wait()[-1].retries == 0, "on the fresh connection, which was kept"


@pytest.mark.parametrize("what", ["a byte came", "it came late", "it was opened for it"])
def test_nothing_else_is_sent_twice_unasked(serve, run, monkeypatch, what):
    if what == "it came late":
        monkeypatch.setattr("harness.scenarios.client.client.CLOSED_NS", 0)
    sender = run(serve(closing(9, b"H" if what == "a byte came" else b"")).url)
    if what == "it was opened for it":
        sender = run(serve(lambda connection, nth: connection.recv(1)).url)
    else:
        sender.one()
    row = sender.one()
    assert (row.error, row.retries) == ("cut", 0)


def test_it_is_tried_once_more_and_no_oftener(serve, run):
    def talk(connection, nth):
        read_request(connection)
        if nth == 1:
            connection.sendall(answer())
            connection.recv(1, socket.MSG_PEEK)

    sender = run(serve(talk).url)
    sender.one()
    row = sender.one()
    assert (row.error, row.retries) == ("cut", 1)


@pytest.mark.parametrize(("said", "limit_s"), [("timeout=1", 0.8), ("max=5, timeout=60", 48.0), ("timeout=600", 60.0),
                                               ("max=5", 4.0), ("timeout=soon", 4.0)])  # fmt: skip
def test_a_server_says_how_long_it_keeps_a_connection(serve, run, said, limit_s):
    head = HEAD.replace(b"\r\n\r\n", b"\r\nKeep-Alive: %b\r\n\r\n" % said.encode())
    sender = run(serve(repeat(answer().replace(HEAD, head))).url)
    for _ in range(2):  # the second is known by its opening
        sender.one()
    assert sender.client._endpoints[0].idle_limit_s == limit_s


@pytest.mark.parametrize(("said", "error"), [("0.5", None), ("9999", "overloaded"), ("later", None)])
def test_a_retry_is_not_sent_before_the_server_wants_it(serve, run, said, error):
    def talk(connection, nth):
        read_request(connection)
        busy = b"HTTP/1.1 429 X\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n" % said.encode()
        connection.sendall(busy)
        while read_request(connection):
            connection.sendall(answer())

    row = run(serve(talk).url, retries=1).one()
    assert (row.error, row.retries) == (error, 0 if error else 1)
    assert (row.finished_ns - row.sent_ns) / 1e9 > {"0.5": 0.5, "later": 0.25}.get(said, 0)


def test_the_server_with_least_in_flight_is_chosen(serve, run):
    release = threading.Event()

    def slow(connection, nth):
        while read_request(connection):
            release.wait(10)
            connection.sendall(answer())

    sender = run(serve(slow).url, serve(slow).url, serve(slow).url)
    for _ in range(9):
        sender.send()
    release.set()
    replicas = [row.replica for row in sender.wait()]
    assert sorted(replicas) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert replicas[:3] == [0, 1, 2]


def test_the_second_address_of_a_host_is_tried(serve, run, monkeypatch):
    server = serve(repeat(answer()))
    dead = socket.create_server(("127.0.0.1", 0))
    port = dead.getsockname()[1]
    dead.close()
    found = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port)), (socket.AF_INET, 1, 6, "", ("127.0.0.1", server.port))]
    monkeypatch.setattr("harness.scenarios.client.endpoint._getaddrinfo", lambda *_: found)
    assert run("http://two.example/v1").one().error is None


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this Python")
def test_ipv6(serve, run):
    try:
        server = serve(repeat(answer()), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 loopback on this machine")
    assert run(f"http://[::1]:{server.port}/v1").one().error is None


# -- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("http500", "server"), ("http429", "overloaded"), ("http400", "rejected"), ("redirect", "redirect"),
        ("html", "protocol"), ("cut", "cut"), ("reset", "cut"), ("error_event", "server"), ("no_done", None),
        ("no_finish", "incomplete"), ("no_usage", None), ("bundle", None), ("empty", "empty"),
        ("only_done", "empty"), ("crlf", None), ("cr", None),
        ("json_label", None), ("no_data", None), ("odd_fields", None), ("late_zeros", None),
    ],
)  # fmt: skip
def test_each_fault_is_a_row_of_its_class(faulty, run, fault, error):
    sender = run(faulty.url)
    payload = prepare(request(output_tokens=6), spec_of(extra_body={"fault": fault}))
    row = sender.one(payload=payload)
    assert row.error == error, row.detail
    assert row.error is None or (row.error in ERRORS and row.detail)
    assert (row.finished_ns or 0) >= (row.sent_ns or 0)
    partial = {"cut": 2, "error_event": 2, "no_finish": 2, "bundle": 3}
    assert len(row.chunk_ns or []) == (6 if error is None and fault != "bundle" else partial.get(fault, 0))
    assert row.output_tokens == (6 if error is None and fault != "no_usage" else None)
    assert error is not None or (row.detail is not None) == (fault == "odd_fields")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cluster.engines.fake.server", "--ttft", "0.01", "--itl", "0.005"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield FakeServer(process.stdout.readline().split()[1], process, tmp_path_factory.mktemp("unused"))
    process.kill()
    process.wait(120)


def test_401_and_404(fake_server: StartServer, run):
    server = fake_server(FAKE_SERVER_API_KEY="sk-right")
    assert run(server.url, api_key="sk-wrong").one().error == "auth"
    row = run(server.url.replace("/v1", "/v7"), api_key="sk-right").one()
    assert (row.error, row.http_status) == ("not_found", 404)


def test_connection_refused(run):
    dead = socket.create_server(("127.0.0.1", 0))
    port = dead.getsockname()[1]
    dead.close()
    sender = run(f"http://127.0.0.1:{port}/v1")
    assert "refused" in sender.client.open_connections(3).lower()
    row = sender.one()
    assert row.error == "connect"
    assert "refused" in row.detail.lower()
    assert row.sent_ns is not None
    assert len(row.chunk_ns) == 0


def test_no_descriptors_left(serve, run, monkeypatch):
    def none_left(*_):
        raise OSError(errno.EMFILE, "")

    sender = run(serve(repeat(answer())).url)
    monkeypatch.setattr("harness.scenarios.client.connection._socket", none_left)
    assert "open files" in sender.client.open_connections(2)
    row = sender.one()
    assert (row.error, "open files" in row.detail) == ("connect", True)


def test_a_stall_and_a_timeout_keep_what_was_there(faulty, run):
    for limits, error in (({"stall_s": 0.4}, "stall"), ({"timeout_s": 0.4}, "timeout")):
        sender = run(faulty.url, **limits)
        payload = prepare(request(), spec_of(extra_body={"fault": "stall"}))
        row = sender.one(payload=payload)
        assert row.error == error
        assert len(row.chunk_ns) == 2
        assert 0.4e9 <= row.finished_ns - row.sent_ns < 3e9


def slow(pause_s):
    """A first event at once, the rest after a pause."""

    def talk(connection, nth):
        while read_request(connection):
            whole = answer()
            connection.sendall(whole[: len(HEAD) + 40])
            time.sleep(pause_s)
            connection.sendall(whole[len(HEAD) + 40 :])

    return talk


@pytest.mark.parametrize("stream", [True, False])
def test_a_requests_own_time_limit_counts_instead_of_the_clients(serve, run, stream):
    server = serve(slow(1.2))
    sender = run(server.url, timeout_s=0.6, stream=stream)
    sender.send(timeout_ns=200_000_000)
    sender.send()
    sender.send(timeout_ns=20_000_000_000)
    short, usual, long = sender.wait()
    assert (short.error, short.detail) == ("timeout", "not finished 0.2 s after it was sent")
    assert 0.2e9 <= short.finished_ns - short.sent_ns < 0.5e9
    # Without stream an answer is silent until it is done, and the stall limit is the time limit.
    assert (usual.error, usual.detail.split(" after")[0]) == ("timeout", "not finished 0.6 s")
    assert (long.error, long.output_tokens) == (None, 2)
    assert not sender.client._own_limit


def test_of_a_hang_up_and_a_time_limit_the_first_counts(serve, run):
    sender = run(serve(slow(1.0)).url)
    sender.send(cancel_after_ns=300_000_000, timeout_ns=150_000_000)
    sender.send(cancel_after_ns=150_000_000, timeout_ns=300_000_000)
    sender.send(cancel_after_ns=200_000_000, timeout_ns=200_000_000)
    assert [row.error for row in sender.wait()] == ["timeout", "cancelled", "cancelled"]


def test_a_time_limit_holds_while_a_retry_waits(serve, run):
    sender = run(serve(repeat(BUSY)).url, retries=50)
    sender.send(timeout_ns=400_000_000)
    row = sender.wait()[0]
    assert (row.error, row.retries > 0) == ("timeout", True)
    assert 0.4e9 <= row.finished_ns - row.sent_ns < 1e9


def test_a_server_that_accepts_and_says_nothing(run):
    listening = socket.create_server(("127.0.0.1", 0), backlog=1)
    row = run(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", stall_s=0.3).one()
    assert (row.error, row.http_status) == ("stall", None)
    listening.close()


def test_a_server_that_never_accepts(run):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    fill = [socket.socket() for _ in range(8)]
    for one in fill:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    row = run(f"http://127.0.0.1:{port}/v1", connect_timeout_s=0.3).one()
    assert row.error == "connect"
    assert "not accepted" in row.detail
    for one in [*fill, full]:
        one.close()


def test_an_early_refusal_of_a_long_request_is_read(serve, run):
    def talk(connection, nth):
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        time.sleep(0.2)

    row = run(serve(talk).url).one(ids=range(1_000_000, 1_500_000))
    assert (row.error, row.http_status) in (("rejected", 413), ("cut", None))  # a reset may overtake the answer


def test_a_server_killed_in_mid_stream(fake_server: StartServer, run):
    server = fake_server("--ttft", "0.01", "--itl", "0.05")
    sender = run(server.url)
    for _ in range(20):
        sender.send(output_tokens=10_000)
    sender.until(lambda: sender.all_have(2), "all stream")
    server.process.send_signal(signal.SIGKILL)
    rows = sender.wait()
    assert {row.error for row in rows} == {"cut"}
    assert all(len(row.chunk_ns) >= 2 for row in rows)
    assert sender.one().error == "connect"


def test_unasked_bytes_on_an_idle_connection_drop_it(serve, run):
    server = serve(repeat(answer() + b"HTTP/1.1 200 OK\r\n"))
    sender = run(server.url)
    for _ in range(2):
        assert sender.one().error is None
        gevent.sleep(0.05)
    assert server.connections == 2


def test_an_end_that_was_none_is_not_believed(serve, run):
    """A body may hold the very bytes we take for the end; the framing decides, before the row is written."""
    fake_end = b"data: [DONE]\n\n\r\n0\r\n\r\n"

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(HEAD + b"400\r\n" + fake_end)
        time.sleep(0.3)

    row = run(serve(talk).url, stall_s=1).one()
    assert row.error == "cut"


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (chunk(b"data: [DONE]\n\n") + b"0\r\n\r\nHTTP/1.1 200 OK", None),
        (b"no size\r\n", "protocol"),
        (chunk(b"data: <html>\n\n"), "protocol"),
    ],
)
def test_an_end_that_only_parsing_finds_frees_its_slot(serve, run, end, error):
    """The last bytes do not look like an end, and the server says nothing more: neither a stall nor a kept slot."""

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(HEAD)
        for _ in range(3):
            connection.sendall(chunk(b'data: {"choices":[{"text":"a"}]}\n\n'))
            time.sleep(0.05)
        connection.sendall(chunk(b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\n'))
        time.sleep(0.05)
        connection.sendall(end)
        connection.recv(1)  # until the client hangs up

    sender = run(serve(talk).url, stall_s=5)
    row = sender.one()
    assert (row.error, len(row.chunk_ns)) == (error, 4)
    assert row.finished_ns - row.chunk_ns[-1] < 1_000_000_000, "when its last bytes came"
    sender.client.parse_queue.settle()
    assert (len(sender.rows), sender.client.in_flight) == (1, 0)
    assert not sender.client.pool.idle[sender.client._endpoints[0]], "what is out of step is not used again"


def test_a_cut_is_stamped_when_it_came_not_when_it_was_parsed(serve, run, monkeypatch):
    cut_ns = []
    parse = InFlight.parse

    def slow(stream, **how):
        if cut_ns:
            time.sleep(0.5)
        parse(stream, **how)

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(HEAD + chunk(b'data: {"choices":[{"text":"a"}]}\n\n'))
        time.sleep(0.3)
        cut_ns.append(time.monotonic_ns())

    monkeypatch.setattr(InFlight, "parse", slow)
    sender = run(serve(talk).url)
    row = sender.one()
    assert row.error == "cut"
    assert 0 <= row.finished_ns + sender.client.start_mono_ns - cut_ns[0] < 400_000_000


def test_ten_thousand_idle_connections_cost_no_comparison_each(run):
    """A burst leaves them all idle at once; looking each up among the others held up the stamps for seconds."""
    compared = 0

    class Counted(Connection):
        __hash__ = Connection.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return self is other

    client = run("http://127.0.0.1:9/v1").client
    (target,) = client._endpoints
    connections = [Counted(client, target) for _ in range(2000)]
    for connection in connections:
        connection.used = True
        client.idle(connection)
    for connection in connections[500:1000]:
        client.drop(connection)
        client.drop(connection)  # twice is no error
    assert len(client.pool.idle[target]) == 1500
    taken = client.pool.take(target, time.monotonic_ns())
    assert taken is connections[-1], "the one used last"
    client.pool.close_idle(time.monotonic_ns() + 10**11)
    assert not client.pool.idle[target]
    assert compared < 10_000


def test_aborted_requests_are_rows(faulty, run):
    sender = run(faulty.url)
    for _ in range(3):
        sender.send(payload=prepare(request(), spec_of(extra_body={"fault": "stall"})))
    sender.until(lambda: sender.all_have(2), "all stream")
    sender.client.abort("stopped", "enough")
    rows = sender.wait()
    assert [(row.error, row.detail, len(row.chunk_ns)) for row in rows] == [("stopped", "enough", 2)] * 3


def test_the_key_is_in_no_row(serve, run):
    body = b'{"error": {"message": "bad key sk-very-secret"}}'
    data = b"HTTP/1.1 401 X\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    row = run(serve(once(data)).url, api_key="sk-very-secret").one()
    assert row.error == "auth"
    assert "sk-very" not in row.detail


# -- what a plan or a run may ask for ---------------------------------------------------------------------------------


def test_a_request_may_ask_for_its_own_model():
    assert body_of(prepare(request(model="lora-1"), spec_of(model="m")))["model"] == "lora-1"
    assert body_of(prepare(request(), spec_of(model="m")))["model"] == "m"


WHOLE = {
    "object": "text_completion", "choices": [{"index": 0, "text": "a b c", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 3},
}  # fmt: skip


def whole(body):
    raw = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw)


def test_without_a_stream_only_the_end_is_timed(serve, run):
    got = []

    def talk(connection, nth):
        got.append(read_request(connection))
        time.sleep(0.3)
        connection.sendall(whole(WHOLE))

    sender = run(serve(talk).url, stream=False, stall_s=0.1)
    row = sender.one(payload=prepare(request(), spec_of(stream=False)))
    head, _, body = got[0].partition(b"\r\n\r\n")
    assert b"Accept: application/json" in head
    assert json.loads(body)["stream"] is False
    assert "stream_options" not in json.loads(body)
    assert (row.error, row.output_tokens, row.finish_reason) == (None, 3, "length"), row.detail
    assert not row.chunk_ns, "no ttft was measured, so none is written"
    assert row.chunk_tokens is None
    assert row.finished_ns - row.sent_ns >= 0.3e9, "silence until it is done is not a stall"


def test_without_a_stream_an_answer_must_still_be_one(serve, run):
    for body, error in (({"error": {"message": "no"}}, "server"), ({"choices": []}, "protocol"), ([], "protocol")):
        assert run(serve(repeat(whole(body))).url, stream=False).one().error == error
    row = run(serve(once(whole(WHOLE)[:-5])).url, stream=False).one()
    assert (row.error, row.output_tokens) == ("cut", None)


def test_extra_headers_are_sent(serve, run):
    got = []

    def talk(connection, nth):
        got.append(read_request(connection))
        connection.sendall(answer())

    run(serve(talk).url, headers={"X-Tenant": "a b", "x-empty": ""}).one()
    lines = got[0].partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert "X-Tenant: a b" in lines
    assert "x-empty: " in lines


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["Authorization: Bearer sk-123456789"], "HARNESS_API_KEY"), (["api-key: abc"], "HARNESS_API_KEY"),
        (["X-API-Key: abc"], "HARNESS_API_KEY"), (["cookie: a=b"], "HARNESS_API_KEY"),
        (["X-Auth-Token: abc"], "HARNESS_API_KEY"), (["X-Thing: Bearer abc"], "HARNESS_API_KEY"),
        (["X-Thing: sk-proj-123456789"], "HARNESS_API_KEY"), (["Ocp-Apim-Subscription-Key: abc"], "--header-env"),
        (["x-functions-key: abc"], "--header-env"), (["X-Thing: hf_abc123456789"], "--header-env"),
        (["X-Thing: id=AKIAIOSFODNN7123456789"], "--header-env"), (["X-JWT: abc"], "--header-env"),
        (["X-Who: eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.123456789"], "--header-env"),
        (["X-Proxy: http://u:123456789@h"], "--header-env"), (["Host: elsewhere"], "client itself"),
        (["content-length: 0"], "client itself"), (["no colon"], "Name: value"), (["a b: c"], "not a header name"),
        ([": c"], "not a header name"), (["X-A: b\r\nX-B: c"], "one line"), (["X-A: \x00"], "one line"),
        (["X-A: ü"], "ASCII"), (["X-A: 1", "x-a: 2"], "twice"),
    ],
)  # fmt: skip
def test_headers_that_must_not_be(lines, words):
    with pytest.raises(UsageError, match=words) as e:
        parse_headers(lines)
    assert "abc" not in str(e.value)
    assert "123456789" not in str(e.value)


def test_headers_are_checked_where_they_are_sent_too():
    with pytest.raises(UsageError):
        Client(spec_of("http://127.0.0.1:9/v1", headers={"X-A": "b\r\nX-B: c"}), lambda row: None)


def test_a_client_hangs_up_when_the_plan_says(faulty, serve, run):
    closed = threading.Event()

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(answer()[: len(HEAD) + 70])
        connection.recv(1)  # the end, when the client hangs up
        closed.set()

    sender = run(serve(talk).url)
    sender.send(cancel_after_ns=200_000_000)
    row = sender.wait()[0]
    assert (row.error, "hung up 0.2 s" in row.detail) == ("cancelled", True)
    assert 0.2e9 <= row.finished_ns - row.sent_ns < 1e9
    assert len(row.chunk_ns) == 1, "what came before is kept"
    assert row.output_tokens is None
    assert closed.wait(120), "the server sees it"
    sender = run(faulty.url)
    sender.send(cancel_after_ns=5_000_000_000)
    row = sender.wait()[0]
    assert row.error is None, "an answer that is done before is a success"
    assert not sender.client._active


def test_a_hang_up_before_the_connection_is_there(run):
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    fill = [socket.socket() for _ in range(8)]
    for one in fill:
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
    sender = run(f"http://127.0.0.1:{port}/v1")
    sender.send(cancel_after_ns=100_000_000)
    assert sender.wait()[0].error == "cancelled"
    for one in [*fill, full]:
        one.close()


BUSY = b"HTTP/1.1 503 X\r\nContent-Length: 4\r\n\r\nbusy"


def test_no_retries_unless_asked_for(serve, run):
    server = serve(repeat(BUSY))
    row = run(server.url).one()
    assert (row.error, row.retries, row.http_status) == ("overloaded", 0, 503)


def test_retries_are_counted_and_take_time(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 0.1)
    calls = []

    def talk(connection, nth):
        while read_request(connection):
            calls.append(time.monotonic())
            connection.sendall(BUSY if len(calls) < 4 else answer())

    sender = run(serve(talk).url, retries=5)
    ends = []
    sender.send(ended=ends.append)
    row = sender.wait()[0]
    assert (row.error, row.retries, row.output_tokens, len(calls), len(ends)) == (None, 3, 2, 4, 1)
    assert row.finished_ns - row.sent_ns >= 0.7e9, "0.1 + 0.2 + 0.4 s of waiting are in every latency"
    assert row.chunk_ns[0] - row.sent_ns >= 0.7e9
    assert np.diff(calls)[0] >= 0.1
    assert [t.in_flight for t in sender.client._endpoints] == [0]


def test_retries_come_to_an_end_and_only_for_what_may_pass(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 0.01)
    chunked = b"HTTP/1.1 429 X\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbusy\r\n0\r\n\r\n"
    for data, error, retries in (
        (chunked, "overloaded", 2), (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "server", 0),
        (answer()[:200], "cut", 0), (b"HTTP/1.1 400 X\r\nContent-Length: 0\r\n\r\n", "rejected", 0),
    ):  # fmt: skip
        row = run(serve(once(data)).url, retries=2).one()
        assert (row.error, row.retries) == (error, retries), row.detail
    dead = socket.create_server(("127.0.0.1", 0))
    port = dead.getsockname()[1]
    dead.close()
    row = run(f"http://127.0.0.1:{port}/v1", retries=2).one()
    assert (row.error, row.retries) == ("connect", 2)


def test_a_busy_server_may_be_asked_more_often_than_one_that_is_not_there(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 0.01)
    row = run(serve(repeat(BUSY)).url, busy_retries=3).one()
    assert (row.error, row.retries) == ("overloaded", 3)
    row = run(serve(once(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")).url, busy_retries=3).one()
    assert (row.error, row.retries) == ("server", 0)
    row = run("http://127.0.0.1:1/v1", busy_retries=3).one()
    assert (row.error, row.retries) == ("connect", 0)


def test_a_retry_may_go_to_another_server(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 0.01)
    row = run(serve(repeat(BUSY)).url, serve(repeat(answer())).url, retries=1).one()
    assert (row.error, row.retries, row.replica) == (None, 1, 1)


def test_what_waits_for_its_retry_can_be_stopped_cancelled_and_timed_out(serve, run, monkeypatch):
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 60.0)
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_MOST_S", 60.0)
    url = serve(repeat(BUSY)).url
    sender = run(url, retries=1)
    sender.send()
    sender.send(cancel_after_ns=1_000_000_000)
    sender.until(lambda: sender.client.in_flight == 1, "one is cancelled")
    sender.client.abort("stopped", "enough")
    assert [(row.error, row.retries) for row in sender.wait()] == [("stopped", 1), ("cancelled", 1)]
    assert [t.in_flight for t in sender.client._endpoints] == [0]
    row = run(url, retries=1, timeout_s=1.0).one()
    assert (row.error, row.retries) == ("timeout", 1)


def test_servers_in_turn_and_by_session(serve, run):
    urls = [serve(repeat(answer())).url for _ in range(3)]
    sender = run(*urls, balance="round-robin")
    for _ in range(7):
        sender.one()
    assert [row.replica for row in sender.rows] == [0, 1, 2, 0, 1, 2, 0]
    sender = run(*urls, balance="session")
    for session in (0, 1, 1, 5, 0, 4, 3):
        sender.one(session=session)
    assert [row.replica for row in sender.rows] == [0, 1, 1, 2, 0, 1, 0]
    with pytest.raises(UsageError, match="round-robin"):
        run(*urls, balance="fair")


# -- time and memory --------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_known_ttft_and_itl_are_measured(fake_server: StartServer, run):
    server = fake_server("--ttft", "0.1", "--itl", "0.02")
    sender = run(server.url)
    sender.client.open_connections(8)
    for _ in range(8):
        sender.send(output_tokens=20)
    rows = sender.wait()
    assert [list(row.chunk_tokens) for row in rows] == [[1] * 20] * 8
    ttft = [(row.chunk_ns[0] - row.sent_ns) / 1e9 for row in rows]
    itl = np.diff([row.chunk_ns for row in rows]) / 1e9
    assert all(t >= 0.099 for t in ttft)
    assert np.median(ttft) < 0.15
    assert np.median(itl) == pytest.approx(0.02, rel=0.25)
    # Against the server's own notes of when it handed each chunk to the kernel, on the same clock of this machine.
    truth = {tuple(entry["chunk_ns"]) for entry in server.truth()}
    assert len(truth) == 8
    seen = sorted(row.chunk_ns[0] + sender.client.start_mono_ns for row in rows)
    delay = np.array(seen) - sorted(chunks[0] for chunks in truth)
    assert delay.min() > -2e6, "nothing is seen before it was sent"
    assert np.median(delay) < 10e6


def test_a_long_answer_is_parsed_on_the_way(serve, run):
    """100,000 tokens are several MB: reads are given back long before the end."""
    pause = threading.Event()
    part = b"".join(chunk(b'data: {"choices":[{"text":"%b"}]}\n\n' % (b"x" * 100)) for _ in range(1000))

    def talk(connection, nth):
        read_request(connection)
        connection.sendall(HEAD)
        for _ in range(100):
            connection.sendall(part)
        pause.wait(120)
        connection.sendall(answer(0)[len(HEAD) :])

    sender = run(serve(talk).url)
    sender.send()
    (stream,) = sender.client._active
    sender.until(lambda: len(stream.response._completion._stamps) >= 99_000, "parsed as it comes")
    sender.until(lambda: stream.buffer.size < 100_000, "of 14 MB")
    pause.set()
    assert len(sender.wait()[0].chunk_ns) == 100_000


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_requests_leave_no_garbage_and_no_descriptors(serve, run, monkeypatch):
    """The collector is off during a run: nothing a request leaves behind may need it."""
    monkeypatch.setattr("harness.scenarios.client.client.RETRY_S", 0.01)
    closing = HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + answer()[len(HEAD) :]
    sender = run(serve(once(closing)).url, serve(once(BUSY)).url, retries=1, balance="round-robin")
    sender.one()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    fds = open_files()
    try:
        for i in range(20):
            sender.one(cancel_after_ns=None if i % 3 else 1_000_000 * (1 + i * 1000))
        gc.collect()
        ours = [o for o in gc.garbage if type(o).__module__.startswith("scenarios")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert ours == []
    assert open_files() <= fds + 4  # the server's threads may still hold one or two


# -- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", "key.pem", "-out", "cert.pem"],
            cwd=folder, check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no openssl to make a certificate with: {e}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, str(folder / "cert.pem")


def test_tls_streams_and_keeps_the_connection(serve, run, certificate):
    context, ca = certificate
    server = serve(repeat(answer(300)), tls=context)
    sender = run(server.url, tls_ca=ca)
    assert sender.client.open_connections(1) is None
    for _ in range(3):
        row = sender.one(ids=range(1_000_000, 1_100_000))
        assert (row.error, row.output_tokens, len(row.chunk_ns)) == (None, 300, 300), row.detail
    assert server.connections == 1


def test_questions_before_the_run_trust_the_same_file(serve, certificate, monkeypatch, tmp_path):
    context, ca = certificate

    def talk(connection, nth):
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    monkeypatch.setattr(probe, "_TLS", probe._TLS)
    server = serve(talk, tls=context)
    with pytest.raises(ServerError, match="certificate"):
        probe.fetch(server.url, None)
    probe.trust(Path(ca))
    assert probe.fetch(server.url, None) == b"{}"
    (tmp_path / "none.pem").write_text("")
    with pytest.raises(UsageError, match="trusted certificates"):
        probe.trust(tmp_path / "none.pem")


def test_tls_without_trust_is_an_error_of_its_own(serve, run, certificate):
    context, _ = certificate
    row = run(serve(repeat(answer()), tls=context).url).one()
    assert row.error == "tls"
    assert "certificate" in row.detail


def test_tls_against_a_server_without_it_and_the_reverse(serve, run, certificate):
    context, ca = certificate
    plain = serve(once(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"))
    row = run(plain.url.replace("http:", "https:"), tls_ca=ca, connect_timeout_s=0.3).one()
    assert row.error == "tls", "it waits for a request, we for a handshake"
    loud = serve(lambda connection, nth: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
    assert run(loud.url.replace("http:", "https:"), tls_ca=ca).one().error == "tls"
    encrypted = serve(repeat(answer()), tls=context)
    row = run(encrypted.url.replace("https:", "http:"), stall_s=1).one()
    assert row.error in ("protocol", "cut")


def test_tls_cut_in_mid_stream(serve, run, certificate):
    context, ca = certificate
    row = run(serve(once(answer(5)[:-60]), tls=context).url, tls_ca=ca).one()
    assert (row.error, len(row.chunk_ns)) == ("cut", 5)
