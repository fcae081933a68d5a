"""One question of the fidelity report and its answer, what it is asked of, and what several questions share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def not_comparable(name: str, why: str, observed: str = "not comparable") -> Fidelity:
    """An answer that is none, and why."""
    return Fidelity(name=name, ok=None, observed=observed, bound="", said=why)


def number(value: float | None) -> str:
    """Three digits, or that there is none."""
    return "not known" if value is None else f"{value:.3g}"


def ks_distance(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> float:
    """Kolmogorov-Smirnov distance of two samples, or of two lists of equally many quantiles."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate((a, b))
    shares = [np.searchsorted(x, at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max(initial=0.0))


def backwards(slices: Ints, times: Ints | Floats | None) -> int:
    """Requests that come before the one before them in their slice."""
    if times is None or not len(slices):
        return 0
    order = np.argsort(slices, kind="stable")
    which, time = slices[order], times[order]
    return int(np.count_nonzero((which[1:] == which[:-1]) & (time[1:] < time[:-1])))


def groups(values: Ints) -> tuple[int, int]:
    """How many different values there are, and how often the most frequent one occurs."""
    counts = np.unique(values, return_counts=True)[1]
    return len(counts), int(counts.max(initial=0))
