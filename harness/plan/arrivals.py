"""Arrival processes: when the requests of an open loop are due, drawn from a seed before the clock starts.

An arrival process here is a renewal process of mean gap 1 (constant, exponential or gamma gaps) laid over the
cumulative request rate of the stages: arrival i is due where that rate has added up to the sum of the first i gaps. At
a constant rate these are the plain constant, Poisson and gamma processes; with exponential gaps and any stages it is
the exact non-homogeneous Poisson process.

Draws are used as they fall. Stretching them until the last lands on n / rate, as other tools do, takes away the
variance of the number of arrivals, which is what makes Poisson load hard.

Source: vLLM ``benchmarks/serve.py`` (``get_request``) for the meaning of burstiness.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from harness.errors import UsageError
from harness.trace.spool import Column

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

    ``constant``: the first at 0, then evenly. ``poisson``, ``gamma``: the first after a first gap. ``burstiness`` is
    the shape of the gamma gaps: 1 is Poisson, below 1 burstier (the gaps' coefficient of variation is 1 / sqrt of it).

    Equal arguments give equal times; ``most`` cuts and changes none. One generator, PCG64 from (``seed``, "arrivals").

    Raises `UsageError` for a burstiness that is not positive or has no meaning, stages without end and without
    ``most``, and more arrivals than `MOST_ARRIVALS` or than 64-bit nanoseconds hold.
    """
    check_burstiness(process, burstiness)
    expected = min(sum(stage.requests for stage in stages), math.inf if most is None else most)
    if expected > MOST_ARRIVALS:
        raise UsageError(f"about {expected:.3g} requests: more than {MOST_ARRIVALS:,} are no plan; check rate and time")
    ends = np.cumsum([stage.requests for stage in stages])  # of each stage, in requests since the start
    generator = np.random.Generator(np.random.PCG64([seed & (2**64 - 1), *b"arrivals"]))
    times = Column("q")
    reached = 0.0
    while reached < ends[-1] and (most is None or len(times) < most):
        gaps = _gaps(process, burstiness, generator, _BLOCK)
        if process == "constant" and not len(times):
            gaps[0] = 0.0
        gaps[0] += reached
        position = np.cumsum(gaps)
        reached = float(position[-1])
        left = None if most is None else most - len(times)
        times.extend(_times(position[position < ends[-1]][:left], stages, ends))
    return times.whole()


def check_burstiness(process: Process, burstiness: float | None) -> None:
    """Raise `UsageError` unless ``process`` can be drawn with this burstiness."""
    if burstiness is None:
        return
    if not (math.isfinite(burstiness) and burstiness > 0):
        raise UsageError(f"burstiness is {burstiness:g}, must be a number above 0 (1 is Poisson, below 1 burstier)")
    if burstiness != 1.0 and process != "gamma":
        raise UsageError(f"burstiness is the shape of gamma gaps and means nothing for {process} arrivals")


def _gaps(process: Process, shape: float, generator: np.random.Generator, n: int) -> npt.NDArray[np.float64]:
    """Gaps of mean 1."""
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
