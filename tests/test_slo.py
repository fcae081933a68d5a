"""The SLO from the command line to the verdict: limits on every request, and percentiles as shares of requests."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import MS, bad, good, write_run

from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.errors import UsageError
from harness.option_types import SHARE, SLO
from harness.slo import check_slo, criteria, metrics_of, split_key, strictest


def judge(path: Path, results, slo, attain: float = 0.99, **more) -> Summary:
    return summarise(read_run(write_run(path, results, **more)), slo=slo, attain=attain)


def test_keys_are_metrics_or_percentiles_of_them() -> None:
    assert split_key("ttft") == ("ttft", None)
    assert split_key("itl_max") == ("itl_max", None)
    assert split_key("ttft_p99") == ("ttft", 0.99)
    assert split_key("itl_max_p99.9") == ("itl_max", 0.999)


@pytest.mark.parametrize("key", ["", "p99", "ttft_p", "ttft_p49", "ttft_p100", "tttft", "ttft_p99x", "TTFT", "lag"])
def test_other_keys_are_refused(key: str) -> None:
    with pytest.raises(UsageError):
        split_key(key)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_is_a_positive_time(limit: float) -> None:
    with pytest.raises(UsageError, match="positive"):
        check_slo({"ttft_p99": limit})


def test_the_command_line_takes_both_forms() -> None:
    parse = SLO.convert
    assert parse("ttft_p99=2s,tpot_p95=80ms", None, None) == {"ttft_p99": 2.0, "tpot_p95": 0.08}
    assert parse("ttft=2s,ttft_p50=500ms", None, None) == {"ttft": 2.0, "ttft_p50": 0.5}
    for text in ("ttft_p101=2s", "ttft_p99", "ttft_p99=0s", "ttft_p99=1s,ttft_p99=2s", "tpo=1s"):
        with pytest.raises(click.BadParameter):
            parse(text, None, None)
    assert SHARE.convert("99%", None, None) == SHARE.convert("0.99", None, None) == 0.99
    for text in ("99", "0", "101%", "x"):
        with pytest.raises(click.BadParameter):
            SHARE.convert(text, None, None)


def test_plain_limits_are_one_criterion_and_each_percentile_is_its_own() -> None:
    found = criteria({"ttft": 2.0, "tpot_p95": 0.08, "e2e": 9.0}, 0.9)
    assert [(c.wanted, dict(c.limits)) for c in found] == [(0.9, {"ttft": 2.0, "e2e": 9.0}), (0.95, {"tpot": 0.08})]
    assert metrics_of({"ttft_p99": 1, "tpot": 1}) == {"ttft", "tpot"}
    assert strictest({"ttft_p99": 2, "ttft": 3, "tpot": 1}, "ttft") == 2 and strictest({}, "ttft") is None
    assert criteria({}, 0.99) == []


def test_a_percentile_is_judged_by_the_share_of_offered_requests(tmp_path: Path) -> None:
    # 40 requests: 37 fast, 2 slow, 1 refused. 92.5 % kept 100 ms, 97.5 % would have if the refused one were forgotten
    rows = [good(k, ttft_ms=50) for k in range(37)] + [good(k, ttft_ms=500) for k in (37, 38)] + [bad(39)]
    found = judge(tmp_path / "a", rows, {"ttft_p90": 0.1, "ttft_p95": 0.1, "ttft_p95.5": 1.0}).slo
    assert found is not None
    assert [one.attainment.value for one in found.criteria] == pytest.approx([0.925, 0.925, 0.975])
    assert [one.met for one in found.criteria] == [True, False, True]
    assert not found.met
    assert found.attainment.value == pytest.approx(0.925)


def test_an_slo_of_percentiles_is_met_though_few_requests_keep_all_of_it(tmp_path: Path) -> None:
    # half miss ttft, the other half tpot: every request misses something, yet both medians are kept
    rows = [good(k, ttft_ms=500, itl_ms=1) for k in range(20)] + [good(k, ttft_ms=5, itl_ms=90) for k in range(20, 40)]
    summary = judge(tmp_path / "a", rows, {"ttft_p50": 0.1, "tpot_p50": 0.01})
    assert summary.slo is not None and summary.slo.met
    assert summary.slo.attainment.value == 0.0
    assert summary.rates.goodput.value == 0.0


def test_without_percentiles_nothing_is_new(tmp_path: Path) -> None:
    rows = [good(k, ttft_ms=50 if k % 10 else 500) for k in range(40)]
    found = judge(tmp_path / "a", rows, {"ttft": 0.1, "tpot": 1.0}, attain=0.9).slo
    assert found is not None and found.met
    assert len(found.criteria) == 1
    assert found.criteria[0].attainment == found.attainment
    assert found.attainment.value == pytest.approx(0.9)


def test_the_longest_pause_can_be_promised(tmp_path: Path) -> None:
    rows = [good(k, itl_ms=10) for k in range(9)]
    paused = good(9, itl_ms=10)
    paused.chunk_ns[-1] += 900 * MS
    paused.finished_ns = paused.chunk_ns[-1]
    found = judge(tmp_path / "a", [*rows, paused], {"itl_max_p90": 0.5, "itl_max": 0.5}, attain=0.95).slo
    assert found is not None
    assert [one.met for one in found.criteria] == [False, True]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(1, 400), st.integers(50, 99))
def test_a_percentile_is_met_exactly_when_enough_of_the_sorted_sample_lies_within(times, limit, percent) -> None:
    import numpy as np

    from harness.analysis.capacity.probes import limit_used

    class Rows:
        success = np.ones(len(times), dtype=bool)
        sent_s = scheduled_s = np.zeros(len(times))
        first_gap_s = np.array(times, dtype=float)
        output_tokens = np.full(len(times), 2.0)
        error = np.full(len(times), -1)

        def __len__(self) -> int:
            return len(times)

    class OneRun:
        rows, errors, lost = Rows(), (), 0

        class manifest:  # noqa: N801
            status = "complete"

            class spec:  # noqa: N801
                duration_s = None

    asked = criteria({f"ttft_p{percent}": float(limit)}, 0.99)
    met = sum(t <= limit for t in times) / len(times) >= percent / 100
    assert (limit_used(OneRun(), asked) <= 1) == met
