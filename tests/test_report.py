"""The report says what the summary says, in 80 columns, and nothing a server wrote can dress it up."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console
from run_files import SPEC, TIER, bad, good, write_run

from harness.analysis import metrics
from harness.analysis.cost.cost import Cost, Split
from harness.analysis.metrics import Counts, Tokens, Window
from harness.analysis.rates import Slo
from harness.analysis.report.figures import hourly, value
from harness.analysis.report.run import render_json, render_markdown, render_text
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import ErrorCount, Metrics, Rates, Server, Summary, summarise
from harness.analysis.validity.checks import Check
from harness.cli.select_runs import find_runs
from harness.errors import ResultsError

METRICS_MD = "".join(path.read_text() for path in Path(metrics.__file__).parent.glob("*.md"))
EVIL = "[bold red]x[/] | \x1b[31mred\x07 `code` <b>\u202egnp.exe\n# head\ud800"


def summary(tmp_path, results=None, **options):
    results = [good(i, lag_ms=1) for i in range(60)] if results is None else results
    options.setdefault("spec", replace(SPEC, slo={"ttft": 0.2}))
    return summarise(read_run(write_run(tmp_path / "run", results, **options)))


def text(s, width=80):
    out = io.StringIO()
    render_text(s, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_verdict_then_price_then_latency(tmp_path):
    said = text(summary(tmp_path))
    order = ("VALID", "Cost", "Latency", "Throughput", "Limits", "Assumptions", "run directory")
    places = [said.index(word) for word in order]
    assert places == sorted(places)
    assert "n<299" in said
    assert "51.0" in said  # ttft from the planned time: 50 + 1 ms
    assert "50.0" in said  # service ttft


def test_an_invalid_run_says_why_first_and_prints_no_price(tmp_path):
    said = text(summary(tmp_path, status="stopped", reason="stopped by the user"))
    assert said.lstrip().startswith("INVALID")
    assert "no price: the run is INVALID" in said.splitlines()[-2]
    assert "USD/h" not in said


@pytest.mark.parametrize("form", ["text", "md"])
def test_an_invalid_run_is_short_unless_all_is_asked_for(tmp_path, form):
    """Why, what went wrong and what to do; figures that prove nothing only on request, and always in JSON."""
    rows = [*(good(i) for i in range(50)), *(bad(50 + i, detail="503: full") for i in range(60))]
    s = summary(tmp_path, rows)
    assert s.verdict == "INVALID"

    def said(whole):
        out = io.StringIO()
        render_text(s, Console(file=out, width=80, highlight=False), whole)
        return out.getvalue() if form == "text" else render_markdown(s, whole)

    short, full = said(False), said(True)
    for words in ("50 of 110", "503: full", "prove nothing", "-v shows"):
        assert words in short
    assert "tpot" not in short and "Assumptions" not in short and len(short.splitlines()) <= 22
    assert "tpot" in full and "-v shows" not in full
    assert full.index("503: full") < full.index("tpot")
    assert json.loads(render_json(s))["metrics"]["tpot"]["p50"]["value"] == pytest.approx(0.01)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_fits_the_width(tmp_path, width):
    results = [*(good(i) for i in range(50)), *(bad(50 + i, detail="x" * 300) for i in range(5))]
    long = replace(TIER, name="n" * 40, source="s" * 200)
    lines = text(summary(tmp_path, results, tier=long), width).splitlines()
    table_and_prose = [line for line in lines if not line.startswith("run directory")]
    assert max(map(len, table_and_prose)) <= width
    assert len(lines) < 110


def test_one_page(tmp_path):
    assert len(text(summary(tmp_path, [good(i) for i in range(700)])).splitlines()) <= 50


@pytest.mark.parametrize("results", [[], [good(0)], [bad(0)], [bad(0, "unsent", sent=False)]])
def test_a_poor_run_still_has_a_report(tmp_path, results):
    s = summary(tmp_path, results)
    for said in (text(s), render_markdown(s), render_json(s)):
        assert s.verdict in said
        assert "nan" not in said.lower().replace("finance", "")
        assert " inf" not in said


def test_what_others_wrote_stays_plain_characters(tmp_path):
    printable = EVIL.replace("\ud800", "")  # a lone surrogate can only come from a file name
    s = summary(tmp_path, [good(0), bad(1, "server", detail=printable)], tier=replace(TIER, name=printable))
    s = replace(s, model=EVIL)
    for said in (text(s), render_markdown(s)):
        assert not set(said) & set("\x1b\x07\u202e\ud800")
        assert "[bold red]" in said.replace("\\", "")
    assert "\n# head" not in render_markdown(s)
    table = [line for line in render_markdown(s).splitlines() if line.startswith("| server")]
    assert len(table) == 1
    assert table[0].replace("\\|", "").count("|") == 5
    assert "\\<b\\>" in table[0]


def test_markdown_tables_have_one_width(tmp_path):
    block: list[str] = []
    for line in [*render_markdown(summary(tmp_path)).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            assert len({row.replace("\\|", "").count("|") for row in block}) == 1
            block = []


def test_markdown_has_room_for_the_intervals_of_latencies(tmp_path):
    """What people copy into a review carries its doubt; a terminal of 80 columns has no room for it."""
    s = summary(tmp_path, [good(i, ttft_ms=40 + i % 20) for i in range(100)])
    (row,) = [line for line in render_markdown(s).splitlines() if line.startswith("| service ttft")]
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert all(re.fullmatch(r"[\d.]+ \((at least )?[\d.]+( to [\d.]+)?\)", cell) for cell in cells[1:5]), cells
    assert cells[5] == "n\\<299"


def test_the_hourly_price_is_that_of_its_source_to_the_last_digit(tmp_path):
    """A month of 0.11592 USD/h is 84.62 USD; of the 0.1159 that four digits show it would be 84.61."""
    s = summary(tmp_path, tier=replace(TIER, usd_per_hour=0.11592))
    assert "- 0.11592 USD/h x 1 replica" in text(s) and "- 0.11592 USD/h x 1 replica" in render_markdown(s)
    assert (hourly(98.32), hourly(1234.5), hourly(None)) == ("98.32", "1,234.5", "-")


def test_json_is_the_documented_shape(tmp_path):
    tree = json.loads(render_json(summary(tmp_path, [*(good(i) for i in range(20)), bad(20)])))
    assert tree["schema"] == "harness.report/1"
    assert set(tree["metrics"]) == {"ttft", "service_ttft", "tpot", "itl", "e2e", "lag", "session_lag"}
    assert set(tree["metrics"]["ttft"]) == {"unit", "mean", "p50", "p90", "p95", "p99"}
    assert set(tree["rates"]) == {
        "request_rate", "request_throughput", "input_token_throughput", "output_token_throughput",
        "total_token_throughput", "goodput", "concurrency",
    }  # fmt: skip
    assert {"value", "low", "high", "n", "unit", "note"} <= set(tree["cost"]["usd_per_1m_total"])
    assert tree["requests"]["planned"] == 21
    assert tree["errors"] == [
        {"error": "server", "count": 1, "meaning": tree["errors"][0]["meaning"], "example": None}
    ]  # fmt: skip
    assert tree["tier"]["usd_per_hour"] == TIER.usd_per_hour
    assert tree["slo"]["limits"] == {"ttft": 0.2}


@pytest.mark.parametrize(
    "kind", [Summary, Metrics, Rates, Cost, Split, Slo, Counts, Tokens, Window, Check, Quantity, ErrorCount, Server]
)
def test_every_json_key_is_documented(kind):
    missing = [f.name for f in fields(kind) if f"`{f.name}`" not in METRICS_MD]
    assert not missing


def test_every_check_is_documented(tmp_path):
    assert [c.name for c in summary(tmp_path).checks if f"`{c.name}`" not in METRICS_MD] == []


def test_a_missed_slo_is_said_beside_the_price(tmp_path):
    s = summary(tmp_path, spec=replace(SPEC, slo={"ttft": 0.01}))
    said = text(s)
    assert "MISSED" in said
    assert "not a price to sell at" in said


def test_a_percentile_of_too_few_independent_requests_says_what_they_are_worth() -> None:
    alike = Quantity(value=None, n=60, unit="s", evidence="measured", note="any words", needed=59, worth=15)
    assert value(alike, str) == "n≈15<59"
    assert value(replace(alike, needed=299, worth=None), str) == "n<299"
    assert value(replace(alike, needed=None, worth=None), str) == "-"


def test_the_last_three_lines_are_verdict_price_and_slo(tmp_path) -> None:
    kept = text(
        summary(tmp_path / "a", [good(i) for i in range(200)], spec=replace(SPEC, slo={"ttft": 2.0}))
    ).splitlines()[-3:]
    assert kept[0] == "VALID"
    assert kept[1] == "8.325 USD per 1M tokens, 24.975 per 1M output tokens at this load"
    assert kept[2].startswith("SLO met, kept by 1")
    refused = text(summary(tmp_path / "b", [bad(i, "unsent", sent=False) for i in range(200)])).splitlines()[-3:]
    assert refused[0].startswith("INVALID: ")
    assert refused[1].startswith("no price: ")
    assert refused[2] == "SLO not judged: the run is INVALID"
    assert text(summary(tmp_path / "c", spec=replace(SPEC, slo={}))).splitlines()[-1].startswith("no SLO was given")


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_figure_of_the_last_lines_is_cut(tmp_path, width) -> None:
    long = {"ttft_p95": 0.2, "tpot_p99": 0.1, "e2e_p99": 9.0}
    said = text(summary(tmp_path, [good(i) for i in range(400)], spec=replace(SPEC, slo=long)), width).split("run dir")
    assert "…" not in said[1]
    bottom = " ".join(said[1].split())
    for figures in ("8.329 USD", "24.987 per 1M output", "kept by 100%: ttft_p95", "kept by 100%: e2e_p99"):
        assert figures in bottom


def test_a_folder_of_runs_stands_for_all_of_them(tmp_path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    assert find_runs(tmp_path, tmp_path / "a") == [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    with pytest.raises(ResultsError, match="not a run directory"):
        find_runs(tmp_path / "none")
