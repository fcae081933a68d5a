"""The rate at which an SLO is just met, from probes around it: what was measured, corrected by what they met.

A probe of a minute meets by chance more or fewer bursts and long answers than the trace has, and its share of requests
within the SLO says more about that than about the server. So each probe's requests are laid beside the whole trace by
one figure that the plan alone gives, their backlog at a server of constant pace (`analysis.capacity.backlog`):

1. over the probes near the crossing together, find the backlog beyond which as many of their requests lie as missed
   the SLO;
2. capacity is the rate at which the wanted share of the *whole trace* stays within that backlog.

The server decides the first step, the trace the second. A regression estimator: where the backlog is a poor guide the
estimate is as good as the shares themselves, and the interval is as wide as what the backlog leaves unexplained between
the windows of the probes. Source: Cochran, Sampling Techniques, chapter 7 (regression estimators), 1977.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.capacity.backlog import Curve, Demand
from harness.analysis.stats.autocorrelation import student_t

PROMPT_WEIGHTS = (0.0, 0.005, 0.02, 0.08)
"""Work of a prompt token in output tokens; the one that explains the probes best is taken."""
NEAR = 0.5
"""Probes within this of the crossing decide, as a difference of logarithms of rates."""
FEWEST_PROBES = 5
FEWEST_S = 280.0
"""Of measured load in probes that decide: below, there is no interval, since a few bursts more would change it."""
SHORTEST_S = 40.0
"""Of one probe: a shorter one begins with an empty server and ends before a burst has passed: no interval."""
TRACE_PARTS = 40
STEP_DOWN = 0.5
"""Where requests miss without a backlog before them, the crossing is below all probes: this share of the lowest."""
SETTLED = 0.5
WIDER = 1.25
"""The interval over Student's t of the windows: they share a server, a pace and a curve that are themselves estimates.
Set so that intervals cover in the laboratory (tests/lab/capacity.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One probe, request by request: planned times and lengths, and whether the measured ones kept each limit."""

    rate: float
    """Requests/s that were planned, at the clock of the whole trace."""
    sent: Demand
    """All requests of the probe, its warm-up among them."""
    measured: Bools
    kept: tuple[Bools, ...]
    """By criterion, of the measured requests."""
    window: Ints
    """Of the measured requests, which window of the trace each is of."""
    unstable: bool
    """Its backlog only grew: it meets no SLO, however many of its requests were within the limits."""
    cached_tokens: float | None = None
    """Mean per measured request that an unlimited prefix cache finds in the plan; None: the trace states no reuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """Where one criterion comes down to the share wanted, req/s."""

    rate: float
    low: float | None
    high: float | None
    probes: int
    """That decided."""
    requests: int
    seconds: float
    """Of measured load in them."""
    missed: bool
    """Some request of them missed it: else ``rate`` is only the highest that was seen to be kept."""
    short: bool
    """The probes are too short for an interval."""
    settled: bool
    """What is left is the trace's own chance: more probes hardly narrow the interval, a longer trace would."""


def crossing(curves: Sequence[Curve], probes: Sequence[Evidence], k: int, wanted: float) -> Crossing | None:
    """Where criterion ``k`` comes down to ``wanted``; None without a stable probe. One curve for each prompt weight."""
    stable = [probe for probe in probes if not probe.unstable and probe.measured.any()]
    if not stable:
        return None
    found = [_fit(curve, stable, k, wanted) for curve in curves]
    best = min(found, key=lambda fit: fit.error)
    low, high, own = None, None, _own(best)
    seconds = sum(_span_s(p) for p in best.near)
    short = seconds < SHORTEST_S * len(best.near)
    if best.missed and len(best.near) >= FEWEST_PROBES and seconds >= FEWEST_S and not short:
        low, high = _ends(best, wanted, own)
    return Crossing(
        rate=best.rate, low=low, high=high, probes=len(best.near),
        requests=sum(int(p.measured.sum()) for p in best.near), seconds=seconds,
        missed=best.missed, short=short, settled=best.error <= SETTLED * own,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """The crossing by one curve."""

    curve: Curve
    near: Sequence[Evidence]
    rate: float
    level_s: float
    error: float
    """95 % reach of the log odds of the share that is kept."""
    missed: bool


def _fit(curve: Curve, probes: Sequence[Evidence], k: int, wanted: float) -> _Fit:
    behind = {id(p): curve.of_part(p.sent.arrival_s, p.sent)[p.measured] for p in probes}
    rate, near = 0.0, list(probes)
    for _ in range(4):
        kept = np.concatenate([p.kept[k] for p in near])
        met = np.concatenate([behind[id(p)] for p in near])
        share = float(kept.mean())
        level_s = float(np.quantile(met, share)) if share < 1 else float(met.max())
        new = curve.rate_at(level_s, wanted)
        if share >= 1:
            new = max(new, max(p.rate for p in near))
        elif share < wanted and level_s <= 0:  # missed by requests that found nothing before them: no queue explains it
            new = STEP_DOWN * min(p.rate for p in near)
        if abs(new - rate) <= 1e-3 * new:
            break
        rate = new
        near = _near(probes, rate, k)
    error = _error(near, behind, k, level_s)
    return _Fit(curve=curve, near=near, rate=rate, level_s=level_s, error=error, missed=share < 1)


def _near(probes: Sequence[Evidence], rate: float, k: int) -> list[Evidence]:
    """Those within `NEAR` of a rate, the nearest two at least; where they missed nothing, the nearest that did, too."""
    order = sorted(probes, key=lambda p: abs(math.log(p.rate / rate)))
    near = [p for i, p in enumerate(order) if i < 2 or abs(math.log(p.rate / rate)) <= NEAR]
    if all(p.kept[k].all() for p in near):
        near += [p for p in order[len(near) :] if not p.kept[k].all()][:1]
    return near


def _span_s(probe: Evidence) -> float:
    times = probe.sent.arrival_s[probe.measured]
    return float(times[-1] - times[0]) if len(times) > 1 else 0.0


def _error(probes: Sequence[Evidence], behind: dict[int, Floats], k: int, level_s: float) -> float:
    """95 % reach of the log odds of the share that is kept, from the misses that the backlog does not explain.

    By probes and by windows, whichever varies more. The level is fitted to the misses, so it explains a single burst by
    its own making: beside the clusters that hold a miss, or should, one more counts as if nothing explained its misses.
    """
    missed = [~p.kept[k] for p in probes]
    over = [behind[id(p)] > level_s for p in probes]
    share = float(np.concatenate(missed).mean())
    if not 0 < share < 1:
        return math.inf
    reach = 0.0
    for by_window in (False, True):
        place, count = [], 0
        for p in probes:
            at = p.window - p.window.min() if by_window else np.zeros(len(p.window), dtype=np.int64)
            place.append(at + count)
            count += int(at.max()) + 1
        where = np.concatenate(place)
        sizes = np.bincount(where)
        did, would = (np.bincount(where, weights=np.concatenate(x)) for x in (missed, over))
        did, would, sizes = did[sizes > 0], would[sizes > 0], sizes[sizes > 0]
        clusters, telling = len(sizes), int(np.count_nonzero(did + would))
        if clusters < 2:
            return math.inf
        plain = did - share * sizes
        left = did - would - (did - would).sum() / sizes.sum() * sizes
        square = (telling * float(left @ left) + float(plain @ plain)) / (telling + 1) * clusters / (clusters - 1)
        reach = max(reach, student_t(clusters - 1) * math.sqrt(square) / sizes.sum())
    return reach / (share * (1 - share))


def _own(fit: _Fit) -> float:
    """95 % reach of the log odds of the share that the whole trace keeps, which is itself one realisation."""
    within = (fit.curve.of_trace(fit.rate) <= fit.level_s).astype(np.float64)
    parts = np.array([part.sum() for part in np.array_split(within - within.mean(), TRACE_PARTS)])
    share = min(max(float(within.mean()), 0.5 / len(within)), 1 - 0.5 / len(within))
    return 2 * math.sqrt(float(parts @ parts)) / len(within) / (share * (1 - share))


def _ends(fit: _Fit, wanted: float, own: float) -> tuple[float, float]:
    """Rates at which the trace would be as far from the share wanted as the pooled share may be off."""
    curve, rate, level_s, error = fit.curve, fit.rate, fit.level_s, fit.error
    reach = WIDER * math.hypot(error, own)
    # as log odds, which do not end at 1
    odds = math.log(wanted / (1 - wanted)) if wanted < 1 else 12.0
    upper, lower = (1 / (1 + math.exp(-(odds + side * min(reach, 20.0)))) for side in (1, -1))
    low, high = (curve.rate_within(level_s, share) for share in (upper, lower))
    return min(low, rate), max(high, rate)
