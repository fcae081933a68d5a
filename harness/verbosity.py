"""How much is said on stderr beside the result: a setting of the process, made at the command line (-q, -v)."""

from __future__ import annotations

from enum import Enum, auto


class Verbosity(Enum):
    """How much is said."""

    QUIET = auto()
    NORMAL = auto()
    VERBOSE = auto()


_verbosity = Verbosity.NORMAL


def verbosity() -> Verbosity:
    """Of this process."""
    return _verbosity


def set_verbosity(value: Verbosity) -> None:
    """For the rest of this process."""
    global _verbosity
    _verbosity = value
