"""The page says what the summary says, stands alone, survives every run, and runs nothing that a server wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import harness, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import MS, SPEC, TIER, S, bad, good, write_run

from harness.analysis import metrics
from harness.analysis.labels import label_runs
from harness.analysis.report import curves as reduce
from harness.analysis.report.charts import interactivity, per_accelerator, tradeoff_charts
from harness.analysis.report.compared import ComparisonView, compare_runs
from harness.analysis.report.curves import EDGES, cumulative, curves, over_time
from harness.analysis.report.document import Chart, Section, Table
from harness.analysis.report.page import LONGEST, plain, render_page, write_page, write_sections_page
from harness.analysis.report.run import render_json
from harness.analysis.report.view import RunView, view_run
from harness.analysis.rows import columns
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.errors import ResultsError
from harness.record.manifest import Replica, RunDir, read_manifest, write_manifest
from harness.record.samples import SERVER_SCHEMA

EVIL = (
    "<script>window.hacked=1</script></script><img src=x onerror=window.hacked=1>\"' onmouseover='window.hacked=1' "
    "\u202egnp.exe\u200f\x00\x1b[31m{{7*7}}{% raw %}&amp;]]>--><!--\u2028</style></title>"
)
SLO = replace(SPEC, slo={"ttft": 0.2, "tpot": 0.1})


def mixed(n=400, **options):
    """Requests with a spread of latencies, a few of them failed."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        if i % 50 == 7:
            rows.append(bad(i, detail="503: full"))
        else:
            slow, gap = rng.lognormal(4, 0.5), rng.lognormal(2.5, 0.3)
            rows.append(good(i, ttft_ms=slow, itl_ms=gap, tokens=int(rng.integers(1, 9)), lag_ms=rng.exponential(1)))
    return rows


def view(path, results=None, *, label="", **options) -> RunView:
    options.setdefault("spec", SLO)
    run = read_run(write_run(path, mixed() if results is None else results, **options))
    return view_run(run, summarise(run), label)


def charts_of(made: RunView | ComparisonView, *places: str) -> list[Chart]:
    return [chart for section in made.sections if section.id in places for chart in section.charts]


def page(*views: RunView) -> Page:
    return Page(render_page(views))


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text outside script and style, the chart data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text, self.elements = html, "", []
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)
        self.close()
        self.charts = json.loads(self.blocks["script"][0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in self.blocks:
            self.blocks[tag].append("")

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] in self.blocks and not self.blocks[self.elements[-1][0]][-1]:
            self.blocks[self.elements[-1][0]][-1] = data
        else:
            self.text += data

    @property
    def policy(self) -> str:
        return next(a["content"] for _, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")


# --------------------------------------------------------------------------------------------------------- the numbers


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-7, 1e6), min_size=1, max_size=200), st.integers(0, len(EDGES) - 2))
def test_the_grid_counts_exactly_what_lies_at_or_below_each_edge(values, edge):
    window = metrics.Window(rule="", start_s=0.0, end_s=1.0, duration_s=1.0)
    grid = np.zeros((metrics.BINS, len(EDGES)))
    values = np.array([*values, EDGES[edge]])
    reduce.count_in(grid, metrics.bin_of(np.linspace(0, 1, len(values)), window), values)
    below = np.array([(values <= e * (1 + 1e-9)).mean() for e in EDGES[:-1]])
    assert cumulative(grid)[:-1] == pytest.approx(below)
    assert grid.sum() == len(values)


def test_curves_hold_every_request_token_and_gap_once(tmp_path):
    run = read_run(write_run(tmp_path / "run", mixed()))
    found = curves(run)
    ok = run.rows.success
    for name in ("ttft", "service_ttft", "e2e"):
        assert found.grids[name].sum() == ok.sum()
    assert found.grids["lag"].sum() == len(run.rows)
    assert found.grids["itl"].sum() == pytest.approx((run.rows.output_tokens[ok] - 1).sum())
    width = found.window.bin_s
    assert found.output_tokens.sum() * width == pytest.approx(run.rows.output_tokens[ok].sum())
    assert found.sent.sum() * width == pytest.approx(len(run.rows))
    assert found.failed.sum() * width == pytest.approx((~ok).sum())


def test_a_gap_stands_where_its_later_token_arrived(tmp_path):
    row = replace(good(0, tokens=3), chunk_ns=[1 * S, 2 * S, 7 * S], finished_ns=10 * S)
    grid = curves(read_run(write_run(tmp_path / "run", [row]))).grids["itl"]
    place = {int(t * 10 / metrics.BINS): EDGES[v] for t, v in zip(*np.nonzero(grid), strict=True)}
    assert place == pytest.approx({2: 1.0, 7: 5.0}, rel=0.024)


def test_figures_are_the_same_in_many_pieces(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", mixed(120), workers=3)
    whole = read_run(path)
    monkeypatch.setattr(columns, "PART_CHUNKS", 3)
    parts = read_run(path)
    assert len(list(parts.parts())) > 50
    assert render_json(summarise(parts)) == render_json(summarise(whole))
    one, many = curves(whole), curves(parts)
    for name in ("in_flight", "input_tokens", "output_tokens"):
        assert getattr(many, name) == pytest.approx(getattr(one, name))
    for name, grid in one.grids.items():
        assert many.grids[name] == pytest.approx(grid), name


def test_latency_over_time_follows_a_step_within_a_latency_bin(tmp_path):
    rows = [good(i, ttft_ms=20 if i < 2000 else 700, itl_ms=5) for i in range(4000)]
    found = curves(read_run(write_run(tmp_path / "run", rows)))
    middle, worst = over_time(found.grids["ttft"], 4000)
    for line in (middle, worst):
        assert line[:90] == pytest.approx(0.020, rel=0.024)
        assert line[110:195] == pytest.approx(0.700, rel=0.024)


def test_joined_rates_keep_their_mean(tmp_path):
    found = curves(read_run(write_run(tmp_path / "run", [good(i) for i in range(60)])))
    smooth = reduce.joined(found.sent, found, 60)
    assert smooth.mean() == pytest.approx(found.sent.mean())
    assert len(np.unique(smooth)) <= 10 < len(smooth)
    assert smooth[:150] == pytest.approx(10, rel=0.4)  # ten a second, not 33 and 0 by turns


def server_metrics(path, values, names=SERVER_SCHEMA.names):
    k = len(values)
    columns = {f.name: pa.nulls(k, f.type) if f.nullable else pa.array([0] * k, f.type) for f in SERVER_SCHEMA}
    columns |= {"t_ns": pa.array([i * S for i in range(k)]), "running": pa.array(values, pa.float64())}
    table = pa.table(columns, schema=SERVER_SCHEMA).rename_columns(names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def test_server_samples_are_added_up_over_replicas_and_gaps_stay_gaps(tmp_path):
    replicas = [Replica(index=i, base_url="http://127.0.0.1:1/v1") for i in range(2)]
    path = write_run(tmp_path / "run", [good(i) for i in range(400)], replicas=replicas)
    server_metrics(path / "server-metrics-0.arrows", [2.0] * 15)
    assert curves(read_run(path)).server == {}  # of the other replica nothing is known
    server_metrics(path / "server-metrics-1.arrows", [3.0] * 41)
    found = curves(read_run(path))
    assert set(found.server) == {"running"}
    known = np.isfinite(found.server["running"])
    assert (found.server["running"][known] == 5.0).all()
    assert known[found.time_s < 14].all()
    assert not known[found.time_s > 14 + reduce.NEAR_S].any()


@pytest.mark.parametrize("spoil", ["foreign", "cut", "empty", "columns"])
def test_server_samples_that_cannot_be_read_are_left_out(tmp_path, spoil):
    path = write_run(tmp_path / "run", [good(i) for i in range(100)])
    file = path / "server-metrics-0.arrows"
    server_metrics(
        file, [2.0] * 20, names=[f"x{n}" for n in SERVER_SCHEMA.names] if spoil == "columns" else SERVER_SCHEMA.names
    )
    data = file.read_bytes()
    file.write_bytes({"foreign": b"not arrow" * 100, "cut": data[: len(data) * 2 // 3], "empty": b""}.get(spoil, data))
    found = curves(read_run(path)).server
    assert set(found) == ({"running"} if spoil == "cut" else set())


# ------------------------------------------------------------------------------------------------------------ the page


def test_verdict_then_price_then_latency_then_proof(tmp_path):
    v = view(tmp_path / "run", [good(i, lag_ms=1) for i in range(700)])
    said = page(v).text
    order = ("VALID", "a million tokens cost", "carry the whole bill", "Latency, ms",
             "Throughput over", "sent as planned", "Failures first", "latencies are of", "Versions")  # fmt: skip
    places = [said.index(word) for word in order]
    assert places == sorted(places)
    assert v.state == "valid"
    assert v.summary.cost.usd_per_1m_total.value is not None
    assert "measured x list price" in said
    assert "read 2026-11-01; source: a price list" in said
    assert "100% of requests kept TTFT 200 ms and TPOT 100 ms; 99.0% was wanted" in said


def test_the_first_screen_names_the_limits_of_its_figures(tmp_path):
    """VALID and a price, without a word on what narrows them, is half of the answer."""
    said = page(view(tmp_path / "run", [good(i) for i in range(100)], tier=replace(TIER, date="2026-01"))).text
    named = said.index("Limits of these figures: sample_size, duration, price_date")
    assert said.index("a million tokens cost") < named < said.index("carry the whole bill")


def test_runs_stand_by_their_load_whatever_order_they_ran_in(tmp_path):
    runs = [view(tmp_path / name, [good(i, i * gap * MS) for i in range(100)], label=name)
            for name, gap in (("middle", 80), ("low", 160), ("high", 40))]  # fmt: skip
    table = next(section.table for section in compare_runs(runs).sections if section.id == "loads")
    assert [row[0].text for row in table.rows] == ["low", "middle", "high"]
    assert [row[0].mark for row in table.rows] == ["run-1", "run-0", "run-2"], "colours are those of the pictures"


def test_an_invalid_run_says_why_and_has_no_price(tmp_path):
    said = page(view(tmp_path / "run", status="stopped", reason="the user pressed Ctrl-C")).text
    assert said.index("INVALID") < said.index("the user pressed Ctrl-C") < said.index("Latency")
    assert "proves nothing" in said
    assert "output tokens, which carry" not in said
    assert "a million tokens cost" not in said


def test_what_an_invalid_run_measured_is_folded_and_why_stands_open(tmp_path):
    rows = [*(good(i) for i in range(50)), *(bad(50 + i, detail="503: full") for i in range(60))]
    made = page(view(tmp_path / "run", rows)).html
    closed = re.search(r'<details class="folded" id="figures"><summary>(.*?)</summary>(.*?)</details>', made, re.DOTALL)
    assert closed, "and not open"
    assert "prove nothing" in closed[1]
    assert "Latency, ms" in closed[2] and made.count("<figure") == closed[2].count("<figure") > 0
    outside = made.replace(closed[0], "")
    assert outside.index("50 of 110") < outside.index("503: full") < outside.index("Failures first")
    assert "Throughput over" not in outside and 'class="keys"' not in outside
    kept = page(view(tmp_path / "valid")).html
    assert 'class="folded"' not in kept and 'class="keys"' in kept
    assert 'href="#figures"' in made and 'href="#latency"' not in made


def test_a_missed_slo_is_said_first(tmp_path):
    v = view(tmp_path / "run", [good(i) for i in range(400)], spec=replace(SPEC, slo={"ttft": 0.03}))
    assert v.state == "missed"
    assert "not a price to sell at" in v.sentence
    assert page(v).text.index("SLO missed") < page(v).text.index("Latency")


@pytest.mark.parametrize(
    ("results", "options"),
    [
        ([], {"requests": 0}),
        ([], {"requests": 5}),
        ([good(0)], {}),
        ([good(0, tokens=0, ttft_ms=0)], {}),
        ([bad(i, sent=False, error="unsent") for i in range(5)], {}),
        ([bad(i) for i in range(80)], {}),
        ([good(i, chunk_tokens=None) for i in range(80)], {}),
        ([replace(good(i), output_tokens=None, input_tokens=None) for i in range(80)], {}),
        ([good(i, itl_ms=0, ttft_ms=0) for i in range(80)], {}),
        ([good(i) for i in range(80)], {"tier": None}),
        ([good(i) for i in range(80)], {"spec": replace(SPEC, mode="closed", concurrency=4)}),
        ([good(i, 0, ttft_ms=3_000_000) for i in range(80)], {}),
    ],
    ids=["empty", "all lost", "one", "no time", "unsent", "all failed", "chunks unknown", "no usage", "zero latency",
         "no tier", "closed", "an hour"],
)  # fmt: skip
def test_every_run_has_an_honest_page(tmp_path, results, options):
    alone = page(view(tmp_path / "run", results, **options))
    both = page(view(tmp_path / "a", results, label="a", **options), view(tmp_path / "b", label="b"))
    for made in (alone, both):
        assert not re.search(r"\b(nan|inf|None|Undefined)\b", made.text)
        for chart in made.charts:
            assert all(len(line["y"]) == len(chart["x"]) for line in chart["lines"])
            assert chart["x"] == sorted(chart["x"])
        assert [int(a["data-chart"]) for t, a in made.elements if t == "figure"] == list(range(len(made.charts)))


def test_the_page_has_one_size_for_every_length_of_run(tmp_path):
    short, long = (len(page(view(tmp_path / str(n), mixed(n))).html) for n in (400, 8000))
    assert long < 1.2 * short < 400_000


def test_hostile_text_stays_text(tmp_path):
    tier = replace(TIER, name=EVIL, source=EVIL, region=EVIL, instance=EVIL)
    spec = replace(SPEC, model=EVIL, extra_body={EVIL: EVIL}, slo={"ttft": 0.2})
    rows = [good(i) for i in range(60)] + [bad(60 + i, detail=EVIL[:300]) for i in range(3)]
    options = {"tier": tier, "spec": spec, "model": EVIL, "engine_version": EVIL, "engine_args": [EVIL] * 3,
               "model_facts": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "git": EVIL, "reason": EVIL}  # fmt: skip
    clean = page(view(tmp_path / "clean", rows))
    plain_two = page(view(tmp_path / "c1", rows, label="a"), view(tmp_path / "c2", rows, label="b"))
    evil = page(view(tmp_path / "evil", rows, **options))
    two = page(view(tmp_path / "e1", rows, label=label_runs([tmp_path / "<b>&\u202e\x07"])[0], **options),
               view(tmp_path / "e2", rows, label="b"))  # fmt: skip
    assert "<script>window.hacked=1</script>" in evil.text  # as text
    assert "{{7*7}}" in evil.text
    for made, tame in ((evil, clean), (two, plain_two)):
        assert {tag for tag, _ in made.elements} <= {tag for tag, _ in tame.elements}
        assert {name for _, a in made.elements for name in a} <= {name for _, a in tame.elements for name in a}
        assert len(made.blocks["script"]) == 2
        assert not re.search("[\x00\x07\x1b\u200f\u2028\u202e]", made.html)


def test_huge_text_is_cut(tmp_path):
    huge = "A" * 1_000_000
    made = page(view(tmp_path / "run", model=huge, tier=replace(TIER, source=huge), engine_args=[huge, "x"] * 3,
                     model_facts={huge: huge}, reason=huge))  # fmt: skip
    assert len(made.html) < 400_000
    assert "(1,000,000 characters)" in made.text


@given(st.text())
def test_plain_text_has_no_control_or_direction_characters(text):
    said = plain(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", said)
    assert len(said) <= LONGEST + 30


def test_the_page_stands_alone_and_its_policy_lets_nothing_else_run(tmp_path):
    made = page(view(tmp_path / "run"))
    for tag, attributes in made.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)

    def digest(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = dict(part.strip().split(" ", 1) for part in made.policy.split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": digest(made.blocks["script"][1]), "base-uri": "'none'",
        "style-src": digest(made.blocks["style"][0]), "img-src": "data:", "form-action": "'none'",
    }  # fmt: skip
    assert "Leon Sorokin" in made.html  # the licence of what is inlined travels with it


def test_several_runs_are_compared_by_price_and_load(tmp_path):
    fast = [good(i, i * 20 * MS, ttft_ms=90 + i % 7) for i in range(700)]
    slow = [good(i, i * 80 * MS, ttft_ms=40 + i % 7) for i in range(700)]
    cheap, dear = view(tmp_path / "a", fast, label="busy"), view(tmp_path / "b", slow, label="idle")
    stopped = view(tmp_path / "c", fast, label="stopped", status="stopped")
    made = page(cheap, dear, stopped)
    assert "2 of 3 runs are VALID" in made.text
    load = next(c for c in made.charts if c["title"] == "TTFT, p99")
    assert load["x"] == pytest.approx([12.5, 50.0])
    assert load["lines"][0]["y"] == pytest.approx([0.046, 0.096], rel=0.01)
    cost = next(c for c in made.charts if c["title"] == "USD per 1M tokens against load")["lines"][0]
    assert cost["y"][0] > cost["y"][1]  # the less busy is dearer
    assert cost["low"] == cost["high"] == [None, None]  # the load was given
    spread = next(c for c in made.charts if c["title"].startswith("TTFT: share") and len(c["lines"]) == 2)
    assert [line["name"] for line in spread["lines"]] == ["busy", "idle"]
    assert "What differs" in made.text
    assert "not a fair comparison" not in made.text
    other = view(tmp_path / "d", fast, label="other", spec=replace(SLO, slo={"ttft": 9.0}))
    assert "The runs differ in SLO: " in page(cheap, other).text


def test_simulated_and_measured_runs_never_share_a_line(tmp_path):
    rows = [good(i) for i in range(400)]
    made = page(view(tmp_path / "a", rows, label="a"), view(tmp_path / "b", rows, label="b", evidence="simulated"))
    load = next(c for c in made.charts if c["title"] == "TTFT, p99")
    assert [line["name"] for line in load["lines"]] == ["m on test.large", "m on test.large, simulated"]
    assert "measured x list price, simulated x list price" in made.text
    assert "differ in evidence" in made.text


def test_run_labels_are_short_and_all_different(tmp_path):
    labels = label_runs([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / ("x" * 200), tmp_path / "\u202e"])
    assert labels[:2] == ["run", "run (2)"]
    assert len(set(labels)) == 4
    assert max(map(len, labels)) <= 64


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path):
    v = view(tmp_path / "run")
    out = tmp_path / "report.html"
    out.write_text("before")
    size = write_page(out, [v])
    assert out.stat().st_size == size
    assert out.read_text("utf-8").startswith("<!doctype html>")
    with pytest.raises(ResultsError, match="cannot write the page"):
        write_page(tmp_path / "none" / "report.html", [v])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "report.html"}


def test_command_line(tmp_path):
    one, two = (write_run(tmp_path / name, [good(i, lag_ms=1) for i in range(60)]) for name in ("one", "two"))
    out = tmp_path / "report.html"
    done = harness("report", one, two, "--html", out)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "2 runs compared" in out.read_text()
    assert "no SLO was given" in harness("report", one, two).stdout
    assert "named twice" in harness("report", one, one, "--html", out).stderr
    write_run(tmp_path / "bad", [good(0)], status="failed", reason="x")
    assert harness("report", one, tmp_path / "bad", "--html", out).returncode == 3
    assert harness("report", one, "--html", out, "--slo", "ttft=1ms").returncode == 4


def test_decisions_have_pages_of_what_they_print(tmp_path):
    one, two = (write_run(tmp_path / name, [good(i, lag_ms=1) for i in range(60)]) for name in ("one", "two"))
    for verb, runs in (("price", (one,)), ("compare", (one, two))):
        out = tmp_path / f"{verb}.html"
        done = harness(verb, *runs, "--html", out)
        assert str(out) in done.stderr
        found = Page(out.read_text())
        assert "default-src 'none'" in found.policy
        first = next(line for line in done.stdout.splitlines() if line.strip())
        assert first.strip() in found.text
        figures = set(re.findall(r"\d+\.\d+", done.stdout))
        assert figures and not {one for one in figures if one not in found.text}, "every figure is on the page"


def test_the_page_of_a_search_says_the_capacity_first(tmp_path):
    """What the system carries is the verdict; that a load beyond it broke the promise is no failure."""
    rows = {rate: [good(i, int(i * 1e9 / rate), ttft_ms=ms) for i in range(700)] for rate, ms in ((10, 50), (20, 900))}
    paths = [write_run(tmp_path / str(rate), rows[rate], spec=SLO) for rate in rows]
    for path, rate in zip(paths, rows, strict=True):
        manifest = read_manifest(path)
        write_manifest(RunDir(path), replace(manifest, plan=replace(manifest.plan, planned_rate=float(rate))))
    ladder = replace(SLO, mode="closed", concurrency=4)
    paths += [write_run(tmp_path / "ladder", rows[10], spec=ladder)]
    out = tmp_path / "report.html"
    done = harness("report", *paths, "--html", out)
    assert done.returncode == 0, done.stderr
    head = out.read_text().split("<section")[1]
    assert "m on test.large carries" in head and "not a fair comparison" not in head
    capacity = compare_runs([view_run(run, summarise(run), run.path.name) for run in map(read_run, paths[:2])])
    capacity = capacity.sections[0].table
    cells = dict(zip(capacity.heads, capacity.rows[0], strict=True))
    for figure in ("Capacity", "USD per 1M there"):
        assert re.fullmatch(r"[\d.]+ to [\d.]+", cells[figure].note), f"{figure} carries its interval under it"
    assert cells["Floor"].note is None, "the floor is that of a load which was given"


def test_the_key_figure_is_the_limit_that_is_nearest_to_breaking(tmp_path):
    """4 of 100 too slow where 5 may be is nearer than 0 where 1 may be."""
    rows = [good(i, i * 20 * MS, ttft_ms=900 if i % 25 == 0 else 50) for i in range(500)]
    v = view(tmp_path / "run", rows, spec=replace(SLO, slo={"ttft_p95": 0.5, "tpot": 1.0}))
    assert v.keys[1][0] == "kept ttft_p95 <= 500 ms"


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page; at the end nothing may have been complained about and nothing but the page been asked for."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    said, asked = [], []

    def go(*views):
        out = tmp_path / "report.html"
        write_page(out, views)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto(out.as_uri())
        # Not wait_for_function: it polls by eval, which the page's own policy forbids.
        wait_for(lambda: tab.evaluate("document.querySelectorAll('canvas').length > 0"), 120, "a chart")
        return tab

    yield go
    context.close()
    assert said == []
    assert asked and all(url.startswith(("file:", "data:,")) for url in asked), asked


def ink(tab, selector="figure"):
    """Share of the pixels of each visible chart that something was drawn on."""
    return tab.evaluate(
        """(selector) => [...document.querySelectorAll(selector + ' canvas')].map((c) => {
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          let drawn = 0;
          for (let i = 3; i < d.length; i += 4) drawn += d[i] > 0;
          return drawn / (c.width * c.height);
        })""",
        selector,
    )


def test_browser_draws_every_chart_and_asks_for_nothing(visit, tmp_path):
    v = view(tmp_path / "run")
    tab = visit(v)
    drawn = ink(tab)
    assert len(drawn) == len(page(v).charts)
    assert min(drawn) > 0.005
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1200
    tab.set_viewport_size({"width": 380, "height": 800})
    # The charts follow the window a frame later.
    narrow = "document.documentElement.scrollWidth <= 380"
    wait_for(lambda: tab.evaluate(narrow), 120, "a page as narrow as the window")
    charts = "[...document.querySelectorAll('.uplot')].every((u) => u.clientWidth <= 380)"
    wait_for(lambda: tab.evaluate(charts), 120, "charts as narrow as the window")


def test_browser_sorts_tables_by_number_with_unknown_last_and_back(visit, tmp_path):
    tab = visit(view(tmp_path / "run", [good(i, ttft_ms=30 + i % 9, lag_ms=1) for i in range(100)]))
    table = tab.locator("table", has=tab.get_by_text("Latency, ms"))

    def column(k, attribute=True):
        get = "(c) => c.dataset.sort === undefined ? null : +c.dataset.sort" if attribute else "(c) => c.innerText"
        return table.locator("tbody tr").evaluate_all(f"rows => rows.map((r) => ({get})(r.cells[{k}]))")

    def click(k):
        head = table.locator("thead th").nth(k)
        head.locator("button").first.click()
        return head.get_attribute("aria-sort")

    before = column(0, attribute=False)
    assert click(1) == "ascending"
    assert column(1) == sorted(column(1))
    assert click(1) == "descending"
    assert column(1) == sorted(column(1), reverse=True)
    assert click(1) is None
    assert column(0, attribute=False) == before
    for direction in ("ascending", "descending"):  # only itl has samples enough for p99
        assert click(5) == direction
        assert [value is None for value in column(5)] == [False] + [True] * 5
    tab.locator("#checks thead button").first.focus()
    tab.keyboard.press("Enter")  # a table sorts without a mouse
    shown = tab.locator("#checks tbody th").evaluate_all("cells => cells.map((c) => c.innerText.split('\\n')[0])")
    assert shown == sorted(shown)


def test_browser_saves_a_chart_as_csv_and_png(visit, tmp_path):
    v = view(tmp_path / "run")
    tab = visit(v)
    chart = page(v).charts[0]
    figure = tab.locator("figure").first
    figure.hover()
    saved = {}
    for kind in ("CSV", "PNG"):
        with tab.expect_download() as found:
            figure.get_by_role("button", name=f"as {kind}").click()
        assert found.value.suggested_filename.endswith(f".{kind.lower()}")
        saved[kind] = Path(found.value.path()).read_bytes()
    head, *rows = saved["CSV"].decode().splitlines()
    assert len(rows) == len(chart["x"])
    assert float(rows[0].split(",")[0]) == chart["x"][0]
    assert head.count('","') + 1 == len(rows[0].split(","))
    assert saved["PNG"].startswith(b"\x89PNG")


def test_the_trade_off_is_per_accelerator_and_user(tmp_path):
    spec = replace(SLO, slo={"tpot_p95": 0.05})
    paths = [write_run(tmp_path / n, [good(i, i * 20 * MS) for i in range(300)], spec=spec) for n in ("a", "b")]
    runs = [summarise(read_run(path)) for path in paths]
    eight = replace(runs[1], tier=replace(runs[1].tier, accelerator="H100", accelerator_count=8))
    rate = runs[0].rates.output_token_throughput.value
    assert per_accelerator(runs[0]).value == pytest.approx(rate), "no accelerator: per server"
    assert per_accelerator(eight).value == pytest.approx(rate / 8)
    assert interactivity(runs[0]) == pytest.approx(100), "a token each 10 ms"
    charts = tradeoff_charts({"a": runs}, [], by_rate=True)
    assert [c.x_label for c in charts] == ["interactivity", "interactivity", "load"]
    assert [(m.at, m.label) for m in charts[0].marks] == [(20, "SLO")], "of p95, as the points are"
    unlike = tradeoff_charts({"a": [runs[0], summarise(read_run(paths[1]), slo={"tpot_p90": 0.05})]}, [], by_rate=True)
    assert unlike[0].marks == [], "two promises, no mark"
    assert charts[0].title == "Output tokens/s per server"


def test_browser_switches_light_and_dark_and_redraws(visit, tmp_path):
    tab = visit(view(tmp_path / "run"))
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(paper)
    tab.locator("#theme").click()
    dark = tab.evaluate(paper)
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    assert min(ink(tab)) > 0.005
    tab.locator("#theme").click()
    assert tab.evaluate(paper) == light


def test_browser_zooms_all_of_the_timeline_together(visit, tmp_path):
    tab = visit(view(tmp_path / "run"))
    stack = tab.locator(".stack")
    stack.scroll_into_view_if_needed()
    last = "() => document.querySelector('.stack figure:last-child canvas').toDataURL()"
    whole = tab.evaluate(last)
    box = stack.locator(".u-over").first.bounding_box()
    y = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + 100, y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 300, y, steps=5)
    tab.mouse.up()
    wait_for(lambda: tab.evaluate(f"(before) => ({last})() !== before", whole), 120, "another range")


def test_browser_draws_each_run_when_it_is_opened_and_all_on_paper(visit, tmp_path):
    tab = visit(view(tmp_path / "a", label="a"), view(tmp_path / "b", label="b"))
    closed = len(ink(tab))
    tab.locator("details.run summary").first.click()
    wait_for(lambda: tab.evaluate(f"document.querySelectorAll('canvas').length > {closed}"), 120, "the closed charts")
    assert min(ink(tab, "details[open] figure")) > 0.005
    assert len(tab.pdf()) > 20_000
    assert tab.locator("details[open]").count() == 1  # as it was before printing


def test_no_column_is_lost_on_paper(visit, tmp_path):
    names = [f"00{k}-smollm2-135m-int8-aws-m7a.large-rate1.1-r{k}" for k in range(3)]
    tab = visit(*(view(tmp_path / name, label=name) for name in names))
    tab.set_viewport_size({"width": 720, "height": 1000})
    tab.emulate_media(media="print")
    widest = "Math.max(...[...document.querySelectorAll('.scroll table')].map((t) => t.offsetWidth))"
    wait_for(lambda: 0 < tab.evaluate(widest) <= 720, 120, "tables as wide as the paper")


BEYOND = """() => [...document.querySelectorAll('td, tbody th, dd')].filter((cell) => {
  const words = document.createRange();
  words.selectNodeContents(cell);
  const box = words.getBoundingClientRect(), own = cell.getBoundingClientRect();
  return box.width && (box.right > innerWidth || box.left < 0 || box.right > own.right + 1 || box.left < own.left - 1);
}).map((cell) => cell.textContent)"""


@pytest.mark.parametrize("width", [375, 1280])
def test_no_figure_lies_beyond_the_screen_or_its_cell(visit, tmp_path, width):
    """Nothing has to be scrolled sideways, and why there is no price is said once, where there is room for it."""
    runs = [view(tmp_path / name, label=name, **options) for name, options in (
        ("priced", {}), ("no-tier", {"tier": None}), ("stopped", {"status": "stopped"}),
        ("slow", {"results": [good(i, ttft_ms=900) for i in range(400)]}),
    )]  # fmt: skip
    tab = visit(*runs)
    tab.set_viewport_size({"width": width, "height": 900})
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.evaluate(BEYOND) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter((box) => box.scrollWidth > box.clientWidth + 1).length"
    assert tab.evaluate(wide) == 0
    row = tab.locator("tbody tr", has_text="no-tier").first
    assert row.inner_text().count("say which hardware this ran on") == 1
    assert "say which hardware" in row.locator("th").inner_text(), "beside the verdict, not in a column of prices"


def test_a_table_of_many_columns_fits_a_screen(browser, tmp_path):
    """That of plan-fleet has 13, and its prices stand last."""
    heads = ["Model and tier", *("Replicas + spares" for _ in range(8)), *("USD per 1M served" for _ in range(4))]
    rows = [["Qwen/Qwen3-0.6B on aws-p5.48xlarge", *["1,234.56 (1,100.12 to 1,301.34)"] * 12]]
    out = tmp_path / "fleet.html"
    write_sections_page(out, "plan-fleet", [Section(title="Fleet"), Section(table=Table(heads, rows))], "now")
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(out.as_uri())
    assert tab.evaluate(BEYOND) == []
    tab.close()


def test_browser_runs_nothing_that_a_server_wrote(visit, tmp_path):
    rows = [good(i) for i in range(60)] + [bad(60 + i, detail=EVIL[:300]) for i in range(3)]
    options = {"model": EVIL, "tier": replace(TIER, name=EVIL), "versions": {EVIL: EVIL}, "engine_args": [EVIL]}
    tab = visit(view(tmp_path / "a", rows, label=EVIL, **options), view(tmp_path / "b", rows, label="b", **options))
    tab.locator("details.run summary").first.click()
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("img").count() == 0


def test_the_limit_of_a_percentile_is_drawn(tmp_path):
    options = {"spec": replace(SPEC, slo={"ttft_p95": 0.2, "tpot": 0.1})}
    slow = [good(k, k * 50 * MS, ttft_ms=60) for k in range(400)]
    one, two = view(tmp_path / "a", label="a", **options), view(tmp_path / "b", slow, label="b", **options)
    marked = {c.title: [(m.axis, m.at, m.label) for m in c.marks] for c in charts_of(one, "latency", "time")}
    assert marked["TTFT: share of successful requests within"] == [("x", 0.2, "SLO p95")]
    assert marked["TTFT"] == [("y", 0.2, "SLO p95")]
    assert marked["ITL"] == []
    against = {c.title: [m.label for m in c.marks] for c in charts_of(compare_runs([one, two]), "latency-load")}
    assert against["TTFT, median"] == []
    assert [labels for title, labels in against.items() if title.startswith("TTFT, p")] == [["SLO p95"]]


@pytest.mark.parametrize(
    ("slo", "drawn", "over_time_name"),
    [
        ({"ttft_p95": 0.2}, "TTFT, p95", "p95 (largest of fewer than 20)"),
        ({"ttft_p99": 0.2}, "TTFT, p99", "p99 (largest of fewer than 100)"),
        ({"ttft": 0.2}, "TTFT, p99", "p99 (largest of fewer than 100)"),
        ({"tpot": 0.2}, "TTFT, p99", "p99 (largest of fewer than 100)"),
    ],
)
def test_under_a_limit_stands_the_percentile_that_it_is_promised_of(tmp_path, slo, drawn, over_time_name):
    """99 % of requests are to keep a limit that names no percentile."""
    runs = [view(tmp_path / str(k), mixed(400 + k), label=str(k), spec=replace(SPEC, slo=slo)) for k in range(2)]
    chart = next(c for c in charts_of(compare_runs(runs), "latency-load") if c.title.startswith("TTFT, p"))
    share = over_time_name.split()[0]
    assert chart.title == drawn
    assert [m.label for m in chart.marks] == ([] if "tpot" in slo else [f"SLO {share}"])
    timeline = next(c for c in charts_of(runs[0], "time") if c.title == "TTFT")
    assert [line.name for line in timeline.lines] == ["median", over_time_name]
    assert [m.label for m in timeline.marks] == ([] if "tpot" in slo else [f"SLO {share}"])


def test_closed_and_open_loops_are_no_points_of_one_line(tmp_path):
    closed = replace(SLO, mode="closed", concurrency=4)
    views = [
        view(tmp_path / "a", [good(i) for i in range(400)], label="a"),
        view(tmp_path / "b", [good(i, i * 60 * MS) for i in range(400)], label="b", spec=closed),
    ]
    made = compare_runs(views)
    for chart in charts_of(made, "latency-load"):
        assert [line.name for line in chart.lines] == ["m on test.large, open loop", "m on test.large, closed loop"]


def test_repeats_of_one_load_all_have_a_point(tmp_path):
    runs = [view(tmp_path / str(k), [good(i, ttft_ms=40 + 10 * k) for i in range(400)], label=str(k)) for k in range(3)]
    chart = next(c for c in charts_of(compare_runs(runs), "latency-load") if c.title == "TTFT, median")
    assert chart.x == pytest.approx([10.0] * 3)
    assert chart.lines[0].y == pytest.approx([0.04, 0.05, 0.06])


def test_of_two_equal_runs_both_are_seen(visit, tmp_path):
    """One lies on the other, point by point: the colour of both is drawn."""
    rows = [good(i, ttft_ms=50 + i % 9) for i in range(400)]
    tab = visit(*(view(tmp_path / name, rows, label=name, model=name) for name in "ab"))
    seen = tab.evaluate(
        """() => {
          const figure = [...document.querySelectorAll('figure')].find((f) => f.textContent.includes('TTFT, median'));
          const canvas = figure.querySelector('canvas'), probe = document.createElement('span');
          document.body.append(probe);
          const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          return [0, 1].map((k) => {
            probe.style.color = `var(--c${k})`;
            const [r, g, b] = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            let n = 0;
            for (let i = 0; i < d.length; i += 4)
              n += d[i + 3] > 200 && Math.abs(d[i] - r) + Math.abs(d[i + 1] - g) + Math.abs(d[i + 2] - b) < 30;
            return n;
          });
        }"""
    )
    assert min(seen) > 20, seen


def test_a_few_odd_short_gaps_do_not_fill_a_picture(tmp_path):
    rows = [good(k, k * 50 * MS, itl_ms=10, tokens=100) for k in range(60)]
    rows[0].chunk_ns = [t if i != 50 else rows[0].chunk_ns[49] + 2000 for i, t in enumerate(rows[0].chunk_ns)]
    v = view(tmp_path / "a", rows)
    itl = [c for c in charts_of(v, "latency") if c.title.startswith("ITL:")]
    assert [min(c.x) > 0.005 for c in itl] == [True]
