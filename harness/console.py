"""The consoles that rich prints to: texts of others as plain characters, colours and layout our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import rich.console
from rich.segment import Segment

from harness.terminal import printable


class Console(rich.console.Console):
    """A console whose texts are `printable`; colours and layout are its own."""

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of ``renderable``."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
