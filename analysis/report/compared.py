"""Several runs side by side: one table, cost against SLO, latency against load, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from analysis.capacity.serving_config import ServingConfig, serving_configs
from analysis.capacity.system import Key, load_of, servers_of, system_of, tier_words, where_words
from analysis.labels import clean
from analysis.rates import KIND_WORDS
from analysis.report.capacity_text import capacity_table, sentence
from analysis.report.charts import cost_charts, load_charts, share_chart, tradeoff_charts
from analysis.report.document import Cell, Chart, Facts, Row, Section, Table
from analysis.report.figures import (
    figure,
    hourly,
    in_seconds,
    load_cell,
    percent,
    price,
    price_cell,
    quantity,
    state_of,
    verdict_note,
    within,
)
from analysis.report.view import RunView
from analysis.stats.intervals import Quantity
from analysis.stats.replicates import FEWEST_PAIRS, over_replicates
from analysis.summary import DEFAULT_ATTAIN, Summary
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
    groups: dict[str, list[RunView]] = {}
    loops = {v.summary.load.mode for v in views}
    for view in views:
        s = view.summary
        # nor those of a closed loop with those of an open one: they are not points of one curve
        name = _what(view) + (f", {s.load.mode} loop" if len(loops) > 1 else "")
        # figures of another kind never stand on one line with measured ones
        groups.setdefault(name if s.evidence == "measured" else f"{name}, {s.evidence}", []).append(view)
    priced = {name: [(v.summary, v.kept) for v in members] for name, members in groups.items()}
    valid = {name: [v.summary for v in members if v.summary.verdict == "VALID"] for name, members in groups.items()}
    by_rate = all(v.summary.load.mode == "open" for v in views)
    same, differs = _differences(views)
    found = [s for s in serving_configs([v.summary for v in views]) if s.capacity is not None and len(s.loads) > 1]
    share = max((v.summary.slo.attain for v in views if v.summary.slo is not None), default=DEFAULT_ATTAIN)
    sections = [
        Section(title="Capacity and cost at the SLO", table=capacity_table(found) if found else None),
        Section(id="loads", title="Each measured load", table=_table(views)),
        Section(
            id="cost-slo", title="Cost against SLO", charts=cost_charts(priced, share),
            lines=["Each point is the cheapest VALID run that kept the limit. Prices are USD per 1M tokens, input and "
                   "output together; bars are 95 % intervals. Nothing is extrapolated."],
        ),
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
    return ComparisonView(
        capacity=[sentence(s) for s in found if s.loop != "closed"],
        sentence=_sentence(views, found),
        mind=_mind(differs, but=ON_PURPOSE if found else ()),
        state="invalid" if all(v.state == "invalid" for v in views) else "valid",
        sections=[section for section in sections if section.table or section.charts or section.facts],
    )


def _what(view: RunView) -> str:
    s = view.summary
    return clean(f"{s.model} on {tier_words(s) or 'no tier'}{where_words(s.label, servers_of(s))}", 120)


def _mind(differs: Table | None, but: Sequence[str]) -> str | None:
    unlike = [name for name in UNLIKE if differs is not None and name in differs.heads and name not in but]
    if not unlike:
        return None
    return f"The runs differ in {' and '.join(unlike)}: side by side, but this is not a fair comparison."


def _distributions(views: Sequence[RunView]) -> list[Chart]:
    """TTFT and ITL of all runs over each other, but of those that prove nothing."""
    known = {k: v for k, v in enumerate(views) if v.state != "invalid" and v.below}
    charts: list[Chart] = []
    for metric, noun in (("ttft", "successful requests"), ("itl", "gaps between tokens")):
        shares = {v.label: v.below[metric] for v in known.values()}
        charts += share_chart(metric.upper(), noun, shares, colors=list(known))
    return charts


def _sentence(views: Sequence[RunView], found: Sequence[ServingConfig]) -> str:
    invalid, missed = (sum(v.state == state for v in views) for state in ("invalid", "missed"))
    said = f"{len(views) - invalid} of {len(views)} runs are VALID"
    said += f", {missed} of them missed their SLO. " if missed else ". "
    return said + cheapest([(v.label, v.summary) for v in views], found)


def _table(views: Sequence[RunView]) -> Table:
    rows = []
    # a sweep runs its loads in random order; colours stay with the run
    by_load = sorted(enumerate(views), key=lambda kv: (_what(kv[1]), load_cell(kv[1].summary).sort or 0.0))
    for k, v in by_load:
        s = v.summary
        cost = s.cost
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
                *(price_cell(s, price) for price in prices),
                *(replace(cell, mark="quiet") if v.state == "invalid" else cell for cell in figures),
            ]
        )
    heads = (
        "Run", "Tier", "Load", "All tokens", "Input", "Output", "TTFT p99", "TPOT p95", "Output tok/s", "SLO kept",
    )  # fmt: skip
    evidence = ", ".join(sorted({v.summary.cost.usd_per_1m_total.evidence for v in views}))
    caption = f"USD per 1M tokens ({evidence}); small print: 95 % intervals; grey: SLO missed or INVALID"
    return Table(heads, rows, range(2, 10), caption)


def _basis(s: Summary) -> str:
    cost = s.cost
    if s.tier is None:
        return "no price basis"
    return f"{hourly(cost.usd_per_hour)} USD/h x {cost.replicas}, {cost.purchase}, {cost.date}"


def _differences(views: Sequence[RunView]) -> tuple[Facts, Table | None]:
    """What is the same in all runs, and what is not: a comparison is only as good as this list."""
    asked: dict[str, Callable[[Summary], object]] = {
        "trace": lambda s: f"{s.plan.trace} {s.plan.trace_sha256[:12]}",
        "plan": lambda s: s.plan_sha256[:12],
        "seed": lambda s: load_seed(s.plan.seed),
        "requests": lambda s: s.plan.requests,
        "SLO": _slo,
        "loop": lambda s: KIND_WORDS[s.offered.kind],
        "model": lambda s: s.model,
        "label": lambda s: s.label or "none",
        "servers": lambda s: " ".join(servers_of(s)) or "started for the run",
        "tier": lambda s: tier_words(s) or "none",
        "price": _basis,
        "engine": lambda s: f"{s.engine} {s.server.version or ''}".strip(),
        "arguments": lambda s: " ".join(s.server.args) or "none",
        "evidence": lambda s: s.evidence,
        "harness": lambda s: f"{s.versions.get('harness', '?')} {s.git or ''}".strip(),
    }
    answers = {name: [ask(v.summary) for v in views] for name, ask in asked.items()}
    same = [(name, values[0]) for name, values in answers.items() if all(value == values[0] for value in values)]
    other = [name for name in answers if name not in dict(same)]
    if not other:
        return same, None
    rows: list[Row] = [[v.label, *(Cell(answers[name][k]) for name in other)] for k, v in enumerate(views)]
    return same, Table(("Run", *other), rows, (), "What differs between the runs")


def _slo(s: Summary) -> str:
    return "none" if s.slo is None else ", ".join(part.name for part in s.slo.criteria)


# ------------------------------------------------------------------------------------------------------ the cheapest
# Run against run only repeats know how much two runs of one system differ (`analysis.stats.replicates`), as in
# `harness compare`; at capacity the interval over many probes does.


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something with a price, and whether its interval knows what differs from run to run."""

    name: str
    cost: Quantity
    judged: bool

    def __str__(self) -> str:
        words = within(self.cost, price) if self.judged else ""
        return f"{self.name}: {price(self.cost.value)} USD per 1M tokens{words}"


def cheapest(runs: Sequence[tuple[str, Summary]], found: Sequence[ServingConfig]) -> str:
    """One sentence or two on cost: at capacity where two systems or more have one, else of the runs by their labels."""
    priced = [s for s in found if s.loop == "open" and s.usd_per_1m_total.value is not None]
    if len(priced) > 1:
        at_capacity = [Candidate(s.name, s.usd_per_1m_total, True) for s in priced]
        return _words(at_capacity, "Cheapest at the load that just keeps the SLO")
    kept = [(label, s) for label, s in runs if state_of(s) == "valid" and s.cost.usd_per_1m_total.value is not None]
    # a closed loop hides the queue that users would see; figures of two kinds of evidence are not held together
    kept = [run for run in kept if run[1].evidence == "measured"] or kept
    kept = [run for run in kept if run[1].load.mode == "open"] or kept
    if not kept:
        return "No run has a price and kept its SLO."
    which = "that kept its SLO" if kept[0][1].slo is not None else "(no SLO was given)"
    groups: dict[tuple[Key, Key], list[tuple[str, Summary]]] = {}
    for label, s in kept:
        # repeats of a trace's own arrivals have one rate exactly; drawn ones have that of their stages in the load
        rate = None if s.plan.stages else s.rates.request_rate.value
        groups.setdefault((system_of(s), (*load_of(s), rate)), []).append((label, s))
    return _words(
        [_of_repeats(members) for members in groups.values()],
        f"The cheapest VALID run {which}",
        kept[0][1].load.mode,
    )


def _of_repeats(members: Sequence[tuple[str, Summary]]) -> Candidate:
    name = members[0][0] + (f" and {len(members) - 1} more of it" if len(members) > 1 else "")
    cost = over_replicates([s.cost.usd_per_1m_total for _, s in members])
    # in an open loop the load is given, and what it costs below capacity is not the cost of the system
    judged = len(members) >= FEWEST_PAIRS and members[0][1].load.mode == "closed"
    return Candidate(name, cost, judged)


def _words(candidates: Sequence[Candidate], what: str, loop: str = "closed") -> str:
    ranked = sorted(candidates, key=lambda c: c.cost.value or 0.0)
    best, rest = ranked[0], ranked[1:]
    if not rest:
        return f"{what} is {best}."
    if all(_below(best, other) for other in rest):
        return f"{what} is {best}; next is {rest[0]}."
    near = next(other for other in rest if not _below(best, other))
    if loop == "open":
        return (
            f"{what}: not judged. {best}, {near}: in an open loop the load is given, and below "
            "capacity any of them could carry more for the same money; measure capacity of each (harness capacity)."
        )
    if best.judged and near.judged:
        return f"{what}: no difference shown between {best} and {near}; their intervals overlap."
    return (
        f"{what}: not judged. {best}, {near}: of one or two runs each it is not known how much two "
        f"runs of one system differ; {FEWEST_PAIRS} repeats of each would tell (harness compare)."
    )


def _below(best: Candidate, other: Candidate) -> bool:
    if not (best.judged and other.judged) or best.cost.high is None or other.cost.low is None:
        return False
    return best.cost.high < other.cost.low
