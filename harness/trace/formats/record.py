"""What a format reader gives back for one record of a trace file, and how it refuses one; what it may be told."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import msgspec

from harness.errors import UsageError
from harness.trace import source
from harness.untrusted import DECODE_ERRORS

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

V = TypeVar("V")
R = TypeVar("R")
Role = Literal["arrival", "input", "output", "session", "model", "cached", "prompt"]
ROLES: tuple[Role, ...] = get_args(Role)
TimeUnit = Literal["s", "ms", "us", "ns"]


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What the user says of a table."""

    columns: Mapping[Role, str] = field(default_factory=dict)
    unit: TimeUnit | None = None


Object: TypeAlias = Mapping[str, object]
"""A JSON object, or a row of a table by the names of its columns."""

MAX_TOKENS = 2**24
"""Most tokens one request may have in or out. Far above any context window: more is a damaged or misread field."""
MAX_ARRIVAL_S = 9_000_000_000
"""Latest arrival in seconds that still counts as nanoseconds in 64 bits (285 years); more is a wrong unit."""

FAILED_CALL = "zero tokens (failed call)"
"""Reason under which rows are counted that record a failed call of the source system."""


class TraceRecord(NamedTuple):
    """One request of a trace, exactly as the file says. What it does not say is None.

    A reader gives it on the source's own clock; a `Trace` shifts the first one it keeps to zero and adds the line.
    """

    arrival_ns: int | None
    """From a reader: ns on the source's clock. From a `Trace`: ns after the first kept record; never decreasing."""
    input_tokens: int | None
    """Counted by the source's tokenizer, as everywhere in a trace."""
    output_tokens: int | None
    session_id: str | None = None
    turn: int | None = None
    prefix_ids: tuple[int, ...] | None = None
    """One per block of ``block_tokens``, the last perhaps partial; equal leading ids are equal leading tokens."""
    block_tokens: int | None = None
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    """Chat messages, each with ``role`` and ``content``."""
    answer: str | None = None
    """What the model said in production. Never sent, but it can be counted."""
    adapter: str | None = None
    """Model or LoRA adapter to ask for, by the name the server under test has for it; None: the run's model."""
    cancel_after_s: float | None = None
    """The client hung up this long after it had sent the request."""
    think_s: float | None = None
    """From the end of the session's previous answer to this turn."""
    timeout_s: float | None = None
    """The client waited this long at most, counted from when it had sent the request; None: the run's limit."""
    model: str | None = None
    """Model that answered in production, by the source's name for it. Never asked for: see ``adapter``."""
    cached_tokens: int | None = None
    """Of ``input_tokens``, those that production found in a prompt cache."""
    max_tokens: int | None = None
    expected: tuple[str, ...] | None = None
    check: str | None = None
    """How an answer is held against the truth; JSON of an object."""
    gate: str | None = None
    """What production itself can test of an answer at run time; JSON of an object."""
    tags: tuple[tuple[str, str], ...] | None = None
    """(name, value), in order of name; an empty value for one of an array of names."""
    weight: float | None = None
    """How many requests of production this one stands for."""
    line: int = 0
    """1-based line in the (uncompressed) file its record begins on; the row in a columnar file."""

    @property
    def arrival_s(self) -> float | None:
        """``arrival_ns`` in seconds."""
        return None if self.arrival_ns is None else self.arrival_ns / 1e9


def memory_bytes(row: TraceRecord) -> int:
    """About how many bytes of memory a row takes."""
    carried = (row.text, row.answer, row.check, row.gate, *(row.expected or ()))
    texts = sum(len(text) for text in carried if text is not None)
    if row.messages is not None:
        texts += sum(len(message["content"]) + 200 for message in row.messages)
    return 500 + texts + 40 * len(row.prefix_ids or ())


def safe(words: str, most: int) -> str:
    """``words`` in at most so many characters, the middle left out, without any that a terminal would obey."""
    if len(words) > most:
        words = f"{words[: most // 2]} ... {words[5 - most // 2 :]}"
    return words if words.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class RowError(Exception):
    """A record that is not a row of its format. ``reason`` is a short class to count by; the message says it all.

    Files name what stands in messages and reasons, so both are made `safe`.
    """

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        super().__init__(safe(problem, 1000))

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, str(self))


class LeftOutError(Exception):
    """A well-formed row that is not to be replayed, but counted under ``reason``: a failed call, a copy."""

    def __init__(self, reason: str) -> None:
        self.reason = safe(reason, 100)
        super().__init__(self.reason)


class FailedCallError(LeftOutError):
    """A row that records a failed call of the source system."""

    def __init__(self, reason: str = FAILED_CALL) -> None:
        super().__init__(reason)


Item = TraceRecord | RowError | LeftOutError
Rows = Sequence[Item]
"""What a record of several calls (a conversation, a batch of spans) holds; empty when it is no call at all."""


def attempt(read: Callable[[V], R], value: V) -> R | RowError | LeftOutError:
    """What ``read`` makes of a value, or why it is none."""
    try:
        return read(value)
    except (RowError, LeftOutError) as e:
        return e


class Place(NamedTuple):
    """Where a record begins."""

    file: int
    """Of the files of a trace, from 0."""
    line: int
    """1-based; the row in a columnar file."""


def is_whole_prompt(row: TraceRecord) -> bool:
    """Whether the text of a row can be all that its input tokens were counted of; True where nothing can be compared.

    A token has a byte at least, and seldom many: more tokens than bytes, beyond a chat template's, show that parts of
    the prompt were not written down, and far more bytes that the text is something else.
    """
    if row.input_tokens is None or (row.text is None and row.messages is None):
        return True
    said = [row.text] if row.messages is None else [message["content"] for message in row.messages]
    size = sum(len(text.encode("utf-8", "replace")) for text in said if text is not None)
    template = 8 if row.messages is None else 64 + 16 * len(said)
    return row.input_tokens <= size + template and size <= 400 + 40 * row.input_tokens


class Reader:
    """One trace format. An instance reads the files of one trace once, from the first record to the last.

    Most readers are `sniff` and `parse`. One that needs more than a record at a time overrides `rows` or `end`.
    """

    summary: ClassVar[str]
    clock: str
    """What its times are, and what in the file shows it."""
    quoted: ClassVar[bool] = False
    """CSV whose quoted fields may hold commas and line ends."""
    in_order: bool = True
    """False: the source writes a row when its call has ended, or in no order at all; rows are sorted by arrival."""
    sends_text: bool = False
    """Texts are meant to be sent as they are, whatever the token counts beside them."""
    columnar: ClassVar[bool] = False
    """Also read from Parquet and Arrow, whose columns show it as the header of a CSV would."""
    log: ClassVar[bool] = False
    """Other lines may stand before the first that shows the format."""
    telling: ClassVar[tuple[frozenset[str], ...]] = ()
    """Fields of a JSON object: any of these sets shows the format."""

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """Whether the first record of a file (not blank, no byte-order mark) shows this format."""
        names = fields_of(record).keys()
        return any(telling <= names for telling in cls.telling)

    def ask(self, asked: TableOptions) -> None:
        """What the user says of columns and times. Raises `UsageError` where the format has its own."""
        if asked.columns:
            raise UsageError(
                "--map names the columns of a table; this format has names of its own (--trace-format table)"
            )
        if asked.unit is not None:
            raise UsageError(f"--time-unit: the times of this format have a unit of their own ({self.clock})")

    def unclear(self) -> str | None:
        """After the first rows: why their times cannot be read; None: they can."""
        return None

    def records(self, file: source.TraceFile) -> Iterator[tuple[int, Any]]:
        """(line, record) of each record of a file; see `harness.trace.source.records`."""
        return source.records(file, quoted=self.quoted)

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        for place, record in records:
            try:
                found: Item | Rows = self.parse(record)
            except (RowError, LeftOutError) as e:
                found = e
            if isinstance(found, Item):
                yield place, found
            else:
                for item in found:
                    yield place, item

    def parse(self, record: Any) -> TraceRecord | Rows:
        """Read one record. Raises `RowError` or `LeftOutError`."""
        raise NotImplementedError

    def end(self) -> Iterable[tuple[Place | None, Item]]:
        """Rows that were still waiting for a later record when the last file ended; no place: that last record's."""
        return ()

    def blocks(self) -> str | None:
        """After the last record: size of the prefix blocks and what in the file shows it; None: none were read."""
        return None

    @cached_property
    def noted(self) -> Counter[str]:
        return Counter()

    def notes(self) -> list[str]:
        """What a reader of the results must know about this trace, after its last record."""
        return [f"{count} {what}" for what, count in self.noted.items() if count]


# --- fields of an object -------------------------------------------------------------------------------------------


def show(raw: bytes | str) -> str:
    """A short, safe quotation of a damaged field."""
    text = raw[:60].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[:60]
    return repr(text.rstrip("\r\n"))


def fields_of(record: bytes) -> dict[str, bytes]:
    """Field name -> its JSON of a record that is a JSON object; empty when it is not one."""
    if record.lstrip()[:1] != b"{":
        return {}
    try:
        return {name: bytes(raw) for name, raw in _decode_fields(record).items()}
    except DECODE_ERRORS:
        return {}


def find(value: object, *paths: str) -> object:
    """What the first of ``paths`` that is given says; None where none is (also as an empty text or ``-``).

    Dots lead into objects, ``*`` into whichever of an object's values has the rest.
    """
    for path in paths:
        found = at_path(value, path)
        if found is not None and found != "" and found != "-":
            return found
    return None


def at_path(value: object, path: str) -> object:
    """What one of them says, as it stands there."""
    if not isinstance(value, dict):
        return None
    found = value.get(path)
    if found is not None or "." not in path or path in value:
        return found
    head, _, rest = path.partition(".")
    if head == "*":
        return next((found for inner in value.values() if (found := at_path(inner, rest)) is not None), None)
    return at_path(value.get(head), rest)


def text_of(value: object, *paths: str) -> str | None:
    """The first of ``paths`` that is a text."""
    return next((found for path in paths if isinstance(found := find(value, path), str)), None)


def object_of(value: object, *paths: str) -> Object:
    """The object there, or in the JSON of a text, or in pairs as Arrow gives a map; empty for anything else."""
    found = find(value, *paths) if paths else value
    if isinstance(found, str) and found.lstrip()[:1] == "{":
        found = decoded(found)
    if isinstance(found, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in found):
        return {str(name): inner for name, inner in found}
    return found if isinstance(found, dict) else {}


def decoded(value: object) -> object:
    """The value in a text of JSON; other values as they are; nothing for JSON that was cut."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "[", '"'):
        return value
    try:
        return msgspec.json.decode(value)
    except DECODE_ERRORS:
        return {} if value.lstrip()[:2] in ('{"', "[{") else value  # a text may begin with a bracket


def decode_object(record: bytes) -> Object:
    """A record that must be a JSON object. Raises `RowError`."""
    try:
        value = msgspec.json.decode(record)
    except DECODE_ERRORS as e:
        raise decode_error(e, record, ()) from None
    return as_object(value)


def as_object(value: object) -> Object:
    """What must be a JSON object. Raises `RowError`."""
    if not isinstance(value, dict):
        raise RowError("not an object", f"expected a JSON object, found {show(str(value))}")
    return value


def decode_error(error: Exception, record: bytes, fields: Iterable[str]) -> RowError:
    """Why a record could not be decoded, with the nearest valid field name."""
    if b"\0" in record:
        return RowError("NUL bytes", "holds NUL bytes: the file is damaged or not text")
    try:
        record.decode()  # asked here: what msgspec raises for it differs between its versions
    except UnicodeDecodeError as e:
        return not_utf8(e)
    if not isinstance(error, msgspec.ValidationError):
        return RowError("not JSON", f"not a JSON object on one line ({error}): {show(record)}")
    problem = str(error)
    unknown = re.search(r"unknown field `(.*?)`", problem)
    if unknown and " - at " not in problem:
        near = difflib.get_close_matches(unknown[1], fields, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(sorted(fields))}"
        return RowError("unknown field", f"unknown field {unknown[1]!r}: {hint}")
    return RowError("bad fields", problem.replace("`", "").replace("$.", "").replace(" - at ", " at "))


def not_utf8(error: UnicodeDecodeError) -> RowError:
    """What to say of bytes that are no UTF-8."""
    return RowError("not UTF-8", f"not UTF-8 ({error.reason}): convert the file, for example with iconv")
