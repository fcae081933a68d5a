"""Each check fails on the run that it exists for, and a small honest run is VALID with its limits said."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from run_files import MS, QUIET, SPEC, TIER, S, bad, good, said, watch, write_run

from harness.analysis import metrics
from harness.analysis.rows import read as load
from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.record.answers import CountedPrompt
from harness.record.host import Host
from harness.record.manifest import Replica, Restart, RunDir, Worker, read_manifest, write_manifest
from harness.record.results import ERRORS, Result
from harness.trace.stats import TraceStats

REPLICA = Replica(index=0, base_url="http://127.0.0.1:1/v1")
CLOSED = replace(SPEC, mode="closed", concurrency=8)
START = "process_start_time_seconds"
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


def recorded(text_tokens):
    """A trace of texts that had so many input tokens in production."""
    return TraceStats(
        requests=20, arrivals=None, input_tokens=None, output_tokens=None, sessions=0, session_rows=0, most_turns=0,
        unit_rows=1.0, prefix=None, grid_s=None, text_tokens=text_tokens,
    )  # fmt: skip


def prompts_of_their_own(n=20):
    return {i: {"input_tokens": 8, "prompt_token_ids": list(range(8 * i, 8 * i + 8))} for i in range(n)}


GATES = {
    "status": {"status": "stopped", "reason": "stopped by the user"},
    "rows": {"requests": 21},
    "success": {"results": [bad(i) for i in range(3)]},
    "lag": {"results": [*rows(18), good(18, lag_ms=101), good(19, lag_ms=101)]},
    "arrival_process": {
        "results": [good(i, i * 40 * MS, lag_ms=40 * (4 - i % 5)) for i in range(20)],
        "spec": replace(SPEC, lag_bound_s=1.0),
    },
    "littles_law": {"seen": watch(rows(), in_flight=2.0)},
    "server_restarts": {
        "replicas": [
            replace(
                REPLICA,
                counters_before={START: 5.0, "vllm:x_total": 3.0},
                counters_after={START: 9.0, "vllm:x_total": 4.0},
            )
        ]
    },
    "workers": {"workers_said": worker(exit="SIGKILL")},
    "generator_cpu": {"workers_said": worker(cpu_share=0.95)},
    "generator_lag": {"workers_said": worker(loop_lag_p99_s=0.2)},
    "replicas": {"replicas": [replace(REPLICA, exit="died of signal 9")]},
    "starved": {"processor": [replace(QUIET, work_delay_ns=QUIET.run_ns)]},
    "engine_fits_tier": {"tier": replace(TIER, accelerator="H100", accelerator_count=8)},
    "input_tokens": {"results": changed(1, input_tokens=9), "plan": as_planned()},
    "prompt_text": {
        "answers": [replace(said(good(i)), prompt=CountedPrompt(bytes=900, words=200)) for i in range(20)],
    },
    "usage_text": {"answers": [said(good(i, tokens=40)) for i in range(20)]},
    "token_books": {"replicas": counted(160, 85)},
}

LIMITS = {
    "output_tokens": {"results": changed(1, output_tokens=3, chunk_tokens=None), "plan": as_planned()},
    "bulk_delivery": {"results": rows(itl_ms=0)},
    "chunk_tokens": {"results": changed(1, output_tokens=9, chunk_tokens=None)},
    "server_counters": {"engine": "url", "replicas": [replace(REPLICA, several_servers=True)]},
    "stamps": {"workers_said": worker(loop_lag_p99_s=0.005)},
    "generator_stall": {"seen": watch(rows(), lag_ms=50)},
    "unfinished": {"results": [*rows(19), bad(19, "stopped")]},
    "usage": {"results": changed(1, output_tokens=None)},
    "recorded_tokens": {"plan": {i: {"input_tokens": None} for i in range(20)}, "source": recorded(17)},
    "answer_fields": {"results": changed(3, detail="left out: finish_reason")},
    "cold_start": {"results": [good(i, ttft_ms=900 if i < 3 else 50) for i in range(20)]},
    "sent_again": {"results": changed(1, retries=1)},
    "failures": {"results": [*rows(19), bad(19)]},
    "sample_size": {},
    "duration": {},
    "planned_rate": {"results": [good(0), *(good(i, lag_ms=99) for i in range(1, 10))]},
    "steady_state": {},
    # the last request is due at 1.9 s and answered at 2.2 s
    "drain": {"results": [*rows(19), good(19, ttft_ms=270)]},
    # each answer takes a tenth of a second longer than the one before it: twice as many are due as are done
    "backlog": {"results": [good(i, ttft_ms=50 + 100 * i) for i in range(20)]},
    "prefix_cache": {"results": changed(20, cached_tokens=7), "plan": prompts_of_their_own()},
    "arrivals": {"spec": CLOSED},
    "concurrency": {"spec": CLOSED},
    "wasted_time": {"results": [*rows(19), bad(19, "timeout", took_ms=500)]},
    "shared_host": {"load_shares_server_host": True},
    "hardware": {"load_shares_server_host": True, "host": Host(cpu="x", cores=64, memory_gib=8.0, os="x")},
    "price_date": {"tier": replace(TIER, date="2026-01")},
}


def run_with(tmp_path, options):
    options = dict(options)
    if "workers_said" in options:
        said = options.pop("workers_said")
        path = write_run(tmp_path / "run", rows())
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


def test_another_number_format_than_the_models_is_a_limit(tmp_path):
    tier, host = replace(TIER, vcpu=8, memory_gib=32.0), Host(cpu="x", cores=8, memory_gib=32.0, os="x")
    same = {"load_shares_server_host": True, "tier": tier, "host": host}
    assert check(summary(tmp_path / "a", **same), "hardware").ok is True
    said = check(summary(tmp_path / "b", model_facts={"dtype_reason": "float32 in place of x"}, **same), "hardware")
    assert said.ok is False and "float32 in place of x" in said.observed


@pytest.mark.parametrize(
    ("tokens", "ok"), [(None, None), (3.9, False), (4, True), (8, True), (16, True), (16.1, False)]
)
def test_texts_are_held_against_what_production_counted(tmp_path, tokens, ok):
    """Each prompt here has 8 input tokens."""
    texts = {i: {"input_tokens": None} for i in range(20)}
    assert check(summary(tmp_path, plan=texts, source=recorded(tokens)), "recorded_tokens").ok is ok


def test_every_check_has_a_test_that_makes_it_fail(tmp_path):
    s = summary(tmp_path)
    assert {c.name for c in s.checks if c.gate} == {*GATES, "files", "min_requests"}
    # files: test_metrics, torn and missing; min_requests: test_too_small; starved as a limit: test_starved
    assert {c.name for c in s.checks if not c.gate} == set(LIMITS)


def test_a_good_run_passes_everything_that_can_be_checked(tmp_path):
    n = 700
    s = summary(
        tmp_path, rows(n), replicas=counted(8 * n, 4 * n), load_shares_server_host=False,
        tier=replace(TIER, date="2026-11-01"), seen=watch(rows(n)),
    )  # fmt: skip
    assert s.verdict == "VALID"
    assert [c.name for c in s.checks if c.ok is False] == []
    # recorded_tokens: of texts, and this plan knows every length
    # prefix_cache: the server counts no hits
    unchecked = {"concurrency", "hardware", "recorded_tokens", "prefix_cache"}
    assert {c.name for c in s.checks if c.ok is None} == unchecked


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
    late = [good(i, lag_ms=200 if i in (7, 8) else 0) for i in range(200)]
    assert check(summary(tmp_path, late), "lag").ok
    assert check(summary(tmp_path / "few", late[:199]), "lag").ok is False


@pytest.mark.parametrize(
    ("n", "late", "lag_ms", "ok"),
    [
        (60, 1, 100.2, True),
        (60, 1, 690, True),  # 590 ms over, 9.8 ms in the mean
        (60, 1, 710, False),
        (60, 2, 100.2, False),
        (99, 1, 1080, True),
        (6, 1, 150, True),
        (6, 1, 170, False),
        (5, 1, 100.2, False),  # 1 % late shows one in five with 4.9 %
        (60, 60, 100.2, False),
    ],
)
def test_one_late_send_of_a_few_is_judged_by_what_it_moves(tmp_path, n, late, lag_ms, ok):
    found = check(summary(tmp_path, [good(i, lag_ms=lag_ms if i < late else 0) for i in range(n)]), "lag")
    assert found.ok is ok
    assert f"{late} of {n} late" in found.observed


@pytest.mark.parametrize(
    ("unstamped", "together", "gate", "fine"),
    [(0.0, 0, True, True), (0.01, 0, True, True), (0.011, 0, False, False), (None, 0, False, False),
     (0.0, 2, True, False), (0.0, 4, False, False)],
)  # fmt: skip
def test_a_late_loop_counts_where_the_kernel_did_not_stamp(tmp_path, unstamped, together, gate, fine):
    """The same loop, 200 ms late, in all cases; ``together``: answers of 20, of 3 gaps each, with one shared stamp."""
    results = rows()
    for row in results[:together]:
        row.chunk_ns[2] = row.chunk_ns[1]
    path = write_run(tmp_path / "run", results)
    manifest = read_manifest(path)
    manifest.workers = worker(loop_lag_p99_s=0.2, unstamped_share=unstamped)
    write_manifest(RunDir(path), manifest)
    s = summarise(read_run(path))
    assert (check(s, "generator_lag").ok, check(s, "stamps").ok) == (gate, fine)
    assert s.verdict == ("VALID" if gate else "INVALID")
    assert "wrong" not in (check(s, "generator_lag").advice or "")


def test_only_the_worker_that_was_late_must_have_stamps(tmp_path):
    path = write_run(tmp_path / "run", rows(), workers=2)
    manifest = read_manifest(path)
    for late, ok in ((0, False), (1, True)):  # worker 0 has no stamps of the kernel
        manifest.workers = [
            Worker(index=k, rows=10, cpu_share=0.2, loop_lag_p99_s=0.2 if k == late else 0.001,
                   unstamped_share=1.0 if k == 0 else 0.0)
            for k in range(2)
        ]  # fmt: skip
        write_manifest(RunDir(path), manifest)
        assert check(summarise(read_run(path)), "generator_lag").ok is ok


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


def test_a_live_conversation_says_how_its_inputs_differ_and_fails_for_none(tmp_path):
    path = write_run(tmp_path / "run", changed(20, input_tokens=9), plan=as_planned())
    manifest = read_manifest(path)
    write_manifest(RunDir(path), replace(manifest, plan=replace(manifest.plan, conversation="live")))
    said = check(summarise(read_run(path)), "input_tokens")
    assert (said.ok, said.observed) == (
        None,
        "live conversation: 100.0% of 20 differ, 180 tokens for 160 asked (+12.5%)",
    )


def test_a_turn_without_history_is_a_failure_that_was_offered(tmp_path):
    """It was never sent because the server failed the turn before it: it counts against the server, as that one."""
    dropped = Result(19, 19 * 100 * MS, error="no_history", detail="request 18 of its session failed (server)")
    s = summary(tmp_path, [*rows(18), bad(18), dropped])
    assert (s.requests.failed, s.requests.unfinished, s.requests.offered) == (2, 0, 20)
    assert ERRORS["no_history"] in [e.meaning for e in s.errors]


def test_what_has_no_plan_or_no_count_is_not_checked(tmp_path):
    unknown = {i: {"input_tokens": None, "output_tokens": None} for i in range(20)}
    s = summary(tmp_path, plan=unknown)
    assert check(s, "input_tokens").ok is None and check(s, "output_tokens").ok is None
    assert check(s, "token_books").ok is None
    spec = replace(SPEC, endpoint="chat")
    chat = summary(tmp_path / "chat", changed(20, input_tokens=30), plan=as_planned(), spec=spec)
    assert check(chat, "input_tokens").ok is True and chat.verdict == "VALID", "a template adds the same to all"
    wrong = summary(tmp_path / "uneven", changed(10, input_tokens=30), plan=as_planned(), spec=spec)
    assert check(wrong, "input_tokens").ok is False and wrong.verdict == "INVALID"


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
    for file in Path(metrics.__file__).parent.rglob("*.py"):
        if file.name == "live.py":  # shows a test that is going on; reads no run directory
            continue
        assert not re.search(r"\b(today|now|time\.time|monotonic)\(", file.read_text()), file.name


def test_lag_is_judged_against_the_slo(tmp_path):
    """5 % of the TTFT limit, if that is less than the run's own bound; also for an SLO given with the report."""
    late = [good(i, lag_ms=30) for i in range(20)]
    for limit, ok in (({}, True), (2.0, True), (0.5, False), (0.001, False)):
        slo = {"ttft": limit} if limit else {"tpot": 0.01}
        path = write_run(tmp_path / str(slo), late, spec=replace(SPEC, slo=slo))
        assert check(summarise(read_run(path)), "lag").ok is ok
        assert check(summarise(read_run(path), slo={"ttft": 0.5}), "lag").ok is False


@pytest.mark.parametrize(
    ("itl_ms", "lag_s", "gate", "fine"),
    [(10, 0.001, True, True), (10, 0.0015, True, False), (10, 0.019, True, False), (10, 0.021, False, False),
     (50, 0.005, True, True), (50, 0.045, True, False), (50, 0.055, False, False), (500, 0.11, False, False)],
)  # fmt: skip
def test_loop_lag_is_judged_against_the_gaps_that_were_timed(tmp_path, itl_ms, lag_s, gate, fine):
    path = write_run(tmp_path / "run", rows(itl_ms=itl_ms))
    manifest = read_manifest(path)
    manifest.workers = worker(loop_lag_p99_s=lag_s)
    write_manifest(RunDir(path), manifest)
    s = summarise(read_run(path))
    assert (check(s, "generator_lag").ok, check(s, "stamps").ok) == (gate, fine)


@pytest.mark.parametrize(
    ("share", "said"), [(None, ""), (0.0, ""), (0.0312, "; the kernel stamped 96.9% of the reads")]
)
def test_reads_that_the_kernel_did_not_stamp_are_said(tmp_path, share, said):
    path = write_run(tmp_path / "run", rows())
    manifest = read_manifest(path)
    manifest.workers = worker(unstamped_share=share)
    write_manifest(RunDir(path), manifest)
    assert check(summarise(read_run(path)), "stamps").observed == f"p99 1 ms late{said}"


def test_one_saturated_second_is_enough_in_a_short_run_and_one_in_a_hundred_later(tmp_path):
    results = rows(1500)  # 150 s
    for busy, ok in ((1, True), (2, False)):
        seen = watch(results, cpu_share=[0.97] * busy + [0.2])
        assert check(summary(tmp_path / f"{busy}", results, seen=seen), "generator_cpu").ok is ok
    short = rows(100)
    s = summary(tmp_path / "short", short, seen=watch(short, cpu_share=[0.97, 0.2]))
    assert check(s, "generator_cpu").ok is False
    assert "max second 97%" in check(s, "generator_cpu").observed
    # A splinter of a second says nothing.
    seen = watch(short)
    seen.append(replace(seen[-1], t_ns=seen[-1].t_ns + 50 * MS, cpu_share=1.0, in_flight=0.0))
    assert check(summary(tmp_path / "splinter", short, seen=seen), "generator_cpu").ok


def arrivals(at_s, sent_s):
    return [good(i, int(a * S), lag_ms=(b - a) * 1e3) for i, (a, b) in enumerate(zip(at_s, sent_s, strict=True))]


@pytest.mark.parametrize("rate", [5, 50, 500])
def test_honest_arrivals_pass_whatever_their_process(tmp_path, rate):
    """Even, Poisson, bursts and whole seconds, each sent up to 3 ms late."""
    random = np.random.default_rng(rate)
    n = 20 * rate
    even = np.arange(n) / rate
    poisson = np.cumsum(random.exponential(1 / rate, n))
    for name, at_s in {"even": even, "poisson": poisson, "bursts": even // 2 * 2, "grid": even // 1}.items():
        sent_s = np.sort(at_s) + random.uniform(0, 0.003, n)
        s = summary(tmp_path / name, arrivals(at_s, sent_s))
        assert check(s, "arrival_process").ok, (name, check(s, "arrival_process").observed)


@pytest.mark.parametrize("spoil", ["bunched", "stretched", "evened"])
def test_another_process_than_the_planned_one_is_noticed(tmp_path, spoil):
    """Bunched: a generator that wakes every 100 ms, so that lag alone looks fine. Evened: bursts that were smoothed."""
    random = np.random.default_rng(1)
    at_s = np.cumsum(random.exponential(0.02, 1000))
    if spoil == "evened":
        at_s = np.floor(np.arange(1000) / 50)
    sent_s = {
        "bunched": np.ceil(at_s / 0.1) * 0.1,
        "stretched": at_s * 1.2,
        "evened": at_s + np.arange(1000) % 50 / 50,
    }[spoil]
    s = summary(tmp_path, arrivals(at_s, sent_s), spec=replace(SPEC, lag_bound_s=1e6))
    assert check(s, "arrival_process").ok is False, check(s, "arrival_process").observed
    assert s.verdict == "INVALID"


def test_littles_law_holds_for_any_shape_and_breaks_with_a_lost_tenth(tmp_path):
    random = np.random.default_rng(2)
    results = [good(i, int(random.uniform(0, 20 * S)), ttft_ms=random.exponential(900)) for i in range(400)]
    assert check(summary(tmp_path, results, seen=watch(results)), "littles_law").ok
    honest = watch(results)
    s = summary(tmp_path / "lost", results[:360], seen=honest)
    assert check(s, "littles_law").ok is False
    assert check(summary(tmp_path / "unwatched", results), "littles_law").ok is None


def test_littles_law_knows_that_ends_are_read_in_batches(tmp_path):
    """A worker that reads in batches learns of an end up to 2.5 ms late: much of an answer of 6 ms, and no fault."""
    results = [good(i, i * MS // 2, ttft_ms=4, itl_ms=0.5, tokens=5) for i in range(3000)]
    room = 1 + 2.5 / 6

    def judged(name, in_flight, events):
        seen = watch(results, in_flight=in_flight, events=events, lag_ms=0)
        return check(summary(tmp_path / name, results, seen=seen), "littles_law")

    batched = judged("batched", room, 20_000)
    assert batched.ok, batched.observed
    assert "read up to 2.5 ms late" in batched.observed
    assert judged("more", room + 0.5, 20_000).ok is False
    assert judged("fewer", 2 - room, 20_000).ok is False, "no end is noticed before it comes"
    assert judged("one by one", room, 1_000).ok is False, "so few events are read as they come"


def test_a_run_of_a_few_samples_is_not_judged_by_littles_law(tmp_path):
    results = [good(i, 10 * MS * i) for i in range(4)]
    found = check(summary(tmp_path, results, seen=watch(results, in_flight=1.4)), "littles_law")
    assert (found.ok, found.observed) == (None, "in flight sampled for 0.11 s only")


def test_warmup_rows_are_part_of_what_the_workers_saw(tmp_path):
    results = rows(100)
    s = summary(tmp_path, results, plan={i: {"phase": "warmup"} for i in range(50)}, seen=watch(results))
    assert check(s, "littles_law").ok


def test_a_warmup_by_time_counts_in_no_figure(tmp_path):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Warm(type(SPEC)):
        warmup_s: float | None = None

    results = [good(i, ttft_ms=5000 if i < 5 else 50) for i in range(20)]
    path = write_run(tmp_path / "run", results, spec=CLOSED)
    cold = read_run(path)
    manifest = replace(cold.manifest, spec=Warm(**{**asdict(CLOSED), "warmup_s": 0.5}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_manifest", lambda _: manifest)
        warm = read_run(path)
    assert (cold.planned, warm.planned, len(warm.warmup), warm.lost, warm.lost_warmup) == (20, 15, 5, 0, 0)
    assert summarise(cold).metrics.ttft.mean.value > 1
    assert summarise(warm).metrics.ttft.mean.value == pytest.approx(0.05)


def test_cancelled_requests_are_neither_success_nor_failure(tmp_path):
    hung_up = [bad(i, "cancelled", chunks_ms=[50, 60], took_ms=65) for i in range(15, 20)]
    s = summary(
        tmp_path, rows(15) + hung_up, spec=replace(SPEC, slo={"ttft": 1.0}), plan=as_planned(),
        replicas=counted(8 * 20, 4 * 15 + 10),
    )  # fmt: skip
    assert (s.verdict, s.requests.cancelled, s.requests.failed, s.requests.offered) == ("VALID", 5, 0, 15)
    assert (s.slo.attainment.value, s.slo.attainment.n) == (1.0, 15)
    assert check(s, "failures").ok and check(s, "success").ok
    assert check(s, "token_books").ok, "the server worked for them"


@pytest.mark.parametrize(
    ("before", "after", "ok"),
    [
        ({"vllm:a_total": 5.0}, {"vllm:a_total": 5.0}, True),
        ({"vllm:a_total": 5.0}, {"vllm:a_total": 4.0}, False),
        ({"vllm:a_total": 5.0, START: 100.5}, {"vllm:a_total": 9.0, START: 100.5}, True),
        ({"vllm:a_total": 5.0, START: 100.5}, {"vllm:a_total": 9.0, START: 170.0}, False),
        ({"vllm:a_total": 5.0}, None, None),
        (None, None, None),
    ],
)
def test_server_restarts(tmp_path, before, after, ok):
    s = summary(tmp_path, replicas=[replace(REPLICA, counters_before=before, counters_after=after)])
    assert check(s, "server_restarts").ok is ok
    assert s.verdict == ("INVALID" if ok is False else "VALID")


def test_a_server_that_died_before_the_run_is_said_and_no_fault_of_it(tmp_path):
    replicas = [replace(REPLICA, counters_before={"vllm:a_total": 5.0}, counters_after={"vllm:a_total": 5.0})]
    before = [Restart(replica=0, died="noon", how="killed by SIGKILL", ready="a minute past noon")]
    s = summary(tmp_path, replicas=replicas, restarts_before=before)
    assert s.verdict == "VALID"
    said = "1 kept running; before this run: replica 0 started again at a minute past noon, its cache empty"
    assert check(s, "server_restarts").observed == said


def test_the_books_count_requests_too(tmp_path):
    def said(requests):
        (replica,) = counted(160, 80)
        replica.counters_before["vllm:request_success_total"] = 7.0
        replica.counters_after["vllm:request_success_total"] = 7.0 + requests
        return [replica]

    for requests, ok in ((20, True), (21, False), (19, False)):
        assert check(summary(tmp_path / str(requests), replicas=said(requests)), "token_books").ok is ok
    with_failure = summary(tmp_path / "f", [*rows(), bad(20)], plan=as_planned(21), replicas=said(21))
    assert check(with_failure, "token_books").ok, "the server may have finished what failed here"


def test_a_turn_that_waited_may_be_due_later_than_planned_but_not_before_its_predecessor_ended(tmp_path):
    first = good(0, 0)
    plan = {1: {"after": 0, "think_ns": 5 * MS, "scheduled_ns": 10 * MS}}
    for due, impossible in ((first.finished_ns + 5 * MS, 0), (first.finished_ns - MS, 1)):
        run = read_run(write_run(tmp_path / str(due), [first, good(1, due)], plan=plan))
        assert run.impossible == impossible


def test_observations_that_cannot_be_read_are_a_problem_of_the_run(tmp_path):
    path = write_run(tmp_path / "run", rows(), seen=watch(rows()))
    RunDir(path).observations(0).write_bytes(b"rubbish")
    s = summarise(read_run(path))
    assert check(s, "files").ok is False and "worker-0.arrows" in check(s, "files").observed


def test_a_minute_is_long_enough(tmp_path):
    assert check(summary(tmp_path, [good(0), good(1, 61 * S)]), "duration").ok


def test_a_run_that_was_stopped_is_not_told_of_errors_it_did_not_have(tmp_path):
    stopped = [good(0), *(bad(i, "stopped") for i in range(1, 20))]
    assert "let the run end" in check(summary(tmp_path / "a", stopped), "success").advice
    failed = [good(0), *(bad(i) for i in range(1, 20))]
    assert "see the errors" in check(summary(tmp_path / "b", failed), "success").advice
