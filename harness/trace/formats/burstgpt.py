"""BurstGPT traces: CSV of ChatGPT and GPT-4 calls at a university, on a clock of whole seconds.

====================  ================================================================================================
``Timestamp``         **seconds** from midnight of the first day; integers in versions 1 and 2, floats that do not begin
                      at zero in version 3
``Session ID``        version 3 only, inserted as second column; empty on rows of the API log
``Request tokens``    input tokens
``Response tokens``   output tokens; zero is a call that failed
``Total tokens``      their sum, checked
====================  ================================================================================================

``Model`` is kept; ``Log Type`` and version 3's ``Elapsed time`` (whole seconds to the last token) are not replayed.
Columns are found by name.

Source: HPMLL/BurstGPT, README; Wang et al., *BurstGPT*, KDD 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from harness.trace.formats.asked import Role
from harness.trace.formats.clock import Clock
from harness.trace.formats.record import RowError, TraceRecord
from harness.trace.formats.table import Table, header_of
from harness.trace.formats.values import show, token_count

_TOTAL = "Total tokens"


class BurstGPT(Table):
    """Reader of BurstGPT traces, versions 1 to 3."""

    summary = "BurstGPT trace (CSV: Timestamp in s, Request tokens, Response tokens; v3 with Session ID)"
    others_first: ClassVar[bool] = False
    names: ClassVar[Mapping[Role, str]] = {
        "arrival": "Timestamp", "input": "Request tokens", "output": "Response tokens",
    }  # fmt: skip
    checked: ClassVar[frozenset[str]] = frozenset({_TOTAL})

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The header names the columns that all versions have."""
        return {*cls.names.values(), _TOTAL} <= set(header_of(record)[1])

    def clock_of(self, name: str) -> Clock:
        """Seconds."""
        clock = Clock(name)
        clock.know("s", "Timestamp in seconds: the header is that of BurstGPT, whose totals were checked on every row")
        return clock

    def row(self, row: Mapping[str, Any]) -> TraceRecord:
        """The row, its total checked."""
        counts = [token_count(name, row.get(name)) for name in ("Request tokens", "Response tokens", _TOTAL)]
        if None not in counts and sum(counts[:2]) != counts[2]:  # type: ignore[arg-type]
            raise RowError(
                "bad Total tokens",
                f"Total tokens is {show(str(row.get(_TOTAL)))}, but request and response are {counts[0]} + {counts[1]}",
            )
        return super().row(row)
