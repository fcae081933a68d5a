"""Traces that were published for research: Azure, BurstGPT, Bailian and RAGPulse (Mooncake: a module of its own).

Azure LLM inference traces: CSV with wall-clock arrivals and token counts, nothing else.

Columns are found by name: ``TIMESTAMP`` (``2023-11-16 18:17:03.9799600``, UTC when no zone is given; the 2024 files
have six digits and ``+00:00``), ``ContextTokens`` (input tokens), ``GeneratedTokens`` (output tokens). Lines end in
CRLF or LF, the last one perhaps in neither. There is no session, no prefix identity, no model and no latency. What
spreadsheets and pandas make of these files is read too: see `harness.trace.formats.table`.

Source: Azure/AzurePublicDataset, ``AzureLLMInferenceDataset2023.md`` and ``...2024.md``.

BurstGPT traces: CSV of ChatGPT and GPT-4 calls at a university, on a clock of whole seconds.

====================  ================================================================================================
``Timestamp``         **seconds** from midnight of the first day; integers in versions 1 and 2, floats that do not begin
                      at zero in version 3
``Session ID``        version 3 only, inserted as second column; empty on rows of the API log
``Request tokens``    input tokens
``Response tokens``   output tokens; zero is a call that failed
``Total tokens``      their sum, checked
====================  ================================================================================================

``Model`` is kept; ``Log Type`` and version 3's ``Elapsed time`` (whole seconds to the last token) are not replayed.
Columns are found by name.

Source: HPMLL/BurstGPT, README; Wang et al., *BurstGPT*, KDD 2025.

Qwen-Bailian traces (Alibaba): JSON Lines with conversations and prefix identity in blocks of 16 tokens.

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

RAGPulse traces: JSON Lines of a retrieval-augmented service; prompts are lists of reused components.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from harness.errors import TraceError
from harness.trace.formats.columns import Clock
from harness.trace.formats.record import MAX_ARRIVAL_S, MAX_TOKENS, Reader, Role, RowError, TraceRecord
from harness.trace.formats.table import TableReader, header_of
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    called,
    decode_error,
    decode_object,
    fields_of,
    seconds_ns,
    show,
    shown_blocks,
    token_count,
)
from harness.trace.source import open_source, records
from harness.trace.spool import Sessions


class Azure(TableReader):
    """Reader of Azure LLM inference traces (2023, 2024 and later)."""

    summary = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"
    others_first: ClassVar[bool] = False
    names: ClassVar[Mapping[Role, str]] = {
        "arrival": "TIMESTAMP", "input": "ContextTokens", "output": "GeneratedTokens",
    }  # fmt: skip

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The header names all three columns."""
        return set(cls.names.values()) <= set(header_of(record)[1])

    def clock_of(self, name: str) -> Clock:
        """Dates and times."""
        return Clock(name).iso()


_TOTAL = "Total tokens"


class BurstGPT(TableReader):
    """Reader of BurstGPT traces, versions 1 to 3."""

    summary = "BurstGPT trace (CSV: Timestamp in s, Request tokens, Response tokens; v3 with Session ID)"
    others_first: ClassVar[bool] = False
    names: ClassVar[Mapping[Role, str]] = {
        "arrival": "Timestamp", "input": "Request tokens", "output": "Response tokens",
    }  # fmt: skip
    checked: ClassVar[frozenset[str]] = frozenset({_TOTAL})

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The header names the columns that all versions have."""
        return {*cls.names.values(), _TOTAL} <= set(header_of(record)[1])

    def clock_of(self, name: str) -> Clock:
        """Seconds."""
        clock = Clock(name)
        clock.know("s", "Timestamp in seconds: the header is that of BurstGPT, whose totals were checked on every row")
        return clock

    def row(self, row: Mapping[str, Any]) -> TraceRecord:
        """The row, its total checked."""
        counts = [token_count(name, row.get(name)) for name in ("Request tokens", "Response tokens", _TOTAL)]
        if None not in counts and sum(counts[:2]) != counts[2]:  # type: ignore[arg-type]
            raise RowError(
                "bad Total tokens",
                f"Total tokens is {show(str(row.get(_TOTAL)))}, but request and response are {counts[0]} + {counts[1]}",
            )
        return super().row(row)


BLOCK_TOKENS = 16

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_REQUIRED = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")


class _BailianLine(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: _Id
    parent_chat_id: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_Id, ...]
    turn: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    type: str | None = None


_decode_bailian = msgspec.json.Decoder(_BailianLine).decode


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
            row = _decode_bailian(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _BailianLine.__struct_fields__) from None
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


_TABLES = {
    "sys_prompt": ("1_sys_prompt", "sys_prompt_id"),
    "passages_ids": ("2_passages", "passage_id"),
    "history": ("3_history", "history_id"),
    "user_input": ("4_user_input", "user_input_id"),
    "web_search": ("5_web_search", "web_search_id"),
}
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_GOLDEN = 0x9E3779B97F4A7C15


class _RagPulseLine(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: str
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: dict[str, list[int]]
    session_id: str | None = None


_decode_ragpulse = msgspec.json.Decoder(_RagPulseLine).decode


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
            row = _decode_ragpulse(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _RagPulseLine.__struct_fields__) from None
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

    def _blocks(self, row: _RagPulseLine) -> tuple[int, ...]:
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

    def _tail(self, row: _RagPulseLine, ids: list[int]) -> tuple[int, ...]:
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
