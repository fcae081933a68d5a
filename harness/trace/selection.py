"""Which rows of a trace are kept: those wanted (``--where model=llama-3*``), and those whose arrival goes forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

from harness.errors import UsageError, unknown_name
from harness.trace.formats.record import MAX_ARRIVAL_S, LeftOutError, RowError, TraceRecord

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


class ArrivalOrder:
    """Shifts arrivals to zero, refuses those that go back, and watches for a coarse clock."""

    def __init__(self, part: int | None = None) -> None:
        self._part = part
        self._current = 1
        self._first_ns: int | None = None
        self._last_ns: int | None = None
        self._before_ns: int | None = None
        self._timed: bool | None = None
        self._steps: Counter[int] = Counter()
        self.instants = 0

    @property
    def span_s(self) -> float | None:
        """From the first row to the last; None without times."""
        return None if self._first_ns is None or self._last_ns is None else (self._last_ns - self._first_ns) / 1e9

    def arrival_ns(self, row: TraceRecord) -> int | None:
        """Nanoseconds after the first row; None when the trace has no times. Raises `RowError` and `LeftOutError`."""
        now_ns = row.arrival_ns
        if self._timed is None:
            self._timed = now_ns is not None
        if self._timed != (now_ns is not None):
            has = "no arrival_s, but rows before have" if self._timed else "arrival_s, but rows before have none"
            raise RowError("arrival_s on some rows only", f"{has}: all rows or none")
        if now_ns is None:
            return None
        if self._part is not None and not self._in_part(now_ns, self._part):
            raise LeftOutError("in another part of the file")
        if self._first_ns is None or self._last_ns is None:
            self._first_ns = self._last_ns = now_ns
            self.instants = 1
        if now_ns - self._first_ns > MAX_ARRIVAL_S * 1_000_000_000:
            years = (now_ns - self._first_ns) / 3.156e16
            raise RowError(
                "arrival centuries late", f"arrives {years:.0f} years after the first row: no time of one trace"
            )
        step_ns = now_ns - self._last_ns
        if step_ns:
            if step_ns < 0:
                raise RowError(
                    "arrival before the row above",
                    f"arrives {-step_ns / 1e9:.9g} s before the row above: a trace goes forward in time. Does the file "
                    "hold several recordings? 'harness trace convert --part N' cuts out one; --sort puts rows in order",
                )
            # Whole milliseconds, as coarse clocks have a jitter of one; bounded, as fine clocks need no counting.
            if len(self._steps) < 10_000:
                self._steps[(step_ns + 500_000) // 1_000_000] += 1
            self._last_ns = now_ns
            self.instants += 1
        return now_ns - self._first_ns

    def _in_part(self, now_ns: int, part: int) -> bool:
        """Whether the row is in the wanted part; each part begins where time goes back."""
        if self._before_ns is not None and now_ns < self._before_ns:
            self._current += 1
        self._before_ns = now_ns
        return self._current == part

    def grid_s(self, rows: int) -> float | None:
        """Step of the clock the source rounded to, seconds; None when the arrivals show no coarse one.

        A grid is said to be there when 95 % of at least 10 steps between different arrivals are whole multiples (to
        2 ms) of the most frequent one, that one is at least 0.1 s, and ``rows`` clearly outnumber the instants:
        otherwise rounding shapes no burst worth telling.
        """
        steps = self._steps
        total = steps.total()
        if total < 10 or rows < 1.05 * self.instants:
            return None
        grid_ms = steps.most_common(1)[0][0]
        if grid_ms < 100:
            return None
        on_grid = sum(n for ms, n in steps.items() if min(ms % grid_ms, -ms % grid_ms) <= 2 and ms > 2)
        return grid_ms / 1000 if on_grid >= 0.95 * total else None
