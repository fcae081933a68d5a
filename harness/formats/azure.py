"""Azure LLM inference traces: CSV with wall-clock arrivals and token counts, nothing else.

Columns are found by name: ``TIMESTAMP`` (``2023-11-16 18:17:03.9799600``, UTC when no zone is given; the 2024 files
have six digits and ``+00:00``), ``ContextTokens`` (input tokens), ``GeneratedTokens`` (output tokens). Lines end in
CRLF or LF, the last one perhaps in neither. There is no session, no prefix identity, no model and no latency.

Source: Azure/AzurePublicDataset, ``AzureLLMInferenceDataset2023.md`` and ``...2024.md``.
"""

from __future__ import annotations

from datetime import UTC, datetime

from harness.formats.row import MAX_TOKENS, FailedCallError, Row, RowError

_COLUMNS = (b"TIMESTAMP", b"ContextTokens", b"GeneratedTokens")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Azure:
    """Reader of Azure LLM inference traces (2023 and 2024)."""

    summary = "Azure LLM inference trace (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)"
    has_header = True

    def __init__(self) -> None:
        self._columns: list[bytes] = []
        self._at = (0, 0, 0)
        self._minute = b""
        self._minute_ns = 0

    @staticmethod
    def sniff(line: bytes) -> bool:
        """The header names all three columns."""
        return set(_COLUMNS) <= {name.strip() for name in line.split(b",")}

    def header(self, line: bytes) -> None:
        """Find the columns by name."""
        self._columns = [name.strip() for name in line.split(b",")]
        missing = [name.decode() for name in _COLUMNS if name not in self._columns]
        if missing:
            raise RowError("bad header", f"no column {', '.join(missing)} in {_show(line)}")
        time, into, out = (self._columns.index(name) for name in _COLUMNS)
        self._at = time, into, out

    def parse(self, line: bytes) -> Row:
        """Read one CSV line. No field of this format needs quotes, so none are understood."""
        fields = line.rstrip(b"\r\n").split(b",")
        if len(fields) != len(self._columns):
            raise RowError(
                "bad row", f"{len(fields)} fields, expected {len(self._columns)} as in the header: {_show(line)}"
            )
        time, into, out = self._at
        arrival_ns = self._arrival_ns(fields[time])
        input_tokens = _tokens("ContextTokens", fields[into])
        output_tokens = _tokens("GeneratedTokens", fields[out])
        if not input_tokens or not output_tokens:
            raise FailedCallError
        return Row(arrival_ns, input_tokens, output_tokens)

    def notes(self) -> list[str]:
        """Columns that are there and are not replayed."""
        extra = [name.decode(errors="replace") for name in self._columns if name not in _COLUMNS]
        return [f"columns not replayed: {', '.join(extra)}"] if extra else []

    def _arrival_ns(self, text: bytes) -> int:
        """Nanoseconds since 1970, exact: the fraction is read as an integer, never as a float."""
        minute, rest = text[:16], text[16:]
        # Rows come in time order, so this row's minute is nearly always the last row's: the calendar is asked once a
        # minute.
        if minute != self._minute:
            self._minute_ns = _minute_ns(minute, text)
            self._minute = minute
        rest = rest.removesuffix(b"Z").removesuffix(b"+00:00")
        second, _, fraction = rest[1:].partition(b".")
        fraction = fraction or b"0"
        if (
            rest[:1] != b":"
            or len(second) != 2
            or not (second + fraction).isdigit()
            or second >= b"60"
            or len(fraction) > 9
        ):
            raise RowError("bad TIMESTAMP", f"TIMESTAMP is {_show(text)}, {_EXPECTED_TIME}")
        return self._minute_ns + int(second) * 1_000_000_000 + int(fraction.ljust(9, b"0"))


_EXPECTED_TIME = "expected YYYY-MM-DD HH:MM:SS with up to 9 decimals, UTC"


def _minute_ns(minute: bytes, whole: bytes) -> int:
    try:
        start = datetime.strptime(minute.decode("ascii"), "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    except ValueError:  # also what a non-ASCII byte raises
        raise RowError("bad TIMESTAMP", f"TIMESTAMP is {_show(whole)}, {_EXPECTED_TIME}") from None
    return int((start - _EPOCH).total_seconds()) * 1_000_000_000


def _tokens(name: str, field: bytes) -> int:
    # isdigit on bytes is ASCII only; a bare int() would take "+1", "1_0" and " 1". Ten digits are far above the limit.
    if field.isdigit() and len(field) <= 10 and (tokens := int(field)) <= MAX_TOKENS:
        return tokens
    raise RowError(f"bad {name}", f"{name} is {_show(field)}, expected a whole number from 0 to {MAX_TOKENS}")


def _show(raw: bytes) -> str:
    return repr(raw[:60].decode("utf-8", "replace").rstrip("\r\n"))
