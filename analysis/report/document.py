"""What every report is made of: sections of sentences, tables, facts, pictures and notes.

A report is built once, as sections, and rendered here as text and Markdown and by `analysis.report.page` as a page.
Whatever a trace, a server or a price map wrote stays plain characters in all three.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from harness.analysis.labels import FORMULA, clean
from harness.console import text_tables

MOST_ITEMS = 200
"""Entries of one list that a server or a trace could make endless (arguments, facts, errors)."""
Facts = Sequence[tuple[str, object]]


@dataclass(frozen=True, slots=True)
class Cell:
    """What a table cell says, the small print under it, the number it sorts by, and its colour."""

    text: object
    note: str | None = None
    sort: float | None = None
    mark: Literal["good", "warn", "bad", "quiet"] | str | None = None
    """``run-0`` and so on are the colours of runs in pictures."""


Row = Sequence[Cell | str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table. Columns ``right`` hold numbers and are set right: all but the first unless stated."""

    heads: Sequence[str]
    rows: Sequence[Row]
    right: Collection[int] | None = None
    caption: str = ""
    """Of the page."""
    brief: bool = False
    """A terminal has no room for the small print."""

    @property
    def numbers(self) -> Collection[int]:
        """Columns that are set right."""
        return range(1, len(self.heads)) if self.right is None else self.right

    def cells(self) -> list[list[Cell]]:
        """The rows, every text a cell."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]


Points = list[float | None]
"""None is a gap, never 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLine:
    """One line. ``color`` is a role (accent, second, muted, bad) or the number of a run."""

    name: str
    y: Points
    color: str | int = "accent"
    low: Points | None = None
    """Lower ends of 95 % intervals, drawn as bars with ``high``."""
    high: Points | None = None
    shape: str = "line"
    """line, step, bars, points (with lines between), stairs (points with steps between), or dots (points alone)."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A straight line across the chart at one value of an axis ("x" or "y")."""

    axis: str
    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture: x values and lines over them, a few hundred points at most.

    Units: "s" (shown as the reader likes: µs, ms, s), "%" of a share 0 to 1, "USD", or as written.
    """

    title: str
    x: list[float]
    x_unit: str
    x_label: str
    y_unit: str
    lines: list[PlotLine]
    says: str
    marks: Sequence[Mark] = ()
    log_x: bool = False
    log_y: bool = False
    x_time: bool = False
    share: bool = False
    """y is a share: the axis goes from 0 to 1."""
    linked: str | None = None
    """Charts of one name share their cursor and zoom."""
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is under it; each may be empty."""

    title: str = ""
    lines: Sequence[str] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, Facts]] = ()
    charts: Sequence[Chart] = ()
    remark: str = ""
    """Of the page: how to read it."""
    id: str = ""
    """Where links of the page lead. The table of such a section is named by its first head where there are no links."""
    proves_nothing: bool = False
    """Figures of an INVALID run: folded on the page, left out elsewhere unless they are asked for."""


PROVES_NOTHING = "the run is INVALID, so its figures prove nothing"
_MARKDOWN = re.compile(r"([\\`*\[\]<>|_#])")


def render_text(sections: Iterable[Section], console: Console, whole: bool = True) -> None:
    """Print; not ``whole``: without the figures of an INVALID run. No figure is cut, however narrow the console."""
    for k, section in enumerate(_shown(sections, whole)):
        if k:
            console.print()
        if title := _title(section):
            console.print(Text(clean(title), style="bold"))
        for line in section.lines:
            console.print(Text(clean(line)))
        if section.table is not None:
            rows = [[_words(cell, section.table.brief) for cell in row] for row in section.table.cells()]
            for n, table in enumerate(text_tables(section.table.heads, rows, console.width, section.table.numbers)):
                if n or section.lines:
                    console.print()
                console.print(table)
        for note in _listed(section):
            body = Grid.grid(padding=0)
            body.add_row("- ", Text(clean(note), overflow="fold"))
            console.print(body)


def render_markdown(sections: Iterable[Section], whole: bool = True) -> str:
    """GitHub-flavoured Markdown; ``whole`` as in `render_text`."""
    lines: list[str] = []
    for section in _shown(sections, whole):
        if title := _title(section):
            lines += [f"## {escaped(title)}", ""]
        lines += [escaped(line) + "  " for line in section.lines]
        if section.table is not None:
            lines += ["", *_table(section.table)]
        lines += ["", *(f"- {escaped(note)}" for note in _listed(section)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def render_csv(sections: Iterable[Section]) -> str:
    """All tables one below the other, each under its own heads, numbers in full and small print in columns of its own.

    The first column is the title that a table stands under. A text that a spreadsheet would run as a formula gets a '
    before it.
    """
    out = io.StringIO()
    writer, title = csv.writer(out, lineterminator="\n"), ""
    for section in sections:
        title = section.title or title
        if (table := section.table) is None:
            continue
        rows = table.cells()
        noted = [any(row[k].note for row in rows) for k in range(len(table.heads))]
        heads = [[head, f"{head}: note"] if note else [head] for head, note in zip(table.heads, noted, strict=True)]
        writer.writerow(["", *(word for words in heads for word in words)])
        for row in rows:
            pairs = zip(row, noted, strict=True)
            words = [w for cell, note in pairs for w in (_value(cell), _harmless(cell.note or ""))[: 1 + note]]
            writer.writerow([_harmless(title), *words])
    return out.getvalue()


def _value(cell: Cell) -> object:
    return _harmless(str(cell.text)) if cell.sort is None else cell.sort


def _harmless(text: str) -> str:
    return text if text == "-" else re.sub(FORMULA, r"'\1", clean(text))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", clean(text))


def _shown(sections: Iterable[Section], whole: bool) -> Iterator[Section]:
    left_out = False
    for section in sections:
        if section.proves_nothing and not whole:
            left_out = True
        else:
            yield section
    if left_out:
        yield Section(notes=[f"{PROVES_NOTHING}: they are left out. -v shows them, --format json has them all"])


def _title(section: Section) -> str:
    return "" if section.id and section.table is not None else section.title


def _listed(section: Section) -> list[str]:
    facts = [f"{title}, {name}: {value}" for title, pairs in section.facts for name, value in pairs]
    return [*section.notes, *facts]


def _words(cell: Cell, brief: bool = False, between: str = "\n") -> str:
    said = [clean(str(cell.text)), f"({clean(cell.note)})" if cell.note and not brief else ""]
    return between.join(filter(None, said))


def _table(table: Table) -> list[str]:
    rule = [" ---: " if k in table.numbers else " --- " for k in range(len(table.heads))]
    rows = [[escaped(_words(cell, between=" ")) for cell in row] for row in table.cells()]
    return [_row([escaped(head) for head in table.heads]), _row(rule), *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"
