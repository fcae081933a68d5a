"""Repeats of one plan have the same arrivals and lengths: what they share does not shrink with their number."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from run_files import SPEC, S, good, write_run

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.capacity.system import plan_of
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity
from harness.analysis.stats.replicates import over_replicates
from harness.analysis.summary import summarise
from harness.record.manifest import RunDir, read_manifest, write_manifest
from harness.trace.stats import arrival_stats
from tests.lab import repeats as study

T2 = 4.303
"""Student's t at two degrees of freedom."""


def quantity(value, low=None, high=None):
    return Quantity(value=value, low=low, high=high, n=10, unit="req/s", evidence="measured")


def test_what_runs_of_one_plan_share_does_not_shrink():
    """Three runs that agree: each knows its plan to - 3 and + 4, and so do all. Of three plans: by sqrt 3 better."""
    alike = [quantity(10.0, 7.0, 14.0)] * 3
    one_plan = over_replicates(alike, plans=["a"] * 3)
    assert (one_plan.value, one_plan.low, one_plan.high) == (10.0, 7.0, 14.0)
    assert "one plan" in one_plan.note
    apart = over_replicates(alike, plans=["a", "b", "c"])
    assert (apart.low, apart.high) == pytest.approx((10 - 3 / math.sqrt(3), 10 + 4 / math.sqrt(3)))
    assert over_replicates(alike) == apart


def test_what_they_differ_in_comes_on_top():
    """Values 9, 10, 11: 4.303 / sqrt 3 from run to run beside the 2 of the plan."""
    q = over_replicates([quantity(v, v - 2, v + 2) for v in (9.0, 10.0, 11.0)], plans=["a"] * 3)
    assert q.high - 10 == pytest.approx(math.hypot(2, T2 / math.sqrt(3)), rel=1e-3)
    assert 10 - q.low == pytest.approx(q.high - 10)


def test_repeats_of_one_plan_alone_know_nothing_of_others():
    """Without the runs' own intervals the spread between them says what an engine varies by, not what traffic does."""
    q = over_replicates([quantity(v) for v in (9.0, 10.0, 11.0)], plans=["a"] * 3)
    assert (q.value, q.low, q.high, q.note) == (10.0, None, None, "mean of 3 runs of one plan")


def test_two_plans_twice_each_are_two_samples_of_traffic():
    q = over_replicates([quantity(v, v - 4, v + 4) for v in (10.0, 10.0, 10.0, 10.0)], plans=["a", "a", "b", "b"])
    assert q.high - 10 == pytest.approx(4 / math.sqrt(2))
    far = over_replicates([quantity(v, v - 1, v + 1) for v in (9.0, 9.0, 11.0, 11.0)], plans=["a", "a", "b", "b"])
    # two plans that differ by 2: standard error 1, Student's t of one degree of freedom
    assert far.high - 10 == pytest.approx(12.706, rel=1e-3)


def run_of(path, *, seed=0, every_s=0.1):
    """400 requests, one each ``every_s``, of which 20 in a row miss the limit."""
    rows = [good(k, round(k * every_s * S), ttft_ms=900 if 100 <= k < 120 else 50) for k in range(400)]
    write_run(path, rows, spec=replace(SPEC, slo={"ttft_p90": 0.5}))
    manifest = read_manifest(path)
    planned = arrival_stats(np.array([row.scheduled_ns for row in rows]))
    manifest.plan = replace(manifest.plan, seed=seed, planned=planned)
    write_manifest(RunDir(path), manifest)
    return summarise(read_run(path))


def test_capacity_takes_repeats_of_one_trace_for_one_sample(tmp_path):
    """Three runs of the trace's own arrivals (seeds change made-up prompts alone) know its share no better than one."""
    one = run_of(tmp_path / "0")
    three = [one, *(run_of(tmp_path / str(seed), seed=seed) for seed in (1, 2))]
    assert len({plan_of(s) for s in three}) == 1
    floors = []
    for runs in ([one], three):
        (system,) = serving_configs(runs)
        assert system.floor is not None
        floors.append(system.floor.total_token_throughput)
    assert (floors[1].low, floors[1].high) == pytest.approx((floors[0].low, floors[0].high))
    assert plan_of(run_of(tmp_path / "other", every_s=0.101)) != plan_of(one)


def test_the_interval_over_repeats_covers_as_often_as_that_of_one_run():
    """A small draw of `tests.lab.repeats`; taken for independent the intervals of three runs cover 65 to 85 %."""
    for row in study.rows(draws=300, seed=5, jobs=1):
        assert row.holds, (row.claim, row.claimed)
