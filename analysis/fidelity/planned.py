"""Planned against source: is the plan its trace, as far as it was asked to be?"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.fidelity.inputs import (
    EXACT,
    LENGTH_BOUND,
    MIN_REQUESTS,
    POINTS_BOUND,
    Fidelity,
    Plan,
    backwards,
    judged,
    ks_distance,
    not_comparable,
    number,
    on_trace_clock,
)
from harness.plan.arrivals import MOST_SHIFT, longest_shift_ns
from harness.plan.file import PlanInfo
from harness.plan.reuse import Reuse
from harness.trace.stats import (
    FEWEST_WINDOWS,
    WINDOWS_S,
    ArrivalStats,
    LengthStats,
    TraceStats,
    arrival_stats,
    counts_between,
    length_stats,
)

CHANCE = 3.0
"""Standard deviations that a draw may be off."""
KS_CHANCE = 1.95
"""Times sqrt(1/n + 1/m): Kolmogorov-Smirnov distance that two samples of one distribution pass once in a thousand."""
MEAN_BOUND = 0.05
ERRORS = 2.0
"""Standard errors that a mean of one plan may be off."""
ON_PURPOSE = "the windows are the trace's busiest stretch, as asked"
OWN_PACE = "sessions that wait begin on another clock and keep their own pace, so gaps are no scaled ones"
CHANCE_OR_DRIFT = "this plan's windows are not like the whole trace: more or longer windows, or several draws together"


def planned_against_source(info: PlanInfo, plan: Plan, reuse: Reuse | None = None) -> list[Fidelity]:
    """Whether the plan is its trace, as far as it was asked to be. ``reuse``: of the prompts, in the trace's blocks."""
    source = info.source
    if source is None:
        return [not_comparable("planned: all", "the plan is of a version that kept nothing of its trace: plan again")]
    return [
        *_planned_times(info, source, plan),
        _planned_lengths("input", source.input_tokens, plan.input_tokens, info),
        _planned_lengths("output", source.output_tokens, plan.output_tokens, info),
        _planned_sessions(info, source, plan),
        _planned_prefix(info, source, plan, reuse),
    ]


TIMES = tuple(f"planned: {what}" for what in ("request rate", "arrivals over time", "bursts", "gaps"))


def _planned_times(info: PlanInfo, source: TraceStats, plan: Plan) -> list[Fidelity]:
    why = _no_times(info, source, plan)
    if why is not None or source.arrivals is None or plan.scheduled_ns is None:
        return [not_comparable(name, why or "") for name in TIMES]
    times = on_trace_clock(plan.scheduled_ns, info.speed or 1.0)
    if info.windows:
        return rate_and_shape(info, source.arrivals, times)
    planned = arrival_stats(times)
    assert planned is not None
    growth = info.grow or 1.0
    return [
        _rate(growth, source, planned),
        _over_time(info, growth, source.arrivals, source.unit_rows, times),
        _bursts(info, growth, source.arrivals, _where_all_run(times, source.arrivals, growth) or planned),
        _planned_gaps(info, source.arrivals, planned),
    ]


def _no_times(info: PlanInfo, source: TraceStats, plan: Plan) -> str | None:
    """Why times cannot be compared; None when they can."""
    if plan.scheduled_ns is None:
        return "closed loop: a free slot decides when to send, there are no planned times"
    if info.arrivals != "trace":
        return f"arrivals are drawn ({info.arrivals}), as asked; the trace gives the content"
    if source.arrivals is None or source.arrivals.rate is None or not source.arrivals.counts:
        return "the trace has no times, or one instant"
    if info.cycles > 1 and not info.windows:
        return f"the trace is sent {info.cycles} times, one after the other"
    if info.cut:
        return "the plan ends before the trace (limit)"
    return None if len(plan.scheduled_ns) >= MIN_REQUESTS else f"fewer than {MIN_REQUESTS} requests"


def _rate(growth: float, source: TraceStats, planned: ArrivalStats) -> Fidelity:
    # the variance of the number of requests when each unit of a copy is drawn with the fraction of the growth
    drawn = growth % 1 * (1 - growth % 1) * source.requests * source.unit_rows
    bound = EXACT + CHANCE * math.sqrt(drawn) / (growth * source.requests)
    if growth > 1 and source.sessions:  # a duration cuts off the turns that hang over the end
        bound += (1 - 1 / growth) / MOST_SHIFT
    asked, unlucky = growth * source.requests, "the draw of whole sessions was unlucky: another --seed"
    return _off_by(planned.requests, asked, bound, f"{bound:.1%}", unlucky, " on the trace's clock")


def _off_by(got: int, asked: float, bound: float, words: str, wrong: str, where: str = "") -> Fidelity:
    off = abs(got / asked - 1)
    return judged(TIMES[0], off <= bound, f"{got} requests for {asked:.0f}{where} ({off:.1%} off)", words, wrong)


def _over_time(info: PlanInfo, growth: float, source: ArrivalStats, unit_rows: float, times: Ints) -> Fidelity:
    counts = np.array(source.counts, dtype=np.float64)
    asked = growth * counts
    got = counts_between(times, 0, round(source.span_s * 1e9), len(counts))
    off = _moved_share(asked, got)
    bound = EXACT
    if info.spread_s is not None:  # an arrival may leave its part for the next
        bound += info.spread_s * len(asked) / source.span_s / 2
    if info.grow is not None:
        share = growth % 1
        drawn = np.sqrt(share * (1 - share) * unit_rows * counts).sum() / float(asked.sum())
        bound += 0.75 * float(drawn) + _shifted_share(source, growth)
    observed = f"{off:.1%} of requests in another of {len(asked)} parts of the time"
    return judged(TIMES[1], off <= bound, observed, f"{bound:.1%}", "the shape over time is not the trace's")


def _moved_share(a: Floats, b: Floats | Ints) -> float:
    return float(np.abs(a - b).sum()) / 2 / float(a.sum())


def _shifted_share(source: ArrivalStats, growth: float) -> float:
    """How much the copies of a superposed plan may differ over time, being the trace a little later."""
    if growth <= 1:
        return 0.0
    counts = np.array(source.counts, dtype=np.float64)
    parts = math.ceil(longest_shift_ns(round(source.span_s * 1e9)) / 1e9 / source.span_s * len(counts))
    worst = max(_moved_share(counts, np.roll(counts, k)) for k in range(1, max(parts, 1) + 1))
    # Of long sessions, what hangs over the end is missing at the beginning.
    return (1 - 1 / growth) * (worst + 1 / MOST_SHIFT)


def _where_all_run(times: Ints, source: ArrivalStats, growth: float) -> ArrivalStats | None:
    """Of a superposed plan, the time in which every copy runs: copies begin and end a little later than the trace."""
    if growth <= 1:
        return None
    end_ns = round(source.span_s * 1e9)
    low, high = np.searchsorted(times, longest_shift_ns(end_ns)), np.searchsorted(times, end_ns, side="right")
    return arrival_stats(times[low:high])


def _bursts(info: PlanInfo, growth: float, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    """Index of dispersion D. Thinned, it lies between the trace's and 1 + growth (D - 1), that of single draws.
    Superposed, between the trace's (copies are independent) and growth D (copies rise and fall together).
    """
    observed = "variance/mean " + ", ".join([
        *(f"{w} {number(source.dispersion[w])} -> {number(planned.dispersion[w])}" for w in source.dispersion),
        f"worst minute/mean {number(source.worst_minute)} -> {number(planned.worst_minute)}",
        f"gap cv {number(source.gap_cv)} -> {number(planned.gap_cv)}",
    ])  # fmt: skip
    if info.spread_s is not None:
        return not_comparable(TIMES[2], f"arrivals were spread within steps of {info.spread_s:g} s, as asked", observed)
    ok, known = True, _dispersions(source, planned)
    for w, before, after in known:
        sides = sorted((before, growth * before if growth > 1 else 1 + growth * (before - 1)))
        slack = EXACT * before
        if info.grow is not None:
            slack = 0.1 * sides[1] + CHANCE * sides[1] * math.sqrt(2 * w / source.span_s)
        ok &= sides[0] - slack <= after <= sides[1] + slack
    if not known:
        return not_comparable(TIMES[2], "the trace is shorter than ten windows", observed)
    bound = f"{EXACT:.0%}" if info.grow is None else "between the trace's and that of bursts which grow along"
    wrong = "bursts are not those of the trace: look at both before a capacity is read from this"
    return judged(TIMES[2], ok, observed, bound, wrong)


def _dispersions(source: ArrivalStats, planned: ArrivalStats) -> list[tuple[int, float, float]]:
    """(window in s, index of dispersion of the trace, that of the plan) where both are known."""
    pairs = [(w, source.dispersion[f"{w}s"], planned.dispersion[f"{w}s"]) for w in WINDOWS_S]
    return [(w, a, b) for w, a, b in pairs if a is not None and b is not None]


def _planned_gaps(info: PlanInfo, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    if info.grow is not None or info.spread_s is not None:
        how = "another demand has other gaps" if info.grow is not None else "gaps were spread"
        return not_comparable(TIMES[3], f"{how}, as asked; for their spread see the gap cv")
    off_s, mean_s, words = _gaps_apart(source, planned, slice(None))
    ok, bound = off_s <= EXACT * mean_s + 1e-5, f"{EXACT:.0%} of the mean gap"
    return judged(TIMES[3], ok, words, bound, "gaps between arrivals are not the trace's")


def _gaps_apart(source: ArrivalStats, planned: ArrivalStats, which: slice) -> tuple[float, float, str]:
    """(mean distance of the sorted gaps, mean gap, both in words), s."""
    mean_s = source.span_s / (source.requests - 1)
    apart = np.abs(np.array(source.gap_quantiles_s) - np.array(planned.gap_quantiles_s))
    off_s = float(apart[which].mean())
    return off_s, mean_s, f"sorted gaps {off_s:.3g} s apart (mean gap {mean_s:.3g} s)"


def _planned_lengths(side: str, source: LengthStats | None, planned: Floats, info: PlanInfo) -> Fidelity:
    if info.windows:
        return mean_lengths(side, source, planned, info)
    name = f"planned: {side} lengths"
    values, counts = np.unique(planned[np.isfinite(planned)], return_counts=True)
    after = length_stats(Counter(dict(zip(map(int, values), counts.tolist(), strict=True))))
    if (why := _no_lengths(source, after)) or source is None or after is None:
        return not_comparable(name, why)
    if info.cut:
        return not_comparable(name, "the plan ends before the trace (limit)")
    cap = info.max_output_tokens if side == "output" else None
    before = np.array(source.quantiles)
    if cap is not None:
        if info.source is not None and source.rows < info.source.requests:
            return not_comparable(name, f"rows without a length got {cap} tokens, as asked")
        before = np.minimum(before, cap)
    distance = ks_distance(before, np.array(after.quantiles))
    whole = info.grow is None and after.rows % source.rows == 0
    bound = 0.0 if whole else LENGTH_BOUND + KS_CHANCE * math.sqrt(1 / after.rows + 1 / source.rows)
    ok = distance <= bound
    least, said = after.quantiles[0], "the plan's token lengths are not the trace's"
    if side == "input" and ks_distance(np.maximum(before, least), np.array(after.quantiles)) <= bound:
        said = f"rows of fewer than {least} tokens are sent that long: the chat template has nearly as many of its own"
    return judged(name, ok, f"{distance:.3f} apart; mean {source.mean:.1f} -> {after.mean:.1f} tokens"
        + (f" (cap {cap})" if cap is not None else ""), f"{bound:.3f}", said)  # fmt: skip


def _no_lengths(source: object | None, planned: object | None) -> str:
    if source is None:
        return "the trace says no lengths on this side"
    return "" if planned else "they are the server's"


def _planned_sessions(info: PlanInfo, source: TraceStats, plan: Plan) -> Fidelity:
    name = "planned: sessions"
    if not source.sessions:
        return not_comparable(name, "the trace has no sessions")
    torn = backwards(plan.slice, plan.scheduled_ns)
    units = source.requests - source.session_rows + source.sessions
    turns = source.requests / units
    sizes = np.unique(plan.slice, return_counts=True)[1]
    got, most = len(plan.slice) / len(sizes), int(sizes.max(initial=0))
    observed = (
        f"{got:.3f} requests in each for {turns:.3f}, most {most} for {source.most_turns}; "
        f"{torn} turns before the one before them"
    )
    if info.windows and not torn:
        return not_comparable(name, "windows cut sessions: turns before and after a window are not sent", observed)
    if info.cycles > 1 or info.cut:
        return not_comparable(name, "the plan ends within a pass over the trace, and so do sessions", observed)
    drawn = info.grow is not None and bool(info.grow % 1)
    bound = 0.0 if not drawn else CHANCE * math.sqrt(source.unit_rows / len(plan.slice))
    if info.grow is not None:  # a duration cuts off the turns that hang over the end
        bound += max(0.0, 1 - len(plan.slice) / (info.grow * source.requests))
    ok = torn == 0 and abs(got / turns - 1) <= bound + 1e-9 and most <= source.most_turns
    words = "whole and in order" + (f", within {bound:.1%}" if drawn else "")
    return judged(name, ok, observed, words, "sessions were torn or turned round")


def _planned_prefix(info: PlanInfo, source: TraceStats, plan: Plan, reuse: Reuse | None) -> Fidelity:
    name = "planned: prefix reuse"
    if source.prefix is None:
        return not_comparable(name, "the trace states no prefixes and no sessions")
    if info.conversation == "live":
        return not_comparable(name, "live conversations: turns carry the server's own answers, as asked")
    if reuse is None or not reuse.tokens:
        return not_comparable(name, "prompts are text: their tokens are the server's")
    ideal = source.prefix.hit_rate_tokens
    observed = f"{ideal:.1%} of input tokens in the trace -> {reuse.hit_rate:.1%} in the prompts"
    if (info.grow or 1.0) % 1 or info.cut:
        return not_comparable(name, "drawn requests lose partners they shared a prefix with", observed)
    if info.busiest:
        return not_comparable(name, ON_PURPOSE, observed)
    sizes = "/".join(map(str, source.prefix.block_tokens))
    bound = prefix_bound(ideal, plan.input_tokens) if info.windows else POINTS_BOUND
    bound_said = f"{bound * 100:.3g} points (in blocks of {sizes} tokens)"
    ok = abs(ideal - reuse.hit_rate) <= bound
    said = "prompts do not share what the trace shares"
    if info.windows:
        said += ": what a window cuts off is not there to be found; longer windows lose less"
    return judged(name, ok, observed, bound_said, said)  # fmt: skip


# Is a plan of several windows like the whole, up to chance? A window's rows and gaps are the trace's by construction
# (`harness.plan.windows`), so what can differ is the mix. Means may be off by `MEAN_BOUND`, or by two standard errors
# where that is more, of single requests or of the windows' means, whichever says more: neighbours are alike. Shares and
# rates likewise, with the trace's own index of dispersion as what a burst does to chance.


def rate_and_shape(info: PlanInfo, source: ArrivalStats, times: Ints) -> list[Fidelity]:
    """Request rate, arrivals over time, bursts and gaps. ``times``: of the plan, on the trace's clock, ns."""
    on_purpose = ON_PURPOSE if info.busiest else None
    paced = on_purpose or (OWN_PACE if info.sessions == "wait" and info.speed != 1.0 else None)
    planned = arrival_stats(times)
    assert planned is not None
    return [
        not_comparable(TIMES[0], on_purpose) if on_purpose else _window_rate(info, source, planned),
        not_comparable(
            TIMES[1], f"the plan is {len(info.windows)} windows of the trace, each with the trace's own times"
        ),
        not_comparable(TIMES[2], paced) if paced else _window_bursts(source, planned),
        not_comparable(TIMES[3], paced) if paced else _window_gaps(source, planned),
    ]


def burstiness(source: ArrivalStats) -> float:
    """The largest index of dispersion of the trace over any windows that it was counted in; at least 1."""
    counts = np.array(source.counts, dtype=np.float64)
    known = [d for d in source.dispersion.values() if d is not None]
    return max(1.0, *known, float(counts.var() / counts.mean()) if len(counts) else 1.0)


def _window_rate(info: PlanInfo, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    lasts_s = sum(window.lasts_s or 0.0 for window in info.windows) * (info.speed or 1.0)
    asked = (source.rate or 0.0) * lasts_s
    bound = max(MEAN_BOUND, ERRORS * math.sqrt(burstiness(source) / asked))
    return _off_by(planned.requests, asked, bound, _window_bound(bound), CHANCE_OR_DRIFT)


def _window_bursts(source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    """Index of dispersion D in windows of the plan; chance is that of a variance of so many counts, and of bursts."""
    ok, known = True, _dispersions(source, planned)
    for w, before, after in known:
        # Counts come in runs of high and low ones where they are bursty, so there are fewer of them than windows.
        counts = max(planned.span_s / w / max(1.0, burstiness(source) / max(before, 1.0)), FEWEST_WINDOWS / 2)
        ok &= abs(after - before) <= EXACT * before + 2 * ERRORS * max(before, 1.0) * math.sqrt(2 / counts)
    if not known:
        return not_comparable(TIMES[2], "the plan is shorter than ten windows")
    observed = "variance/mean " + ", ".join(f"{w}s {number(a)} -> {number(b)}" for w, a, b in known)
    return judged(TIMES[2], ok, observed, "the chance of so few windows", CHANCE_OR_DRIFT)


def _window_gaps(source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    off_s, mean_s, words = _gaps_apart(source, planned, slice(1, -1))
    bound = LENGTH_BOUND + KS_CHANCE * max(1.0, source.gap_cv or 1.0) * math.sqrt(burstiness(source) / planned.requests)
    return judged(TIMES[3], off_s <= bound * mean_s, words, f"{bound:.1%} of the mean gap, by chance", CHANCE_OR_DRIFT)


def mean_lengths(side: str, source: LengthStats | None, lengths: Floats, info: PlanInfo) -> Fidelity:
    """Mean tokens of the plan against those of the trace."""
    name = f"planned: {side} lengths"
    known = np.isfinite(lengths)
    n = int(known.sum())
    if (why := _no_lengths(source, n)) or source is None:
        return not_comparable(name, why)
    if info.busiest:
        return not_comparable(name, ON_PURPOSE)
    cap = info.max_output_tokens if side == "output" else None
    if cap is not None and (cap < source.quantiles[-1] or (info.source and source.rows < info.source.requests)):
        return not_comparable(name, f"output lengths were capped at {cap} tokens, as asked")
    mean = float(lengths.sum(where=known)) / n
    bound = max(MEAN_BOUND, ERRORS * standard_error(lengths, info, source.part_sd) / source.mean)
    off = abs(mean / source.mean - 1)
    observed = f"mean {source.mean:.1f} -> {mean:.1f} tokens ({off:.1%} off)"
    return judged(name, off <= bound, observed, _window_bound(bound), CHANCE_OR_DRIFT)


def standard_error(values: Floats, info: PlanInfo, part_sd: float | None = None) -> float:
    """Of the mean of a plan's ``values`` (NaN: not given): that of single requests or of its windows, the larger.

    ``part_sd``: by how much stretches of the trace differ, which a few windows do not tell.
    """
    known = values[np.isfinite(values)]
    errors = [float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.inf]
    *parts, _ = np.split(values, np.cumsum([window.requests for window in info.windows], dtype=np.int64))
    means = [float(np.nanmean(part)) for part in parts if np.isfinite(part).any()]
    if len(means) > 1:
        errors.append(float(np.std(means, ddof=1)) / math.sqrt(len(means)))
    if part_sd is not None and means:
        errors.append(part_sd / math.sqrt(len(means)))
    return max(errors)


def prefix_bound(hit_rate: float, inputs: Floats) -> float:
    """How far the share of cached input tokens of one plan may be from the trace's."""
    known = inputs[np.isfinite(inputs)]
    if not len(known):
        return POINTS_BOUND
    # A ratio of sums: long prompts weigh more, so there are fewer of them.
    effective = float(known.sum()) ** 2 / float((known**2).sum())
    chance = ERRORS * math.sqrt(hit_rate * (1 - hit_rate) / max(effective, 1.0))
    return max(POINTS_BOUND, MEAN_BOUND * hit_rate, chance)


def _window_bound(bound: float) -> str:
    return f"{bound:.1%}" + (" (two standard errors)" if bound > MEAN_BOUND else "")
