"""The steady window leaves out ramp and drain, keeps the rest, and refuses drift, steps and peaks."""

from __future__ import annotations

import numpy as np
import pytest
from golden import qwen

from harness.analysis.cost.cost import bill_usd, usd_per_1m
from harness.analysis.stats.intervals import rate
from harness.analysis.steady import LARGEST_DRIFT, Steady, _drift, steady_rate, steady_window

BINS = 200


def noisy(rng, shape, *, spread=0.05, alike=0.5):
    """``shape`` with noise whose neighbours are alike."""
    noise = np.empty(len(shape))
    noise[0] = rng.standard_normal()
    for k in range(1, len(shape)):
        noise[k] = alike * noise[k - 1] + np.sqrt(1 - alike**2) * rng.standard_normal()
    return np.maximum(0.0, shape * (1 + spread * noise))


def found(in_flight, tokens=None, bin_s=1.0) -> Steady:
    return steady_window(in_flight, in_flight * 20 if tokens is None else tokens, start_s=0.0, bin_s=bin_s)


def trapezoid(ramp, drain, level=64.0, bins=BINS):
    shape = np.full(bins, level)
    shape[:ramp] = level * (np.arange(ramp) + 0.5) / ramp
    if drain:
        shape[-drain:] = level * (np.arange(drain, 0, -1) - 0.5) / drain
    return shape


def test_golden_measured_run():
    """The window of the known figures: seconds with at least 90 % of the full batch, 108 of 160."""
    steady = steady_window(qwen.TICKS["running"], qwen.TICKS["gen_throughput"], start_s=0.0, bin_s=1.0)
    assert steady.found
    assert (steady.start_s, steady.end_s, steady.duration_s) == (17.0, 125.0, 108.0)
    assert steady.level == 128.0
    out = qwen.TICKS["gen_throughput"][steady.first : steady.last].sum()
    into = qwen.TICKS["prompt_throughput"][steady.first : steady.last].sum()
    usd = bill_usd(qwen.USD_PER_HOUR, 1, steady.duration_s)
    assert usd_per_1m(usd, out) == pytest.approx(1.511, abs=5e-4)
    assert usd_per_1m(usd, into + out) == pytest.approx(0.753, abs=5e-4)
    assert usd_per_1m(usd, into / 4 + out) == pytest.approx(1.207, abs=5e-4)
    whole = bill_usd(qwen.USD_PER_HOUR, 1, qwen.SPAN_S)
    assert usd_per_1m(whole, qwen.USAGE.output) == pytest.approx(1.842, abs=5e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ramp", "drain"), [(40, 0), (0, 60), (40, 60), (10, 10), (1, 90)])
def test_ramp_and_drain_are_left_out(ramp, drain, seed):
    steady = found(noisy(np.random.default_rng(seed), trapezoid(ramp, drain)))
    assert steady.found
    # 90 % of the level is reached in the last tenth of a ramp; noise may move that a little
    assert 0.8 * ramp <= steady.first <= ramp + 6
    assert BINS - drain - 6 <= steady.last <= BINS - 0.75 * drain


def test_noise_is_not_cut_and_not_drift():
    """Poisson noise around a level: 95 of 100 runs keep 95 % of themselves, and at most a few are called drifting."""
    rng, kept, drifting, runs = np.random.default_rng(0), [], 0, 300
    for _ in range(runs):
        steady = found(rng.poisson(30.0, BINS).astype(float), rng.poisson(900.0, BINS).astype(float))
        kept.append((steady.last - steady.first) / BINS)
        drifting += bool(steady.drifting)
    assert np.quantile(kept, 0.05) >= 0.95
    assert drifting <= 0.02 * runs


def test_the_drift_test_has_its_level():
    """Without drift, neighbours alike: beyond the critical value in about 1 of 100 runs, size left aside."""
    rng, runs, beyond = np.random.default_rng(1), 1000, 0
    for _ in range(runs):
        values = noisy(rng, np.full(BINS, 100.0), spread=0.1)
        beyond += _drift(values)[1]
    assert beyond <= 0.02 * runs


@pytest.mark.parametrize("alike", [0.0, 0.5])
@pytest.mark.parametrize("bins", [100, 200])
def test_false_alarms_of_the_drift_test(bins, alike):
    """The same for shorter runs and neighbours that are not alike: 1 of 100, at most 2."""
    rng, runs = np.random.default_rng(2), 1000
    beyond = sum(_drift(noisy(rng, np.full(bins, 100.0), spread=0.1, alike=alike))[1] for _ in range(runs))
    assert beyond <= 0.02 * runs


@pytest.mark.parametrize(
    "shape",
    [
        np.linspace(50, 80, BINS),  # a queue that grows
        np.linspace(80, 50, BINS),
        np.where(np.arange(BINS) < 100, 64.0, 90.0),  # a replica was lost
        np.where(np.arange(BINS) < 140, 64.0, 48.0),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_drift_and_steps_are_no_steady_state(shape, seed):
    rng = np.random.default_rng(seed)
    level = np.full(BINS, 64.0)
    steady = found(noisy(rng, level), noisy(rng, shape * 20))
    assert steady.drifting == ["tokens"]
    assert "drift within the window: tokens by" in steady.reason
    assert steady.drift["tokens"] > LARGEST_DRIFT
    assert steady.duration_s  # the window is still given, beside the reason


_AT = np.arange(BINS) / BINS
DRIFTS = {
    "ramp up": _AT - 0.5,
    "ramp down": 0.5 - _AT,
    "ramp in the second half": np.maximum(0.0, 2 * _AT - 1),
    "easy first 15 %": (_AT >= 0.15) * 1.0,
    "up and down again": ((_AT >= 0.35) & (_AT < 0.7)) * 1.0,
    "down and up again": ((_AT < 0.3) | (_AT >= 0.6)) * 1.0,
    "climbs, then falls": 1 - np.abs(2 * _AT - 1),
    "stairs": np.floor(4 * _AT) / 3,
    "fades": np.exp(-5 * _AT),
}
"""Shapes of a drift, each of height 1 from its lowest to its highest."""


@pytest.mark.parametrize("shape", DRIFTS.values(), ids=DRIFTS)
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_drift_of_two_thirds_is_seen_whatever_its_shape(shape, spread):
    """The error that a change is held against must not hold the change: with blocks about the means before and after
    one change a climb and fall of 67 % was none, and a mere ramp hardly one.
    """
    level = np.full(BINS, 64.0)
    for seed in range(20):
        steady = found(level, noisy(np.random.default_rng(seed), 1000 * (1 + 0.67 * shape), spread=spread))
        assert steady.drifting == ["tokens"], seed


def queue(rng, busy, seconds, slots=8, service_s=3.0):
    """Requests in flight per bin of a queue in equilibrium (M/M/8), and what it serves per bin."""
    rate, now_s, inside, bin_s = busy * slots / service_s, -100.0, 0, seconds / BINS
    in_flight, served = np.zeros(BINS), np.zeros(BINS)
    while now_s < seconds:
        leave = min(inside, slots) / service_s
        until = now_s + rng.exponential(1 / (rate + leave))
        at = max(now_s, 0.0)
        while at < min(until, seconds) - 1e-12:
            k = min(BINS - 1, int(at / bin_s + 1e-9))
            end = min(until, (k + 1) * bin_s)
            in_flight[k] += inside * (end - at) / bin_s
            served[k] += min(inside, slots) * (end - at)
            at = end
        now_s = until
        inside += 1 if rng.random() < rate / (rate + leave) else -1
    return in_flight, rng.poisson(served * 20).astype(float)


@pytest.mark.parametrize(("busy", "seconds", "most"), [(0.5, 300, 0.1), (0.7, 300, 0.1), (0.85, 1200, 0.1)])
def test_a_queue_in_equilibrium_seldom_drifts(busy, seconds, most):
    """False alarms where nothing drifts, of both series together. Near saturation or in a short run a queue's own waves
    are as long as the run, and it is no steady state (METRICS.md has the shares).
    """
    rng, runs = np.random.default_rng(7), 60
    alarms = sum(bool(found(*queue(rng, busy, seconds), bin_s=seconds / BINS).drifting) for _ in range(runs))
    assert alarms <= most * runs


def test_growing_in_flight_is_said():
    steady = found(noisy(np.random.default_rng(0), np.linspace(10, 60, BINS)), np.full(BINS, 100.0))
    assert steady.drifting == ["in_flight"]
    assert "drift within the window: in flight by" in steady.reason


def test_a_small_change_is_said_but_no_reason():
    steady = found(noisy(np.random.default_rng(0), np.linspace(64, 67, BINS), spread=0.005))
    assert steady.found
    assert 0.02 < steady.drift["in_flight"] < LARGEST_DRIFT


def test_a_perfectly_constant_run_is_steady():
    steady = found(np.full(BINS, 8.0))
    assert steady.found and (steady.first, steady.last) == (0, BINS)
    assert steady.drift == {"in_flight": 0.0, "tokens": 0.0}


def test_a_peak_is_no_plateau():
    shape = np.ones(BINS)
    shape[90:120] = 400.0
    assert "a peak" in found(shape).reason


@pytest.mark.parametrize(("bins", "bin_s"), [(1, 1.0), (19, 1.0), (100, 0.05)])
def test_a_short_run_has_no_steady_state(bins, bin_s):
    steady = found(np.full(bins, 8.0), bin_s=bin_s)
    assert "needs 10 s and 20 bins" in steady.reason
    assert (steady.start_s, steady.end_s, steady.duration_s) == (None, None, None)


@pytest.mark.parametrize("in_flight", [np.zeros(0), np.zeros(BINS), np.full(BINS, np.nan)])
def test_nothing_in_flight(in_flight):
    assert found(in_flight).reason == "nothing was in flight"


def test_series_of_two_lengths():
    with pytest.raises(ValueError, match="bins"):
        steady_window(np.ones(3), np.ones(4), start_s=0.0, bin_s=1.0)


def test_the_rate_of_a_steady_part_holds_with_and_without_its_beginning():
    """All slots begin at once, no long answer half done: for a while more come than later, 3 % of 60 s."""
    per_bin = np.random.default_rng(4).gamma(4, 25, 180)
    per_bin[:18] *= 2.5
    found = steady_rate(per_bin, 0.3, n=400, unit="tokens/s", evidence="simulated")
    every, later = (rate(part, 0.3, n=400, unit="tokens/s", evidence="simulated") for part in (per_bin, per_bin[18:]))
    assert found.value == every.value
    assert (found.low, found.high) == (min(every.low, later.low), max(every.high, later.high))
    assert found.low <= per_bin[18:].mean() / 0.3 < 0.93 * found.value
