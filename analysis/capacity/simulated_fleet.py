"""The smallest fleet that meets an SLO in every minute of a demand, by replaying it on an engine fitted to runs.

Nothing here was measured: the figures are simulated. The demand is replayed as it was, and in resamples of it, since
what is bought must serve another day with other luck: each request comes a Poisson number of times (mean 1, or the
growth; the Poisson bootstrap, Hanley and MacGibbon 2006), near its own time: as far from it as the rate is even, so
that what was chance in the demand does not count twice. A fleet is large enough when the demand itself and at least
95 % of the resamples meet the SLO in every minute.

A fleet that follows the demand is replayed in the same way. A new instance takes its share of new requests from the
moment it answers, and none that already wait elsewhere; one that is given back takes no new requests, finishes what
it has, and does not come back: the next one begins empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np

from harness.analysis.arrays import Bools, Floats
from harness.analysis.capacity.fitted_engine import (
    Changes,
    Engine,
    FittedEngine,
    NotFittedError,
    ObservedRun,
    Requests,
    ServedTimes,
    confirmed,
    delayed,
    fit_engine,
    within,
)
from harness.analysis.capacity.fleet import MINUTE_S, Kept, Schedule
from harness.analysis.stats.intervals import samples_needed
from harness.slo import Criterion

MOST_SCALED_STEPS = 20_000_000
"""Of one replay of a fleet that follows the demand."""
RESAMPLES = 20
MISSES = 0.05
"""Of the resamples, so many may miss the SLO in some minute."""
MOST_STEPS = 30_000_000
"""Of all replays by one fleet together, about: a longer demand is resampled less often, `FEWEST` times at least, and
only its busiest half hours are."""
FEWEST = 10
"""With fewer a fleet that misses the SLO on one day of three would pass too often."""
NEAR = 2
"""A copy of a request may come at least about as far away as the second-next request."""
EVEN_SCALES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
FEWEST_PAIRS = 8
STRETCH_S = 1800.0
QUIET = 0.6
"""A half hour whose worst minute asks for less than this share of the worst of all is not replayed."""
LARGEST = 4
"""Times the fluid answer: where not even that many replicas meet the SLO, no number does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedFleet:
    """The smallest fleet by replay. Simulated, never measured."""

    replicas: int
    evidence: Literal["simulated"] = "simulated"
    engine: FittedEngine
    replayed: int
    """Requests of one replay."""
    left_out: int
    """Those of the demand in less busy half hours, which were not replayed."""
    resamples: int
    missed: int
    """Of them, those in which this fleet misses the SLO in some minute."""
    worst_share: float
    """The lowest share of requests in any judged minute that kept a criterion, when the demand itself is replayed."""
    one_fewer_missed: int | None
    """Of the replays with one replica fewer, those that were seen to miss the SLO before it was given up; None: one
    replica is the least there is."""


def size_fleet(
    runs: Sequence[ObservedRun], demand: Requests, factor: float, criteria: Sequence[Criterion], engine: Engine,
    likely: int, seed: int = 0, progress: Callable[[str], object] = str,
) -> SimulatedFleet:  # fmt: skip
    """The smallest fleet for ``factor`` times the demand.

    ``likely``: where to begin the search, such as the fluid answer. ``progress``: told of every size that was tried.
    Raises `NotFittedError` where no engine can be fitted or trusted, or no fleet meets the SLO.
    """
    fitted = confirmed(fit_engine(runs), engine, runs, criteria)
    busy = demand.chosen(_busy(demand, fitted, factor, likely))
    times = int(np.clip(MOST_STEPS / steps_of(busy, fitted, factor, likely), FEWEST, RESAMPLES))
    progress(f"{len(busy):,} requests are replayed, and {times} resamples of them, on fleets of about {likely}")
    reach_s, most = even_s(busy.arrival_s) if len(busy) else 0.0, math.floor(MISSES * times)

    def demands() -> Iterator[Requests]:
        if factor == 1:
            yield busy
        for k in range(times):
            yield resampled(busy, factor, reach_s, np.random.default_rng([seed, k]))

    def worst_of(requests: Requests, replicas: int) -> tuple[float, bool]:
        served = delayed(engine(fitted, requests, replicas), fitted.overhead_s)
        return _worst_minute(requests, served, criteria)

    def tell(replicas: int, *, enough: bool) -> bool:
        progress(f"{replicas} replica{'' if replicas == 1 else 's'}: {'enough' if enough else 'not enough'}")
        return enough

    @cache
    def first(replicas: int) -> tuple[float, bool]:
        return worst_of(next(demands()), replicas)

    @cache
    def maybe(replicas: int) -> bool:
        """Whether the first replay meets the SLO."""
        return first(replicas)[1] or tell(replicas, enough=False)

    @cache
    def missed(replicas: int) -> int:
        """Resamples that miss the SLO, counted up to one too many."""
        count = 0
        for number, requests in enumerate(demands()):
            _, kept = worst_of(requests, replicas) if number else first(replicas)
            count += not kept
            if number == 0 and not kept and factor == 1:  # the demand itself
                count = most + 1
            if count > most:
                break
        tell(replicas, enough=count <= most)
        return count

    # one replay tells most sizes that are not enough; only near the answer all are worth their time
    found = _smallest(lambda replicas: missed(replicas) <= most, _smallest(maybe, max(1, likely)))
    return SimulatedFleet(
        replicas=found, engine=fitted, replayed=len(busy), left_out=len(demand) - len(busy),
        resamples=times, missed=missed(found), worst_share=first(found)[0],
        one_fewer_missed=missed(found - 1) if found > 1 else None,
    )  # fmt: skip


def _worst_minute(requests: Requests, served: ServedTimes, criteria: Sequence[Criterion]) -> tuple[float, bool]:
    """The lowest share of any judged minute, and whether every minute keeps every criterion."""
    if not len(requests):
        return 1.0, True
    shares = [
        (float(share_by_minute(requests.arrival_s, within(requests, served, one), one.wanted).min()), one.wanted)
        for one in criteria
    ]
    return min(1.0, *(share for share, _ in shares)), all(share >= wanted for share, wanted in shares)


def _smallest(enough: Callable[[int], bool], likely: int) -> int:
    """Outwards from a likely answer in steps of 1, 1, 2, 4 ..., then by halving what lies between."""
    low, high, step = 0, likely, 1
    while not enough(high):
        low, high, step = high, high + max(1, step // 2), 2 * step
        if high > LARGEST * likely + 4:
            raise NotFittedError(f"not even {low} replicas keep the SLO in every minute of the replayed demand")
    step = 1
    while high - low > 1:
        middle = max(high - step, (low + high) // 2)
        if enough(middle):
            high, step = middle, 2 * step
        else:
            low = middle
    return high


def follow(
    fitted: FittedEngine, demand: Requests, factor: float, criteria: Sequence[Criterion], engine: Engine,
    plan: Schedule, *, spares: int = 0, per_instance: int = 1, seed: int = 0,
) -> Kept:  # fmt: skip
    """``factor`` times the demand on the instances that ``plan`` has up, and ``spares`` beside them.

    Of a demand that would take more than `MOST_SCALED_STEPS`, half hours evenly spread over it are replayed.
    """
    began_s = demand.arrival_s[0]
    requests = demand.chosen(_affordable(demand, fitted, factor, per_instance * int(plan.target.max() + spares)))
    if factor != 1:
        requests = resampled(requests, factor, even_s(requests.arrival_s), np.random.default_rng([seed, 0]))
    changes = Changes(
        at_s=began_s + MINUTE_S * np.arange(len(plan.target)), replicas=(plan.target + spares) * per_instance,
        start_s=plan.start_s, fails_s=plan.fails_s,
    )  # fmt: skip
    served = delayed(engine(fitted, requests, changes), fitted.overhead_s)
    found = [(within(requests, served, one), one.wanted) for one in criteria]
    kept, wanted = min(found, key=lambda pair: float(pair[0].mean()) - pair[1])
    return Kept(
        share=float(kept.mean()), worst_minute=float(share_by_minute(requests.arrival_s, kept, wanted).min()),
        promised=all(bool(one.mean() >= least) for one, least in found), replayed=len(requests),
    )  # fmt: skip


def _affordable(demand: Requests, fitted: FittedEngine, factor: float, replicas: int) -> Bools:
    stretch = ((demand.arrival_s - demand.arrival_s[0]) // STRETCH_S).astype(np.int64)
    every = math.ceil(steps_of(demand, fitted, factor, replicas) / MOST_SCALED_STEPS)
    return np.asarray(stretch % every == 0)


def share_by_minute(arrival_s: Floats, kept: Bools, wanted: float) -> Floats:
    """Of the requests of each minute, the share that kept a limit: by the time they came, in order.

    Minutes of fewer than ceil(ln 0.05 / ln ``wanted``) requests are joined with those that follow, the rest with the
    last: as many as a percentile needs to be printed, since of ten requests one late says little of 95 %.
    """
    least = samples_needed(wanted) if wanted < 1 else 1
    minute = ((arrival_s - arrival_s[0]) // MINUTE_S).astype(np.int64)
    minute = np.unique(minute, return_inverse=True)[1]
    counts, good = np.bincount(minute), np.bincount(minute, weights=kept)
    sums = [[0.0, 0.0]]
    for count, ok in zip(counts, good, strict=True):
        if sums[-1][0] >= least:
            sums.append([0.0, 0.0])
        sums[-1][0] += count
        sums[-1][1] += ok
    if len(sums) > 1 and sums[-1][0] < least:
        n, m = sums.pop()
        sums[-1][0] += n
        sums[-1][1] += m
    return np.array([m / n for n, m in sums])


def resampled(demand: Requests, factor: float, reach_s: float, rng: np.random.Generator) -> Requests:
    """Another day like it: each request comes a Poisson number of times, ``factor`` in the mean, up to ``reach_s`` (or
    about as far as the second-next request, if that is more) from its own time.
    """
    n = len(demand)
    source = np.repeat(np.arange(n), rng.poisson(factor, n))
    place, first_s, last_s = np.arange(n), demand.arrival_s[0], demand.arrival_s[-1]
    near_s = demand.arrival_s[np.minimum(place + NEAR, n - 1)] - demand.arrival_s[np.maximum(place - NEAR, 0)]
    most_s = np.maximum(near_s / 2, reach_s)[source]
    arrival_s = demand.arrival_s[source] + (2 * rng.random(len(source)) - 1) * most_s
    arrival_s = first_s + np.abs(arrival_s - first_s)  # what falls off an end is laid back from it
    arrival_s = np.maximum(first_s, last_s - np.abs(last_s - arrival_s))
    order = np.argsort(arrival_s, kind="stable")
    return replace(demand.chosen(source[order]), arrival_s=arrival_s[order])


def even_s(arrival_s: Floats) -> float:
    """How far apart two moments may be between which the rate of a demand does not differ by more than chance, s; 0: it
    has bursts at every scale.

    Counts of neighbouring bins of 1, 2, 4 ... 64 s: the sum of (a - b)^2 over that of (a + b) is 1 for Poisson
    arrivals, give or take sqrt(2 / pairs), and more where bursts begin and end. The last scale before it is more by two
    of these.
    """
    found = 0.0
    for scale_s in EVEN_SCALES_S:
        counts = np.bincount(((arrival_s - arrival_s[0]) // scale_s).astype(np.int64))
        counts = counts[: len(counts) // 2 * 2].reshape(-1, 2).astype(np.float64)
        pairs = int(np.count_nonzero(counts.sum(axis=1)))
        if pairs < FEWEST_PAIRS:
            break
        ratio = float((np.diff(counts, axis=1) ** 2).sum() / counts.sum())
        if ratio > 1 + 2 * math.sqrt(2 / pairs):
            break
        found = scale_s
    return found


def steps_of(requests: Requests, fitted: FittedEngine, factor: float, replicas: int) -> float:
    """About how many steps a replay takes: one for each token where hardly two sequences run at once, else as many as
    the time holds, in steps as long as the mean number of sequences makes them.
    """
    span_s = len(np.unique(requests.arrival_s // MINUTE_S)) * MINUTE_S
    tokens = factor * float(requests.output_tokens.sum())
    base_s, each_s = max(fitted.base_s, 1e-6), fitted.per_sequence_s
    # b sequences of one replica give b tokens in base + b x each: b = tokens/s x base / (1 - tokens/s x each)
    free = max(0.0, 1 - tokens / (replicas * span_s) * each_s)
    longest = replicas * span_s * max(free / base_s, 1 / (base_s + each_s * fitted.max_num_seqs))
    return max(1.0, min(tokens, longest))


def _busy(demand: Requests, fitted: FittedEngine, factor: float, replicas: int) -> Bools:
    """Which requests come in a half hour that can decide: its worst minute asks for enough of the worst of all. Of many
    the busiest, as far as `MOST_STEPS` go.
    """
    since_s = demand.arrival_s - demand.arrival_s[0]
    token_s = fitted.per_sequence_s + fitted.base_s / fitted.max_num_seqs
    work_s = token_s * demand.output_tokens + fitted.per_prompt_token_s * demand.input_tokens
    minute, stretch = ((since_s // unit_s).astype(np.int64) for unit_s in (MINUTE_S, STRETCH_S))
    minutes = round(STRETCH_S / MINUTE_S)
    whole = int(minute[-1]) // minutes + 1
    worst = np.bincount(minute, weights=work_s, minlength=whole * minutes).reshape(whole, minutes).max(axis=1)
    chosen, steps = np.zeros(whole, dtype=np.bool_), 0.0
    for k in np.argsort(-worst, kind="stable"):
        steps += (FEWEST + 1) * steps_of(demand.chosen(stretch == k), fitted, factor, replicas)
        if worst[k] < QUIET * worst.max() or (steps > MOST_STEPS and chosen.any()):
            break
        chosen[k] = True
    return np.asarray(chosen[stretch])
