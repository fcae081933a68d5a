"""Every metric as a pure function of result columns. Definitions, edge cases and sources: METRICS.md.

Per-request functions return one float per row, NaN where the metric does not exist for that row. Latency exists for
successful requests only; failures count against goodput and attainment instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from analysis.load import Bools, Floats, Ints, Rows, Run
from harness.errors import UsageError, unknown_name

WINDOW_RULE = "whole run, ramp and drain included"
SLO_METRICS = ("ttft", "tpot", "e2e")
BINS = 200


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
    return np.where(rows.success, _first_gap(rows), np.nan)


def e2e(rows: Rows) -> Floats:
    """e2e latency, s: finished - scheduled."""
    return np.where(rows.success, rows.finished_s - rows.scheduled_s, np.nan)


def service_e2e(rows: Rows) -> Floats:
    """Service e2e latency, s: finished - sent."""
    return np.where(rows.success, rows.finished_s - rows.sent_s, np.nan)


def tpot(rows: Rows) -> Floats:
    """tpot, s per output token: (last chunk - first chunk) / (output tokens - 1).

    NaN below two output tokens, without ``usage``, and when all output came in one chunk: then nothing was timed.
    Source: vLLM and NVIDIA GenAI-Perf divide by output tokens - 1; they end at the last token as here.
    """
    chunks = np.diff(rows.offsets)
    spent = np.bincount(rows.chunk_row, weights=rows.gap_s, minlength=len(rows)) - np.nan_to_num(_first_gap(rows))
    usable = rows.success & (chunks >= 2) & (rows.output_tokens >= 2)
    result = np.full(len(rows), np.nan)
    result[usable] = spent[usable] / (rows.output_tokens[usable] - 1)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Pooled inter-token gaps: ``seconds`` per token, each standing for ``tokens`` tokens, of the row ``row``."""

    seconds: Floats
    tokens: Floats
    row: Ints
    unknown: int
    """Requests whose server did not say how many tokens a chunk holds: one sample per chunk there."""


def itl(rows: Rows) -> Gaps:
    """itl, s: gaps between token arrivals of successful requests, pooled.

    A chunk of k tokens that came g after the chunk before it counts as k samples of g / k; a request's first chunk is
    ttft and counts none. So the samples of a request add up to last chunk - first chunk.
    """
    later = np.ones(len(rows.gap_s), dtype=np.bool_)
    later[_first_index(rows)] = False
    later &= rows.success[rows.chunk_row]
    row = rows.chunk_row[later]
    counts = rows.chunk_tokens[later]
    tokens = np.where(np.isnan(counts), 1.0, counts)
    unknown = len(np.unique(row[np.isnan(counts)]))
    return Gaps(seconds=rows.gap_s[later] / tokens, tokens=tokens, row=row, unknown=unknown)


def _first_index(rows: Rows) -> Ints:
    return rows.offsets[:-1][np.diff(rows.offsets) > 0]


def _first_gap(rows: Rows) -> Floats:
    first = np.full(len(rows), np.nan)
    first[np.diff(rows.offsets) > 0] = rows.gap_s[_first_index(rows)]
    return first


# ---------------------------------------------------------------------------------------------- which requests count


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
        return np.zeros(len(rows), dtype=np.bool_)
    late = rows.scheduled_s >= spec.duration_s if spec.mode == "open" else np.ones(len(rows), dtype=np.bool_)
    return _is_error(rows, "unsent") & late


def not_offered(run: Run) -> Bools:
    """Rows that are no evidence for or against the server: never due, or cancelled on purpose."""
    return not_due(run) | _is_error(run.rows, "cancelled")


def count(run: Run) -> Counts:
    """How many requests were planned, sent, succeeded, failed, unfinished, lost, not due, cancelled."""
    rows, skipped, cancelled = run.rows, not_due(run), _is_error(run.rows, "cancelled")
    unfinished = (_is_error(rows, "unsent") | _is_error(rows, "stopped")) & ~skipped
    return Counts(
        planned=run.planned,
        sent=int(np.isfinite(rows.sent_s).sum()),
        succeeded=int(rows.success.sum()),
        failed=int((~rows.success & ~unfinished & ~skipped & ~cancelled).sum()),
        unfinished=int(unfinished.sum()),
        lost=run.lost,
        not_due=int(skipped.sum()),
        cancelled=int(cancelled.sum()),
    )


def _is_error(rows: Rows, name: str) -> Bools:
    return np.asarray(pc.fill_null(pc.equal(rows.error, name), False).to_numpy(), dtype=np.bool_)


def check_slo(slo: Mapping[str, float]) -> None:
    """Raise `UsageError` for a limit on something else than ttft, tpot or e2e, or a limit that is not positive."""
    for name, limit in slo.items():
        if name not in SLO_METRICS:
            raise unknown_name("SLO metric", name, SLO_METRICS)
        if not (np.isfinite(limit) and limit > 0):
            raise UsageError(f"SLO {name}={limit}: the limit must be a positive number of seconds")


def meets_slo(rows: Rows, slo: Mapping[str, float]) -> Bools:
    """Rows that succeeded within every limit (s). A metric that is not known does not meet its limit.

    One exception: a request of fewer than two output tokens has no tpot to miss.
    """
    met = rows.success.copy()
    values = {"ttft": ttft, "tpot": tpot, "e2e": e2e}
    for name, limit in slo.items():
        within = values[name](rows) <= limit
        if name == "tpot":
            within |= rows.output_tokens < 2
        met &= within
    return met


# ------------------------------------------------------------------------------------------------ the window and rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The one window of every rate, in seconds after the common start, and its rule in words."""

    rule: str
    start_s: float
    end_s: float
    duration_s: float

    @property
    def bin_s(self) -> float:
        """Width of one of the `BINS` equal bins, s."""
        return self.duration_s / BINS


def window(rows: Rows) -> Window | None:
    """From the first scheduled to the last finish of any sent request, failed ones too; None when there is no time."""
    sent = np.isfinite(rows.sent_s)
    if not sent.any():
        return None
    start, end = float(rows.scheduled_s[sent].min()), float(rows.finished_s[sent].max())
    if end <= start:
        return None
    return Window(rule=WINDOW_RULE, start_s=start, end_s=end, duration_s=end - start)


def binned(times_s: Floats, amounts: Floats | None, within: Window) -> Floats:
    """Sum of ``amounts`` (None: count) per bin of the window, shape (BINS,). Every time must lie in the window."""
    index = np.clip(((times_s - within.start_s) / within.bin_s).astype(np.int64), 0, BINS - 1)
    return np.bincount(index, weights=amounts, minlength=BINS).astype(np.float64)


def output_token_events(rows: Rows) -> tuple[Floats, Floats]:
    """(time s, output tokens) of successful requests: ``usage`` spread over the chunks.

    By the chunks' own token counts where known, else evenly. Without chunks: all at the finish.
    """
    chunks = np.diff(rows.offsets)
    part = np.where(np.isnan(rows.chunk_tokens), 1.0, rows.chunk_tokens)
    whole = np.bincount(rows.chunk_row, weights=part, minlength=len(rows))
    sold = rows.success & np.isfinite(rows.output_tokens)
    take = sold[rows.chunk_row]
    row = rows.chunk_row[take]
    at_end = sold & (chunks == 0)
    return (
        np.concatenate((rows.chunk_s[take], rows.finished_s[at_end])),
        np.concatenate((part[take] / whole[row] * rows.output_tokens[row], rows.output_tokens[at_end])),
    )


def input_token_events(rows: Rows) -> tuple[Floats, Floats]:
    """(time s, input tokens) of successful requests, at the first chunk (the prompt has been read by then)."""
    sold = rows.success & np.isfinite(rows.input_tokens)
    time = np.where(np.diff(rows.offsets) > 0, rows.sent_s + _first_gap(rows), rows.finished_s)
    return time[sold], rows.input_tokens[sold]


def in_flight(rows: Rows, within: Window) -> Floats:
    """Requests in flight, time average per bin of the window, shape (BINS,); failed requests count while they ran."""
    sent = np.isfinite(rows.sent_s)
    edges = np.linspace(within.start_s, within.end_s, BINS + 1)
    begun, ended = (_integral(np.sort(t[sent]), edges) for t in (rows.sent_s, rows.finished_s))
    return np.maximum(0.0, np.diff(begun - ended) / within.bin_s)


def _integral(sorted_s: Floats, at: Floats) -> Floats:
    """Sum over events of max(0, at - event), for each ``at``."""
    running = np.concatenate(([0.0], np.cumsum(sorted_s)))
    passed = np.searchsorted(sorted_s, at, side="right")
    total: Floats = at * passed - running[passed]
    return total


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
    chunks = np.diff(rows.offsets)
    stated = np.bincount(rows.chunk_row, weights=rows.chunk_tokens, minlength=len(rows))
    made = np.where(np.isfinite(rows.output_tokens), rows.output_tokens, stated)[~rows.success & (chunks > 0)]
    missing = rows.success & ~(np.isfinite(rows.input_tokens) & np.isfinite(rows.output_tokens))
    return Tokens(
        input=_total(rows.input_tokens[rows.success]),
        cached_input=_total(rows.cached_tokens[rows.success]),
        output=_total(rows.output_tokens[rows.success]),
        wasted_output=int(made.sum()) if np.isfinite(made).all() else None,
        missing=int(missing.sum()),
    )


def _total(values: Floats) -> int | None:
    return int(np.nansum(values)) if np.isfinite(values).any() else None


def planned_rate(run: Run) -> float | None:
    """Request rate asked for, req/s: (n - 1) / (last - first planned time) of the requests that were due.

    None in a closed loop, below two requests, and when all are due at one instant.
    """
    due = run.planned_scheduled_s
    limit = run.manifest.spec.duration_s
    if limit is not None:
        due = due[due < limit]
    if run.manifest.spec.mode != "open" or len(due) < 2 or due[-1] <= due[0]:
        return None
    return float((len(due) - 1) / (due[-1] - due[0]))
