"""Words and tables of a `Summary`: text for a terminal, Markdown for a document, JSON for a program. No arithmetic.

Whatever a trace or a server wrote (model names, error details, paths) is printed as plain characters, never as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.capacity.system import servers_of, tier_words, where_words
from analysis.labels import clean as clean
from analysis.offered_load import KIND_WORDS
from analysis.stats.intervals import Distribution, Quantity
from analysis.summary import Summary, claims
from harness.text_table import text_tables

_MARKDOWN = re.compile(r"([\\`*\[\]<>|])")
_ALIKE = re.compile(r"needs (\d+) independent .* worth about (\d+)$")
_NEEDS = re.compile(r"needs (\d+) \w+, has ")
DETAIL_CHARS = 90
Section = tuple[Sequence[str], list[Sequence[str]]]
"""Column heads, the first of which names the table, and rows."""


def render_text(summary: Summary, console: Console, whole: bool = False) -> None:
    """Print the report; fits 80 columns. ``whole``: also the figures of an INVALID run, which prove nothing."""
    colour = {"VALID": "green", "INVALID": "red", "TOO SMALL": "yellow"}[summary.verdict]
    console.print(Text.assemble((f" {summary.verdict} ", f"bold white on {colour}"), "  ",
                                (headline(summary), "bold")))  # fmt: skip
    for line in opening(summary):
        console.print(Text(line, style="bold yellow" if line == summary.caution else ""))
    for heads, rows in sections(summary, whole=whole):
        right = [k for k, head in enumerate(heads) if k and head not in _WORDY]
        for table in text_tables(heads, rows, console.width, right):
            console.print()
            console.print(table)
    for title, lines in closing(summary, whole=whole):
        console.print()
        console.print(Text(title, style="bold"))
        for line in lines:
            body = Table.grid(padding=0)
            body.add_row("- ", Text(line, overflow="fold"))
            console.print(body)
    console.print(Text(f"run directory: {clean(summary.run)}"), soft_wrap=True)
    verdict, *figures = bottom_lines(summary)
    console.print(Text(verdict, style="bold"), no_wrap=True, overflow="ellipsis")  # the reasons stand above, whole
    for line in figures:
        console.print(Text(line, style="bold"))


def render_markdown(summary: Summary, whole: bool = False) -> str:
    """The report as GitHub-flavoured Markdown; ``whole`` as in `render_text`."""
    lines = [f"## {summary.verdict}: {_md(headline(summary))}", ""]
    lines += [(f"**{line}**" if line == summary.caution else _md(line)) + "  " for line in opening(summary)]
    for heads, rows in sections(summary, wide=True, whole=whole):
        lines += ["", _md_row(heads), _md_row([" --- " if head in _WORDY or not k else " ---: "
                                                                for k, head in enumerate(heads)])]  # fmt: skip
        lines += [_md_row([_md(cell) for cell in row]) for row in rows]
    for title, notes in closing(summary, whole=whole):
        lines += ["", f"**{title}**", ""] + [f"- {_md(note)}" for note in notes]
    return "\n".join([*lines, "", f"Run directory: {_md(clean(summary.run))}"])


def render_json(summary: Summary) -> str:
    """The report as JSON, keys as METRICS.md lists them; not known is null."""
    return msgspec.json.format(msgspec.json.encode(claims(summary)), indent=2).decode()


# -------------------------------------------------------------------------------------------- what all of them say


_WORDY = ("meaning", "example", "95 % interval", "unit", "note")


def headline(summary: Summary) -> str:
    """Model, hardware, evidence."""
    tier = tier_words(summary)
    where = (
        f"{tier} x {summary.cost.replicas}"
        if tier
        else f"{summary.cost.replicas} {'server' if summary.cost.replicas == 1 else 'servers'}, no tier"
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
        within = f" ({interval(total, price)})" if total.low is not None or total.high is not None else ""
        given = "" if summary.load.mode == "closed" else " at this load"
        paid = f"{price(total.value)} USD per 1M tokens{within}, {price(output.value)} per 1M output tokens{given}"
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


def sections(summary: Summary, *, wide: bool = False, whole: bool = False) -> list[Section]:
    """Tables: cost, latency, rates, errors. ``wide``: there is room for the intervals of latencies, too.

    An INVALID run has no cost, and its other figures only where the ``whole`` is asked for.
    """
    invalid = summary.verdict == "INVALID"
    found: list[Section] = [] if invalid else [_cost(summary)]
    if whole or not invalid:
        found += [_latency(summary, wide), _rates(summary)]
    if summary.errors:
        rows = [
            (clean(e.error), f"{e.count:,}", clean(e.meaning), clean(e.example or "-", DETAIL_CHARS))
            for e in summary.errors
        ]
        found.insert(0 if invalid else len(found), (("Errors", "count", "meaning", "example"), list(rows)))
    return found


def _cost(summary: Summary) -> Section:
    cost, heads = summary.cost, ("Cost, USD per 1M", "value", "95 % interval")
    if cost.reason is not None:
        return heads, [("no price", "-", clean(cost.reason))]
    return heads, [(what, value(q, price), interval(q, price)) for what, q in priced(summary)]


def priced(summary: Summary) -> list[tuple[str, Quantity]]:
    """What has a price in this run, in words, with the price: the whole run, each split that holds, the steady part."""
    cost, split = summary.cost, summary.cost.split
    return [
        ("input + output tokens", cost.usd_per_1m_total),
        ("output tokens, which carry the whole bill", cost.usd_per_1m_output_only),
        (f"split 1:{split.ratio:g}: input tokens", split.usd_per_1m_input),
        (f"split 1:{split.ratio:g}: output tokens", split.usd_per_1m_output),
        *counted_splits(summary),
        *steady_prices(summary),
    ]


def counted_splits(summary: Summary) -> list[tuple[str, Quantity]]:
    """Prices by each split that follows what the servers counted and that holds."""
    lines = []
    for found in summary.cost.splits:
        if found.reason is None:
            cached = found.usd_per_1m_cached_input
            lines.append((f"split by {found.method}: input tokens", found.usd_per_1m_input))
            lines += [(f"split by {found.method}: cached input", cached)] if cached.value is not None else []
            lines.append((f"split by {found.method}: output tokens", found.usd_per_1m_output))
    return lines


def steady_prices(summary: Summary) -> list[tuple[str, Quantity]]:
    """Prices of the steady part of a closed loop; empty where there is none."""
    steady = summary.steady
    if summary.load.mode != "closed" or steady.usd_per_1m_total.value is None or steady.window is None:
        return []
    where = f"without ramp and drain ({steady.window.duration_s:.0f} s)"
    return [
        (f"{where}: input + output", steady.usd_per_1m_total),
        (f"{where}: output alone", steady.usd_per_1m_output_only),
    ]


def _latency(summary: Summary, wide: bool) -> Section:
    m = summary.metrics
    named = (
        ("ttft (from planned time)", m.ttft), ("service ttft (from sent)", m.service_ttft), ("tpot", m.tpot),
        ("itl", m.itl), ("e2e (from planned time)", m.e2e), ("lag (sent - planned)", m.lag),
        *([("session lag (due after its own time)", m.session_lag)] if summary.offered.kind == "sessions" else []),
    )  # fmt: skip
    heads = ("Latency, ms (95 % interval)" if wide else "Latency, ms", "mean", "p50", "p90", "p95", "p99")
    return heads, [(name, *_latencies(d, wide)) for name, d in named]


def _latencies(d: Distribution, wide: bool) -> list[str]:
    cells = []
    for q in (d.mean, d.p50, d.p90, d.p95, d.p99):
        known = wide and q.value is not None and not (q.low is None and q.high is None)
        cells.append(value(q, milliseconds) + (f" ({interval(q, milliseconds)})" if known else ""))
    return cells


def _rates(summary: Summary) -> Section:
    r = summary.rates
    named = (
        ("requests succeeded", r.request_throughput), ("input tokens", r.input_token_throughput),
        ("output tokens", r.output_token_throughput), ("input + output tokens", r.total_token_throughput),
        ("in flight, time average", r.concurrency),
    )  # fmt: skip
    rows: list[Sequence[str]] = [_rate_row(name, q) for name, q in named]
    if summary.slo is not None:
        limits = ", ".join(f"{name} {milliseconds(limit)} ms" for name, limit in summary.slo.limits.items())
        rows.append(_rate_row(f"goodput ({limits})", r.goodput))
        for part in summary.slo.criteria:
            became = {True: "met", False: "MISSED", None: "not judged"}[part.met]
            name = part.name.removesuffix(" of requests")
            rows.append((*_rate_row(f"SLO {became}: {name}", part.attainment, percent)[:3], "of requests"))
    return ("Throughput", "value", "95 % interval", "unit"), rows


def _rate_row(name: str, q: Quantity, style: object = None) -> Sequence[str]:
    style = style or figure
    return (name, value(q, style), interval(q, style) if q.value is not None else clean(q.note or "-"), q.unit)


PROVES_NOTHING = "the run is INVALID, so its figures prove nothing"


def closing(summary: Summary, *, whole: bool = True) -> list[tuple[str, list[str]]]:
    """Price basis, limits and what could not be checked, assumptions; of an INVALID run only where the figures are."""
    if summary.verdict == "INVALID" and not whole:
        said = f"left out: {PROVES_NOTHING}. With -v they are shown, and --format json has them all."
        return [("Latency and throughput", [said])]
    cost = summary.cost
    basis = []
    if cost.reason is None:
        basis.append(
            f"{hourly(cost.usd_per_hour)} USD/h x {cost.replicas} {'replica' if cost.replicas == 1 else 'replicas'}, "
            f"bill of this window {figure(cost.bill_usd)} USD; {cost.purchase}, {cost.region}, "
            f"read {cost.date}; source: {cost.source}"
        )
        if summary.engine == "url":
            basis.append("the tier is as stated by you: what these servers run on was not looked at")
        if cost.note:
            basis.insert(0, cost.note)
    missed = [c for c in summary.checks if not c.gate and c.ok is False]
    limits = [f"{c.name}: {c.observed}; {c.advice}" for c in missed]
    unchecked = [f"{c.name}: {c.observed}" for c in summary.checks if c.ok is None and c.gate]
    apart = [f for f in summary.fidelity if f.ok is False]
    differ = [f"fidelity: {f.name}: {f.observed} (bound: {f.bound}); {f.said}" for f in apart]
    blind = [f"not checked: {'; '.join(unchecked)}"] if unchecked else []
    named = [("Price basis", basis), ("Limits of this run", limits + differ + blind)]
    named.append(("Assumptions", list(summary.assumptions)))
    return [(title, [clean(line) for line in lines]) for title, lines in named if lines]


# ----------------------------------------------------------------------------------------------------------- formatting


def value(q: Quantity, style: object) -> str:
    """A figure, ``n<299`` when the sample is too small for it, ``n≈60<299`` when its requests are too alike to count as
    more than 60, ``-`` when it is not known.
    """
    if q.value is not None:
        assert callable(style)
        return str(style(q.value))
    if alike := _ALIKE.match(q.note or ""):
        return f"n≈{alike[2]}<{alike[1]}"
    needs = _NEEDS.match(q.note or "")
    return f"n<{needs[1]}" if needs else "-"


def interval(q: Quantity, style: object) -> str:
    """The 95 % interval in ``style``, or why there is none."""
    if q.low is None and q.high is None:
        return clean(q.note or "-")
    assert callable(style)
    low, high = (None if end is None else style(end) for end in (q.low, q.high))
    return f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}"


def hourly(value: float | None) -> str:
    """The price of an hour as its source states it, not rounded: who checks a bill begins with it."""
    return "-" if value is None else f"{value:,.10g}"


def figure(value: float | None) -> str:
    """A number to four significant digits; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def price(value: float | None) -> str:
    """USD to three significant digits, cents from 100 on; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,.2f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{value:.0%}" if value in (0, 1) else f"{value:.2%}" if value > 0.99 else f"{value:.1%}"


def milliseconds(seconds: float) -> str:
    """Seconds shown as milliseconds."""
    ms = seconds * 1000
    return f"{ms:,.0f}" if abs(ms) >= 99.95 else f"{ms:.1f}" if abs(ms) >= 9.995 else f"{ms:.2f}"


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"
