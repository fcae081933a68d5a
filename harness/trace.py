"""Production traces: what arrived, when, and how long it was, exactly as the file says.

`open_trace` finds the format (`harness.formats`), and iterating the `Trace` streams `TraceRecord` in file order in
constant memory. Nothing is guessed, sorted or dropped in silence: rows_read == rows_kept + what was dropped, by reason.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from harness.errors import TraceError, unknown_name
from harness.formats import FORMATS
from harness.formats.row import FailedCallError, Reader, Row, RowError

MAX_LINE_BYTES = 16 * 2**20
"""Longest line that is read; more is not a trace but a binary file or a file without line ends."""

FAILED_CALL = "zero tokens (failed call)"
"""Reason under which rows are counted that record a failed call of the source system."""


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One request of a trace. What the file does not say is None."""

    line: int
    """1-based line in the (uncompressed) file."""
    arrival_s: float | None
    """Seconds after the first kept record; never decreasing."""
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


class Trace:
    """A trace file. Iterate it as often as needed; each time the file is read anew.

    After an iteration (also one ended early) the counters tell about the rows it looked at, and
    ``rows_read == rows_kept + sum(rows_dropped.values())``. Blank lines and headers are not rows.
    """

    def __init__(self, path: Path, format_: str, sha256: str, skip_bad: bool) -> None:
        self.path = path
        self.format = format_
        self.sha256 = sha256
        """Of the file as it lies on disk (compressed, if it is)."""
        self.skip_bad = skip_bad
        self.rows_read = 0
        self.rows_kept = 0
        self.rows_dropped: dict[str, int] = {}
        self.notes: list[str] = []

    def __iter__(self) -> Generator[TraceRecord, None, None]:
        """Records in file order.

        Raises `TraceError` at the first bad line (with ``skip_bad``: counts it and goes on), at a damaged file, and at
        the end of a file that had no usable row.
        """
        reader = FORMATS[self.format]()
        read = kept = 0
        dropped: Counter[str] = Counter()
        order = _Order()
        header = reader.has_header
        try:
            for number, line in _lines(self.path):
                if header:
                    self._read_header(reader, number, line)
                    header = False
                    continue
                read += 1
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise RowError("line too long", f"longer than {MAX_LINE_BYTES // 2**20} MiB: not a trace line")
                    row = reader.parse(line)
                    arrival_s = order.arrival_s(row)
                except FailedCallError:
                    dropped[FAILED_CALL] += 1
                    continue
                except RowError as e:
                    if not self.skip_bad:
                        raise TraceError(
                            str(self.path), number, f"{e} (--skip-bad drops and counts such rows)"
                        ) from None
                    dropped[e.reason] += 1
                    continue
                kept += 1
                yield TraceRecord(number, arrival_s, *row[1:])
        finally:
            self.rows_read, self.rows_kept, self.rows_dropped = read, kept, dict(dropped)
            self.notes = self._notes(reader, order)
        if not kept:
            raise TraceError(str(self.path), None, f"no usable row: {_books(read, dropped)}")

    def _read_header(self, reader: Reader, number: int, line: bytes) -> None:
        try:
            reader.header(line)
        except RowError as e:
            raise TraceError(str(self.path), number, f"{e}; this is not a {self.format} trace") from None

    def _notes(self, reader: Reader, order: _Order) -> list[str]:
        notes = [
            f"{count} of {self.rows_read} rows not replayed: {why}" for why, count in sorted(self.rows_dropped.items())
        ]
        if (step_s := order.grid_s(self.rows_kept)) is not None:
            notes.append(
                f"arrivals lie on a grid of {step_s:g} s: {self.rows_kept} rows on {order.instants} instants. The "
                "source rounded its clock; replayed as recorded they come in bursts that production may not have seen"
            )
        return notes + reader.notes()


def open_trace(path: Path, *, format: str | None = None, skip_bad: bool = False) -> Trace:  # noqa: A002
    """A `Trace` over ``path``, its format found from its first line unless ``format`` names it.

    ``skip_bad``: bad lines are dropped and counted by reason instead of ending the iteration.

    Raises `TraceError` when the file cannot be opened or its format is not recognised, `UsageError` for an unknown
    format.
    """
    if format is not None and format not in FORMATS:
        raise unknown_name("trace format", format, FORMATS)
    file = str(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise TraceError(file, None, "is a directory; name a trace file in it")
        if not stat.S_ISREG(mode):
            raise TraceError(
                file, None, "is not a regular file; a trace is read more than once, so save it to a file first"
            )
        with path.open("rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    except OSError as e:
        raise TraceError(file, None, f"cannot read: {e.strerror or e}") from e
    return Trace(path, format or _detect(path), sha256, skip_bad)


def _detect(path: Path) -> str:
    first = next((line for _, line in _lines(path)), None)
    if first is None:
        raise TraceError(str(path), None, "is empty: no line with anything on it")
    found = [name for name, reader in FORMATS.items() if reader.sniff(first)]
    if len(found) == 1:
        return found[0]
    seen = first[:100].decode("utf-8", "replace").rstrip("\r\n")
    problem = f"could be {' or '.join(found)}" if found else f"format not recognised{_looks_like(first)}"
    formats = "; ".join(f"{name} - {reader.summary}" for name, reader in FORMATS.items())
    raise TraceError(str(path), None, f"{problem}. First line: {seen!r}. Formats: {formats}. --format NAME forces one")


_MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd: decompress it first (zstd -d)",
    b"\xfd7zXZ": "xz: decompress it first (xz -d)",
    b"BZh": "bzip2: decompress it first (bunzip2)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: convert it to CSV or JSON Lines first",
    b"ARROW1": "an Arrow file (perhaps a plan, which is already made)",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"<": "HTML or XML, perhaps an error page saved as a file",
    b"[": "one JSON document: one object per line is wanted (jq -c '.[]')",
    b"{\n": "one JSON document over several lines: one object per line is wanted (jq -c .)",
    b"{\r\n": "one JSON document over several lines: one object per line is wanted (jq -c .)",
}


def _looks_like(first: bytes) -> str:
    return next((f"; it looks like {what}" for magic, what in _MAGIC.items() if first.startswith(magic)), "")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, line) of each line that is not blank; plain or gzip by the first bytes, byte-order mark removed.

    Memory is bounded: of a line longer than `MAX_LINE_BYTES` the first ``MAX_LINE_BYTES + 1`` bytes come out.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            source = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20)) if zipped else raw
            while line := source.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if len(line) > MAX_LINE_BYTES:
                    _skip_line(source)
                if not line.isspace() and line:
                    yield number, line
    except EOFError as e:
        raise TraceError(str(path), number + 1, "the gzip data ends early: the file was cut, copy it again") from e
    except (gzip.BadGzipFile, zlib.error) as e:
        raise TraceError(str(path), number + 1, f"damaged gzip data ({e}): copy the file again") from e
    except OSError as e:
        raise TraceError(str(path), number + 1, f"cannot read: {e.strerror or e}") from e


def _skip_line(source: BinaryIO) -> None:
    while (rest := source.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
        pass


def _books(read: int, dropped: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"{read} rows read" + (f", dropped: {reasons}" if reasons else "")


class _Order:
    """Shifts arrivals to zero, refuses those that go back, and watches for a coarse clock."""

    def __init__(self) -> None:
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._timed: bool | None = None
        self._steps: Counter[int] = Counter()
        self.instants = 0

    def arrival_s(self, row: Row) -> float | None:
        """Seconds after the first row; None when the trace has no times. Raises `RowError`."""
        now_ns = row.arrival_ns
        if self._timed is None:
            self._timed = now_ns is not None
        if self._timed != (now_ns is not None):
            has = "no arrival_s, but rows before have" if self._timed else "arrival_s, but rows before have none"
            raise RowError("arrival_s on some rows only", f"{has}: all rows or none")
        if now_ns is None:
            return None
        if self._first_ns is None or self._last_ns is None:
            self._first_ns = self._last_ns = now_ns
            self.instants = 1
        step_ns = now_ns - self._last_ns
        if step_ns:
            if step_ns < 0:
                raise RowError(
                    "arrival before the row above",
                    f"arrives {-step_ns / 1e9:.9g} s before the row above: a trace goes forward in time. Sort it, or "
                    "cut it here if it holds several recordings",
                )
            # Whole milliseconds, as coarse clocks have a jitter of one; bounded, as fine clocks need no counting.
            if len(self._steps) < 10_000:
                self._steps[(step_ns + 500_000) // 1_000_000] += 1
            self._last_ns = now_ns
            self.instants += 1
        return (now_ns - self._first_ns) / 1e9

    def grid_s(self, rows: int) -> float | None:
        """Step of the clock the source rounded to, seconds; None when the arrivals show no coarse one.

        A grid is said to be there when 95 % of at least 10 steps between different arrivals are whole multiples (to
        2 ms) of the most frequent one, that one is at least 0.1 s, and ``rows`` clearly outnumber the instants:
        otherwise rounding shapes no burst worth telling.
        """
        steps = self._steps
        total = steps.total()
        if total < 10 or rows < 1.05 * self.instants:
            return None
        grid_ms = steps.most_common(1)[0][0]
        if grid_ms < 100:
            return None
        on_grid = sum(n for ms, n in steps.items() if min(ms % grid_ms, -ms % grid_ms) <= 2 and ms > 2)
        return grid_ms / 1000 if on_grid >= 0.95 * total else None
