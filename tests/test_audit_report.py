"""The document of an audit from grades that are planted: money by hand, and what must not turn into a switch."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from analysis.audit import AuditReport, MeasuredModel, TokenPrice, audit_report
from analysis.quality.bill import Rented, Stated
from analysis.quality.estimate import Bounded
from analysis.quality.slices import RecordFacts
from analysis.report.audit import audit_sections
from analysis.report.document import render_markdown, render_text
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
CURRENT = MeasuredModel(name="now", grades=table(GOOD), slo_met=True, price=TokenPrice(input=2, output=8))
EQUAL = MeasuredModel(name="then", grades=table(GOOD), slo_met=True, price=TokenPrice(input=0.2, output=0.8))


def report(*models: MeasuredModel, rate: float = 10.0, stated: Stated | None = None) -> AuditReport:
    return audit_report(
        FACTS, models, margin=0.02, slo={"ttft_p95": 2.0}, requests_per_s=rate, stated=stated or Stated(),
        unmeasurable=frozenset(), made="now", folder="f", trace="t", records=N, checks_sha256="0",
    )  # fmt: skip


def words(*models: MeasuredModel, rate: float = 10.0) -> list[str]:
    return [answer.verdict.word for answer in report(*models, rate=rate).answers]


def rented(name: str, capacity: float, usd: float = 3.6) -> MeasuredModel:
    fleet = Rented(usd_per_hour=usd, capacity=Bounded(capacity, capacity * 0.9, capacity * 1.1))
    return MeasuredModel(name=name, grades=table(GOOD), slo_met=True, fleet=fleet, capacity_searched=True)


def test_list_prices_by_hand() -> None:
    found = report(replace(CURRENT, again=table(GOOD)), EQUAL)
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
        facts, [replace(CURRENT, grades=sent, price=TokenPrice(input=2, output=2)), EQUAL], margin=0.02,
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
        (replace(EQUAL, grades=table(GOOD & (np.arange(N) % 20 != 0))), "do not switch: worse"),
        (replace(EQUAL, grades=table(GOOD, failed=40)), "do not switch: worse"),
        (replace(EQUAL, price=TokenPrice(input=4, output=9)), "do not switch: not cheaper"),
        (replace(EQUAL, slo_met=False), "do not switch: misses the SLO"),
        (replace(EQUAL, slo_met=None), "not decided"),
        (replace(EQUAL, price=None), "not decided"),
        (replace(EQUAL, problem="its server was no more"), "INVALID"),
        (replace(EQUAL, grades=None), "quality not measured"),
        (replace(EQUAL, evidence="simulated"), "quality not measured"),
    ],
)
def test_what_keeps_a_good_candidate_from_a_switch(candidate: MeasuredModel, word: str) -> None:
    assert words(CURRENT, candidate) == [word]
    # nor does a hopeless one beside it help
    hopeless = replace(EQUAL, name="hopeless", grades=table(~GOOD))
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
    worse = replace(EQUAL, grades=table(GOOD & (np.arange(N) % 20 != 0)))
    plain, stated = report(CURRENT, worse).answers[0], report(CURRENT, worse, stated=dear).answers[0]
    assert plain.usd_per_request is not None and plain.usd_per_request.value == pytest.approx(0.1)
    assert stated.usd_per_request is not None and stated.usd_per_request.value > 1
    even = plain.break_even
    assert even is not None and even.failure_usd is not None
    lost = float(np.mean(GOOD & (np.arange(N) % 20 == 0)))
    assert even.failure_usd.value == pytest.approx(0.9 * 280 / 1e6 / lost)


def test_the_page_says_the_answer_first_in_every_form() -> None:
    sections = audit_sections(report(CURRENT, EQUAL, replace(EQUAL, name="gone", problem="no server", grades=None)))
    text = io.StringIO()
    render_text(sections, Console(file=text, width=240))
    for page in (text.getvalue(), render_markdown(sections)):
        assert page.index("then: switch") < page.index("Slices")
        assert "gone: INVALID: no server" in page
