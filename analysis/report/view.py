"""One run as its page: what `analysis.report.run` says in sections, with pictures, checks and all inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import msgspec

from harness.analysis.arrays import Floats
from harness.analysis.report import run as report
from harness.analysis.report.charts import run_charts
from harness.analysis.report.curves import cumulative, curves
from harness.analysis.report.document import MOST_ITEMS, Cell, Chart, Facts, Row, Section, Table
from harness.analysis.report.figures import VERDICTS, figure, in_seconds, percent, price, quantity, state_of, within
from harness.analysis.rows.read import Run
from harness.analysis.stats.intervals import Distribution
from harness.analysis.summary import Summary

_FEW_SAMPLES = (
    "Of successful requests. “n<299” means that so many samples are needed before this percentile is more than the "
    "luck of one request; “n≈60<299”: neighbours are so alike that they are worth about 60."
)
_ONE_AXIS = (
    "One time axis: point at any picture to read all of them at that moment, drag to zoom, double-click to zoom out."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run, in the words, tables and pictures of its page."""

    label: str
    summary: Summary
    state: str
    verdict: str
    sentence: str
    opening: list[str]
    limits: list[str]
    """Names of the limits that narrow the figures; what each says stands under Limits."""
    keys: list[tuple[str, Cell]]
    below: Mapping[str, Floats]
    """Metric -> share at or below each of `EDGES`, for pictures of several runs."""
    sections: list[Section]


def view_run(run: Run, summary: Summary, label: str = "") -> RunView:
    """Reduce one run to what its page shows; the run itself can be forgotten afterwards."""
    found = curves(run)
    state = state_of(summary)
    return RunView(
        label=label, summary=summary, state=state, verdict=VERDICTS[state], sentence=_sentence(summary),
        opening=report.done(summary), limits=[c.name for c in summary.checks if not c.gate and c.ok is False],
        keys=[] if state == "invalid" else _keys(summary),
        below={name: cumulative(found.grids[name]) for name in ("ttft", "itl")} if found else {},
        sections=_sections(summary, run_charts(run, summary, found, linked=f"time {label}") if found else {}),
    )  # fmt: skip


def _sections(s: Summary, charts: Mapping[str, Sequence[Chart]]) -> list[Section]:
    """Price, latency, load, then the proof; of an INVALID run the proof first, and its figures folded."""
    invalid = s.verdict == "INVALID"
    said = {section.id: section for section in report.run_sections(s)}
    said["latency"] = replace(said["latency"], charts=charts.get("latency", ()), remark=_FEW_SAMPLES)
    said["time"] = replace(said["time"], title="Over time", charts=charts.get("time", ()), remark=_ONE_AXIS)
    said["lag"] = Section(
        id="lag", title="Was the load sent as planned?", lines=[_lag_says(s)], charts=charts.get("lag", ()),
        proves_nothing=invalid,
    )  # fmt: skip
    said["checks"] = Section(
        id="checks", title="Checks", table=_checks(s),
        lines=["A failed gate makes the run INVALID. A failed limit narrows what may be concluded from it."],
    )  # fmt: skip
    if s.fidelity:
        said["fidelity"] = Section(id="fidelity", title="Fidelity", table=_fidelity(s))
    said["inputs"] = Section(id="inputs", title="Inputs", facts=_inputs(s))
    figures, proof = ("cost", "latency", "time", "lag"), ("errors", "checks", "fidelity")
    ordered = (*proof, *figures) if invalid else (*figures, *proof)
    return [said[place] for place in (*ordered, "limits", "assumptions", "inputs") if place in said]


def _sentence(s: Summary) -> str:
    """The verdict as a sentence that someone who reads nothing else may act on."""
    if s.verdict == "TOO SMALL":
        n = s.requests.offered
        return f"{n} {'request is' if n == 1 else 'requests are'} too few for a verdict, and carry no price."
    if s.verdict != "VALID":
        n = len(s.reasons)
        return (
            f"This run proves nothing: {n} {'check' if n == 1 else 'checks'} failed. "
            "Its figures help to find out why; they carry no price."
        )
    parts = _priced(s)
    if s.slo is None:
        return " ".join([*parts, "No SLO was given."])
    for part in s.slo.criteria:
        share = part.attainment.value
        kept = "not known" if share is None else percent(share)
        limits = " and ".join(f"{name.upper()} {in_seconds(limit)}" for name, limit in part.limits.items())
        parts.append(f"{kept} of requests kept {limits}; {percent(part.wanted)} was wanted.")
    if s.slo.met is False:
        parts.append("The SLO was missed at this load: not a price to sell at.")
    if s.slo.attainment.note:
        parts.append(f"{s.slo.attainment.note}.")
    return " ".join(parts)


def _priced(s: Summary) -> list[str]:
    cost = s.cost.usd_per_1m_total
    if cost.value is None:
        return [f"No price: {s.cost.reason or s.cost.note or 'not known'}."]
    load = f"{s.load.concurrency} requests in flight"
    if s.load.mode == "open":
        sessions = s.offered.kind == "sessions"
        at = (s.offered.session_rate if sessions else s.rates.request_rate).value
        load = "this load" if at is None else f"{at:.4g} {'sessions started' if sessions else 'requests'} a second"
    said = [
        f"At {load}, a million tokens cost {price(cost.value)} USD{within(cost, price)}, input and output together."
    ]
    if s.offered.kind != "closed":
        said.append(f"That is the cost at this load ({s.fullness.words}), not the cost when full.")
    return said


def _keys(s: Summary) -> list[tuple[str, Cell]]:
    """The few figures above everything else; of the SLO the limit that is nearest to breaking."""
    cost = s.cost.usd_per_1m_total
    keys = [("USD per 1M tokens", quantity(cost, price))] if cost.value is not None else []
    if s.slo is not None:
        part = max(s.slo.criteria, key=lambda one: (1 - (one.attainment.value or 0.0)) / max(1e-9, 1 - one.wanted))
        keys.append((f"kept {part.name}", quantity(part.attainment, percent)))
    tails = [_tail("TTFT", s.metrics.ttft), _tail("ITL", s.metrics.itl)]
    return [*keys, *tails, ("output tokens/s", quantity(s.rates.output_token_throughput, figure))]


def _tail(name: str, d: Distribution) -> tuple[str, Cell]:
    """The highest percentile that the sample supports."""
    which = next((p for p in ("p99", "p95", "p90") if getattr(d, p).value is not None), "p50")
    return f"{name} {which}", quantity(getattr(d, which), in_seconds)


def _lag_says(s: Summary) -> str:
    check = next((c for c in s.checks if c.name == "lag"), None)
    if check is None or check.ok is None:
        return "In a closed loop a request is due when its slot becomes free, so lag is only the client's own delay."
    return (
        f"Every request has a planned time; lag is how much later it was sent. Observed: {check.observed}; wanted: "
        f"{check.bound}. Latency counts from the planned time, so lag is inside it and hides nothing."
    )


def _checks(s: Summary) -> Table:
    words = {True: ("passed", "good"), False: ("failed", "bad"), None: ("not checked", "quiet")}
    rows: list[Row] = []
    for c in sorted(s.checks, key=lambda c: (c.ok is not False, not c.gate)):
        word, mark = ("limit", "warn") if c.ok is False and not c.gate else words[c.ok]
        named = Cell(c.name, note=c.advice if c.ok is False else None)
        rows.append([named, Cell(word, mark=mark), c.observed, c.bound, "gate" if c.gate else "limit"])
    heads = ("Check", "Result", "Observed", "Wanted", "Kind")
    return Table(heads, rows, (), "Failures first, then gates, then limits")


def _fidelity(s: Summary) -> Table:
    """Trace against plan against run, differences first."""
    words = {True: ("agrees", "good"), False: ("differs", "warn"), None: ("not comparable", "quiet")}
    rows: list[Row] = [
        [Cell(f.name, note=f.said or None), Cell(words[f.ok][0], mark=words[f.ok][1]), f.observed, f.bound]
        for f in sorted(s.fidelity, key=lambda f: (f.ok is not False, f.ok is None))
    ]
    return Table(("Comparison", "Result", "Observed", "Bound"), rows, (), "Plan against trace, run against plan")


def _inputs(s: Summary) -> list[tuple[str, Facts]]:
    """Everything that went in, so that the run can be repeated and doubted."""
    server = s.server
    replicas = {
        f"replica {r.index}": f"{r.base_url}, "
        + (f"ready after {r.ready_s:.1f} s" if r.ready_s is not None else "was there already")
        + (f"; ended: {r.exit}" if r.exit else "")
        for r in server.replicas[:MOST_ITEMS]
    }
    engine = {"model": s.model, "engine": s.engine, "version": server.version, "arguments": " ".join(server.args)}
    identity = {"run": s.run_id, "label": s.label, "created": s.created, "harness commit": s.git,
                "plan SHA-256": s.plan_sha256, "run directory": s.run, "evidence": s.evidence}  # fmt: skip
    load = asdict(s.load)
    if isinstance(load.get("headers"), dict):
        load["headers"] = list(load["headers"])  # names only: a value may be a secret
    return [
        ("Load", _facts(load, without=("base_urls", "model"))),
        ("Plan", _facts(asdict(s.plan), without=("notes", "schema_version", "source", "planned"))),
        ("Server", [*_facts(engine), *_facts(server.model_facts), *_facts(replicas)]),
        (
            "Hardware tier" + (", as stated by you" if s.tier and s.engine == "url" else ""),
            _facts(asdict(s.tier) if s.tier is not None else {"tier": "none stated, so no price"}),
        ),
        ("Load generator's host", _facts(asdict(s.host))),
        ("Versions", _facts(s.versions)),
        ("This run", _facts(identity)),
    ]


_UNITS = {"s": "s", "ns": "ns", "gib": "GiB", "rate": "rate, req/s"}


def _facts(facts: Mapping[str, object], without: Sequence[str] = ()) -> list[tuple[str, object]]:
    """Names with the unit that they end in, and values in words."""
    said: list[tuple[str, object]] = []
    for name, value in list(facts.items())[:MOST_ITEMS]:
        if name in without:
            continue
        if isinstance(value, dict | list):
            value = msgspec.json.encode(value).decode() if value else "none"
        elif isinstance(value, float):
            value = f"{value:.6g}"
        stem, _, unit = name.rpartition("_")
        if stem and unit in _UNITS:
            name = f"{stem}{' ' if unit == 'rate' else ', '}{_UNITS[unit]}"
        said.append((name.replace("_", " "), "not set" if value is None or value == "" else value))
    return said
