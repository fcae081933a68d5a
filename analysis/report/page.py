"""The report as one HTML page that stands alone: no network, light and dark, printable.

Everything that a trace or a server wrote reaches the page through one gate: the template escapes every expression, and
`plain` takes out control and direction characters and cuts what is too long. The page's own policy forbids any network
and any script or style but the two whose hashes it names, so even a hole in that gate could run nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup, escape

from harness.analysis.labels import clean
from harness.analysis.report import run as report
from harness.analysis.report.compared import compare_runs
from harness.analysis.report.document import PROVES_NOTHING, Chart, Section
from harness.analysis.report.live import LiveRun
from harness.analysis.report.view import RunView
from harness.errors import ResultsError

LONGEST = 1000
"""Characters of one text; a report is read by people."""


def render_page(views: Sequence[RunView]) -> str:
    """The whole page of one run, or of several compared, as HTML."""
    if len(views) == 1:
        return _page(title=report.headline(views[0].summary), one=views[0], sections=views[0].sections)
    comparison = compare_runs(views)
    title = f"{len(views)} runs compared"
    return _page(title=title, comparison=comparison, sections=comparison.sections, views=views)


def _page(**values: Any) -> str:
    charts: list[Chart] = []

    def number(chart: Chart) -> int:
        charts.append(chart)
        return len(charts) - 1

    absent = dict.fromkeys(("one", "comparison", "verb", "first", "made", "live"))
    live = values.get("live") is not None
    css, js = _style_and_script(live=live)
    page = _templates().get_template("page.html").render(
        **{**absent, **values}, css=css, js=js, policy=_policy(css, js, live=live), proves_nothing=PROVES_NOTHING,
        chart_number=number, data=lambda: _json_for_script(charts),
    )  # fmt: skip
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


def render_live(live: LiveRun) -> str:
    """The page of a test that runs, as of now; it asks for `live_json` at ``live.json`` each second."""
    return _page(title=live.test.run, verb="live", live=live, sections=live.sections())


def live_json(live: LiveRun) -> str:
    """What the page renews itself from: state, figures, and its charts in their order."""
    charts = [chart for section in live.sections() for chart in section.charts]
    found = {"say": live.state(), "over": live.over, "facts": live.facts(), "charts": charts}
    return msgspec.json.encode(found).decode()


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
def _style_and_script(*, live: bool = False) -> tuple[Markup, Markup]:
    """Both as the page holds them. uPlot is inlined: other plotting libraries are many times its size."""
    css = _file("uplot.css") + "\n" + _file("page.css")
    js = f"/*\n{_file('uplot-LICENSE.txt')}*/\n{_file('uplot.js')}\n{_file('page.js')}" + (
        f"\n{_file('live.js')}" if live else ""
    )
    return Markup(css), Markup(js)  # noqa: S704 - ours


@cache
def _file(name: str) -> str:
    return resources.files("harness.analysis.report").joinpath("web", name).read_text("utf-8")


def _policy(css: Markup, js: Markup, *, live: bool = False) -> str:
    """The Content-Security-Policy of a page: nothing but the page's own style and script, by hash; a live one may ask
    where it came from.
    """
    by_js, by_css = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (js, css))
    return (
        f"default-src 'none'; script-src 'sha256-{by_js}'; style-src 'sha256-{by_css}'; img-src data:; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if live else "")
    )


def _json_for_script(value: object) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - nothing in it can be markup any more


GLOSSARY: Mapping[str, str] = {
    "TTFT": "Time to first token: from the time a request was planned to be sent until its first output arrives.",
    "service TTFT": "Time to first token as the server sees it: from the time the request was really sent.",
    "TPOT": "Time per output token after the first: how fast an answer is written, averaged over that answer.",
    "ITL": "Inter-token latency: the time between two tokens of a stream, over the tokens of all requests.",
    "E2E": "End-to-end latency: from the time a request was planned to be sent until its answer ended.",
    "lag": "How much later than planned a request was sent. Latencies contain it.",
    "session lag": "How much later than its own time a turn was due, because the answer before it took too long.",
    "p50": "The median: half of the samples are at or below it.",
    "p90": "The 90th percentile: 90 of 100 samples are at or below it.",
    "p95": "The 95th percentile: 95 of 100 samples are at or below it.",
    "p99": "The 99th percentile: 99 of 100 samples are at or below it. It needs at least 299 samples.",
    "SLO": "Service level objective: the latency limits, and the share of requests that has to keep them.",
    "goodput": "Requests a second that succeeded within every limit of the SLO.",
    "attainment": "The share of all offered requests that kept the SLO. Failed and lost requests did not keep it.",
    "throughput": "What was served a second over the whole run: successful requests or their tokens.",
    "VALID": "Every check that a result depends on passed, so its figures and its price can be used.",
    "INVALID": "A check that the result depends on failed: the figures prove nothing and there is no price.",
    "TOO SMALL": "Too few requests for a verdict. Figures are shown, but no price.",
    "gate": "A check that makes a run INVALID when it fails.",
    "95 % interval": "The range that holds the true value with 95 % confidence, by this measurement.",
    "open loop": "Requests are sent at times of their own, as users send them, whether or not the server keeps up.",
    "closed loop": "A fixed number of requests is in flight. A slow server slows its own load, which hides queues.",
    "in flight": "Requests that were sent and have not ended.",
    "capacity": "The highest request rate at which the SLO is still kept and no backlog grows.",
    "utilisation": "The share of the capacity paid for that is sold, around the clock.",
    "interactivity": "Tokens a second that one user sees in a stream: 1 / TPOT.",
    "floor": "Cost at the highest throughput measured. It keeps no SLO; real costs are above it.",
    "gross margin": "(price - cost) / price.",
    "break-even": "The share of capacity, or tokens a month, from which own servers are cheaper than the API.",
    "tier": "A kind of machine with its price an hour, when that price was read, and its source.",
    "replica": "One copy of the model, served by one engine.",
    "fluid": "Demand divided by what one replica carries, as if requests were a steady flow.",
    "probe": "One short measurement at one load, made while searching for capacity.",
    "list price": "The published price of an hour of the hardware, not what you negotiated.",
    "evidence": "Where a figure comes from: measured on real servers, simulated, or quoted from a list.",
    "KV cache": "The server's memory of tokens it has read; when it is full, requests wait.",
    "prefix cache": "Input that the server has seen before and need not read again.",
    "fidelity": "How closely the load that was sent follows the trace it was made from.",
}
"""Term -> one sentence. A term is found in any case, the verdicts only as they are written here."""

_BY_LOWER = {term.lower(): term for term in GLOSSARY}
_AS_WRITTEN = {"VALID", "INVALID", "TOO SMALL"}
_TERMS = re.compile(
    r"(?<![\w-])(" + "|".join(sorted(map(re.escape, GLOSSARY), key=len, reverse=True)) + r")s?(?![\w-])", re.IGNORECASE
)
_MAIN = re.compile(r"(?<=<main>).*(?=</main>)", re.DOTALL)
_TAG = re.compile(r"(<[^>]+>)")  # every other > on a page is escaped
_UNMARKED = {"a", "button", "summary", "h1", "noscript"}
"""Elements whose text is left as it is: no button may stand in another, and headlines stay plain."""


def with_terms(page: str) -> str:
    """The page with the first of each term in a section as a button that opens what the term means.

    The explanations are popovers: the browser opens them by mouse, key and touch, without a script or a network.
    A browser that knows no popovers, and paper, show them as a list at the end.
    """
    return _MAIN.sub(lambda main: _marked(main[0]), page)


def _marked(main: str) -> str:
    out: list[str] = []
    used: dict[str, None] = {}
    seen: set[str] = set()
    inside: list[str] = []
    after_head = ""

    def mark(found: re.Match[str], text: str | None = None) -> str:
        term = _BY_LOWER[found[1].lower()]
        if term in seen or (term in _AS_WRITTEN and found[1] != term):
            return found[0] if text is None else ""
        seen.add(term)
        used[term] = None
        named = f' aria-label="What {escape(term)} means"' if text == "" else ""
        shown = found[0] if text is None else text
        return f'<button type="button" class="term" popovertarget="{_id(term)}"{named}>{shown}</button>'

    for part in _TAG.split(main):
        name = re.match(r"</?(\w+)", part)
        if name is None:
            if not inside:
                part = _TERMS.sub(mark, part)
            elif inside == ["button"]:  # the head of a column is a button of its own: it sorts
                after_head = after_head or next(filter(None, (mark(found, "") for found in _TERMS.finditer(part))), "")
        elif part.startswith("<section"):
            seen.clear()
        elif name[1] in _UNMARKED:
            if part.startswith("</"):
                inside.pop()
                part, after_head = part + after_head, ""
            else:
                inside.append(name[1])
        out.append(part)
    tips = (
        f'<div popover class="tip" id="{_id(term)}"><b>{escape(term)}</b> {escape(GLOSSARY[term])}</div>'
        for term in used
    )
    return "".join([*out, *tips])


def _id(term: str) -> str:
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")
