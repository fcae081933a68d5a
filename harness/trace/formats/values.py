"""What formats share: fields of JSON objects, token counts, times, CSV, chat messages, copies of a row.

Token counts as APIs state them: of OpenAI cached and reasoning tokens are **inside** ``prompt_tokens`` and
``completion_tokens`` (LiteLLM too, whatever the model), or ``input_tokens`` and ``output_tokens`` of Responses. Of
Anthropic what was written to the cache and read from it (``cache_creation_input_tokens``, ``cache_read_input_tokens``)
stands **beside** ``input_tokens``: the prompt is the sum of the three.

Source: OpenAI API reference, ``usage`` of Chat Completions and Responses; Anthropic API reference, Messages, ``usage``.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import NamedTuple

from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    MAX_TOKENS,
    LeftOutError,
    Object,
    RowError,
    TimeUnit,
    at_path,
    find,
    not_utf8,
    show,
)

csv.field_size_limit(2**24)


# --- token counts --------------------------------------------------------------------------------------------------

_WHOLE = re.compile(r"(\d{1,10})(\.0*)?", re.ASCII)


def token_count(name: str, value: object) -> int | None:
    """A token count: a whole number, as a number or as digits (pandas writes ``374.0``); None stays None."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and (match := _WHOLE.fullmatch(value.strip())):
        value = int(match[1])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and 0 <= value <= MAX_TOKENS:  # not a bool
        return value
    raise RowError(f"bad {name}", f"{name} is {show(str(value))}, expected a whole number from 0 to {MAX_TOKENS}")


def count_of(value: object, *paths: str) -> int | None:
    """The token count that the first of ``paths`` states. Raises `RowError`."""
    for path in paths:
        if (found := find(value, path)) is not None:
            return token_count(path, found)
    return None


class TokenCounts(NamedTuple):
    """Tokens of one call; None: not stated."""

    input_tokens: int | None
    """The whole prompt, cached tokens included."""
    output_tokens: int | None
    cached_tokens: int | None
    """Of the input, those read from a prompt cache."""


def usage_of(usage: object) -> TokenCounts:
    """The counts of a ``usage`` object; all None when it is none. Raises `RowError` for a count that is no count."""
    inside = count_of(usage, "prompt_tokens")
    into = count_of(usage, "input_tokens") if inside is None else inside
    read, written = count_of(usage, "cache_read_input_tokens"), count_of(usage, "cache_creation_input_tokens")
    if inside is None and into is not None:
        into += (read or 0) + (written or 0)
    if read is None:
        read = count_of(usage, "prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens")
    return TokenCounts(into, count_of(usage, "completion_tokens", "output_tokens"), read)


# --- times ---------------------------------------------------------------------------------------------------------

UNIT_NS: dict[TimeUnit, int] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_S = (978_307_200, 4_102_444_800)
_NUMBER = re.compile(r"[+-]?\d{1,24}(\.\d*)?", re.ASCII)
_DATE = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?\s*(Z|UTC|[+-]\d\d:?(?:\d\d)?)?", re.ASCII)
_LOG_DATE = re.compile(r"(\d\d)/(\w{3})/(\d{4}):(\d\d:\d\d:\d\d) ([+-]\d{4})", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def iso_ns(name: str, text: str) -> int:
    """Nanoseconds since 1970 of ``2023-11-16 18:17:03.9799600``, exactly: up to nine decimals, UTC without a zone.

    Also of ``10/Oct/2000:13:55:36 -0700``, as web servers write it. Raises `RowError`.
    """
    match = _DATE.fullmatch(text)
    if match is None and (log := _LOG_DATE.fullmatch(text)) and log[2] in _MONTHS:
        match = _DATE.fullmatch(f"{log[3]}-{_MONTHS.index(log[2]) + 1:02}-{log[1]} {log[4]} {log[5]}")
    try:
        if match is None:
            raise ValueError
        whole = datetime.fromisoformat(match[1] + "+00:00") - _EPOCH
    except ValueError:
        expected = "expected YYYY-MM-DD HH:MM:SS with up to 9 decimals, UTC or with its offset"
        raise RowError(f"bad {name}", f"{name} is {show(text)}, {expected}") from None
    seconds, zone = whole.days * 86_400 + whole.seconds, match[3]
    if zone and zone[0] in "+-":
        digits = zone[1:].replace(":", "").ljust(4, "0")
        away = (int(digits[:2]) * 60 + int(digits[2:])) * 60
        seconds += -away if zone[0] == "+" else away
    return seconds * 1_000_000_000 + int((match[2] or "0").ljust(9, "0"))


def number_of(value: object) -> Decimal | None:
    """A number exactly as it is written; None for anything else."""
    if isinstance(value, str):
        return Decimal(text) if _NUMBER.fullmatch(text := value.strip()) else None
    if isinstance(value, float):
        return Decimal(repr(value)) if math.isfinite(value) else None
    return Decimal(value) if isinstance(value, int) and not isinstance(value, bool) else None


def is_epoch(number: Decimal, unit: TimeUnit) -> bool:
    """Whether it is a time of the years 2001 to 2100 since 1970: four ranges that do not meet."""
    return _EPOCH_S[0] <= number * UNIT_NS[unit] / 10**9 < _EPOCH_S[1]


def epoch_unit(number: Decimal) -> TimeUnit | None:
    """The unit in which it is such a time."""
    return next((unit for unit in UNIT_NS if is_epoch(number, unit)), None)


def epoch_ns(name: str, value: object) -> int:
    """Nanoseconds since 1970 of a number since then, whose size shows the unit. Raises `RowError` for others."""
    number = number_of(value)
    unit = None if number is None else epoch_unit(number)
    if number is None or unit is None:
        raise RowError(
            f"bad {name}", f"{name} is {show(str(value))}: not a time since 1970 between the years 2001 and 2100"
        )
    return int((number * UNIT_NS[unit]).to_integral_value())


def wall_clock_ns(name: str, value: object) -> int:
    """Nanoseconds since 1970 of a date and time, or of a number since 1970. Raises `RowError`."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return iso_ns(name, value.strip())
    return epoch_ns(name, value)


def fits(number: Decimal, unit: TimeUnit) -> bool:
    """Whether it is an arrival or duration in this unit."""
    return 0 <= number * UNIT_NS[unit] <= MAX_ARRIVAL_S * 10**9


def ns_of(name: str, value: object, unit: TimeUnit) -> int:
    """Nanoseconds of a number in this unit. Raises `RowError`."""
    number = value if type(value) is int else number_of(value)
    ns = None if number is None else number * UNIT_NS[unit]
    if ns is None or not 0 <= ns <= MAX_ARRIVAL_S * 10**9:
        expected = "a number" if ns is None else f"a time in {unit} from 0 to {MAX_ARRIVAL_S} s"
        raise RowError(f"bad {name}", f"{name} is {show(str(value))}, expected {expected}")
    return round(ns)


_SUFFIX = re.compile(
    r"(?<=[a-z])[\s_.]*[(\[]?(?:(?<=[\s_.(\[])(?P<short>s|ms|us|ns)|"
    r"(?P<long>sec(?:ond)?s?|milli(?:second)?s?|msecs?|micro(?:second)?s?|usecs?|nano(?:second)?s?|nsecs?))[)\]]?$"
)
_LONG: dict[str, TimeUnit] = {"se": "s", "mi": "ms", "ms": "ms", "us": "us", "na": "ns", "ns": "ns"}


def unit_of(name: str) -> tuple[str, TimeUnit | None]:
    """A column's name in snake case without the unit at its end, and the unit: ``arrivalTimeNs`` -> (``arrival_time``,
    ns).
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    match = _SUFFIX.search(name)
    if match is None:
        return name, None
    if match["short"]:
        return name[: match.start()], match["short"]  # type: ignore[return-value]
    long = match["long"]
    return name[: match.start()], "us" if long.startswith("micro") else _LONG[long[:2]]


class Clock:
    """Reads the times of one column, once it has looked at the first."""

    def __init__(self, name: str, unit: TimeUnit | None = None, said: str = "") -> None:
        """``unit``: as the user says, or the format (which then says so); None: as the name and the times show."""
        self.name, self.said = name, said
        self._unit = unit
        self._mixed = False
        self._told = bool(said)
        self.absolute = self._told and unit is None
        """The times are of a calendar: those that go back are of rows in another order, not of another recording."""
        self.unclear: str | None = None
        """Why nothing shows the unit; None: it is known."""

    def look(self, values: Sequence[object]) -> None:
        """Find out from the first times what they are; those that are none are looked at when they are read."""
        if self._told:
            return
        numbers = [number for value in values if (number := number_of(value)) is not None]
        named = unit_of(self.name)[1]
        typical = sorted(numbers)[len(numbers) // 2] if numbers else Decimal(0)
        if self._unit is not None:
            self.said = f"{self.name} in {self._unit}, as asked"
            self.absolute = bool(numbers) and is_epoch(typical, self._unit)
        elif len(numbers) < len([value for value in values if value not in (None, "")]) / 2 or not numbers:
            self.absolute = self._mixed = True
            self.said = f"{self.name}, a date and time, UTC where no zone is given"
        elif named is not None and fits(typical, named):
            self._unit, self.absolute = named, is_epoch(typical, named)
            self.said = f"{self.name} in {named}, by its name"
        elif epoch := epoch_unit(typical):
            self._unit, self.absolute, self._mixed = epoch, True, True
            but = f" (not {named}, as its name says)" if named else ""
            self.said = f"{self.name} in {epoch} since 1970, by its size{but}"
        elif named is not None:
            self._unit, self.said = named, f"{self.name} in {named}, by its name"
        elif any(number % 1 for number in numbers):
            self._unit = "s"
            self.said = f"{self.name} in seconds, as it has fractions (--time-unit ms, us or ns, if not)"
        else:
            span = float(max(numbers) - min(numbers))
            self.unclear = (
                f"nothing shows the unit of {self.name}: its first {len(numbers)} rows span {span:g} s in seconds, "
                f"{span / 1000:g} s in milliseconds. Say --time-unit s, ms, us or ns"
            )
            self.said = f"{self.name} in a unit that nothing shows"

    def know(self, unit: TimeUnit, said: str) -> None:
        self._unit, self.unclear, self.said = unit, None, said

    def ns(self, value: object) -> int | None:
        """Nanoseconds; None while the unit is not known. Raises `RowError`."""
        if self.absolute and self._unit is None:
            return (wall_clock_ns if self._mixed else iso_ns)(self.name, str(value).strip())
        if self._mixed and isinstance(value, str) and ":" in value:
            return iso_ns(self.name, value.strip())
        ns = ns_of(self.name, value, self._unit or "ns")
        if self.absolute and self._unit and not is_epoch(Decimal(ns), "ns"):
            raise RowError(f"bad {self.name}", f"{self.name} is {show(str(value))}: not in {self._unit} since 1970")
        return ns if self._unit else None


# --- CSV -----------------------------------------------------------------------------------------------------------


def header_of(line: bytes) -> tuple[str, list[str]]:
    """(what divides the fields, their names) of a header: the mark that most of them are found with."""
    text = line[:100_000].decode("utf-8", "replace").strip("\r\n\ufeff")
    best: tuple[str, list[str]] = (",", [text])
    for mark in (",", ";", "\t", "|"):
        try:
            (names,) = csv.reader([text], delimiter=mark, strict=True)
        except (csv.Error, ValueError):
            continue
        names = [name.strip().strip('"') for name in names]
        if len(names) > len(best[1]):
            best = mark, names
    return best


def split(record: bytes, mark: str) -> list[str]:
    """The fields of a record. Raises `RowError`."""
    try:
        text = record.decode().rstrip("\r\n")
        if '"' not in text:
            return text.split(mark)
        (fields,) = csv.reader([text], delimiter=mark, strict=True)
        return fields
    except UnicodeDecodeError as e:
        raise not_utf8(e) from None
    except (csv.Error, ValueError) as e:
        raise RowError("bad row", f"not a CSV record ({e}): {show(record)}") from None


class Columns:
    """Records of one CSV file after the other as objects; the header may come again, its columns in another order."""

    def __init__(self) -> None:
        self.mark = ","
        self.names: list[str] = []
        self.needed: set[str] = set()
        """Columns that a header names; until the user of the rows says, all of the header before."""
        self._first = b""

    def read(self, record: bytes) -> Object | None:
        """Column -> field; None for a header, which is what names all that is needed. Raises `RowError`."""
        if not self.names or (self._first in record and set(header_of(record)[1]) >= self.needed):
            self.mark, self.names = header_of(record)
            self._first, self.needed = self.names[0].encode(), set(self.names)
            return None
        fields = split(record, self.mark)
        if len(fields) != len(self.names):
            raise RowError(
                "bad row", f"{len(fields)} fields, expected {len(self.names)} as in the header: {show(record)}"
            )
        return dict(zip(self.names, fields, strict=True))


# --- text ----------------------------------------------------------------------------------------------------------

_TEXT_PARTS = ("text", "input_text", "output_text")


def plain_text(value: object) -> str | None:
    """A text, or content parts that are nothing but text; None for anything more."""
    if isinstance(value, list):
        texts = [at_path(part, "text") if find(part, "type") in _TEXT_PARTS else None for part in value]
        value = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
    return value if isinstance(value, str) and value else None


def plain_messages(value: object) -> tuple[dict[str, str], ...] | None:
    """Chat messages with a role and a text each; None when there are none or one of them is more than text."""
    messages = []
    for message in value if isinstance(value, list) else ():
        if find(message, "tool_calls") or find(message, "function_call"):
            return None  # beside a text too: without it the prompt is another one
        role, content = find(message, "role"), at_path(message, "content")
        if isinstance(content, list) and len(content) == 1:  # one text part is the same as the text
            content = at_path(content[0], "text") if find(content[0], "type") in _TEXT_PARTS else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return tuple(messages) or None


class Blocks:
    """Prefix blocks of a trace whose rows have one id for each, and how many rows show their size."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._rows = self._long = 0

    def check(self, name: str, ids: int, tokens: int, more: Callable[[int, int], str] | None = None) -> None:
        """One row's number of ids. Raises `RowError` where it is not that of its blocks, with what ``more`` says of so
        many ids for so many tokens.
        """
        blocks = -(-tokens // self.size)
        if ids != blocks:
            problem = f"{ids} {name} for input_length {tokens}, expected {blocks} (one per {self.size} tokens)"
            raise RowError("block mismatch", problem + (more(ids, tokens) if more else ""))
        self._rows += 1
        self._long += blocks > 1

    def said(self) -> str | None:
        """What is known of the size; None without rows."""
        if not self._rows:
            return None
        if not self._long:
            alone = "no prompt is longer than a block, so nothing in the file shows it"
            return f"{self.size} tokens by its format alone: {alone}"
        return f"{self.size} tokens: one id per block on all {self._rows} rows, {self._long} of them of several blocks"


class Copies:
    """Ids seen before: overlapping pages of an export hold the same row twice. Looks back half a million rows."""

    _ROWS = 500_000

    def __init__(self, what: str) -> None:
        self.what = what
        self._new: set[str] = set()
        self._old: set[str] = set()

    def check(self, id_: object) -> None:
        """Raises `LeftOutError` for an id that came before."""
        if id_ is None or id_ == "":
            return
        id_ = str(id_)
        if id_ in self._new or id_ in self._old:
            raise LeftOutError(f"same {self.what} as an earlier row (a copy)")
        self._new.add(id_)
        if len(self._new) >= self._ROWS:
            self._old, self._new = self._new, set()
