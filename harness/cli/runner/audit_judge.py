"""The judge of an audit: who it is, how it does before it is used, and how far it is believed then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.audit.asked import AuditOptions
from harness.audit.judge import (
    CURRENT,
    HttpJudge,
    JudgeTrial,
    Label,
    PairLabel,
    asks_judge,
    read_labels,
    try_judge,
)
from harness.audit.pairs import has_pairs, try_pairs
from harness.audit.records import AuditedRecord
from harness.checks.grade import TURNED
from harness.checks.judge import AskedJudge
from harness.cli.output import say
from harness.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.analysis.quality.judging import JudgeTrust


def family(name: str) -> str:
    """The beginning of a model's name: ``llama`` of ``meta/Llama-3-8B``."""
    return name.rpartition("/")[2].partition("-")[0].casefold()


def judge_of(want: AuditOptions) -> AskedJudge | None:
    """None: none was asked for."""
    if want.judge is None:
        return None
    return AskedJudge(HttpJudge(want.judge, want.judge_model or "", want.judge_time_s))


def trial_of(
    judge: AskedJudge, graded: Sequence[AuditedRecord], labels: Sequence[Label | PairLabel]
) -> JudgeTrial | None:
    """How the judge does on canaries and labels; None: no check asks one. Raises `UsageError` for labels of others."""
    if has_pairs(graded):
        say(f"trying the judge: canaries and {len(labels)} labelled pairs, each in both orders")
        return try_pairs(judge, graded, labels)
    if not any(asks_judge(record.check) for record in graded):
        return None
    say(f"trying the judge: canaries and {len(labels)} labelled answers")
    return try_judge(judge, graded, labels)


def doubts_of(trial: JudgeTrial, want: AuditOptions) -> str | None:
    """Why the judge is believed for no candidate; None: for one at least."""
    each = [trust_of(trial, candidate, want.margin).faults for candidate in want.candidates]
    if not all(each):
        return None
    found = f"the judge is not to be believed: {', '.join(dict.fromkeys(fault for one in each for fault in one))}"
    say(found)
    return found


def labels_of(want: AuditOptions) -> list[Label | PairLabel]:
    """Raises `UsageError` for what are no labels of these models."""
    labels = read_labels(want.labelled) if want.labelled else []
    check_labels(labels, want)
    return labels


def check_labels(labels: Sequence[Label | PairLabel], want: AuditOptions) -> None:
    """Raise `UsageError` for a label of a model that is not audited."""
    for label in labels:
        of_pair = isinstance(label, PairLabel)
        if label.model not in want.candidates and (of_pair or label.model != CURRENT):
            raise UsageError(f"label of line {label.line}: {label.model!r} is neither {CURRENT!r} nor a --candidate")


def trust_of(trial: JudgeTrial, candidate: str, margin: float) -> JudgeTrust:
    """The judge on answers of the current model and of one candidate."""
    import numpy as np

    from harness.analysis.quality.judging import Labelled, trust

    mine = [one for one in trial.labelled if one.model in (CURRENT, candidate) and one.pair in (None, candidate)]
    pairs = [one.turned for one in mine if one.pair is not None and one.judged is not None]
    return trust(
        Labelled(
            judged=np.array([np.nan if one.judged is None else one.judged for one in mine], np.float64),
            label=np.array([one.label for one in mine], np.float64),
            candidate=np.array([one.model != CURRENT for one in mine], np.float64),
            session=np.array([one.session for one in mine], np.int64),
        ),
        margin, canaries=trial.canaries, canaries_accepted=trial.accepted,
        flips=sum(pairs) / len(pairs) if pairs else None,
    )  # fmt: skip


def places(tables: Sequence[pa.Table]) -> tuple[int, int, int, int]:
    """(pairs that a judge chose in, those whose choice turned with the order, the first or the second chosen twice)."""
    reasons = Counter(reason for table in tables for reason in table.column("reason").to_pylist())
    turned = sum(reasons[one] for one in TURNED)
    asked = turned + sum(reasons[one] for one in ("tie", "preferred", "other preferred"))
    return asked, turned, reasons["first both times"], reasons["second both times"]


def place_note(model: str, tables: Sequence[pa.Table]) -> str | None:
    """What is said of how the order of two answers moved the judge; None: it saw no pairs."""
    asked, turned, first, second = places(tables)
    if not asked:
        return None
    return (
        f"{model}: the judge's choice turned with the order of the two answers in {turned:,} of {asked:,} pairs: "
        f"{first:,} times it chose the first in both, {second:,} times the second. These are ties, and a tie is "
        "half an accepted answer."
    )


def place_problem(tables: Sequence[pa.Table]) -> str | None:
    """Why the judge is not believed: it chooses by place; None: seldom enough."""
    from harness.analysis.quality.judging import MOST_FLIPS

    asked, turned, *_ = places(tables)
    if turned <= MOST_FLIPS * asked:
        return None
    return f"the judge is not to be believed: its choice turned with the order in {turned:,} of {asked:,} pairs"
