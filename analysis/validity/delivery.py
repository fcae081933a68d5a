"""Can the time of tokens be told from how they were delivered? Where it cannot, tpot is null, and this says why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis import metrics
from analysis.check import Check, limit
from analysis.rows.read import Run

UNTOLD_BOUND = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Streamed successes of two output tokens or more, and those of them that cannot be timed by token."""

    streamed: int
    clumps: int
    single: int
    """All in one event."""
    hidden: int
    """With declared reasoning that may not have been streamed."""
    unclear: int
    """Nobody says how many tokens a chunk holds."""


def delivery(run: Run) -> tuple[Check, Check]:
    """Output arrived as it was made, and it is known how many tokens came between first chunk and last."""
    rows = run.rows
    streamed = rows.success & (rows.chunks >= 1) & (rows.output_tokens >= 2)
    clumps, single, declared = metrics.clumped(rows), rows.chunks == 1, rows.reasoning_tokens > 0
    lost = streamed & ~clumps & ~single & np.isnan(metrics.between(rows))
    seen = _Seen(
        streamed=int(streamed.sum()), clumps=int((streamed & clumps).sum()), single=int((streamed & single).sum()),
        hidden=int((lost & declared).sum()), unclear=int((lost & ~declared).sum()),
    )  # fmt: skip
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
