"""How much memory the pages of a Parquet column take once they are unpacked, from the headers of the pages.

The sizes in a file's footer are what its writer says. A reader allocates what the header before each page states, so
these are looked at: a chunk is walked from page to page, and no page is unpacked.

Source: Parquet format, ``parquet.thrift`` (``PageHeader``); Thrift compact protocol.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from harness.errors import TraceError
from harness.trace.formats.unpacked import DamagedError, check_fits
from harness.trace.source import Source

MOST_DICTIONARY = 2**25
"""Bytes: writers end a dictionary at one MiB, or a few; it is held twice."""

_DEEPEST = 8
_UNPACKED, _PACKED = 2, 3
_DATA, _DICTIONARY, _DATA_2 = 5, 7, 8
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


def group_pages(file: Source, raw: BinaryIO, columns: Mapping[str, Any]) -> dict[str, Pages]:
    """The pages of a row group's columns, by path; ``columns``: their metadata.

    Raises `TraceError` for headers that make no sense.
    """
    try:
        return {path: _pages(raw, column) for path, column in columns.items()}
    except (DamagedError, OSError, ValueError) as e:
        raise TraceError(file.name, None, f"damaged columnar file ({e}): copy it again") from e


def check_pages(file: Source, found: Mapping[str, Pages]) -> None:
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
        if _DICTIONARY in header:
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
