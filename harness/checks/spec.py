"""What a check may say: a closed set of kinds as typed JSON, read once, refused with a reason, and hashed.

``check`` is the truth and used by the audit alone; ``gate`` is what production itself can test of an answer. Both are
written in this form. Where ``of`` is left out it is the record's ``expected``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from harness.errors import UsageError
from harness.install import install_command
from harness.untrusted import DECODE_ERRORS

VERSION = 1
"""Of what the checks do. It is hashed with them: another version may grade the same answer otherwise."""
MOST_CHARS, MOST_PARTS, MOST_DEPTH = 100_000, 100, 4
"""Of the JSON of a check, of ``of`` and its like, and of all and any inside each other."""
MOST_PATTERN, MOST_REPEATS = 5_000, 10_000
"""Of a regular expression: counted repeats inside each other take memory as their product."""
_REPEATS = re.compile(r"\{(\d{1,99})(?:,(\d{0,99}))?\}")


class _Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all."""

    def problem(self) -> str | None:
        """Why it cannot tell right from wrong; None where it can."""
        return None


class Exact(_Check, frozen=True, tag="exact"):
    """The answer is one of ``of``: case, spaces, quotes and a full stop around it do not count unless ``strict``."""

    of: tuple[str, ...] = ()
    strict: bool = False

    def problem(self) -> str | None:
        """No truth to hold it against."""
        return _words_problem(self.of)


class Contains(_Check, frozen=True, tag="contains"):
    """One of ``of`` stands in the answer, or all of them, as whole words; ``case`` counts if asked."""

    of: tuple[str, ...] = ()
    all: bool = False
    case: bool = False

    def problem(self) -> str | None:
        """No truth to hold it against."""
        return _words_problem(self.of)


class Regex(_Check, frozen=True, tag="regex"):
    """The pattern is found in the answer, or is the whole of it, within a second. Syntax: PyPI's regex."""

    pattern: str
    full: bool = False

    def problem(self) -> str | None:
        """A pattern that is invalid, too costly, or found in any answer."""
        return _regex_problem(self.pattern)


class Number(_Check, frozen=True, tag="number"):
    """The last, first or only number of the answer is ``value``, within the larger of both tolerances.

    Without ``value`` it is the record's ``expected``, or any one of several, written with a decimal point. ``decimal``
    is the sign before decimals in the answer; the other of ``.`` and ``,`` may group thousands.
    """

    value: float | None = None
    abs: float = 0.0
    rel: float = 1e-9
    which: Literal["last", "first", "only"] = "last"
    decimal: Literal[".", ","] = "."

    def problem(self) -> str | None:
        """No truth to hold it against, or a tolerance out of bounds."""
        if self.value is None or not math.isfinite(self.value):
            return "'value' (or the record's 'expected') is not a number"
        fine = 0 <= self.abs < math.inf and 0 <= self.rel < 1
        return None if fine else "'abs' is at least 0, 'rel' from 0 to below 1"


class OneOf(_Check, frozen=True, tag="choice"):
    """The answer names ``answer`` (left out: the record's one ``expected``) and no other of ``choices``. Single letters
    must be capitals as they are given.
    """

    choices: tuple[str, ...]
    answer: str = ""

    def problem(self) -> str | None:
        """Choices that cannot be told apart, or a truth that is none of them."""
        folded = {one.strip().casefold() for one in self.choices} - {""}
        if not 2 <= len(self.choices) <= MOST_PARTS or len(folded) < len(self.choices):
            return f"'choices' are 2 to {MOST_PARTS} different words"
        return None if self.answer in self.choices else "'answer' is none of 'choices'"


class IsJson(_Check, frozen=True, tag="json"):
    """The answer is JSON, perhaps in a code fence; RFC 8259, no key twice, no number beyond a float."""


class JsonSchema(_Check, frozen=True, tag="json_schema"):
    """The answer is JSON that the schema allows. It refers to nothing outside itself; patterns match in linear time."""

    schema: msgspec.Raw

    def problem(self) -> str | None:
        """A schema that is invalid, reaches outside, or allows anything."""
        return _schema_problem(bytes(self.schema))


class Similar(_Check, frozen=True, tag="similar"):
    """How alike the answer is to the nearest of ``of``, 0 to 1. It never decides: near the current model's answers,
    likeness does not rank quality. Source: Nikolic, arXiv 2606.19558.
    """

    of: tuple[str, ...] = ()
    how: Literal["ratio", "token_f1"] = "token_f1"

    def problem(self) -> str | None:
        """Nothing to be like."""
        return _words_problem(self.of)


class Code(_Check, frozen=True, tag="code"):
    """``before``, the answer's code and ``test`` run as one Python program in a sandbox, to the end of ``test``.

    The program may read the standard library, write nothing, start no other, and reach no network. ``fenced``: of an
    answer with code fences take what the first holds.
    """

    test: str
    before: str = ""
    fenced: bool = True
    timeout_s: float = 5.0
    memory_mib: int = 512

    def problem(self) -> str | None:
        """No test, or limits out of bounds."""
        if not self.test.strip():
            return "'test' is empty: any program would pass"
        fine = 0 < self.timeout_s <= 60 and 64 <= self.memory_mib <= 4096
        return None if fine else "'timeout_s' is up to 60, 'memory_mib' from 64 to 4096"


class Judge(_Check, frozen=True, tag="judge"):
    """Another model's verdict by a rubric, beside the reference ``of`` where there is one."""

    rubric: str
    of: tuple[str, ...] = ()

    def problem(self) -> str | None:
        """Nothing to judge by."""
        return None if self.rubric.strip() else "'rubric' is empty"


class Prefer(_Check, frozen=True, tag="prefer"):
    """Another model's choice, by a rubric, between the answer and the current model's, which it sees in both orders."""

    rubric: str

    def problem(self) -> str | None:
        """Nothing to choose by."""
        return None if self.rubric.strip() else "'rubric' is empty"


class _Several(_Check, frozen=True):
    checks: tuple[Check, ...]

    def problem(self) -> str | None:
        """No part, or one that is about two answers."""
        if any(isinstance(one, Prefer) for one in self.checks):
            return "'prefer' compares two answers, so it is no part of another check"
        return None if self.checks else "'checks' is empty"


class All(_Several, frozen=True, tag="all"):
    """Every part accepts."""


class Any(_Several, frozen=True, tag="any"):
    """One part at least accepts."""


Check = Exact | Contains | Regex | Number | OneOf | IsJson | JsonSchema | Similar | Code | Judge | Prefer | All | Any
_DECODER = msgspec.json.Decoder(Check)


def parse_check(text: str, expected: Sequence[str] | None = None) -> Check:
    """A check from its JSON, ``expected`` put in where it says nothing itself.

    Raises `UsageError` for what is not a check, cannot be judged by (an empty truth, a pattern or schema that is
    invalid) or needs a library that is not installed.
    """
    check = _with_expected(decode_check(text), tuple(expected or ()))
    if len(tuple(parts(check))) > MOST_PARTS or _depth(check) > MOST_DEPTH:
        raise UsageError(f"check: more than {MOST_PARTS} parts, or all and any more than {MOST_DEPTH} deep")
    for part in parts(check):
        if (problem := part.problem()) is not None:
            raise UsageError(f"check {part.__struct_config__.tag}: {problem}")
    return check


def decode_check(text: str) -> Check:
    """A check from its JSON, which may lack the truth that a record has. Raises `UsageError` for what is not one."""
    if len(text) > MOST_CHARS:
        raise UsageError(f"check: longer than {MOST_CHARS:,} characters")
    try:
        return _DECODER.decode(text)
    except (*DECODE_ERRORS, UnicodeEncodeError) as e:
        raise UsageError(f"check: {'nested too deeply' if isinstance(e, RecursionError) else e}") from e


def parts(check: Check) -> Iterator[Check]:
    """The check and all inside it."""
    yield check
    if isinstance(check, All | Any):
        for part in check.checks:
            yield from parts(part)


def decides(check: Check) -> bool:
    """Whether it can accept or reject: `Similar` alone never does."""
    return any(not isinstance(part, Similar | All | Any) for part in parts(check))


def check_sha256(check: Check) -> str:
    """Of what the check says and of the `VERSION` that reads it: the same for the same JSON in another order."""
    canonical = msgspec.json.encode(msgspec.json.decode(msgspec.json.encode(check)), order="sorted")
    return hashlib.sha256(b"%d %s" % (VERSION, canonical)).hexdigest()


def _with_expected(check: Check, expected: tuple[str, ...]) -> Check:
    if isinstance(check, All | Any):
        return type(check)(checks=tuple(_with_expected(part, expected) for part in check.checks))
    if isinstance(check, Number) and check.value is None and expected:
        each = tuple(msgspec.structs.replace(check, value=_number(one)) for one in expected)
        return each[0] if len(each) == 1 else Any(checks=each)
    if isinstance(check, OneOf) and not check.answer and len(expected) == 1:
        return msgspec.structs.replace(check, answer=expected[0])
    if isinstance(check, Exact | Contains | Similar | Judge) and not check.of and expected:
        return msgspec.structs.replace(check, of=expected)
    return check


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _depth(check: Check) -> int:
    return 1 + max(map(_depth, check.checks), default=0) if isinstance(check, All | Any) else 0


def _words_problem(of: tuple[str, ...]) -> str | None:
    if not of or not all(one.strip() for one in of):
        return "'of' (or the record's 'expected') has no words, or an empty one"
    return None if len(of) <= MOST_PARTS else f"'of' has more than {MOST_PARTS} entries"


def _regex_problem(pattern: str) -> str | None:
    try:
        import regex
    except ImportError:
        return f"needs the package regex: {install_command('audit')}"
    counts = [int(most or least) for least, most in _REPEATS.findall(pattern)]
    if math.prod(max(count, 1) for count in counts) > MOST_REPEATS or len(pattern) > MOST_PATTERN:
        return f"'pattern' is longer than {MOST_PATTERN:,} or repeats more than {MOST_REPEATS:,} times in all"
    try:
        found = regex.compile(pattern).search("", timeout=1.0)
    except (regex.error, RecursionError, OverflowError, TimeoutError) as e:
        return f"'pattern' cannot be used ({type(e).__name__})"
    return "'pattern' is found in an empty answer, so in any" if found else None


def _schema_problem(schema: bytes) -> str | None:
    from harness.checks.structured import validator

    try:
        validator(schema)
    except ImportError:
        return f"needs the package jsonschema-rs: {install_command('audit')}"
    except Exception as e:
        return f"'schema' cannot be used ({type(e).__name__}); it must be valid, and refer to nothing outside itself"
    return None if schema.strip(b" {}") else "'schema' is empty: say json where any JSON will do"
