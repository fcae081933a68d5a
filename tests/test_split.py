"""The bill divides exactly, by methods that find what is there and say when nothing can be found."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from golden import deepseek, qwen
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.cost.cost import bill_usd
from harness.analysis.cost.split import (
    Samples,
    busy_rows,
    by_fit,
    by_phase_time,
    by_ratio,
    by_step_model,
    divide,
    server_samples,
    split_bill,
    token_mix,
)
from harness.analysis.stats.nonnegative import fit_non_negative

USD = 10.0
USAGE = token_mix(8e6, None, 2e6)


def parts(split):
    return (split.input_nusd, split.cached_input_nusd, split.output_nusd)


def prices(split):
    return tuple(q.value for q in (split.usd_per_1m_input, split.usd_per_1m_cached_input, split.usd_per_1m_output))


def refused(split):
    assert split.reason
    assert parts(split) == (None, None, None) and prices(split) == (None, None, None)
    assert split.usd_per_1m_input.note == split.usd_per_1m_output.note == split.reason
    return split.reason


def samples(rng, n=300, *, a=2e-4, b=5e-4, c=0.0, d=0.0, noise=0.02, mix=0.5, running=100, with_steps=False):
    """Seconds of one busy server whose time is a x input + b x output + c x steps + d x cached."""
    share = np.clip(0.4 + mix * (rng.random(n) - 0.5), 0.02, 0.98)
    cached = 1000 * rng.random(n) if d else None
    steps = rng.uniform(5, 40, n) if with_steps else None
    left = 1.0 - (c * steps if with_steps else 0) - (d * cached if d else 0)
    left = left * (1 + noise * rng.standard_normal(n))
    return Samples(
        seconds=np.ones(n), uncached_input=share * left / a, cached_input=cached, output=(1 - share) * left / b,
        steps=steps, running=np.full(n, float(running)), prefill_request_s=None, decode_request_s=None,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- sums


@given(
    st.floats(1e-6, 1e7), st.lists(st.floats(0, 1e12), min_size=2, max_size=4).filter(lambda w: sum(w) > 0)
)  # fmt: skip
def test_parts_are_whole_and_add_up_exactly(usd, weights):
    found = divide(usd, weights)
    assert sum(found) == round(Fraction(usd) * 10**9)
    for part, weight in zip(found, weights, strict=True):
        assert part >= 0
        assert weight or part == 0
        share = Fraction(usd) * 10**9 * Fraction(weight) / sum(map(Fraction, weights))
        assert abs(part - share) <= len(weights) + 1


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0]])
def test_nothing_divides_by_nothing(weights):
    with pytest.raises(ValueError, match="weights"):
        divide(1.0, weights)


@given(
    st.floats(0.01, 1e6), st.integers(1, 10**12), st.floats(0, 1), st.integers(1, 10**12), st.floats(0.1, 20),
    st.none() | st.floats(0, 1),
)  # fmt: skip
def test_every_declared_split_adds_up(usd, into, hit, out, ratio, cached_ratio):
    usage = token_mix(float(into), into * hit, float(out))
    split = by_ratio(usd, usage, ratio, cached_ratio=cached_ratio, evidence="measured")
    assert sum(parts(split)) == split.bill_nusd == round(Fraction(usd) * 10**9)
    price_in, price_cached, price_out = prices(split)
    charged = usage.input if price_cached is None else usage.uncached_input
    back = charged * price_in + (price_cached or 0) * usage.cached_input + usage.output * price_out
    assert back / 1e6 == pytest.approx(usd, rel=1e-9)
    assert price_out == pytest.approx(ratio * price_in)


# ------------------------------------------------------------------------------------------------- golden cases


def test_deepseeks_day_by_phase_time():
    """Engine seconds of each phase from the tokens a node does per second: what was published, and adds up."""
    usage = token_mix(deepseek.INPUT, deepseek.CACHED_INPUT, deepseek.OUTPUT)
    usd = bill_usd(deepseek.USD_PER_HOUR, 1, 24 * 3600) * deepseek.NODES
    assert usd == pytest.approx(87_072)
    prefill, decode = deepseek.INPUT / deepseek.PREFILL_PER_S, deepseek.OUTPUT / deepseek.DECODE_PER_S
    split = by_phase_time(usd, usage, prefill, decode, evidence="quoted")
    # tokens per node are rounded where they were published: together they fill 100.05 % of the day
    assert (prefill + decode) / (deepseek.NODES * 24 * 3600) == pytest.approx(1.0005, abs=1e-4)
    assert prices(split)[0] == pytest.approx(0.0603, abs=5e-5)
    assert prices(split)[2] == pytest.approx(0.3003, rel=1e-3)
    assert split.ratio == pytest.approx(4.98, abs=0.005)
    assert sum(parts(split)) == split.bill_nusd == 87_072 * 10**9


def test_deepseeks_day_with_cached_input_apart():
    usage = token_mix(deepseek.INPUT, deepseek.CACHED_INPUT, deepseek.OUTPUT)
    prefill, decode = deepseek.INPUT / deepseek.PREFILL_PER_S, deepseek.OUTPUT / deepseek.DECODE_PER_S
    split = by_phase_time(87_072.0, usage, prefill, decode, evidence="quoted", cached_ratio=0.25)
    price_in, price_cached, price_out = prices(split)
    assert price_cached == pytest.approx(price_in / 4)
    assert price_out == pytest.approx(0.3003, rel=1e-3)  # what output costs does not depend on it
    assert sum(parts(split)) == 87_072 * 10**9


def test_gke_ratio_on_the_measured_run():
    usd = bill_usd(qwen.USD_PER_HOUR, 1, qwen.SPAN_S)
    split = by_ratio(usd, qwen.USAGE, 4.0, evidence="measured")
    assert prices(split) == (pytest.approx(0.348, abs=5e-4), None, pytest.approx(1.391, abs=5e-4))
    assert split.usd_per_1m_cached_input.note == "cached input tokens were not counted"


def test_the_measured_run_by_step_model():
    """Two thirds of the bill are output; request seconds of 128 sequences at once are refused as engine time."""
    usd = bill_usd(qwen.USD_PER_HOUR, 1, qwen.SPAN_S)
    phase, step = split_bill(usd, qwen.USAGE, qwen.samples(), evidence="measured")
    declared = by_ratio(usd, qwen.USAGE, 4.0, evidence="measured")
    assert "no engine time" in refused(phase)
    assert phase.facts["overlap"] == pytest.approx(102.7, abs=0.1)
    assert step.reason is None
    assert sum(parts(step)) == sum(parts(declared)) == step.bill_nusd
    assert prices(step) == (pytest.approx(0.474, abs=5e-4), None, pytest.approx(1.227, abs=5e-4))
    for q in (step.usd_per_1m_input, step.usd_per_1m_output):
        assert q.low < q.value < q.high < 1.5 * q.low
    assert step.facts["residual"] < 0.06


# ------------------------------------------------------------------------------------------------- known truths


def test_the_step_model_finds_what_is_there():
    """Truth 2.5 : 1, in the interval of about 95 of 100 servers."""
    hits = 0
    for seed in range(100):
        split = by_step_model(USD, USAGE, samples(np.random.default_rng(seed)), evidence="measured")
        true_out = USD / (USAGE.input / 2.5 + USAGE.output) * 1e6
        q = split.usd_per_1m_output
        assert q.value == pytest.approx(true_out, rel=0.05)
        hits += q.low <= true_out <= q.high
    assert hits >= 85


def test_the_step_model_tells_shared_time_apart():
    found = samples(np.random.default_rng(0), c=0.005, with_steps=True)
    split = by_step_model(USD, USAGE, found, evidence="measured")
    assert split.facts["per_steps"] == pytest.approx(0.005, rel=0.15)
    assert split.facts["shared_share"] == pytest.approx(0.11, abs=0.02)
    assert split.ratio == pytest.approx(2.5, rel=0.05)


def test_time_that_is_mostly_shared_is_a_rule_not_a_measurement():
    found = samples(np.random.default_rng(0), c=0.03, with_steps=True)
    assert "shared by both" in refused(by_step_model(USD, USAGE, found, evidence="measured"))


def test_cached_input_has_a_price_of_its_own():
    usage = token_mix(8e6, 4e6, 2e6)
    split = by_step_model(USD, usage, samples(np.random.default_rng(0), d=5e-5), evidence="measured")
    price_in, _, price_out = prices(split)
    true_in = USD / (4e6 + 4e6 / 4 + 2.5 * 2e6) * 1e6
    for q, truth in ((split.usd_per_1m_input, true_in), (split.usd_per_1m_cached_input, true_in / 4)):
        assert q.low < truth < q.high
    assert price_out == pytest.approx(2.5 * price_in, rel=0.05)
    assert sum(parts(split)) == split.bill_nusd == 10 * 10**9


def test_cached_input_that_costs_nothing_is_not_known():
    rng = np.random.default_rng(1)
    found = replace(samples(rng), cached_input=1000 * rng.random(300))
    fit = by_step_model(USD, token_mix(8e6, 4e6, 2e6), found, evidence="measured")
    assert fit.facts["per_cached_input"] < 1e-5
    if fit.usd_per_1m_cached_input.value is None:
        assert "not told from nothing" in fit.usd_per_1m_cached_input.note
    assert sum(parts(fit)) == fit.bill_nusd


# ------------------------------------------------------------------------------------------------- not identifiable


def test_one_mix_has_no_two_prices():
    """The same requests faster and slower: any division explains it."""
    into = np.linspace(1e5, 2e6, 12)
    split = regression(2e-4 * into + 5e-4 * into / 4, into, into / 4)
    assert "hardly varies" in refused(split)


def regression(spent, into, out):
    rows = Samples(seconds=spent, uncached_input=into, cached_input=None, output=out, steps=None, running=spent)
    return by_fit(USD, USAGE, rows, evidence="measured", block=1)


def test_a_mix_that_moves_by_a_hundredth_is_one_mix():
    """A fit through exact data would find the truth here: in real data the noise would."""
    into = np.linspace(1e5, 2e6, 12)
    out = into / 4 * (1 + 0.01 * np.cos(np.arange(12)))
    split = regression(2e-4 * into + 5e-4 * out, into, out)
    assert "hardly varies" in refused(split) and 30 < split.facts["condition"] < 1000


def test_time_that_tokens_do_not_explain_is_not_divided():
    rng = np.random.default_rng(0)
    into, out = rng.uniform(1, 10, (2, 400)) * 1e5
    split = regression((2e-4 * into + 5e-4 * out) * np.tile([0.5, 1.5], 200), into, out)
    assert "off the measured ones" in refused(split)


def test_an_interval_wider_than_its_value_is_no_price():
    rng = np.random.default_rng(2)
    into, out = rng.uniform(1, 2, (2, 12)) * 1e5
    assert "the interval of input is wider" in refused(
        regression((1e-5 * into + 5e-4 * out) * rng.normal(1, 0.05, 12), into, out)
    )


def test_seconds_without_a_request_are_not_engine_time():
    """An engine that idles half of each minute: idle seconds would be laid on tokens."""
    found = samples(np.random.default_rng(0), with_steps=True, c=0.005)
    idle = np.arange(300) % 20 < 10
    half = replace(
        found, running=np.where(idle, 0.0, found.running), uncached_input=np.where(idle, 0.0, found.uncached_input),
        output=np.where(idle, 0.0, found.output), steps=np.where(idle, 0.0, found.steps),
    )  # fmt: skip
    rows = busy_rows(half)
    assert rows.seconds.sum() == 150 and rows.uncached_input.sum() == pytest.approx(half.uncached_input.sum())


def test_request_seconds_of_a_batch_are_no_engine_time():
    for seconds, divided in ((104.0, True), (200.0, False)):
        split = by_phase_time(USD, USAGE, seconds / 4, seconds * 3 / 4, evidence="measured", busy_s=100.0)
        assert (split.reason is None) == divided and split.facts["overlap"] == seconds / 100


def test_a_part_at_zero_is_no_price():
    rng = np.random.default_rng(0)
    into, out = rng.uniform(1, 2, (2, 30)) * 1e5
    split = regression(1e-3 * out - 1e-5 * into, into, out)
    assert "at its bound" in refused(split)


def test_noise_gives_no_price():
    rng = np.random.default_rng(0)
    into, out, spent = rng.exponential(1.0, (3, 30))
    reason = refused(regression(spent, into, out))
    assert re.fullmatch(r"the fitted times are \d+% off the measured ones, and 25% is the most", reason)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_rows(n):
    column = np.arange(1.0, n + 1)
    split = regression(column, column, column**2)
    assert "rows for 2 unknowns" in refused(split)


def test_a_short_or_idle_server_has_no_step_model():
    found = samples(np.random.default_rng(0), n=20)
    assert "busy intervals" in refused(by_step_model(USD, USAGE, found, evidence="measured"))
    idle = replace(samples(np.random.default_rng(0)), running=np.zeros(300))
    assert "busy intervals" in refused(by_step_model(USD, USAGE, idle, evidence="measured"))


def test_phases_without_time():
    assert "no time" in refused(by_phase_time(USD, USAGE, 0.0, 1.0, evidence="measured"))
    assert "no time" in refused(by_phase_time(USD, USAGE, math.nan, 1.0, evidence="measured"))


@pytest.mark.parametrize(("usd", "usage"), [(None, USAGE), (USD, None), (USD, replace(USAGE, output=0.0))])
def test_no_bill_no_split(usd, usage):
    for split in split_bill(usd, usage, None, evidence="measured"):
        refused(split)


def test_unsampled_servers_divide_nothing():
    phase, step = split_bill(USD, USAGE, None, evidence="measured")
    assert refused(phase) == refused(step) == "the servers were not sampled"


# ------------------------------------------------------------------------------------------------- the fit, the samples


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_the_fit_is_the_best_that_is_not_negative(seed, k):
    """No step along any coordinate, nor any random other point, explains the response better."""
    rng = np.random.default_rng(seed)
    columns, response = rng.standard_normal((12, k)), rng.standard_normal(12)
    found = fit_non_negative(response, columns).coefficients
    assert (found >= 0).all()
    least = ((response - columns @ found) ** 2).sum()
    for other in np.abs(found + 0.3 * rng.standard_normal((50, k))):
        assert ((response - columns @ other) ** 2).sum() >= least - 1e-9


def table(t_s, **columns):
    n = len(t_s)
    base = {"t_ns": [int(t * 1e9) for t in t_s], "running": [4.0] * n, "process_start_s": [1.0] * n}
    counted = {
        "prompt_tokens_total": [100.0 * k for k in range(n)],
        "generation_tokens_total": [10.0 * k for k in range(n)],
    }
    return pa.table(base | counted | columns)


def test_samples_are_differences_within_the_window():
    found = server_samples([table(range(10), prefix_cache_hits_total=[40.0 * k for k in range(10)])], 2.0, 6.0)
    assert found.trouble is None
    assert found.seconds.tolist() == [1.0] * 4
    assert found.uncached_input.tolist() == [60.0] * 4
    assert found.cached_input.tolist() == [40.0] * 4
    assert found.output.tolist() == [10.0] * 4
    assert found.steps is None and found.prefill_request_s is None


def test_cached_tokens_that_are_counted_with_the_prompt_come_first():
    found = server_samples(
        [table(range(3), prefix_cache_hits_total=[0.0, 90, 90], prompt_tokens_cached_total=[0.0, 45, 90])], 0, 9
    )
    assert found.cached_input.tolist() == [45.0, 45.0]


def test_samples_of_two_servers_are_rows_of_one_table():
    found = server_samples(
        [table(range(5), prefill_request_s_total=[0.0, 1, 2, 3, 4], decode_request_s_total=[0.0] * 5)] * 2, 0, 9
    )
    assert len(found.seconds) == 8
    assert found.prefill_request_s == 8.0


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([], "not sampled"),
        ([table([1.0])], "not sampled"),
        ([table(range(4), process_start_s=[1.0, 1, 2, 2])], "started again"),
        ([table(range(4), prompt_tokens_total=[0.0, 9, 1, 2])], "started again"),
        ([table(range(4), generation_tokens_total=[None] * 4)], "do not count tokens"),
    ],
)
def test_books_that_cannot_be_read_are_void(tables, words):
    found = server_samples(tables, 0.0, 10.0)
    assert words in found.trouble
    assert words in refused(by_step_model(USD, USAGE, found, evidence="measured"))


def test_the_fewest_intervals_still_cover():
    """Forty busy seconds with a tenth of noise: what is given at all covers in about 94 of 100 servers."""
    held = given_ = 0
    truth = USD / (USAGE.input / 2.5 + USAGE.output) * 1e6
    for seed in range(150):
        found = samples(np.random.default_rng(seed), n=40, noise=0.1)
        q = by_step_model(USD, USAGE, found, evidence="measured").usd_per_1m_output
        if q.value is not None:
            given_ += 1
            held += q.low <= truth <= q.high
    assert given_ > 60
    assert held / given_ >= 0.88
    short = by_step_model(USD, USAGE, samples(np.random.default_rng(0), n=35), evidence="measured")
    assert "7 busy intervals of 5 s, needs 8 (40 s with requests in the batch)" in refused(short)
