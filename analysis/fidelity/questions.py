"""Is what was planned the trace, and what was sent the plan? Each question with a number, a bound and a verdict.

What is changed on purpose is judged against what was asked: a plan on a faster clock is laid back onto the trace's
clock; of a thinned or superposed one its demand is asked for, with the room that chance needs; a cap on output lengths
is applied to the trace first. A question that the run cannot answer is "not comparable", and says why. What a check of
validity asks already (lengths, gaps, rows that are missing) is not asked again here.

=======================  =============================================================================================
arrivals over time       share of requests in another part of the time than they belong in: half the sum of the absolute
                         differences of counts per part, over the requests
dispersion               variance / mean of counts in windows of 1, 10, 60 s; worst minute over mean; cv of the gaps
gaps                     mean distance of the sorted gaps (Wasserstein-1): Kolmogorov-Smirnov would take a jitter of
                         microseconds on an even rate for another distribution
lengths                  Kolmogorov-Smirnov distance of the token lengths
prefix reuse             share of input tokens found in an unlimited prefix cache
=======================  =============================================================================================
"""

from __future__ import annotations

import math

import numpy as np

from harness.analysis.arrays import Ints
from harness.analysis.fidelity.inputs import (
    MIN_REQUESTS,
    POINTS_BOUND,
    Fidelity,
    Plan,
    judged,
    not_comparable,
    read_plan,
    read_reuse,
)
from harness.analysis.fidelity.planned import planned_against_source
from harness.analysis.rows.read import Run
from harness.analysis.validity.prefix_cache import CacheCounters, HitSource, hit_share, read_served
from harness.errors import PlanError
from harness.plan.reuse import Reuse
from harness.trace.stats import WINDOWS_S, dispersion

MOVED_BOUNDS = {1: 0.05, 10: 0.02, 60: 0.01}
"""Window, s -> share of requests that may go out in another one than planned."""
CACHE_FULL = 0.9
_SOURCES: dict[HitSource, str] = {"counters": "its counters", "usage": "usage of each request"}


def fidelity(run: Run) -> list[Fidelity]:
    """All questions to one run: planned against source, then sent against planned.

    Reads the plan's columns, and its prompts where the trace states prefixes. A plan that cannot be read leaves the one
    answer that nothing can be compared.
    """
    try:
        plan, (own, at_server) = read_plan(run), read_reuse(run)
    except PlanError as e:
        return [Fidelity(name="plan", ok=None, observed="", bound="", said=str(e))]
    sent = [*_sent_times(run, plan), _sent_prefix(run, len(plan.slice), at_server)]
    return planned_against_source(run.manifest.plan, plan, own) + sent


def _sent_times(run: Run, plan: Plan) -> list[Fidelity]:
    windows, bursts = "sent: arrivals in windows", "sent: bursts"
    sent_s = np.full(len(plan.slice), np.nan)
    for side in (run.rows, run.warmup):
        sent_s[side.request_id] = side.sent_s
    timed = np.isfinite(sent_s) & ~plan.waits
    why = None
    if plan.scheduled_ns is None:
        why = "closed loop: a free slot decides when to send"
    elif timed.sum() < MIN_REQUESTS:
        why = f"fewer than {MIN_REQUESTS} requests were sent at a time of their own"
    if why is not None or plan.scheduled_ns is None:
        return [not_comparable(name, why or "") for name in (windows, bursts)]
    due, got = np.sort(plan.scheduled_ns[timed]), np.rint(np.sort(sent_s[timed]) * 1e9).astype(np.int64)
    moved = {w: _moved(due, got, w) for w in WINDOWS_S}
    bounds = {w: max(bound, 3 / len(due)) for w, bound in MOVED_BOUNDS.items()}
    shares = " / ".join(f"{moved[w]:.2%}" for w in WINDOWS_S)
    return [
        judged(
            windows,
            all(moved[w] <= bounds[w] for w in WINDOWS_S),
            f"{shares} in another window of 1 / 10 / 60 s than planned",
            " / ".join(f"{bounds[w]:.2%}" for w in WINDOWS_S),
            "requests went out late: more --workers, or a lower rate",
        ),
        _sent_bursts(bursts, due, got),
    ]


def _moved(due: Ints, got: Ints, window_s: int) -> float:
    """Share of requests in another window. Windows begin half a second early, so that whole seconds lie within."""
    start, width = int(due[0]) - 500_000_000, window_s * 1_000_000_000
    last = (max(int(due[-1]), int(got[-1])) - start) // width
    if last > 50_000_000:
        return 0.0
    planned, sent = (np.bincount(np.maximum(t - start, 0) // width, minlength=last + 1) for t in (due, got))
    return float(np.abs(planned - sent).sum()) / 2 / len(due)


def _sent_bursts(name: str, due: Ints, got: Ints) -> Fidelity:
    pairs = {w: (dispersion(due, w), dispersion(got, w)) for w in WINDOWS_S}
    known = {w: (a, b) for w, (a, b) in pairs.items() if a is not None and b is not None}
    if not known:
        return not_comparable(name, "the run is shorter than ten seconds")
    # A window begins with the first request of each side, so that near an edge a request may fall either way.
    ok = all(abs(b - a) <= 0.1 * max(a, 1.0) + 2 / math.sqrt(len(due)) for a, b in known.values())
    observed = "variance/mean " + ", ".join(f"{w}s {a:.3g} -> {b:.3g}" for w, (a, b) in known.items())
    return judged(name, ok, observed, "10 %", "bursts were smoothed or made on the way out")


def _sent_prefix(run: Run, planned: int, reuse: Reuse | str) -> Fidelity:
    """``reuse``: of the plan's prompts, in whole blocks of the server's size, or why it is not known."""
    name, served = "sent: prefix reuse", read_served(run)
    if isinstance(reuse, str):
        return not_comparable(name, reuse)
    got, source = hit_share(run)
    if got is None or source is None:
        return not_comparable(name, "the server counts no prefix-cache hits")
    observed = (
        f"{reuse.hit_rate:.1%} of input tokens in an unlimited cache -> {got:.1%} at the server "
        f"({_SOURCES[source]}, in blocks of {reuse.block_tokens} tokens)"
    )
    if served.replicas > 1:
        return not_comparable(name, "each of several replicas has a cache of its own", observed)
    if sum(side.success.sum() for side in (run.rows, run.warmup)) < 0.99 * planned:
        return not_comparable(name, "too many requests failed or were not sent", observed)
    ok = abs(got - reuse.hit_rate) <= POINTS_BOUND
    if not ok and got < reuse.hit_rate and (why := _forgot(reuse, served)):
        return not_comparable(name, why, observed)
    said = "prefix caching is off, the cache is too small, or requests that share a prefix ran at the same time"
    if got > reuse.hit_rate:
        said = "the cache was warm before the run, or other users share it"
    return judged(name, ok, observed, "2 points", said)


def _forgot(reuse: Reuse, served: CacheCounters) -> str | None:
    """Why the server's cache cannot have kept everything; None when nothing shows it.

    The share in use alone does not: blocks that only wait to be found again count as free.
    """
    different = reuse.tokens - reuse.hit_tokens
    if served.cache_tokens is not None and different > served.cache_tokens:
        return f"{different:,} different input tokens do not fit its {served.cache_tokens:,.0f}: it had to forget"
    if served.fullest is not None and served.fullest >= CACHE_FULL:
        return f"the KV cache was {served.fullest:.0%} full: it had to forget"
    return None
