"""Our own trace format: JSON Lines, one request per line.

=================  ===================================================================================================
``arrival_s``      number, seconds on any clock (the first row becomes zero). Never decreasing. On all rows or on none.
                   Numbers are 64-bit floats: seconds since 1970 keep a quarter of a microsecond. Those that can only be
                   milli-, micro- or nanoseconds since 1970 are read as these, and that is said
``prompt``         string, the prompt as text, sent as it is
``messages``       chat messages ``[{"role": ..., "content": ...}, ...]``, contents are strings
``input_tokens``   integer, prompt length. A prompt of exactly this length is made when there is no text
``output_tokens``  integer, length of the answer, forced on the server. Left out: the server decides, unless a maximum
                   is set when the plan is made
``session_id``     string; requests of one conversation share it and stay on one load worker
``turn``           integer from 0, place in the session; needs ``session_id``
``prefix_ids``     integers, one per block of ``block_tokens`` input tokens, the last block may be partial; requests
                   whose leading ids are equal share those tokens. Needs ``input_tokens`` and ``block_tokens``
``block_tokens``   integer, tokens per id in ``prefix_ids``
``answer``         string, what the model said in production; never sent, but its tokens can be counted
``adapter``        string, model or LoRA adapter to ask for by the name the server under test has for it; left out: the
                   model of the run
``cancel_after_s`` number above 0, the client hung up this long after it had sent the request, and does so again
``think_s``        number, from the end of the session's previous answer to this turn; needs ``session_id``
``timeout_s``      number above 0, the client's own time limit for this request, counted from when it is sent; left
                   out: the limit of the run
``model``          string, model that answered in production; never asked for (that is ``adapter``), but rows can be
                   chosen by it
``cached_tokens``  integer, of ``input_tokens`` those that production found in a prompt cache
``max_tokens``     integer from 1, the cap that production set on the answer
``expected``       string or list of strings: right answers, any of which will do
``check``          object, how an answer is held against the truth
``gate``           object, what production itself can test of an answer at run time
``tags``           object of strings, what the request belongs to: ``{"task": "extract", "team": "billing"}``
``weight``         number above 0, how many requests of production this one stands for
=================  ===================================================================================================

The last six are carried for the judgement of answers; a replay sends none of them. Where a file cannot hold objects
(Parquet), ``check``, ``gate`` and ``tags`` are their JSON as a string.

A row needs one of ``prompt``, ``messages`` and ``input_tokens``; ``prompt`` and ``messages`` exclude each other.
``null`` means not given. Unknown fields are refused: a misspelt field must not be silently ignored. A row with zero
input or output tokens records a failed call: it is counted, not replayed. Lines are UTF-8, at most 16 MiB; blank lines
are skipped. The same rows are read from a JSON array, and from Parquet and Arrow files with these columns
(any integer or float width will do; ``prefix_ids`` is a list of integers, ``messages`` one of structs). Of such a file
with other columns those are read that make a table (`harness.trace.formats.table`), and no others.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from itertools import chain, islice
from typing import Annotated, Any

import msgspec

from harness.errors import TraceError
from harness.trace.formats.columnar import MAGICS, chosen_rows, is_columnar, schema_of
from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    FailedCallError,
    Item,
    LeftOutError,
    Place,
    Reader,
    RowError,
    TraceRecord,
    decode_error,
    fields_of,
    safe,
)
from harness.trace.formats.table import TableReader, is_table, recognised, role_of
from harness.trace.formats.values import Clock, seconds_ns
from harness.trace.source import TraceFile
from harness.untrusted import DECODE_ERRORS

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: _Text
    content: str


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One row; see the module docstring for each field."""

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
    tags: dict[str, str] | str | None = None
    weight: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None


FIELDS = Line.__struct_fields__
_TELLING = {"prompt", "input_tokens", "output_tokens", "arrival_s", "prefix_ids", "block_tokens"}
_OURS_ALONE = {"prompt", "messages", "prefix_ids", "block_tokens"}
"""Columns by which a columnar file is meant to be in our format, whatever else it has."""
_EXACT_S = 2**53 / 1e9
_decode = msgspec.json.Decoder(Line).decode


class Jsonl(Reader):
    """Reader of our own JSON Lines."""

    summary = "our JSON Lines: arrival_s, prompt or messages or input_tokens, output_tokens, session_id, prefix_ids ..."
    sends_text = True

    def __init__(self) -> None:
        self._sizes = BlockSizes()
        self._clock = OwnClock()

    @property
    def clock(self) -> str:  # type: ignore[override]
        """As its name says, or as found."""
        return self._clock.said

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """An object with a field that is only ours (a misspelt one beside it is then reported by name)."""
        fields = fields_of(record)
        if fields.get("arrival_s", b"").startswith(b'"') or any(role_of(name) for name in fields.keys() - set(FIELDS)):
            return False  # a table with some of our names
        if fields.keys() & _TELLING:
            # A request to a model has a model and a prompt, and nothing that only a trace has.
            return "body" not in fields and ("model" not in fields or _is_row(fields.keys()))
        # Messages alone are ours, unless the last is an answer: then it is a chat log, see
        # `harness.trace.formats.messages`. With nothing but a model beside them they are a request, see
        # `harness.trace.formats.messages`.
        request = fields.keys() == {"messages", "model"}
        return (
            "messages" in fields and fields.keys() <= set(FIELDS) and not answered(fields["messages"]) and not request
        )

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        try:
            row = row_of(_decode(record), self._clock)
            self._sizes.see(row)
            return row
        except DECODE_ERRORS as e:
            raise decode_error(e, record, FIELDS) from None

    def blocks(self) -> str | None:
        """As ``block_tokens`` says."""
        return self._sizes.said()


def _is_row(names: Set[str]) -> bool:
    return names <= set(FIELDS) and bool(names & (_TELLING - {"prompt"}))


class Columnar(TableReader):
    """Reader of columnar files; the first bytes tell which kind."""

    summary = "Parquet or Arrow file with the columns of our JSON Lines, or of any table"
    others_first = False

    def __init__(self) -> None:
        super().__init__()
        self._sizes = BlockSizes()
        self._own = OwnClock()
        self._ours = False

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The magic bytes of Parquet, an Arrow file or an Arrow stream."""
        return record.startswith(MAGICS)

    @property
    def clock(self) -> str:  # type: ignore[override]
        """As its name says, or as found."""
        return self._own.said if self._ours else super().clock

    @property
    def sends_text(self) -> bool:  # type: ignore[override]
        """Our own rows are written to be sent."""
        return self._ours

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        """(row from 1, column -> value without nulls) of the columns that are ours, or a table's."""
        if not is_columnar(file):
            return super().records(file)
        schema, asked = schema_of(file), self._asked.columns
        names: list[str] = schema.names
        unknown = [name for name in names if name not in FIELDS]
        self._ours = not asked and bool(names) and not unknown and _in_seconds(schema)
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
        """Rows of our own as lines of JSON would be read; those of a table as a table's."""
        records = iter(records)
        again = chain(list(islice(records, 1)), records)  # opens the file: only now is known whose columns it has
        if not self._ours:
            yield from super().rows(again)
            return
        for place, record in again:
            try:
                if isinstance(record, RowError):
                    raise record
                row = row_of(msgspec.convert(record, Line), self._own)
                self._sizes.see(row)
                yield place, row
            except msgspec.ValidationError as e:
                yield place, decode_error(e, b"", FIELDS)
            except (RowError, LeftOutError) as e:
                yield place, e

    def blocks(self) -> str | None:
        """As ``block_tokens`` says."""
        return self._sizes.said()


def _in_seconds(schema: Any) -> bool:
    import pyarrow as pa

    kind = schema.field("arrival_s").type if "arrival_s" in schema.names else pa.float64()
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


class BlockSizes:
    """Sizes of prefix blocks that rows state."""

    def __init__(self) -> None:
        self._rows: Counter[int] = Counter()

    def see(self, row: TraceRecord) -> None:
        """The next row."""
        if row.block_tokens is not None and (row.block_tokens in self._rows or len(self._rows) < 8):
            self._rows[row.block_tokens] += 1

    def said(self) -> str | None:
        """The sizes; None without any."""
        sizes = " and ".join(map(str, sorted(self._rows)))
        return f"{sizes} tokens, as block_tokens says; the ids were counted on every row" if sizes else None


class OwnClock:
    """Times of ``arrival_s``: seconds, unless the first can only be another unit since 1970."""

    def __init__(self) -> None:
        self.said = "arrival_s in seconds, by its name"
        self._clock: Clock | None = None
        self._known = False

    def ns(self, arrival: float) -> int:
        """Nanoseconds. Raises `RowError`."""
        if not self._known:
            self._known = True
            if arrival > MAX_ARRIVAL_S:
                self._clock = Clock("arrival_s")
                self._clock.look([arrival])
                self.said = self._clock.said
        if self._clock is not None:
            return self._clock.ns(arrival) or 0
        # Beyond, whole nanoseconds have no place in a float.
        return round(arrival * 1e9) if arrival < _EXACT_S else seconds_ns("arrival_s", arrival)


def answered(messages: bytes) -> bool:
    """Whether these messages (JSON) end with an assistant's."""
    try:
        last = msgspec.json.decode(messages)[-1]
    except (*DECODE_ERRORS, IndexError, TypeError, KeyError):
        return False
    return isinstance(last, dict) and last.get("role") == "assistant"


def row_of(line: Line, clock: OwnClock) -> TraceRecord:
    """The row of a decoded line, its time on ``clock``. Raises `RowError` and `FailedCallError`."""
    if problem := _contradiction(line):
        raise RowError("bad fields", problem)
    if line.input_tokens == 0 or line.output_tokens == 0:
        raise FailedCallError
    return TraceRecord(
        None if line.arrival_s is None else clock.ns(line.arrival_s),
        line.input_tokens,
        line.output_tokens,
        line.session_id,
        line.turn,
        line.prefix_ids,
        line.block_tokens,
        line.prompt,
        None if line.messages is None else tuple({"role": m.role, "content": m.content} for m in line.messages),
        line.answer,
        line.adapter,
        line.cancel_after_s,
        line.think_s,
        line.timeout_s,
        line.model,
        line.cached_tokens,
        line.max_tokens,
        None if line.expected is None else (line.expected,) if isinstance(line.expected, str) else tuple(line.expected),
        _object("check", line.check),
        _object("gate", line.gate),
        _tags(line.tags),
        line.weight,
    )


def _object(name: str, value: dict[str, object] | str | None) -> str | None:
    """JSON of an object, which may be that already, its keys in order. Raises `RowError`."""
    if value is None:
        return None
    try:
        found = msgspec.json.decode(value, type=dict[str, object]) if isinstance(value, str) else value
    except DECODE_ERRORS as e:
        raise RowError("bad fields", f"{name} must be a JSON object: {e}") from None
    return msgspec.json.encode(found, order="sorted").decode()


def _tags(value: dict[str, str] | str | None) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    try:
        found = msgspec.json.decode(value, type=dict[str, str]) if isinstance(value, str) else value
    except DECODE_ERRORS as e:
        raise RowError("bad fields", f"tags must be a JSON object of strings: {e}") from None
    return tuple(sorted(found.items()))


def _contradiction(row: Line) -> str | None:
    """What is wrong with fields that are each right alone."""
    if row.arrival_s is not None and not math.isfinite(row.arrival_s):
        return f"arrival_s is {row.arrival_s}"
    if not all(math.isfinite(s or 0.0) for s in (row.cancel_after_s, row.think_s, row.timeout_s)):
        return "cancel_after_s, think_s or timeout_s is no number"
    if row.think_s is not None and row.session_id is None:
        return "think_s without session_id: it is the time between two turns of a session"
    has_text = row.prompt is not None or row.messages is not None
    if row.prompt is not None and row.messages is not None:
        return "prompt and messages exclude each other: give one"
    if not has_text and row.input_tokens is None:
        return "no prompt, messages or input_tokens: nothing to send"
    if row.turn is not None and row.session_id is None:
        return "turn without session_id: a turn is a place in a session"
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
