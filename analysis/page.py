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

import jinja2
import msgspec
from markupsafe import Markup

from analysis import report
from analysis.compared import compare_runs
from analysis.plot import Chart
from analysis.view import RunView
from harness.errors import ResultsError

LONGEST = 1000
"""Characters of one text; a report is read by people."""


def render_page(views: Sequence[RunView]) -> str:
    """The whole page of one run, or of several compared, as HTML."""
    charts: list[Chart] = []

    def figure(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    comparison = compare_runs(views) if len(views) > 1 else None
    css = _file("uplot.css") + "\n" + _file("page.css")
    js = f"/*\n{_file('uplot-LICENSE.txt')}*/\n{_file('uplot.js')}\n{_file('page.js')}"
    body = _template().render(
        views=views, one=views[0] if len(views) == 1 else None, comparison=comparison, figure=figure,
        title=report.headline(views[0].summary) if len(views) == 1 else f"{len(views)} runs compared",
        css=Markup(css), js=Markup(js), policy=_policy(css, js),  # noqa: S704 - our own files
        data=lambda: _json_for_script(charts),
    )  # fmt: skip
    return body + "\n"


def write_page(path: Path, views: Sequence[RunView]) -> int:
    """Write the page and return its size in bytes; an earlier one of that name is replaced in one step.

    Raises `ResultsError` when it cannot be written.
    """
    data = render_page(views).encode("utf-8", "replace")
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
def _template() -> jinja2.Template:
    made = jinja2.Environment(
        autoescape=True, finalize=plain, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return made.from_string(_file("page.html"))


@cache
def _file(name: str) -> str:
    return resources.files("analysis").joinpath("web", name).read_text("utf-8")


def _policy(css: str, js: str) -> str:
    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest(js)}; style-src {digest(css)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json_for_script(value: object) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - nothing in it can be markup any more
