"""What a worker can carry: the search for its ceiling, the file, and how many workers a plan is given."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import in_time
from test_worker import write_plan

from harness.calibration import (
    DEFAULT_EVENTS_PER_S,
    FILE,
    Calibration,
    GeneratorDemand,
    demand,
    read_calibration,
    size_workers,
    write_calibration,
)
from harness.cluster import calibrate
from harness.cluster.calibrate import (
    Bench,
    LoadStep,
    find_batch_threshold,
    find_ceiling,
    kept_up,
    poisson,
    server_was_the_limit,
)
from harness.errors import ResultsError, WorkerError
from harness.record.host import describe_host
from harness.record.run_spec import BATCH_READS_FROM

NOMINAL_S = calibrate.TTFT_S + (calibrate.STREAM_TOKENS - 1) * calibrate.ITL_S

CALIBRATION = Calibration(
    created="2026-11-22T00:00:00Z", host=describe_host(), versions={}, events_per_s=100_000.0, events_at_least=False,
    events_cpu_share=0.9, requests_per_s=10_000.0, requests_at_least=True, lag_p50_s=1e-5, lag_p99_s=1e-4,
    timing_events_per_s=50_000.0, ttft_error_p50_s=1e-4, ttft_error_p99_s=3e-4, itl_error_p50_s=0.0,
    itl_error_p99_s=1e-4, cpu_us_per_event=6.0, took_s=50.0,
)  # fmt: skip


def step(streams, *, slow=1.0, server_slow=1.0, cpu=0.5, server=0.3, lag_s=0.001, failed=0):
    durations = np.full(streams, NOMINAL_S)
    return LoadStep(
        requests=streams, failed=failed, took_s=4.5, lag_s=np.zeros(streams), ttft_s=np.full(streams, 0.02),
        itl_s=np.zeros(0), duration_s=durations * slow, true_ttft_s=np.full(streams, 0.02), true_itl_s=np.zeros(0),
        true_duration_s=durations * server_slow, events_per_s=streams * 100.0, cpu_share=cpu, loop_lag_s=lag_s,
        cpu_s=1.0, server_share=server,
    )  # fmt: skip


def machine(ceiling, server_ceiling=10**9):
    """A worker whose processor is full at ``ceiling`` streams, against a server that falls behind at its own."""
    tried = []

    def drive(streams):
        tried.append(streams)
        behind = max(1.0, streams / server_ceiling)
        return step(
            streams, slow=max(behind, streams / ceiling), server_slow=behind, cpu=min(1.0, streams / ceiling),
            server=min(1.0, streams / server_ceiling),
        )  # fmt: skip

    return drive, tried


@pytest.mark.parametrize("ceiling", [200, 350, 1000, 1500])
def test_the_ceiling_is_found_in_a_few_steps_and_never_claimed_beyond(ceiling):
    drive, tried = machine(ceiling)
    best, at_least = find_ceiling(drive, lambda words: None)
    assert len(tried) <= calibrate.STEPS
    assert 0.7 * ceiling <= best.requests <= calibrate.KEPT * ceiling
    assert not at_least, "the worker's own processor was full"


def test_a_server_that_is_slower_than_the_worker_gives_an_at_least():
    drive, _ = machine(2000, server_ceiling=500)
    said = []
    best, at_least = find_ceiling(drive, said.append)
    assert at_least and best.requests <= 1.05 * 500
    assert any("not kept up by the server" in words for words in said)


def test_a_machine_that_keeps_up_with_nothing_is_an_error():
    with pytest.raises(WorkerError, match="busy"):
        find_ceiling(lambda streams: step(streams, slow=2.0), lambda words: None)


def test_what_keeping_up_means():
    assert kept_up(step(10))
    assert not kept_up(step(10, slow=1.06)), "streams drawn out"
    assert not kept_up(step(10, lag_s=0.011)), "stamps later than a gap is long"
    assert not kept_up(step(10, failed=1))
    assert server_was_the_limit(step(10, slow=1.2, server_slow=1.2))
    assert server_was_the_limit(step(10, server=0.95))
    assert not server_was_the_limit(step(10, server=0.95, cpu=0.95))


@pytest.mark.parametrize(("batched_s", "at_once_s", "found"), [(0.9, 1.0, BATCH_READS_FROM), (1.0, 0.9, 80)])
def test_batching_begins_later_only_where_it_costs_cpu(batched_s, at_once_s, found):
    """Each way is measured twice, in turns; what other work adds to one of them decides nothing."""
    tried = []

    def drive(threshold):
        tried.append(threshold)
        spent = batched_s if threshold == BATCH_READS_FROM else at_once_s
        return replace(step(100), cpu_s=spent * (3 if len(tried) in (1, 2) else 1))

    assert find_batch_threshold(drive, lambda words: None) == found
    assert tried == [BATCH_READS_FROM, calibrate.NEVER, calibrate.NEVER, BATCH_READS_FROM]


def test_poisson_arrivals_are_seeded_and_poisson():
    times = poisson(500, 20, 7)
    assert (times == poisson(500, 20, 7)).all() and len(times) != len(poisson(500, 20, 8))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(10_000, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)
    assert all(a <= b for a, b in pairwise(times)) and times[-1] < 20


def test_a_step_sees_both_sides(tmp_path: Path):
    """A small load on a real server and worker: counts, truth and processor are there and fit each other."""
    folders = (tmp_path / str(k) for k in count())

    def play() -> dict[str, bool]:
        arrivals = poisson(60, 1.5, 1)
        folder = next(folders)
        folder.mkdir()
        found = Bench(folder, servers=1).step(arrivals, requests=len(arrivals), tokens=12)
        assert (found.requests, found.failed) == (len(arrivals), 0)
        assert found.events == 12 * len(arrivals)
        assert len(found.true_ttft_s) == len(found.ttft_s) == len(found.lag_s)
        assert len(found.true_itl_s) == len(found.itl_s)
        assert 0 < found.cpu_share < 1 and 0 < found.server_share < 1 and found.cpu_s > 0
        late_s = np.median(found.ttft_s) - np.median(found.true_ttft_s)
        assert late_s > -1e-4, "no client sees a token before it was written"
        ttft_s, itl_s = np.median(found.true_ttft_s), np.median(found.itl_s)
        return {
            f"TTFT of the server {ttft_s} s": ttft_s == pytest.approx(calibrate.TTFT_S, abs=0.004),
            f"ITL {itl_s} s": itl_s == pytest.approx(calibrate.ITL_S, abs=0.002),
            f"seen {late_s} s late": late_s < 0.005,
        }

    in_time(play)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_calibration_is_kept_for_this_machine_only(tmp_path):
    assert read_calibration(tmp_path) is None
    path = write_calibration(tmp_path / "new", CALIBRATION)
    assert path.name == FILE
    assert read_calibration(tmp_path / "new") == CALIBRATION
    other = replace(CALIBRATION, host=replace(CALIBRATION.host, cpu="another"))
    write_calibration(tmp_path, other)
    assert read_calibration(tmp_path) is None, "another machine's"
    write_calibration(tmp_path, replace(CALIBRATION, events_per_s=0.0))
    assert read_calibration(tmp_path) is None, "nonsense must not become a division by zero"
    older = json.loads(path.read_text())
    del older["batch_reads_from"]
    (tmp_path / FILE).write_text(json.dumps(older))
    assert read_calibration(tmp_path) == CALIBRATION, "made before that was measured"
    (tmp_path / FILE).write_text("{not json")
    assert read_calibration(tmp_path) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="HARNESS_CACHE"):
        write_calibration(tmp_path / "file", CALIBRATION)


# -- how many workers -------------------------------------------------------------------------------------------------


def test_demand_is_that_of_the_busiest_ten_seconds(tmp_path):
    at_s = [*range(0, 100, 2), *(40 + i / 10 for i in range(100))]  # 0.5 req/s, and 10 req/s from 40 to 50 s
    plan = write_plan(
        tmp_path / "plan.arrow", n=len(at_s), scheduled_ns=[int(t * 1e9) for t in sorted(at_s)],
        output_tokens=[200] * len(at_s),
    )  # fmt: skip
    asked = demand(plan, None)
    assert asked.requests_per_s == pytest.approx(10.5, rel=0.02)
    assert asked.tokens_per_s == pytest.approx(2100, rel=0.02)
    assert not asked.assumed


def test_demand_of_a_short_burst_and_of_a_plan_without_lengths(tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", n=50, scheduled_ns=[0] * 50, output_tokens=[None] * 50)
    asked = demand(plan, None)
    assert (asked.requests_per_s, asked.tokens_per_s) == (50, 50 * 128), "all in one second, at a usual length"


def test_demand_of_a_closed_loop_assumes_a_fast_server(tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", n=50, timed=False, tokens=20)
    assert demand(plan, 8) == GeneratorDemand(tokens_per_s=1600, requests_per_s=80, assumed=True)
    assert demand(plan, 1000).tokens_per_s == 10_000, "no more in flight than there are requests"


def size(tokens, requests=1.0, *, calibration=CALIBRATION, cores=4, asked=None, most=10**6, assumed=False):
    wanted = GeneratorDemand(tokens_per_s=tokens, requests_per_s=requests, assumed=assumed)
    return size_workers(wanted, calibration, cores=cores, asked=asked, most=most)


@pytest.mark.parametrize(
    ("tokens", "requests", "workers"), [(0, 0, 1), (49_000, 1, 1), (51_000, 1, 2), (1, 5_001, 2), (1, 14_000, 3)]
)
def test_a_worker_is_given_half_of_its_ceiling(tokens, requests, workers):
    sizing = size(tokens, requests)
    assert (sizing.workers, sizing.warning) == (workers, None)
    assert "calibrated 2026-11-22" in sizing.words


def test_without_a_calibration_cautious_defaults_hold_and_are_said():
    sizing = size(DEFAULT_EVENTS_PER_S * 0.6, calibration=None)
    assert sizing.workers == 2
    assert "not calibrated" in sizing.words


def test_a_plan_that_this_machine_cannot_carry_is_said_before_the_run():
    sizing = size(240_000, cores=2)
    assert sizing.workers == 2
    assert sizing.warning is not None and "needs 5 workers" in sizing.warning
    assert "INVALID" in sizing.warning
    assumed = size(240_000, cores=2, assumed=True)
    assert assumed.warning is not None and "if the server streams" in assumed.warning


def test_what_was_asked_for_is_obeyed_and_judged():
    assert size(1, asked=3).workers == 3
    few = size(120_000, asked=1)
    assert few.workers == 1
    assert few.warning is not None and "there are 1 of them" in few.warning
    assert size(1, asked=8, most=2).workers == 2, "two requests in flight cannot be shared by eight"
