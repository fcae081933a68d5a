"""However many gaps: counts and mean exact, percentiles within a tenth of a percent, memory of one size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import good, write_run

from harness.analysis import metrics
from harness.analysis.rows import itl_histogram as gaps
from harness.analysis.rows.itl_histogram import ItlHistogram
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import distribution
from harness.analysis.summary import summarise


def pooled(seconds, tokens, owners, requests, exact, monkeypatch, pieces=1):
    monkeypatch.setattr(gaps, "EXACT", exact)
    pool = ItlHistogram(requests)
    for part in np.array_split(np.arange(len(seconds)), pieces):
        pool.add(seconds[part], tokens[part], owners[part], np.ones(len(part), dtype=np.int32))
    return pool.take()[:3]


def quantile(seconds, tokens, p):
    order = np.argsort(seconds)
    running = np.cumsum(tokens[order])
    return seconds[order[np.searchsorted(running, running[-1] * p * (1 - 1e-12))]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e-9, 1e4), st.integers(0, 5), st.integers(0, 2000)), min_size=1, max_size=300
    ).filter(lambda drawn: any(k for _, k, _ in drawn)),
    st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
    st.integers(1, 4),
)  # fmt: skip
def test_binned_gaps_are_within_a_tenth_of_a_percent(drawn, p, pieces):
    seconds, tokens, owners = (np.array(column) for column in zip(*drawn, strict=True))
    tokens = tokens.astype(float)
    with pytest.MonkeyPatch.context() as patch:
        values, counts, units = pooled(seconds, tokens, owners, 2001, 0, patch, pieces)
    assert counts.sum() == tokens.sum()
    assert (values * counts).sum() == pytest.approx((seconds * tokens).sum(), rel=1e-9)
    assert quantile(values, counts, p) == pytest.approx(quantile(seconds, tokens, p), rel=0.001)
    assert units.min() >= 0 and units.max() < gaps.UNITS
    for unit in np.unique(units):  # each stretch of requests keeps its own tokens
        assert counts[units == unit].sum() == tokens[owners * gaps.UNITS // 2001 == unit].sum()


@pytest.mark.parametrize("value", [0.0, 1e-12, 5e-10, 1e5])
def test_gaps_beyond_the_bins_are_still_counted(value, monkeypatch):
    values, counts, _ = pooled(np.array([value]), np.ones(1), np.zeros(1, int), 1, 0, monkeypatch)
    assert values.tolist() == [value]
    assert counts.tolist() == [1]


def test_figures_of_a_long_run_are_those_of_a_short_one_within_the_bins(tmp_path, monkeypatch):
    """The same run once exactly and once through bins: counts and mean equal, percentiles within 0.1 %."""
    rng = np.random.default_rng(1)
    rows = [good(i, itl_ms=rng.lognormal(2.5, 0.4), tokens=int(rng.integers(2, 30))) for i in range(1500)]
    path = write_run(tmp_path / "run", rows)
    exact = summarise(read_run(path)).metrics.itl
    monkeypatch.setattr(gaps, "EXACT", 1000)
    binned = summarise(read_run(path)).metrics.itl
    assert binned.mean.n == exact.mean.n == sum(len(r.chunk_ns) - 1 for r in rows)
    assert binned.mean.value == pytest.approx(exact.mean.value, rel=1e-9)
    for name in ("p50", "p90", "p95", "p99"):
        ours, true = getattr(binned, name), getattr(exact, name)
        assert ours.value == pytest.approx(true.value, rel=0.001), name
        assert ours.low == pytest.approx(true.low, rel=0.05), name  # requests are judged in stretches of three
        assert ours.high == pytest.approx(true.high, rel=0.05), name


def test_up_to_a_million_gaps_nothing_is_rounded(tmp_path):
    run = read_run(write_run(tmp_path / "run", [good(i, itl_ms=1 + i) for i in range(50)]))
    whole = metrics.itl(run.whole())
    some = whole.tokens > 0
    assert np.array_equal(run.chunks.gap_s, whole.seconds[some])
    assert np.array_equal(run.chunks.gap_owner, np.repeat(run.rows.rank, run.rows.chunks)[some])


def test_distribution_of_nothing(tmp_path):
    run = read_run(write_run(tmp_path / "run", [], requests=1))
    assert len(run.chunks.gap_s) == 0
    assert run.chunks.median_itl_s is None
    empty = distribution(run.chunks.gap_s, owners=run.chunks.gap_owner, weights=run.chunks.gap_tokens, unit="s",
                         evidence="measured")  # fmt: skip
    assert empty.p50.value is None


def test_a_hundred_times_the_chunks_take_no_more_memory(tmp_path):
    """Stamps of 2,000 and of 200,000 chunks: what stays of a run is the same number of bytes a request."""
    sizes = []
    for name, tokens in (("short", 4), ("long", 400)):
        run = read_run(write_run(tmp_path / name, [good(i, tokens=tokens) for i in range(500)]))
        sizes.append(sum(getattr(run.rows, f).nbytes for f in run.rows.__dataclass_fields__))
        assert max(len(part.gap_s) for part in run.parts()) <= 500 * tokens
    assert sizes[0] == sizes[1] == 500 * 150, "bytes of the columns of `Rows`"
