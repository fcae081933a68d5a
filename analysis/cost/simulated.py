"""What a simulated run says of itself: what its steps took, and how far its costs may be off for that alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from harness.analysis.stats.intervals import Quantity

STEP_SOURCES = {
    "kernels": "steps take what NVIDIA's measured kernels take",
    "fitted": "steps take what was fitted to measured runs",
    "given": "steps take what the user said",
    "bound": "steps take what the chip's data sheet allows at best, so every latency and cost is at least as high",
}
WIDENED = "the interval holds the simulator's own error"
Within = tuple[float, float]
"""What a cost may be at least and at most, as multiples of the simulated one; infinite at the end of a bound."""


def is_bound(model_facts: Mapping[str, str]) -> bool:
    """Whether steps took what a chip does at best, so that every cost is a lower bound."""
    return model_facts.get("step_source") == "bound"


def own_error(model_facts: Mapping[str, str]) -> Within | None:
    """The simulator's own error for the model and the chip of a run; None: it is measured, or nobody knows."""
    if is_bound(model_facts):
        return 1.0, math.inf
    if (said := model_facts.get("cost_range")) is None:
        return None
    low, high = (float(end) for end in said.split(" to "))
    return low, high


def words(model_facts: Mapping[str, str]) -> str | None:
    """How a run was simulated; None: it was not, or by an engine that does not say."""
    source = model_facts.get("step_source")
    if source is None:
        return None
    known = f"Simulated, not measured: {model_facts.get('simulated', '')}; {STEP_SOURCES.get(source, source)}."
    return f"{known} {_error_words(model_facts)}."


def error_words(model_facts: Mapping[str, str]) -> str | None:
    """What to know of the interval of a simulated cost; None: it is measured."""
    return _error_words(model_facts) if "step_source" in model_facts else None


def _error_words(model_facts: Mapping[str, str]) -> str:
    within = own_error(model_facts)
    if within is None:
        return "How far the simulator itself is off is not known, and in no interval"
    if math.isinf(within[1]):
        return "Costs are lower bounds: neither ranked nor compared"
    return (
        f"Intervals of cost hold the simulator's own error: {within[0]:.2f} to {within[1]:.2f} times it, in 9 of 10 "
        "cases. Near saturation it tells no time to first token: compare latencies at an equal share of each system's "
        "own capacity"
    )


def widened(cost: Quantity, within: Within | None) -> Quantity:
    """A cost whose interval, of sampling alone, is made to hold the simulator's own error; as it is for None."""
    if within is None or cost.value is None:
        return cost
    low = within[0] * (cost.value if cost.low is None else cost.low)
    high = within[1] * (cost.value if cost.high is None else cost.high)
    return replace(
        cost, low=low, high=high if math.isfinite(high) else None, note="; ".join(filter(None, (cost.note, WIDENED)))
    )  # fmt: skip


def at_least_as_wide(cost: Quantity, within: Within | None) -> Quantity:
    """A cost pooled from widened ones: what they share does not shrink with their number."""
    if within is None or cost.value is None:
        return cost
    whole = widened(replace(cost, low=None, high=None), within)
    low = whole.low if cost.low is None or whole.low is None else min(cost.low, whole.low)
    high = whole.high if cost.high is None or whole.high is None else max(cost.high, whole.high)
    return replace(whole, low=low, high=high)
