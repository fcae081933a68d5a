"""Fields that several formats share: token counts, times, CSV columns, chat messages, copies of a row.

Token counts as APIs state them: what was read, whole, and what was written.

==============================================  ======================================================================
OpenAI: ``prompt_tokens``, ``completion_tokens``  cached and reasoning tokens are **inside** (Chat, Completions; LiteLLM
                                                too, whatever the model)
OpenAI Responses: ``input_tokens`` with          the same; ``input_tokens_details.cached_tokens`` is inside
``input_tokens_details``
Anthropic: ``input_tokens`` with                 what was written to the cache and read from it stands **beside**
``cache_creation_input_tokens``,                 ``input_tokens``: the prompt is the sum of the three
``cache_read_input_tokens``
==============================================  ======================================================================

Source: OpenAI API reference, ``usage`` of Chat Completions and Responses; Anthropic API reference, Messages, ``usage``.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    FailedCallError,
    LeftOutError,
    RowError,
    Rows,
    TraceRecord,
)
from harness.untrusted import DECODE_ERRORS as DECODE_ERRORS

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000_000


def show(raw: bytes | str) -> str:
    """A short, safe quotation of a damaged field."""
    text = raw[:60].decode("utf-8", "replace") if isinstance(raw, bytes) else raw[:60]
    return repr(text.rstrip("\r\n"))


def fields_of(record: bytes) -> dict[str, bytes]:
    """Field name -> its JSON of a record that is a JSON object; empty when it is not one."""
    if record.lstrip()[:1] != b"{":
        return {}
    try:
        return {name: bytes(raw) for name, raw in _decode_fields(record).items()}
    except DECODE_ERRORS:
        return {}


def rows_of(items: Sequence[Any], row: Callable[[dict[str, Any]], TraceRecord | None]) -> Rows:
    """What ``row`` makes of each object of a page, errors as values."""
    found: list[TraceRecord | RowError | LeftOutError] = []
    for item in items:
        try:
            if not isinstance(item, dict):
                raise RowError("not an object", "an entry of the page is not a JSON object")
            made = row(item)
        except (RowError, LeftOutError) as e:
            found.append(e)
        else:
            found += [made] if made else []
    return found


# --- token counts --------------------------------------------------------------------------------------------------


def tokens(name: str, field: bytes) -> int:
    """A token count from text: digits only, at most `MAX_TOKENS`."""
    # isdigit on bytes is ASCII only; a bare int() would take "+1", "1_0" and " 1". Ten digits are far above the limit.
    whole = field.strip() if field.isdigit() else _WHOLE.sub(rb"\1", field.strip())  # 374.0: pandas writes it so
    if whole.isdigit() and len(whole) <= 10 and (count := int(whole)) <= MAX_TOKENS:
        return count
    raise RowError(f"bad {name}", f"{name} is {show(field)}, expected a whole number from 0 to {MAX_TOKENS}")


_WHOLE = re.compile(rb"^(\d+)\.0*$")


def token_count(name: str, value: Any) -> int | None:
    """A token count from JSON: a whole number, as a number or as digits; None stays None."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return tokens(name, value.encode())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS:
        return value
    raise RowError(f"bad {name}", f"{name} is {show(str(value))}, expected a whole number from 0 to {MAX_TOKENS}")


def called(input_tokens: int | None, output_tokens: int | None) -> None:
    """Raises `FailedCallError` when either count is zero."""
    if input_tokens == 0 or output_tokens == 0:
        raise FailedCallError


# --- times ---------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"\d{1,24}(\.\d{0,12})?", re.ASCII)
_TIME = re.compile(r":(\d\d)(?:[.,](\d{1,9}))?\s*(Z|UTC|[+-]\d\d:?(?:\d\d)?)?", re.ASCII)


class IsoClock:
    """Reads ``2023-11-16 18:17:03.9799600`` exactly: with ``T`` or a space, up to nine decimals, UTC without a zone."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._minute = ""
        self._minute_ns = 0

    def ns(self, text: str) -> int:
        """Nanoseconds since 1970; the fraction is read as an integer, never as a float. Raises `RowError`."""
        minute = text[:16]
        # Rows come in time order, so this row's minute is nearly always the last row's: the calendar is asked once a
        # minute.
        if minute != self._minute:
            self._minute_ns = self._calendar(minute, text)
            self._minute = minute
        match = _TIME.fullmatch(text, 16)
        if match is None or match[1] >= "60":
            raise self._error(text)
        ns = self._minute_ns + int(match[1]) * _SECOND + int((match[2] or "0").ljust(9, "0"))
        zone = match[3]
        if zone and zone[0] in "+-":
            digits = zone[1:].replace(":", "").ljust(4, "0")
            away: int = (int(digits[:2]) * 60 + int(digits[2:])) * 60 * _SECOND
            ns += -away if zone[0] == "+" else away
        return ns

    def _calendar(self, minute: str, whole: str) -> int:
        try:
            if not minute.isascii():
                raise self._error(whole)
            start = datetime.strptime(minute.replace("T", " ", 1), "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
        except ValueError:
            raise self._error(whole) from None
        return int((start - _EPOCH).total_seconds()) * _SECOND

    def _error(self, text: str) -> RowError:
        expected = "expected YYYY-MM-DD HH:MM:SS with up to 9 decimals, UTC or with its offset"
        return RowError(f"bad {self.name}", f"{self.name} is {show(text)}, {expected}")


def seconds_ns(name: str, value: float) -> int:
    """Nanoseconds of a time in seconds. Raises `RowError` when it is negative, not finite or too large for seconds."""
    if not 0 <= value <= MAX_ARRIVAL_S:  # also what NaN is
        raise RowError(
            f"bad {name}",
            f"{name} is {value:g}, expected seconds from 0 to {MAX_ARRIVAL_S} (more would be milliseconds or less)",
        )
    whole = int(value)
    return whole * _SECOND + round((value - whole) * _SECOND)


def epoch_ns(name: str, value: Any) -> int:
    """Nanoseconds since 1970 of a number that is seconds, milliseconds, microseconds or nanoseconds since 1970.

    The years 2001 to 2100 are four ranges of numbers that do not meet, so the unit is certain; other numbers raise
    `RowError`.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value) if value.isdigit() else float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        for unit_ns in (1, 1000, 1_000_000, _SECOND):
            if 978_307_200 * _SECOND <= value * unit_ns < 4_102_444_800 * _SECOND:
                # A float's whole part times 10**9 has no place in a float.
                whole = int(value)
                return whole * unit_ns + round((value - whole) * unit_ns)
    raise RowError(
        f"bad {name}", f"{name} is {show(str(value))}: not a time since 1970 between the years 2001 and 2100"
    )


def wall_clock_ns(name: str, value: Any) -> int:
    """Nanoseconds since 1970 of a date and time, or of a number since 1970 (`epoch_ns`). Raises `RowError`."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return IsoClock(name).ns(value.strip())
    return epoch_ns(name, value)


# --- CSV -----------------------------------------------------------------------------------------------------------


class CsvColumns:
    """The columns of a CSV file, found by name: files insert and reorder them."""

    def __init__(self, line: bytes, wanted: Sequence[str]) -> None:
        """Read the header. Raises `RowError` when one of ``wanted`` is missing or named twice."""
        self.names = header_names(line)
        missing = [name for name in wanted if name not in self.names]
        if missing:
            hint = "; it is divided by semicolons" if line.count(b";") > line.count(b",") else ""
            hint = hint or ("; it is divided by tabs" if line.count(b"\t") > line.count(b",") else "")
            raise RowError("bad header", f"no column {', '.join(missing)} in {show(line)}{hint}")
        if twice := [name for name in wanted if self.names.count(name) > 1]:
            raise RowError("bad header", f"column {', '.join(twice)} stands there twice: {show(line)}")
        self.at = tuple(self.names.index(name) for name in wanted)

    def split(self, line: bytes) -> list[bytes]:
        """Fields of a line without quotes."""
        fields = line.rstrip(b"\r\n").split(b",")
        if len(fields) != len(self.names):
            raise self._count(fields, line)
        return fields

    def _count(self, fields: Sequence[object], line: bytes) -> RowError:
        return RowError("bad row", f"{len(fields)} fields, expected {len(self.names)} as in the header: {show(line)}")

    def split_quoted(self, record: bytes) -> dict[str, str]:
        """Column -> field of a record with quotes."""
        try:
            (fields,) = csv.reader([record.decode().rstrip("\r\n")], strict=True)
        except UnicodeDecodeError as e:
            raise not_utf8(e) from None
        except (csv.Error, ValueError) as e:
            raise RowError("bad row", f"not a CSV record ({e}): {show(record)}") from None
        if len(fields) != len(self.names):
            raise self._count(fields, record)
        return dict(zip(self.names, fields, strict=True))


def not_utf8(error: UnicodeDecodeError) -> RowError:
    """What to say of bytes that are no UTF-8."""
    return RowError("not UTF-8", f"not UTF-8 ({error.reason}): convert the file, for example with iconv")


def header_names(line: bytes) -> list[str]:
    """Column names of a CSV header, quotes and spaces around them taken off."""
    return [name.strip().strip('"') for name in line.decode("utf-8", "replace").rstrip("\r\n").split(",")]


csv.field_size_limit(2**24)


# --- text ----------------------------------------------------------------------------------------------------------


def plain_text(value: Any) -> str | None:
    """A text, or content parts that are nothing but text; None for anything more."""
    if isinstance(value, list):
        texts = [
            part.get("text") if part.get("type") in _TEXT_PARTS else None for part in value if isinstance(part, dict)
        ]
        if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
            return None
        value = "".join(map(str, texts))
    return value if isinstance(value, str) and value else None


_TEXT_PARTS = ("text", "input_text", "output_text")


def plain_messages(value: Any) -> tuple[dict[str, str], ...] | None:
    """Chat messages with a role and a text each; None when there are none or one of them is more than text."""
    if not isinstance(value, list) or not value:
        return None
    messages = []
    for message in value:
        if not isinstance(message, dict):
            return None
        if message.get("tool_calls") or message.get("function_call"):
            return None  # beside a text too: without it the prompt is another one
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
            # One text part is the same as the text.
            part = content[0]
            content = part.get("text") if part.get("type") in _TEXT_PARTS else None
        if not isinstance(role, str) or not role or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return tuple(messages)


def shown_blocks(size: int, rows: int, long: int) -> str | None:
    """What is known of a block size that the number of ids was checked against on ``rows`` rows, ``long`` of several
    blocks; None without rows.
    """
    if not rows:
        return None
    if not long:
        return f"{size} tokens by its format alone: no prompt is longer than a block, so nothing in the file shows it"
    return f"{size} tokens: one id per block on all {rows} rows, {long} of them of several blocks"


def prefix_hashes(ids: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """One chained 63-bit hash per block of token ids: equal leading hashes are equal leading tokens."""
    chain = hashlib.blake2b(digest_size=8)
    hashes = []
    for at in range(0, len(ids), block_tokens):
        chain.update(b"".join(i.to_bytes(8, "little", signed=True) for i in ids[at : at + block_tokens]))
        hashes.append(int.from_bytes(chain.digest(), "little") >> 1)
    return tuple(hashes)


# --- copies --------------------------------------------------------------------------------------------------------


class Copies:
    """Ids seen before: overlapping pages of an export hold the same row twice. Looks back half a million rows."""

    _ROWS = 500_000

    def __init__(self, what: str) -> None:
        self.what = what
        self._new: set[str] = set()
        self._old: set[str] = set()

    def check(self, id_: str | None) -> None:
        """Raises `LeftOutError` for an id that came before."""
        if not id_:
            return
        if id_ in self._new or id_ in self._old:
            raise LeftOutError(f"same {self.what} as an earlier row (a copy)")
        self._new.add(id_)
        if len(self._new) >= self._ROWS:
            self._old, self._new = self._new, set()


def decode_error(error: Exception, record: bytes, fields: Iterable[str]) -> RowError:
    """A `RowError` that says in plain words why a record could not be decoded, with the nearest valid field name."""
    import difflib

    if b"\0" in record:
        return RowError("NUL bytes", "holds NUL bytes: the file is damaged or not text")
    try:
        record.decode()  # asked here: what msgspec raises for it differs between its versions
    except UnicodeDecodeError as e:
        return not_utf8(e)
    if not isinstance(error, msgspec.ValidationError):
        return RowError("not JSON", f"not a JSON object on one line ({error}): {show(record)}")
    problem = str(error)
    unknown = re.search(r"unknown field `(.*?)`", problem)
    if unknown and " - at " not in problem:
        near = difflib.get_close_matches(unknown[1], fields, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(sorted(fields))}"
        return RowError("unknown field", f"unknown field {unknown[1]!r}: {hint}")
    return RowError("bad fields", problem.replace("`", "").replace("$.", "").replace(" - at ", " at "))


def decode_object(record: bytes) -> dict[str, Any]:
    """A record that must be a JSON object, as a dict. Raises `RowError`."""
    try:
        value = msgspec.json.decode(record)
    except DECODE_ERRORS as e:
        raise decode_error(e, record, ()) from None
    if not isinstance(value, dict):
        raise RowError("not an object", f"expected a JSON object, found {show(record)}")
    return value


_READ, _WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"
_DETAILS = ("prompt_tokens_details", "input_tokens_details")


class TokenCounts(NamedTuple):
    """Tokens of one call; None: not stated."""

    input_tokens: int | None
    """The whole prompt, cached tokens included."""
    output_tokens: int | None
    cached_tokens: int | None
    """Of the input, those read from a prompt cache."""


def usage_of(usage: Any) -> TokenCounts:
    """The counts of a ``usage`` object; all None when it is none. Raises `RowError` for a count that is no count."""
    if not isinstance(usage, dict):
        return TokenCounts(None, None, None)
    inside = _count(usage, "prompt_tokens")
    into = _count(usage, "input_tokens") if inside is None else inside
    out = _count(usage, "completion_tokens")
    out = _count(usage, "output_tokens") if out is None else out
    read, written = _count(usage, _READ), _count(usage, _WRITTEN)
    if inside is None and into is not None and (read or written):
        into += (read or 0) + (written or 0)
    return TokenCounts(into, out, _cached(usage) if read is None else read)


def _cached(usage: Mapping[str, Any]) -> int | None:
    details: Mapping[str, Any] = next((usage[name] for name in _DETAILS if isinstance(usage.get(name), dict)), {})
    return _count(details, "cached_tokens")


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    return token_count(name, usage.get(name))
