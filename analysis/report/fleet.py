"""Words, tables and rows of a fleet plan. No arithmetic beyond units and percent."""

from __future__ import annotations

from harness.analysis.capacity.fleet import Autoscaled, Kept
from harness.analysis.capacity.fleet_plan import FleetPlan, TierFleet
from harness.analysis.report.document import Cell, Section, Table
from harness.analysis.report.figures import figure, price

WITHIN = 0.03
"""How far the replayed share is from the share of a real autoscaled fleet of another engine: tests/lab/fleet.py."""


def fleet_sections(plan: FleetPlan) -> list[Section]:
    """The whole plan: the answer first, then the tiers, what scaling saves, and what changes the answer."""
    sections = [Section(title="Fleet", lines=(plan.sentence, _demand(plan)))]
    if plan.tiers:
        sections += [_sizes(plan), _scaling(plan)]
        sections += [_changes(one) for one in plan.tiers if one.sensitivities]
    if plan.excluded:
        notes = tuple(f"{name}: {why}" for name, why in plan.excluded)
        sections.append(Section(title="Left out", notes=notes))
    return [*sections, Section(title="What this rests on", notes=plan.assumptions)]


def _demand(plan: FleetPlan) -> str:
    said = (
        f"Demand of {plan.trace} x {plan.grow:g}: {figure(plan.requests.mean)} req/s on average, "
        f"{figure(plan.requests.worst_minute)} in the worst minute"
    )
    if plan.tokens is not None:
        said += f"; {figure(plan.tokens.mean)} and {figure(plan.tokens.worst_minute)} tokens/s (input + output)"
    return said + f". Planned for {figure(plan.requests.worst_minute * plan.headroom)} req/s."


def _sizes(plan: FleetPlan) -> Section:
    heads = (
        "Model and tier", "One replica carries", "Binding", "For the mean", "Fluid", "Replicas + spares", "Found by",
        "Instances", "Utilisation", "USD/h", "USD/month", "USD/year", "USD per 1M served",
    )  # fmt: skip
    rows = [
        (
            one.name,
            f"{'at least ' if one.at_least else ''}{figure(one.capacity)} {one.unit}{_ends(one)}",
            one.binding,
            _number(one.mean.replicas, "d"),
            _number(one.fluid.replicas, "d"),
            f"{one.peak.replicas}" + (f" + {one.peak.spares} inst." if one.peak.spares else ""),
            "fluid" if one.simulated is None else one.simulated.evidence,
            _number(one.peak.instances, "d"),
            _number(one.peak.utilisation, ".1%"),
            _number(one.peak.usd_per_hour, ",.4g"),
            _number(one.peak.usd_per_month, ",.0f"),
            _number(one.peak.usd_per_year, ",.0f"),
            Cell(price(one.usd_per_1m_served), sort=one.usd_per_1m_served),
        )
        for one in plan.tiers
    ]
    notes = [f"{one.name}: {one.slo}; price: {one.price_basis}" for one in plan.tiers]
    notes += [f"{one.name}: {note}" for one in plan.tiers for note in (_found_by(one), *one.notes)]
    notes += [
        f"{one.name}: when its instances fail and start again in {figure(one.start_s)} s, as often as their "
        f"availability says, {_share(one.failures)} of requests keep the SLO (simulated; in brackets the worst minute)"
        for one in plan.tiers if one.failures is not None
    ]  # fmt: skip
    notes.append("utilisation is what harness price takes (--utilisation): its cost at that share is USD per 1M served")
    notes += [
        f"{one.name}: no utilisation: {one.no_utilisation}. Go by USD per 1M served"
        for one in plan.tiers if one.no_utilisation is not None
    ]  # fmt: skip
    return Section(title="Replicas and instances", table=Table(heads, rows), notes=tuple(notes))


def _number(value: float | None, form: str) -> Cell:
    return Cell("-" if value is None else format(value, form), sort=value)


def _found_by(one: TierFleet) -> str:
    found = one.simulated
    if found is None:
        return f"not simulated, the fluid answer stands alone: {one.not_simulated}"
    step = found.engine
    said = (
        f"simulated: {found.replayed:,} requests on an engine fitted to {step.requests:,} answers (a step takes "
        f"{step.base_s:.3g} s + {step.per_sequence_s:.2g} s x sequences + {step.per_prompt_token_s:.2g} s x prompt "
        f"tokens, {step.max_num_seqs} sequences at most; median error {step.residual:.1%}); of {found.resamples} "
        f"resampled demands {found.missed} miss the SLO in some minute"
    )
    if found.left_out:
        said += f"; {found.left_out:,} requests of less busy half hours were not replayed"
    if not step.limit_seen:
        said += "; no run was full: the server may hold more sequences, and the fleet be smaller"
    return said


def _ends(one: TierFleet) -> str:
    low, high = one.capacity_low, one.capacity_high
    if low is None:
        return "" if high is None else f" (at most {figure(high)})"
    return f" (at least {figure(low)})" if high is None else f" ({figure(low)} to {figure(high)})"


def _scaling(plan: FleetPlan) -> Section:
    heads = (
        "Model and tier", "Fixed USD/h", "Scheduled USD/h", "keep the SLO", "Reactive USD/h", "keep the SLO",
        "come while it is behind", "Most instances", "Start-up s", "USD per 1M, scheduled",
    )  # fmt: skip
    rows = [
        (
            one.name, f"{one.peak.usd_per_hour:,.4g}", f"{one.scheduled.usd_per_hour:,.4g}", _kept(one.scheduled),
            f"{one.reactive.usd_per_hour:,.4g}", _kept(one.reactive), f"{one.reactive.short_share:.2%} of requests",
            f"{one.scheduled.peak_instances}", figure(one.start_s),
            price(one.usd_per_1m_scheduled),
        )
        for one in plan.tiers
    ]  # fmt: skip
    notes = []
    if any(one.simulated is not None for one in plan.tiers):
        notes.append(
            "keep the SLO: of all requests, replayed in virtual time while instances come and go (simulated; "
            f"within {WITHIN * 100:.0f} points of another engine in the laboratory); in brackets the worst minute"
        )
    notes += [
        f"{one.name}: half hours evenly spread over the demand were replayed for that, {kept.replayed:,} of "
        f"{plan.requests.total:,} requests"
        for one in plan.tiers
        if (kept := one.reactive.kept) is not None and kept.replayed < 0.9 * plan.requests.total
    ]
    if any(one.simulated is None for one in plan.tiers):
        notes.append("not simulated: how many keep the SLO while instances come and go is not known")
    notes.append(
        "come while it is behind: fluid, even demand within a minute; those may keep the SLO, and others miss it"
    )
    return Section(
        title="Autoscaled against fixed, over the trace's own time", table=Table(heads, rows), notes=tuple(notes)
    )


def _kept(one: Autoscaled) -> str:
    return "not simulated" if one.kept is None else _share(one.kept)


def _share(kept: Kept) -> str:
    return f"{'' if kept.promised else 'MISSES: '}{kept.share:.1%} ({kept.worst_minute:.0%})"


def _changes(one: TierFleet) -> Section:
    rows = [(s.changed, f"{s.instances}", f"{s.usd_per_month:,.0f}") for s in one.sensitivities]
    return Section(
        title=f"What changes the fluid fleet: {one.name}", table=Table(("If", "Instances", "USD/month"), rows)
    )
