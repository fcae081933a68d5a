"""What arrivals alone say of queueing: how far behind a server of one constant pace would be with the same requests.

No server is that simple, and no figure of a report is a backlog. But a burst that makes one server late makes the other
late too, so the backlog of the requests that a probe sent, beside that of all requests of the trace, says whether the
probe met more or less than its share of bursts and long answers. `analysis.sizing.crossing` corrects by that.
Source: Lindley, Proceedings of the Cambridge Philosophical Society 48(2), 1952.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.arrays import Floats

GRID = np.geomspace(0.02, 1.15, 80)
"""Rates at which the backlog of the trace is known, as shares of the pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Requests in the order of their arrival, s, with their lengths, tokens."""

    arrival_s: Floats
    input_tokens: Floats
    output_tokens: Floats

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests/s in the mean; NaN where there is no time."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) > 1 else 0.0
        return (len(self) - 1) / span_s if span_s > 0 else np.nan

    def tokens(self, prompt_weight: float) -> Floats:
        """Output tokens + ``prompt_weight`` x input tokens of each request."""
        return self.output_tokens + prompt_weight * self.input_tokens


def backlog_s(arrival_s: Floats, work: Floats, pace: float) -> Floats:
    """Seconds of work that each request finds before it, at ``pace`` work/s, from an empty server on."""
    if not len(arrival_s):
        return np.zeros(0)
    net = np.concatenate(([0.0], np.cumsum(work[:-1]))) / pace - arrival_s
    behind: Floats = net - np.minimum.accumulate(net)
    return behind


class Curve:
    """The backlog of a whole trace at every rate, for a server of one pace."""

    def __init__(self, demand: Demand, prompt_weight: float, pace: float) -> None:
        """``pace``: requests of the trace's mean length per second."""
        tokens = demand.tokens(prompt_weight)
        self.mean_tokens = max(float(tokens.mean()), 1e-9)
        self.prompt_weight, self.pace = prompt_weight, pace
        self._demand, self._work = demand, tokens / self.mean_tokens
        self._known: dict[float, Floats] = {}

    @property
    def rates(self) -> Floats:
        """Requests/s of the grid."""
        grid: Floats = GRID * self.pace
        return grid

    def of_trace(self, rate: float) -> Floats:
        """Backlog of each request of the trace, played so that its mean rate is ``rate``, s."""
        return backlog_s(self._demand.arrival_s * (self._demand.rate / rate), self._work, self.pace)

    def of_part(self, arrival_s: Floats, demand: Demand) -> Floats:
        """The same for requests of the trace at times of their own."""
        return backlog_s(arrival_s, demand.tokens(self.prompt_weight) / self.mean_tokens, self.pace)

    def levels(self, wanted: float) -> Floats:
        """By rate of the grid, the backlog that the share ``wanted`` of the trace does not exceed, s."""
        if wanted not in self._known:
            found = [float(np.quantile(self.of_trace(rate), wanted)) for rate in self.rates.tolist()]
            self._known[wanted] = np.maximum.accumulate(found)
        return self._known[wanted]

    def rate_at(self, level_s: float, wanted: float) -> float:
        """The rate at which the share ``wanted`` of the trace stays within a backlog; within the grid, req/s."""
        levels, rates = self.levels(wanted), self.rates
        if level_s >= levels[-1]:
            return float(rates[-1])
        above = int(np.searchsorted(levels, level_s, side="right"))
        if above == 0:
            return float(rates[0])
        low, high = float(levels[above - 1]), float(levels[above])
        place = (level_s - low) / (high - low) if high > low else 1.0
        return float(rates[above - 1] + place * (rates[above] - rates[above - 1]))

    def shares(self, level_s: float) -> Floats:
        """By rate of the grid, the share of the trace within a backlog; it falls with the rate."""
        found = [float((self.of_trace(rate) <= level_s).mean()) for rate in self.rates.tolist()]
        return np.minimum.accumulate(found)


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
