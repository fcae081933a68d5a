"""Live conversations: each turn of a session carries what the server really answered to the turns before it.

The plan says which turns go on from another (``continues``) and holds what is new in each. What was said is kept from
the end of an answer until the next turn takes it, so memory is bounded by the sessions that are open. An answer is
parsed and encoded when the event loop is idle, in the think time; where that never came, when the next turn is due.

A turn whose predecessor failed has nothing to go on from: it is not sent, nor is the rest of its session (vLLM's own
multi-turn benchmark drops such a conversation, too), and each has its row, of class ``no_history``. A client that hung
up as planned goes on from what it had read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from harness.results import Result
from scenarios.client.completion import Answer
from scenarios.payload import Draft

if TYPE_CHECKING:
    from scenarios.client.client import Client
    from scenarios.client.in_flight import Stream
    from scenarios.schedule import Planned

NO_HISTORY = "no_history"
"""Class of the row of a turn that was not sent because an earlier one failed."""


class Conversations:
    """What was said in sessions that go on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._open: dict[int, Stream] = {}  # sent, and a turn waits for the answer
        self._said: dict[int, bytes | str] = {}  # request -> history for the turn after it, or why there is none

    def history(self, planned: Planned) -> bytes | str:
        """What goes before the new part of this turn, or why that is not known. It is forgotten here."""
        if not planned.continues:
            return b""
        assert planned.after is not None
        stream = self._open.get(planned.after)
        if stream is not None:
            self._client.later.hand_over(stream)
        return self._said.pop(planned.after, f"request {planned.after}, the turn before it, has not ended")

    def send(self, planned: Planned, result: Result, history: bytes, ended: Callable[[Result], None] | None) -> None:
        """Send a turn with its history, and keep what is answered for the next one, if there is one."""
        draft = planned.draft
        assert draft is not None
        answered = partial(self._answered, draft, history) if planned.kept else None
        stream = self._client.send(
            result, draft.payload(history), ended, slice_=planned.slice,
            cancel_after_ns=planned.cancel_after_ns, timeout_ns=planned.timeout_ns, answered=answered,
            most_tokens=planned.most_tokens,
        )  # fmt: skip
        if planned.kept and planned.request_id not in self._said:
            self._open[planned.request_id] = stream

    def drop(self, planned: Planned, why: str) -> None:
        """Note that a turn is not sent, so that none can go on from it."""
        if planned.kept:
            self._said[planned.request_id] = why

    def _answered(self, draft: Draft, history: bytes, result: Result, answer: Answer) -> None:
        self._open.pop(result.request_id, None)
        if result.error not in (None, "cancelled"):
            said: bytes | str | None = f"request {result.request_id} of its session failed ({result.error})"
        else:
            said = draft.history(history, answer)
        if said is None:
            said = f"the server gave no token ids with request {result.request_id} (return_token_ids)"
        self._said[result.request_id] = said
