"""What a run is called, and text of others made printable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")
FORMULA = r"^([=+\-@\t\r])"
"""What a spreadsheet would run as a formula when a cell of text begins with it."""


def clean(text: str, most: int | None = None) -> str:
    """Text without control, zero-width or direction characters, cut to ``most`` characters."""
    text = _UNPRINTABLE.sub(" ", text).strip()
    return text if most is None or len(text) <= most else text[: most - 3] + "..."


def label_runs(paths: Sequence[Path]) -> list[str]:
    """A short name for each run directory, printable and no two alike. Raises `UsageError` when one is named twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice")
    labels: list[str] = []
    for path in paths:
        name = clean(path.resolve().name, 60) or "run"
        taken = [name, *(f"{name} ({k})" for k in range(2, len(paths) + 1))]
        labels.append(next(label for label in taken if label not in labels))
    return labels
