"""One run as arrays of a fixed size, whatever its length: what pictures and the table of promises are made from.

Latencies are counted into a grid of time bins x latency bins, so a million rows and a hundred become the same few
thousand numbers. Latency bins are 2.3 % wide (100 to a decade): read from them, a value is at most that much too high.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from analysis import metrics
from analysis.intervals import samples_needed
from analysis.load import Bools, Floats, Rows, Run
from analysis.metrics import BINS, Counts, Window
from harness.run import RunDir
from harness.server_metrics import SCHEMA as SERVER

PER_DECADE = 100
SMALLEST_S, LARGEST_S = 1e-5, 1e4
EDGES: Floats = np.logspace(-5, 4, 9 * PER_DECADE + 1)
"""Upper edges of the latency bins, s. The first bin holds all that is shorter, the last all that is longer."""
PART_CHUNKS = 4_000_000
PER_GROUP, FEW = 20, 3
SECOND = 1.0
GROUPS = (1, 2, 4, 5, 8, 10, 20)
WORST_OF = 100
NEAR_S = 5.0
"""A server that was not heard of for longer than this has no value there."""
SERVER_COLUMNS = ("running", "waiting", "kv_cache_usage")
SHARES = (0.90, 0.95, 0.99, 0.999)


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
    """Tokens per second, as in the rates."""
    output_tokens: Floats
    grids: dict[str, Floats]
    """Metric -> counts. Latencies by planned time, itl by the time of the chunk and weighted by its tokens."""
    server: dict[str, Floats]
    """Column of the server's own samples -> value per bin, NaN where not known; empty when there are none."""
    loop_lag_s: Floats | None
    """Longest lateness of any load worker's event loop per bin; None when they did not watch themselves."""


def curves(run: Run) -> Curves | None:
    """Reduce a run; None when it has no window. Memory beyond the run's own is that of `PART_CHUNKS` chunks."""
    window = metrics.window(run.rows)
    if window is None:
        return None
    rows = run.rows
    grids = {name: np.zeros((BINS, len(EDGES))) for name in ("ttft", "service_ttft", "tpot", "itl", "e2e", "lag")}
    in_flight, into, out = (np.zeros(BINS) for _ in range(3))
    for part in _parts(rows):
        _count(part, window, grids)
        in_flight += metrics.in_flight(part, window)
        into += metrics.binned(*metrics.input_token_events(part), window)
        out += metrics.binned(*metrics.output_token_events(part), window)
    sent = np.isfinite(rows.sent_s)
    failed = sent & ~rows.success
    edges = np.linspace(window.start_s, window.end_s, BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    return Curves(
        window=window,
        time_s=middle,
        planned=_per_second(rows.scheduled_s[sent], window),
        sent=_per_second(rows.sent_s[sent], window),
        failed=_per_second(rows.finished_s[failed], window),
        in_flight=in_flight,
        input_tokens=into / window.bin_s,
        output_tokens=out / window.bin_s,
        grids=grids,
        server=_server(run, middle),
        loop_lag_s=_loop_lag(run, window),
    )


def _per_second(times_s: Floats, window: Window) -> Floats:
    return metrics.binned(times_s, None, window) / window.bin_s


def _parts(rows: Rows) -> Iterator[Rows]:
    """The rows in pieces of about `PART_CHUNKS` chunks, in file order."""
    start = 0
    while start < len(rows):
        end = int(np.searchsorted(rows.offsets, rows.offsets[start] + PART_CHUNKS, side="right")) - 1
        end = min(len(rows), max(end, start + 1))
        yield _piece(rows, start, end)
        start = end


def _piece(rows: Rows, start: int, end: int) -> Rows:
    first, last = int(rows.offsets[start]), int(rows.offsets[end])
    taken = {
        field.name: getattr(rows, field.name)[first:last]
        if field.name.startswith(("chunk_", "gap_"))
        else getattr(rows, field.name)[start:end]
        for field in fields(rows)
        if field.name not in ("offsets", "chunk_row")
    }
    return replace(
        rows, **taken, offsets=rows.offsets[start : end + 1] - first, chunk_row=rows.chunk_row[first:last] - start
    )


def _count(rows: Rows, window: Window, grids: dict[str, Floats]) -> None:
    """Add the latencies of some rows to the grids."""
    for name, grid in grids.items():
        if name == "itl":
            gaps = metrics.itl(rows)
            _add(grid, rows.chunk_s[_timed(rows)], gaps.seconds, gaps.tokens, window)
        else:
            _add(grid, rows.scheduled_s, getattr(metrics, name)(rows), None, window)


def _timed(rows: Rows) -> Bools:
    """The chunks that `metrics.itl` has a gap for, in its order."""
    later = rows.success[rows.chunk_row]
    counts = np.diff(rows.offsets)
    later[rows.offsets[:-1][counts > 0]] = False
    return later


def _add(grid: Floats, times_s: Floats, values_s: Floats, weights: Floats | None, window: Window) -> None:
    known = np.isfinite(values_s)
    weights = None if weights is None else weights[known]
    decades = np.log10(np.clip(values_s[known], SMALLEST_S, LARGEST_S) / SMALLEST_S)
    # a value on an edge belongs below it, also when the logarithm rounds
    value = np.ceil(decades * PER_DECADE - 1e-9).astype(np.int64)
    time = np.clip(((times_s[known] - window.start_s) / window.bin_s).astype(np.int64), 0, BINS - 1)
    counts = np.bincount(time * len(EDGES) + value, weights=weights, minlength=grid.size)
    grid += counts.reshape(grid.shape)


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
    found: dict[str, list[Floats]] = {name: [] for name in SERVER_COLUMNS}
    for replica in run.manifest.replicas:
        table = _read_server(run, replica.index)
        if table is None:
            return {}
        for name, values in found.items():
            values.append(_at(table, name, at_s))
    combined = {
        name: (np.max if name == "kv_cache_usage" else np.sum)(np.array(values), axis=0)
        for name, values in found.items()
        if values
    }
    return {name: values for name, values in combined.items() if np.isfinite(values).any()}


def _read_server(run: Run, replica: int) -> pa.Table | None:
    """Samples of one server; None when there are none that can be read (they are pictures, not evidence)."""
    path = RunDir(run.path).path / f"server-metrics-{replica}.arrows"
    batches: list[pa.RecordBatch] = []
    try:
        with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
            if reader.schema.names != SERVER.names:
                return None
            with contextlib.suppress(pa.ArrowException, OSError):  # a torn tail: what came before it is whole
                batches.extend(reader)
        table = pa.Table.from_batches(batches, schema=SERVER)
        table.validate(full=True)
    except (pa.ArrowException, OSError):
        return None
    return table if table.num_rows else None


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


# ------------------------------------------------------------------------------------------------- read from the grids


def cumulative(grid: Floats) -> Floats:
    """Share of the samples at or below each of `EDGES`; NaN without samples."""
    counts = grid.sum(axis=0)
    return np.cumsum(counts) / counts.sum() if counts.sum() else np.full(len(EDGES), np.nan)


def over_time(grid: Floats, requests: int) -> tuple[Floats, Floats]:
    """Median and worst latency per time bin, s; worst is p99, or the largest of fewer than 100.

    Neighbouring bins are joined until one holds about `PER_GROUP` of ``requests``, so that a median means something.
    """
    group = _group(requests, PER_GROUP)
    counts = np.cumsum(grid.reshape(BINS // group, group, -1).sum(axis=1), axis=1)
    total = counts[:, -1]
    found = []
    for share in (np.full(len(total), 0.5), np.where(total < WORST_OF, 1.0, 0.99)):
        reached = counts >= (share * total * (1 - 1e-12))[:, None]
        value = EDGES[np.argmax(reached, axis=1)]
        found.append(np.repeat(np.where(total > 0, value, np.nan), group))
    return found[0], found[1]


def joined(rates: Floats, found: Curves, requests: int) -> Floats:
    """Rates per time bin as means of neighbouring bins: at least `SECOND` long and of a few requests each."""
    group = max(_group(requests, FEW), next((k for k in GROUPS if found.window.bin_s * k >= SECOND), GROUPS[-1]))
    return np.repeat(rates.reshape(-1, group).mean(axis=1), group)


def _group(requests: int, wanted: int) -> int:
    """How many time bins to join so that one holds about ``wanted`` of ``requests``."""
    return next((k for k in GROUPS if requests * k >= wanted * BINS), GROUPS[-1])


Promises = dict[str, dict[float, float | None]]
"""Metric -> share -> limit, s."""


def promises(run: Run, counts: Counts, shares: Sequence[float]) -> Promises:
    """The limit (s) on ttft, tpot and e2e that each share of all offered requests kept, each metric by itself.

    Failed and lost requests kept no limit; a success of fewer than two output tokens kept every tpot. None when too
    many failed for that share, or when there are too few requests for it (`samples_needed`).
    """
    rows = run.rows
    found: Promises = {}
    for name, values in (("ttft", metrics.ttft(rows)), ("tpot", metrics.tpot(rows)), ("e2e", metrics.e2e(rows))):
        if name == "tpot":
            values = np.where(rows.success & (rows.output_tokens < 2), 0.0, values)
        ranked = np.sort(values[np.isfinite(values)])
        found[name] = {}
        for share in shares:
            place = math.ceil(share * counts.offered * (1 - 1e-12)) - 1
            enough = counts.offered >= samples_needed(share) if share < 1 else True
            found[name][share] = float(ranked[place]) if enough and 0 <= place < len(ranked) else None
    return found
