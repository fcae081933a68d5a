"""Times of a table whose clock nobody has described: what they are is found from the first rows, and said.

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
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from harness.trace.formats.asked import TimeUnit
from harness.trace.formats.record import MAX_ARRIVAL_S, RowError
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
