"""Constructed stamps give exact metrics; damaged runs give honest tables."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_files import MS, SPEC, S, bad, good, write_run

from harness.analysis import metrics
from harness.analysis.rows.itl_histogram import Gaps, chunk_output_tokens
from harness.analysis.rows.read import read_run
from harness.analysis.summary import exit_code, summarise
from harness.errors import EXIT_INVALID, EXIT_SLO_MISSED, EXIT_VALID, PlanError, ResultsError, UsageError
from harness.record.manifest import RunDir
from harness.record.results import ERRORS, Result


def run_of(tmp_path, results, **options):
    return read_run(write_run(tmp_path / "run", results, **options))


def pooled(rows):
    """The gaps between tokens, without the chunks that end none."""
    gaps = metrics.itl(rows)
    some = gaps.tokens > 0
    return Gaps(seconds=gaps.seconds[some], tokens=gaps.tokens[some])


# ------------------------------------------------------------------------------------------------------- per request


def test_one_request_by_hand(tmp_path):
    """Due at 1 s, sent 20 ms late, chunks 50, 60, 70, 80 ms after sending, finished with the last."""
    rows = run_of(tmp_path, [good(0, 1 * S, lag_ms=20)]).whole()
    assert metrics.lag(rows) == pytest.approx([0.020])
    assert metrics.service_ttft(rows) == pytest.approx([0.050])
    assert metrics.ttft(rows) == pytest.approx([0.070])
    assert metrics.tpot(rows) == pytest.approx([0.010])
    assert metrics.e2e(rows) == pytest.approx([0.100])
    assert metrics.service_e2e(rows) == pytest.approx([0.080])
    gaps = pooled(rows)
    assert gaps.seconds == pytest.approx([0.010] * 3)
    assert gaps.tokens == pytest.approx([1] * 3)


def test_a_late_generator_shows_in_ttft_and_not_in_service_ttft(tmp_path):
    s = summarise(run_of(tmp_path, [good(i, lag_ms=20 * i) for i in range(5)]))
    assert s.metrics.service_ttft.mean.value == pytest.approx(0.050)
    assert s.metrics.ttft.mean.value == pytest.approx(0.050 + 0.040)


def test_a_chunk_of_k_tokens_is_k_samples_of_its_share(tmp_path):
    """Chunks of 2, 3 and 1 tokens at 50, 80 and 90 ms: 3 samples of 10 ms, 1 of 10 ms; the first chunk is ttft."""
    row = good(0, 0, tokens=3)
    row.chunk_ns, row.chunk_tokens, row.output_tokens = [50 * MS, 80 * MS, 90 * MS], [2, 3, 1], 6
    row.finished_ns = 90 * MS
    rows = run_of(tmp_path, [row]).whole()
    gaps = pooled(rows)
    assert gaps.seconds == pytest.approx([0.010, 0.010])
    assert gaps.tokens == pytest.approx([3, 1])
    assert (gaps.seconds * gaps.tokens).sum() == pytest.approx(0.040)  # last chunk - first chunk
    assert metrics.tpot(rows) == pytest.approx([0.040 / 4]), "the two of the first chunk came before"
    assert summarise(run_of(tmp_path / "again", [row])).metrics.itl.mean.n == 4


@pytest.mark.parametrize("tokens", [None, [1, 0, 2]])
def test_unknown_tokens_per_chunk_are_one_sample_each_and_said(tmp_path, tokens):
    row = good(0, tokens=3, chunk_tokens=tokens)
    run = run_of(tmp_path, [row])
    gaps = pooled(run.whole())
    assert (len(gaps.seconds), metrics.untold(run.rows)) == (2, 1)
    assert any("one sample per chunk" in a for a in summarise(run).assumptions)


@pytest.mark.parametrize(
    ("stamps_ms", "per_chunk", "usage", "reasoning", "tpot_ms"),
    [
        ([50, 60], [5, 1], 6, None, 10),  # five tokens in the first event, then one
        ([50, 60], None, 6, None, None),  # the same, and the server does not say
        ([50 + 10 * k for k in range(20)], None, 21, None, 9.5),  # one may be in any chunk: 5 % at most
        ([50 + 10 * k for k in range(20)], None, 24, None, None),
        ([50 + 10 * k for k in range(6)], None, 24, 18, None),  # reasoning that was not streamed
        ([50 + 10 * k for k in range(20)], None, 21, 1, None),
        ([50 + 10 * k for k in range(24)], [1] * 24, 24, 12, 10),  # streamed: each chunk is a token
        ([50 + 10 * k for k in range(6)], [19, *[1] * 5], 24, 18, 10),  # told with each chunk, by usage so far
        ([50 + 10 * k for k in range(24)], None, 12, None, 230 / 11),  # chunks of less than a token
    ],
)
def test_tpot_counts_the_tokens_that_came_between(tmp_path, stamps_ms, per_chunk, usage, reasoning, tpot_ms):
    row = good(0, 0, tokens=1)
    row.chunk_ns, row.chunk_tokens = [at * MS for at in stamps_ms], per_chunk
    row.output_tokens, row.reasoning_tokens, row.finished_ns = usage, reasoning, stamps_ms[-1] * MS
    run = run_of(tmp_path, [row] * 1)
    (got,) = metrics.tpot(run.rows)
    assert (None if np.isnan(got) else got * 1e3) == (None if tpot_ms is None else pytest.approx(tpot_ms))
    assert metrics.unknown(run.rows, "tpot") == (tpot_ms is None)
    judged = summarise(run, slo={"tpot": 0.0105}).slo
    assert judged.met is (None if tpot_ms is None else tpot_ms < 10.5)
    assert (judged.attainment.value is None) is (tpot_ms is None)


def test_metrics_that_do_not_exist_are_null(tmp_path):
    one_token, one_chunk, silent, no_usage = (good(i) for i in range(4))
    one_token.chunk_ns, one_token.chunk_tokens, one_token.output_tokens = one_token.chunk_ns[:1], [1], 1
    one_chunk.chunk_ns, one_chunk.chunk_tokens = one_chunk.chunk_ns[:1], [4]
    silent.chunk_ns, silent.chunk_tokens, silent.output_tokens = [], None, 0
    no_usage.output_tokens = None
    rows = run_of(tmp_path, [one_token, one_chunk, silent, no_usage]).whole()
    assert np.isnan(metrics.tpot(rows)).all()
    assert np.isnan(metrics.ttft(rows)).tolist() == [False, False, True, False]
    assert np.isfinite(metrics.e2e(rows)).all()


def test_failures_have_lag_but_no_latency(tmp_path):
    rows = run_of(tmp_path, [bad(0, chunks_ms=(10, 20)), bad(1, "unsent", sent=False)]).whole()
    for metric in (metrics.ttft, metrics.service_ttft, metrics.tpot, metrics.e2e, metrics.service_e2e):
        assert np.isnan(metric(rows)).all()
    assert metrics.lag(rows)[0] == 0.0
    assert np.isnan(metrics.lag(rows)[1])
    assert len(pooled(rows).seconds) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10 * S), st.integers(0, S),
            st.lists(st.tuples(st.integers(0, S), st.integers(1, 4)), min_size=2, max_size=8),
        ),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_gaps_and_tokens_add_up(drawn):
    """For any stamps: itl samples of a run add up to the decode time, token events to the tokens."""
    results = []
    for i, (due, lag, chunks) in enumerate(drawn):
        row = good(i, due)
        row.sent_ns = due + lag
        row.chunk_ns = [row.sent_ns + int(t) for t in np.cumsum([gap for gap, _ in chunks])]
        row.chunk_tokens = [k for _, k in chunks]
        row.output_tokens, row.finished_ns = sum(row.chunk_tokens), row.chunk_ns[-1]
        results.append(row)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_of(Path(folder), results).whole()
    gaps = pooled(rows)
    clumped = metrics.clumped(rows)  # as gaps of the transport alone are drawn, too
    decode = [(r.chunk_ns[-1] - r.chunk_ns[0]) / 1e9 for r, clump in zip(results, clumped, strict=True) if not clump]
    assert (gaps.seconds * gaps.tokens).sum() == pytest.approx(sum(decode), abs=1e-6)
    assert np.nansum(metrics.tpot(rows) * (rows.output_tokens - rows.first_tokens)) == pytest.approx(
        sum(decode), abs=1e-6
    )
    times, tokens = rows.chunk_s, chunk_output_tokens(rows)
    assert tokens.sum() == pytest.approx(sum(r.output_tokens for r in results))
    within = metrics.window(rows)
    if within is not None:
        assert within.start_s <= times.min() + 1e-9 and times.max() <= within.end_s + 1e-9
        assert metrics.binned(times, tokens, within).sum() == pytest.approx(tokens.sum())
        held = metrics.in_flight(rows, within).mean() * within.duration_s
        assert held == pytest.approx(metrics.service_e2e(rows).sum(), abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- rates


def test_rates_share_one_window(tmp_path):
    """Ten requests each 0.1 s apart, of 80 ms: 0 to 0.98 s."""
    s = summarise(run_of(tmp_path, [good(i) for i in range(10)]))
    r = s.rates
    assert (s.window.start_s, s.window.end_s) == (0.0, pytest.approx(0.98))
    assert r.request_rate.value == pytest.approx(10.0)
    assert r.request_throughput.value == pytest.approx(10 / 0.98)
    assert r.input_token_throughput.value == pytest.approx(80 / 0.98)
    assert r.output_token_throughput.value == pytest.approx(40 / 0.98)
    assert r.total_token_throughput.value == pytest.approx(120 / 0.98)
    assert r.concurrency.value == pytest.approx(10 * 0.08 / 0.98)
    assert r.goodput.value is None


def test_a_failed_request_lengthens_the_window_and_its_tokens_are_not_sold(tmp_path):
    failed = bad(4, "timeout", scheduled_ns=400 * MS, chunks_ms=(10, 20), took_ms=1600)
    failed.chunk_tokens = [1, 1]
    s = summarise(run_of(tmp_path, [*(good(i) for i in range(4)), failed]))
    assert s.window.duration_s == pytest.approx(2.0)
    assert s.rates.output_token_throughput.value == pytest.approx(16 / 2.0)
    assert (s.tokens.output, s.tokens.wasted_output) == (16, 2)
    assert s.rates.concurrency.value == pytest.approx((4 * 0.08 + 1.6) / 2.0)


def test_wasted_tokens_of_unknown_number_are_null(tmp_path):
    s = summarise(run_of(tmp_path, [good(0), bad(1, "cut", chunks_ms=(10, 20))]))
    assert s.tokens.wasted_output is None
    assert any("unknown length" in a for a in s.assumptions)


def test_usage_missing_means_no_token_rate_and_no_price(tmp_path):
    rows = [good(i) for i in range(10)]
    rows[3].output_tokens = None
    s = summarise(run_of(tmp_path, rows))
    assert s.rates.output_token_throughput.value is None
    assert s.rates.total_token_throughput.value is None
    assert s.cost.usd_per_1m_output_only.value is None
    assert "usage missing on 1 of 10" in s.cost.usd_per_1m_output_only.note
    assert s.verdict == "VALID"


def test_warmup_counts_nowhere(tmp_path):
    rows = [good(0, 0, ttft_ms=5000, itl_ms=1), *(good(i, 10 * S + i * MS) for i in range(1, 6))]
    s = summarise(run_of(tmp_path, rows, plan={0: {"phase": "warmup"}}))
    assert s.requests.planned == s.requests.succeeded == 5
    assert s.window.start_s == pytest.approx(10.001)
    assert s.metrics.ttft.mean.value == pytest.approx(0.050)


# --------------------------------------------------------------------------------------------------------------- SLO


def test_goodput_counts_failures_unfinished_and_lost_against(tmp_path):
    rows = [good(0), good(1, ttft_ms=500), bad(2), bad(3, "stopped")]
    s = summarise(run_of(tmp_path, rows, requests=5), slo={"ttft": 0.1})
    assert s.slo.attainment.value == pytest.approx(1 / 5)
    assert s.rates.goodput.value == pytest.approx(1 / s.window.duration_s)


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ({"ttft": 0.070}, [1, 1, 1, 0, 0]),  # lag counts: the fourth is late by 40 ms
        ({"tpot": 0.005}, [0, 1, 0, 0, 0]),  # a request of one token has no tpot to miss
        ({"tpot": 0.010001}, [1, 1, 0, 1, 0]),  # one chunk of four tokens: tpot not known, so not met
        ({"e2e": 0.081, "ttft": 0.1}, [1, 1, 1, 0, 0]),
        ({}, [1, 1, 1, 1, 0]),
    ],
)
def test_meets_slo(tmp_path, slo, met):
    rows = [good(0), good(1, tokens=1), good(2), good(3, lag_ms=40), bad(4)]
    rows[2].chunk_ns, rows[2].chunk_tokens = rows[2].chunk_ns[:1], [4]
    assert metrics.meets_slo(run_of(tmp_path, rows).rows, slo).tolist() == [bool(m) for m in met]


@pytest.mark.parametrize("slo", [{"ttft": 0.0}, {"ttft": float("nan")}, {"tpto": 1.0}])
def test_a_limit_that_makes_no_sense_is_refused(tmp_path, slo):
    with pytest.raises(UsageError):
        summarise(run_of(tmp_path, [good(0)]), slo=slo)


def test_exit_codes(tmp_path):
    rows = [good(i, ttft_ms=50 if i else 500) for i in range(100)]
    run = run_of(tmp_path, rows, spec=replace(SPEC, slo={"ttft": 0.1}))
    assert summarise(run).slo.attainment.value == pytest.approx(0.99)
    assert exit_code(summarise(run)) == EXIT_VALID
    assert exit_code(summarise(run, attain=0.995)) == EXIT_SLO_MISSED
    assert exit_code(summarise(run, slo={}, attain=1.0)) == EXIT_VALID
    stopped = run_of(tmp_path / "2", rows, status="stopped", spec=replace(SPEC, slo={"ttft": 0.1}))
    assert exit_code(summarise(stopped, attain=1.0)) == EXIT_INVALID


def test_requests_beyond_the_duration_were_never_offered(tmp_path):
    """A closed loop that ends after its time leaves the rest of the plan unsent: nobody failed."""
    rows = [*(good(i) for i in range(5)), *(bad(i, "unsent", sent=False) for i in range(5, 20))]
    spec = replace(SPEC, mode="closed", concurrency=1, duration_s=1.0)
    s = summarise(run_of(tmp_path, rows, spec=spec), slo={"ttft": 1.0})
    assert (s.requests.not_due, s.requests.unfinished, s.slo.attainment.value) == (15, 0, 1.0)
    assert (s.verdict, s.errors) == ("VALID", [])
    stopped = summarise(run_of(tmp_path / "2", rows, spec=spec, status="stopped"), slo={"ttft": 1.0})
    assert (stopped.requests.not_due, stopped.requests.unfinished) == (0, 15)
    assert stopped.slo.attainment.value == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------------------ damaged runs


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["ok", "lost", *ERRORS]), max_size=30), st.integers(1, 3))
@example(["ok", "connect", "cancelled"], 1)
@example(["ok", "connect", "overloaded"], 1)
@example(["ok", "connect", "overloaded", "no_history", "no_history"], 1)
def test_every_planned_request_is_counted_once(fates, workers):
    rows = [
        good(i) if fate == "ok" else bad(i, fate, sent=fate != "unsent")
        for i, fate in enumerate(fates)
        if fate != "lost"
    ]
    with tempfile.TemporaryDirectory() as folder:
        s = summarise(run_of(Path(folder), rows, requests=len(fates), workers=workers), slo={"ttft": 1.0})
    r = s.requests
    assert r.planned == len(fates) == r.succeeded + r.failed + r.unfinished + r.lost + r.not_due + r.cancelled
    assert r.lost == fates.count("lost")
    assert sum(e.count for e in s.errors) == len(fates) - fates.count("ok")
    offered = len(fates) - fates.count("cancelled")  # a client that hung up on purpose asked for no success
    # refused for overload is measured, and a turn without history failed as those before it did
    failed = [f for f in fates if f not in ("ok", "lost", "cancelled", "stopped", "unsent", "no_history")]
    refused = failed.count("overloaded") * (1 + fates.count("no_history") / len(failed)) if failed else 0.0
    measured = fates.count("ok") > 0 and fates.count("ok") + refused >= offered / 2
    assert (s.verdict == "VALID") == (fates.count("lost") == 0 and measured)
    assert b"NaN" not in msgspec.json.encode(s)


@pytest.mark.parametrize(
    "results",
    [[], [good(0)], [bad(i) for i in range(5)], [bad(i, "unsent", sent=False) for i in range(3)], [good(0, tokens=0)]],
    ids=["empty", "one request", "all failed", "nothing sent", "no output"],
)
def test_a_poor_run_gives_nulls_with_reasons(tmp_path, results):
    s = summarise(run_of(tmp_path, results), slo={"ttft": 1.0, "tpot": 0.1})
    for group in (s.metrics, s.rates):
        for name in group.__dataclass_fields__:
            value = getattr(group, name)
            for q in [value] if hasattr(value, "value") else [value.mean, value.p50, value.p99]:
                assert q.value is not None or q.note
    assert s.metrics.ttft.p99.value is None
    assert (s.requests.succeeded > 0) == any(r.error is None for r in results)
    if not s.requests.succeeded:
        assert s.verdict == ("INVALID" if results else "TOO SMALL")
        assert s.cost.usd_per_1m_total.value is None and s.cost.reason


def test_duplicates_are_counted_and_the_first_row_stays(tmp_path):
    run = run_of(tmp_path, [good(0), good(1), good(1, ttft_ms=999)])
    assert (run.duplicates, run.lost, len(run.rows)) == (1, 0, 2)
    assert summarise(run).metrics.service_ttft.mean.value == pytest.approx(0.05)
    assert summarise(run).verdict == "INVALID"


def test_rows_the_plan_does_not_know_are_left_out(tmp_path):
    path = write_run(tmp_path / "run", [good(0), good(1), good(7)], requests=8)
    smaller = write_run(tmp_path / "smaller", [good(0), good(1)])
    (path / "plan.arrow").write_bytes((smaller / "plan.arrow").read_bytes())
    run = read_run(path)
    assert (run.unknown, run.lost, len(run.rows)) == (1, 0, 2)
    assert any("SHA-256" in p for p in run.problems)


def impossible_rows():
    negative_gap, early_end, moved, early, no_end = (good(0, S) for _ in range(5))
    negative_gap.chunk_ns[1] = negative_gap.chunk_ns[0] - 1
    early_end.finished_ns -= 1
    moved.scheduled_ns = moved.sent_ns = S + 50 * MS
    early.sent_ns -= 2 * MS
    no_end.finished_ns = None
    unsent_success = Result(request_id=0, scheduled_ns=S)
    minus = good(0, S)
    minus.output_tokens = -1
    wrong_lengths = good(0, S, chunk_tokens=[1, 1])
    far = good(0, S)
    far.chunk_ns = [far.sent_ns, far.sent_ns + 2**62]
    far.chunk_tokens = None
    named = {
        "negative gap": negative_gap, "ends before its last chunk": early_end, "moved its due time": moved,
        "sent before due": early, "no end": no_end, "success unsent": unsent_success, "negative tokens": minus,
        "token list of another length": wrong_lengths, "absurd gap": far,
    }  # fmt: skip
    return [pytest.param(row, id=name) for name, row in named.items()]


@pytest.mark.parametrize("row", impossible_rows())
def test_rows_that_cannot_be_true_are_no_evidence(tmp_path, row):
    run = run_of(tmp_path, [row, good(1, 2 * S)], plan={0: {"scheduled_ns": S}})
    assert (run.impossible, run.lost, len(run.rows)) == (1, 1, 1)
    s = summarise(run)
    assert s.verdict == "INVALID" and "impossible" in s.reasons[0]
    assert s.metrics.ttft.mean.value == pytest.approx(0.05)


def test_torn_missing_and_foreign_files(tmp_path):
    path = write_run(tmp_path / "run", [good(i) for i in range(40)], workers=4)
    run = RunDir(path)
    torn = run.results(0).read_bytes()
    run.results(0).write_bytes(torn[: len(torn) // 2])
    run.results(1).unlink()
    run.results(2).write_text("not arrow at all")
    (path / "results-x.arrows").write_text("")
    read = read_run(path)
    assert read.lost == 30
    assert any("worker 1" in p for p in read.problems)
    assert any("results-2.arrows" in p for p in read.problems)
    s = summarise(read)
    assert s.verdict == "INVALID"
    assert s.requests.succeeded == 10
    assert s.metrics.ttft.p50.value == pytest.approx(0.05)
    assert s.cost.usd_per_1m_total.value is None


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_plan_that_cannot_be_read_is_an_error(tmp_path, cut):
    path = write_run(tmp_path / "run", [good(0)])
    whole = (path / "plan.arrow").read_bytes()
    (path / "plan.arrow").write_bytes(whole[:cut])
    with pytest.raises(PlanError):
        read_run(path)


def test_no_run_directory_is_an_error(tmp_path):
    with pytest.raises(ResultsError, match="not a run directory"):
        read_run(tmp_path)


def test_rows_need_no_python_loop(tmp_path):
    """Columns only: of 5,000 more rows of 4 chunks not one makes a call of its own."""
    import sys

    def calls_of(rows: int) -> int:
        path = write_run(tmp_path / f"run{rows}", [good(i, i * MS) for i in range(rows)], answers=[])
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            summarise(read_run(path))
        finally:
            sys.setprofile(None)
        return calls

    calls_of(500)  # what is imported and cached once
    assert calls_of(10_000) - calls_of(5000) < 1000
