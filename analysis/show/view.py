"""One run in the words and tables of the HTML page. No arithmetic: figures come from the `Summary` and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from analysis.capacity.system import tier_words
from analysis.rows.read import Run
from analysis.show import report
from analysis.show.cells import Cell, Table, in_percent, in_seconds, interval, number, quantity, state_of
from analysis.show.curves import SHARES, Promises, curves, promises
from analysis.show.plot import RunCharts, run_charts
from analysis.stats.intervals import Distribution, Quantity, samples_needed
from analysis.summary import DEFAULT_ATTAIN, Summary

MOST_ITEMS = 200
"""Entries of one list that a server or a trace could make endless (arguments, facts, errors)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run, in the words and tables of the page."""

    label: str
    summary: Summary
    state: str
    """valid, missed or invalid."""
    verdict: str
    sentence: str
    proves_nothing: str
    opening: list[str]
    limits: list[str]
    """Names of the limits that narrow the figures; what each says is under Inputs."""
    keys: list[tuple[str, Cell]]
    price: Table | None
    basis: list[tuple[str, object]]
    kept: Promises
    promises: Table | None
    latency: Table
    rates: Table
    lag_says: str
    charts: RunCharts | None
    checks: Table
    fidelity: Table | None
    errors: Table | None
    inputs: list[tuple[str, list[tuple[str, object]]]]
    notes: list[tuple[str, list[str]]]


def view_run(run: Run, summary: Summary, label: str = "") -> RunView:
    """Reduce one run to what its page shows; the run itself can be forgotten afterwards."""
    found = curves(run)
    attain = summary.slo.attain if summary.slo is not None else DEFAULT_ATTAIN
    shares = sorted({*SHARES, attain})
    charts = run_charts(run, summary, found, linked=f"time {label}") if found is not None else None
    kept = promises(run, summary.requests, shares)
    state = state_of(summary)
    return RunView(
        label=label,
        summary=summary,
        state=state,
        verdict={
            "valid": "VALID",
            "missed": "VALID, SLO missed",
            "unknown": "VALID, SLO not judged",
            "invalid": "INVALID",
            "small": "TOO SMALL",
        }[state],
        sentence=_sentence(summary),
        proves_nothing=report.PROVES_NOTHING,
        opening=report.done(summary),
        limits=[c.name for c in summary.checks if not c.gate and c.ok is False],
        keys=[] if state == "invalid" else _keys(summary),
        price=_price(summary),
        basis=_basis(summary),
        kept=kept,
        promises=_promises(summary, kept, shares) if summary.verdict == "VALID" else None,
        latency=_latency(summary),
        rates=_rates(summary),
        lag_says=_lag_says(summary),
        charts=charts,
        checks=_checks(summary),
        fidelity=_fidelity(summary),
        errors=_errors(summary),
        inputs=_inputs(summary),
        notes=[(title, lines) for title, lines in report.closing(summary) if title != "Price basis"],
    )


# ---------------------------------------------------------------------------------------------------------- plain words


def _sentence(s: Summary) -> str:
    """The verdict as a sentence that someone who reads nothing else may act on."""
    if s.verdict == "TOO SMALL":
        n = s.requests.offered
        return f"{n} {'request is' if n == 1 else 'requests are'} too few for a verdict, and carry no price."
    if s.verdict != "VALID":
        n = len(s.reasons)
        return (
            f"This run is no evidence: {n} {'check' if n == 1 else 'checks'} failed. "
            "Its figures help to find out why; they carry no price."
        )
    price = s.cost.usd_per_1m_total
    parts = []
    if price.value is None:
        parts.append(f"No price: {s.cost.reason or price.note or 'not known'}.")
    else:
        load = f"{s.load.concurrency} requests in flight"
        if s.load.mode == "open":
            sessions = s.offered.kind == "sessions"
            at = (s.offered.session_rate if sessions else s.rates.request_rate).value
            what = "sessions started a second" if sessions else "requests a second"
            load = "this load" if at is None else f"{at:.4g} {what}"
        within = f" (95 %: {interval(price, report.price)})" if interval(price, report.price) else ""
        parts.append(
            f"At {load}, a million tokens cost {report.price(price.value)} USD{within}, input and output together."
        )
        if s.offered.kind != "closed":
            parts.append(f"That is the cost at this load ({s.fullness.words}), not the cost when full.")
    if s.slo is not None:
        for part in s.slo.criteria:
            share = part.attainment.value
            kept = "not known" if share is None else report.percent(share)
            promise = " and ".join(f"{name.upper()} {in_seconds(limit)}" for name, limit in part.limits.items())
            parts.append(f"{kept} of requests kept {promise}; {report.percent(part.wanted)} was wanted.")
        if s.slo.met is False:
            parts.append("The promise was not kept at this load: not a price to sell at.")
        if s.slo.attainment.note:
            parts.append(f"{s.slo.attainment.note}.")
    else:
        parts.append("No SLO was given, so nothing was promised.")
    return " ".join(parts)


def _keys(s: Summary) -> list[tuple[str, Cell]]:
    """The few figures above everything else."""
    cost = s.cost
    price = cost.usd_per_1m_total
    keys = [("USD per 1M tokens", quantity(price, report.price))] if price.value is not None else []
    if s.slo is not None:
        part = max(s.slo.criteria, key=lambda part: _missed(part.attainment.value) / max(1e-9, 1 - part.wanted))
        keys.append((f"kept {part.name}", quantity(part.attainment, report.percent)))
    return [
        *keys,
        _tail("TTFT", s.metrics.ttft),
        _tail("ITL", s.metrics.itl),
        ("output tokens/s", quantity(s.rates.output_token_throughput, report.figure)),
    ]


def _missed(attainment: float | None) -> float:
    return 1.0 if attainment is None else 1 - attainment


def _tail(name: str, d: Distribution) -> tuple[str, Cell]:
    """The highest percentile that the sample supports."""
    for which, q in (("p99", d.p99), ("p95", d.p95), ("p90", d.p90)):
        if q.value is not None:
            return f"{name} {which}", quantity(q, in_seconds)
    return f"{name} p50", quantity(d.p50, in_seconds)


def _lag_says(s: Summary) -> str:
    check = next((c for c in s.checks if c.name == "lag"), None)
    if check is None or check.ok is None:
        return "In a closed loop a request is due when its slot becomes free, so lag is only the client's own delay."
    return (
        f"Every request has a planned time; lag is how much later it was sent. Observed: {check.observed}; wanted: "
        f"{check.bound}. Latency counts from the planned time, so lag is inside it and hides nothing."
    )


# --------------------------------------------------------------------------------------------------------------- tables


def _price(s: Summary) -> Table | None:
    cost = s.cost
    if cost.reason is not None:
        return None
    split = cost.split
    ratio = f"when 1 output token costs {split.ratio:g} input tokens"
    lines = [
        ("All tokens", "bill / (input + output tokens)", cost.usd_per_1m_total),
        ("Input tokens", f"share of the bill, {ratio}", split.usd_per_1m_input),
        ("Output tokens", f"share of the bill, {ratio}", split.usd_per_1m_output),
        ("Output tokens alone", "the whole bill / output tokens", cost.usd_per_1m_output_only),
        *((name.capitalize(), "what the servers counted", q) for name, q in report.counted_splits(s)),
        *((name.capitalize(), "the steady part", q) for name, q in report.steady_prices(s)),
    ]
    return Table(
        "USD per 1M tokens", ("Price of", "USD", "95 % interval", "Evidence"), right=(1, 2), rows=
        [
            [Cell(name, note=how), number(q, report.price), Cell(interval(q, report.price)), Cell("", tag=q.evidence)]
            for name, how, q in lines
        ],
    )  # fmt: skip


def _basis(s: Summary) -> list[tuple[str, object]]:
    cost, tier, window = s.cost, s.tier, s.window
    if tier is None:
        return []
    hardware = f"{tier.accelerator_count} x {tier.accelerator}" if tier.accelerator else "no accelerator"
    bill = f"{report.figure(cost.bill_usd)} USD" if cost.bill_usd is not None else None
    return [
        ("Tier", f"{tier_words(s)}: {tier.provider} {tier.instance}"),
        ("Hardware", f"{tier.vcpu} vCPU, {tier.memory_gib:g} GiB, {hardware}"),
        ("Price of one instance", f"{report.hourly(cost.usd_per_hour)} USD/h, {tier.purchase}, {tier.region}"),
        ("Source", f"{tier.source}, read {tier.date}"),
        ("Replicas", f"{cost.replicas}, each one whole instance"),
        ("Window", f"{window.duration_s:,.1f} s: {window.rule}" if window else None),
        ("Bill of the window", bill),
        *((f"Split by {split.method}", split.reason) for split in cost.splits if split.reason is not None),
        *([("Mind", cost.note)] if cost.note else []),
    ]


def _promises(s: Summary, kept: Promises, shares: Sequence[float]) -> Table | None:
    """The limit that each share of all offered requests kept: what could be promised at this load."""
    names = (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2e", "E2E"))
    if all(limit is None for by_share in kept.values() for limit in by_share.values()):
        return None

    def cell(metric: str, share: float) -> Cell:
        limit = kept[metric][share]
        if limit is not None:
            return Cell(in_seconds(limit), sort=limit)
        few = s.requests.offered < samples_needed(share)
        return Cell(f"needs {samples_needed(share):,} requests" if few else "not kept: failures", mark="quiet")

    return Table(
        "Limit that a share of all offered requests kept, each by itself",
        ("Share of requests", *(head for _, head in names)),
        [[Cell(in_percent(share), sort=share), *(cell(metric, share) for metric, _ in names)] for share in shares],
        right=(1, 2, 3),
    )


def _latency(s: Summary) -> Table:
    m = s.metrics
    named = [
        ("TTFT", "first output - planned time", m.ttft), ("Service TTFT", "first output - sent time", m.service_ttft),
        ("TPOT", "per output token after the first", m.tpot), ("ITL", "gaps between tokens, pooled", m.itl),
        ("E2E", "end - planned time", m.e2e), ("Lag", "sent - planned time", m.lag),
    ]  # fmt: skip
    if s.offered.kind == "sessions":
        named.append(("Session lag", "due - own time, behind the answer before it", m.session_lag))
    rows = [
        [
            Cell(name, note=what),
            *(quantity(q, report.milliseconds) for q in (d.mean, d.p50, d.p90, d.p95, d.p99)),
            Cell(f"{d.mean.n:,}", sort=d.mean.n),
        ]
        for name, what, d in named
    ]
    heads = ("Metric", "mean", "p50", "p90", "p95", "p99", "samples")
    return Table("Latency, ms, with 95 % intervals", heads, rows, right=range(1, 7))


def _rates(s: Summary) -> Table:
    r = s.rates
    named = [
        ("Requests planned", r.request_rate), *_sent(s), ("Requests succeeded", r.request_throughput),
        ("Input tokens", r.input_token_throughput), ("Output tokens", r.output_token_throughput),
        ("Input + output tokens", r.total_token_throughput), ("In flight, time average", r.concurrency),
    ]  # fmt: skip
    if s.slo is not None:
        named.append(("Goodput: within the SLO", r.goodput))
    rows = [
        [
            Cell(name, note=q.note if q.value is None else None), number(q, report.figure),
            Cell(interval(q, report.figure)), Cell(q.unit),
            Cell("", tag=q.evidence),
        ]
        for name, q in named
    ]  # fmt: skip
    return Table("Throughput over the window", ("Rate", "value", "95 % interval", "Unit", "Evidence"), rows, (1, 2))


def _sent(s: Summary) -> list[tuple[str, Quantity]]:
    """What sessions that wait really offered."""
    if s.offered.kind != "sessions":
        return []
    return [("Requests sent", s.offered.sent_rate), ("Sessions started", s.offered.session_rate)]


def _checks(s: Summary) -> Table:
    words = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not checked", "quiet")}
    rows = []
    for c in sorted(s.checks, key=lambda c: (c.ok is not False, not c.gate)):
        word, mark = words[c.ok]
        if c.ok is False and not c.gate:
            word, mark = "limit", "warn"
        rows.append(
            [
                Cell(c.name, note=c.advice if c.ok is False else None), Cell(word, mark=mark),
                Cell(c.observed), Cell(c.bound), Cell("gate" if c.gate else "limit"),
            ]
        )  # fmt: skip
    return Table("Failures first, then gates, then limits", ("Check", "Result", "Observed", "Wanted", "Kind"), rows)


def _fidelity(s: Summary) -> Table | None:
    """Trace against plan against run, differences first."""
    if not s.fidelity:
        return None
    words = {True: ("agrees", "good"), False: ("differs", "warn"), None: ("not comparable", "quiet")}
    rows = [
        [Cell(f.name, note=f.said or None), Cell(words[f.ok][0], mark=words[f.ok][1]), Cell(f.observed), Cell(f.bound)]
        for f in sorted(s.fidelity, key=lambda f: (f.ok is not False, f.ok is None))
    ]
    return Table("Plan against trace, run against plan", ("Comparison", "Result", "Observed", "Bound"), rows)


def _errors(s: Summary) -> Table | None:
    if not s.errors:
        return None
    rows = [
        [Cell(e.error), Cell(f"{e.count:,}", sort=e.count), Cell(e.meaning), Cell(report.clean(e.example or "-", 300))]
        for e in s.errors[:MOST_ITEMS]
    ]
    return Table("Requests that did not succeed", ("Error", "count", "Meaning", "First example"), rows, (1,))


def _inputs(s: Summary) -> list[tuple[str, list[tuple[str, object]]]]:
    """Everything that went in, so that the run can be repeated and doubted."""
    server = s.server
    replicas = [
        (
            f"replica {r.index}",
            f"{r.base_url}, " + (f"ready after {r.ready_s:.1f} s" if r.ready_s is not None else "was there already")
            + (f"; ended: {r.exit}" if r.exit else ""),
        )
        for r in server.replicas[:MOST_ITEMS]
    ]  # fmt: skip
    engine = {"model": s.model, "engine": s.engine, "version": server.version, "arguments": " ".join(server.args)}
    identity = {"run": s.run_id, "label": s.label, "created": s.created, "harness commit": s.git,
                "plan SHA-256": s.plan_sha256, "run directory": s.run, "evidence": s.evidence}  # fmt: skip
    hardware: list[tuple[str, object]] = [("tier", "none stated, so no price")]
    if s.tier is not None:
        hardware = _facts(asdict(s.tier))
    load = asdict(s.load)
    if isinstance(load.get("headers"), dict):
        load["headers"] = list(load["headers"])  # names only: a value may be a secret
    return [
        ("Load", _facts(load, without=("base_urls", "model"))),
        ("Plan", _facts(asdict(s.plan), without=("notes", "schema_version", "source", "planned"))),
        ("Server", [*_facts(engine), *_facts(server.model_facts), *replicas]),
        ("Hardware tier" + (", as stated by you" if s.tier and s.engine == "url" else ""), hardware),
        ("Load generator's host", _facts(asdict(s.host))),
        ("Versions", _facts(s.versions)),
        ("This run", _facts(identity)),
    ]


def _facts(facts: dict[str, Any], without: Sequence[str] = ()) -> list[tuple[str, object]]:
    said: list[tuple[str, object]] = []
    for name, value in list(facts.items())[:MOST_ITEMS]:
        if name in without:
            continue
        if isinstance(value, dict | list):
            value = msgspec.json.encode(value).decode() if value else "none"
        elif isinstance(value, float):
            value = f"{value:.6g}"
        said.append((_with_unit(name), "not set" if value is None or value == "" else value))
    return said


def _with_unit(name: str) -> str:
    stem, _, unit = name.rpartition("_")
    units = {"s": "s", "ns": "ns", "gib": "GiB", "rate": "rate, req/s"}
    if not stem or unit not in units:
        return name.replace("_", " ")
    return f"{stem} {units[unit]}" if unit == "rate" else f"{stem.replace('_', ' ')}, {units[unit]}"
