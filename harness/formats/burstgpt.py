"""BurstGPT traces: CSV of ChatGPT and GPT-4 calls at a university, on a clock of whole seconds.

====================  ================================================================================================
``Timestamp``         **seconds** from midnight of the first day; integers in versions 1 and 2, floats that do not begin
                      at zero in version 3
``Session ID``        version 3 only, inserted as second column; empty on rows of the API log
``Request tokens``    input tokens
``Response tokens``   output tokens; zero is a call that failed
``Total tokens``      their sum, checked
====================  ================================================================================================

``Model``, ``Log Type`` and version 3's ``Elapsed time`` (whole seconds to the last token) are not replayed. Columns are
found by name.

Source: HPMLL/BurstGPT, README; Wang et al., *BurstGPT*, KDD 2025.
"""

from __future__ import annotations

import re

from harness.formats.row import Reader, Row, RowError, Rows
from harness.formats.values import Columns, called, header_names, seconds_ns, show, tokens

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens", "Total tokens")
_SESSION = "Session ID"
_SECONDS = re.compile(rb"\d{1,12}(\.\d{1,9})?")


class BurstGPT(Reader):
    """Reader of BurstGPT traces, versions 1 to 3."""

    summary = "BurstGPT trace (CSV: Timestamp in s, Request tokens, Response tokens; v3 with Session ID)"
    clock = "Timestamp in seconds: the header is that of BurstGPT, whose totals were checked on every row"

    def __init__(self) -> None:
        self._columns: Columns | None = None
        self._session: int | None = None

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The header names the columns that all versions have."""
        return set(_COLUMNS) <= set(header_names(record))

    def parse(self, record: bytes) -> Row | Rows:
        """Read one CSV line. No field of this format needs quotes, so none are understood."""
        if self._columns is None:
            self._columns = Columns(record, _COLUMNS)
            names = self._columns.names
            self._session = names.index(_SESSION) if _SESSION in names else None
            return ()
        fields = self._columns.split(record)
        time, into, out, total = self._columns.at
        if not _SECONDS.fullmatch(fields[time]):
            raise RowError("bad Timestamp", f"Timestamp is {show(fields[time])}, expected seconds")
        input_tokens = tokens("Request tokens", fields[into])
        output_tokens = tokens("Response tokens", fields[out])
        if tokens("Total tokens", fields[total]) != input_tokens + output_tokens:
            raise RowError(
                "bad Total tokens",
                f"Total tokens is {show(fields[total])}, but request and response are {input_tokens} + {output_tokens}",
            )
        called(input_tokens, output_tokens)
        session = fields[self._session].decode("utf-8", "replace").strip() if self._session is not None else ""
        return Row(seconds_ns("Timestamp", float(fields[time])), input_tokens, output_tokens, session or None)
