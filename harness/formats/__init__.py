"""Trace formats. A new one is a module with a `Reader` class here and one line in `FORMATS`."""

from __future__ import annotations

from harness.formats.azure import Azure
from harness.formats.jsonl import Jsonl
from harness.formats.mooncake import Mooncake
from harness.formats.row import Reader

FORMATS: dict[str, type[Reader]] = {
    "azure": Azure,
    "jsonl": Jsonl,
    "mooncake": Mooncake,
}
"""Name (as given to ``--format``) -> reader."""
