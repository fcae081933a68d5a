"""A judge that is fair is used; one that is biased, down, too few labels or fooled is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.analysis.quality.judging import JudgeTrust, Labelled, corrected, kappa, trust

MARGIN = 0.05


def labelled(n: int = 400, right: float = 0.9, kind: float = 0.0, seed: int = 0, silent: float = 0.0) -> Labelled:
    """A judge that is right in this share, and calls the candidate's wrong answers right in ``kind`` more."""
    rng = np.random.default_rng(seed)
    label, candidate = (rng.random(n) < 0.6).astype(float), (np.arange(n) % 2).astype(float)
    judged = np.where(rng.random(n) < right, label, 1 - label)
    judged = np.where((label == 0) & (candidate == 1) & (rng.random(n) < kind), 1.0, judged)
    judged = np.where(rng.random(n) < silent, math.nan, judged)
    return Labelled(judged=judged, label=label, candidate=candidate, session=np.arange(n) // 2)


def told(one: Labelled, **more: float) -> JudgeTrust:
    return trust(one, MARGIN, **{"canaries": 20, "canaries_accepted": 0, **more})  # type: ignore[arg-type]


def test_a_fair_judge_is_used() -> None:
    found = told(labelled(right=0.95))
    assert found.faults == () and found.labels == 400
    assert found.kappa is not None and found.kappa.low < 0.89 < found.kappa.high
    assert found.sensitivity == pytest.approx(0.95, abs=0.04) and found.specificity == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize(
    ("one", "more", "fault"),
    [
        (labelled(40), {}, "too few labels"),
        (labelled(right=0.6), {}, "agreement not shown"),
        (labelled(kind=0.6), {}, "kinder to one model"),
        (labelled(), {"canaries_accepted": 1}, "accepted a canary"),
        (labelled(), {"canaries": 5}, "too few canaries"),
        (labelled(), {"flips": 0.3}, "turns with the order"),
        (labelled(silent=0.1), {}, "too often no verdict"),
        (
            Labelled(judged=np.ones(100), label=np.ones(100), candidate=np.ones(100), session=np.arange(100)),
            {},
            "agreement not shown",
        ),
        (
            Labelled(judged=np.full(9, math.nan), label=np.ones(9), candidate=np.ones(9), session=np.arange(9)),
            {},
            "too often no verdict",
        ),
        (
            Labelled(judged=np.empty(0), label=np.empty(0), candidate=np.empty(0), session=np.empty(0, np.int64)),
            {},
            "too few labels",
        ),
    ],
)
def test_another_is_not(one: Labelled, more: dict[str, float], fault: str) -> None:
    assert fault in told(one, **more).faults


def test_a_judge_that_accepts_all_is_never_used() -> None:
    one = labelled()
    always = Labelled(judged=np.ones(400), label=one.label, candidate=one.candidate, session=one.session)
    assert "agreement not shown" in told(always).faults


def test_a_bias_that_few_labels_cannot_exclude_is_a_fault() -> None:
    label, candidate = np.tile([1.0, 1.0, 0.0, 0.0], 15), np.tile([0.0, 1.0], 30)
    judged = label.copy()
    judged[[3, 23, 43]] = 1  # 3 of the candidate's 15 wrong answers let through: 10 points, from 0 to 21
    found = told(Labelled(judged=judged, label=label, candidate=candidate, session=np.arange(60)))
    assert found.kinder is not None and found.kinder.low <= 0 < MARGIN < found.kinder.value
    assert found.faults == ("kinder to one model",)


def test_kappa_as_published() -> None:
    """Two readers of 50 proposals, 20 and 15 agreed, 5 and 10 not: kappa 0.4 (the textbook example)."""
    one = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 5, 10, 15])
    other = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 5, 10, 15])
    found = kappa(one, other, np.arange(50))
    assert found is not None and found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - 2.01 * 0.128, abs=0.03)  # Fleiss, Cohen and Everitt's standard error
    assert kappa(one, other, np.zeros(50, np.int64)) is None
    assert kappa(np.ones(9), np.ones(9), np.arange(9)) is None


def test_corrected_shares_hold_the_truth() -> None:
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        found = told(labelled(300, right=0.85, seed=seed))
        truth = rng.random(1000) < 0.7
        judged = np.where(rng.random(1000) < 0.85, truth, ~truth).mean()
        share = corrected(float(judged), 1000, found, right=180, wrong=120)
        assert share is not None
        held += share.low <= 0.7 <= share.high
    assert held / 300 >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 300)
    blind = told(labelled(right=0.4))
    assert corrected(0.5, 100, blind, right=50, wrong=50) is None


def test_bias_is_seen_at_the_level_it_claims() -> None:
    faulted = sum("kinder to one model" in told(labelled(1200, right=0.97, seed=seed)).faults for seed in range(200))
    assert faulted / 200 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)
