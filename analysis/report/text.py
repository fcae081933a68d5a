"""Sections as text for a terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from analysis.labels import clean
from analysis.report.document import Cell, Section, Table
from harness.console import text_tables

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


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", clean(text))


def _shown(sections: Iterable[Section], whole: bool) -> Iterator[Section]:
    left_out = False
    for section in sections:
        if section.proves_nothing and not whole:
            left_out = True
        elif not section.page_only:
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
