"""A run as the analysis sees it: rows as columns, the chunks of some rows at a time, what was left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.rows.columns import Table, chunk_arrays, floats, read_parts
from harness.errors import ResultsError
from harness.plan.file import PlanInfo
from harness.record.manifest import Evidence, RunDir, RunManifest, Worker
from harness.record.results import SCHEMA
from harness.record.run_spec import RunSpec
from harness.record.samples import WORKER_SCHEMA, read_observations, read_server_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRows:
    """One entry per measured row of a run whose sessions wait."""

    first: Bools
    """Whether the row begins a session; its time is the plan's, whatever the server does."""
    lag_s: Floats
    """Session lag, s: when a turn was due after its own time in the plan (`own_times`), because the answer before it
    had not ended. NaN for a row that begins a session and for one that was never sent."""


def own_times(scheduled: Floats, after: Floats, think: Floats) -> Floats:
    """The earliest time of each planned request, by id, that the plan itself allows: were every answer instant.

    A turn's own time is the planned one, but not before the own time of the turn it waits for (``after``, an id; NaN:
    none) plus ``think``. On the trace's own clock that is the planned time: there the next turn comes when the recorded
    answer ended and the user had thought. On a faster clock, which think times do not follow, it may be later.
    """
    own, waits = scheduled.copy(), np.isfinite(after)
    before, think = after[waits].astype(np.int64), np.nan_to_num(think[waits])
    while ((least := own[before] + think) > own[waits]).any():  # one level of turns at a time, at worst
        own[waits] = np.maximum(own[waits], least)
    return own


LoadKind = Literal["open", "closed", "sessions"]
"""`analysis.rates` says what each is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Result rows as columns. Every array has one entry per row; not measured is NaN.

    Times are seconds after the common start. Row order is file order; `rank` is the place in time.
    """

    request_id: Ints
    rank: Ints
    """Place of each row when ordered by (scheduled_s, request_id)."""
    scheduled_s: Floats
    sent_s: Floats
    finished_s: Floats
    input_tokens: Floats
    cached_tokens: Floats
    output_tokens: Floats
    reasoning_tokens: Floats
    """Of ``output_tokens``, spent on reasoning as the server declared them."""
    planned_input_tokens: Floats
    planned_output_tokens: Floats
    error: npt.NDArray[np.int16]
    """Place of the error class in `Run.errors`, -1 for a success."""
    replica: npt.NDArray[np.int16]
    """The server it was last sent to, -1 when it was never sent."""
    retries: npt.NDArray[np.int16]
    chunks: npt.NDArray[np.int32]
    first_gap_s: Floats
    """First chunk - sent_s."""
    decode_s: Floats
    """Last chunk - first chunk."""
    max_gap_s: Floats
    """Longest gap between two chunks; NaN below two."""
    stated_tokens: Floats
    """Output tokens that the chunks say they hold; NaN when the server did not say."""
    first_tokens: Floats
    """Of these, in the first chunk."""
    shared: npt.NDArray[np.int32]
    """Chunks that came together with the one before."""
    held_s: Floats
    """Longest that an event loop of ours stood still meanwhile: what it read together may have come apart."""

    def __len__(self) -> int:
        return len(self.request_id)

    @property
    def success(self) -> Bools:
        """Rows without an error."""
        found: Bools = self.error < 0
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRows(Rows):
    """Some rows with all their chunks; chunk arrays have one entry per chunk."""

    offsets: Ints
    """Chunks of row i are offsets[i]:offsets[i + 1]."""
    gap_s: Floats
    """WorkerSamples since the chunk before; for a row's first chunk, since sent_s."""
    chunk_s: Floats
    chunk_tokens: Floats
    """Output tokens in each chunk; NaN for every chunk of a row when the server did not say."""

    @property
    def chunk_row(self) -> Ints:
        """Row of each chunk."""
        return np.repeat(np.arange(len(self)), self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """What the figures need of all chunks of the measured rows."""

    gap_s: Floats
    """Gaps between tokens, s; each stands for ``gap_tokens`` tokens of the stretch of requests ``gap_owner``."""
    gap_tokens: Floats
    gap_owner: Ints
    """Place in time of the request, or of its stretch of requests."""
    median_itl_s: float | None
    shared_stamps: float | None
    """Share of the chunks after a request's first that have the stamp of the chunk before; None without any."""
    output_tokens: Floats
    """Output tokens per time bin of the window, shape (BINS,); zeros without a window."""
    itl_grid: Floats
    """Tokens per time bin and latency bin (`grid.EDGES`), by the time of the later token."""


NS = 1e9
SHORTEST_SECOND_S = 0.5
"""Of the workers' own rows, one that covers less than this says nothing about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSamples:
    """What the load workers saw of themselves, all workers' rows in one; not measured is NaN."""

    worker: Ints
    t_s: Floats
    length_s: Floats
    loop_lag_max_s: Floats
    cpu_share: Floats
    in_flight: Floats
    events: Floats
    """Of answers that were read in the interval."""
    unwatched: list[int]
    """Workers without a single row."""

    @property
    def whole(self) -> Bools:
        """Intervals long enough that a share of them means something."""
        return self.length_s >= SHORTEST_SECOND_S


def read_worker_samples(directory: RunDir, workers: int, problems: list[str]) -> WorkerSamples:
    """Observations of all workers; a run of before there were any has none, a file that cannot be read is a problem."""
    tables, owners, lengths, unwatched = [], [], [], []
    for k in range(workers):
        path, table = directory.observations(k), WORKER_SCHEMA.empty_table()
        if path.exists():
            try:
                table = read_observations(path)
            except ResultsError as e:
                problems.append(str(e))
        if not table.num_rows:
            unwatched.append(k)
        tables.append(table)
        owners.append(np.full(table.num_rows, k))
        lengths.append(np.diff(floats(table.column("t_ns")), prepend=0.0) / NS)
    table = pa.concat_tables(tables) if tables else WORKER_SCHEMA.empty_table()
    return WorkerSamples(
        worker=np.concatenate([np.zeros(0, dtype=np.int64), *owners]).astype(np.int64),
        t_s=floats(table.column("t_ns")) / NS,
        length_s=np.concatenate([np.zeros(0), *lengths]),
        loop_lag_max_s=floats(table.column("loop_lag_max_ns")) / NS,
        cpu_share=_finite(floats(table.column("cpu_share"))),
        in_flight=_finite(floats(table.column("in_flight"))),
        events=_finite(floats(table.column("events"))),
        unwatched=unwatched,
    )


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


class LoopStalls:
    """Longest stall of any worker's loop, by time, s; of workers that did not watch themselves, what they said last."""

    def __init__(self, seconds: WorkerSamples, workers: list[Worker]) -> None:
        said = [w.loop_lag_p99_s for w in workers if w.loop_lag_p99_s is not None]
        known = np.isfinite(seconds.loop_lag_max_s) & np.isfinite(seconds.t_s)
        ends, lags = np.maximum(0.0, seconds.t_s[known]), seconds.loop_lag_max_s[known]
        begins = np.maximum(0.0, ends - seconds.length_s[known])
        worst = np.zeros(int(ends.max(initial=0.0)) + 1) if len(ends) else np.full(1, max(said, default=0.0))
        for at in (begins, (begins + ends) / 2, ends):  # a row covers a second: at most two of ours
            np.maximum.at(worst, at.astype(np.int64), lags)
        self._worst: Floats = np.append(worst, 0.0)

    def between(self, start_s: Floats, end_s: Floats) -> Floats:
        """Longest stall that ended in each stretch of time; 0 where there is no time."""
        there = np.isfinite(start_s) & np.isfinite(end_s)
        first, final = (
            np.clip(np.where(there, at, 0.0), 0, len(self._worst) - 2).astype(np.int64) for at in (start_s, end_s)
        )
        ends = np.stack((first, np.maximum(first, final) + 1), axis=1)
        found = np.maximum.reduceat(self._worst, ends.ravel())[::2] if len(ends) else np.zeros(0)
        return np.where(there, found, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run, read. ``rows`` are the measured requests; ``warmup`` the others, which count in no figure."""

    path: Path
    manifest: RunManifest
    rows: Rows
    warmup: Rows
    planned: int
    """Requests of phase "measured" in the plan."""
    planned_scheduled_s: Floats
    """Their planned times, sorted; empty in a closed loop."""
    lost: int
    """Measured requests without a usable row."""
    lost_warmup: int
    duplicates: int
    """Rows beyond the first of a request_id; left out."""
    unknown: int
    """Rows whose request_id the plan does not have; left out."""
    impossible: int
    """Rows that cannot be true (an end before the last chunk, a negative count, not the plan's due time); left out."""
    seconds: WorkerSamples
    errors: tuple[str, ...]
    """Error classes that `Rows.error` points to."""
    examples: dict[str, str | None]
    """Error class -> the first detail written with it."""
    sources: tuple[tuple[Path, int], ...]
    """Result files, and how many rows were read of each."""
    measured: Bools
    """For every row of the sources, in order: is it one of `rows`?"""
    resent: int = 0
    """Requests that were sent more than once."""
    remarked: int = 0
    """Successes of whose answers something was left out, as of no type that can be read."""
    remark: str | None = None
    """What, in the first of them."""
    turns: TurnRows | None = None
    """Of `rows`, where sessions wait (`analysis.rates`); None for other kinds of load."""
    chunks: Chunks
    problems: list[str] = field(default_factory=list)

    @property
    def load_kind(self) -> LoadKind:
        """The kind of load, by what was asked."""
        return load_kind(self.manifest.spec, self.manifest.plan)

    @property
    def evidence(self) -> Evidence:
        """Where the figures come from, as the manifest says: measured or simulated."""
        return self.manifest.evidence

    def server_tables(self) -> list[pa.Table] | None:
        """What each server said of itself each second; None where one was not sampled, or there is none."""
        found = [read_server_metrics(RunDir(self.path).server_metrics(r.index)) for r in self.manifest.replicas]
        known = [table for table in found if table is not None]
        return known if known and len(known) == len(found) else None

    def batches(self) -> Iterator[tuple[pa.RecordBatch, Bools, Rows]]:
        """All rows read again from the files, about `columns.PART_CHUNKS` chunks at a time: a batch as it was written,
        which of its rows are measured, and those as columns.

        Raises `ResultsError` when a file is not what it was when the run was read.
        """
        begin = at = 0
        for path, count in self.sources:
            for batch in read_again(path, count):
                keep = self.measured[at : at + len(batch)]
                at, end = at + len(batch), begin + int(keep.sum())
                rows = Rows(**columns_of(self.rows, slice(begin, end)))
                begin = end
                if not np.array_equal(rows.request_id, batch.column("request_id").to_numpy()[keep]):
                    raise ResultsError(f"{path}: changed while it was read; report again when nothing writes to it")
                yield batch, keep, rows

    def parts(self) -> Iterator[ChunkRows]:
        """The measured rows with all their chunks, a batch of `batches` at a time."""
        for batch, keep, rows in self.batches():
            if len(rows):
                chosen = batch if keep.all() else batch.filter(pa.array(keep))
                yield ChunkRows(**columns_of(rows, slice(None)), **chunk_arrays(chosen))

    def whole(self) -> ChunkRows:
        """The measured rows with all their chunks at once: 32 bytes a chunk, for runs known to be short."""
        parts = list(self.parts())
        if not parts:
            return ChunkRows(**columns_of(self.rows, slice(0)), **chunk_arrays(pa.RecordBatch.from_pylist([], SCHEMA)))
        joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(ChunkRows)}
        joined["offsets"] = np.concatenate(([0], np.cumsum(joined["chunks"], dtype=np.int64)))
        return ChunkRows(**joined)


def load_kind(spec: RunSpec, plan: PlanInfo) -> LoadKind:
    """The kind of load that was asked for."""
    if spec.mode == "closed":
        return "closed"
    return "sessions" if plan.sessions == "wait" or plan.conversation == "live" else "open"


def read_again(path: Path, count: int) -> Iterator[pa.RecordBatch]:
    """The first ``count`` rows of a file that was read before."""
    left = count
    if left:
        for batch in read_parts(path):
            yield batch.slice(0, left)
            left -= min(left, len(batch))
            if not left:
                return
        raise ResultsError(f"{path}: shorter than it was; report again when nothing writes to it")


def columns_of(rows: Rows, where: slice | Bools) -> Table:
    """Name -> column of some of the rows."""
    return {f.name: getattr(rows, f.name)[where] for f in fields(Rows)}


WINDOW_RULE = "whole run, ramp and drain included"
BINS = 200


def was_sent(rows: Rows) -> Bools:
    """Rows that went out."""
    return np.isfinite(rows.sent_s)


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
