"""Arrivals are what their name says, whatever the seed, and nobody tidies them up afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.plan.arrivals import Stage, arrival_times, constant_stage, parse_stages

S = 1_000_000_000


GOLDEN_POISSON = [740_231_152, 914_826_324, 1_378_600_954, 1_519_419_129]
GOLDEN_GAMMA = [791_236_964, 890_386_958, 1_388_037_932, 2_691_094_189]


def gaps_s(times: np.ndarray) -> np.ndarray:
    return np.diff(times) / S


def test_constant_arrivals_are_even_and_start_at_once():
    assert arrival_times("constant", constant_stage(4.0, 1.0)).tolist() == [0, S // 4, S // 2, 3 * S // 4]
    assert arrival_times("constant", constant_stage(3.0), most=4).tolist() == [0, 333_333_333, 666_666_667, S]


def test_stages_go_on_after_a_long_one():
    """Times are drawn in blocks, and the first stage alone fills more than one."""
    stages = (*constant_stage(100_000.0, 1.0), *constant_stage(50_000.0, 2.0))
    times = arrival_times("constant", stages)
    assert (len(times), times[-1]) == (200_000, 3 * S - S // 50_000)


def test_golden_draws():
    """Bit for bit: a plan that was rebuilt is the plan. A NumPy whose generators changed must be noticed here."""
    poisson = arrival_times("poisson", constant_stage(2.0), seed=7, most=4)
    gamma = arrival_times("gamma", constant_stage(2.0), burstiness=0.5, seed=7, most=4)
    assert poisson.tolist() == GOLDEN_POISSON
    assert gamma.tolist() == GOLDEN_GAMMA
    assert arrival_times("poisson", constant_stage(2.0), seed=8, most=4).tolist() != GOLDEN_POISSON


def test_gaps_have_the_mean_and_the_spread_of_their_process():
    n = 200_000
    for process, shape in (("poisson", 1.0), ("gamma", 0.25), ("gamma", 1.0), ("gamma", 4.0)):
        gaps = gaps_s(arrival_times(process, constant_stage(50.0), burstiness=shape, seed=1, most=n))
        spread = 1 / math.sqrt(shape)
        assert gaps.mean() == pytest.approx(1 / 50, rel=5 * spread / math.sqrt(n))
        assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.03), (process, shape)
        assert (gaps >= 0).all()
    gaps = gaps_s(arrival_times("poisson", constant_stage(1.0), seed=3, most=n))
    for at in (0.1, 0.5, 1.0, 3.0):  # the whole distribution, not only two moments
        assert (gaps > at).mean() == pytest.approx(math.exp(-at), abs=4 * 0.5 / math.sqrt(n))
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(n), "gaps do not know each other"


def test_the_number_of_arrivals_varies_as_it_should():
    """Peers stretch the draws so that the last lands on n / rate: then every seed has the same count. Ours does not."""
    counts = [len(arrival_times("poisson", constant_stage(20.0, 10.0), seed=seed)) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(200, abs=4 * math.sqrt(200 / 400))
    assert np.var(counts) / np.mean(counts) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 400))
    last = [arrival_times("poisson", constant_stage(20.0), seed=seed, most=200)[-1] / S for seed in range(400)]
    assert np.std(last) == pytest.approx(math.sqrt(200) / 20, rel=0.2)


def test_stages_follow_one_another_at_their_rates():
    stages = parse_stages("10s@20, 5s@0, 10s@60")
    times = arrival_times("constant", stages) / S
    assert len(times) == 800
    assert ((times >= 10) & (times < 15)).sum() == 0, "a pause is a pause"
    assert np.diff(times[times < 10]) == pytest.approx(1 / 20)
    assert np.diff(times[times >= 15]) == pytest.approx(1 / 60)
    assert times[-1] < 25
    drawn = arrival_times("poisson", stages, seed=5) / S
    assert len(drawn) == pytest.approx(800, abs=4 * math.sqrt(800))
    assert ((drawn >= 10) & (drawn < 15)).sum() == 0


def test_a_climb_is_linear():
    """At rate 2t the n-th arrival is at sqrt(n)."""
    climb = (Stage(duration_s=50.0, rate=0.0, end_rate=100.0),)
    times = arrival_times("constant", climb) / S
    assert times == pytest.approx(np.sqrt(np.arange(2500)), abs=1e-8)
    fall = (Stage(duration_s=50.0, rate=100.0, end_rate=0.0),)
    assert arrival_times("constant", fall) / S == pytest.approx(50 - np.sqrt(2500 - np.arange(2500)), abs=1e-6)
    times = arrival_times("poisson", parse_stages("100s@10..50"), seed=2) / S
    early, late = (times < 50).sum(), (times >= 50).sum()
    assert early == pytest.approx(50 * 20, abs=4 * math.sqrt(1000))
    assert late == pytest.approx(50 * 40, abs=4 * math.sqrt(2000))


@given(
    process=st.sampled_from(["constant", "poisson", "gamma"]),
    stages=st.lists(st.tuples(st.floats(0.01, 20), st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=4),
    seed=st.integers(-(2**31), 2**63),
    most=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_times_are_sorted_inside_the_stages_and_a_cut_changes_none(process, stages, seed, most):
    made = [Stage(duration_s=d, rate=a, end_rate=b) for d, a, b in stages]
    times = arrival_times(process, made, seed=seed)
    assert (np.diff(times) >= 0).all()
    assert times.dtype == np.int64
    assert not len(times) or (times[0] >= 0 and times[-1] <= sum(d for d, _, _ in stages) * S + 1)
    assert arrival_times(process, made, seed=seed, most=most).tolist() == times[:most].tolist()


def test_blocks_do_not_show(monkeypatch):
    whole = arrival_times("gamma", constant_stage(3.0), burstiness=2.0, most=1000)
    monkeypatch.setattr("harness.plan.arrivals._BLOCK", 7)
    assert arrival_times("gamma", constant_stage(3.0), burstiness=2.0, most=1000).tolist() == whole.tolist()


@pytest.mark.parametrize(
    "text",
    ["", "2m", "2m@", "@4", "2m@-1", "2m@4...8", "2m@4,", "x@4", "0s@4", "2m@0", "1m@0,2m@0..0", "2m@inf", "9e9@1"],
)
def test_stages_that_are_none(text):
    with pytest.raises(UsageError, match="stage"):
        parse_stages(text)


def test_what_cannot_be_drawn():
    for arguments in (
        {"process": "gamma", "stages": constant_stage(1.0, 1.0), "burstiness": 0.0},
        {"process": "gamma", "stages": constant_stage(1.0, 1.0), "burstiness": math.nan},
        {"process": "poisson", "stages": constant_stage(1.0, 1.0), "burstiness": 0.5},
        {"process": "poisson", "stages": constant_stage(1.0)},  # without end
        {"process": "poisson", "stages": parse_stages("100h@1000000")},
        {"process": "poisson", "stages": constant_stage(1e-10), "most": 10},
    ):
        with pytest.raises(UsageError):
            arrival_times(**arguments)
