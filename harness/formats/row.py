"""What a format reader gives back for one record of a trace file, and how it refuses one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from harness import source

MAX_TOKENS = 2**24
"""Most tokens one request may have in or out. Far above any context window: more is a damaged or misread field."""
MAX_ARRIVAL_S = 9_000_000_000
"""Latest arrival in seconds that still counts as nanoseconds in 64 bits (285 years); more is a wrong unit."""

FAILED_CALL = "zero tokens (failed call)"
"""Reason under which rows are counted that record a failed call of the source system."""


class Row(NamedTuple):
    """One trace row as its format states it. ``arrival_ns`` is the source's own clock, not yet shifted to zero."""

    arrival_ns: int | None
    input_tokens: int | None
    output_tokens: int | None
    session_id: str | None = None
    turn: int | None = None
    prefix_ids: tuple[int, ...] | None = None
    block_tokens: int | None = None
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    answer: str | None = None
    """What the model said, where the file has it: never sent, but it can be counted."""
    adapter: str | None = None
    cancel_after_s: float | None = None
    think_s: float | None = None
    timeout_s: float | None = None


def safe(words: str, most: int) -> str:
    """``words`` in at most so many characters, the middle left out, without any that a terminal would obey."""
    if len(words) > most:
        words = f"{words[: most // 2]} ... {words[5 - most // 2 :]}"
    return words if words.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class RowError(Exception):
    """A record that is not a row of its format. ``reason`` is a short class to count by; the message says it all.

    Files name what stands in messages and reasons, so both are made `safe`.
    """

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        super().__init__(safe(problem, 1000))


class LeftOutError(Exception):
    """A well-formed row that is not to be replayed, but counted under ``reason``: a failed call, a copy."""

    def __init__(self, reason: str) -> None:
        self.reason = safe(reason, 100)
        super().__init__(self.reason)


class FailedCallError(LeftOutError):
    """A row that records a failed call of the source system."""

    def __init__(self, reason: str = FAILED_CALL) -> None:
        super().__init__(reason)


Rows = Sequence[Row | RowError | LeftOutError]
"""What a record of several calls (a conversation, a batch of spans) holds; empty when it is no call at all."""


class Reader:
    """One trace format. An instance reads one file once, from its first record to its last."""

    summary: ClassVar[str]
    """One line for people choosing a format."""
    clock: ClassVar[str]
    """What its times are, and what in the file shows it."""
    has_header: ClassVar[bool] = False
    """The first line goes to `header`, not to `parse`."""
    quoted: ClassVar[bool] = False
    """CSV whose quoted fields may hold commas and line ends."""
    in_order: ClassVar[bool] = True
    """False: the source writes a row when its call has ended, or in no order at all; rows are sorted by arrival."""
    log: ClassVar[bool] = False
    """Other lines may stand before the first that shows the format."""

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Whether the first record of a file (not blank, no byte-order mark) shows this format."""
        raise NotImplementedError

    def beside(self, path: Path) -> None:
        """Look at the files that belong to the trace at ``path`` and lie beside it. Raises `RowError`."""

    def records(self, file: source.Source) -> Iterator[tuple[int, Any]]:
        """(line, record) of each record; see `harness.source.records`."""
        return source.records(file, quoted=self.quoted)

    def header(self, line: bytes) -> None:
        """Read the header line. Raises `RowError`."""

    def parse(self, record: Any) -> Row | Rows:
        """Read one record. Raises `RowError` or `LeftOutError`."""
        raise NotImplementedError

    def end(self) -> Rows:
        """Rows that were still waiting for a later line when the file ended."""
        return ()

    def blocks(self) -> str | None:
        """After the last record: size of the prefix blocks and what in the file shows it; None: none were read."""
        return None

    def notes(self) -> list[str]:
        """What a reader of the results must know about this file, after its last record."""
        return []
