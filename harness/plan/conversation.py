"""Live conversations in a plan: which part of a turn's prompt is new, and which the server's own answers will replace.

A turn *goes on* from the row before it of its session when its prompt is that row's prompt, then an answer, then
something new. Only what is new is planned; what goes before it is known when the turn is sent
(`scenarios.dispatch`). A turn that does not go on (its history was cut or rewritten, or nobody can tell where the
answer ends) is sent whole, as it was recorded, and counted by reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from harness.plan.prompts import Ids
from harness.trace.io import TraceRecord
from harness.trace.spool import Sessions

OTHER_FORM = "another form of prompt than the turn before"
OTHER_START = "the prompt does not begin with the one before it"
NO_ANSWER = "no answer stands between the prompt before it and what is new"
UNKNOWN_END = "the trace does not say the answer before it (answer), so nobody can tell where that ends in the text"
MADE_UP_TEXT = "a made-up text does not show where an answer ends: give the model's folder, with its chat template"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a row would send; one of the three is set."""

    messages: Sequence[dict[str, Any]] | None = None
    text: str | None = None
    ids: Ids | None = None

    @property
    def size(self) -> int:
        """Messages, characters or tokens."""
        return len(next(part for part in (self.messages, self.text, self.ids) if part is not None))

    def digest(self, size: int) -> bytes:
        """Of its first ``size`` messages, characters or tokens."""
        if self.messages is not None:
            raw = msgspec.json.encode(self.messages[:size], order="sorted")
        elif self.text is not None:
            raw = self.text[:size].encode()
        else:
            assert self.ids is not None
            raw = self.ids[:size].tobytes()
        return hashlib.blake2b(raw, digest_size=16).digest()

    def after(self, at: int) -> Prompt:
        """What is behind there."""
        return Prompt(
            messages=None if self.messages is None else self.messages[at:],
            text=None if self.text is None else self.text[at:],
            ids=None if self.ids is None else self.ids[at:],
        )


@dataclass(frozen=True, slots=True)
class _Before:
    """A session's last row, as far as the next one is held against it."""

    form: str
    size: int
    shared: int
    """So much of it the next prompt begins with, if it goes on: all, or whole blocks of prefix ids."""
    digest: bytes
    answer: tuple[int, bytes] | None
    """Length and digest of the recorded answer to a text."""
    output_tokens: int


class Live:
    """Follows the sessions of a plan, row by row."""

    def __init__(self, *, overlap: bool) -> None:
        """``overlap``: copies of the trace lie over each other; else one is over when the next begins."""
        self.continued = 0
        self.whole: Counter[str] = Counter()
        """Why turns, beyond the first of their session, do not go on from the one before them -> how many."""
        self._overlap = overlap
        self._copy = 0
        self._last = Sessions(_Before)

    def new(self, copy: int, record: TraceRecord, prompt: Prompt) -> Prompt | None:
        """What is new in the next row of copy ``copy``; None when it goes on from nothing."""
        if copy != self._copy and not self._overlap:
            self._last.clear()
        self._copy = copy
        if record.session_id is None:
            return None
        session = (copy, record.session_id)
        before = self._last.get(session)
        self._last.set(session, _remember(record, prompt))
        if before is None:
            return None
        at = _starts(before, record, prompt)
        if isinstance(at, str):
            self.whole[at] += 1
            return None
        self.continued += 1
        return prompt.after(at)


def _form(record: TraceRecord, prompt: Prompt) -> str:
    if prompt.messages is not None:
        return "messages"
    if prompt.text is not None:
        return "text" if record.text is not None else "made-up text"
    return "token ids"


def _remember(record: TraceRecord, prompt: Prompt) -> _Before:
    size = shared = prompt.size
    if prompt.ids is not None and record.prefix_ids is not None and record.block_tokens:
        shared = size // record.block_tokens * record.block_tokens
    answer = None
    if prompt.text is not None and record.answer:
        answer = len(record.answer), Prompt(text=record.answer).digest(len(record.answer))
    return _Before(_form(record, prompt), size, shared, prompt.digest(shared), answer, record.output_tokens or 0)


def _starts(before: _Before, record: TraceRecord, prompt: Prompt) -> int | str:
    """Where what is new begins in a prompt, or why it does not go on."""
    form = _form(record, prompt)
    if form != before.form:
        return OTHER_FORM
    if form == "made-up text":
        return MADE_UP_TEXT
    if prompt.size < before.size or prompt.digest(before.shared) != before.digest:
        return OTHER_START
    if prompt.messages is not None:
        answer, new = prompt.messages[before.size : before.size + 1], prompt.messages[before.size + 1 :]
        goes_on = answer and new and answer[0]["role"] == "assistant" and new[0]["role"] != "assistant"
        return before.size + 1 if goes_on else NO_ANSWER
    if prompt.ids is not None:
        at = before.size + before.output_tokens
        return at if at <= prompt.size else NO_ANSWER
    if before.answer is None:
        return UNKNOWN_END
    length, digest = before.answer
    at = before.size + length
    return at if prompt.size > at and prompt.after(before.size).digest(length) == digest else NO_ANSWER


def live_notes(live: Live) -> list[str]:
    """What a reader of the results must know."""
    said = [
        f"live conversation: {live.continued} turns carry what the server really answers to the turns before them, so "
        "their input lengths follow from the run"
    ]
    if live.whole:
        said.append(f"{live.whole.total()} later turns are sent as recorded: {reasons(live)}")
    return said


def reasons(live: Live) -> str:
    """Why turns do not go on, with how many."""
    return "; ".join(f"{count} x {why}" for why, count in live.whole.most_common())
