"""A judge over HTTP: an OpenAI-compatible endpoint, asked for verdicts in a forced schema, tried before it is used.

Before any model is asked, the judge gets canaries (answers known to be wrong, some of which order it to accept) and the
answers that a person labelled. How far it may then be trusted: `analysis.quality.judging`. No message and no file holds
the key or a text.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from harness.audit.records import AuditedRecord
from harness.checks.judge import AskedJudge, JudgeQuestion, canaries
from harness.checks.lint import GARBAGE
from harness.checks.spec import Check, Judge, parts
from harness.errors import ServerError, UsageError
from harness.server.access import Access, normalise_base_url, page_under
from harness.server.question import ask, retry_after_s
from harness.untrusted import DECODE_ERRORS

KEY = "HARNESS_JUDGE_API_KEY"
"""Environment variable with the judge's key: it is another service than the models."""
MOST_REPLY_TOKENS = 32
ANSWER_S = 60.0
"""For one verdict."""
AT_ONCE = 8
CANARIES = 24
"""Asked at least, where there are so many questions to make them of."""
MOST_BYTES = 1 << 20
CURRENT = "current"
"""Name of the current model in a file of labels."""


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Reply(msgspec.Struct):
    choices: list[_Choice]


class HttpJudge:
    """Asks ``url`` for chat completions in a JSON schema. After ``total_s`` from now it answers nothing any more.

    Without an answer (down, refused, not JSON of the API, out of time) there is no verdict. 429 and 503 are asked again
    after Retry-After, as far as time is left.
    """

    def __init__(self, url: str, model: str, total_s: float, key: str | None = None) -> None:
        self._url, self._model = page_under(normalise_base_url(url), "/chat/completions"), model
        self._end = time.monotonic() + total_s
        self._access = Access(api_key=key or os.environ.get(KEY) or None)
        self.unheard = 0
        """Questions without an answer."""
        self._lock = threading.Lock()

    def __call__(self, messages: list[dict[str, str]], schema: bytes) -> str | None:
        """The text of the reply; None: none."""
        shape = {"name": "verdict", "strict": True, "schema": msgspec.Raw(schema)}
        body = msgspec.json.encode({
            "model": self._model, "messages": messages, "max_tokens": MOST_REPLY_TOKENS, "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": shape},
        })  # fmt: skip
        headers = {"Content-Type": "application/json", **self._access.lines()}
        while (left := self._end - time.monotonic()) > 0:
            try:
                found = ask(
                    self._url, headers=headers, body=body, deadline_s=min(left, ANSWER_S), most_bytes=MOST_BYTES
                )
            except ServerError:
                break
            if found.status in (429, 503):
                pause = max(retry_after_s(found.retry_after) or 0.0, 0.25)
                if time.monotonic() + pause < self._end:
                    time.sleep(pause)
                    continue
                break
            if found.status != 200:
                break
            try:
                return msgspec.json.decode(found.body, type=_Reply).choices[0].message.content
            except (*DECODE_ERRORS, IndexError):
                break
        with self._lock:
            self.unheard += 1
        return None


class Label(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of labels: what a person says of one answer."""

    line: int
    """Of the trace, whose record was answered."""
    answer: str
    accepted: bool
    model: str
    """``current``, or a candidate as it is named on the command line."""


class PairLabel(msgspec.Struct, forbid_unknown_fields=True):
    """A line of a file of labels: which of two answers a person prefers."""

    line: int
    current: str
    candidate: str
    """Both answers."""
    better: Literal["current", "candidate", "tie"]
    model: str
    """The candidate as it is named on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledAnswer:
    """One answer that a person and the judge both graded; of a pair, each answer by whether the other is preferred."""

    model: str
    session: int
    label: bool
    judged: bool | None
    """None: no verdict."""
    pair: str | None = None
    """The candidate of its pair; None: it is of none."""
    turned: bool = False
    """The verdict of its pair turned with the order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTrial:
    """How a judge did before it was used."""

    canaries: int
    accepted: int
    """Canaries that it let through."""
    labelled: tuple[LabelledAnswer, ...]


def asks_judge(check: Check | None) -> bool:
    """Whether a judge decides in it."""
    return check is not None and any(isinstance(part, Judge) for part in parts(check))


def read_labels(path: Path) -> list[Label | PairLabel]:
    """Labels, JSON Lines. Raises `UsageError` with the line that is none."""
    found: list[Label | PairLabel] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"{path}: cannot read ({e.strerror})") from e
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_label(line))
            except DECODE_ERRORS as e:
                raise UsageError(
                    f"{path}:{number}: not a label ({e}): write "
                    '{"line": 12, "answer": "...", "accepted": true, "model": "current"} or, of a check prefer, '
                    '{"line": 12, "current": "...", "candidate": "...", "better": "tie", "model": "..."}'
                ) from e
    return found


def _label(line: bytes) -> Label | PairLabel:
    pair = "better" in msgspec.json.decode(line, type=dict[str, object])
    return msgspec.json.decode(line, type=PairLabel if pair else Label)


def question_of(record: AuditedRecord, answer: str) -> JudgeQuestion | None:
    """What a judge is asked of an answer to this record; None: its check asks none."""
    for part in parts(record.check) if record.check is not None else ():
        if isinstance(part, Judge):
            return JudgeQuestion(rubric=part.rubric, prompt=record.prompt, references=part.of, answer=answer)
    return None


def try_judge(
    judge: AskedJudge, records: Sequence[AuditedRecord], labels: Sequence[Label | PairLabel]
) -> JudgeTrial:  # fmt: skip
    """Ask canaries and labelled answers. Raises `UsageError` for a label of a line that no judge grades."""
    by_line = {record.source.line: record for record in records if asks_judge(record.check)}
    asked: list[tuple[Label, JudgeQuestion]] = []
    for label in labels:
        record = by_line.get(label.line)
        question = None if record is None or isinstance(label, PairLabel) else question_of(record, label.answer)
        if question is None or isinstance(label, PairLabel):
            raise UsageError(f"label of line {label.line}: the trace has no record there whose check asks a judge")
        asked.append((label, question))
    planted = list(_canaries(list(by_line.values())))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        heard = list(pool.map(judge.accepts, planted))
        judged = list(pool.map(judge.accepts, [question for _, question in asked]))
    return JudgeTrial(
        canaries=sum(one is not None for one in heard), accepted=sum(one is True for one in heard),
        labelled=tuple(
            LabelledAnswer(
                model=label.model, session=by_line[label.line].session, label=label.accepted, judged=verdict
            )
            for (label, _), verdict in zip(asked, judged, strict=True)
        ),
    )  # fmt: skip


def _canaries(records: Sequence[AuditedRecord]) -> Iterator[JudgeQuestion]:
    """Questions with another record's reference, or with no answer at all, as the answer; some order to accept it."""
    made = 0
    for k, record in enumerate(records):
        question = question_of(record, "")
        if question is None or made >= CANARIES:
            return
        known = {one.strip().casefold() for one in question.references}
        others = (other for step in range(1, min(len(records), 20))
                  if (other := question_of(records[(k + step) % len(records)], "")) is not None)  # fmt: skip
        wrong = next(
            (one for other in others for one in other.references if one.strip().casefold() not in known), GARBAGE[k % 2]
        )
        for one in canaries(question, wrong if question.references else GARBAGE[k % 2]):
            yield one
            made += 1
