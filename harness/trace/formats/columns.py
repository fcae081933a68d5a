"""Columns of a table that nobody has described: which is what, by common names, and what its times are.

What the times are is found from the first rows, and said:

==========================================  ==========================================================================
dates and times (``2026-09-21T14:13:20Z``)  UTC where no zone is given
a unit in the name (``arrival_time_ns``)    that unit, unless the times were 285 years and more in it
numbers of 2001 to 2100 since 1970          s, ms, us or ns: the four ranges do not meet
smaller numbers, some with a fraction       seconds
smaller whole numbers                       not known: s and ms are both common. ``--time-unit`` says it
==========================================  ==========================================================================

The kind found holds for the whole trace: a row of another kind is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from harness.errors import UsageError, unknown_name
from harness.trace.formats.record import MAX_ARRIVAL_S, ROLES, Role, RowError, TimeUnit
from harness.trace.formats.values import IsoClock, show

UNIT_NS: dict[TimeUnit, int] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}

_SUFFIX = re.compile(
    r"(?<=[a-z])[\s_.]*[(\[]?(?:(?<=[\s_.(\[])(?P<short>s|ms|us|ns)|"
    r"(?P<long>sec(?:ond)?s?|milli(?:second)?s?|msecs?|micro(?:second)?s?|usecs?|nano(?:second)?s?|nsecs?))[)\]]?$"
)
_LONG: dict[str, TimeUnit] = {"se": "s", "mi": "ms", "ms": "ms", "us": "us", "na": "ns", "ns": "ns"}
_EPOCH_S = (978_307_200, 4_102_444_800)
_NUMBER = re.compile(r"[+-]?\d{1,24}(\.\d*)?", re.ASCII)


def unit_of(name: str) -> tuple[str, TimeUnit | None]:
    """A column's name in snake case without the unit at its end, and the unit: ``arrivalTimeNs`` -> (``arrival_time``,
    ns).
    """
    name = snake(name)
    match = _SUFFIX.search(name)
    if match is None:
        return name, None
    if match["short"]:
        return name[: match.start()], match["short"]  # type: ignore[return-value]
    long = match["long"]
    return name[: match.start()], "us" if long.startswith("micro") else _LONG[long[:2]]


def snake(name: str) -> str:
    """``arrivalTimeMs`` -> ``arrival_time_ms``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class Clock:
    """Reads the times of one column."""

    def __init__(self, name: str, unit: TimeUnit | None = None) -> None:
        """``unit``: as the user says; None: as the name and the times show."""
        self.name = name
        self._iso: IsoClock | None = None
        self._unit: TimeUnit | None = unit
        self._known = False
        self.absolute = False
        """The times are of a calendar: those that go back are of rows in another order, not of another recording."""
        self.said = ""
        """What the times are, and what shows it."""
        self.unclear: str | None = None
        """Why nothing shows the unit; None: it is known."""

    def look(self, values: Sequence[Any]) -> None:
        """Find out from the first times what they are; those that are none are looked at when they are read."""
        if self._iso is not None or self._known:
            return
        numbers = [number for value in values if (number := _number(value)) is not None]
        named = unit_of(self.name)[1]
        typical = sorted(numbers)[len(numbers) // 2] if numbers else Decimal(0)
        if self._unit is not None:
            self.said = f"{self.name} in {self._unit}, as asked"
            self.absolute = bool(numbers) and _is_epoch(typical, self._unit)
        elif len(numbers) < len([value for value in values if value not in (None, "")]) / 2 or not numbers:
            self._iso, self.absolute = IsoClock(self.name), True
            self.said = f"{self.name}, a date and time, UTC where no zone is given"
        elif named is not None and _fits(typical, named):
            self._unit = named
            self.absolute = _is_epoch(typical, named)
            self.said = f"{self.name} in {named}, by its name"
        elif epoch := _epoch_unit(typical):
            self._unit, self.absolute = epoch, True
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

    def iso(self) -> Clock:
        """The format has dates and times."""
        self._iso, self.absolute = IsoClock(self.name), True
        self.said = f"{self.name}, a date and time: up to 9 decimals of a second, UTC where no zone is given"
        return self

    def know(self, unit: TimeUnit, said: str) -> None:
        """The format shows the unit where the times do not."""
        self._unit, self.unclear, self.said, self._known = unit, None, said, True

    def ns(self, value: Any) -> int | None:
        """Nanoseconds; None while the unit is not known. Raises `RowError`."""
        if self._iso is not None:
            return self._iso.ns(str(value).strip())
        number = _number(value)
        if number is None:
            raise RowError(f"bad {self.name}", f"{self.name} is {show(str(value))}, expected a number")
        if self._unit is None:
            return None
        ns = int((number * UNIT_NS[self._unit]).to_integral_value())
        if not _fits(number, self._unit):
            raise RowError(
                f"bad {self.name}",
                f"{self.name} is {show(str(value))}, expected a time in {self._unit} from 0 to {MAX_ARRIVAL_S} s",
            )
        if self.absolute and not _is_epoch(number, self._unit):
            raise RowError(f"bad {self.name}", f"{self.name} is {show(str(value))}: not in {self._unit} since 1970")
        return ns


def _number(value: Any) -> Decimal | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Decimal(value)
    if isinstance(value, float):
        return Decimal(repr(value)) if math.isfinite(value) else None
    if isinstance(value, str) and _NUMBER.fullmatch(text := value.strip()):
        return Decimal(text)
    return None


def _fits(number: Decimal, unit: TimeUnit) -> bool:
    return 0 <= number * UNIT_NS[unit] <= MAX_ARRIVAL_S * 10**9


def _is_epoch(number: Decimal, unit: TimeUnit) -> bool:
    seconds = number * UNIT_NS[unit] / 10**9
    return _EPOCH_S[0] <= seconds < _EPOCH_S[1]


def _epoch_unit(number: Decimal) -> TimeUnit | None:
    return next((unit for unit in UNIT_NS if _is_epoch(number, unit)), None)


_COMMON: dict[Role, str] = {
    "arrival": "arrival arrival_time arrivals arrived_at arrival_timestamp arrived timestamp time_stamp ts "
    "request_time request_timestamp requested_at request_start request_received received_at received "
    "request_start_time start_time start_timestamp started_at start created_at created submitted_at "
    "sent_at event_time event_timestamp date_time datetime time epoch epoch_time epoch_timestamp timestamp_epoch "
    "time_epoch arrival_epoch unix_time unix_timestamp unix_epoch unix timestamp_unix time_unix arrival_unix "
    "start_time_unix event_time_unix request_time_unix t",
    "input": "input_tokens prompt_tokens input_length prompt_length input_len prompt_len num_prompt_tokens "
    "num_input_tokens num_prefill_tokens prefill_tokens n_prompt_tokens n_input_tokens nb_input_tokens context_tokens "
    "request_tokens query_tokens prompt_token_count input_token_count prompt_tokens_count input_tokens_count "
    "tokens_prompt tokens_input tokens_in input_toks prompt_toks prompt_num_tokens input_num_tokens isl "
    "input_sequence_length total_prompt_tokens total_input_tokens llm_token_count_prompt gen_ai_usage_input_tokens "
    "gen_ai_usage_prompt_tokens tokens_per_prompt promptlen",
    "output": "output_tokens completion_tokens generated_tokens generation_tokens response_tokens output_length "
    "completion_length response_length generation_length output_len completion_len response_len num_output_tokens "
    "num_completion_tokens num_generated_tokens num_generation_tokens num_decode_tokens decode_tokens n_output_tokens "
    "n_completion_tokens n_generated_tokens nb_output_tokens answer_tokens completion_token_count output_token_count "
    "completion_tokens_count output_tokens_count generated_token_count tokens_completion tokens_output tokens_out "
    "tokens_generated output_toks completion_toks output_num_tokens completion_num_tokens osl output_sequence_length "
    "total_completion_tokens total_output_tokens llm_token_count_completion gen_ai_usage_output_tokens "
    "gen_ai_usage_completion_tokens",
    "session": "session_id session conversation_id conversation thread_id chat_session_id chat_session dialog_id",
    "model": "model model_name response_model request_model served_model llm_model_name deployment_name model_id",
    "cached": "cached_tokens cached_input_tokens cached_prompt_tokens prompt_cached_tokens input_cached_tokens "
    "cache_hit_tokens num_cached_tokens cache_read_tokens",
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


COMMON: dict[str, tuple[int, Role]] = {
    _plain(name): (rank, role) for role, names in _COMMON.items() for rank, name in enumerate(names.split())
}
"""Name without case and marks -> (how early it is taken of several, what it is)."""


def role_of(name: str) -> Role | None:
    """What a column of this name is; None: nothing known."""
    name = name.removeprefix("usage.")
    found = COMMON.get(_plain(name))
    if found is None:
        bare, unit = unit_of(name)
        found = COMMON.get(_plain(bare)) if unit else None
        if found is not None and found[1] != "arrival":
            return None
    return None if found is None else found[1]


def recognised(names: Iterable[str]) -> dict[Role, str]:
    """Role -> the column for it; of several the one whose name says it best."""
    best: dict[Role, tuple[int, int, str]] = {}
    for at, name in enumerate(names):
        role = role_of(name)
        if role is None:
            continue
        bare = name.removeprefix("usage.")
        rank = (COMMON.get(_plain(bare)) or COMMON[_plain(unit_of(bare)[0])])[0]
        best[role] = min(best.get(role, (rank, at, name)), (rank, at, name))
    return {role: best[role][2] for role in ROLES if role in best}


def is_table(found: Mapping[Role, str]) -> bool:
    """Whether these columns are enough to replay: a length of the prompt, and a time or a length of the answer."""
    return "input" in found and ("output" in found or "arrival" in found)


def parse_map(text: str) -> dict[Role, str]:
    """``arrival=ts,input=p,output=c`` as roles and columns. Raises `UsageError`."""
    found: dict[Role, str] = {}
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UsageError(f"--map {text!r}: expected ROLE=COLUMN,..., with roles {', '.join(ROLES)}")
        if role not in ROLES:
            raise unknown_name("role", role, ROLES)
        if role in found:
            raise UsageError(f"--map {text!r}: {role} is named twice")
        found[role] = column
    return found
