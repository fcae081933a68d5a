"""Pairs of answers that a judge chooses between: which records have them, and how the judge does before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from harness.audit.judge import AT_ONCE, CANARIES, CURRENT, JudgeTrial, Label, LabelledAnswer, PairLabel, asks_judge
from harness.audit.records import AuditedRecord
from harness.checks.judge import AskedJudge, JudgeQuestion, Preference, pair_canaries
from harness.checks.lint import GARBAGE
from harness.checks.spec import Prefer
from harness.errors import UsageError


def has_pairs(records: Sequence[AuditedRecord]) -> bool:
    """Whether the checks of these records choose between two answers."""
    return any(isinstance(record.check, Prefer) for record in records)


def check_pairs(records: Sequence[AuditedRecord], *, keep_text: bool) -> None:
    """Raise `UsageError` for checks of pairs beside those of a judge alone, and without the text that they compare."""
    if not has_pairs(records):
        return
    if any(asks_judge(record.check) for record in records):
        raise UsageError("the trace has checks prefer and judge: a judge is tried for one of them, so audit them apart")
    if not keep_text:
        raise UsageError("checks prefer compare the candidates' answers with the current model's: say --keep-text")


def try_pairs(judge: AskedJudge, records: Sequence[AuditedRecord], labels: Sequence[Label | PairLabel]) -> JudgeTrial:
    """Ask labelled pairs, and canaries: the answer that a person prefers beside a wrong one, which may give orders.

    Raises `UsageError` for a label of a line whose check is no choice between two answers.
    """
    by_line = {record.source.line: record for record in records if isinstance(record.check, Prefer)}
    asked: list[tuple[PairLabel, JudgeQuestion]] = []
    for label in labels:
        record = by_line.get(label.line)
        if record is None or not isinstance(record.check, Prefer) or isinstance(label, Label):
            raise UsageError(f"label of line {label.line}: not a pair of answers to a record whose check is prefer")
        asked.append((label, JudgeQuestion(
            rubric=record.check.rubric, prompt=record.prompt, references=(), answer=label.current
        )))  # fmt: skip
    planted: list[tuple[JudgeQuestion, str]] = []
    for k, (label, question) in enumerate(asked):
        if label.better != "tie" and len(planted) < CANARIES:
            good = label.current if label.better == "current" else label.candidate
            mine = JudgeQuestion(rubric=question.rubric, prompt=question.prompt, references=(), answer=good)
            planted += [(mine, wrong) for wrong in pair_canaries(GARBAGE[k % len(GARBAGE)])]

    def heard(one: tuple[JudgeQuestion, str]) -> Preference | None:
        return judge.prefers(*one)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        canaries = list(pool.map(heard, planted))
        judged = list(pool.map(heard, [(question, label.candidate) for label, question in asked]))
    return JudgeTrial(
        canaries=sum(one is not None for one in canaries),
        accepted=sum(one is not None and one.better != "current" for one in canaries),
        labelled=tuple(
            LabelledAnswer(
                model=model, session=by_line[label.line].session, label=label.better != worse_if, pair=label.model,
                judged=None if found is None else found.better != worse_if, turned=found is not None and found.turned,
            )
            for (label, _), found in zip(asked, judged, strict=True)
            for model, worse_if in ((CURRENT, "candidate"), (label.model, "current"))
        ),
    )  # fmt: skip
