"""Requests in flight: what has been received for each and when, and the queue of those that wait to be parsed."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic_ns
from typing import Any, Protocol

from harness.record.answers import SAMPLE, Said
from harness.record.results import Result
from harness.scenarios.client.completion import Secret, StreamedAnswer, clean
from harness.scenarios.client.endpoint import Endpoint
from harness.scenarios.client.fast_path import AnswerShape, Template
from harness.scenarios.client.http1 import Response
from harness.scenarios.client.reader import ReceiveBuffer

OnAnswer = Callable[[Result, StreamedAnswer], None]
"""Called with the row of a request that ended, and the text received until then."""
_SEEN_LIMIT = 65536
# An answer is too long beyond this. Gateways stream single characters, and with log-probabilities a token is kilobytes.
_EVENTS_EACH, _EVENTS_MORE = 8, 256
_BYTES_EACH, _BYTES_MORE = 65536, 16 * 2**20
# Answers wait to be parsed until there are so many, or until the next sweep: each by itself would find cold caches.
# Beyond the backlog, one is parsed on the spot for each that ends.
_TOGETHER, _BACKLOG = 32, 4096
_IDLE_NS = 200_000  # parsed at a time, before the loop turns again


class Carrier(Protocol):
    """The connection that carries a request, as far as the request is concerned."""

    ready: bool
    stream: InFlight | None

    @property
    def shaking_hands(self) -> bool:
        """Connected, while TLS is not ready."""

    def look(self, stream: InFlight) -> None:
        """Parse what has been stored of the answer."""

    def close(self) -> None:
        """Close it."""


class InFlight:
    """One request in flight: the row it will become, and what has been received for it."""

    __slots__ = (
        "buffer", "connection", "ended", "endpoint", "error", "hang_up", "last_ns", "most_tokens", "on_answer",
        "payload", "queued", "resent", "response", "result", "retry", "secret", "seen", "sent_ns", "session", "shape",
        "start_ns", "tried_ns",
    )  # fmt: skip

    def __init__(
        self, result: Result, payload: bytes, endpoint: Endpoint, secret: Secret,
        ended: Callable[[Result], None] | None, session: int = 0, on_answer: OnAnswer | None = None,
        start_ns: int = 0, most_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.result = result
        self.on_answer = on_answer
        self.payload = payload
        self.endpoint = endpoint
        self.secret = secret
        self.ended = ended
        self.session = session
        self.start_ns = start_ns  # of the run clock, from which parsed stamps count
        self.most_tokens = most_tokens
        self.queued = False  # it waits to be parsed
        self.resent = False  # once, on a fresh connection
        self.hang_up: Any = None  # timer
        self.retry: Any = None  # timer
        self.begin(monotonic_ns())
        self.sent_ns = self.tried_ns

    def begin(self, now_ns: int) -> None:
        """Forget what was received: the request is sent, perhaps again, at ``now_ns``."""
        self.response = Response(self.secret, None if self.on_answer is None else StreamedAnswer())
        self.buffer = ReceiveBuffer()
        self.shape: AnswerShape | None = self.endpoint.shape  # by which the reader stores the answer
        self.seen: bytes | None = b""  # the answer as passed on, up to its first output: to learn the shape from
        self.tried_ns = self.last_ns = now_ns
        self.error: tuple[str, str] | None = None
        self.connection: Carrier | None = None

    def stop_timers(self) -> None:
        """Stop the timers: they hold this object, and no garbage collector runs."""
        for timer in (self.hang_up, self.retry):
            if timer is not None:
                timer.stop()
                timer.close()
        self.hang_up = self.retry = None

    @property
    def silent(self) -> bool:
        """Whether not a byte of its answer has arrived."""
        return self.seen == b"" and not self.buffer.last_ns

    @property
    def heard_ns(self) -> int:
        """When something last arrived, or else when it was sent."""
        return max(self.buffer.last_ns, self.last_ns)

    @property
    def too_long(self) -> bool:
        """Whether the answer is far longer than was asked for, however tokens are cut into events."""
        if self.most_tokens is None:
            return False
        events, size = self.response.taken
        return (
            events + len(self.buffer) > _EVENTS_MORE + _EVENTS_EACH * self.most_tokens
            or size + self.buffer.size > _BYTES_MORE + _BYTES_EACH * self.most_tokens
        )

    def feed(self, data: bytes, stamp: int) -> None:
        """Parse bytes that the reader passed on; whatever was stored before them must have been parsed."""
        self.last_ns = max(stamp, self.tried_ns)  # what came before the request was sent is read after it
        if self.seen is not None:
            self.seen = self.seen + data if len(self.seen) < _SEEN_LIMIT else None
        self.response.feed(data, self.last_ns - self.start_ns)

    def parse(self, *, over: bool = False) -> None:
        """Parse what is stored; ``over``: nothing more will arrive, so an incomplete chunk, too."""
        buffer, response = self.buffer, self.response
        if buffer.opening_matched and self.seen is not None:
            self.seen = None
            response.begin()
        if buffer:
            for kind, stamps, parts in buffer.runs(self.start_ns, self.on_answer is not None):
                times = array("q", stamps)
                if kind:
                    assert self.shape is not None
                    template = self.shape.templates[kind - 1]
                    response.feed_plain(template.whole, template.said, times, parts)
                elif parts:
                    response.feed_chunks(parts, times)
            buffer.clear()
        if over and (rest := buffer.take_partial()):
            self.feed(rest, buffer.last_ns)

    def learn(self) -> AnswerShape:
        """Learn the shape of this server's answers from what has been parsed."""
        endpoint = self.endpoint
        if self.seen is not None:
            self.shape = AnswerShape.learn(self.seen, endpoint.shape)
            self.seen = None
        else:
            self.shape = (endpoint.shape or AnswerShape.of(b"", ())).with_one(Template.learn(self.response.sample))
        endpoint.shape = self.shape
        return self.shape

    def fill(self, *, timed: bool) -> None:
        """Fill in the row, with chunk times if ``timed``. What the client itself noticed (a timeout, a stop) takes
        precedence over what the bytes say.
        """
        self.parse(over=True)
        if not self.response.done and self.error is None:
            self.response.eof("the answer went on after its end")
        result = self.response.fill(self.result)
        if not timed:
            result.chunk_ns = result.chunk_tokens = None
        if self.error is not None:
            result.error, result.detail = self.error[0], clean(self.error[1], self.secret)


def parse(request: InFlight) -> None:
    """Parse what a request has stored; one that turns out to be over (junk behind its end, not HTTP) ends."""
    if request.connection is None:
        request.parse()
    else:
        request.connection.look(request)


class ParseQueue:
    """Answers that wait to be parsed until the loop (libev's) is idle, in order: the next requests go out first.

    ``record`` gets the row of each that has ended, once. ``timed``: rows have chunk times.
    """

    def __init__(self, loop: Any, record: Callable[[Result], None], *, timed: bool) -> None:
        self._record = record
        self._timed = timed
        self._waiting: deque[InFlight] = deque()
        self._idle: Any = loop.idle()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: InFlight) -> None:
        """Parse what this request has stored soon, and hand over its row if it has ended."""
        if request.queued:
            return
        request.queued = True
        self._waiting.append(request)
        if len(self._waiting) >= _TOGETHER:
            self.begin()
            while len(self._waiting) > _BACKLOG:
                self._next()

    def begin(self) -> None:
        """Parse as soon as the loop is idle, however few wait."""
        if self._waiting and not self._idle.active:
            self._idle.start(self._some)

    def _some(self) -> None:
        """Parse some, then let the loop turn: a request may be due."""
        end_ns = monotonic_ns() + _IDLE_NS
        while self._waiting:
            self._next()
            if monotonic_ns() > end_ns:
                break
        if not self._waiting:
            self._idle.stop()

    def _next(self) -> None:
        request = self._waiting.popleft()
        if not request.queued:
            return  # it was handed over before its turn
        if request.result.finished_ns is None:
            parse(request)  # this may end it
        request.queued = False
        if request.result.finished_ns is not None:
            self._finish(request)

    def _finish(self, request: InFlight) -> None:
        request.fill(timed=self._timed)
        self._record(request.result)
        if request.on_answer is not None and request.response.answer is not None:
            request.on_answer(request.result, request.response.answer)

    def hand_over(self, request: InFlight) -> None:
        """Parse an answer that has ended now, before its turn, and hand over its row, unless that was done."""
        if request.queued and request.result.finished_ns is not None:
            request.queued = False
            self._finish(request)

    def settle(self) -> None:
        """Parse everything that waits, and hand over the rows."""
        while self._waiting:
            self._next()
        self._idle.stop()

    def close(self) -> None:
        """Settle, and stop."""
        self.settle()
        self._idle.close()


class AnswerSampler:
    """Keeps the text of at most ``most`` answers, evenly spread however many there are, for `harness.record.answers`.

    Every answer at first, then every second one, every fourth, and so on.
    """

    def __init__(self, most: int = SAMPLE) -> None:
        self._most, self._seen, self._stride = max(1, most), 0, 1
        self._kept: dict[int, Said] = {}

    def next(self) -> OnAnswer | None:
        """What to call with the answer of the next request; None when it is not in the sample."""
        n = self._seen
        self._seen += 1
        return None if n % self._stride else partial(self._take, n)

    def _take(self, n: int, result: Result, answer: StreamedAnswer) -> None:
        if result.error is not None or n % self._stride:
            return
        self._kept[n] = Said(
            request_id=result.request_id, text=answer.parts, reasoning=answer.reasoning, blanks=answer.blanks,
            ids=len(answer.token_ids), other=answer.other,
        )  # fmt: skip
        if len(self._kept) > self._most:
            self._stride *= 2
            self._kept = {k: said for k, said in self._kept.items() if not k % self._stride}

    def said(self) -> list[Said]:
        """The sample, in the order of the requests."""
        return [self._kept[n] for n in sorted(self._kept)]
