"""What goes out when: turns that wait, slots that join, phases, hang-ups; from the schedule to the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import StartServer, harness, in_time
from hypothesis import given
from hypothesis import strategies as st
from test_worker import classes, starter, whole_schedule, write_plan  # noqa: F401 - a fixture

from harness.cli import main
from harness.plan.file import iter_requests
from harness.record.manifest import RunDir, read_manifest
from harness.record.results import read_results
from harness.scenarios.dispatch import slot_starts
from harness.scenarios.plan_reader import Planned

S = 1_000_000_000


def planned(i, at=None, after=None, think=0):
    return Planned(i, at, after, think, b"")


# -- the schedule -----------------------------------------------------------------------------------------------------


def test_a_waiting_turn_is_due_at_the_later_of_its_own_time_and_the_answer_before_it():
    schedule = whole_schedule([planned(0, 0), planned(1, 100, after=0, think=10), planned(2, 30, after=1)], timed=True)
    schedule.take(0)
    assert schedule.next_due() is None, "nobody knows yet when"
    assert schedule.finished(0, 20)
    assert schedule.next_due() == 100, "the answer came early: the turn keeps its time"
    assert schedule.take(100)[1] == 100
    assert schedule.finished(1, 250)
    assert schedule.take(250)[1] == 250, "the answer came late: that is no lag of the generator"


@pytest.mark.parametrize(("timed", "order"), [(True, [2, 1, 3]), (False, [1, 2, 3])])
def test_who_is_late_goes_in_the_order_it_was_due(timed, order):
    """Else turns, which become due all the time, would hold back the first turns of others for as long as we are late.

    In a closed loop new sessions have no time, and a turn whose time has come goes before them.
    """
    at = {0: 0, 2: 30, 3: 40} if timed else {}
    rows = [planned(i, at.get(i, 1 if timed else None), 0 if i == 1 else None) for i in range(4)]
    schedule = whole_schedule(rows, timed=timed)
    schedule.take(0)
    schedule.finished(0, 35)
    assert [schedule.take(100)[0].request_id for _ in range(3)] == order


def test_what_was_never_sent_says_when_it_was_due():
    rows = [planned(0, 0), planned(1, 1, after=0, think=5), planned(2, 2, after=1), planned(3, 7)]
    schedule = whole_schedule(rows, timed=True)
    schedule.take(0)
    schedule.finished(0, 20)
    assert [(p.request_id, p.scheduled_ns) for p in schedule.rest()] == [(1, 25), (2, 2), (3, 7)]
    schedule = whole_schedule([planned(0), planned(1, after=0)], timed=False)
    schedule.take(0)
    schedule.finished(0, 20)
    assert [p.scheduled_ns for p in schedule.rest()] == [None]


@given(
    sessions=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    took=st.lists(st.integers(0, 50), min_size=30, max_size=30),
    think=st.integers(0, 20),
    timed=st.booleans(),
)
def test_every_request_goes_out_once_and_never_before_it_may(sessions, took, think, timed):
    last: dict[int, int] = {}
    rows = []
    for i, session in enumerate(sessions):
        after = last.get(session) if session else None
        rows.append(planned(i, 10 * i if timed else None, after, think))
        last[session] = i
    schedule = whole_schedule(rows, timed=timed)
    now, ends, sent = 0, {}, {}
    while schedule.left:
        due = schedule.next_due()
        if due is None or any(end <= max(due, now) for end in ends.values()):
            first = min(ends, key=lambda i: (ends[i], i))
            now = max(now, ends.pop(first))
            schedule.finished(first, now)
            sent[first] = (*sent[first][:1], now)
            continue
        now = max(now, due)
        one, at = schedule.take(now)
        assert at <= now
        assert one.request_id not in sent
        sent[one.request_id] = (at, None)
        ends[one.request_id] = now + took[one.request_id]
        if one.after is not None:
            assert at == max(sent[one.after][1] + think, one.scheduled_ns or 0)
        elif timed:
            assert at == one.scheduled_ns
    assert sorted(sent) == list(range(len(rows)))


@given(slots=st.integers(1, 40), workers=st.integers(1, 4), ramp_s=st.floats(0.001, 100))
def test_slots_join_evenly_over_the_ramp(slots, workers, ramp_s):
    starts = sorted(t for k in range(workers) for t in slot_starts(ramp_s, slots, k, workers))
    assert starts[0] == 0
    assert np.diff(starts) == pytest.approx(ramp_s * S / (slots * workers), rel=1e-6, abs=2)
    assert slot_starts(None, 3) == [0, 0, 0]


# -- the worker -------------------------------------------------------------------------------------------------------


def test_a_ramp_fills_the_slots_one_by_one(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.005")
    plan = write_plan(tmp_path / "plan.arrow", n=150, timed=False)
    _, end, rows = start(server.url, plan, mode="closed", concurrency=5, ramp_s=1.0).start().end()
    assert (end["exit"], classes(rows)) == (None, {None: 150})
    finished = [row["finished_ns"] for row in rows]
    joined = sorted({row["scheduled_ns"] for row in rows} - set(finished))
    assert joined == [0, 200_000_000, 400_000_000, 600_000_000, 800_000_000]
    for k in range(1, 5):
        at = joined[k] - 1_000_000
        assert sum(row["sent_ns"] <= at < row["finished_ns"] for row in rows) <= k
    assert all(row["sent_ns"] >= row["scheduled_ns"] for row in rows)


def test_a_stop_during_the_ramp_ends_it(fake_server: StartServer, start, tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", n=20, timed=False, tokens=1)
    worker = start(fake_server("--ttft", "0.3").url, plan, mode="closed", concurrency=4, ramp_s=100.0).start()
    worker.process.stdout.readline()
    worker.tell("stop")
    _, end, rows = worker.end(10)
    assert (end["exit"], len(rows)) == (None, 20)
    assert set(classes(rows)) <= {None, "unsent"}
    assert classes(rows)["unsent"] >= 10, "the slots that never joined and most of the plan"


def test_a_turn_that_waits_for_a_slow_server_is_not_late(fake_server: StartServer, start, tmp_path):
    """Due 10 ms apart, 100 ms an answer: without honest due times the third turn would look 180 ms late."""
    server = fake_server("--ttft", "0.1", "--itl", "0.001")
    chain = {"slice": [0, 0, 0, 1], "after": [None, 0, 1, None], "think_ns": [None, 0, 30_000_000, None]}
    plan = write_plan(tmp_path / "plan.arrow", n=4, gap_s=0.01, tokens=1, **chain)

    def play() -> dict[str, bool]:
        _, _, rows = start(server.url, plan).start().end()
        assert rows[1]["scheduled_ns"] == rows[0]["finished_ns"]
        assert rows[2]["scheduled_ns"] == rows[1]["finished_ns"] + 30_000_000
        assert rows[3]["scheduled_ns"] == 30_000_000, "nobody else waits"
        return {"sent when due": bool(np.median([row["sent_ns"] - row["scheduled_ns"] for row in rows]) < 0.05 * S)}

    in_time(play)


def test_hang_ups_of_the_plan_are_rows(fake_server: StartServer, start, tmp_path):
    server = fake_server("--ttft", "0.02", "--itl", "0.02")
    after = [100_000_000 if i % 2 else None for i in range(20)]
    plan = write_plan(tmp_path / "plan.arrow", n=20, gap_s=0.01, tokens=20, cancel_after_ns=after)
    _, end, rows = start(server.url, plan).start().end()
    assert (end["exit"], classes(rows)) == (None, {None: 10, "cancelled": 10})
    assert all((row["error"] == "cancelled") == (row["request_id"] % 2 == 1) for row in rows)
    assert all(0 < len(row["chunk_gap_ns"]) < 20 for row in rows if row["error"])


def test_time_limits_of_the_plan_are_rows(fake_server: StartServer, start, tmp_path):
    """20 tokens take 0.4 s: a limit of 100 ms fails each, one of 10 s none, whatever the run's is."""
    server = fake_server("--ttft", "0.02", "--itl", "0.02")
    limits = [100_000_000 if i % 2 else 10_000_000_000 for i in range(10)]
    plan = write_plan(tmp_path / "plan.arrow", n=10, gap_s=0.01, tokens=20, timeout_ns=limits)
    _, end, rows = start(server.url, plan, timeout_s=0.2).start().end()
    assert (end["exit"], classes(rows)) == (None, {None: 5, "timeout": 5})
    assert all((row["error"] == "timeout") == (row["request_id"] % 2 == 1) for row in rows)
    assert all("0.1 s" in row["detail"] for row in rows if row["error"])


# -- the command line -------------------------------------------------------------------------------------------------


def write_trace(path: Path, n: int = 60, gap_s: float = 0.02, **fields: Any) -> Path:
    rows = ({"arrival_s": round(i * gap_s, 6), "input_tokens": 20, "output_tokens": 10, **fields} for i in range(n))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def replay(fake_server: StartServer, tmp_path: Path):
    """Run `harness replay` to its end: (report, run directory, rows by id)."""
    server = fake_server("--ttft", "0.03", "--itl", "0.005")

    def go(trace: Path, *args: str) -> tuple[dict[str, Any], RunDir, list[dict[str, Any]]]:
        done = harness("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs", "--format", "json", *args)
        assert done.stdout.strip(), done.stderr
        run = RunDir(max((tmp_path / "runs").iterdir()))
        rows = [row for file in run.all_results() for row in read_results(file).to_pylist()]
        return json.loads(done.stdout), run, sorted(rows, key=lambda row: row["request_id"])

    return go


def broken(report: dict[str, Any]) -> list[str]:
    """Gates that failed, but for those that a test machine busy with other things may fail."""
    busy = ("lag", "generator_", "arrivals", "littles_law")
    return [c["name"] for c in report["checks"] if c["gate"] and c["ok"] is False and not c["name"].startswith(busy)]


def test_stages_with_repeat_and_warm_up(replay, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 30)
    stages = "1s@20,500ms@20..60,500ms@0,1s@30"
    report, run, rows = replay(trace, "--stages", stages, "--repeat", "--warmup", "1s", "--seed", "5")
    assert broken(report) == []
    plan = list(iter_requests(run.plan))
    assert [row["scheduled_ns"] for row in rows] == [request.scheduled_ns for request in plan]
    warm = sum(request.scheduled_ns < S for request in plan)
    assert report["requests"]["planned"] == len(plan) - warm
    assert [request.phase for request in plan] == ["warmup"] * warm + ["measured"] * (len(plan) - warm)
    assert not [row for row in rows if 1.5 * S < row["scheduled_ns"] < 2 * S]
    info = read_manifest(run.path).plan
    assert (info.arrivals, info.seed, len(info.stages), info.warmup_requests) == ("poisson", 5, 4, warm)
    assert info.cycles == -(-len(plan) // 30) > 1


def test_a_closed_loop_with_ramp_and_warm_up_by_time(replay, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 30)
    report, run, rows = replay(
        trace, "--concurrency", "4", "--ramp", "500ms", "--warmup", "700ms", "--limit", "120", "--repeat"
    )
    assert broken(report) == []
    spec = read_manifest(run.path).spec
    assert (spec.ramp_s, spec.warmup_s) == (0.5, pytest.approx(0.7))
    assert len(rows) == 120
    assert report["requests"]["planned"] == sum(row["scheduled_ns"] >= spec.warmup_s * S for row in rows) < 120


def test_cancelled_requests_are_neither_success_nor_failure(replay, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 60)
    report, _, rows = replay(trace, "--cancel", "30%@40ms")
    hung_up = sum(row["error"] == "cancelled" for row in rows)
    assert 6 <= hung_up <= 30
    assert {row["error"] for row in rows} == {None, "cancelled"}
    assert broken(report) == []
    assert report["requests"]["failed"] == 0
    assert report["requests"]["succeeded"] == 60 - hung_up


def test_sessions_wait_and_the_run_is_valid(replay, tmp_path: Path) -> None:
    rows = [
        {"arrival_s": i * 0.01, "input_tokens": 20, "output_tokens": 10, "session_id": str(i % 5), "think_s": 0.02}
        for i in range(40)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, _, rows = replay(trace, "--sessions", "wait", "--workers", "2")
    assert broken(report) == []
    for row in rows[5:]:
        assert row["scheduled_ns"] >= rows[row["request_id"] - 5]["finished_ns"] + 20_000_000
    assert report["metrics"]["lag"]["p50"]["value"] < 0.05


def test_no_stream_has_an_end_and_no_ttft(replay, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", 30)
    report, _, rows = replay(trace, "--no-stream", "--retries", "2", "--header", "X-Tenant: a", "--slo", "e2e=1s")
    assert broken(report) == []
    assert [row["chunk_gap_ns"] for row in rows] == [[]] * 30
    assert report["metrics"]["ttft"]["p50"]["value"] is None
    assert report["metrics"]["e2e"]["p50"]["value"] == pytest.approx(0.03 + 9 * 0.005, abs=0.05)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ramp", "1s"], "--concurrency"), (["--concurrency", "4", "--stages", "1s@1"], "closed loop"),
        (["--concurrency", "4", "--arrivals", "poisson"], "closed loop"), (["--stages", "1s"], "2m@4"),
        (["--warmup", "1.5"], "unit"), (["--warmup", "soon"], "30s"), (["--cancel", "2@2s"], "share@time"),
        (["--cancel", "0.1"], "share@time"), (["--header", "Authorization: Bearer x"], "HARNESS_API_KEY"),
        (["--no-stream", "--slo", "ttft=1s"], "e2e"), (["--extra-body", '{"stream": false}'], "--no-stream"),
        (["--arrivals", "gamma", "--rate", "3"], "burstiness"), (["--arrivals", "poisson"], "--rate"),
        (["--balance", "fair"], "round-robin"), (["--retries", "-1"], "retries"), (["--tls-ca", "/none"], "/none"),
        (["--stages", "100s@1000"], "--repeat"), (["--repeat"], "end"),
    ],
)  # fmt: skip
def test_wrong_wishes_are_answered_with_what_to_do(fake_server: StartServer, tmp_path: Path, capsys, args, words):
    trace = write_trace(tmp_path / "trace.jsonl", 5)
    with pytest.raises(SystemExit) as end:
        main(["replay", str(trace), "--base-url", fake_server().url, "--out", str(tmp_path / "runs"), *args])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
