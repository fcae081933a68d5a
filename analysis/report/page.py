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

from analysis.labels import clean
from analysis.report import run as report
from analysis.report.compared import compare_runs
from analysis.report.document import PROVES_NOTHING, Chart, Section
from analysis.report.glossary import with_terms
from analysis.report.view import RunView
from harness.errors import ResultsError

LONGEST = 1000
"""Characters of one text; a report is read by people."""


def render_page(views: Sequence[RunView], home: str | None = None) -> str:
    """The whole page of one run, or of several compared, as HTML; ``home`` is where it links back to, if anywhere."""
    if len(views) == 1:
        return _page(title=report.headline(views[0].summary), one=views[0], sections=views[0].sections, home=home)
    comparison = compare_runs(views)
    title = f"{len(views)} runs compared"
    return _page(title=title, comparison=comparison, sections=comparison.sections, views=views, home=home)


def _page(**values: Any) -> str:
    charts: list[Chart] = []

    def number(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    absent = dict.fromkeys(("home", "one", "comparison", "verb", "first", "made"))
    return render(
        "page.html",
        **{**absent, **values},
        policy=policy(),
        proves_nothing=PROVES_NOTHING,
        chart_number=number,
        data=lambda: _json_for_script(charts),
    )


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


def write_sections_page(path: Path, verb: str, sections: Sequence[Section], made: str) -> int:
    """Write what ``verb`` prints as a page; otherwise as `write_page`. ``made``: the time."""
    title = next((section.title for section in sections if section.title), verb)
    return _write(path, _page(title=title, verb=verb, made=made, first=sections[0], sections=sections[1:]))


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


def plain(value: object) -> object:
    """What the template prints for any value: no control or direction characters, at most `LONGEST` characters."""
    if isinstance(value, Markup | jinja2.Undefined | int | float):
        return value
    if value is None:
        return "-"
    text = str(value)
    return clean(text) if len(text) <= LONGEST else f"{clean(text[:LONGEST])}… ({len(text):,} characters)"


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        autoescape=True, finalize=plain, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_file),
    )  # fmt: skip


@cache
def _style_and_script() -> tuple[str, str]:
    """Both as the page holds them. uPlot is inlined: other plotting libraries are many times its size."""
    css = _file("uplot.css") + "\n" + _file("page.css")
    return css, f"/*\n{_file('uplot-LICENSE.txt')}*/\n{_file('uplot.js')}\n{_file('page.js')}"


@cache
def _file(name: str) -> str:
    return resources.files("analysis.report").joinpath("web", name).read_text("utf-8")


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
