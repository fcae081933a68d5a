"""Prices against published and measured golden cases, and the rule that no price is better than a wrong one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_files import TIER, good, write_run

from harness.analysis.cost.cost import bill_usd, cost, usd_per_1m
from harness.analysis.cost.split import by_phase_time, by_ratio, token_mix
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import summarise
from harness.errors import UsageError

# Qwen3-32B on two RTX PRO 6000 (vLLM 0.19, 300 requests): half a g7e.24xlarge at its list price.
USD_PER_HOUR, SECONDS, INPUT, OUTPUT = 8.28608, 159.65, 258_691, 199_486


def per_s(tokens, low=0.9, high=1.1):
    value = tokens / SECONDS
    return Quantity(value=value, low=value * low, high=value * high, n=300, unit="tokens/s", evidence="measured")


def priced(tier=TIER, reason=None, rate=None):
    rate = rate or per_s(OUTPUT)
    return cost(
        tier, 1, SECONDS, total_rate=per_s(INPUT + OUTPUT), output_rate=rate, weighted_rate=per_s(INPUT / 4 + OUTPUT),
        ratio=4.0, reason=reason, note=None,
    )  # fmt: skip


def test_golden_measured_run():
    bill = bill_usd(USD_PER_HOUR, 1, SECONDS)
    assert usd_per_1m(bill, OUTPUT) == pytest.approx(1.842, abs=5e-4)
    assert usd_per_1m(bill, INPUT + OUTPUT) == pytest.approx(0.802, abs=5e-4)
    split = by_ratio(bill, token_mix(INPUT, None, OUTPUT), 4.0, evidence="measured")
    assert split.usd_per_1m_input.value == pytest.approx(0.348, abs=5e-4)
    assert split.usd_per_1m_output.value == pytest.approx(1.391, abs=5e-4)


def test_golden_through_the_rates():
    c = priced(replace(TIER, usd_per_hour=USD_PER_HOUR))
    assert c.usd_per_1m_output_only.value == pytest.approx(1.842, abs=5e-4)
    assert c.usd_per_1m_total.value == pytest.approx(0.802, abs=5e-4)
    assert c.split.usd_per_1m_output.value == pytest.approx(1.391, abs=5e-4)
    assert c.split.usd_per_1m_input.value == pytest.approx(0.348, abs=5e-4)
    assert c.bill_usd == pytest.approx(USD_PER_HOUR * SECONDS / 3600)


def test_the_bill_is_for_whole_replicas():
    assert bill_usd(2.0, 3, 1800) == 3.0


def test_slow_is_dear():
    q = priced().usd_per_1m_output_only
    assert q.low == pytest.approx(q.value / 1.1)
    assert q.high == pytest.approx(q.value / 0.9)
    assert q.evidence == "measured x list price"


def test_a_rate_that_may_be_nothing_has_no_highest_price():
    q = priced(rate=replace(per_s(OUTPUT), low=0.0)).usd_per_1m_output_only
    assert q.value is not None and q.high is None


@pytest.mark.parametrize(
    ("tier", "reason", "words"),
    [
        (None, None, "no tier"),
        (replace(TIER, usd_per_hour=0.0), None, "no positive price"),
        (replace(TIER, usd_per_hour=float("nan")), None, "no positive price"),
        (replace(TIER, usd_per_hour=-1.0), None, "no positive price"),
        (TIER, "the run is INVALID", "INVALID"),
    ],
)
def test_no_price_says_why(tier, reason, words):
    c = priced(tier, reason)
    split = (c.split.usd_per_1m_input, c.split.usd_per_1m_output)
    for q in (c.usd_per_1m_total, c.usd_per_1m_output_only, *split):
        assert (q.value, q.low, q.high) == (None, None, None)
        assert words in q.note
    assert words in c.reason


def test_the_declared_parts_are_the_bill():
    c = priced(replace(TIER, usd_per_hour=USD_PER_HOUR))
    parts = (c.split.input_nusd, c.split.cached_input_nusd, c.split.output_nusd)
    assert sum(parts) == c.split.bill_nusd == round(c.bill_usd * 1e9)
    assert c.split.input_nusd / 1e9 == pytest.approx(c.split.usd_per_1m_input.value * INPUT / 1e6, rel=1e-6)
    assert c.split.ratio == pytest.approx(4.0)


def test_other_divisions_are_withheld_with_the_price():
    usage = token_mix(float(INPUT), None, float(OUTPUT))
    other = by_phase_time(1.0, usage, 1.0, 2.0, evidence="measured")
    rates = {"total_rate": per_s(INPUT + OUTPUT), "output_rate": per_s(OUTPUT), "weighted_rate": per_s(OUTPUT)}
    given = cost(TIER, 1, SECONDS, **rates, ratio=4.0, reason=None, note=None, splits=[other])
    assert given.splits == [other]
    (held,) = cost(TIER, 1, SECONDS, **rates, ratio=4.0, reason="the run is INVALID", note=None, splits=[other]).splits
    assert held.reason == "the run is INVALID"
    assert (held.output_nusd, held.usd_per_1m_output.value, held.facts) == (None, None, other.facts)


@pytest.mark.parametrize("value", [None, 0.0])
def test_no_tokens_no_price(value):
    q = priced(rate=Quantity(value=value, n=0, unit="tokens/s", evidence="measured")).usd_per_1m_output_only
    assert (q.value, q.note) == (None, "no tokens were served")


def test_a_whole_run_by_hand(tmp_path):
    """10 requests of 8 in and 4 out; 3.6 USD/h is 0.001 USD a second; first due at 0, last ends at 0.98 s."""
    s = summarise(read_run(write_run(tmp_path / "r", [good(i) for i in range(10)])))
    assert s.window.duration_s == pytest.approx(0.98)
    assert s.cost.usd_per_1m_output_only.value == pytest.approx(0.00098 / 40 * 1e6)
    assert s.cost.usd_per_1m_total.value == pytest.approx(0.00098 / 120 * 1e6)
    assert s.cost.split.usd_per_1m_output.value == pytest.approx(0.00098 / (80 / 4 + 40) * 1e6)
    into, out = s.cost.split.usd_per_1m_input.value, s.cost.split.usd_per_1m_output.value
    assert (80 * into + 40 * out) / 1e6 == pytest.approx(s.cost.bill_usd)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ratio_must_be_positive(tmp_path, ratio):
    run = read_run(write_run(tmp_path / "r", [good(0)]))
    with pytest.raises(UsageError, match="ratio"):
        summarise(run, ratio=ratio)
