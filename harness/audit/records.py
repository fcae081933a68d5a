"""The records of an audit, and the traces made of them: each pass replays a trace of its own.

The quality pass sends every record once, in an order of its own, with its cap as length: no clock, no session (turns
carry the recorded history), nothing forced. The load pass sends the trace as it was recorded, with the lengths that the
model under load gave by itself. Both are private files (0600), as plans are: they hold the prompts of users.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
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
    Prefer,
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
            if isinstance(gate, Prefer):
                raise UsageError("gate: production has no second answer to prefer one to")
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
    """At most ``most`` graded records, drawn by ``seed``, in the order of the trace.

    Tags and kinds of check keep their shares, as do the sessions in each, and the truths in these as far as they can:
    of a few whole sessions, one constant answer might be right. Conversations stay whole; a session all of whose
    records are a first turn is none. Records without a check come with their sessions.
    """
    luck = np.random.default_rng(seed).permutation(len(records)).tolist()
    by_session: dict[int, list[int]] = {}
    for k, record in enumerate(records):
        by_session.setdefault(record.session, []).append(k)
    strata: dict[object, dict[int, list[tuple[list[int], object]]]] = {}
    had_truths, truths = Counter[object](), Counter[object]()
    for session, places in by_session.items():
        graded = [k for k in places if records[k].check is not None]
        apart = all(records[k].source.turn == 0 for k in places)
        for unit in [] if not graded else [[k] for k in graded] if apart else [places]:
            first = records[graded[0] if not apart else unit[0]]
            name: object = (first.kind, *sorted(first.source.tags or ()))
            truth: object = (name, first.sha256)
            strata.setdefault(name, {}).setdefault(session, []).append((unit, truth))
            had_truths[truth] += 1
    # the least drawn stratum is next, and in it the least drawn session: (share drawn, luck, what, how many it had)
    waiting = [(0.0, luck[next(iter(parts.values()))[0][0][0]], name, sum(map(len, parts.values())))
               for name, parts in strata.items()]  # fmt: skip
    inside = {name: [(0.0, luck[units[0][0][0]], session, len(units)) for session, units in parts.items()]
              for name, parts in strata.items()}  # fmt: skip
    for heap in (waiting, *inside.values()):
        heapq.heapify(heap)  # type: ignore[arg-type]
    taken, left = set[int](), most
    while waiting and left:
        drawn, tie, name, had = heapq.heappop(waiting)
        share, order_, session, units_had = heapq.heappop(inside[name])
        units = strata[name][session]
        unit, truth = min(units, key=lambda one: (truths[one[1]] / had_truths[one[1]], luck[one[0][0]]))
        units.remove((unit, truth))
        truths[truth] += 1
        size = sum(records[k].check is not None for k in unit)
        if size <= left:
            taken.update(unit)
            left -= size
        if units:
            heapq.heappush(inside[name], (share + 1 / units_had, order_, session, units_had))
        if inside[name]:
            heapq.heappush(waiting, (drawn + 1 / had, tie, name, had))
    came = {records[k].session for k in taken}
    ungraded = {session for session, places in by_session.items() if all(records[k].check is None for k in places)}
    return [one for k, one in enumerate(records)
            if k in taken or (one.check is None and one.session in came | ungraded)]  # fmt: skip


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
