"""What verbs say: words on stderr, data on stdout. Light to import: rich comes with the first word."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.terminal import cut

if TYPE_CHECKING:
    from harness.analysis.report.document import Section
    from harness.console import Console


def say(words: str) -> None:
    """One line for the person, on stderr."""
    from harness.console import console

    console().print(cut(words), markup=False)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(as_json(value).decode())


def as_json(value: object) -> bytes:
    """An indented document with a line end."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table on stdout."""
    from harness.console import text_tables

    out = _stdout(200)
    for table in text_tables(columns, rows, out.width, right=()):
        out.print(table)


def print_rows(rows: Sequence[Mapping[str, object]], names: str) -> None:
    """A plain table on stdout: of rows as JSON has them the fields in ``names``, which are its heads."""
    wanted = names.split()
    table = [tuple(_words(row[name]) for name in wanted) for row in rows]
    print_table(tuple(name.replace("_", " ") for name in wanted), table)


def _words(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _stdout(pipe_width: int) -> Console:
    """Into a pipe there is no width to fit: a table is a line for each row, as a script or a pager will read it."""
    from harness.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else pipe_width)


def present(
    document: object, sections: Sequence[Section], format_: str, *, html: Path | None = None, verb: str = ""
) -> None:
    """A result on stdout: the document as JSON, its tables as CSV, or its sections as Markdown or text; and in ``html``
    as a page of a verb that stands alone, which replaces an earlier one.
    """
    from harness.analysis.report.document import render_csv, render_markdown, render_text

    if html is not None:
        from harness.analysis.report.page import write_sections_page
        from harness.record.manifest import now_utc

        say_page(html, write_sections_page(html, verb, sections, now_utc()))
    if format_ == "json":
        print_json(document)
    elif format_ == "csv":
        print(render_csv(sections), end="")
    elif format_ == "md":
        print(render_markdown(sections))
    else:
        render_text(sections, _stdout(240))


def say_page(html: Path, size: int) -> None:
    """That a page of ``size`` bytes was written."""
    say(f"{html}: {size / 1e6:.2f} MB, stands alone; open it in a browser")
