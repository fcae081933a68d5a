"""An answer held against its check: accepted, rejected or not gradable, always with a reason from a closed set."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, assert_never

from harness.checks.judge import JudgeQuestion, Verdicts
from harness.checks.sandbox import Sandbox, program
from harness.checks.spec import (
    All,
    Any,
    Check,
    Code,
    Contains,
    Exact,
    IsJson,
    JsonSchema,
    Judge,
    Number,
    OneOf,
    Prefer,
    Regex,
    Similar,
    decides,
)  # fmt: skip
from harness.checks.structured import read_json, validator

if TYPE_CHECKING:
    import regex

MOST_CHARS = 1 << 20
"""Of an answer. A longer one is rejected: no cap of tokens that anybody pays for gives it."""
PATTERN_S = 0.5
"""Seconds that one search may take."""
COMPARED_CHARS = 20_000
"""Of either side of a likeness by characters, whose cost is the product of both."""
MARKS = 31
"""So many combining marks in a row are not text (Unicode allows 30 in UAX 15, "stream-safe"), and slow to normalise."""
Reason = Literal[
    "accepted", "empty", "too long", "not text", "other words", "not found", "no match", "no number",
    "several numbers", "other number", "no choice", "several choices", "other choice", "not json", "schema", "failed",
    "code failed", "code timed out", "judged wrong", "part rejected", "preferred", "other preferred",
    # neither of two answers is preferred
    "same", "tie", "turned", "first both times", "second both times", "compared",
    # not gradable
    "never decides", "pattern timed out", "no sandbox", "no judge", "judge failed", "check failed",
    "no other answer",
]  # fmt: skip
TURNED: tuple[Reason, ...] = ("turned", "first both times", "second both times")
"""The choice between two answers was another in the other order: so it was none."""
HALF: tuple[Reason, ...] = ("same", "tie", *TURNED, "compared")
"""Neither accepted nor rejected but half of it: neither of two answers is better, or it is the one of the current model
("compared"), with which those of others are compared."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What became of one answer."""

    accepted: bool | None
    """None: could not be graded, neither right nor wrong."""
    reason: Reason
    score: float | None = None
    """Likeness from 0 to 1, of `Similar` alone."""


ACCEPTED = Grade(True, "accepted")


class Grader:
    """Grades answers. ``sandbox`` runs code, ``judge`` is another model; without them such checks are not gradable."""

    def __init__(self, sandbox: Sandbox | None = None, judge: Verdicts | None = None) -> None:
        self._sandbox, self._judge = sandbox, judge

    def grade(self, check: Check, answer: str, prompt: str = "", other: str | None = None) -> Grade:
        """Grade of one answer; ``prompt`` is shown to a judge alone, as is the ``other`` answer of `Prefer`. Never
        raises.
        """
        try:
            if isinstance(check, Prefer) and answer == other:
                return Grade(None, "same")
            if len(answer) > MOST_CHARS:
                return Grade(False, "too long")
            if not answer.strip():
                return Grade(False, "empty")
            return self._grade(check, answer, prompt, other)
        except TimeoutError:
            return Grade(None, "pattern timed out")
        except Exception:
            return Grade(None, "check failed")

    def _grade(self, check: Check, answer: str, prompt: str, other: str | None) -> Grade:
        match check:
            case All() | Any():
                return self._several(check, answer, prompt)
            case Code():
                return self._code(check, answer)
            case Judge():
                return self._judged(check, answer, prompt)
            case Prefer():
                return self._chosen(check, answer, prompt, other)
            case IsJson() | JsonSchema():
                return _structured(check, answer)
            case Exact() if check.strict:
                return _or(answer in check.of, "other words")
            case Regex():
                found = _compiled(check.pattern)
                search = found.fullmatch if check.full else found.search
                return _or(search(answer, timeout=PATTERN_S) is not None, "no match")
        text = normal(answer)
        return Grade(False, "not text") if text is None else _words(check, text)

    def _several(self, check: All | Any, answer: str, prompt: str) -> Grade:
        """All: rejected as soon as one part rejects. Any: accepted as soon as one accepts. Else what is not known."""
        settled = isinstance(check, Any)
        last, unknown = ACCEPTED, None
        for part in check.checks:
            if not decides(part):
                continue
            last = self.grade(part, answer, prompt)
            if last.accepted is settled:
                return last
            unknown = last if last.accepted is None else unknown
        return unknown or last if decides(check) else Grade(None, "never decides")

    def _code(self, check: Code, answer: str) -> Grade:
        if self._sandbox is None:
            return Grade(None, "no sandbox")
        source, token = program(check, answer)
        ended = self._sandbox.run(source, check.timeout_s, check.memory_mib)
        if ended.how == "refused":
            return Grade(None, "no sandbox")
        if ended.how == "timed out":
            return Grade(False, "code timed out")
        return _or(ended.status == 0 and ended.output.rstrip().endswith(token), "code failed")

    def _judged(self, check: Judge, answer: str, prompt: str) -> Grade:
        if self._judge is None:
            return Grade(None, "no judge")
        right = self._judge.accepts(
            JudgeQuestion(rubric=check.rubric, prompt=prompt, references=check.of, answer=answer)
        )
        return Grade(None, "judge failed") if right is None else _or(right, "judged wrong")

    def _chosen(self, check: Prefer, answer: str, prompt: str, other: str | None) -> Grade:
        if self._judge is None:
            return Grade(None, "no judge")
        if other is None:
            return Grade(None, "no other answer")
        if not other.strip() or len(other) > MOST_CHARS:
            return Grade(True, "preferred")
        found = self._judge.prefers(
            JudgeQuestion(rubric=check.rubric, prompt=prompt, references=(), answer=other), answer
        )
        if found is None:
            return Grade(None, "judge failed")
        if found.better != "tie":
            return Grade(True, "preferred") if found.better == "candidate" else Grade(False, "other preferred")
        if found.place is not None:
            return Grade(None, "first both times" if found.place == "first" else "second both times")
        return Grade(None, "turned" if found.turned else "tie")


def _or(accepted: bool, reason: Reason) -> Grade:
    return ACCEPTED if accepted else Grade(False, reason)


def _words(check: Exact | Contains | Number | OneOf | Similar, text: str) -> Grade:
    match check:
        case Exact():
            return _or(bare(text) in {bare(normal(one) or "") for one in check.of}, "other words")
        case Contains():
            return _contains(check, text)
        case Number():
            return _number(check, text)
        case OneOf():
            return _choice(check, text)
        case Similar():
            return Grade(None, "never decides", max(likeness(check.how, text, normal(one) or "") for one in check.of))
        case _:
            assert_never(check)


def normal(text: str) -> str | None:
    """NFKC with plain minus signs and quotes; None where it is not text: dozens of marks on one letter."""
    if not text.isascii():
        if _compiled(rf"\p{{M}}{{{MARKS},}}+").search(text, timeout=PATTERN_S):
            return None
        text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return text


_PLAIN = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
     "\u0000": None, "\ufeff": None, "\u200b": None, "\u00ad": None, "\u200e": None, "\u200f": None}
)  # fmt: skip


def bare(text: str) -> str:
    """Without case, and without spaces, quotes, emphasis and full stops around it; spaces inside are one."""
    return " ".join(text.split()).strip("`\"'* ").rstrip(".!").strip("`\"'* ").casefold()


def _contains(check: Contains, text: str) -> Grade:
    def found(word: str) -> bool:
        left, right = (r"(?<!\w)" if word[0].isalnum() else ""), (r"(?!\w)" if word[-1].isalnum() else "")
        where = _compiled(left + _escaped(word) + right, ignore_case=not check.case)
        return where.search(text, timeout=PATTERN_S) is not None

    each = (found((normal(word) or word).strip()) for word in check.of)
    return _or(all(each) if check.all else any(each), "not found")


def _choice(check: OneOf, text: str) -> Grade:
    letter = all(len(one) == 1 for one in check.choices)
    words = sorted((normal(one.strip()) or one for one in check.choices), key=len, reverse=True)
    where = _compiled(rf"(?<!\w)(?:{'|'.join(map(_escaped, words))})(?!\w)", ignore_case=not letter)
    named = {m[0].casefold() for m in where.finditer(text, timeout=PATTERN_S)}
    if len(named) != 1:
        return Grade(False, "several choices" if named else "no choice")
    return _or(named == {(normal(check.answer.strip()) or "").casefold()}, "other choice")


_NUMBER = r"(?<![\p{L}\p{N}_.,])[+-]?\d[\d.,_]*+(?:[eE][+-]?\d{1,4}+)?"
_MOST_DIGITS = 400


def numbers(text: str, decimal: Literal[".", ","]) -> Iterable[float]:
    """Numbers in text as `normal` gives it. One that is not written by the convention (``1.234,5`` where decimals come
    after a full stop) is none, nor is one that no float holds, nor digits behind a letter.
    """
    groups = "," if decimal == "." else "."
    written = _compiled(rf"[+-]?(?:\d++|\d{{1,3}}(?:[{groups}_]\d{{3}})++)(?:[{decimal}]\d++)?(?:[eE][+-]?\d++)?")
    for match in _compiled(_NUMBER).finditer(text, timeout=PATTERN_S):
        digits = match[0].rstrip(".,_")
        if len(digits) <= _MOST_DIGITS and written.fullmatch(digits):
            value = float(digits.replace(groups, "").replace("_", "").replace(decimal, "."))
            if math.isfinite(value):
                yield value


def _number(check: Number, text: str) -> Grade:
    found = list(numbers(text, check.decimal))
    if not found:
        return Grade(False, "no number")
    if check.which == "only" and len(set(found)) > 1:
        return Grade(False, "several numbers")
    value = found[0] if check.which == "first" else found[-1]
    assert check.value is not None  # `parse_check` refuses one without
    return _or(math.isclose(value, check.value, rel_tol=check.rel, abs_tol=check.abs), "other number")


def _structured(check: IsJson | JsonSchema, answer: str) -> Grade:
    try:
        value = read_json(answer)
    except ValueError:
        return Grade(False, "not json")
    if isinstance(check, IsJson):
        return ACCEPTED
    return _or(validator(bytes(check.schema)).is_valid(value), "schema")


def likeness(how: Literal["ratio", "token_f1"], one: str, other: str) -> float:
    """From 0 to 1. ratio: of characters, by insertions and deletions; token_f1: of words, however they are ordered."""
    if how == "ratio":
        from rapidfuzz import fuzz

        return fuzz.ratio(bare(one[:COMPARED_CHARS]), bare(other[:COMPARED_CHARS])) / 100
    words, others = Counter(bare(one).split()), Counter(bare(other).split())
    shared = (words & others).total()
    return 2 * shared / (words.total() + others.total()) if shared else 0.0


@lru_cache(maxsize=1024)
def _compiled(pattern: str, ignore_case: bool = False) -> regex.Pattern[str]:
    import regex

    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)


def _escaped(word: str) -> str:
    import regex

    return regex.escape(word)
