"""Words and tables of the two decisions: what to charge, and A against B. No arithmetic beyond units and percent.

Whatever a trace, a server or a price map wrote is printed as plain characters, never as markup.
"""

from __future__ import annotations

from harness.analysis.capacity.system import where_words
from harness.analysis.compare.compare import Comparison, Figure, LoadComparison
from harness.analysis.compare.paired import SHARES
from harness.analysis.pricing.rate_card import PriceReport, RateCard
from harness.analysis.pricing.terms import PriceBasis, Terms
from harness.analysis.report.document import Cell, Row, Section, Table
from harness.analysis.report.figures import figure, hourly, price, usd, within


def price_sections(report: PriceReport) -> list[Section]:
    """The whole price decision."""
    sections: list[Section] = []
    for charge in report.charges:
        sections += _charge_sections(charge, report.terms)
    if report.refused:
        lines = tuple(f"{run}: {'; '.join(why)}" for run, why in report.refused)
        sections.append(Section(title="Refused: runs that are not VALID have no price", notes=lines))
    return [*sections, Section(title="What this rests on", notes=report.assumptions)]


def _charge_sections(charge: RateCard, terms: Terms) -> list[Section]:
    stated = " (as stated by you)" if charge.tier and charge.servers else ""
    where = f"{charge.tier or 'no tier'}{stated} x {charge.replicas}{where_words(charge.label, charge.servers)}"
    title = f"What to charge: {charge.model} on {where}"
    warned = () if charge.caution is None else (f"CAUTION. {charge.caution}",)
    if charge.reason is not None or charge.cost_full is None or charge.cost is None:
        lines = (*warned, f"No price: {charge.reason}.", _load_line(charge))
        return [Section(title=title, lines=lines, notes=charge.notes)]
    standard = charge.offers[0]
    u, m, asked = percent(terms.utilisation), percent(terms.margin), standard.prices.total
    apart = charge.cost.cached_input.value is not None
    kinds = {"input": "uncached input" if apart else "input", "cached_input": "cached input", "output": "output",
             "total": "all tokens (this trace's mix)"}  # fmt: skip
    columns = ((charge.cost_full, False), (charge.cost, True), (standard.prices, False), (charge.floor, True))
    rows: list[Row] = [
        [name, *(usd(getattr(prices, kind, None), bare=bare) for prices, bare in columns)]
        for kind, name in kinds.items()
    ]
    quoted = f"Quoted at the highest load that keeps the SLO ({charge.slo}): {charge.load}."
    if charge.quoted_at != "capacity":
        slo = "without an SLO" if charge.slo is None else f"which kept the SLO ({charge.slo})"
        quoted = f"Quoted at one measured load, {slo}: {charge.load}."
    lines = (
        *warned,
        quoted,
        f"Charge {price(asked.value)} USD{within(asked, price)} per 1M tokens of this traffic: cost "
        f"{price(charge.cost.total.value)} at {u} utilisation, and {m} of the price is gross margin.",
        f"The price pays for the fleet from {percent(standard.break_even_utilisation)} utilisation on "
        f"({tokens(charge.break_even_tokens_per_month)} tokens a month; the fleet costs "
        f"{figure(charge.fleet_usd_per_month)} USD a month and serves at most "
        f"{tokens(charge.capacity_tokens_per_month)} at this load).",
    )
    ends = "95 %" if charge.evidence.startswith("measured") else "simulated"
    heads = ("USD per 1M tokens", f"cost at 100 % ({ends})", f"cost at {u}", f"PRICE ({ends})", "floor")
    sections = [Section(title=title, lines=lines, table=Table(heads, rows))]
    sections += [_offers(charge, terms)] if len(charge.offers) > 1 else []
    return [*sections, _against(charge, terms), Section(notes=(*_basis_lines(charge), *charge.notes))]


def _offers(charge: RateCard, terms: Terms) -> Section:
    u = percent(terms.utilisation)
    rows: list[Row] = [
        [
            offer.name + (f" (-{percent(offer.discount)})" if offer.discount else ""),
            *(usd(getattr(offer.prices, kind), bare=True) for kind in ("input", "cached_input", "output", "total")),
            Cell(percent(offer.margin), sort=offer.margin),
            percent(offer.break_even_utilisation) if offer.break_even_utilisation <= 1 else "never",
        ]
        for offer in charge.offers
    ]
    notes = []
    if any(offer.margin < 0 for offer in charge.offers):
        notes.append(f"a margin below 0 is a price BELOW COST at {u} utilisation")
    if terms.volume:
        notes.append("a volume discount is on the tokens beyond its threshold, not on those before it")
    sold = (charge.capacity_tokens_per_month or 0.0) * terms.utilisation
    if any(offer.from_tokens > sold for offer in charge.offers):
        notes.append(
            f"this fleet sells {tokens(sold)} tokens a month at {u} utilisation: a tier beyond that needs more"
        )
    heads = ("Price list, USD per 1M", "input", "cached", "output", "all", f"margin at {u}", "break-even utilisation")
    return Section(table=Table(heads, rows), notes=tuple(notes))


def _against(charge: RateCard, terms: Terms) -> Section:
    assert charge.cost is not None
    rows = [
        (
            f"{a.price.vendor} {a.price.name.rsplit('/', 1)[-1]}" + ("" if a.same_model else " (another model)"),
            "/".join("-" if usd is None else f"{usd:g}" for usd in
                     (a.price.usd_per_1m_input, a.price.usd_per_1m_cached_input, a.price.usd_per_1m_output)),
            price(a.usd_per_1m_total),
            "-" if a.own_share.value is None else f"x {a.own_share.value:.3g}",
            "never" if a.break_even_tokens_per_month is None
            else f"{percent(a.break_even_utilisation.value)}, {tokens(a.break_even_tokens_per_month)}",
            a.verdict,
        )
        for a in charge.against
    ]  # fmt: skip
    same = [a for a in charge.against if a.same_model]
    found = [(sum(a.verdict == verdict for a in same), words) for verdict, words in _VERDICTS.items()]
    summed = ", ".join(f"{n} {words}" for n, words in found if n)
    lines = (
        f"Build or buy, for this trace: own cost (without margin) at {percent(terms.utilisation)} utilisation is "
        f"{price(charge.cost.total.value)} USD{within(charge.cost.total, price)} per 1M tokens.",
        f"Of {len(same)} API offers of this model: {summed or 'none is in the price map (--against, --list-prices)'}.",
    )
    notes = sorted({note for a in charge.against for note in a.notes})
    if charge.against:
        notes.append("break-even: own is cheaper from that share of the fleet's capacity, or so many tokens a month")
    if any(a.verdict == "not known" for a in charge.against):
        notes.append("not known: own cost has no end of its interval on the side that would decide")
    heads = ("API list price", "in/cached/out", "this trace", "own is", "break-even", "verdict")
    return Section(lines=lines, table=Table(heads, rows), notes=tuple(notes))


_VERDICTS = {
    "build": "cost more than own hardware", "buy": "cost less than own hardware",
    "too close to call": "are too close to call", "not known": "cannot be judged (no interval)",
}  # fmt: skip


def _basis_lines(charge: RateCard) -> list[str]:
    said = [
        f"{charge.evidence}; {_load_line(charge)}",
        f"denominator: {charge.denominator}; window: {charge.window} ({figure(charge.window_s)} s)",
    ]
    if charge.floor is not None:
        said.append(
            f"floor: all tokens {price(charge.floor.total.value)}{within(charge.floor.total, price)} USD per 1M, "
            f"100 % utilisation at {figure(charge.floor_load)} {charge.offered.unit if charge.offered else ''}, the "
            "highest throughput of any VALID run; it keeps no SLO, and a higher load may cost less unless this one "
            "saturated the servers"
        )
    if charge.basis is not None:
        said.append(f"hardware: {_basis(charge.basis)}")
        if charge.basis.measured_with is not None:
            said.append(
                f"priced again, not measured again; at the time of the run: {_basis(charge.basis.measured_with)}"
            )
    if charge.mix is not None:
        cached = charge.mix.cached_input
        said.append(
            f"mix: {charge.mix.uncached_input:,} {'input (cached: unknown)' if cached is None else 'uncached input'}, "
            + ("" if cached is None else f"{cached:,} cached input, ")
            + f"{charge.mix.output:,} output tokens; the bill is laid on them by {charge.structure.method} "
            f"{charge.structure.input:.3g} : {charge.structure.output:.3g}"
            + ("" if charge.structure.cached_input is None else f" : {charge.structure.cached_input:.3g} (cached)")
        )
    if charge.args:
        said.append(f"engine: {charge.engine} {' '.join(charge.args)}")
    return said


def _basis(basis: PriceBasis) -> str:
    return (
        f"{hourly(basis.usd_per_hour)} USD/h, {basis.purchase}, {basis.region}, read {basis.date}"
        f"{' (OLD)' if basis.old else ''}; {basis.source}{'' if basis.note is None else f'; {basis.note}'}"
    )


def _load_line(charge: RateCard) -> str:
    became = {True: "kept", False: "MISSED", None: "not judged"}[charge.slo_met]
    slo = "no SLO" if charge.slo is None else f"SLO {charge.slo}: {became}"
    runs = f"{len(charge.runs)} runs" if len(charge.runs) > 1 else "1 run"
    return f"{charge.load}, trace {charge.trace}, {slo}; {runs} of {charge.measured}"


def comparison_sections(comparison: Comparison) -> list[Section]:
    """The whole comparison, or why there is none."""
    if not comparison.comparable:
        return [Section(title="Not comparable", notes=comparison.reasons)]
    sections = [] if comparison.caution is None else [Section(lines=(f"CAUTION. {comparison.caution}.",))]
    sections += [_load(load, len(comparison.loads) > 1) for load in comparison.loads]
    if comparison.differs:
        rows = [(d.name, d.a, d.b) for d in comparison.differs]
        sections.append(Section(table=Table(("What differs", "A", "B"), rows)))
    honest = (
        f"{comparison.compared} figures are judged, each by its own 95 % interval over the pairs: about "
        f"{comparison.expected_by_chance:.1f} of them would show a difference by chance alone; {comparison.shown} do"
        if comparison.compared
        else "no figure is judged"
    )
    same = (
        f"the same in both: trace {comparison.trace}, seed, load, SLO ({comparison.slo or 'none'}); "
        f"evidence: {comparison.evidence}"
    )
    return [*sections, Section(notes=(honest, same, *comparison.notes))]


def _load(load: LoadComparison, named: bool) -> Section:
    rows = [_figure_row(f) for f in load.figures]
    notes = [f"{load.requests:,} requests in {load.pairs} {'pair' if load.pairs == 1 else 'pairs'} of runs"]
    if load.left_out:
        notes.append(f"{load.left_out:,} requests that only one run was offered are left out")
    unknown = sorted(
        {f"{f.name}: {f.difference.note or 'no interval'}" for f in load.figures if f.verdict == "not known"}
    )
    gates = tuple(f"--fail-if {g.text}: {_OUTCOMES[g.outcome]}{f' ({g.why})' if g.why else ''}" for g in load.gates)
    return Section(
        title="A against B" + (f": {load.load}" if named else ""),
        lines=(*load.verdict, *gates),
        table=Table(("Figure", "A", "B", "B - A", "95 % interval", "change", "B is"), rows),
        notes=(*notes, *unknown),
    )


_OUTCOMES = {
    "fails": "FAILS, the whole interval is beyond it",
    "holds": "holds, the whole interval is within it",
    "undecided": "undecided, the interval lies on both sides; this does not fail (more requests or repeats would tell)",
    "not judged": "NOT JUDGED",
}


def _figure_row(f: Figure) -> tuple[str, ...]:
    factor, unit = _SHOWN.get(f.unit, (1.0, f.unit))
    d = f.difference
    unknown = d.low is None or d.high is None
    within = "-" if unknown else f"{_show(d.low, factor, '+')} to {_show(d.high, factor, '+')}"
    change = "-" if f.change.value is None or f.name in SHARES else f"{f.change.value * 100:+.3g} %"
    name = f"{f.name}, {unit}"
    return (name, _show(f.a, factor), _show(f.b, factor), _show(d.value, factor, "+"), within, change, f.verdict)


_SHOWN = {"s": (1000.0, "ms"), "share of requests": (100.0, "%")}


def _show(value: float | None, factor: float, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value * factor:{sign},.0f}" if abs(value * factor) >= 1000 else f"{value * factor:{sign}.4g}"


def percent(share: float | None) -> str:
    """A share in percent to three significant digits."""
    if share is None:
        return "-"
    return f"{share * 100:,.0f} %" if abs(share) >= 10 else f"{share * 100:.3g} %"


def tokens(value: float | None) -> str:
    """Tokens with a word for the power of ten."""
    if value is None:
        return "-"
    for power, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= power:
            return f"{value / power:.3g} {word}"
    return f"{value:,.0f}"
