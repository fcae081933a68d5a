"""Fleets that change: an autoscaler that goes by a gauge, a schedule, and replicas that fail.

The autoscaler is Kubernetes' HPA (autoscaling/v2) with its default behaviour, over a sum of vLLM's gauges as KEDA's
Prometheus scaler hands it on (an ``AverageValue``): it wants the sum over the target, nothing else within a tolerance
of 10 %, at most four more or twice as many at once, and gives back only what no decision of the last five minutes
wanted. After Kubernetes' documentation of the Horizontal Pod Autoscaler; not compared with its code.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

TOLERANCE = 0.1
MORE_AT_ONCE = 4
Gauge = Literal["in flight", "waiting"]
"""Of requests: those that wait or run, or those that wait (``vllm:num_requests_waiting``); summed over replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaler:
    """What it goes by. Raises ValueError for one that could want nothing or anything."""

    least: int
    most: int
    gauge: Gauge
    target: float
    """Of the gauge, for each replica."""
    every_s: float = 15.0
    """Between decisions."""
    hold_s: float = 300.0
    """It gives back what no decision of so long wanted."""

    def __post_init__(self) -> None:
        if not (1 <= self.least <= self.most and self.target > 0 and self.every_s > 0 and self.hold_s >= 0):
            raise ValueError(f"no autoscaler can go by this: {self}")

    def wanted(self, at_s: float, total: float, replicas: int, before: deque[tuple[float, int]]) -> int:
        """How many replicas there shall be, when ``replicas`` serve or start and the gauge sums up to ``total``.

        ``before``: earlier decisions and their times, for it to keep.
        """
        ratio = total / (self.target * replicas) if replicas else math.inf
        n = replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(total / self.target - 1e-9)
        n = max(self.least, min(n, self.most, max(2 * replicas, replicas + MORE_AT_ONCE)))
        before.append((at_s, n))
        while before[0][0] < at_s - self.hold_s:
            before.popleft()
        return n if n >= replicas else min(replicas, max(one for _, one in before))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedReplicas:
    """How many replicas there shall be from each moment on; before the first as many as there are."""

    at_s: Sequence[float]
    """Ascending."""
    replicas: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Replicas that are gone from one moment to the next, with their requests and caches; others start at once."""

    mean_s: float | None = None
    """Between failures of one replica that answers; exponential. None: none by chance."""
    seed: int = 0
    at_s: Sequence[tuple[float, int]] = ()
    """Stated ones: when, and the number of the replica, counted in the order in which they were asked for."""

    def after_s(self, replica: int) -> float:
        """How long a replica answers until it fails by chance; inf: for good."""
        if self.mean_s is None:
            return math.inf
        return float(np.random.default_rng([self.seed, replica, 23]).exponential(self.mean_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """How the replicas of a fleet change."""

    start_s: float
    """From asking for a replica until it answers."""
    scaling: Autoscaler | PlannedReplicas | None = None
    """None: there are always as many, but for those that start again."""
    failures: Failures = Failures()
