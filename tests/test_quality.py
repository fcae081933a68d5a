"""The statistics of the audit against published tables, exact enumeration, and what must not matter."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.analysis.quality.distributions import t_quantile, t_tail, wilson
from harness.analysis.quality.paired import (
    ALPHA,
    FEWEST_SESSIONS,
    Paired,
    holm,
    like_another_run,
    newcombe_interval,
    paired,
    tango_interval,
    tango_score,
)
from harness.analysis.quality.power import power, provable_margin, records_needed
from tests.lab.audit import CASES, Case, called_not_worse, compared, covered

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(
    ("p", "degrees", "t"),
    [(0.975, 1, 12.7062), (0.975, 10, 2.2281), (0.995, 29, 2.7564), (0.9995, 5, 6.8688), (0.95, 120, 1.6577)],
)
def test_students_t_is_the_printed_table(p: float, degrees: float, t: float) -> None:
    assert t_quantile(p, degrees) == pytest.approx(t, abs=5e-5)
    assert t_quantile(1 - p, degrees) == pytest.approx(-t, abs=5e-5)
    assert t_tail(t_quantile(p, degrees), degrees) == pytest.approx(1 - p, rel=1e-6)


def test_students_t_at_its_ends() -> None:
    assert t_quantile(0.975, 1e9) == pytest.approx(Z, abs=1e-6)
    assert t_tail(math.inf, 3) == 0 and t_tail(-math.inf, 3) == 1
    assert t_quantile(0.975, 0) == math.inf and t_tail(5.0, 0) == 1  # one session knows nothing


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "tango", "newcombe"),
    [
        # Fagerland, Lydersen and Laake, Statistics in Medicine 33(16), 2014: airway reactivity of 21 children
        (1, 1, 7, 12, (-0.517, -0.026), (-0.507, -0.026)),
        # The same authors' "Statistical Analysis of Contingency Tables", 2017, chapter 8: response to therapy
        (59, 6, 16, 80, (-0.1240, -0.0054), (-0.1186, -0.0046)),
    ],
)
def test_intervals_are_the_published_ones(
    a: int, b: int, c: int, d: int, tango: tuple[float, float], newcombe: tuple[float, float]
) -> None:
    assert tango_interval(b, c, a + b + c + d, Z) == pytest.approx(tango, abs=6e-4 if a == 1 else 6e-5)
    assert newcombe_interval(a, b, c, d, Z) == pytest.approx(newcombe, abs=6e-4 if a == 1 else 6e-5)


@pytest.mark.parametrize(("cells", "ends"), [((36, 12, 2, 0), (0.0569, 0.3404)), ((20, 12, 2, 16), (0.0562, 0.3292))])
def test_newcombes_own_examples(cells: tuple[int, int, int, int], ends: tuple[float, float]) -> None:
    """Newcombe, Statistics in Medicine 17(22), 1998, table II, method 10."""
    assert newcombe_interval(*cells, Z) == pytest.approx(ends, abs=6e-5)


def test_mcnemar_is_its_case_at_no_difference() -> None:
    score = tango_score(np.array([31.0, 5.0]), np.array([14.0, 5.0]), np.array([312.0, 40.0]), 0.0)
    assert score[0] ** 2 == pytest.approx((31 - 14) ** 2 / (31 + 14))
    assert score[1] == 0


def test_no_flip_at_all_is_not_proof_by_itself() -> None:
    """Without any discordant pair 2 points need 189 pairs, and one harmful flip 280."""
    nothing, one = np.zeros(300), np.ones(300)
    n = np.arange(1.0, 301)
    for c, needed in ((nothing, 189), (one, 280)):
        proven = tango_score(nothing, c, n, -0.02) > Z
        assert int(n[proven][0]) == needed and proven[needed:].all()


def test_wilson_at_its_ends() -> None:
    assert wilson(0, 10, Z)[0] == 0 and wilson(10, 10, Z)[1] == 1
    assert wilson(0, 10, Z)[1] == pytest.approx(0.2775, abs=1e-4)
    assert wilson(0, 0, Z) == (0, 1)


def outcomes(n: int, b: float, c: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of pairs of either kind and their probability, but for what is rarer than 1e-15 in all."""
    most = [min(n, int(n * p + 8 * math.sqrt(n * p + 1)) + 4) for p in (b, c)]
    grid_b, grid_c = np.meshgrid(*(np.arange(m + 1) for m in most), indexing="ij")
    possible = grid_b + grid_c <= n
    many_b, many_c = grid_b[possible], grid_c[possible]
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    same = n - many_b - many_c
    log_p = log_factorial[n] - log_factorial[many_b] - log_factorial[many_c] - log_factorial[same]
    for many, p in ((many_b, b), (many_c, c)):
        log_p = log_p + np.where(many > 0, many * math.log(p) if p > 0 else -np.inf, 0.0)
    return many_b, many_c, np.exp(log_p + same * math.log1p(-b - c))


def exactly_called_not_worse(n: int, discordance: float, margin: float, difference: float) -> float:
    b, c, p = outcomes(n, (discordance + difference) / 2, (discordance - difference) / 2)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    return float(p[tango_score(b.astype(float), c.astype(float), np.full(b.shape, float(n)), -margin) > Z].sum())


@pytest.mark.parametrize(
    ("n", "discordance", "margin", "wrong"),
    [
        (100, 0.05, 0.05, 0.006), (150, 0.06, 0.05, 0.016), (300, 0.03, 0.02, 0.015), (300, 0.06, 0.02, 0.023),
        (300, 0.12, 0.05, 0.023), (1000, 0.03, 0.02, 0.022), (1000, 0.2, 0.02, 0.025), (3000, 0.06, 0.02, 0.024),
    ],
)  # fmt: skip
def test_a_candidate_at_the_margin_is_seldom_called_not_worse(
    n: int, discordance: float, margin: float, wrong: float
) -> None:
    """Exact, not simulated; Wald's interval is wrong in up to 11.8 % of the same cases."""
    found = exactly_called_not_worse(n, discordance, margin, -margin)
    assert found == pytest.approx(wrong, abs=6e-4)
    assert found <= 0.03


@pytest.mark.parametrize("margin", [0.02, 0.05])
@pytest.mark.parametrize("discordance", [0.01, 0.02, 0.05, 0.1, 0.2])
def test_the_records_asked_for_prove_it_four_times_of_five(discordance: float, margin: float) -> None:
    n = records_needed(discordance, margin)
    assert n is not None
    assert 0.78 <= exactly_called_not_worse(n, discordance, margin, 0.0) <= 0.9
    if n * discordance >= 5:  # fewer flips than that come in steps too large for it
        assert exactly_called_not_worse(round(0.8 * n), discordance, margin, 0.0) < 0.8  # N is right within a fifth
    assert provable_margin(n, discordance, sessions=n) == pytest.approx(margin, abs=2e-4)


def test_records_needed_at_its_edges() -> None:
    assert records_needed(0.05, 0.02, difference=-0.02) is None  # no number of records will do
    assert records_needed(0.0, 0.02) == pytest.approx(189, abs=2)
    assert records_needed(0.05, 0.02, difference=0.02) < records_needed(0.05, 0.02)  # type: ignore[operator]
    twice = records_needed(0.1, 0.02, design_effect=2.0, per_session=10)
    assert twice == pytest.approx(2 * records_needed(0.1, 0.02), rel=0.01)  # type: ignore[operator]
    assert records_needed(0.01, 0.5, per_session=10) == 10 * FEWEST_SESSIONS
    with pytest.raises(ValueError, match="margin"):
        records_needed(0.1, 2)
    assert provable_margin(50, 0.1, sessions=1) is None
    assert power(100, 0.1, 0.02, sessions=5) < power(100, 0.1, 0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sessions_do_not_lower_the_bar(case: Case) -> None:
    """Small draws of `make study`: at most 3.5 % wrong, within what 150 draws allow (4.5 standard errors)."""
    assert called_not_worse(case, 150, 7).share <= 0.035 + 4.5 * math.sqrt(0.035 * 0.965 / 150)
    assert covered(case, 60, 7).share >= 0.95 - 4.5 * math.sqrt(0.05 * 0.95 / 60)


def test_records_alone_would_lower_it() -> None:
    """What the design effect is for: the same draws, each record a session of its own."""
    case, wrong = Case(15, 20, 0.3, 0.12, 0.05), 0
    for seed in range(150):
        one = compared(case, seed, -case.margin)
        alone = Paired(
            n=one.n, sessions=one.n, current=one.current, candidate=one.candidate, helpful=one.helpful,
            harmful=one.harmful, discordance=one.discordance, design_effect=1.0,
        )  # fmt: skip
        wrong += alone.p_worse_by(case.margin) <= ALPHA
    assert wrong / 150 > 0.12


def single(b: int, c: int, n: int, current: int) -> Paired:
    """n records, each its own session: ``b`` flips to right, ``c`` flips to wrong, the first ``current`` were right."""
    before = (np.arange(n) < current).astype(float)
    after = before.copy()
    after[:c] = 0
    after[n - b :] = 1
    found = paired(before, after, np.arange(n))
    assert found is not None
    return found


def test_int8_as_it_was_measured() -> None:
    """SmolLM2-135M against its int8, 312 prompts: 31 harmful flips, 14 helpful."""
    found = single(14, 31, 312, 151)
    assert found.current == 151 / 312 and found.candidate == 134 / 312
    assert (found.harmful, found.helpful) == (31 / 312, 14 / 312)
    assert found.design_effect == pytest.approx(1.0, abs=0.01)
    assert found.interval() == pytest.approx((-0.099, -0.013), abs=1.5e-3)
    assert found.p_as_good() < 0.01 < found.p_worse_by(0.02)
    assert found.newcombe() == pytest.approx(found.interval(), abs=0.01)


grades = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, math.nan]), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9)),
    min_size=1, max_size=60,
)  # fmt: skip


@given(grades, st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter_and_a_swap_turns_the_sign(rows, random) -> None:
    def of(rows, swap=False):
        a, c, s = (np.array(column) for column in zip(*rows, strict=True))
        return paired(c, a, s) if swap else paired(a, c, s)

    one = of(rows)
    if one is None:
        assert all(math.isnan(a) for a, _, _ in rows)
        return
    random.shuffle(rows)
    other = of([(a, c, 1000 - 3 * s) for a, c, s in rows])
    assert other is not None
    for name in ("n", "sessions", "current", "candidate", "helpful", "harmful", "discordance", "design_effect"):
        assert getattr(other, name) == pytest.approx(getattr(one, name))
    swapped = of(rows, swap=True)
    assert swapped is not None
    assert swapped.difference == pytest.approx(-one.difference)
    low, high = one.interval()
    assert swapped.interval() == pytest.approx((-high, -low), abs=1e-6)
    assert -1 <= low <= one.difference <= high <= 1
    assert 0 <= one.p_worse_by(0.02) <= 1 and one.design_effect >= 1


def test_equal_weights_are_no_weights() -> None:
    case = Case(40, 8, 0.3, 0.2, 0.05)
    one = compared(case, 5, 0.0)
    a = np.zeros(one.n)
    assert paired(a, a, np.arange(one.n), np.full(one.n, 3.0)) == paired(a, a, np.arange(one.n))


def test_what_cannot_be_known() -> None:
    nothing = np.full(3, np.nan)
    assert paired(nothing, np.ones(3), np.arange(3)) is None
    assert paired(np.empty(0), np.empty(0), np.empty(0, np.int64)) is None
    one = paired(np.ones(50), np.ones(50), np.zeros(50, np.int64))
    assert one is not None and one.interval() == (-1, 1) and one.p_worse_by(0.5) == 1 and one.newcombe() == (-1, 1)
    with pytest.raises(ValueError, match="length"):
        paired(np.ones(3), np.ones(2), np.arange(3))
    all_lost = single(0, 100, 100, 100)
    assert all_lost.difference == -1 and all_lost.interval()[0] == -1


def test_no_flip_is_worth_its_sessions_and_not_its_records() -> None:
    same = np.ones(1000)
    one = paired(same, same, np.repeat(np.arange(40), 25))
    assert one is not None and one.design_effect == pytest.approx(25)
    assert one.p_worse_by(0.02) > ALPHA
    other = same.copy()
    other[0] = 0  # one flip still says little of how they come together
    one = paired(same, other, np.repeat(np.arange(40), 25))
    assert one is not None and one.design_effect == pytest.approx((1 + 2 * 25) / 3, rel=0.03)
    many = paired(same, same, np.arange(1000))
    assert many is not None and many.p_worse_by(0.02) < ALPHA


def test_discordance_has_an_upper_limit() -> None:
    found = single(14, 31, 312, 151)
    assert found.discordance == pytest.approx(45 / 312)
    assert found.discordance < found.discordance_limit() < 0.18


def test_a_candidate_within_the_noise_of_two_runs_is_like_another_run() -> None:
    again = single(4, 4, 300, 150)
    assert like_another_run(single(5, 6, 300, 150), again) and not like_another_run(single(14, 31, 300, 150), again)


def test_holm() -> None:
    """Holm 1979: the smallest of m times m, the next times m - 1, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.5, 1))
def test_a_hopeless_candidate_helps_no_other(p_values: list[float], hopeless: float) -> None:
    assert all(more >= alone for more, alone in zip(holm([*p_values, hopeless]), holm(p_values), strict=False))
