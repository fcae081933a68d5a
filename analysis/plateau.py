"""The figures of a closed loop without its ramp and drain: throughput of the steady part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis import metrics
from analysis.arrays import Floats
from analysis.check import Check, limit
from analysis.intervals import Quantity, rate
from analysis.load import Run
from analysis.metrics import Window
from analysis.steady import Steady, steady_window

LARGEST_DRAIN = 0.1
"""Of the window: more of it moves a price by more than most intervals admit."""


def steady_part(run: Run, window: Window | None) -> Steady | None:
    """Where requests in flight and tokens stay what they are; None without a window."""
    if window is None:
        return None
    work = run.chunks.output_tokens + metrics.binned(*metrics.input_token_events(run.rows), window)
    return steady_window(metrics.in_flight(run.rows, window), work, start_s=window.start_s, bin_s=window.bin_s)


def steady_check(run: Run, steady: Steady | None) -> Check:
    """Load and speed stayed what they were for a good part of the run: else figures are those of a ramp or queue."""
    bound = "a part without ramp, drain and drift"
    if steady is None:
        return limit("steady_state", None, "nothing was sent and ended", bound, "nothing to do")
    if steady.found and steady.start_s is not None and steady.end_s is not None:
        observed = f"from {steady.start_s:.0f} s to {steady.end_s:.0f} s"
    else:
        observed = steady.reason or "none"
    longer = "let it run longer"
    advice = longer if run.manifest.spec.mode == "closed" else f"{longer}, or at a rate that the server keeps up with"
    return limit("steady_state", steady.found, observed, bound, advice)


def drain_check(run: Run, window: Window | None) -> Check:
    """Open loop: how much of the window lies after the last request was due, when the servers empty and are paid for.

    A short run of long answers is drain to a large part: its tokens/s are below what the same load gives for hours.
    """
    bound = f"at most {LARGEST_DRAIN:.0%} of the window after the last request was due"
    if run.manifest.spec.mode != "open" or window is None:
        return limit("drain", None, "closed loop or no window", bound, "nothing to do")
    sent = np.isfinite(run.rows.sent_s)
    last_s = float(run.rows.scheduled_s.max(where=sent, initial=-np.inf))
    drain_s = max(0.0, window.end_s - last_s)
    advice = (
        "no request came in that time and it is paid for: tokens/s come out low and the price high, by up to that "
        "share; a longer run (a longer trace, a higher --limit)"
    )
    share = drain_s / window.duration_s
    observed = f"{drain_s:.1f} of {window.duration_s:.1f} s ({share:.0%}) after the last request was due"
    return limit("drain", share <= LARGEST_DRAIN, observed, bound, advice)


def steady_rates(
    run: Run, window: Window | None, steady: Steady | None, total: Quantity, output: Quantity
) -> tuple[Quantity, Quantity]:
    """Tokens/s and output tokens/s of the steady part; ``total`` and ``output`` are those of the whole run, not known
    where they are not. None of arrivals: what is quiet there is the traffic's own, and to leave it out would sell hours
    that are paid for.
    """
    arrive = run.manifest.spec.mode != "closed"
    if window is None or steady is None or not steady.found or arrive:
        why = "nothing was sent and ended" if steady is None else steady.reason
        why = "not a closed loop: its quiet stretches are part of the load" if arrive else why
        none = [
            q if q.value is None else replace(q, value=None, low=None, high=None, note=why) for q in (total, output)
        ]
        return none[0], none[1]
    part, bin_s = slice(steady.first, steady.last), window.bin_s

    def within(whole: Quantity, per_bin: Floats) -> Quantity:
        if whole.value is None:
            return whole
        return rate(per_bin[part], bin_s, n=whole.n, unit=whole.unit, evidence=whole.evidence, note=whole.note)

    into = metrics.binned(*metrics.input_token_events(run.rows), window)
    return within(total, run.chunks.output_tokens + into), within(output, run.chunks.output_tokens)
