"""Production traces: what arrived, when, and how long it was, exactly as the file says.

`open_trace` finds the format (`harness.formats`), and iterating the `Trace` streams `TraceRecord` in order of arrival
in bounded memory. Nothing is guessed or dropped in silence: rows_read == rows_kept + what was dropped, by reason. Rows
are sorted only when the format is written out of order (or when asked to), and then a note says so.
"""

from __future__ import annotations

import heapq
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.errors import TraceError, UsageError, unknown_name
from harness.formats import FORMATS
from harness.formats.detect import detect
from harness.formats.row import FAILED_CALL, MAX_ARRIVAL_S, FailedCallError, LeftOutError, Reader, Row, RowError
from harness.source import Cut, Source, open_source

__all__ = ["FAILED_CALL", "Draw", "Trace", "TraceRecord", "open_trace"]

Draw = Callable[[], tuple[int, int]]
"""Gives the next (input, output) tokens for rows of a log that has arrivals only."""

_MAX_REASONS = 30
_FAST, _FAST_ROWS = 1000, 100
"""Requests/s that no single trace is likely to hold over so many rows: the clock may be in another unit."""
_SORT_ROWS = 200_000
"""Rows held in memory when sorting; the rest waits in temporary files."""


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One request of a trace. What the file does not say is None."""

    line: int
    """1-based line in the (uncompressed) file its record begins on; the row in a columnar file."""
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
    answer: str | None = None
    """What the model said in production. Never sent."""
    adapter: str | None = None
    """Model or LoRA adapter to ask for, by the name the server under test has for it; None: the run's model."""
    cancel_after_s: float | None = None
    """The client hung up this long after it had sent the request."""
    think_s: float | None = None
    """From the end of the session's previous answer to this turn."""
    timeout_s: float | None = None
    """The client waited this long at most, counted from when it had sent the request; None: the run's limit."""


class Trace:
    """A trace file. Iterate it as often as needed; each time the file is read anew.

    After an iteration (also one ended early) the counters tell about the rows it looked at, and
    ``rows_read == rows_kept + sum(rows_dropped.values())``. Blank lines and headers are not rows, nor are the lines of
    a log that are about something else.
    """

    def __init__(
        self,
        source: Source,
        format_: str,
        *,
        skip_bad: bool = False,
        sort: bool = False,
        part: int | None = None,
        lengths: Callable[[], Draw] | None = None,
        arrivals_only: bool = False,
    ) -> None:
        self.source = source
        self.path = Path(source.name)
        self.format = format_
        self.sha256 = source.sha256
        """Of the file as it lies on disk (compressed, if it is)."""
        self.skip_bad = skip_bad
        self.sorted = sort or not FORMATS[format_].in_order
        self.part = part
        self.rows_read = 0
        self.rows_kept = 0
        self.rows_dropped: dict[str, int] = {}
        self.rows_failed = 0
        """Of the rows dropped: failed calls of the source system."""
        self.notes: list[str] = []
        self.clock: str | None = None
        """What its times are and what shows it; None when it has none."""
        self.blocks: str | None = None
        """Size of its prefix blocks and what shows it; None when it has none."""
        self.grid_s: float | None = None
        """Step of the coarse clock the source rounded to, seconds; None when there is none to be seen."""
        self._lengths = lengths
        self._arrivals_only = arrivals_only

    def __iter__(self) -> Generator[TraceRecord, None, None]:
        """Records in order of arrival.

        Raises `TraceError` at the first bad row (with ``skip_bad``: counts it and goes on), at a damaged file, at a row
        without lengths when none are given, and at the end of a file that had no usable row.
        """
        reader = FORMATS[self.format]()
        books = _Books()
        order = _Order(self.part)
        done = False
        try:
            rows = self._rows(reader, books)
            for number, row in _sorted(rows) if self.sorted else rows:
                try:
                    arrival_s = order.arrival_s(row)
                except RowError as e:
                    self._refuse(books, number, e)
                    continue
                except LeftOutError as e:
                    books.drop(e.reason)
                    continue
                books.kept += 1
                yield TraceRecord(number, arrival_s, *row[1:])
            done = True
        finally:
            if self.sorted and not done:
                books.read = books.kept + books.dropped.total()  # rows that were sorted, but not looked at
            self.rows_read, self.rows_kept, self.rows_dropped = books.read, books.kept, dict(books.dropped)
            self.rows_failed = books.failed
            self.grid_s = order.grid_s(books.kept)
            self.clock, self.blocks = reader.clock if order.instants else None, reader.blocks()
            self.notes = self._notes(reader, order, books)
        if not books.kept:
            raise TraceError(self.source.name, None, f"no usable row: {books}")

    def _rows(self, reader: Reader, books: _Books) -> Iterator[tuple[int, Row]]:
        """Good rows in file order; the others are counted or raised."""
        draw = self._lengths() if self._lengths else None
        header = reader.has_header
        number = 0
        try:
            reader.beside(self.source.path)
        except RowError as e:
            raise TraceError(self.source.name, None, str(e)) from None
        for number, record in reader.records(self.source):
            if header:
                self._read_header(reader, number, record)
                header = False
                continue
            for item in _parse(reader, record):
                yield from self._judge(books, number, item, draw)
        for item in reader.end():
            yield from self._judge(books, number, item, draw)

    def _judge(
        self, books: _Books, number: int, item: Row | RowError | LeftOutError, draw: Draw | None
    ) -> Iterator[tuple[int, Row]]:
        books.read += 1
        if isinstance(item, LeftOutError):
            books.drop(item.reason)
            books.failed += isinstance(item, FailedCallError)
        elif isinstance(item, RowError):
            self._refuse(books, number, item)
        elif item.input_tokens is not None or item.text is not None or item.messages is not None:
            yield number, item
        elif draw is not None:
            input_tokens, output_tokens = draw()
            books.drawn += 1
            yield number, item._replace(input_tokens=input_tokens, output_tokens=item.output_tokens or output_tokens)
        elif self._arrivals_only:
            yield number, item
        else:
            raise TraceError(
                self.source.name,
                number,
                f"this {self.format} file says when requests arrived, not how long they were. State the lengths: "
                "--input-tokens lognormal:mean=800,cv=1 --output-tokens ... (or write them into a trace of their own: "
                "'harness trace convert FILE --input-tokens ... --output-tokens ... -o OUT')",
            )

    def _refuse(self, books: _Books, number: int, error: RowError) -> None:
        if not self.skip_bad:
            raise TraceError(self.source.name, number, f"{error} (--skip-bad drops and counts such rows)") from None
        books.drop(error.reason)

    def _read_header(self, reader: Reader, number: int, line: bytes) -> None:
        try:
            reader.header(line)
        except RowError as e:
            raise TraceError(self.source.name, number, f"{e}; this is not a {self.format} trace") from None

    def _notes(self, reader: Reader, order: _Order, books: _Books) -> list[str]:
        notes = [f"{count} of {books.read} rows not replayed: {why}" for why, count in sorted(books.dropped.items())]
        if self.sorted and order.instants:
            notes.append(
                "rows sorted by arrival: " + ("as asked" if reader.in_order else "the source writes them later")
            )
        if books.drawn:
            notes.append(f"token lengths of {books.drawn} rows are drawn from the stated distributions, not measured")
        if self.grid_s is not None:
            notes.append(
                f"arrivals lie on a grid of {self.grid_s:g} s: {books.kept} rows on {order.instants} instants. The "
                "source rounded its clock; replayed as recorded they come in bursts that production may not have seen"
            )
        span_s = order.span_s
        if span_s and books.kept > _FAST_ROWS and books.kept > _FAST * span_s:
            notes.append(
                f"{books.kept} rows arrive within {span_s:.3g} s, {books.kept / span_s:.4g} requests/s: is the clock "
                f"what it was read as ({reader.clock})? --speed plays it slower"
            )
        return notes + reader.notes()


def open_trace(
    path: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    skip_bad: bool = False,
    sort: bool = False,
    part: int | None = None,
    lengths: Callable[[], Draw] | None = None,
    arrivals_only: bool = False,
) -> Trace:
    """A `Trace` over ``path``, its format found from its first record unless ``format`` names it.

    ``path`` may also be ``-`` (standard input) or ``s3://bucket/key``. ``skip_bad``: bad rows are dropped and counted
    by reason instead of ending the iteration. ``sort``: rows are put in order of arrival. ``part``: of a file that
    holds several recordings one after the other, each beginning where time goes back, this one (from 1). Rows that say
    neither length nor text (access logs) get the lengths that ``lengths`` draws (a fresh drawer for each iteration),
    or are given as they are with ``arrivals_only``; else they are refused.

    Raises `TraceError` when the file cannot be opened or its format is not recognised, `UsageError` for an unknown
    format or for ``sort`` with ``part``.
    """
    if format is not None and format not in FORMATS:
        raise unknown_name("trace format", format, FORMATS)
    if sort and part is not None:
        raise UsageError("--sort and --part exclude each other: parts begin where time goes back")
    if part is not None and part < 1:
        raise UsageError(f"part is {part}, must be at least 1")
    source = open_source(path)
    return Trace(
        source,
        format or detect(source),
        skip_bad=skip_bad, sort=sort, part=part, lengths=lengths, arrivals_only=arrivals_only,
    )  # fmt: skip


def _parse(reader: Reader, record: object) -> Iterable[Row | RowError | LeftOutError]:
    """What one record holds, its errors as values."""
    try:
        if isinstance(record, Cut):
            raise RowError("line too long", f"longer than {(len(record) - 1) // 2**20} MiB: not a trace line")
        row = reader.parse(record)
    except (RowError, LeftOutError) as e:
        return (e,)
    return (row,) if isinstance(row, Row) else row


class _Books:
    """Every row is read, and then kept or dropped for a reason."""

    def __init__(self) -> None:
        self.read = self.kept = self.drawn = self.failed = 0
        self.dropped: Counter[str] = Counter()

    def drop(self, reason: str) -> None:
        """Count a row under ``reason``; a file can name reasons (an API, a status), so their number is bounded."""
        self.dropped[reason if reason in self.dropped or len(self.dropped) < _MAX_REASONS else "other reasons"] += 1

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.read} rows read" + (f", dropped: {reasons}" if reasons else "")


Numbered = tuple[int, Row]


def _when(numbered: Numbered) -> int:
    arrival_ns = numbered[1].arrival_ns
    return -1 if arrival_ns is None else arrival_ns


def _sorted(rows: Iterator[Numbered]) -> Iterator[Numbered]:
    """Rows by arrival, equal ones in file order. More than `_SORT_ROWS` are sorted in temporary files and merged."""
    with ExitStack() as files:
        runs: list[Iterator[Numbered]] = []
        chunk: list[Numbered] = []
        for row in rows:
            chunk.append(row)
            if len(chunk) == _SORT_ROWS:
                chunk.sort(key=_when)
                runs.append(_stored(chunk, files.enter_context(tempfile.TemporaryFile())))
                chunk = []
        chunk.sort(key=_when)
        yield from heapq.merge(*runs, chunk, key=_when) if runs else chunk


def _stored(chunk: list[Numbered], file: IO[bytes]) -> Iterator[Numbered]:
    for at in range(0, len(chunk), 1000):
        pickle.dump(chunk[at : at + 1000], file, pickle.HIGHEST_PROTOCOL)
    end = file.tell()
    file.seek(0)

    def load() -> Iterator[Numbered]:
        while file.tell() < end:
            yield from pickle.load(file)  # noqa: S301  # our own temporary file, without a name

    return load()


class _Order:
    """Shifts arrivals to zero, refuses those that go back, and watches for a coarse clock."""

    def __init__(self, part: int | None = None) -> None:
        self._part = part
        self._current = 1
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._before_ns: int | None = None
        self._timed: bool | None = None
        self._steps: Counter[int] = Counter()
        self.instants = 0

    @property
    def span_s(self) -> float | None:
        """From the first row to the last; None without times."""
        return None if self._first_ns is None or self._last_ns is None else (self._last_ns - self._first_ns) / 1e9

    def arrival_s(self, row: Row) -> float | None:
        """Seconds after the first row; None when the trace has no times. Raises `RowError` and `LeftOutError`."""
        now_ns = row.arrival_ns
        if self._timed is None:
            self._timed = now_ns is not None
        if self._timed != (now_ns is not None):
            has = "no arrival_s, but rows before have" if self._timed else "arrival_s, but rows before have none"
            raise RowError("arrival_s on some rows only", f"{has}: all rows or none")
        if now_ns is None:
            return None
        if self._part is not None and not self._in_part(now_ns, self._part):
            raise LeftOutError("in another part of the file")
        if self._first_ns is None or self._last_ns is None:
            self._first_ns = self._last_ns = now_ns
            self.instants = 1
        if now_ns - self._first_ns > MAX_ARRIVAL_S * 1_000_000_000:
            years = (now_ns - self._first_ns) / 3.156e16
            raise RowError(
                "arrival centuries late", f"arrives {years:.0f} years after the first row: no time of one trace"
            )
        step_ns = now_ns - self._last_ns
        if step_ns:
            if step_ns < 0:
                raise RowError(
                    "arrival before the row above",
                    f"arrives {-step_ns / 1e9:.9g} s before the row above: a trace goes forward in time. Does the file "
                    "hold several recordings? 'harness trace convert --part N' cuts out one; --sort puts rows in order",
                )
            # Whole milliseconds, as coarse clocks have a jitter of one; bounded, as fine clocks need no counting.
            if len(self._steps) < 10_000:
                self._steps[(step_ns + 500_000) // 1_000_000] += 1
            self._last_ns = now_ns
            self.instants += 1
        return (now_ns - self._first_ns) / 1e9

    def _in_part(self, now_ns: int, part: int) -> bool:
        """Whether the row is in the wanted part; each part begins where time goes back."""
        if self._before_ns is not None and now_ns < self._before_ns:
            self._current += 1
        self._before_ns = now_ns
        return self._current == part

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
