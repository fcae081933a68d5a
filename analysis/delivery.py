"""Can the time of tokens be told from how they were delivered? Where it cannot, tpot is null, and this says why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis import metrics
from analysis.check import Check, limit
from analysis.load import Run

UNTOLD_BOUND = 0.01


@dataclass(slots=True)
class _Seen:
    """Streamed successes of two output tokens or more, and those of them that cannot be timed by token."""

    streamed: int = 0
    clumps: int = 0
    single: int = 0
    """All in one event."""
    hidden: int = 0
    """With declared reasoning that may not have been streamed."""
    unclear: int = 0
    """Nobody says how many tokens a chunk holds."""


def delivery(run: Run) -> tuple[Check, Check]:
    """Output arrived as it was made, and it is known how many tokens came between first chunk and last."""
    seen = _Seen()
    for _, part in run.rows.blocks():
        streamed = part.success & (part.chunks >= 1) & (part.output_tokens >= 2)
        clumps, single, declared = metrics.clumped(part), part.chunks == 1, part.reasoning_tokens > 0
        lost = streamed & ~clumps & ~single & np.isnan(metrics.between(part))
        seen.streamed += int(streamed.sum())
        seen.clumps += int((streamed & clumps).sum())
        seen.single += int((streamed & single).sum())
        seen.hidden += int((lost & declared).sum())
        seen.unclear += int((lost & ~declared).sum())
    return _bulk_delivery(seen), _chunk_tokens(seen)


def _bulk_delivery(seen: _Seen) -> Check:
    name, bound = "bulk_delivery", f"at most {UNTOLD_BOUND:.0%} of the answers in clumps"
    if not seen.streamed:
        return limit(name, None, "no streamed answer of several tokens", bound, "nothing to do")
    words = [f"{seen.clumps} of {seen.streamed} answers came in clumps of events with one time"] if seen.clumps else []
    words += [f"{seen.single} of {seen.streamed} answers came in one event"] if seen.single else []
    advice = (
        "itl and tpot of these are not known and no limit on them is judged; ttft is when the first clump came. Switch "
        "buffering off between you and the engine (nginx: proxy_buffering off, or the header X-Accel-Buffering: no); a "
        "server that sends all at its end can only be judged by e2e"
    )
    ok = seen.clumps + seen.single <= UNTOLD_BOUND * seen.streamed
    return limit(name, ok, "; ".join(words) or "event by event", bound, advice)


def _chunk_tokens(seen: _Seen) -> Check:
    name, bound = "chunk_tokens", f"tpot known of all but {UNTOLD_BOUND:.0%} of the answers"
    if not seen.streamed:
        return limit(name, None, "no streamed answer of several tokens", bound, "nothing to do")
    of = f"of {seen.streamed} answers"
    words = [f"{seen.hidden} {of} have reasoning tokens that may not have been streamed"] if seen.hidden else []
    words += [f"{seen.unclear} {of} do not say how many tokens their chunks hold"] if seen.unclear else []
    advice = "tpot of these is not known, and no limit on it is judged"
    if seen.unclear:
        advice += (
            "; vLLM and SGLang say it with --extra-body "
            '\'{"stream_options": {"include_usage": true, "continuous_usage_stats": true}}\''
        )
    ok = seen.hidden + seen.unclear <= UNTOLD_BOUND * seen.streamed
    return limit(name, ok, "; ".join(words) or "known", bound, advice)
