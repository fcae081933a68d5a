"""How far the simulator itself may be off, from what docs/ACCURACY.md found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

Source = Literal["kernels", "fitted", "given", "bound"]
"""Measured kernels of the chip, runs of one's own, what the user says, or the roofline of the chip's data sheet, which
nothing is faster than."""
ERRORS = Path(__file__).with_name("errors.json")
PCIE = 0.35
"""Of several accelerators over PCIe that nobody has calibrated."""


@cache
def _errors() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ERRORS.read_text(encoding="utf-8"))
    return found


def cost_range(source: Source, chip: str, facts: Mapping[str, str]) -> tuple[float, float]:
    """What a cost may be at least and at most, as multiples of the simulated one, in 9 of 10 cases.

    The largest of these 90th percentiles: of the cost of models left out of the fit, over all chips and on this one,
    and of open loops at saturation, to which nothing was fitted; `PCIE` where ``facts`` say so. (1, inf) for a bound.
    """
    if source == "bound":
        return 1.0, float("inf")
    figures = _errors()
    p90 = max(figures["all"]["model_left_out"]["cost"][1], figures["strangers_beyond"]["cost"][1]) / 100
    if chip in figures["chips"]:
        p90 = max(p90, figures["chips"][chip]["cost"][1] / 100)
    if "uncalibrated" in facts:
        p90 = max(p90, PCIE)
    return 1 / (1 + p90), 1 / (1 - p90)
