"""Every page says what its terms mean: once a section, by mouse, key and touch, without a network."""

from __future__ import annotations

import re

import pytest
from run_files import bad, good
from test_page import view, visit  # noqa: F401 - fixtures

from harness.analysis.report.document import Section
from harness.analysis.report.page import GLOSSARY, render_page, with_terms, write_sections_page

MARK = re.compile(r'<button type="button" class="term" popovertarget="([^"]+)"[^>]*>')


def marked(html: str) -> list[list[str]]:
    """The terms of each section, in their order."""
    return [MARK.findall(section) for section in html.split("<section")[1:]]


def test_a_term_is_a_sentence():
    for term, says in GLOSSARY.items():
        assert says.endswith(".") and len(says) < 160, term


def test_each_term_is_marked_once_in_a_section_and_explained_once():
    made = with_terms(
        "<title>ttft</title><main><section><h1>TTFT</h1><p>Goodput, goodput and TTFTs; a_ttft_p99, valid VALID</p>"
        "<thead><tr><th><button><bdi>TTFT p99</bdi></button></th></tr></thead><a>lag</a></section>"
        "<section><p title='lag'>service TTFT &lt;lag&gt;</p></section></main><footer>lag</footer>"
    )
    assert marked(made) == [["term-goodput", "term-ttft", "term-valid", "term-p99"], ["term-service-ttft", "term-lag"]]
    assert '<button><bdi>TTFT p99</bdi></button><button type="button" class="term" popovertarget="term-p99"' in made
    assert "<title>ttft</title>" in made and "<h1>TTFT</h1>" in made and "<a>lag</a>" in made
    assert made.count('id="term-ttft"') == 1
    assert set(MARK.findall(made)) == set(re.findall(r'<div popover class="tip" id="([^"]+)">', made))


def test_marks_add_no_text_and_nest_no_buttons(tmp_path):
    rows = [*(good(i) for i in range(300)), *(bad(300 + i) for i in range(5))]
    made = render_page([view(tmp_path / "a", rows, label="a"), view(tmp_path / "b", rows, label="b")])
    for terms in marked(made):
        assert len(terms) == len(set(terms))
    depth = 0
    for tag in re.findall(r"</?button", made.split("<script")[0]):
        depth += 1 if tag == "<button" else -1
        assert depth in (0, 1)


def test_every_kind_of_page_has_them(tmp_path):
    write_sections_page(tmp_path / "x.html", "price", [Section(title="x", lines=("the SLO and the floor",))], "now")
    assert "term-floor" in (tmp_path / "x.html").read_text()
    assert "term-ttft" in render_page([view(tmp_path / "run")])


@pytest.mark.parametrize("way", ["key", "mouse", "touch"])
def test_browser_opens_a_term(visit, browser, tmp_path, way):  # noqa: F811 - the fixtures
    tab = visit(view(tmp_path / "run"))
    if way == "touch":
        context = browser.new_context(has_touch=True, viewport={"width": 375, "height": 800})
        url, tab = tab.url, context.new_page()
        tab.goto(url)
    term = tab.locator("#latency tbody .term").first
    tip = tab.locator("#term-ttft")
    assert term.inner_text() == "ttft" and not tip.is_visible()
    if way == "key":
        term.focus()
        tab.keyboard.press("Enter")
    elif way == "mouse":
        term.hover()
    else:
        term.tap()
    tip.wait_for(state="visible")
    assert "Time to first token" in tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= tab.viewport_size["width"]
    if way == "mouse":
        tab.mouse.move(1, 1)
    else:
        tab.keyboard.press("Escape")
    tip.wait_for(state="hidden")
    if way == "touch":
        context.close()
