"""What a format reader gives back for one line of a trace file, and how it refuses one."""

from __future__ import annotations

from typing import NamedTuple, Protocol

MAX_TOKENS = 2**24
"""Most tokens one request may have in or out. Far above any context window: more is a damaged or misread field."""
MAX_ARRIVAL_S = 9_000_000_000
"""Latest arrival in seconds that still counts as nanoseconds in 64 bits (285 years); more is a wrong unit."""


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


class RowError(Exception):
    """A line that is not a row of its format. ``reason`` is a short class to count by; the message says it all."""

    def __init__(self, reason: str, problem: str) -> None:
        self.reason = reason
        super().__init__(problem)


class FailedCallError(Exception):
    """A well-formed row that records a failed call in the source (zero tokens): not to be replayed, but counted."""


class Reader(Protocol):
    """One trace format. An instance reads one file once, from its first line to its last."""

    summary: str
    """One line for people choosing a format."""
    has_header: bool
    """True: the first line goes to `header`, not to `parse`."""

    @staticmethod
    def sniff(line: bytes) -> bool:
        """Whether the first line of a file (not blank, no byte-order mark) shows this format."""
        ...

    def header(self, line: bytes) -> None:
        """Read the header line. Raises `RowError`."""
        ...

    def parse(self, line: bytes) -> Row:
        """Read one line. Raises `RowError` or `FailedCallError`."""
        ...

    def notes(self) -> list[str]:
        """What a reader of the results must know about this file, after its last line."""
        ...
