"""One run as arrays of a fixed size, whatever its length: what pictures are made from.

Latencies are counted into a grid of time bins x latency bins (`analysis.rows.itl_histogram`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.metrics import BINS, Window
from harness.analysis.rows.itl_histogram import EDGES, count_in
from harness.analysis.rows.read import Run
from harness.analysis.validity.counters import shared_addresses

PER_GROUP, FEW = 20, 3
SECOND = 1.0
GROUPS = (1, 2, 4, 5, 8, 10, 20)
NEAR_S = 5.0
"""A server that was not heard of for longer than this has no value there."""
SERVER_COLUMNS = ("running", "waiting", "kv_cache_usage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A run in `BINS` equal time bins over its window; latency grids are counts, shape (BINS, len(EDGES))."""

    window: Window
    time_s: Floats
    """Middle of each bin, s after the common start."""
    planned: Floats
    """Requests per second by planned time; by sent time in ``sent``, failures by their end in ``failed``."""
    sent: Floats
    failed: Floats
    in_flight: Floats
    input_tokens: Floats
    output_tokens: Floats
    grids: dict[str, Floats]
    """Metric -> counts. Latencies by planned time, itl by the time of the chunk and weighted by its tokens."""
    server: dict[str, Floats]
    """Column of the server's own samples -> value per bin, NaN where not known; empty when there are none."""
    loop_lag_s: Floats | None
    """Longest lateness of any load worker's event loop per bin; None when they did not watch themselves."""


def curves(run: Run) -> Curves | None:
    """Reduce a run; None when it has no window."""
    window = metrics.window(run.rows)
    if window is None:
        return None
    rows = run.rows
    grids = {name: np.zeros((BINS, len(EDGES))) for name in ("ttft", "service_ttft", "tpot", "e2e", "lag")}
    due = metrics.bin_of(rows.scheduled_s, window)
    for name, grid in grids.items():
        count_in(grid, due, getattr(metrics, name)(rows))
    grids["itl"] = run.chunks.itl_grid
    into = metrics.binned(*metrics.input_token_events(rows), window)
    sent = metrics.was_sent(rows)
    failed = np.isfinite(rows.sent_s) & ~rows.success
    edges = np.linspace(window.start_s, window.end_s, BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    return Curves(
        window=window,
        time_s=middle,
        planned=_per_second(rows.scheduled_s[sent], window),
        sent=_per_second(rows.sent_s[sent], window),
        failed=_per_second(rows.finished_s[failed], window),
        in_flight=metrics.in_flight(rows, window),
        input_tokens=into / window.bin_s,
        output_tokens=run.chunks.output_tokens / window.bin_s,
        grids=grids,
        server=_server(run, middle),
        loop_lag_s=_loop_lag(run, window),
    )


def _per_second(times_s: Floats, window: Window) -> Floats:
    return metrics.binned(times_s, None, window) / window.bin_s


def _loop_lag(run: Run, window: Window) -> Floats | None:
    seconds = run.seconds
    known = np.isfinite(seconds.loop_lag_max_s)
    if not known.any():
        return None
    place = ((seconds.t_s[known] - window.start_s) / window.bin_s).astype(np.int64)
    inside = (place >= 0) & (place < BINS)
    worst = np.full(BINS, -np.inf)
    np.maximum.at(worst, place[inside], seconds.loop_lag_max_s[known][inside])
    return np.where(np.isfinite(worst), worst, np.nan)


def _server(run: Run, at_s: Floats) -> dict[str, Floats]:
    """Requests in all servers' batches and queues, and the KV cache use of the fullest, where every server is known."""
    tables = None if shared_addresses(run) else run.server_tables()
    found = {}
    for name in SERVER_COLUMNS if tables else ():
        combine = np.max if name == "kv_cache_usage" else np.sum
        values = combine(np.array([_at(table, name, at_s) for table in tables or ()]), axis=0)
        if np.isfinite(values).any():
            found[name] = values
    return found


def _at(table: pa.Table, name: str, at_s: Floats) -> Floats:
    """A column at the times ``at_s``, straight lines between samples, NaN farther than `NEAR_S` from one."""
    value = table.column(name).to_numpy().astype(np.float64)
    time = table.column("t_ns").to_numpy() / 1e9
    known = np.isfinite(value)
    time, value = time[known], value[known]
    order = np.argsort(time, kind="stable")
    time, value = time[order], value[order]
    if not len(time):
        return np.full(len(at_s), np.nan)
    after = np.clip(np.searchsorted(time, at_s), 0, len(time) - 1)
    near = np.minimum(np.abs(time[after] - at_s), np.abs(at_s - time[np.maximum(after - 1, 0)]))
    return np.where(near <= NEAR_S, np.interp(at_s, time, value), np.nan)


def cumulative(grid: Floats) -> Floats:
    """Share of the samples at or below each of `EDGES`; NaN without samples."""
    counts = grid.sum(axis=0)
    return np.cumsum(counts) / counts.sum() if counts.sum() else np.full(len(EDGES), np.nan)


def over_time(grid: Floats, requests: int, tail: float = 0.99) -> tuple[Floats, Floats]:
    """Median and worst latency per time bin, s; worst is that of the share ``tail``, or the largest of too few for it.

    Neighbouring bins are joined until one holds about `PER_GROUP` of ``requests``, so that a median means something.
    """
    group = _group(requests, PER_GROUP)
    counts = np.cumsum(grid.reshape(BINS // group, group, -1).sum(axis=1), axis=1)
    total = counts[:, -1]
    found = []
    for share in (np.full(len(total), 0.5), np.where(total * (1 - tail) < 1 - 1e-9, 1.0, tail)):
        reached = counts >= (share * total * (1 - 1e-12))[:, None]
        value = EDGES[np.argmax(reached, axis=1)]
        found.append(np.repeat(np.where(total > 0, value, np.nan), group))
    return found[0], found[1]


def joined(rates: Floats, found: Curves, requests: int) -> Floats:
    """Rates per time bin as means of neighbouring bins: at least `SECOND` long and of a few requests each. Bins that
    are NaN (not known yet) count in none.
    """
    group = max(_group(requests, FEW), next((k for k in GROUPS if found.window.bin_s * k >= SECOND), GROUPS[-1]))
    parts = rates.reshape(-1, group)
    of = np.isfinite(parts).sum(axis=1)
    return np.repeat(np.divide(np.nansum(parts, axis=1), of, out=np.full(len(of), np.nan), where=of > 0), group)


def _group(requests: int, wanted: int) -> int:
    """How many time bins to join so that one holds about ``wanted`` of ``requests``."""
    return next((k for k in GROUPS if requests * k >= wanted * BINS), GROUPS[-1])
