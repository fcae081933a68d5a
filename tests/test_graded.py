"""The graded prompts that ship: sound checks, balanced, the same for the same seed, examples apart from questions."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path

from click.testing import CliRunner

from harness.audit.records import read_records, sampled
from harness.checks.grade import Grader
from harness.checks.lint import LintRecord, lint
from harness.options import PlanOptions
from harness.scenarios.graded import FAMILIES, FAMILY, KINDS, SHOTS, main
from harness.trace.io import open_asked

FEW_SHOT = "b4e590c548a6db2f5ee391498fa1df79604c45aed63740b9b0d6424deb6667a5"
CHAT = "ce2370b725de9fd5c94e652b6259856adf8adb8fab07779acada4dc519bd914a"


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


def test_a_quick_audit_has_every_kind_and_family_and_no_constant_answer_passes(tmp_path: Path) -> None:
    records = read_records(open_asked(written(tmp_path), PlanOptions(trace_format="jsonl")), None, None)
    for seed in range(6):
        few = sampled(records, 300, seed)
        assert len(few) == 300 and [one.row for one in few] == sorted(one.row for one in few)
        kinds = Counter(dict(one.source.tags or ())["kind"] for one in few)
        assert len({one.session for one in few}) == len(KINDS) * FAMILIES
        assert set(kinds) == set(KINDS) and max(kinds.values()) - min(kinds.values()) <= 1
        lines = [one.source for one in few]
        found = lint((LintRecord(line=x.line, check=x.check, gate=None, expected=None, answer=x.answer,
                                 tags=x.tags or ()) for x in lines), Grader())  # fmt: skip
        assert found.sound, [(group.name, group.faults) for group in found.groups if group.faults]


def test_the_prompts_that_ship_stay_what_they_are(tmp_path: Path) -> None:
    """Figures of published runs are of these very bytes."""
    digests = [sha256(written(tmp_path, "--form", form).read_bytes()).hexdigest() for form in ("few-shot", "chat")]
    assert digests == [FEW_SHOT, CHAT]


def test_examples_are_never_asked(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in written(tmp_path, "--form", "few-shot", "--each", "2").open()]
    asked = [row["prompt"].rstrip().removesuffix("\nAnswer:").rsplit("Task: ", 1)[1] for row in rows]
    for row, question in zip(rows, asked, strict=True):
        assert row["prompt"].count("\nAnswer:") == SHOTS + 1 and row["prompt"].count(question) == 1
    first = written(tmp_path, "--seed", "3").read_bytes()
    assert written(tmp_path, "--seed", "3").read_bytes() == first != written(tmp_path, "--seed", "4").read_bytes()
