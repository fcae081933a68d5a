"""Were the first answers those of a cold server? Engines compile, capture graphs and fill caches at first.

What is compared is the time to the first token (without streaming: to the end), of answers in the order of sending.
"""

from __future__ import annotations

import numpy as np

from analysis import metrics
from analysis.arrays import Bools, Floats
from analysis.check import Check, limit, ms
from analysis.rows.read import Run

LEAST = 20
SLOW = 2.0
"""An answer is slow when it takes so many times the median of those after the first wave."""
LARGEST = 0.25
"""A first wave is no larger a share of a run: what is larger is drift."""
CHANCE = 1e-3
"""By which so many slow answers in a row may be the first ones."""
FAR_LONGER = 2
"""And the run of slow ones must be so many times the longest later one: a queue makes runs, too."""
FEW, FAR = 3, 5.0
"""Fewer slow answers prove nothing by their number. Or each takes so many times the slowest of the others."""
ADVISED = 8
"""So many requests of warm-up are advised at least, and a power of two: a few more than were slow."""


def cold_start(run: Run) -> Check:
    """The first answers took no longer than those after them: a p95 that they decide is not the service's."""
    bound = "the first answers like the others"
    streamed = run.manifest.spec.stream
    took_s, tokens = _in_order(run, streamed)
    if len(took_s) < LEAST:
        return limit("cold_start", None, f"{len(took_s)} answers, too few to compare", bound, "nothing to do")
    first = first_wave(took_s, tokens)
    if not first:
        return limit("cold_start", True, "no slow first wave", bound, "")
    what = "to the first token" if streamed else "to the end"
    wave, rest = float(np.median(took_s[:first])), float(np.median(took_s[first:]))
    observed = f"the first {first} of {len(took_s)} answers took {ms(wave)} {what}, the others {ms(rest)} (medians)"
    advised = max(ADVISED, 1 << (first - 1).bit_length())
    advice = f"a server compiles and fills its caches at first: keep that out of every figure with --warmup {advised}"
    return limit("cold_start", False, observed, bound, advice)


def first_wave(took_s: Floats, tokens: Floats) -> int:
    """How many answers at the beginning are those of a cold server; 0 where they are like the others.

    ``tokens``: of their prompts, NaN where not known; a longer prompt takes longer and is no cold start.
    """
    n = len(took_s)
    first = _leading(took_s > SLOW * np.median(took_s))
    if not 0 < first <= LARGEST * n:
        return 0
    wave, rest = took_s[:first], took_s[first:]
    usual = float(np.median(rest))
    later = rest > SLOW * usual
    chance = ((later.sum() + 1) / (len(rest) + 1)) ** first
    by_number = first >= FEW and chance <= CHANCE and first > FAR_LONGER * _longest_run(later)
    if not by_number and wave.min() <= FAR * rest.max():
        return 0
    longer = float(tokens[:first].mean() / tokens[first:].mean())
    return first if np.median(wave) > SLOW * usual * (longer if longer > 1 else 1.0) else 0


def _in_order(run: Run, streamed: bool) -> tuple[Floats, Floats]:
    """How long each success took, s, and its input tokens, in the order of sending."""
    took_s = (metrics.service_ttft if streamed else metrics.service_e2e)(run.rows)
    known = np.isfinite(took_s)
    order = np.argsort(run.rows.sent_s[known], kind="stable")
    return took_s[known][order], run.rows.input_tokens[known][order]


def _leading(flags: Bools) -> int:
    """How many are true before the first that is not."""
    return len(flags) if flags.all() else int(np.argmin(flags))


def _longest_run(flags: Bools) -> int:
    """The most that are true in a row."""
    ends = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max()) if len(ends) else 0
