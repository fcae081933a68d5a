"""Slices of a trace: which there are, which can be routed, and quality against depth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from harness.analysis.quality.slices import RecordFacts, depth_slope, sessions_hit, slices

N = 1000
FACTS = RecordFacts(
    tags=[{"task": ("json", "chat", "code")[k % 3], **({"rare": "x"} if k % 50 == 0 else {})} for k in range(N)],
    kinds=["exact" if k % 2 else "json" for k in range(N)],
    input_tokens=np.where(np.arange(N) < 10, math.nan, np.arange(N) % 100),
    turn=np.arange(N) % 10 + 1,
    shares_prefix=np.arange(N) % 4 != 0,
    session=np.arange(N) // 10,
    weight=np.ones(N),
)


def test_every_cut_is_there_and_covers_what_it_says() -> None:
    found = slices(FACTS)
    assert {name for name, one in found.items() if not one.routable} == {"last fifth", "least like the rest"}
    assert found["last fifth"].mask.sum() == 200 and found["last fifth"].mask[-200:].all()
    assert sum(found[f"task {one}"].mask.sum() for one in ("json", "chat", "code")) == N
    assert sum(found[f"check {one}"].mask.sum() for one in ("json", "exact")) == N
    assert sum(one.mask.sum() for name, one in found.items() if name.startswith("input")) == N - 10
    depths = [one.mask for name, one in found.items() if name.startswith("turn")]
    assert len(depths) == 4 and sum(mask.sum() for mask in depths) == N
    assert found["least like the rest"].mask.sum() == 250 + 10  # begins like no other, or has the rare tag
    untagged = slices(replace(FACTS, tags=[{}] * N))
    assert (untagged["least like the rest"].mask == ~FACTS.shares_prefix).all()


def test_small_slices_and_the_whole_are_none() -> None:
    few = replace(FACTS, tags=[{"who": "one"} if k < 3 else {"who": "all"} for k in range(N)], kinds=["json"] * N)
    found = slices(few)
    assert "who one" not in found and "check json" not in found and "who all" in found


def test_a_slice_that_a_constant_answer_passes_cannot_be_measured() -> None:
    found = slices(FACTS, frozenset({"task chat"}))
    assert [name for name, one in found.items() if not one.measurable] == ["task chat"]


def test_quality_against_depth_has_its_slope() -> None:
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        current = np.ones(N)
        candidate = (rng.random(N) > 0.05 * (FACTS.turn - 1)).astype(float)
        found = depth_slope(current, candidate, FACTS)
        assert found is not None
        held += found.low <= -0.05 <= found.high
    assert held / 200 >= 0.95 - 4 * math.sqrt(0.05 * 0.95 / 200)
    assert found.value == pytest.approx(-0.05, abs=0.02)
    assert depth_slope(np.ones(N), np.ones(N), replace(FACTS, turn=np.ones(N, np.int64))) is None
    assert depth_slope(np.full(N, math.nan), np.ones(N), FACTS) is None


def test_users_leave_for_the_worst_answer_of_a_session() -> None:
    session = np.repeat(np.arange(100), 3)
    current, candidate = np.ones(300), np.ones(300)
    current[0], candidate[:30:3] = 0, 0  # one session today, ten then, of which one is the same
    found = sessions_hit(current, candidate, session)
    assert found is not None and found.value == pytest.approx(0.09) and found.low > 0
    candidate[:30] = 0
    again = sessions_hit(current, candidate, session)
    assert again is not None and again.value == pytest.approx(0.09), "a session is hit once"
    assert sessions_hit(np.where(session < 10, math.nan, current), candidate, session) is not None
    assert sessions_hit(current, candidate, np.arange(300)) is None
