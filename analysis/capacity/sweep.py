"""Capacity: the highest load at which the SLO is met, and what limits a system beyond it. Nothing is extrapolated.

A `LoadPoint` is one load of one system (tier, model, engine arguments), repeats pooled, from VALID runs only. Loads are
requests/s (open loop) or requests in flight (closed loop); one system is judged in one of the two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.capacity.system import grouped
from harness.analysis.stats.autocorrelation import ALPHA, Z
from harness.analysis.stats.intervals import Quantity
from harness.analysis.stats.replicates import over_replicates
from harness.slo import Criterion

FOLLOWS = 0.95
"""A server that finishes less than this share of the offered rate is saturated."""
GAIN = 0.05
"""A closed loop is saturated when twice the requests in flight give less than this much more throughput."""
DRAWS = 1000
"""Resamples behind an interval; always the same, so that one sweep gives one answer."""
NO_INTERVAL = 10
"""A share without an interval is worth at most so many independent requests: its run was too short for more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """One load, its repeats pooled."""

    load: float
    """Requests/s that were offered, or requests in flight."""
    kept: tuple[Quantity, ...]
    """Share of offered requests that kept each criterion, in the order of the criteria."""
    rates: Mapping[str, Quantity]
    """Per second by name, as in a summary's rates: request_throughput, total_token_throughput ..."""
    runs: tuple[str, ...] = ()
    unstable: bool = False
    """Its backlog only grew (`analysis.steady`): it meets no SLO, however many of its requests did."""


State = Literal["found", "not reached", "beyond", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The highest load at which every criterion is kept."""

    state: State
    """"found"; "not reached": the lowest load misses already; "beyond": the highest load keeps it; "unknown"."""
    load: Quantity
    """Interpolated between the two measured loads around it. Interval, 95 %: each share is drawn anew within its own
    uncertainty, and between the two loads around a drawn crossing every place is equally likely, since nothing was
    measured there (a straight line would claim to know). An end beyond the measured loads is None; with state "beyond"
    the value is None and ``low`` a floor of what is possible, with "not reached" ``high`` its ceiling."""
    limit: Criterion | None
    """What is missed first; None when nothing was."""
    rates: Mapping[str, Quantity]
    """Each rate at that load, interpolated; its interval spans that of the load, and has no end where that has none."""


def pool(points: Iterable[LoadPoint]) -> list[LoadPoint]:
    """Points by load, lowest first, those of equal load as one: means weighted by samples.

    The interval of a pooled figure is the wider of what the repeats' own intervals say together and what the repeats
    differ by (Student's t needs two; with one it is that one's own).
    """
    by_load = grouped(points, lambda point: point.load)
    return [merged(by_load[load]) for load in sorted(by_load)]


def merged(same: Sequence[LoadPoint], plans: Sequence[Hashable] | None = None) -> LoadPoint:
    """Points of one load as one; ``plans``: what each was asked (`over_replicates`)."""

    def mean(quantities: Sequence[Quantity], most: float = math.inf) -> Quantity:
        found = over_replicates(quantities, [max(1, q.n) for q in quantities], plans)
        return found if found.high is None else replace(found, high=min(most, found.high))

    names = [name for name in same[0].rates if all(name in point.rates for point in same)]
    return LoadPoint(
        load=same[0].load,
        kept=tuple(mean(shares, 1.0) for shares in zip(*(p.kept for p in same), strict=True)),
        rates={name: mean([p.rates[name] for p in same]) for name in names},
        runs=tuple(run for point in same for run in point.runs),
        unstable=any(point.unstable for point in same),
    )


def capacity(points: Sequence[LoadPoint], criteria: Sequence[Criterion], unit: str = "req/s") -> Capacity:
    """The highest load at which every criterion is kept, from pooled points in order of load (`pool`).

    More load never helps to meet an SLO, so the shares are first made to fall with the load (weighted isotonic
    regression). Raises ValueError for no criteria or points out of order.
    """
    if not criteria:
        raise ValueError("capacity needs an SLO: at least one criterion")
    loads = np.array([point.load for point in points])
    if np.any(np.diff(loads) <= 0):
        raise ValueError("points must be pooled: one of each load, lowest first")
    n = sum(q.n for point in points for q in point.kept[:1])
    evidence = points[0].kept[0].evidence if points else "measured"
    blank = Quantity(value=None, n=n, unit=unit, evidence=evidence)
    known = [k for k, point in enumerate(points) if all(q.value is not None for q in point.kept)]
    if not known:
        why = next((q.note for point in points for q in point.kept if q.note), "no VALID run")
        return Capacity(state="unknown", load=replace(blank, note=why), limit=None, rates={})
    points, loads = [points[k] for k in known], loads[known]
    kept = [np.array([[0.0 if p.unstable else p.kept[k].value] for p in points]) for k in range(len(criteria))]
    crossings = [
        float(_crossing(loads, one.astype(np.float64), _weights(points, k), c.wanted)[0])
        for k, (one, c) in enumerate(zip(kept, criteria, strict=True))
    ]
    first = int(np.argmin(crossings))
    draws = _draws(loads, points, criteria)
    low, high = _ends(draws, loads)
    if crossings[first] == -math.inf:
        note = f"not reached: at {loads[0]:g} {unit}, the lowest load that was measured, it is missed"
        load = replace(blank, high=high, note=note)
        return Capacity(state="not reached", load=load, limit=criteria[first], rates={})
    if crossings[first] == math.inf:
        note = f"beyond the highest load: at {loads[-1]:g} {unit} it is kept"
        return Capacity(state="beyond", load=replace(blank, low=low, note=note), limit=None, rates={})
    value = crossings[first]
    done = max(p.rates["request_throughput"].value or 0.0 if "request_throughput" in p.rates else 0.0 for p in points)
    if unit == "req/s" and 0 < done < value:  # a finite run cannot see a queue that only grows
        value = done
    low, high = None if low is None else min(low, value), None if high is None else max(high, value)
    load = replace(blank, value=value, low=low, high=high, note=_unproven(low, high))
    return Capacity(state="found", load=load, limit=criteria[first], rates=_rates_at(points, loads, load, draws))


def saturation(points: Sequence[LoadPoint], *, closed: bool) -> float | None:
    """The lowest load at which the server no longer follows; None when it followed to the end.

    Open loop: it finishes less than `FOLLOWS` of the offered rate, beyond the interval's doubt. Closed loop: from there
    on, doubling the requests in flight gives less than `GAIN` more throughput.
    """
    known = [(p.load, p.rates["request_throughput"]) for p in points if p.rates["request_throughput"].value]
    if not closed:
        for load, done in known:
            best = done.high if done.high is not None else done.value
            if best is not None and best < FOLLOWS * load:
                return load
        return None
    for (load, done), (more, after) in itertools.pairwise(known):
        assert done.value is not None and after.value is not None
        doublings = math.log2(more / load)
        if after.value < done.value * (1 + GAIN) ** doublings:
            return load
    return None


def little(point: LoadPoint, e2e_s: float | None) -> float | None:
    """Requests in flight over throughput x mean e2e latency: 1 when the figures of a point agree with each other.

    None when one of them is not known. Source: Little, Operations Research 9(3), 1961.
    """
    flow, inside = point.rates["request_throughput"].value, point.rates["concurrency"].value
    return None if not flow or not e2e_s or inside is None else inside / (flow * e2e_s)


def falling(values: Floats, weights: Floats) -> Floats:
    """The non-increasing series nearest to ``values`` by weighted squares, along the first axis.

    At each place the least, over all that begin before it, of the largest mean of what ends after it.
    Source: Barlow et al., Statistical Inference under Order Restrictions, 1972 (the min-max formula).
    """
    fitted = np.full(values.shape, np.inf)
    work, size = (values.T * weights).T, weights.reshape(-1, *[1] * (values.ndim - 1))
    for first in range(len(values)):
        means = np.cumsum(work[first:], axis=0) / np.cumsum(size[first:], axis=0)
        fitted[first:] = np.minimum(fitted[first:], np.maximum.accumulate(means[::-1])[::-1])
    return fitted


def _weights(points: Sequence[LoadPoint], k: int) -> Floats:
    return np.array([max(1, point.kept[k].n) for point in points], dtype=np.float64)


def _crossing(loads: Floats, shares: Floats, weights: Floats, wanted: float, place: Floats | None = None) -> Floats:
    """Loads at which columns of shares, made to fall, come down to ``wanted``; -inf: below all loads, inf: above.

    ``place``: how far between the two loads around it; None: where a straight line crosses.
    """
    shares = falling(shares, weights)
    kept = (shares >= wanted).sum(axis=0)
    below, above = np.maximum(kept - 1, 0), np.minimum(kept, len(loads) - 1)
    if place is None:
        low, high = (np.take_along_axis(shares, at[None], axis=0)[0] for at in (below, above))
        place = (low - wanted) / np.where(low > high, low - high, 1.0)
    found = loads[below] + place * (loads[above] - loads[below])
    return np.where(kept == 0, -np.inf, np.where(kept == len(loads), np.inf, found))


def _draws(loads: Floats, points: Sequence[LoadPoint], criteria: Sequence[Criterion]) -> Floats:
    """What capacity could have been: `DRAWS` loads, -inf below and inf above all that was measured.

    Nothing was measured between the two loads around a crossing, so each place between them is taken as equally likely.
    """
    rng = np.random.default_rng(0)
    lowest = np.full(DRAWS, np.inf)
    for k, criterion in enumerate(criteria):
        weights = _weights(points, k)
        shares = np.stack([_shares(point.kept[k], rng) * (not point.unstable) for point in points])
        places = rng.random(DRAWS)
        lowest = np.minimum(lowest, _crossing(loads, shares, weights, criterion.wanted, places))
    return lowest


def _shares(q: Quantity, rng: np.random.Generator) -> Floats:
    """Draws of a share within its own uncertainty: beta at the sample size that its interval stands for."""
    assert q.value is not None
    size = float(max(1, min(q.n, NO_INTERVAL)))
    if q.low is not None and q.high is not None:
        width = q.high - q.low
        if width <= 1e-9:
            return np.full(DRAWS, q.value)
        sizes = np.geomspace(1e-3, 1e9, 600)
        spread = Z / (1 + Z**2 / sizes) * np.sqrt(q.value * (1 - q.value) / sizes + Z**2 / (4 * sizes**2))
        size = float(np.interp(-width, -2 * spread, sizes))  # Wilson's width falls with the size
    return rng.beta(q.value * size + 0.5, (1 - q.value) * size + 0.5, DRAWS)


def _ends(draws: Floats, loads: Floats) -> tuple[float | None, float | None]:
    """The 95 % interval of draws; an end beyond the measured loads is None, unless the other one is too."""
    low, high = (float(x) for x in np.quantile(draws, (ALPHA / 2, 1 - ALPHA / 2), method="nearest"))
    if high == -math.inf:
        return None, float(loads[0])
    if low == math.inf:
        return float(loads[-1]), None
    return None if low == -math.inf else low, None if high == math.inf else high


def _unproven(low: float | None, high: float | None) -> str | None:
    ends = [name for name, end in (("below", low), ("above", high)) if end is None]
    return f"may lie {' or '.join(ends)} the measured loads: more requests or loads there narrow it" if ends else None


def _rates_at(points: Sequence[LoadPoint], loads: Floats, at: Quantity, draws: Floats) -> dict[str, Quantity]:
    """Each rate at a load between the measured ones."""
    rng, inside, found = np.random.default_rng(1), np.clip(draws, loads[0], loads[-1]), {}
    below = np.clip(np.searchsorted(loads, inside, side="right") - 1, 0, max(0, len(loads) - 2))
    above = np.minimum(below + 1, len(loads) - 1)
    place = (inside - loads[below]) / np.where(above > below, loads[above] - loads[below], 1.0)
    for name, first in points[0].rates.items():
        series = [q for point in points if (q := point.rates.get(name)) is not None and q.value is not None]
        if len(series) < len(points) or at.value is None:
            continue
        values = np.array([q.value for q in series], dtype=np.float64)
        value, low, high = float(np.interp(at.value, loads, values)), None, None
        open_ended = at.low is None and at.high is None
        if not open_ended and all(q.low is not None and q.high is not None for q in series):
            spread = np.array([((q.high or 0.0) - (q.low or 0.0)) / (2 * Z) for q in series])
            drawn = values + rng.standard_normal((DRAWS, len(series))) * spread
            each = np.arange(DRAWS)
            ends = np.quantile(
                drawn[each, below] + place * (drawn[each, above] - drawn[each, below]), (ALPHA / 2, 1 - ALPHA / 2)
            )
            # where capacity has no end within the measured loads, nor has what was interpolated between them
            low = None if at.low is None else max(0.0, min(value, float(ends[0])))
            high = None if at.high is None else max(value, float(ends[1]))
        found[name] = replace(first, value=value, low=low, high=high, n=sum(q.n for q in series), note=None)
    return found
