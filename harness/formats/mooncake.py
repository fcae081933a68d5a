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

from harness.formats.jsonl import DECODE_ERRORS, decode_error, fields_of
from harness.formats.row import MAX_ARRIVAL_S, MAX_TOKENS, FailedCallError, Row, RowError

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


class Mooncake:
    """Reader of Mooncake traces."""

    summary = "Mooncake trace (JSON Lines: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks)"
    has_header = False

    @staticmethod
    def sniff(line: bytes) -> bool:
        """The object has the four fields, and ``hash_ids`` is a list (RAGPulse has an object there)."""
        fields = fields_of(line)
        return set(_Line.__struct_fields__) <= fields.keys() and fields["hash_ids"].startswith(b"[")

    def header(self, line: bytes) -> None:
        """There is none."""

    def parse(self, line: bytes) -> Row:
        """Read one line."""
        try:
            row = _decode(line)
        except DECODE_ERRORS as e:
            raise decode_error(e, line, _Line.__struct_fields__) from None
        blocks = -(-row.input_length // BLOCK_TOKENS)
        if len(row.hash_ids) != blocks:
            raise RowError("block mismatch", _mismatch(len(row.hash_ids), row.input_length, blocks))
        if not row.input_length or not row.output_length:
            raise FailedCallError
        return Row(
            row.timestamp * 1_000_000, row.input_length, row.output_length, None, None, row.hash_ids, BLOCK_TOKENS
        )

    def notes(self) -> list[str]:
        """None of its own; the 3 s grid of the real traces is found by looking at the arrivals."""
        return []


def _mismatch(ids: int, tokens: int, expected: int) -> str:
    problem = f"{ids} hash_ids for input_length {tokens}, expected {expected} (one per {BLOCK_TOKENS} tokens)"
    fits = [str(size) for size in _OTHER_BLOCKS if -(-tokens // size) == ids]
    if not fits:
        return problem
    return (
        f"{problem}. They fit blocks of {' or '.join(fits)} tokens: this is not a Mooncake trace. "
        "Qwen-Bailian has 16-token blocks and seconds; convert it to our JSON Lines with block_tokens set"
    )
