"""Sent against planned: is what went out, and what the servers counted, the plan?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.arrays import Bools, Floats, Ints
from analysis.fidelity.inputs import (
    EXACT,
    LENGTH_BOUND,
    MIN_REQUESTS,
    POINTS_BOUND,
    Fidelity,
    Plan,
    backwards,
    groups,
    ks_distance,
    not_comparable,
)
from analysis.rows.read import Rows
from analysis.validity.prefix_cache import CacheCounters
from harness.plan.reuse import Reuse
from harness.trace.stats import WINDOWS_S, dispersion

MOVED_BOUNDS = {1: 0.05, 10: 0.02, 60: 0.01}
"""Window, s -> share of requests that may go out in another one than planned."""
GAP_BOUND, GAP_FLOOR_S = 0.1, 0.005
CACHE_FULL = 0.9
_OTHER_LENGTHS = {
    "input": "the server counted other lengths than were planned: its tokenizer is another",
    "output": "the server ended its answers by itself: what was served is not the trace's workload",
}
START_TOKENS = 2


def sent_against_planned(
    plan: Plan, rows: Sequence[Rows], reuse: Reuse | str, served: CacheCounters, *, chat: bool = False
) -> list[Fidelity]:
    """Whether what went out, and what the servers counted, is the plan. ``rows``: of the measured and the warm-up.

    ``reuse``: of the plan's prompts, in whole blocks of the server's size, or why it is not known.
    """
    ids, success, cached = (_joined(rows, name) for name in ("request_id", "success", "cached_tokens"))
    sent_s = np.full(len(plan.slice), np.nan)
    for part in rows:
        sent_s[part.request_id] = part.sent_s
    went = np.isfinite(sent_s)
    n = int(went.sum())
    return [
        Fidelity(
            name="sent: requests", ok=n == len(went), observed=f"{n} of {len(went)}", bound="all",
            said="" if n == len(went) else "the run was stopped or cut, so its load is a part of the plan's",
        ),
        *_sent_times(plan, sent_s, went),
        _sent_lengths("input", ids, plan.input_tokens, _joined(rows, "input_tokens"), success, chat=chat),
        _sent_lengths("output", ids, plan.output_tokens, _joined(rows, "output_tokens"), success),
        _sent_turns(plan, sent_s, went),
        _sent_prefix(reuse, served, cached, success, len(went)),
    ]  # fmt: skip


def _joined(rows: Sequence[Rows], name: str) -> Any:
    """A column of all rows."""
    return np.concatenate([getattr(part, name) for part in rows])


def _sent_times(plan: Plan, sent_s: Floats, went: Bools) -> list[Fidelity]:
    names = [f"sent: {what}" for what in ("arrivals in windows", "bursts", "gaps")]
    if plan.scheduled_ns is None:
        return [not_comparable(name, "closed loop: a free slot decides when to send") for name in names]
    timed = went & ~plan.waits
    if timed.sum() < MIN_REQUESTS:
        why = f"fewer than {MIN_REQUESTS} requests were sent at a time of their own"
        return [not_comparable(name, why) for name in names]
    due, went_s = np.sort(plan.scheduled_ns[timed]), np.sort(sent_s[timed])
    got = np.rint(went_s * 1e9).astype(np.int64)
    return [_sent_windows(names[0], due, got), _sent_bursts(names[1], due, got), _sent_gaps(names[2], due, got)]


def _sent_windows(name: str, due: Ints, got: Ints) -> Fidelity:
    moved = {w: _moved(due, got, w) for w in WINDOWS_S}
    bounds = {w: max(bound, 3 / len(due)) for w, bound in MOVED_BOUNDS.items()}
    ok = all(moved[w] <= bounds[w] for w in WINDOWS_S)
    return Fidelity(
        name=name, ok=ok,
        observed=f"{' / '.join(f'{moved[w]:.2%}' for w in WINDOWS_S)} in another window of 1 / 10 / 60 s than planned",
        bound=" / ".join(f"{bounds[w]:.2%}" for w in WINDOWS_S),
        said="" if ok else "requests went out late: more --workers, or a lower rate",
    )  # fmt: skip


def _moved(due: Ints, got: Ints, window_s: int) -> float:
    """Share of requests in another window. Windows begin half a second early, so that whole seconds lie within."""
    start = int(due[0]) - 500_000_000
    width = window_s * 1_000_000_000
    last = (max(int(due[-1]), int(got[-1])) - start) // width
    if last > 50_000_000:
        return 0.0
    more = np.zeros(last + 1, dtype=np.int64)
    for times, sign in ((due, 1), (got, -1)):
        more += sign * np.bincount(np.maximum(times - start, 0) // width, minlength=last + 1)
    return float(np.abs(more).sum()) / 2 / len(due)


def _sent_bursts(name: str, due: Ints, got: Ints) -> Fidelity:
    pairs = {w: (dispersion(due, w), dispersion(got, w)) for w in WINDOWS_S}
    known = {w: (a, b) for w, (a, b) in pairs.items() if a is not None and b is not None}
    if not known:
        return not_comparable(name, "the run is shorter than ten seconds")
    # A window begins with the first request of each side, so that near an edge a request may fall either way.
    ok = all(abs(b - a) <= 0.1 * max(a, 1.0) + 2 / math.sqrt(len(due)) for a, b in known.values())
    return Fidelity(
        name=name, ok=ok, bound="10 %",
        observed="variance/mean " + ", ".join(f"{w}s {a:.3g} -> {b:.3g}" for w, (a, b) in known.items()),
        said="" if ok else "bursts were smoothed or made on the way out",
    )  # fmt: skip


def _sent_gaps(name: str, due: Ints, got: Ints) -> Fidelity:
    off_s = float(np.abs(np.sort(np.diff(due)) - np.sort(np.diff(got))).mean()) / 1e9
    mean_s = int(due[-1] - due[0]) / 1e9 / (len(due) - 1)
    bound_s = max(GAP_BOUND * mean_s, GAP_FLOOR_S)
    return Fidelity(
        name=name, ok=off_s <= bound_s, observed=f"sorted gaps {off_s * 1e3:.3g} ms apart (mean {mean_s * 1e3:.3g} ms)",
        bound=f"{bound_s * 1e3:.3g} ms", said="" if off_s <= bound_s else "requests did not go out as planned",
    )  # fmt: skip


def _sent_lengths(
    side: str,
    ids: Ints,
    planned: Floats,
    counted: Floats,
    success: Bools,
    *,
    chat: bool = False,
) -> Fidelity:
    name = f"sent: {side} lengths"
    asked = planned[ids]
    both = success & np.isfinite(asked) & np.isfinite(counted)
    if not both.any():
        return not_comparable(name, "no request has both a planned length and the server's count")
    asked, got = asked[both], counted[both]
    start = got[0] - asked[0]
    constant = bool((got - asked == start).all())
    if side == "input" and start > 0 and constant:
        if chat:
            return not_comparable(name, f"chat: the server's template adds {start:.0f} tokens to every planned prompt")
        got -= start if start <= START_TOKENS else 0  # a start token that the server adds to every prompt
    distance = ks_distance(asked, got)
    differing = float(np.mean(asked != got))
    ok = distance <= LENGTH_BOUND and abs(got.mean() - asked.mean()) <= EXACT * asked.mean()
    return Fidelity(
        name=name, ok=ok, bound=f"{LENGTH_BOUND:.3f}, means within {EXACT:.0%}",
        observed=f"{distance:.3f} apart; mean {asked.mean():.1f} -> {got.mean():.1f} tokens; {differing:.1%} differ",
        said="" if ok else _OTHER_LENGTHS[side],
    )  # fmt: skip


def _sent_turns(plan: Plan, sent_s: Floats, went: Bools) -> Fidelity:
    name = "sent: turns in order"
    followers = len(plan.slice) - groups(plan.slice)[0]
    if not followers:
        return not_comparable(name, "no session has a second turn")
    overtaken = backwards(plan.slice[went], sent_s[went])
    return Fidelity(
        name=name, ok=overtaken == 0, observed=f"{overtaken} of {followers} turns before the one before them",
        bound="none", said="" if not overtaken else "turns of a session overtook each other",
    )  # fmt: skip


def _sent_prefix(reuse: Reuse | str, served: CacheCounters, cached: Floats, success: Bools, planned: int) -> Fidelity:
    name = "sent: prefix reuse"
    if isinstance(reuse, str):
        return not_comparable(name, reuse)
    got, whose = _cache_hits(reuse, served, cached, success)
    if got is None:
        return not_comparable(name, "the server counts no prefix-cache hits")
    observed = (
        f"{reuse.hit_rate:.1%} of input tokens in an unlimited cache -> {got:.1%} at the server ({whose}, in blocks of "
        f"{reuse.block_tokens} tokens)"
    )
    if served.replicas > 1:
        return not_comparable(name, "each of several replicas has a cache of its own", observed)
    if success.sum() < 0.99 * planned:
        return not_comparable(name, "too many requests failed or were not sent", observed)
    ok = abs(got - reuse.hit_rate) <= POINTS_BOUND
    if not ok and got < reuse.hit_rate and (why := _forgot(reuse, served)):
        return not_comparable(name, why, observed)
    more = "the cache was warm before the run, or other users share it"
    less = "prefix caching is off, the cache is too small, or requests that share a prefix ran at the same time"
    return Fidelity(
        name=name, ok=ok, observed=observed, bound="2 points",
        said="" if ok else more if got > reuse.hit_rate else less,
    )  # fmt: skip


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


def _cache_hits(reuse: Reuse, served: CacheCounters, cached: Floats, success: Bools) -> tuple[float | None, str]:
    """Share of input tokens found in the server's cache, and who says so."""
    if served.queried_tokens and served.hit_tokens is not None:
        return served.hit_tokens / served.queried_tokens, "its counters"
    known = np.isfinite(cached) & success
    if known.any() and known.sum() == success.sum():
        return float(cached.sum(where=known)) / reuse.tokens, "usage of each request"
    return None, ""
