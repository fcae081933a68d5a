"""What was served per second over the window of a run, and how long its queue remembers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from analysis import metrics
from analysis.arrays import Bools, Floats
from analysis.metrics import Counts, Tokens, Window
from analysis.offered_load import GIVEN
from analysis.rows.run import Run
from analysis.stats.intervals import Quantity, rate, without_interval
from analysis.stats.relaxation import ClosedLoop, Memory, relaxation


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second over the window; ``concurrency`` is requests in flight, time average."""

    request_rate: Quantity
    request_throughput: Quantity
    input_token_throughput: Quantity
    output_token_throughput: Quantity
    total_token_throughput: Quantity
    goodput: Quantity
    concurrency: Quantity


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
    if known.sum() < (1 - metrics.MISMATCH_BOUND) * rows.success[sent].sum():
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


def served_rates(
    run: Run,
    window: Window | None,
    tokens: Tokens,
    counts: Counts,
    limits: Mapping[str, float],
    ratio: float,
    queue: Memory | None,
) -> tuple[Rates, Quantity]:
    """The rates, and input / ratio + output tokens per second, the denominator of the price split."""
    rows, evidence = run.rows, run.evidence
    asked = metrics.planned_rate(run)
    request_rate = Quantity(
        value=asked,
        n=len(run.planned_scheduled_s),
        unit="req/s",
        note="planned arrivals over their own span" if asked is not None else "no planned times",
        evidence="plan",
    )

    def blank(unit: str, why: str, n: int = 0) -> Quantity:
        return Quantity(value=None, n=n, unit=unit, note=why, evidence=evidence)

    if window is None:
        request, token = (blank(unit, "nothing was sent and ended") for unit in ("req/s", "tokens/s"))
        in_flight = blank("requests", "nothing was sent and ended")
        return Rates(
            request_rate=request_rate, request_throughput=request, input_token_throughput=token,
            output_token_throughput=token, total_token_throughput=token, goodput=request, concurrency=in_flight,
        ), token  # fmt: skip

    def requests(which: Bools) -> Quantity:
        ended = metrics.binned(rows.finished_s[which], None, window)
        return rate(ended, window.bin_s, n=int(which.sum()), unit="req/s", evidence=evidence)

    unknown, short = metrics.unjudged(limits, rows, counts), None if queue is None else queue.note
    good = metrics.meets_slo(rows, limits)
    out, into = run.chunks.output_tokens, metrics.binned(*metrics.input_token_events(rows), window)
    n = counts.succeeded
    too_few = tokens.missing > metrics.MISMATCH_BOUND * n
    note = f"usage missing on {tokens.missing} of {n} requests" if tokens.missing else None

    def token_rate(total: int | None, per_bin: Floats) -> Quantity:
        if total is None or too_few:
            return blank("tokens/s", note or "no request succeeded", n)
        return rate(per_bin, window.bin_s, n=n, unit="tokens/s", evidence=evidence, note=note)

    busy_s = metrics.in_flight(rows, window) * window.bin_s
    all_known = None if tokens.input is None or tokens.output is None else tokens.input + tokens.output
    return Rates(
        request_rate=request_rate,
        request_throughput=requests(rows.success),
        input_token_throughput=token_rate(tokens.input, into),
        output_token_throughput=token_rate(tokens.output, out),
        total_token_throughput=token_rate(all_known, out + into),
        goodput=(
            blank("req/s", unknown, n)
            if unknown
            else requests(good)
            if limits
            else blank("req/s", "no SLO given (--slo)")
        ),
        concurrency=without_interval(
            rate(busy_s, window.bin_s, n=counts.sent, unit="requests", evidence=evidence), short
        ),
    ), token_rate(all_known, out + into / ratio)


def given(rates: Rates) -> Rates:
    """The rates at a load that was given: how fast it was served is the load's own."""
    names = ("request_throughput", "input_token_throughput", "output_token_throughput", "total_token_throughput",
             "goodput")  # fmt: skip
    return replace(rates, **{name: given_rate(getattr(rates, name)) for name in names})


def given_rate(q: Quantity) -> Quantity:
    """A rate at a load that was given, which has no interval."""
    return q if q.value is None else replace(q, low=None, high=None, note=q.note or GIVEN)
