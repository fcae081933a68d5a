"""The records of an audit, and the traces made of them: each pass replays a trace of its own.

The quality pass sends every record once, in an order of its own, with its cap as length: no clock, no session (turns
carry the recorded history), nothing forced. The load pass sends the trace as it was recorded, with the lengths that the
model under load gave by itself. Both are private files (0600), as plans are: they hold the prompts of users.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from harness.checks.lint import kind
from harness.checks.spec import (
    Check,
    Code,
    Contains,
    Exact,
    Judge,
    Number,
    OneOf,
    Regex,
    check_sha256,
    parse_check,
    parts,
)
from harness.errors import UsageError
from harness.trace.formats.jsonl import Line
from harness.trace.formats.record import TraceRecord
from harness.trace.io import Trace

_PREFIX = 64
"""Characters of a beginning that two prompts share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRecord:
    """One request of the trace, as an audit sees it."""

    row: int
    """Of the records that are kept, from 0."""
    source: TraceRecord
    check: Check | None
    """None: it has none, and is sent under load alone."""
    gate: Check | None
    session: int
    """The same for records of a session, and for sessions that share a prompt."""

    @property
    def prompt(self) -> str:
        """All that is sent, as text."""
        if self.source.messages is None:
            return self.source.text or ""
        return "\n".join(one["content"] for one in self.source.messages)

    @property
    def sha256(self) -> str:
        """Of the check; empty without one."""
        return "" if self.check is None else check_sha256(self.check)

    @property
    def kind(self) -> str:
        """Of the check; empty without one."""
        return "" if self.check is None else kind(self.check)


def read_records(trace: Trace, default: str | None, limit: int | None) -> list[AuditedRecord]:
    """The first ``limit`` records with their checks. ``default``: check, as JSON, of those that have none.

    Raises `UsageError` with the line of a check that cannot be used, and for records without a prompt.
    """
    found: list[AuditedRecord] = []
    sessions: dict[str, int] = {}
    for row, source in enumerate(trace):
        if row == limit:
            break
        if source.text is None and source.messages is None:
            raise UsageError(f"{trace.path}:{source.line}: has no prompt or messages: made-up prompts cannot be graded")
        try:
            text = source.check or (default if source.expected else None)
            check = None if text is None else parse_check(text, source.expected)
            gate = None if source.gate is None else parse_check(source.gate)  # production has no 'expected'
        except UsageError as e:
            raise UsageError(f"{trace.path}:{source.line}: {e}") from e
        key = source.session_id if source.session_id is not None else f"\0{row}"
        session = sessions.setdefault(key, len(sessions))
        found.append(AuditedRecord(row=row, source=source, check=check, gate=gate, session=session))
    return _clustered(found)


def _clustered(records: list[AuditedRecord]) -> list[AuditedRecord]:
    """Sessions with a prompt in common are one: asked twice, the same prompt tells nothing twice."""
    root = list(range(len(records)))

    def find(one: int) -> int:
        while root[one] != one:
            root[one] = one = root[root[one]]
        return one

    first: dict[str, int] = {}
    for record in records:
        one, other = find(record.session), find(first.setdefault(record.prompt, record.session))
        root[max(one, other)] = min(one, other)
    return [replace(record, session=find(record.session)) for record in records]


def prompt_sha256(source: TraceRecord) -> str:
    """Of what is sent: the same for the same prompt in another trace, whatever its check."""
    return hashlib.sha256(msgspec.json.encode(source.messages or source.text)).hexdigest()


def without_seen(records: Sequence[AuditedRecord], seen: Collection[str]) -> list[AuditedRecord]:
    """The records, those of a session without their check of which a model has ``seen`` one: it is sent, not graded."""
    taken = {record.session for record in records if seen and prompt_sha256(record.source) in seen}
    return [replace(one, check=None, gate=None) if one.session in taken else one for one in records]


def check_gates(records: Sequence[AuditedRecord], path: str, *, decide: bool = True) -> None:
    """Raise `UsageError` where gates ``decide`` but none is there or one knows the truth: a saving nobody can have."""
    if not decide:
        return
    if not any(record.gate is not None for record in records):
        raise UsageError(f"{path}: no record has a 'gate', which decides --tries and --escalate")
    for record in records:
        if record.gate is not None and _truths(record.gate) & (
            _truths(record.check) | set(record.source.expected or ())
        ):
            raise UsageError(f"{path}:{record.source.line}: its gate knows the right answer, which production does not")


def _truths(check: Check | None) -> set[str]:
    """What the parts of a check compare an answer with."""
    found = set[str]()
    for part in parts(check) if check is not None else ():
        match part:
            case Exact() | Contains() | Judge():
                found.update(part.of)
            case Number():
                found.add(f"number {part.value!r}")
            case OneOf():
                found.add(part.answer)
            case Regex():
                found.add(f"pattern {part.pattern}")
            case Code():
                found.add(f"code {part.test}")
    return found


def checks_sha256(records: Iterable[AuditedRecord]) -> str:
    """Over the check and the gate of every record: what is right is fixed before anybody is asked."""
    whole = hashlib.sha256()
    for record in records:
        gate = "" if record.gate is None else check_sha256(record.gate)
        whole.update(f"{record.sha256} {gate}\n".encode())
    return whole.hexdigest()


def sampled(records: Sequence[AuditedRecord], most: int, seed: int) -> list[AuditedRecord]:
    """Whole sessions, drawn by ``seed``, until ``most`` graded records would be passed; in the order of the trace."""
    sizes: dict[int, int] = {}
    for record in records:
        sizes[record.session] = sizes.get(record.session, 0) + (record.check is not None)
    taken, left = set[int](), most
    for session in np.random.default_rng(seed).permutation(list(sizes)).tolist():
        if sizes[session] <= left:
            taken.add(session)
            left -= sizes[session]
    return [record for record in records if record.session in taken]


def order(graded: Sequence[AuditedRecord], seed: int, again: int) -> list[AuditedRecord]:
    """The records in the order in which pass ``again`` (from 1) asks them."""
    return [graded[k] for k in np.random.default_rng([seed, again]).permutation(len(graded))]


def shares_prefix(records: Sequence[AuditedRecord]) -> list[bool]:
    """Whether the beginning of each prompt is that of another record, too."""
    heads = [record.prompt[:_PREFIX] for record in records]
    counts: dict[str, int] = {}
    for head in heads:
        counts[head] = counts.get(head, 0) + 1
    return [counts[head] > 1 for head in heads]


def cap(record: AuditedRecord, most: int) -> int:
    """Tokens that an answer may have: production's own cap, else ``most``."""
    return record.source.max_tokens or most


def write_quality_trace(path: Path, asked: Sequence[AuditedRecord], most: int) -> None:
    """What the quality pass sends, in the order asked; the planned length is the cap."""
    _write(path, (_line(record, output_tokens=cap(record, most)) for record in asked))


def write_load_trace(path: Path, records: Sequence[AuditedRecord], lengths: Sequence[int]) -> None:
    """The trace as recorded, with ``lengths``: the output tokens of each record."""
    _write(
        path,
        (
            _line(
                record, output_tokens=length, arrival_s=record.source.arrival_s, session_id=record.source.session_id,
                turn=record.source.turn,
            )
            for record, length in zip(records, lengths, strict=True)
        ),
    )  # fmt: skip


def _line(record: AuditedRecord, **fields: float | str | None) -> Line:
    said = {"messages": record.source.messages} if record.source.messages else {"prompt": record.source.text}
    return msgspec.convert({**said, **fields}, Line)


def _write(path: Path, lines: Iterable[Line]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        for line in lines:
            given = {name: value for name, value in msgspec.structs.asdict(line).items() if value is not None}
            out.write(msgspec.json.encode(given) + b"\n")
    temporary.replace(path)
