"""`harness audit lint`: checks that tell right from wrong, and those that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harness.checks.grade import Grade, Grader
from harness.checks.lint import MOST_PROBLEMS, Lint, LintRecord, lint
from harness.checks.spec import Check
from harness.cli.audit import audit

CAPITALS = ["Rome", "Paris", "Oslo", "Bern", "Wien", "Riga", "Kiew", "Lima"]


def record(answer: str | None, check: object = None, **more: object) -> LintRecord:
    text = None if check is None else json.dumps(check)
    return LintRecord(**{"line": 1, "check": text, "gate": None, "expected": None, "answer": answer, **more})  # type: ignore[arg-type]


def linted(*records: LintRecord, default: str | None = None) -> Lint:
    return lint(records, Grader(), default)


def faults(found: Lint) -> dict[str, tuple[str, ...]]:
    return {group.name: group.faults for group in found.groups}


def test_sound_checks_are_sound() -> None:
    found = linted(*(record(f"It is {one}.", {"type": "contains"}, expected=[one]) for one in CAPITALS))
    (group,) = found.groups
    assert found.sound and (group.own, group.others, group.garbage, group.ungraded) == (1.0, 0.0, 0, 0.0)
    assert group.constant == 1 / 8 and len(found.hashes) == 8


@pytest.mark.parametrize(
    ("check", "answers", "expected", "fault"),
    [
        ({"type": "exact"}, [f"It is {one}." for one in CAPITALS], CAPITALS, "never passes"),
        ({"type": "regex", "pattern": "[a-z]"}, CAPITALS, CAPITALS, "accepts garbage"),
        ({"type": "regex", "pattern": "^[A-Z][a-z]{3,4}$"}, CAPITALS, CAPITALS, "accepts others' answers"),
        ({"type": "exact"}, ["yes", "no"] * 4, ["yes", "no"] * 4, "a constant answer passes"),
        ({"type": "similar"}, CAPITALS, CAPITALS, "decides nothing"),
    ],
)
def test_a_check_that_tells_nothing_is_named(
    check: object, answers: list[str], expected: list[str], fault: str
) -> None:
    found = linted(*(record(a, check, expected=[e]) for a, e in zip(answers, expected, strict=True)))
    (group,) = found.groups
    assert fault in group.faults and not found.sound


def test_what_was_not_tried_is_no_fault() -> None:
    for check in ({"type": "code", "test": "assert True"}, {"type": "judge", "rubric": "good"}):
        found = linted(*(record(one, check, expected=[one]) for one in CAPITALS))
        assert found.sound and found.groups[0].own is None


def test_a_check_without_a_grade_is_a_fault() -> None:
    class Silent(Grader):
        def grade(self, check: Check, answer: str, prompt: str = "") -> Grade:
            return Grade(None, "pattern timed out")

    found = lint([record("x", {"type": "json"})], Silent())
    assert found.groups[0].faults == ("often not gradable",) and found.groups[0].ungraded == 1


def test_a_tag_is_held_by_itself() -> None:
    """Over all the constant answer is rare; within one task it is half."""
    rows = [record(one, {"type": "exact"}, expected=[one], tags=(("task", "facts"),)) for one in CAPITALS * 2]
    rows += [record(one, {"type": "exact"}, expected=[one], tags=(("task", "yesno"),)) for one in ["yes", "no"] * 3]
    assert faults(linted(*rows)) == {
        "check exact": (), "task facts": (), "task yesno": ("a constant answer passes",)
    }  # fmt: skip


def test_the_truth_is_no_gate() -> None:
    gold = json.dumps({"type": "contains"})
    rows = [record(one, {"type": "contains"}, expected=[one], gate=gold) for one in CAPITALS]
    assert faults(linted(*rows)) == {"check contains": ("gate is the check",)}


def test_what_cannot_be_used_is_named_and_counted() -> None:
    rows = [record("x", {"type": "exact"}, line=k) for k in range(30)]  # no truth
    rows += [record("x", {"type": "json"}, gate="{}", line=99), record("x")]
    found = linted(*rows)
    assert (found.records, found.checked, found.unusable) == (32, 0, 31) and not found.sound
    assert len(found.problems) == MOST_PROBLEMS and found.problems[0][0] == 0 and "expected" in found.problems[0][1]
    (group,) = linted(*(record(one, expected=[one]) for one in CAPITALS), default='{"type": "exact"}').groups
    assert group.own == 1


def test_records_without_answers_have_no_share() -> None:
    found = linted(*(record(None, {"type": "exact"}, expected=[one]) for one in CAPITALS))
    (group,) = found.groups
    assert (group.own, group.others, group.constant) == (None, None, 1 / 8) and found.sound


def run(tmp_path: Path, rows: list[dict[str, object]], *options: str) -> Result:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CliRunner().invoke(audit, ["lint", str(path), *options], standalone_mode=False)


def rows(**more: object) -> list[dict[str, object]]:
    return [
        {"prompt": f"Capital {k}?", "arrival_s": k, "output_tokens": 4, "answer": one, "expected": one, **more}
        for k, one in enumerate(CAPITALS)
    ]


def test_the_verb(tmp_path: Path) -> None:
    good = run(tmp_path, rows(check={"type": "exact"}, tags={"task": "facts"}))
    assert good.return_value == 0, good.output + repr(good.exception)
    assert "task facts" in good.output and "8 of 8 records" in good.output
    told = run(tmp_path, rows(check={"type": "exact"}), "--format", "json")
    document = json.loads(told.stdout)
    assert document["sound"] is True and document["groups"][0]["own"] == 1.0 and len(document["hashes"]) == 8
    bad = run(tmp_path, rows(check={"type": "regex", "pattern": "(a"}))
    assert bad.return_value == 3 and "line 1: check regex" in bad.output
    assert run(tmp_path, rows()).return_value == 5
    assert run(tmp_path, rows(), "--check", '{"type": "exact"}').return_value == 0
    assert "nonsense" in str(run(tmp_path, rows(), "--check", '{"type": "nonsense"}').exception)


def test_no_answer_is_quoted(tmp_path: Path) -> None:
    secret = [{**row, "answer": "SECRET-7", "prompt": "SECRET-8"} for row in rows(check={"type": "exact"})]
    for options in ((), ("--format", "json")):
        found = run(tmp_path, secret, *options)
        assert found.return_value == 3 and "SECRET" not in found.output
