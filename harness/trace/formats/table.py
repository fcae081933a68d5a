"""Any table of requests: CSV, JSON (Lines), Parquet or Arrow with a time and token counts, by whatever names.

Columns are found by their names (`harness.trace.formats.columns`), or named by the user (``--map
arrival=ts,input=p,output=c``, in JSON with dots into objects). Needed are the input tokens and one of the time and the
output tokens; session, model and cached tokens are read where there are any; all else is not replayed, and a note says
so. What the times are is found from the first rows (`harness.trace.formats.columns`), or said by ``--time-unit``.

CSV may be divided by commas, semicolons, tabs or bars, its fields quoted, counts written as ``374.0``; the header may
come again, as it does where files were put together. Empty fields, ``null`` and ``NaN`` are not given. With
Anthropic's columns beside ``input_tokens`` (``cache_read_input_tokens``, ``cache_creation_input_tokens``) these are
added, and a ``usage`` object is read as `harness.trace.formats.values` says.

A table is what is in no other format: every other reader is asked first.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain, islice
from typing import Any, ClassVar

import msgspec

from harness.trace.formats import columnar
from harness.trace.formats.columns import Clock, is_table, recognised
from harness.trace.formats.jsonl import FIELDS, BlockSizes, Line, OwnClock, row_of
from harness.trace.formats.record import (
    Item,
    LeftOutError,
    Place,
    Reader,
    Role,
    RowError,
    Rows,
    TableOptions,
    TraceRecord,
    safe,
    whole,
)
from harness.trace.formats.values import (
    TokenCounts,
    called,
    decode_error,
    decode_object,
    fields_of,
    not_utf8,
    show,
    token_count,
    usage_of,
)
from harness.trace.source import TraceFile

MARKS = (",", ";", "\t", "|")
_LOOKED_AT = 1000
"""Rows that show what the times are."""
_BESIDE = ("cache_read_input_tokens", "cache_creation_input_tokens")
_MISSING = frozenset({"", "nan", "null", "none", "na", "n/a", "-", "<na>", "nat"})


class TableReader(Reader):
    """Reader of tables."""

    summary = "any table (CSV, JSON Lines, Parquet) with a time and token counts: --map says which columns"
    quoted = True
    others_first: ClassVar[bool] = True
    names: ClassVar[Mapping[Role, str]] = {}
    """Columns of a format that has names of its own."""
    checked: ClassVar[frozenset[str]] = frozenset()
    """Its columns that are only compared."""

    def __init__(self) -> None:
        self._asked = TableOptions()
        self._header: list[str] | None = None
        self._mark = ","
        self._at: Mapping[Role, str] | None = None
        self._others: dict[str, None] = {}
        self._known: Set[str] = frozenset()
        """Names of the last row, as those of most rows are."""
        self._clock: Clock | None = None

    def ask(self, asked: TableOptions) -> None:
        """Columns and unit as the user names them. Raises `UsageError` for a format that has its own."""
        if self.names:
            super().ask(asked)
        self._asked = asked

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """A header or an object with names of a table."""
        if record.lstrip()[:1] == b"{":
            fields = fields_of(record)
            return is_table(recognised([*fields, *(f"usage.{name}" for name in fields_of(fields.get("usage", b"")))]))
        return b"\0" not in record and is_table(recognised(header_of(record)[1]))

    @property
    def clock(self) -> str:  # type: ignore[override]
        """As found."""
        return self._clock.said if self._clock is not None else "none"

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        """Times of a calendar that go back are of rows in another order."""
        return self._clock is None or not self._clock.absolute

    def unclear(self) -> str | None:
        """Why the times have no unit."""
        return self._clock.unclear if self._clock is not None else None

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        """Lines, objects, or rows of a columnar file."""
        return columnar.rows(file, self._asked.columns) if columnar.is_columnar(file) else super().records(file)

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """What each record of one file holds, after a look at the first ones."""
        made = self._made(records)
        if self._clock is not None:
            first: list[tuple[Place, Mapping[str, Any] | RowError]] = []
        else:
            first = list(islice(made, _LOOKED_AT))
            self._look([row for _, row in first if not isinstance(row, RowError)])
        for place, row in chain(first, made):
            try:
                if isinstance(row, RowError):
                    raise row
                yield place, self.row(row)
            except (RowError, LeftOutError) as e:
                yield place, e

    def parse(self, record: Any) -> TraceRecord | Rows:
        """Not used: rows need the header before them."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What was taken for what, and what is not replayed."""
        said = []
        if self._at and not self._asked.columns and not self.names:
            found = ", ".join(f"{role}={safe(name, 60)}" for role, name in self._at.items())
            said.append(f"columns recognised by their names: {found} (--map says others)")
        if self._others:
            said.append(f"columns not replayed: {safe(', '.join(self._others), 500)}")
        if self._clock is not None and self._clock.unclear:
            said.append(self._clock.unclear)
        return said

    # --- records to named values ----------------------------------------------------------------------------------

    def _made(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Mapping[str, Any] | RowError]]:
        for place, record in records:
            try:
                row = self._named(record)
            except RowError as e:
                yield place, e
                continue
            if row is not None:
                yield place, row

    def _named(self, record: Any) -> Mapping[str, Any] | None:
        """Name -> value of one record; None for a header."""
        if isinstance(record, RowError):
            raise record
        if isinstance(record, dict):
            return record
        if whole(record).lstrip()[:1] == b"{":
            return decode_object(record)
        if self._header is None or self._is_header(record):
            mark, names = header_of(record)
            if self._header is None and (problem := self._missing(names)):
                raise RowError("bad header", f"{problem} in {show(record)}")
            self._mark, self._header = mark, names
            return None
        fields = split(record, self._mark)
        if len(fields) != len(self._header):
            raise RowError(
                "bad row", f"{len(fields)} fields, expected {len(self._header)} as in the header: {show(record)}"
            )
        return dict(zip(self._header, fields, strict=True))

    def _is_header(self, record: bytes) -> bool:
        """A header that comes again, or that of a file with its columns in another order."""
        assert self._header is not None
        first = self._header[0].encode()
        return first in record[:1000] and set(header_of(record)[1]) >= set(self._wanted(self._header).values())

    def _missing(self, names: Sequence[str]) -> str | None:
        wanted = {**self.names, **self._asked.columns}
        if missing := [name for name in wanted.values() if name not in names]:
            return f"no column {', '.join(missing)}"
        if twice := [name for name in self._wanted(names).values() if names.count(name) > 1]:
            return f"two columns {', '.join(twice)}"
        return None if wanted or is_table(recognised(names)) else "no columns of a time and of token counts"

    def _wanted(self, names: Iterable[str]) -> dict[Role, str]:
        found = recognised(names)
        if self.names:
            found = {role: name for role, name in found.items() if role in ("session", "model", "cached")}
        return {**found, **self.names, **self._asked.columns}

    # --- named values to rows -------------------------------------------------------------------------------------

    def _look(self, rows: Sequence[Mapping[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in _names(row)))
        at = self._wanted(names)
        self._at = at
        if "arrival" in at:
            self._clock = self.clock_of(at["arrival"])
            self._clock.look([value for row in rows if (value := self._value(row, "arrival")) is not None])

    def clock_of(self, name: str) -> Clock:
        """Of the column of times."""
        return Clock(name, self._asked.unit)

    def row(self, row: Mapping[str, Any]) -> TraceRecord:
        """The row of named values. Raises `RowError` and `LeftOutError`."""
        assert self._at is not None
        if row.keys() != self._known and len(self._others) < 50:
            self._known = row.keys()
            used = {name.partition(".")[0] for name in self._at.values()}
            used |= {*_BESIDE, "usage", *self.checked}
            self._others |= {name: None for name in row if name not in used}
        arrival = self._value(row, "arrival")
        if arrival is None and self._clock is not None:
            raise RowError("no time", f"{self._clock.name} is empty")
        input_tokens, output_tokens, cached = self._counts(row)
        if input_tokens is None:
            raise RowError("no input tokens", f"{self._at.get('input', 'the input length')} is empty")
        called(input_tokens, output_tokens)
        session, model = self._value(row, "session"), self._value(row, "model")
        return TraceRecord(
            None if self._clock is None else self._clock.ns(arrival),
            input_tokens,
            output_tokens,
            None if session is None else str(session),
            model=None if model is None else str(model),
            cached_tokens=cached,
        )

    def _counts(self, row: Mapping[str, Any]) -> TokenCounts:
        assert self._at is not None
        name = self._at.get("input", "")
        if name.startswith("usage.") and name not in row and not self._asked.columns:
            return usage_of(row.get("usage"))
        counts = TokenCounts(*(self._count(row, role) for role in ("input", "output", "cached")))
        if name == "input_tokens" and not self._asked.columns and any(each in row for each in _BESIDE):
            # Anthropic's columns stand beside it.
            beside = {each: token_count(each, _given(row.get(each))) for each in _BESIDE}
            if counts.input_tokens is not None and any(beside.values()):
                whole_input = usage_of({"input_tokens": counts.input_tokens, **beside})
                counts = counts._replace(input_tokens=whole_input[0], cached_tokens=whole_input[2])
        return counts

    def _count(self, row: Mapping[str, Any], role: Role) -> int | None:
        assert self._at is not None
        return token_count(self._at.get(role, role), self._value(row, role))

    def _value(self, row: Mapping[str, Any], role: Role) -> Any:
        """What the row says; None where it does not."""
        assert self._at is not None
        name = self._at.get(role)
        if name is None:
            return None
        value = row.get(name)
        if value is None and "." in name:
            value = _inside(row, name)
        value = _given(value)
        if role == "arrival" and isinstance(value, str) and self._mark == ";" and ":" not in value:
            return value.replace(",", ".")  # a decimal comma
        return value


class Columnar(TableReader):
    """Reader of columnar files; the first bytes tell which kind."""

    summary = "Parquet or Arrow file with the columns of our JSON Lines, or of any table"
    others_first: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._sizes = BlockSizes()
        self._own = OwnClock()
        self._ours = False

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The magic bytes of Parquet, an Arrow file or an Arrow stream."""
        return record.startswith(columnar.MAGICS)

    @property
    def clock(self) -> str:  # type: ignore[override]
        """As its name says, or as found."""
        return self._own.said if self._ours else super().clock

    @property
    def sends_text(self) -> bool:  # type: ignore[override]
        """Our own rows are written to be sent."""
        return self._ours

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        """(row from 1, column -> value without nulls)."""
        self._ours = columnar.is_ours(file, self._asked.columns)
        return columnar.rows(file, self._asked.columns)

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """Rows of our own as lines of JSON would be read; those of a table as a table's."""
        records = iter(records)
        first = list(islice(records, 1))  # opens the file: only now is known whose columns it has
        if not first:
            return
        again = chain(first, records)
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


def _given(value: Any) -> Any:
    if isinstance(value, str):
        if value.isdigit():
            return value
        return None if value.strip().lower() in _MISSING else value.strip()
    return None if isinstance(value, float) and value != value else value


def _inside(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _names(row: Mapping[str, Any]) -> list[str]:
    """Of a row's values, those of a usage object with its name before them."""
    usage = row.get("usage")
    return [*row, *(f"usage.{name}" for name in usage)] if isinstance(usage, dict) else list(row)


# --- CSV -------------------------------------------------------------------------------------------------------------


def header_of(line: bytes) -> tuple[str, list[str]]:
    """(what divides the fields, their names) of a header: the mark that most of them are found with."""
    text = line[:100_000].decode("utf-8", "replace").strip("\r\n\ufeff")
    best: tuple[str, list[str]] = (",", [text])
    for mark in MARKS:
        try:
            (names,) = csv.reader([text], delimiter=mark, strict=True)
        except (csv.Error, ValueError):
            continue
        names = [name.strip().strip('"') for name in names]
        if len(names) > len(best[1]):
            best = mark, names
    return best


def split(record: bytes, mark: str) -> list[str]:
    """The fields of a record. Raises `RowError`."""
    try:
        text = record.decode().rstrip("\r\n")
        if '"' not in text:
            return text.split(mark)
        (fields,) = csv.reader([text], delimiter=mark, strict=True)
        return fields
    except UnicodeDecodeError as e:
        raise not_utf8(e) from None
    except (csv.Error, ValueError) as e:
        raise RowError("bad row", f"not a CSV record ({e}): {show(record)}") from None
