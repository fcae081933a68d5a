"""What verbs say: words on stderr, data on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.console import console
from harness.terminal import cut

if TYPE_CHECKING:
    from analysis.report.document import Section


def say(words: str) -> None:
    """One line for the person, on stderr."""
    console().print(cut(words), markup=False)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table on stdout."""
    from harness.console import Console, text_tables

    # Into a pipe there is no width to fit: one table, a line for each row, as a script or a pager will read it.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    for table in text_tables(columns, rows, console.width, right=()):
        console.print(table)


def print_sections(sections: Sequence[Section], format_: str) -> None:
    """Blocks on stdout, as Markdown (md) or text; into a pipe there is no width to fit, so nothing is cut."""
    from analysis.report.text import render_markdown, render_text
    from harness.console import Console

    if format_ == "md":
        print(render_markdown(sections))
    else:
        render_text(sections, Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 240))


def write_sections(path: Path, verb: str, sections: Sequence[Section]) -> None:
    """Blocks as a page that stands alone; its path on stderr. An earlier page of that name is replaced."""
    from analysis.report.page import write_sections_page
    from harness.record.manifest import now_utc

    size = write_sections_page(path, verb, sections, now_utc())
    say(f"{path}: {size / 1e6:.2f} MB, stands alone; open it in a browser")
