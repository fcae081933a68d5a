import csv
import json
import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, TIER, bad, good, write_run
from test_capacity import sweep_run

from harness.analysis.capacity.fitted_engine import FittedEngine
from harness.analysis.capacity.fleet import (
    HOURS_PER_YEAR,
    Kept,
    Schedule,
    TierOffer,
    TrafficDemand,
    autoscaled,
    demand,
    fleet,
    spare_instances,
)
from harness.analysis.capacity.fleet_plan import Wanted, grown, plan_fleets
from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.capacity.simulated_fleet import SimulatedFleet
from harness.analysis.capacity.sweep import Capacity
from harness.analysis.pricing.rate_card import HOURS_PER_MONTH
from harness.analysis.report.document import Cell, Section, Table, render_csv, render_markdown
from harness.analysis.report.fleet import fleet_sections
from harness.analysis.stats.intervals import Quantity
from harness.cli.plan_fleet import plan_fleet as plan_fleet_verb
from harness.errors import UsageError

ENGINE = FittedEngine(
    base_s=0.02, per_sequence_s=0.0015, per_prompt_token_s=0.00002, max_num_seqs=8, max_num_batched_tokens=None,
    limit_seen=True, overhead_s=0.0, residual=0.0, requests=1000,
)  # fmt: skip
L4 = TierOffer(name="l4", usd_per_hour=0.8, capacity=2.0)


def by_minute(*rates):
    per_minute = np.array(rates, dtype=float)
    return TrafficDemand(
        per_minute=per_minute, mean=float(per_minute.mean()), worst_minute=float(per_minute.max()),
        requests=round(float(per_minute.sum()) * 60), span_s=60.0 * len(rates),
    )  # fmt: skip


def test_demand_counts_the_worst_minute_wherever_it_begins():
    # 30 requests in the last half of minute 0 and 30 in the first half of minute 1: no clock minute shows the 60
    times = np.concatenate((np.linspace(30, 59, 30), np.linspace(60, 89, 30), [179.0]))
    found = demand(times)
    assert found.worst_minute == 1.0
    # minutes count from the first arrival
    assert found.per_minute.tolist() == [1.0, 0.0, 1 / 60]
    assert found.requests == 61 and found.mean == pytest.approx(61 / 149)


def test_demand_does_not_depend_on_order_or_on_where_the_clock_begins():
    rng = np.random.default_rng(0)
    times = rng.uniform(0, 600, 200)
    there = demand(times)
    here = demand(rng.permutation(times) + 1e6)
    assert there.worst_minute == here.worst_minute and there.mean == pytest.approx(here.mean)


def test_one_request_is_no_rate_of_infinity():
    assert demand(np.array([5.0])).mean == pytest.approx(1 / 60)


@pytest.mark.parametrize("times", [[], [1.0, math.nan], [math.inf]])
def test_demand_needs_arrivals(times):
    with pytest.raises(ValueError, match="arrival"):
        demand(np.array(times))


def test_a_fleet_is_whole_instances():
    # 7 req/s over 2 req/s a replica: 4 replicas; 3 to a box: 2 boxes
    found = fleet(TierOffer(name="box", usd_per_hour=10.0, capacity=2.0, replicas_per_instance=3), 7.0)
    assert (found.replicas, found.instances, found.spares) == (4, 2, 0)
    assert found.usd_per_hour == 20.0 and found.usd_per_month == 14_600 and found.usd_per_year == 175_200
    assert found.utilisation == pytest.approx(7 / 12)


def test_a_demand_that_fits_exactly_takes_no_instance_more():
    assert fleet(L4, 6.0).instances == 3
    assert fleet(L4, 6.0, headroom=1.1).instances == 4
    assert (
        fleet(TierOffer(name="x", usd_per_hour=1, capacity=0.1), 0.3).instances == 3
    )  # 0.3 / 0.1 is above 3 in floats


def test_nothing_asked_still_takes_one():
    assert fleet(L4, 0.0).instances == 1


def test_spares_follow_the_binomial_law():
    # one needed, each up 99 %: one alone 0.99, two 1 - 0.01^2 = 0.9999, three 1 - 0.01^3
    assert spare_instances(1, 0.99, 0.99) == 0
    assert spare_instances(1, 0.99, 0.9999) == 1
    assert spare_instances(1, 0.99, 0.99991) == 2
    assert spare_instances(50, 1.0, 0.999999) == 0
    # by hand: 10 needed, 12 bought, each up 95 %: P(at most 2 down) = 0.98043
    assert spare_instances(10, 0.95, 0.980) == 2
    assert spare_instances(10, 0.95, 0.981) == 3


def test_many_instances_need_no_huge_sum():
    spares = spare_instances(1_000_000, 0.99, 0.99)
    # normal law: mean 10,101, standard deviation 101, 2.33 of them above
    assert spares == pytest.approx(10_101 + 2.33 * 101, rel=0.002)


def test_certainty_cannot_be_bought():
    with pytest.raises(ValueError, match="100 %"):
        spare_instances(1, 0.99, 1.0)
    with pytest.raises(ValueError, match="shares"):
        spare_instances(1, 0.0, 0.9)


@given(
    st.floats(0.01, 1e4),
    st.floats(1.0, 3.0),
    st.floats(0.01, 100),
    st.integers(1, 8),
    st.sampled_from([None, 0.99, 0.999]),
)
def test_more_demand_never_needs_less(rate, factor, capacity, per_instance, availability):
    offer = TierOffer(
        name="x", usd_per_hour=1.0, capacity=capacity, replicas_per_instance=per_instance, node_availability=0.99
    )
    small = fleet(offer, rate, availability=availability)
    large = fleet(offer, rate * factor, availability=availability)
    assert large.instances >= small.instances
    assert small.replicas * capacity >= rate * (1 - 1e-6)
    assert (small.instances - small.spares) * per_instance >= small.replicas
    assert small.usd_per_hour == small.instances


def test_an_autoscaler_pays_what_it_asked_for_and_is_late_by_its_start():
    # 1 instance carries 2 req/s; a step from 2 to 8 in minute 3
    day = by_minute(2, 2, 2, 8, 8, 8, 8, 8)
    at_once = autoscaled(replace(L4, start_s=0), day)
    # it asks for 4 at the end of minute 3; 360 requests are left over then, and four that carry the 8 req/s that are
    # asked never work them off: everything from minute 3 on waits
    assert at_once.instance_hours == pytest.approx((1 * 4 + 4 * 4) / 60)
    assert at_once.short_share == pytest.approx(40 / 46)
    assert at_once.backlog_s == pytest.approx(360 / 2)
    late = autoscaled(replace(L4, start_s=120), day)
    assert late.instance_hours == at_once.instance_hours  # what starts is paid
    assert late.short_share == pytest.approx(40 / 46)
    assert late.backlog_s == pytest.approx(3 * 360 / 2)
    assert at_once.peak_instances == 4


def test_an_autoscaler_works_its_backlog_off_with_what_it_has_to_spare():
    # one instance carries 2 req/s; minute 1 leaves 120 requests over; from then on 4 req/s are up for 3 asked: 1 req/s
    # is to spare, minutes 2 and 3 are behind, and the 4th is not
    found = autoscaled(replace(L4, start_s=0), by_minute(2, 4, 3, 3, 3, 3))
    assert found.short_share == pytest.approx((4 + 3 + 3) / 18)
    assert found.backlog_s == pytest.approx(120 / 2)
    # what is left over after a lull of half a minute is behind for that half minute
    found = autoscaled(replace(L4, start_s=0), by_minute(2, 4, 0, 3))
    assert found.short_share == pytest.approx(4 / 9)


def test_an_autoscaler_holds_what_the_last_ten_minutes_needed():
    day = by_minute(8, *[2] * 12)
    found = autoscaled(L4, day)
    assert found.instance_hours == pytest.approx((4 * 11 + 1 * 2) / 60)
    assert found.short_share == 0.0
    assert found.usd == pytest.approx(found.instance_hours * 0.8)


def test_a_steady_day_costs_the_same_either_way():
    day = by_minute(*[3.0] * 60)
    assert autoscaled(L4, day).usd_per_hour == pytest.approx(fleet(L4, day.worst_minute).usd_per_hour)


def test_a_grown_day_is_the_same_day_with_more_requests():
    grown = by_minute(1, 2, 3).grown(3)
    assert grown.per_minute.tolist() == [3, 6, 9] and grown.worst_minute == 9 and grown.requests == 1080


def test_a_schedule_is_never_short_and_pays_for_the_start():
    day = by_minute(2, 2, 2, 8, 8, 8, 8, 8)
    found = autoscaled(replace(L4, start_s=120), day, ahead=True)
    assert found.short_share == 0.0
    # asked for two minutes before minute 3: one minute of 1 instance, seven of 4
    assert found.instance_hours == pytest.approx((1 + 7 * 4) / 60)


def test_what_starts_answers_after_its_start_up_and_not_a_minute_later():
    # 1, then 3 asked for at 60 s, then 2 at 120 s; start-up 90 s
    plan = Schedule(target=np.array([1, 3, 3, 3, 2, 4]), start_s=90.0)
    assert plan.up(np.array([0.0, 60.0, 149.9, 150.0, 239.9, 240.0, 300.0, 359.9, 1000.0])).tolist() == [
        1, 1, 1, 3, 3, 2, 2, 2, 4,
    ]  # fmt: skip
    assert replace(plan, start_s=0.0).up(np.array([0.0, 60.0, 240.0, 300.0])).tolist() == [1, 3, 2, 4]


def test_a_year_is_twelve_months():
    assert HOURS_PER_YEAR == 12 * HOURS_PER_MONTH


def test_demand_counts_tokens_as_well_as_requests():
    times, tokens = np.array([0.0, 30.0, 100.0]), np.array([600.0, 600.0, 300.0])
    found = demand(times[::-1], tokens[::-1])
    assert found.per_minute.tolist() == [20.0, 5.0]
    assert found.worst_minute == 20.0 and found.requests == 1500 and found.mean == pytest.approx(15.0)


# --------------------------------------------------------------------------------------------------------- whole plans


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet")
    (system,) = serving_configs([sweep_run(path / f"{r}", r, slow) for r, slow in ((4, 0), (8, 20))])
    return system


def system_of(measured, *, name="a", usd=10.0, rate=5.0, tokens=500.0, state="found", held=1, start_s=90.0):
    """A system that carries ``rate`` req/s and ``tokens`` tokens/s on an instance of ``usd`` an hour."""

    def q(value, unit):
        return Quantity(value=value, low=value * 0.9, high=value * 1.1, n=100, unit=unit, evidence="measured")

    throughput = q(tokens, "tokens/s")
    load = q(rate, "req/s")
    if state != "found":
        load = replace(load, value=None, note="why not")
    rates = {"total_token_throughput": throughput} if state == "found" else {}
    found = Capacity(state=state, load=load, limit=None, rates=rates)
    return replace(
        measured, tier=name, usd_per_hour=usd, replicas=1, loads=(rate / 2, rate), capacity=found, start_s=start_s,
        top_token_throughput=throughput, replicas_per_instance=held,
    )  # fmt: skip


def asked(*rates, tokens_each=100.0, **more):
    """A demand of these requests/s by the minute, ``tokens_each`` tokens a request."""
    requests = by_minute(*rates)
    return Wanted(requests=requests, tokens=requests.grown(tokens_each), **more)


def plan(found, wanted, **more):
    return plan_fleets(found, wanted, made="2026-11-22T00:00:00Z", trace="t", **more)


def test_a_fleet_by_hand(measured):
    # demand 2, 12, 4 req/s: mean 6, worst 12; three times that, 20 % headroom: 43.2 req/s at the peak
    # 5 req/s a replica: 9 replicas, two to an instance: 5 instances of 10 USD
    system = system_of(measured, held=2)
    made = plan([system], grown(asked(2, 12, 4, headroom=1.2), 3.0))
    (tier,) = made.tiers
    assert (tier.mean.replicas, tier.worst_minute.replicas, tier.peak.replicas) == (4, 8, 9)
    assert (tier.mean.instances, tier.worst_minute.instances, tier.peak.instances) == (2, 4, 5)
    assert tier.peak.usd_per_hour == 50.0
    assert tier.peak.usd_per_month == 36_500.0 and tier.peak.usd_per_year == 438_000.0
    assert tier.fluid == tier.peak and tier.simulated is None and tier.not_simulated
    # two replicas on an instance, and harness price counts an instance for each: no utilisation makes it right
    assert tier.peak.utilisation is None and "several share one" in str(tier.no_utilisation)
    # 18 req/s on average x 100 tokens x 3600 s is 6.48 M tokens an hour for 50 USD
    assert tier.usd_per_1m_served == pytest.approx(50 / 6.48)
    # a schedule: 7.2, 43.2, 14.4 req/s over 10 an instance need 1, 5, 2; asked 2 minutes ahead and held: 5, 5, 5
    assert tier.scheduled.usd == pytest.approx(15 / 60 * 10)
    # reactive: 1, then what minute 0 needed, then 5, which are not up yet; nobody who came after minute 0 was in time
    assert tier.reactive.usd == pytest.approx((1 + 1 + 5) / 60 * 10)
    assert tier.reactive.short_share == pytest.approx((36 + 12) / (6 + 36 + 12))
    assert "5 instances, 36,500 USD a month" in made.sentence and "Nothing else was measured" in made.sentence
    by_name = {s.changed: s.instances for s in tier.sensitivities}
    assert by_name == {"capacity at its low end": 5, "capacity at its high end": 4}


@pytest.mark.parametrize(("rates", "tokens_each", "state", "share"), [
    ((2, 12, 4), 100.0, "found", 18 / 45),  # 9 replicas of 5 req/s
    ((2, 12, 4), 300.0, "found", 18 * 300 / (26 * 500)),  # tokens bind, and the price is of tokens
    ((2, 12, 4), 80.0, "found", 18 * 80 / (9 * 500)),
    ((2, 12, 4), 100.0, "beyond", 18 / 45),
    ((14,), 100.0, "found", None),  # 42 req/s steady on 8 replicas, by replay: more than as many times one
])  # fmt: skip
def test_utilisation_is_the_share_at_which_the_price_is_the_bill(measured, rates, tokens_each, state, share):
    class Eight:
        def fleet(self, system, factor, likely):
            return SimulatedFleet(
                replicas=8, evidence="simulated", engine=ENGINE, replayed=1, left_out=0, resamples=20, missed=0,
                worst_share=1.0, one_fewer_missed=2,
            )  # fmt: skip

        def scaled(self, system, fitted, factor, plan, spares, per_instance):
            return Kept(share=0.846, worst_minute=0.1, promised=False, replayed=1)

    system = system_of(measured, state=state)
    wanted = grown(asked(*rates, tokens_each=tokens_each, headroom=1.2), 3.0)
    made = plan([system], wanted, replays=Eight() if share is None else None)
    (tier,) = made.tiers
    text = " ".join(render_markdown(fleet_sections(made)).split())
    if share is None:
        assert tier.peak.utilisation is None and "more than as many times one" in tier.no_utilisation
        assert "no utilisation: the fleet serves" in text
        assert "MISSES: 84.6% (10%)" in text and tier.reactive.kept.promised is False
        return
    assert tier.peak.utilisation == pytest.approx(share) and tier.no_utilisation is None
    assert "not simulated: how many keep the SLO" in text
    # cost at 100 % of one replica: 10 USD an hour over 500 tokens/s
    assert 10 / (500 * 3600) * 1e6 / tier.peak.utilisation == pytest.approx(tier.usd_per_1m_served)


@pytest.mark.parametrize(("read", "old"), [("2026-11", False), ("2026-01", True), ("some day", True)])
def test_an_old_price_is_marked(measured, read, old):
    (tier,) = plan([replace(system_of(measured), price_date=read)], asked(2, 12)).tiers
    assert (" (OLD)" in tier.price_basis) == any(note.startswith("OLD: ") for note in tier.notes) == old


def test_spares_are_bought_for_availability(measured):
    made = plan([system_of(measured)], asked(10, availability=0.999, node_availability=0.995))
    (tier,) = made.tiers
    # 2 needed: P(both of 2 up) = 0.990025, at most 1 of 3 down = 0.99992537
    assert (tier.peak.instances, tier.peak.spares) == (3, 1)
    assert any("99.9 %" in said for said in made.assumptions)


def test_tokens_bind_when_the_demand_is_heavier_than_what_was_measured(measured):
    # measured 100 tokens a request; the demand has 300
    (tier,) = plan([system_of(measured)], asked(10, tokens_each=300.0)).tiers
    assert (tier.binding, tier.unit, tier.capacity) == ("tokens", "tokens/s", 500.0)
    assert tier.peak.instances == 6
    (tier,) = plan([system_of(measured)], asked(10, tokens_each=100.0)).tiers
    assert (tier.binding, tier.peak.instances) == ("requests", 2)
    (tier,) = plan([system_of(measured)], replace(asked(10), tokens=None)).tiers
    assert (tier.binding, tier.peak.instances, tier.usd_per_1m_served) == ("requests", 2, None)


def test_the_cheapest_fleet_wins_and_the_runner_up_is_named(measured):
    large = system_of(measured, name="dear box", usd=30.0, rate=20.0, tokens=2000.0)
    made = plan([system_of(measured, name="small", usd=10.0), large], asked(18))
    # 18 req/s: four small ones for 40 USD, or one large one for 30
    assert [t.tier for t in made.tiers] == ["dear box", "small"]
    assert "Runner-up" in made.sentence and "+33%" in made.sentence


def test_what_does_not_reach_the_slo_is_left_out_with_its_reason(measured):
    bad = system_of(measured, name="slow", state="not reached")
    free = replace(system_of(measured, name="free"), usd_per_hour=None)
    shut = replace(system_of(measured, name="shut"), loop="closed")
    none = replace(system_of(measured, name="none"), capacity=None)
    few = system_of(measured, name="few", state="beyond")
    few = replace(few, top_token_throughput=replace(few.top_token_throughput, low=None, high=None))
    made = plan([bad, free, shut, none, few], asked(5))
    assert made.tiers == ()
    why = dict(made.excluded)
    assert [key.split(" on ")[1] for key in why] == ["slow", "free", "shut", "none", "few"]
    assert "why not" in why["m on slow"] and "price" in why["m on free"]
    assert "closed loop" in why["m on shut"] and "--slo" in why["m on none"]
    assert "no interval" in why["m on few"], "no money is spent on a figure that nobody can defend"
    assert made.sentence.startswith("No tier")
    assert render_markdown(fleet_sections(made))


def test_beyond_the_highest_load_is_a_lower_bound_and_said(measured):
    made = plan([system_of(measured, state="beyond")], asked(12))
    (tier,) = made.tiers
    assert tier.at_least and tier.capacity == 5.0 and tier.peak.instances == 3
    # 12 req/s over 4.5 of the 500 tokens/s a replica: the low end takes 3 as well
    assert "at most 3 instances, 21,900 USD a month (95 %: up to 3, 21,900 USD)" in made.sentence
    assert any("lower bound" in note for note in tier.notes)


def test_the_answer_carries_the_interval_of_what_it_rests_on(measured):
    # 43.2 req/s at 4.5 and 5.5 req/s a replica: 10 and 8 instances of 10 USD an hour
    made = plan([system_of(measured)], asked(36, headroom=1.2))
    assert "9 instances, 65,700 USD a month (95 %: 8 to 10, 58,400 to 73,000 USD)" in made.sentence


@pytest.mark.parametrize(("rows", "tier", "code", "words"), [
    ([bad(i) for i in range(20)], TIER, 3, "every run is INVALID (1)"),
    ([good(i) for i in range(20)], None, 1, "no price"),
    ([good(i, ttft_ms=900) for i in range(20)], TIER, 4, "not reached"),
])  # fmt: skip
def test_no_fleet_says_why_by_word_and_by_status(tmp_path, rows, tier, code, words):
    """A run that proves nothing is no tier that misses its SLO."""
    run = write_run(tmp_path / "run", rows, tier=tier, spec=replace(SPEC, slo={"ttft": 0.2}))
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"arrival_s": 0, "input_tokens": 8, "output_tokens": 4}\n' * 2)
    done = CliRunner().invoke(plan_fleet_verb, [str(trace), str(run), "--attain", "90%"], standalone_mode=False)
    assert done.exception is None and done.return_value == code, done.output
    text = " ".join(done.stdout.split())
    assert words in text and "planned with: ." not in text
    assert ("success: 0 of 20 succeeded" in text) == (code == 3), "an INVALID run is listed with its reason"


def test_what_was_measured_on_other_requests_or_mostly_on_drain_is_said(measured):
    system = system_of(measured)
    flow = replace(system.capacity.load, unit="req/s")
    capacity = replace(system.capacity, rates=system.capacity.rates | {"request_throughput": flow})

    def notes(tokens_each, drained=()):
        made = plan([replace(system, capacity=capacity, drained=drained)], asked(12, tokens_each=tokens_each))
        return " ".join(made.tiers[0].notes)

    # 500 tokens/s at 5 req/s: 100 tokens a request
    assert "a request of the demand has 130 tokens on average, one of those that were measured 100" in notes(130.0)
    assert "drain" not in notes(105.0) and "was measured" not in notes(105.0) and "were measured" not in notes(105.0)
    assert "drain: at 2.5, 5 req/s more than a tenth of the window" in notes(100.0, (2.5, 5.0))


def test_another_slo_is_a_line_of_its_own(measured):
    system = system_of(measured)
    strict = replace(system_of(measured, rate=2.5), slo="ttft_p95 <= 500 ms")
    (tier,) = plan([system], asked(10), others=[strict, replace(strict, tier="elsewhere")]).tiers
    assert [(s.changed, s.instances) for s in tier.sensitivities if "SLO" in s.changed] == [
        ("SLO ttft_p95 <= 500 ms", 4)
    ]


def test_a_plan_prints_in_every_form(measured):
    made = plan([system_of(measured, name="=cmd()", start_s=None)], asked(2, 12, 4))
    text = render_markdown(fleet_sections(made))
    assert "Runner-up" not in text and "start-up was not measured" in text
    assert (
        json.loads(msgspec.json.encode(made))["tiers"][0]["peak"]["usd_per_month"] == made.tiers[0].peak.usd_per_month
    )
    head, line, *_ = csv.reader(render_csv(fleet_sections(made)).splitlines())
    assert len(head) == len(line) == 14 and line[1] == "m on =cmd()"
    evil = Section(title="t", table=Table(("a", "b"), [("=cmd()", Cell("5 ms", note="-1 to 2", sort=0.005))]))
    assert render_csv([evil]).splitlines() == [",a,b,b: note", "t,'=cmd(),0.005,'-1 to 2"]


@given(st.lists(st.floats(0, 500), min_size=1, max_size=60), st.floats(1, 4), st.integers(1, 8), st.floats(0.1, 50))
def test_sums_add_up_and_more_demand_never_needs_less(rates, factor, held, capacity):
    offer = TierOffer(name="x", usd_per_hour=2.0, capacity=capacity, replicas_per_instance=held, start_s=70.0)
    day = by_minute(*rates, 0.1)
    for ahead in (False, True):
        small, large = autoscaled(offer, day, ahead=ahead), autoscaled(offer, day.grown(factor), ahead=ahead)
        assert large.instance_hours >= small.instance_hours - 1e-9
        assert small.usd == pytest.approx(small.instance_hours * 2.0)
        assert small.usd_per_hour * day.span_s / 3600 == pytest.approx(small.usd)
        assert small.peak_instances <= fleet(offer, day.worst_minute).instances
        assert 0 <= small.short_share <= 1
    assert autoscaled(offer, day, ahead=True).short_share == pytest.approx(0, abs=1e-6)


def test_a_trace_without_times_or_lengths_is_no_demand_or_half_of_one(tmp_path):
    from harness.cli.plan_fleet import read_demand
    from harness.options import ReadOptions

    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_s": 0, "input_tokens": 5, "output_tokens": 5}\n{"arrival_s": 61, "prompt": "hello"}\n')
    asked = read_demand(path, ReadOptions())
    assert asked.requests.requests == 2 and asked.tokens is None and asked.replayable is None
    path.write_text('{"input_tokens": 5, "output_tokens": 5}\n')
    with pytest.raises(UsageError, match="no arrival time"):
        read_demand(path, ReadOptions())
