"""How much memory the parts of a columnar file take once they are unpacked, read from its own headers beforehand.

A few kilobytes of Arrow or Parquet may unpack to gigabytes. Arrow allocates what the headers of a part state and fails
when that is not what came out, so the headers are what must be bounded:

- of an Arrow record batch or dictionary each compressed buffer begins with its unpacked size;
- of a Parquet column the header before each page says it (the sizes in the file's footer are only what its writer
  says): a chunk is walked from page to page, and no page is unpacked.

Source: Arrow "Columnar format", IPC messages and compression (``Message.fbs``); Parquet format, ``parquet.thrift``
(``PageHeader``); Thrift compact protocol.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from harness.errors import TraceError
from harness.trace.source import TraceFile

MOST_BYTES = 2**28
"""Of a batch with its dictionaries."""
_HEADER_BYTES = 2**26
_MAGIC = b"ARROW1"
_DICTIONARY, _BATCH = 2, 3
"""What a message is; the fields of a footer that list them have the same numbers."""


class DamagedError(Exception):
    """The headers make no sense."""


def check_arrow(file: TraceFile) -> None:
    """Raises `TraceError` when a batch of an IPC file or stream unpacks to more than fits, with its dictionaries."""
    dictionaries: dict[int, int] = {}
    try:
        with file.path.open("rb") as raw:
            is_file = raw.read(len(_MAGIC)) == _MAGIC
            for message in _of_file(raw) if is_file else _of_stream(raw):
                if message.dictionary is not None:
                    before = dictionaries.get(message.dictionary, 0) if message.is_delta else 0
                    dictionaries[message.dictionary] = before + message.size
                size = sum(dictionaries.values()) + (message.dictionary is None) * message.size
                check_fits(file, size, "a batch of it", "write it in smaller batches")
    except (DamagedError, struct.error, OSError) as e:
        raise TraceError(file.name, None, f"damaged columnar file ({e}): copy it again") from e


def check_fits(file: TraceFile, size: int, part: str, advice: str, most: int | None = None) -> None:
    """Raises `TraceError` when a ``part`` has more bytes than ``most``; None: `MOST_BYTES`."""
    most = MOST_BYTES if most is None else most
    if size > most:
        raise TraceError(
            file.name,
            None,
            f"{part} takes {size // 2**20:,} MiB of memory once unpacked, more than the {most // 2**20} that one may: "
            f"{advice}",
        )


# --- Arrow -----------------------------------------------------------------------------------------------------------


class _ArrowMessage(NamedTuple):
    """A record batch, or a dictionary for those after it."""

    size: int
    """Bytes of its buffers once unpacked."""
    dictionary: int | None
    is_delta: bool
    """Its values come after those that the dictionary has."""


def _of_stream(raw: BinaryIO) -> Iterator[_ArrowMessage]:
    """One message after the other; a torn end is the end."""
    at: int | None = 0
    while at is not None:
        message, at = _message(raw, at)
        if message is not None:
            yield message


def _of_file(raw: BinaryIO) -> Iterator[_ArrowMessage]:
    """The messages that the list at the end names."""
    end = raw.seek(-len(_MAGIC) - 4, os.SEEK_END)
    size = struct.unpack("<i", raw.read(4))[0]
    if not 0 < size <= min(end, _HEADER_BYTES):
        raise DamagedError(f"a footer of {size} bytes")
    raw.seek(end - size)
    footer = _Table.root(raw.read(size))
    for field in (_DICTIONARY, _BATCH):
        for at, _, _ in footer.structs(field, "<qqq"):
            message, _ = _message(raw, at)
            if message is not None:
                yield message


def _message(raw: BinaryIO, at: int) -> tuple[_ArrowMessage | None, int | None]:
    """The message at a byte of the file, if it is one with data, and where the next begins."""
    raw.seek(at)
    head = raw.read(8)
    if len(head) < 8:
        return None, None
    mark, size = struct.unpack("<Ii", head)
    if mark != 0xFFFFFFFF:  # as Arrow wrote it before 0.15
        size, at = struct.unpack("<i", head[:4])[0], at - 4
    if size == 0:
        return None, None
    if not 0 < size <= _HEADER_BYTES:
        raise DamagedError(f"a header of {size} bytes")
    raw.seek(at + 8)
    table = _Table.root(raw.read(size))
    body_at, body = at + 8 + size, table.number(3, "q")
    if body < 0:
        raise DamagedError(f"a body of {body} bytes")
    kind, header = table.number(1, "B"), table.inner(2)
    batch = header.inner(1) if header is not None and kind == _DICTIONARY else header
    if header is None or batch is None or kind not in (_DICTIONARY, _BATCH):
        return None, body_at + body
    unpacked = sum(_unpacked(raw, batch, body_at))
    if kind == _BATCH:
        return _ArrowMessage(unpacked, None, False), body_at + body
    return _ArrowMessage(unpacked, header.number(0, "q"), bool(header.number(2, "?"))), body_at + body


def _unpacked(raw: BinaryIO, batch: _Table, body_at: int) -> Iterator[int]:
    """Bytes of each buffer."""
    packed = batch.inner(3) is not None
    for offset, length in batch.structs(2, "<qq"):
        stated = -1
        if packed and length >= 8:
            raw.seek(body_at + max(offset, 0))
            stated = struct.unpack("<q", raw.read(8))[0]
        yield max(stated, length, 0)


class _Table:
    """A table of FlatBuffers."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        (back,) = struct.unpack_from("<i", data, at)
        self._fields = at - back
        if not 0 <= self._fields <= len(data) - 4:
            raise DamagedError("no table")
        (self._size,) = struct.unpack_from("<H", data, self._fields)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, struct.unpack_from("<I", data)[0])

    def _place(self, field: int) -> int | None:
        at = 4 + 2 * field
        offset: int = struct.unpack_from("<H", self._data, self._fields + at)[0] if at + 2 <= self._size else 0
        return self._at + offset if offset else None

    def number(self, field: int, kind: str) -> int:
        """A number; 0 where there is none."""
        place = self._place(field)
        return 0 if place is None else int(struct.unpack_from(f"<{kind}", self._data, place)[0])

    def _target(self, field: int) -> int | None:
        place = self._place(field)
        return None if place is None else place + int(struct.unpack_from("<I", self._data, place)[0])

    def inner(self, field: int) -> _Table | None:
        """A table in it."""
        target = self._target(field)
        return None if target is None else _Table(self._data, target)

    def structs(self, field: int, kind: str) -> Iterable[tuple[int, ...]]:
        """A list of some numbers each."""
        target = self._target(field)
        if target is None:
            return ()
        (count,) = struct.unpack_from("<I", self._data, target)
        return struct.iter_unpack(kind, self._data[target + 4 : target + 4 + struct.calcsize(kind) * count])


MOST_DICTIONARY = 2**25
"""Bytes: writers end a dictionary at one MiB, or a few; it is held twice."""

_DEEPEST = 8
_UNPACKED, _PACKED = 2, 3
_DATA, _DICTIONARY_PAGE, _DATA_2 = 5, 7, 8
"""Fields of a ``PageHeader``."""
_VALUES = 1
"""Field of a header of data: how many values there are."""

Fields = Mapping[int, "int | Fields"]


@dataclass(slots=True)
class Pages:
    """Bytes of one chunk's pages once unpacked."""

    dictionary: int = 0
    largest: int = 0
    """Of its other pages."""
    total: int = 0
    values: int = 0


def group_pages(file: TraceFile, raw: BinaryIO, columns: Mapping[str, Any]) -> dict[str, Pages]:
    """The pages of a row group's columns, by path; ``columns``: their metadata.

    Raises `TraceError` for headers that make no sense.
    """
    try:
        return {path: _pages(raw, column) for path, column in columns.items()}
    except (DamagedError, OSError, ValueError) as e:
        raise TraceError(file.name, None, f"damaged columnar file ({e}): copy it again") from e


def check_pages(file: TraceFile, found: Mapping[str, Pages]) -> None:
    """Raises `TraceError` when the pages of a row group take more memory than fits."""
    dictionary = max((pages.dictionary for pages in found.values()), default=0)
    check_fits(file, dictionary, "a dictionary of it", "write it without dictionaries", MOST_DICTIONARY)
    held = sum(pages.dictionary + pages.largest for pages in found.values())
    check_fits(file, held, "a page of each of its columns", "write it with smaller pages")


def _pages(raw: BinaryIO, column: Any) -> Pages:
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
            raise DamagedError(f"a page of {packed} bytes")
        if _DICTIONARY_PAGE in header:
            found.dictionary += unpacked
        else:
            found.largest = max(found.largest, unpacked)
        data = header.get(_DATA, header.get(_DATA_2, {}))
        found.values += _number(data, _VALUES) if isinstance(data, Mapping) else 0
        found.total += unpacked
        at = raw.tell() + packed
    return found


def _number(fields: Fields, name: int) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


# --- Thrift ----------------------------------------------------------------------------------------------------------


def _byte(raw: BinaryIO) -> int:
    found = raw.read(1)
    if not found:
        raise DamagedError("a page header is cut")
    return found[0]


def _varint(raw: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(raw)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise DamagedError("a number without an end")


def _signed(raw: BinaryIO) -> int:
    value = _varint(raw)
    return value >> 1 ^ -(value & 1)


def _struct(raw: BinaryIO, deep: int = 0) -> Fields:
    """The numbers in a struct, and in those in it."""
    if deep > _DEEPEST:
        raise DamagedError("a page header is nested too deeply")
    fields: dict[int, int | Fields] = {}
    name = 0
    while head := _byte(raw):
        name = name + (head >> 4) if head >> 4 else _signed(raw)
        kind = head & 0x0F
        if kind > 2:  # 1 and 2 are true and false
            value = _value(raw, kind, deep)
            if value is not None:
                fields[name] = value
    return fields


def _value(raw: BinaryIO, kind: int, deep: int) -> int | Fields | None:
    if kind in (4, 5, 6):
        return _signed(raw)
    if kind == 12:
        return _struct(raw, deep + 1)
    if kind == 3:
        _byte(raw)
    elif kind == 7:
        raw.seek(8, os.SEEK_CUR)
    elif kind == 8:
        raw.seek(_varint(raw), os.SEEK_CUR)
    else:
        raise DamagedError(f"a page header has a field of kind {kind}")
    return None
