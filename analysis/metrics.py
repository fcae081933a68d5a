"""Every metric as a pure function of result columns. Definitions, edge cases and sources: METRICS.md.

Per-request functions return one float per row, NaN where the metric does not exist for that row. Latency exists for
successful requests only; failures count against goodput and attainment instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Bools, Floats
from harness.analysis.rows.itl_histogram import clumped as clumped
from harness.analysis.rows.itl_histogram import itl as itl
from harness.analysis.rows.run import BINS as BINS
from harness.analysis.rows.run import Rows, Run
from harness.analysis.rows.run import Window as Window
from harness.analysis.rows.run import bin_of as bin_of
from harness.analysis.rows.run import binned as binned
from harness.analysis.rows.run import was_sent as was_sent
from harness.analysis.rows.run import window as window
from harness.slo import split_key

BETWEEN_BOUND = 0.1
"""Share by which tpot may be wrong for want of knowing how many tokens a chunk holds."""
MISMATCH_BOUND = 0.01
"""Share of requests of which something may be unknown or other than planned before a figure of all is none."""


def lag(rows: Rows) -> Floats:
    """lag, s: sent - scheduled, of every request that was sent, failed ones too."""
    return rows.sent_s - rows.scheduled_s


def ttft(rows: Rows) -> Floats:
    """ttft, s: first chunk that carries output - scheduled. NaN without output."""
    return service_ttft(rows) + lag(rows)


def service_ttft(rows: Rows) -> Floats:
    """Service ttft, s: first chunk that carries output - sent; what a client that counts from its own send reports.

    Source: vLLM ``benchmarks/lib/endpoint_request_func.py`` (``ttft``).
    """
    return np.where(rows.success, rows.first_gap_s, np.nan)


def e2e(rows: Rows) -> Floats:
    """e2e latency, s: finished - scheduled."""
    return np.where(rows.success, rows.finished_s - rows.scheduled_s, np.nan)


def service_e2e(rows: Rows) -> Floats:
    """Service e2e latency, s: finished - sent."""
    return np.where(rows.success, rows.finished_s - rows.sent_s, np.nan)


def tpot(rows: Rows) -> Floats:
    """tpot, s per output token: (last chunk - first chunk) / tokens that came between.

    NaN below two output tokens, without ``usage``, when all output came in one chunk (then nothing was timed) or in
    clumps (`clumped`), and when nobody knows how many tokens came between.
    Source: vLLM and NVIDIA GenAI-Perf divide by output tokens - 1: the same where the first chunk holds one token.
    """
    tokens = between(rows)
    usable = rows.success & (rows.chunks >= 2) & (rows.output_tokens >= 2) & (tokens >= 1) & ~clumped(rows)
    result = np.full(len(rows), np.nan)
    result[usable] = rows.decode_s[usable] / tokens[usable]
    return result


def between(rows: Rows) -> Floats:
    """Output tokens after the first chunk; NaN when not known.

    As the server said for each chunk. Where it did not, the first chunk holds at least one and leaves one at least for
    each other: output tokens - 1, unless what it may hold makes more than `BETWEEN_BOUND` of a difference, or some
    tokens are declared to be reasoning: those were perhaps not streamed.
    """
    most, least = rows.output_tokens - 1, rows.chunks - 1
    close = (least >= (1 - BETWEEN_BOUND) * most) & ~(rows.reasoning_tokens > 0)
    stated = rows.stated_tokens - rows.first_tokens
    return np.where(np.isfinite(stated), stated, np.where(close, most, np.nan))


def itl_max(rows: Rows) -> Floats:
    """Longest pause of each answer, s: the longest gap between two chunks. NaN below two chunks, and in clumps."""
    return np.where(rows.success & ~clumped(rows), rows.max_gap_s, np.nan)


def untold(rows: Rows) -> int:
    """Successful requests of several chunks whose server did not say how many tokens a chunk holds: one sample each."""
    return int((rows.success & (rows.chunks >= 2) & np.isnan(rows.stated_tokens)).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Measured requests by what became of them; planned is the sum of all but ``sent``."""

    planned: int
    sent: int
    succeeded: int
    failed: int
    """Ended with an error other than those below."""
    unfinished: int
    """In flight or not yet sent when the run was stopped."""
    lost: int
    """Without a usable row. Counted as failed everywhere."""
    not_due: int
    """Beyond the duration that was asked for, never sent: nobody offered them, so they count nowhere."""
    cancelled: int
    """Hung up by the client on purpose, as planned: load for the server, but neither its success nor its failure."""

    @property
    def offered(self) -> int:
        """Requests that count in goodput and attainment."""
        return self.planned - self.not_due - self.cancelled


def not_due(run: Run) -> Bools:
    """Rows that were never meant to go out: unsent because the run's own ``duration_s`` ended before they were due."""
    spec, rows = run.manifest.spec, run.rows
    if spec.duration_s is None or run.manifest.status != "complete":
        return np.zeros(len(rows), np.bool_)
    from_s = spec.duration_s if spec.mode == "open" else -np.inf
    found: Bools = (rows.error == _code(run, "unsent")) & (rows.scheduled_s >= from_s)
    return found


def not_offered(run: Run) -> Bools:
    """Rows that are no evidence for or against the server: never due, or cancelled on purpose."""
    cancelled: Bools = run.rows.error == _code(run, "cancelled")
    return not_due(run) | cancelled


def count(run: Run) -> Counts:
    """How many requests were planned, sent, succeeded, failed, unfinished, lost, not due, cancelled."""
    succeeded, by_name = by_error(run)
    skipped, cancelled = int(not_due(run).sum()), by_name.get("cancelled", 0)
    unfinished = by_name.get("unsent", 0) + by_name.get("stopped", 0) - skipped
    return Counts(
        planned=run.planned,
        sent=int(was_sent(run.rows).sum()),
        succeeded=succeeded,
        failed=len(run.rows) - succeeded - unfinished - skipped - cancelled,
        unfinished=unfinished,
        lost=run.lost,
        not_due=skipped,
        cancelled=cancelled,
    )


def by_error(run: Run) -> tuple[int, dict[str, int]]:
    """How many rows succeeded, and how many ended with each error class."""
    found = np.bincount(run.rows.error + 1, minlength=len(run.errors) + 1)
    return int(found[0]), dict(zip(run.errors, found[1:].tolist(), strict=True))


def _code(run: Run, name: str) -> int:
    """What `Rows.error` holds for an error class; no row holds it where there was none."""
    return run.errors.index(name) if name in run.errors else len(run.errors)


def unknown(rows: Rows, name: str) -> int:
    """Successful requests of two output tokens or more whose ``tpot`` or ``itl_max`` nobody knows."""
    metric = {"tpot": tpot, "itl_max": itl_max}[name]
    return int((rows.success & ~(rows.output_tokens < 2) & np.isnan(metric(rows))).sum())


def meets_slo(rows: Rows, slo: Mapping[str, float]) -> Bools:
    """Rows that succeeded within every limit (s), that of a percentile too. An unknown metric does not meet its limit.

    One exception: a request of fewer than two output tokens has no tpot and no pause to miss.
    """
    return slo_ratio(rows, slo) <= 1


def slo_ratio(rows: Rows, slo: Mapping[str, float]) -> Floats:
    """How much of its tightest limit each row used: 1 is the limit; inf when it failed or a metric is not known."""
    values = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "itl_max": itl_max}
    worst = np.where(rows.success, 0.0, np.inf)
    for key, limit in slo.items():
        name, _ = split_key(key)
        used = values[name](rows) / limit
        if name in ("tpot", "itl_max"):
            used[rows.success & (rows.output_tokens < 2)] = 0.0
        worst = np.maximum(worst, np.where(np.isnan(used), np.inf, used))
    return worst


def input_token_events(rows: Rows) -> tuple[Floats, Floats]:
    """(time s, input tokens) of successful requests, at the first chunk (the prompt has been read by then)."""
    sold = rows.success & np.isfinite(rows.input_tokens)
    time = np.where(rows.chunks > 0, rows.sent_s + rows.first_gap_s, rows.finished_s)
    return time[sold], rows.input_tokens[sold]


def in_flight(rows: Rows, within: Window) -> Floats:
    """Requests in flight, time average per bin of the window, shape (BINS,); failed requests count while they ran."""
    sent = was_sent(rows)
    edges = np.linspace(within.start_s, within.end_s, BINS + 1)
    begun, ended = (_integral(np.sort(t[sent]), edges) for t in (rows.sent_s, rows.finished_s))
    return np.maximum(0.0, np.diff(begun - ended) / within.bin_s)


def _integral(sorted_s: Floats, at: Floats) -> Floats:
    """Sum over events of max(0, at - event), for each ``at``."""
    passed = np.searchsorted(sorted_s, at, side="right")
    running = np.cumsum(sorted_s)
    before: Floats = np.where(passed > 0, running[passed - 1], 0.0) if len(running) else np.zeros(len(at))
    return at * passed - before


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of the measured requests as the server counted them; None when it did not."""

    input: int | None
    """Input tokens of successful requests, cached ones included."""
    cached_input: int | None
    output: int | None
    """Output tokens of successful requests."""
    wasted_output: int | None
    """Output tokens of requests that failed later: made, not sold. None when a failed one's count is not known."""
    missing: int
    """Successful requests without complete ``usage``; their tokens are missing above."""


def tokens(rows: Rows) -> Tokens:
    """Token totals over the window. A total is None when no successful request said it."""
    sold = rows.success
    counted = np.where(np.isfinite(rows.output_tokens), rows.output_tokens, rows.stated_tokens)
    wasted = counted[~sold & (rows.chunks > 0)]
    return Tokens(
        input=_total(rows.input_tokens[sold]),
        cached_input=_total(rows.cached_tokens[sold]),
        output=_total(rows.output_tokens[sold]),
        wasted_output=int(wasted.sum()) if np.isfinite(wasted).all() else None,
        missing=int((sold & ~(np.isfinite(rows.input_tokens) & np.isfinite(rows.output_tokens))).sum()),
    )


def _total(values: Floats) -> int | None:
    known = np.isfinite(values)
    return int(values.sum(where=known)) if known.any() else None


def planned_rate(run: Run) -> float | None:
    """Request rate asked for, req/s: (n - 1) / (last - first planned time) of the requests that were due.

    None in a closed loop, below two requests, and when all are due at one instant.
    """
    due = run.planned_scheduled_s
    limit = run.manifest.spec.duration_s
    if limit is not None:
        due = due[: np.searchsorted(due, limit)]
    if run.manifest.spec.mode != "open" or len(due) < 2 or due[-1] <= due[0]:
        return None
    return float((len(due) - 1) / (due[-1] - due[0]))


def unjudged(limits: Mapping[str, float], rows: Rows, counts: Counts) -> str | None:
    """Why it is not known whether requests kept these limits; None: it is."""
    for name in ("tpot", "itl_max"):
        if all(split_key(key)[0] != name for key in limits):
            continue
        missing = unknown(rows, name)
        if missing <= MISMATCH_BOUND * counts.succeeded:
            continue
        uncounted = int((rows.success & np.isnan(rows.output_tokens)).sum())
        if name == "tpot" and uncounted == missing:
            return f"tpot is not known: usage missing on {missing} of {counts.succeeded} requests"
        return f"{name} is not known of {missing} of {counts.succeeded} requests (limits say why)"
    return None
