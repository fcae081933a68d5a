"""What a sweep file asks for, what it will cost, and what a sweep folder survives; nothing is run here."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import TIER, good, write_run

from harness.cli.select_runs import done_points
from harness.cli.sweep import DECIDED, OPTIONS, OWN, resolve, sum_up
from harness.errors import ResultsError, UsageError
from harness.options import PlanOptions
from harness.plan.build import build_plan
from harness.plan.file import plan_sha256
from harness.plan.prompts import Vocabulary
from harness.plan.spec import asked_plan
from harness.record.manifest import RunDir
from harness.sweep import state as sweep_state
from harness.sweep.cost import (
    BETWEEN_S,
    DRAIN_S,
    ITL_S,
    TraceLoad,
    estimate,
    expect,
    rows_needed,
    start_s,
    survey,
    usd_per_hour,
)
from harness.sweep.spec import Level, Loads, Pair, SweepSpec, levels, make_points, pairs, point_seed, read_sweep
from harness.sweep.state import (
    Rental,
    SweepState,
    close_rentals,
    create_folder,
    differences,
    find_folder,
    lock,
    read_state,
    set_aside,
    verify,
    write_state,
)
from harness.trace.io import open_trace

ROOT = Path(__file__).resolve().parent.parent
NAMES = OPTIONS.keys() - OWN
SPEC = SweepSpec(trace="t.jsonl", loads=Loads(concurrency=[1, 8]), models=["a", "b"], tiers=["x", "y"], repeats=3)
GOOD = 'trace = "t.jsonl"\nmodels = ["a"]\ntiers = ["x"]\n'


def read(tmp_path: Path, text: str) -> SweepSpec:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return read_sweep(file, NAMES, DECIDED)


def state_of(spec: SweepSpec = SPEC, **facts: Any) -> SweepState:
    return SweepState(
        **{"name": "s", "created": "2026-11-22T00:00:00Z", "file": "/x/s.toml", "spec": spec, "trace_sha256": "0" * 64,
           "pairs": pairs(spec), "points": make_points(spec)} | facts
    )  # fmt: skip


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_example_is_read_and_every_option_of_it_is_one_of_replay() -> None:
    file = ROOT / "scenarios" / "sweep.example.toml"
    spec = read_sweep(file, NAMES, DECIDED)
    assert Path(spec.trace).is_file(), "the trace counts from the folder of the file"
    options = resolve(spec.options, str(file), file.parent)
    assert options.load.slo
    assert options.load.timeout_s == 600, "what the file does not say is as on the command line"
    assert make_points(spec)


def test_options_become_what_the_command_line_makes_of_them(tmp_path: Path) -> None:
    (tmp_path / "tok.json").touch()
    text = """
    loads = {request_rate = [1, 2.5, "4..8x2"]}
    duration = "5m"
    warmup = "30s"
    skip-bad = true
    no_stream = false
    slo = {ttft = "2s", tpot = "100ms"}
    extra_body = {temperature = 0.5, nested = {a = [1]}}
    header = ["X-A: 1", "X-B: 2"]
    cancel = "5%@2s"
    tokenizer = "tok.json"
    """
    spec = read(tmp_path, GOOD + text)
    options = resolve(spec.options, "f", tmp_path)
    plan, load = options.plan, options.load
    assert plan.duration_s == 300
    assert plan.warmup_s == 30.0
    assert plan.skip_bad is True
    assert load.no_stream is False
    assert load.slo == {"ttft": 2.0, "tpot": 0.1}
    assert load.extra_body == {"temperature": 0.5, "nested": {"a": [1]}}
    assert load.headers == ("X-A: 1", "X-B: 2")
    assert plan.cancel == (0.05, 2.0)
    assert plan.tokenizer == tmp_path / "tok.json"
    assert [level.request_rate for level in levels(spec)] == [1, 2.5, 4, 8]


CONCURRENCY = "loads = {concurrency = [1]}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD, ["loads"]),
        (GOOD + CONCURRENCY + "repeat_s = 3", ["repeat_s", "repeats"]),
        (GOOD + CONCURRENCY + "modles = []", ["modles", "models"]),
        (GOOD + CONCURRENCY + "rate = 3", ["rate", "request_rate"]),
        (GOOD + CONCURRENCY + 'repeats = "3"', ["repeats", "int"]),
        (GOOD + CONCURRENCY + "repeats = 0", ["repeats", "0"]),
        (GOOD + CONCURRENCY + "replicas = 0", ["replicas"]),
        (GOOD + CONCURRENCY + "budget_usd = -1", ["budget_usd"]),
        (GOOD + CONCURRENCY + "budget_usd = nan", ["budget_usd"]),
        (GOOD + CONCURRENCY + 'order = "shuffled"', ["order"]),
        (GOOD + CONCURRENCY + 'on_failure = "retry"', ["on_failure"]),
        (GOOD + CONCURRENCY + "skip-bad = true\nskip_bad = true", ["skip_bad", "twice"]),
        (GOOD + "loads = {concurency = [1]}", ["loads", "concurency", "concurrency"]),
        (GOOD + "loads = {concurrency = [1], request_rate = [1]}", ["loads", "one"]),
        (GOOD + "loads = {concurrency = []}", ["loads.concurrency"]),
        (GOOD + "loads = {concurrency = [1, 1]}", ["loads.concurrency", "different"]),
        (GOOD + "loads = {concurrency = [0]}", ["loads.concurrency", "0"]),
        (GOOD + "loads = {concurrency = [1.5]}", ["loads.concurrency"]),
        (GOOD + 'loads = {concurrency = "1..4x1.5"}', ["loads.concurrency", "whole"]),
        (GOOD + 'loads = {request_rate = "1-8"}', ["loads.request_rate", "1..64x2"]),
        (GOOD + 'loads = {request_rate = "8..1x2"}', ["loads.request_rate"]),
        (GOOD + 'loads = {request_rate = "1..8x1"}', ["loads.request_rate"]),
        (GOOD + 'loads = {request_rate = "1..1000000x1.0000001"}', ["loads.request_rate"]),
        (GOOD + "loads = {request_rate = [inf]}", ["loads.request_rate"]),
        (GOOD + f"loads = {{concurrency = [{'9' * 400}]}}", ["loads.concurrency"]),
        (GOOD + f'loads = {{request_rate = "1..{"9" * 400}x{"9" * 400}"}}', ["loads.request_rate"]),
        (GOOD + "loads = {request_rate = [1.0000001, 1.0000002]}", ["loads.request_rate", "different"]),
        (GOOD + CONCURRENCY + "repeats = 100000", ["100,000 runs"]),
        ('trace = "a\\u0000b"\nmodels = ["a"]\ntiers = ["x"]\n' + CONCURRENCY, ["trace"]),
        (GOOD.replace('["x"]', '["x", "x"]') + CONCURRENCY, ["twice"]),
        (GOOD + CONCURRENCY + '[[pair]]\nmodel = "a"\ntier = "x"', ["pair"]),
        ('trace = "t"\n' + CONCURRENCY + '[[pair]]\nmodel = "a"', ["pair", "tier"]),
        ('trace = "t"\n' + CONCURRENCY + '[[pair]]\nmodle = "a"', ["pair", "modle", "model"]),
        ('trace = "t"\n' + CONCURRENCY, ["models"]),
        ('trace = "-"\nmodels = ["a"]\ntiers = ["x"]\n' + CONCURRENCY, ["trace"]),
        ("models = []\n" + CONCURRENCY, ["trace"]),
        (GOOD + CONCURRENCY + '[base_url]\nz = "http://h"', ["base_url", "z"]),
        (GOOD.replace('["x"]', '["x", "y"]') + CONCURRENCY + 'base_url = "http://h"', ["base_url", "2 tiers"]),
        ("trace = ", ["TOML"]),
        ("\0", ["TOML"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_with_its_name_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as e:
        read(tmp_path, text)
    for word in ["sweep.toml", *words]:
        assert word in str(e.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"limit": "many"}, ["limit", "many"]),
        ({"limit": 0}, ["limit"]),
        ({"limit": True}, ["limit"]),
        ({"limit": [1]}, ["limit"]),
        ({"skip_bad": 1}, ["skip_bad", "true or false"]),
        ({"slo": {"tfft": "2s"}}, ["slo", "ttft"]),
        ({"duration": "5 parsecs"}, ["duration"]),
        ({"tokenizer": "nowhere.json"}, ["tokenizer", "nowhere.json"]),
        ({"tokenizer": "no\0where"}, ["null"]),
        ({"extra_body": {"day": date(2026, 11, 22)}}, ["extra_body", "JSON"]),
        ({"extra_body": {"top_p": math.inf}}, ["extra_body", "JSON"]),
        ({"attain": 2}, ["attain"]),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_with_its_key(tmp_path: Path, values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as e:
        resolve(values, "my.toml", tmp_path)
    for word in ["my.toml", *words]:
        assert word in str(e.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: cannot read"):
        read_sweep(tmp_path / "none.toml", NAMES, DECIDED)


def test_servers_that_are_there_by_tier_and_in_pairs(tmp_path: Path) -> None:
    both = 'trace = "t"\ntiers = ["x", "y"]\nmodels = ["a"]\nreplicas = 3\n' + CONCURRENCY
    spec = read(tmp_path, both + '[base_url]\ny = ["http://h1", "http://h2"]')
    assert pairs(spec) == [
        Pair(model="a", tier="x", replicas=3),
        Pair(model="a", tier="y", replicas=2, base_url=["http://h1", "http://h2"]),
    ]
    alone = read(tmp_path, 'trace = "t"\nbase_url = "http://h"\n' + CONCURRENCY)
    assert pairs(alone) == [Pair(replicas=1, base_url="http://h")]
    named = read(tmp_path, 'trace = "t"\n' + CONCURRENCY + '[[pair]]\nmodel="a"\ntier="x"\nreplicas=4')
    assert pairs(named) == [Pair(model="a", tier="x", replicas=4)]
    assert [p.name for p in (named.pair[0], Pair(model="org/m"), Pair(base_url="http://h"))] == [
        "a on x", "m", "served model",
    ]  # fmt: skip


@given(low=st.integers(1, 64), factor=st.integers(2, 9), steps=st.integers(0, 12), beyond=st.floats(0, 0.99))
def test_a_range_holds_every_step_and_no_more(low: int, factor: int, steps: int, beyond: float) -> None:
    last = low * factor**steps
    high = last + int(beyond * (last * factor - last - 1))
    spec = replace(SPEC, loads=Loads(concurrency=f"{low}..{high}x{factor}"))
    assert [level.concurrency for level in levels(spec)] == [low * factor**k for k in range(steps + 1)]


# --- points ----------------------------------------------------------------------------------------------------------


def test_every_combination_once_pair_after_pair_in_an_order_that_only_the_seed_decides() -> None:
    points = make_points(SPEC)
    assert len(points) == 2 * 2 * 2 * 3
    assert len({(p.pair, p.level, p.repeat) for p in points}) == len(points)
    assert [p.pair for p in points] == sorted(p.pair for p in points), "servers are shared, so pairs stay together"
    assert len({p.name for p in points}) == len(points)
    assert make_points(SPEC) == points
    given_order = [(p.repeat, p.level.concurrency) for p in make_points(replace(SPEC, order="given")) if p.pair == 0]
    assert given_order == [(1, 1), (1, 8), (2, 1), (2, 8), (3, 1), (3, 8)]
    orders = {tuple((p.level, p.repeat) for p in make_points(replace(SPEC, seed=s)) if p.pair == 0) for s in range(8)}
    assert len(orders) > 4


def test_seeds_differ_inside_a_pair_and_agree_between_pairs() -> None:
    points = make_points(replace(SPEC, loads=Loads(concurrency="1..512x2"), repeats=9))
    seeds = {(p.pair, p.level, p.repeat): p.seed for p in points}
    inside = [seed for (pair, _, _), seed in seeds.items() if pair == 0]
    assert len(set(inside)) == len(inside), "a warm prefix cache would answer the second of two alike"
    for (_, level, repeat), seed in seeds.items():
        assert seed == seeds[0, level, repeat]
    assert point_seed(0, Level(concurrency=8), 1) != point_seed(1, Level(concurrency=8), 1)
    assert all(0 <= seed < 2**31 for seed in inside)
    fewer = {p.seed for p in make_points(SPEC)}
    assert fewer <= set(seeds.values()), "a level that is added leaves the seeds of the others"


def test_plans_are_shared_by_the_tiers_of_a_model_and_by_nobody_else() -> None:
    spec = replace(
        SPEC, models=[], tiers=[],
        pair=[Pair(model="a", tier="x"), Pair(model="a", tier="y"), Pair(model="b", tier="x"),
              Pair(tier="x", base_url="http://h1"), Pair(tier="y", base_url="http://h2"),
              Pair(model="a", tier="x", base_url="http://gate"), Pair(model="b", tier="x", base_url="http://gate")],
    )  # fmt: skip
    plans: dict[int, set[str]] = {}
    for p in make_points(spec):
        plans.setdefault(p.pair, set()).add(p.plan)
    assert all(len(names) == 6 for names in plans.values())
    assert plans[0] == plans[1]
    assert plans[0].isdisjoint(plans[2])
    assert plans[3].isdisjoint(plans[4])
    assert plans[5].isdisjoint(plans[6]), "two models behind one address count tokens each in its own way"


# --- what it will cost -----------------------------------------------------------------------------------------------

TRACE = TraceLoad(rows=1000, output_tokens=100.0, longest_output=400)
AROUND = BETWEEN_S + 400 * ITL_S


@pytest.mark.parametrize(
    ("level", "options", "requests", "seconds"),
    [
        (Level(request_rate=4.0), {}, 1000, 250),
        (Level(request_rate=4.0), {"limit": 100}, 100, 25),
        (Level(request_rate=4.0), {"duration_s": 60.0}, 240, 60),
        (Level(request_rate=4.0), {"duration_s": 60.0, "limit": 100}, 100, 25),
        (Level(request_rate=100.0), {"duration_s": 60.0}, 1000, 10),
        (Level(request_rate=100.0), {"duration_s": 60.0, "repeat": True}, 6000, 60),
        (Level(concurrency=8), {"duration_s": 60.0}, 1000, 60),
        (Level(concurrency=8), {"limit": 100}, 100, 100 * 100 * ITL_S / 8),
        (Level(concurrency=8), {"limit": 2}, 2, 100 * ITL_S),
    ],
)  # fmt: skip
def test_estimates(level: Level, options: dict[str, Any], requests: int, seconds: float) -> None:
    found = estimate(level, PlanOptions(**options), TRACE)
    assert found.requests == requests
    assert found.seconds == pytest.approx(seconds + AROUND)
    slow = estimate(level, PlanOptions(**options), replace(TRACE, longest_output=10**6))
    assert slow.seconds == pytest.approx(seconds + BETWEEN_S + DRAIN_S), "no drain is longer than it may be"
    assert found.assumed == (level.concurrency is not None and "duration_s" not in options)


@pytest.mark.parametrize(
    ("rate", "more", "requests", "seconds"),
    [
        (1.0, {"rescale": "thin"}, 100, 100),
        (20.0, {"rescale": "superpose"}, 2000, 100),
        (20.0, {"rescale": "superpose", "limit": 200}, 200, 10),
        (20.0, {"rescale": "superpose", "duration_s": 50.0}, 1000, 50),
        (20.0, {"rescale": "compress"}, 1001, 50),
    ],
)
def test_other_users_on_the_same_clock_take_as_long_as_the_trace(
    tmp_path: Path, rate: float, more: dict[str, Any], requests: int, seconds: float
) -> None:
    file = tmp_path / "t.jsonl"
    row = {"arrival_s": 0.0, "input_tokens": 5, "output_tokens": 400}
    file.write_text("".join(json.dumps(row | {"arrival_s": i / 10}) + "\n" for i in range(1001)))
    asked = PlanOptions(**more)
    found = survey(open_trace(file), [Level(request_rate=rate)], asked)
    guess = estimate(Level(request_rate=rate), asked, found)
    assert guess.requests == pytest.approx(requests, abs=2)
    assert guess.seconds - AROUND == pytest.approx(seconds, rel=0.01)
    info = build_plan(
        open_trace(file),
        tmp_path / "p",
        asked_plan(replace(asked, rate=rate), closed=False),
        Vocabulary.from_ids(range(99)),
    )
    assert guess.requests == pytest.approx(info.requests, rel=0.25), "what the plan then holds"
    assert guess.seconds - AROUND == pytest.approx(info.span_s, rel=0.1)


def test_what_the_trace_cannot_give_is_said_before_anything_begins(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    row = {"input_tokens": 5, "output_tokens": 4}
    file.write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
    rates = [Level(request_rate=1.0), Level(request_rate=20.0)]
    with pytest.raises(UsageError, match="no arrival times"):
        survey(open_trace(file), rates, PlanOptions())
    assert survey(open_trace(file), rates, PlanOptions(arrivals="poisson")).rows == 9
    assert survey(open_trace(file), [Level(concurrency=2)], PlanOptions()).rate is None
    file.write_text("".join(json.dumps(row | {"arrival_s": i / 10}) + "\n" for i in range(100)))
    for rescale, rate in (("thin", "20 req/s"), ("superpose", "1 req/s")):
        with pytest.raises(UsageError, match=f"10 requests/s.*{rescale}.*cannot make {rate}"):
            survey(open_trace(file), rates, PlanOptions(rescale=rescale))


def test_what_was_measured_at_the_same_level_beats_a_guess() -> None:
    points = make_points(SPEC)
    done = next(p for p in points if p.level.concurrency == 8)
    done.state, done.took_s = "done", 77.0
    expected = expect(points, PlanOptions(), TRACE)
    alike = [p for p in points if (p.pair, p.level) == (done.pair, done.level)]
    assert len(alike) == 3
    assert {expected[p.name].seconds for p in alike} == {77.0}
    assert all(expected[p.name].seconds != 77.0 for p in points if p not in alike)
    alike[1].state, alike[1].took_s = "done", 99.0
    assert {expect(points, PlanOptions(), TRACE)[p.name].seconds for p in alike} == {99.0}, "the careful one of two"


def test_dollars_are_price_by_replicas_by_hours() -> None:
    gpu = replace(TIER, accelerator="L4", accelerator_count=1)
    assert usd_per_hour(Pair(model="a", tier="x", replicas=64), TIER) == 64 * 3.6
    assert usd_per_hour(Pair(base_url="http://h", replicas=1), None) == 0
    assert start_s(Pair(model="a", tier="x"), gpu) > start_s(Pair(model="a", tier="x"), TIER) > 0
    assert start_s(Pair(tier="x", base_url="http://h"), gpu) == 0, "it is up already"
    state = state_of(rentals=[
        Rental(pair=0, replicas=2, tier=TIER, started_s=0.0, ended_s=1800.0),
        Rental(pair=1, replicas=1, tier=None, started_s=1800.0, ended_s=3600.0),
        Rental(pair=0, replicas=1, tier=TIER, started_s=3600.0),
    ])  # fmt: skip
    assert state.spent(7200.0) == pytest.approx((0.5 * 7.2 + 3.6, 2.0))
    assert Rental(pair=0, replicas=1, tier=TIER, started_s=9.0, ended_s=5.0).hours(9.0) == 0, "a clock set back"


def test_a_trace_is_read_no_further_than_the_heaviest_level_needs(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    row = {"arrival_s": 0.0, "input_tokens": 5}
    file.write_text("".join(json.dumps(row | {"arrival_s": i, "output_tokens": i + 1}) + "\n" for i in range(50)))
    assert rows_needed([Level(request_rate=2.0), Level(request_rate=0.1)], PlanOptions(duration_s=10.0)) == 20
    found = survey(open_trace(file), [Level(request_rate=2.0)], PlanOptions(duration_s=10.0))
    assert found == TraceLoad(rows=20, output_tokens=10.5, longest_output=20, span_s=19.0)
    assert survey(open_trace(file), [Level(concurrency=2)], PlanOptions(limit=4)).rows == 4
    assert survey(open_trace(file), [Level(concurrency=2)], PlanOptions(duration_s=4.0)).rows == 50


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = state_of(rentals=[Rental(pair=0, replicas=2, tier=TIER, started_s=1.0)])
    state.points[0].figures = {"ttft_p50_s": None, "usd_per_1m_total": 0.5}
    folder = create_folder(tmp_path / "sweeps", state)
    assert read_state(folder) == state
    assert folder.name.endswith("-s")
    assert [f.name for f in folder.iterdir()] == ["sweep.json"]
    assert create_folder(tmp_path / "sweeps", state) != folder
    assert find_folder(tmp_path / "sweeps", "s") != folder, "the newest"
    with pytest.raises(UsageError, match="no sweep named other"):
        find_folder(tmp_path / "sweeps", "other")


def test_a_write_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of()
    folder = create_folder(tmp_path, state)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    changed = replace(state, name="other")
    with pytest.raises(ResultsError, match="No space left"):
        write_state(folder, changed)
    assert read_state(folder) == state
    assert [file.name for file in folder.iterdir()] == ["sweep.json"], "on a full disk every byte counts"


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"[]",
        lambda raw: raw.replace(b'"schema_version": "1"', b'"schema_version": "99"'),
        lambda raw: raw.replace(b'"name": "001-', b'"name": "../001-'),
        lambda raw: raw.replace(b'"pair": 3', b'"pair": 30'),
        lambda raw: raw.replace(b'"state": "pending"', b'"state": "fine"'),
    ],
)
def test_a_damaged_state_is_an_error_not_a_traceback(tmp_path: Path, damage: Any) -> None:
    folder = create_folder(tmp_path, state_of())
    file = folder / "sweep.json"
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(ResultsError, match=r"sweep\.json"):
        read_state(folder)


def test_one_sweep_has_one_harness_at_a_time(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(UsageError, match="another harness"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass
    with pytest.raises(ResultsError, match="cannot write there"), lock(tmp_path / "none"):
        pass
    with pytest.raises(PermissionError, match="elsewhere"), lock(tmp_path):
        raise PermissionError("elsewhere")  # what goes wrong inside is not the lock's to explain


def test_two_that_begin_in_one_second_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it looks to the slower one: not there when it asks, there when it renames."""
    stamp = datetime(2026, 11, 22, tzinfo=UTC)
    monkeypatch.setattr("harness.record.manifest.datetime", SimpleNamespace(now=lambda zone: stamp))
    first = create_folder(tmp_path, state_of())
    monkeypatch.setattr(Path, "exists", lambda self: False)
    second = create_folder(tmp_path, state_of())
    assert (first.name, second.name) == ("20261122T000000Z-s", "20261122T000000Z-s-2")


def test_the_difference_is_named() -> None:
    assert differences(SPEC, SPEC) == []
    assert differences(SPEC, replace(SPEC, budget_usd=9.0, budget_hours=1.0, on_failure="stop", trace="moved")) == []
    changed = replace(SPEC, repeats=4, models=["a"], options={"limit": 5})
    assert differences(SPEC, changed) == ['models: ["a","b"] -> ["a"]', "repeats: 3 -> 4", "limit: not given -> 5"]
    fields = {f: getattr(SPEC, f) for f in SweepSpec.__dataclass_fields__}
    for name in fields.keys() - {*sweep_state.ADJUSTABLE, "options"}:
        other = replace(SPEC, **{name: "changed"})
        assert len(differences(SPEC, other)) == 1, f"{name} is compared"


def test_nothing_is_overwritten_when_set_aside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "p") is None
    for n in range(1, 4):
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "rows").write_text(str(n))
        assert set_aside(tmp_path / "p") == tmp_path / f"p.aborted-{n}"
    assert [(tmp_path / f"p.aborted-{n}" / "rows").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]


def test_a_rental_that_a_crash_left_open_ends_at_the_last_sign_of_life(tmp_path: Path) -> None:
    now = time.time()
    state = state_of(rentals=[Rental(pair=0, replicas=1, tier=TIER, started_s=now - 1000)])
    folder = create_folder(tmp_path, state)
    (folder / "run").mkdir()
    (folder / "run" / "results-0.arrows").touch()
    os.utime(folder / "run" / "results-0.arrows", (now - 100, now - 100))
    os.utime(folder / "sweep.json", (now - 900, now - 900))
    assert close_rentals(folder, state)
    assert state.rentals[0].hours(now) * 3600 == pytest.approx(900, abs=0.01)
    assert state.rentals[0].crashed
    assert not close_rentals(folder, state)


def test_only_a_whole_run_is_kept(tmp_path: Path) -> None:
    point = make_points(SPEC)[0]
    run = RunDir(tmp_path / point.name)
    rows = [good(k) for k in range(20)]

    def found(results: list[Any] = rows, **facts: Any) -> str | None:
        for file in run.path.glob("*"):
            file.unlink()
        write_run(run.path, results, requests=20, workers=2, **facts)
        point.plan_sha256 = plan_sha256(run.plan)
        return verify(tmp_path, point)

    assert found() is None
    assert "stopped" in (found(status="stopped") or "")
    assert "19 of 20" in (found(rows[:-1]) or "")
    assert "21 rows" in (found([*rows, rows[0]]) or "")
    assert "another plan" in (found(plan_sha256="0" * 64) or "")

    assert found() is None
    torn = run.results(1)
    torn.write_bytes(torn.read_bytes()[:-200])
    assert "of 20" in (verify(tmp_path, point) or "")

    assert found() is None
    run.results(0).write_bytes(b"not arrow at all")
    assert "not a file of results" in (verify(tmp_path, point) or "")

    assert found() is None
    run.plan.write_bytes(run.plan.read_bytes() + b"x")
    assert "plan.arrow" in (verify(tmp_path, point) or "")

    assert found() is None
    run.manifest.unlink()
    assert "run.json" in (verify(tmp_path, point) or "")

    point.plan_sha256 = None
    write_run(run.path, rows, requests=20)
    assert "another plan" in (verify(tmp_path, point) or "")


def test_a_state_is_plain_json() -> None:
    decoded = json.loads(msgspec.json.encode(state_of()))
    assert decoded["points"][0]["state"] == "pending"
    assert decoded["points"][0]["level"]["concurrency"] in (1, 8)


@pytest.mark.parametrize(
    ("states", "code"),
    [
        ([("done", "VALID"), ("done", "VALID")], 0),
        ([("done", "VALID"), ("done", "INVALID")], 3),
        ([("done", "VALID"), ("done", "TOO SMALL")], 5),
        ([("done", "TOO SMALL"), ("done", "INVALID")], 3),
        ([("done", "INVALID"), ("failed", None)], 1),
        ([("done", "VALID"), ("skipped", None)], 1),
        ([("done", "VALID"), ("pending", None)], 1),
    ],
)  # fmt: skip
def test_the_exit_code_says_the_worst(
    tmp_path: Path, states: list[Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of(replace(SPEC, models=["a"], tiers=["x"], repeats=1))
    for point, (which, verdict) in zip(state.points, states, strict=True):
        point.state, point.verdict = which, verdict
        point.slo_met = False if point.state == "done" else None
    assert sum_up(tmp_path, state, "text") == code
    shown = capsys.readouterr().out
    assert shown.count("SLO missed") == sum(s == "done" for s, _ in states), "a missed SLO is a result, not a failure"
    assert all(point.name in shown for point in state.points)


@pytest.mark.parametrize(("search", "left"), [("capacity", 3), (None, 4)])
def test_a_probe_that_was_made_again_decides_nothing(tmp_path: Path, search: str | None, left: int) -> None:
    """A search repeats a load because its run was INVALID; a sweep repeats each load anyway, and wants them all."""
    options = {} if search is None else {"search": search}
    state = state_of(replace(SPEC, models=["a"], tiers=["x"], repeats=2, options={**SPEC.options, **options}))
    for k, point in enumerate(sorted(state.points, key=lambda p: (str(p.level), p.repeat))):
        point.state, point.verdict = "done", "VALID" if k else "INVALID"
    write_state(tmp_path, state)
    assert len(state.points) == 4 and len(done_points(tmp_path)) == left
    for point in state.points:
        point.verdict = "INVALID"
    write_state(tmp_path, state)
    assert len(done_points(tmp_path)) == 4, "nothing stands in for them"


TWO = [Pair(model="m", base_url="http://127.0.0.1:1/v1"), Pair(model="m", base_url="http://127.0.0.1:2/v1")]


def test_two_systems_in_turns_a_b_b_a() -> None:
    """What drifts meets both alike: each repeat is the one before it, backwards."""
    spec = SweepSpec(trace="t", loads=Loads(concurrency=[1, 8]), pair=TWO, repeats=3, order="abba")
    points = make_points(spec)
    assert [p.pair for p in points] == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert [p.level.concurrency for p in points] == [1, 8, 1, 8, 8, 1, 8, 1, 1, 8, 1, 8]
    assert [p.repeat for p in points] == [1] * 4 + [2] * 4 + [3] * 4
    seeds = [{(p.level, p.repeat): p.seed for p in points if p.pair == k} for k in (0, 1)]
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 6


@pytest.mark.parametrize("systems", [1, 3])
def test_turns_are_of_two_systems(tmp_path: Path, systems: int) -> None:
    models = ", ".join(f'"m{k}"' for k in range(systems))
    file = tmp_path / "s.toml"
    file.write_text(
        f'trace = "t"\norder = "abba"\nmodels = [{models}]\nbase_url = "http://a/v1"\nloads = {{ concurrency = [1] }}\n'
    )
    with pytest.raises(UsageError, match=f"two systems in turns, and here are {systems}"):
        read_sweep(file, (), {})


def test_a_system_is_called_by_its_label() -> None:
    pairs_ = [replace(TWO[0], label="old kernel"), replace(TWO[0], label="new kernel")]
    points = make_points(SweepSpec(trace="t", loads=Loads(concurrency=[1]), pair=pairs_, order="abba"))
    assert [p.name for p in points] == ["001-old-kernel-c1-r1", "002-new-kernel-c1-r1"]
