"""Traces that were published for research, by the names of their columns; scenarios/traces/README.md has their traps.

**Azure LLM inference traces** (CSV, 2023 and later). Source: Azure/AzurePublicDataset.

**BurstGPT** (CSV, versions 1 to 3): seconds from midnight of the first day; zero tokens are a call that failed; the
total of request and response tokens is checked. Source: HPMLL/BurstGPT, README; Wang et al., KDD 2025.

**Mooncake** (FAST'25), and what others write in its fields (AIPerf, NVIDIA Dynamo, GuideLLM): times are milliseconds,
seconds with them, or since 1970; ``text_input`` is a prompt; ``delay`` is milliseconds from the end of the answer
before, of a turn without ``timestamp``. ``hash_ids``, one integer per 512-token block, each of its block *and
everything before it*, are checked on every row, because files of the same fields with other block sizes exist and would
be replayed with other prefixes and on another clock. Prompts of several blocks show Mooncake, and so milliseconds;
where there are none the unit is asked for. Source: kvcache-ai/Mooncake; ai-dynamo/aiperf; vllm-project/guidellm.

**Qwen-Bailian**: seconds; 16-token blocks, the last partial one counted or not. The session is the conversation's first
``chat_id``; a parent that lies before the file's beginning begins a session of its own.
Source: alibaba-edu/qwen-bailian-usagetraces-anon, README.

**RAGPulse**: a prefix cache reuses a prompt only from its beginning, so two requests share the tokens of the components
that lead both. How long these are stands in five files beside the trace. With them the leading run is given as blocks
of 16 tokens; the few template tokens by which ``input_length`` exceeds the sum are taken to stand at the end and to be
shared with nobody. Source: flashserve/RAGPulse, README.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec

from harness.errors import TraceError
from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    Object,
    Reader,
    RowError,
    TableOptions,
    TraceRecord,
    attempt,
    decode_error,
    decode_object,
    fields_of,
    show,
)
from harness.trace.formats.table import TableReader
from harness.trace.formats.values import (
    Blocks,
    Clock,
    Copies,
    header_of,
    ns_of,
    token_count,
)
from harness.trace.source import TraceFile, open_source, records
from harness.trace.spool import Sessions
from harness.untrusted import DECODE_ERRORS

BLOCK_TOKENS = 16
"""Of Bailian, and of the blocks made here for RAGPulse."""
_MOONCAKE_TOKENS = 512
_OTHER_BLOCKS = (8, 16, 32, 64, 128, 256, 1024)
_TOTAL = "Total tokens"
_DELAYED = (
    "turns have a delay after the answer before them and no time: planned so long after the turn before them "
    "(--sessions wait holds them until it has ended)"
)
_ORPHANS = "requests continue one that is not in the file: their conversations begin before it"
_UNKNOWN = "rows have a component of unknown length: nothing is shared from there on"

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_ids = tuple[_Id, ...]


class Azure(TableReader):
    summary = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"
    names = {"arrival": "TIMESTAMP", "input": "ContextTokens", "output": "GeneratedTokens"}  # noqa: RUF012

    def clock_of(self, name: str) -> Clock:
        said = "a date and time: up to 9 decimals of a second, UTC where no zone is given"
        return Clock(name, said=f"{name}, {said}")


class BurstGPT(TableReader):
    summary = "BurstGPT trace (CSV: Timestamp in s, Request tokens, Response tokens; v3 with Session ID)"
    names = {"arrival": "Timestamp", "input": "Request tokens", "output": "Response tokens"}  # noqa: RUF012
    known = frozenset({_TOTAL})

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        return super().sniff(record) and _TOTAL in header_of(record)[1]

    def clock_of(self, name: str) -> Clock:
        said = "Timestamp in seconds: the header is that of BurstGPT, whose totals were checked on every row"
        return Clock(name, "s", said)

    def row(self, row: Object) -> TraceRecord:
        counts = [token_count(name, row.get(name)) for name in ("Request tokens", "Response tokens", _TOTAL)]
        if None not in counts and sum(counts[:2]) != counts[2]:  # type: ignore[arg-type]
            raise RowError(
                "bad Total tokens",
                f"Total tokens is {show(str(row.get(_TOTAL)))}, but request and response are {counts[0]} + {counts[1]}",
            )
        return super().row(row)


class Mooncake(TableReader):
    summary = "Mooncake trace (JSON Lines: timestamp in ms, input_length, output_length, hash_ids of 512-token blocks)"
    names = {  # noqa: RUF012
        "arrival": "timestamp", "input": "input_length", "output": "output_length", "session": "session_id",
        "prompt": "text_input",
    }  # fmt: skip
    known = frozenset({"hash_ids", "delay"})
    block_tokens = _MOONCAKE_TOKENS
    looked_at = 10_000

    def __init__(self) -> None:
        super().__init__()
        self._blocks = Blocks(_MOONCAKE_TOKENS)
        self._last = Sessions(int)

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        lengths = {"input_length", "text_input"} & fields.keys()
        others = {"timestamp", "delay", "hash_ids", "text_input"} & fields.keys()
        return bool(lengths and others) and "chat_id" not in fields and not fields.get("hash_ids", b"").startswith(b"{")

    def ask(self, asked: TableOptions) -> None:
        super().ask(replace(asked, unit=None))
        self._asked = asked

    def look(self, rows: Sequence[Object]) -> None:
        super().look(rows)
        clock = self._clock
        if clock and not clock.absolute and self._asked.unit is None and any(_is_long(row) for row in rows):
            clock.know("ms", "timestamp in milliseconds: beside the 512-token blocks of Mooncake")

    def row(self, row: Object) -> TraceRecord:
        if "chat_id" in row:
            raise RowError("unknown field", "unknown field 'chat_id': a row of Bailian (--trace-format bailian)")
        return super().row(row)

    def prefix_ids(self, row: Object, input_tokens: int | None, text: str | None) -> tuple[int, ...] | None:
        if row.get("hash_ids") is None or text is not None:
            return None
        try:
            ids = msgspec.convert(row["hash_ids"], _ids)
        except msgspec.ValidationError as e:
            raise RowError("bad fields", f"hash_ids: {e}") from None
        self._blocks.check("hash_ids", len(ids), input_tokens or 0, _fitting)
        return ids

    def think_s(self, row: Object, session: str | None) -> float | None:
        delay = row.get("delay")
        return None if delay is None or session is None else ns_of("delay", delay, "ms") / 1e9

    def arrival_ns(self, row: Object, session: str | None) -> int | None:
        if row.get("timestamp") is not None:
            arrival_ns = super().arrival_ns(row, session)
        elif session is None or row.get("delay") is None or (last := self._last.get(session)) is None:
            return None
        else:
            self.noted[_DELAYED] += 1
            arrival_ns = last + ns_of("delay", row["delay"], "ms")
        if session is not None and arrival_ns is not None:
            self._last.set(session, arrival_ns)
        return arrival_ns

    def blocks(self) -> str | None:
        return self._blocks.said()


def _is_long(row: Object) -> bool:
    ids, tokens = row.get("hash_ids"), row.get("input_length")
    blocks = -(-tokens // _MOONCAKE_TOKENS) if isinstance(tokens, int) else 0
    return row.get("timestamp") is not None and isinstance(ids, list) and len(ids) == blocks > 1


def _fitting(ids: int, tokens: int) -> str:
    sizes = [str(size) for size in _OTHER_BLOCKS if -(-tokens // size) == ids]
    if not sizes:
        return ""
    return (
        f". They fit blocks of {' or '.join(sizes)} tokens: this is not a Mooncake trace. Qwen-Bailian (--trace-format "
        "bailian) has 16-token blocks and seconds; else write our JSON Lines with block_tokens"
    )


class _BailianLine(msgspec.Struct, forbid_unknown_fields=True):
    chat_id: _Id
    parent_chat_id: Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[_Id, ...]
    turn: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | None = None
    type: str | None = None


class Bailian(Reader):
    summary = "Qwen-Bailian trace (JSON Lines: chat_id, parent_chat_id, timestamp in s, hash_ids of 16-token blocks)"
    clock = "timestamp in seconds: the rows have the fields and 16-token blocks of Bailian, not Mooncake"
    telling = (frozenset(_BailianLine.__struct_fields__[:6]),)

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_BailianLine).decode
        self._root = Sessions(int)
        self._blocks = Blocks(BLOCK_TOKENS)
        self._copies = Copies("chat_id")

    def parse(self, record: bytes) -> TraceRecord:
        try:
            row = self._decode(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _BailianLine.__struct_fields__) from None
        self._copies.check(row.chat_id)
        ids = row.hash_ids
        if row.input_length % BLOCK_TOKENS and len(ids) == row.input_length // BLOCK_TOKENS:
            ids = (*ids, -1 - row.chat_id)  # the last, partial block has no id of its own: nobody shares it
        more = ": this is not a Bailian trace; Mooncake has 512-token blocks and milliseconds"
        self._blocks.check("hash_ids", len(ids), row.input_length, lambda *_: more)
        parent = row.parent_chat_id
        before = self._root.get(parent) if parent >= 0 else None
        self.noted[_ORPHANS] += parent >= 0 and before is None
        root = before if before is not None else parent if parent >= 0 else row.chat_id
        self._root.set(row.chat_id, root)
        turn = None if row.turn is None else row.turn - 1
        arrival_ns = ns_of("timestamp", row.timestamp, "s")
        return TraceRecord(arrival_ns, row.input_length, row.output_length, str(root), turn, ids, BLOCK_TOKENS)

    def blocks(self) -> str | None:
        return self._blocks.said()


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


class RagPulse(Reader):
    summary = "RAGPulse trace (JSON Lines: timestamp as a string of s, hash_ids an object of component ids)"
    clock = "timestamp in seconds: strings of whole numbers, beside components as RAGPulse has them"
    telling = (frozenset({"timestamp", "input_length", "output_length", "hash_ids"}),)

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(_RagPulseLine).decode
        self._lengths: dict[str, dict[int, int]] = {}
        self._rows = 0

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        return super().sniff(record) and fields_of(record)["hash_ids"].startswith(b"{")

    def records(self, file: TraceFile) -> Iterator[tuple[int, bytes]]:
        for name, (stem, key) in _TABLES.items():
            found = (f for suffix in _SUFFIXES if (f := file.path.parent / f"{stem}{suffix}").is_file())
            if (beside := next(found, None)) is not None:
                self._lengths[name] = _table(beside, key)
        return records(file)

    def parse(self, record: bytes) -> TraceRecord:
        try:
            row = self._decode(record)
        except DECODE_ERRORS as e:
            raise decode_error(e, record, _RagPulseLine.__struct_fields__) from None
        if not re.fullmatch(r"\d{1,10}", row.timestamp, re.ASCII):
            raise RowError("bad timestamp", f"timestamp is {show(row.timestamp)}, expected whole seconds")
        if other := row.hash_ids.keys() - _TABLES.keys():
            raise RowError("bad hash_ids", f"hash_ids has {', '.join(sorted(other))}, expected {', '.join(_TABLES)}")
        self._rows += 1
        ids = self._blocks(row) if len(self._lengths) == len(_TABLES) else None
        return TraceRecord(
            ns_of("timestamp", row.timestamp, "s"), row.input_length, row.output_length, row.session_id, None, ids,
            None if ids is None else BLOCK_TOKENS,
        )  # fmt: skip

    def blocks(self) -> str | None:
        said = f"{BLOCK_TOKENS} tokens, made here from the components' lengths in the files beside it"
        return said if len(self._lengths) == len(_TABLES) else None

    def notes(self) -> list[str]:
        if len(self._lengths) < len(_TABLES):
            missing = ", ".join(f"{stem}.jsonl" for name, (stem, _) in _TABLES.items() if name not in self._lengths)
            return [f"prefix reuse not known: put the component lengths ({missing}) beside the trace"]
        said = f"prefixes: the components that lead a prompt, in blocks of {BLOCK_TOKENS} tokens"
        return [said, *super().notes()]

    def _blocks(self, row: _RagPulseLine) -> tuple[int, ...]:
        """One id per block: of the chain of components that reach into it, and its place."""
        chain = hashlib.blake2b(digest_size=8)
        ids: list[int] = []
        end = 0
        for name, components in row.hash_ids.items():
            for component in components:
                length = self._lengths[name].get(component)
                if length is None:
                    self.noted[_UNKNOWN] += 1
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
        blocks = -(-row.input_length // BLOCK_TOKENS)
        return tuple(ids[:blocks] + [-(self._rows << 24 | at) - 1 for at in range(len(ids), blocks)])


def _table(file: Path, key: str) -> dict[int, int]:
    """Raises `TraceError`."""
    lengths: dict[int, int] = {}
    for number, record in records(open_source(file)):
        row = attempt(decode_object, record)
        id_, length = (row.get(key), row.get("token_length")) if isinstance(row, Mapping) else (None, None)
        if type(id_) is not int or type(length) is not int or not 0 <= length <= MAX_TOKENS:
            raise TraceError(str(file), number, f"expected {key} and token_length, found {show(record)}")
        lengths[id_] = length
    return lengths
