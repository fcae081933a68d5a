"""Long-run values of the processes, worked out once and kept in ``truths.json`` by all that they depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

REQUESTS = 1_000_000
SEED = 5
"""Of the long runs; draws have others."""
KEPT = Path(__file__).with_name("truths.json")
Case = TypeVar("Case")
Figures = dict[str, float]


class Mapper(Protocol):
    """`map`, or that of a pool."""

    def __call__(self, make: Callable[[Case], Figures], cases: Iterable[Case], /) -> Iterable[Figures]:
        """What ``make`` makes of each case."""


def long_run_values(
    cases: Mapping[str, Case], make: Callable[[Case], Figures], mapper: Mapper = map, kept: Path = KEPT
) -> list[Figures]:
    """The values of each case, by its key: from ``kept``, or made and added to it."""
    known: dict[str, Figures] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [key for key in cases if key not in known]
    if missing:
        known |= zip(missing, mapper(make, [cases[key] for key in missing]), strict=True)
        kept.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return [known[key] for key in cases]
