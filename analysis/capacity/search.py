"""Which load to probe next in the search for capacity, and what all probes together say.

First a short closed-loop ladder (1, 4, 16 ... in flight) up to where throughput stops growing or the SLO is missed:
the ceiling, beyond which no rate is believed. Then open-loop probes of windows from all over the trace, each at the
crossing that the ones before it give (`analysis.capacity.crossing`), until the interval is as narrow as was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.capacity.backlog import Curve, Demand, Worked, curve_of
from harness.analysis.capacity.crossing import FEWEST_PROBES, PROMPT_WEIGHTS, SHORTEST_S, Crossing, Evidence, crossing
from harness.analysis.capacity.sweep import GAIN, LoadPoint
from harness.analysis.stats.autocorrelation import student_t
from harness.slo import Criterion

RUNG = 4
"""Requests in flight grow by this factor from rung to rung."""
MOST_IN_FLIGHT = 4096
MOST_PROBES = 24
TRIES = 2
"""A load whose runs were INVALID so often is left alone."""
BEYOND = 1.1
"""An open loop at this multiple of the ceiling shows what a server that never idles gets done."""
FULL = 0.96
"""Of the ceiling: a server that is as good as full and still keeps up."""
FIRST = 0.9
"""The first rate: at most this share of the ceiling."""
STEP_UP, STEP_DOWN = 1.5, 0.6
"""The next rate is within these multiples of the last: an estimate from one probe is a rough one."""
SPREAD = 0.05
"""Probes lie this far to either side of the estimate: they learn more than at one rate, and are never all alike."""
IDLE = 0.25
"""At this share of what one request at a time does, hardly any two meet: an SLO missed there cannot be met."""
SATURATED = 0.9
"""Stretches that got so much done of the most that any did count as saturated."""
FEWEST_STRETCHES = 3
PACE_STEP = 0.01
"""Paces are told apart this finely, as a share: a curve is then worked out once for many steps."""
SETTLES = 4.0
"""A server that begins empty has filled after this many times as long as an answer takes when it is full."""
PROOFS = 4
"""Probes next to the ceiling that met no miss, before the server itself is named as the limit: one minute there may
meet no burst."""
SUSTAINED = Criterion(name="the server keeps up", wanted=1.0)
"""What limits a load when the SLO itself would allow more than the server gets done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One load and what was found there."""

    rate: float | None
    """Open loop, req/s; None: closed."""
    concurrency: int | None
    point: LoadPoint | None
    """None: the run was INVALID or failed. A lost probe has none either, but evidence that it was unstable."""
    used: float = math.nan
    """Share of the tightest limit that the wanted share of requests used; above 1 the SLO is missed."""
    evidence: Evidence | None = None
    """Of an open loop."""
    worked: Worked | None = None

    @property
    def proves(self) -> bool:
        """There is something to go on from."""
        return self.point is not None or self.evidence is not None


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
    unstable: bool = False
    """Its backlog only grew, so it meets no SLO, however many of its requests were within the limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The next load (one of the two), or the end (neither), and why."""

    rate: float | None = None
    concurrency: int | None = None
    why: str
    narrow: bool = False
    """The end, with the interval as narrow as was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Where the SLO is missed by all probes so far, req/s."""

    rate: float
    low: float | None
    high: float | None
    limit: Criterion
    """What breaks first; `SUSTAINED`: the server itself."""
    ceiling: float
    """What a server that never idles gets done, requests of the trace's mean length per second."""
    seconds: float
    """Of measured load that decided."""
    probes: int
    missed: bool
    """Some request missed it, or the ceiling was reached; else capacity lies beyond what was seen."""
    short: bool = False
    """The probes are too short for an interval."""
    settled: bool = False
    """More probes hardly narrow the interval: what is left is the trace's own chance."""

    @property
    def half_width(self) -> float | None:
        """Half of the interval as a share of the rate; None without one."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2 / self.rate


def settling_s(probes: Sequence[Probe]) -> float:
    """How long a probe in an open loop must run until an empty server has settled at a load near its ceiling, s.

    By Little's law on the lowest rung of the ladder that saturates the server; 0 before there is a ladder.
    """
    rungs = [p for p in probes if p.concurrency is not None and p.point is not None and _throughput(p) > 0]
    if not rungs:
        return 0.0
    full = SATURATED * max(_throughput(p) for p in rungs)
    return SETTLES * min((p.concurrency or 0) / _throughput(p) for p in rungs if _throughput(p) >= full)


def next_load(
    probes: Sequence[Probe], criteria: Sequence[Criterion], tolerance: float, demand: Demand
) -> Step:  # fmt: skip
    """What to probe after ``probes``; ``tolerance``: half of the interval as a share of the rate, when to end."""
    if len(probes) >= MOST_PROBES:
        return Step(why=f"{MOST_PROBES} probes were made")
    unknown = [q.note for p in probes if p.point is not None for q in p.point.kept if q.value is None]
    if unknown:
        return Step(why=f"the SLO cannot be judged: {unknown[0]}")
    ladder = _by_load([p for p in probes if p.concurrency is not None])
    step = _next_rung(ladder, criteria)
    if step is not None:
        return step
    rungs = [(c, tries[-1]) for c, tries in ladder.items() if tries[-1].point is not None]
    if not rungs:
        return Step(why="no run of one request at a time was VALID")
    if all(_throughput(p) <= 0 for _, p in rungs):
        return Step(why="nothing was answered")
    return _next_rate(rungs, [p for p in probes if p.rate is not None], probes, criteria, tolerance, demand)


def estimate(probes: Sequence[Probe], criteria: Sequence[Criterion], demand: Demand) -> Estimate | None:
    """Where the SLO is missed, by all probes together; None before a probe in an open loop proves anything."""
    shown = [p.evidence for p in probes if p.evidence is not None]
    curves = _curves(probes, demand)
    if not shown or not curves:
        return None
    ceiling, low, high, seconds = _ceiling(probes, curves[0])
    shown = [_beside(e, ceiling) for e in shown]
    found = [crossing(curves, shown, k, c.wanted) for k, c in enumerate(criteria)]
    known = [(one, c) for one, c in zip(found, criteria, strict=True) if one is not None]
    sustained = Estimate(
        rate=ceiling, low=low, high=high, limit=SUSTAINED, ceiling=ceiling, seconds=seconds,
        probes=sum(e.unstable for e in shown), missed=any(e.unstable for e in shown),
    )  # fmt: skip
    if not known:
        return sustained
    first, limit = min(known, key=lambda pair: pair[0].rate)
    if first.rate >= ceiling or (not first.missed and sustained.missed):
        kept = min(first.rate, ceiling)
        if not _seen_full(shown, ceiling):  # what lies between is not known: claim what was seen to be kept
            return replace(sustained, rate=kept, low=None, high=None)
        full = max([e.rate for e in shown if not e.unstable], default=ceiling)  # beyond that nothing was kept up with
        low = None if low is None else min([low, kept, full, *_lows(known)])
        return replace(sustained, rate=min(ceiling, full), low=low)
    return _capped(first, limit, known, sustained)


def _beside(evidence: Evidence, ceiling: float) -> Evidence:
    """A backlog that grew far below what the server gets done is a burst, which the trace's own bursts put right."""
    burst = evidence.unstable and evidence.rate < SATURATED * ceiling and bool(evidence.measured.any())
    return replace(evidence, unstable=False) if burst else evidence


def _capped(
    first: Crossing, limit: Criterion, known: Sequence[tuple[Crossing, Criterion]], sustained: Estimate
) -> Estimate:
    """The crossing that comes first, its interval no higher than what the server can get done."""
    highs = [one.high for one, _ in known if one.high is not None]
    top = sustained.high if sustained.high is not None else math.inf
    low = None if first.low is None else min([first.rate, *_lows(known)])
    high = None if first.high is None else max(first.rate, min([first.high, *highs, top]))
    return Estimate(
        rate=first.rate, low=low, high=high, limit=limit, ceiling=sustained.ceiling, seconds=first.seconds,
        probes=first.probes, missed=first.missed, short=first.short, settled=first.settled,
    )  # fmt: skip


def _lows(known: Sequence[tuple[Crossing, Criterion]]) -> list[float]:
    return [one.low for one, _ in known if one.low is not None]


def _curves(probes: Sequence[Probe], demand: Demand) -> list[Curve]:
    """The backlog of the trace at the pace that was seen, one for each weight of a prompt token that makes sense."""
    worked = [p.worked for p in probes if p.worked is not None and p.worked.requests]
    if not worked:
        return []
    weights = PROMPT_WEIGHTS if demand.input_tokens.any() else PROMPT_WEIGHTS[:1]
    curves = []
    for weight in weights:
        mean = max(float(demand.tokens(weight).mean()), 1e-9)
        most = max(w.rate(weight, mean) for w in worked)
        curves.append(curve_of(demand, weight, math.exp(math.ceil(math.log(most) / PACE_STEP) * PACE_STEP)))
    return curves


def _ceiling(probes: Sequence[Probe], curve: Curve) -> tuple[float, float | None, float | None, float]:
    """(rate, low, high, seconds) that saturated stretches got done, in requests of the trace's mean length."""
    rates = [
        (p.worked.rate(curve.prompt_weight, curve.mean_tokens), p.worked.seconds, p)
        for p in probes
        if p.worked is not None and p.worked.requests
    ]
    most = max(rate for rate, _, _ in rates)
    flat = [(rate, s) for rate, s, p in rates if rate >= SATURATED * most and _saturated(p)]
    if not flat:
        flat = [(rate, s) for rate, s, _ in rates if rate == most]
    values, weights = np.array([rate for rate, _ in flat]), np.array([s for _, s in flat])
    mean, n = float(values @ weights / weights.sum()), len(flat)
    if n < FEWEST_STRETCHES:
        return mean, None, None, float(weights.sum())
    shares: Floats = weights / weights.sum()
    reach = student_t(n - 1) * math.sqrt(float(shares**2 @ (values - mean) ** 2) * n / (n - 1))
    return mean, mean - reach, mean + reach, float(weights.sum())


def _saturated(probe: Probe) -> bool:
    """The server never idled: slots that were always taken, or a backlog that only grew."""
    return probe.concurrency is not None or (probe.evidence is not None and probe.evidence.unstable)


def keeps(point: LoadPoint, criteria: Sequence[Criterion]) -> bool:
    """Whether the point itself keeps every criterion; one whose backlog only grew keeps none."""
    if point.unstable:
        return False
    return all(q.value is not None and q.value >= c.wanted for q, c in zip(point.kept, criteria, strict=True))


def _by_load(probes: Sequence[Probe]) -> dict[float, list[Probe]]:
    """Probes by load, lowest first; of each load those that prove nothing first."""
    found: dict[float, list[Probe]] = {}
    for p in sorted(probes, key=lambda p: (_load(p), p.proves)):
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
    if top >= MOST_IN_FLIGHT or (top <= 1 and not keeps(last.point, criteria)):
        return None
    below = [(c, t[-1]) for c, t in ladder.items() if c < top and t[-1].point is not None]
    if below:
        before, earlier = below[-1]
        if _throughput(last) < _throughput(earlier) * (1 + GAIN) ** math.log2(top / before):
            return None
        if not keeps(last.point, criteria) and not keeps(earlier.point or last.point, criteria):
            return None  # two rungs beyond the SLO: the ceiling is high enough for any rate that meets it
    return Step(concurrency=int(top) * RUNG, why="throughput still grows")


def _next_rate(
    rungs: Sequence[tuple[float, Probe]], opened: Sequence[Probe], probes: Sequence[Probe],
    criteria: Sequence[Criterion], tolerance: float, demand: Demand,
) -> Step:  # fmt: skip
    """The next rate, or the end."""
    alone = _throughput(rungs[0][1])
    by_rate = _by_load(opened)
    untried = [rate for rate, tries in by_rate.items() if not tries[-1].proves and len(tries) < TRIES]
    if untried:
        return Step(rate=untried[0], why="once more, since that run proves nothing")
    spoilt = min((rate for rate, tries in by_rate.items() if not tries[-1].proves), default=math.inf)
    now = estimate(probes, criteria, demand)
    if now is None:
        first = _first_rate(rungs, probes, criteria, demand)
        rate = first if spoilt == math.inf else spoilt / 2
        if rate <= alone * IDLE / 2:
            return Step(why="no VALID run")
        return Step(rate=_round(rate), why="where the ladder and the trace's own bursts put it")
    shown = [p.evidence for p in opened if p.evidence is not None]
    if now.limit is SUSTAINED and now.missed and not _seen_full(shown, now.ceiling):
        why = f"the server gets {now.ceiling:.3g} req/s done: just below that, to see whether the SLO breaks first"
        return Step(rate=_round(FULL * now.ceiling), why=why)
    if (ended := _ended(now, tolerance)) is not None:
        return ended
    last = [p.rate for p in opened if p.rate is not None and p.proves][-1]
    if now.limit is SUSTAINED:
        rate, why = BEYOND * now.ceiling, f"the server gets {now.ceiling:.3g} req/s done: more than that, to be sure"
    else:
        tries = sum(p.proves for p in opened)
        place = 2 * math.modf(tries * (math.sqrt(5) - 1) / 2)[0] - 1
        rate = min(max(now.rate * math.exp(SPREAD * place), STEP_DOWN * last), STEP_UP * last, BEYOND * now.ceiling)
        why = f"{now.limit.name} should break near {now.rate:.3g} req/s"
    if rate <= alone * IDLE * 0.99 and not any(keeps(p.point, criteria) for p in opened if p.point is not None):
        if last <= alone * IDLE:
            return Step(why=f"at {last:g} req/s requests hardly meet, and the SLO is missed")
        rate = alone * IDLE * 0.99
    if rate >= spoilt:
        if last >= 0.95 * spoilt:
            return Step(why=f"runs at {spoilt:g} req/s are INVALID, and at {last:g} the SLO is kept")
        rate = (last + spoilt) / 2
    return Step(rate=_round(rate), why=why)


def _seen_full(shown: Sequence[Evidence], ceiling: float) -> bool:
    """Probes near the ceiling kept up, so that their requests say what the SLO allows there; or two did not."""
    near = [e for e in shown if abs(e.rate / ceiling / FULL - 1) <= 1 - FULL]
    return sum(not e.unstable for e in near) >= PROOFS or sum(e.unstable for e in near) >= TRIES


def _ended(now: Estimate, tolerance: float) -> Step | None:
    """The end, when the interval is narrow enough."""
    width = now.half_width
    if now.short and now.missed and now.probes >= FEWEST_PROBES:
        return Step(why=f"probes this short give no interval (--probe {SHORTEST_S:.0f}s and more do)")
    if width is None or not now.missed:
        return None
    words = f"{now.low:.4g} to {now.high:.4g} req/s"
    if width > tolerance:
        why = f"the interval {words} is as wide as this trace leaves it: only a longer trace narrows it"
        return Step(why=why) if now.settled else None
    return Step(why=f"the interval {words} is as narrow as was asked for", narrow=True)


def _first_rate(
    rungs: Sequence[tuple[float, Probe]], probes: Sequence[Probe], criteria: Sequence[Criterion], demand: Demand
) -> float:
    """Where the ladder puts capacity, and what the trace's own bursts leave of it at a limit on waiting."""
    kept = [p for _, p in rungs if p.point is not None and keeps(p.point, criteria)]
    missed = [p for _, p in rungs if p.point is not None and not keeps(p.point, criteria)]
    if not kept:
        return _throughput(rungs[0][1]) / 2
    best = max(kept, key=_throughput)
    if not missed or _throughput(missed[0]) <= _throughput(best):
        guess = FIRST * _throughput(best)
    else:
        low, high = _throughput(best), _throughput(missed[0])
        guess = FIRST * (low + (high - low) * _place(best.used, missed[0].used))
    for curve in _curves(probes, demand)[:1]:
        for criterion in criteria:
            waits = [limit for metric, limit in criterion.limits.items() if metric in ("ttft", "e2e")]
            if waits:
                guess = min(guess, curve.rate_at(min(waits), criterion.wanted))
    return guess


def _place(below: float, above: float) -> float:
    """How far from one load to the next the limit is used up, on a logarithmic scale of its use; 0.5 when not known."""
    if not (0 < below < 1 < above < math.inf):
        return 0.5
    return -math.log(below) / (math.log(above) - math.log(below))


def _round(rate: float) -> float:
    """Four digits: a rate that can be said."""
    return float(f"{rate:.4g}")
