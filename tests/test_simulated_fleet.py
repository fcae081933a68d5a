"""An engine told from rows, and the smallest fleet by replay (`analysis.capacity.fitted_engine`, `simulated_fleet`)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from harness.analysis.capacity.fitted_engine import (
    FittedEngine,
    NotFittedError,
    Requests,
    confirmed,
    fit_engine,
    observe,
    within,
)
from harness.analysis.capacity.fleet import Kept, Schedule, TierOffer, failing, spare_instances
from harness.analysis.capacity.fleet import demand as traffic
from harness.analysis.capacity.simulated_fleet import (
    FEWEST,
    MOST_STEPS,
    _affordable,
    _busy,
    even_s,
    resampled,
    share_by_minute,
    size_fleet,
    steps_of,
)
from harness.analysis.capacity.simulated_fleet import MOST_SCALED_STEPS as MOST_FOLLOWED
from harness.analysis.capacity.simulated_fleet import follow as follow_demand
from harness.analysis.report.fleet import WITHIN
from harness.analysis.rows.read import read_run
from harness.cli.plan_fleet import plan_fleet as plan_fleet_verb
from harness.cli.plan_fleet import simulated_engine
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.scheduler import Limits
from harness.slo import Criterion, criteria
from tests.lab.fleet import SLO, Case, follow, judge, measured_runs, priced, serve, workload, write_rows
from tests.lab.processes import STEP

TTFT = criteria(SLO, 0.99)
KNOWN = FittedEngine(
    base_s=0.020, per_sequence_s=0.0015, per_prompt_token_s=0.00002, max_num_seqs=8, max_num_batched_tokens=None,
    limit_seen=True, overhead_s=0.0, residual=0.0, requests=1000,
)  # fmt: skip


def poisson(rate, requests, seed=0, output=16, inputs=200):
    rng = np.random.default_rng(seed)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate, requests)),
        input_tokens=np.maximum(1, rng.poisson(inputs, requests) * rng.integers(1, 4, requests) // 2),
        output_tokens=1 + rng.geometric(1 / output, requests),
    )  # fmt: skip


def demand(rate, requests, seed=0):
    load = poisson(rate, requests, seed)
    return Requests(arrival_s=load.arrival_s, input_tokens=load.input_tokens, output_tokens=load.output_tokens)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three loads of the laboratory's engine, without noise and without chunks."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for rate in (2.0, 6.0, 10.0):
        load = poisson(rate, 400, seed=round(rate))
        served = simulate(load, Limits(max_num_seqs=8), [STEP])
        write_rows(folder / f"{rate:g}", load, served, rate)
        found.append(observe(read_run(folder / f"{rate:g}"), 1))
    return found


def test_the_steps_of_an_engine_are_told_from_rows(measured):
    fitted = confirmed(fit_engine(measured), simulated_engine, measured, TTFT)
    assert fitted.base_s == pytest.approx(STEP.base_s, rel=0.02)
    assert fitted.per_sequence_s == pytest.approx(STEP.per_sequence_s, rel=0.05)
    assert fitted.per_prompt_token_s == pytest.approx(STEP.per_prompt_token_s, rel=0.10)
    assert (fitted.max_num_seqs, fitted.limit_seen, fitted.max_num_batched_tokens) == (8, True, None)
    assert fitted.residual < 0.01 and 0 <= fitted.overhead_s < 0.002


def test_a_server_that_was_never_full_may_hold_more(measured):
    fitted = fit_engine([run for run in measured if run.run.endswith(("2", "6"))])
    assert not fitted.limit_seen and fitted.max_num_seqs <= 8


def test_chunks_of_prompts_and_noise_are_told_too(tmp_path):
    measured_runs(tmp_path, workload(Case("poisson", 20.0, 300.0), np.random.default_rng(1)), seed=1)
    runs = [observe(read_run(path), 1) for path in sorted(tmp_path.iterdir())]
    fitted = confirmed(fit_engine(runs), simulated_engine, runs, TTFT)
    assert fitted.max_num_batched_tokens == 256
    assert fitted.base_s == pytest.approx(STEP.base_s, rel=0.05)
    assert fitted.per_sequence_s == pytest.approx(STEP.per_sequence_s, rel=0.15)
    # a full server is as fast as the real one: one per cent of it decides the luck of several in a backlog
    trace = workload(Case("poisson", 20.0, 150.0), np.random.default_rng(2))
    load = replace(trace, arrival_s=np.zeros(len(trace)))
    asked = Requests(arrival_s=load.arrival_s, input_tokens=load.input_tokens, output_tokens=load.output_tokens)
    took_s = simulated_engine(fitted, asked, 1).finished_s.max()
    assert took_s == pytest.approx(np.mean([serve(load, 1, k).finished_s.max() for k in range(3)]), rel=0.008)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, cached_tokens=0.5 * r.input_tokens.sum()), "prefix cache"),
        (lambda r: replace(r, failed=50), "failed"),
        (lambda r: replace(r, replicas=2), "which of 2 replicas"),
        (
            lambda r: replace(r, last_s=r.first_s + (r.last_s - r.first_s) * np.tile([0.5, 2.0], 200)),
            "off the measured",
        ),
    ],
)
def test_an_engine_that_cannot_be_told_is_refused(measured, change, words):
    with pytest.raises(NotFittedError, match=words):
        fit_engine([change(run) for run in measured])


def test_loads_that_are_all_alike_are_refused(measured):
    # one request at a time: what a sequence costs and what a step costs cannot be told apart
    (run,) = (run for run in measured if run.run.endswith("2"))
    apart = replace(run, sent_s=run.sent_s, first_s=np.arange(400.0) * 100, last_s=np.arange(400.0) * 100 + 0.0215 * (
        run.output_tokens - 1))  # fmt: skip
    with pytest.raises(NotFittedError, match="too much alike"):
        fit_engine([apart])
    with pytest.raises(NotFittedError, match="at least 100"):
        fit_engine([replace(run, **{
            name: getattr(run, name)[:50]
            for name in ("replica", "sent_s", "first_s", "last_s", "finished_s", "input_tokens", "output_tokens")
        })])  # fmt: skip


def test_an_engine_whose_replays_keep_other_shares_is_refused(measured):
    with pytest.raises(NotFittedError, match="replayed on engines"):
        confirmed(replace(fit_engine(measured), max_num_seqs=5), simulated_engine, measured, TTFT)


def test_minutes_of_few_requests_are_joined_until_a_share_can_be_told():
    # 60, 30, 30, 60, 10 requests: at 95 % 59 are needed, so minutes 1 and 2 are one, and the last belongs to the 4th
    at_s = np.concatenate([60.0 * k + np.linspace(0, 59, n) for k, n in enumerate((60, 30, 30, 60, 10))])
    kept = np.ones(len(at_s), dtype=bool)
    kept[60:66] = False  # 6 of minutes 1 and 2
    kept[-7:] = False
    assert share_by_minute(at_s, kept, 0.95).tolist() == pytest.approx([1.0, 54 / 60, 63 / 70])
    assert share_by_minute(at_s[:10], kept[:10], 0.95).tolist() == [1.0]


def test_every_limit_of_an_slo_is_judged():
    load = demand(2.0, 200)
    served = simulated_engine(KNOWN, load, 1)
    ttft_s, e2e_s = served.first_token_s - load.arrival_s, served.finished_s - load.arrival_s
    tpot_s = (e2e_s - ttft_s) / np.maximum(1, load.output_tokens - 1)
    for metric, values in (("ttft", ttft_s), ("e2e", e2e_s), ("tpot", tpot_s)):
        limit = float(np.median(values))
        found = within(load, served, Criterion(name="x", wanted=0.9, limits={metric: limit}))
        assert found.tolist() == (values <= limit + 1e-9).tolist()
    with pytest.raises(NotFittedError, match="itl_max"):
        within(load, served, Criterion(name="x", wanted=0.9, limits={"itl_max": 1.0}))


def test_a_resample_is_another_day_of_the_same_shape():
    day = demand(5.0, 20_000)
    reach_s = even_s(day.arrival_s)
    assert reach_s >= 8, "a Poisson demand is even at every scale"
    sizes = [len(resampled(day, 2.0, reach_s, np.random.default_rng(k))) for k in range(20)]
    assert np.mean(sizes) == pytest.approx(40_000, rel=0.01) and 100 < np.std(sizes) < 500
    again = resampled(day, 1.0, reach_s, np.random.default_rng(0))
    assert np.all(np.diff(again.arrival_s) >= 0) and again.arrival_s[0] >= day.arrival_s[0]
    counts = [np.histogram(again.arrival_s, bins=195, range=(0, 3900))[0] for again in (day, again)]
    # counts of 20 s vary as those of a Poisson process do, not twice as much
    assert np.var(counts[1]) == pytest.approx(100, rel=0.35)


def test_bursts_are_not_smoothed_away():
    bursty = workload(Case("bursty", 20.0), np.random.default_rng(3))
    assert even_s(bursty.arrival_s) == 0.0


def test_the_smallest_fleet_is_found_from_wherever_the_search_begins(measured):
    day = demand(26.0, 1000, seed=5)
    found = [size_fleet(measured, day, 1.0, TTFT, simulated_engine, likely) for likely in (1, 6)]
    assert len({(one.replicas, one.missed) for one in found}) == 1
    (one, *_) = found
    assert one.evidence == "simulated" and one.missed <= 1 and one.one_fewer_missed
    assert one.replicas >= 3, "no replica of this engine does more than 12 req/s"
    assert size_fleet(measured, day, 2.0, TTFT, simulated_engine, one.replicas).replicas > one.replicas
    with pytest.raises(NotFittedError, match="not even"):
        size_fleet(measured, day, 1.0, [Criterion(name="x", wanted=0.95, limits={"ttft": 0.01})], simulated_engine, 2)


def test_quiet_half_hours_are_not_replayed(measured):
    busy, quiet = demand(12.0, 1200), demand(2.0, 1200, seed=1)
    day = Requests(
        arrival_s=np.concatenate((busy.arrival_s, 1800 + quiet.arrival_s)),
        input_tokens=np.concatenate((busy.input_tokens, quiet.input_tokens)),
        output_tokens=np.concatenate((busy.output_tokens, quiet.output_tokens)),
    )  # fmt: skip
    found = size_fleet(measured, day, 1.0, TTFT, simulated_engine, 2)
    alone = size_fleet(measured, busy, 1.0, TTFT, simulated_engine, 2)
    assert (found.replayed, found.left_out) == (1200, 1200) and found.replicas == alone.replicas


@pytest.mark.parametrize(("slo", "words"), [(None, "(simulated; fluid:"), ("itl_max=10s", "not simulated")])
def test_plan_fleet_says_that_its_fleet_is_simulated_or_why_not(tmp_path, slo, words):
    load = workload(Case("poisson", 12.0, 180.0), np.random.default_rng(0))
    measured_runs(tmp_path / "runs", load, 0)
    rows = zip(load.arrival_s, load.input_tokens, load.output_tokens, strict=True)
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(f'{{"arrival_s": {a}, "input_tokens": {i}, "output_tokens": {o}}}\n' for a, i, o in rows))
    asked = [str(trace), str(tmp_path / "runs"), *(() if slo is None else ("--slo", slo))]
    done = CliRunner().invoke(plan_fleet_verb, asked, standalone_mode=False)
    assert done.exception is None and done.return_value == 0, done.output
    assert words in " ".join(done.stdout.split())
    (tier,) = json.loads(
        CliRunner().invoke(plan_fleet_verb, [*asked, "--format", "json"], standalone_mode=False).stdout
    )["tiers"]
    assert (tier["simulated"] is None) == (slo is not None) == (tier["not_simulated"] is not None)
    if slo is None:
        assert tier["simulated"]["evidence"] == "simulated" and tier["evidence"] == "measured"
    # at the utilisation that is said, harness price says what the month's bill over the month's tokens is
    tokens_per_s = (load.input_tokens + load.output_tokens).sum() / (load.arrival_s[-1] - load.arrival_s[0])
    paid = tier["peak"]["usd_per_month"] / (tokens_per_s * 730 * 3600) * 1e6
    assert 0 < tier["peak"]["utilisation"] <= 1
    said = priced(tmp_path / "runs", tier["peak"]["utilisation"], {"itl_max": 10.0} if slo else SLO)
    assert said == pytest.approx(paid, rel=1e-5)
    assert (tier["reactive"]["kept"] is None) == (tier["scheduled"]["kept"] is None) == (slo is not None)


def test_a_small_draw_of_the_study():
    """Planned from run directories alone, against 20 draws of another engine; `python -m tests.lab` does more."""
    found = judge(Case("poisson", 16.0, 240.0), seed=3)
    assert found.simulated and found.missed <= 1
    assert found.truth <= found.said <= found.truth + 1


def test_a_small_draw_of_the_study_of_autoscaling():
    """A step of three times the demand: the backlog until new replicas answer, and what is late by it."""
    found = follow(Case("step", 12.0, 360.0, start_s=70.0), seed=2)
    assert found.reactive.true < 0.9 < found.scheduled.true
    assert found.reactive.said == pytest.approx(found.reactive.true, abs=WITHIN)
    assert found.scheduled.said == pytest.approx(found.scheduled.true, abs=WITHIN)


def test_a_fleet_that_never_changes_is_a_fixed_one():
    day = demand(30.0, 3000, seed=8)
    plan = Schedule(target=np.array([2, 2, 2]), start_s=60.0)

    def kept(**more):
        return follow_demand(KNOWN, day, more.pop("factor", 1.0), TTFT, simulated_engine, plan, **more)

    served = simulated_engine(KNOWN, day, 3)
    share = float(within(day, served, TTFT[0]).mean())
    assert kept(spares=1).share == share and kept(spares=1).replayed == 3000
    assert share > 0.95 and kept(spares=1).promised and kept(spares=1).worst_minute <= share
    # two replicas of at most 12 req/s for 30: a queue that grows; two instances of two replicas each have none
    assert kept().share < 0.5 and not kept().promised
    assert kept(per_instance=2).share > 0.99
    # grown, it is another day of about so many times the requests
    twice = kept(factor=2.0, per_instance=3)
    assert 5700 < twice.replayed < 6300 and twice.share > 0.95
    assert kept(factor=2.0, spares=1).share < 0.3


def test_instances_that_fail_lose_requests_and_spares_make_up_for_them():
    day = demand(20.0, 24_000, seed=8)  # 20 minutes, which two replicas just carry
    offer = TierOffer(name="x", usd_per_hour=1.0, capacity=11.0, start_s=60.0, node_availability=0.9)

    def kept(instances: int) -> Kept:
        plan = failing(offer, traffic(day.arrival_s), instances)
        assert plan is not None and plan.fails_s == pytest.approx(540.0)
        return follow_demand(KNOWN, day, 1.0, TTFT, simulated_engine, plan)

    bare, planned = kept(2), kept(2 + spare_instances(2, 0.9, 0.95))
    assert bare.share < 0.9 and not bare.promised
    assert planned.promised and 0.95 <= planned.share < 1, "those in flight are lost all the same"
    assert failing(replace(offer, start_s=None), traffic(day.arrival_s), 2) is None
    assert failing(replace(offer, replicas_per_instance=2), traffic(day.arrival_s), 2) is None


def test_a_long_demand_is_replayed_as_far_as_the_steps_go():
    """A day: its busiest half hours for the fleet, half hours evenly over it for one that follows; and it is said."""
    rng = np.random.default_rng(0)
    arrival_s = np.concatenate(([0.0], np.sort(rng.random(59_999)) * 86_400))
    day = Requests(
        arrival_s=arrival_s, input_tokens=np.full(60_000, 50), output_tokens=np.full(60_000, 400),
    )  # fmt: skip
    busy = _busy(day, KNOWN, 1.0, 3)
    half_hours = np.unique(day.arrival_s[busy] // 1800)
    assert 1 <= len(half_hours) < 24 and steps_of(day.chosen(busy), KNOWN, 1.0, 3) * (FEWEST + 1) < 1.1 * MOST_STEPS
    counts = np.bincount((day.arrival_s // 60).astype(int), minlength=1440).reshape(-1, 30).max(axis=1)
    assert counts.argmax() in half_hours
    part = _affordable(day, KNOWN, 6.0, 18)
    assert steps_of(day.chosen(part), KNOWN, 6.0, 18) < 1.1 * MOST_FOLLOWED < 2 * steps_of(day, KNOWN, 6.0, 18)
    (apart,) = np.unique(np.diff(np.unique(day.arrival_s[part] // 1800)))
    assert apart >= 2
    short = day.chosen(np.arange(60_000) < 500)
    assert _busy(short, KNOWN, 1.0, 3).all() and _affordable(short, KNOWN, 1.0, 3).all()


def test_a_search_says_what_it_tries(measured):
    said: list[str] = []
    found = size_fleet(measured, demand(26.0, 400, seed=5), 1.0, TTFT, simulated_engine, 2, progress=said.append)
    assert "400 requests are replayed" in said[0]
    assert f"{found.replicas} replicas: enough" in said and f"{found.replicas - 1} replicas: not enough" in said


def test_the_true_engine_of_the_study_is_another_one():
    load = workload(Case("poisson", 10.0, 60.0), np.random.default_rng(0))
    plain = simulate(load, Limits(max_num_seqs=8), [STEP] * 2)
    assert np.median(serve(load, 2, 0).finished_s / plain.finished_s) != 1
