"""Mooncake traces (FAST'25): JSON Lines with prefix identity in blocks of 512 tokens.

========================  ============================================================================================
``timestamp``             integer milliseconds from the start of the trace
``input_length``          input tokens
``output_length``         output tokens
``hash_ids``              one integer per 512-token block of the input, the last block usually partial. An id stands for
                          its block *and everything before it*: only equal leading ids mean a shared prefix
========================  ============================================================================================

``len(hash_ids) == ceil(input_length / 512)`` on every row of the published traces; it is checked, because files of the
same fields with other block sizes exist (Qwen-Bailian: 16 tokens and float seconds) and would be replayed with other
prefixes and on another clock.

Source: kvcache-ai/Mooncake, ``FAST25-release/traces``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from harness.formats.row import MAX_ARRIVAL_S, MAX_TOKENS, Reader, Row, RowError
from harness.formats.values import DECODE_ERRORS, called, decode_error, fields_of, shown_blocks

BLOCK_TOKENS = 512
_OTHER_BLOCKS = (8, 16, 32, 64, 128, 256, 1024)

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S * 1000)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_Id, ...]


_decode = msgspec.json.Decoder(_Line).decode


class Mooncake(Reader):
    """Reader of Mooncake traces."""

    summary = "Mooncake trace (JSON Lines: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks)"
    clock = "timestamp in milliseconds: whole numbers, beside the 512-token blocks of Mooncake"

    def __init__(self) -> None:
        self._rows = self._long = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The four fields, ``hash_ids`` a list (RAGPulse has an object there) and no ``chat_id`` (that is Bailian)."""
        fields = fields_of(record)
        return (
            set(_Line.__struct_fields__) <= fields.keys()
            and "chat_id" not in fields
            and fields["hash_ids"].startswith(b"[")
        )

    def parse(self, record: bytes) -> Row:
        """Read one line."""
        try:
            row = _decode(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _Line.__struct_fields__) from None
        blocks = -(-row.input_length // BLOCK_TOKENS)
        if len(row.hash_ids) != blocks:
            raise RowError("block mismatch", _mismatch(len(row.hash_ids), row.input_length, blocks))
        self._rows += 1
        self._long += blocks > 1
        called(row.input_length, row.output_length)
        return Row(
            row.timestamp * 1_000_000, row.input_length, row.output_length, None, None, row.hash_ids, BLOCK_TOKENS
        )

    def blocks(self) -> str | None:
        """512 tokens, and how many rows show it."""
        return shown_blocks(BLOCK_TOKENS, self._rows, self._long)


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
