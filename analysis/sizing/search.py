"""Which load to probe next in the search for capacity: few probes, each decided by what the ones before it measured.

First a closed-loop ladder (1, 4, 16 ... in flight) up to where throughput stops growing or the promise breaks: that is
the ceiling. Then open-loop replays around it: the bracket between a rate that keeps the promise and one that does not
shrinks by where the tightest limit should be used up, until it is as narrow as was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis import metrics
from analysis.intervals import samples_needed
from analysis.load import Run
from analysis.sizing.capacity import GAIN, Point, bracket, pool
from harness.slo import Criterion

RUNG = 4
"""Requests in flight grow by this factor from rung to rung."""
MOST_IN_FLIGHT = 4096
MOST_PROBES = 24
TRIES = 2
"""A load whose runs were INVALID so often is left alone."""
BEYOND = 1.1
"""An open loop at this multiple of the ceiling should miss any promise."""
LEAP = 1.5
"""When even that kept it (a probe too short for its queue), the next rate is so many times as high."""
FIRST = 0.9
"""The first rate: this share of what the ladder says, since a trace comes in bursts and a ladder does not."""
IDLE = 0.25
"""At this share of what one request at a time does, hardly any two meet: a promise missed there cannot be kept."""
NEAR_END = 0.2
"""A probe stays this share of the bracket away from both its ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One load and what was found there."""

    rate: float | None
    """Open loop, req/s; None: closed."""
    concurrency: int | None
    point: Point | None
    """None: the run was INVALID or failed."""
    used: float = math.nan
    """Share of the tightest limit that the wanted share of requests used; above 1 the promise is missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRow:
    """One probe of the search, as its table says it."""

    run: str
    load: str
    requests: int | None
    verdict: str
    attainment: tuple[float | None, ...]
    """By criterion."""
    request_throughput: float | None
    seconds: float | None
    usd: float | None
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The next load (one of the two), or the end (neither), and why."""

    rate: float | None = None
    concurrency: int | None = None
    why: str
    narrow: bool = False
    """The end, with the bracket as narrow as was asked for."""


def limit_used(run: Run, criteria: Sequence[Criterion]) -> float:
    """Largest share of a limit that the wanted share of offered requests used, over the criteria; inf: not answered.

    Steers the search only: no figure of a report, so no sample is too small for it.
    """
    worst = 0.0
    offered = ~metrics.not_offered(run)
    for criterion in criteria:
        used = np.sort(
            np.concatenate((metrics.slo_ratio(run.rows, criterion.limits)[offered], np.full(run.lost, np.inf)))
        )
        if len(used):
            worst = max(worst, float(used[max(0, math.ceil(criterion.wanted * len(used) - 1e-9) - 1)]))
    return worst


def requests_needed(criteria: Sequence[Criterion]) -> int:
    """Requests that a probe must offer to judge every criterion (`intervals.samples_needed`)."""
    return max(samples_needed(min(criterion.wanted, 0.999)) for criterion in criteria)


def next_load(probes: Sequence[Probe], criteria: Sequence[Criterion], tolerance: float) -> Step:
    """What to probe after ``probes``; ``tolerance``: width of the bracket as a share of its upper end."""
    if len(probes) >= MOST_PROBES:
        return Step(why=f"{MOST_PROBES} probes were made")
    unknown = [q.note for p in probes if p.point is not None for q in p.point.kept if q.value is None]
    if unknown:
        return Step(why=f"nobody can say whether the promise is kept: {unknown[0]}")
    ladder = _by_load([p for p in probes if p.concurrency is not None])
    step = _next_rung(ladder, criteria)
    if step is not None:
        return step
    rungs = [(c, tries[-1]) for c, tries in ladder.items() if tries[-1].point is not None]
    if not rungs:
        return Step(why="no run of one request at a time was VALID")
    return _next_rate(rungs, [p for p in probes if p.rate is not None], criteria, tolerance)


def keeps(point: Point, criteria: Sequence[Criterion]) -> bool:
    """Whether the point itself keeps every criterion."""
    return all(q.value is not None and q.value >= c.wanted for q, c in zip(point.kept, criteria, strict=True))


def _by_load(probes: Sequence[Probe]) -> dict[float, list[Probe]]:
    """Probes by load, lowest first; of each load those that are not VALID first."""
    found: dict[float, list[Probe]] = {}
    for p in sorted(probes, key=lambda p: (_load(p), p.point is not None)):
        found.setdefault(_load(p), []).append(p)
    return found


def _load(probe: Probe) -> float:
    load = probe.rate if probe.rate is not None else probe.concurrency
    assert load is not None
    return load


def _throughput(probe: Probe) -> float:
    assert probe.point is not None
    return probe.point.rates["request_throughput"].value or 0.0


def _next_rung(ladder: dict[float, list[Probe]], criteria: Sequence[Criterion]) -> Step | None:
    """The next rung of the ladder; None: it is done."""
    if not ladder:
        return Step(concurrency=1, why="one request at a time: the best latency there is")
    top, tries = list(ladder.items())[-1]
    last = tries[-1]
    if last.point is None:
        return Step(concurrency=int(top), why="once more") if len(tries) < TRIES else None
    if not keeps(last.point, criteria) or top >= MOST_IN_FLIGHT:
        return None
    below = [(c, t[-1]) for c, t in ladder.items() if c < top and t[-1].point is not None]
    if below:
        before, earlier = below[-1]
        if _throughput(last) < _throughput(earlier) * (1 + GAIN) ** math.log2(top / before):
            return None
    return Step(concurrency=int(top) * RUNG, why="throughput still grows")


def _next_rate(
    rungs: Sequence[tuple[float, Probe]], opened: Sequence[Probe], criteria: Sequence[Criterion], tolerance: float
) -> Step:
    """The next rate, or the end."""
    ceiling = max(_throughput(p) for _, p in rungs)
    alone = _throughput(rungs[0][1])
    if ceiling <= 0:
        return Step(why="nothing was answered")
    by_rate = _by_load(opened)
    untried = [rate for rate, tries in by_rate.items() if tries[-1].point is None and len(tries) < TRIES]
    if untried:
        return Step(rate=untried[0], why="once more, since that run proves nothing")
    spoilt = min((rate for rate, tries in by_rate.items() if tries[-1].point is None), default=math.inf)
    points = pool(p.point for p in opened if p.point is not None)
    low, high = bracket(points, criteria)
    if low is not None and high is not None:
        if high - low <= tolerance * high:
            return Step(why=f"the bracket {low:g} to {high:g} req/s is as narrow as was asked for", narrow=True)
        return Step(rate=_inside(low, high, opened), why=f"between {low:g} and {high:g} req/s")
    if low is None and high is None:
        rate = _first_rate(rungs, criteria) if spoilt == math.inf else spoilt / 2
        return (
            Step(rate=_round(rate), why="the ladder's guess") if rate > alone * IDLE / 2 else Step(why="no VALID run")
        )
    if high is None:
        assert low is not None
        top = BEYOND * ceiling if low < ceiling else LEAP * low
        if spoilt < math.inf:
            if spoilt - low <= tolerance * spoilt:
                return Step(why=f"runs at {spoilt:g} req/s are INVALID, and at {low:g} the promise is kept")
            top = (low + spoilt) / 2
        return Step(rate=_round(top), why=f"{low:g} req/s kept it")
    if high <= alone * IDLE:
        return Step(why=f"at {high:g} req/s requests hardly meet, and the promise is missed")
    return Step(rate=_round(max(high / 2, alone * IDLE * 0.99)), why=f"{high:g} req/s missed it")


def _first_rate(rungs: Sequence[tuple[float, Probe]], criteria: Sequence[Criterion]) -> float:
    """Where the ladder puts capacity, less something for bursts."""
    kept = [p for _, p in rungs if p.point is not None and keeps(p.point, criteria)]
    missed = [p for _, p in rungs if p.point is not None and not keeps(p.point, criteria)]
    if not kept:
        return _throughput(rungs[0][1]) / 2
    best = max(kept, key=_throughput)
    if not missed or _throughput(missed[0]) <= _throughput(best):
        return FIRST * _throughput(best)
    low, high = _throughput(best), _throughput(missed[0])
    return FIRST * (low + (high - low) * _place(best.used, missed[0].used))


def _inside(low: float, high: float, opened: Sequence[Probe]) -> float:
    """A rate within the bracket: where the tightest limit should be used up, well away from both ends."""

    def used(rate: float) -> float:
        return float(np.median([p.used for p in opened if p.point is not None and p.point.load == rate]))

    place = min(1 - NEAR_END, max(NEAR_END, _place(used(low), used(high))))
    return _round(low + place * (high - low))


def _place(below: float, above: float) -> float:
    """How far from one load to the next the limit is used up, on a logarithmic scale of its use; 0.5 when not known."""
    if not (0 < below < 1 < above < math.inf):
        return 0.5
    return -math.log(below) / (math.log(above) - math.log(below))


def _round(rate: float) -> float:
    """Four digits: a rate that can be said."""
    return float(f"{rate:.4g}")
