"""The bill of a request and of an accepted answer, by hand and against planted truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.quality.bill import (
    Attempts,
    CostedModel,
    Costs,
    Rented,
    ServedRequests,
    Stated,
    bill,
    break_even,
    by_record,
    serve,
)
from harness.analysis.quality.estimate import Bounded, mean, quotient, ratio
from harness.analysis.quality.estimate import given as stated
from harness.analysis.quality.retries import all_fail, likeness, tries

NAN = math.nan


def attempts(usd: float, gate: list[list[float]], accepted: list[list[float]]) -> Attempts:
    return Attempts(usd=np.full((len(gate), len(gate[0])), usd), gate=np.array(gate), accepted=np.array(accepted))


SMALL = attempts(
    1.0,
    [[1, NAN, NAN], [0, 1, NAN], [0, 0, 0], [1, NAN, NAN]],
    [[1, NAN, NAN], [0, 1, NAN], [0, 0, 0], [0, NAN, NAN]],
)
BIG = attempts(10.0, [[1], [1], [1], [1]], [[1], [1], [1], [0]])


def test_asked_until_the_gate_passes_and_handed_to_a_person() -> None:
    found = serve(SMALL, 3)
    assert found.calls.tolist() == [1, 2, 3, 1] and found.usd.tolist() == [1, 2, 3, 1]
    assert found.rejected.tolist() == [0, 0, 1, 0] and found.accepted.tolist() == [1, 1, 0, 0]
    assert found.undetected.tolist() == [0, 0, 0, 1] and found.escalated.tolist() == [0, 0, 0, 0]


def test_escalation_pays_both_calls() -> None:
    found = serve(SMALL, 3, BIG)
    assert found.usd.tolist() == [1, 2, 13, 1] and found.escalated.tolist() == [0, 0, 1, 0]
    assert found.accepted.tolist() == [1, 1, 1, 0] and not found.rejected.any()
    once = serve(SMALL, 1, BIG)
    assert once.usd.tolist() == [1, 11, 11, 1] and once.calls.tolist() == [1, 1, 1, 1]


def test_gold_is_no_gate() -> None:
    """A gate that lets everything through asks once, and its wrong answers go out."""
    blind = replace(SMALL, gate=np.ones((4, 3)))
    found = serve(blind, 3)
    assert found.calls.tolist() == [1, 1, 1, 1] and found.undetected.tolist() == [0, 1, 1, 1]


SESSION, WEIGHT = np.arange(4), np.ones(4)


def test_every_part_of_the_bill() -> None:
    user = Stated(
        wage_usd_per_hour=60, review_minutes=2, review_share=0.5, failure_usd=7, gate_usd=0.1, engineering_hours=10,
        months=5, requests_per_month=1000,
    )  # fmt: skip
    served = serve(SMALL, 3)
    found = bill(served, user, SESSION, WEIGHT)
    assert found.calls.value == pytest.approx(7 / 4) and found.gate.value == pytest.approx(0.7 / 4)
    assert found.review is not None and found.review.value == pytest.approx(2 * (1 + 3 * 0.5) / 4)
    assert found.failures is not None and found.failures.value == pytest.approx(7 / 4)
    assert found.per_request.value == pytest.approx((7 + 0.7 + 5 + 7) / 4)
    assert found.per_accepted is not None and found.per_accepted.value == pytest.approx((7 + 0.7 + 5 + 7) / 2)
    assert user.fixed_usd_per_month == 120 and found.accepted.value == 0.5 and found.calls_per_request.value == 7 / 4


def test_what_was_not_stated_is_not_in_the_bill() -> None:
    found = bill(serve(SMALL, 3), Stated(), SESSION, WEIGHT)
    assert found.review is None and found.failures is None and found.per_request.value == 7 / 4
    nothing = bill(serve(replace(SMALL, accepted=SMALL.accepted * 0), 3), Stated(), SESSION, WEIGHT)
    assert nothing.per_accepted is None


def served(n: int, usd: float, wrong: float, seed: int = 0) -> ServedRequests:
    rng = np.random.default_rng(seed)
    bad = (rng.random(n) < wrong).astype(float)
    return ServedRequests(
        calls=np.ones(n), usd=usd * rng.uniform(0.5, 1.5, n), escalated=np.zeros(n), rejected=np.zeros(n),
        undetected=bad, accepted=1 - bad,
    )  # fmt: skip


N = 4000
SESSIONS, ONES = np.arange(N) // 4, np.ones(N)
FLAGSHIP, CHEAP = served(N, 0.010, 0.05, 1), served(N, 0.004, 0.15, 2)


def test_where_the_saving_ends() -> None:
    """0.6 cents saved per request, 10 more failures in 100: gone at 6 cents a failure, 3.6 s of a 60 USD hour each."""
    found = break_even(FLAGSHIP, CHEAP, Stated(wage_usd_per_hour=60, failure_usd=0.03), SESSIONS, ONES)
    for one, truth in (
        (found.failure_usd, 0.06), (found.minutes_per_failure, 0.06), (found.failure_rate, 0.05 + 0.006 / 0.03),
        (found.minutes_per_100, 100 * (0.006 - 0.1 * 0.03)),
    ):  # fmt: skip
        assert one is not None and one.low <= truth <= one.high and one.value == pytest.approx(truth, rel=0.2)
    assert found.requests_per_month is None


def test_a_price_at_the_break_even_makes_both_bills_alike() -> None:
    at = break_even(FLAGSHIP, CHEAP, Stated(), SESSIONS, ONES).failure_usd
    assert at is not None
    user = Stated(failure_usd=at.value)
    assert by_record(FLAGSHIP, user).mean() == pytest.approx(by_record(CHEAP, user).mean())
    rate = break_even(FLAGSHIP, CHEAP, user, SESSIONS, ONES).failure_rate
    assert rate is not None and rate.value == pytest.approx(CHEAP.undetected.mean())


def test_volume_that_repays_the_engineering() -> None:
    user = Stated(wage_usd_per_hour=100, engineering_hours=120, months=12)
    found = break_even(FLAGSHIP, CHEAP, user, SESSIONS, ONES).requests_per_month
    assert found is not None and found.low <= 1000 / 0.006 <= found.high
    assert break_even(CHEAP, FLAGSHIP, user, SESSIONS, ONES).requests_per_month is None


def test_nothing_turns_what_is_cheaper_and_fails_less() -> None:
    better = served(N, 0.004, 0.01, 3)
    found = break_even(FLAGSHIP, better, Stated(wage_usd_per_hour=60), SESSIONS, ONES)
    assert found.failure_usd is None and found.minutes_per_failure is None


def costs(current: CostedModel, candidate: CostedModel, rate: float, user: Stated | None = None) -> Costs:
    return Costs(
        current=current,
        candidate=candidate,
        stated=user or Stated(),
        session=SESSIONS,
        weight=ONES,
        requests_per_s=rate,
    )


ALL, NONE, HALF = np.ones(N, np.bool_), np.zeros(N, np.bool_), np.arange(N) < N // 2
FREE = replace(FLAGSHIP, usd=np.zeros(N), undetected=np.zeros(N))
FLEET = Rented(usd_per_hour=2.0, capacity=Bounded(10, 9, 11))
FASTER = Rented(usd_per_hour=2.0, capacity=Bounded(20, 18, 22))


def test_whole_instances_save_nothing_where_one_carries_all() -> None:
    assert FLEET.instances(25) == Bounded(3, 3, 3) and FLEET.instances(95) == Bounded(10, 9, 11)
    assert (
        FLEET.instances(0) == stated(0)
        and Rented(usd_per_hour=1, capacity=Bounded(1, 0, 2)).instances(1).high == math.inf
    )
    small = costs(CostedModel(served=FREE, fleet=FLEET), CostedModel(served=FREE, fleet=FASTER), 5.0)
    assert small.routed(ALL) == stated(1.0)
    large = costs(CostedModel(served=FREE, fleet=FLEET), CostedModel(served=FREE, fleet=FASTER), 1000.0)
    found = large.routed(ALL)
    assert found is not None and found.value == pytest.approx(0.5, abs=0.01) and found.low < 0.5 < found.high


def test_both_fleets_are_paid_for_where_traffic_is_routed_or_escalated() -> None:
    one = costs(CostedModel(served=FREE, fleet=FLEET), CostedModel(served=FREE, fleet=FLEET), 5.0)
    assert one.routed(NONE) == stated(1.0) and one.routed(HALF) == stated(2.0)
    assert one.cascade(HALF) == stated(2.0) and one.cascade(NONE) == stated(1.0)


def test_retries_fill_instances() -> None:
    twice = replace(FREE, calls=np.full(N, 2.0))
    found = costs(CostedModel(served=FREE, fleet=FLEET), CostedModel(served=twice, fleet=FLEET), 1000.0).routed(ALL)
    assert found is not None and found.value == pytest.approx(2.0)


def test_list_prices_are_paired_by_record() -> None:
    one = costs(CostedModel(served=FLAGSHIP, fleet=None), CostedModel(served=CHEAP, fleet=None), 5.0)
    whole, half = one.routed(ALL), one.routed(HALF)
    assert whole is not None and whole.low < 0.4 < whole.high < 0.45
    assert half is not None and half.value == pytest.approx(0.7, abs=0.02)
    escalated = one.cascade(HALF)
    assert escalated is not None and escalated.value == pytest.approx(0.9, abs=0.02)
    hidden = costs(one.current, one.candidate, 5.0, Stated(failure_usd=0.3)).routed(ALL)
    assert hidden is not None and hidden.low > 1.5  # cheaper by 60 % per call, and dearer in all


def test_engineering_is_in_the_bill_of_a_change_alone() -> None:
    user = Stated(wage_usd_per_hour=100, engineering_hours=100, months=1)
    one = costs(CostedModel(served=FREE, fleet=FLEET), CostedModel(served=FREE, fleet=FLEET), 5.0, user)
    assert one.routed(NONE) == stated(1.0)
    found = one.routed(ALL)
    assert found is not None and found.value == pytest.approx((1460 + 10_000) / 1460)


# ------------------------------------------------------------------------------------------------------- retries


def test_retries_as_they_were_measured() -> None:
    """SmolLM2-135M at temperature 0.7, three samples of 240 prompts: successes 0/1/2/3 of 88/74/47/31 prompts."""
    successes = np.repeat([0, 1, 2, 3], [88, 74, 47, 31])
    found = tries(successes, 3, 3)
    assert found[2].accepted == pytest.approx(152 / 240) and found[2].if_independent == pytest.approx(0.741, abs=0.001)
    assert found[2].calls_per_accepted == pytest.approx(3.33, abs=0.01)
    assert likeness(successes, 3, np.ones(240)) == pytest.approx(0.27, abs=0.005)
    assert found[1].accepted - found[0].accepted == pytest.approx(0.26 * (1 - found[0].accepted), abs=0.005)


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.6])
def test_planted_likeness_is_found_and_more_tries_are_modelled(rho: float) -> None:
    rng = np.random.default_rng(4)
    size = (1 - rho) / rho
    p = rng.beta(0.4 * size, 0.6 * size, 20_000)
    first, truth = rng.binomial(4, p), float(((1 - p) ** 8).mean())
    assert likeness(first, 4, np.ones(20_000)) == pytest.approx(rho, abs=0.02)
    found = tries(first, 4, 8)
    assert [one.modelled for one in found] == [False] * 4 + [True] * 4
    assert 1 - found[7].accepted == pytest.approx(truth, abs=0.015)
    assert found[3].accepted == pytest.approx(1 - float(((1 - p) ** 4).mean()), abs=0.01)
    assert all(one.accepted < one.if_independent for one in found[1:])
    assert all(later.accepted >= sooner.accepted for sooner, later in itertools.pairwise(found))


def test_all_fail_is_unbiased_and_refuses_what_was_not_observed() -> None:
    assert all_fail(np.array([1]), 3, 2, np.ones(1)) == pytest.approx(1 / 3)
    assert all_fail(np.array([0, 3]), 3, 3, np.array([3.0, 1.0])) == 0.75
    with pytest.raises(ValueError, match="tries"):
        all_fail(np.array([1]), 3, 4, np.ones(1))
    assert likeness(np.array([1, 0]), 1, np.ones(2)) is None and likeness(np.array([2, 2]), 2, np.ones(2)) is None
    never = tries(np.zeros(5, np.int64), 2, 4)
    assert never[3].calls_per_accepted is None and never[3].calls == 4


def test_cheaper_per_token_and_dearer_per_accepted_answer() -> None:
    """int8 of SmolLM2-135M: 113 against 93 tokens/s, 5,992 against 5,481 tokens, 134 against 151 of 312 accepted."""
    rng, n = np.random.default_rng(0), 312

    def of(tokens: int, right: int, per_s: float) -> ServedRequests:
        spread = rng.dirichlet(np.full(n, 2.0)) * tokens
        good = rng.permutation(np.arange(n) < right).astype(float)
        return replace(served(n, 1.0, 0.0), usd=spread / per_s, accepted=good, undetected=1 - good)

    bf16, int8 = of(5481, 151, 93), of(5992, 134, 113)
    each, ones = np.arange(n), np.ones(n)
    request = ratio([int8.usd], [bf16.usd], each, ones)
    answer = ratio([int8.usd, bf16.accepted], [bf16.usd, int8.accepted], each, ones)
    assert request is not None and request.value == pytest.approx(0.90, abs=0.005)
    assert answer is not None and answer.value == pytest.approx(1.014, abs=0.001) and answer.low < 1 < answer.high


def test_more_records_of_the_same_sessions_say_nothing_new() -> None:
    over, under = np.array([3.0, 2.5, 3.5, 2.8]), np.array([2.0, 1.9, 2.2, 2.1])
    few, many = (np.arange(4), np.ones(4)), (np.repeat(np.arange(4), 25), np.ones(100))
    for estimate, sides in ((mean, [over]), (quotient, [over, under])):
        one = estimate(*sides, *few)  # type: ignore[operator]
        other = estimate(*(np.repeat(side, 25) for side in sides), *many)  # type: ignore[operator]
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))
        assert one.low < one.value < one.high
