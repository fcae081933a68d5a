"""The report as one HTML page that stands alone: no network, light and dark, printable.

Everything that a trace or a server wrote reaches the page through one gate: the template escapes every expression, and
`plain` takes out control and direction characters and cuts what is too long. The page's own policy forbids any network
and any script or style but the two whose hashes it names, so even a hole in that gate could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from analysis.show import report
from analysis.show.cells import Cell, Table
from analysis.show.compared import compare_runs
from analysis.show.decision_text import Block
from analysis.show.glossary import with_terms
from analysis.show.plot import Chart
from analysis.show.view import RunView
from harness.errors import ResultsError

LONGEST = 1000
"""Characters of one text; a report is read by people."""


def render_page(views: Sequence[RunView], home: str | None = None) -> str:
    """The whole page of one run, or of several compared, as HTML; ``home`` is where it links back to, if anywhere."""
    charts: list[Chart] = []

    def figure(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    comparison = compare_runs(views) if len(views) > 1 else None
    return render(
        "page.html", views=views, one=views[0] if len(views) == 1 else None, comparison=comparison, figure=figure,
        title=report.headline(views[0].summary) if len(views) == 1 else f"{len(views)} runs compared", home=home,
        policy=policy(), data=lambda: _json_for_script(charts),
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """One of our templates with the page's own style and script."""
    css, js = _style_and_script()
    page = _templates().get_template(template).render(css=Markup(css), js=Markup(js), **values)  # noqa: S704 - ours
    return with_terms(page) + "\n"


def write_page(path: Path, views: Sequence[RunView]) -> int:
    """Write the page and return its size in bytes; an earlier one of that name is replaced in one step.

    Raises `ResultsError` when it cannot be written.
    """
    return _write(path, render_page(views))


def write_blocks_page(path: Path, verb: str, blocks: Sequence[Block], made: str) -> int:
    """Write a decision's blocks, as ``verb`` prints them, as a page; otherwise as `write_page`. ``made``: the time."""
    shown = [
        {
            "title": block.title, "lines": block.lines, "notes": block.notes,
            "table": Table(
                caption="", heads=block.heads, right=range(1, len(block.heads)),
                rows=[[Cell(text) for text in row] for row in block.rows],
            ) if block.rows else None,
        }
        for block in blocks
    ]  # fmt: skip
    title = next((block.title for block in blocks if block.title), verb)
    values = {"verb": verb, "blocks": shown, "made": made, "title": title, "home": None, "policy": policy()}
    return _write(path, render("blocks.html", **values))


def _write(path: Path, text: str) -> int:
    data = text.encode("utf-8", "replace")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise ResultsError(f"{path}: cannot write the page ({e.strerror}); choose another --html") from e
    return len(data)


# ------------------------------------------------------------------------------------------------- the gate to the page


def plain(value: object) -> object:
    """What the template prints for any value: no control or direction characters, at most `LONGEST` characters."""
    if isinstance(value, Markup | jinja2.Undefined | int | float):
        return value
    if value is None:
        return "-"
    text = str(value)
    return report.clean(text) if len(text) <= LONGEST else f"{report.clean(text[:LONGEST])}… ({len(text):,} characters)"


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        autoescape=True, finalize=plain, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_file),
    )  # fmt: skip


@cache
def _style_and_script() -> tuple[str, str]:
    css = _file("uplot.css") + "\n" + _file("page.css")
    return css, f"/*\n{_file('uplot-LICENSE.txt')}*/\n{_file('uplot.js')}\n{_file('page.js')}"


@cache
def _file(name: str) -> str:
    return resources.files("analysis.show").joinpath("web", name).read_text("utf-8")


def policy(form_action: str = "'none'") -> str:
    """The Content-Security-Policy of a page: nothing but the page's own style and script, by hash."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    css, js = _style_and_script()
    return (
        f"default-src 'none'; script-src {digest(js)}; style-src {digest(css)}; img-src data:; "
        f"base-uri 'none'; form-action {form_action}"
    )


def _json_for_script(value: object) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - nothing in it can be markup any more
