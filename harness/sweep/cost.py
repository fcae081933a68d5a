"""What a sweep will take before it has begun: hours and dollars of every point, and of the servers' start.

Every estimate rests on stated assumptions; the budget is held to what the clock says, not to these.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.errors import UsageError
from harness.options import PlanOptions
from harness.record.manifest import Tier
from harness.sweep.spec import Level, Pair, Point
from harness.trace import survey as traces
from harness.trace.io import Trace

ITL_S = 0.05
"""Assumed time per output token where only a run could tell: closed loops without a duration, and every drain."""
DRAIN_S = 60.0
"""The longest drain of a run that is cut by its duration."""
SAID_TOKENS = 128
START_CPU_S = 60.0
START_GPU_S = 300.0
"""Assumed start of servers: load the weights, compile, be ready. The start of servers that are there takes no time."""
BETWEEN_S = 5.0
"""Assumed time around a point: load workers start, the server's counters settle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLoad:
    """What the estimate needs to know of the trace: the rows that will be sent, never more than were asked for."""

    rows: int
    output_tokens: float
    longest_output: int
    span_s: float | None = None
    """From the first to the last arrival; null when the trace has no times."""

    @property
    def rate(self) -> float | None:
        """Mean of the trace's own clock, requests/s; null without times, or when all arrive at one instant."""
        return (self.rows - 1) / self.span_s if self.span_s else None


def survey(trace: Trace, levels: Sequence[Level], asked: PlanOptions) -> TraceLoad:
    """Read the trace as far as the sweep will.

    Raises `TraceError`, and `UsageError` for a trace without the times that are needed, or that no draw of its users
    gives the rates asked for.
    """
    until_s = asked.duration_s if same_clock(asked) else None
    seen = traces.survey(
        trace,
        limit=rows_needed(levels, asked),
        cut_ns=None if until_s is None else until_s * 1e9,
        timed=levels[0].request_rate is not None and not asked.drawn,
        made_up=True,
    )
    said = seen.stats.output_tokens
    tokens = (said.mean * said.rows if said else 0.0) + SAID_TOKENS * seen.open_ended
    found = TraceLoad(
        rows=seen.requests,
        output_tokens=tokens / seen.requests,
        longest_output=max([*seen.outputs, SAID_TOKENS if seen.open_ended else 0]),
        span_s=int(seen.arrivals[-1]) / 1e9 if len(seen.arrivals) else None,
    )
    for level in levels if same_clock(asked) and found.rate else ():
        if level.request_rate and (level.request_rate > (found.rate or 0)) is (asked.rescale == "thin"):
            raise UsageError(
                f"{trace.path}: arrives at {found.rate:.4g} requests/s: rescale = '{asked.rescale}' cannot make "
                f"{level.words} of it; keep loads.request_rate on one side of that, or leave rescale out"
            )
    return found


def same_clock(asked: PlanOptions) -> bool:
    """Rates are reached by fewer or more users on the trace's own clock, not by another clock."""
    return asked.rescale in ("thin", "superpose")


def rows_needed(levels: Iterable[Level], asked: PlanOptions) -> int | None:
    """Rows of the trace that the heaviest level sends; null: all (within the duration)."""
    if same_clock(asked):
        return None
    limit, duration_s = asked.limit, asked.duration_s
    most = max((level.request_rate or math.inf) for level in levels) * duration_s if duration_s else math.inf
    if math.isinf(most):
        return limit
    rows = max(1, math.ceil(round(most, 6)))
    return rows if limit is None else min(rows, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class PointEstimate:
    """Of one point on servers that are up."""

    requests: int
    """About how many; in a closed loop with a duration the most."""
    seconds: float
    assumed: bool
    """True where the pace of the server decides, so that `ITL_S` stands in for it."""


def estimate(level: Level, asked: PlanOptions, found: TraceLoad) -> PointEstimate:
    """Requests and seconds of one point: its planned span or duration (warm-up inside it), the drain, the way there."""
    limit, duration_s = asked.limit, asked.duration_s
    rows = limit if limit and asked.repeat else found.rows if not limit else min(limit, found.rows)
    around_s = BETWEEN_S + min(DRAIN_S, found.longest_output * ITL_S)
    if level.request_rate is not None:
        if same_clock(asked) and found.rate and found.span_s:
            due = min(found.rows * level.request_rate / found.rate, limit or math.inf)
            return PointEstimate(requests=round(due), seconds=due / level.request_rate + around_s, assumed=False)
        due = level.request_rate * duration_s if duration_s else math.inf
        if not asked.repeat or math.isinf(due):
            due = min(due, rows)
        if limit:
            due = min(due, limit)
        return PointEstimate(requests=round(due), seconds=due / level.request_rate + around_s, assumed=False)
    assert level.concurrency is not None
    if duration_s:
        return PointEstimate(requests=rows, seconds=duration_s + around_s, assumed=False)
    work_s = rows * found.output_tokens * ITL_S / min(level.concurrency, rows)
    return PointEstimate(requests=rows, seconds=work_s + around_s, assumed=True)


def start_s(pair: Pair, tier: Tier | None) -> float:
    """Estimated seconds until the servers of a pair answer."""
    if pair.base_urls:
        return 0.0
    return START_GPU_S if tier is not None and tier.accelerator_count else START_CPU_S


def usd_per_hour(pair: Pair, tier: Tier | None) -> float:
    """Of all replicas of a pair; 0 without a price."""
    return tier.usd_per_hour * (pair.replicas or 1) if tier is not None else 0.0


def expect(points: Sequence[Point], asked: PlanOptions, found: TraceLoad) -> dict[str, PointEstimate]:
    """Estimates by the name of the point. What the same pair took at the same level is worth more than a guess."""
    measured: dict[tuple[int, Level], list[float]] = {}
    for point in points:
        if point.state == "done" and point.took_s is not None:
            measured.setdefault((point.pair, point.level), []).append(point.took_s)
    guesses = {level: estimate(level, asked, found) for level in {point.level for point in points}}
    expected: dict[str, PointEstimate] = {}
    for point in points:
        guess, seen = guesses[point.level], measured.get((point.pair, point.level))
        expected[point.name] = (
            PointEstimate(requests=guess.requests, seconds=max(seen), assumed=False) if seen else guess
        )
    return expected
