"""Which rows of a trace are wanted: ``--where model=llama-3*``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from harness.errors import UsageError, unknown_name
from harness.trace.formats.record import TraceRecord

Field = Literal["model", "session", "adapter"]
FIELDS: tuple[Field, ...] = get_args(Field)


@dataclass(frozen=True, slots=True)
class Where:
    """Rows whose field matches one of the patterns (``*``, ``?`` and ``[...]`` as in names of files; case counts)."""

    field: Field
    patterns: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.field}={'|'.join(self.patterns)}"

    def matches(self, row: TraceRecord) -> bool:
        """Whether the row is wanted; one that does not say the field is not."""
        value = {"model": row.model, "session": row.session_id, "adapter": row.adapter}[self.field]
        return value is not None and any(fnmatchcase(value, pattern) for pattern in self.patterns)


def parse_where(texts: Iterable[str]) -> tuple[Where, ...]:
    """``FIELD=PATTERN`` or ``FIELD=PATTERN|PATTERN``; a row must match each. Raises `UsageError`."""
    found = []
    for text in texts:
        field, equals, patterns = text.partition("=")
        some = tuple(pattern.strip() for pattern in patterns.split("|"))
        if not equals or not all(some):
            raise UsageError(f"--where {text!r}: expected FIELD=PATTERN, like model=llama-3*")
        if field.strip() not in FIELDS:
            raise unknown_name("field", field.strip(), FIELDS)
        found.append(Where(cast(Field, field.strip()), some))
    return tuple(found)


def unmatched(row: TraceRecord, wanted: Sequence[Where]) -> str | None:
    """Why a row is left out; None: it is wanted."""
    return next((f"not {where} (--where)" for where in wanted if not where.matches(row)), None)
