"""Where the bytes of a trace come from, and how they fall into records.

A trace is read more than once, so what is not a file (``-``, ``s3://bucket/key``) is first copied to a temporary one
(in ``$TMPDIR``), which is removed with the `TraceFile`.

`records` cuts the bytes (gzip, zstd, xz, bzip2 and zip are unpacked as they are read) into records: lines, CSV records
whose quoted fields may hold line ends, or the values of a JSON document. Memory is bounded whatever the file holds: of
a record that is too long only its beginning comes out.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from harness.errors import TraceError, UsageError
from harness.terminal import printable

MAX_LINE_BYTES = 16 * 2**20
"""Longest line that is read; more is not a trace but a binary file or a file without line ends."""
MAX_VALUE_BYTES = 64 * 2**20
"""Longest value of a JSON document: an export may hold all its spans in one object."""

_CHUNK = 2**18
_LONG_BEGINNING = 10_000
"""Bytes: what is written over several lines for people to read does not begin with a longer one."""


@dataclass(frozen=True, slots=True)
class TraceFile:
    """A trace file to be read as often as needed."""

    name: str
    path: Path
    """Where the bytes lie."""
    sha256: str
    """Of the bytes as they lie there (compressed, if they are)."""
    held: object = field(default=None, repr=False)
    member: str | None = None
    named: bool = True
    """By the user; else it was found in a folder, an archive or below a prefix."""


def open_source(name: str | Path) -> TraceFile:
    """The file, standard input or S3 object called ``name``. Raises `TraceError` when it cannot be read."""
    text = full_name(name)
    if text == "-":
        return _copied("<stdin>", _copy_stdin)
    if text.startswith("s3://"):
        return _fetched(text)
    path = Path(text)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise TraceError(text, None, "is a directory; name a trace file in it")
        if not stat.S_ISREG(mode):
            raise TraceError(
                text, None, "is not a regular file; a trace is read more than once: pipe it in and name it '-'"
            )
        with path.open("rb") as raw:
            return TraceFile(printable(text), path, hashlib.file_digest(raw, "sha256").hexdigest())
    except OSError as e:
        raise TraceError(text, None, f"cannot read: {e.strerror or e}") from e


def full_name(name: str | Path) -> str:
    """A path, or a URL whose two slashes a Path folded into one."""
    return re.sub(r"^(s3|hf):/+", r"\1://", str(name))


def _copied(name: str, copy: Callable[[IO[bytes]], str]) -> TraceFile:
    spool = tempfile.NamedTemporaryFile(prefix="harness-trace-")  # noqa: SIM115  # lives as long as the TraceFile
    try:
        return TraceFile(name, Path(spool.name), copy(spool), spool)
    except BaseException:
        spool.close()
        raise


def _copy_stdin(file: IO[bytes]) -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise TraceError("<stdin>", None, "standard input is a terminal: pipe a trace into it (... | harness ... -)")
    try:
        shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        file.flush()
        file.seek(0)
        return hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").hexdigest()
    except OSError as e:
        raise TraceError("<stdin>", None, f"the stream broke off: {e}") from e


def _fetched(url: str) -> TraceFile:
    from harness.store.objects import StoreError, fetch

    try:
        return _copied(url, lambda file: fetch(url, file))
    except (UsageError, StoreError) as e:
        problem = f"cannot read from S3: {e.problem}" if isinstance(e, StoreError) else "expected s3://BUCKET/KEY"
        raise TraceError(url, None, problem) from e


# --- bytes ---------------------------------------------------------------------------------------------------------


def magic(source: TraceFile, size: int = 16) -> bytes:
    """The first bytes of the file as it lies there, or in its archive."""
    try:
        with source.path.open("rb") as raw:
            if source.member is None:
                return raw.read(size)
            with zipfile.ZipFile(raw) as archive, archive.open(source.member) as member:
                return member.read(size)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as e:
        raise TraceError(source.name, None, f"damaged zip data ({e}): copy the file again") from e
    except OSError as e:
        raise TraceError(source.name, None, f"cannot read: {e.strerror or e}") from e


class _Place:
    line = 1


@contextmanager
def _unpacked(source: TraceFile, place: _Place) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; what goes wrong while they are read becomes a `TraceError`."""
    kind = "zip" if source.member is not None else ""
    try:
        with ExitStack() as open_:
            raw: Any = open_.enter_context(source.path.open("rb"))
            if source.member is not None:
                raw = open_.enter_context(open_.enter_context(zipfile.ZipFile(raw)).open(source.member))
            # An archive may hold a compressed file, and that is all.
            stream = cast(BinaryIO, io.BufferedReader(raw, 2**20) if source.member is not None else raw)
            start = stream.peek(6)[:6] if isinstance(stream, io.BufferedReader) else b""
            kind, opener = next((p for magic, p in _PACKED.items() if start.startswith(magic)), (kind, None))
            yield stream if opener is None else cast(BinaryIO, io.BufferedReader(opener(stream), 2**20))
    except EOFError as e:
        raise TraceError(source.name, place.line, f"the {kind} data ends early: the file was cut, copy it again") from e
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
        raise TraceError(source.name, place.line, f"damaged {kind} data ({e}): copy the file again") from e
    except OSError as e:
        # Arrow and bz2 raise it without a number for data that they cannot unpack; the system always has one.
        problem = f"cannot read: {e.strerror}"
        if e.errno is None:
            problem = f"the {kind or 'file'} data is damaged or ends early ({e}): copy the file again"
        raise TraceError(source.name, place.line, problem) from e


def _zstd(raw: Any) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


_PACKED: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw)), b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile), b"BZh": ("bzip2", bz2.BZ2File),
}  # fmt: skip


def unpack(source: TraceFile, limit: int) -> bytes:
    """All bytes of the file, decompressed. Raises `TraceError` when they are more than ``limit``."""
    with _unpacked(source, _Place()) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise TraceError(source.name, None, f"is larger than {limit // 2**20} MiB")
    return raw


# --- records -------------------------------------------------------------------------------------------------------


class Cut(bytes):
    """The beginning of a record that is too long to be read."""


def records(source: TraceFile, *, quoted: bool = False) -> Iterator[tuple[int, bytes]]:
    """(1-based line it begins on, bytes) of each record that is not blank; a byte-order mark is removed.

    A record is a line, with ``quoted`` a CSV record, or a value of a JSON document: of an array, or of values that are
    written over several lines. Beyond `MAX_LINE_BYTES` (JSON: `MAX_VALUE_BYTES`) it comes out as a `Cut`.

    Raises `TraceError` for damaged compression, a JSON document that does not end, or a quote that is never closed.
    """
    place = _Place()
    with _unpacked(source, place) as stream:
        lines = _lines(stream, place)
        said = _said(source, lines)
        number, line = next(said, (1, b""))
        if _SEPARATOR.fullmatch(line):
            number, line = next(said, (1, b""))
        if line.lstrip().startswith((b"[", b"{")):
            line = type(line)(line.lstrip(b" \t"))
        if not line:
            return
        # An export may be one object on one line, too long for a line.
        if _is_document(line) or (isinstance(line, Cut) and line.startswith(b"{")):
            yield from _json_values(source, place, stream, number, line)
        elif quoted and not line.startswith(b"{"):
            yield from _csv_records(source, chain(((number, line),), lines))
        else:
            yield number, line
            yield from said


def _is_document(line: bytes) -> bool:
    text = line.strip() if len(line) < _LONG_BEGINNING else b""
    # An access log may begin with "[2016-04-15": an array of numbers is no trace.
    return (text[:1] == b"{" and text[-1:] in b"{[,") or re.match(rb"\[\s*([{\[\]]|$)", line) is not None


_SEPARATOR = re.compile(rb"sep=.\s*", re.IGNORECASE)
"""Excel's word, before the header of a CSV, for what divides the fields."""


def _check_blank(source: TraceFile, number: int, blank_bytes: int) -> None:
    if blank_bytes > MAX_LINE_BYTES:
        raise TraceError(source.name, number, f"nothing but blanks for {MAX_LINE_BYTES // 2**20} MiB: not a trace")


def _said(source: TraceFile, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    blank = 0
    for number, line in lines:
        if line.isspace():
            blank += len(line)
            _check_blank(source, number, blank)
        else:
            blank = 0
            yield number, line


def _lines(stream: BinaryIO, place: _Place) -> Iterator[tuple[int, bytes]]:
    number, mark = 1, b"\xef\xbb\xbf"
    while line := stream.readline(MAX_LINE_BYTES + 1).removeprefix(mark if number == 1 else b""):
        place.line = number
        yield number, line if len(line) <= MAX_LINE_BYTES else Cut(line)
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES + 1) or b"\n"
        number += 1
        place.line = number


def _csv_records(source: TraceFile, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    start, size, open_ = 0, 0, False
    parts: list[bytes] = []
    for number, line in lines:
        if not open_:
            start, parts, size = number, [], 0
        parts.append(line)
        size += len(line)
        # Doubled quotes inside a field keep the count even.
        open_ ^= line.count(b'"') % 2 == 1
        if open_ and size > MAX_LINE_BYTES:
            raise TraceError(source.name, start, "a quote is opened here and not closed within 16 MiB: not CSV")
        if not open_ and not (len(parts) == 1 and line.isspace()):
            yield start, parts[0] if len(parts) == 1 else b"".join(parts)
    if open_:
        raise TraceError(source.name, start, "a quote is opened here and never closed: the file was cut or is not CSV")


_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')


def _json_values(
    source: TraceFile, place: _Place, stream: BinaryIO, number: int, first: bytes
) -> Iterator[tuple[int, bytes]]:
    """Values of a JSON array, or JSON objects one after the other. Only brackets and quotes are looked at."""
    scan = _JsonScan(source, place, array=first.startswith(b"["), line=number)
    chunk, blank = first[scan.array :], 0
    while chunk:
        empty, ended = not scan.value, False
        for found in scan.feed(chunk):  # one by one: what is before the damage shows the format
            ended = True
            yield found
        blank = blank + len(chunk) if empty and not ended and not scan.value else 0
        _check_blank(source, place.line, blank)
        chunk = stream.read(_CHUNK)
    if scan.depth or scan.in_string or scan.array is not scan.closed:
        raise TraceError(source.name, place.line, "the JSON document ends early: the file was cut, copy it again")
    if scan.value.strip():
        raise scan.problem("text after the end of the JSON")


class _JsonScan:
    def __init__(self, source: TraceFile, place: _Place, *, array: bool, line: int) -> None:
        self.array = array
        self.closed = False
        self.depth = 0
        self.in_string = self._escaped = False
        self.value = bytearray()
        self._source, self._place, self._begun = source, place, line
        place.line = line

    def problem(self, what: str) -> TraceError:
        return TraceError(self._source.name, self._place.line, f"{what}: not a JSON document")

    def feed(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Values that end in this chunk. Raises `TraceError` for what cannot stand between two of them."""
        start, at = 0, int(self._escaped)
        self._escaped = False
        while found := (_INSIDE if self.in_string else _OUTSIDE).search(chunk, at):
            at, mark = found.end(), found[0]
            if mark == b"\\":
                self._escaped = at == len(chunk)
                at += 1
            elif mark == b'"':
                self.in_string = not self.in_string
            elif mark in b"{[":
                self.depth += 1
            elif self.depth:
                self.depth -= mark != b","
                if not self.depth and not self.array:
                    yield from self._end(chunk[start:at])
                    start = at
            else:
                yield from self._end(chunk[start : at - 1])
                start = at
                if not self.array or self.closed or mark == b"}":
                    raise self.problem(f"a {mark.decode()} where no value is open")
                self.closed = mark == b"]"
        self._keep(chunk[start:])

    def _keep(self, text: bytes) -> None:
        if not self.value:
            lead = len(text) - len(text.lstrip())
            self._place.line += text.count(b"\n", 0, lead)
            text = text[lead:]
            self._begun = self._place.line
        self._place.line += text.count(b"\n")
        self.value += text[: max(MAX_VALUE_BYTES + 1 - len(self.value), 0)]

    def _end(self, text: bytes) -> list[tuple[int, bytes]]:
        self._keep(text)
        if not self.value:
            return []
        if self.closed:
            raise self.problem("text after the end of the JSON array")
        ended = (Cut if len(self.value) > MAX_VALUE_BYTES else bytes)(self.value)
        self.value.clear()
        return [(self._begun, ended)]
