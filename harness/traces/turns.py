"""Turns of a session: which of them continue the turn before them, of traces that say lengths only.

A turn *continues* its session when its input is at least as long as the prompt of the row before it of that session
and its answer together: then that conversation was sent again, with more. Its prompt begins with that prompt, so a
server's prefix cache sees what production's saw. A shorter turn is no continuation (the history was cut, or it is not
one conversation): its prompt shares nothing, and a conversation begins with it.

All prompts of a conversation are the beginning of one endless stream of tokens, that of its first request, so nothing
of them has to be kept: four numbers a session are.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import NamedTuple

from harness.records import TraceRecord

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


class Turns:
    """Follows the sessions of a trace, row by row."""

    def __init__(self, *, room: int = 0, lengths: bool = False) -> None:
        """``room``: tokens that a turn must have beyond the conversation before it (a chat template's own);
        ``lengths``: keep those of all turns of a conversation.
        """
        self.continued = self.independent = 0
        """Turns, beyond the first of their session, that do and do not continue."""
        self._room, self._keep = room, lengths
        self._sessions: dict[Hashable, int] = {}
        self._first, self._input, self._output = array("q"), array("i"), array("i")
        self._before: dict[int, array[int]] = {}

    def clear(self) -> None:
        """All sessions are over."""
        self._sessions.clear()
        self._first, self._input, self._output = array("q"), array("i"), array("i")
        self._before.clear()

    def place(self, session: Hashable, number: int, tokens: int, output_tokens: int | None) -> Turn:
        """The next row of a session that `accumulates`: its number among all rows, its input and output tokens."""
        output = output_tokens or 0
        at = self._sessions.setdefault(session, len(self._first))
        if at == len(self._first):
            self._first.append(number)
            self._input.append(tokens)
            self._output.append(output)
            return Turn(number, 0, self._kept(at, tokens, output, begins=True))
        before = self._input[at]
        goes_on = tokens >= before + self._output[at] + self._room
        self.continued += goes_on
        self.independent += not goes_on
        if not goes_on:
            self._first[at], before = number, 0
        self._input[at], self._output[at] = tokens, output
        return Turn(self._first[at], before, self._kept(at, tokens, output, begins=not goes_on))

    def _kept(self, at: int, tokens: int, output: int, *, begins: bool) -> tuple[int, ...]:
        if not self._keep:
            return ()
        lengths = array("i") if begins else self._before[at]
        before = tuple(lengths)
        lengths.extend((tokens, output))
        self._before[at] = lengths
        return before
