"""Planned against source where the plan is several windows of the trace: is it like the whole, up to chance?

A window's rows and gaps are the trace's by construction (`harness.trace.windows`), so what can differ is the mix: one
short plan has another mean length than its trace by chance alone. Means may be off by `MEAN_BOUND`, or by two standard
errors where that is more, taken from single requests or from the means of the windows, whichever says more: neighbours
are alike. Shares and rates likewise, with the trace's own index of dispersion D as what a burst does to chance.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.arrays import Floats, Ints
from analysis.fidelity.inputs import EXACT, LENGTH_BOUND, POINTS_BOUND, Fidelity, not_comparable, number
from harness.plan.file import PlanInfo
from harness.trace.stats import FEWEST_WINDOWS, WINDOWS_S, ArrivalStats, LengthStats, arrival_stats

MEAN_BOUND = 0.05
ERRORS = 2.0
"""Standard errors that a mean of one plan may be off."""
KS_CHANCE = 1.95
"""As in `analysis.fidelity.planned`."""
ON_PURPOSE = "the windows are the trace's busiest stretch, as asked"
OWN_PACE = "sessions that wait begin on another clock and keep their own pace, so gaps are no scaled ones"
CHANCE_OR_DRIFT = "this plan's windows are not like the whole trace: more or longer windows, or several draws together"


def rate_and_shape(info: PlanInfo, source: ArrivalStats, times: Ints) -> list[Fidelity]:
    """Request rate, arrivals over time, bursts and gaps. ``times``: of the plan, on the trace's clock, ns."""
    names = [f"planned: {what}" for what in ("request rate", "arrivals over time", "bursts", "gaps")]
    over_time = not_comparable(
        names[1], f"the plan is {len(info.windows)} windows of the trace, each with the trace's own times"
    )
    if info.busiest:
        return [over_time if name == names[1] else not_comparable(name, ON_PURPOSE) for name in names]
    planned = arrival_stats(times)
    assert planned is not None
    if info.sessions == "wait" and info.speed != 1.0:
        paced = (not_comparable(name, OWN_PACE) for name in names[2:])
        return [_rate(names[0], info, source, planned), over_time, *paced]
    return [
        _rate(names[0], info, source, planned),
        over_time,
        _bursts(names[2], source, planned),
        _gaps(names[3], source, planned),
    ]


def burstiness(source: ArrivalStats) -> float:
    """The largest index of dispersion of the trace over any windows that it was counted in; at least 1."""
    counts = np.array(source.counts, dtype=np.float64)
    known = [d for d in source.dispersion.values() if d is not None]
    return max(1.0, *known, float(counts.var() / counts.mean()) if len(counts) else 1.0)


def _rate(name: str, info: PlanInfo, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    lasts_s = sum(window.lasts_s or 0.0 for window in info.windows) * (info.speed or 1.0)
    asked = (source.rate or 0.0) * lasts_s
    off = abs(planned.requests / asked - 1)
    bound = max(MEAN_BOUND, ERRORS * math.sqrt(burstiness(source) / asked))
    return Fidelity(
        name=name, ok=off <= bound, observed=f"{planned.requests} requests for {asked:.0f} ({off:.1%} off)",
        bound=_bound(bound), said="" if off <= bound else CHANCE_OR_DRIFT,
    )  # fmt: skip


def _bursts(name: str, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    """Index of dispersion D in windows of the plan; chance is that of a variance of so many counts, and of bursts."""
    ok, compared, said = True, False, []
    for w in WINDOWS_S:
        before, after = source.dispersion[f"{w}s"], planned.dispersion[f"{w}s"]
        if before is None or after is None:
            continue
        compared = True
        said.append(f"{w}s {number(before)} -> {number(after)}")
        # Counts come in runs of high and low ones where they are bursty, so there are fewer of them than windows.
        counts = max(planned.span_s / w / max(1.0, burstiness(source) / max(before, 1.0)), FEWEST_WINDOWS / 2)
        ok &= abs(after - before) <= EXACT * before + 2 * ERRORS * max(before, 1.0) * math.sqrt(2 / counts)
    if not compared:
        return not_comparable(name, "the plan is shorter than ten windows")
    return Fidelity(
        name=name, ok=ok, observed="variance/mean " + ", ".join(said), bound="the chance of so few windows",
        said="" if ok else CHANCE_OR_DRIFT,
    )  # fmt: skip


def _gaps(name: str, source: ArrivalStats, planned: ArrivalStats) -> Fidelity:
    mean_s = source.span_s / (source.requests - 1)
    off_s = float(np.abs(np.array(source.gap_quantiles_s) - np.array(planned.gap_quantiles_s))[1:-1].mean())
    spread = max(1.0, source.gap_cv or 1.0)
    bound = LENGTH_BOUND + KS_CHANCE * spread * math.sqrt(burstiness(source) / planned.requests)
    ok = off_s <= bound * mean_s
    return Fidelity(
        name=name, ok=ok, observed=f"sorted gaps {off_s:.3g} s apart (mean gap {mean_s:.3g} s)",
        bound=f"{bound:.1%} of the mean gap, by chance", said="" if ok else CHANCE_OR_DRIFT,
    )  # fmt: skip


def mean_lengths(side: str, source: LengthStats | None, lengths: Floats, info: PlanInfo) -> Fidelity:
    """Mean tokens of the plan against those of the trace."""
    name = f"planned: {side} lengths"
    known = np.isfinite(lengths)
    n = int(known.sum())
    if source is None or not n:
        return not_comparable(
            name, "the trace says no lengths on this side" if source is None else "they are the server's"
        )
    if info.busiest:
        return not_comparable(name, ON_PURPOSE)
    cap = info.max_output_tokens if side == "output" else None
    if cap is not None and (cap < source.quantiles[-1] or (info.source and source.rows < info.source.requests)):
        return not_comparable(name, f"output lengths were capped at {cap} tokens, as asked")
    mean = float(lengths.sum(where=known)) / n
    bound = max(MEAN_BOUND, ERRORS * standard_error(lengths, info, source.part_sd) / source.mean)
    off = abs(mean / source.mean - 1)
    return Fidelity(
        name=name, ok=off <= bound, observed=f"mean {source.mean:.1f} -> {mean:.1f} tokens ({off:.1%} off)",
        bound=_bound(bound), said="" if off <= bound else CHANCE_OR_DRIFT,
    )  # fmt: skip


def standard_error(values: Floats, info: PlanInfo, part_sd: float | None = None) -> float:
    """Of the mean of a plan's ``values`` (NaN: not given): that of single requests or of its windows, the larger.

    ``part_sd``: by how much stretches of the trace differ, which a few windows do not tell.
    """
    known = values[np.isfinite(values)]
    errors = [float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.inf]
    means, at = [], 0
    for window in info.windows:
        part = values[at : at + window.requests]
        at += window.requests
        if np.isfinite(part).any():
            means.append(float(np.nanmean(part)))
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


def _bound(bound: float) -> str:
    return f"{bound:.1%}" + (" (two standard errors)" if bound > MEAN_BOUND else "")
