"""The backlog at a server of constant pace, by hand, where turns of a session wait for each other too."""

from __future__ import annotations

import numpy as np
import pytest

from harness.analysis.capacity.backlog import GRID, Curve, Demand, backlog_of_sessions_s, backlog_s
from harness.analysis.capacity.probes import worked_between

NONE = np.full(4, -1)


def sessions(n: int = 3000, turns: int = 4, think_s: float = 2.0, seed: int = 1) -> Demand:
    """Sessions that begin as a Poisson process, 4 requests/s, a turn each 2 s."""
    rng = np.random.default_rng(seed)
    starts = np.repeat(np.cumsum(rng.exponential(1.0, n // turns)), turns)
    within = np.tile(np.arange(turns) * think_s, n // turns)
    order = np.argsort(starts + within, kind="stable")
    place = np.argsort(order)
    before = np.where(np.arange(n) % turns == 0, -1, np.arange(n) - 1)
    return Demand(
        arrival_s=(starts + within)[order], input_tokens=np.zeros(n),
        output_tokens=rng.lognormal(2, 0.7, n)[order], into_session_s=within[order],
        after=np.where(before < 0, -1, place[before])[order],
    )  # fmt: skip


def test_a_turn_comes_later_by_what_the_one_before_it_waited() -> None:
    """One unit of work takes 1 s. The first two come together; the second's next turn, planned at 1 s, comes at 2."""
    due_s, work = np.array([0.0, 0.0, 1.0, 2.0]), np.array([1.0, 1.0, 1.0, 1.0])
    assert backlog_s(due_s, work, 1.0).tolist() == [0.0, 1.0, 1.0, 1.0]
    assert backlog_of_sessions_s(due_s, work, NONE, 1.0).tolist() == [0.0, 1.0, 1.0, 1.0]
    waiting = np.array([-1, -1, 1, -1])
    # the third comes at 1 + 1 s, together with the fourth, when the first two are just done
    assert sorted(backlog_of_sessions_s(due_s, work, waiting, 1.0).tolist()) == [0.0, 0.0, 1.0, 1.0]


def test_where_nobody_waits_both_are_the_same() -> None:
    demand = sessions()
    work = demand.output_tokens / demand.output_tokens.mean()
    alone = np.full(len(demand), -1)
    at_s = np.sort(demand.at(3.9))
    assert backlog_of_sessions_s(at_s, work, alone, 4.1) == pytest.approx(backlog_s(at_s, work, 4.1), abs=1e-6)


def test_a_queue_slows_the_sessions_that_stand_in_it() -> None:
    demand = sessions()
    work = demand.output_tokens / demand.output_tokens.mean()
    assert demand.after is not None
    free = backlog_s(demand.arrival_s, work, 4.2).mean()
    assert 0.2 * free < backlog_of_sessions_s(demand.arrival_s, work, demand.after, 4.2).mean() < 0.9 * free


def test_another_rate_moves_when_sessions_begin_and_not_their_turns() -> None:
    demand = sessions()
    faster = demand.at(2 * demand.rate)
    for k in range(1, 200):
        before = int(demand.after[k]) if demand.after is not None else -1
        if before >= 0:
            assert faster[k] - faster[before] == pytest.approx(2.0)
        else:
            assert faster[k] == pytest.approx(demand.arrival_s[k] / 2)


@pytest.mark.parametrize("waits", [False, True])
def test_a_curve_says_where_the_trace_stays_within_a_backlog(*, waits: bool) -> None:
    """Held against every rate of the grid."""
    demand = sessions()
    if not waits:
        demand = Demand(
            arrival_s=demand.arrival_s, input_tokens=demand.input_tokens, output_tokens=demand.output_tokens
        )
    curve = Curve(demand, 0.0, 5.0)
    levels = [float(np.quantile(curve.of_trace(rate), 0.95)) for rate in curve.rates]
    rate = curve.rate_at(1.0, 0.95)
    assert rate == pytest.approx(float(np.interp(1.0, levels, curve.rates)), rel=1e-6)
    assert curve.rate_within(1.0, 0.95) == pytest.approx(rate, rel=0.01)
    assert curve.rate_at(1e9, 0.95) == pytest.approx(GRID[-1] * 5.0)
    assert curve.rate_within(-1.0, 0.95) == pytest.approx(GRID[0] * 5.0)


def test_long_answers_count_by_what_they_got_of_the_stretch() -> None:
    """Two slots, answers of 10 s and 100 tokens: 20 tokens/s, whole answers alone would say 14.3."""
    starts = np.array([0.0, 0.0, 10.0, 10.0, 20.0, 20.0])
    ended = np.where(starts + 10 > 25, np.nan, starts + 10)
    tokens = np.full(6, 100.0)
    whole = worked_between(4.0, 18.0, starts, starts + 10, tokens, tokens)
    assert (whole.seconds, whole.requests) == (14.0, 2)
    assert whole.output_tokens == pytest.approx(14 * 20)
    assert whole.input_tokens == 200, "prompts are read when the first token comes"
    assert worked_between(4.0, 18.0, starts, ended, tokens, tokens) == whole
    assert worked_between(0.0, 5.0, np.full(6, np.nan), np.full(6, 3.0), tokens, tokens).output_tokens == 600
