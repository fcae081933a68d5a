"""One request on its way: what was read for it and when, until that is parsed."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from harness.results import Result
from scenarios.completion import clean
from scenarios.hot_path import Kept
from scenarios.plain import Template
from scenarios.response import Response
from scenarios.told import Answered, ToldResponse

if TYPE_CHECKING:
    from scenarios.connection import Connection
    from scenarios.target import Target


class Stream:
    """One request on its way: the row it will become, and what has been read for it."""

    __slots__ = (
        "answered", "connection", "ended", "error", "hang_up", "kept", "last_ns", "lazy", "payload", "queued", "raw",
        "reads", "response", "result", "retry", "secret", "sent_ns", "slice", "stamps", "start_ns", "target",
        "template", "tried_ns",
    )  # fmt: skip

    def __init__(
        self,
        result: Result,
        payload: bytes,
        target: Target,
        secret: str | None,
        ended: Callable[[Result], None] | None,
        slice_: int = 0,
        answered: Answered | None = None,
        start_ns: int = 0,
    ) -> None:
        self.result = result
        self.answered = answered
        self.payload = payload
        self.target = target
        self.secret = secret
        self.ended = ended
        self.slice = slice_
        self.start_ns = start_ns  # of the run clock: what is parsed has the times of that
        self.queued = False  # it waits to be parsed
        self.hang_up: Any = None  # timer
        self.retry: Any = None  # timer
        self.begin(monotonic_ns())
        self.sent_ns = self.tried_ns

    def begin(self, now_ns: int) -> None:
        """Forget what was read: it is sent, perhaps again, at ``now_ns``."""
        self.response = Response(self.secret) if self.answered is None else ToldResponse(self.secret, self.answered)
        self.kept = Kept()  # texts of plain events, and then
        self.reads: list[bytes] = []  # whatever came after those
        self.stamps: list[int] = []
        self.template: Template | None = None  # of what is kept
        self.raw = True  # what arrives next is a read, whatever it is
        self.lazy = False  # the end can be told from the last bytes, so nothing need be parsed before it
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
    def heard_ns(self) -> int:
        """When something arrived last, or else when it was sent."""
        return self.stamps[-1] if self.stamps else self.kept.last_ns or self.last_ns

    def parse(self) -> None:
        """Feed what was read to the response. The hot path holds ``kept``: it stays the same object."""
        self.last_ns = self.heard_ns
        if self.kept:
            assert self.template is not None
            self.response.feed_kept(self.template, self.kept, self.start_ns)
            self.kept.clear()
        if self.reads:
            start_ns = self.start_ns
            self.response.feed(self.reads, [stamp - start_ns for stamp in self.stamps])
            self.reads.clear()
            self.stamps.clear()
        if self.raw and self.lazy and self.connection is not None:
            self.template = self.response.plain
            if self.template is not None:
                self.raw = False
                self.connection.keep_texts(self.kept, self.template)

    def fill(self, *, timed: bool) -> None:
        """Fill the row from the answer, with times of chunks where they are ``timed``; what the client itself saw (a
        timeout, a stop) outranks what the bytes say.
        """
        result = self.result
        if not self.response.done and self.error is None:
            self.response.eof("the answer went on after its end")
        facts = self.response.facts()
        if timed:
            result.chunk_ns, result.chunk_tokens = facts.chunk_ns, facts.chunk_tokens
        result.input_tokens = facts.input_tokens
        result.cached_tokens = facts.cached_tokens
        result.output_tokens = facts.output_tokens
        result.finish_reason = facts.finish_reason
        result.http_status = facts.http_status
        result.error, result.detail = facts.error, facts.detail
        if self.error is not None:
            result.error, result.detail = self.error[0], clean(self.error[1], self.secret)
