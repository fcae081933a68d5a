"""Trace records -> batches of plan rows: prompts, sessions, hang-ups. `harness.plan.build` decides how many and
when.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.errors import PlanError
from harness.plan.arrivals import Arrangement, Times
from harness.plan.chat import Chat, Live, Made, Prompt
from harness.plan.file import SCHEMA
from harness.plan.prompts import Ids, Vocabulary
from harness.plan.spec import PlanSpec
from harness.trace.formats.record import safe
from harness.trace.io import Trace, TraceRecord
from harness.trace.prefix import Turns, accumulates
from harness.trace.spool import Sessions

# Batches are bounded in rows and in tokens or characters, so that memory is, whatever the trace holds.
_BATCH_ROWS = 1024
_BATCH_SIZE = 2_000_000

Copied = tuple[int, TraceRecord]
"""A row and which copy of the trace it is of: a trace can be begun again, or be laid over itself."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A reading of the trace that takes some of its rows."""

    open_: contextlib.ExitStack
    rows: Iterator[tuple[int, TraceRecord]]
    held: dict[int, TraceRecord]
    """Read already, and sent later: turns of sessions that lie over each other."""

    def take(self, wanted: int | None) -> TraceRecord | None:
        """The row of that number, or the next; None when there is none."""
        if wanted in self.held:
            return self.held.pop(wanted)
        for row, record in self.rows:
            if wanted is None or row == wanted:
                return record
            self.held[row] = record
        return None


class _LastTurn(NamedTuple):
    slice: int
    request_id: int
    turn: int | None


@dataclass(slots=True)
class Batches:
    """Reads the trace a second time and turns it into batches of `SCHEMA`."""

    trace: Trace
    spec: PlanSpec
    vocabulary: Vocabulary | None
    rows: int
    scheduled: Times | None
    warmup: int
    cancelled: npt.NDArray[np.bool_]
    chat: Chat | None = None
    arrangement: Arrangement | None = None
    """null: the rows in trace order, from the beginning again where ``rows`` are too few."""
    live: Live | None = None
    """What became of the live conversations of the last `of`; null without."""
    _alike: dict[int, int] = field(default_factory=dict)
    """Copy -> the copy that it shares made-up prefixes with, where it is another."""
    _turns: Turns = field(default_factory=Turns)
    _last: Sessions[_LastTurn] = field(default_factory=lambda: Sessions(_LastTurn))
    _slices: int = 0

    def of(self, n: int) -> Iterator[pa.RecordBatch]:
        """The first ``n`` requests. Raises `PlanError` when the trace is no longer what it was."""
        in_turn = self.arrangement is None or not self.arrangement.overlap
        done, self._slices, self._last = 0, 0, Sessions(_LastTurn, in_turn=in_turn)
        parts = self.arrangement.parts if self.arrangement else []
        self._alike = {part.copy: part.prompts for part in parts if part.prompts is not None}
        room = self.chat.room if self.chat is not None else None
        self._turns = Turns(room=room or 0, lengths=room is not None, in_turn=in_turn)
        self.live = Live(in_turn=in_turn) if self.spec.conversation == "live" else None
        with contextlib.closing(self._copied(n) if self.arrangement is None else self._arranged(n)) as rows:
            for chunk in _chunks(rows):
                yield self._batch(chunk, done)
                done += len(chunk)
        if done != n:
            raise PlanError(f"{self.trace.path}: {n} requests before, now {done}: it changed while it was read")

    def _copied(self, n: int) -> Generator[Copied, None, None]:
        for copy in range(-(-n // self.rows)):
            with contextlib.closing(iter(self.trace)) as records:
                read = 0
                for record in islice(records, min(self.rows, n - copy * self.rows)):
                    read += 1
                    yield copy, record
            if read < min(self.rows, n - copy * self.rows):
                return

    def _arranged(self, n: int) -> Generator[Copied, None, None]:
        """Rows as arranged: each part is a reading of its own, so that none need be held.

        A reading is open from its first request to its last: parts that follow each other may be many.
        """
        assert self.arrangement is not None
        parts, order = self.arrangement.parts, self.arrangement.part[:n]
        left = np.bincount(order, minlength=len(parts))
        with contextlib.ExitStack() as open_:
            readings: dict[int, _Reading] = {}
            for at, part in enumerate(map(int, order)):
                if part not in readings:
                    one = open_.enter_context(contextlib.ExitStack())
                    rows = one.enter_context(contextlib.closing(iter(self.trace)))
                    readings[part] = _Reading(one, compress(enumerate(rows), parts[part].rows.data), {})
                wanted = None if self.arrangement.rows is None else int(self.arrangement.rows[at])
                record = readings[part].take(wanted)
                if record is None:
                    return
                yield parts[part].copy, record
                left[part] -= 1
                if not left[part]:
                    readings.pop(part).open_.close()

    def _batch(self, rows: list[Copied], first: int) -> pa.RecordBatch:
        n, i = len(rows), range(first, first + len(rows))
        chunk = [record for _, record in rows]
        made = self._prompts(rows, first)
        parts: list[Prompt | None] = [None] * n
        if self.live is not None:
            parts = [self.live.new(copy, record, p) for (copy, record), p in zip(rows, made, strict=True)]
        sent = [whole if part is None else part for whole, part in zip(made, parts, strict=True)]
        slices, waits = zip(*(self._slice(*row, at) for row, at in zip(rows, i, strict=True)), strict=True)
        columns = {
            "request_id": [*i],
            "phase": ["warmup" if request_id < self.warmup else "measured" for request_id in i],
            "scheduled_ns": None if self.scheduled is None else self.scheduled[first : first + n],
            "slice": slices,
            "after": waits,
            "think_ns": [
                None if after is None else round((r.think_s or 0.0) * 1e9)
                for after, r in zip(waits, chunk, strict=True)
            ],
            "cancel_after_ns": [self._cancel_after_ns(*each) for each in zip(i, chunk, strict=True)],
            # At least one: a time too short for a nanosecond is not no time.
            "timeout_ns": [None if r.timeout_s is None else max(round(r.timeout_s * 1e9), 1) for r in chunk],
            "continues": [None if part is None else True for part in parts],
            "model": [record.adapter for record in chunk],
            # Of a text, the trace's count is another tokenizer's: only the server knows.
            "input_tokens": [prompt.tokens for prompt in made],
            "output_tokens": [record.output_tokens for record in chunk],
            "prompt_text": [prompt.text for prompt in sent],
            "messages": [None if p.messages is None else msgspec.json.encode(p.messages).decode() for p in sent],
            "prompt_token_ids": _id_lists([prompt.ids for prompt in sent]),
        }
        arrays = {name: pa.nulls(n) if column is None else column for name, column in columns.items()}
        return pa.record_batch([pa.array(arrays[f.name], f.type) for f in SCHEMA], schema=SCHEMA)

    def _cancel_after_ns(self, i: int, record: TraceRecord) -> int | None:
        if record.cancel_after_s is not None:
            return round(record.cancel_after_s * 1e9)
        return round(self.spec.cancel[1] * 1e9) if self.spec.cancel and self.cancelled[i] else None

    def _prompts(self, rows: list[Copied], first: int) -> list[Prompt]:
        """What each row sends: the trace's own text or messages where it has them, else a prompt made up for it."""
        if self.spec.bare:
            return [self._length(copy, record, i) for i, (copy, record) in enumerate(rows, first)]
        made = [self._made(copy, record, i) for i, (copy, record) in enumerate(rows, first)]
        wanted = [each for each in made if each is not None]
        if self.chat is not None:
            chats = zip(wanted, self.chat.messages(wanted), strict=True)
            prompts = [Prompt(tokens=m.tokens, messages=chat) for m, chat in chats]
        elif self.spec.as_text and self.vocabulary is not None:
            texts = self.vocabulary.texts([m.ids for m in wanted])
            prompts = [Prompt(tokens=m.tokens, text=text) for m, text in zip(wanted, texts, strict=True)]
        else:
            prompts = [Prompt(tokens=m.tokens, ids=m.ids) for m in wanted]
        left = iter(prompts)
        return [
            Prompt(messages=record.messages, text=record.text) if each is None else next(left)
            for (_, record), each in zip(rows, made, strict=True)
        ]

    def _length(self, copy: int, record: TraceRecord, request_id: int) -> Prompt:
        """How long a prompt is, and its tokens only where others share some."""
        if record.input_tokens is None:
            raise PlanError(
                f"{self.trace.path}:{record.line}: a text without a number of tokens, which only a tokenizer could "
                f"count: simulate a trace of lengths ('harness trace anonymize' writes one)"
            )
        if record.prefix_ids is None and not accumulates(record):
            return Prompt(tokens=record.input_tokens)
        made = self._made(copy, record, request_id)
        return Prompt(tokens=record.input_tokens, ids=None if made is None else made.ids)

    def _made(self, copy: int, record: TraceRecord, request_id: int) -> Made | None:
        """What the prompt is made from; None where the trace has its own."""
        if record.text is not None or record.messages is not None:
            return None
        assert self.vocabulary is not None and record.input_tokens is not None
        tokens = record.input_tokens if self.chat is None else max(record.input_tokens, self.chat.shortest)
        key, before = request_id, tuple[int, ...]()
        if accumulates(record):
            turn = self._turns.place((copy, record.session_id), request_id, tokens, record.output_tokens)
            key, before = turn.first, turn.before
        seed = _seed_of(self.spec.seed, self._alike.get(copy, copy))
        ids = self.vocabulary.token_ids(
            tokens, key, seed=seed, prefix_ids=record.prefix_ids, block_tokens=record.block_tokens
        )
        return Made(ids=ids, tokens=tokens, before=before)

    def _slice(self, copy: int, record: TraceRecord, request_id: int) -> tuple[int, int | None]:
        session = (copy, record.session_id)
        last = None if record.session_id is None else self._last.get(session)
        slice_ = self._slices if last is None else last.slice
        self._slices += last is None
        if record.session_id is not None:
            self._last.set(session, _LastTurn(slice_, request_id, record.turn))
        if last is None or self.spec.sessions != "wait":
            return slice_, None
        if (last.turn or 0) > (record.turn if record.turn is not None else 2**31):
            raise PlanError(
                f"{self.trace.path}:{record.line}: turn {record.turn} of session {safe(str(record.session_id), 80)!r} "
                f"comes after its turn {last.turn}: a turn cannot wait for a later one; put the rows in order"
            )
        return slice_, last.request_id


def _seed_of(seed: int, copy: int) -> int:
    """The seed of a copy's prompts: shared prefixes of one pass over the trace must be unknown to the next."""
    if not copy:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {copy}".encode(), digest_size=8).digest(), "little")


def _chunks(rows: Iterator[Copied]) -> Iterator[list[Copied]]:
    chunk: list[Copied] = []
    size = 0
    for row in rows:
        chunk.append(row)
        record = row[1]
        if record.messages is not None:
            size += sum(len(message["content"]) for message in record.messages)
        else:
            size += len(record.text) if record.text is not None else record.input_tokens or 0
        if len(chunk) == _BATCH_ROWS or size >= _BATCH_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _id_lists(prompts: list[Ids | None]) -> pa.Array:
    offsets = np.cumsum([0] + [0 if ids is None else len(ids) for ids in prompts], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype=np.int32), *(ids for ids in prompts if ids is not None)])
    missing = pa.array([ids is None for ids in prompts])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)
