"""The document of an audit from grades that are planted: money by hand, and what must not turn into a switch."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from harness.analysis.audit.model import MeasuredModel, TokenPrice
from harness.analysis.audit.report import AuditReport, CandidateAnswer, audit_report
from harness.analysis.quality.bill import Policy, Rented, Stated
from harness.analysis.quality.cascade import cascade
from harness.analysis.quality.estimate import Bounded
from harness.analysis.quality.slices import RecordFacts
from harness.analysis.report.audit import audit_sections
from harness.analysis.report.document import render_markdown, render_text
from harness.audit.asked import AuditOptions
from harness.audit.grades import SCHEMA
from harness.cli.runner.audit import evidence_of
from harness.cli.runner.audit_run import exit_status
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_VALID
from harness.record.manifest import read_manifest
from tests.run_files import good, write_run

N = 400
GOOD = np.arange(N) % 10 < 7


def table(accepted: np.ndarray, *, into: int = 100, out: int = 10, failed: int = 0) -> pa.Table:
    rows = [
        {
            "record": i, "line": i + 1, "check_sha256": "x", "accepted": bool(good) and i >= failed,
            "reason": "accepted", "gate": None, "input_tokens": None if i < failed else into, "cached_tokens": None,
            "output_tokens": None if i < failed else out, "finish_reason": "stop", "ttft_s": 0.1,
            "e2e_s": None if i < failed else 1.0,
        }
        for i, good in enumerate(accepted)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SCHEMA)


FACTS = RecordFacts(
    tags=[{"task": "ab"[i % 2]} for i in range(N)], kinds=["contains"] * N, input_tokens=np.full(N, 100.0),
    turn=np.ones(N, np.int64), shares_prefix=np.ones(N, np.bool_), session=np.arange(N), weight=np.ones(N),
)  # fmt: skip
CURRENT = MeasuredModel(name="now", grades=(table(GOOD),), slo_met=True, price=TokenPrice(input=2, output=8))
EQUAL = MeasuredModel(name="then", grades=(table(GOOD),), slo_met=True, price=TokenPrice(input=0.2, output=0.8))


def report(*models: MeasuredModel, rate: float = 10.0, stated: Stated | None = None) -> AuditReport:
    return audit_report(
        FACTS, models, margin=0.02, slo={"ttft_p95": 2.0}, requests_per_s=rate, stated=stated or Stated(),
        unmeasurable=frozenset(), made="now", folder="f", trace="t", records=N, checks_sha256="0",
    )  # fmt: skip


def words(*models: MeasuredModel, rate: float = 10.0) -> list[str]:
    return [answer.verdict.word for answer in report(*models, rate=rate).answers]


def rented(name: str, capacity: float, usd: float = 3.6) -> MeasuredModel:
    fleet = Rented(usd_per_hour=usd, capacity=Bounded(capacity, capacity * 0.9, capacity * 1.1))
    return MeasuredModel(name=name, grades=(table(GOOD),), slo_met=True, fleet=fleet, capacity_searched=True)


def test_list_prices_by_hand() -> None:
    found = report(replace(CURRENT, again=(table(GOOD),)), EQUAL)
    now, then = found.models
    per_request = (100 * 2 + 10 * 8) / 1e6
    assert now.usd_per_request and now.usd_per_request.value == pytest.approx(per_request)
    assert now.usd_per_accepted and now.usd_per_accepted.value == pytest.approx(per_request / 0.7)
    assert then.usd_per_1m and then.usd_per_1m.value == pytest.approx(per_request / 10 / 110 * 1e6)
    assert found.answers[0].verdict.word == "switch"
    assert found.noise is not None and found.noise.discordance == 0 and found.answers[0].like_another_run


def test_tokens_of_a_million_are_weighted_as_the_bill_is() -> None:
    """Half of the records stand for nine requests each, and have ten times the input."""
    heavy = np.arange(N) % 2 == 0
    into = np.where(heavy, 1000, 100)
    place, kind = SCHEMA.get_field_index("input_tokens"), SCHEMA.field("input_tokens")
    sent = table(GOOD).set_column(place, kind, pa.array(into, kind.type))
    facts = replace(FACTS, weight=np.where(heavy, 9.0, 1.0))
    found = audit_report(
        facts, [replace(CURRENT, grades=(sent,), price=TokenPrice(input=2, output=2)), EQUAL], margin=0.02,
        slo={"ttft_p95": 2.0}, requests_per_s=1.0, stated=Stated(), unmeasurable=frozenset(), made="now", folder="f",
        trace="t", records=N, checks_sha256="0",
    )  # fmt: skip
    assert found.models[0].usd_per_1m and found.models[0].usd_per_1m.value == pytest.approx(2)


@pytest.mark.parametrize("facts, evidence", [({"source": "dummy"}, "dummy"), ({}, "simulated")])
def test_made_up_weights_have_no_quality(facts: dict[str, str], evidence: str, tmp_path: Path) -> None:
    manifest = read_manifest(write_run(tmp_path / "run", [good(0)]))
    found = evidence_of(replace(manifest, model_facts=facts, evidence="simulated"))
    assert found == evidence
    assert words(CURRENT, replace(EQUAL, evidence=found)) == ["quality not measured"]


def test_whole_instances_decide_at_low_volume_and_capacity_at_a_high_one() -> None:
    now, then = rented("now", 10), rented("then", 20)
    assert words(now, then, rate=5) == ["do not switch: not cheaper"], "one instance each"
    assert words(now, then, rate=100) == ["switch"]
    row = report(now, then, rate=100).models[1]
    assert row.instances == Bounded(5, 5, 6)
    assert row.usd_per_request and row.usd_per_request.value == pytest.approx(5 * 3.6 / 3600 / 100)
    assert row.usd_per_request_full and row.usd_per_request_full.value == pytest.approx(3.6 / 3600 / 20)
    unsearched = report(replace(now, capacity_searched=False), then, rate=100).models[0]
    assert unsearched.capacity is None and unsearched.usd_per_request_full is None


def test_a_rented_candidate_against_list_prices() -> None:
    found = report(CURRENT, rented("then", 20, usd=1.0), rate=100).answers[0]
    assert found.verdict.word == "switch" and found.usd_per_request is not None
    assert found.usd_per_request.value == pytest.approx(5 * 1.0 / 3600 / 100 / ((100 * 2 + 10 * 8) / 1e6))


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (replace(EQUAL, grades=(table(GOOD & (np.arange(N) % 20 != 0)),)), "do not switch: worse"),
        (replace(EQUAL, grades=(table(GOOD, failed=40),)), "do not switch: worse"),
        (replace(EQUAL, price=TokenPrice(input=4, output=9)), "do not switch: not cheaper"),
        (replace(EQUAL, slo_met=False), "do not switch: misses the SLO"),
        (replace(EQUAL, slo_met=None), "not decided"),
        (replace(EQUAL, price=None), "not decided"),
        (replace(EQUAL, problem="its server was no more"), "INVALID"),
        (replace(EQUAL, grades=()), "quality not measured"),
        (replace(EQUAL, evidence="simulated"), "quality not measured"),
    ],
)
def test_what_keeps_a_good_candidate_from_a_switch(candidate: MeasuredModel, word: str) -> None:
    assert words(CURRENT, candidate) == [word]
    # nor does a hopeless one beside it help
    hopeless = replace(EQUAL, name="hopeless", grades=(table(~GOOD),))
    assert words(CURRENT, candidate, hopeless)[0] == word


def test_a_current_model_that_proves_nothing_makes_all_invalid() -> None:
    assert words(replace(CURRENT, problem="its server was no more"), EQUAL) == ["INVALID"]
    assert words(replace(CURRENT, evidence="simulated"), EQUAL) == ["quality not measured"]


WANT = AuditOptions(current="now@http://h/v1")


@pytest.mark.parametrize(
    ("models", "want", "code"),
    [
        ((CURRENT, EQUAL), WANT, EXIT_VALID),
        ((CURRENT, replace(EQUAL, slo_met=False)), WANT, EXIT_VALID),
        ((CURRENT, replace(EQUAL, slo_met=False)), replace(WANT, fail_if="not-switch"), EXIT_SLO_MISSED),
        ((CURRENT, EQUAL), replace(WANT, fail_if="not-switch"), EXIT_VALID),
        ((replace(CURRENT, slo_met=False), EQUAL), WANT, EXIT_SLO_MISSED),
        ((CURRENT, replace(EQUAL, problem="gone")), WANT, EXIT_INVALID),
        ((CURRENT, replace(EQUAL, problem="gone"), EQUAL), WANT, EXIT_VALID),
        ((CURRENT, replace(EQUAL, slo_met=None)), WANT, EXIT_NOT_DECIDED),
        ((CURRENT, replace(EQUAL, evidence="simulated")), WANT, EXIT_NOT_DECIDED),
    ],
)
def test_what_the_exit_status_says(models: tuple[MeasuredModel, ...], want: AuditOptions, code: int) -> None:
    assert exit_status(report(*models), want) == code


def test_wages_and_failures_are_in_the_bill_only_where_they_are_stated() -> None:
    dear = Stated(failure_usd=1.0)
    worse = replace(EQUAL, grades=(table(GOOD & (np.arange(N) % 20 != 0)),))
    plain, stated = report(CURRENT, worse).answers[0], report(CURRENT, worse, stated=dear).answers[0]
    assert plain.usd_per_request is not None and plain.usd_per_request.value == pytest.approx(0.1)
    assert stated.usd_per_request is not None and stated.usd_per_request.value > 1
    even = plain.break_even
    assert even is not None and even.failure_usd is not None
    lost = float(np.mean(GOOD & (np.arange(N) % 20 == 0)))
    assert even.failure_usd.value == pytest.approx(0.9 * 280 / 1e6 / lost)


def test_the_page_says_the_answer_first_in_every_form() -> None:
    sections = audit_sections(report(CURRENT, EQUAL, replace(EQUAL, name="gone", problem="no server", grades=())))
    text = io.StringIO()
    render_text(sections, Console(file=text, width=240))
    for page in (text.getvalue(), render_markdown(sections)):
        assert page.index("then: switch") < page.index("Slices")
        assert "gone: INVALID: no server" in page


def with_gate(one: pa.Table, gate: np.ndarray, *, logprob: np.ndarray | None = None, e2e: float = 1.0) -> pa.Table:
    for name, values in (("gate", gate), ("mean_logprob", logprob), ("e2e_s", np.full(N, e2e))):
        if values is not None:
            place, kind = SCHEMA.get_field_index(name), SCHEMA.field(name)
            one = one.set_column(place, kind, pa.array(values.tolist(), kind.type))
    return one


LOST = GOOD & (np.arange(N) % 20 != 0)
GATED = replace(FACTS, gated=np.ones(N, np.bool_))
WHOLE = {
    "margin": 0.02, "requests_per_s": 10.0, "stated": Stated(), "unmeasurable": frozenset[str](), "made": "now",
    "folder": "f", "trace": "t", "records": N, "checks_sha256": "0",
}  # fmt: skip


def test_escalation_mends_what_the_gate_sees_and_pays_both_calls_and_both_waits() -> None:
    """The candidate loses 5 points, and production's gate sees just these."""
    sees = with_gate(table(LOST), ~(GOOD & ~LOST), e2e=0.6)
    current = replace(CURRENT, grades=(with_gate(table(GOOD), np.ones(N, np.bool_), e2e=1.0),))
    cheap = replace(EQUAL, grades=(sees,))
    alone, helped = (
        audit_report(GATED, [current, cheap], slo={"e2e_p95": 2.0}, policy=policy, **WHOLE)  # type: ignore[arg-type]
        for policy in (Policy(), Policy(escalate=True))
    )
    assert alone.answers[0].verdict.word == "do not switch: worse"
    answer = helped.answers[0]
    assert answer.verdict.word == "switch" and answer.difference and answer.difference.value == 0
    share = float(np.mean(GOOD & ~LOST))
    assert helped.models[1].escalated == pytest.approx(share)
    assert answer.usd_per_request and answer.usd_per_request.value == pytest.approx(0.1 + share)
    # 0.6 s and then 1 s more are over 1.5 s, in 5 % of the requests
    late = audit_report(GATED, [current, cheap], slo={"e2e_p99": 1.5}, policy=Policy(escalate=True), **WHOLE)  # type: ignore[arg-type]
    assert late.answers[0].verdict.word == "do not switch: misses the SLO"
    # nobody knows what a gate says that could not be tested
    blind = np.where(np.arange(N) % 20 == 0, np.nan, 1.0)
    unknown = replace(
        cheap, grades=(with_gate(table(GOOD), np.array([None if np.isnan(x) else bool(x) for x in blind])),)
    )
    found = audit_report(GATED, [current, unknown], slo={"e2e_p95": 2.0}, policy=Policy(escalate=True), **WHOLE)  # type: ignore[arg-type]
    assert found.answers[0].verdict.word == "INVALID"


def test_a_gate_that_sees_nothing_mends_nothing() -> None:
    sees = with_gate(table(LOST), np.ones(N, np.bool_))
    current = replace(CURRENT, grades=(with_gate(table(GOOD), np.ones(N, np.bool_)),))
    found = audit_report(
        GATED, [current, replace(EQUAL, grades=(sees,))], slo={"e2e_p95": 2.0}, policy=Policy(escalate=True), **WHOLE  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.answers[0].verdict.word == "do not switch: worse"


def test_tries_are_those_that_were_observed() -> None:
    """Two answers to each record, either of them first: where one alone passes the gate, half need a second."""
    first, second = np.arange(N) % 4 != 0, np.arange(N) % 4 != 1
    passes = [with_gate(table(x & GOOD), x) for x in (first, second)]
    current = replace(CURRENT, grades=(with_gate(table(GOOD), np.ones(N, np.bool_)),) * 2)
    found = audit_report(
        GATED, [current, replace(EQUAL, grades=tuple(passes))], slo={"e2e_p95": 2.0}, policy=Policy(tries=2), **WHOLE  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.models[1].calls == pytest.approx(1.25)
    assert found.answers[0].usd_per_request and found.answers[0].usd_per_request.value == pytest.approx(0.125)
    assert found.answers[0].difference and found.answers[0].difference.value == pytest.approx(0)


def cascaded(right: float, seed: int, *, sure: bool = True) -> CandidateAnswer:
    """3,000 records of a candidate that loses 10 points, whose log-probabilities tell which (or nothing at all)."""
    n = 3000
    rng = np.random.default_rng(seed)
    good = rng.random(n) < 0.7
    lost = good & (rng.random(n) < 0.15)
    wrong = lost if sure else rng.permutation(lost)
    score = rng.normal(0, 1, n) - 4 * wrong * right
    tables = []
    for accepted, logprob in ((good, None), (good & ~lost, score)):
        base = {
            "accepted": accepted, "reason": ["x"] * n, "record": range(n), "line": range(n), "check_sha256": ["x"] * n,
            "input_tokens": [100] * n, "output_tokens": [10] * n, "finish_reason": ["stop"] * n, "ttft_s": [0.1] * n,
            "e2e_s": [0.5] * n, "gate": [None] * n, "cached_tokens": [None] * n,
            "mean_logprob": [None] * n if logprob is None else logprob,
        }  # fmt: skip
        tables.append(pa.table({f.name: pa.array(base[f.name], f.type) for f in SCHEMA}, SCHEMA))
    facts = RecordFacts(
        tags=[{}] * n, kinds=["contains"] * n, input_tokens=np.full(n, 100.0), turn=np.ones(n, np.int64),
        shares_prefix=np.ones(n, np.bool_), session=np.arange(n), weight=np.ones(n),
    )  # fmt: skip
    models = [replace(CURRENT, grades=(tables[0],)), replace(EQUAL, grades=(tables[1],))]
    return audit_report(facts, models, slo={"e2e_p95": 2.0}, **{**WHOLE, "records": n}).answers[0]  # type: ignore[arg-type]


def test_a_cascade_by_a_score_that_tells() -> None:
    found = cascaded(1.0, 1)
    assert found.verdict.word == "switch as a cascade" and found.cascade is not None
    assert found.cascade.held_out.difference > -0.02 and 0.5 < found.cascade.kept < 0.95
    assert found.cascade.random < found.cascade.held_out.candidate <= found.cascade.oracle
    assert found.verdict.bill is not None and found.verdict.bill.high < 1
    words = io.StringIO()
    render_text(audit_sections(report_of(found)), Console(file=words, width=200))
    assert "oracle" in words.getvalue()


def report_of(answer: CandidateAnswer) -> AuditReport:
    return replace(report(CURRENT, EQUAL), answers=(answer,))


def test_no_cascade_by_a_score_that_tells_nothing() -> None:
    assert [cascaded(1.0, seed, sure=False).verdict.word for seed in range(3)] == ["do not switch: worse"] * 3


def test_a_judge_that_errs_narrows_the_margin() -> None:
    """Of a judge that sees 60 % of a difference, 1.5 points are 2.5."""
    lost = GOOD & (np.arange(N) % 200 != 0)
    seen = replace(EQUAL, grades=(table(lost),))
    sharp, dull = (
        audit_report(FACTS, [CURRENT, replace(seen, sharpness=x)], slo={"e2e_p95": 2.0}, **{**WHOLE, "margin": 0.03})  # type: ignore[arg-type]
        for x in (1.0, 0.3)
    )
    assert [one.answers[0].verdict.word for one in (sharp, dull)] == ["switch", "not decided"]


def test_payroll_and_churn_are_thresholds_until_they_are_stated() -> None:
    def outcomes(stated: Stated) -> dict[str, str]:
        return {claim.text: claim.outcome for claim in report(CURRENT, EQUAL, stated=stated).answers[0].claims[-2:]}

    review, wrong = "cheaper, review counted", "cheaper, wrong answers counted"
    assert outcomes(Stated()) == {review: "not stated", wrong: "not stated"}
    assert outcomes(Stated(failure_usd=0.001))[wrong] == "holds"
    paid = Stated(wage_usd_per_hour=60, review_minutes=1, review_share=0.5)
    assert outcomes(paid)[review] == "holds", "the same review of both models"
    even = report(CURRENT, EQUAL).answers[0].break_even
    assert even is not None and even.minutes_per_100 is None
    saving = 0.9 * 280 / 1e6
    assert even.review_usd_per_100.value == pytest.approx(saving * 100)

    def said(stated: Stated, *models: MeasuredModel) -> str:
        return render_markdown(audit_sections(report(*models, stated=stated)))

    # stated or not, where each turns is on the page
    worse = replace(EQUAL, grades=(table(LOST),))
    lost = float(np.mean(GOOD & ~LOST))
    page = said(Stated(), CURRENT, worse)
    assert "review counted: not stated; false above 0.0252 USD of review per 100 answers" in page
    assert f"wrong answers counted: not stated; false above {saving / lost:.3g} " in page
    assert "USD per wrong answer that goes out" in page
    assert "review counted: not stated; false above 0.05 " in said(Stated(wage_usd_per_hour=30.24), CURRENT, worse)
    assert "wrong answers counted: not stated; nothing that was measured turns it" in said(Stated(), CURRENT, EQUAL)
    dear, unknown = (replace(EQUAL, price=price) for price in (TokenPrice(input=4, output=9), None))
    assert "review counted: not stated; false at any" in said(Stated(), CURRENT, dear)
    assert "review counted: not stated; threshold not measured" in said(Stated(), CURRENT, unknown)


def test_checks_that_tell_nothing_are_no_evidence() -> None:
    """Garbage passes on half of the records, or the margin gives away all that the current model can."""
    lost = GOOD & (np.arange(N) % 20 != 0)
    alike = np.where(np.arange(N) % 20 == 0, lost, GOOD)

    def word(candidate: np.ndarray, blind: np.ndarray, current: np.ndarray = GOOD) -> str:
        models = [replace(CURRENT, grades=(table(current),)), replace(EQUAL, grades=(table(candidate),))]
        found = audit_report(FACTS, models, slo={"e2e_p95": 2.0}, blind=blind, **{**WHOLE, "margin": 0.05})  # type: ignore[arg-type]
        return str(found.answers[0].verdict.word)

    none, half = np.zeros(N, np.bool_), np.arange(N) % 2 == 1
    assert word(GOOD, none) == "switch" and word(GOOD, half) == "switch"
    assert word(GOOD, np.arange(N) % 3 > 0) == "quality not measured"
    assert word(alike, half) != "switch", "records that cannot tell do not dilute those that can"
    assert word(GOOD & False, none, current=np.arange(N) % 40 == 0) == "quality not measured"


def test_a_share_accepted_is_one_number_everywhere() -> None:
    """The current model is right on all records that cannot tell, and on 60 % of the others."""
    blind = np.arange(N) % 4 == 0
    now = blind | (np.arange(N) % 5 < 3)
    lost = now & (np.arange(N) % 20 != 1)
    models = [replace(CURRENT, grades=(table(now),), again=(table(now),)), replace(EQUAL, grades=(table(lost),))]
    found = audit_report(FACTS, models, slo={"e2e_p95": 2.0}, blind=blind, **WHOLE)  # type: ignore[arg-type]
    answer, pair = found.answers[0], found.answers[0].verdict.paired
    shares = [100 * float(x[~blind].mean()) for x in (lost, now)]
    assert f"Accepted {shares[0]:.1f} % against {shares[1]:.1f} %" in answer.sentence
    assert pair is not None and found.noise is not None and found.noise.n == pair.n == (~blind).sum()
    for row, share in zip(found.models, reversed(shares), strict=True):
        assert row.accepted is not None and 100 * row.accepted.value == pytest.approx(share)
        assert row.usd_per_request is not None and row.usd_per_accepted is not None
        assert row.usd_per_accepted.value == pytest.approx(row.usd_per_request.value / share * 100)
    assert answer.usd_per_accepted is not None
    assert answer.usd_per_accepted.value == pytest.approx(0.1 * shares[1] / shares[0])
    with_them = f"With them accepted: now {100 * now.mean():.1f} %, then {100 * lost.mean():.1f} %."
    assert sum(with_them in note for note in found.notes) == 1


def test_what_todays_server_failed_does_not_speak_for_a_candidate() -> None:
    lost = GOOD & (np.arange(N) >= 6)
    flaky = replace(CURRENT, grades=(table(GOOD, failed=6),))
    found = report(flaky, replace(EQUAL, grades=(table(lost),))).answers[0]
    assert found.difference is not None and found.difference.value == 0, "neither side of these pairs is graded"
    assert words(replace(CURRENT, grades=(table(GOOD, failed=9),)), EQUAL) == ["INVALID"]


def test_no_cascade_that_gives_up_a_part_of_the_trace() -> None:
    """A tag of 10 % is answered worse, and as surely as all else."""
    n = 3000
    rng = np.random.default_rng(1)
    good, legal = rng.random(n) < 0.7, np.arange(n) % 10 == 0
    lost = good & ((rng.random(n) < 0.1) | (legal & (rng.random(n) < 0.4)))
    score = rng.normal(0, 1, n) - 6 * (lost & ~legal)
    found = cascade(
        score, good.astype(float), (good & ~lost).astype(float), np.arange(n), np.ones(n), margin=0.06,
        bill=lambda up: Bounded(0.5, 0.5, 0.5), slo_met=lambda up: True, parts={"legal": legal, "others": ~legal},
    )  # fmt: skip
    assert found is not None and found.held_out.p_worse_by(0.06) <= 0.025
    assert found.worse == ("legal",) and not found.passes(0.06)
