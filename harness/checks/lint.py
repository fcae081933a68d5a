"""Are the checks of a trace any good? Before anything is rented: held against recorded answers, others' and garbage.

A check that never passes or always does tells nothing, and a slice where one constant answer passes is no measurement:
a model that always says "positive" is right in half of a balanced set.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from harness.checks.grade import Grader, Reason
from harness.checks.spec import Check, Exact, check_sha256, decides, parse_check, parts
from harness.errors import UsageError

GARBAGE = ("I'm sorry, but I can't help with that.", "lorem ipsum dolor sit amet", "?", "null", "\ufffd" * 40)
"""Answers to nothing. A check that accepts one accepts anything."""
CONSTANTS = 3
"""The most frequent right and recorded answers of a group, each tried on all of its records."""
MOST_CONSTANT = 0.4
"""Share of a group that one constant answer may pass."""
MOST_OTHERS = 0.5
"""Share of a group whose check may accept the answer recorded for another record."""
MOST_UNGRADED = 0.02
UNTRIED: tuple[Reason, ...] = ("no sandbox", "no judge", "no other answer")
"""Why a check was not tried here, which is no fault of it."""
FEWEST = 5
"""Records of a group before a share of it is a fault."""
MOST_PROBLEMS = 20
Fault = Literal[
    "never passes", "accepts others' answers", "accepts garbage", "a constant answer passes", "often not gradable",
    "decides nothing", "gate is the check",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LintRecord:
    """What of a record concerns its check."""

    line: int
    check: str | None
    """JSON; None: it has none."""
    gate: str | None
    expected: Sequence[str] | None
    answer: str | None
    """As production recorded it."""
    prompt: str = ""
    tags: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LintGroup:
    """The checks of one kind, or of one tag. Shares are None where nothing was there to grade."""

    name: str
    records: int
    own: float | None
    """Share of recorded answers that their own check accepts."""
    others: float | None
    """Share of checks that accept the answer recorded for another record."""
    garbage: int
    """Records whose check accepts an answer to nothing."""
    constant: float | None
    """Share that the best constant answer passes."""
    ungraded: float
    """Share of recorded answers that could not be graded."""
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lint:
    """All of it."""

    records: int
    checked: int
    """Records with a check that can be used."""
    unusable: int
    problems: tuple[tuple[int, str], ...]
    """(line, why) of the first checks and gates that cannot be used."""
    groups: tuple[LintGroup, ...]
    hashes: tuple[str, ...]
    """SHA-256 of the checks, each once, sorted: what an audit is bound to beforehand."""

    @property
    def sound(self) -> bool:
        """Every check can be used and no group has a fault."""
        return not self.unusable and not any(group.faults for group in self.groups)


@dataclass(slots=True)
class _Tally:
    """Of one group, while records pass."""

    own: list[bool | None] = field(default_factory=list)
    others: list[bool | None] = field(default_factory=list)
    garbage: int = 0
    deciding: int = 0
    same_gate: int = 0
    rows: list[tuple[Check, str]] = field(default_factory=list)
    constants: Counter[str] = field(default_factory=Counter)


def lint(records: Iterable[LintRecord], grader: Grader, default: str | None = None) -> Lint:
    """Hold every check against answers. ``default``: check, as JSON, of records that have none of their own."""
    usable: list[tuple[LintRecord, Check, Check | None]] = []
    problems: list[tuple[int, str]] = []
    total = unusable = 0
    for record in records:
        total += 1
        try:
            gate = None if record.gate is None else parse_check(record.gate, record.expected)
            if (text := record.check or default) is not None:
                usable.append((record, parse_check(text, record.expected), gate))
        except UsageError as e:
            unusable += 1
            if len(problems) < MOST_PROBLEMS:
                problems.append((record.line, str(e)))
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    answered = [record for record, _, _ in usable if record.answer]
    place = {id(record): k for k, record in enumerate(answered)}
    for record, check, gate in usable:
        other = _other(record, answered, place)
        names = (f"check {kind(check)}", *(f"{name} {value}".strip() for name, value in record.tags))
        own = grader.grade(check, record.answer, record.prompt) if record.answer else None
        wrong = grader.grade(check, other, record.prompt).accepted if other is not None else None
        junk = any(grader.grade(check, one, record.prompt).accepted for one in GARBAGE)
        for name in names:
            tally = tallies[name]
            tally.rows.append((check, record.prompt))
            tally.deciding += decides(check)
            tally.same_gate += gate == check
            tally.garbage += junk
            if own is not None and own.reason not in UNTRIED:
                tally.own.append(own.accepted)
            if record.answer:
                tally.constants[record.answer] += 1
            if other is not None:
                tally.others.append(wrong)
            tally.constants.update(record.expected or _truth(check))
    return Lint(
        records=total, checked=len(usable), unusable=unusable, problems=tuple(problems),
        groups=tuple(_group(name, tally, grader) for name, tally in sorted(tallies.items())),
        hashes=tuple(sorted({check_sha256(check) for _, check, _ in usable})),
    )  # fmt: skip


def kind(check: Check) -> str:
    """Its name in JSON."""
    return str(check.__struct_config__.tag)


def _truth(check: Check) -> list[str]:
    return [one for part in parts(check) if isinstance(part, Exact) for one in part.of]


def _other(record: LintRecord, answered: Sequence[LintRecord], place: dict[int, int]) -> str | None:
    """The answer of another record that is not the same answer: the next one, a few further on at most."""
    first = place.get(id(record), -1) + 1
    for step in range(min(len(answered), 10)):
        other = answered[(first + step) % len(answered)]
        if other.answer != record.answer and (record.expected is None or other.expected != record.expected):
            return other.answer
    return None


def _share(found: Sequence[bool | None]) -> float | None:
    known = [one for one in found if one is not None]
    return sum(known) / len(known) if known else None


def _group(name: str, tally: _Tally, grader: Grader) -> LintGroup:
    n = len(tally.rows)
    constant: float | None = None
    if n >= FEWEST:
        passed = [
            sum(grader.grade(check, answer, prompt).accepted is True for check, prompt in tally.rows) / n
            for answer, _ in tally.constants.most_common(CONSTANTS)
        ]
        constant = max(passed, default=None)
    own, others = _share(tally.own), _share(tally.others)
    ungraded = tally.own.count(None) / len(tally.own) if tally.own else 0.0
    faults: dict[Fault, bool] = {
        "decides nothing": tally.deciding < n,
        "never passes": n >= FEWEST and own == 0,
        "accepts others' answers": n >= FEWEST and others is not None and others > MOST_OTHERS,
        "accepts garbage": tally.garbage > 0,
        "a constant answer passes": constant is not None and constant > MOST_CONSTANT,
        "often not gradable": ungraded > MOST_UNGRADED and tally.deciding == n,
        "gate is the check": tally.same_gate > 0,
    }
    return LintGroup(
        name=name, records=n, own=own, others=others, garbage=tally.garbage, constant=constant, ungraded=ungraded,
        faults=tuple(fault for fault, found in faults.items() if found),
    )  # fmt: skip
