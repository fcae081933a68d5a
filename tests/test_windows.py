"""A plan of windows is stretches of its trace: its rows, its gaps, its rate, from other parts of it for each draw."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from harness.analysis.fidelity.inputs import Fidelity, Plan
from harness.analysis.fidelity.planned import mean_lengths, planned_against_source, rate_and_shape
from harness.errors import UsageError
from harness.options import PlanOptions
from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, Windows, iter_requests, read_plan_columns, read_plan_info
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec, asked_plan
from harness.trace.io import open_trace
from harness.trace.stats import part_sd

VOCABULARY = Vocabulary.from_ids(range(100, 5000))
ROWS = 2000


def trace_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(n: int, rate: float = 2.0, seed: int = 1, **fields: object) -> list[dict]:
    """Poisson arrivals; the output length is the number of the row plus 1."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n)).round(6)
    return [
        {"arrival_s": t, "input_tokens": 20, "output_tokens": i + 1, **fields} for i, t in enumerate(times.tolist())
    ]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace_file(tmp_path_factory.mktemp("t") / "t.jsonl", numbered(ROWS))


def plan(trace: Path, out: Path, *, count: int = 3, draw: int = 0, busiest: bool = False, **spec) -> PlanInfo:
    spec = {"closed": False, **spec}
    if not spec["closed"] and spec.get("arrivals", "trace") == "trace":
        spec = {"rate": 4.0, "duration_s": 60.0, **spec}
    windows = Windows(count=count, draw=draw, busiest=busiest)
    out.unlink(missing_ok=True)
    return build_plan(open_trace(trace), out, PlanSpec(windows=windows, **spec), VOCABULARY)


def rows_of(out: Path) -> list[int]:
    """Numbers of the trace's rows that a plan sends."""
    return [tokens - 1 for tokens in read_plan_columns(out, ["output_tokens"]).column(0).to_pylist()]


def times_of(out: Path) -> np.ndarray:
    return np.array(read_plan_columns(out, ["scheduled_ns"]).column(0).to_pylist()) / 1e9


def parts_of(info: PlanInfo, values) -> list:
    ends = np.cumsum([0] + [window.requests for window in info.windows])
    return [values[a:b] for a, b in pairwise(ends)]


# --- the trace's own times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", range(4))
def test_each_window_has_the_rows_and_the_gaps_of_the_trace(tmp_path, trace, draw):
    info = plan(trace, tmp_path / "p", draw=draw)
    at = np.array([row["arrival_s"] for row in numbered(ROWS)])
    clock = 4.0 / ((ROWS - 1) / (at[-1] - at[0]))
    assert info.speed == pytest.approx(clock, rel=1e-12)
    assert info.source_rate == pytest.approx((ROWS - 1) / (at[-1] - at[0]), rel=1e-12)
    assert info.source is not None and info.source.requests == ROWS, "the whole trace is what the plan is held against"
    assert len(info.windows) == 3
    assert sum(window.requests for window in info.windows) == info.requests
    assert info.trace_share == pytest.approx(info.requests / ROWS)
    times, rows = times_of(tmp_path / "p"), rows_of(tmp_path / "p")
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 60.0
    for k, (window, sent, due) in enumerate(
        zip(info.windows, parts_of(info, rows), parts_of(info, times), strict=True)
    ):
        assert (window.starts_s, window.lasts_s) == (pytest.approx(20.0 * k), pytest.approx(20.0))
        expected = [(window.first_row + i) % ROWS for i in range(window.requests)]
        assert sent == expected
        assert sent[-1] == window.last_row
        assert (due >= 20.0 * k - 1e-6).all()
        assert (due <= 20.0 * (k + 1) + 1e-6).all()
        if window.last_row > window.first_row:
            assert np.diff(due) == pytest.approx(np.diff(at[sent]) / clock, abs=1e-8)
            # Nothing of the trace that belongs into the window is missing.
            room = 20.0 - (due[-1] - due[0])
            assert (at[(sent[-1] + 1) % ROWS] - at[sent[0] - 1]) / clock >= 20.0 - 1e-6 or sent[-1] == ROWS - 1
            assert room >= 0
    assert read_plan_info(tmp_path / "p").windows == info.windows


def test_over_the_draws_the_rate_is_the_one_asked_for(tmp_path, trace):
    sent = [plan(trace, tmp_path / "p", draw=draw).requests for draw in range(16)]
    assert np.mean(sent) == pytest.approx(240, rel=0.02)


def test_draws_take_different_parts_whatever_the_seeds_and_each_part_as_often(tmp_path, trace):
    times = Counter[int]()
    seen = []
    for draw in range(30):
        plan(trace, tmp_path / "p", draw=draw, seed=draw * 17)
        rows = rows_of(tmp_path / "p")
        assert len(set(rows)) == len(rows)
        seen.append(set(rows))
        times.update(rows)
    for before, after in pairwise(seen):
        assert len(before & after) < 0.1 * len(after), "the next draw is another part"
    # 30 draws of about 240 of 2000 rows: each 3.6 times.
    used = np.array([times[row] for row in range(ROWS)])
    assert used.min() >= 2
    assert used.max() <= 5


def test_the_seed_decides_the_order_of_the_windows_and_the_draw_where_they_are(tmp_path, trace):
    orders = set()
    for seed in range(12):
        info = plan(trace, tmp_path / "p", count=4, draw=3, seed=seed)
        assert sorted(w.first_row for w in info.windows) == sorted(
            w.first_row for w in plan(trace, tmp_path / "q", count=4, draw=3, seed=99).windows
        )
        orders.add(tuple(w.first_row for w in info.windows))
    assert len(orders) > 6


def test_equal_specs_are_equal_bytes(tmp_path, trace):
    for spec in ({}, {"closed": True, "limit": 90}, {"arrivals": "poisson", "rate": 3.0, "duration_s": 30.0}):
        plan(trace, tmp_path / "p", seed=5, draw=2, **spec)
        plan(trace, tmp_path / "q", seed=5, draw=2, **spec)
        assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
        plan(trace, tmp_path / "q", seed=5, draw=3, **spec)
        assert rows_of(tmp_path / "p") != rows_of(tmp_path / "q")


def test_a_drift_of_the_trace_is_in_the_probes(tmp_path, drifting):
    mean = np.mean([json.loads(line)["output_tokens"] for line in drifting.read_text().splitlines()])
    pooled: list[int] = []
    for draw in range(8):
        plan(drifting, tmp_path / "p", draw=draw, seed=draw)
        pooled += read_plan_columns(tmp_path / "p", ["output_tokens"]).column(0).to_pylist()
    assert np.mean(pooled) == pytest.approx(mean, rel=0.05)
    head = build_plan(
        open_trace(drifting), tmp_path / "h", PlanSpec(closed=False, rate=4.0, duration_s=60.0), VOCABULARY
    )
    assert head.source is not None and head.source.output_tokens is not None
    assert head.source.output_tokens.mean < 0.3 * mean, "which its first rows do not show"


def test_a_window_goes_round_the_end_of_the_trace(tmp_path, trace):
    infos = [plan(trace, tmp_path / f"{draw}.plan", draw=draw) for draw in range(20)]
    wrapped = [
        (draw, k) for draw, info in enumerate(infos) for k, w in enumerate(info.windows) if w.last_row < w.first_row
    ]
    assert wrapped
    for draw, k in wrapped:
        rows = parts_of(infos[draw], rows_of(tmp_path / f"{draw}.plan"))[k]
        due = parts_of(infos[draw], times_of(tmp_path / f"{draw}.plan"))[k]
        at = rows.index(0)
        assert rows[at - 1] == ROWS - 1
        assert due[at] - due[at - 1] == pytest.approx(1 / 4.0, rel=1e-3), "one mean gap"
        assert infos[draw].cycles == 1


@pytest.mark.parametrize("n", [2, 7, 100, 239])
def test_a_short_trace_is_one_window_that_repeats_it_with_new_prompts(tmp_path, n):
    rows = numbered(n, session_id="s", prefix_ids=[1, 2], block_tokens=10)
    for row in rows:
        del row["session_id"]
    short = trace_file(tmp_path / "t.jsonl", rows)
    info = plan(short, tmp_path / "p")
    assert len(info.windows) == 1
    assert info.requests == pytest.approx(240, abs=1 + 0.1 * n)
    assert info.trace_share == 1.0
    sent = rows_of(tmp_path / "p")
    assert sent == [(sent[0] + i) % n for i in range(len(sent))]
    if n > 100:
        return
    assert info.cycles > 1
    starts = [tuple(request.prompt_token_ids[:10]) for request in iter_requests(tmp_path / "p")]
    assert len(set(starts)) in (info.cycles, info.cycles + 1), "each pass has its own shared prefix"
    assert any("one window instead of 3" in note for note in info.notes)


def test_windows_that_repeat_nothing_share_the_traces_prefixes(tmp_path):
    shared = trace_file(tmp_path / "t.jsonl", numbered(ROWS, prefix_ids=[1, 2], block_tokens=10))
    for draw in range(6):
        plan(shared, tmp_path / "p", draw=draw)
        assert len({tuple(request.prompt_token_ids) for request in iter_requests(tmp_path / "p")}) == 1


def test_busiest_windows_are_the_worst_stretch(tmp_path):
    rows = numbered(ROWS, rate=2.0)
    at = np.array([row["arrival_s"] for row in rows])
    at[1200:] -= 0.9 * (at[1200:].clip(max=at[1400]) - at[1200])  # 200 rows ten times as dense
    for row, t in zip(rows, at.tolist(), strict=True):
        row["arrival_s"] = t
    bursty = trace_file(tmp_path / "t.jsonl", rows)
    info = plan(bursty, tmp_path / "p", count=4, duration_s=40.0, busiest=True)
    length = 10.0 * info.speed
    most = max(np.searchsorted(at, t + length) - i for i, t in enumerate(at))
    assert [w.requests for w in info.windows] == [most] * 4
    assert all(1150 < w.first_row < 1400 for w in info.windows)
    assert info.busiest
    assert info.trace_share == pytest.approx(most / ROWS)
    assert len({r.prompt_token_ids[0] for r in iter_requests(tmp_path / "p")}) > 4
    for spec in ({"closed": True, "limit": 100}, {"arrivals": "poisson", "rate": 3.0, "duration_s": 30.0}):
        info = plan(bursty, tmp_path / "p", count=2, busiest=True, **spec)
        assert all(1150 < w.first_row < 1400 for w in info.windows)


def test_windows_without_a_request_are_fine_and_a_plan_without_is_not(tmp_path):
    # Two bursts far from each other.
    rows = numbered(200, rate=100.0)
    for row in rows[100:]:
        row["arrival_s"] += 10_000.0
    sparse = trace_file(tmp_path / "t.jsonl", rows)
    found = []
    for draw in range(40):
        try:
            found.append(plan(sparse, tmp_path / "p", draw=draw, rate=0.5, duration_s=60.0))
        except UsageError as e:
            assert "not one request" in str(e)
    assert any(not w.requests for info in found for w in info.windows)
    assert 0 < len(found) < 40
    for info in found:
        assert sum(w.requests for w in info.windows) == info.requests > 0


def test_warm_up_is_the_plans_first_seconds(tmp_path, trace):
    info = plan(trace, tmp_path / "p", warmup=15.0)
    times = times_of(tmp_path / "p")
    phases = read_plan_columns(tmp_path / "p", ["phase"]).column(0).to_pylist()
    assert info.warmup_requests == int((times < 15.0).sum()) == phases.count("warmup")
    assert 45 < times[-1] < 60


def test_a_limit_cuts_the_plan_and_what_is_said_of_it(tmp_path, trace):
    whole, cut = plan(trace, tmp_path / "p"), plan(trace, tmp_path / "q", limit=100)
    assert cut.requests == 100 == sum(w.requests for w in cut.windows)
    assert rows_of(tmp_path / "q") == rows_of(tmp_path / "p")[:100]
    assert whole.requests > 100


# --- times of its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [{"closed": True, "limit": 301, "repeat": True}, {"arrivals": "poisson", "rate": 5.0, "duration_s": 60.0}],
    ids=["closed", "drawn"],
)
def test_blocks_of_rows_from_all_over_the_trace(tmp_path, trace, spec):
    times = Counter[int]()
    for draw in range(30):
        info = plan(trace, tmp_path / "p", draw=draw, seed=draw, **spec)
        rows = rows_of(tmp_path / "p")
        assert len(info.windows) == 3
        assert len(rows) == info.requests == sum(w.requests for w in info.windows)
        for window, sent in zip(info.windows, parts_of(info, rows), strict=True):
            assert sent == [(window.first_row + i) % ROWS for i in range(window.requests)]
        assert max(w.requests for w in info.windows) - min(w.requests for w in info.windows) <= 1
        starts = sorted(w.first_row for w in info.windows)
        assert np.diff(starts) == pytest.approx([ROWS / 3] * 2, abs=1)
        times.update(rows)
    used = np.array([times[row] for row in range(ROWS)])
    assert used.min() >= 3
    assert used.max() <= 6  # about 4.5 of 30
    if spec.get("closed"):
        assert info.requests == 301
        assert info.windows[0].starts_s is None
    else:
        plain = PlanSpec(closed=False, seed=29, **spec)
        build_plan(open_trace(trace), tmp_path / "q", plain, VOCABULARY)
        assert (times_of(tmp_path / "p") == times_of(tmp_path / "q")).all(), "the times are those without windows"


@pytest.mark.parametrize(
    "spec", [{"closed": True, "limit": 300}, {"arrivals": "constant", "rate": 5, "duration_s": 60}]
)
def test_blocks_of_a_short_trace_repeat_it(tmp_path, spec):
    short = trace_file(tmp_path / "t.jsonl", numbered(90))
    info = plan(short, tmp_path / "p", **spec)
    rows = rows_of(tmp_path / "p")
    assert info.requests == 300
    assert rows == [(rows[0] + i) % 90 for i in range(300)]
    assert (len(info.windows), info.cycles, info.trace_share) == (1, 4, 1.0)


# --- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [80, ROWS])
def test_turns_of_a_window_wait_for_each_other_and_for_none_outside(tmp_path, n):
    rng = np.random.default_rng(2)
    rows, turns = numbered(n), Counter[int]()
    for row in rows:
        session = int(rng.integers(n // 10))
        row |= {"session_id": str(session), "turn": turns[session], "think_s": 0.5}
        turns[session] += 1
    sessions = trace_file(tmp_path / "t.jsonl", rows)
    linked = 0
    for draw in range(6):
        info = plan(sessions, tmp_path / "p", draw=draw, sessions="wait")
        requests = list(iter_requests(tmp_path / "p"))
        ends = np.cumsum([w.requests for w in info.windows])
        of_session: dict[int, list[tuple[int, int, str]]] = {}
        for request in requests:
            assert request.output_tokens is not None
            row = request.output_tokens - 1
            window = int(np.searchsorted(ends, request.request_id, side="right"))
            before = of_session.setdefault(request.slice, [])
            assert request.after == (before[-1][0] if before else None)
            before.append((request.request_id, window, rows[row]["session_id"]))
            assert len({(window, session) for _, window, session in before}) == 1
            turns_of = [requests[i].output_tokens or 0 for i, _, _ in before]
            assert turns_of == sorted(turns_of), "turns of one pass over the trace, in order"
            linked += request.after is not None
    assert linked > 50


# --- held against the whole trace ------------------------------------------------------------------------------------


def answers_of(out: Path, info: PlanInfo) -> dict[str, Fidelity]:
    columns = read_plan_columns(out, ["scheduled_ns", "slice", "after", "input_tokens", "output_tokens"])
    got = {name: columns.column(name).to_numpy() for name in columns.column_names}
    asked = Plan(
        scheduled_ns=got["scheduled_ns"], slice=got["slice"], waits=np.isfinite(got["after"].astype(float)),
        input_tokens=got["input_tokens"].astype(float), output_tokens=got["output_tokens"].astype(float),
    )  # fmt: skip
    return {answer.name: answer for answer in planned_against_source(info, asked)}


@pytest.fixture(scope="module")
def drifting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    rows = numbered(6000)
    for i, row in enumerate(rows):
        row["output_tokens"] = int(rng.integers(50, 150)) * (1 if i < 900 else 4)
    return trace_file(tmp_path_factory.mktemp("d") / "t.jsonl", rows)


def test_a_faithful_plan_of_windows_is_like_its_trace_up_to_chance(tmp_path, drifting):
    differs = Counter[str]()
    for draw in range(20):
        info = plan(drifting, tmp_path / "p", count=4, draw=draw)
        answers = answers_of(tmp_path / "p", info)
        assert not any("reading stopped" in note or "trace ends" in note for note in info.notes)
        differs.update(name for name, answer in answers.items() if answer.ok is False)
        for what in ("request rate", "bursts", "gaps", "input lengths", "output lengths"):
            assert answers[f"planned: {what}"].ok is not None, answers[f"planned: {what}"]
    assert max(differs.values(), default=0) <= 2, differs  # two standard errors: 1 in 20


def test_a_plan_of_easy_rows_alone_is_not(tmp_path, drifting):
    info = plan(drifting, tmp_path / "p", count=4)
    columns = read_plan_columns(tmp_path / "p", ["output_tokens"])
    lengths = columns.column(0).to_numpy() / 4.0
    assert mean_lengths("output", info.source.output_tokens, lengths, info).ok is False
    assert mean_lengths("output", info.source.output_tokens, lengths * 4, info).ok
    times = read_plan_columns(tmp_path / "p", ["scheduled_ns"]).column(0).to_numpy()
    on_the_trace = np.rint(times * info.speed).astype(np.int64)
    assert {a.name for a in rate_and_shape(info, info.source.arrivals, on_the_trace[::2]) if a.ok is False} >= {
        "planned: request rate", "planned: gaps"
    }  # fmt: skip
    bunched = on_the_trace // 10**10 * 10**10
    bunched += np.arange(len(bunched)) * 1000
    assert "planned: bursts" in {a.name for a in rate_and_shape(info, info.source.arrivals, bunched) if a.ok is False}


def test_the_busiest_stretch_is_not_held_against_the_whole(tmp_path, drifting):
    info = plan(drifting, tmp_path / "p", count=4, busiest=True)
    answers = answers_of(tmp_path / "p", info)
    assert not [a for a in answers.values() if a.ok is False]
    assert "busiest" in answers["planned: request rate"].said


@pytest.mark.parametrize("n", [59, 60, 119, 120, 121, 1000])
def test_parts_tell_how_far_stretches_are_apart(n):
    found = part_sd([int(i >= n // 2) for i in range(n)])
    if n < 60:
        assert found is None
    else:
        assert found == pytest.approx(0.5, rel=0.03)
    assert part_sd([i % 2 for i in range(6000)]) == pytest.approx(0.0, abs=1e-9)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_the_options_bring_windows():
    windows = Windows(count=4, draw=2)
    assert asked_plan(PlanOptions(windows=windows, rate=3.0, duration_s=60.0), closed=False).windows == windows
    assert asked_plan(PlanOptions(rate=3.0), closed=False).windows is None


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"count": 0}, "at least 1 window"),
        ({"draw": -1}, "draws count from 0"),
        ({"duration_s": None}, "give a duration"),
        ({"grow": 2.0, "rate": None}, "drop the growth"),
    ],
    ids=str,
)
def test_what_windows_cannot_be(tmp_path, trace, spec, word):
    with pytest.raises(UsageError, match=word):
        plan(trace, tmp_path / "p", **spec)


def test_one_instant_has_no_windows(tmp_path):
    rows = numbered(50)
    for row in rows:
        row["arrival_s"] = 1.0
    with pytest.raises(UsageError, match="one instant"):
        plan(trace_file(tmp_path / "t.jsonl", rows), tmp_path / "p")
    assert asdict(Windows(count=1, draw=0)) == {"count": 1, "draw": 0, "busiest": False}
