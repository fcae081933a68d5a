"""Azure LLM inference traces: CSV with wall-clock arrivals and token counts, nothing else.

Columns are found by name: ``TIMESTAMP`` (``2023-11-16 18:17:03.9799600``, UTC when no zone is given; the 2024 files
have six digits and ``+00:00``), ``ContextTokens`` (input tokens), ``GeneratedTokens`` (output tokens). Lines end in
CRLF or LF, the last one perhaps in neither. There is no session, no prefix identity, no model and no latency. What
spreadsheets and pandas make of these files is read too: see `harness.trace.formats.table`.

Source: Azure/AzurePublicDataset, ``AzureLLMInferenceDataset2023.md`` and ``...2024.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from harness.trace.formats.asked import Role
from harness.trace.formats.clock import Clock
from harness.trace.formats.table import Table, header_of


class Azure(Table):
    """Reader of Azure LLM inference traces (2023, 2024 and later)."""

    summary = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"
    others_first: ClassVar[bool] = False
    names: ClassVar[Mapping[Role, str]] = {
        "arrival": "TIMESTAMP", "input": "ContextTokens", "output": "GeneratedTokens",
    }  # fmt: skip

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        """The header names all three columns."""
        return set(cls.names.values()) <= set(header_of(record)[1])

    def clock_of(self, name: str) -> Clock:
        """Dates and times."""
        return Clock(name).iso()
