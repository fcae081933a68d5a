"""Azure LLM inference traces: CSV with wall-clock arrivals and token counts, nothing else.

Columns are found by name: ``TIMESTAMP`` (``2023-11-16 18:17:03.9799600``, UTC when no zone is given; the 2024 files
have six digits and ``+00:00``), ``ContextTokens`` (input tokens), ``GeneratedTokens`` (output tokens). Lines end in
CRLF or LF, the last one perhaps in neither. There is no session, no prefix identity, no model and no latency.

Source: Azure/AzurePublicDataset, ``AzureLLMInferenceDataset2023.md`` and ``...2024.md``.
"""

from __future__ import annotations

from harness.formats.row import Reader, Row, Rows, safe
from harness.formats.values import Columns, IsoClock, called, header_names, tokens

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Azure(Reader):
    """Reader of Azure LLM inference traces (2023, 2024 and later)."""

    summary = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"
    clock = "TIMESTAMP, a date and time: up to 9 decimals of a second, UTC where no zone is given"

    def __init__(self) -> None:
        self._clock = IsoClock("TIMESTAMP")
        self._columns: Columns | None = None

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The header names all three columns."""
        return set(_COLUMNS) <= set(header_names(record))

    def parse(self, record: bytes) -> Row | Rows:
        """Read one CSV line. No field of this format needs quotes, so none are understood."""
        if self._columns is None:
            self._columns = Columns(record, _COLUMNS)
            return ()
        fields = self._columns.split(record)
        time, into, out = self._columns.at
        arrival_ns = self._clock.ns(fields[time].decode("utf-8", "replace"))
        input_tokens = tokens("ContextTokens", fields[into])
        output_tokens = tokens("GeneratedTokens", fields[out])
        called(input_tokens, output_tokens)
        return Row(arrival_ns, input_tokens, output_tokens)

    def notes(self) -> list[str]:
        """Columns that are there and are not replayed."""
        extra = [name for name in (self._columns.names if self._columns else ()) if name not in _COLUMNS]
        return [f"columns not replayed: {safe(', '.join(extra), 500)}"] if extra else []
