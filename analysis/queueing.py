"""The memory of a run's queue, from its rows: what `analysis.relaxation` needs to know of it."""

from __future__ import annotations

import numpy as np

from analysis import metrics
from analysis.load import Run
from analysis.metrics import Window
from analysis.relaxation import ClosedLoop, Memory, relaxation
from analysis.served import MISMATCH_BOUND


def queue_of(run: Run, window: Window | None) -> Memory | None:
    """The memory of the run: of a closed loop its slots, of an open loop what its series show. None without a window.

    Work is output tokens, or requests where too many of these are not known.
    """
    if window is None:
        return None
    if run.manifest.spec.mode != "open":
        return ClosedLoop(concurrency=run.manifest.spec.concurrency or 1)
    rows = run.rows
    sent = metrics.was_sent(rows)
    sent_s = rows.sent_s[sent]
    came = metrics.binned(sent_s, None, window)
    sold = rows.output_tokens[sent]
    known = np.isfinite(sold)
    if known.sum() < (1 - MISMATCH_BOUND) * rows.success[sent].sum():
        finished_s = rows.finished_s[sent]
        work_came, work_done = came, metrics.binned(finished_s[np.isfinite(finished_s)], None, window)
    else:
        sold_then = known & rows.success[sent]
        work_came = metrics.binned(sent_s[sold_then], sold[sold_then], window)
        work_done = np.asarray(run.chunks.output_tokens, dtype=np.float64)
    return relaxation(
        in_flight=metrics.in_flight(rows, window), came=came, work_came=work_came, work_done=work_done,
        bin_s=window.bin_s,
    )  # fmt: skip
