"""Pictures: what to draw and from which numbers. How they look is the page's business (``web/page.js``).

A `Chart` is x values and lines over them, a few hundred points at most. None is a gap, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.arrays import Floats
from analysis.report.curves import Curves, KeptLimits, cumulative, joined, over_time
from analysis.rows.itl_histogram import EDGES, PER_DECADE
from analysis.rows.read import Run
from analysis.stats.intervals import Distribution, Quantity
from analysis.summary import DEFAULT_ATTAIN, Summary
from analysis.validity.generator import lag_bound_s
from harness.slo import split_key

Points = list[float | None]
COARSE = 5
"""Latency bins joined into one bar of a histogram: 20 to a decade."""
HARDLY_ANY = 0.001
"""Pictures of a distribution begin where so large a share is reached: a few odd short gaps would fill half of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLine:
    """One line. ``color`` is a role (accent, second, muted, bad) or the number of a run."""

    name: str
    y: Points
    color: str | int = "accent"
    low: Points | None = None
    """Lower ends of 95 % intervals, drawn as bars with ``high``."""
    high: Points | None = None
    shape: str = "line"
    """line, step, bars, points (with lines between), stairs (points with steps between), or dots (points alone)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A straight line across the chart at one value of an axis ("x" or "y")."""

    axis: str
    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture. Units: "s" (shown as the reader likes: µs, ms, s), "%" of a share 0 to 1, "USD", or as written."""

    title: str
    x: list[float]
    x_unit: str
    x_label: str
    y_unit: str
    lines: list[PlotLine]
    says: str
    """The picture in words, for those who do not see it."""
    marks: list[Mark] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    x_time: bool = False
    """x is time since the start of the run."""
    share: bool = False
    """y is a share: the axis goes from 0 to 1."""
    linked: str | None = None
    """Charts of one name share their cursor and zoom."""
    small: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCharts:
    """All pictures of one run, and the shares at or below each of `EDGES` for pictures of several."""

    distributions: list[Chart]
    timeline: list[Chart]
    lag: list[Chart]
    below: dict[str, Floats]


def run_charts(run: Run, summary: Summary, found: Curves, linked: str) -> RunCharts:
    """The pictures of one run; ``linked`` names its timeline."""
    limits = summary.slo.limits if summary.slo is not None else {}
    attain = summary.slo.attain if summary.slo is not None else DEFAULT_ATTAIN
    bound_s = lag_bound_s(run, limits) if run.manifest.spec.mode == "open" else None
    return RunCharts(
        distributions=_distributions(summary, found, limits),
        timeline=_timeline(summary, found, slo_limits(limits, attain), linked),
        lag=_lag(summary, found, bound_s, linked),
        below={name: cumulative(found.grids[name]) for name in ("ttft", "itl", "tpot", "e2e")},
    )


def _marks(limits: Mapping[str, float], metric: str, axis: str) -> list[Mark]:
    """A line for each limit of the SLO on a metric, that of a percentile with its name."""
    marks = []
    for key, limit in limits.items():
        name, share = split_key(key)
        if name == metric:
            marks.append(Mark(axis=axis, at=limit, label="SLO" if share is None else f"SLO p{share * 100:g}"))
    return marks


def slo_limits(limits: Mapping[str, float], attain: float) -> dict[str, tuple[float, float]]:
    """Metric -> the share of requests and the limit that an SLO sets on it; of several the first."""
    found: dict[str, tuple[float, float]] = {}
    for key, limit in limits.items():
        name, share = split_key(key)
        found.setdefault(name, (attain if share is None else share, limit))
    return found


def _limit(limit: tuple[float, float] | None) -> list[Mark]:
    """The line of a limit beside the percentile that it is set on."""
    return [] if limit is None else [Mark(axis="y", at=limit[1], label=f"SLO p{limit[0] * 100:g}")]


# ------------------------------------------------------------------------------------------------------- distributions


def _distributions(summary: Summary, found: Curves, limits: dict[str, float]) -> list[Chart]:
    """How TTFT and ITL are spread: share at or below, and the shape on a logarithmic axis."""
    charts = []
    m = summary.metrics
    for name, title, said, noun in (
        ("ttft", "TTFT", m.ttft, "successful requests"), ("itl", "ITL", m.itl, "gaps between tokens"),
    ):  # fmt: skip
        if not found.grids[name].sum():
            continue
        marks = _marks(limits, name, "x")
        sources = {"from planned time": "ttft", "from sent time": "service_ttft"} if name == "ttft" else {title: name}
        share = share_chart(title, noun, {k: cumulative(found.grids[v]) for k, v in sources.items()}, marks, said)
        if share is not None:
            charts.append(share)
        charts.append(_histogram(title, noun, found.grids[name].sum(axis=0), marks, said))
    return charts


def share_chart(
    title: str, noun: str, shares: dict[str, Floats], marks: list[Mark], said: Distribution | None = None,
    colors: Sequence[str | int] = ("accent", "muted"),
) -> Chart | None:  # fmt: skip
    """Cumulative distributions over one logarithmic axis; None without any sample."""
    known = {name: share for name, share in shares.items() if np.isfinite(share).all()}
    if not known:
        return None
    stacked = np.array(list(known.values()))
    begun = np.flatnonzero((stacked >= HARDLY_ANY).any(axis=0))
    done = np.flatnonzero((stacked >= 1).all(axis=0))
    first, last = max(0, int(begun[0]) - 1), int(done[0])
    # where nothing changes there is nothing to draw: only the ends of a flat stretch stay
    moves = np.any(np.diff(stacked[:, first : last + 1], axis=1) != 0, axis=0)
    keep = np.flatnonzero(np.concatenate(([True], moves)) | np.concatenate((moves, [True]))) + first
    color = dict(zip(shares, colors, strict=False))
    return Chart(
        title=f"{title}: share of {noun} within",
        x=_numbers(EDGES[keep]), x_unit="s", x_label=title, y_unit="%", log_x=True, share=True, marks=marks,
        lines=[
            PlotLine(name=name, y=_points(share[keep]), color=color[name]) for name, share in known.items()
        ],
        says=f"{title}: share of {noun} at or below each value" + ("" if said is None else f"; {_spoken(said)}"),
    )  # fmt: skip


def _histogram(title: str, noun: str, counts: Floats, marks: list[Mark], said: Distribution) -> Chart:
    coarse = np.concatenate((counts[:1], counts[1:].reshape(-1, COARSE).sum(axis=1)))
    upper = EDGES[::COARSE]
    begun = int(np.argmax(np.cumsum(coarse) >= HARDLY_ANY * coarse.sum()))
    first, last = max(0, begun - 1), min(len(coarse) - 1, int(np.flatnonzero(coarse)[-1]) + 1)
    share = coarse[first : last + 1] / coarse.sum()
    return Chart(
        title=f"{title}: how the {noun} are spread",
        x=_numbers(upper[first : last + 1] * 10 ** (-COARSE / PER_DECADE / 2)),
        x_unit="s", x_label=title, y_unit="%", log_x=True, marks=marks,
        lines=[PlotLine(name=f"share of {noun}", y=_points(share), shape="bars")],
        says=f"{title}: histogram on a logarithmic axis; {_spoken(said)}",
    )  # fmt: skip


def _spoken(said: Distribution) -> str:
    parts = [
        f"{name} {q.value * 1000:.3g} ms"
        for name, q in (("median", said.p50), ("p95", said.p95), ("p99", said.p99))
        if q.value is not None
    ]
    return ", ".join(parts) or "too few samples for percentiles"


# ------------------------------------------------------------------------------------------------------------ timeline


def _timeline(
    summary: Summary, found: Curves, limits_of: Mapping[str, tuple[float, float]], linked: str
) -> list[Chart]:
    """Load, in flight, latency and tokens on one time axis; server queue and KV cache where the server told."""
    said = summary.metrics

    def chart(title: str, unit: str, lines: list[PlotLine], says: str, **more: object) -> Chart:
        return Chart(
            title=title, x=_numbers(found.time_s), x_unit="s", x_label="since the start", y_unit=unit, lines=lines,
            says=f"{title} over the run: {says}", linked=linked, x_time=True, small=True, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def latency(title: str, name: str, distribution: Distribution) -> Chart:
        share = limits_of[name][0] if name in limits_of else 0.99
        middle, worst = over_time(found.grids[name], summary.requests.succeeded, share)
        # an SLO's limit holds for a share of requests: that percentile is drawn beside it, and no other
        tail = "largest" if share >= 1 else f"p{share * 100:g} (largest of fewer than {1 / (1 - share):.0f})"
        lines = [
            PlotLine(name="median", y=_points(middle), shape="step"),
            PlotLine(name=tail, y=_points(worst), color="second", shape="step"),
        ]
        return chart(title, "s", lines, _spoken(distribution), log_y=True, marks=_limit(limits_of.get(name)))

    def per_second(values: Floats) -> Points:
        return _points(joined(values, found, summary.requests.sent))

    load = [PlotLine(name="sent", y=per_second(found.sent), shape="step")]
    if summary.load.mode == "open":
        load.insert(0, PlotLine(name="planned", y=per_second(found.planned), color="muted", shape="step"))
    if found.failed.any():
        load.append(PlotLine(name="failed", y=per_second(found.failed), color="bad", shape="step"))
    flight = [PlotLine(name="client: in flight", y=_points(found.in_flight))]
    flight += [
        PlotLine(name=f"server: {name}", y=_points(found.server[name]), color=color)
        for name, color in (("running", "second"), ("waiting", "bad"))
        if name in found.server
    ]
    charts = [
        chart("Load", "req/s", load, f"mean {found.sent.mean():.4g} requests sent a second"),
        chart("In flight", "requests", flight, f"mean {found.in_flight.mean():.4g} requests"),
        latency("TTFT", "ttft", said.ttft),
        latency("ITL", "itl", said.itl),
    ]
    for name, values in (("Output", found.output_tokens), ("Input", found.input_tokens)):
        line = PlotLine(name=f"{name.lower()} tokens", y=per_second(values), shape="step")
        charts.append(chart(f"{name} tokens", "tokens/s", [line], f"mean {values.mean():.4g} a second"))
    if "kv_cache_usage" in found.server:
        usage = found.server["kv_cache_usage"]
        line = PlotLine(name="in use, fullest replica", y=_points(usage))
        charts.append(chart("KV cache", "%", [line], f"highest {np.nanmax(usage):.0%}", share=True))
    return charts


def _lag(summary: Summary, found: Curves, bound_s: float | None, linked: str) -> list[Chart]:
    """The proof that the load went out as planned: lag over time and its distribution, with the bound."""
    if not found.grids["lag"].sum():
        return []
    middle, worst = over_time(found.grids["lag"], summary.requests.sent)
    lines = [
        PlotLine(name="median", y=_points(middle), shape="step"),
        PlotLine(name="p99 (largest of fewer than 100)", y=_points(worst), color="second", shape="step"),
    ]
    if found.loop_lag_s is not None:
        lines.append(
            PlotLine(name="generator's clock, latest", y=_points(found.loop_lag_s), color="muted", shape="dots")
        )
    across = [] if bound_s is None else [Mark(axis="y", at=bound_s, label="bound")]
    down = [] if bound_s is None else [Mark(axis="x", at=bound_s, label="bound")]
    said = summary.metrics.lag
    charts = [
        Chart(
            title="Lag over the run", x=_numbers(found.time_s), x_unit="s", x_label="since the start", y_unit="s",
            lines=lines, marks=across, log_y=True, x_time=True, linked=linked,
            says=f"Lag over the run: {_spoken(said)}",
        ),
        share_chart("Lag", "requests sent", {"lag": cumulative(found.grids["lag"])}, down, said),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


# ---------------------------------------------------------------------------------------------------------- comparison


def load_charts(groups: dict[str, list[Summary]], by_rate: bool) -> list[Chart]:
    """Latency against load: one point a run with its interval, one line a group."""
    charts = []
    everyone = [s for members in groups.values() for s in members]
    limits_of = [slo_limits(s.slo.limits, s.slo.attain) if s.slo is not None else {} for s in everyone]
    limits = limits_of[0] if limits_of and all(one == limits_of[0] for one in limits_of) else {}
    tails = {metric: _tail(everyone, metric, limits.get(metric)) for metric in ("ttft", "tpot")}
    for metric, percentile in (("ttft", "p50"), ("ttft", tails["ttft"]), ("tpot", "p50"), ("tpot", tails["tpot"])):
        title = f"{metric.upper()}, {'median' if percentile == 'p50' else percentile}"
        lines = {
            name: [
                (load, getattr(getattr(s.metrics, metric), percentile))
                for s in members
                if (load := load_of(s, by_rate)) is not None
            ]
            for name, members in groups.items()
        }
        limit = limits.get(metric)
        marks = _limit(limit) if limit is not None and percentile == _named(limit[0]) else []
        x_unit = "requests in flight" if not by_rate else "req/s"
        chart = against(title, lines, "s", x_unit, "load", marks=marks)
        if chart is not None:
            charts.append(chart)
    return charts


def _named(share: float) -> str:
    return f"p{share * 100:g}"


def _tail(summaries: Sequence[Summary], metric: str, limit: tuple[float, float] | None) -> str:
    """The percentile that the SLO sets a limit on, where some run has it; else the highest that all runs support."""
    known = {
        name: [getattr(getattr(s.metrics, metric), name).value is not None for s in summaries]
        for name in ("p99", "p95", "p90")
    }
    if limit is not None and any(known.get(_named(limit[0]), ())):
        return _named(limit[0])
    return next((name for name, there in known.items() if all(there)), "p99")


def load_of(summary: Summary, by_rate: bool) -> float | None:
    """Where a run stands on the axis of load: requests/s asked for, or requests in flight. Sessions that wait do not
    send what they were asked for when the server is slow: they stand at what was really sent.
    """
    rates = summary.rates
    if by_rate and summary.offered.kind == "sessions":
        return summary.offered.sent_rate.value
    return rates.request_rate.value if by_rate else rates.concurrency.value


def against(
    title: str, groups: dict[str, list[tuple[float, Quantity]]], unit: str, x_unit: str, x_label: str,
    shape: str = "points", marks: Sequence[Mark] = (),
) -> Chart | None:  # fmt: skip
    """Quantities over an axis that all groups share, repeats of one load side by side; None without a single value."""
    numbered = {name: _counted([(x, q) for x, q in points if q.value is not None]) for name, points in groups.items()}
    columns = sorted({place for by_x in numbered.values() for place in by_x})
    if not columns:
        return None
    lines = []
    for number, (name, by_x) in enumerate(numbered.items()):
        if not by_x:
            continue
        lines.append(
            PlotLine(
                name=name, color=number, shape=shape,
                y=[_point(by_x[x].value) if x in by_x else None for x in columns],
                low=[_point(by_x[x].low) if x in by_x else None for x in columns],
                high=[_point(by_x[x].high) if x in by_x else None for x in columns],
            )
        )  # fmt: skip
    at = [x for x, _ in columns]
    return Chart(
        title=title, x=at, x_unit=x_unit, x_label=x_label, y_unit=unit, lines=lines, marks=list(marks),
        says=f"{title} against {x_label}, {len(set(at))} loads, {len(lines)} lines",
    )  # fmt: skip


def _counted(points: Sequence[tuple[float, Quantity]]) -> dict[tuple[float, int], Quantity]:
    """Each point by its x and by how many of this x came before it: none hides another."""
    found: dict[tuple[float, int], Quantity] = {}
    for x, q in points:
        found[x, sum(1 for other, _ in found if other == x)] = q
    return found


def cost_charts(groups: dict[str, list[tuple[Summary, KeptLimits]]], share: float) -> list[Chart]:
    """Cost against SLO: for each limit, the cheapest VALID run that kept it for this share of offered requests."""
    charts = []
    for metric, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
        lines: dict[str, list[tuple[float, Quantity]]] = {}
        for name, members in groups.items():
            points = [
                (limit, summary.cost.usd_per_1m_total)
                for summary, kept in members
                if (limit := kept[metric].get(share)) is not None and summary.cost.usd_per_1m_total.value is not None
            ]
            lines[name] = _cheapest(points)
        name = f"Cost against the {title} limit that {share * 100:.4g}% of requests kept"
        chart = against(name, lines, "USD", "s", f"{title} limit", shape="stairs")
        if chart is not None:
            charts.append(replace(chart, log_x=True))
    return charts


def _cheapest(points: list[tuple[float, Quantity]]) -> list[tuple[float, Quantity]]:
    """The points that no other beats in both limit and price, by limit."""
    best: list[tuple[float, Quantity]] = []
    for limit, cost in sorted(points, key=lambda p: (p[0], p[1].value or 0.0)):
        if not best or (cost.value or 0.0) < (best[-1][1].value or 0.0):
            best.append((limit, cost))
    return best


# -------------------------------------------------------------------------------------------------------------- numbers


def _point(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _points(values: Floats) -> Points:
    """Four digits are more than a picture shows."""
    return [_point(float(value)) for value in values]


def _numbers(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
