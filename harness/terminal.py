"""What reaches the terminal: the words of servers, files and registries print as plain characters, never as orders.

Two places print. `harness.console` is for what rich lays out; `guard_streams` puts a filter before standard output and
error for everything else. Both make text `printable`. How much is said on stderr beside the result is a setting of the
process, made at the command line (-q, -v).
"""

from __future__ import annotations

import os
import re
import sys
from enum import Enum, auto
from typing import IO, Any

MOST_CHARS = 4000
"""Of a message; a server may name 200,000 models."""
_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor, screen
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)"  # title, clipboard, links
)
# Control characters but tab and line end; what turns the direction of text or hides it; halves of characters, as file
# names that are not UTF-8 have them.
_ORDERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""``text`` without terminal sequences, and whatever else a terminal would obey written as ``\u202e``."""
    if not _ORDERS.search(text):
        return text
    return _ORDERS.sub(_escaped, _SEQUENCES.sub("", text))


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[k : k + 2].hex()}" for k in range(0, len(units), 2))  # as JSON has it, and valid there


def cut(text: str) -> str:
    """At most `MOST_CHARS` of a message."""
    more = len(text) - MOST_CHARS
    return text if more <= 0 else f"{text[:MOST_CHARS]} ... ({more:,} more characters)"


class _Filtered:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.rich_proxied_file = stream
        """Where rich writes, whose text was made printable and whose colours are meant."""

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From now on standard output and error print what is `printable`, in any encoding."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Filtered):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Filtered(stream))
    _terminals.extend(fd for fd in (1, 2) if os.isatty(fd))


_terminals: list[int] = []


def hung_up() -> None:
    """After SIGHUP: nobody reads a terminal that is gone, and to write there would fail."""
    for fd in _terminals:
        if not os.isatty(fd):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)
            os.close(nowhere)


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
