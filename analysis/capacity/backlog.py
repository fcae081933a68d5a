"""What arrivals alone say of queueing: how far behind a server of one constant pace would be with the same requests.

No server is that simple, and no figure of a report is a backlog. But a burst that makes one server late makes the other
late too, so the backlog of the requests that a probe sent, beside that of all requests of the trace, says whether the
probe met more or less than its share of bursts and long answers. `analysis.capacity.crossing` corrects by that.
Source: Lindley, Proceedings of the Cambridge Philosophical Society 48(2), 1952.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Floats, Ints

GRID = np.geomspace(0.02, 1.15, 500)
"""Rates at which the backlog of the trace is known, as shares of the pace."""
KEPT = 10_001
"""Of the backlogs at one rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests in the order of their arrival, s, with their lengths, tokens."""

    arrival_s: Floats
    input_tokens: Floats
    output_tokens: Floats
    into_session_s: Floats | None = None
    """Of sessions that wait: how long after its session's first each is due, which another rate leaves alone. None:
    another rate plays everything on another clock."""
    after: Ints | None = None
    """The request before each of its session, whose answer it waits for; -1: none. None: nobody waits."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests/s in the mean; NaN where there is no time."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) > 1 else 0.0
        return (len(self) - 1) / span_s if span_s > 0 else np.nan

    @property
    def requests_per_session(self) -> float:
        """Mean number of requests that wait for each other in a row; 1 where nobody waits."""
        return 1.0 if self.after is None else len(self) / max(int(np.count_nonzero(self.after < 0)), 1)

    def at(self, rate: float) -> Floats:
        """When each is due where the mean is ``rate`` requests/s, s; ascending but for sessions that wait."""
        slower, within = self.rate / rate, self.into_session_s
        return self.arrival_s * slower if within is None else (self.arrival_s - within) * slower + within

    def tokens(self, prompt_weight: float) -> Floats:
        """Output tokens + ``prompt_weight`` x input tokens of each request."""
        return self.output_tokens + prompt_weight * self.input_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Worked:
    """What ended within a stretch of a run in which load came all the time."""

    seconds: float
    requests: int
    input_tokens: float
    output_tokens: float

    def rate(self, prompt_weight: float, mean_tokens: float) -> float:
        """Requests of the trace's mean length per second."""
        return (self.output_tokens + prompt_weight * self.input_tokens) / mean_tokens / max(self.seconds, 1e-9)


def backlog_s(arrival_s: Floats, work: Floats, pace: float) -> Floats:
    """Seconds of work that each request finds before it, at ``pace`` work/s, from an empty server on."""
    if not len(arrival_s):
        return np.zeros(0)
    net = np.concatenate(([0.0], np.cumsum(work[:-1]))) / pace - arrival_s
    behind: Floats = net - np.minimum.accumulate(net)
    return behind


def backlog_of_sessions_s(due_s: Floats, work: Floats, after: Ints, pace: float) -> Floats:
    """The same where turns wait: each is due as long after the one before it as planned, and later by what that one
    waited. So a queue slows the sessions that stand in it. Each request has at most one that waits for it.
    """
    n = len(due_s)
    follower = np.full(n, -1)
    waits = np.flatnonzero(after >= 0)
    follower[after[waits]] = waits
    gap_s = np.where(follower >= 0, due_s[follower] - due_s, 0.0).tolist()
    costs_s, followers, behind, free_s = (work / pace).tolist(), follower.tolist(), [0.0] * n, 0.0
    first = np.flatnonzero(after < 0)
    starts = list(zip(due_s[first].tolist(), first.tolist(), strict=True))
    starts.sort(reverse=True)
    coming: list[tuple[float, int]] = []  # turns whose predecessor was taken up: few, so the heap is small
    while starts or coming:
        if starts and not (coming and coming[0] <= starts[-1]):
            (at_s, k), begins = starts.pop(), True
        else:
            (at_s, k), begins = coming[0], False
        wait_s = behind[k] = free_s - at_s if free_s > at_s else 0.0
        free_s = at_s + wait_s + costs_s[k]
        if (next_ := followers[k]) < 0:
            if not begins:
                heapq.heappop(coming)
        elif begins:
            heapq.heappush(coming, (at_s + wait_s + gap_s[k], next_))
        else:
            heapq.heapreplace(coming, (at_s + wait_s + gap_s[k], next_))
    return np.array(behind)


class Curve:
    """The backlog of a whole trace at every rate, for a server of one pace."""

    def __init__(self, demand: Demand, prompt_weight: float, pace: float) -> None:
        """``pace``: requests of the trace's mean length per second."""
        tokens = demand.tokens(prompt_weight)
        self.mean_tokens = max(float(tokens.mean()), 1e-9)
        self.prompt_weight, self.pace = prompt_weight, pace
        self.rates: Floats = GRID * pace
        """Requests/s of the grid."""
        self._demand = demand
        self._known: dict[int, Floats] = {}

    def of_trace(self, rate: float) -> Floats:
        """Backlog of each request of the trace, played so that its mean rate is ``rate``, s."""
        return self.of_part(self._demand.at(rate), self._demand)

    def of_part(self, due_s: Floats, demand: Demand) -> Floats:
        """The same for requests of the trace at times of their own."""
        work = demand.tokens(self.prompt_weight) / self.mean_tokens
        if demand.after is None:
            return backlog_s(due_s, work, self.pace)
        return backlog_of_sessions_s(due_s, work, demand.after, self.pace)

    def rate_at(self, level_s: float, wanted: float) -> float:
        """The rate at which the share ``wanted`` of the trace stays within a backlog; within the grid, req/s."""
        return self._where(lambda k: self._level_s(k, wanted), level_s)

    def rate_within(self, level_s: float, share: float) -> float:
        """The same rate, on a straight line between shares of the grid, not between their backlogs."""
        return self._where(lambda k: -self._share(k, level_s), -share)

    def _where(self, of: Callable[[int], float], value: float) -> float:
        """The rate of the grid at which a figure that rises with the rate comes to a value, by bisection."""
        above = bisect.bisect_right(range(len(GRID)), value, key=of)
        if above in (0, len(GRID)):
            return float(self.rates[min(above, len(GRID) - 1)])
        low, high = of(above - 1), of(above)
        place = (value - low) / (high - low) if high > low else 1.0
        return float(self.rates[above - 1] + place * (self.rates[above] - self.rates[above - 1]))

    def _level_s(self, k: int, share: float) -> float:
        return float(np.interp(share * (len(self._sorted(k)) - 1), np.arange(len(self._sorted(k))), self._sorted(k)))

    def _share(self, k: int, level_s: float) -> float:
        return float(np.searchsorted(self._sorted(k), level_s, side="right")) / len(self._sorted(k))

    def _sorted(self, k: int) -> Floats:
        """Backlogs at a rate of the grid, ascending; of many only as many as `KEPT`."""
        if k not in self._known:
            found = np.sort(self.of_trace(float(self.rates[k])))
            self._known[k] = (
                found[np.linspace(0, len(found) - 1, KEPT).astype(np.int64)] if len(found) > KEPT else found
            )
        return self._known[k]


_KNOWN: dict[tuple[int, float, float], Curve] = {}
_MOST_KNOWN = 16


def curve_of(demand: Demand, prompt_weight: float, pace: float) -> Curve:
    """`Curve`, worked out once: a search asks for the same one at every step."""
    key = (id(demand), prompt_weight, pace)  # the curve holds its demand, so the id stays its own
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = Curve(demand, prompt_weight, pace)
    return _KNOWN[key]
