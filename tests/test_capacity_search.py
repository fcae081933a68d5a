"""The search for capacity: its decisions against servers of known capacity, then the verb against a real process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import StartServer

from harness.analysis.capacity.backlog import curve_of
from harness.analysis.capacity.crossing import crossing
from harness.analysis.capacity.probes import requests_needed
from harness.analysis.capacity.search import (
    MOST_PROBES,
    SUSTAINED,
    Probe,
    Step,
    estimate,
    keeps,
    next_load,
    settling_s,
)
from harness.analysis.capacity.sweep import LoadPoint
from harness.analysis.stats.intervals import Quantity
from harness.cli.capacity import capacity
from harness.cli.plan_fleet import plan_fleet
from harness.cli.results import compare, report
from harness.cli.runner.capacity import CapacitySession
from harness.cluster.deploy import load_workers as load
from harness.cluster.simulator.fleet import Workload
from harness.errors import ServerError, UsageError
from harness.record.manifest import read_manifest
from harness.slo import Criterion, criteria
from harness.sweep.state import ANSWER, read_state
from tests.lab import capacity as capacity_lab
from tests.lab.processes import workload

P95 = (capacity_lab.P95,)
POISSON = workload("poisson", 16_000, 5)
DEMAND = capacity_lab.demand_of(POISSON)


# ---------------------------------------------------------------------------------------- decisions, without a server


def quantity(value: float) -> Quantity:
    return Quantity(value=value, low=value, high=value, n=1000, unit="", evidence="simulated")


def search(
    criteria: tuple[Criterion, ...] = P95, load: Workload = POISSON, invalid_from: float = math.inf,
    tolerance: float = 0.1, pause: float = 0.0,
) -> tuple[list[Probe], Step]:  # fmt: skip
    """A search against the laboratory's engine; ``pause``: it is that much slower to answer, s."""
    probes: list[Probe] = []
    rng = np.random.default_rng(3)
    while True:
        step = next_load(probes, criteria, tolerance, capacity_lab.demand_of(load))
        if step.rate is None and step.concurrency is None:
            return probes, step
        opened = sum(p.rate is not None for p in probes)
        found, _ = capacity_lab.probe(load, step, opened, rng, limit_s=criteria[0].limits["ttft"] - pause)
        if step.rate is not None and step.rate >= invalid_from:
            found = replace(found, point=None, evidence=None, worked=None)
        probes.append(found)


def test_the_ladder_ends_where_throughput_stops_growing() -> None:
    probes, _ = search()
    assert [p.concurrency for p in probes if p.concurrency] == [1, 4, 16, 64]  # of 8 slots


def test_a_search_ends_with_an_interval_that_is_narrow_enough() -> None:
    probes, end = search()
    found = estimate(probes, P95, DEMAND)
    assert end.narrow and found is not None and found.half_width is not None and found.half_width <= 0.1
    assert found.low is not None and found.high is not None and found.low < found.rate < found.high
    assert found.rate == pytest.approx(9.654, rel=0.1)
    assert len(probes) <= 14


def test_a_short_trace_leaves_a_wide_interval_and_ends_the_search() -> None:
    """A thousand requests are one realisation: no number of probes says what another one would have been."""
    probes, end = search(load=workload("bursty", 1000, 5))
    assert not end.narrow and "longer trace" in end.why
    assert len(probes) < MOST_PROBES


def test_an_slo_that_any_queue_keeps_is_no_capacity_beyond_what_gets_done() -> None:
    """With 1,000 s to answer, a probe of a minute keeps the SLO at any rate: its queue only grows."""
    lax = (Criterion(name="ttft_p95 <= 1000 s", wanted=0.95, limits={"ttft": 1000.0}),)
    probes, end = search(lax)
    found = estimate(probes, lax, DEMAND)
    assert found is not None and found.limit is SUSTAINED
    assert found.rate == pytest.approx(11.5, rel=0.06)
    assert found.low is not None and found.low < 11.6 < found.high * 1.03 and end.narrow
    assert any(p.evidence is not None and p.evidence.unstable for p in probes)
    assert max(p.rate for p in probes if p.rate) <= 1.2 * found.rate, "the search knows the ceiling that it has seen"


def test_what_the_server_gets_done_is_no_capacity_before_a_probe_was_as_good_as_full() -> None:
    """One probe at half the ceiling kept all, one beyond it only grew: the SLO breaks somewhere between."""
    rng = np.random.default_rng(3)
    steps = [Step(concurrency=c, why="") for c in (1, 4, 16, 64)] + [Step(rate=r, why="") for r in (5.0, 14.0)]
    probes = [capacity_lab.probe(POISSON, step, k, rng)[0] for k, step in enumerate(steps)]
    found = estimate(probes, P95, DEMAND)
    assert found is not None and found.missed and (found.low, found.high) == (None, None)
    assert found.rate < 9.7 < found.ceiling
    step = next_load(probes, P95, 0.1, DEMAND)
    assert step.rate == pytest.approx(0.96 * found.ceiling, rel=1e-3) and "just below" in step.why


def test_a_server_is_no_limit_before_several_probes_next_to_its_ceiling_kept_the_slo() -> None:
    """Three minutes there met no miss: they may have met no burst."""
    rng = np.random.default_rng(3)
    steps = [Step(concurrency=c, why="") for c in (1, 4, 16, 64)] + [Step(rate=14.0, why="")]
    probes = [capacity_lab.probe(POISSON, step, k, rng)[0] for k, step in enumerate(steps)]
    near = capacity_lab.probe(POISSON, Step(rate=11.0, why=""), 9, rng)[0]
    assert near.evidence is not None
    calm = replace(near, evidence=replace(near.evidence, kept=(np.ones_like(near.evidence.kept[0]),), unstable=False))
    for seen in range(4):
        found = estimate([*probes, *[calm] * seen], P95, DEMAND)
        step = next_load([*probes, *[calm] * seen], P95, 0.1, DEMAND)
        assert found is not None and step.rate is not None
        if seen:
            assert (found.low, found.high) == (None, None) and step.rate < found.ceiling
    found = estimate([*probes, *[calm] * 4], P95, DEMAND)
    assert found is not None and found.limit is SUSTAINED and found.low is not None


def test_a_burst_far_below_the_ceiling_is_no_queue_that_only_grows() -> None:
    """Of this trace most probes near the true 2.4 req/s meet no burst, and the server gets 7 req/s done."""
    case = capacity_lab.CASES["slow"]
    found = capacity_lab.search(case, 880001).found
    assert found is not None and found.limit is not SUSTAINED
    assert found.rate == pytest.approx(case.true, rel=0.25)


def test_a_server_settles_in_answers_as_long_as_they_are_when_it_is_full() -> None:
    rng = np.random.default_rng(3)
    probes = [capacity_lab.probe(POISSON, Step(concurrency=c, why=""), 0, rng)[0] for c in (1, 4, 16, 64)]
    assert settling_s(probes[:0]) == 0.0
    assert settling_s(probes) == pytest.approx(4 * 16 / 11.4, rel=0.1)  # 16 in flight get 11.4 req/s done, as 64 do


def test_one_burst_says_less_of_the_crossing_than_six() -> None:
    """A tenth of a probe misses, where its backlog is longest: of one probe in eight, or of six."""
    curve, rng = curve_of(DEMAND, 0.0, 11.4), np.random.default_rng(5)
    probes = [capacity_lab.probe(POISSON, Step(rate=9.6, why=""), k, rng)[0].evidence for k in range(8)]
    widths = []
    for bursts in (1, 6):
        met = []
        for k, e in enumerate(probes):
            assert e is not None
            behind = curve.of_part(e.sent.arrival_s, e.sent)[e.measured]
            met.append(replace(e, kept=((behind <= np.quantile(behind, 0.9)) | (k >= bursts),)))
        found = crossing([curve], met, 0, 0.95)
        assert found is not None and found.low is not None and found.high is not None
        widths.append((found.high - found.low) / 2 / found.rate)
    assert widths[0] > 1.25 * widths[1] > 0.1


def test_a_queue_that_only_grew_keeps_no_slo() -> None:
    probes, _ = search((Criterion(name="ttft_p95 <= 1000 s", wanted=0.95, limits={"ttft": 1000.0}),))
    grown = next(p for p in probes if p.evidence is not None and p.evidence.unstable)
    assert grown.point is not None and grown.point.kept[0].value == 1.0
    assert not keeps(grown.point, P95)


def test_an_slo_that_one_request_alone_breaks_is_given_up_soon() -> None:
    probes, end = search(pause=1.5)
    assert not end.narrow and "hardly meet" in end.why
    assert 1 <= len([p for p in probes if p.rate]) <= 6


def test_loads_whose_runs_are_invalid_are_tried_twice_and_then_left_alone() -> None:
    probes, end = search(invalid_from=5.0)
    assert "INVALID" in end.why
    spoilt = [p.rate for p in probes if p.point is None]
    assert spoilt and all(spoilt.count(rate) == 2 for rate in spoilt)


def test_a_server_that_answers_nothing_valid_ends_the_search() -> None:
    dead = Probe(rate=None, concurrency=1, point=None)
    assert next_load([dead], P95, 0.05, DEMAND).concurrency == 1
    assert next_load([dead, dead], P95, 0.05, DEMAND).why.startswith("no run")


def test_an_slo_that_cannot_be_judged_ends_the_search_at_once() -> None:
    unknown = Quantity(value=None, n=60, unit="", evidence="measured", note="tpot is not known: no usage")
    point = LoadPoint(load=1.0, kept=(unknown,), rates={"request_throughput": quantity(2.0)})
    step = next_load([Probe(rate=None, concurrency=1, point=point, used=math.inf)], P95, 0.05, DEMAND)
    assert (step.rate, step.concurrency, step.narrow) == (None, None, False)
    assert "tpot is not known: no usage" in step.why


def test_no_search_is_endless() -> None:
    point = LoadPoint(load=1.0, kept=(quantity(1.0),), rates={"request_throughput": quantity(1.0)})
    probe = Probe(rate=1.0, concurrency=None, point=point)
    assert next_load([probe] * MOST_PROBES, P95, 0.05, DEMAND).rate is None


def test_a_probe_offers_as_many_requests_as_its_percentile_needs() -> None:
    assert requests_needed(criteria({"ttft_p99": 1.0, "tpot_p50": 1.0}, 0.9)) == 299
    assert requests_needed(criteria({"ttft": 1.0}, 0.95)) == 59
    assert requests_needed(criteria({"ttft": 1.0}, 1.0)) == 2995  # certainty cannot be shown; 99.9 % stands in


# ------------------------------------------------------------------------------------------- against real processes


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LEAD_S", 0.2)


# A busy machine wakes a process tens of ms late. Such a run proves nothing of a limit or a gap that is as short, and is
# INVALID for it; so where answers are judged here, gaps are 80 ms and the SLO is of e2e, which allows 80 ms of lag.
SLOW = ("--ttft", "0.02", "--itl", "0.08")


def write_trace(path: Path, rows: int = 50) -> Path:
    lines = (json.dumps({"arrival_s": i / 10, "input_tokens": 12, "output_tokens": 2}) for i in range(rows))
    path.write_text("\n".join(lines))
    return path


def run(command: click.Command, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args], standalone_mode=False)


def folder_of(out: Path) -> Path:
    (folder,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return folder


@pytest.mark.alone
def test_a_known_capacity_is_found_and_a_fleet_planned_by_it(fake_server: StartServer, tmp_path: Path) -> None:
    # two slots, 100 ms a request: 20 req/s, and beyond that the queue grows
    server = fake_server(*SLOW, "--slots", "2")
    trace, out = write_trace(tmp_path / "trace.jsonl"), tmp_path / "sweeps"
    asked = (
        trace, "--base-url", server.url, "--tier", "aws-m7a.large", "--slo", "e2e_p90=210ms", "--probe", "2s",
        "--tolerance", "30%", "--out", out, "--format", "json", "--min-requests", "10",
    )  # fmt: skip
    result = run(capacity, *asked)
    assert result.exception is None, result.output
    found = json.loads(result.stdout)
    (system,) = [s for s in found["systems"] if s["loop"] == "open"]
    # in 2 s a queue that grows by 10 % waits 200 ms at the end: the SLO breaks a little above 20 req/s
    assert system["capacity"]["state"] == "found"
    assert 15 < system["capacity"]["load"]["value"] < 26
    tokens = system["capacity"]["rates"]["total_token_throughput"]["value"]
    assert system["usd_per_1m_total"]["value"] == pytest.approx(0.11592 / 3600 / tokens * 1e6)

    folder = folder_of(out)
    assert json.loads((folder / ANSWER).read_text())["sentence"] == found["sentence"]
    state = read_state(folder)
    assert len(state.points) == len(found["probes"]) and all(p.state == "done" for p in state.points)
    assert len({p.seed for p in state.points}) == len(state.points), "a warm prefix cache would answer"
    for point in state.points:
        assert read_manifest(folder / point.name).plan.seed == point.seed
        if point.level.request_rate is not None:
            assert point.requests is not None and point.requests >= 10

    # the same question again finds everything measured and starts nothing
    before = len(server.truth())
    again = run(capacity, *asked, "--resume", folder)
    assert json.loads(again.stdout)["sentence"] == found["sentence"]
    assert len(server.truth()) == before
    other = run(capacity, *asked, "--resume", folder, "--slo", "e2e_p90=50ms")
    assert isinstance(other.exception, UsageError) and "something else" in str(other.exception)

    table = run(report, folder, "--format", "json")
    assert table.return_value in (0, 3), table.output  # on a busy machine a probe may be INVALID
    assert json.loads(table.stdout)["systems"] == found["systems"]
    assert "Capacity and cost at the SLO" in run(report, folder, "--format", "md").stdout

    searches = run(compare, folder, folder)
    assert isinstance(searches.exception, UsageError) and "harness price A B" in str(searches.exception)

    fleet = run(plan_fleet, trace, folder, "--grow", "10x", "--headroom", "1", "--format", "json")
    assert fleet.exception is None, fleet.output
    (tier,) = json.loads(fleet.stdout)["tiers"]
    # the trace asks for 10 req/s, ten times over 100; its own 5 s count as a minute
    per_replica = system["capacity"]["load"]["value"]
    assert tier["peak"]["instances"] == math.ceil(50 / 60 * 10 / per_replica)
    assert tier["peak"]["usd_per_month"] == pytest.approx(tier["peak"]["instances"] * 0.11592 * 730)
    for format_ in ("text", "md", "csv"):
        printed = run(plan_fleet, trace, folder, "--availability", "99.9%", "--format", format_)
        assert printed.exception is None and "aws-m7a.large" in printed.stdout


def test_an_slo_out_of_reach_is_said_and_costs_little(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server(*SLOW)
    trace, out = write_trace(tmp_path / "trace.jsonl"), tmp_path / "sweeps"
    result = run(capacity, trace, "--base-url", server.url, "--slo", "e2e_p50=50ms", "--probe", "1s", "--out", out,
                 "--min-requests", "2")  # fmt: skip
    assert result.return_value == 4, result.output
    assert "does not keep" in result.stdout
    points = read_state(folder_of(out)).points  # a busy machine makes a run INVALID now and then: it is done again
    assert sum(p.verdict == "VALID" for p in points) <= 4
    left_out = run(plan_fleet, trace, folder_of(out), "--format", "json")
    assert left_out.return_value == 4
    assert "missed" in json.loads(left_out.stdout)["excluded"][0][1]


def test_the_budget_ends_the_search_and_more_money_goes_on(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server(*SLOW)
    trace, out = write_trace(tmp_path / "trace.jsonl"), tmp_path / "sweeps"
    asked = (trace, "--base-url", server.url, "--slo", "e2e_p50=50ms", "--probe", "1s", "--out", out,
             "--min-requests", "2")  # fmt: skip
    result = run(capacity, *asked, "--max-hours", "0.0001")
    assert result.return_value == 1, result.output
    assert "budget" in result.stdout
    (point,) = read_state(folder_of(out)).points
    assert point.state == "skipped"
    (row,) = json.loads((folder_of(out) / ANSWER).read_text())["probes"]
    assert row["verdict"] == "skipped", "no probe is chosen that the budget cannot pay"
    more = run(capacity, *asked, "--resume")
    assert more.return_value == 4, more.output  # out of reach, which takes the fewest probes to find
    assert any(p.state == "done" for p in read_state(folder_of(out)).points)


def test_servers_that_keep_dying_end_the_search(
    fake_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server()
    trace = write_trace(tmp_path / "trace.jsonl")

    def broken(self: CapacitySession, target: object, first: object) -> None:
        raise ServerError("it will not start")

    monkeypatch.setattr(CapacitySession, "_rent_and_probe", broken)
    result = run(capacity, trace, "--base-url", server.url, "--slo", "ttft=1s", "--out", tmp_path / "sweeps")
    assert result.return_value == 1
    assert "it will not start" in result.stdout


def test_what_cannot_be_searched_is_refused_before_anything_is_rented(tmp_path: Path) -> None:
    timeless = tmp_path / "t.jsonl"
    timeless.write_text('{"input_tokens": 4, "output_tokens": 4}\n')
    result = run(capacity, timeless, "--slo", "ttft=1s", "--out", tmp_path / "sweeps")
    assert isinstance(result.exception, UsageError) and "--arrivals poisson" in str(result.exception)
    assert not (tmp_path / "sweeps").exists()
    result = run(capacity, "-", "--slo", "ttft=1s")
    assert isinstance(result.exception, UsageError)
    assert isinstance(run(capacity, timeless).exception, click.UsageError)  # no --slo
