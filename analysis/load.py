"""Read a run directory into NumPy columns: result rows joined to the plan by request_id.

Nothing is repaired. What cannot be read or cannot be true is left out, counted, and makes the run INVALID later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.errors import ResultsError
from harness.observations import SCHEMA as OBSERVED
from harness.observations import read_observations
from harness.plan import plan_sha256, read_plan_columns
from harness.results import SCHEMA, read_results
from harness.run import RunDir, RunManifest, read_manifest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NS = 1e9
PLAN_COLUMNS = ["request_id", "phase", "scheduled_ns", "input_tokens", "output_tokens", "after"]
EARLY_NS = 1_000_000
"""A timer may fire this much before the due time; a row sent earlier than that breaks its own plan."""
SHORTEST_SECOND_S = 0.5
"""Of the workers' own rows, one that covers less than this says nothing about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Result rows as columns. Every array has one entry per row, chunk arrays one per chunk; not measured is NaN.

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
    planned_input_tokens: Floats
    planned_output_tokens: Floats
    success: Bools
    error: pa.ChunkedArray
    detail: pa.ChunkedArray
    chunk_row: Ints
    """Row of each chunk."""
    offsets: Ints
    """Chunks of row i are offsets[i]:offsets[i + 1]."""
    gap_s: Floats
    """Seconds since the chunk before; for a row's first chunk, since sent_s."""
    chunk_s: Floats
    """Time of each chunk."""
    chunk_tokens: Floats
    """Output tokens in each chunk; NaN for every chunk of a row when the server did not say."""

    def __len__(self) -> int:
        return len(self.request_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What the load workers saw of themselves, all workers' rows in one; not measured is NaN."""

    worker: Ints
    t_s: Floats
    """End of the interval."""
    length_s: Floats
    loop_lag_max_s: Floats
    cpu_share: Floats
    in_flight: Floats
    unwatched: list[int]
    """Workers without a single row."""

    @property
    def whole(self) -> Bools:
        """Intervals long enough that a share of them means something."""
        return self.length_s >= SHORTEST_SECOND_S


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
    files: int
    seconds: Seconds
    problems: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def evidence(self) -> str:
        """Where the figures come from, as the manifest says: measured or simulated."""
        return self.manifest.evidence


def read_run(path: Path) -> Run:
    """Read a run directory: manifest, plan columns (no prompts), all result files, the workers' own observations.

    Measured are the requests of phase "measured", less those sent in the first ``warmup_s`` of the run, if it has any.

    A result file that is missing, torn or foreign becomes an entry of `Run.problems`; complete batches before a tear
    are kept. Raises `ResultsError` without a readable manifest or with a plan that does not number its requests
    0..n-1, `PlanError` without a readable plan: without a plan nobody knows what is missing.
    """
    manifest = read_manifest(path)
    directory = RunDir(path)
    plan = read_plan_columns(directory.plan, PLAN_COLUMNS)
    order = np.argsort(_integers(plan, "request_id"), kind="stable")
    if not np.array_equal(_integers(plan, "request_id")[order], np.arange(len(order))):
        raise ResultsError(f"{directory.plan}: request ids are not 0..{len(order) - 1}; build the plan again")
    plan = plan.take(pa.array(order))
    problems: list[str] = []
    if manifest.plan.requests != plan.num_rows:
        problems.append(f"plan.arrow holds {plan.num_rows} requests, the manifest says {manifest.plan.requests}")
    if plan_sha256(directory.plan) != manifest.plan_sha256:
        problems.append("plan.arrow is not the plan of this run: its SHA-256 is not the manifest's")
    table, files = _read_tables(directory, manifest.spec.workers, problems)

    ids = _integers(table, "request_id")
    known = (ids >= 0) & (ids < plan.num_rows)
    first = np.zeros(len(ids), dtype=np.bool_)
    first[np.unique(ids, return_index=True)[1]] = True
    possible = _possible(table)
    if manifest.spec.mode == "open":  # a row that moved its own due time would hide its lag
        possible[known] &= _due_as_planned(table, plan, ids, known)
        possible &= ~(_floats(table, "sent_ns") < _floats(table, "scheduled_ns") - EARLY_NS)
    keep = known & first & possible
    seen = np.zeros(plan.num_rows, dtype=np.bool_)
    seen[ids[keep]] = True

    measured = np.asarray(pc.equal(plan.column("phase"), "measured").to_numpy(), dtype=np.bool_)
    warmup_ns = (getattr(manifest.spec, "warmup_s", None) or 0.0) * NS
    if warmup_ns:
        early = keep & (_floats(table, "scheduled_ns") < warmup_ns) & np.isfinite(_floats(table, "sent_ns"))
        measured[ids[early]] = False
    row_measured = np.zeros(len(ids), dtype=np.bool_)
    row_measured[keep] = measured[ids[keep]]
    scheduled = _floats(plan, "scheduled_ns")[measured]
    return Run(
        path=path,
        manifest=manifest,
        rows=_rows(table, row_measured, plan),
        warmup=_rows(table, keep & ~row_measured, plan),
        planned=int(measured.sum()),
        planned_scheduled_s=np.sort(scheduled[np.isfinite(scheduled)]) / NS,
        lost=int((measured & ~seen).sum()),
        lost_warmup=int((~measured & ~seen).sum()),
        duplicates=int((known & ~first).sum()),
        unknown=int((~known).sum()),
        impossible=int((known & first & ~possible).sum()),
        files=files,
        seconds=_read_seconds(directory, manifest.spec.workers, problems),
        problems=problems,
    )


def _due_as_planned(table: pa.Table, plan: pa.Table, ids: Ints, known: Bools) -> Bools:
    """Of the known rows: due when the plan says; a turn that waited for another, not before that one had ended."""
    due, after = _floats(table, "scheduled_ns")[known], _floats(plan, "after")[ids[known]]
    ended = np.full(plan.num_rows, np.nan)
    ended[ids[known]] = _floats(table, "finished_ns")[known]
    waited = np.isfinite(after)
    before = np.zeros(len(due))
    before[waited] = ended[after[waited].astype(np.int64)]
    return np.where(waited, ~(due < before), due == _floats(plan, "scheduled_ns")[ids[known]])


def _read_seconds(directory: RunDir, workers: int, problems: list[str]) -> Seconds:
    """Observations of all workers; a run of before there were any has none, a file that cannot be read is a problem."""
    tables, owners, lengths, unwatched = [], [], [], []
    for k in range(workers):
        path, table = directory.observations(k), OBSERVED.empty_table()
        if path.exists():
            try:
                table = read_observations(path)
            except ResultsError as e:
                problems.append(str(e))
        if not table.num_rows:
            unwatched.append(k)
        tables.append(table)
        owners.append(np.full(table.num_rows, k))
        lengths.append(np.diff(_floats(table, "t_ns"), prepend=0.0) / NS)
    table = pa.concat_tables(tables) if tables else OBSERVED.empty_table()
    return Seconds(
        worker=np.concatenate([np.zeros(0, dtype=np.int64), *owners]).astype(np.int64),
        t_s=_floats(table, "t_ns") / NS,
        length_s=np.concatenate([np.zeros(0), *lengths]),
        loop_lag_max_s=_floats(table, "loop_lag_max_ns") / NS,
        cpu_share=_floats(table, "cpu_share"),
        in_flight=_floats(table, "in_flight"),
        unwatched=unwatched,
    )


def _read_tables(directory: RunDir, workers: int, problems: list[str]) -> tuple[pa.Table, int]:
    """All readable rows, and the number of result files there are."""
    try:
        paths = directory.all_results()
    except ValueError:  # a file named like ours that no worker wrote
        paths = sorted(p for p in directory.path.glob("results-*.arrows") if p.stem.removeprefix("results-").isdigit())
        problems.append("a results-*.arrows file without a worker number was left out")
    tables = []
    for path in paths:
        try:
            table = read_results(path)
            table.validate(full=True)
            tables.append(table)
        except (ResultsError, pa.ArrowException, OSError) as e:
            problems.append(f"{path.name}: {e}")
    missing = [k for k in range(workers) if not directory.results(k).exists()]
    if missing:
        problems.append(f"no result file of worker {', '.join(map(str, missing))}")
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table(), len(paths)


def _possible(table: pa.Table) -> Bools:
    """False for rows that contradict themselves: a row that cannot be true is no evidence of anything."""
    scheduled, sent, finished = (_floats(table, n) for n in ("scheduled_ns", "sent_ns", "finished_ns"))
    gaps, offsets = _list(table.column("chunk_gap_ns"))
    counts = np.diff(offsets)
    running = np.concatenate(([0], np.cumsum(gaps)))
    spent = running[offsets[1:]] - running[offsets[:-1]]
    negative = np.concatenate(([0], np.cumsum(gaps < 0)))
    token_counts = pc.list_value_length(table.column("chunk_tokens"))
    has_tokens = _bools(pc.is_valid(token_counts))
    lengths = np.asarray(pc.fill_null(token_counts, 0).to_numpy(), dtype=np.int64)

    was_sent = np.isfinite(sent)
    ok: Bools = negative[offsets[1:]] == negative[offsets[:-1]]
    ok &= was_sent | (counts == 0)
    ok &= ~has_tokens | (lengths == counts)
    ok &= ~was_sent | (np.isfinite(finished) & (finished >= sent + spent))
    ok &= was_sent | _bools(pc.is_valid(table.column("error")))  # nothing succeeds unsent
    ok &= scheduled >= 0
    for name in ("input_tokens", "cached_tokens", "output_tokens"):
        ok &= ~(_floats(table, name) < 0)
    return ok


def _rows(table: pa.Table, mask: Bools, plan: pa.Table) -> Rows:
    """The rows under ``mask`` as columns."""
    if not mask.all():
        table = table.filter(pa.array(mask))
    ids = _integers(table, "request_id")
    scheduled, sent, finished = (_floats(table, n) for n in ("scheduled_ns", "sent_ns", "finished_ns"))
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.lexsort((ids, scheduled))] = np.arange(len(ids))

    gaps, offsets = _list(table.column("chunk_gap_ns"))
    counts = np.diff(offsets)
    chunk_row = np.repeat(np.arange(len(ids)), counts)
    running = np.cumsum(gaps)  # integers: exact however long the run
    before = np.concatenate(([0], running))[offsets[:-1]]
    chunk_ns = running - np.repeat(before, counts) + np.repeat(np.nan_to_num(sent), counts)
    tokens = table.column("chunk_tokens")
    return Rows(
        request_id=ids,
        rank=rank,
        scheduled_s=scheduled / NS,
        sent_s=sent / NS,
        finished_s=finished / NS,
        input_tokens=_floats(table, "input_tokens"),
        cached_tokens=_floats(table, "cached_tokens"),
        output_tokens=_floats(table, "output_tokens"),
        planned_input_tokens=_floats(plan, "input_tokens")[ids],
        planned_output_tokens=_floats(plan, "output_tokens")[ids],
        success=_bools(pc.is_null(table.column("error"))),
        error=table.column("error"),
        detail=table.column("detail"),
        chunk_row=chunk_row,
        offsets=offsets,
        gap_s=gaps / NS,
        chunk_s=chunk_ns / NS,
        chunk_tokens=_chunk_tokens(tokens, chunk_row, len(ids)),
    )


def _chunk_tokens(column: pa.ChunkedArray, chunk_row: Ints, rows: int) -> Floats:
    """Tokens per chunk; NaN for a whole row when unknown or when a count below one makes it no division."""
    values, _ = _list(column)
    known = _bools(pc.is_valid(column))
    tokens = np.full(len(chunk_row), np.nan)
    tokens[known[chunk_row]] = values
    unclear = np.zeros(rows, dtype=np.bool_)
    unclear[chunk_row[tokens < 1]] = True
    tokens[unclear[chunk_row]] = np.nan
    return tokens


def _list(column: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """A list column as flat values and offsets (length rows + 1); a null list has no values."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0).to_numpy(), dtype=np.int64)
    flat = pc.list_flatten(column)
    values = np.asarray(pc.fill_null(flat, -1).to_numpy(), dtype=np.int64)
    return values, np.concatenate(([0], np.cumsum(lengths)))


def _integers(table: pa.Table, name: str) -> Ints:
    return np.asarray(table.column(name).to_numpy(), dtype=np.int64)


def _floats(table: pa.Table, name: str) -> Floats:
    """A column as floats, null as NaN. Nanoseconds stay exact up to 104 days."""
    column: Any = pc.cast(table.column(name), pa.float64(), safe=False)
    return np.asarray(pc.fill_null(column, float("nan")).to_numpy(), dtype=np.float64)


def _bools(array: Any) -> Bools:
    return np.asarray(array.to_numpy(), dtype=np.bool_)
