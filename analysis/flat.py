"""All figures of a summary as rows of one table: for data frames, SQL and experiment trackers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from harness.analysis.stats.intervals import Quantity
from harness.install import require

if TYPE_CHECKING:
    import pandas as pd

PLACES = {"metrics": "", "rates": "", "cost": "", "slo": "slo_", "steady": "steady_"}
"""Parts of a summary that hold figures, and what their names begin with: ``ttft_p99``, ``goodput``, ``slo_attainment``,
``usd_per_1m_total``, ``steady_usd_per_1m_total``."""
COLUMNS = ("value", "low", "high", "unit", "n", "evidence", "note")


def figures(summary: object) -> dict[str, Quantity]:
    """Every figure with an interval of one, by its name."""
    return {
        name: quantity
        for place, prefix in PLACES.items()
        for name, quantity in _within(getattr(summary, place), prefix)
    }


def _within(tree: object, name: str) -> Iterator[tuple[str, Quantity]]:
    if isinstance(tree, Quantity):
        yield name.removesuffix("_"), tree
    elif is_dataclass(tree):
        for f in fields(tree):
            yield from _within(getattr(tree, f.name), f"{name}{f.name}_")


def figure_rows(summary: object) -> list[dict[str, object]]:
    """A row for each figure: ``figure`` and `COLUMNS`; None where it is not known."""
    return [
        {"figure": name, **{column: getattr(quantity, column) for column in COLUMNS}}
        for name, quantity in figures(summary).items()
    ]


class Framed:
    """What has figures, as a data frame."""

    __slots__ = ()

    def to_frame(self) -> pd.DataFrame:
        """A pandas data frame of all figures: their names are its index, `COLUMNS` its columns.

        What is not known is NaN, and ``note`` says why. Raises `HarnessError` where pandas is not installed.
        """
        pandas: Any = require("pandas", package="pandas")
        frame: pd.DataFrame = pandas.DataFrame(figure_rows(self)).set_index("figure")
        return frame
