"""Each check fails on the run that it exists for, and a small honest run is VALID with its limits said."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from run_files import MS, SPEC, TIER, S, bad, good, write_run

from analysis import metrics
from analysis.load import read_run
from analysis.summary import summarise
from harness.run import Host, Replica, Worker

REPLICA = Replica(index=0, base_url="http://127.0.0.1:1/v1")
CLOSED = replace(SPEC, mode="closed", concurrency=8)
INPUT, OUTPUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"


def rows(n=20, **options):
    return [good(i, **options) for i in range(n)]


def summary(tmp_path, results=None, **options):
    return summarise(read_run(write_run(tmp_path / "run", rows() if results is None else results, **options)))


def check(s, name):
    return next(c for c in s.checks if c.name == name)


def worker(**facts):
    return [Worker(index=0, **({"rows": 0, "cpu_share": 0.2, "loop_lag_p99_s": 0.001} | facts))]


def counted(inputs, outputs, **facts):
    after = {INPUT: 100.0 + inputs, OUTPUT: 50.0 + outputs}
    return [replace(REPLICA, counters_before={INPUT: 100.0, OUTPUT: 50.0}, counters_after=after, **facts)]


def changed(k, n=20, **fields):
    """n good rows of which the k-th differ."""
    found = rows(n)
    for row in found[:k]:
        for name, value in fields.items():
            setattr(row, name, value)
    return found


def as_planned(n=20):
    return {i: {"input_tokens": 8, "output_tokens": 4} for i in range(n)}


GATES = {
    "status": {"status": "stopped", "reason": "stopped by the user"},
    "rows": {"requests": 21},
    "success": {"results": [bad(i) for i in range(3)]},
    "lag": {"results": [*rows(19), good(19, lag_ms=101)]},
    "workers": {"workers_said": worker(exit="SIGKILL")},
    "generator_cpu": {"workers_said": worker(cpu_share=0.95)},
    "generator_lag": {"workers_said": worker(loop_lag_p99_s=0.2)},
    "replicas": {"replicas": [replace(REPLICA, exit="died of signal 9")]},
    "engine_fits_tier": {"tier": replace(TIER, accelerator="H100", accelerator_count=8)},
    "output_tokens": {"results": changed(1, output_tokens=3, chunk_tokens=None), "plan": as_planned()},
    "input_tokens": {"results": changed(1, input_tokens=9), "plan": as_planned()},
    "token_books": {"replicas": counted(160, 85)},
}

LIMITS = {
    "usage": {"results": changed(1, output_tokens=None)},
    "failures": {"results": [*rows(19), bad(19)]},
    "sample_size": {},
    "duration": {},
    "planned_rate": {"results": [good(0), *(good(i, lag_ms=99) for i in range(1, 10))]},
    "arrivals": {"spec": CLOSED},
    "concurrency": {"spec": CLOSED},
    "littles_law": {"results": [*rows(19), bad(19, "timeout", took_ms=500)]},
    "shared_host": {"load_shares_server_host": True},
    "hardware": {"load_shares_server_host": True, "host": Host(cpu="x", cores=64, memory_gib=8.0, os="x")},
    "price_date": {"tier": replace(TIER, date="2026-01")},
}


def run_with(tmp_path, options):
    options = dict(options)
    if "workers_said" in options:
        said = options.pop("workers_said")
        path = write_run(tmp_path / "run", rows())
        from harness.run import RunDir, read_manifest, write_manifest

        manifest = read_manifest(path)
        manifest.workers = said
        write_manifest(RunDir(path), manifest)
        return summarise(read_run(path))
    return summary(tmp_path, options.pop("results", None), **options)


@pytest.mark.parametrize(("failed", "verdict"), [(10, "VALID"), (11, "INVALID")])
def test_a_server_that_refuses_most_of_the_workload_was_not_measured_on_it(tmp_path, failed, verdict):
    results = [*rows(20 - failed), *(bad(i) for i in range(20 - failed, 20))]
    assert summary(tmp_path, results).verdict == verdict


@pytest.mark.parametrize("name", GATES)
def test_a_failed_gate_makes_the_run_invalid_and_takes_its_price(tmp_path, name):
    s = run_with(tmp_path, GATES[name])
    failed = check(s, name)
    assert failed.ok is False and failed.gate and failed.advice
    assert s.verdict == "INVALID"
    assert any(reason.startswith(f"{name}: ") for reason in s.reasons)
    assert s.cost.reason and s.cost.usd_per_1m_total.value is None
    assert {c.name for c in s.checks if c.gate and c.ok is False} <= {name, "rows", "files"} | (
        {"success"} if name == "success" else set()
    )


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_said_and_leaves_the_run_valid(tmp_path, name):
    s = run_with(tmp_path, LIMITS[name])
    said = check(s, name)
    assert said.ok is False and not said.gate and said.advice
    assert s.verdict == "VALID"


def test_every_check_has_a_test_that_makes_it_fail(tmp_path):
    s = summary(tmp_path)
    assert {c.name for c in s.checks if c.gate} == {*GATES, "files"}  # files: test_metrics, torn and missing
    assert {c.name for c in s.checks if not c.gate} == set(LIMITS)


def test_a_good_run_passes_everything_that_can_be_checked(tmp_path):
    n = 700
    s = summary(
        tmp_path, rows(n), replicas=counted(8 * n, 4 * n), load_shares_server_host=False,
        tier=replace(TIER, date="2026-11-01"),
    )  # fmt: skip
    assert s.verdict == "VALID"
    assert [c.name for c in s.checks if c.ok is False] == []
    assert {c.name for c in s.checks if c.ok is None} == {"concurrency", "hardware"}


def test_a_demo_of_sixty_requests_is_valid_with_its_limits_said(tmp_path):
    slots, results = [0] * 8, []
    for i in range(60):
        k = slots.index(min(slots))
        results.append(good(i, slots[k], ttft_ms=300 + 7 * (i % 11), itl_ms=40, tokens=64, inputs=128))
        slots[k] = results[-1].finished_ns + MS
    s = summary(tmp_path, results, spec=CLOSED)
    assert s.verdict == "VALID"
    price = s.cost.usd_per_1m_total
    assert 0 < price.low < price.value < price.high
    assert s.metrics.ttft.p99.note == "needs 299 requests, has 60"
    assert s.metrics.ttft.p95.value is not None
    assert {"sample_size", "duration", "arrivals"} <= {c.name for c in s.checks if c.ok is False}
    assert s.rates.request_rate.value is None


def test_lag_is_p99_from_a_hundred_requests_on(tmp_path):
    late = [good(i, lag_ms=200 if i == 7 else 0) for i in range(200)]
    assert check(summary(tmp_path, late), "lag").ok
    assert check(summary(tmp_path / "few", late[:99]), "lag").ok is False


def test_lag_of_a_closed_loop_is_not_judged(tmp_path):
    s = summary(tmp_path, rows(lag_ms=500), spec=CLOSED)
    assert check(s, "lag").ok is None and s.verdict == "VALID"


def test_a_stopped_run_shows_its_figures(tmp_path):
    s = summary(tmp_path, status="stopped", reason="stopped by the user")
    assert "stopped by the user" in s.reasons[0]
    assert s.metrics.ttft.p50.value is not None
    assert s.cost.usd_per_1m_total.note == "the run is INVALID"


def test_one_start_token_is_not_a_mismatch_but_two_lengths_are(tmp_path):
    assert check(summary(tmp_path, changed(20, input_tokens=9), plan=as_planned()), "input_tokens").ok
    mixed = changed(20, input_tokens=9)
    mixed[0].input_tokens = 10
    assert check(summary(tmp_path / "2", mixed, plan=as_planned()), "input_tokens").ok is False
    assert check(summary(tmp_path / "3", changed(20, input_tokens=12), plan=as_planned()), "input_tokens").ok is False


def test_what_has_no_plan_or_no_count_is_not_checked(tmp_path):
    unknown = {i: {"input_tokens": None, "output_tokens": None} for i in range(20)}
    s = summary(tmp_path, plan=unknown)
    assert check(s, "input_tokens").ok is None and check(s, "output_tokens").ok is None
    assert check(s, "token_books").ok is None
    spec = replace(SPEC, endpoint="chat")
    chat = summary(tmp_path / "chat", changed(20, input_tokens=30), plan=as_planned(), spec=spec)
    assert check(chat, "input_tokens").ok is None and chat.verdict == "VALID"


@pytest.mark.parametrize(
    ("inputs", "outputs", "ok"),
    [
        (160, 80, True),
        (160, 79, False),
        (159, 80, False),
        (161, 80, False),
        (160, 81, False),
        (168, 84, True),
        (169, 84, False),
    ],
)
def test_token_books(tmp_path, inputs, outputs, ok):
    """20 successes of 8 in and 4 out; in the last two a 21st failed, which may have used up to 8 and 4."""
    results = rows()
    if inputs > 165:
        results.append(bad(20))
    s = summary(tmp_path, results, plan=as_planned(21) if inputs > 165 else None, replicas=counted(inputs, outputs))
    assert check(s, "token_books").ok is ok


def test_token_books_include_warmup_and_all_replicas(tmp_path):
    half = counted(80, 40)[0]
    both = [half, replace(half, index=1)]
    plan = {i: {"phase": "warmup"} for i in range(5)}
    assert check(summary(tmp_path, replicas=both, plan=plan), "token_books").ok
    both[1] = replace(half, index=1, counters_after=None)
    assert check(summary(tmp_path / "2", replicas=both, plan=plan), "token_books").ok is None


def test_a_worker_without_last_words_is_noticed(tmp_path):
    s = run_with(tmp_path, {"workers_said": []})
    assert "no last words" in check(s, "workers").observed


@pytest.mark.parametrize(
    ("date", "ok"), [("2026-05-26", True), ("2026-05-20", False), ("2026-11", True), ("soon", False)]
)
def test_price_date(tmp_path, date, ok):
    assert check(summary(tmp_path, tier=replace(TIER, date=date)), "price_date").ok is ok


def test_no_figure_depends_on_when_it_is_read():
    """A verdict is a function of the run directory: the same files give the same verdict for ever."""
    for file in Path(metrics.__file__).parent.glob("*.py"):
        assert not re.search(r"\b(today|now|time\.time|monotonic)\(", file.read_text()), file.name


def test_a_minute_is_long_enough(tmp_path):
    assert check(summary(tmp_path, [good(0), good(1, 61 * S)]), "duration").ok
