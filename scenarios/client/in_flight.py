"""One request in flight: what has been received for it and when, until that is parsed into its row."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Protocol

from harness.record.results import Result
from scenarios.client.capture import CapturingResponse, OnAnswer
from scenarios.client.endpoint import Endpoint
from scenarios.client.fast_path import Shape
from scenarios.client.http1 import Response
from scenarios.client.outcome import Secret, clean
from scenarios.client.reader import ReceiveBuffer

_SEEN_LIMIT = 65536
# An answer is too long beyond this. Gateways stream single characters, and with log-probabilities a token is kilobytes.
_EVENTS_EACH, _EVENTS_MORE = 8, 256
_BYTES_EACH, _BYTES_MORE = 65536, 16 * 2**20


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
        self,
        result: Result,
        payload: bytes,
        endpoint: Endpoint,
        secret: Secret,
        ended: Callable[[Result], None] | None,
        session: int = 0,
        on_answer: OnAnswer | None = None,
        start_ns: int = 0,
        most_tokens: int | None = None,
    ) -> None:
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
        on_answer = self.on_answer
        self.response = Response(self.secret) if on_answer is None else CapturingResponse(self.secret, on_answer)
        self.buffer = ReceiveBuffer()
        self.shape: Shape | None = self.endpoint.shape  # by which the reader stores the answer
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
        self.response.feed([data], [self.last_ns - self.start_ns])

    def parse(self, *, over: bool = False) -> None:
        """Parse what is stored; ``over``: nothing more will arrive, so an incomplete chunk, too."""
        buffer, response = self.buffer, self.response
        if buffer.opening_matched and self.seen is not None:
            self.seen = None
            response.begin()
        if buffer:
            for kind, stamps, parts in buffer.runs(self.start_ns, response.captures):
                times = array("q", stamps)
                if kind:
                    assert self.shape is not None
                    response.feed_plain(self.shape.templates[kind - 1], times, parts)
                elif parts:
                    response.feed_chunks(parts, times.tolist())
            buffer.clear()
        if over and (rest := buffer.take_partial()):
            self.feed(rest, buffer.last_ns)

    def learn(self) -> Shape:
        """Learn the shape of this server's answers from what has been parsed."""
        endpoint = self.endpoint
        if self.seen is not None:
            self.shape = Shape.learn(self.seen, endpoint.shape)
            self.seen = None
        else:
            self.shape = (endpoint.shape or Shape.of(b"", ())).with_one(self.response.learn())
        endpoint.shape = self.shape
        return self.shape

    def fill(self, *, timed: bool) -> None:
        """Fill in the row, with chunk times if ``timed``. What the client itself noticed (a timeout, a stop) takes
        precedence over what the bytes say.
        """
        result = self.result
        self.parse(over=True)
        if not self.response.done and self.error is None:
            self.response.eof("the answer went on after its end")
        outcome = self.response.outcome()
        if timed:
            result.chunk_ns, result.chunk_tokens = outcome.chunk_ns, outcome.chunk_tokens
        result.input_tokens = outcome.input_tokens
        result.cached_tokens = outcome.cached_tokens
        result.output_tokens = outcome.output_tokens
        result.reasoning_tokens = outcome.reasoning_tokens
        result.finish_reason = outcome.finish_reason
        result.http_status = outcome.http_status
        result.error, result.detail = outcome.error, outcome.detail
        if self.error is not None:
            result.error, result.detail = self.error[0], clean(self.error[1], self.secret)
