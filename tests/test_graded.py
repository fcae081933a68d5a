"""The graded prompts that ship: sound checks, balanced, the same for the same seed, examples apart from questions."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from harness.checks.grade import Grader
from harness.checks.lint import LintRecord, lint
from harness.options import PlanOptions
from harness.scenarios.graded import FAMILIES, FAMILY, KINDS, SHOTS, main
from harness.trace.io import open_asked


def written(folder: Path, *more: str) -> Path:
    path = folder / "graded.jsonl"
    done = CliRunner().invoke(main, ["-o", str(path), *more])
    assert done.exit_code == 0, done.output
    return path


def test_the_checks_are_sound_and_no_constant_answer_passes(tmp_path: Path) -> None:
    records = list(open_asked(written(tmp_path), PlanOptions(trace_format="jsonl")))
    assert 600 <= len(records) == len(KINDS) * FAMILIES * FAMILY <= 1000
    assert len({one.session_id for one in records}) == len(KINDS) * FAMILIES >= 40
    found = lint(
        (
            LintRecord(line=one.line, check=one.check, gate=None, expected=None, answer=one.answer, tags=one.tags or ())
            for one in records
        ),
        Grader(),
    )
    assert found.sound, [(group.name, group.faults) for group in found.groups if group.faults]
    assert all(group.own in (None, 1.0) for group in found.groups)
    assert len({json.dumps(one.messages) for one in records}) == len(records), "none is asked twice"


def test_examples_are_never_asked(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in written(tmp_path, "--form", "few-shot", "--each", "2").open()]
    asked = [row["prompt"].rstrip().removesuffix("\nAnswer:").rsplit("Task: ", 1)[1] for row in rows]
    for row, question in zip(rows, asked, strict=True):
        assert row["prompt"].count("\nAnswer:") == SHOTS + 1 and row["prompt"].count(question) == 1
    first = written(tmp_path, "--seed", "3").read_bytes()
    assert written(tmp_path, "--seed", "3").read_bytes() == first != written(tmp_path, "--seed", "4").read_bytes()
