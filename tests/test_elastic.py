"""Fleets that change: laws that hold for every one of them, and cases whose answer is known."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from harness.analysis.capacity.fleet import TierOffer, fleet
from harness.cli import cli
from harness.cluster.simulator.elastic import Autoscaler, Elastic, Failures, PlannedReplicas
from harness.cluster.simulator.fleet import Outcomes, Router, Workload, simulate
from harness.cluster.simulator.limits import Limits
from harness.cluster.simulator.step_time import LinearStep
from harness.errors import UsageError
from harness.record.manifest import read_manifest
from harness.record.results import read_results

STEP = LinearStep(base_s=0.020, per_sequence_s=0.0015, per_prompt_token_s=0.00002)
EIGHT = Limits(max_num_seqs=8)
SCALER = Autoscaler(least=1, most=5, gauge="in flight", target=6, every_s=5.0, hold_s=20.0)


def poisson(rate: float, span_s: float, seed: int = 0, output: int = 20) -> Workload:
    rng = np.random.default_rng(seed)
    n = rng.poisson(rate * span_s)
    return Workload(
        arrival_s=np.sort(rng.random(n)) * span_s, input_tokens=rng.integers(50, 400, n),
        output_tokens=rng.geometric(1 / output, n),
    )  # fmt: skip


def given(arrival_s: Sequence[float], outputs: Sequence[int]) -> Workload:
    return Workload(
        arrival_s=np.array(arrival_s), input_tokens=np.zeros(len(outputs), dtype=int), output_tokens=np.array(outputs)
    )  # fmt: skip


def waves(seed: int) -> Workload:
    """Quiet, busy and quiet again: 2, 24 and 2 req/s for a minute each."""
    parts = [poisson(rate, 60.0, seed + k) for k, rate in enumerate((2.0, 24.0, 2.0))]
    return Workload(
        arrival_s=np.concatenate([60.0 * k + one.arrival_s for k, one in enumerate(parts)]),
        input_tokens=np.concatenate([one.input_tokens for one in parts]),
        output_tokens=np.concatenate([one.output_tokens for one in parts]),
    )  # fmt: skip


def kept(load: Workload, found: Outcomes, limit_s: float = 1.0) -> float:
    """Share of all requests that ended well with a first token in time."""
    return float(np.mean(np.isfinite(found.finished_s) & (found.first_token_s - load.arrival_s <= limit_s)))


def paid_s(found: Outcomes, end_s: float) -> float:
    return sum((end_s if one.ended_s is None else one.ended_s) - one.asked_s for one in found.lives)


def test_an_autoscaler_wants_what_hpa_wants() -> None:
    before: deque[tuple[float, int]] = deque()
    hpa = replace(SCALER, least=2, most=40)
    assert hpa.wanted(0.0, 0.0, 2, before) == 2, "never fewer than the least"
    assert hpa.wanted(5.0, 13.0, 2, before) == 2, "8 % beside the target is within the tolerance"
    assert hpa.wanted(10.0, 14.0, 2, before) == 3
    assert hpa.wanted(15.0, 600.0, 3, before) == 7, "four more at once, or twice as many"
    assert hpa.wanted(20.0, 600.0, 7, before) == 14
    assert hpa.wanted(35.0, 6.0, 14, before) == 14, "what a decision of the last 20 s wanted is kept"
    assert hpa.wanted(40.1, 6.0, 14, before) == 2
    with pytest.raises(ValueError, match="no autoscaler"):
        replace(SCALER, least=3, most=2)


def test_a_schedule_by_hand() -> None:
    # an answer is 2 steps of about 22 ms; the second replica answers from 20 s on, and is given back at 30 s
    load = Workload(
        arrival_s=np.arange(80) * 0.5, input_tokens=np.zeros(80, dtype=int), output_tokens=np.full(80, 2)
    )  # fmt: skip
    found = simulate(
        load, EIGHT, [STEP], elastic=Elastic(start_s=10.0, scaling=PlannedReplicas(at_s=[10, 30], replicas=[2, 1]))
    )
    assert found.replica[load.arrival_s < 20].tolist() == [0] * 40
    assert found.replica[(load.arrival_s >= 20) & (load.arrival_s < 30)].tolist() == [0, 1] * 10
    assert found.replica[load.arrival_s >= 30].tolist() == [0] * 20
    one = found.lives[1]
    assert (one.asked_s, one.ready_s, one.drains_s, one.ended_s, one.failed) == (10.0, 20.0, 30.0, 30.0, False)


def test_what_is_given_back_finishes_what_it_has_and_takes_nothing_more() -> None:
    load = given([0.0, 0.1, 1.1], [5, 200, 5])
    fewer = PlannedReplicas(at_s=[1.0], replicas=[1])
    found = simulate(load, EIGHT, [STEP] * 2, elastic=Elastic(start_s=9.0, scaling=fewer))
    assert found.replica.tolist() == [0, 1, 0]
    assert found.lives[1].drains_s == 1.0 and found.lives[1].ended_s == found.finished_s[1] > 4.0
    # one that still starts goes at once
    found = simulate(
        load, EIGHT, [STEP], elastic=Elastic(start_s=9.0, scaling=PlannedReplicas(at_s=[0.5, 1], replicas=[2, 1]))
    )
    assert found.lives[1].ended_s == 1.0 and found.replica.tolist() == [0, 0, 0]


def test_a_failure_by_hand() -> None:
    # 21.5 ms a step: the first request has 4 tokens at 0.1 s; the second comes while nobody is there
    load = Workload(
        arrival_s=np.array([0.0, 0.2, 0.7]), input_tokens=np.zeros(3, dtype=int), output_tokens=np.full(3, 9)
    )
    found = simulate(load, EIGHT, [STEP], elastic=Elastic(start_s=0.5, failures=Failures(at_s=[(0.1, 0)])))
    assert found.lost_s == {0: 0.1, 1: 0.2}
    assert found.token_s(0, 9) == pytest.approx(0.0215 * np.arange(1, 5)) and len(found.token_s(1, 9)) == 0
    assert found.replica.tolist() == [0, -1, 1] and found.finished_s[2] == pytest.approx(0.7 + 9 * 0.0215)
    assert [(one.asked_s, one.ready_s, one.ended_s, one.failed) for one in found.lives] == [
        (0.0, 0.0, 0.1, True), (0.1, 0.6, None, False),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_every_request_has_one_end_and_every_seed_one_result(seed: int) -> None:
    rng = np.random.default_rng([seed, 5])
    load = waves(seed)
    waits = seed % 3 == 1
    n = len(load)
    if waits:
        load = replace(load, after=np.where(rng.random(n) < 0.3, np.arange(n) - 1, -1), think_s=rng.random(n))
    fleet_ = Elastic(
        start_s=float(rng.choice([0.0, 7.0, 30.0])), failures=Failures(mean_s=60.0 if seed % 2 else None, seed=seed),
        scaling=SCALER if seed % 4 else None,
    )  # fmt: skip
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=128, kv_blocks=120, prefix_cache=True, async_scheduling=True)

    def served() -> Outcomes:
        return simulate(
            load, limits, [STEP] * 2, router="least in flight", elastic=fleet_, sample_s=1.0,
            concurrency=10 if seed % 3 == 2 else None,
        )  # fmt: skip

    found = served()
    lost = np.zeros(n, dtype=bool)
    lost[[*found.lost_s]] = True
    assert np.all(np.isfinite(found.finished_s) != lost), "served to the end, or lost"
    for k in range(n):
        tokens = len(found.token_s(k, int(load.output_tokens[k])))
        assert tokens == load.output_tokens[k] if not lost[k] else tokens <= load.output_tokens[k]
    for k in np.flatnonzero(found.replica >= 0):
        life = found.lives[found.replica[k]]
        assert life.ready_s <= found.due_s[k] and (life.drains_s is None or found.due_s[k] < life.drains_s)
        assert life.ended_s is None or max(np.nan_to_num(found.finished_s[k]), found.lost_s.get(k, 0)) <= life.ended_s
    again = served()
    assert np.array_equal(found.finished_s, again.finished_s, equal_nan=True) and found.lives == again.lives
    moments = {one.asked_s for one in found.lives}
    for at_s in moments:
        staying = [
            one for one in found.lives
            if one.asked_s <= at_s < min(*(math.inf if end is None else end for end in (one.drains_s, one.ended_s)))
        ]  # fmt: skip
        assert len(staying) <= (5 if fleet_.scaling else 2)
    assert len({tuple(one.at_s for one in samples) for samples in found.samples}) == 1


def test_a_fleet_that_nothing_changes_is_the_fixed_one() -> None:
    load = poisson(30.0, 60.0)
    for router in ("round robin", "least in flight"):
        fixed = simulate(load, EIGHT, [STEP] * 3, router=router)  # type: ignore[arg-type]
        wide = Elastic(start_s=5.0, scaling=replace(SCALER, least=3, most=3))
        assert np.array_equal(
            fixed.finished_s, simulate(load, EIGHT, [STEP] * 3, router=router, elastic=wide).finished_s
        )  # type: ignore[arg-type]


def test_an_autoscaled_fleet_follows_and_never_beats_perfect_foresight() -> None:
    for seed in range(6):
        load = waves(10 * seed)
        found = simulate(load, EIGHT, [STEP], router="least in flight", elastic=Elastic(start_s=8.0, scaling=SCALER))
        end_s = float(found.finished_s.max())
        # nobody serves a token faster than in a full batch, and one replica at least is there all the time
        least_s = (0.020 / 8 + 0.0015) * load.output_tokens.sum() + 0.00002 * load.input_tokens.sum()
        assert max(end_s, float(least_s)) <= paid_s(found, end_s) < 5 * end_s
        assert len(found.lives) > 3 and any(one.drains_s is not None for one in found.lives)
        alone = simulate(load, EIGHT, [STEP])
        assert kept(load, found) > kept(load, alone) + 0.1


def test_a_planned_spare_holds_the_slo_through_failures_and_no_spare_does_not() -> None:
    load = poisson(30.0, 1800.0, seed=3)
    offer = TierOffer(name="x", usd_per_hour=1.0, capacity=11.0, node_availability=0.95)
    bare, planned = fleet(offer, 30.0), fleet(offer, 30.0, availability=0.97)
    assert (bare.instances, planned.instances, planned.spares) == (3, 4, 1)
    # each of three is down for 90 s of 1800: up for 95 % of the time
    failing = Elastic(start_s=90.0, failures=Failures(at_s=[(300.0, 0), (800.0, 1), (1300.0, 2)]))
    shares = {
        n: kept(load, simulate(load, EIGHT, [STEP] * n, router="least in flight", elastic=failing)) for n in (3, 4)
    }
    assert kept(load, simulate(load, EIGHT, [STEP] * 3, router="least in flight")) > 0.99
    assert shares[3] < 0.85 and shares[4] > 0.99


def test_prefix_affinity_hits_more_than_taking_turns() -> None:
    rng = np.random.default_rng(2)
    n, texts = 600, 30
    text = rng.integers(0, texts, n)
    keys = [[(int(one), block) for block in range(30)] for one in text]
    load = Workload(
        arrival_s=np.cumsum(rng.exponential(0.2, n)), input_tokens=np.full(n, 500), output_tokens=np.full(n, 10),
        keys=keys,
    )  # fmt: skip
    # one cache holds 10 of the 30 texts, three together hold all of them
    limits = Limits(max_num_seqs=8, kv_blocks=380, prefix_cache=True)
    hits = {}
    router: Router
    for router in ("round robin", "prefix"):
        found = simulate(load, limits, [STEP] * 3, router=router)
        assert found.cached_tokens is not None
        hits[router] = found.cached_tokens.sum() / load.input_tokens.sum()
    assert hits["prefix"] > 0.75 > 0.45 > hits["round robin"]


def test_a_failure_loses_the_cache_and_moves_its_sessions() -> None:
    keys = [[("text", block) for block in range(20)]] * 4
    load = Workload(
        arrival_s=np.array([0.0, 10.0, 30.0, 40.0]), input_tokens=np.full(4, 320), output_tokens=np.full(4, 3),
        keys=keys, session=np.zeros(4, dtype=int),
    )  # fmt: skip
    limits = Limits(max_num_seqs=8, prefix_cache=True)
    failing = Elastic(start_s=5.0, failures=Failures(at_s=[(20.0, 0)]))
    router: Router
    for router in ("session", "prefix"):
        found = simulate(load, limits, [STEP] * 2, router=router, elastic=failing)
        assert found.cached_tokens is not None
        assert found.cached_tokens.tolist() == [0, 304, 0, 304]
        assert found.replica[0] == found.replica[1] == 0 and found.replica[2] == found.replica[3] != 0


def test_a_router_that_asks_seldom_herds() -> None:
    load = poisson(40.0, 120.0, seed=4)
    worst = {}
    for stale_s in (0.0, 5.0):
        found = simulate(load, EIGHT, [STEP] * 4, router="least in flight", stale_s=stale_s)
        worst[stale_s] = float(np.percentile(found.first_token_s - load.arrival_s, 95))
        to_one = [
            np.bincount(found.replica[(load.arrival_s >= at) & (load.arrival_s < at + 5)]).max()
            for at in range(0, 120, 5)
        ]
        assert (np.mean(to_one) > 150) == (stale_s > 0), "of about 200 in five seconds"
    assert worst[0.0] < 0.5 < 2.0 < worst[5.0]


def simulated(folder: Path, *more: str) -> Path:
    rows = [{"arrival_s": k * 0.05, "input_tokens": 100 + 10 * (k % 7), "output_tokens": 60} for k in range(400)]
    trace = folder / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "--model",
        "llama-3.1-8b-instruct",
        "--tier",
        "aws-p5.4xlarge",
        "--step",
        "8,1,0.02",
        "-o",
        str(folder / "runs"),
    ]
    done = CliRunner().invoke(cli, ["simulate", str(trace), *args, *more], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    (run,) = (folder / "runs").iterdir()
    return run


def test_a_run_whose_servers_come_and_go_says_so_in_rows_bill_and_page(tmp_path: Path) -> None:
    run = simulated(
        tmp_path, "--replicas", "1..3", "--scale-on", "in-flight=8", "--scale-every", "3s", "--start", "2s", "--fail",
        "0@10s,9@11s",
    )  # fmt: skip
    rows = read_results(run / "results-0.arrows").to_pylist()
    assert [row["request_id"] for row in rows] == list(range(400))
    lost = [row for row in rows if row["error"] is not None]
    assert lost and {row["error"] for row in lost} == {"cut"} and {row["replica"] for row in lost} == {0}
    assert all(row["finished_ns"] == 10_000_000_000 and len(row["chunk_gap_ns"]) < 60 for row in lost)
    assert any(row["chunk_gap_ns"] for row in lost) and {row["output_tokens"] for row in lost} == {None}
    manifest = read_manifest(run)
    assert 3 < len(manifest.lives) == len(manifest.replicas) and manifest.lives[0].failed
    report = CliRunner().invoke(cli, ["report", str(run), "--format", "json"], standalone_mode=False)
    found = json.loads(report.stdout)
    end_s = found["window"]["end_s"]
    paid = sum((end_s if one.ended_s is None else one.ended_s) - one.asked_s for one in manifest.lives)
    assert found["cost"]["bill_usd"] == pytest.approx(paid / 3600 * found["tier"]["usd_per_hour"], rel=1e-6)
    assert found["cost"]["rented"] == pytest.approx(paid / found["window"]["duration_s"])
    assert any("given back or fails" in one for one in found["assumptions"])
    page = tmp_path / "page.html"
    CliRunner().invoke(cli, ["report", str(run), "--html", str(page)], standalone_mode=False)
    assert "paid for" in page.read_text() and "take requests" in page.read_text()


def test_what_nobody_is_there_for_finds_no_connection(tmp_path: Path) -> None:
    run = simulated(tmp_path, "--start", "4s", "--fail", "0@10s")
    rows = read_results(run / "results-0.arrows").to_pylist()
    refused = [row for row in rows if row["error"] == "connect"]
    assert [row["sent_ns"] / 1e9 for row in refused] == pytest.approx(np.arange(10, 14, 0.05))
    assert all(row["replica"] is None and row["finished_ns"] == row["sent_ns"] for row in refused)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--replicas", "1..3"], "go together"),
        (["--scale-on", "waiting=5"], "go together"),
        (["--replicas", "3..1", "--scale-on", "waiting=5"], "the fewest and the most"),
        (["--replicas", "1..3", "--scale-on", "cpu=80"], "in-flight=32 or waiting=5"),
        (["--fail", "1@soon"], "is not a duration"),
        (["--fail", "x@3s"], "server@time"),
    ],
)
def test_what_makes_no_fleet_is_refused(tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(Exception, match=words) as told:
        simulated(tmp_path, *more)
    assert isinstance(told.value, UsageError) or type(told.value).__name__ == "BadParameter"
