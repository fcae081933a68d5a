"""How long a queue remembers: what a run of an open loop must outlast before its figures have an interval.

Requests that share a queue are alike for as long as the queue takes to forget a stretch of heavy load. Near capacity
that is far longer than a few requests, and a short run that saw no bad stretch does not show it. So the time is taken
from what a short run does know: how much work came and how unevenly, and how fast the server works when it is fullest.
For a queue in heavy traffic with spare speed m (work/s) and work that comes with variance S (work^2/s) the integrated
time of the queue is 2 S / m^2; for requests that do not wait for each other the same formula gives about their service
time. The longer of that and of the integrated time of the requests in flight counts.
Sources: Whitt, Management Science 35(11), 1989 (how long a queue must be watched, by its load); Geyer, Statistical
Science 7(4), 1992 (initial monotone sequence).

Bursts of arrivals: in how many stretches of a run more came than in the rest, beyond what single arrivals explain.

The counts are cut into blocks of one rate each: the cut that makes them most likely as Poisson counts, each block at a
price. Source: optimal partition, Jackson et al., IEEE Signal Processing Letters 12(2), 2005; Scargle et al.,
Astrophysical Journal 764, 2013 (Bayesian blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats, Ints

PRICE = 5.0
"""Logarithm of how much likelier the counts must be for one block more. Of Poisson runs 6 % are cut at all."""


def bursts_seen(came: Floats) -> int:
    """Stretches of equal bins in which requests came faster than in the mean of the run; 0 for an even run.

    ``came``: requests in each bin. A stretch is of one block or several; one at an end of the run counts.
    """
    edges = _blocks(came)
    if len(edges) <= 2:
        return 0
    passed = np.concatenate(([0.0], np.cumsum(came)))
    fast = np.diff(passed[edges]) / np.diff(edges) > came.mean()
    return int(fast[0]) + int((~fast[:-1] & fast[1:]).sum())


def _blocks(came: Floats) -> Ints:
    """Edges of the blocks, from 0 to the number of bins."""
    n = len(came)
    passed, at = np.concatenate(([0.0], np.cumsum(came))), np.arange(n + 1.0)
    best, start = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        count = passed[end] - passed[:end]
        gain = best[:end] + count * np.log(np.maximum(count, 1e-9) / (end - at[:end])) - PRICE
        start[end] = int(gain.argmax())
        best[end] = gain[start[end]]
    edges = [n]
    while edges[-1] > 0:
        edges.append(int(start[edges[-1]]))
    return np.array(edges[::-1])


FULLEST = 0.1
"""Share of the run with most requests in flight that shows how fast the server can work."""
ONE_SIDED = 1.645
"""Standard errors by which the load may have been higher than this run saw: 95 %."""
ONE_SIDED_BURSTY = 0.5
"""The same of arrivals in bursts, of which a few would allow any load: 69 %."""
UNLUCKY = (1.28, 0.84, 0.42, 0.0, -0.84, -ONE_SIDED)
"""Standard errors by which this run may have been luckier than the next: the first that any length is enough for. 1.28
(90 %), so that with what else this run does not know the next is long enough in four of five. That no length is enough
is said only when the load is too high even if this run saw more of it than 95 % of runs do."""
FEWEST_TIMES = 8.0
"""Integrated times (each two relaxation times of an exponential memory) that a run must outlast, at the longest that
its own data allow."""
UNEVEN = 2.0
"""Long-run variance over mean of the arrivals beyond which they come in bursts: 99 % of Poisson runs have less."""
FEWEST_BURSTS = 7
"""Bursts that a run must show: a third of those that come are too short to be seen, so about ten."""
FEWEST_BURST_TIMES = 120.0
"""Or so many integrated times of its arrivals: they are too short to be told apart, and then there are many."""
FEWEST_BURSTY_TIMES = 5.0
"""Integrated times that a run in bursts must outlast: ten relaxation times."""
BURSTS_AHEAD = 14
"""Bursts that the advice to run longer asks for, by the rate at which this run showed them."""
CLOCKWORK = 0.1
"""Of the unevenness of equal requests that come as Poisson arrivals: below it load is as even as a clock."""
FEWEST_BINS, FEWEST_REQUESTS = 20, 20
"""Below these a run tells nothing about its memory."""
LONGEST_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """The memory of one run, as integrated times (1 + 2 x the sum of all autocorrelations) in s."""

    observed_s: float
    """Time in which requests came."""
    time_s: float
    """Best guess; inf: more work came than the server could do."""
    longest_s: float
    """What the load may really have been taken into account, and how uneven arrivals in bursts really are."""
    needed_s: float | None
    """So long must a run be at this load; None: no length is enough."""
    requests: int

    @property
    def enough(self) -> bool:
        """The run is long enough for intervals."""
        return self.needed_s is not None and self.observed_s >= self.needed_s

    @property
    def alike(self) -> float:
        """Requests that the queue makes alike: a share of ``n`` requests is worth ``n / (1 + alike)`` of independent
        ones at the most.
        """
        return math.sqrt(self.time_s * self.longest_s) * self.requests / self.observed_s

    @property
    def note(self) -> str | None:
        """Why there is no interval; None: there is."""
        if self.enough:
            return None
        if self.needed_s is None:
            seen = f"by what {self.observed_s:.0f} s show"
            return f"no interval: {seen}, the server is too close to its limit at this load, however long the run"
        needed = f"{self.needed_s:.0f} s" if self.needed_s < 90 else f"{math.ceil(self.needed_s / 60)} min"
        return f"no interval: needs about {needed} at this load, has {self.observed_s:.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """The memory of a closed loop: requests that are in flight together share a server, and its queue never grows."""

    concurrency: int
    """Requests in flight."""

    @property
    def alike(self) -> float:
        """Requests that are alike: those in flight."""
        return float(self.concurrency)

    @property
    def note(self) -> str | None:
        """Why there is no interval: there is."""
        return None


Memory = Relaxation | ClosedLoop


def relaxation_s(series: Floats, bin_s: float) -> float | None:
    """Integrated autocorrelation time of a series in equal bins, s; at least one bin. None below `FEWEST_BINS` bins."""
    return integrated_time(series) * bin_s if len(series) >= FEWEST_BINS else None


def integrated_time(series: Floats) -> float:
    """1 + 2 x the sum of autocorrelations, in places of the series, at least 1: Geyer's initial monotone sequence."""
    n = len(series)
    beyond = series - series.mean()
    power = np.fft.rfft(beyond, 1 << (2 * n - 1).bit_length())
    products = np.fft.irfft(np.abs(power) ** 2)[:n]
    if n < 2 or products[0] <= 1e-12 * n * float(np.square(series).max(initial=0.0)):
        return 1.0
    pairs = (products[0 : n - 1 : 2] + products[1:n:2]) / products[0]
    ends = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: ends[0]] if len(ends) else pairs)
    return max(1.0, 2 * float(pairs.sum()) - 1)


def relaxation(
    *, in_flight: Floats, came: Floats, work_came: Floats, work_done: Floats, bin_s: float
) -> Relaxation | None:
    """The memory of an open loop, from series in equal bins of ``bin_s``; None for a run too short to tell.

    ``in_flight``: requests in flight, ``came``: requests sent, ``work_came``: their work (output tokens),
    ``work_done``: the work that the server did. Bins after the last request that came count for the work done only.
    """
    bins = int(np.flatnonzero(came)[-1]) + 1 if came.any() else 0
    if bins < FEWEST_BINS or came.sum() < FEWEST_REQUESTS:
        return None
    came, work_came = came[:bins], work_came[:bins]
    # white noise has a time of one bin, however long that is: only what goes beyond a bin was seen
    observed_s, seen_s = bins * bin_s, (integrated_time(in_flight) - 1) * bin_s
    arrivals, single = integrated_time(came), float(came.var() / came.mean())
    bursts_s = 0.0
    if single * arrivals > UNEVEN:  # without the noise of single arrivals, which hides how long bursts are
        arrivals = max(arrivals, (single * arrivals - 1) / max(single - 1, 1e-9))
        bursts_s = arrivals * bin_s
    # a few bursts tell little of how uneven arrivals really are
    doubt = 1 + ONE_SIDED * math.sqrt(4 * arrivals / bins) if bursts_s else 1.0
    load = float(work_came.sum()) / observed_s
    unevenness = float(work_came.var()) * integrated_time(work_came) / bin_s
    fullest = np.argsort(in_flight, kind="stable")[-max(5, round(FULLEST * len(in_flight))) :]
    spare = float(work_done[fullest].mean()) / bin_s - load

    stretches = work_came[: bins // FEWEST_BINS * FEWEST_BINS].reshape(FEWEST_BINS, -1).sum(axis=1)
    if stretches.var() < CLOCKWORK * stretches.mean() ** 2 * FEWEST_BINS / came.sum():
        spare, unevenness = 1.0, 0.0  # a load that never changes shows no spare speed: the requests in flight must tell

    def queue_s(more: float, doubt: float = doubt) -> float:
        """The queue's time if the load were higher by ``more`` standard errors of a second."""
        left = spare - more * math.sqrt(doubt * unevenness)
        return max(seen_s, 2 * doubt * unevenness / left**2 + bursts_s) if left > 0 else math.inf

    longest_s = queue_s((ONE_SIDED_BURSTY if bursts_s else ONE_SIDED) / math.sqrt(observed_s))
    times = FEWEST_BURSTY_TIMES if bursts_s else FEWEST_TIMES
    shortest_s = bin_s
    if bursts_s and bins < FEWEST_BURST_TIMES * arrivals:
        bursts = bursts_seen(came[:-1])  # requests came for a part of the last bin only
        shortest_s = observed_s if bursts >= FEWEST_BURSTS else observed_s * BURSTS_AHEAD / max(1, bursts)
    needed_s: float | None = observed_s
    if observed_s < max(shortest_s, times * longest_s):
        ahead = (_ahead_s(queue_s, observed_s, shortest_s, times, unlucky) for unlucky in UNLUCKY)
        needed_s = next((found for found in ahead if found is not None), None)
    return Relaxation(
        observed_s=observed_s,
        time_s=queue_s(0.0, doubt=1.0),
        longest_s=longest_s,
        needed_s=needed_s,
        requests=int(came.sum()),
    )


def _ahead_s(
    queue_s: Callable[[float], float], observed_s: float, shortest_s: float, times: float, unlucky: float
) -> float | None:
    """How long a run to come must be, longer than this one: it will see another load, and so did this one."""
    run_s = max(shortest_s, 1.1 * observed_s)
    while run_s < LONGEST_S:
        more = ONE_SIDED / math.sqrt(run_s) + unlucky * math.sqrt(1 / run_s + 1 / observed_s)
        if times * queue_s(more) <= run_s:
            return run_s
        run_s *= 1.05
    return None
