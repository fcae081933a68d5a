import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, TIER, S, good, watch, write_run

from harness.analysis.capacity.serving_config import ServingConfig, cost_at, serving_configs
from harness.analysis.capacity.sweep import (
    Capacity,
    LoadPoint,
    capacity,
    falling,
    little,
    pool,
    saturation,
)
from harness.analysis.capacity.system import offered
from harness.analysis.report.capacity_text import capacity_sections, sentence
from harness.analysis.report.document import render_markdown
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity, share
from harness.analysis.summary import summarise
from harness.slo import Criterion

P99 = Criterion(name="ttft <= 2 s", wanted=0.99)
P95 = Criterion(name="tpot <= 80 ms", wanted=0.95)


def figure(value, low=None, high=None, n=1000, unit="req/s"):
    return Quantity(value=value, low=low, high=high, n=n, unit=unit, evidence="measured")


def kept(value, n=1000, width=0.0):
    if value is None:
        return figure(None, n=n)
    return figure(value, max(0.0, value - width), min(1.0, value + width), n=n, unit="share of requests")


def point(load, *shares, n=1000, width=0.0, **rates):
    rates = {name: q if isinstance(q, Quantity) else figure(q, q, q) for name, q in rates.items()}
    return LoadPoint(load=load, kept=tuple(kept(s, n, width) for s in shares), rates=rates)


def at(points, *criteria) -> Capacity:
    return capacity(pool(points), criteria or (P99,))


def test_capacity_lies_between_the_load_that_kept_and_the_one_that_missed():
    found = at([point(1, 1.0), point(2, 1.0), point(4, 0.98), point(8, 0.5)])
    assert found.state == "found" and found.limit is P99
    assert found.load.value == pytest.approx(3.0)  # halfway from 1.0 to 0.98
    # shares without doubt: nothing but the place between the two loads is open, and each is equally likely
    assert found.load.low == pytest.approx(2.05, abs=0.05) and found.load.high == pytest.approx(3.95, abs=0.05)


def test_the_slo_that_breaks_first_decides():
    found = at([point(1, 1.0, 1.0), point(2, 1.0, 0.9), point(4, 0.9, 0.5)], P99, P95)
    assert found.limit is P95 and 1 < found.load.value < 2


def test_not_reached_and_beyond_are_answers_without_a_figure():
    low = at([point(2, 0.5), point(4, 0.2)])
    assert (low.state, low.load.value, low.load.low, low.load.high) == ("not reached", None, None, 2)
    assert "at 2 req/s" in low.load.note
    high = at([point(2, 1.0), point(4, 1.0)])
    assert (high.state, high.load.value, high.load.low, high.load.high) == ("beyond", None, 4, None)
    assert high.limit is None and high.rates == {}


def test_without_a_valid_run_nothing_is_known():
    assert at([]).state == "unknown"
    found = at([point(1, None)])
    assert found.state == "unknown" and "no VALID run" in found.load.note


def test_an_slo_that_cannot_be_judged_says_why():
    unknown = replace(kept(None), note="tpot is not known: usage missing on 5 of 5 requests")
    found = at([LoadPoint(load=2.0, kept=(unknown,), rates={})])
    assert (found.state, found.load.value, found.load.note) == ("unknown", None, unknown.note)


def test_points_without_a_share_are_left_out():
    assert at([point(1, 1.0), point(2, None), point(3, 0.98)]).load.value == pytest.approx(2.0)


def test_few_requests_prove_neither_end():
    found = at([point(1, 1.0, n=60, width=0.05), point(2, 0.97, n=60, width=0.05)])
    assert found.state == "found" and found.load.low is None and found.load.high is None
    assert "more requests" in found.load.note


def test_rates_at_capacity_are_interpolated_and_span_its_interval():
    points = [point(1, 1.0, tokens=figure(100, 90, 110)), point(3, 0.98, tokens=figure(300, 290, 310))]
    tokens = at(points).rates["tokens"]
    assert tokens.value == pytest.approx(200)
    assert 90 < tokens.low < 115 and 285 < tokens.high < 310


def test_a_rate_without_an_interval_has_none_at_capacity():
    points = [point(1, 1.0, tokens=figure(100)), point(3, 0.98, tokens=figure(300, 290, 310))]
    tokens = at(points).rates["tokens"]
    assert (tokens.value, tokens.low, tokens.high) == (pytest.approx(200), None, None)


def test_a_rate_that_is_not_known_everywhere_is_left_out():
    points = [point(1, 1.0, a=figure(None), b=1.0), point(3, 0.98, a=1.0, b=1.0)]
    assert set(at(points).rates) == {"b"}


def test_rates_are_not_extrapolated():
    for share_kept, state in ((1.0, "beyond"), (0.5, "not reached")):
        found = at([point(1, share_kept, tokens=10.0), point(3, share_kept, tokens=30.0)])
        assert (found.state, found.rates) == (state, {})


def test_a_lucky_point_beyond_a_miss_does_not_raise_capacity():
    lucky = at([point(1, 1.0), point(2, 0.90, n=5000), point(3, 0.995, n=500), point(4, 0.5)])
    assert lucky.load.value < 2


def test_repeats_pool_by_their_requests_and_by_what_they_differ():
    same = pool([point(2, 1.0, n=300), point(2, 0.9, n=100), point(1, 1.0)])
    assert [p.load for p in same] == [1, 2]
    assert same[1].kept[0].value == pytest.approx(0.975) and same[1].kept[0].n == 400
    # two repeats that differ: t with one degree of freedom is wide
    assert same[1].kept[0].low < 0.9 and same[1].kept[0].high == 1.0


def test_capacity_refuses_no_slo_and_points_that_are_not_pooled():
    with pytest.raises(ValueError, match="SLO"):
        capacity([], ())
    with pytest.raises(ValueError, match="pooled"):
        capacity([point(2, 1.0), point(1, 1.0)], (P99,))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1e4)), min_size=1, max_size=30))
def test_the_falling_series_falls_and_keeps_the_weighted_mean(pairs):
    values, weights = (np.array(x) for x in zip(*pairs, strict=True))
    fitted = falling(values, weights)
    assert np.all(np.diff(fitted) <= 1e-12)
    assert fitted @ weights == pytest.approx(values @ weights, abs=1e-6 * weights.sum())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 1))
def test_a_stricter_slo_never_has_more_capacity(shares, wanted):
    points = pool([point(k + 1, s) for k, s in enumerate(shares)])
    order = {"not reached": -1.0, "beyond": math.inf}

    def height(share_wanted):
        found = capacity(points, (Criterion(name="x", wanted=share_wanted),))
        return order.get(found.state, found.load.value)

    assert height(wanted) <= height(wanted * 0.9) + 1e-9


def coverage(attainment, truths, loads, wanted, requests, seed=3):
    """(share of intervals that hold the truth, of how many) over synthetic sweeps."""
    rng = np.random.default_rng(seed)
    held = found = 0
    for curve, truth in ((attainment(rng, t), t) for t in truths(rng)):
        points = []
        for load in loads:
            flags = rng.random(requests) < curve(load)
            points.append(LoadPoint(load=load, kept=(share(flags, unit="", evidence="simulated"),), rates={}))
        result = capacity(points, (Criterion(name="x", wanted=wanted),))
        if result.state != "found":
            continue
        found += 1
        low = -math.inf if result.load.low is None else result.load.low
        high = math.inf if result.load.high is None else result.load.high
        held += low <= truth <= high
    return held / found, found


def test_the_interval_covers_95_of_100_sweeps_when_the_slo_breaks_at_once():
    # a queue: all is well below capacity, and little above. Nothing says where between two loads that lies
    held, found = coverage(
        lambda rng, truth: lambda load: 0.999 if load < truth else 0.6,
        lambda rng: rng.uniform(1.5, 11.5, 300),
        np.arange(1.0, 13.0), 0.99, 800,
    )  # fmt: skip
    assert found > 290
    assert 0.93 <= held <= 0.98


def test_the_interval_covers_no_less_when_the_slo_fades():
    # logistic: the straight line between two loads is not the truth, so an interval that believed it would miss
    def fading(rng, truth):
        steep = rng.uniform(0.8, 3)
        middle = truth + math.log(0.95 / 0.05) / steep
        return lambda load: 1 / (1 + math.exp(steep * (load - middle)))

    held, found = coverage(fading, lambda rng: rng.uniform(4, 8, 300), np.arange(1.0, 13.0), 0.95, 800)
    assert found > 290
    assert held >= 0.95


def test_an_open_loop_is_saturated_where_the_server_no_longer_follows():
    points = [
        point(x, 1.0, request_throughput=figure(min(x, 5.0), min(x, 5.0) - 0.1, min(x, 5.0) + 0.1)) for x in (2, 4, 6)
    ]
    assert saturation(points, closed=False) == 6
    assert saturation(points[:2], closed=False) is None


def test_a_closed_loop_is_saturated_where_doubling_gains_nothing():
    points = [point(x, 1.0, request_throughput=y) for x, y in ((1, 1.0), (2, 1.9), (4, 3.5), (8, 3.55), (32, 3.7))]
    assert saturation(points, closed=True) == 4
    assert saturation(points[:3], closed=True) is None


def test_little_compares_what_is_inside_with_flow_times_stay():
    p = point(1, 1.0, request_throughput=4.0, concurrency=8.0)
    assert little(p, 2.0) == pytest.approx(1.0)
    assert little(p, None) is None


# ------------------------------------------------------------------------------------------------------ run folders


def sweep_run(path, rate, slow, *, valid=True, seed=0, mode="open", tier=TIER, **slo):
    """A run of 100 requests at ``rate``, ``slow`` of them with a ttft of 2 s; 12 tokens each; one replica."""
    gap = round(S / rate)
    rows = [good(k, k * gap, ttft_ms=2000 if k * slow % 100 < slow else 50) for k in range(100)]
    if not valid:
        rows = rows[:50]
    spec = replace(SPEC, mode=mode, concurrency=8 if mode == "closed" else None)
    made = write_run(path, rows, requests=100, seen=watch(rows), spec=spec, tier=tier)
    summary = summarise(read_run(made), slo=slo or {"ttft_p95": 1.0})
    plan = replace(summary.plan, planned_rate=float(rate) if mode == "open" else None, seed=seed)
    return replace(summary, plan=plan)


def only(found: list[ServingConfig]) -> ServingConfig:
    (system,) = found
    return system


def test_a_sweep_becomes_capacity_and_the_cost_there(tmp_path):
    runs = [sweep_run(tmp_path / f"{r}", r, slow) for r, slow in ((2, 0), (4, 0), (8, 20))]
    system = only(serving_configs(runs))
    assert system.capacity is not None and system.capacity.state == "found"
    # from 100 % at 4 to 80 % at 8 req/s: 95 % after a quarter of the way
    assert system.capacity.load.value == pytest.approx(5.0)
    tokens = system.capacity.rates["total_token_throughput"].value
    between = [r.rates.total_token_throughput.value for r in runs[1:]]
    assert tokens == pytest.approx(0.75 * between[0] + 0.25 * between[1])
    # 3.6 USD/h is 0.001 USD/s
    assert system.usd_per_1m_total.value == pytest.approx(0.001 / tokens * 1e6)
    assert system.usd_per_1m_total.low < system.usd_per_1m_total.value < system.usd_per_1m_total.high
    assert system.usd_per_1m_total_utilised.value == pytest.approx(system.usd_per_1m_total.value / 0.3)
    assert system.requests_per_s == pytest.approx(5.0)
    assert system.floor is not None and system.floor.load == 8
    assert system.floor.usd_per_1m_total.value < system.usd_per_1m_total.value
    speeds = [i.tokens_per_s_per_user.value for i in system.interactivity]
    assert speeds == pytest.approx([100, 100, 100])
    assert all(0.9 < ratio < 1.1 for ratio in system.little.values())
    assert "5 req/s" in sentence(system) and "ttft_p95 <= 1 s" in sentence(system)
    assert "Capacity and cost at the SLO" in render_markdown(capacity_sections([system]))


def test_repeats_are_one_load_and_invalid_runs_none(tmp_path):
    runs = [sweep_run(tmp_path / "a", 2, 0), sweep_run(tmp_path / "b", 2, 0, seed=1), sweep_run(tmp_path / "c", 8, 10)]
    spoilt = sweep_run(tmp_path / "d", 4, 0, valid=False)
    assert spoilt.verdict == "INVALID"
    system = only(serving_configs([*runs, spoilt]))
    assert system.loads == (2.0, 8.0) and len(system.runs) == 3
    assert any("1 run is not VALID" in note for note in system.notes)
    assert serving_configs([spoilt]) == []


def test_answers_without_a_figure_have_no_cost(tmp_path):
    low = only(serving_configs([sweep_run(tmp_path / "a", 2, 50)]))
    assert low.capacity is not None and low.capacity.state == "not reached" and low.requests_per_s is None
    assert low.usd_per_1m_total.value is None and low.usd_per_1m_total.note
    assert "does not keep" in sentence(low)
    high = only(serving_configs([sweep_run(tmp_path / "b", 2, 0)]))
    assert high.capacity is not None and high.capacity.state == "beyond" and high.requests_per_s == 2.0
    assert high.usd_per_1m_total.value is None and "at least 2 req/s" in sentence(high)
    assert render_markdown(capacity_sections([low, high]))


def test_without_an_slo_there_is_a_floor_but_no_capacity(tmp_path):
    run = sweep_run(tmp_path / "a", 2, 0)
    system = only(serving_configs([replace(run, slo=None)]))
    assert system.capacity is None and system.requests_per_s is None and system.floor is not None
    assert "no SLO" in sentence(system)
    assert render_markdown(capacity_sections([system]))


def test_without_a_price_there_is_capacity_but_no_cost(tmp_path):
    runs = [sweep_run(tmp_path / "a", 2, 0, tier=None), sweep_run(tmp_path / "b", 8, 50, tier=None)]
    system = only(serving_configs(runs))
    assert system.requests_per_s is not None
    assert system.usd_per_1m_total.value is None and "no tier" in system.usd_per_1m_total.note


def test_an_old_price_is_said_beside_the_capacity(tmp_path):
    old = replace(TIER, date="2025-01")
    (system,) = serving_configs(
        [sweep_run(tmp_path / f"{rate}", rate, slow, tier=old) for rate, slow in ((4, 0), (8, 20))]
    )
    assert any(note.startswith("OLD: ") for note in system.notes)


def test_the_two_kinds_of_loop_are_two_systems(tmp_path):
    found = serving_configs([sweep_run(tmp_path / "a", 2, 0), sweep_run(tmp_path / "b", 2, 0, mode="closed")])
    assert sorted(s.loop for s in found) == ["closed", "open"]
    closed = next(s for s in found if s.loop == "closed")
    assert closed.unit == "in flight" and closed.loads == (8.0,) and closed.requests_per_s is None


def test_a_load_without_a_rate_is_refused(tmp_path):
    run = sweep_run(tmp_path / "a", 2, 0)
    with pytest.raises(ValueError, match="no request rate"):
        offered(replace(run, plan=replace(run.plan, planned_rate=None)))


def test_cost_is_dear_when_slow(tmp_path):
    cost = cost_at(sweep_run(tmp_path / "a", 2, 0), figure(1000.0, 500.0, 2000.0))
    assert (cost.value, cost.low, cost.high) == (pytest.approx(1.0), pytest.approx(0.5), pytest.approx(2.0))
