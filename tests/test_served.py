"""A workload that a server served otherwise than planned is measured, priced and said; only a broken run is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_files import SPEC, bad, good, write_run

from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise

PLANNED = 24


def answers(lengths, **plan):
    """A run whose k-th answer had ``lengths[k]`` tokens for `PLANNED`."""
    return [good(k, tokens=n) for k, n in enumerate(lengths)], {
        k: {"input_tokens": 8, "output_tokens": PLANNED, **plan} for k in range(len(lengths))
    }


def summary(tmp_path, results, **options):
    return summarise(read_run(write_run(tmp_path / "run", results, **options)))


def check(s, name):
    return next(c for c in s.checks if c.name == name)


@pytest.mark.parametrize("engine", ["url", "vllm-cpu"])
def test_answers_that_end_by_themselves_are_priced_as_they_were_served(tmp_path, engine):
    """5, 6 and 7 tokens in turn, as of a server that knows no ignore_eos (truth: 6 a request, 39 requests)."""
    results, plan = answers([5 + k % 3 for k in range(39)])
    s = summary(tmp_path, results, plan=plan, engine=engine)
    said = check(s, "output_tokens")
    assert s.verdict == "VALID"
    assert (said.ok, said.gate) == (False, False)
    assert "6 output tokens a request for 24 planned: 100.0% of 39 answers shorter" in said.observed
    assert "longer" not in said.observed
    price = s.cost
    bill = price.usd_per_hour * s.window.duration_s / 3600
    assert price.usd_per_1m_output_only.value == pytest.approx(bill / (39 * 6) * 1e6, rel=1e-6)
    assert "6 output tokens a request for 24 planned" in price.note


def test_answers_beyond_max_tokens_are_said_too(tmp_path):
    results, plan = answers([30] * 10 + [PLANNED] * 30)
    said = check(summary(tmp_path, results, plan=plan), "output_tokens")
    assert said.ok is False and "25.0% longer" in said.observed and "usage" in said.advice


def test_answers_as_planned_have_no_note(tmp_path):
    results, plan = answers([PLANNED] * 40)
    s = summary(tmp_path, results, plan=plan)
    assert check(s, "output_tokens").ok and "planned" not in (s.cost.note or "")


SPEC_SLO = replace(SPEC, slo={"ttft": 1.0})


@pytest.mark.parametrize(
    ("served", "error", "verdict"),
    [
        (5, "overloaded", "VALID"),
        (0, "overloaded", "INVALID"),  # nothing was measured
        (5, "rejected", "INVALID"),
        (5, "server", "INVALID"),
        (5, "connect", "INVALID"),
        (20, "server", "VALID"),
    ],
)
def test_an_overloaded_server_is_told_from_a_broken_measurement(tmp_path, served, error, verdict):
    results = [good(k) if k < served else bad(k, error, took_ms=2) for k in range(40)]
    s = summary(tmp_path, results, spec=SPEC_SLO)
    assert s.verdict == verdict
    assert (s.slo.attainment.value, s.slo.attainment.n) == (served / 40, 40), "goodput counts refusals against it"
    refused = 40 - served if error == "overloaded" else 0
    assert (f"{refused} refused as overloaded" in check(s, "success").observed) is bool(refused)
    assert (f"{refused} of them refused as overloaded" in check(s, "failures").observed) is bool(refused)


def test_more_breakage_than_refusals_is_still_broken(tmp_path):
    results = [*(good(k) for k in range(4)), *(bad(k, "overloaded") for k in range(4, 15)),
               *(bad(k, "protocol") for k in range(15, 40))]  # fmt: skip
    assert summary(tmp_path, results).verdict == "INVALID"


@pytest.mark.parametrize(("error", "verdict"), [("overloaded", "VALID"), ("server", "INVALID")])
def test_turns_that_lost_their_history_follow_the_failure_before_them(tmp_path, error, verdict):
    """10 sessions of 4 turns, of which 8 fail at once: their 24 other turns are never sent."""
    results = [good(k) for k in range(8)] + [bad(k, error) for k in range(8, 16)]
    results += [bad(k, "no_history", sent=False) for k in range(16, 40)]
    assert summary(tmp_path, results).verdict == verdict


@pytest.mark.parametrize(("how", "longer", "ok"), [("cap", 0, True), ("cap", 10, False), ("free", 10, None)])
def test_lengths_that_were_caps_or_free_are_what_was_asked_for(tmp_path, how, longer, ok):
    results, plan = answers([30] * longer + [6] * 30)
    said = check(summary(tmp_path, results, plan=plan, spec=replace(SPEC, output_lengths=how)), "output_tokens")
    assert (said.ok, said.gate) == (ok, False)
    assert "output tokens a request for 24 planned" in said.observed
