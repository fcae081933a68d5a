"""The records of an audit: which are one cluster, and what a crash leaves of their answers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from harness.audit.grades import grade_run
from harness.audit.records import check_gates, read_records, sampled
from harness.checks.grade import Grader
from harness.checks.lint import LintRecord, lint
from harness.cli.runner.audit import QualityPass
from harness.cli.runner.audit_plan import blind_records
from harness.errors import ResultsError, UsageError
from harness.options import PlanOptions
from harness.record.answers import CapturedWriter
from harness.record.manifest import RunDir
from harness.trace.io import open_asked
from tests.run_files import good, write_run


def test_sessions_that_share_a_prompt_are_one(tmp_path: Path) -> None:
    rows = [("a", "hello"), ("a", "more"), ("b", "hello"), (None, "more"), (None, "else"), ("c", "new"), (None, "new")]
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(
        json.dumps({"arrival_s": k, "prompt": prompt, **({} if name is None else {"session_id": name})}) + "\n"
        for k, (name, prompt) in enumerate(rows)
    ))  # fmt: skip
    found = [record.session for record in read_records(open_asked(file, PlanOptions()), None, None)]
    assert found[0] == found[1] == found[2] == found[3] and found[5] == found[6]
    assert len(set(found)) == 3


def test_a_sample_keeps_shares_whole_conversations_and_what_has_no_check(tmp_path: Path) -> None:
    """90 % sums and 10 % chats; chats of two turns, one of them graded; a session without any check."""
    rows: list[dict[str, object]] = [
        {"prompt": f"sum {i}", "expected": str(i % 2), "check": {"type": "exact"}, "tags": ["sum"]} for i in range(180)
    ]
    for i in range(20):
        rows += [{"prompt": f"chat {i} {turn}", "session_id": f"chat{i}", "tags": ["chat"],
                  **({"expected": "a", "check": {"type": "exact"}} if turn else {})} for turn in (0, 1)]  # fmt: skip
    rows.append({"prompt": "plain"})
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps({"arrival_s": k, **row}) + "\n" for k, row in enumerate(rows)))
    records = read_records(open_asked(file, PlanOptions()), None, None)
    few = sampled(records, 50, 1)
    graded = [one for one in few if one.check is not None]
    assert [len([one for one in graded if one.prompt.startswith(kind)]) for kind in ("sum", "chat")] == [45, 5]
    chats = [one.session for one in few if one.prompt.startswith("chat")]
    assert all(chats.count(one) == 2 for one in chats) and few[-1].prompt == "plain"
    assert sampled(records, 1000, 1) == records and sampled(records, 50, 2) != few == sampled(records, 50, 1)


def test_what_another_process_sealed_is_not_graded(tmp_path: Path) -> None:
    run = RunDir(write_run(tmp_path / "run", [good(0)]))
    writer = CapturedWriter(run.captured(0), bytes(32), keep_text=False, sealed=True)
    writer.append(0, "secretword")
    writer.close()
    assert b"secretword" not in run.captured(0).read_bytes()
    with pytest.raises(ResultsError, match="asked again"):
        grade_run(run, [], Grader(), keep_text=False)


@pytest.mark.parametrize(
    ("check", "gate", "known"),
    [
        ({"type": "exact"}, {"type": "exact"}, "no words"),
        (
            {"type": "exact"},
            {"type": "any", "checks": [{"type": "contains", "of": ["Rome"]}, {"type": "json"}]},
            "knows",
        ),
        ({"type": "exact"}, {"type": "choice", "choices": ["Rome", "Paris"], "answer": "Rome"}, "knows"),
        ({"type": "number", "value": 4}, {"type": "number", "value": 4, "abs": 1}, "knows"),
        ({"type": "regex", "pattern": "R.me"}, {"type": "regex", "pattern": "R.me"}, "knows"),
        ({"type": "exact"}, {"type": "regex", "pattern": "^[A-Z]"}, None),
        ({"type": "json_schema", "schema": {"type": "object"}}, {"type": "json"}, None),
    ],
)
def test_a_gate_does_not_know_the_right_answer(
    check: dict[str, object], gate: dict[str, object], known: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"prompt": "Capital of Italy?", "expected": "Rome", "check": check, "gate": gate}))

    def read() -> None:
        check_gates(read_records(open_asked(file, PlanOptions()), None, None), "trace")

    if known is None:
        read()
    else:
        with pytest.raises(UsageError, match=known):
            read()


def test_checks_that_garbage_or_one_constant_answer_passes_tell_nothing(tmp_path: Path) -> None:
    """Yes or no: a current model that always says yes is no better than that, one that is right on nine of ten is."""
    n = 120
    any_word = {"type": "regex", "pattern": "[a-z]"}
    rows = [
        {"prompt": f"Is {i} even?", "expected": "no" if i % 2 else "yes", "tags": ["loose" if i % 4 == 0 else "strict"],
         "check": any_word if i % 4 == 0 else {"type": "choice", "choices": ["yes", "no"]}}
        for i in range(n)
    ]  # fmt: skip
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(open_asked(file, PlanOptions()), None, None)
    faults = [
        group for group in lint(
            (LintRecord(line=r.source.line, check=r.source.check, gate=None, expected=r.source.expected, answer=None,
                        tags=r.source.tags or ()) for r in records), Grader(),
        ).groups if group.faults
    ]  # fmt: skip

    def blind(right: list[bool]) -> tuple[frozenset[str], list[bool]]:
        grades = pa.table({"accepted": right})
        names, found = blind_records(records, faults, QualityPass(problem=None, grades=grades))
        return names, found.tolist()

    loose = [i % 4 == 0 for i in range(n)]
    names, found = blind([i % 2 == 0 for i in range(n)])
    assert found == [True] * n and {"check choice", "strict"} <= names
    names, found = blind([i % 10 > 0 for i in range(n)])
    assert found == loose and "check choice" not in names and "strict" not in names
