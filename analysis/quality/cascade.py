"""The candidate first, the current model where the candidate seems unsure: what a threshold gains when it is not tuned
on the records that judge it.

A threshold tuned and reported on the same half promises what it does not keep (here: -1.8 points where tuned, -3.5 on
the other half). So sessions are split in two; each half is judged by the threshold of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.quality.estimate import Bounded
from harness.analysis.quality.paired import ALPHA, FEWEST_SESSIONS, Paired, paired

STEPS = 40
"""Thresholds that are tried: quantiles of the scores of the tuning half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One half judged by the threshold of the other."""

    threshold: float
    """Keep the candidate's answer where its score is at least this."""
    tuned: Paired
    """On the half that chose it, where it looks better than it is."""
    held_out: Paired
    kept: float
    """Share of the held-out half's weight that the candidate answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cascade:
    """What the cascade does, beside what needs no score at all. Shares accepted are of the records' weight."""

    threshold: float
    """To deploy: the more careful of both halves."""
    halves: tuple[Half, Half]
    held_out: Paired
    """All records, each by the threshold of the other half, against the current model alone."""
    kept: float
    """Share that the candidate answers alone at ``threshold``."""
    bill: Bounded | None
    """At ``threshold``: both calls where it escalates and both fleets, over the current model's bill."""
    slo_met: bool | None
    """With both latencies where it escalates."""
    random: float
    """Share accepted when as many records are kept at random."""
    oracle: float
    """Share accepted when each record goes to a model that gets it right, if one does: no score can do better."""
    both_wrong: float
    """Share that escalation cannot mend."""
    worse: tuple[str, ...] = ()
    """Parts of the trace on which it is proven worse by the margin, on held-out records."""

    def passes(self, margin: float, alpha: float = ALPHA) -> bool:
        """Not worse by the margin on held-out records, cheaper by the worse end, and within the SLO."""
        enough = min(half.held_out.sessions for half in self.halves) * 2 >= FEWEST_SESSIONS
        good = enough and not self.worse and self.held_out.p_worse_by(margin) <= alpha
        return good and self.bill is not None and self.bill.high < 1 and self.slo_met is True


def halves(session: Ints, seed: int = 0) -> Bools:
    """True for records of the first half: sessions by the hash of their number, so that none is in both."""
    unique, place = np.unique(session, return_inverse=True)
    digests = [hashlib.blake2b(b"%d %d" % (seed, one), digest_size=8).digest() for one in unique.tolist()]
    first: Bools = np.array([digest[0] < 128 for digest in digests], np.bool_)[place]
    return first


def cascade(
    score: Floats, current: Floats, candidate: Floats, session: Ints, weight: Floats, *, margin: float,
    bill: Callable[[Bools], Bounded | None], slo_met: Callable[[Bools], bool | None], alpha: float = ALPHA,
    seed: int = 0, parts: Mapping[str, Bools] | None = None,
) -> Cascade | None:  # fmt: skip
    """Tune on each half, judge on the other. ``score``: higher is surer (mean or least log-probability of a token).

    ``bill`` and ``slo_met`` are asked with the records that are escalated. A record without score or grade of the
    candidate is escalated. ``parts``: of the trace, none of which may get worse by the margin (Bonferroni). None where
    a half has no graded record, or where nothing is kept.
    """
    known = np.isfinite(score) & np.isfinite(candidate)
    sure = np.where(known, score, -np.inf)
    answer = np.where(known, candidate, 0.0)
    first = halves(session, seed)

    def against(mask: Bools, kept: Bools) -> Paired | None:
        mixed = np.where(kept, answer, current)
        return paired(current[mask], mixed[mask], session[mask], weight[mask])

    def tune(mask: Bools) -> float:
        """The lowest threshold, so the cheapest, that is proven not worse; infinite where none is."""
        if not (mask & known).any():
            return float("inf")
        for threshold in np.unique(np.quantile(score[mask & known], np.linspace(0, 1, STEPS))):
            found = against(mask, sure >= threshold)
            if found is not None and found.p_worse_by(margin) <= alpha:
                return float(threshold)
        return float("inf")

    thresholds = tune(first), tune(~first)
    crossed = sure >= np.where(first, thresholds[1], thresholds[0])
    found = []
    for mask, other in ((first, thresholds[1]), (~first, thresholds[0])):
        tuned, held_out = against(~mask, sure >= other), against(mask, sure >= other)
        if tuned is None or held_out is None:
            return None
        kept = float(weight[mask] @ (sure >= other)[mask]) / float(weight[mask].sum())
        found.append(Half(threshold=other, tuned=tuned, held_out=held_out, kept=kept))
    whole = against(np.ones(len(session), np.bool_), crossed)
    threshold = max(thresholds)
    kept_then = sure >= threshold
    if whole is None or not kept_then.any():
        return None
    graded = np.isfinite(current) & known
    total, w = float(weight[graded].sum()), weight[graded]
    share = float(weight @ kept_then) / float(weight.sum())
    a, c = current[graded], candidate[graded]
    each = {name: against(mask, crossed) for name, mask in (parts or {}).items()}
    level = alpha / max(1, len(each))
    return Cascade(
        threshold=threshold, halves=(found[0], found[1]), held_out=whole, kept=share, bill=bill(~kept_then),
        slo_met=slo_met(~kept_then), random=float(w @ (share * c + (1 - share) * a)) / total,
        oracle=float(w @ np.maximum(a, c)) / total, both_wrong=float(w @ np.minimum(1 - a, 1 - c)) / total,
        worse=tuple(name for name, one in each.items() if one is not None and one.interval(level)[1] < -margin),
    )  # fmt: skip
