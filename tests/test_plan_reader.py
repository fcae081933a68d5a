"""Plans of any length: read and prepared a bounded time ahead, every request sent once or accounted for."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import StartServer, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worker import Worker, classes, run_patched, write_plan

from harness.errors import PlanError
from harness.record.run_spec import RunSpec
from harness.record.samples import WORKER_SCHEMA, read_observations
from harness.scenarios import schedule as schedules
from harness.scenarios.plan_reader import Planned, PlanReader
from harness.scenarios.schedule import Schedule

SMALL = schedules._Ahead(ns=200_000_000, requests=5, bytes=10**6, least_ns=10_000_000, least=2, most_bytes=2 * 10**6)


def window(plan: Path, worker: int = 0, workers: int = 1, *, timed: bool = True) -> PlanReader:
    spec = RunSpec(mode="open" if timed else "closed", model="m", base_urls=[], workers=workers)
    return PlanReader(plan, spec, worker)


def drain(schedule: Schedule, now_ns: int = 10**15) -> list[int]:
    """Hand out everything, each answered at once."""
    out = []
    while schedule.left:
        assert schedule.next_due() is not None
        planned, _ = schedule.take(now_ns)
        schedule.finished(planned.request_id, now_ns)
        out.append(planned.request_id)
    return out


# -- what is prepared -------------------------------------------------------------------------------------------------


def test_ten_seconds_and_two_thousand_requests_are_prepared_and_no_more(tmp_path: Path) -> None:
    dense = Schedule.of(window(write_plan(tmp_path / "a", n=6000, gap_s=0.0001)))
    assert (dense.prepared, dense.left) == (6000, 6000), "0.6 s in all"
    sparse = Schedule.of(window(write_plan(tmp_path / "b", n=6000, gap_s=0.1)))
    assert (sparse.prepared, sparse.left) == (2000, 6000)
    busy = Schedule.of(window(write_plan(tmp_path / "c", n=6000, gap_s=0.0025)))
    assert busy.prepared == pytest.approx(4000, abs=2)
    closed = Schedule.of(window(write_plan(tmp_path / "d", n=6000, timed=False), timed=False))
    assert (closed.prepared, closed.left) == (2000, 6000)


def test_large_prompts_are_prepared_less_far_ahead(tmp_path: Path) -> None:
    prompts = [np.full(200_000, 7, np.int32)] * 300
    closed = Schedule.of(window(write_plan(tmp_path / "a", n=300, timed=False, prompt_token_ids=prompts), timed=False))
    assert closed.prepared * 400_000 == pytest.approx(64 * 2**20, rel=0.02)
    timed = Schedule.of(window(write_plan(tmp_path / "b", n=300, gap_s=0.004, prompt_token_ids=prompts)))
    assert timed.prepared == pytest.approx(250, abs=2), "a second, whatever they take"


def test_the_window_moves_with_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "AHEAD", SMALL)
    source = window(write_plan(tmp_path / "plan", n=3000, gap_s=0.001))
    schedule = Schedule.of(source)
    most = 0
    for i in range(3000):
        now = int(i * 0.001 * 1e9)
        while schedule.wants_more(now) and schedule.read_more():
            pass
        most = max(most, schedule.prepared)
        assert schedule.next_due() == now
        assert schedule.take(now)[0].request_id == i
    assert (schedule.left, schedule.prepared, schedule.next_due()) == (0, 0, None)
    assert most <= 202


@pytest.mark.parametrize("timed", [True, False])
def test_slices_are_the_plan(tmp_path: Path, timed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "AHEAD", SMALL)
    plan = write_plan(tmp_path / "plan", n=500, timed=timed, slice=[i // 3 for i in range(500)])
    parts = [window(plan, k, 3, timed=timed) for k in range(3)]
    assert sum(part.requests for part in parts) == 500
    sent = [drain(Schedule.of(part)) for part in parts]
    assert sorted(i for part in sent for i in part) == list(range(500))
    assert all(part == sorted(part) for part in sent)


def test_what_was_not_read_is_known_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "AHEAD", SMALL)
    source = window(write_plan(tmp_path / "plan", n=4000, gap_s=0.1, slice=[i // 2 for i in range(4000)]), 1, 2)
    schedule = Schedule.of(source)
    sent = [schedule.take(0)[0].request_id for _ in range(3)]
    read = [planned.request_id for planned in schedule.rest()]
    unread = list(source.unread())
    assert sorted([*sent, *read, *(i for i, _ in unread)]) == [i for i in range(4000) if i // 2 % 2]
    assert all(due == int(i * 0.1 * 1e9) for i, due in unread)


@pytest.mark.parametrize(
    ("columns", "timed", "words"),
    [
        ({"after": [None, 5, None], "slice": [0, 0, 0]}, True, "waits for 5"),
        ({"after": [None, 1, None], "slice": [0, 0, 0]}, True, "waits for 1"),
        ({"after": [None, 0, None], "slice": [0, 1, 2]}, False, None),
        ({"scheduled_ns": [0, 1, None]}, True, "request 2 has no time"), ({"scheduled_ns": [0, 1, None]}, False, None),
    ],
)  # fmt: skip
def test_a_plan_that_could_never_end_is_refused_before_the_start(tmp_path: Path, columns, timed, words) -> None:
    plan = write_plan(tmp_path / "plan", n=3, **columns)
    if words is None:
        assert drain(Schedule.of(window(plan, timed=timed))) == [0, 1, 2]
        return
    with pytest.raises(PlanError, match=words):
        window(plan, timed=timed)


def test_another_workers_predecessor_is_refused(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan", n=3, after=[None, 0, None], slice=[0, 1, 2])
    with pytest.raises(PlanError, match="waits for 0"):
        window(plan, 1, 2)


# -- the order is that of a plan read whole ---------------------------------------------------------------------------


def play(rows: list[Planned], took: list[int], *, timed: bool, lazily: bool, slots: int) -> list[tuple[int, int, int]]:
    """(id, due, sent) of a run with answers of known length; ``slots`` in flight at most."""
    awaited = np.sort(np.array([one.after for one in rows if one.after is not None], dtype=np.int64))
    schedule = Schedule(rows, timed=timed, requests=len(rows), awaited=awaited)
    while not lazily and schedule.read_more():
        pass
    now, ends, log = 0, [], []
    while schedule.left:
        while lazily and schedule.wants_more(now) and schedule.read_more():
            pass
        due = schedule.next_due()
        if due is not None and due <= now and len(ends) < slots:
            one, at = schedule.take(now)
            log.append((one.request_id, at, now))
            ends.append((now + took[one.request_id], one.request_id))
            continue
        moments = [end for end, _ in ends]
        if due is not None and due > now and len(ends) < slots:
            moments.append(due)
        if lazily and not schedule.all_read:
            moments.append(now + 1)
        assert moments, "nothing will ever happen"
        now = max(now, min(moments))
        for end in sorted(end for end in ends if end[0] <= now):
            ends.remove(end)
            schedule.finished(end[1], end[0])
    return log


@settings(max_examples=200, deadline=None)
@given(
    sessions=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    took=st.lists(st.integers(0, 50), min_size=40, max_size=40),
    gaps=st.lists(st.integers(0, 12), min_size=40, max_size=40),
    think=st.integers(0, 20), ahead=st.integers(1, 15), requests=st.integers(1, 6), slots=st.integers(1, 50),
)  # fmt: skip
def test_an_open_loop_goes_out_as_if_read_whole(sessions, took, gaps, think, ahead, requests, slots) -> None:
    last: dict[int, int] = {}
    rows, times = [], np.cumsum(gaps).tolist()
    for i, session in enumerate(sessions):
        rows.append(Planned(i, times[i], last.get(session) if session else None, think, b"x"))
        last[session] = i
    whole = play(rows, took, timed=True, lazily=False, slots=slots)
    before = schedules.AHEAD
    schedules.AHEAD = schedules._Ahead(ns=ahead, requests=requests)
    try:
        assert play(rows, took, timed=True, lazily=True, slots=slots) == whole
    finally:
        schedules.AHEAD = before


@settings(max_examples=200, deadline=None)
@given(
    sessions=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    took=st.lists(st.integers(0, 50), min_size=40, max_size=40),
    think=st.integers(0, 20), requests=st.integers(1, 6), slots=st.integers(1, 8), limit=st.sampled_from([3, 10**6]),
    shared=st.booleans(),
)  # fmt: skip
def test_a_closed_loop_keeps_its_slots_full_and_its_sessions_in_order(
    sessions, took, think, requests, slots, limit, shared
) -> None:
    last: dict[int, int] = {}
    rows = []
    for i, session in enumerate(sessions):
        rows.append(Planned(i, None, last.get(session) if session else None, think, b"x"))
        if not (shared and session in last):
            last[session] = i
    before = schedules.AHEAD
    schedules.AHEAD = schedules._Ahead(requests=requests, bytes=limit, most_bytes=limit, least=1)
    try:
        log = play(rows, took, timed=False, lazily=True, slots=slots)
    finally:
        schedules.AHEAD = before
    assert sorted(i for i, _, _ in log) == list(range(len(rows)))
    sent = {i: at for i, _, at in log}
    for one in rows:
        if one.after is not None:
            assert sent[one.request_id] >= sent[one.after] + took[one.after] + think
    free = deque(i for i, _, _ in log if rows[i].after is None)
    assert list(free) == sorted(free), "new sessions in the order of the plan"


# -- whole runs -------------------------------------------------------------------------------------------------------

NARROW = (
    "import harness.scenarios.schedule as s, harness.scenarios.dispatch as d\n"
    "s.AHEAD = s._Ahead(ns=100_000_000, requests=5, bytes=10**6, least_ns=10**7, least=2, most_bytes=2 * 10**6)", "",
)  # fmt: skip


# Nobody reads ahead; what ran out is still noticed.
NO_FILL = NARROW[0] + """
fill = d.Dispatcher.fill
def late(self):
    while not (self.stopping or self.schedule.all_read):
        d.gevent.sleep(0.01)
    fill(self)
d.Dispatcher.fill = late""", ""  # fmt: skip


@pytest.mark.parametrize(("mode", "concurrency"), [("open", None), ("closed", 8)])
def test_a_run_through_a_narrow_window(fake_server: StartServer, tmp_path: Path, mode, concurrency) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    n = 600
    chain = {"slice": [i % 40 for i in range(n)], "after": [i - 40 if i >= 40 and i % 3 else None for i in range(n)],
             "think_ns": [1_000_000 if i >= 40 and i % 3 else None for i in range(n)]}  # fmt: skip
    plan = write_plan(tmp_path / "plan.arrow", n=n, gap_s=0.004, timed=mode == "open", **chain)
    seen = tmp_path / "seen.arrows"
    lines, words = run_patched(
        tmp_path, server.url, plan, NARROW, mode=mode, concurrency=concurrency, observations=str(seen)
    )
    end = json.loads(lines[-1])
    assert (end["exit"], end["rows"]) == (None, n), words
    prepared = read_observations(seen)["prepared"].to_pylist()
    assert max(prepared) < 100
    assert prepared[-1] == 0


def test_a_run_stopped_early_has_a_row_for_what_was_never_read(fake_server: StartServer, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.arrow", n=40_000, gap_s=0.02, tokens=1)
    server = fake_server("--ttft", "0.01")
    worker = Worker(tmp_path, server.url, plan)
    try:
        assert worker.ready()["requests"] == 40_000
        worker.tell(f"start {time.time_ns()}")
        wait_for(lambda: len(server.truth()) > 0, 120, "an answer")
        worker.tell("stop")
        _, end, rows = worker.end()
    finally:
        worker.process.kill()
        worker.process.wait(120)
    assert (end["exit"], len(rows)) == (None, 40_000)
    assert set(classes(rows)) == {None, "unsent"}
    assert [row["request_id"] for row in rows] == list(range(40_000))
    assert rows[-1]["scheduled_ns"] == int(39_999 * 0.02 * 1e9)


def test_a_window_that_runs_dry_is_lag_and_no_loss(fake_server: StartServer, tmp_path: Path) -> None:
    """Nobody reads ahead: each request is prepared when it is asked for, and all go out."""
    plan = write_plan(tmp_path / "plan.arrow", n=300, timed=False)
    server = fake_server("--ttft", "0.01", "--itl", "0.001")
    lines, words = run_patched(tmp_path, server.url, plan, NO_FILL, mode="closed", concurrency=8)
    assert (json.loads(lines[-1])["exit"], json.loads(lines[-1])["rows"]) == (None, 300), words


@pytest.mark.parametrize("code", [NARROW, NO_FILL])
def test_a_request_that_cannot_be_prepared_ends_the_run_and_is_said(
    fake_server: StartServer, tmp_path: Path, code
) -> None:
    mode, concurrency = ("open", None) if code is NARROW else ("closed", 4)
    good = '[{"role":"user","content":"hi"}]'
    messages = [good] * 300 + ["{"] + [good] * 99
    plan = write_plan(
        tmp_path / "plan.arrow", n=400, gap_s=0.004, timed=mode == "open", prompt_token_ids=[None] * 400,
        messages=messages,
    )  # fmt: skip
    lines, words = run_patched(
        tmp_path, fake_server("--ttft", "0.01", "--itl", "0.001").url, plan, code, mode=mode, concurrency=concurrency,
        endpoint="chat",
    )  # fmt: skip
    end = json.loads(lines[-1])
    assert "request 300" in end["exit"]
    assert "JSON list" in end["exit"]
    assert end["rows"] == 400
    assert "Traceback" not in words


def test_observations_of_the_version_before_are_still_read(tmp_path: Path) -> None:
    old = pa.schema(
        [field for field in WORKER_SCHEMA if field.name != "prepared"], metadata={"harness.observations": "1"}
    )
    path = tmp_path / "worker-0.arrows"
    with pa.ipc.new_stream(str(path), old) as stream:
        row = [pa.array([1], field.type) for field in old]
        stream.write_batch(pa.record_batch(row, schema=old))
    table = read_observations(path)
    assert table.schema.equals(WORKER_SCHEMA)
    assert table.to_pylist()[0]["prepared"] is None
