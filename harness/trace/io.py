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
from typing import Any

from harness.errors import TraceError, UsageError, unknown_name
from harness.options import ReadOptions
from harness.plan.spec import load_seed
from harness.trace.formats.detect import FORMATS, detect_all
from harness.trace.formats.record import (
    FAILED_CALL,
    MAX_ARRIVAL_S,
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
from harness.trace.source import Cut, TraceFile
from harness.trace.sources import Sources, Where, open_sources, parse_where
from harness.trace.spool import Sorter

__all__ = ["FAILED_CALL", "Draw", "Files", "Reading", "Trace", "TraceRecord", "open_asked", "open_trace"]

Files = Path | Sequence[Path]
"""What the command line calls a trace: a file, or several."""
Draw = Callable[[], tuple[int, int]]
"""Gives the next (input, output) tokens for rows of a log that has arrivals only."""

_MAX_REASONS = 30
_FAST, _FAST_ROWS = 1000, 100
"""Requests/s that no single trace is likely to hold over so many rows: the clock may be in another unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a trace is to be read."""

    skip_bad: bool = False
    """Bad rows are dropped and counted by reason instead of ending the iteration."""
    sort: bool = False
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
    where: Sequence[Where] = ()
    """Rows that are wanted; empty: all."""


def open_asked(trace: Files, asked: ReadOptions, *, arrivals_only: bool = False, survey: bool = False) -> Trace:
    """The trace, read as the command line says; for the two flags see `Reading`.

    Raises what `open_trace` does, and `UsageError` for one of the two distributions of lengths without the other.
    """
    lengths = None
    if asked.input_tokens or asked.output_tokens:
        from harness.trace.synth import draw_lengths, parse_lengths

        if not (asked.input_tokens and asked.output_tokens):
            raise UsageError("--input-tokens and --output-tokens go together")
        seed = load_seed(asked.seed or 0)
        lengths = draw_lengths(parse_lengths(asked.input_tokens), parse_lengths(asked.output_tokens), seed)
    return open_trace(
        trace, format=asked.trace_format, skip_bad=asked.skip_bad, sort=asked.sort, part=asked.part, lengths=lengths,
        arrivals_only=arrivals_only, survey=survey, table=TableOptions(asked.columns or {}, asked.time_unit),
        where=parse_where(asked.where),
    )  # fmt: skip


def open_trace(path: str | Path | Sequence[str | Path], *, format: str | None = None, **how: Any) -> Trace:  # noqa: A002
    """A `Trace` over ``path``: one file or several (`harness.trace.sources.open_sources`), ``-`` for standard input.

    Without ``format`` the first record shows it; ``how``: fields of `Reading`. Raises `TraceError` when a file cannot
    be opened or its format is not recognised, `UsageError` for an unknown one and options that exclude each other.
    """
    asked = Reading(**how)
    if format is not None and format not in FORMATS:
        raise unknown_name("trace format", format, FORMATS)
    if asked.part is not None and (asked.sort or asked.part < 1):
        why = "--sort and --part exclude each other: parts begin where time goes back"
        raise UsageError(why if asked.sort else f"part is {asked.part}, must be at least 1")
    sources = open_sources([path] if isinstance(path, str | Path) else path)
    if asked.part is not None and len(sources.files) > 1:
        raise UsageError("--part is of one file: rows of several are merged by arrival")
    if (name := format or ("table" if asked.table.columns else None)) is not None:
        return Trace(sources, name, asked)
    sources, name, left_out = detect_all(sources)
    return Trace(sources, name, asked, left_out)


class Trace:
    """A trace: a file, or several. Iterate it as often as needed; each time the files are read anew.

    After an iteration (also one ended early) the counters tell about the rows it looked at, and
    ``rows_read == rows_kept + sum(rows_dropped.values())``. Blank lines and headers are not rows, nor are the lines of
    a log that are about something else.
    """

    rows_read = rows_kept = rows_failed = 0
    """``rows_failed``: of the rows dropped, failed calls of the source system."""
    clock: str | None = None
    """What its times are and what shows it; None when it has none."""
    blocks: str | None = None
    """Size of its prefix blocks and what shows it; None when it has none."""
    grid_s: float | None = None
    """Step of the coarse clock the source rounded to, seconds; None when there is none to be seen."""

    def __init__(self, sources: Sources, format_: str, asked: Reading, left_out: Sequence[str] = ()) -> None:
        self.sources, self.path, self.source = sources, Path(sources.name), sources.files[0]
        self.format, self.asked = format_, asked
        self.sha256 = sources.sha256
        self.rows_dropped: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        """Why rows could not be read -> the first of them, and where it is."""
        self.notes: list[str] = []
        self._left_out = left_out
        _Pass(self)  # refuses what the format cannot be asked

    def __iter__(self) -> Generator[TraceRecord, None, None]:
        """Records in order of arrival. Raises `TraceError` at a damaged file, the first bad row (unless bad ones are
        skipped), and at the end of a trace that had no usable row.
        """
        one, done = _Pass(self), False
        try:
            for place, row in one.in_order():
                try:
                    arrival_ns = one.order.arrival_ns(row)
                except (RowError, LeftOutError) as e:
                    one.drop(place, e)
                    continue
                one.kept += 1
                yield TraceRecord._make((arrival_ns, *row[1:-1], place.line))  # its first field and its last
            done = True
        finally:
            if not done and one.sorted:
                one.read = one.kept + one.dropped.total()  # rows that were sorted, but not looked at
            self.rows_read, self.rows_kept, self.rows_dropped = one.read, one.kept, dict(one.dropped)
            self.rows_failed, self.examples = one.failed, one.examples
            self.grid_s = one.order.grid_s(one.kept)
            timed = one.order.instants or one.reader.unclear()
            self.clock, self.blocks = one.reader.clock if timed else None, one.reader.blocks()
            self.notes = [*self._left_out, *one.notes(), *one.reader.notes()]
        if not one.kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
            dropped = f", dropped: {reasons}" if reasons else ""
            first = f"; the first: {next(iter(one.examples.values()))}" if one.examples else ""
            raise TraceError(self.sources.name, None, f"no usable row: {one.read} rows read{dropped}{first}")


class _Pass:
    """One reading of a trace. Every row is read, and then kept or dropped for a reason."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._asked, self._files = trace, trace.asked, trace.sources.files
        self.reader: Reader = FORMATS[trace.format]()
        self.reader.ask(self._asked.table)
        self.order = _ArrivalOrder(self._asked.part)
        self._draw = self._asked.lengths() if self._asked.lengths else None
        self.read = self.kept = self.failed = self._drawn = self._partial = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.sorted = self._moved = False

    def drop(self, place: Place, why: RowError | LeftOutError) -> None:
        """Count a row by its reason; a file can name reasons (an API, a status), so their number is bounded.

        Raises `TraceError` for one that cannot be read, unless those are to be skipped.
        """
        known = why.reason if why.reason in self.dropped or len(self.dropped) < _MAX_REASONS else "other reasons"
        if isinstance(why, RowError):
            name = self._files[place.file].name
            if not (self._asked.skip_bad or self._asked.survey):
                raise TraceError(name, place.line, f"{why} (--skip-bad drops and counts such rows)") from None
            self.examples.setdefault(known, f"{name}:{place.line}: {why}")
        self.dropped[known] += 1
        self.failed += isinstance(why, FailedCallError)

    def in_order(self) -> Iterator[tuple[Place, TraceRecord]]:
        """Rows by arrival, equal ones in file order, where that has to be made."""
        rows = self._rows()
        first = next(rows, None)  # what the times are shows when the first row is there
        if first is None:
            return
        if not self._asked.sort and self.reader.in_order and len(self._files) == 1:
            yield first
            yield from rows
            return
        self.sorted, latest = True, -1
        by_arrival: Sorter[tuple[Place, TraceRecord]] = Sorter(_when, lambda placed: memory_bytes(placed[1]))
        for placed in chain((first,), rows):
            self._moved |= _when(placed) < latest
            latest = max(latest, _when(placed))
            by_arrival.add(placed)
        yield from by_arrival

    def _rows(self) -> Iterator[tuple[Place, TraceRecord]]:
        last = Place(0, 1)

        def placed(at: int, source: TraceFile) -> Iterator[tuple[Place, object]]:
            nonlocal last
            for line, record in self.reader.records(source):
                last = Place(at, line)
                if isinstance(record, Cut):
                    record = RowError("line too long", f"longer than {len(record) // 2**20} MiB: not a trace line")
                if isinstance(record, RowError):
                    self._judged(last, record)
                else:
                    yield last, record

        def items() -> Iterator[tuple[Place | None, Item]]:
            for at, source in enumerate(self._files):
                yield from self.reader.rows(placed(at, source))
            yield from self.reader.end()

        for place, item in items():
            if row := self._judged(place or last, item):
                yield place or last, row

    def _judged(self, place: Place, item: Item) -> TraceRecord | None:
        """The row, as it is to be replayed; None for one that is not."""
        self.read += 1
        if isinstance(item, TraceRecord) and (item.input_tokens == 0 or item.output_tokens == 0):
            item = FailedCallError()
        if not isinstance(item, TraceRecord):
            self.drop(place, item)
            return None
        if not self._asked.survey and (problem := self.reader.unclear()):
            raise TraceError(self._files[place.file].name, None, problem)
        for where in self._asked.where:
            if why := where.unmatched(item):
                self.drop(place, LeftOutError(why))
                return None
        if item.input_tokens is not None or item.text is not None or item.messages is not None:
            if not self.reader.sends_text and not is_whole_prompt(item):
                self._partial += 1
                return item._replace(text=None, messages=None)
        elif self._draw is not None:
            input_tokens, output_tokens = self._draw()
            self._drawn += 1
            return item._replace(input_tokens=input_tokens, output_tokens=item.output_tokens or output_tokens)
        elif not (self._asked.arrivals_only or self._asked.survey):
            what = f"this {self._trace.format} file says when requests arrived, not how long they were"
            how = "--input-tokens lognormal:mean=800,cv=1 --output-tokens ..."
            into = "(harness trace convert writes them into a trace of their own)"
            problem = f"{what}. State the lengths: {how} {into}"
            raise TraceError(self._files[place.file].name, place.line, problem)
        return item

    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        notes = [f"{count} of {self.read} rows not replayed: {why}" for why, count in sorted(self.dropped.items())]
        files = len(self._files)
        if files > 1:
            notes.append(f"{files} files, their rows merged by arrival")
            if self.order.instants and self.reader.in_order:
                notes.append("their clocks begin at no date: they are laid over each other as if all began together")
        if self._moved:
            why = "the source writes them later, or files were put together in another order"
            notes.append("rows sorted by arrival: " + ("as asked" if self._asked.sort else why))
        if self._drawn:
            notes.append(f"token lengths of {self._drawn} rows are drawn from the stated distributions, not measured")
        if self._partial:
            notes.append(
                f"{self._partial} rows have a text that cannot be the whole prompt, by the input tokens counted beside "
                "it: replayed by their lengths"
            )
        if (grid_s := self.order.grid_s(self.kept)) is not None:
            notes.append(
                f"arrivals lie on a grid of {grid_s:g} s: {self.kept} rows on {self.order.instants} instants. The "
                "source rounded its clock; replayed as recorded they come in bursts that production may not have seen"
            )
        span_s = self.order.span_s
        if span_s and self.kept > _FAST_ROWS and self.kept > _FAST * span_s:
            notes.append(
                f"{self.kept} rows arrive within {span_s:.3g} s, {self.kept / span_s:.4g} requests/s: is the clock "
                f"what it was read as ({self.reader.clock})? --speed plays it slower"
            )
        return notes


def _when(placed: tuple[Place, TraceRecord]) -> int:
    arrival_ns = placed[1].arrival_ns
    return -1 if arrival_ns is None else arrival_ns


class _ArrivalOrder:
    """Shifts arrivals to zero, refuses those that go back, and watches for a coarse clock."""

    def __init__(self, part: int | None) -> None:
        self._part, self._current = part, 1
        self._first_ns = self._last_ns = self._before_ns = 0
        self._timed: bool | None = None
        self._steps: Counter[int] = Counter()
        self.instants = 0

    @property
    def span_s(self) -> float:
        """From the first row to the last; 0 without times."""
        return (self._last_ns - self._first_ns) / 1e9

    def arrival_ns(self, row: TraceRecord) -> int | None:
        """Nanoseconds after the first row; None when the trace has no times. Raises `RowError` and `LeftOutError`."""
        now_ns = row.arrival_ns
        if self._timed is None:
            self._timed = now_ns is not None
            self._before_ns = now_ns or 0
        if self._timed != (now_ns is not None):
            has = "no arrival_s, but rows before have" if self._timed else "arrival_s, but rows before have none"
            raise RowError("arrival_s on some rows only", f"{has}: all rows or none")
        if now_ns is None:
            return None
        self._current += now_ns < self._before_ns  # each part begins where time goes back
        self._before_ns = now_ns
        if self._part is not None and self._current != self._part:
            raise LeftOutError("in another part of the file")
        if not self.instants:
            self._first_ns = self._last_ns = now_ns
            self.instants = 1
        if now_ns - self._first_ns > MAX_ARRIVAL_S * 1_000_000_000:
            years = (now_ns - self._first_ns) / 3.156e16
            raise RowError(
                "arrival centuries late", f"arrives {years:.0f} years after the first row: no time of one trace"
            )
        step_ns = now_ns - self._last_ns
        if step_ns < 0:
            raise RowError(
                "arrival before the row above",
                f"arrives {-step_ns / 1e9:.9g} s before the row above: a trace goes forward in time. Does the file "
                "hold several recordings? 'harness trace convert --part N' cuts out one; --sort puts rows in order",
            )
        if step_ns:
            # Whole milliseconds, as coarse clocks have a jitter of one; bounded, as fine clocks need no counting.
            if len(self._steps) < 10_000:
                self._steps[(step_ns + 500_000) // 1_000_000] += 1
            self._last_ns = now_ns
            self.instants += 1
        return now_ns - self._first_ns

    def grid_s(self, rows: int) -> float | None:
        """Step of the clock the source rounded to, seconds; None when the arrivals show no coarse one.

        There is one when 95 % of at least 10 steps between different arrivals are whole multiples (to 2 ms) of the most
        frequent one, that is at least 0.1 s, and ``rows`` clearly outnumber the instants.
        """
        total = self._steps.total()
        if total < 10 or rows < 1.05 * self.instants:
            return None
        grid_ms = self._steps.most_common(1)[0][0]
        if grid_ms < 100:
            return None
        on_grid = sum(n for ms, n in self._steps.items() if min(ms % grid_ms, -ms % grid_ms) <= 2 and ms > 2)
        return grid_ms / 1000 if on_grid >= 0.95 * total else None
