"""Pictures of the trade that a tier offers: what an accelerator gives against what a user sees of it, and its price.

*Interactivity* is tokens/s of one user's stream: 1 / TPOT, at the percentile of the SLO, else the median.
Throughput per accelerator is output tokens/s over all of a system's accelerators (over its servers where a tier has
none). Between two measured loads nothing is known; the lines only guide the eye.

Source: the axes are those of InferenceMAX's curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from analysis.capacity.serving_config import ServingConfig
from analysis.report.charts import Chart, Mark, against, load_of, slo_limits
from analysis.stats.intervals import Quantity, scaled
from analysis.summary import Summary


def tradeoff_charts(
    groups: Mapping[str, Sequence[Summary]], found: Sequence[ServingConfig], by_rate: bool
) -> list[Chart]:
    """Of VALID runs by group: throughput per accelerator and USD per 1M against interactivity, and USD against load.

    Charts without a point are left out. The limit that the SLO sets on TPOT is marked, and each capacity.
    """
    everyone = [s for members in groups.values() for s in members]
    unit = "accelerator" if all(s.tier is not None and s.tier.accelerator_count for s in everyone) else "server"
    percentile, limit_s = _shared_limit(everyone)
    marked = [] if limit_s is None else [Mark(axis="x", at=1 / limit_s, label="SLO")]
    capacities = [
        Mark(axis="x", at=one.capacity.load.value, label="capacity")
        for one in found
        if one.loop == ("open" if by_rate else "closed") and one.capacity and one.capacity.load.value is not None
    ]
    user = {
        name: [(x, s) for s in members if (x := interactivity(s, percentile)) is not None]
        for name, members in groups.items()
    }
    loads = {
        name: [(x, s) for s in members if (x := load_of(s, by_rate)) is not None] for name, members in groups.items()
    }
    load_unit = "req/s" if by_rate else "requests in flight"
    charts = (
        against(
            f"Output tokens/s per {unit}",
            {name: [(x, per_accelerator(s)) for x, s in points] for name, points in user.items()},
            "tokens/s", "tokens/s per user", "interactivity", marks=marked,
        ),
        against(
            "USD per 1M tokens against what a user sees",
            {name: [(x, s.cost.usd_per_1m_total) for x, s in points] for name, points in user.items()},
            "USD", "tokens/s per user", "interactivity", marks=marked,
        ),
        against(
            "USD per 1M tokens against load",
            {name: [(x, s.cost.usd_per_1m_total) for x, s in points] for name, points in loads.items()},
            "USD", load_unit, "load", marks=capacities,
        ),
    )  # fmt: skip
    return [chart for chart in charts if chart is not None]


def interactivity(summary: Summary, percentile: str = "p50") -> float | None:
    """Tokens/s of one stream: 1 / TPOT at ``percentile``; None where that is not known."""
    tpot_s = getattr(summary.metrics.tpot, percentile).value
    return 1 / tpot_s if tpot_s else None


def per_accelerator(summary: Summary) -> Quantity:
    """Output tokens/s over the accelerators of all replicas (over the replicas where the tier has none)."""
    accelerators = summary.tier.accelerator_count if summary.tier else 0
    return scaled(summary.rates.output_token_throughput, 1 / (summary.cost.replicas * (accelerators or 1)))


def _shared_limit(summaries: Sequence[Summary]) -> tuple[str, float | None]:
    """The percentile of TPOT that all SLOs limit, and that limit, s: a mark says nothing of points at another one.

    The median and None where there is no such limit, they differ, or no run has that percentile.
    """
    found = {slo_limits(s.slo.limits, s.slo.attain).get("tpot") if s.slo else None for s in summaries}
    limit = found.pop() if len(found) == 1 else None
    if limit is not None:
        name = f"p{limit[0] * 100:g}"
        if any(getattr(s.metrics.tpot, name, None) and getattr(s.metrics.tpot, name).value for s in summaries):
            return name, limit[1]
    return "p50", None
