"""The part of a run in which load and speed stay what they are: without ramp, without drain, without drift.

Ramp and drain move a price: what they do to that of a measured run is in tests/test_steady.py. In an open loop requests
in flight that grow are a queue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.arrays import Floats
from analysis.likeness import long_run_variance
from analysis.trend import without_trend

PLATEAU = 0.9
"""Share of the level that counts as being at it."""
NOISE = 2.0
FEWEST_BINS = 20
SHORTEST_S = 10.0
SMALLEST_PART = 0.25
"""Of the run: a shorter plateau is a peak."""
DRIFT_BLOCK, DRIFT_CRITICAL = 0.1, 3.75
"""99 % point of the largest partial sum over its error, for 100 bins or more without drift whose neighbours are alike
(correlation 0.5); measured again by tests/test_steady.py. High, since lines between changes also take out noise."""
DRIFT_LEVEL = 0.01
LARGEST_DRIFT = 0.10
"""A change that is real but smaller than this is said, and no reason to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """Where a run is steady, or why it is not.

    ``first`` and ``last`` are bins: the window is ``bins[first:last]``. ``drift`` is the largest change between thirds
    of the window, as a share of its mean, by series; ``drifting`` names the series whose change is beyond chance
    (`DRIFT_LEVEL`) and beyond `LARGEST_DRIFT`.
    """

    start_s: float | None
    end_s: float | None
    first: int
    last: int
    level: float | None
    """Requests in flight on the plateau."""
    drift: dict[str, float]
    drifting: list[str]
    reason: str | None

    @property
    def found(self) -> bool:
        """A steady window exists."""
        return self.reason is None

    @property
    def duration_s(self) -> float | None:
        """Length of the window; None without one."""
        return None if self.start_s is None or self.end_s is None else self.end_s - self.start_s


def steady_window(in_flight: Floats, tokens: Floats, *, start_s: float, bin_s: float) -> Steady:
    """The steady window of a run in equal bins of ``bin_s`` from ``start_s`` on.

    ``in_flight``: requests in flight, time average per bin (or a server's running batch). ``tokens``: output tokens per
    bin (or any work done). The level is the median of ``in_flight`` as requests see it (each bin weighted by its
    requests), so a long ramp or drain does not lower it. The window reaches from the first to the last bin within 10 %
    of the level, or within twice the noise of the plateau where that is more. Then neither series may drift: the
    largest partial sum of deviations (OLS-CUSUM, Ploberger and Kraemer, Econometrica 60(2), 1992) over its batch-means
    error about the trend (`analysis.trend`), at the 1 % level. With drift the window is still given, beside the reason.
    """
    total = len(in_flight)
    if total != len(tokens):
        raise ValueError(f"{total} bins of requests in flight, {len(tokens)} of tokens")
    whole = float(in_flight.sum()) if total else 0.0
    if not (whole > 0 and math.isfinite(whole) and np.isfinite(tokens).all()):
        return _none("nothing was in flight")
    level = _level(in_flight)
    at_level = np.flatnonzero(in_flight >= min(PLATEAU * level, level - NOISE * _noise(in_flight, level)))
    first, last = int(at_level[0]), int(at_level[-1]) + 1
    bins, seconds = last - first, (last - first) * bin_s
    if bins < FEWEST_BINS or seconds < SHORTEST_S:
        return _none(f"too short: {seconds:.3g} s at its level, needs {SHORTEST_S:g} s and {FEWEST_BINS} bins", level)
    if bins < SMALLEST_PART * total:
        return _none(f"only {bins / total:.0%} of the run is at its level: a peak", level)
    changes = {name: _drift(values[first:last]) for name, values in (("in_flight", in_flight), ("tokens", tokens))}
    drifting = [name for name, (size, beyond) in changes.items() if beyond and size > LARGEST_DRIFT]
    said = " and ".join(f"{name.replace('_', ' ')} by {changes[name][0]:.0%}" for name in drifting)
    return Steady(
        start_s=start_s + first * bin_s,
        end_s=start_s + last * bin_s,
        first=first,
        last=last,
        level=level,
        drift={name: size for name, (size, _) in changes.items()},
        drifting=drifting,
        reason=f"drift within the window: {said}" if drifting else None,
    )


def _level(in_flight: Floats) -> float:
    """Median of the requests in flight, each bin weighted by its requests."""
    order = np.argsort(in_flight, kind="stable")
    cumulative = np.cumsum(in_flight[order])
    return float(in_flight[order][np.searchsorted(cumulative, cumulative[-1] / 2)])


def _noise(in_flight: Floats, level: float) -> float:
    """Spread of the bins on the plateau: from the bins above the level, which ramp and drain cannot reach."""
    above = in_flight[in_flight >= level] - level
    return 1.4826 * float(np.median(above)) if len(above) else 0.0


def _drift(values: Floats) -> tuple[float, bool]:
    """(largest change between thirds as a share of the mean, whether the series changes beyond chance)."""
    mean = float(values.mean())
    if mean <= 0:
        return 0.0, False
    thirds = [float(part.mean()) for part in np.array_split(values, 3)]
    deviations = values - mean
    largest = float(np.abs(np.cumsum(deviations)).max())
    error = math.sqrt(long_run_variance(without_trend(values), DRIFT_BLOCK))
    return (max(thirds) - min(thirds)) / mean, largest > max(DRIFT_CRITICAL * error, 1e-9 * mean * len(values))


def _none(reason: str, level: float | None = None) -> Steady:
    return Steady(
        start_s=None, end_s=None, first=0, last=0, level=level, drift={}, drifting=[], reason=reason
    )  # fmt: skip
