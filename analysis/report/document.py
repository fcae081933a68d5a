"""What every report is made of: sections of sentences, tables, facts, pictures and notes.

A report is built once, as sections, and rendered as text and Markdown (`analysis.report.text`) and as a page
(`analysis.report.page`). Whatever a trace, a server or a price map wrote stays plain characters in all three.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from analysis.report.charts import Chart

MOST_ITEMS = 200
"""Entries of one list that a server or a trace could make endless (arguments, facts, errors)."""
Mark = Literal["good", "warn", "bad", "quiet"]
Facts = Sequence[tuple[str, object]]
"""Names and values."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a table cell says, the small print under it, the number it sorts by, and its colour."""

    text: object
    note: str | None = None
    sort: float | None = None
    mark: Mark | str | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is under it; each may be empty."""

    title: str = ""
    lines: Sequence[str] = ()
    table: Table | None = None
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, Facts]] = ()
    """Lists of names and values, each under its heading."""
    charts: Sequence[Chart] = ()
    remark: str = ""
    """Of the page: how to read it."""
    id: str = ""
    """Where links of the page lead. The table of such a section is named by its first head where there are no links."""
    page_only: bool = False
    proves_nothing: bool = False
    """Figures of an INVALID run: folded on the page, left out elsewhere unless they are asked for."""
