"""Several runs side by side: one table, the trade-off, latency against load, and what differs between them.

Which of two runs is cheaper is not said here: only repeats tell (`harness compare`), or capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from harness.analysis.capacity.serving_config import ServingConfig, serving_configs
from harness.analysis.capacity.system import servers_of, slo_words, tier_words, where_words
from harness.analysis.compare.comparable import SUBJECT
from harness.analysis.labels import clean
from harness.analysis.rates import KIND_WORDS
from harness.analysis.report.capacity_text import capacity_table, sentence
from harness.analysis.report.charts import load_charts, share_chart, tradeoff_charts
from harness.analysis.report.document import Cell, Chart, Facts, Row, Section, Table
from harness.analysis.report.figures import (
    figure,
    hourly,
    in_seconds,
    load_cell,
    percent,
    price,
    price_cell,
    quantity,
    verdict_note,
    within,
)
from harness.analysis.report.view import RunView
from harness.analysis.summary import Summary
from harness.plan.spec import load_seed

COLORS = 8
UNLIKE = ("trace", "SLO", "seed", "evidence", "loop")
"""Runs that differ in one of these did not do the same work to the same standard."""
ON_PURPOSE = ("seed", "loop")
"""What loads of one system differ in: each has prompts of its own, so that no prefix cache answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonView:
    """Several runs side by side."""

    capacity: list[str]
    """What each system carries at the SLO, in sentences; empty without an SLO or with one load only."""
    sentence: str
    mind: str | None
    """What makes the runs unlike; None when only what may be compared differs."""
    state: str
    sections: list[Section]


def compare_runs(views: Sequence[RunView]) -> ComparisonView:
    """Views of runs as one comparison; an INVALID run stands in the table with its verdict and without a price."""
    valid: dict[str, list[Summary]] = {}
    loops = {v.summary.load.mode for v in views}
    for s in (v.summary for v in views):
        name = _system(s)
        # runs of two loops, or of another kind of evidence, are not points of one curve
        name += f", {s.load.mode} loop" if len(loops) > 1 else ""
        group = valid.setdefault(name if s.evidence == "measured" else f"{name}, {s.evidence}", [])
        group += [s] if s.verdict == "VALID" else []
    by_rate = loops == {"open"}
    same, differs = _differences(views)
    found = [s for s in serving_configs([v.summary for v in views]) if s.capacity is not None and len(s.loads) > 1]
    sections = [
        Section(title="Capacity and cost at the SLO", table=capacity_table(found) if found else None),
        Section(id="loads", title="Each measured load", table=_table(views)),
        Section(
            title="Throughput, price and what a user sees", charts=tradeoff_charts(valid, found, by_rate),
            lines=["VALID runs, one point each; bars are 95 % intervals. Interactivity is tokens/s of one stream, 1 / "
                   "TPOT, at the percentile of the SLO, else the median; only a closed loop, or a load at capacity, "
                   "shows what the hardware gives."],
        ),
        Section(
            id="latency-load", title="Latency against load", charts=load_charts(valid, by_rate),
            lines=["VALID runs; bars are 95 % intervals."],
        ),
        Section(title="Distributions", charts=_distributions(views)),
        Section(title="What is compared", table=differs, facts=[("The same in all runs", same)] if same else []),
    ]  # fmt: skip
    unlike = [name for name in UNLIKE if differs and name in differs.heads and not (found and name in ON_PURPOSE)]
    return ComparisonView(
        capacity=[sentence(s) for s in found if s.loop != "closed"],
        sentence=_sentence(views, found),
        mind=f"The runs differ in {' and '.join(unlike)}: side by side, but this is not a fair comparison."
        if unlike
        else None,
        state="invalid" if all(v.state == "invalid" for v in views) else "valid",
        sections=[section for section in sections if section.table or section.charts or section.facts],
    )


def _distributions(views: Sequence[RunView]) -> list[Chart]:
    known = {k: v for k, v in enumerate(views) if v.state != "invalid" and v.below}
    charts: list[Chart] = []
    for metric, noun in (("ttft", "successful requests"), ("itl", "gaps between tokens")):
        shares = {v.label: v.below[metric] for v in known.values()}
        charts += share_chart(metric.upper(), noun, shares, colors=list(known))
    return charts


def _sentence(views: Sequence[RunView], found: Sequence[ServingConfig]) -> str:
    """How many runs count, and which system is cheapest at capacity: one with an interval wholly below the next."""
    invalid, missed = (sum(v.state == state for v in views) for state in ("invalid", "missed"))
    said = f"{len(views) - invalid} of {len(views)} runs are VALID"
    said += f", {missed} of them missed their SLO." if missed else "."
    costs = [(s.usd_per_1m_total, s.name) for s in found if s.loop == "open" and s.usd_per_1m_total.value is not None]
    costs.sort(key=lambda one: one[0].value or 0.0)
    if len(costs) < 2:
        return said
    named = [f"{name} ({price(q.value)} USD per 1M tokens{within(q, price)})" for q, name in costs]
    near = [k for k in range(1, len(costs)) if not (costs[0][0].high or 1e99) < (costs[k][0].low or 0.0)]
    if near:
        return f"{said} At capacity no difference in cost is shown between {named[0]} and {named[near[0]]}."
    return f"{said} Cheapest at capacity is {named[0]}; next is {named[1]}."


def _table(views: Sequence[RunView]) -> Table:
    rows = []
    # a sweep runs its loads in random order; colours stay with the run
    by_load = sorted(enumerate(views), key=lambda kv: (_system(kv[1].summary), load_cell(kv[1].summary).sort or 0.0))
    for k, v in by_load:
        s, cost = v.summary, v.summary.cost
        figures = (
            quantity(s.metrics.ttft.p99, in_seconds),
            quantity(s.metrics.tpot.p95, in_seconds),
            quantity(s.rates.output_token_throughput, figure),
            quantity(s.slo.attainment, percent) if s.slo is not None else Cell("-"),
        )
        prices = (cost.usd_per_1m_total, cost.split.usd_per_1m_input, cost.split.usd_per_1m_output)
        rows.append(
            [
                Cell(v.label, note=verdict_note(s, v.verdict), mark=f"run-{k % COLORS}"),
                Cell(tier_words(s) or "no tier", note=_basis(s)),
                load_cell(s),
                *(price_cell(s, one) for one in prices),
                *(replace(cell, mark="quiet") if v.state == "invalid" else cell for cell in figures),
            ]
        )
    heads = (
        "Run", "Tier", "Load", "All tokens", "Input", "Output", "TTFT p99", "TPOT p95", "Output tok/s", "SLO kept",
    )  # fmt: skip
    evidence = ", ".join(sorted({v.summary.cost.usd_per_1m_total.evidence for v in views}))
    caption = f"USD per 1M tokens ({evidence}); small print: 95 % intervals; grey: SLO missed or INVALID"
    return Table(heads, rows, range(2, 10), caption)


def _system(s: Summary) -> str:
    return clean(f"{s.model} on {tier_words(s) or 'no tier'}{where_words(s.label, servers_of(s))}", 120)


def _basis(s: Summary) -> str:
    cost = s.cost
    if s.tier is None:
        return "no price basis"
    return f"{hourly(cost.usd_per_hour)} USD/h x {cost.paid:.4g}, {cost.purchase}, {cost.date}"


ASKED: dict[str, Callable[[Summary], object]] = {
    "trace": lambda s: f"{s.plan.trace} {s.plan.trace_sha256[:12]}",
    "plan": lambda s: s.plan_sha256[:12],
    "seed": lambda s: load_seed(s.plan.seed),
    "requests": lambda s: s.plan.requests,
    "SLO": lambda s: slo_words(s) or "none",
    "loop": lambda s: KIND_WORDS[s.offered.kind],
    "evidence": lambda s: s.evidence,
}


def _differences(views: Sequence[RunView]) -> tuple[Facts, Table | None]:
    """What is the same in all runs, and what is not: a comparison is only as good as this list."""
    answers = {name: [ask(v.summary) for v in views] for name, ask in (ASKED | SUBJECT).items()}
    same = [(name, values[0]) for name, values in answers.items() if all(value == values[0] for value in values)]
    other = [name for name in answers if name not in dict(same)]
    if not other:
        return same, None
    rows: list[Row] = [[v.label, *(Cell(answers[name][k]) for name in other)] for k, v in enumerate(views)]
    return same, Table(("Run", *other), rows, (), "What differs between the runs")
