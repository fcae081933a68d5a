"""Service-level objectives: the keys and criteria of an SLO (`RunSpec.slo`, limits in seconds by key).

``ttft``, ``tpot``, ``e2e``, ``itl_max`` alone limit every request: together they are one criterion, which a share of
requests (``attain``) must meet. ``ttft_p99`` is a criterion of its own: 99 % of requests meet that limit. All requests
that were offered count: failed, refused and unfinished ones met nothing. So a percentile is judged by a share, which
every sample supports, and never by an order statistic that it may not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.errors import UsageError, unknown_name

SLO_METRICS = ("ttft", "tpot", "e2e", "itl_max")
LOWEST, HIGHEST = 50.0, 99.9
"""Percentiles that an SLO may name."""
_KEY = re.compile(r"(?P<metric>[a-z0-9_]+?)(?:_p(?P<percent>\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One part of an SLO: the share ``wanted`` of all offered requests meets every limit."""

    name: str
    """In words."""
    wanted: float
    limits: Mapping[str, float] = field(default_factory=dict)
    """Seconds by metric."""


def split_key(key: str) -> tuple[str, float | None]:
    """(metric, share) of a key: ``ttft_p99`` is ("ttft", 0.99), ``ttft`` is ("ttft", None). Raises `UsageError`."""
    match = _KEY.fullmatch(key)
    metric, percent = (match["metric"], match["percent"]) if match else (key, None)
    if metric not in SLO_METRICS:
        raise unknown_name("SLO metric", key, SLO_METRICS)
    if percent is None:
        return metric, None
    if not LOWEST <= float(percent) <= HIGHEST:
        raise UsageError(f"SLO {key}: a percentile from p{LOWEST:g} to p{HIGHEST:g}")
    return metric, round(float(percent) / 100, 9)


def nearest_key(key: str) -> str:
    """``key`` as it is written here when it names one known metric and at most a percentile: ``ttft_p99`` from
    ``p99_ttft``, ``TTFT-p99`` or ``ttft.p(99)``. Any other key as it is.
    """
    words = re.findall(r"itl_max|[a-z]+|\d+(?:\.\d+)?", key.lower())
    metrics = [word for word in words if word in SLO_METRICS]
    numbers = [word for word in words if word[0].isdigit()]
    rest = set(words) - set(metrics) - set(numbers) - {"p"}
    if len(metrics) != 1 or len(numbers) > 1 or rest or ("p" in words) != bool(numbers):
        return key
    return f"{metrics[0]}_p{numbers[0]}" if numbers else metrics[0]


def check_slo(slo: Mapping[str, float]) -> None:
    """Raise `UsageError` for an unknown key or a limit that is not a positive number of seconds."""
    for key, limit in slo.items():
        split_key(key)
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"SLO {key}={limit}: the limit must be a positive number of seconds")


def criteria(slo: Mapping[str, float], attain: float) -> list[Criterion]:
    """The criteria of an SLO: the limits on every request as one with the share ``attain``, then each percentile."""
    plain: dict[str, float] = {}
    found: list[Criterion] = []
    for key, limit in slo.items():
        metric, share = split_key(key)
        if share is None:
            plain[metric] = limit
        else:
            found.append(Criterion(name=f"{key} <= {seconds(limit)}", wanted=share, limits={metric: limit}))
    if plain:
        limits = " and ".join(f"{metric} <= {seconds(limit)}" for metric, limit in plain.items())
        found.insert(0, Criterion(name=f"{limits} for {percent(attain)} of requests", wanted=attain, limits=plain))
    return found


def metrics_of(slo: Mapping[str, float]) -> set[str]:
    """The metrics that an SLO limits, whatever the percentile."""
    return {split_key(key)[0] for key in slo}


def strictest(slo: Mapping[str, float], metric: str) -> float | None:
    """The lowest limit on ``metric``, s; None when there is none."""
    return min((limit for key, limit in slo.items() if split_key(key)[0] == metric), default=None)


def seconds(limit: float) -> str:
    """A limit in words: ``2 s``, ``80 ms``."""
    return f"{limit:g} s" if limit >= 1 else f"{round(limit * 1000, 6):g} ms"


def percent(share: float) -> str:
    """``99 %`` from 0.99."""
    return f"{round(share * 100, 6):g} %"
