"""Pictures: what to draw and from which numbers. How they look is the page's business (``web/page.js``).

*Interactivity* is
tokens/s of one user's stream: 1 / TPOT, at the percentile of the SLO, else the median. Throughput per accelerator is
output tokens/s over all of a system's accelerators (over its servers where a tier has none). Between two measured loads
nothing is known; lines only guide the eye. Source of these axes: InferenceMAX's curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.capacity.serving_config import ServingConfig
from harness.analysis.report.curves import Curves, cumulative, joined, over_time
from harness.analysis.report.document import Chart, Mark, PlotLine, Points
from harness.analysis.report.figures import load_of
from harness.analysis.rows.itl_histogram import EDGES
from harness.analysis.rows.read import Run
from harness.analysis.stats.intervals import Distribution, Quantity, scaled
from harness.analysis.summary import Summary
from harness.analysis.validity.generator import lag_bound_s
from harness.slo import split_key

HARDLY_ANY = 0.001
"""Pictures of a distribution begin where so large a share is reached: a few odd short gaps would fill half of one."""
Limits = Mapping[str, tuple[float, float]]
"""Metric -> the share of requests and the limit, s, that an SLO sets on it."""


def run_charts(run: Run, summary: Summary, found: Curves, linked: str) -> dict[str, list[Chart]]:
    """The pictures of one run by the section that they stand in; ``linked`` names its timeline."""
    m, limits = summary.metrics, _limits_of(summary)
    asked = dict(summary.slo.limits) if summary.slo is not None else {}
    both = {"from planned time": found.grids["ttft"], "from sent time": found.grids["service_ttft"]}
    spread = _share_of(m.ttft, "TTFT", "successful requests", both, asked)
    spread += _share_of(m.itl, "ITL", "gaps between tokens", {"ITL": found.grids["itl"]}, asked)
    lag = _lag(run, summary, found, asked, linked) if found.grids["lag"].sum() else []
    return {"latency": spread, "time": _timeline(run, summary, found, limits, linked), "lag": lag}


def _limits_of(summary: Summary) -> Limits:
    return {} if summary.slo is None else limits_of(summary.slo.limits, summary.slo.attain)


def limits_of(slo: Mapping[str, float], attain: float) -> Limits:
    """The first limit on each metric; ``attain``: the share of a limit that names none."""
    found: dict[str, tuple[float, float]] = {}
    for key, limit in slo.items():
        name, share = split_key(key)
        found.setdefault(name, (attain if share is None else share, limit))
    return found


def _share_of(
    said: Distribution, title: str, noun: str, grids: Mapping[str, Floats], limits: Mapping[str, float]
) -> list[Chart]:
    keys = {key: split_key(key) for key in limits if split_key(key)[0] == title.lower()}
    marks = [Mark("x", limits[key], "SLO" if at is None else f"SLO {_named(at)}") for key, (_, at) in keys.items()]
    return share_chart(title, noun, {name: cumulative(grid) for name, grid in grids.items()}, marks, said)


def share_chart(
    title: str, noun: str, shares: Mapping[str, Floats], marks: Sequence[Mark] = (), said: Distribution | None = None,
    colors: Sequence[str | int] = ("accent", "muted"),
) -> list[Chart]:  # fmt: skip
    """Cumulative distributions over one logarithmic axis; none without any sample."""
    known = [(*line, color) for line, color in zip(shares.items(), colors, strict=False) if np.isfinite(line[1]).all()]
    if not known:
        return []
    stacked = np.array([share for _, share, _ in known])
    first = max(0, int(np.flatnonzero((stacked >= HARDLY_ANY).any(axis=0))[0]) - 1)
    last = int(np.flatnonzero((stacked >= 1).all(axis=0))[0])
    # where nothing changes there is nothing to draw: only the ends of a flat stretch stay
    moves = np.any(np.diff(stacked[:, first : last + 1], axis=1) != 0, axis=0)
    keep = np.flatnonzero(np.concatenate(([True], moves)) | np.concatenate((moves, [True]))) + first
    return [Chart(
        title=f"{title}: share of {noun} within",
        x=_numbers(EDGES[keep]), x_unit="s", x_label=title, y_unit="%", log_x=True, share=True, marks=marks,
        lines=[PlotLine(name=name, y=_points(share[keep]), color=color) for name, share, color in known],
        says=f"{title}: share of {noun} at or below each value" + ("" if said is None else f"; {_spoken(said)}"),
    )]  # fmt: skip


def _spoken(said: Distribution) -> str:
    known = [(name, q.value) for name, q in (("median", said.p50), ("p95", said.p95), ("p99", said.p99))]
    parts = [f"{name} {value * 1000:.3g} ms" for name, value in known if value is not None]
    return ", ".join(parts) or "too few samples for percentiles"


def _over_time(
    found: Curves, linked: str, title: str, unit: str, lines: list[PlotLine], says: str, **more: object
) -> Chart:
    return Chart(
        title=title, x=_numbers(found.time_s), x_unit="s", x_label="since the start", y_unit=unit, lines=lines,
        says=f"{title} over the run: {says}", linked=linked, x_time=True, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _two_lines(grid: Floats, requests: int, share: float = 0.99) -> list[PlotLine]:
    # an SLO's limit holds for a share of requests: that percentile is drawn beside it, and no other
    tail = "largest" if share >= 1 else f"{_named(share)} (largest of fewer than {1 / (1 - share):.0f})"
    middle, worst = over_time(grid, requests, share)
    return [
        PlotLine(name="median", y=_points(middle), shape="step"),
        PlotLine(name=tail, y=_points(worst), color="second", shape="step"),
    ]


def _servers(run: Run, found: Curves, linked: str) -> list[Chart]:
    """Servers over time, where they come and go."""
    if not (lives := run.manifest.lives):
        return []
    begins = {"paid for": [one.asked_s for one in lives], "take requests": [one.ready_s for one in lives]}
    ends = {
        "paid for": [one.ended_s for one in lives],
        "take requests": [one.ended_s if one.drains_s is None else one.drains_s for one in lives],
    }
    counts = {
        name: sum(
            ((found.time_s >= begin) & (found.time_s < (math.inf if end is None else end))).astype(np.float64)
            for begin, end in zip(begins[name], ends[name], strict=True)
        )
        for name in begins
    }
    lines = [
        PlotLine(name=name, y=_points(np.asarray(count)), color=color, shape="step")
        for (name, count), color in zip(counts.items(), ("muted", "accent"), strict=True)
    ]
    failed = sum(one.failed for one in lives)
    said = f"{len(lives)} in all, {failed} of which failed"
    return [_over_time(found, linked, "Servers", "servers", lines, said, small=True)]


def _timeline(run: Run, summary: Summary, found: Curves, limits: Limits, linked: str) -> list[Chart]:
    """Load, in flight, latency and tokens on one time axis; server queue and KV cache where the server told."""
    spoken = {"ttft": _spoken(summary.metrics.ttft), "itl": _spoken(summary.metrics.itl)}
    counts = summary.requests
    return _servers(run, found, linked) + timeline(
        found, limits, linked, spoken, open_loop=summary.load.mode == "open", sent=counts.sent,
        succeeded=counts.succeeded,
    )  # fmt: skip


def timeline(
    found: Curves, limits: Limits, linked: str, spoken: Mapping[str, str], *, open_loop: bool, sent: int, succeeded: int
) -> list[Chart]:
    """The same of any curves; ``spoken``: metric -> what its picture says to who cannot see it."""
    chart = partial(_over_time, found, linked, small=True)

    def latency(name: str, said: str) -> Chart:
        share, _ = limits.get(name, (0.99, 0.0))
        lines = _two_lines(found.grids[name], succeeded, share)
        return chart(name.upper(), "s", lines, said, log_y=True, marks=_across(limits.get(name)))

    def line(name: str, values: Floats, color: str = "accent") -> PlotLine:
        return PlotLine(name=name, y=_points(joined(values, found, sent)), color=color, shape="step")

    load = [line("planned", found.planned, "muted")] if open_loop else []
    load.append(line("sent", found.sent))
    if (found.failed > 0).any():  # NaN: not known yet
        load.append(line("failed", found.failed, "bad"))
    flight = [PlotLine(name="client: in flight", y=_points(found.in_flight))]
    flight += [
        PlotLine(name=f"server: {name}", y=_points(found.server[name]), color=color)
        for name, color in (("running", "second"), ("waiting", "bad"))
        if name in found.server
    ]
    charts = [
        chart("Load", "req/s", load, f"mean {_mean(found.sent)} requests sent a second"),
        chart("In flight", "requests", flight, f"mean {_mean(found.in_flight)} requests"),
        *(latency(name, said) for name, said in spoken.items()),
    ]
    for name, values in (("Output", found.output_tokens), ("Input", found.input_tokens)):
        if np.isfinite(values).any():
            tokens = [line(f"{name.lower()} tokens", values)]
            charts.append(chart(f"{name} tokens", "tokens/s", tokens, f"mean {_mean(values)} a second"))
    if (usage := found.server.get("kv_cache_usage")) is not None:
        used = [PlotLine(name="in use, fullest replica", y=_points(usage))]
        charts.append(chart("KV cache", "%", used, f"highest {np.nanmax(usage):.0%}", share=True))
    return charts


def _mean(values: Floats) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():.4g}" if len(known) else "not known"


def _lag(run: Run, summary: Summary, found: Curves, asked: dict[str, float], linked: str) -> list[Chart]:
    lines = _two_lines(found.grids["lag"], summary.requests.sent)
    if found.loop_lag_s is not None:
        late = _points(found.loop_lag_s)
        lines.append(PlotLine(name="generator's clock, latest", y=late, color="muted", shape="dots"))
    bound = [Mark("y", lag_bound_s(run, asked), "bound")] if run.manifest.spec.mode == "open" else []
    said = _spoken(summary.metrics.lag)
    return [_over_time(found, linked, "Lag over the run", "s", lines, said, marks=bound, log_y=True)]


def _across(limit: tuple[float, float] | None) -> list[Mark]:
    return [] if limit is None else [Mark("y", limit[1], f"SLO {_named(limit[0])}")]


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
    load, unit = partial(load_of, by_rate=by_rate), "req/s" if by_rate else "requests in flight"
    for metric in ("ttft", "tpot"):
        limit = _shared_limit(everyone, metric)
        for percentile in ("p50", _tail(everyone, metric, limit)):
            marks = _across(limit) if limit is not None and percentile == _named(limit[0]) else []
            title = f"{metric.upper()}, {'median' if percentile == 'p50' else percentile}"
            figure = partial(_figure, metric=metric, percentile=percentile)
            charts += _against(title, groups, load, figure, "s", unit, "load", marks)
    return charts


def tradeoff_charts(groups: Groups, found: Sequence[ServingConfig], by_rate: bool) -> list[Chart]:
    """Of VALID runs by group: throughput per accelerator and USD per 1M against interactivity, and USD against load.

    Charts without a point are left out. The limit that the SLO sets on TPOT is marked, and each capacity.
    """
    everyone = [s for members in groups.values() for s in members]
    unit = "accelerator" if all(s.tier is not None and s.tier.accelerator_count for s in everyone) else "server"
    limit, percentile = _shared_limit(everyone, "tpot"), "p50"
    slo = []
    if limit is not None and any(_figure(s, "tpot", _named(limit[0])).value for s in everyone):
        percentile, slo = _named(limit[0]), [Mark("x", 1 / limit[1], "SLO")]
    capacities = [
        Mark("x", one.capacity.load.value, "capacity")
        for one in found
        if one.loop == ("open" if by_rate else "closed") and one.capacity and one.capacity.load.value is not None
    ]
    user, sees = partial(interactivity, percentile=percentile), ("tokens/s per user", "interactivity", slo)
    load, at = partial(load_of, by_rate=by_rate), ("req/s" if by_rate else "requests in flight", "load", capacities)
    return [
        *_against(f"Output tokens/s per {unit}", groups, user, per_accelerator, "tokens/s", *sees),
        *_against("USD per 1M tokens against what a user sees", groups, user, _usd_per_1m, "USD", *sees),
        *_against("USD per 1M tokens against load", groups, load, _usd_per_1m, "USD", *at),
    ]


def _figure(summary: Summary, metric: str, percentile: str) -> Quantity:
    """A percentile; not known where it is none of those that are reported."""
    said: Distribution = getattr(summary.metrics, metric)
    found: Quantity = getattr(said, percentile, Quantity(value=None, n=said.mean.n, unit="s", evidence="measured"))
    return found


def _usd_per_1m(summary: Summary) -> Quantity:
    return summary.cost.usd_per_1m_total


def _shared_limit(summaries: Sequence[Summary], metric: str) -> tuple[float, float] | None:
    """The limit on a metric where all SLOs set the same: a mark says nothing of points at another one."""
    found = {_limits_of(s).get(metric) for s in summaries}
    return found.pop() if len(found) == 1 else None


def _named(share: float) -> str:
    return f"p{share * 100:g}"


def _tail(summaries: Sequence[Summary], metric: str, limit: tuple[float, float] | None) -> str:
    """The percentile that the SLO sets a limit on, where some run has it; else the highest that all runs support."""
    known = {name: [_figure(s, metric, name).value is not None for s in summaries] for name in ("p99", "p95", "p90")}
    if limit is not None and any(known.get(_named(limit[0]), ())):
        return _named(limit[0])
    return next((name for name, there in known.items() if all(there)), "p99")


def _against(
    title: str, groups: Groups, x: Callable[[Summary], float | None], y: Callable[[Summary], Quantity], unit: str,
    x_unit: str, x_label: str, marks: Sequence[Mark],
) -> list[Chart]:  # fmt: skip
    """Quantities over an axis that all groups share, repeats of one load side by side; none without a single value."""
    placed: dict[str, dict[tuple[float, int], Quantity]] = {}
    for name, members in groups.items():
        found = placed.setdefault(name, {})
        for s in members:
            if (at := x(s)) is not None and (q := y(s)).value is not None:
                # each by its x and by how many of this x came before it: none hides another
                found[at, sum(1 for other, _ in found if other == at)] = q
    columns = sorted({place for by_x in placed.values() for place in by_x})
    if not columns:
        return []

    def ends(by_x: dict[tuple[float, int], Quantity], end: str) -> Points:
        return [_point(getattr(by_x[place], end)) if place in by_x else None for place in columns]

    lines = [
        PlotLine(name=name, color=k, shape="points", y=ends(q, "value"), low=ends(q, "low"), high=ends(q, "high"))
        for k, (name, q) in enumerate(placed.items())
        if q
    ]
    xs = [at for at, _ in columns]
    return [Chart(
        title=title, x=xs, x_unit=x_unit, x_label=x_label, y_unit=unit, lines=lines, marks=marks,
        says=f"{title} against {x_label}, {len(set(xs))} loads, {len(lines)} lines",
    )]  # fmt: skip


def _point(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _points(values: Floats) -> Points:
    return [_point(float(value)) for value in values]


def _numbers(values: Floats) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
