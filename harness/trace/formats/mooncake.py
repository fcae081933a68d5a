"""Mooncake traces (FAST'25) and what others write in their fields (AIPerf, NVIDIA Dynamo, GuideLLM): JSON Lines.

========================  ============================================================================================
``timestamp``             milliseconds from the start of the trace. Others write seconds, or times since 1970
``input_length``          input tokens; or ``text_input``, the prompt itself
``output_length``         output tokens; left out: not stated
``hash_ids``              one integer per 512-token block of the input, the last block usually partial. An id stands for
                          its block *and everything before it*: only equal leading ids mean a shared prefix. May be left
                          out
``session_id``            the conversation
``delay``                 milliseconds from the end of the answer before, of a turn that has no ``timestamp``
========================  ============================================================================================

``len(hash_ids) == ceil(input_length / 512)`` on every row of the published traces; it is checked, because files of the
same fields with other block sizes exist (Qwen-Bailian: 16 tokens and float seconds) and would be replayed with other
prefixes and on another clock. Prompts of several blocks show Mooncake, and so milliseconds; where there are none, small
whole numbers could be seconds as well, and the unit is asked for (`harness.trace.formats.columns`).

Source: kvcache-ai/Mooncake, ``FAST25-release/traces``; ai-dynamo/aiperf, ``docs/tutorials/fixed-schedule.md`` and
``docs/benchmark-datasets.md``; vllm-project/guidellm, trace replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Annotated, Any

import msgspec

from harness.trace.formats.columns import Clock
from harness.trace.formats.record import (
    Item,
    LeftOutError,
    Place,
    Reader,
    RowError,
    Rows,
    TableOptions,
    TraceRecord,
    safe,
    whole,
)
from harness.trace.formats.values import (
    called,
    decode_object,
    fields_of,
    seconds_ns,
    shown_blocks,
    token_count,
)
from harness.trace.spool import Sessions

BLOCK_TOKENS = 512
_OTHER_BLOCKS = (8, 16, 32, 64, 128, 256, 1024)
_LOOKED_AT = 10_000
"""Rows that show what the times are."""
_FIELDS = {"timestamp", "input_length", "text_input", "output_length", "hash_ids", "session_id", "delay"}

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ids = tuple[_Id, ...]


class Mooncake(Reader):
    """Reader of Mooncake traces."""

    summary = "Mooncake trace (JSON Lines: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks)"

    def __init__(self) -> None:
        self._asked = TableOptions()
        self._clock: Clock | None = None
        self._rows = self._long = self._delayed = 0
        self._last = Sessions(int)
        """Session -> its last arrival."""
        self._others: dict[str, None] = {}

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Its names for lengths, no object as ``hash_ids`` (RAGPulse) and no ``chat_id`` (Bailian)."""
        fields = fields_of(record)
        lengths = {"input_length", "text_input"} & fields.keys()
        others = {"timestamp", "delay", "hash_ids", "text_input"} & fields.keys()
        return bool(lengths and others) and "chat_id" not in fields and not fields.get("hash_ids", b"").startswith(b"{")

    def ask(self, asked: TableOptions) -> None:
        """The unit of the times, as the user says."""
        if asked.columns:
            super().ask(asked)
        self._asked = asked

    @property
    def clock(self) -> str:  # type: ignore[override]
        """As found."""
        return self._clock.said if self._clock is not None else "timestamp in milliseconds"

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        """Times of a calendar that go back are of rows in another order."""
        return self._clock is None or not self._clock.absolute

    def unclear(self) -> str | None:
        """Why the times have no unit."""
        return self._clock.unclear if self._clock is not None else None

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """What each line holds, after a look at the first ones."""
        made = _decoded(records)
        first = [] if self._clock is not None else list(islice(made, _LOOKED_AT))
        if self._clock is None:
            self._look([row for _, row in first if isinstance(row, dict)])
        for place, row in chain(first, made):
            try:
                if isinstance(row, RowError):
                    raise row
                yield place, self._row(row)
            except (RowError, LeftOutError) as e:
                yield place, e

    def parse(self, record: bytes) -> TraceRecord | Rows:
        """Not used: what the times are is found first."""
        raise NotImplementedError

    def blocks(self) -> str | None:
        """512 tokens, and how many rows show it."""
        return shown_blocks(BLOCK_TOKENS, self._rows, self._long)

    def notes(self) -> list[str]:
        """Turns without a time, fields that are not replayed, a clock without a unit."""
        said = []
        if self._delayed:
            said.append(
                f"{self._delayed} turns have a delay after the answer before them and no time: planned so long after "
                "the turn before them (--sessions wait holds them until it has ended)"
            )
        if self._others:
            said.append(f"fields not replayed: {safe(', '.join(self._others), 500)}")
        if self._clock is not None and self._clock.unclear:
            said.append(self._clock.unclear)
        return said

    def _look(self, rows: list[dict[str, Any]]) -> None:
        """Several blocks of 512 tokens, as many as the length says, are Mooncake's own, and so is its clock then."""
        self._clock = Clock("timestamp", self._asked.unit)
        times = [row["timestamp"] for row in rows if row.get("timestamp") is not None]
        self._clock.look(times)
        shown = sum(_is_long(row) for row in rows)
        if shown and not self._clock.absolute and self._asked.unit is None and times:
            self._clock.know("ms", "timestamp in milliseconds: beside the 512-token blocks of Mooncake")

    def _row(self, row: dict[str, Any]) -> TraceRecord:
        if "chat_id" in row:
            raise RowError("unknown field", "unknown field 'chat_id': a row of Bailian (--trace-format bailian)")
        if len(self._others) < 50:
            self._others |= {name: None for name in row if name not in _FIELDS}
        input_tokens = token_count("input_length", row.get("input_length"))
        output_tokens = token_count("output_length", row.get("output_length"))
        text, session = row.get("text_input"), row.get("session_id")
        if text is not None and not isinstance(text, str):
            raise RowError("bad text_input", "text_input is no text")
        if input_tokens is None and not text:
            raise RowError("bad fields", "missing required field input_length (or text_input)")
        ids = self._blocks(row["hash_ids"], input_tokens) if row.get("hash_ids") is not None and not text else None
        session = None if session is None else str(session)
        arrival_ns, think_s = self._when(row, session)
        called(input_tokens, output_tokens)
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, session, prefix_ids=ids,
            block_tokens=None if ids is None else BLOCK_TOKENS, text=text or None, think_s=think_s,
        )  # fmt: skip

    def _blocks(self, value: Any, input_tokens: int | None) -> tuple[int, ...]:
        try:
            ids = msgspec.convert(value, _ids)
        except msgspec.ValidationError as e:
            raise RowError("bad fields", f"hash_ids: {e}") from None
        blocks = -(-(input_tokens or 0) // BLOCK_TOKENS)
        if len(ids) != blocks:
            raise RowError("block mismatch", _mismatch(len(ids), input_tokens or 0, blocks))
        self._rows += 1
        self._long += blocks > 1
        return ids

    def _when(self, row: dict[str, Any], session: str | None) -> tuple[int | None, float | None]:
        """(arrival in ns, s to think): of a turn with a delay alone, so long after the turn before it."""
        assert self._clock is not None
        think_s = None
        if row.get("delay") is not None and session is not None:
            think_s = _milliseconds(row["delay"]) / 1e9
        if row.get("timestamp") is not None:
            arrival_ns = self._clock.ns(row["timestamp"])
        elif think_s is not None and session is not None and (last := self._last.get(session)) is not None:
            self._delayed += 1
            arrival_ns = last + round(think_s * 1e9)
        else:
            arrival_ns = None
        if session is not None and arrival_ns is not None:
            self._last.set(session, arrival_ns)
        return arrival_ns, think_s


def _milliseconds(value: Any) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RowError("bad delay", "delay is no number of milliseconds")
    return seconds_ns("delay", value / 1000)


def _decoded(records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, dict[str, Any] | RowError]]:
    for place, record in records:
        try:
            yield place, decode_object(whole(record))
        except RowError as e:
            yield place, e


def _is_long(row: dict[str, Any]) -> bool:
    ids, tokens = row.get("hash_ids"), row.get("input_length")
    return isinstance(ids, list) and len(ids) > 1 and isinstance(tokens, int) and len(ids) == -(-tokens // BLOCK_TOKENS)


def _mismatch(ids: int, tokens: int, expected: int) -> str:
    problem = f"{ids} hash_ids for input_length {tokens}, expected {expected} (one per {BLOCK_TOKENS} tokens)"
    fits = [str(size) for size in _OTHER_BLOCKS if -(-tokens // size) == ids]
    if not fits:
        return problem
    return (
        f"{problem}. They fit blocks of {' or '.join(fits)} tokens: this is not a Mooncake trace. "
        "Qwen-Bailian (--trace-format bailian) has 16-token blocks and seconds; else write our JSON Lines with "
        "block_tokens"
    )
