"""How old a price is: one rule for hardware, list prices and what a run was measured with."""

from __future__ import annotations

from datetime import date

OLD_DAYS = 180
"""A price that was read longer ago is marked old."""


def age_days(read: str, today: date) -> int | None:
    """Days since a price was read, on a day (2026-11-22) or in a month (2026-11); None for a date nobody can read."""
    try:
        day = date.fromisoformat(read if len(read) > 7 else f"{read}-01")
    except ValueError:
        return None
    return (today - day).days


def is_old(read: str, today: date) -> bool:
    """Whether a price was read more than `OLD_DAYS` ago, or on a date that proves nothing since nobody can read it."""
    age = age_days(read, today)
    return age is None or age > OLD_DAYS
