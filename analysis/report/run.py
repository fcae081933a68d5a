"""One run in words and tables, the same in a terminal, in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec
from rich.console import Console
from rich.text import Text

from harness.analysis.capacity.system import servers_of, tier_words, where_words
from harness.analysis.labels import clean
from harness.analysis.rates import KIND_WORDS
from harness.analysis.report.document import MOST_ITEMS, Cell, Row, Section, Table, escaped
from harness.analysis.report.document import render_markdown as sections_as_markdown
from harness.analysis.report.document import render_text as print_sections
from harness.analysis.report.figures import (
    Style,
    figure,
    hourly,
    interval,
    milliseconds,
    percent,
    price,
    quantity,
    value,
    within,
)
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import Summary, claims

DETAIL_CHARS = 160


def render_text(summary: Summary, console: Console, whole: bool = False) -> None:
    """Print the report; fits 80 columns. ``whole``: also the figures of an INVALID run, which prove nothing."""
    colour = {"VALID": "green", "INVALID": "red", "TOO SMALL": "yellow"}[summary.verdict]
    console.print(Text.assemble((f" {summary.verdict} ", f"bold white on {colour}"), "  ",
                                (headline(summary), "bold")))  # fmt: skip
    for line in opening(summary):
        console.print(Text(line, style="bold yellow" if line == summary.caution else ""))
    console.print()
    print_sections(run_sections(summary), console, whole)
    console.print(Text(f"run directory: {clean(summary.run)}"), soft_wrap=True)
    verdict, *figures = bottom_lines(summary)
    console.print(Text(verdict, style="bold"), no_wrap=True, overflow="ellipsis")  # the reasons stand above, whole
    for line in figures:
        console.print(Text(line, style="bold"))


def render_markdown(summary: Summary, whole: bool = False) -> str:
    """The report as GitHub-flavoured Markdown; ``whole`` as in `render_text`."""
    lines = [f"## {summary.verdict}: {escaped(headline(summary))}", ""]
    lines += [(f"**{line}**" if line == summary.caution else escaped(line)) + "  " for line in opening(summary)]
    tables = sections_as_markdown(run_sections(summary), whole)
    return "\n".join([*lines, "", tables, "", f"Run directory: {escaped(summary.run)}"])


def render_json(summary: Summary) -> str:
    """The report as JSON, keys as METRICS.md lists them; not known is null."""
    return msgspec.json.format(msgspec.json.encode(claims(summary)), indent=2).decode()


def headline(summary: Summary) -> str:
    """Model, hardware, evidence."""
    tier = tier_words(summary)
    where = (
        f"{tier} x {summary.cost.paid:.4g}"
        if tier
        else f"{summary.cost.paid:.4g} {'server' if summary.cost.replicas == 1 else 'servers'}, no tier"
    )
    where += where_words(summary.label, servers_of(summary))
    return clean(f"{summary.model} on {where}, {summary.evidence} {summary.created[:10]}")


def opening(summary: Summary) -> list[str]:
    """Reasons, what to beware of, then what was done, in sentences."""
    said = [clean(f"- {reason}") for reason in summary.reasons]
    said += [summary.caution] if summary.caution else []
    return said + done(summary)


def done(summary: Summary) -> list[str]:
    """What became of the requests, and what load and server they were, in a sentence each."""
    counts, load, window = summary.requests, summary.load, summary.window
    parts = [f"{counts.succeeded:,} of {counts.planned:,} requests succeeded"]
    parts += [
        f"{n:,} {what}"
        for n, what in (
            (counts.failed, "failed"), (counts.unfinished, "unfinished"), (counts.lost, "lost"),
            (counts.not_due, "not due within the run's duration"), (counts.cancelled, "cancelled as planned"),
        )
        if n
    ]  # fmt: skip
    parts.append(f"{window.duration_s:,.1f} s ({window.rule})" if window else "no window")
    rate, offered = summary.rates.request_rate, summary.offered
    asked = f"{figure(rate.value)} req/s planned" if rate.value is not None else "no planned times"
    if offered.kind == "closed":
        asked = f"{load.concurrency} in flight"
    elif offered.kind == "sessions":
        started = f"{figure(offered.session_rate.value)} sessions/s started"
        asked = f"{started}, {figure(offered.sent_rate.value)} req/s sent ({asked})"
    load_words = f"{KIND_WORDS[offered.kind]}, {asked}"
    trace = f"{summary.plan.trace} ({summary.plan.trace_format})"
    served = clean(f"{load_words}; trace {trace}; {summary.engine} {summary.server.version or ''}".rstrip())
    return ["; ".join(parts), served, *_cache(summary)]


def _cache(summary: Summary) -> list[str]:
    """What production's prompt cache held, and what that of the replay: where the trace says it."""
    found, source = summary.cache, summary.plan.source
    if found.recorded_share is None or source is None:
        return []
    replay = "not measured"
    if found.replay_share is not None:
        whose = "the servers' counters" if found.replay_source == "counters" else "usage of each request"
        replay = f"{percent(found.replay_share)} ({whose})"
    rows = f"{found.recorded_rows:,} of {source.requests:,} rows say it"
    return [f"prompt cache: recorded {percent(found.recorded_share)} of input cached ({rows}), replay {replay}"]


def bottom_lines(summary: Summary) -> tuple[str, str, str]:
    """Verdict, price, SLO: a line each, the last that a terminal shows."""
    reason = f": {summary.reasons[0]}" if summary.reasons else ""
    more = f" (and {len(summary.reasons) - 1} more)" if len(summary.reasons) > 1 else ""
    cost = summary.cost
    if cost.reason is not None:
        paid = f"no price: {cost.reason}"
    else:
        total, output = cost.usd_per_1m_total, cost.usd_per_1m_output_only
        given = "" if summary.load.mode == "closed" else " at this load"
        paid = "" if summary.evidence == "measured" else f"{summary.evidence}, not measured: "
        paid += "at least " if summary.costs_at_least else ""
        paid += f"{price(total.value)} USD per 1M tokens{within(total, price)}"
        paid += f", {price(output.value)} per 1M output tokens{given}"
    if summary.verdict != "VALID" and summary.slo is not None:
        kept = f"SLO not judged: the run is {summary.verdict}"
    elif summary.slo is None:
        kept = "no SLO was given (--slo ttft=2s,tpot=100ms)"
    else:
        words = {True: "met", False: "MISSED", None: "not judged"}
        kept = "; ".join(
            f"SLO {words[part.met]}, kept by {value(part.attainment, percent)}: {part.name}"
            for part in summary.slo.criteria
        )
    return clean(f"{summary.verdict}{reason}{more}"), clean(paid), clean(kept)


def run_sections(summary: Summary) -> list[Section]:
    """Cost, latency, throughput, errors, limits, assumptions. An INVALID run has no cost, and errors come first."""
    invalid = summary.verdict == "INVALID"
    figures = [
        Section(id="latency", title="Latency", table=_latency(summary), proves_nothing=invalid),
        Section(id="time", title="Throughput", table=_rates(summary), proves_nothing=invalid),
    ]
    errors = [Section(id="errors", title="Errors", table=_errors(summary))] if summary.errors else []
    rests_on = [
        Section(id=place, title=title, notes=notes, proves_nothing=invalid)
        for place, title, notes in (
            ("limits", "Limits of this run", _limits(summary)),
            ("assumptions", "Assumptions", summary.assumptions),
        )
        if notes
    ]
    return [*errors, *figures, *rests_on] if invalid else [_cost(summary), *figures, *errors, *rests_on]


def _cost(summary: Summary) -> Section:
    cost, split, steady = summary.cost, summary.cost.split, summary.steady
    if cost.reason is not None:
        return Section(id="cost", title="Cost", lines=[f"No price: {cost.reason}."])
    ratio = f"split 1:{split.ratio:g}"
    priced = [
        ("input + output tokens", cost.usd_per_1m_total),
        ("output tokens, which carry the whole bill", cost.usd_per_1m_output_only),
        (f"{ratio}: input tokens", split.usd_per_1m_input),
        (f"{ratio}: output tokens", split.usd_per_1m_output),
    ]
    for found in cost.splits:
        if found.reason is None:
            priced += [
                (f"split by {found.method}: {kind}", q)
                for kind, q in (
                    ("input tokens", found.usd_per_1m_input), ("cached input", found.usd_per_1m_cached_input),
                    ("output tokens", found.usd_per_1m_output),
                )
                if q.value is not None or kind != "cached input"
            ]  # fmt: skip
    if summary.load.mode == "closed" and steady.usd_per_1m_total.value is not None and steady.window is not None:
        where = f"without ramp and drain ({steady.window.duration_s:.0f} s)"
        priced += [
            (f"{where}: input + output", steady.usd_per_1m_total),
            (f"{where}: output alone", steady.usd_per_1m_output_only),
        ]
    ends = "interval" if summary.evidence == "simulated" else "95 % interval"
    return Section(
        id="cost", title="Cost", notes=_price_basis(summary), table=Table(
            ("Cost, USD per 1M", "value", ends), [_figure_row(name, q, price) for name, q in priced],
            caption=f"Evidence: {_evidence(q for _, q in priced)}",
        ),
    )  # fmt: skip


def _price_basis(summary: Summary) -> list[str]:
    cost = summary.cost
    basis = [cost.note] if cost.note else []
    basis.append(
        f"{hourly(cost.usd_per_hour)} USD/h x {cost.paid:.4g} {'replica' if cost.replicas == 1 else 'replicas'}, "
        f"bill of this window {figure(cost.bill_usd)} USD; {cost.purchase}, {cost.region}, "
        f"read {cost.date}; source: {cost.source}"
    )
    if summary.engine == "url":
        basis.append("the tier is as stated by you: what these servers run on was not looked at")
    return basis


def _latency(summary: Summary) -> Table:
    m = summary.metrics
    named = [
        ("ttft (from planned time)", m.ttft), ("service ttft (from sent)", m.service_ttft), ("tpot", m.tpot),
        ("itl", m.itl), ("e2e (from planned time)", m.e2e), ("lag (sent - planned)", m.lag),
    ]  # fmt: skip
    if summary.offered.kind == "sessions":
        named.append(("session lag (due after its own time)", m.session_lag))
    rows: list[Row] = [
        [
            name,
            *(quantity(q, milliseconds) for q in (d.mean, d.p50, d.p90, d.p95, d.p99)),
            Cell(f"{d.mean.n:,}", sort=d.mean.n),
        ]
        for name, d in named
    ]
    heads = ("Latency, ms", "mean", "p50", "p90", "p95", "p99", "samples")
    return Table(heads, rows, caption="With 95 % intervals", brief=True)


def _rates(summary: Summary) -> Table:
    r, offered = summary.rates, summary.offered
    named = [
        ("requests planned", replace(r.request_rate, note="as planned") if r.request_rate.value else r.request_rate)
    ]
    if offered.kind == "sessions":
        named += [("requests sent", offered.sent_rate), ("sessions started", offered.session_rate)]
    named += [
        ("requests succeeded", r.request_throughput), ("input tokens", r.input_token_throughput),
        ("output tokens", r.output_token_throughput), ("input + output tokens", r.total_token_throughput),
        ("in flight, time average", r.concurrency),
    ]  # fmt: skip
    caption = f"Throughput over the window. Evidence: {_evidence(q for _, q in named)}"
    if summary.slo is not None:
        limits = ", ".join(f"{name} {milliseconds(limit)} ms" for name, limit in summary.slo.limits.items())
        named.append((f"goodput ({limits})", r.goodput))
    rows: list[Row] = [[*_figure_row(name, q, figure), q.unit] for name, q in named]
    for part in summary.slo.criteria if summary.slo is not None else ():
        became = {True: "met", False: "MISSED", None: "not judged"}[part.met]
        name = f"SLO {became}: {part.name.removesuffix(' of requests')}"
        rows.append([*_figure_row(name, part.attainment, percent), "of requests"])
    return Table(("Throughput", "value", "95 % interval", "unit"), rows, (1,), caption)


def _figure_row(name: str, q: Quantity, style: Style) -> Row:
    return [
        name,
        Cell(value(q, style), sort=q.value),
        interval(q, style, q.note or "-") if q.value is not None else q.note or "-",
    ]


def _evidence(quantities: Iterable[Quantity]) -> str:
    return ", ".join(sorted({q.evidence for q in quantities}))


def _errors(summary: Summary) -> Table:
    rows: list[Row] = [
        [e.error, Cell(f"{e.count:,}", sort=e.count), e.meaning, clean(e.example or "-", DETAIL_CHARS)]
        for e in summary.errors[:MOST_ITEMS]
    ]
    caption = "Requests that did not succeed"
    return Table(("Errors", "count", "meaning", "first example"), rows, (1,), caption)


def _limits(summary: Summary) -> list[str]:
    missed = [f"{c.name}: {c.observed}; {c.advice}" for c in summary.checks if not c.gate and c.ok is False]
    differ = [
        f"fidelity: {f.name}: {f.observed} (bound: {f.bound}); {f.said}" for f in summary.fidelity if f.ok is False
    ]
    unchecked = [f"{c.name}: {c.observed}" for c in summary.checks if c.ok is None and c.gate]
    return missed + differ + ([f"not checked: {'; '.join(unchecked)}"] if unchecked else [])
