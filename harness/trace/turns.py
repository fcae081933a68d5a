"""Turns of a session: which of them continue the turn before them, of traces that say lengths only.

A turn *continues* its session when its input is at least as long as the prompt of the row before it of that session
and its answer together: then that conversation was sent again, with more. Its prompt begins with that prompt, so a
server's prefix cache sees what production's saw. A shorter turn is no continuation (the history was cut, or it is not
one conversation): its prompt shares nothing, and a conversation begins with it.

All prompts of a conversation are the beginning of one endless stream of tokens, that of its first request, so nothing
of them has to be kept: a few numbers a session are, in a file where sessions are many (`harness.trace.spool`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from harness.trace.io import TraceRecord
from harness.trace.spool import Sessions

BLOCK_TOKENS = 16
"""What a conversation shares is counted in blocks of vLLM's own size: only whole ones are found again."""


class Turn(NamedTuple):
    """A row in its conversation."""

    first: int
    """Number of the row that its conversation began with: itself, if it continues nothing."""
    before_tokens: int
    """Input tokens of the turn it continues, 0 without."""
    before: tuple[int, ...]
    """Input and output tokens of each turn before it in its conversation, one after the other, where they are kept."""


def accumulates(record: TraceRecord) -> bool:
    """Whether the row's prompt is made up as a turn of its session: its text and its prefixes are not given."""
    return (
        record.session_id is not None
        and record.prefix_ids is None
        and record.text is None
        and record.messages is None
        and record.input_tokens is not None
    )


class _Last(NamedTuple):
    """A session's last row."""

    first: int
    input_tokens: int
    output_tokens: int
    lengths: tuple[int, ...]
    """Those of its conversation so far, where they are kept."""


class Turns:
    """Follows the sessions of a trace, row by row."""

    def __init__(self, *, room: int = 0, lengths: bool = False) -> None:
        """``room``: tokens that a turn must have beyond the conversation before it (a chat template's own);
        ``lengths``: keep those of all turns of a conversation.
        """
        self.continued = self.independent = 0
        """Turns, beyond the first of their session, that do and do not continue."""
        self._room, self._keep = room, lengths
        self._last = Sessions(_Last)

    def clear(self) -> None:
        """All sessions are over."""
        self._last.clear()

    def place(self, session: Hashable, number: int, tokens: int, output_tokens: int | None) -> Turn:
        """The next row of a session that `accumulates`: its number among all rows, its input and output tokens."""
        output = output_tokens or 0
        last, turn = self._last.get(session), Turn(number, 0, ())
        if last is not None:
            goes_on = tokens >= last.input_tokens + last.output_tokens + self._room
            self.continued += goes_on
            self.independent += not goes_on
            turn = Turn(last.first, last.input_tokens, last.lengths) if goes_on else turn
        lengths = (*turn.before, tokens, output) if self._keep else ()
        self._last.set(session, _Last(turn.first, tokens, output, lengths))
        return turn
