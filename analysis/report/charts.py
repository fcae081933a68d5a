"""Pictures: what to draw and from which numbers. How they look is the page's business (``web/page.js``).

*Interactivity* is
tokens/s of one user's stream: 1 / TPOT, at the percentile of the SLO, else the median. Throughput per accelerator is
output tokens/s over all of a system's accelerators (over its servers where a tier has none). Between two measured loads
nothing is known; lines only guide the eye. Source of these axes: InferenceMAX's curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from analysis.arrays import Floats
from analysis.capacity.serving_config import ServingConfig
from analysis.report.curves import Curves, KeptLimits, cumulative, joined, over_time
from analysis.report.document import Chart, Mark, PlotLine, Points
from analysis.report.figures import load_of
from analysis.rows.itl_histogram import EDGES, PER_DECADE
from analysis.rows.read import Run
from analysis.stats.intervals import Distribution, Quantity, scaled
from analysis.summary import DEFAULT_ATTAIN, Summary
from analysis.validity.generator import lag_bound_s
from harness.slo import split_key

COARSE = 5
"""Latency bins joined into one bar of a histogram: 20 to a decade."""
HARDLY_ANY = 0.001
"""Pictures of a distribution begin where so large a share is reached: a few odd short gaps would fill half of one."""


# ------------------------------------------------------------------------------------------------------------- one run


def run_charts(run: Run, summary: Summary, found: Curves, linked: str) -> dict[str, list[Chart]]:
    """The pictures of one run by the section that they stand in; ``linked`` names its timeline."""
    limits = summary.slo.limits if summary.slo is not None else {}
    attain = summary.slo.attain if summary.slo is not None else DEFAULT_ATTAIN
    bound_s = lag_bound_s(run, limits) if run.manifest.spec.mode == "open" else None
    return {
        "latency": _distributions(summary, found, limits),
        "time": _timeline(summary, found, slo_limits(limits, attain), linked),
        "lag": _lag(summary, found, bound_s, linked) if found.grids["lag"].sum() else [],
    }


def slo_limits(limits: Mapping[str, float], attain: float) -> dict[str, tuple[float, float]]:
    """Metric -> the share of requests and the limit that an SLO sets on it; of several the first."""
    found: dict[str, tuple[float, float]] = {}
    for key, limit in limits.items():
        name, share = split_key(key)
        found.setdefault(name, (attain if share is None else share, limit))
    return found


def _limit(limit: tuple[float, float] | None) -> list[Mark]:
    """The line of a limit beside the percentile that it is set on."""
    return [] if limit is None else [Mark("y", limit[1], f"SLO {_named(limit[0])}")]


def _distributions(summary: Summary, found: Curves, limits: dict[str, float]) -> list[Chart]:
    """How TTFT and ITL are spread: share at or below, and the shape on a logarithmic axis."""
    charts = []
    m = summary.metrics
    for name, title, said, noun, sources in (
        (
            "ttft",
            "TTFT",
            m.ttft,
            "successful requests",
            {"from planned time": "ttft", "from sent time": "service_ttft"},
        ),
        ("itl", "ITL", m.itl, "gaps between tokens", {"ITL": "itl"}),
    ):
        if not found.grids[name].sum():
            continue
        marks = [
            Mark("x", limit, "SLO" if share is None else f"SLO {_named(share)}")
            for (metric, share), limit in ((split_key(key), limit) for key, limit in limits.items())
            if metric == name
        ]
        charts += share_chart(title, noun, {k: cumulative(found.grids[v]) for k, v in sources.items()}, marks, said)
        charts.append(_histogram(title, noun, found.grids[name].sum(axis=0), marks, said))
    return charts


def share_chart(
    title: str, noun: str, shares: dict[str, Floats], marks: Sequence[Mark] = (), said: Distribution | None = None,
    colors: Sequence[str | int] = ("accent", "muted"),
) -> list[Chart]:  # fmt: skip
    """Cumulative distributions over one logarithmic axis; none without any sample."""
    color = dict(zip(shares, colors, strict=False))
    known = {name: share for name, share in shares.items() if np.isfinite(share).all()}
    if not known:
        return []
    stacked = np.array(list(known.values()))
    first = max(0, int(np.flatnonzero((stacked >= HARDLY_ANY).any(axis=0))[0]) - 1)
    last = int(np.flatnonzero((stacked >= 1).all(axis=0))[0])
    # where nothing changes there is nothing to draw: only the ends of a flat stretch stay
    moves = np.any(np.diff(stacked[:, first : last + 1], axis=1) != 0, axis=0)
    keep = np.flatnonzero(np.concatenate(([True], moves)) | np.concatenate((moves, [True]))) + first
    return [Chart(
        title=f"{title}: share of {noun} within",
        x=_numbers(EDGES[keep]), x_unit="s", x_label=title, y_unit="%", log_x=True, share=True, marks=marks,
        lines=[PlotLine(name=name, y=_points(share[keep]), color=color[name]) for name, share in known.items()],
        says=f"{title}: share of {noun} at or below each value" + ("" if said is None else f"; {_spoken(said)}"),
    )]  # fmt: skip


def _histogram(title: str, noun: str, counts: Floats, marks: list[Mark], said: Distribution) -> Chart:
    coarse = np.concatenate((counts[:1], counts[1:].reshape(-1, COARSE).sum(axis=1)))
    begun = int(np.argmax(np.cumsum(coarse) >= HARDLY_ANY * coarse.sum()))
    shown = slice(max(0, begun - 1), min(len(coarse), int(np.flatnonzero(coarse)[-1]) + 2))
    return Chart(
        title=f"{title}: how the {noun} are spread",
        x=_numbers(EDGES[::COARSE][shown] * 10 ** (-COARSE / PER_DECADE / 2)),
        x_unit="s", x_label=title, y_unit="%", log_x=True, marks=marks,
        lines=[PlotLine(name=f"share of {noun}", y=_points(coarse[shown] / coarse.sum()), shape="bars")],
        says=f"{title}: histogram on a logarithmic axis; {_spoken(said)}",
    )  # fmt: skip


def _spoken(said: Distribution) -> str:
    known = [(name, q.value) for name, q in (("median", said.p50), ("p95", said.p95), ("p99", said.p99))]
    parts = [f"{name} {value * 1000:.3g} ms" for name, value in known if value is not None]
    return ", ".join(parts) or "too few samples for percentiles"


def _two_lines(grid: Floats, requests: int, tail: str, share: float = 0.99) -> list[PlotLine]:
    middle, worst = over_time(grid, requests, share)
    return [
        PlotLine(name="median", y=_points(middle), shape="step"),
        PlotLine(name=tail, y=_points(worst), color="second", shape="step"),
    ]


def _timeline(
    summary: Summary, found: Curves, limits_of: Mapping[str, tuple[float, float]], linked: str
) -> list[Chart]:
    """Load, in flight, latency and tokens on one time axis; server queue and KV cache where the server told."""

    def chart(title: str, unit: str, lines: list[PlotLine], says: str, **more: object) -> Chart:
        return Chart(
            title=title, x=_numbers(found.time_s), x_unit="s", x_label="since the start", y_unit=unit, lines=lines,
            says=f"{title} over the run: {says}", linked=linked, x_time=True, small=True, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def latency(name: str, distribution: Distribution) -> Chart:
        share = limits_of[name][0] if name in limits_of else 0.99
        # an SLO's limit holds for a share of requests: that percentile is drawn beside it, and no other
        tail = "largest" if share >= 1 else f"{_named(share)} (largest of fewer than {1 / (1 - share):.0f})"
        lines = _two_lines(found.grids[name], summary.requests.succeeded, tail, share)
        marks = _limit(limits_of.get(name))
        return chart(name.upper(), "s", lines, _spoken(distribution), log_y=True, marks=marks)

    def line(name: str, values: Floats, color: str = "accent") -> PlotLine:
        return PlotLine(name=name, y=_points(joined(values, found, summary.requests.sent)), color=color, shape="step")

    load = [line("planned", found.planned, "muted")] if summary.load.mode == "open" else []
    load.append(line("sent", found.sent))
    if found.failed.any():
        load.append(line("failed", found.failed, "bad"))
    flight = [PlotLine(name="client: in flight", y=_points(found.in_flight))]
    flight += [
        PlotLine(name=f"server: {name}", y=_points(found.server[name]), color=color)
        for name, color in (("running", "second"), ("waiting", "bad"))
        if name in found.server
    ]
    charts = [
        chart("Load", "req/s", load, f"mean {found.sent.mean():.4g} requests sent a second"),
        chart("In flight", "requests", flight, f"mean {found.in_flight.mean():.4g} requests"),
        latency("ttft", summary.metrics.ttft),
        latency("itl", summary.metrics.itl),
    ]
    for name, values in (("Output", found.output_tokens), ("Input", found.input_tokens)):
        tokens = [line(f"{name.lower()} tokens", values)]
        charts.append(chart(f"{name} tokens", "tokens/s", tokens, f"mean {values.mean():.4g} a second"))
    if "kv_cache_usage" in found.server:
        usage = found.server["kv_cache_usage"]
        used = [PlotLine(name="in use, fullest replica", y=_points(usage))]
        charts.append(chart("KV cache", "%", used, f"highest {np.nanmax(usage):.0%}", share=True))
    return charts


def _lag(summary: Summary, found: Curves, bound_s: float | None, linked: str) -> list[Chart]:
    """The proof that the load went out as planned: lag over time and its distribution, with the bound."""
    lines = _two_lines(found.grids["lag"], summary.requests.sent, "p99 (largest of fewer than 100)")
    if found.loop_lag_s is not None:
        late = _points(found.loop_lag_s)
        lines.append(PlotLine(name="generator's clock, latest", y=late, color="muted", shape="dots"))
    across, down = ([] if bound_s is None else [Mark(axis, bound_s, "bound")] for axis in "yx")
    said = summary.metrics.lag
    over = Chart(
        title="Lag over the run", x=_numbers(found.time_s), x_unit="s", x_label="since the start", y_unit="s",
        lines=lines, marks=across, log_y=True, x_time=True, linked=linked, says=f"Lag over the run: {_spoken(said)}",
    )  # fmt: skip
    return [over, *share_chart("Lag", "requests sent", {"lag": cumulative(found.grids["lag"])}, down, said)]


# -------------------------------------------------------------------------------------------------------- several runs

Groups = Mapping[str, Sequence[Summary]]
"""VALID runs by what they measured: one line each."""


def interactivity(summary: Summary, percentile: str = "p50") -> float | None:
    """Tokens/s of one stream: 1 / TPOT at ``percentile``; None where that is not known."""
    tpot_s = getattr(summary.metrics.tpot, percentile).value
    return 1 / tpot_s if tpot_s else None


def per_accelerator(summary: Summary) -> Quantity:
    """Output tokens/s over the accelerators of all replicas (over the replicas where the tier has none)."""
    accelerators = summary.tier.accelerator_count if summary.tier else 0
    return scaled(summary.rates.output_token_throughput, 1 / (summary.cost.replicas * (accelerators or 1)))


def load_charts(groups: Groups, by_rate: bool) -> list[Chart]:
    """Latency against load: one point a run with its interval, one line a group."""
    charts = []
    everyone = [s for members in groups.values() for s in members]
    limits_of = [slo_limits(s.slo.limits, s.slo.attain) if s.slo is not None else {} for s in everyone]
    limits = limits_of[0] if limits_of and all(one == limits_of[0] for one in limits_of) else {}
    for metric in ("ttft", "tpot"):
        limit = limits.get(metric)
        tail = _tail(everyone, metric, limit)
        for percentile in ("p50", tail):
            charts += _by_run(
                f"{metric.upper()}, {'median' if percentile == 'p50' else percentile}",
                groups, partial(load_of, by_rate=by_rate), partial(_figure, metric=metric, percentile=percentile), "s",
                "req/s" if by_rate else "requests in flight", "load",
                _limit(limit) if limit is not None and percentile == _named(limit[0]) else [],
            )  # fmt: skip
    return charts


def tradeoff_charts(groups: Groups, found: Sequence[ServingConfig], by_rate: bool) -> list[Chart]:
    """Of VALID runs by group: throughput per accelerator and USD per 1M against interactivity, and USD against load.

    Charts without a point are left out. The limit that the SLO sets on TPOT is marked, and each capacity.
    """
    everyone = [s for members in groups.values() for s in members]
    unit = "accelerator" if all(s.tier is not None and s.tier.accelerator_count for s in everyone) else "server"
    percentile, limit_s = _shared_limit(everyone)
    slo = [] if limit_s is None else [Mark("x", 1 / limit_s, "SLO")]
    capacities = [
        Mark("x", one.capacity.load.value, "capacity")
        for one in found
        if one.loop == ("open" if by_rate else "closed") and one.capacity and one.capacity.load.value is not None
    ]
    user, sees = partial(interactivity, percentile=percentile), ("tokens/s per user", "interactivity", slo)
    load, at = partial(load_of, by_rate=by_rate), ("req/s" if by_rate else "requests in flight", "load", capacities)
    return [
        *_by_run(f"Output tokens/s per {unit}", groups, user, per_accelerator, "tokens/s", *sees),
        *_by_run("USD per 1M tokens against what a user sees", groups, user, _usd_per_1m, "USD", *sees),
        *_by_run("USD per 1M tokens against load", groups, load, _usd_per_1m, "USD", *at),
    ]


def _figure(summary: Summary, metric: str, percentile: str) -> Quantity:
    found: Quantity = getattr(getattr(summary.metrics, metric), percentile)
    return found


def _usd_per_1m(summary: Summary) -> Quantity:
    return summary.cost.usd_per_1m_total


def _shared_limit(summaries: Sequence[Summary]) -> tuple[str, float | None]:
    """The percentile of TPOT that all SLOs limit, and that limit, s: a mark says nothing of points at another one.

    The median and None where there is no such limit, they differ, or no run has that percentile.
    """
    found = {slo_limits(s.slo.limits, s.slo.attain).get("tpot") if s.slo else None for s in summaries}
    limit = found.pop() if len(found) == 1 else None
    if limit is not None:
        name = _named(limit[0])
        if any((q := getattr(s.metrics.tpot, name, None)) and q.value for s in summaries):
            return name, limit[1]
    return "p50", None


def _named(share: float) -> str:
    return f"p{share * 100:g}"


def _tail(summaries: Sequence[Summary], metric: str, limit: tuple[float, float] | None) -> str:
    """The percentile that the SLO sets a limit on, where some run has it; else the highest that all runs support."""
    known = {name: [_figure(s, metric, name).value is not None for s in summaries] for name in ("p99", "p95", "p90")}
    if limit is not None and any(known.get(_named(limit[0]), ())):
        return _named(limit[0])
    return next((name for name, there in known.items() if all(there)), "p99")


def cost_charts(groups: Mapping[str, Sequence[tuple[Summary, KeptLimits]]], share: float) -> list[Chart]:
    """Cost against SLO: for each limit, the cheapest VALID run that kept it for this share of offered requests."""
    charts = []
    for metric, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
        lines: dict[str, list[tuple[float, Quantity]]] = {}
        for group, members in groups.items():
            points = [(kept[metric].get(share), summary.cost.usd_per_1m_total) for summary, kept in members]
            priced = [(limit, q) for limit, q in points if limit is not None and q.value is not None]
            best: list[tuple[float, Quantity]] = []  # what no other beats in both limit and price
            for limit, q in sorted(priced, key=lambda p: (p[0], p[1].value or 0.0)):
                if not best or (q.value or 0.0) < (best[-1][1].value or 0.0):
                    best.append((limit, q))
            lines[group] = best
        name = f"Cost against the {title} limit that {share * 100:.4g}% of requests kept"
        charts += [replace(c, log_x=True) for c in _against(name, lines, "USD", "s", f"{title} limit", shape="stairs")]
    return charts


def _by_run(
    title: str, groups: Groups, x: Callable[[Summary], float | None], y: Callable[[Summary], Quantity], unit: str,
    x_unit: str, x_label: str, marks: Sequence[Mark],
) -> list[Chart]:  # fmt: skip
    points = {name: [(at, y(s)) for s in members if (at := x(s)) is not None] for name, members in groups.items()}
    return _against(title, points, unit, x_unit, x_label, marks=marks)


def _against(
    title: str, groups: Mapping[str, Sequence[tuple[float, Quantity]]], unit: str, x_unit: str, x_label: str,
    shape: str = "points", marks: Sequence[Mark] = (),
) -> list[Chart]:  # fmt: skip
    """Quantities over an axis that all groups share, repeats of one load side by side; none without a single value."""
    numbered: dict[str, dict[tuple[float, int], Quantity]] = {name: {} for name in groups}
    for name, points in groups.items():
        found = numbered[name]
        for x, q in points:
            if q.value is not None:  # each by its x and by how many of this x came before it: none hides another
                found[x, sum(1 for other, _ in found if other == x)] = q
    columns = sorted({place for by_x in numbered.values() for place in by_x})
    if not columns:
        return []

    def ends(by_x: dict[tuple[float, int], Quantity], end: str) -> Points:
        return [_point(getattr(by_x[x], end)) if x in by_x else None for x in columns]

    lines = [
        PlotLine(name=name, color=k, shape=shape, y=ends(q, "value"), low=ends(q, "low"), high=ends(q, "high"))
        for k, (name, q) in enumerate(numbered.items())
        if q
    ]
    at = [x for x, _ in columns]
    return [Chart(
        title=title, x=at, x_unit=x_unit, x_label=x_label, y_unit=unit, lines=lines, marks=marks,
        says=f"{title} against {x_label}, {len(set(at))} loads, {len(lines)} lines",
    )]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- numbers


def _point(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _points(values: Floats) -> Points:
    """Four digits are more than a picture shows."""
    return [_point(float(value)) for value in values]


def _numbers(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
