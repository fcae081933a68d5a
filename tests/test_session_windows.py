"""Windows of a trace whose sessions wait: sessions begin on another clock, and keep their own pace."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, Request, Windows, iter_requests
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.plan.windows import windows_in_time
from harness.trace.io import open_trace

VOCABULARY = Vocabulary.from_ids(range(100, 5000))
TURNS, EVERY_S, SESSIONS = 5, 2.0, 400
OWN_RATE = 4.0
"""Requests/s of the trace: a session in 1.25 s, each 8 s long."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row i has i + 1 output tokens; a session has a turn each 2 s, the k-th with 10 k input tokens."""
    starts = np.cumsum(np.random.default_rng(1).exponential(TURNS / OWN_RATE, SESSIONS)).round(3)
    turns = sorted((float(at) + k * EVERY_S, s, k) for s, at in enumerate(starts) for k in range(TURNS))
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    with path.open("w") as file:
        for i, (at, s, k) in enumerate(turns):
            row = {"arrival_s": round(at, 3), "input_tokens": 10 * (k + 1), "output_tokens": i + 1,
                   "session_id": f"s{s}", "turn": k, "think_s": 1.0}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    return path


def planned(trace: Path, out: Path, *, rate: float, draw: int = 0, seconds: float = 60.0, sessions: str = "wait",
            count: int = 3, busiest: bool = False, seed: int = 0) -> tuple[PlanInfo, list[Request]]:  # fmt: skip
    out.unlink(missing_ok=True)
    spec = PlanSpec(closed=False, rate=rate, duration_s=seconds, sessions=sessions, seed=seed,
                    windows=Windows(count=count, draw=draw, busiest=busiest))  # fmt: skip
    return build_plan(open_trace(trace), out, spec, VOCABULARY), list(iter_requests(out))


def by_session(requests: list[Request]) -> list[list[Request]]:
    found = defaultdict(list)
    for request in requests:
        found[request.slice].append(request)
    return list(found.values())


@pytest.mark.parametrize("rate", [1.0, OWN_RATE, 16.0])
def test_turns_keep_their_pace_whatever_the_rate(tmp_path: Path, trace: Path, rate: float) -> None:
    whole = 0
    for draw in range(4):
        _, requests = planned(trace, tmp_path / "p", rate=rate, draw=draw)
        times = [request.scheduled_ns or 0 for request in requests]
        assert times == sorted(times)
        for session in by_session(requests):
            assert [turn.after for turn in session] == [None, *(turn.request_id for turn in session[:-1])]
            inputs = [turn.input_tokens or 0 for turn in session]
            assert np.diff(inputs).tolist() == [10] * (len(inputs) - 1), "consecutive turns, in order"
            for before, after in pairwise(session):
                assert (after.scheduled_ns or 0) - (before.scheduled_ns or 0) == pytest.approx(EVERY_S * 1e9, abs=1e3)
            whole += len(session) == TURNS
    assert whole > 10


@pytest.mark.parametrize("rate", [1.0, 16.0])
def test_the_rate_is_the_one_asked_for_from_the_first_second_on(trace: Path, rate: float) -> None:
    """Without the turns of sessions that began before a window its first seconds would be half empty."""
    records = list(open_trace(trace))
    arrivals = np.array([round((r.arrival_s or 0.0) * 1e9) for r in records])
    first: dict[object, int] = {}
    starts = np.array([first.setdefault(r.session_id, int(at)) for r, at in zip(records, arrivals, strict=True)])
    speed = rate / ((len(arrivals) - 1) / (arrivals[-1] / 1e9))
    times = np.concatenate([
        windows_in_time(
            arrivals, Windows(count=3, draw=draw), starts=starts, lasts_ns=60e9 * speed, speed=speed, trace_sha256="x",
            seed=draw, most=None,
        ).arrangement.scheduled / speed / 1e9
        for draw in range(48)
    ])  # fmt: skip
    counts = np.histogram(times, bins=6, range=(0, 60))[0] / 48 / 10
    assert counts.mean() == pytest.approx(rate, rel=0.05)
    assert counts[0] == pytest.approx(rate, rel=0.15)
    assert counts[-1] == pytest.approx(rate, rel=0.15)


def test_on_the_traces_own_clock_a_window_is_a_stretch_of_the_trace(tmp_path: Path, trace: Path) -> None:
    own = build_plan(open_trace(trace), tmp_path / "o", PlanSpec(closed=False), VOCABULARY).source_rate
    assert own is not None
    _, waiting = planned(trace, tmp_path / "p", rate=own, draw=1)
    _, free = planned(trace, tmp_path / "q", rate=own, draw=1, sessions="trace")
    assert [r.output_tokens for r in waiting] == [r.output_tokens for r in free]
    assert [r.scheduled_ns for r in waiting] == pytest.approx([r.scheduled_ns for r in free], abs=2)


@pytest.mark.parametrize("busiest", [False, True])
def test_a_trace_that_is_sent_several_times_has_each_turn_as_often(
    tmp_path: Path, trace: Path, *, busiest: bool
) -> None:
    """600 s at four times the rate of 500 s: sessions of one pass over the trace hang over into the next."""
    info, requests = planned(trace, tmp_path / "p", rate=16.0, seconds=600.0, count=1, busiest=busiest)
    assert info.trace_share == 1.0 and info.cycles == 5
    sent = np.bincount([request.output_tokens or 0 for request in requests])[1:]
    assert set(sent.tolist()) <= {4, 5}
    for session in by_session(requests):
        assert np.diff([turn.input_tokens or 0 for turn in session]).tolist() == [10] * (len(session) - 1)
    prompts = {(r.output_tokens, tuple(r.prompt_token_ids or ())) for r in requests if r.after is None}
    assert len(prompts) == sum(r.after is None for r in requests), "each pass has prompts of its own"


def test_a_seed_gives_the_plan_again(tmp_path: Path, trace: Path) -> None:
    one, other = (planned(trace, tmp_path / name, rate=9.0, seed=4)[1] for name in "pq")
    assert one == other
    assert planned(trace, tmp_path / "r", rate=9.0, seed=5)[1] != one


def test_a_limit_cuts_the_plan(tmp_path: Path, trace: Path) -> None:
    spec = PlanSpec(
        closed=False, rate=9.0, duration_s=60.0, sessions="wait", windows=Windows(count=3, draw=0), limit=50
    )
    assert build_plan(open_trace(trace), tmp_path / "p", spec, VOCABULARY).requests == 50
