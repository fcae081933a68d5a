"""When requests are due: drawn from an arrival process, or at the trace's own times, with more, fewer or finer ones.

**A process** is a renewal process of mean gap 1 (constant, exponential or gamma gaps) laid over the cumulative request
rate of the stages: arrival i is due where that rate has added up to the sum of the first i gaps. With exponential gaps
it is the exact non-homogeneous Poisson process. Draws are used as they fall: stretching them until the last lands on
n / rate, as other tools do, takes away the variance of the number of arrivals, which is what makes Poisson load hard.

**Thinning** (below the trace's rate) draws whole sessions, and requests without one, with the same probability p.
Bursts thin out with the rest (variance / mean of counts D becomes 1 + p (D - 1)); shared prefixes lose partners.

**Superposition** (above it) adds copies of all sessions and requests, each copy as a whole a little later (at most half
an hour and a twentieth of the trace, so that the time of day stays), wrapped over the trace's end. The fraction of a
copy is a thinned copy. Bursts do not fall onto bursts: demand grows by more users, not by bigger bursts. Made-up
prompts of a copy have a seed of their own: copies share no prefix, so the ideal hit rate is that of the trace (real
growth shares its system prompts: this is the careful side). Texts are sent word for word.

**Spreading** moves each arrival of a coarse clock to a uniform place within its step; order stays.

Source: vLLM ``benchmarks/serve.py`` (``get_request``) for the meaning of burstiness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError

Process = Literal["trace", "constant", "poisson", "gamma"]
"""Of these "trace" is not drawn: the trace's own times."""
MOST_ARRIVALS = 50_000_000
"""A plan of more requests than this is a typing error."""

_BLOCK = 65536
_NS_LIMIT = 2**63 / 1e9
_DURATION = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0}

Times = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stretch of time with a request rate that is constant or changes linearly."""

    duration_s: float | None
    """null: until the requests are used up."""
    rate: float
    """Requests/s at its start."""
    end_rate: float
    """Requests/s at its end; equal to ``rate`` in a constant stage."""

    @property
    def requests(self) -> float:
        """Expected number of requests in it; infinite without an end."""
        return math.inf if self.duration_s is None else self.duration_s * (self.rate + self.end_rate) / 2


def constant_stage(rate: float, duration_s: float | None = None) -> tuple[Stage, ...]:
    """One stage of ``rate`` requests/s for ``duration_s`` (null: without end)."""
    return (Stage(duration_s=duration_s, rate=rate, end_rate=rate),)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Stages from ``2m@4,5m@8``; ``2m@4..8`` climbs linearly from 4 to 8 requests/s, ``30s@0`` is a pause.

    Raises `UsageError` for anything else.
    """
    stages = []
    for part in text.split(","):
        match = re.fullmatch(
            r"(\d+(?:\.\d+)?)(ms|s|m|h|)@(\d+(?:\.\d+)?)(?:\.\.(\d+(?:\.\d+)?))?", part.strip(), re.ASCII
        )
        duration_s = float(match[1]) * _DURATION[match[2]] if match else 0.0
        if match is None or not 0 < duration_s < 1e8:
            raise UsageError(
                f"stage {part.strip()!r}: write duration@rate, several with commas, like 2m@4,5m@8; 2m@4..8 climbs"
            )
        rate = float(match[3])
        stages.append(Stage(duration_s=duration_s, rate=rate, end_rate=rate if match[4] is None else float(match[4])))
    if not any(stage.requests for stage in stages):
        raise UsageError(f"stages {text!r}: every rate is 0, so nothing would be sent")
    return tuple(stages)


def arrival_times(
    process: Process, stages: Sequence[Stage], *, burstiness: float = 1.0, seed: int = 0, most: int | None = None
) -> Times:
    """Arrival times, ns after the start, ascending: all that fall into the stages, at most ``most`` of them.

    ``burstiness`` is the shape of the gamma gaps: 1 is Poisson, below 1 burstier (the gaps' coefficient of variation is
    1 / sqrt of it). Constant arrivals begin at 0, others after a first gap. Equal arguments give equal times, from one
    generator, PCG64 of (``seed``, "arrivals"); ``most`` cuts and changes none.

    Raises `UsageError` for a burstiness without meaning and more arrivals than `MOST_ARRIVALS` or 64-bit ns hold.
    """
    check_burstiness(process, burstiness)
    expected = min(sum(stage.requests for stage in stages), math.inf if most is None else most)
    if expected > MOST_ARRIVALS:
        raise UsageError(f"about {expected:.3g} requests: more than {MOST_ARRIVALS:,} are no plan; check rate and time")
    ends = np.cumsum([stage.requests for stage in stages])  # of each stage, in requests since the start
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"arrivals"]))
    found, made, reached = [np.empty(0, dtype=np.int64)], 0, 0.0
    while reached < ends[-1] and (most is None or made < most):
        gaps = _gaps(process, burstiness, generator, _BLOCK)
        if process == "constant" and not made:
            gaps[0] = 0.0
        gaps[0] += reached
        position = np.cumsum(gaps)
        reached = float(position[-1])
        left = None if most is None else most - made
        found.append(_times(position[position < ends[-1]][:left], stages, ends))
        made += len(found[-1])
    return np.concatenate(found)


def check_burstiness(process: Process, burstiness: float | None) -> None:
    """Raise `UsageError` unless ``process`` can be drawn with this burstiness."""
    if burstiness is None:
        return
    if not (math.isfinite(burstiness) and burstiness > 0):
        raise UsageError(f"burstiness is {burstiness:g}, must be a number above 0 (1 is Poisson, below 1 burstier)")
    if burstiness != 1.0 and process != "gamma":
        raise UsageError(f"burstiness is the shape of gamma gaps and means nothing for {process} arrivals")


def _gaps(process: Process, shape: float, generator: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    if process == "constant":
        return np.ones(n)
    if process == "poisson":
        return generator.standard_exponential(n)
    return generator.standard_gamma(shape, n) / shape


def _times(positions: npt.NDArray[np.float64], stages: Sequence[Stage], ends: npt.NDArray[np.float64]) -> Times:
    """Where the cumulative rate of the stages reaches each position, ns."""
    starts_s = np.cumsum([0.0, *(stage.duration_s or 0.0 for stage in stages[:-1])])
    inside = np.searchsorted(ends, positions, side="right")
    beyond = positions - np.concatenate(([0.0], ends[:-1]))[inside]
    rate = np.array([stage.rate for stage in stages])[inside]
    slope = np.array([(s.end_rate - s.rate) / s.duration_s if s.duration_s else 0.0 for s in stages])[inside]
    # The root of slope / 2 t^2 + rate t = beyond in the form that needs no case for slope 0 and loses no digits.
    below = rate + np.sqrt(np.maximum(rate * rate + 2.0 * slope * beyond, 0.0))
    into_s = np.divide(2.0 * beyond, below, out=np.zeros_like(beyond), where=below > 0)
    times_s = starts_s[inside] + into_s
    if len(times_s) and times_s[-1] >= _NS_LIMIT:
        raise UsageError("the last request would be due in more than 292 years: the rate is too low")
    times: Times = np.rint(times_s * 1e9).astype(np.int64)
    return times


# --- the own times of a trace ---------------------------------------------------------------------------------------

MOST_SHIFT_NS = 1800 * 1_000_000_000
MOST_SHIFT = 20
"""A shift is at most the span over this: what a session hangs over the end is missing at the beginning."""
MOST_GROWTH = 100
"""A plan of more copies than this says nothing about any demand."""

Bools = npt.NDArray[np.bool_]


class Units(NamedTuple):
    """What stays together, for each row: its session, or the row alone."""

    starts: Times
    """First arrival of its unit, ns."""
    places: npt.NDArray[np.uint64]
    """A random number, the same for all rows of a unit."""


class TracePass(NamedTuple):
    """One reading of the trace for a plan: which copy its requests belong to, and the rows it takes."""

    copy: int
    rows: Bools
    """Whether each row is taken, in trace order; none after its end."""
    prompts: int | None = None
    """Copies with the same number here share made-up prefixes; null: the number is that of the copy."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Requests of a plan that is not the trace in its order."""

    scheduled: Times
    part: npt.NDArray[np.unsignedinteger[Any]]
    """Which of ``parts`` the request comes from: its next row."""
    parts: list[TracePass]
    rows: Times | None = None
    """Row of the trace of each request, where a part's are not sent in the order of the trace."""

    @property
    def overlap(self) -> bool:
        """Whether copies lie over each other; else one is over when the next begins, and so are its sessions."""
        copies = np.array([part.copy for part in self.parts])
        return bool((np.diff(copies[self.part]) < 0).any())


def parse_growth(text: str) -> float:
    """Demand as a multiple of the trace's from ``3x``, ``0.5``, ``+200%`` or ``-20%``. Raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)x?|([+-]\d+(?:\.\d+)?)%", text.strip(), re.ASCII)
    growth = 0.0 if match is None else float(match[1]) if match[1] else round(1 + float(match[2]) / 100, 9)
    if not 0 < growth <= MOST_GROWTH:
        raise UsageError(f"growth {text!r}: write 3x, 0.5x, +200% or -20% (above 0, at most {MOST_GROWTH}x)")
    return growth


def period_of(arrivals: Times) -> int:
    """Time from one beginning of the trace to the next, ns: its span and one mean gap.

    Raises `UsageError` when all rows arrive at one instant.
    """
    n, span = len(arrivals), int(arrivals[-1])
    if not span:
        raise UsageError("all rows arrive at one instant: there is no time to repeat, superpose or cut")
    return span + max(span // (n - 1), 1)


def arrange(arrivals: Times, units: Units, growth: float, seed: int) -> Arrangement:
    """The requests of a demand ``growth`` times the trace's: thinned below 1, superposed above.

    Raises `UsageError` for a growth of no meaning, when nothing is left, and when all arrive at one instant.
    """
    if not 0 < growth <= MOST_GROWTH:
        raise UsageError(f"demand times {growth:g}: must be above 0 and at most {MOST_GROWTH}")
    n = len(arrivals)
    period = period_of(arrivals) if growth > 1 else int(arrivals[-1]) + 1
    copies = math.ceil(round(growth, 9))
    shifts = _shifts(copies, period, seed)
    parts: list[TracePass] = []
    times: list[Times] = []
    for copy in range(copies):
        least = None if growth - copy >= 1 - 1e-9 else np.uint64((growth - copy) * 2**64)
        drawn = np.ones(n, np.bool_) if least is None else units.places < least
        wraps = units.starts >= period - shifts[copy]
        for taken, shift in ((drawn & wraps, shifts[copy] - period), (drawn & ~wraps, shifts[copy])):
            if taken.any():
                parts.append(TracePass(copy, taken))
                times.append(arrivals[taken] + shift)
    if not times:
        raise UsageError(f"thinning to {growth:g} of the demand left no request: keep more, or another seed")
    every, whose = np.concatenate(times), np.repeat(np.arange(len(times), dtype=np.uint16), [len(t) for t in times])
    order = np.argsort(every, kind="stable")
    return Arrangement(every[order], whose[order], parts)


def _shifts(copies: int, period: int, seed: int) -> list[int]:
    """How much later each copy is, ns: one in each of as many equal ranges, so that no two are close; the first not."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"copies"]))
    width = longest_shift_ns(period) / copies
    return [0] + [round((copy + float(generator.random())) * width) for copy in range(1, copies)]


def longest_shift_ns(span_ns: int) -> int:
    """The most that a copy of a trace of this span is shifted by, ns."""
    return min(span_ns // MOST_SHIFT, MOST_SHIFT_NS)


def spread(arrivals: Times, grid_s: float, seed: int) -> Times:
    """Arrivals moved from each instant to uniform places before the next step of the clock; ascending, order kept."""
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"spread"]))
    grid_ns = round(grid_s * 1e9)
    instants, group = np.unique(arrivals, return_inverse=True)
    # A clock's jitter makes a step now and then a little short: nothing may move past the next instant.
    room = np.minimum(np.diff(instants, append=instants[-1] + grid_ns), grid_ns)
    places = generator.random(len(arrivals))
    places = places[np.lexsort((places, group))]
    moved: Times = arrivals + (places * room[group]).astype(np.int64)
    return moved
