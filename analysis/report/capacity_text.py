"""Words and tables of capacity and cost at the SLO. No arithmetic beyond units and percent."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.capacity.search import ProbeRow
from harness.analysis.capacity.serving_config import ServingConfig
from harness.analysis.rates import KIND_WORDS
from harness.analysis.report.document import Cell, Row, Section, Table
from harness.analysis.report.figures import figure, hourly, interval, price, usd, within
from harness.analysis.stats.intervals import Quantity
from harness.slo import Criterion, percent


def simulated(system: ServingConfig) -> bool:
    """Whether no such system was ever measured."""
    return system.usd_per_1m_total.evidence.startswith("simulated")


def sentence(system: ServingConfig) -> str:
    """The capacity of one system and its cost there, in one plain sentence or two."""
    return f"Simulated, not measured: {_sentence(system)}" if simulated(system) else _sentence(system)


def _sentence(system: ServingConfig) -> str:
    slo, found = system.slo or "any latency", system.capacity
    if found is None:
        return f"{system.name}: no SLO was given, so there is no capacity (--slo)."
    if found.state == "unknown":
        return f"{system.name}: capacity is not known: {found.load.note}."
    if found.state == "not reached":
        return (
            f"{system.name} does not keep {slo}: at {figure(system.loads[0])} {system.unit}, the lowest load "
            f"that was measured, {found.limit.name if found.limit else 'it'} is missed. Lower loads were not measured."
        )
    if found.state == "beyond":
        return (
            f"{system.name} carries at least {figure(system.loads[-1])} {system.unit}{_sent(system)} with {slo}: "
            "the highest load that was measured keeps it, so capacity lies beyond and has no figure."
        )
    load = f"{figure(found.load.value)} {system.unit}{within(found.load, figure)}{_sent(system)}"
    said = f"{system.name} carries {'at most ' if system.costs_at_least else ''}{load} with {slo}"
    said += f"; what breaks first: {found.limit.name}." if found.limit and len(system.criteria) > 1 else "."
    total, tokens = system.usd_per_1m_total, found.rates.get("total_token_throughput")
    if tokens is not None and tokens.value is not None:
        said += f" At that load: {figure(tokens.value)} tokens/s (input + output)"
        if total.value is not None:
            cost = f"at least {price(total.low)}" if system.costs_at_least else price(total.value)
            said += f", {cost} USD per 1M tokens" + ("" if system.costs_at_least else within(total, price))
        said += "."
    return said


def _sent(system: ServingConfig) -> str:
    """Requests/s that sessions which wait really sent at capacity; nothing for other loads."""
    if system.loop != "sessions" or system.requests_per_s is None:
        return ""
    return f" ({figure(system.requests_per_s * system.replicas)} req/s really sent)"


def capacity_sections(systems: Sequence[ServingConfig]) -> list[Section]:
    """Capacity and cost per tier and model, then what limits each."""
    if not systems:
        return []
    notes = [
        "Capacity is that of all replicas together, from VALID runs; between two measured loads tokens/s are "
        "interpolated and the cost is derived from them; nothing is extrapolated.",
        "Floor: cost at the highest throughput of any VALID run. It keeps no SLO; where no measured load saturated "
        "the servers, a higher one may cost less.",
    ]
    sold = [s for s in systems if s.usd_per_1m_total_utilised.value is not None and s.loop != "closed"]
    notes += [_utilised(system) for system in sold]
    sections = [Section(title="Capacity and cost at the SLO", table=capacity_table(systems), notes=tuple(notes))]
    sections += [Section(title=f"Limits of {s.name}, {KIND_WORDS[s.loop]}", notes=_limits(s)) for s in systems]
    return sections


def probe_section(probes: Sequence[ProbeRow], criteria: Sequence[Criterion]) -> Section:
    """What each probe of a search found and cost."""
    heads = ("Load", "Requests", "Verdict", *(c.name for c in criteria), "Done req/s", "Seconds", "USD")
    rows = []
    for p in probes:
        shares = [*p.attainment, *[None] * len(criteria)][: len(criteria)]
        rows.append(
            (
                p.load, "-" if p.requests is None else f"{p.requests:,}", p.verdict,
                *("-" if x is None else f"{x:.2%}" for x in shares), figure(p.request_throughput), figure(p.seconds),
                "-" if p.usd is None else f"{p.usd:.4f}",
            )
        )  # fmt: skip
    return Section(title="Probes", table=Table(heads, rows))


def capacity_table(systems: Sequence[ServingConfig]) -> Table:
    """Capacity and cost at the SLO, a line per system, with intervals."""
    heads = ("Tier and model", "Loop", "Capacity", "Breaks first", "Tokens/s there", "USD per 1M there", "Floor")
    caption = (
        "From VALID runs; tokens/s are interpolated between two measured loads, nothing is extrapolated; with 95 % "
        "intervals"
    )
    return Table(heads, [_system_row(system) for system in systems], (2, 4, 5, 6), caption)


def _system_row(system: ServingConfig) -> Row:
    found, floor = system.capacity, system.floor
    tokens = found.rates.get("total_token_throughput") if found else None
    load = found.load if found else None
    return [
        _stamped(system),
        system.loop,
        Cell(_load(system, load), note=interval(load, figure) or None),
        found.limit.name if found and found.limit else "-",
        figure(tokens.value) if tokens else "-",
        usd(system.usd_per_1m_total),
        usd(floor.usd_per_1m_total if floor else None),
    ]


def _stamped(system: ServingConfig) -> str:
    """Its name, and what its figures are where they are not measured."""
    if system.costs_at_least:
        return f"{system.name}, simulated, costs at least"
    return f"{system.name}, simulated" if simulated(system) else system.name


def _load(system: ServingConfig, load: Quantity | None) -> str:
    if load is not None and load.value is not None:
        return f"{figure(load.value)} {system.unit}"
    state = system.capacity.state if system.capacity else "no SLO"
    return f"beyond {figure(system.loads[-1])} {system.unit}" if state == "beyond" else state


def _utilised(system: ServingConfig) -> str:
    q = system.usd_per_1m_total_utilised
    basis = f"{hourly(system.usd_per_hour)} USD/h, {system.purchase}, {system.region}, {system.price_date}"
    cost = f"{price(q.value)} USD per 1M tokens{within(q, price)}"
    return (
        f"{system.name}: {cost} at {percent(system.utilisation)} utilisation of that capacity. Price basis: {basis} "
        f"({system.price_source})."
    )


def _limits(system: ServingConfig) -> tuple[str, ...]:
    said = []
    if system.saturated_from is not None:
        said.append(f"saturated from {figure(system.saturated_from)} {system.unit} on: more load gives no more answers")
    else:
        said.append("not saturated at any measured load")
    return (*said, *system.notes)
