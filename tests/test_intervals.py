"""Intervals cover the truth as often as they say, and say nothing where nothing can be said."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from run_files import SPEC, good, write_run

from harness.analysis.rows.read import read_run
from harness.analysis.stats.autocorrelation import BLOCKS, CRITICAL, LONG, long_run_variance, student_t
from harness.analysis.stats.intervals import (
    MIN_SAMPLES,
    Quantity,
    distribution,
    rate,
    ratio_interval,
    samples_needed,
    share,
)
from harness.analysis.stats.replicates import over_replicates
from harness.analysis.summary import summarise

Z = {0.5: 0.0, 0.9: 1.2815515655, 0.95: 1.6448536270, 0.99: 2.3263478740}
RUNS = 200


def summary_of(values, owners=None, weights=None):
    owners = np.arange(len(values)) if owners is None else owners
    return distribution(np.asarray(values, dtype=float), unit="s", evidence="measured", owners=owners, weights=weights)


def percentile_of(d, p):
    return {0.5: d.p50, 0.9: d.p90, 0.95: d.p95, 0.99: d.p99}[p]


def coverage(quantity_and_truth):
    hits = 0
    for seed in range(RUNS):
        q, truth = quantity_and_truth(np.random.default_rng(seed))
        hits += (q.low is None or q.low <= truth) and (q.high is None or truth <= q.high)
    return hits / RUNS


def autoregressive(rng, n, phi):
    steps = rng.standard_normal(n) * math.sqrt(1 - phi**2)
    values = np.empty(n)
    values[0] = rng.standard_normal()
    for i in range(1, n):
        values[i] = phi * values[i - 1] + steps[i]
    return values


@pytest.mark.parametrize(("p", "n"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299)])
def test_samples_needed(p, n):
    assert samples_needed(p) == n
    assert 1 - p**n >= 0.95 > 1 - p ** (n - 1)


def test_a_percentile_that_the_sample_cannot_carry_is_null_and_says_so():
    d = summary_of(np.arange(60.0))
    assert (d.p99.value, d.p99.low, d.p99.high) == (None, None, None)
    assert d.p99.note == "needs 299 requests, has 60"
    assert d.p95.value == 56.0  # the 57th of 60: the smallest with 95 % at or below


def test_no_samples_is_all_null():
    d = summary_of([])
    assert all(q.value is None and q.n == 0 for q in (d.mean, d.p50, d.p90, d.p95, d.p99))


def test_one_sample_has_a_mean_without_interval():
    d = summary_of([0.25])
    assert (d.mean.value, d.mean.low, d.mean.high, d.p50.value) == (0.25, None, None, None)
    assert "needs" in d.mean.note


def test_known_order_statistics():
    # n = 100, median: x_(41) and x_(61) bracket it with P(41 <= B <= 60) = 95.4 %, B binomial (100, 1/2)
    q = summary_of(np.random.default_rng(1).permutation(np.arange(1.0, 101.0))).p50
    assert q.value == 50.0
    assert (q.low, q.high) == pytest.approx((40.68, 60.32), abs=0.01)  # between two ranks, so that it is 95 %


@pytest.mark.parametrize(("p", "n"), [(0.5, 29), (0.9, 29), (0.9, 200), (0.95, 59), (0.99, 299), (0.99, 1000)])
def test_percentile_coverage_independent(p, n):
    truth = math.exp(Z[p])
    found = coverage(lambda rng: (percentile_of(summary_of(np.exp(rng.standard_normal(n))), p), truth))
    assert 0.90 <= found <= 0.995


@pytest.mark.parametrize("n", [12, 25])
def test_a_median_of_few_samples_is_covered_as_often_as_promised(n):
    """To take the next whole rank for an end that lies between two covers 0.91 here."""
    rng = np.random.default_rng(n)
    medians = [summary_of(rng.random(n)).p50 for _ in range(1500)]
    known = [q for q in medians if q.low is not None and q.high is not None]
    assert len(known) > 1400
    assert 0.935 <= np.mean([q.low <= 0.5 <= q.high for q in known]) <= 0.975


def test_an_end_at_the_largest_sample_is_that_sample():
    q = summary_of([0.1, 0.2, 0.3, 0.4, 0.5]).p50
    assert (q.value, q.low, q.high) == (0.3, None, 0.5)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_percentile_coverage_when_neighbours_are_alike(p):
    """Binomial intervals that take requests for independent would cover about 0.5 here."""
    truth = math.exp(Z[p])
    found = coverage(lambda rng: (percentile_of(summary_of(np.exp(autoregressive(rng, 400, 0.8))), p), truth))
    assert 0.86 <= found <= 0.99


def test_percentile_coverage_of_gaps_that_belong_together():
    """100 requests of 50 gaps each, half of the spread between requests."""
    owners = np.repeat(np.arange(100), 50)
    truth = math.exp(Z[0.9] * math.sqrt(0.5))

    def one(rng):
        values = np.exp(0.5 * np.repeat(rng.standard_normal(100), 50) + 0.5 * rng.standard_normal(5000))
        return summary_of(values, owners).p90, truth

    assert 0.86 <= coverage(one) <= 0.99


@pytest.mark.parametrize("requests", [5, 10])
def test_gaps_of_few_requests_are_as_few_as_these(requests):
    """Half of the spread between requests: 50 gaps of each taken for independent would cover about 0.4."""
    owners = np.repeat(np.arange(requests), 50)

    def one(rng):
        of_request = 0.5 * np.repeat(rng.standard_normal(requests), 50)
        return summary_of(np.exp(of_request + 0.5 * rng.standard_normal(len(owners))), owners).p50, 1.0

    assert coverage(one) >= 0.92


def test_one_request_has_percentiles_of_its_gaps_without_interval():
    q = summary_of(np.arange(100.0), np.zeros(100, dtype=np.int64)).p50
    assert (q.value, q.low, q.high) == (49.0, None, None)


@pytest.mark.parametrize("n", [60, 1000])
def test_mean_coverage(n):
    found = coverage(lambda rng: (summary_of(np.exp(0.5 * rng.standard_normal(n))).mean, math.exp(0.125)))
    assert 0.90 <= found <= 0.99


def test_rate_coverage_of_a_load_that_comes_in_waves():
    def one(rng):
        counts = rng.poisson(5 * np.exp(0.5 * autoregressive(rng, 200, 0.7))).astype(float)
        return rate(counts, 0.5, n=int(counts.sum()), unit="req/s", evidence="measured"), 10 * math.exp(0.125)

    assert 0.87 <= coverage(one) <= 0.99


def test_share_coverage():
    found = coverage(lambda rng: (share(rng.random(300) < 0.97, unit="share", evidence="measured"), 0.97))
    assert 0.90 <= found <= 0.995


def test_share_of_all_is_not_certain():
    q = share(np.ones(60, dtype=bool), unit="share", evidence="measured")
    assert (q.value, q.high) == (1.0, 1.0)
    assert q.low == pytest.approx(60 / (60 + 1.959964**2), rel=1e-6)  # Wilson at p = 1


def test_share_of_nothing_is_null():
    assert share(np.ones(0, dtype=bool), unit="share", evidence="measured").value is None


def test_a_ratio_without_spread_is_a_point():
    assert ratio_interval(np.full(50, 2.0), np.full(50, 0.5)) == pytest.approx((4.0, 4.0))


def test_an_interval_of_a_positive_series_is_positive():
    low, high = ratio_interval(np.concatenate((np.full(99, 1e-3), [50.0])), np.ones(100))
    assert 0 < low < 0.5 < high


@given(st.lists(st.floats(0.001, 1e6), min_size=MIN_SAMPLES, max_size=80), st.floats(1e-3, 1e3))
def test_an_interval_scales_with_its_unit(values, scale):
    low, high = ratio_interval(np.array(values), np.ones(len(values)))
    scaled = ratio_interval(scale * np.array(values), np.ones(len(values)))
    assert scaled == (pytest.approx(scale * low, rel=1e-6, abs=1e-9), pytest.approx(scale * high, rel=1e-6))


def test_the_critical_values_are_those_of_white_noise():
    """97.5 % points of sum / root of its estimated variance, both sides together."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4000, 200))
    values_about = values - values.mean(axis=1, keepdims=True)
    for share_of_run, critical in ((LONG, CRITICAL), *((of_run, enlarged / 1.03) for of_run, enlarged in BLOCKS)):
        found = [
            abs(v.sum()) / math.sqrt(long_run_variance(d, share_of_run))
            for v, d in zip(values, values_about, strict=True)
        ]
        assert np.quantile(found, 0.95) == pytest.approx(critical, rel=0.05)


def test_student_t_is_the_tables():
    for degrees, value in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert student_t(degrees) == pytest.approx(value, rel=5e-3)


def quantity(value, unit="req/s"):
    return Quantity(value=value, n=10, unit=unit, evidence="measured")


def test_repeats_by_hand():
    q = over_replicates([quantity(9.0), quantity(10.0), quantity(11.0)])
    assert q.value == 10.0 and q.n == 30
    assert q.high - q.value == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert q.note == "mean of 3 runs, interval between runs"


def test_repeats_are_no_narrower_than_the_runs_themselves():
    """Runs that happen to agree do not know more than each of them together did: 3 / sqrt(4) here."""
    alike = [replace(quantity(10.0), low=8.0, high=13.0)] * 4
    assert (over_replicates(alike).low, over_replicates(alike).high) == (10 - 2 / 2, 10 + 3 / 2)


def test_repeats_by_weight_are_the_ratio_of_sums():
    """Two bills over two counts of tokens: 8 for 4 and 6 for 2 make 14 for 6."""
    assert over_replicates([quantity(2.0), quantity(3.0)], [4, 2]).value == pytest.approx(14 / 6)


def test_one_run_is_no_repeat():
    assert over_replicates([quantity(9.0)]) == quantity(9.0)
    q = over_replicates([quantity(9.0), replace(quantity(None), note="usage missing")])
    assert (q.value, q.low, q.n) == (None, None, 20) and q.note == "1 of 2 repeats have no value: usage missing"
    for wrong in ([], [quantity(1.0), quantity(1.0, "s")]):
        with pytest.raises(ValueError, match="one unit"):
            over_replicates(wrong)


def test_no_interval_from_too_few():
    assert ratio_interval(np.ones(MIN_SAMPLES - 1), np.ones(MIN_SAMPLES - 1)) == (None, None)
    assert rate(np.ones(200), 1.0, n=MIN_SAMPLES - 1, unit="req/s", evidence="measured").low is None


def test_weights_are_repeated_samples():
    rng = np.random.default_rng(3)
    values, weights = rng.random(200), rng.integers(1, 6, 200).astype(float)
    owners = np.arange(200)
    weighted = summary_of(values, owners, weights)
    copies = weights.astype(int)
    repeated = summary_of(np.repeat(values, copies), np.repeat(owners, copies))
    for p in Z:
        assert percentile_of(weighted, p) == percentile_of(repeated, p)
    assert weighted.mean.value == pytest.approx(repeated.mean.value)
    assert weighted.mean.n == repeated.mean.n == copies.sum()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400))
@example([0.0, 0.0, 0.0, 0.0, 1.5e-159])
def test_any_sample_gives_ordered_finite_ends(values):
    d = summary_of(values)
    for q in (d.mean, d.p50, d.p90, d.p95, d.p99):
        if q.value is not None:
            slack = 1e-9 * max(1.0, abs(q.value))
            assert q.low is None or q.low <= q.value + slack
            assert q.high is None or q.high >= q.value - slack
            assert min(values) - slack <= q.value <= max(values) + slack


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_quantity_is_never_a_number_that_is_none(number):
    with pytest.raises(ValueError, match="not known must be None"):
        Quantity(value=number, n=1, unit="s", evidence="measured")


@pytest.mark.parametrize(("low", "high"), [(2.0, None), (None, 0.5), (1.1, 1.2)])
def test_a_quantity_lies_within_its_own_interval(low, high):
    with pytest.raises(ValueError, match="outside its own interval"):
        Quantity(value=1.0, low=low, high=high, n=1, unit="s", evidence="measured")
    Quantity(value=1.0, low=1.0 + 1e-15, high=1.0, n=1, unit="s", evidence="measured")  # rounding is no contradiction


def test_a_low_end_is_never_above_the_percentile_it_belongs_to():
    """Gaps of answers that stand still now and then: seen as "p99 28.9 ms, at least 123 ms"."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        slow = np.repeat(rng.random(40) < 0.04, 50)  # a few answers of 50 gaps each are slow from end to end
        gaps = np.where(slow, 0.12, 0.028) * rng.lognormal(0, 0.02, len(slow))
        d = summary_of(gaps, np.repeat(np.arange(40), 50))
        for q in (d.p50, d.p90, d.p95, d.p99):
            assert q.low is None or q.low <= q.value


def test_where_a_percentile_is_given_so_are_the_lower_ones():
    """A queue that is 90 % busy, 300 requests: of 200 runs some gave p95 beside a p90 that was refused."""
    both = 0
    for row in busy_queue(np.random.default_rng(5), 200, 300):
        d = summary_of(row)
        given_ = [q.value is not None for q in (d.p50, d.p90, d.p95, d.p99)]
        assert given_ == sorted(given_, reverse=True), [q.note for q in (d.p50, d.p90, d.p95, d.p99)]
        both += given_[2]
    assert both >= 80, "most of those that can be given still are"


def busy_queue(rng, runs, n, busy=0.9, warmup=500):
    """Latency of a single server with lognormal service, shape (runs, n)."""
    service = np.exp(0.5 * rng.standard_normal((runs, n + warmup)) - 0.125)
    gap = rng.exponential(1 / busy, (runs, n + warmup))
    wait = np.zeros((runs, n + warmup))
    for k in range(1, n + warmup):
        wait[:, k] = np.maximum(0.0, wait[:, k - 1] + service[:, k - 1] - gap[:, k])
    return (wait + service)[:, warmup:]


def test_coverage_of_whole_runs(tmp_path):
    """Closed-loop runs of 80 requests at concurrency 4 with random speeds, from files to figures.

    Truth is what long experience with such runs shows: the mean over all of them for the rate and the price, the pooled
    percentile for ttft. Ramp and drain belong to every one of them.
    """
    runs = 120
    summaries = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        slots, rows = [0] * 4, []
        for i in range(80):
            k = slots.index(min(slots))
            ttft_ms, itl_ms = 1 + float(rng.exponential(200)), float(rng.uniform(5, 35))
            row = good(i, slots[k], ttft_ms=ttft_ms, itl_ms=itl_ms, tokens=20)
            slots[k] = row.finished_ns
            rows.append(row)
        spec = replace(SPEC, mode="closed", concurrency=4)
        summaries.append(summarise(read_run(write_run(tmp_path / str(seed), rows, spec=spec))))

    def covered(figure, truth):
        figures = [figure(s) for s in summaries]
        truth = truth([q.value for q in figures])
        return sum(q.low <= truth <= (q.high or math.inf) for q in figures) / runs

    assert 0.88 <= covered(lambda s: s.rates.output_token_throughput, np.mean) <= 1.0
    assert 0.88 <= covered(lambda s: s.cost.usd_per_1m_total, np.mean) <= 1.0
    for p, figure in ((0.5, lambda s: s.metrics.ttft.p50), (0.9, lambda s: s.metrics.ttft.p90)):
        truth_s = (1 - 200 * math.log(1 - p)) / 1000
        assert 0.88 <= covered(figure, lambda _, truth_s=truth_s: truth_s) <= 1.0
