"""Verdicts of audits whose truth is planted, and what must never turn one into a switch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.analysis.quality.cascade import cascade, halves
from harness.analysis.quality.claims import results_for_cost, times_cheaper, usual_claims
from harness.analysis.quality.estimate import Bounded, mean, quotient, ratio
from harness.analysis.quality.estimate import given as stated
from harness.analysis.quality.paired import Paired, paired
from harness.analysis.quality.verdict import (
    SWITCHES,
    AuditVerdict,
    CandidateModel,
    GradedRecords,
    Slice,
    decide,
    settled,
)

MARGIN = 0.05
CHEAP, DEAR, OPEN = Bounded(0.6, 0.5, 0.7), Bounded(1.3, 1.1, 1.5), Bounded(0.95, 0.8, 1.1)


def records(n: int = 1200, seed: int = 0, per_session: int = 4, tags: int = 4) -> GradedRecords:
    rng = np.random.default_rng(seed)
    tag = np.arange(n) // per_session % tags
    slices = {f"tag {k}": Slice(mask=tag == k, routable=True) for k in range(tags)}
    slices["last fifth"] = Slice(mask=np.arange(n) >= 0.8 * n, routable=False)
    current, session = (rng.random(n) < 0.6).astype(float), np.arange(n) // per_session
    return GradedRecords(
        current=current,
        session=session,
        weight=np.ones(n),
        slices=slices,
    )


def flipped(
    of: GradedRecords, helpful: float, harmful: float, seed: int = 1, where: np.ndarray | None = None
) -> np.ndarray:
    """Grades of a candidate that flips these shares of all records, by chance."""
    luck = np.random.default_rng(seed).random(len(of.current))
    lose, gain = harmful / of.current.mean(), helpful / (1 - of.current.mean())
    flips = np.where(of.current == 1, luck < lose, luck < gain)
    if where is not None:
        flips &= where
    return np.where(flips, 1 - of.current, of.current)


def candidate(grades: np.ndarray | None, bill: Bounded | None = CHEAP, **more: object) -> CandidateModel:
    return CandidateModel(
        name="small", grades=grades, bill=lambda mask: bill, slo_met=more.pop("slo_met", True), **more
    )  # type: ignore[arg-type]


def verdict(of: GradedRecords, one: CandidateModel, *others: CandidateModel) -> AuditVerdict:
    return decide(of, [one, *others], MARGIN)[0]


ALL = records()
EQUAL = flipped(ALL, 0.03, 0.03)
WORSE = flipped(ALL, 0.01, 0.13)


def test_as_good_and_cheaper_is_a_switch() -> None:
    found = verdict(ALL, candidate(EQUAL))
    assert (found.word, found.bill, found.switches) == ("switch", CHEAP, True)
    assert {part.name for part in found.slices} == {*ALL.slices}


@pytest.mark.parametrize(
    ("one", "word"),
    [
        (candidate(WORSE), "do not switch: worse"),
        (candidate(EQUAL, DEAR), "do not switch: not cheaper"),
        (candidate(EQUAL, stated(1.0)), "do not switch: not cheaper"),
        (candidate(EQUAL, slo_met=False), "do not switch: misses the SLO"),
        (candidate(EQUAL, OPEN), "not decided"),
        (candidate(EQUAL, None), "not decided"),
        (candidate(EQUAL, slo_met=None), "not decided"),
        (candidate(None), "quality not measured"),
        (candidate(EQUAL, evidence="simulated"), "quality not measured"),
        (candidate(EQUAL, evidence="dummy"), "quality not measured"),
        (candidate(EQUAL, problem="the server died at request 48"), "INVALID"),
        (candidate(np.where(np.arange(1200) < 30, math.nan, EQUAL)), "INVALID"),
        (candidate(np.where(np.arange(1200) < 20, math.nan, EQUAL)), "switch"),
    ],
)
def test_words(one: CandidateModel, word: str) -> None:
    found = verdict(ALL, one)
    assert found.word == word
    assert found.switches == (word in SWITCHES)
    assert (found.why is not None) == (word == "INVALID")


def test_what_is_open_is_named() -> None:
    assert verdict(ALL, candidate(EQUAL, OPEN)).open == ("money",)
    assert verdict(ALL, candidate(EQUAL, None, slo_met=None)).open == ("money", "SLO")
    few = verdict(records(100, per_session=4), candidate(flipped(records(100, per_session=4), 0.03, 0.03)))
    assert few.word == "not decided" and few.open == ("quality", "sessions")


def test_too_few_records_say_how_many_are_needed_within_a_fifth() -> None:
    """Truth: equal, 6 % of pairs differ, sessions of one. Asked of 20 pilots, for a margin of 2 points."""
    from harness.analysis.quality.power import records_needed

    true = records_needed(0.06, 0.02)
    asked = []
    for seed in range(20):
        of = records(500, seed, per_session=1)
        found = decide(of, [candidate(flipped(of, 0.03, 0.03, seed + 100))], 0.02)[0]
        if found.word == "not decided":
            assert found.open == ("quality",) and found.needed is not None and found.needed > 500
            assert found.needed_as_seen is None or found.needed_as_seen >= found.needed
            asked.append(found.needed)
    assert len(asked) > 10
    assert true is not None and 0.95 * true <= np.mean(asked) <= 1.3 * true  # from the upper limit, so rather more
    assert 0.8 * true <= np.median(asked) <= 1.3 * true


def test_fewer_sessions_than_thirty_are_no_switch() -> None:
    of = records(1200, per_session=60)
    found = verdict(of, candidate(of.current.copy()))
    assert found.word == "not decided" and "sessions" in found.open
    proven = verdict(replace(of, slices={}), candidate(flipped(of, 0.02, 0.01)))
    assert proven.not_worse is not None and proven.not_worse < 0.025
    assert proven.word == "not decided" and proven.open == ("sessions",) and proven.needed == 30 * 60


def test_no_number_of_records_mends_what_is_as_bad_as_the_margin() -> None:
    of = records(200)
    right, wrong = np.flatnonzero(of.current == 1), np.flatnonzero(of.current == 0)
    grades = of.current.copy()
    grades[right[:44]], grades[wrong[:32]] = 0, 1
    found = verdict(of, candidate(grades))
    assert found.word == "not decided" and found.needed is not None and found.needed_as_seen is None


def test_a_slice_that_got_worse_forbids_a_switch_and_the_others_may_go() -> None:
    of = records(4000)
    json = of.slices["tag 1"].mask
    grades = flipped(of, 0.0, 0.24, where=json & (np.arange(4000) % 3 == 0))
    one = candidate(grades)
    pooled = decide(of, [one], MARGIN)[0]
    assert pooled.not_worse is not None and pooled.not_worse <= 0.025
    assert pooled.word == "switch for slices" and pooled.named == ("tag 0", "tag 2", "tag 3")
    assert {part.name: part.state for part in pooled.slices}["tag 1"] == "worse"
    only_whole = replace(one, bill=lambda mask: CHEAP if mask.all() else DEAR)
    assert decide(of, [only_whole], MARGIN)[0].word == "do not switch: worse"
    sent: list[np.ndarray] = []
    decide(of, [replace(one, bill=lambda mask: sent.append(mask) or CHEAP)], MARGIN)  # type: ignore[func-returns-value]
    assert not (sent[-1] & json).any() and sent[-1].sum() == 3000


def test_a_slice_of_the_future_is_never_routed() -> None:
    of = records(4000)
    grades = np.where(of.slices["last fifth"].mask, of.current, flipped(of, 0.0, 0.2))
    for slices in (of.slices, {"last fifth": of.slices["last fifth"]}):
        found = verdict(replace(of, slices=slices), candidate(grades))
        assert {part.name: part.state for part in found.slices}["last fifth"] == "not worse"
        assert found.word == "do not switch: worse"


def test_what_is_left_of_a_named_slice_is_tested_as_a_whole() -> None:
    """A slice that passes at a wide margin, two thirds of it in one that got worse: the rest is 20 sessions."""
    of = records(240)
    bad = of.session < 40
    slices = {"all of it": Slice(mask=np.ones(240, np.bool_), routable=True), "bad": Slice(mask=bad, routable=True)}
    grades = np.where(bad, flipped(of, 0.0, 0.25), 1.0)
    found = decide(replace(of, slices=slices), [candidate(grades)], 0.5)[0]
    assert [part.state for part in found.slices] == ["not worse", "worse"]
    assert found.word == "do not switch: worse" and found.named == ("bad",)


def test_a_slice_that_checks_nothing_is_never_named() -> None:
    of = records(4000)
    grades = flipped(of, 0.0, 0.3, where=of.slices["tag 1"].mask)
    slices = {name: replace(one, measurable=name not in ("tag 0", "tag 2")) for name, one in of.slices.items()}
    found = verdict(replace(of, slices=slices), candidate(grades))
    assert found.word == "switch for slices" and found.named == ("tag 3",)


def test_an_undecided_slice_says_what_it_lacks() -> None:
    parts = decide(ALL, [candidate(EQUAL)], 0.03)[0].slices
    lacking = [part for part in parts if part.state == "not decided"]
    assert lacking and all(part.missing is not None and part.missing > 0 for part in lacking)
    assert [part.missing for part in parts if part.state == "not worse"] == [None] * (len(parts) - len(lacking))


def audit(seed: int, worse: float) -> tuple[GradedRecords, CandidateModel]:
    of = records(600, seed, per_session=3)
    return of, candidate(flipped(of, 0.05, 0.05 + worse, seed + 10_000))


def test_at_the_margin_few_audits_say_switch() -> None:
    """200 seeds, 2.5 % and two standard errors; a candidate that is worse by twice the margin hardly ever."""
    words = [verdict(*audit(seed, MARGIN)).word for seed in range(200)]
    assert words.count("switch") <= 200 * 0.025 + 2 * math.sqrt(200 * 0.025 * 0.975)
    assert sum(word in SWITCHES for word in words) <= 200 * 0.05 + 2 * math.sqrt(200 * 0.05 * 0.95)
    assert not any(verdict(*audit(seed, 2 * MARGIN)).switches for seed in range(60))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.12))
def test_order_names_and_hopeless_candidates_never_make_a_switch(seed: int, worse: float) -> None:
    of, one = audit(seed, worse)
    alone = verdict(of, one)
    order = np.random.default_rng(seed).permutation(len(of.session))
    shuffled = GradedRecords(
        current=of.current[order], session=of.session[order] * 7 + 3, weight=of.weight[order],
        slices={f"x {name}": replace(part, mask=part.mask[order]) for name, part in of.slices.items()},
    )  # fmt: skip
    assert one.grades is not None
    renamed = replace(one, name="other", grades=one.grades[order])
    assert verdict(shuffled, renamed).word == alone.word
    hopeless = candidate(np.zeros(len(of.session)))
    beside = decide(of, [hopeless, one, hopeless], MARGIN)
    assert not beside[1].switches or alone.switches
    assert [found.word for found in (beside[0], beside[2])] == ["do not switch: worse"] * 2


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.2), st.booleans())
def test_what_quality_has_settled_no_load_and_no_other_candidate_changes(seed: int, worse: float, part: bool) -> None:
    of, one = audit(seed, worse)
    assert one.grades is not None
    if part:
        one = replace(one, grades=np.where(of.slices["tag 1"].mask, one.grades, of.current))
    unknown = replace(one, bill=lambda _: None, slo_met=None)
    hopeless, good = candidate(np.zeros(len(of.session))), candidate(of.current.copy())
    for others in ([], [hopeless, good]):
        word = settled(of, unknown, MARGIN, 1 + len(others))
        for bill in (None, CHEAP, OPEN, DEAR):
            for slo_met in (None, True, False):
                found = decide(of, [*others, replace(one, bill=lambda _, b=bill: b, slo_met=slo_met)], MARGIN)[-1]
                missed = "do not switch: misses the SLO" if slo_met is False else word
                assert word is None or found.word == missed


def test_quality_settles_what_is_worse_and_what_no_cascade_mends() -> None:
    assert settled(ALL, candidate(WORSE), MARGIN, 1) == "do not switch: worse"
    assert settled(ALL, candidate(EQUAL), MARGIN, 1) is None and settled(ALL, candidate(None), MARGIN, 1) is None
    assert settled(ALL, candidate(WORSE, evidence="simulated"), MARGIN, 1) is None
    assert settled(ALL, candidate(np.where(np.arange(1200) < 30, math.nan, EQUAL)), MARGIN, 1) == "INVALID"
    of = records(4000)
    grades = flipped(of, 0.02, 0.25)
    mixed = asked(of, grades, np.where(grades == 1, 1.0, -1.0) + np.random.default_rng(5).normal(0, 0.7, 4000))
    assert settled(of, candidate(grades), MARGIN, 1) == "do not switch: worse"
    assert settled(of, candidate(grades, cascade=replace(mixed, bill=None, slo_met=None)), MARGIN, 1) is None


def test_two_good_candidates_share_the_level() -> None:
    of, one = audit(3, 0.0)
    two = decide(of, [one, one], MARGIN)
    alone = decide(of, [one], MARGIN)[0]
    assert two[0].not_worse == pytest.approx(min(1.0, 2 * (alone.not_worse or 0)))


def test_margins_are_shares() -> None:
    for margin in (0.0, 2.0, -0.1):
        with pytest.raises(ValueError, match="margin"):
            decide(ALL, [candidate(EQUAL)], margin)


# ------------------------------------------------------------------------------------------------------ cascades


def asked(of: GradedRecords, grades: np.ndarray, score: np.ndarray, **more: object):  # type: ignore[no-untyped-def]
    bill = more.pop("bill", lambda escalated: Bounded(*(one + escalated.mean() for one in (0.3, 0.28, 0.32))))
    return cascade(
        score, of.current, grades, of.session, of.weight, margin=MARGIN, bill=bill, slo_met=lambda _: True, **more
    )  # fmt: skip


def worse_pair(of: GradedRecords) -> Paired:
    found = paired(of.current, np.zeros(len(of.current)), of.session)
    assert found is not None
    return found


def test_halves_hold_whole_sessions() -> None:
    session = np.repeat(np.arange(300), 5)
    first = halves(session)
    assert all(len(set(first[session == one])) == 1 for one in range(300))
    assert 0.4 < first.mean() < 0.6
    assert (halves(session[::-1]) == first[::-1]).all() and (halves(session, 1) != first).any()


def test_a_score_that_knows_saves_money() -> None:
    of = records(4000)
    grades = flipped(of, 0.02, 0.25)
    score = np.where(grades == 1, 1.0, -1.0) + np.random.default_rng(5).normal(0, 0.7, 4000)
    found = asked(of, grades, score)
    assert found.passes(MARGIN) and 0.3 < found.kept < 0.9
    assert abs(found.held_out.difference) < MARGIN
    assert found.random < found.oracle and 0 < found.both_wrong < 0.5
    assert verdict(of, candidate(grades, cascade=found)).word == "switch as a cascade"
    for failing in (replace(found, bill=DEAR), replace(found, slo_met=False), replace(found, held_out=worse_pair(of))):
        assert verdict(of, candidate(grades, cascade=failing)).word == "do not switch: worse"
    halved = [half.held_out for half in found.halves]
    assert found.threshold == max(half.threshold for half in found.halves)
    assert found.held_out.n == 4000 == sum(half.n for half in halved)
    assert found.held_out.difference == pytest.approx(sum(half.n * half.difference for half in halved) / 4000)
    assert not replace(found, bill=DEAR).passes(MARGIN) and not replace(found, slo_met=None).passes(MARGIN)


def test_a_score_that_knows_nothing_keeps_little_and_its_held_out_half_says_so() -> None:
    """Worse by 30 points and a score of pure noise: as good as routing at random, which is not held to be as good."""
    passed, shortfall = 0, []
    for seed in range(40):
        of = records(800, seed)
        grades = flipped(of, 0.0, 0.3, seed + 50)
        found = asked(of, grades, np.random.default_rng(seed + 900).random(800), bill=lambda _: CHEAP)
        if found is not None:
            passed += found.passes(MARGIN) and (found.kept * 0.3 > MARGIN)
            shortfall += [half.held_out.difference - half.tuned.difference for half in found.halves if half.kept]
    assert passed <= 40 * 0.025 + 3 * math.sqrt(40 * 0.025)
    assert np.mean(shortfall) < 0  # what is tuned looks better where it was tuned


def test_what_has_no_score_is_escalated() -> None:
    of = records(800)
    assert asked(of, of.current.copy(), np.full(800, math.nan)) is None
    half = np.where(np.arange(800) % 2 == 0, 1.0, math.nan)
    found = asked(of, of.current.copy(), half)
    assert found is None or found.kept <= 0.5
    assert asked(of, of.current.copy(), np.ones(800)).kept == 1.0


# ----------------------------------------------------------------------------------------------- figures and claims


def test_ends_hold_the_truth_as_often_as_they_say() -> None:
    """USD per accepted answer over that of another model, and a ratio of two means: 300 draws of 60 sessions of 5."""
    held = np.zeros(3)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        session, weight = np.repeat(np.arange(60), 5), np.ones(300)
        shared = rng.normal(0, 0.5, 60)[session]
        a, c = (rng.random(300) < 0.5).astype(float), (rng.random(300) < 0.6).astype(float)
        usd_a, usd_c = (np.exp(shared + rng.normal(0, 0.5, 300)) for _ in range(2))
        found = ratio([usd_c, a], [usd_a, c], session, weight)
        assert found is not None
        held[0] += found.low <= 0.5 / 0.6 <= found.high
        average = mean(shared + rng.normal(0, 1, 300), session, weight)
        held[1] += average.low <= 0 <= average.high
        one = quotient(2 + shared + rng.normal(0, 1, 300), 1 + shared + rng.normal(0, 0.5, 300), session, weight)
        assert one is not None
        held[2] += one.low <= 2 <= one.high
    assert (held / 300 >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 300)).all()


def test_what_has_no_ratio() -> None:
    nothing, session, weight = np.zeros(4), np.arange(4), np.ones(4)
    assert ratio([weight], [nothing], session, weight) is None
    assert quotient(weight, np.array([1.0, -1, 1, -1]), session, weight) is None
    alone = mean(weight, np.zeros(4, np.int64), weight)
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="outside"):
        Bounded(1, 2, 3)
    assert Bounded(2, 1, 4).over(Bounded(2, 0, 3)) is None
    assert Bounded(2, 1, 4).over(Bounded(2, 1, 4)) == Bounded(1, 0.25, 4)
    assert -Bounded(2, 1, 4) == Bounded(-2, -4, -1)


@pytest.mark.parametrize(
    ("results", "cost", "outcome"),
    [
        (Bounded(0.95, 0.91, 0.99), Bounded(0.08, 0.07, 0.1), "holds"),
        (Bounded(0.95, 0.89, 0.99), Bounded(0.08, 0.07, 0.1), "not decided"),
        (Bounded(0.95, 0.91, 0.99), Bounded(0.1, 0.09, 0.11), "not decided"),
        (Bounded(0.8, 0.7, 0.89), Bounded(0.08, 0.07, 0.1), "fails"),
        (Bounded(0.95, 0.91, 0.99), Bounded(0.5, 0.4, 0.6), "fails"),
        (Bounded(0.95, 0.91, 0.99), Bounded(*[0.1 + 1e-16] * 3), "holds"),  # 0.3 / 3 USD, in binary
        (None, Bounded(0.5, 0.4, 0.6), "fails"),
        (None, Bounded(0.08, 0.07, 0.1), "not measured"),
        (Bounded(0.95, 0.91, 0.99), None, "not measured"),
    ],
)
def test_ninety_for_ten(results: Bounded | None, cost: Bounded | None, outcome: str) -> None:
    assert results_for_cost(results, cost, 0.9, 0.1).outcome == outcome


@pytest.mark.parametrize(
    ("cost", "not_worse", "outcome"),
    [
        (Bounded(0.25, 0.2, 0.33), True, "holds"), (Bounded(0.05, 0.04, 0.06), True, "holds"),
        (Bounded(0.25, 0.2, 0.33), None, "not decided"), (Bounded(0.25, 0.2, 0.33), False, "fails"),
        (Bounded(0.3, 0.2, 0.4), True, "not decided"), (Bounded(0.5, 0.4, 0.6), None, "fails"),
        (None, True, "not measured"),
    ],
)  # fmt: skip
def test_three_to_ten_times(cost: Bounded | None, not_worse: bool | None, outcome: str) -> None:
    assert times_cheaper(stated(1.0), cost, not_worse).outcome == outcome
    assert [one.text for one in usual_claims(None, cost, not_worse)][2] == "3 to 10 times cheaper"
