"""One question of the fidelity report and its answer, what it is asked of, and what several questions share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from analysis import arrays
from analysis.arrays import Bools, Floats, Ints

EXACT = 0.01
"""What is not drawn may differ by this much: rounding to nanoseconds, arrivals on the edge of a window."""
LENGTH_BOUND = 0.02
POINTS_BOUND = 0.02
"""Prefix reuse may differ by two points."""
MIN_REQUESTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One question and its answer. ``ok`` None: not comparable, and ``said`` is why."""

    name: str
    ok: bool | None
    observed: str
    bound: str
    said: str

    def __post_init__(self) -> None:
        if self.ok is not None:
            object.__setattr__(self, "ok", bool(self.ok))  # numpy's own kind of truth is no JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Columns of a plan, in the order of its requests; not given is NaN."""

    scheduled_ns: Ints | None
    """null in a closed loop."""
    slice: Ints
    waits: Bools
    """Turns that are due when the one before them has ended."""
    input_tokens: Floats
    output_tokens: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What servers said of their prefix caches."""

    replicas: int
    queried_tokens: float | None
    """null when no server counts them."""
    hit_tokens: float | None
    fullest: float | None = None
    """Largest share of the KV cache in use."""
    cache_tokens: float | None = None
    """What the caches hold; null when the servers do not say."""


def not_comparable(name: str, why: str, observed: str = "not comparable") -> Fidelity:
    """An answer that is none, and why."""
    return Fidelity(name=name, ok=None, observed=observed, bound="", said=why)


def number(value: float | None) -> str:
    """Three digits, or that there is none."""
    return "not known" if value is None else f"{value:.3g}"


def ks_distance(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> float:
    """Kolmogorov-Smirnov distance of two samples, or of two lists of equally many quantiles."""
    a, b = arrays.ranked(a), arrays.ranked(b)
    largest = 0.0
    for points in (a, b):
        for part in arrays.blocks(len(points)):
            shares = [np.searchsorted(x, points[part], side="right") / len(x) for x in (a, b)]
            largest = max(largest, float(np.abs(shares[0] - shares[1]).max()))
    return largest


def backwards(slices: Ints, times: Ints | Floats | None) -> int:
    """Requests that come before the one before them in their slice."""
    if times is None or not len(slices):
        return 0
    found, latest = 0, arrays.filled(int(slices.max()) + 1, lambda _: -np.inf)
    for part in arrays.blocks(len(slices)):
        order = np.argsort(slices[part], kind="stable")
        which, time = slices[part][order], times[part][order]
        first = np.concatenate(([True], which[1:] != which[:-1]))
        before = np.where(first, latest[which], np.roll(time, 1))
        found += int(np.count_nonzero(time < before))
        last = np.roll(first, -1)
        latest[which[last]] = time[last]
    return found


def groups(values: Ints) -> tuple[int, int]:
    """How many different values there are, and how often the most frequent one occurs."""
    ranked, different, most, begun = arrays.ranked(values), 0, 0, 0
    for part in arrays.blocks(len(ranked)):
        begins = part.start + np.flatnonzero(np.diff(ranked[part], prepend=ranked[max(0, part.start - 1)]))
        different += len(begins)
        most = max(most, int(np.diff(begins, prepend=begun, append=part.stop).max()))
        begun = int(begins[-1]) if len(begins) else begun
    return different + bool(len(ranked)), most
