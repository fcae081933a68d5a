"""The smallest fleet that meets an SLO in every minute of a demand, by replaying it on an engine fitted to runs.

Nothing here was measured: the figures are simulated. The demand is replayed as it was, and in resamples of it, since
what is bought must serve another day with other luck: each request comes a Poisson number of times (mean 1, or the
growth; the Poisson bootstrap, Hanley and MacGibbon 2006), near its own time: as far from it as the rate is even, so
that what was chance in the demand does not count twice. A fleet is large enough when the demand itself and at least
95 % of the resamples meet the SLO in every minute.

A fleet that follows the demand is replayed in the same way. A new instance takes its share of new requests from the
moment it answers, and none that already wait elsewhere; one that is given back takes no new requests and finishes what
it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.arrays import Bools, Floats
from analysis.capacity.fitted_engine import (
    Engine,
    FittedEngine,
    NotFittedError,
    ObservedRun,
    Requests,
    confirmed,
    delayed,
    fit_engine,
    within,
)
from analysis.capacity.fleet import Kept, Schedule
from analysis.stats.intervals import samples_needed
from harness.slo import Criterion

MOST_SCALED_STEPS = 20_000_000
"""Of one replay."""


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
    replicas = (plan.up(requests.arrival_s - began_s) + spares) * per_instance
    owner = np.arange(len(requests)) % replicas
    served = delayed(engine(fitted, requests, int(replicas.max(initial=1)), owner), fitted.overhead_s)
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


MINUTE_S = 60.0
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
    evidence: str
    """Always "simulated"."""
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


def _silent(_: str) -> None:
    pass


def size_fleet(
    runs: Sequence[ObservedRun], demand: Requests, factor: float, criteria: Sequence[Criterion], engine: Engine,
    likely: int, seed: int = 0, progress: Callable[[str], None] = _silent,
) -> SimulatedFleet:  # fmt: skip
    """The smallest fleet for ``factor`` times the demand.

    ``likely``: where to begin the search, such as the fluid answer. ``progress``: told of every size that was tried.
    Raises `NotFittedError` where no engine can be fitted or trusted, or no fleet meets the SLO.
    """
    fitted = confirmed(fit_engine(runs), engine, runs, criteria)
    busy = demand.chosen(_busy(demand, fitted, factor, likely))
    times = _resamples(busy, fitted, factor, likely)
    progress(f"{len(busy):,} requests are replayed, and {times} resamples of them, on fleets of about {likely}")
    replays = _Replays(fitted, engine, criteria, busy, factor, times, seed, progress)
    # one replay tells most sizes that are not enough; only near the answer all are worth their time
    found = _smallest(replays.enough, _smallest(replays.maybe, max(1, likely)))
    fewer = replays.missed(found - 1)[0] if found > 1 else None
    missed, worst = replays.missed(found)
    return SimulatedFleet(
        replicas=found, evidence="simulated", engine=fitted, replayed=len(busy), left_out=len(demand) - len(busy),
        resamples=times, missed=missed, worst_share=worst, one_fewer_missed=fewer,
    )  # fmt: skip


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


class _Replays:
    """Replays of one demand by fleets of any size, each size asked once."""

    def __init__(
        self, fitted: FittedEngine, engine: Engine, criteria: Sequence[Criterion], demand: Requests, factor: float,
        resamples: int, seed: int, progress: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.progress = progress
        self.fitted, self.engine, self.criteria = fitted, engine, criteria
        self.demand, self.factor, self.resamples, self.seed = demand, factor, resamples, seed
        self.most = math.floor(MISSES * resamples)
        self.reach_s = even_s(demand.arrival_s) if len(demand) else 0.0
        self._seen: dict[int, tuple[int, float]] = {}
        self._first: dict[int, tuple[float, bool]] = {}

    def maybe(self, replicas: int) -> bool:
        """Whether the first replay meets the SLO."""
        if replicas not in self._first:
            self._first[replicas] = self._worst(next(self._demands()), replicas)
            if not self._first[replicas][1]:
                self.progress(f"{replicas} replica{'' if replicas == 1 else 's'}: not enough")
        return self._first[replicas][1]

    def enough(self, replicas: int) -> bool:
        return self.missed(replicas)[0] <= self.most

    def missed(self, replicas: int) -> tuple[int, float]:
        """Resamples that miss the SLO, counted up to one too many, and the worst share of the demand itself."""
        if replicas not in self._seen:
            missed, worst = 0, math.nan
            for number, requests in enumerate(self._demands()):
                known = self._first.get(replicas) if number == 0 else None
                share, kept = known or self._worst(requests, replicas)
                if number == 0:
                    worst = share
                missed += not kept
                if missed > self.most or (number == 0 and not kept and self.factor == 1):
                    missed = max(missed, self.most + 1)
                    break
            self._seen[replicas] = missed, worst
            enough = "enough" if missed <= self.most else "not enough"
            self.progress(f"{replicas} replica{'' if replicas == 1 else 's'}: {enough}")
        return self._seen[replicas]

    def _demands(self) -> Iterator[Requests]:
        if self.factor == 1:
            yield self.demand
        for k in range(self.resamples):
            yield resampled(self.demand, self.factor, self.reach_s, np.random.default_rng([self.seed, k]))

    def _worst(self, requests: Requests, replicas: int) -> tuple[float, bool]:
        if not len(requests):
            return 1.0, True
        served = delayed(self.engine(self.fitted, requests, replicas), self.fitted.overhead_s)
        worst, kept = 1.0, True
        for one in self.criteria:
            shares = share_by_minute(requests.arrival_s, within(requests, served, one), one.wanted)
            worst = min(worst, float(shares.min()))
            kept &= bool(shares.min() >= one.wanted)
        return worst, kept


def share_by_minute(arrival_s: Floats, kept: Bools, wanted: float) -> Floats:
    """Of the requests of each minute, the share that kept a limit: by the time they came, in order.

    Minutes of fewer than ceil(ln 0.05 / ln ``wanted``) requests are joined with those that follow, the rest with the
    last: as many as a percentile needs to be printed, since of ten requests one late says little of 95 %.
    """
    least = samples_needed(wanted) if wanted < 1 else 1
    minute = ((arrival_s - arrival_s[0]) // MINUTE_S).astype(np.int64)
    minute = np.unique(minute, return_inverse=True)[1]
    counts, good = np.bincount(minute), np.bincount(minute, weights=kept)
    n = m = 0.0
    all_n, all_m = [0.0], [0.0]
    for count, ok in zip(counts, good, strict=True):
        n, m = n + count, m + ok
        if n >= least:
            all_n.append(n)
            all_m.append(m)
            n = m = 0.0
    all_n[-1] += n
    all_m[-1] += m
    return np.array([m / n for n, m in zip(all_n, all_m, strict=True) if n])


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
    again = demand.chosen(source[order])
    return Requests(
        arrival_s=arrival_s[order], input_tokens=again.input_tokens, output_tokens=again.output_tokens
    )  # fmt: skip


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


def _work_s(requests: Requests, fitted: FittedEngine) -> Floats:
    """What each request takes of one full replica."""
    token_s = fitted.per_sequence_s + fitted.base_s / fitted.max_num_seqs
    return token_s * requests.output_tokens + fitted.per_prompt_token_s * requests.input_tokens


def _busy(demand: Requests, fitted: FittedEngine, factor: float, replicas: int) -> Bools:
    """Which requests come in a half hour that can decide: its worst minute asks for enough of the worst of all. Of many
    the busiest, as far as `MOST_STEPS` go.
    """
    since_s = demand.arrival_s - demand.arrival_s[0]
    by_minute = np.bincount((since_s // MINUTE_S).astype(np.int64), weights=_work_s(demand, fitted))
    whole = math.ceil(len(by_minute) * MINUTE_S / STRETCH_S)
    padded = np.zeros(whole * round(STRETCH_S / MINUTE_S))
    padded[: len(by_minute)] = by_minute
    worst = padded.reshape(whole, -1).max(axis=1)
    stretch = (since_s // STRETCH_S).astype(np.int64)
    chosen, steps = np.zeros(whole, dtype=np.bool_), 0.0
    for k in np.argsort(-worst, kind="stable"):
        steps += (FEWEST + 1) * steps_of(demand.chosen(stretch == k), fitted, factor, replicas)
        if worst[k] < QUIET * worst.max() or (steps > MOST_STEPS and chosen.any()):
            break
        chosen[k] = True
    return np.asarray(chosen[stretch])


def _resamples(demand: Requests, fitted: FittedEngine, factor: float, replicas: int) -> int:
    return int(np.clip(MOST_STEPS / steps_of(demand, fitted, factor, replicas), FEWEST, RESAMPLES))
