"""One request on its way: what was read for it and when, until that is parsed."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from harness.results import Result
from scenarios.client.capture import Answered, ToldResponse
from scenarios.client.completion import Secret, clean
from scenarios.client.fast_path import Shape
from scenarios.client.http1 import Response
from scenarios.client.reader import Kept

if TYPE_CHECKING:
    from scenarios.client.connection import Connection
    from scenarios.client.endpoint import Target

_SEEN_LIMIT = 65536
# An answer is too long beyond this. Gateways stream single characters, and with log-probabilities a token is kilobytes.
_EVENTS_EACH, _EVENTS_MORE = 8, 256
_BYTES_EACH, _BYTES_MORE = 65536, 16 * 2**20


class Stream:
    """One request on its way: the row it will become, and what has been read for it."""

    __slots__ = (
        "answered", "connection", "ended", "error", "hang_up", "kept", "last_ns", "most_tokens", "payload", "queued",
        "resent", "response", "result", "retry", "secret", "seen", "sent_ns", "shape", "slice", "start_ns", "target",
        "tried_ns",
    )  # fmt: skip

    def __init__(
        self,
        result: Result,
        payload: bytes,
        target: Target,
        secret: Secret,
        ended: Callable[[Result], None] | None,
        slice_: int = 0,
        answered: Answered | None = None,
        start_ns: int = 0,
        most_tokens: int | None = None,
    ) -> None:
        self.result = result
        self.answered = answered
        self.payload = payload
        self.target = target
        self.secret = secret
        self.ended = ended
        self.slice = slice_
        self.start_ns = start_ns  # of the run clock: what is parsed has the times of that
        self.most_tokens = most_tokens
        self.queued = False  # it waits to be parsed
        self.resent = False  # once, on a fresh connection
        self.hang_up: Any = None  # timer
        self.retry: Any = None  # timer
        self.begin(monotonic_ns())
        self.sent_ns = self.tried_ns

    def begin(self, now_ns: int) -> None:
        """Forget what was read: it is sent, perhaps again, at ``now_ns``."""
        self.response = Response(self.secret) if self.answered is None else ToldResponse(self.secret, self.answered)
        self.kept = Kept()
        self.shape: Shape | None = self.target.shape  # of what is kept
        self.seen: bytes | None = b""  # of an answer that is handed on, up to its first output: to learn the shape
        self.tried_ns = self.last_ns = now_ns
        self.error: tuple[str, str] | None = None
        self.connection: Connection | None = None

    def stop_timers(self) -> None:
        """Nothing more is due; the timers hold this stream, and no garbage collector runs."""
        for timer in (self.hang_up, self.retry):
            if timer is not None:
                timer.stop()
                timer.close()
        self.hang_up = self.retry = None

    @property
    def silent(self) -> bool:
        """Whether not a byte of its answer has come."""
        return self.seen == b"" and not self.kept.last_ns

    @property
    def heard_ns(self) -> int:
        """When something arrived last, or else when it was sent."""
        return max(self.kept.last_ns, self.last_ns)

    @property
    def too_long(self) -> bool:
        """Whether it has gone on far beyond what was asked for, however a token is cut into events."""
        if self.most_tokens is None:
            return False
        events, size = self.response.taken
        return (
            events + len(self.kept) > _EVENTS_MORE + _EVENTS_EACH * self.most_tokens
            or size + self.kept.size > _BYTES_MORE + _BYTES_EACH * self.most_tokens
        )

    def feed(self, data: bytes, stamp: int) -> None:
        """Take bytes that were handed on, at once; whatever came before them must be parsed."""
        self.last_ns = max(stamp, self.tried_ns)  # what came before the request was sent is read after it
        if self.seen is not None:
            self.seen = self.seen + data if len(self.seen) < _SEEN_LIMIT else None
        self.response.feed([data], [self.last_ns - self.start_ns])

    def parse(self, *, over: bool = False) -> None:
        """Feed what is kept to the response; ``over``: nothing else will come, so what is not whole, too."""
        kept, response = self.kept, self.response
        if kept.opened and self.seen is not None:
            self.seen = None
            response.begin()
        if kept:
            for kind, stamps, parts in kept.runs(self.start_ns, response.told):
                times = array("q", stamps)
                if kind:
                    assert self.shape is not None
                    response.feed_plain(self.shape.templates[kind - 1], times, parts)
                elif parts:
                    response.feed_chunks(parts, times.tolist())
            kept.clear()
        if over and (rest := kept.rest()):
            self.feed(rest, kept.last_ns)

    def learn(self) -> Shape:
        """Learn from what was parsed what the answers of this server look like."""
        if self.seen is not None:
            self.shape = Shape.learn(self.seen, self.target.shape)
            self.seen = None
        else:
            self.shape = (self.target.shape or Shape.of(b"", ())).with_one(self.response.learn())
        self.target.shape = self.shape
        return self.shape

    def fill(self, *, timed: bool) -> None:
        """Fill the row from the answer, with times of chunks where they are ``timed``; what the client itself saw (a
        timeout, a stop) outranks what the bytes say.
        """
        result = self.result
        self.parse(over=True)
        if not self.response.done and self.error is None:
            self.response.eof("the answer went on after its end")
        facts = self.response.facts()
        if timed:
            result.chunk_ns, result.chunk_tokens = facts.chunk_ns, facts.chunk_tokens
        result.input_tokens = facts.input_tokens
        result.cached_tokens = facts.cached_tokens
        result.output_tokens = facts.output_tokens
        result.reasoning_tokens = facts.reasoning_tokens
        result.finish_reason = facts.finish_reason
        result.http_status = facts.http_status
        result.error, result.detail = facts.error, facts.detail
        if self.error is not None:
            result.error, result.detail = self.error[0], clean(self.error[1], self.secret)
