"""Every metric as a pure function of result columns. Definitions, edge cases and sources: METRICS.md.

Per-request functions return one float per row, NaN where the metric does not exist for that row. Latency exists for
successful requests only; failures count against goodput and attainment instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.arrays import Bools, Floats, Ints
from analysis.load import ChunkRows, Rows, Run
from harness.slo import split_key

BETWEEN_BOUND = 0.1
"""Share by which tpot may be wrong for want of knowing how many tokens a chunk holds."""
CLUMP_BOUND, CLUMP_FLOOR_S = 0.25, 0.005
"""Share of chunks that come together with the one before, and time between those that do not, from which on an answer
was delivered in clumps."""
WINDOW_RULE = "whole run, ramp and drain included"
BINS = 200


def was_sent(rows: Rows) -> Bools:
    """Rows that went out."""
    return np.isfinite(rows.sent_s)


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


def clumped(rows: Rows) -> Bools:
    """Answers that were delivered in clumps, so that their gaps are the transport's and not the engine's.

    More than `CLUMP_BOUND` of the chunks have the time of the one before, and the times that differ lie farther apart
    (where none does: the first from sending) than our own loop stood still meanwhile, so that it was not we who read
    them together.
    """
    later = rows.chunks - 1
    apart = later - rows.shared
    spacing = np.divide(rows.decode_s, apart, out=rows.first_gap_s.copy(), where=apart > 0)
    together = (later > 0) & (rows.shared > CLUMP_BOUND * later)
    found: Bools = together & (spacing > np.maximum(CLUMP_FLOOR_S, rows.held_s))
    return found


def itl_max(rows: Rows) -> Floats:
    """Longest pause of each answer, s: the longest gap between two chunks. NaN below two chunks, and in clumps."""
    return np.where(rows.success & ~clumped(rows), rows.max_gap_s, np.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Pooled inter-token gaps, one entry per chunk: ``seconds`` per token, standing for ``tokens`` tokens.

    ``tokens`` is 0 where a chunk ends no gap between tokens: a request's first, and those of failed requests.
    """

    seconds: Floats
    tokens: Floats


def itl(rows: ChunkRows) -> Gaps:
    """itl, s: gaps between token arrivals of successful requests that did not come in clumps, pooled.

    A chunk of k tokens that came g after the chunk before it counts as k samples of g / k; a request's first chunk is
    ttft and counts none. So the samples of a request add up to last chunk - first chunk.
    """
    parts = _parts(rows)
    tokens = np.repeat((rows.success & ~clumped(rows)).astype(np.float64), rows.chunks)
    tokens[rows.offsets[:-1][rows.chunks > 0]] = 0.0
    if parts is None:
        return Gaps(seconds=rows.gap_s, tokens=tokens)
    return Gaps(seconds=rows.gap_s / parts, tokens=parts * tokens)


def _parts(rows: ChunkRows) -> Floats | None:
    """Tokens per chunk, 1 where the server did not say; None when it is 1 throughout, as it mostly is."""
    if (np.isnan(rows.stated_tokens) | (rows.stated_tokens == rows.chunks)).all():
        return None
    return np.where(np.isnan(rows.chunk_tokens), 1.0, rows.chunk_tokens)


def untold(rows: Rows) -> int:
    """Successful requests of several chunks whose server did not say how many tokens a chunk holds: one sample each."""
    return int((rows.success & (rows.chunks >= 2) & np.isnan(rows.stated_tokens)).sum())


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
    sent = was_sent(rows)
    if not sent.any():
        return None
    start = float(rows.scheduled_s.min(where=sent, initial=np.inf))
    end = float(rows.finished_s.max(where=sent, initial=-np.inf))
    if end <= start:
        return None
    return Window(rule=WINDOW_RULE, start_s=start, end_s=end, duration_s=end - start)


def binned(times_s: Floats, amounts: Floats | None, within: Window) -> Floats:
    """Sum of ``amounts`` (None: count) per bin of the window, shape (BINS,). Every time must lie in the window."""
    return np.bincount(bin_of(times_s, within), weights=amounts, minlength=BINS).astype(np.float64)


def bin_of(times_s: Floats, within: Window) -> Ints:
    """Which of the `BINS` bins of the window each time lies in; what is outside lies in the bin at that end."""
    place = (times_s - within.start_s) / within.bin_s
    return np.clip(place, 0, BINS - 1, out=place).astype(np.int64)


def chunk_output_tokens(rows: ChunkRows) -> Floats:
    """Output tokens of each chunk: ``usage`` of successful requests spread over their chunks.

    By the chunks' own token counts where known, else evenly; 0 for chunks of other requests.
    """
    parts = _parts(rows)
    whole = rows.stated_tokens
    whole = np.where(np.isnan(whole), rows.chunks, whole)
    sold = rows.success & np.isfinite(rows.output_tokens)
    scale = np.divide(rows.output_tokens, whole, out=np.zeros(len(rows)), where=sold & (rows.chunks > 0))
    each = np.repeat(scale, rows.chunks)
    return each if parts is None else parts * each


def unstreamed_output_events(rows: Rows) -> tuple[Floats, Floats]:
    """(time s, output tokens) of successful requests without chunks: all at the finish."""
    at_end = rows.success & np.isfinite(rows.output_tokens) & (rows.chunks == 0)
    return rows.finished_s[at_end], rows.output_tokens[at_end]


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
    """Sum of those that are known; None where none is."""
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
