"""RAGPulse traces: JSON Lines of a retrieval-augmented service; prompts are lists of reused components.

===================  =================================================================================================
``timestamp``        a **string** of whole seconds. The published file holds two recordings one after the other: time
                     goes back to 0 in the middle, which is refused until ``--part 1`` or ``--part 2`` picks one
``input_length``     input tokens
``output_length``    output tokens
``hash_ids``         an object of lists of component ids (system prompt, passages, history, web search, user input), in
                     the order of the prompt
``session_id``       string
===================  =================================================================================================

A component may stand at any place of a prompt, but a server's prefix cache reuses a prompt only from its beginning:
two requests share the tokens of the components that lead both. How long a component is stands in five files beside the
trace (``1_sys_prompt.jsonl`` ... ``5_web_search.jsonl``, plain or compressed). With them the leading run is given as
blocks of 16 tokens; the few template tokens by which ``input_length`` exceeds the sum are taken to stand at the end
and to be shared with nobody. Without the files no prefix is known, and a note says so.

Source: flashserve/RAGPulse, README.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

import msgspec

from harness.errors import TraceError
from harness.trace.formats.record import MAX_TOKENS, Reader, RowError, TraceRecord
from harness.trace.formats.values import DECODE_ERRORS, called, decode_error, decode_object, fields_of, seconds_ns, show
from harness.trace.source import open_source, records

BLOCK_TOKENS = 16
_TABLES = {
    "sys_prompt": ("1_sys_prompt", "sys_prompt_id"),
    "passages_ids": ("2_passages", "passage_id"),
    "history": ("3_history", "history_id"),
    "user_input": ("4_user_input", "user_input_id"),
    "web_search": ("5_web_search", "web_search_id"),
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_GOLDEN = 0x9E3779B97F4A7C15

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: str
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: dict[str, list[int]]
    session_id: str | None = None


_decode = msgspec.json.Decoder(_Line).decode


class RagPulse(Reader):
    """Reader of RAGPulse traces."""

    summary = "RAGPulse trace (JSON Lines: timestamp as a string of s, hash_ids an object of component ids)"
    clock = "timestamp in seconds: strings of whole numbers, beside components as RAGPulse has them"

    def __init__(self) -> None:
        self._lengths: dict[str, dict[int, int]] = {}
        self._rows = 0
        self._unknown = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """``hash_ids`` is an object."""
        fields = fields_of(record)
        return {"timestamp", "input_length", "output_length"} <= fields.keys() and fields.get(
            "hash_ids", b""
        ).startswith(b"{")

    def beside(self, path: Path) -> None:
        """Read the length tables that lie beside the trace."""
        for name, (stem, key) in _TABLES.items():
            file = next((f for suffix in _SUFFIXES if (f := path.parent / f"{stem}{suffix}").is_file()), None)
            if file is not None:
                self._lengths[name] = _table(file, key)

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        try:
            row = _decode(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _Line.__struct_fields__) from None
        if not re.fullmatch(r"\d{1,10}", row.timestamp, re.ASCII):
            raise RowError("bad timestamp", f"timestamp is {show(row.timestamp)}, expected whole seconds")
        if other := row.hash_ids.keys() - _TABLES.keys():
            raise RowError("bad hash_ids", f"hash_ids has {', '.join(sorted(other))}, expected {', '.join(_TABLES)}")
        self._rows += 1
        called(row.input_length, row.output_length)
        ids = self._blocks(row) if len(self._lengths) == len(_TABLES) else None
        return TraceRecord(
            seconds_ns("timestamp", int(row.timestamp)), row.input_length, row.output_length, row.session_id, None, ids,
            None if ids is None else BLOCK_TOKENS,
        )  # fmt: skip

    def blocks(self) -> str | None:
        """16 tokens, made from the components' lengths."""
        known = len(self._lengths) == len(_TABLES)
        return (
            f"{BLOCK_TOKENS} tokens, made here from the components' lengths in the files beside it" if known else None
        )

    def notes(self) -> list[str]:
        """What is known of shared prefixes."""
        if len(self._lengths) < len(_TABLES):
            missing = ", ".join(f"{stem}.jsonl" for name, (stem, _) in _TABLES.items() if name not in self._lengths)
            return [f"prefix reuse not known: put the component lengths ({missing}) beside the trace"]
        notes = [f"prefixes: the components that lead a prompt, in blocks of {BLOCK_TOKENS} tokens"]
        if self._unknown:
            notes.append(f"{self._unknown} rows have a component of unknown length: nothing is shared from there on")
        return notes

    def _blocks(self, row: _Line) -> tuple[int, ...]:
        """One id per block: of the chain of components that reach into it, and its place."""
        chain = hashlib.blake2b(digest_size=8)
        ids: list[int] = []
        end = 0
        for name, components in row.hash_ids.items():
            for component in components:
                length = self._lengths[name].get(component)
                if length is None:
                    self._unknown += 1
                    return self._tail(row, ids)
                chain.update(f"{name} {component};".encode())
                end += length
                base = int.from_bytes(chain.digest(), "little")
                # A block belongs to the component its last token is in: whoever shares that shares all before it.
                ids += [(base + at * _GOLDEN) >> 1 & 2**62 - 1 for at in range(len(ids), end // BLOCK_TOKENS)]
        if end > row.input_length:
            raise RowError(
                "component mismatch", f"components of {end} tokens in all, but input_length is {row.input_length}"
            )
        return self._tail(row, ids)

    def _tail(self, row: _Line, ids: list[int]) -> tuple[int, ...]:
        """The ids, filled up with some that nobody shares."""
        blocks = -(-row.input_length // BLOCK_TOKENS)
        return tuple(ids[:blocks] + [-(self._rows << 24 | at) - 1 for at in range(len(ids), blocks)])


def _table(file: Path, key: str) -> dict[int, int]:
    lengths: dict[int, int] = {}
    try:
        for number, record in records(open_source(file)):
            row = decode_object(record)
            id_, length = row.get(key), row.get("token_length")
            if type(id_) is not int or type(length) is not int or not 0 <= length <= MAX_TOKENS:
                raise RowError("bad table", f"{file}:{number}: expected {key} and token_length, found {show(record)}")
            lengths[id_] = length
    except TraceError as e:
        raise RowError("bad table", str(e)) from None
    return lengths
