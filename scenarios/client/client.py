"""The streaming client: sends prepared requests and turns each answer into a result row.

Bytes are prepared before they are due (`scenarios.plan_reader`), connections are opened before the clock starts
(`Client.open_connections`), and while answers stream in nothing is parsed: reads are stamped and kept
(`scenarios.client.reader`), and parsed when the event loop has nothing else to do. One sweep serves all timeouts.
Nothing is sent twice unless that was asked for, and then the row counts it.

Not followed on purpose: redirects and proxy settings of the environment. A load test must know where its load goes.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import Any, get_args

import gevent

from harness.errors import UsageError
from harness.headers import check_headers
from harness.results import Result
from harness.retry_after import retry_after_s
from harness.run_spec import Balance, RunSpec
from scenarios.client.capture import Answered
from scenarios.client.completion import clean
from scenarios.client.connection import Connection
from scenarios.client.endpoint import ENDPOINTS, Target, tls_context
from scenarios.client.in_flight import Stream
from scenarios.client.pacing import ReadPacer
from scenarios.client.parse_queue import Later, parse
from scenarios.client.reader import Kept, Reader
from scenarios.sampling import Sampler

BALANCES: tuple[Balance, ...] = get_args(Balance)
"""How a request finds its server: see `Client`."""
# How often all streams are looked at: eight times within the shortest time limit, but not more or less often than this.
_SWEEP_S, _SWEEP_LEAST_S = 0.5, 0.05
_SLICES = 8  # a sweep goes over ten thousand streams in so many parts, lest it holds up the stamps
# What a stream may hold before it is parsed, looked at once a sweep. Whole chunks: few, as they are large and teach how
# plain events look. In all: much, for that is cheap.
_RAW_LIMIT, _SIZE_LIMIT = 4096, 16384
_FLOOD = 16 * 2**20  # bytes from one part of a sweep to the next, beyond which large streams do not wait for theirs
_TOLD = 100  # servers of which is said how long they are quiet
_QUIET_NS = 1_000_000_000  # chunks after which nothing came for so long may have been an end that only parsing finds
RETRY_S, RETRY_MOST_S = 0.25, 4.0
"""Wait before the first retry of a request, and before any; it doubles in between. Longer where the server says so."""
CLOSED_NS = 1_000_000_000
"""A kept connection that ends so soon after it was used, without a byte, was being closed; later, something failed."""
_OPENING = 128  # connections being opened at the same time: below any server's listen backlog


def raise_fd_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft  # not allowed here (macOS says so of "unlimited"): what we have is what we report
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Client:
    """Sends requests to its servers and hands over a row for each.

    ``balance``: "least", the server with the least of this client's requests in flight; "round-robin", in turn;
    "session", server ``slice % servers``, so that the turns of a session meet the same prefix cache. ``retries``: how
    often a request is sent again when no connection came about or the answer was 429 or 503, after a growing pause (and
    not before the server's Retry-After). Besides, one that met a kept connection as it was closed is sent once more.
    Without ``stream`` an answer is silent until it is done, so ``stall_s`` does not apply, and it has no chunk times.
    ``sampler`` keeps some of the answers.

    ``record`` gets every row, once, complete (from the event loop, some time after the request ended). Use it from one
    thread. Times in rows count from ``start_mono_ns``, a `time.monotonic_ns` value.
    """

    def __init__(
        self,
        spec: RunSpec,
        record: Callable[[Result], None],
        *,
        connect_timeout_s: float = 10.0,
        api_key: str | None = None,
        secret_headers: Mapping[str, str] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        if not spec.base_urls:
            raise UsageError("no base URL to send to")
        if spec.endpoint not in ENDPOINTS:
            raise UsageError(f"unknown endpoint {spec.endpoint!r}: valid: {', '.join(ENDPOINTS)}")
        if spec.balance not in BALANCES:
            raise UsageError(f"unknown balance {spec.balance!r}: valid: {', '.join(BALANCES)}")
        check_headers(spec.headers)
        tls = tls_context(spec.tls_ca) if any(url.startswith("https:") for url in spec.base_urls) else None
        every = {**spec.headers, **(secret_headers or {})}
        self._targets = [
            Target(i, url, spec.endpoint, api_key, tls, headers=every, key_header=spec.key_header, stream=spec.stream)
            for i, url in enumerate(spec.base_urls)
        ]
        self._turn = 0
        self._balance = spec.balance
        self.retries = spec.retries
        self._stream = spec.stream
        self._secrets = tuple(filter(None, (api_key, *(secret_headers or {}).values())))
        self._sampler = sampler
        self._record = record
        self._timeout_ns = int(spec.timeout_s * 1e9)
        self._stall_ns = int((spec.stall_s if spec.stream else spec.timeout_s) * 1e9)
        self._connect_timeout_ns = int(connect_timeout_s * 1e9)
        self._active: set[Stream] = set()
        self._own_limit: set[Stream] = set()
        """Those with a time limit of their own, which has a timer."""
        self._opening: set[Connection] = set()
        self._unopened: dict[Target, str] = {}
        self._unswept: list[Stream] = []
        self._share = 0
        self.tls_reads = self.tls_unstamped = 0
        """As the counts of the reader, of connections with TLS."""
        self._swept_bytes = 0
        self.start_mono_ns = monotonic_ns()
        self.loop: Any = gevent.get_hub().loop
        self.reader = Reader()
        self._pacer = ReadPacer(self.reader, self._active.__len__, spec.batch_reads_from)
        self.later = Later(self.loop, record, timed=spec.stream)
        """What waits to be parsed."""
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
        """Of all reads, those that have the time of the read because the kernel gave none; null before the first."""
        reads = self.reader.reads + self.tls_reads
        return (self.reader.unstamped + self.tls_unstamped) / reads if reads else None

    # -- sending ------------------------------------------------------------------------------------------------------

    def send(
        self,
        result: Result,
        payload: bytes,
        ended: Callable[[Result], None] | None = None,
        *,
        slice_: int = 0,
        cancel_after_ns: int | None = None,
        timeout_ns: int | None = None,
        answered: Answered | None = None,
        most_tokens: int | None = None,
    ) -> Stream:
        """Send now; hang up after ``cancel_after_ns``; ``timeout_ns`` counts instead of the client's own. ``result``
        (request_id, scheduled_ns) is filled in; ``ended`` is called as soon as the answer ended, in the middle of the
        event loop: it must only note that or wake someone. ``answered`` gets what was said, after the row. An answer
        that goes on far beyond ``most_tokens`` is hung up on.
        """
        if answered is None and self._sampler is not None:
            answered = self._sampler.next()
        stream = Stream(
            result,
            payload,
            self._choose(slice_),
            self._secrets,
            ended,
            slice_,
            answered,
            self.start_mono_ns,
            most_tokens,
        )
        result.sent_ns = stream.sent_ns - self.start_mono_ns
        self._active.add(stream)
        if cancel_after_ns is not None or timeout_ns is not None:
            self._limit(stream, cancel_after_ns, timeout_ns)
        self._go(stream)
        return stream

    def _limit(self, stream: Stream, cancel_after_ns: int | None, timeout_ns: int | None) -> None:
        """One timer: of two limits only the first can count."""
        if timeout_ns is not None:
            self._own_limit.add(stream)
        first_ns = min(limit for limit in (cancel_after_ns, timeout_ns) if limit is not None)
        give_up = self._hang_up if first_ns == cancel_after_ns else self._time_out
        stream.hang_up = self.loop.timer(first_ns / 1e9)
        stream.hang_up.start(give_up, stream, first_ns, update=True)

    def _go(self, stream: Stream) -> None:
        target = stream.target
        stream.result.replica = target.index
        target.in_flight += 1
        if target.waiting_ns is None:
            target.waiting_ns = stream.tried_ns
        connection = target.take(stream.tried_ns)
        if connection is None:
            Connection(self, target).open(stream)
        else:
            connection.send(stream)

    def _choose(self, slice_: int) -> Target:
        targets = self._targets
        n = len(targets)
        if n == 1:
            return targets[0]
        if self._balance == "session":
            return targets[slice_ % n]
        best = self._turn
        if self._balance == "least":  # ties in turn
            best = min(range(best, best + n), key=lambda i: targets[i % n].in_flight) % n
        self._turn = (best + 1) % n
        return targets[best]

    def _hang_up(self, stream: Stream, after_ns: int) -> None:
        self._give_up(stream, "cancelled", f"the client hung up {after_ns / 1e9:g} s after it had sent, as planned")

    def _time_out(self, stream: Stream, limit_ns: int) -> None:
        self._give_up(stream, "timeout", f"not finished {limit_ns / 1e9:g} s after it was sent")

    def _try_again(self, stream: Stream) -> bool:
        """Whether this ended try is followed by another, which is then on its way."""
        result, tries = stream.result, stream.result.retries - stream.resent
        # The status is known by now: only what follows the first bytes is parsed later.
        refused = stream.error[0] == "connect" if stream.error else stream.response.status in (429, 503)
        if not refused or tries >= self.retries:
            return False
        asked_s = retry_after_s(stream.response.retry_after) or 0.0
        if monotonic_ns() + asked_s * 1e9 > stream.sent_ns + self._timeout_ns:
            return False  # it would be in vain: the answer stays what it is
        pause_s = max(min(RETRY_S * 2.0**tries, RETRY_MOST_S), asked_s)
        result.retries += 1
        stream.begin(monotonic_ns() + int(pause_s * 1e9))  # no timeout before that
        stream.retry = self.loop.timer(pause_s)
        stream.retry.start(self._retry, stream, update=True)
        return True

    def resend(self, stream: Stream, stamp: int) -> bool:
        """Send once more, on a fresh connection, what was sent on a kept one that the server was just closing; False
        when that is not what happened. Nobody read it: there was not a byte of an answer, and the end came soon.
        """
        if stream.resent or not stream.silent or stamp - stream.tried_ns > CLOSED_NS:
            return False
        stream.resent = True
        stream.result.retries += 1
        stream.begin(monotonic_ns())
        Connection(self, stream.target).open(stream)
        return True

    def _retry(self, stream: Stream) -> None:
        stream.retry.close()
        stream.retry = None
        stream.begin(monotonic_ns())
        stream.target.in_flight -= 1
        stream.target = self._choose(stream.slice)
        self._go(stream)

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

    def refuse(self, result: Result) -> None:
        """Hand over the row of a request that is not sent."""
        self._record(result)

    # -- called by connections ----------------------------------------------------------------------------------------

    def pool(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        self._opening.discard(connection)
        connection.idle_ns = monotonic_ns()
        connection.target.idle[connection] = None

    def drop(self, connection: Connection, trouble: str = "") -> None:
        """Forget an idle connection that ended, or one that could not be opened ahead."""
        self._opening.discard(connection)
        if trouble:
            self._unopened[connection.target] = trouble
        connection.target.idle.pop(connection, None)

    def end(self, stream: Stream, stamp: int) -> None:
        """An answer ended, well or not: say so at once, parse it and hand over its row when there is time."""
        if self.retries and self._try_again(stream):
            return
        if stream.hang_up is not None or stream.retry is not None:
            stream.stop_timers()
        stream.result.finished_ns = stamp - self.start_mono_ns
        stream.target.in_flight -= 1
        if stream.heard_ns > stream.tried_ns:
            stream.target.heard(stamp)
        self._active.discard(stream)
        if self._own_limit:
            self._own_limit.discard(stream)
        if stream.ended is not None:
            stream.ended(stream.result)
            stream.ended = None
        self.later.add(stream)

    # -- once in a while ----------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Every timeout of every stream, a part at a time; parse what came; close what has been idle for too long."""
        now = monotonic_ns()
        self.later.begin()
        self._stem_floods()
        if not self._unswept:
            self._unswept = list(self._active)
            self._share = -(-len(self._unswept) // _SLICES)
            self._close_idle(now)
        part, self._unswept = self._unswept[: self._share], self._unswept[self._share :]
        for stream in part:
            if stream in self._active:
                self._look_at(stream, now)

    def _look_at(self, stream: Stream, now: int) -> None:
        connection = stream.connection
        if stream.heard_ns > stream.tried_ns:
            stream.target.heard(stream.heard_ns)
        if now - stream.sent_ns > self._timeout_ns and stream not in self._own_limit:
            self._time_out(stream, self._timeout_ns)
        elif connection is not None and not connection.ready:
            if now - stream.tried_ns > self._connect_timeout_ns:
                tls, limit_s = connection.shaking_hands, self._connect_timeout_ns / 1e9
                error, what = ("tls", "no TLS handshake") if tls else ("connect", "not accepted")
                self._give_up(stream, error, f"{stream.target.authority}: {what} in {limit_s:g} s")
        elif now - stream.heard_ns > self._stall_ns and (self._stream or stream not in self._own_limit):
            self._give_up(stream, "stall", f"the server sent nothing for {self._stall_ns / 1e9:g} s")
        elif stream.too_long:
            self._cut_off(stream)
        elif stream.queued:
            parse(stream)  # there was no time for it since the last sweep
        elif _is_much(stream, now):
            self.later.add(stream)

    def _cut_off(self, stream: Stream) -> None:
        """Hang up, and parse no more of it than was."""
        stream.kept = Kept()
        self._give_up(
            stream, "too_long", f"it went on far beyond the {stream.most_tokens} output tokens that were asked for"
        )

    def _stem_floods(self) -> None:
        """Between two sweeps a stream without end could fill the memory."""
        came, self._swept_bytes = self.reader.bytes - self._swept_bytes, self.reader.bytes
        if came > _FLOOD:
            for stream in [s for s in self._active if s.kept.size > _FLOOD // 16]:
                if stream.too_long:
                    self._cut_off(stream)
                else:
                    parse(stream)

    def _close_idle(self, now: int) -> None:
        for target in self._targets:
            stale = [c for c in target.idle if c.used and now - c.idle_ns > target.idle_limit_s * 1e9]
            for connection in stale:
                del target.idle[connection]
                connection.close()

    def _give_up(self, stream: Stream, error: str, detail: str) -> None:
        stream.error = (error, detail)
        if stream.connection is not None:
            stream.connection.stream = None
            stream.connection.close()
            stream.connection = None
        self.end(stream, monotonic_ns())

    def abort(self, error: str, detail: str, replica: int | None = None) -> None:
        """End every request in flight, or every one at ``replica``, with this error class."""
        for stream in list(self._active):
            if replica is None or stream.target.index == replica:
                self._give_up(stream, error, detail)

    def quiet_s(self) -> tuple[dict[int, float], list[int]]:
        """By server, how long requests have waited for a byte from it, where that is long; and those just heard."""
        now, quiet, heard = monotonic_ns(), {}, []
        for target in self._targets[:_TOLD]:
            if target.waiting_ns is not None and now - target.waiting_ns > _QUIET_NS:
                quiet[target.index] = round((now - target.waiting_ns) / 1e9, 1)
            elif target.waiting_ns is not None:
                heard.append(target.index)
        return quiet, heard

    def close(self) -> None:
        """Close every connection and stop. Requests in flight end as ``stopped``."""
        self.abort("stopped", "the client was closed")
        self.later.close()
        for target in self._targets:
            for connection in target.idle:
                connection.close()
            target.idle.clear()
        self._sweeper.stop()
        self._sweeper.close()
        self._pacer.close()
        self.reader.close()


def _is_much(stream: Stream, now: int) -> bool:
    """Whether a stream holds what should be parsed before its answer ends."""
    kept = stream.kept
    return kept.raw > _RAW_LIMIT or kept.size > _SIZE_LIMIT or (kept.raw > 0 and now - kept.last_ns > _QUIET_NS)
