"""What was offered: the kind of load, what was really sent, and what users of sessions that wait waited for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from run_files import MS, SPEC, S, good, write_run

from harness.analysis.capacity.probes import evidence_of
from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.capacity.system import load_words, offered
from harness.analysis.report.capacity_text import capacity_sections, sentence
from harness.analysis.report.run import render_json, render_markdown
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import read_run
from harness.analysis.rows.run import own_times
from harness.analysis.summary import summarise
from harness.plan.file import PlannedWindow
from harness.record.manifest import RunDir, read_manifest, write_manifest
from harness.slo import Criterion
from harness.trace.stats import TraceStats

TURNS, EVERY_S, ANSWER_S, THINK_S = 4, 2.0, 3.0, 1.0
"""Planned: a turn each 2 s. The server takes 3 s to answer, and users think for 1 s: each turn comes 4 s after the
one before it, so later by 2, 4, 6 s than in the trace."""


def sessions_run(path, *, sessions=60, start_every_s=0.5, answer_s=ANSWER_S, waits=True, limit_s=60.0):
    """A server that takes ``answer_s`` for every answer, and sessions of `TURNS` turns that wait for it (or do not)."""
    rows, plan = [], {}
    for k in range(sessions):
        end_s = 0.0
        for turn in range(TURNS):
            n = k * TURNS + turn
            planned_s = k * start_every_s + turn * EVERY_S
            due_s = planned_s if not waits or turn == 0 else max(planned_s, end_s + THINK_S)
            end_s = due_s + answer_s
            itl_ms = (answer_s - 0.05) * 1000 / 3
            rows.append(good(n, round(due_s * S), ttft_ms=50, itl_ms=itl_ms))
            first = turn == 0 or not waits
            plan[n] = {
                "scheduled_ns": round(planned_s * S), "slice": k, "after": None if first else n - 1,
                "think_ns": None if first else round(THINK_S * S),
            }  # fmt: skip
    write_run(path, rows, plan=plan, spec=replace(SPEC, slo={"ttft": limit_s}))
    manifest = read_manifest(path)
    times = np.sort([fields["scheduled_ns"] for fields in plan.values()]) / S
    rate = (len(times) - 1) / (times[-1] - times[0])
    manifest.plan = replace(manifest.plan, sessions="wait" if waits else "trace", planned_rate=float(rate))
    write_manifest(RunDir(path), manifest)
    return summarise(read_run(path))


def test_sessions_that_wait_are_a_kind_of_load_of_their_own(tmp_path):
    s = sessions_run(tmp_path / "run")
    assert s.offered.kind == "sessions"
    # 60 starts, one each half second; 240 requests over 29.5 s + three turns of 4 s
    assert s.offered.session_rate.value == pytest.approx(2.0)
    assert s.offered.requests_per_session == TURNS
    assert s.offered.sent_rate.value == pytest.approx(239 / (29.5 + 12.0))
    assert s.rates.request_rate.value == pytest.approx(239 / (29.5 + 6.0))
    assert offered(s) == 2.0
    assert "open loop" not in load_words(s)
    assert load_words(s) == "sessions that wait, 2 sessions/s started, 5.76 req/s sent of 6.73 planned"


def test_what_users_wait_behind_a_slow_answer_is_session_lag(tmp_path):
    """Turns come 2, 4 and 6 s after their own time; the generator's lag does not know of it."""
    s = sessions_run(tmp_path / "run")
    assert s.metrics.session_lag.mean.n == 60 * (TURNS - 1)
    assert s.metrics.session_lag.mean.value == pytest.approx(4.0)
    assert s.metrics.session_lag.p50.value == pytest.approx(4.0)
    assert s.metrics.lag.mean.value == 0.0
    # a server that answers within the trace's own gaps makes nobody wait
    quick = sessions_run(tmp_path / "quick", answer_s=0.5)
    assert quick.metrics.session_lag.mean.value == 0.0
    assert quick.offered.sent_rate.value == pytest.approx(quick.rates.request_rate.value)


def test_other_loads_have_no_session_lag(tmp_path):
    s = sessions_run(tmp_path / "run", waits=False)
    assert s.offered.kind == "open"
    assert (s.metrics.session_lag.mean.value, s.metrics.session_lag.p50.value) == (None, None)
    assert s.metrics.session_lag.mean.note == "no turns that wait for an answer to measure"
    assert "session lag" not in render_markdown(s)
    assert s.offered.session_rate.value is None and s.offered.requests_per_session is None
    assert load_words(s).startswith("open loop, ")
    closed = replace(SPEC, mode="closed", concurrency=2)
    write_run(tmp_path / "closed", [good(k) for k in range(20)], spec=closed)
    assert summarise(read_run(tmp_path / "closed")).offered.kind == "closed"


def test_a_live_conversation_waits_too(tmp_path):
    sessions_run(tmp_path / "run")
    manifest = read_manifest(tmp_path / "run")
    manifest.plan = replace(manifest.plan, conversation="live")
    write_manifest(RunDir(tmp_path / "run"), manifest)
    assert summarise(read_run(tmp_path / "run")).offered.kind == "sessions"


def test_reports_say_what_was_sent(tmp_path):
    s = sessions_run(tmp_path / "run")
    text = render_markdown(s)
    assert "open loop, " not in text
    assert "sessions that wait, 2 sessions/s started, 5.759 req/s sent (6.732 req/s planned)" in text
    assert "session lag" in text
    assert '"session_lag": {' in render_json(s) and '"kind": "sessions"' in render_json(s)
    arrivals = next(c for c in s.checks if c.name == "arrivals")
    assert arrivals.ok is False and arrivals.observed == "sessions that wait"
    v = view_run(read_run(tmp_path / "run"), s)
    assert "At 2 sessions started a second" in v.sentence
    names = [row[0] for section in v.sections if section.id in ("latency", "time") for row in section.table.rows]
    assert {"session lag (due after its own time)", "requests sent", "sessions started"} <= set(names)


def test_capacity_is_planned_in_sessions(tmp_path):
    """Loads are rates of sessions started; what was really sent stands beside them."""
    runs = [
        sessions_run(tmp_path / "low", start_every_s=1.0, answer_s=0.4, limit_s=1.0),
        sessions_run(tmp_path / "high", start_every_s=0.25, answer_s=9.0, limit_s=1.0),
    ]
    (system,) = serving_configs(runs)
    assert (system.loop, system.unit, system.loads) == ("sessions", "sessions/s", (1.0, 4.0))
    # at 4 a second every request that is sent keeps the limit, and ever more turns wait for the answer before them
    assert system.capacity is not None and system.capacity.state == "found"
    assert system.capacity.load.value is not None and 1.0 <= system.capacity.load.value < 4.0
    # 240 requests of 60 sessions, one each 250 ms, and three turns of 10 s
    assert system.top_sent_rate == pytest.approx(239 / (14.75 + 30.0))
    assert system.requests_per_s is not None and system.requests_per_s < system.top_sent_rate
    assert " req/s really sent)" in sentence(system)
    assert any("sessions that wait" in block.title for block in capacity_sections([system]))
    # it does not follow the 11.5 req/s that these sessions ask for, though it does follow what they really send
    assert system.saturated_from == 4.0


def test_open_loops_and_sessions_are_different_systems(tmp_path):
    runs = [sessions_run(tmp_path / "a"), sessions_run(tmp_path / "b", waits=False)]
    assert sorted(one.loop for one in serving_configs(runs)) == ["open", "sessions"]


def test_own_times_follow_think_times_that_the_clock_does_not():
    scheduled = np.array([0.0, 1.0, 2.0, 3.0]) * MS
    after, think = np.array([np.nan, 0, np.nan, 1]), np.array([np.nan, 5.0, np.nan, np.nan]) * MS
    assert own_times(scheduled, after, think).tolist() == [0, 5 * MS, 2 * MS, 5 * MS]
    assert scheduled.tolist() == [0, MS, 2 * MS, 3 * MS]


def test_what_a_window_leaves_of_a_session_begins_none(tmp_path):
    """Of three windows a half of the first turns are of sessions that began before; the trace says how many begin."""
    whole = sessions_run(tmp_path / "run")
    manifest = read_manifest(tmp_path / "run")
    source = TraceStats(
        requests=1000, arrivals=None, input_tokens=None, output_tokens=None, sessions=100, session_rows=900,
        most_turns=12, unit_rows=9.0, prefix=None, grid_s=None,
    )  # fmt: skip
    windows = [PlannedWindow(first_row=0, last_row=239, starts_s=0.0, requests=240, lasts_s=36.0)]
    manifest.plan = replace(manifest.plan, windows=windows, source=source)
    write_manifest(RunDir(tmp_path / "run"), manifest)
    cut = summarise(read_run(tmp_path / "run"))
    assert cut.offered.requests_per_session == 5.0  # 900 in sessions of 9, 100 alone
    assert cut.offered.session_rate.value == pytest.approx(whole.plan.planned_rate / 5.0)
    assert cut.offered.sent_rate == whole.offered.sent_rate


def test_turns_that_come_after_the_plans_end_are_no_evidence(tmp_path):
    """60 starts, one each half second, and turns planned to 35.5 s; with 3 s to answer they come until 41.5 s."""
    sessions_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    limit = Criterion(name="ttft", wanted=0.95, limits={"ttft": 1.0})
    evidence = evidence_of(run, [limit], 6.7, lost=False)
    last_s = 29.5 + (TURNS - 1) * EVERY_S
    late = sum(k * 0.5 + turn * (ANSWER_S + THINK_S) > last_s for k in range(60) for turn in range(TURNS))
    assert late == 12 + 4  # the last 12 sessions' fourth turns, the last 4 sessions' third
    assert int(evidence.measured.sum()) == len(evidence.kept[0]) == 240 - late
    assert evidence.sent.after is not None and evidence.sent.after[:5].tolist() == [-1, 0, 1, 2, -1]
