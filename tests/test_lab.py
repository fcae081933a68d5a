"""Small draws of the studies that `make study` runs at length."""

from __future__ import annotations

import math

import pytest

from tests.lab import capacity
from tests.lab.processes import RATE, Process, workload
from tests.lab.table import Coverage


@pytest.mark.parametrize("process", ["poisson", "bursty", "diurnal"])
def test_a_search_finds_the_capacity_that_is_true(process: Process) -> None:
    true = capacity.TRUTHS[process]
    told = capacity.judge(capacity.searches(process, 8, 41, math.inf, 0.1, jobs=1), true)
    covered = told["coverage"]
    assert isinstance(covered, Coverage) and covered.draws == 8
    assert covered.held >= 6  # of 8 at 95 %: fewer in 1 of 180 draws
    assert abs(float(told["mean error"])) < 0.05  # type: ignore[arg-type]
    assert float(told["half width"]) <= 0.15  # type: ignore[arg-type]


def test_the_truth_is_where_95_of_100_requests_keep_the_limit() -> None:
    true = capacity.TRUTHS["poisson"]
    assert capacity.kept_share("poisson", true, range(900, 904)) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("process", ["poisson", "bursty", "diurnal", "drifting"])
def test_a_process_has_its_rate(process: Process) -> None:
    load = workload(process, 40_000, 1)
    assert len(load) / load.arrival_s[-1] == pytest.approx(RATE, rel=0.08)
    if process == "drifting":
        easy = int(0.15 * len(load))
        assert load.output_tokens[easy:].mean() == pytest.approx(4 * load.output_tokens[:easy].mean(), rel=0.1)


def test_a_drifting_trace_is_not_its_beginning() -> None:
    """The first 15 % are easy: on them alone capacity would be four times as high."""
    (answer,) = capacity.searches("drifting", 1, 41, math.inf, 0.1, jobs=1)
    assert answer.found is not None and answer.found.rate < 4.5  # a server that never idles gets 3.4 req/s done


def test_coverage_has_a_band() -> None:
    assert Coverage(95, 100).overlaps() and not Coverage(80, 100).overlaps() and not Coverage(0, 0).overlaps()
    low, high = Coverage(95, 100).band
    assert low == pytest.approx(0.888, abs=0.002) and high == pytest.approx(0.978, abs=0.002)
