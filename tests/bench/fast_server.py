"""A known-truth server that outruns every client: OpenAI-compatible streams on an exact schedule, one event per token.

Start it::

    python tests/bench/fast_server.py --port 0 --ttft 0.02 --itl 0.01

It prints ``ready PORT`` and serves chat completions and completions, streamed (256-byte HTTP chunks, as uvicorn writes
them) or not, until standard input ends. Several processes can share a port (SO_REUSEPORT). It is plain Python on epoll,
which was measured to be enough (a loop like its hot path sent 295,000 chunks/s to a reader on another core): bytes are
rendered before, one millisecond tick (a Linux timerfd) writes to every stream that is due, and the kernel's own send is
nearly all of the cost. Streams in one slot of the ring are due together: a token costs one turn of a loop, send, stamp.

Commands on standard input, one line each; each is answered by one line of JSON:

- ``mark [N SECONDS]``: forget what was seen so far. Of the next N requests, hold back the k-th by k / N of these
  seconds: the streams of a closed loop, which all begin at once, are then out of step, as those of many users are.
- ``pace TTFT ITL``: new times in seconds, when no stream is open. ITL 0: each answer at once, a write per event.
- ``count``: the counters alone.
- ``report FOLDER``: what was seen since the mark. Counters in the line; arrays of int64 in FOLDER, one file each:
  ``arrival_ns`` (CLOCK_MONOTONIC, when the kernel got the last of the request), ``ttft_ns`` and ``itl_ns`` (to and
  between its own writes: the truth), ``duration_ns`` beside ``nominal_ns`` of each finished stream, ``late_ns`` (each
  tick's end against its time) and ``series`` (rows of time, CPU ns, events, requests, open streams; every 100 ms while
  streams are open).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import select
import socket
import time
from array import array
from collections import defaultdict
from collections.abc import Callable
from operator import sub
from pathlib import Path

from harness.cluster.engines.fake.server import SO_TIMESTAMPNS, came_ns

TICK_NS = 1_000_000
_SERIES_TICKS = 100
_FLUSH_BYTES = 1 << 20
_EVENT_BYTES = 250  # with "data: " and the blank line, as vLLM's own for a common model name
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:completion_)?tokens" *: *(\d+)')
_STREAM = re.compile(rb'"stream" *: *true')

now = time.monotonic_ns


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(value: dict[str, object]) -> bytes:
    """One server-sent event as one HTTP chunk."""
    return chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


class Words:
    """Every byte that is ever sent, rendered before; one for each endpoint."""

    head = (
        b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\n"
        b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    done = chunk(b"data: [DONE]\n\n")
    end = b"0\r\n\r\n"

    def __init__(self, chat: bool, model: str, input_tokens: int) -> None:
        self.chat, self.input_tokens = chat, input_tokens
        kind = ("chatcmpl", "chat.completion.chunk") if chat else ("cmpl", "text_completion")
        self.base = {"id": f"{kind[0]}-8f2b7d3f0c4e4a7b9b1f2d3e4f5a6b7c", "object": kind[1], "created": 1700000000}
        self.base["model"] = model
        role = self._token({"role": "assistant", "content": ""}, None) if chat else b""
        short = len(self._token(self._text(" t"), None)) - len(chunk(b"x" * _EVENT_BYTES))
        word = " t" + "o" * max(-short, 0)
        self.token = self._token(self._text(word), None)
        self.first = role + self.token
        self.last = self._token(self._text(word), "length")
        self._closing: dict[int, bytes] = {}

    def _text(self, text: str) -> object:
        return {"content": text} if self.chat else text

    def _token(self, text: object, finish: str | None) -> bytes:
        said = {"delta": text} if self.chat else {"text": text}
        return event({**self.base, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]})

    def usage(self, tokens: int) -> dict[str, int]:
        """The books of one answer."""
        total = self.input_tokens + tokens
        return {"prompt_tokens": self.input_tokens, "completion_tokens": tokens, "total_tokens": total}

    def closing(self, tokens: int) -> bytes:
        """The usage event that follows the last token."""
        if tokens not in self._closing:
            self._closing[tokens] = event({**self.base, "choices": [], "usage": self.usage(tokens)})
        return self._closing[tokens]

    def whole(self, tokens: int) -> bytes:
        """The answer to a request that did not ask for a stream."""
        text = " t" * tokens
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": "length"}
        return plain({**self.base, "choices": [choice], "usage": self.usage(tokens)})


def plain(value: object, status: str = "200 OK") -> bytes:
    """A JSON answer with a Content-Length."""
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        status.encode(), len(body), body,
    )  # fmt: skip


class Connection:
    """One keep-alive connection, and the stream on it while ``tokens`` is not 0."""

    __slots__ = (
        "arrival_ns", "buffer", "came_ns", "ended", "first_tick", "pending", "send", "sock", "stamps", "tokens",
        "words",
    )  # fmt: skip

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.send: Callable[[bytes], int] = sock.send
        self.buffer = b""
        self.pending = bytearray()  # what the socket did not take
        self.stamps: list[int] = []
        self.tokens = 0
        self.ended = False
        self.first_tick = self.arrival_ns = self.came_ns = 0
        self.words: Words

    def queue(self, data: bytes) -> int:
        """In place of ``send`` while the socket takes nothing."""
        self.pending += data
        return len(data)


class Seen:
    """What was seen since the mark."""

    def __init__(self) -> None:
        self.events = self.requests = self.finished = self.blocked = self.dropped = 0
        self.since_ns, self.cpu_ns = now(), time.process_time_ns()
        self.arrival_ns, self.ttft_ns, self.itl_ns = array("q"), array("q"), array("q")
        self.duration_ns, self.nominal_ns, self.late_ns, self.series = array("q"), array("q"), array("q"), array("q")

    def write(self, folder: Path) -> None:
        """Write the arrays to files in ``folder``."""
        for name, value in vars(self).items():
            if isinstance(value, array):
                (folder / name).write_bytes(value.tobytes())

    def counters(self) -> dict[str, int]:
        """The counters, and the CPU and time since the mark."""
        counters = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {**counters, "cpu_ns": time.process_time_ns() - self.cpu_ns, "wall_ns": now() - self.since_ns}


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Server:
    """One process: an epoll loop, a tick, and a ring with one slot for each tick of an inter-token gap."""

    def __init__(self, listener: socket.socket, ttft_s: float, itl_s: float, model: str, input_tokens: int) -> None:
        self.listener, self.model = listener, model
        self.words = {chat: Words(chat, model, input_tokens) for chat in (False, True)}
        self.connections: dict[int, Connection] = {}
        self.open = 0
        self.staggered, self.stagger_ns = 0, 0
        self.seen = Seen()
        self.pace(ttft_s, itl_s)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.clock = self.libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self.ticking = False
        self.tick = 0
        self.epoll = select.epoll()
        self.epoll.register(listener, select.EPOLLIN)
        self.epoll.register(self.clock, select.EPOLLIN)
        self.epoll.register(0, select.EPOLLIN)
        self.commands = b""

    def pace(self, ttft_s: float, itl_s: float) -> None:
        """Set the times of all streams."""
        if self.open:
            raise ValueError(f"{self.open} streams are open")
        if itl_s > 0 and ttft_s < TICK_NS / 1e9:
            raise ValueError("paced streams need a TTFT of a tick (1 ms) at least")
        self.ttft_ns = round(ttft_s * 1e9)
        self.itl_ticks = round(itl_s * 1e9 / TICK_NS)
        self.ring: list[dict[Connection, Words]] = [{} for _ in range(max(self.itl_ticks, 1))]
        self.starting: defaultdict[int, list[Connection]] = defaultdict(list)
        self.ending: defaultdict[int, list[Connection]] = defaultdict(list)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until standard input ends."""
        poll, connections, clock, listener = self.epoll.poll, self.connections, self.clock, self.listener.fileno()
        while True:
            for fd, what in poll():
                connection = connections.get(fd)
                if connection is not None:
                    if what & select.EPOLLOUT:
                        self.flush(connection)
                    if what & ~select.EPOLLOUT:
                        self.read(connection)
                elif fd == clock:
                    os.read(clock, 8)  # only that re-arms it
                elif fd == listener:
                    self.accept()
                elif fd == 0 and not self.obey():
                    return
            if self.ticking:
                self.advance()

    def advance(self) -> None:
        """Every tick whose time has come."""
        while (self.tick + 1) * TICK_NS <= now():
            self.tick += 1
            tick = self.tick
            slot, ending = self.ring[tick % len(self.ring)], self.ending.pop(tick, ())
            for connection in ending:
                slot.pop(connection, None)
            self.write_tokens(slot)
            for connection in ending:
                self.finish(connection)
            for connection in self.starting.pop(tick, ()):
                self.begin(connection, slot)
            self.seen.late_ns.append(now() - tick * TICK_NS)
            if tick % _SERIES_TICKS == 0:
                self.sample()
        if not self.open:
            self.sample()
            self.wake(ticking=False)

    def write_tokens(self, slot: dict[Connection, Words]) -> None:
        """One token on each stream of a slot: the hot path."""
        trouble = []
        for connection, words in slot.items():
            token = words.token
            try:
                sent = connection.send(token)
            except BlockingIOError:
                sent = 0
            except OSError:
                sent = -1
            connection.stamps.append(now())
            if sent != len(token):
                trouble.append((connection, token, sent))
        self.seen.events += len(slot)
        for connection, token, sent in trouble:
            self.not_taken(connection, token, sent)

    def write(self, connection: Connection, data: bytes) -> None:
        """Write what is not a token of the hot path."""
        try:
            sent = connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = -1
        if sent != len(data):
            self.not_taken(connection, data, sent)

    def not_taken(self, connection: Connection, data: bytes, sent: int) -> None:
        """The client does not read (or is gone: ``sent`` -1): keep the rest until it does."""
        if sent < 0:
            self.drop(connection)
            return
        self.seen.blocked += 1
        connection.pending += data[sent:]
        connection.send = connection.queue
        self.epoll.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)

    def flush(self, connection: Connection) -> None:
        """The socket takes more."""
        try:
            sent = connection.sock.send(connection.pending[:_FLUSH_BYTES])
        except BlockingIOError:
            return
        except OSError:
            self.drop(connection)
            return
        del connection.pending[:sent]
        if not connection.pending:
            connection.send = connection.sock.send
            self.epoll.modify(connection.sock, select.EPOLLIN)
            if connection.ended:
                self.close_books(connection)

    def sample(self) -> None:
        """One row of the series."""
        seen = self.seen
        seen.series.extend((now(), time.process_time_ns(), seen.events, seen.requests, self.open))

    def wake(self, *, ticking: bool) -> None:
        """Have the clock tick each millisecond, or not."""
        self.ticking = ticking
        self.tick = now() // TICK_NS
        first = (self.tick + 1) * TICK_NS if ticking else 0
        spec = _Itimerspec(_Timespec(0, TICK_NS), _Timespec(first // 10**9, first % 10**9))
        self.libc.timerfd_settime(self.clock, 1, ctypes.byref(spec), None)

    # -- one stream ---------------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """Take every connection that waits."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            self.connections[sock.fileno()] = Connection(sock)
            self.epoll.register(sock, select.EPOLLIN)

    def read(self, connection: Connection) -> None:
        """Collect a whole request, then answer it."""
        try:
            data, said, _, _ = connection.sock.recvmsg(65536, 64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(connection)
            return
        connection.came_ns = came_ns(said)
        connection.buffer += data
        if not connection.tokens:
            self.answer(connection)

    def answer(self, connection: Connection) -> None:
        """Answer the request in the buffer, if it is whole."""
        head, found, body = connection.buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if not found or len(body) < size:
            return
        connection.buffer = body[size:]
        if head.startswith(b"POST") and (b"/completions " in head[:100]):
            self.complete(connection, body[:size], chat=b"/chat/" in head[:100])
        elif b"/models" in head[:100]:
            self.write(connection, plain({"object": "list", "data": [{"id": self.model, "object": "model"}]}))
        elif b"/health" in head[:100]:
            self.write(connection, plain({}))
        else:
            self.write(connection, plain({"error": "not found"}, "404 Not Found"))

    def complete(self, connection: Connection, body: bytes, *, chat: bool) -> None:
        """Set the times of one answer."""
        seen, found = self.seen, _TOKENS.search(body)
        connection.arrival_ns = connection.came_ns
        connection.tokens = int(found[1]) if found else 16
        connection.words = self.words[chat]
        connection.stamps = []
        connection.ended = False
        seen.requests += 1
        seen.arrival_ns.append(connection.arrival_ns)
        self.open += 1
        if not self.ticking:
            self.wake(ticking=True)
        due_ns = connection.arrival_ns + self.ttft_ns
        if seen.requests <= self.staggered:
            due_ns += seen.requests * self.stagger_ns // self.staggered
        if not _STREAM.search(body):
            due_ns += (connection.tokens - 1) * self.itl_ticks * TICK_NS
            connection.stamps.append(0)  # there is nothing to time
        else:
            self.write(connection, Words.head)
        connection.first_tick = max(-(-due_ns // TICK_NS), self.tick + 1)
        if self.ttft_ns:
            self.starting[connection.first_tick].append(connection)
        else:
            self.begin(connection, self.ring[connection.first_tick % len(self.ring)])

    def begin(self, connection: Connection, slot: dict[Connection, Words]) -> None:
        """The first token, and the times of all others."""
        if not connection.tokens:
            return  # the client went away
        words, tokens = connection.words, connection.tokens
        if connection.stamps:
            self.write(connection, words.whole(tokens))
            self.seen.events += tokens
            connection.ended = True
            if connection.tokens and not connection.pending:
                self.close_books(connection)
            return
        if tokens > 1:
            self.write(connection, words.first)
            connection.stamps.append(now())
            self.seen.events += 1
        if not connection.tokens:
            return  # the client went away
        if tokens == 1 or not self.itl_ticks:
            for _ in range(tokens - 2):
                self.write(connection, words.token)
                self.seen.events += 1
            self.finish(connection)
        else:
            self.ending[connection.first_tick + (tokens - 1) * self.itl_ticks].append(connection)
            slot[connection] = words

    def finish(self, connection: Connection) -> None:
        """The last token and the end, in the writes that vLLM behind uvicorn makes of them."""
        if not connection.tokens:
            return
        words = connection.words
        self.write(connection, words.last)
        connection.stamps.append(now())
        self.seen.events += 1
        for data in (words.closing(connection.tokens), words.done, words.end):
            self.write(connection, data)
        connection.ended = True
        if connection.tokens and not connection.pending:
            self.close_books(connection)

    def close_books(self, connection: Connection) -> None:
        """The client's socket has taken the whole answer (or the client is gone)."""
        seen, stamps, tokens = self.seen, connection.stamps, connection.tokens
        self.open -= 1
        connection.tokens = 0
        if not connection.ended:
            seen.dropped += 1
            return
        seen.finished += 1
        if stamps[0] and self.itl_ticks:
            seen.ttft_ns.append(stamps[0] - connection.arrival_ns)
            seen.itl_ns.extend(map(sub, stamps[1:], stamps))
            due_ns = (connection.first_tick + (tokens - 1) * self.itl_ticks) * TICK_NS
            seen.nominal_ns.append(due_ns - connection.arrival_ns)
            seen.duration_ns.append(now() - connection.arrival_ns)
        if connection.buffer:
            self.answer(connection)

    def drop(self, connection: Connection) -> None:
        """The connection is gone."""
        if self.connections.pop(connection.sock.fileno(), None) is None:
            return
        if connection.tokens:
            connection.ended = False
            for slot in self.ring:
                slot.pop(connection, None)
            self.close_books(connection)
        connection.sock.close()

    # -- commands -----------------------------------------------------------------------------------------------------

    def obey(self) -> bool:
        """Carry out what standard input says; False when it ended."""
        data = os.read(0, 4096)
        *lines, self.commands = (self.commands + data).split(b"\n")
        for line in lines:
            word, *arguments = line.decode().split()
            answer: dict[str, object] = {}
            if word == "mark":
                self.seen = Seen()
                self.staggered = int(arguments[0]) if arguments else 0
                self.stagger_ns = int(float(arguments[1]) * 1e9) if arguments else 0
            elif word == "pace":
                self.pace(float(arguments[0]), float(arguments[1]))
            elif word in ("count", "report"):
                answer = {**self.seen.counters(), "open": self.open}
                if arguments:
                    self.seen.write(Path(arguments[0]))
            else:
                raise ValueError(f"unknown command {word!r}")
            print(json.dumps(answer), flush=True)
        return bool(data)


def main() -> None:
    """Parse arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0: any free port (default)")
    parser.add_argument("--ttft", type=float, default=0.02, help="seconds to the first token")
    parser.add_argument("--itl", type=float, default=0.01, help="seconds between tokens, whole milliseconds")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--input-tokens", type=int, default=128, help="what usage says of every prompt")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", args.port))
    listener.listen(16384)
    listener.setblocking(False)
    server = Server(listener, args.ttft, args.itl, args.model, args.input_tokens)
    gc.disable()  # no cycles are made, and a collection would be a pause in every stream
    print(f"ready {listener.getsockname()[1]}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
