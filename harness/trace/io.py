"""Production traces: what arrived, when, and how long it was, exactly as the file says.

`open_trace` finds the format (`harness.trace.formats`), and iterating the `Trace` streams `TraceRecord` in order of
arrival in bounded memory. Nothing is guessed or dropped in silence: rows_read == rows_kept + what was dropped, by
reason. Rows are sorted only when the format is written out of order (or when asked to), and then a note says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from harness.errors import TraceError, UsageError, unknown_name
from harness.trace.formats.detect import FORMATS, detect_all
from harness.trace.formats.record import (
    FAILED_CALL,
    FailedCallError,
    Item,
    LeftOutError,
    Place,
    Reader,
    RowError,
    TableOptions,
    TraceRecord,
    is_whole_prompt,
    memory_bytes,
)
from harness.trace.selection import ArrivalOrder, Where, unmatched
from harness.trace.source import TraceFile
from harness.trace.sources import Sources, open_sources
from harness.trace.spool import Sorter

__all__ = ["FAILED_CALL", "Draw", "Reading", "Trace", "TraceRecord", "open_trace"]

Draw = Callable[[], tuple[int, int]]
"""Gives the next (input, output) tokens for rows of a log that has arrivals only."""

_MAX_REASONS = 30
_FAST, _FAST_ROWS = 1000, 100
"""Requests/s that no single trace is likely to hold over so many rows: the clock may be in another unit."""


class Trace:
    """A trace: a file, or several. Iterate it as often as needed; each time the files are read anew.

    After an iteration (also one ended early) the counters tell about the rows it looked at, and
    ``rows_read == rows_kept + sum(rows_dropped.values())``. Blank lines and headers are not rows, nor are the lines of
    a log that are about something else.
    """

    def __init__(self, sources: Sources, format_: str, asked: Reading, left_out: Sequence[str] = ()) -> None:
        """``left_out``: what is to be said of files that are not read."""
        self.sources = sources
        self.path = Path(sources.name)
        self.format = format_
        self.sha256 = sources.sha256
        """Of the file as it lies on disk (compressed, if it is); see `harness.trace.sources.Sources`."""
        self.asked = asked
        self.rows_read = 0
        self.rows_kept = 0
        self.rows_dropped: dict[str, int] = {}
        self.rows_failed = 0
        """Of the rows dropped: failed calls of the source system."""
        self.examples: dict[str, str] = {}
        """Why rows could not be read -> the first of them, and where it is."""
        self.notes: list[str] = []
        self.clock: str | None = None
        """What its times are and what shows it; None when it has none."""
        self.blocks: str | None = None
        """Size of its prefix blocks and what shows it; None when it has none."""
        self.grid_s: float | None = None
        """Step of the coarse clock the source rounded to, seconds; None when there is none to be seen."""
        self._left_out = left_out
        self._reader()

    @property
    def source(self) -> TraceFile:
        """The file, or the first of several."""
        return self.sources.files[0]

    def __iter__(self) -> Generator[TraceRecord, None, None]:
        """Records in order of arrival.

        Raises `TraceError` at the first bad row (with ``skip_bad``: counts it and goes on), at a damaged file, at a row
        without lengths when none are given, at times whose unit nothing shows, and at the end of a trace that had no
        usable row.
        """
        reader = self._reader()
        books = _Books()
        order = ArrivalOrder(self.asked.part)
        done = False
        try:
            rows = self._rows(reader, books)
            for place, row in self._in_order(rows, reader, books):
                try:
                    arrival_ns = order.arrival_ns(row)
                except RowError as e:
                    self._refuse(books, place, e)
                    continue
                except LeftOutError as e:
                    books.drop(e.reason)
                    continue
                books.kept += 1
                yield row._replace(arrival_ns=arrival_ns, line=place.line)
            done = True
        finally:
            if not done and books.sorted:
                books.read = books.kept + books.dropped.total()  # rows that were sorted, but not looked at
            self.rows_read, self.rows_kept, self.rows_dropped = books.read, books.kept, dict(books.dropped)
            self.rows_failed, self.examples = books.failed, books.examples
            self.grid_s = order.grid_s(books.kept)
            timed = order.instants or reader.unclear()
            self.clock, self.blocks = reader.clock if timed else None, reader.blocks()
            self.notes = self._notes(reader, order, books)
        if not books.kept:
            first = f"; the first: {next(iter(books.examples.values()))}" if books.examples else ""
            raise TraceError(self.sources.name, None, f"no usable row: {books}{first}")

    def _reader(self) -> Reader:
        reader = FORMATS[self.format]()
        reader.ask(self.asked.table)
        return reader

    def _in_order(
        self, rows: Iterator[tuple[Place, TraceRecord]], reader: Reader, books: _Books
    ) -> Iterator[tuple[Place, TraceRecord]]:
        """Rows by arrival, equal ones in file order, where that has to be made."""
        first = next(rows, None)  # what the times are shows when the first row is there
        if first is None:
            return
        if not self.asked.sort and reader.in_order and len(self.sources.files) == 1:
            yield first
            yield from rows
            return
        books.sorted = True
        by_arrival: Sorter[tuple[Place, TraceRecord]] = Sorter(_when, lambda placed: memory_bytes(placed[1]))
        for placed in chain((first,), rows):
            books.moved = books.moved or _when(placed) < books.latest
            books.latest = max(books.latest, _when(placed))
            by_arrival.add(placed)
        yield from by_arrival

    def _rows(self, reader: Reader, books: _Books) -> Iterator[tuple[Place, TraceRecord]]:
        """Good rows in file order; the others are counted or raised."""
        draw = self.asked.lengths() if self.asked.lengths else None
        last = Place(0, 1)

        def placed(at: int, source: TraceFile) -> Iterator[tuple[Place, object]]:
            nonlocal last
            for line, record in reader.records(source):
                last = Place(at, line)
                yield last, record

        for at, source in enumerate(self.sources.files):
            try:
                reader.beside(source.path)
            except RowError as e:
                raise TraceError(source.name, None, str(e)) from None
            for place, item in reader.rows(placed(at, source)):
                yield from self._judge(reader, books, place, item, draw)
        for end, item in reader.end():
            yield from self._judge(reader, books, end or last, item, draw)

    def _judge(
        self, reader: Reader, books: _Books, place: Place, item: Item, draw: Draw | None
    ) -> Iterator[tuple[Place, TraceRecord]]:
        books.read += 1
        if isinstance(item, LeftOutError):
            books.drop(item.reason)
            books.failed += isinstance(item, FailedCallError)
            return
        if isinstance(item, RowError):
            self._refuse(books, place, item)
            return
        if not self.asked.survey and (problem := reader.unclear()):
            raise TraceError(self._name(place), None, problem)
        if self.asked.where and (why := unmatched(item, self.asked.where)):
            books.drop(why)
            return
        if item.input_tokens is not None or item.text is not None or item.messages is not None:
            if not reader.sends_text and not is_whole_prompt(item):
                books.partial += 1
                item = item._replace(text=None, messages=None)
            yield place, item
        elif draw is not None:
            input_tokens, output_tokens = draw()
            books.drawn += 1
            yield place, item._replace(input_tokens=input_tokens, output_tokens=item.output_tokens or output_tokens)
        elif self.asked.arrivals_only or self.asked.survey:
            yield place, item
        else:
            raise TraceError(
                self._name(place),
                place.line,
                f"this {self.format} file says when requests arrived, not how long they were. State the lengths: "
                "--input-tokens lognormal:mean=800,cv=1 --output-tokens ... (or write them into a trace of their own: "
                "'harness trace convert FILE --input-tokens ... --output-tokens ... -o OUT')",
            )

    def _refuse(self, books: _Books, place: Place, error: RowError) -> None:
        if not (self.asked.skip_bad or self.asked.survey):
            raise TraceError(
                self._name(place), place.line, f"{error} (--skip-bad drops and counts such rows)"
            ) from None
        books.drop(error.reason, f"{self._name(place)}:{place.line}: {error}")

    def _name(self, place: Place) -> str:
        return self.sources.files[place.file].name

    def _notes(self, reader: Reader, order: ArrivalOrder, books: _Books) -> list[str]:
        notes = [f"{count} of {books.read} rows not replayed: {why}" for why, count in sorted(books.dropped.items())]
        files = len(self.sources.files)
        if files > 1:
            notes.append(f"{files} files, their rows merged by arrival")
            if order.instants and reader.in_order:
                notes.append("their clocks begin at no date: they are laid over each other as if all began together")
        if books.moved:
            why = "the source writes them later, or files were put together in another order"
            notes.append("rows sorted by arrival: " + ("as asked" if self.asked.sort else why))
        if books.drawn:
            notes.append(f"token lengths of {books.drawn} rows are drawn from the stated distributions, not measured")
        if books.partial:
            notes.append(
                f"{books.partial} rows have a text that cannot be the whole prompt, by the input tokens counted beside "
                "it: replayed by their lengths"
            )
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
        return [*self._left_out, *notes, *reader.notes()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a trace is to be read."""

    skip_bad: bool = False
    """Bad rows are dropped and counted by reason instead of ending the iteration."""
    sort: bool = False
    """Rows are put in order of arrival."""
    part: int | None = None
    """Of a file that holds several recordings one after the other, each beginning where time goes back, this one (from
    1)."""
    lengths: Callable[[], Draw] | None = None
    """Draws the lengths of rows that say neither length nor text (access logs), a fresh drawer for each iteration."""
    arrivals_only: bool = False
    """Such rows are given as they are where there are no lengths to draw."""
    survey: bool = False
    """Only to be described: as ``arrivals_only`` and ``skip_bad``, and times of an unknown unit are left out."""
    table: TableOptions = field(default_factory=TableOptions)
    """Columns and unit, as the user names them."""
    where: tuple[Where, ...] = ()
    """Rows that are wanted; empty: all."""


def open_trace(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,  # noqa: A002
    skip_bad: bool = False,
    sort: bool = False,
    part: int | None = None,
    lengths: Callable[[], Draw] | None = None,
    arrivals_only: bool = False,
    survey: bool = False,
    table: TableOptions | None = None,
    where: Sequence[Where] = (),
) -> Trace:
    """A `Trace` over ``path``, its format found from its first record unless ``format`` names it.

    ``path`` stands for one file or several (`harness.trace.sources.open_sources`), ``-`` for standard input. The
    others are the fields of `Reading`.

    Raises `TraceError` when a file cannot be opened or its format is not recognised, `UsageError` for an unknown format
    and for options that exclude each other.
    """
    if format is not None and format not in FORMATS:
        raise unknown_name("trace format", format, FORMATS)
    if sort and part is not None:
        raise UsageError("--sort and --part exclude each other: parts begin where time goes back")
    if part is not None and part < 1:
        raise UsageError(f"part is {part}, must be at least 1")
    sources = open_sources([path] if isinstance(path, str | Path) else path)
    if part is not None and len(sources.files) > 1:
        raise UsageError("--part is of one file: rows of several are merged by arrival")
    asked = Reading(
        skip_bad=skip_bad, sort=sort, part=part, lengths=lengths, arrivals_only=arrivals_only, survey=survey,
        table=table or TableOptions(), where=tuple(where),
    )  # fmt: skip
    if format is None and asked.table.columns:
        format = "table"  # noqa: A001
    if format is not None:
        return Trace(sources, format, asked)
    sources, name, left_out = detect_all(sources)
    return Trace(sources, name, asked, left_out)


class _Books:
    """Every row is read, and then kept or dropped for a reason."""

    def __init__(self) -> None:
        self.read = self.kept = self.drawn = self.failed = self.partial = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.sorted = self.moved = False
        """Whether rows are put in order, and whether one was not."""
        self.latest = -1
        """Arrival of the rows so far, ns."""

    def drop(self, reason: str, example: str | None = None) -> None:
        """Count a row under ``reason``; a file can name reasons (an API, a status), so their number is bounded."""
        known = reason if reason in self.dropped or len(self.dropped) < _MAX_REASONS else "other reasons"
        self.dropped[known] += 1
        if example is not None:
            self.examples.setdefault(known, example)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.read} rows read" + (f", dropped: {reasons}" if reasons else "")


def _when(placed: tuple[Place, TraceRecord]) -> int:
    arrival_ns = placed[1].arrival_ns
    return -1 if arrival_ns is None else arrival_ns
