"""Can the time of tokens be told from how they were delivered? Where it cannot, tpot is null, and this says why."""

from __future__ import annotations

import numpy as np

from analysis import metrics
from analysis.check import Check, limit
from analysis.load import Run

UNTOLD_BOUND = 0.01


def chunk_tokens(run: Run) -> Check:
    """It is known how many tokens came between the first chunk of an answer and its last."""
    timed = hidden = unclear = 0
    for _, part in run.rows.blocks():
        several = part.success & (part.chunks >= 2) & (part.output_tokens >= 2)
        lost = several & np.isnan(metrics.between(part))
        declared = part.reasoning_tokens > 0
        timed, hidden, unclear = (
            count + int(np.count_nonzero(which))
            for count, which in ((timed, several), (hidden, lost & declared), (unclear, lost & ~declared))
        )
    bound = f"tpot known of all but {UNTOLD_BOUND:.0%} of the answers"
    if not timed:
        return limit("chunk_tokens", None, "no answer of several chunks", bound, "nothing to do")
    words = [f"{hidden} of {timed} answers have reasoning tokens that may not have been streamed"] if hidden else []
    words += [f"{unclear} of {timed} answers do not say how many tokens their chunks hold"] if unclear else []
    observed = "; ".join(words) or "known"
    advice = "tpot of these is not known, and no limit on it is judged"
    if unclear:
        advice += (
            "; vLLM and SGLang say it with --extra-body "
            '\'{"stream_options": {"include_usage": true, "continuous_usage_stats": true}}\''
        )
    return limit("chunk_tokens", hidden + unclear <= UNTOLD_BOUND * timed, observed, bound, advice)
