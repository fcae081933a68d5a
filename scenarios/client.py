"""The streaming client: sends prepared requests and turns each answer into a result row.

All bytes are prepared before the clock starts (`prepare`), connections are opened before it
(`Client.open_connections`), and while answers stream in nothing is parsed: reads are stamped and kept, and parsed when
the event loop has nothing else to do. One sweep serves all timeouts. There are no retries: what happened to a request
is what the row says.

Not followed on purpose: redirects and proxy settings of the environment. A load test must know where its load goes.
"""

from __future__ import annotations

import resource
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns
from typing import Any
from urllib.parse import urlsplit

import gevent
import gevent.monkey
import msgspec

from harness import __version__
from harness.errors import UsageError
from harness.plan import Request
from harness.results import Result
from scenarios.completion import clean
from scenarios.connection import UNPARSED_LIMIT, Connection, Stream

_getaddrinfo: Any = gevent.monkey.get_original("socket", "getaddrinfo")
_SSLContext: Any = gevent.monkey.get_original("ssl", "SSLContext")

ENDPOINTS = {"completions": "/completions", "chat": "/chat/completions"}
IDLE_LIMIT_S = 4.0
"""A connection idle for longer is not used again: uvicorn closes at 5 s, and a request sent into a close is lost."""
SWEEP_S = 0.25
# Answers that may wait to be parsed; beyond that one is parsed on the spot for each that ends.
_BACKLOG, _BACKLOG_BYTES = 4096, 128 * 2**20
_OPENING = 128  # connections being opened at the same time: below any server's listen backlog


def prepare(request: Request, *, endpoint: str, model: str, extra_body: Mapping[str, object] | None = None) -> bytes:
    """The bytes of one request from its Content-Length header on; `Target.head` comes before them.

    Generation is greedy, and forced to ``output_tokens`` when the plan has them. ``extra_body`` fields win over ours; a
    null there removes the field (for servers that refuse one they do not know).

    Raises `UsageError` when the endpoint cannot take this kind of prompt.
    """
    body: dict[str, object] = {"model": model}
    if endpoint == "completions":
        if request.messages is not None:
            raise UsageError(f"request {request.request_id} holds chat messages: use the chat endpoint")
        body["prompt"] = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_text
    elif endpoint == "chat":
        body["messages"] = _messages(request)
    else:
        raise UsageError(f"unknown endpoint {endpoint!r}: valid: {', '.join(ENDPOINTS)}")
    if request.output_tokens is not None:
        body["max_tokens"] = request.output_tokens
        body["ignore_eos"] = True
    body.update(temperature=0, stream=True, stream_options={"include_usage": True})
    for name, value in (extra_body or {}).items():
        if value is None:
            body.pop(name, None)
        else:
            body[name] = value
    try:
        raw = msgspec.json.encode(body)
    except (TypeError, ValueError) as e:
        raise UsageError(f"request {request.request_id} cannot be written as JSON: {e}") from e
    return b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)


def _messages(request: Request) -> object:
    if request.messages is not None:
        try:
            return msgspec.json.decode(request.messages, type=list[dict[str, Any]])
        except msgspec.DecodeError as e:
            raise UsageError(f"request {request.request_id}: its chat messages are not a JSON list ({e})") from e
    if request.prompt_text is None:
        raise UsageError(
            f"request {request.request_id} is a list of token ids, which the chat endpoint cannot take: "
            "use the completions endpoint, or a plan with text"
        )
    return [{"role": "user", "content": request.prompt_text}]


def raise_fd_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft  # not allowed here (macOS says so of "unlimited"): what we have is what we report
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Target:
    """One server: where it is, the head of every request to it, and its open connections.

    Names are resolved here, once. Raises `UsageError` for a URL that is none or a host without an address.
    """

    def __init__(
        self, index: int, base_url: str, endpoint: str, api_key: str | None, tls: ssl.SSLContext | None
    ) -> None:
        url = urlsplit(base_url)
        try:
            port = url.port or {"http": 80, "https": 443}.get(url.scheme)
        except ValueError:
            port = None
        if not url.hostname or port is None:
            raise UsageError(f"{base_url!r} is not a base URL: give one such as http://host:8000/v1")
        if url.username is not None or url.password is not None:
            raise UsageError("a base URL must not hold a user name or password: set HARNESS_API_KEY instead")
        self.index = index
        self.host = url.hostname
        self.authority = url.netloc
        self.tls = tls if url.scheme == "https" else None
        self.in_flight = 0
        self.idle: list[Connection] = []
        try:
            found = _getaddrinfo(self.host, port, 0, 1)  # SOCK_STREAM
        except OSError as e:
            raise UsageError(f"{base_url}: no address for {self.host!r} ({e.strerror})") from e
        self.addresses = [(family, address) for family, _, _, _, address in found]
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise UsageError("HARNESS_API_KEY holds characters that cannot be in an HTTP header")
        path = url.path.rstrip("/") + ENDPOINTS[endpoint] + (f"?{url.query}" if url.query else "")
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self.authority}",
            f"User-Agent: harness/{__version__}",
            "Accept: text/event-stream",
            "Accept-Encoding: identity",
            "Content-Type: application/json",
            *([f"Authorization: Bearer {api_key}"] if api_key is not None else []),
        ]
        self.head = "".join(f"{line}\r\n" for line in lines).encode("ascii")

    def prefer(self, index: int) -> None:
        """Try the address that just accepted first from now on."""
        if index:
            self.addresses.insert(0, self.addresses.pop(index))

    def take(self, now_ns: int) -> Connection | None:
        """The most recently used idle connection that the server is unlikely to be closing."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.used or now_ns - connection.idle_ns < IDLE_LIMIT_S * 1e9:
                return connection
            connection.close()
        return None


class Client:
    """Sends requests to the least loaded of its servers and hands over a row for each.

    ``record`` gets every row, once, complete (from the event loop, some time after the request ended). Use it from one
    thread. Times in rows count from ``start_mono_ns``, a `time.monotonic_ns` value.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        record: Callable[[Result], None],
        *,
        endpoint: str = "completions",
        timeout_s: float = 600.0,
        stall_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        tls_ca: str | None = None,
        api_key: str | None = None,
    ) -> None:
        if not base_urls:
            raise UsageError("no base URL to send to")
        if endpoint not in ENDPOINTS:
            raise UsageError(f"unknown endpoint {endpoint!r}: valid: {', '.join(ENDPOINTS)}")
        tls = _tls_context(tls_ca) if any(url.startswith("https:") for url in base_urls) else None
        self._targets = [Target(i, url, endpoint, api_key, tls) for i, url in enumerate(base_urls)]
        self._turn = 0
        self._api_key = api_key
        self._record = record
        self._timeout_ns = int(timeout_s * 1e9)
        self._stall_ns = int(stall_s * 1e9)
        self._connect_timeout_ns = int(connect_timeout_s * 1e9)
        self._active: set[Stream] = set()
        self._opening: set[Connection] = set()
        self._unopened: dict[Target, str] = {}
        self._later: deque[Stream] = deque()
        self._later_bytes = 0
        self.start_mono_ns = monotonic_ns()
        self.loop: Any = gevent.get_hub().loop
        self._idle: Any = self.loop.idle()
        self._sweeper: Any = self.loop.timer(SWEEP_S, SWEEP_S)
        self._sweeper.start(self._sweep)

    @property
    def in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._active)

    # -- sending ------------------------------------------------------------------------------------------------------

    def send(self, result: Result, payload: bytes, ended: Callable[[Result], None] | None = None) -> None:
        """Send now. ``result`` (request_id, scheduled_ns) is filled in; ``ended`` is called as soon as the answer
        ended, in the middle of the event loop: it must only note that or wake someone.
        """
        target = self._choose()
        stream = Stream(result, payload, target, self._api_key, ended)
        result.replica = target.index
        result.sent_ns = stream.sent_ns - self.start_mono_ns
        target.in_flight += 1
        self._active.add(stream)
        connection = target.take(stream.sent_ns)
        if connection is None:
            Connection(self, target).open(stream)
        else:
            connection.send(stream)

    def _choose(self) -> Target:
        """Least in flight, ties in turn."""
        targets = self._targets
        if len(targets) == 1:
            return targets[0]
        turn = self._turn
        best = min(range(turn, turn + len(targets)), key=lambda i: targets[i % len(targets)].in_flight) % len(targets)
        self._turn = (best + 1) % len(targets)
        return targets[best]

    def open_connections(self, wanted: int, timeout_s: float | None = None) -> str | None:
        """Open connections until the pools hold ``wanted``, spread over the servers; why some could not be, if so.

        Waits for them at most ``timeout_s`` (default: the connect timeout). A failure here is not an error of the run:
        the requests themselves will tell.
        """
        self._unopened.clear()
        share = [wanted // len(self._targets) + (i < wanted % len(self._targets)) for i in range(len(self._targets))]
        todo = [t for t, n in zip(self._targets, share, strict=True) for _ in range(n - len(t.idle))]
        deadline = monotonic_ns() + (self._connect_timeout_ns if timeout_s is None else int(timeout_s * 1e9))
        while (todo or self._opening) and monotonic_ns() < deadline:
            while todo and len(self._opening) < _OPENING:
                target = todo.pop()
                if target in self._unopened:
                    continue
                connection = Connection(self, target)
                self._opening.add(connection)
                connection.open(None)
            gevent.sleep(0.001)
        for connection in list(self._opening):
            connection.close()
            self._unopened[connection.target] = f"{connection.target.authority}: no connection in time"
        self._opening.clear()
        return clean("; ".join(self._unopened.values())) or None

    # -- called by connections ----------------------------------------------------------------------------------------

    def pool(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        self._opening.discard(connection)
        connection.idle_ns = monotonic_ns()
        connection.target.idle.append(connection)

    def drop(self, connection: Connection, trouble: str = "") -> None:
        """Forget an idle connection that ended, or one that could not be opened ahead."""
        self._opening.discard(connection)
        if trouble:
            self._unopened[connection.target] = trouble
        if connection in connection.target.idle:
            connection.target.idle.remove(connection)

    def end(self, stream: Stream, stamp: int) -> None:
        """An answer ended, well or not: say so at once, parse it and hand over its row when there is time."""
        stream.result.finished_ns = stamp - self.start_mono_ns
        stream.target.in_flight -= 1
        self._active.discard(stream)
        if stream.ended is not None:
            stream.ended(stream.result)
            stream.ended = None
        self._wait_for_idle(stream)
        while len(self._later) > _BACKLOG or self._later_bytes > _BACKLOG_BYTES:
            self._parse_next()

    def parse_later(self, stream: Stream) -> None:
        """A stream holds much: parse it when the loop is idle, or now if that did not happen for long."""
        if stream.room < -16 * UNPARSED_LIMIT:
            stream.parse()
        elif not stream.queued:
            self._wait_for_idle(stream)

    def _wait_for_idle(self, stream: Stream) -> None:
        if not stream.queued:
            stream.queued = max(UNPARSED_LIMIT - stream.room, 1)
            self._later_bytes += stream.queued
            self._later.append(stream)
            if not self._idle.active:
                self._idle.start(self._on_idle)

    # -- when there is time -------------------------------------------------------------------------------------------

    def _on_idle(self) -> None:
        if self._later:
            self._parse_next()
        if not self._later:
            self._idle.stop()

    def _parse_next(self) -> None:
        stream = self._later.popleft()
        self._later_bytes -= stream.queued
        stream.queued = 0
        stream.parse()
        if stream.result.finished_ns is not None:
            self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        """Fill the row from the answer; what the client itself saw (a timeout, a stop) outranks what the bytes say."""
        response, result = stream.response, stream.result
        if not response.done and stream.error is None:
            response.eof("the answer went on after its end")
        facts = response.facts()
        start = self.start_mono_ns
        result.chunk_ns = [stamp - start for stamp in facts.chunk_ns]
        result.chunk_tokens = facts.chunk_tokens
        result.input_tokens = facts.input_tokens
        result.cached_tokens = facts.cached_tokens
        result.output_tokens = facts.output_tokens
        result.finish_reason = facts.finish_reason
        result.http_status = facts.http_status
        result.error, result.detail = facts.error, facts.detail
        if stream.error is not None:
            result.error, result.detail = stream.error[0], clean(stream.error[1], self._api_key)
        self._record(result)

    def _sweep(self) -> None:
        """Every timeout of every stream, in one pass; close what has been idle for too long."""
        now = monotonic_ns()
        for stream in list(self._active):
            last = stream.stamps[-1] if stream.stamps else stream.last_ns
            connection = stream.connection
            if now - stream.sent_ns > self._timeout_ns:
                self._give_up(stream, "timeout", f"not finished {self._timeout_ns / 1e9:g} s after it was sent")
            elif connection is not None and not connection.ready:
                if now - stream.sent_ns > self._connect_timeout_ns:
                    tls, limit_s = connection.shaking_hands, self._connect_timeout_ns / 1e9
                    error, what = ("tls", "no TLS handshake") if tls else ("connect", "not accepted")
                    self._give_up(stream, error, f"{stream.target.authority}: {what} in {limit_s:g} s")
            elif now - last > self._stall_ns:
                self._give_up(stream, "stall", f"the server sent nothing for {self._stall_ns / 1e9:g} s")
            elif stream.reads and now - last > 1e9:
                self.parse_later(stream)
        for target in self._targets:
            stale = [c for c in target.idle if c.used and now - c.idle_ns > IDLE_LIMIT_S * 1e9]
            if stale:
                target.idle = [c for c in target.idle if c not in stale]
                for connection in stale:
                    connection.close()

    def _give_up(self, stream: Stream, error: str, detail: str) -> None:
        stream.error = (error, detail)
        if stream.connection is not None:
            stream.connection.stream = None
            stream.connection.close()
            stream.connection = None
        self.end(stream, monotonic_ns())

    def abort(self, error: str, detail: str) -> None:
        """End every request in flight with this error class."""
        for stream in list(self._active):
            self._give_up(stream, error, detail)

    def settle(self) -> None:
        """Parse and hand over what still waits for it."""
        while self._later:
            self._parse_next()
        self._idle.stop()

    def close(self) -> None:
        """Close every connection and stop. Requests in flight end as ``stopped``."""
        self.abort("stopped", "the client was closed")
        self.settle()
        for target in self._targets:
            for connection in target.idle:
                connection.close()
            target.idle = []
        for watcher in (self._idle, self._sweeper):
            watcher.stop()
            watcher.close()


def _tls_context(ca: str | None) -> ssl.SSLContext:
    context: ssl.SSLContext = _SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the certificate and the host name
    try:
        if ca is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"{ca}: not a file of trusted certificates ({e})") from e
    return context
