"""What the observer works out itself is what NumPy would say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.scenarios.observer import _BUCKETS, _bucket, _from_histogram, _rank


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300), st.sampled_from([0.5, 0.99, 1.0]))
def test_percentiles_of_lags(lags: list[int], p: float) -> None:
    exact = int(np.quantile(lags, p, method="inverted_cdf"))
    assert sorted(lags)[_rank(p, len(lags))] == exact
    counts = np.bincount([_bucket(lag) for lag in lags], minlength=_BUCKETS).tolist()
    found = _from_histogram(counts, p)
    assert found is not None
    assert exact / 1e9 <= found * 1.0001
    assert found <= max(exact, 1) / 1e9 * 1.0102


def test_no_tick_has_no_percentile() -> None:
    assert _from_histogram([0] * _BUCKETS, 0.99) is None


@pytest.mark.parametrize("days", [1, 100])
def test_a_stall_of_days_has_a_bucket(days: int) -> None:
    assert _bucket(days * 86_400 * 10**9) < _BUCKETS
