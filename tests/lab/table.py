"""One line of the table "claimed against true", and coverage with its band."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A claim of the product, what is true, and how often it held."""

    item: str
    """Number of the claim in the list that the study answers, such as "3"."""
    claim: str
    truth: str
    claimed: str
    """What the product said, in figures."""
    draws: int
    holds: bool | None
    """None: open, not studied yet."""
    command: str = ""
    """What reproduces it, when it is not ``make study``."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of ``draws`` intervals held the truth."""

    held: int
    draws: int

    @property
    def share(self) -> float:
        """Held of all; NaN without draws."""
        return self.held / self.draws if self.draws else math.nan

    @property
    def band(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        n, p, z = max(self.draws, 1), self.share if self.draws else 0.5, 1.959963984540054
        centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - reach) / (1 + z * z / n), (centre + reach) / (1 + z * z / n)

    def overlaps(self, low: float = 0.93, high: float = 0.99) -> bool:
        """The band and [low, high] have something in common."""
        return bool(self.draws) and self.band[0] <= high and self.band[1] >= low

    def __str__(self) -> str:
        if not self.draws:
            return "no intervals"
        return f"{self.share:.1%} of {self.draws:,} ({self.band[0]:.1%} to {self.band[1]:.1%})"
