"""Whatever a run directory holds: an honest table with nulls and reasons, in every format, or one clear error.

Never 0 for what was not measured, never NaN or infinity, never a traceback.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from run_files import MS, SPEC, TIER, S, bad, good, watch, write_run

from harness.analysis.report.page import render_page
from harness.analysis.report.run import render_json, render_markdown, render_text
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import read_run
from harness.analysis.summary import exit_code, summarise
from harness.errors import EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_VALID, HarnessError
from harness.record.host import Host
from harness.record.manifest import MANIFEST, Replica, RunDir, Worker
from harness.record.results import SCHEMA
from harness.record.samples import SERVER_SCHEMA

SLO = replace(SPEC, slo={"ttft": 0.2, "tpot": 0.1})
NOT_A_NUMBER = re.compile(r"(?<![a-z])[-+]?(nan|inf|infinity)(?![a-z])", re.IGNORECASE)


def shown(path):
    """The run in every format, checked for what must never be in any."""
    run = read_run(path)
    s = summarise(run)
    out = io.StringIO()
    render_text(s, Console(file=out, width=100, highlight=False))
    page = render_page([view_run(run, s, "x")])
    compared = render_page([view_run(run, s, "x"), view_run(run, s, "y")])
    written = {"text": out.getvalue(), "md": render_markdown(s), "json": render_json(s)}
    written |= {"html": re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page + compared, flags=re.DOTALL)}
    for name, text in written.items():
        assert not NOT_A_NUMBER.search(text), (name, NOT_A_NUMBER.search(text))
        assert "Traceback" not in text and "None" not in text.replace("None of", ""), name
    tree = json.loads(written["json"], parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    for quantity in quantities(tree):
        if quantity["value"] is None:
            assert quantity["note"], quantity
            assert quantity["low"] is None and quantity["high"] is None
    return s, written


def quantities(tree):
    if isinstance(tree, dict):
        if {"value", "low", "high", "n"} <= set(tree):
            yield tree
        for value in tree.values():
            yield from quantities(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from quantities(value)


def unmeasured(s):
    """Every latency and token rate, which a run without answers cannot have."""
    m, r = s.metrics, s.rates
    latencies = [q for d in (m.ttft, m.service_ttft, m.tpot, m.itl, m.e2e) for q in (d.mean, d.p50, d.p99)]
    return [*latencies, r.input_token_throughput, r.output_token_throughput, r.total_token_throughput,
            s.cost.usd_per_1m_total, s.cost.usd_per_1m_output_only]  # fmt: skip


@pytest.mark.parametrize(
    "results",
    [[], [bad(0)], [bad(i, e) for i, e in enumerate(("connect", "server", "timeout", "stall", "cut") * 8)],
     [bad(i, "unsent", sent=False) for i in range(5)], [bad(i, "cancelled") for i in range(5)]],
    ids=["no rows", "one failure", "all failed", "nothing sent", "all cancelled"],
)  # fmt: skip
def test_a_run_without_an_answer_has_no_latency_no_tokens_and_no_price(tmp_path, results):
    s, _ = shown(write_run(tmp_path / "run", results, requests=40, spec=SLO))
    assert s.verdict == "INVALID"
    assert [q.value for q in unmeasured(s)] == [None] * len(unmeasured(s))
    assert s.tokens.input is None and s.tokens.output is None
    assert s.cost.reason


def test_an_empty_plan_is_a_report_too(tmp_path):
    s, _ = shown(write_run(tmp_path / "run", [], requests=0, spec=SLO))
    assert s.requests.planned == 0
    assert s.slo.attainment.value is None


@pytest.mark.parametrize("row", [good(0), good(0, tokens=1), good(0, tokens=0), good(0, chunk_tokens=None)])
def test_one_request(tmp_path, row):
    s, _ = shown(write_run(tmp_path / "run", [row], spec=SLO))
    assert s.metrics.e2e.mean.n == 1 and s.metrics.e2e.mean.low is None
    assert s.metrics.e2e.p50.value is None and "needs 5" in s.metrics.e2e.p50.note
    assert s.requests.succeeded == 1
    assert s.verdict == "VALID" and s.cost.usd_per_1m_total.value is None, "no price without an interval"
    assert "a price needs 5 requests" in s.cost.reason or "no tokens" in s.cost.usd_per_1m_total.note


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_run_cut_short(tmp_path, keep):
    path = write_run(tmp_path / "run", [good(i) for i in range(300)], workers=2, spec=SLO, status="running")
    for file in path.glob("results-*.arrows"):
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])
    s, _ = shown(path)
    assert s.verdict == "INVALID"
    assert s.requests.lost + s.requests.succeeded == 300
    assert s.cost.usd_per_1m_total.value is None


def test_rows_of_another_schema_version_are_not_mixed_in(tmp_path):
    """One worker's file of version 1, one that says 3 but has other columns, one that is right."""
    path = write_run(tmp_path / "run", [good(i) for i in range(30)], workers=3, spec=SLO)
    run = RunDir(path)
    rewrite(run.results(0), SCHEMA.with_metadata({"harness.results": "1"}))
    rewrite(run.results(1), pa.schema(list(SCHEMA)[:-1], metadata=SCHEMA.metadata))
    s, written = shown(path)
    assert (s.verdict, s.requests.succeeded, s.requests.lost) == ("INVALID", 10, 20)
    assert "result schema 1, this harness reads 3" in written["md"]
    assert "results-1.arrows: the columns are not those" in written["md"]


def rewrite(file, schema):
    with pa.OSFile(str(file), "rb") as source:
        table = pa.ipc.open_stream(source).read_all()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(table.select(schema.names).replace_schema_metadata(schema.metadata))


def test_batches_after_a_damaged_one_are_left_out_and_said(tmp_path):
    path = write_run(tmp_path / "run", [good(i) for i in range(10)], spec=SLO)
    file = path / "results-0.arrows"
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=6)
    data = bytearray(file.read_bytes())
    ends = np.arange(0, 17, 4, dtype=np.int32).tobytes()  # where lists begin and end: gaps, tokens, of two batches
    at = [found.start() for found in re.finditer(re.escape(ends), bytes(data))][2]
    data[at + 8 : at + 12] = np.int32(2**20).tobytes()
    file.write_bytes(data)
    s, written = shown(path)
    assert (s.requests.succeeded, s.requests.lost) == (6, 4)
    assert "6 rows before it are used" in written["text"].replace("\n", " ")


@pytest.mark.parametrize(
    "change",
    [{"sent_ns": 2**62, "finished_ns": 2**62 + S}, {"finished_ns": 2**63 - 1}, {"sent_ns": -(2**62)},
     {"scheduled_ns": -1}, {"scheduled_ns": 2**61, "sent_ns": 2**61, "finished_ns": 2**61 + S},
     {"finished_ns": 5 * MS}],
    ids=["sent in 146 years", "ends never", "sent before the start", "due before the start", "due in 73 years",
         "clock went back"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["open", "closed"])
def test_a_clock_that_steps(tmp_path, change, mode):
    """A stamp that cannot be is no evidence; the other rows are still shown, and nothing grows with the size of it."""
    rows = [good(i, chunk_tokens=None) for i in range(60)]
    for name, value in change.items():
        setattr(rows[7], name, value)
    rows[7].chunk_ns = []
    s, _ = shown(write_run(tmp_path / "run", rows, spec=replace(SLO, mode=mode, concurrency=4)))
    assert s.verdict == "INVALID"
    assert any("1 impossible" in reason for reason in s.reasons)
    assert s.window.duration_s < 10
    assert s.metrics.ttft.p50.value == pytest.approx(0.05)


def test_gaps_that_overflow_are_no_evidence(tmp_path):
    """Two gaps of 2**62 ns add up to a negative number."""
    path = write_run(tmp_path / "run", [good(i) for i in range(10)], spec=SLO)
    table = pa.ipc.open_stream((path / "results-0.arrows").read_bytes()).read_all()
    gaps = table.column("chunk_gap_ns").to_pylist()
    gaps[3] = [2**62] * 4
    table = table.set_column(SCHEMA.get_field_index("chunk_gap_ns"), SCHEMA.field("chunk_gap_ns"), pa.array([*gaps]))
    with pa.OSFile(str(path / "results-0.arrows"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(table.cast(SCHEMA))
    s, _ = shown(path)
    assert (s.requests.succeeded, s.requests.lost) == (9, 1)


def test_no_usage_means_no_token_figures(tmp_path):
    rows = [good(i) for i in range(100)]
    for row in rows:
        row.input_tokens = row.output_tokens = None
    s, written = shown(write_run(tmp_path / "run", rows, spec=SLO))
    assert s.tokens.input is None and s.tokens.output is None and s.tokens.cached_input is None
    for q in (s.rates.output_token_throughput, s.metrics.tpot.mean, s.cost.usd_per_1m_total):
        assert q.value is None
    assert "usage" in written["text"]
    assert s.metrics.ttft.p50.value == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("limits", "ttft_ms", "met", "goodput"),
    [
        ({"ttft": 1.0, "tpot": 0.1}, 50, None, False),
        ({"ttft_p50": 0.01, "tpot": 0.1}, 50, False, False),  # enough is known to say that it was missed
        ({"ttft": 1.0}, 50, True, True),
        ({"e2e": 0.01}, 50, False, True),
    ],
)
def test_a_limit_on_what_was_not_measured_is_not_judged(tmp_path, limits, ttft_ms, met, goodput):
    """Without usage nobody knows a time per token: neither kept nor missed, and no goodput of 0."""
    rows = [good(i, ttft_ms=ttft_ms) for i in range(100)]
    for row in rows:
        row.input_tokens = row.output_tokens = None
    s, written = shown(write_run(tmp_path / "run", rows, spec=replace(SPEC, slo=limits)))
    assert s.slo is not None
    assert s.slo.met is met
    assert (s.rates.goodput.value is not None) is goodput
    assert (s.slo.attainment.value is not None) is goodput
    assert exit_code(s) == {True: EXIT_VALID, False: EXIT_SLO_MISSED, None: EXIT_NOT_DECIDED}[met]
    unknown = "usage missing on 100 of 100 requests"
    for name in ("md", "html"):
        assert (f"tpot is not known: {unknown}" in " ".join(written[name].split())) is not goodput
    assert ("SLO not judged" in " ".join(written["text"].split())) is not goodput


@pytest.mark.parametrize(
    ("tier", "words"),
    [(None, "no tier"), (replace(TIER, usd_per_hour=0.0), "no positive price"),
     (replace(TIER, usd_per_hour=-1.0), "no positive price"),
     (replace(TIER, memory_gib=0.0, vcpu=0, date=""), None), (replace(TIER, date="yesterday"), None)],
    ids=["no tier", "price of 0", "negative price", "no hardware", "no date"],
)  # fmt: skip
def test_a_missing_price(tmp_path, tier, words):
    rows = [good(i) for i in range(100)]
    s, written = shown(write_run(tmp_path / "run", rows, tier=tier, load_shares_server_host=True, spec=SLO))
    assert s.verdict == "VALID"
    if words is not None:
        assert words in s.cost.reason
        assert s.cost.usd_per_1m_total.value is None
        assert words in written["html"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_in_what_servers_and_workers_say(tmp_path, value):
    rows = [good(i) for i in range(100)]
    seen = [replace(o, cpu_share=value, in_flight=value) for o in watch(rows)]
    path = write_run(tmp_path / "run", rows, seen=seen, spec=SLO)
    columns = {f.name: pa.array([value] * 9 if f.type == pa.float64() else [k * S for k in range(9)], f.type)
               for f in SERVER_SCHEMA}  # fmt: skip
    with (
        pa.OSFile(str(path / "server-metrics-0.arrows"), "wb") as sink,
        pa.ipc.new_stream(sink, SERVER_SCHEMA) as writer,
    ):
        writer.write_table(pa.table(columns, schema=SERVER_SCHEMA))
    s, _ = shown(path)
    assert s.metrics.ttft.p50.value == pytest.approx(0.05)


def test_manifests_with_nothing_in_them(tmp_path):
    s, _ = shown(
        write_run(
            tmp_path / "run", [good(i) for i in range(60)], spec=SLO, workers=1, replicas=[], tier=None, created="",
            host=Host(cpu="", cores=0, memory_gib=0.0, os=""), model="", engine="url",
        )
    )  # fmt: skip
    assert s.requests.succeeded == 60


@pytest.mark.parametrize("number", ["NaN", "1e999", "-1e999", '"a"', "[]"])
def test_a_manifest_with_numbers_that_are_none_is_one_error(tmp_path, number):
    path = write_run(tmp_path / "run", [good(0)])
    text = (path / MANIFEST).read_text()
    assert '"usd_per_hour": 3.6' in text
    (path / MANIFEST).write_text(text.replace('"usd_per_hour": 3.6', f'"usd_per_hour": {number}'))
    try:
        shown(path)
    except HarnessError as e:
        assert MANIFEST in str(e)
        assert "\n" not in str(e)


def test_counters_of_workers_and_servers_that_make_no_sense(tmp_path):
    before, after = {"vllm:prompt_tokens_total": 1e308}, {"vllm:prompt_tokens_total": -1e308}
    s, _ = shown(
        write_run(
            tmp_path / "run", [good(i) for i in range(60)], spec=SLO,
            workers=1, replicas=[Replica(index=0, base_url="", counters_before=before, counters_after=after)],
        )
    )  # fmt: skip
    assert s.verdict == "INVALID"
    path = write_run(tmp_path / "two", [good(i) for i in range(60)], spec=SLO)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["workers"] = msgspec.to_builtins([Worker(index=0, cpu_share=-1.0, loop_lag_p99_s=1e300)])
    (path / MANIFEST).write_text(json.dumps(manifest))
    shown(path)


def test_dummy_weights_are_said_first_everywhere(tmp_path):
    facts = {"source": "dummy", "weights": "dummy weights: speed only"}
    s, written = shown(write_run(tmp_path / "run", [good(i) for i in range(60)], model_facts=facts, spec=SLO))
    assert s.assumptions[0] == s.caution
    for name in ("text", "md", "html"):
        text = " ".join(re.sub(r"<[^>]+>|[*]", " ", written[name]).replace("&#39;", "'").split())
        said = text.index("Dummy weights: the model's answers are meaningless")
        assert said < text.index("Latency"), name
        assert text.index("VALID") < said
    real, written = shown(write_run(tmp_path / "real", [good(0)], model_facts={"weights": "SmolLM2, sha256 ..."}))
    assert real.caution is None
    assert "Dummy" not in "".join(written.values())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_rows_at_all(tmp_path_factory, data):
    """Rows of arbitrary numbers in every column: a report, never an error."""
    big = st.sampled_from([2**31, 2**53, 2**62, -(2**62)])
    times, counts = st.one_of(st.integers(-5, 10**10), big), st.one_of(st.integers(-5, 5), st.just(2**31 - 1))
    rows = []
    for i in range(data.draw(st.integers(0, 12))):
        row = good(i)
        for name in data.draw(st.sets(st.sampled_from(["sent_ns", "finished_ns", "input_tokens", "output_tokens",
                                                       "cached_tokens"]))):  # fmt: skip
            setattr(row, name, data.draw(st.one_of(st.none(), times if name.endswith("_ns") else counts)))
        if row.sent_ns is None:
            row.chunk_ns, row.chunk_tokens = [], None
        else:
            steps = data.draw(st.lists(st.integers(-10, 2**40), max_size=4))
            row.chunk_ns = [int(t) for t in row.sent_ns // 2 + np.cumsum([0, *steps])]
            row.chunk_tokens = data.draw(
                st.one_of(st.none(), st.just([data.draw(st.integers(-1, 3))] * (len(steps) + 1)))
            )
        row.error = data.draw(st.sampled_from([None, "server", "never heard of"]))
        rows.append(row)
    mode = data.draw(st.sampled_from(["open", "closed"]))
    path = tmp_path_factory.mktemp("runs") / "run"
    shown(write_run(path, rows, requests=15, spec=replace(SLO, mode=mode, concurrency=2)))
