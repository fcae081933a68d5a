import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.fleet import Demand, Offer, autoscaled, demand, fleet, sensitivities, spare_instances

L4 = Offer(name="l4", usd_per_hour=0.8, capacity=2.0)


def by_minute(*rates):
    per_minute = np.array(rates, dtype=float)
    return Demand(
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
    found = fleet(Offer(name="box", usd_per_hour=10.0, capacity=2.0, replicas_per_instance=3), 7.0)
    assert (found.replicas, found.instances, found.spares) == (4, 2, 0)
    assert found.usd_per_hour == 20.0 and found.usd_per_month == 14_600 and found.usd_per_year == 175_200
    assert found.utilisation == pytest.approx(7 / 12)


def test_a_demand_that_fits_exactly_takes_no_instance_more():
    assert fleet(L4, 6.0).instances == 3
    assert fleet(L4, 6.0, headroom=1.1).instances == 4
    assert fleet(Offer(name="x", usd_per_hour=1, capacity=0.1), 0.3).instances == 3  # 0.3 / 0.1 is above 3 in floats


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
    offer = Offer(
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
    at_once = autoscaled(L4, day, start_s=0)
    # it asks for 4 at the end of minute 3, so minute 3 alone is short, by 6 of 8 req/s
    assert at_once.instance_hours == pytest.approx((1 * 4 + 4 * 4) / 60)
    assert at_once.short_share == pytest.approx(6 / 46)
    late = autoscaled(L4, day, start_s=120)
    assert late.instance_hours == at_once.instance_hours  # what starts is paid
    assert late.short_share == pytest.approx((6 * 3) / 46)
    assert at_once.peak_instances == 4


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


def test_sensitivities_change_one_thing_at_a_time():
    found = {s.changed: s for s in sensitivities(L4, 10.0, capacities=[("capacity 1", 1.0)])}
    assert found["demand x 2"].instances == 10
    assert found["price x 1.2"].instances == 5 and found["price x 1.2"].usd_per_month == pytest.approx(5 * 0.96 * 730)
    assert found["capacity 1"].instances == 10
