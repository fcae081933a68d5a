"""Our own trace format: JSON Lines, one request per line; also a JSON array, Parquet or Arrow.

Fields are those of a `TraceRecord` (what each means stands there, for users in ``scenarios/traces/README.md``), but for
``arrival_s`` (seconds on any clock, never decreasing, on all rows or on none; numbers that can only be milli-, micro-
or nanoseconds since 1970 are read as these, and that is said) and ``prompt`` (the text, sent as it is). A row needs one
of ``prompt``, ``messages`` and ``input_tokens``; ``prompt`` and ``messages`` exclude each other.

``null`` means not given. Unknown fields are refused: a misspelt field must not be silently ignored. A row with zero
input or output tokens records a failed call: it is counted, not replayed. Where a file cannot hold objects (Parquet),
``check``, ``gate`` and ``tags`` are their JSON as a string; any integer or float width will do, ``prefix_ids`` is a
list of integers, ``messages`` one of structs. Of a columnar file with other columns those are read that make a table
(`harness.trace.formats.table`), and no others.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter
from typing import Annotated, Any, TypeVar

import msgspec

from harness.errors import TraceError
from harness.trace.formats.columnar import MAGICS, chosen_rows, is_columnar, schema_of
from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    Item,
    Place,
    Reader,
    RowError,
    TraceRecord,
    decode_error,
    fields_of,
    safe,
)
from harness.trace.formats.table import TableReader, is_table, recognised, role_of
from harness.trace.formats.values import Clock, ns_of
from harness.trace.source import TraceFile
from harness.untrusted import DECODE_ERRORS

T = TypeVar("T")
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: _Text
    content: str


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One row."""

    arrival_s: Annotated[int, msgspec.Meta(ge=0)] | Annotated[float, msgspec.Meta(ge=0)] | None = None
    prompt: _Text | None = None
    messages: Annotated[list[_ChatMessage], msgspec.Meta(min_length=1)] | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    session_id: _Text | None = None
    turn: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    prefix_ids: tuple[Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)], ...] | None = None
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None
    answer: str | None = None
    adapter: _Text | None = None
    cancel_after_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    think_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)] | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    model: str | None = None
    cached_tokens: _Tokens | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None
    expected: _Text | Annotated[list[_Text], msgspec.Meta(min_length=1)] | None = None
    check: dict[str, object] | str | None = None
    gate: dict[str, object] | str | None = None
    tags: dict[str, str] | list[_Text] | str | None = None
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None


FIELDS = Line.__struct_fields__
_TELLING = {"prompt", "input_tokens", "output_tokens", "arrival_s", "prefix_ids", "block_tokens"}
_OURS_ALONE = {"prompt", "messages", "prefix_ids", "block_tokens"}
"""Columns by which a columnar file is meant to be in our format, whatever else it has."""
_EXACT_S = 2**53 / 1e9
_NUMBERS = {"null", "halffloat", "float", "double", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64))}
_LENGTHS = attrgetter("input_tokens", "output_tokens", "session_id", "turn", "prefix_ids", "block_tokens", "prompt")
_CALL = attrgetter(
    "answer", "adapter", "cancel_after_s", "think_s", "timeout_s", "model", "cached_tokens", "max_tokens"
)  # fmt: skip
_decode = msgspec.json.Decoder(Line).decode


class Jsonl(Reader):
    summary = "our JSON Lines: arrival_s, prompt or messages or input_tokens, output_tokens, session_id, prefix_ids ..."
    sends_text = True

    def __init__(self) -> None:
        self.clock = "arrival_s in seconds, by its name"
        self._epoch: Clock | None = None
        """Where the first time can only be in another unit since 1970."""
        self._timed = False
        self._sizes: set[int] = set()

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        if fields.get("arrival_s", b"").startswith(b'"') or any(role_of(name) for name in fields.keys() - set(FIELDS)):
            return False  # a table with some of our names
        if fields.keys() & _TELLING:
            # A request to a model has a model and a prompt, and nothing that only a trace has.
            is_row = fields.keys() <= set(FIELDS) and fields.keys() & (_TELLING - {"prompt"})
            return "body" not in fields and bool("model" not in fields or is_row)
        # Messages alone are ours, but not with an answer at the end (a chat log), or a model beside (a request).
        request = fields.keys() == {"messages", "model"}
        return (
            "messages" in fields and fields.keys() <= set(FIELDS) and not answered(fields["messages"]) and not request
        )

    def parse(self, record: Any) -> TraceRecord:
        columnar = isinstance(record, dict)
        try:
            return self._row(msgspec.convert(record, Line) if columnar else _decode(record))
        except DECODE_ERRORS as e:
            raise decode_error(e, b"" if columnar else record, FIELDS) from None

    def _row(self, line: Line) -> TraceRecord:
        """The row of a decoded line. Raises `RowError`."""
        if problem := _contradiction(line):
            raise RowError("bad fields", problem)
        if line.block_tokens is not None and len(self._sizes) < 8:
            self._sizes.add(line.block_tokens)
        messages, expected = line.messages, line.expected
        tags = None if line.tags is None else _tags(line.tags)
        return TraceRecord._make((
            None if line.arrival_s is None else self._ns(line.arrival_s), *_LENGTHS(line),
            None if messages is None else tuple({"role": m.role, "content": m.content} for m in messages), *_CALL(line),
            (expected,) if isinstance(expected, str) else None if expected is None else tuple(expected),
            None if line.check is None else _object("check", line.check),
            None if line.gate is None else _object("gate", line.gate),
            tags, line.weight, 0,
        ))  # fmt: skip

    def _ns(self, arrival: float) -> int:
        if not self._timed:
            self._timed = True
            if arrival > MAX_ARRIVAL_S:
                self._epoch = Clock("arrival_s")
                self._epoch.look([arrival])
                self.clock = self._epoch.said
        if self._epoch is not None:
            return self._epoch.ns(arrival) or 0
        # Beyond, whole nanoseconds have no place in a float.
        return round(arrival * 1e9) if arrival < _EXACT_S else ns_of("arrival_s", arrival, "s")

    def blocks(self) -> str | None:
        sizes = " and ".join(map(str, sorted(self._sizes)))
        return f"{sizes} tokens, as block_tokens says; the ids were counted on every row" if sizes else None


class Columnar(TableReader):
    summary = "Parquet or Arrow file with the columns of our JSON Lines, or of any table"

    def __init__(self) -> None:
        super().__init__()
        self._own = Jsonl()
        self._ours = False

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        return record.startswith(MAGICS)

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self._own.clock if self._ours else super().clock

    @property
    def sends_text(self) -> bool:  # type: ignore[override]
        return self._ours

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        if not is_columnar(file):
            return super().records(file)
        schema, asked = schema_of(file), self._asked.columns
        names: list[str] = schema.names
        unknown = [name for name in names if name not in FIELDS]
        in_seconds = "arrival_s" not in names or str(schema.field("arrival_s").type) in _NUMBERS
        self._ours = not asked and bool(names) and not unknown and in_seconds
        if self._ours:
            return chosen_rows(file, names)
        if asked or (is_table(recognised(names)) and not _OURS_ALONE & set(names)):
            return super().records(file)
        near = {name: difflib.get_close_matches(name, FIELDS, 1, 0.8) for name in unknown}
        hints = ", ".join(f"{name!r}" + (f" (did you mean {best[0]}?)" if best else "") for name, best in near.items())
        problem = f"columns that a trace does not have: {safe(hints, 500)}; valid: {', '.join(FIELDS)}. Of any other"
        advice = "table say which columns are what: --map arrival=COLUMN,input=COLUMN,output=COLUMN"
        raise TraceError(file.name, None, f"{problem} {advice}")

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        records = iter(records)
        again = chain(list(islice(records, 1)), records)  # opens the file: only now is known whose columns it has
        yield from self._own.rows(again) if self._ours else super().rows(again)

    def blocks(self) -> str | None:
        return self._own.blocks()


def answered(messages: bytes) -> bool:
    """Whether these messages (JSON) end with an assistant's."""
    try:
        last = msgspec.json.decode(messages)[-1]
    except (*DECODE_ERRORS, IndexError, TypeError, KeyError):
        return False
    return isinstance(last, dict) and last.get("role") == "assistant"


def _decoded(name: str, value: T | str, kind: type[T]) -> T:
    """An object, which may be JSON of it. Raises `RowError`."""
    try:
        return msgspec.json.decode(value, type=kind) if isinstance(value, str) else value
    except DECODE_ERRORS as e:
        raise RowError("bad fields", f"{name} must be a JSON object: {e}") from None


def _tags(said: dict[str, str] | list[str] | str) -> tuple[tuple[str, str], ...]:
    if isinstance(said, str) and said.lstrip()[:1] == "[":
        said = _decoded("tags", said, list[str])
    named = dict.fromkeys(said, "") if isinstance(said, list) else _decoded("tags", said, dict[str, str])
    return tuple(sorted(named.items()))


def _object(name: str, value: dict[str, object] | str) -> str:
    return msgspec.json.encode(_decoded(name, value, dict[str, object]), order="sorted").decode()


def _contradiction(row: Line) -> str | None:
    if not math.isfinite((row.arrival_s or 0) + (row.cancel_after_s or 0) + (row.think_s or 0) + (row.timeout_s or 0)):
        return "arrival_s, cancel_after_s, think_s or timeout_s is not a finite number"
    if row.session_id is None and row.think_s is not None:
        return "think_s without session_id: it is the time between two turns of a session"
    if row.session_id is None and row.turn is not None:
        return "turn without session_id: a turn is a place in a session"
    has_text = row.prompt is not None or row.messages is not None
    if row.prompt is not None and row.messages is not None:
        return "prompt and messages exclude each other: give one"
    if not has_text and row.input_tokens is None:
        return "no prompt, messages or input_tokens: nothing to send"
    if row.prefix_ids is None:
        return None if row.block_tokens is None else "block_tokens without prefix_ids"
    if has_text:
        return "prefix_ids beside prompt or messages: a text is its own prefix"
    if row.block_tokens is None or row.input_tokens is None:
        return "prefix_ids need block_tokens and input_tokens"
    expected = -(-row.input_tokens // row.block_tokens)
    if len(row.prefix_ids) != expected:
        return (
            f"{len(row.prefix_ids)} prefix_ids for {row.input_tokens} input_tokens in blocks of {row.block_tokens}, "
            f"expected {expected} (the last block may be partial)"
        )
    return None
