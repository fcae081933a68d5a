"""The streaming client: sends prepared requests and turns each answer into a result row.

Request bytes are prepared before they are due (`scenarios.plan_reader`), and connections are opened before the clock
starts (`Client.open_connections`). While answers stream in nothing is parsed: reads are stamped and stored
(`scenarios.client.reader`), and parsed when the event loop is otherwise idle. One periodic sweep enforces all timeouts.
Nothing is sent twice unless that was asked for, and then the row counts it.

Redirects and proxy settings of the environment are ignored on purpose: a load test must know where its load goes.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any

import gevent

from harness.errors import UsageError
from harness.record.results import Result
from harness.record.run_spec import BATCH_READS_FROM, RunSpec
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.connection import Connection
from harness.scenarios.client.endpoint import ENDPOINTS, Endpoint, tls_context
from harness.scenarios.client.in_flight import AnswerSampler, InFlight, OnAnswer, ParseQueue, parse
from harness.scenarios.client.pool import Pool
from harness.scenarios.client.reader import Reader, ReadPacer, ReceiveBuffer
from harness.server.access import check_headers
from harness.server.question import retry_after_s

# How often each request in flight is checked: eight times within the shortest timeout, within these limits.
_SWEEP_S, _SWEEP_LEAST_S = 0.5, 0.05
_SLICES = 8  # a sweep of ten thousand requests is done in parts, lest it delay sends
# What a request may store before it is parsed, checked once per sweep. Whole chunks: few, since they are large and
# show how plain events look. In all: much, because text is cheap.
_RAW_LIMIT, _SIZE_LIMIT = 4096, 16384
_FLOOD = 16 * 2**20  # bytes between two parts of a sweep, beyond which large answers are parsed at once
_TOLD = 100  # servers whose silence is reported
_QUIET_NS = 1_000_000_000  # stored chunks with nothing after them for so long may be an end that only parsing finds
RETRY_S, RETRY_MOST_S = 0.25, 4.0
"""Pause before the first retry of a request, and the longest; it doubles in between. Longer if the server says so."""
CLOSED_NS = 1_000_000_000
"""A kept connection that ends so soon after it was used, without a byte, was being closed; later, something failed."""


def raise_fd_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft  # not allowed here (macOS says so of "unlimited")
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Client:
    """Sends requests to its servers and hands a row for each to ``record``; what it is asked is in ``spec``.

    ``retries`` are made when there was no connection or the answer was 429 or 503 (then ``busy_retries``), after a
    growing pause and not before the server's Retry-After.
    In addition, a request that met a kept connection as it was closed is sent once more.
    Without ``stream`` an answer is silent until it is complete, so ``stall_s`` does not apply and chunks have no times.
    ``sampler`` keeps the text of some answers; ``capture`` gets that of every one.

    ``record`` is called once for each row, from the event loop, some time after the request ended. Not thread-safe.
    Times in rows count from ``start_mono_ns``, a `time.monotonic_ns` value.
    """

    def __init__(
        self,
        spec: RunSpec,
        record: Callable[[Result], None],
        *,
        connect_timeout_s: float = 10.0,
        api_key: str | None = None,
        secret_headers: Mapping[str, str] | None = None,
        sampler: AnswerSampler | None = None,
        capture: OnAnswer | None = None,
    ) -> None:
        if not spec.base_urls:
            raise UsageError("no base URL to send to")
        if spec.endpoint not in ENDPOINTS:
            raise UsageError(f"unknown endpoint {spec.endpoint!r}: valid: {', '.join(ENDPOINTS)}")
        check_headers(spec.headers)
        tls = tls_context(spec.tls_ca) if any(url.startswith("https:") for url in spec.base_urls) else None
        headers = {**spec.headers, **(secret_headers or {})}
        self._endpoints = [
            Endpoint(i, url, spec.endpoint, api_key, tls, headers=headers, key_header=spec.key_header,
                     stream=spec.stream)
            for i, url in enumerate(spec.base_urls)
        ]  # fmt: skip
        self.retries, self._unheard_retries = max(spec.retries, spec.busy_retries), spec.retries
        self._stream = spec.stream
        self._secrets = tuple(filter(None, (api_key, *(secret_headers or {}).values())))
        self._sampler = sampler
        self._capture = capture
        self._record = record
        self._timeout_ns = int(spec.timeout_s * 1e9)
        self._stall_ns = int((spec.stall_s if spec.stream else spec.timeout_s) * 1e9)
        self._connect_timeout_ns = int(connect_timeout_s * 1e9)
        self._active: set[InFlight] = set()
        self._own_limit: set[InFlight] = set()
        """Those with a time limit of their own, which has a timer."""
        self._unswept: list[InFlight] = []
        self._share = 0
        self._swept_bytes = 0
        self.tls_reads = self.tls_unstamped = 0
        """Like the counts of the reader, for connections with TLS."""
        self.start_mono_ns = monotonic_ns()
        self.loop: Any = gevent.get_hub().loop
        self.reader = Reader()
        self.pool = Pool(self, self._endpoints, spec.balance, self._connect_timeout_ns)
        self._pacer = ReadPacer(self.reader, self._active.__len__, spec.batch_reads_from or BATCH_READS_FROM)
        self.parse_queue = ParseQueue(self.loop, record, timed=spec.stream)
        sweep_s = max(_SWEEP_LEAST_S, min(_SWEEP_S, min(spec.timeout_s, spec.stall_s, connect_timeout_s) / 8))
        self._sweeper: Any = self.loop.timer(sweep_s / _SLICES, sweep_s / _SLICES)
        self._sweeper.start(self._sweep)

    @property
    def in_flight(self) -> int:
        """Requests sent and not ended."""
        return len(self._active)

    @property
    def read(self) -> tuple[int, int]:
        """Plain events and other reads, and bytes, that have arrived."""
        return self.reader.events, self.reader.bytes

    @property
    def unstamped_share(self) -> float | None:
        """Share of reads without a kernel timestamp, which have the time of the read; null before the first."""
        reads = self.reader.reads + self.tls_reads
        return (self.reader.unstamped + self.tls_unstamped) / reads if reads else None

    # -- sending ------------------------------------------------------------------------------------------------------

    def send(
        self,
        result: Result,
        payload: bytes,
        ended: Callable[[Result], None] | None = None,
        *,
        session: int = 0,
        cancel_after_ns: int | None = None,
        timeout_ns: int | None = None,
        on_answer: OnAnswer | None = None,
        most_tokens: int | None = None,
    ) -> InFlight:
        """Send now, and fill in ``result`` (request_id, scheduled_ns) when the answer has been parsed.

        ``ended`` is called as soon as the answer ended, from inside the event loop: it must only take a note or wake
        someone. ``cancel_after_ns``: hang up after that long. ``timeout_ns`` replaces the client's timeout.
        ``on_answer`` gets the text, after the row. An answer far longer than ``most_tokens`` is hung up on.
        """
        if on_answer is None and self._sampler is not None:
            on_answer = self._sampler.next()
        if self._capture is not None:
            on_answer = _both(self._capture, on_answer)
        request = InFlight(
            result, payload, self.pool.choose(session), self._secrets, ended, session, on_answer,
            self.start_mono_ns, most_tokens,
        )  # fmt: skip
        result.sent_ns = request.sent_ns - self.start_mono_ns
        self._active.add(request)
        if cancel_after_ns is not None or timeout_ns is not None:
            self._limit(request, cancel_after_ns, timeout_ns)
        self._go(request)
        return request

    def _limit(self, request: InFlight, cancel_after_ns: int | None, timeout_ns: int | None) -> None:
        """Start one timer: of two limits only the first can apply."""
        if timeout_ns is not None:
            self._own_limit.add(request)
        first_ns = min(limit for limit in (cancel_after_ns, timeout_ns) if limit is not None)
        give_up = self._hang_up if first_ns == cancel_after_ns else self._time_out
        request.hang_up = self.loop.timer(first_ns / 1e9)
        request.hang_up.start(give_up, request, first_ns, update=True)

    def _go(self, request: InFlight) -> None:
        endpoint = request.endpoint
        request.result.replica = endpoint.index
        endpoint.in_flight += 1
        if endpoint.waiting_ns is None:
            endpoint.waiting_ns = request.tried_ns
        self.pool.send(request)

    def _hang_up(self, request: InFlight, after_ns: int) -> None:
        self._give_up(request, "cancelled", f"the client hung up {after_ns / 1e9:g} s after it had sent, as planned")

    def _time_out(self, request: InFlight, limit_ns: int) -> None:
        self._give_up(request, "timeout", f"not finished {limit_ns / 1e9:g} s after it was sent")

    def _try_again(self, request: InFlight) -> bool:
        """Whether this attempt, which has ended, is followed by another, now scheduled."""
        result, tries = request.result, request.result.retries - request.resent
        # The status is known by now: only what follows the first bytes is parsed later.
        if request.error is None:
            most = self.retries if request.response.head.status in (429, 503) else 0
        else:
            most = self._unheard_retries if request.error[0] == "connect" else 0
        if tries >= most:
            return False
        asked_s = retry_after_s(request.response.head.retry_after) or 0.0
        if monotonic_ns() + asked_s * 1e9 > request.sent_ns + self._timeout_ns:
            return False  # it would time out: the answer stays what it is
        pause_s = max(min(RETRY_S * 2.0**tries, RETRY_MOST_S), asked_s)
        result.retries += 1
        request.begin(monotonic_ns() + int(pause_s * 1e9))  # no timeout before that
        request.retry = self.loop.timer(pause_s)
        request.retry.start(self._retry, request, update=True)
        return True

    def resend(self, request: InFlight, stamp: int) -> bool:
        """Send once more, on a fresh connection, what was sent on a kept one that the server was just closing; False
        when that is not what happened. Nobody read it: there was not a byte of an answer, and the end came soon.
        """
        if request.resent or not request.silent or stamp - request.tried_ns > CLOSED_NS:
            return False
        request.resent = True
        request.result.retries += 1
        request.begin(monotonic_ns())
        Connection(self, request.endpoint).open(request)
        return True

    def _retry(self, request: InFlight) -> None:
        request.retry.close()
        request.retry = None
        request.begin(monotonic_ns())
        request.endpoint.in_flight -= 1
        request.endpoint = self.pool.choose(request.session)
        self._go(request)

    def open_connections(self, wanted: int, timeout_s: float | None = None) -> str | None:
        """Open connections ahead of the load: see `Pool.open_ahead`."""
        return self.pool.open_ahead(wanted, timeout_s)

    def refuse(self, result: Result) -> None:
        """Hand over the row of a request that is not sent."""
        self._record(result)

    # -- called by connections ----------------------------------------------------------------------------------------

    def idle(self, connection: Connection) -> None:
        """Return a connection to the pool."""
        self.pool.add(connection)

    def drop(self, connection: Connection, trouble: str = "") -> None:
        """Forget a connection that carried no request when it ended."""
        self.pool.drop(connection, trouble)

    def end(self, request: InFlight, stamp: int) -> None:
        """An answer ended, well or not: say so at once, parse it and hand over its row when there is time."""
        if self.retries and self._try_again(request):
            return
        if request.hang_up is not None or request.retry is not None:
            request.stop_timers()
        request.result.finished_ns = stamp - self.start_mono_ns
        request.endpoint.in_flight -= 1
        if request.heard_ns > request.tried_ns:
            request.endpoint.heard(stamp)
        self._active.discard(request)
        if self._own_limit:
            self._own_limit.discard(request)
        if request.ended is not None:
            request.ended(request.result)
            request.ended = None
        self.parse_queue.add(request)

    # -- periodic work ------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Check every timeout of every request, a part at a time; parse what came; close what was idle for too long."""
        now = monotonic_ns()
        self.parse_queue.begin()
        self._stem_floods()
        if not self._unswept:
            self._unswept = list(self._active)
            self._share = -(-len(self._unswept) // _SLICES)
            self.pool.close_idle(now)
        part, self._unswept = self._unswept[: self._share], self._unswept[self._share :]
        for request in part:
            if request in self._active:
                self._check(request, now)

    def _check(self, request: InFlight, now: int) -> None:
        connection = request.connection
        if request.heard_ns > request.tried_ns:
            request.endpoint.heard(request.heard_ns)
        if now - request.sent_ns > self._timeout_ns and request not in self._own_limit:
            self._time_out(request, self._timeout_ns)
        elif connection is not None and not connection.ready:
            if now - request.tried_ns > self._connect_timeout_ns:
                tls, limit_s = connection.shaking_hands, self._connect_timeout_ns / 1e9
                error, what = ("tls", "no TLS handshake") if tls else ("connect", "not accepted")
                self._give_up(request, error, f"{request.endpoint.authority}: {what} in {limit_s:g} s")
        elif now - request.heard_ns > self._stall_ns and (self._stream or request not in self._own_limit):
            self._give_up(request, "stall", f"the server sent nothing for {self._stall_ns / 1e9:g} s")
        elif request.too_long:
            self._cut_off(request)
        elif request.queued:
            parse(request)  # there was no time for it since the last sweep
        elif _is_much(request, now):
            self.parse_queue.add(request)

    def _cut_off(self, request: InFlight) -> None:
        """Hang up, and parse no more of it than was."""
        request.buffer = ReceiveBuffer()
        self._give_up(
            request, "too_long", f"it went on far beyond the {request.most_tokens} output tokens that were asked for"
        )

    def _stem_floods(self) -> None:
        """Between two sweeps an endless answer could fill the memory."""
        came, self._swept_bytes = self.reader.bytes - self._swept_bytes, self.reader.bytes
        if came > _FLOOD:
            for request in [r for r in self._active if r.buffer.size > _FLOOD // 16]:
                if request.too_long:
                    self._cut_off(request)
                else:
                    parse(request)

    def _give_up(self, request: InFlight, error: str, detail: str) -> None:
        request.error = (error, detail)
        if request.connection is not None:
            request.connection.stream = None
            request.connection.close()
            request.connection = None
        self.end(request, monotonic_ns())

    def abort(self, error: str, detail: str, replica: int | None = None) -> None:
        """End every request in flight, or every one at ``replica``, with this error class."""
        for request in list(self._active):
            if replica is None or request.endpoint.index == replica:
                self._give_up(request, error, detail)

    def quiet_s(self) -> tuple[dict[int, float], list[int]]:
        """By server, how long requests have waited for a byte from it, where that is long; and those just heard."""
        now, quiet, heard = monotonic_ns(), {}, []
        for endpoint in self._endpoints[:_TOLD]:
            if endpoint.waiting_ns is not None and now - endpoint.waiting_ns > _QUIET_NS:
                quiet[endpoint.index] = round((now - endpoint.waiting_ns) / 1e9, 1)
            elif endpoint.waiting_ns is not None:
                heard.append(endpoint.index)
        return quiet, heard

    def close(self) -> None:
        """Close every connection and stop. Requests in flight end as ``stopped``."""
        self.abort("stopped", "the client was closed")
        self.parse_queue.close()
        self.pool.close()
        self._sweeper.stop()
        self._sweeper.close()
        self._pacer.close()
        self.reader.close()


def _both(first: OnAnswer, second: OnAnswer | None) -> OnAnswer:
    def call(result: Result, answer: StreamedAnswer) -> None:
        first(result, answer)
        if second is not None:
            second(result, answer)

    return call


def _is_much(request: InFlight, now: int) -> bool:
    """Whether a request has stored what should be parsed before its answer ends."""
    buffer = request.buffer
    return (
        buffer.chunk_bytes > _RAW_LIMIT
        or buffer.size > _SIZE_LIMIT
        or (buffer.chunk_bytes > 0 and now - buffer.last_ns > _QUIET_NS)
    )
