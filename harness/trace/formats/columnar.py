"""Rows of Parquet and Arrow files (IPC file or stream), in bounded memory; nulls mean not given.

A few kilobytes may unpack to gigabytes, and Arrow allocates what the headers of a part state. So these are looked at
first: each compressed buffer of an Arrow batch or dictionary begins with its unpacked size; of a Parquet column the
header before each page says it, and a chunk is walked from page to page without unpacking any (the sizes in the file's
footer are only what its writer says). Then a batch is read at a time, as small as long values make it.

Source: Arrow "Columnar format", ``Message.fbs``; Parquet, ``parquet.thrift`` (``PageHeader``); Thrift compact protocol.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from harness.errors import TraceError
from harness.trace.formats.record import Object, RowError, safe
from harness.trace.source import MAX_LINE_BYTES, TraceFile, magic

MAGICS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""First bytes of Parquet, an Arrow file and an Arrow stream."""
_ROWS = 4096
_BATCH_BYTES = 2**26
MOST_BYTES = 2**28
"""Unpacked, of an Arrow batch with its dictionaries, or of a page of each column of Parquet."""
MOST_DICTIONARY = 2**25
"""Of a dictionary of Parquet: writers end one at one MiB, or a few; it is held twice."""


def is_columnar(file: TraceFile) -> bool:
    """Whether the bytes of a file say so."""
    return magic(file).startswith(MAGICS)


@contextmanager
def _reading(file: TraceFile, row: int | None = None) -> Iterator[None]:
    """Says in one line of a file that it is damaged; the words of Arrow may hold any byte of it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, struct.error) as e:
        problem = f"damaged columnar file ({safe(str(e).strip(), 300)}): copy it again"
        raise TraceError(file.name, row, problem) from e


def schema_of(file: TraceFile) -> Any:
    """Of a columnar file (as Arrow has it). Raises `TraceError` for a damaged one, and for a plan."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _reading(file):
        if magic(file).startswith(b"PAR1"):
            schema = pq.read_schema(str(file.path))
        else:
            with _stream(file) as raw, pa.ipc.open_stream(raw) as reader:
                schema = reader.schema
        schema.names  # noqa: B018  # decoded only here
    if b"harness.plan" in (schema.metadata or {}):
        raise TraceError(file.name, None, "is a plan, already made from a trace: use it with 'harness run'")
    return schema


def chosen_rows(file: TraceFile, wanted: Sequence[str]) -> Iterator[tuple[int, Object | RowError]]:
    """(row from 1, column -> value without nulls) of these columns. Raises `TraceError` for a damaged file."""
    batches, number = _batches(file, wanted), 0
    while True:
        with _reading(file, number + 1):
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)  # Arrow trusts offsets: a damaged file would read outside its memory
            names, columns = batch.schema.names, [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            if any(isinstance(value, str | bytes) and len(value) > MAX_LINE_BYTES for value in values):
                yield number, RowError("line too long", f"longer than {MAX_LINE_BYTES // 2**20} MiB: not a trace line")
                continue
            yield number, {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _values(column: Any) -> list[Any]:
    """Python's values of a column, times written out; equal texts of a dictionary are one object."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        used = column.indices.unique().drop_null()
        words = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
        return [words.get(at) for at in column.indices.to_pylist()]
    if pa.types.is_timestamp(column.type):
        column = pc.strftime(column.cast(pa.timestamp(column.type.unit)), format="%Y-%m-%d %H:%M:%S")
    found: list[Any] = column.to_pylist()
    return found


def _check_fits(file: TraceFile, size: int, most: int, part: str, advice: str) -> None:
    """Raises `TraceError` when a ``part`` has more bytes than ``most``."""
    if size > most:
        problem = f"{part} takes {size // 2**20:,} MiB of memory once unpacked"
        raise TraceError(file.name, None, f"{problem}, more than the {most // 2**20} that one may: {advice}")


def _batches(file: TraceFile, wanted: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not magic(file).startswith(b"PAR1"):
        _check_arrow(file)
        with _stream(file) as raw, pa.ipc.open_stream(raw) as reader:
            yield from (part for batch in reader for part in _cut(batch.select(list(wanted))))
        return
    path = str(file.path)
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as parquet, file.path.open("rb") as raw:
        for at in range(parquet.metadata.num_row_groups):
            rows = _fitting_rows(file, raw, parquet.metadata.row_group(at), wanted)
            yield from parquet.iter_batches(rows, row_groups=[at], columns=list(wanted), use_threads=False)


# --- Arrow -----------------------------------------------------------------------------------------------------------


def _stream(file: TraceFile) -> Any:
    """The stream of messages in a file. Raises `OSError` for a file that was cut."""
    import pyarrow as pa

    raw = pa.memory_map(str(file.path))
    if magic(file).startswith(b"ARROW1"):
        if raw.size() < 20 or (raw.seek(raw.size() - 6), raw.read(6))[1] != b"ARROW1":
            raise OSError("an Arrow file without its end")
        raw.seek(8)
    return raw


def _check_arrow(file: TraceFile) -> None:
    """Raises `TraceError` when a batch unpacks to more than fits, with its dictionaries."""
    import pyarrow as pa

    dictionaries: dict[int, int] = {}
    with _reading(file), _stream(file) as raw:
        for message in pa.MessageReader.open_stream(raw):
            header = _Table.root(message.metadata.to_pybytes()).inner(2)
            size = 0
            if header is not None and message.type == "dictionary":
                name, batch = header.number(0, "q"), header.inner(1)
                before = dictionaries.get(name, 0) if header.number(2, "?") else 0  # a delta adds to it
                dictionaries[name] = before + _unpacked(message.body, batch)
            elif header is not None and message.type == "record batch":
                size = _unpacked(message.body, header)
            size += sum(dictionaries.values())
            _check_fits(file, size, MOST_BYTES, "a batch of it", "write it in smaller batches")


def _unpacked(body: Any, batch: _Table | None) -> int:
    if batch is None:
        return 0
    packed = batch.inner(3) is not None
    size = 0
    for offset, length in batch.structs(2, "<qq"):
        stated = struct.unpack("<q", body[max(offset, 0) :][:8])[0] if packed and length >= 8 else -1
        size += max(stated, length, 0)
    return size


def _cut(batch: Any) -> Iterator[Any]:
    rows, size = max(batch.num_rows, 1), max(batch.get_total_buffer_size(), 1)
    # Rows of some kinds may all be the same bytes: each is as large as all that is there.
    repeated = sum(column.get_total_buffer_size() for column in batch.columns if _repeats(column.type))
    fit = max(1, min(_ROWS, _BATCH_BYTES * rows // size, _BATCH_BYTES // max(repeated, 1)))
    yield from (batch.slice(at, fit) for at in range(0, batch.num_rows, fit))


def _repeats(kind: Any) -> bool:
    """Whether values of a type, or in it, may share bytes."""
    import pyarrow.types as types

    shares = (types.is_string_view, types.is_binary_view, types.is_list_view, types.is_large_list_view,
              types.is_run_end_encoded)  # fmt: skip
    return any(of(kind) for of in shares) or any(_repeats(kind.field(i).type) for i in range(kind.num_fields))


class _Table:
    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        if not 0 <= self._fields <= len(data) - 4:
            raise ValueError("no table")
        (self._size,) = struct.unpack_from("<H", data, self._fields)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def number(self, field: int, kind: str) -> int:
        """A number; 0 where there is none."""
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(f"<{kind}", self._data, place)[0])

    def inner(self, field: int) -> _Table | None:
        place = self._place(field, pointed=True)
        return None if place is None else _Table(self._data, place)

    def structs(self, field: int, kind: str) -> Iterable[tuple[int, ...]]:
        place = self._place(field, pointed=True)
        if place is None:
            return ()
        size = struct.calcsize(kind) * struct.unpack_from("<I", self._data, place)[0]
        return struct.iter_unpack(kind, self._data[place + 4 : place + 4 + size])

    def _place(self, field: int, *, pointed: bool = False) -> int | None:
        at = 4 + 2 * field
        offset: int = struct.unpack_from("<H", self._data, self._fields + at)[0] if at + 2 <= self._size else 0
        place = self._at + offset
        if not offset:
            return None
        return place + int(struct.unpack_from("<I", self._data, place)[0]) if pointed else place


# --- Parquet ---------------------------------------------------------------------------------------------------------

_UNPACKED, _PACKED, _DATA, _DICTIONARY_PAGE, _DATA_2 = 2, 3, 5, 7, 8
"""Fields of a ``PageHeader``; the first field of a header of data is how many values there are."""

_Fields = Mapping[int, "int | _Fields"]


@dataclass(slots=True)
class Pages:
    """Bytes of one chunk's pages once unpacked."""

    dictionary: int = 0
    largest: int = 0
    total: int = 0
    values: int = 0


def _fitting_rows(file: TraceFile, raw: BinaryIO, group: Any, wanted: Sequence[str]) -> int:
    """Rows of a row group that may be read at a time. Raises `TraceError` when not one fits."""
    columns = {(c := group.column(k)).path_in_schema: c for k in range(group.num_columns)}
    columns = {name: column for name, column in columns.items() if name.split(".")[0] in wanted}
    with _reading(file):
        pages = {path: pages_of(raw, column) for path, column in columns.items()}
    # Equal numbers are written as one: unpacked each has its own place.
    rows, size = max(group.num_rows, 1), sum(max(each.total, 8 * each.values) for each in pages.values())
    if size > MAX_LINE_BYTES * rows:
        problem = f"its rows have {size // rows // 2**20} MiB each on average: not a trace"
        raise TraceError(file.name, None, problem)
    dictionary = max((each.dictionary for each in pages.values()), default=0)
    _check_fits(file, dictionary, MOST_DICTIONARY, "a dictionary of it", "write it without dictionaries")
    held = sum(each.dictionary + each.largest for each in pages.values())
    _check_fits(file, held, MOST_BYTES, "a page of each of its columns", "write it with smaller pages")
    # A value that is repeated is written once: a row may be as large as all that is written, but for numbers.
    texts = sum(
        pages[name].total if name in wanted else pages[name].dictionary
        for name, column in columns.items()
        if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
    )
    fit: int = min(_ROWS, _BATCH_BYTES * rows // max(size, 1), _BATCH_BYTES // max(texts, 1))
    return max(1, fit)


def pages_of(raw: BinaryIO, column: Any) -> Pages:
    """The pages of a column by the metadata of its chunk. Raises `ValueError` for headers that make no sense."""
    found = Pages()
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    while at < end and found.values < column.num_values:
        raw.seek(at)
        header = _struct(raw)
        unpacked, packed = _number(header, _UNPACKED), _number(header, _PACKED)
        if packed < 0 or unpacked < 0:
            raise ValueError(f"a page of {packed} bytes")
        if _DICTIONARY_PAGE in header:
            found.dictionary += unpacked
        else:
            found.largest = max(found.largest, unpacked)
        data = header.get(_DATA, header.get(_DATA_2, {}))
        found.values += _number(data, 1) if isinstance(data, Mapping) else 0
        found.total += unpacked
        at = raw.tell() + packed
    return found


def _number(fields: _Fields, name: int) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


def _byte(raw: BinaryIO) -> int:
    found = raw.read(1)
    if not found:
        raise ValueError("a page header is cut")
    return found[0]


def _varint(raw: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(raw)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("a number without an end")


def _struct(raw: BinaryIO, deep: int = 0) -> _Fields:
    if deep > 8:
        raise ValueError("a page header is nested too deeply")
    fields: dict[int, int | _Fields] = {}
    name = 0
    while head := _byte(raw):
        kind = head & 0x0F
        name = name + (head >> 4) if head >> 4 else _signed(raw)
        if kind in (4, 5, 6):
            fields[name] = _signed(raw)
        elif kind == 12:
            fields[name] = _struct(raw, deep + 1)
        elif kind in (3, 7, 8):  # a byte, a float, bytes
            raw.seek(1 if kind == 3 else 8 if kind == 7 else _varint(raw), os.SEEK_CUR)
        elif kind > 2:  # 1 and 2 are true and false
            raise ValueError(f"a page header has a field of kind {kind}")
    return fields


def _signed(raw: BinaryIO) -> int:
    value = _varint(raw)
    return value >> 1 ^ -(value & 1)
