"""Qwen-Bailian traces (Alibaba): JSON Lines with conversations and prefix identity in blocks of 16 tokens.

===================  =================================================================================================
``chat_id``          integer, the request; ``parent_chat_id`` the one it continues, -1 for a conversation's first
``timestamp``        **seconds** from the start of the trace, a float
``input_length``     input tokens
``output_length``    output tokens
``type``             text, search, image, file, ...: not replayed
``turn``             from 1, place in the conversation
``hash_ids``         one integer per 16-token block; an id stands for its block and everything before it
===================  =================================================================================================

The session is the conversation's first ``chat_id``. A parent that lies before the file's beginning begins a session of
its own. The block size is checked on every row: the number of ids must be that of 16-token blocks, the last partial one
counted or not.

Source: alibaba-edu/qwen-bailian-usagetraces-anon, README.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from harness.trace.formats.record import MAX_ARRIVAL_S, MAX_TOKENS, Reader, RowError, TraceRecord
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    called,
    decode_error,
    fields_of,
    seconds_ns,
    shown_blocks,
)
from harness.trace.spool import Sessions

BLOCK_TOKENS = 16

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_REQUIRED = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: _Id
    parent_chat_id: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_Id, ...]
    turn: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    type: str | None = None


_decode = msgspec.json.Decoder(_Line).decode


class Bailian(Reader):
    """Reader of Qwen-Bailian traces."""

    summary = "Qwen-Bailian trace (JSON Lines: chat_id, parent_chat_id, timestamp in s, hash_ids of 16-token blocks)"
    clock = "timestamp in seconds: the rows have the fields and 16-token blocks of Bailian, not Mooncake"

    def __init__(self) -> None:
        self._root = Sessions(int)
        self._orphans = self._rows = self._long = 0
        self._copies = Copies("chat_id")

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The object has the fields that set this format apart from Mooncake's."""
        return set(_REQUIRED) <= fields_of(record).keys()

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        try:
            row = _decode(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _Line.__struct_fields__) from None
        self._copies.check(str(row.chat_id))
        whole, rest = divmod(row.input_length, BLOCK_TOKENS)
        ids = row.hash_ids
        if len(ids) == whole and rest:
            ids = (*ids, -1 - row.chat_id)  # the last, partial block has no id of its own: nobody shares it
        elif len(ids) != whole + bool(rest):
            raise RowError(
                "block mismatch",
                f"{len(ids)} hash_ids for input_length {row.input_length}, expected {whole + bool(rest)} (one per "
                f"{BLOCK_TOKENS} tokens): this is not a Bailian trace; Mooncake has 512-token blocks and milliseconds",
            )
        self._rows += 1
        self._long += len(ids) > 1
        parent = row.parent_chat_id
        before = self._root.get(parent) if parent >= 0 else None
        self._orphans += parent >= 0 and before is None
        root = before if before is not None else parent if parent >= 0 else row.chat_id
        self._root.set(row.chat_id, root)
        called(row.input_length, row.output_length)
        return TraceRecord(
            seconds_ns("timestamp", row.timestamp),
            row.input_length,
            row.output_length,
            str(root),
            None if row.turn is None else row.turn - 1,
            ids,
            BLOCK_TOKENS,
        )

    def blocks(self) -> str | None:
        """16 tokens, and how many rows show it."""
        return shown_blocks(BLOCK_TOKENS, self._rows, self._long)

    def notes(self) -> list[str]:
        """Conversations whose beginning is not in the file."""
        if not self._orphans:
            return []
        return [f"{self._orphans} requests continue one that is not in the file: their conversations begin before it"]
