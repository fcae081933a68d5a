"""Read a run directory into NumPy columns: result rows joined to the plan by request_id.

A run of any length fits: per request a dozen numbers stay in memory (`analysis.columns` reduces the stamps as they are
read), the stamps themselves are read again, a part at a time, by whoever needs each of them (`Run.parts`).

Nothing is repaired. What cannot be read or cannot be true is left out, counted, and makes the run INVALID later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from analysis.columns import Columns, chunk_arrays, floats, read_parts
from analysis.seconds import Seconds, read_seconds
from harness.errors import ResultsError
from harness.plan import plan_sha256, read_plan_columns
from harness.results import SCHEMA
from harness.run import RunDir, RunManifest, read_manifest

if TYPE_CHECKING:
    from analysis.gaps import Chunks

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NS = 1e9
PLAN_COLUMNS = ["request_id", "phase", "scheduled_ns", "input_tokens", "output_tokens", "after"]
EARLY_NS = 1_000_000
"""A timer may fire this much before the due time; a row sent earlier than that breaks its own plan."""


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
    planned_input_tokens: Floats
    planned_output_tokens: Floats
    error: npt.NDArray[np.int16]
    """Place of the error class in `Run.errors`, -1 for a success."""
    chunks: npt.NDArray[np.int32]
    """How many chunks carried output."""
    first_gap_s: Floats
    """First chunk - sent_s."""
    decode_s: Floats
    """Last chunk - first chunk."""
    max_gap_s: Floats
    """Longest gap between two chunks; NaN below two."""
    stated_tokens: Floats
    """Output tokens that the chunks say they hold; NaN when the server did not say."""

    def __len__(self) -> int:
        return len(self.request_id)

    @property
    def success(self) -> Bools:
        """Rows without an error."""
        return self.error < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRows(Rows):
    """Some rows with all their chunks; chunk arrays have one entry per chunk."""

    offsets: Ints
    """Chunks of row i are offsets[i]:offsets[i + 1]."""
    gap_s: Floats
    """Seconds since the chunk before; for a row's first chunk, since sent_s."""
    chunk_s: Floats
    """Time of each chunk."""
    chunk_tokens: Floats
    """Output tokens in each chunk; NaN for every chunk of a row when the server did not say."""

    @property
    def chunk_row(self) -> Ints:
        """Row of each chunk."""
        return np.repeat(np.arange(len(self)), self.chunks)


@dataclass(frozen=True, kw_only=True)  # without slots: `chunks` is kept once it was worked out
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
    seconds: Seconds
    errors: tuple[str, ...]
    """Error classes that `Rows.error` points to."""
    examples: dict[str, str | None]
    """Error class -> the first detail written with it."""
    sources: tuple[tuple[Path, int], ...]
    """Result files, and how many rows were read of each."""
    measured: Bools
    """For every row of the sources, in order: is it one of `rows`?"""
    problems: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def evidence(self) -> str:
        """Where the figures come from, as the manifest says: measured or simulated."""
        return self.manifest.evidence

    def batches(self) -> Iterator[tuple[pa.RecordBatch, Bools, Rows]]:
        """All rows read again from the files, about `columns.PART_CHUNKS` chunks at a time: a batch as it was written,
        which of its rows are measured, and those as columns.

        Raises `ResultsError` when a file is not what it was when the run was read.
        """
        begin = at = 0
        for path, count in self.sources:
            for batch in _again(path, count):
                keep = self.measured[at : at + len(batch)]
                at, end = at + len(batch), begin + int(keep.sum())
                rows = Rows(**_take(self.rows, slice(begin, end)))
                begin = end
                if not np.array_equal(rows.request_id, batch.column("request_id").to_numpy()[keep]):
                    raise ResultsError(f"{path}: changed while it was read; report again when nothing writes to it")
                yield batch, keep, rows

    def parts(self) -> Iterator[ChunkRows]:
        """The measured rows with all their chunks, a batch of `batches` at a time."""
        for batch, keep, rows in self.batches():
            if len(rows):
                chosen = batch if keep.all() else batch.filter(pa.array(keep))
                yield ChunkRows(**_take(rows, slice(None)), **chunk_arrays(chosen))

    def whole(self) -> ChunkRows:
        """The measured rows with all their chunks at once: 32 bytes a chunk, for runs known to be short."""
        parts = list(self.parts())
        if not parts:
            return ChunkRows(**_take(self.rows, slice(0)), **chunk_arrays(pa.RecordBatch.from_pylist([], SCHEMA)))
        joined = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(ChunkRows)}
        joined["offsets"] = np.concatenate(([0], np.cumsum(joined["chunks"], dtype=np.int64)))
        return ChunkRows(**joined)

    @cached_property
    def chunks(self) -> Chunks:
        """What the figures need of all chunks: gaps between tokens, and tokens by time. One pass over the files."""
        from analysis.gaps import pool_chunks

        return pool_chunks(self)


def _again(path: Path, count: int) -> Iterator[pa.RecordBatch]:
    """The first ``count`` rows of a file that was read before."""
    left = count
    if left:
        for batch in read_parts(path):
            yield batch.slice(0, left)
            left -= min(left, len(batch))
            if not left:
                return
        raise ResultsError(f"{path}: shorter than it was; report again when nothing writes to it")


def _take(rows: Rows, where: slice | Bools) -> dict[str, Any]:
    return {f.name: getattr(rows, f.name)[where] for f in fields(Rows)}


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
    plan = _in_order(directory, plan)
    problems: list[str] = []
    if manifest.plan.requests != plan.num_rows:
        problems.append(f"plan.arrow holds {plan.num_rows} requests, the manifest says {manifest.plan.requests}")
    if plan_sha256(directory.plan) != manifest.plan_sha256:
        problems.append("plan.arrow is not the plan of this run: its SHA-256 is not the manifest's")
    columns = Columns()
    sources = _read_rows(directory, manifest.spec.workers, columns, problems)
    table = columns.take()

    ids, possible = table["request_id"], table.pop("possible")
    known = (ids >= 0) & (ids < plan.num_rows)
    first = np.zeros(len(ids), dtype=np.bool_)
    first[np.unique(ids, return_index=True)[1]] = True
    if manifest.spec.mode == "open":  # a row that moved its own due time would hide its lag
        possible[known] &= _due_as_planned(table, plan, known)
        possible &= ~(table["sent_ns"] < table["scheduled_ns"] - EARLY_NS)
    keep = known & first & possible
    seen = np.zeros(plan.num_rows, dtype=np.bool_)
    seen[ids[keep]] = True

    measured = np.asarray(pc.equal(plan.column("phase"), "measured").to_numpy(), dtype=np.bool_)
    warmup_ns = (manifest.spec.warmup_s or 0.0) * NS
    if warmup_ns:
        early = keep & (table["scheduled_ns"] < warmup_ns) & np.isfinite(table["sent_ns"])
        measured[ids[early]] = False
    row_measured = np.zeros(len(ids), dtype=np.bool_)
    row_measured[keep] = measured[ids[keep]]
    scheduled = floats(plan.column("scheduled_ns"))[measured]
    counts = {
        "duplicates": int((known & ~first).sum()),
        "unknown": int((~known).sum()),
        "impossible": int((known & first & ~possible).sum()),
    }
    return Run(
        path=path,
        manifest=manifest,
        warmup=_rows(dict(table), keep & ~row_measured, plan),
        rows=_rows(table, row_measured, plan),
        planned=int(measured.sum()),
        planned_scheduled_s=np.sort(scheduled[np.isfinite(scheduled)]) / NS,
        lost=int((measured & ~seen).sum()),
        lost_warmup=int((~measured & ~seen).sum()),
        **counts,
        seconds=read_seconds(directory, manifest.spec.workers, problems),
        errors=tuple(columns.names),
        examples=columns.examples,
        sources=tuple(sources),
        measured=row_measured,
        problems=problems,
    )


def _in_order(directory: RunDir, plan: pa.Table) -> pa.Table:
    """The plan by request id. Raises `ResultsError` unless the ids are 0..n-1."""
    ids = np.asarray(plan.column("request_id").to_numpy(), dtype=np.int64)
    if not np.array_equal(ids, np.arange(len(ids))):
        order = np.argsort(ids, kind="stable")
        if not np.array_equal(ids[order], np.arange(len(ids))):
            raise ResultsError(f"{directory.plan}: request ids are not 0..{len(ids) - 1}; build the plan again")
        plan = plan.take(pa.array(order))
    return plan


def _due_as_planned(table: dict[str, Any], plan: pa.Table, known: Bools) -> Bools:
    """Of the known rows: due when the plan says; a turn that waited for another, not before that one had ended."""
    ids = table["request_id"][known]
    due, after = table["scheduled_ns"][known], floats(plan.column("after"))[ids]
    waited = np.isfinite(after)
    as_planned: Bools = due == floats(plan.column("scheduled_ns"))[ids]
    if waited.any():
        ended = np.full(plan.num_rows, np.nan)
        ended[ids] = table["finished_ns"][known]
        as_planned[waited] = ~(due[waited] < ended[after[waited].astype(np.int64)])
    return as_planned


def _read_rows(directory: RunDir, workers: int, columns: Columns, problems: list[str]) -> list[tuple[Path, int]]:
    """Reduce all readable rows into ``columns``; the files, and how many rows were read of each."""
    try:
        paths = directory.all_results()
    except ValueError:  # a file named like ours that no worker wrote
        paths = sorted(p for p in directory.path.glob("results-*.arrows") if p.stem.removeprefix("results-").isdigit())
        problems.append("a results-*.arrows file without a worker number was left out")
    sources = []
    for path in paths:
        rows = 0
        try:
            for batch in read_parts(path):
                columns.add(batch)
                rows += len(batch)
        except (ResultsError, pa.ArrowException, OSError) as e:
            kept = f" (the {rows:,} rows before it are used)" if rows else ""
            problems.append(f"{path.name}: {e}{kept}")
        sources.append((path, rows))
    missing = [k for k in range(workers) if not directory.results(k).exists()]
    if missing:
        problems.append(f"no result file of worker {', '.join(map(str, missing))}")
    return sources


def _rows(table: dict[str, Any], mask: Bools, plan: pa.Table) -> Rows:
    """The rows under ``mask`` as columns, times in seconds; each column is taken out of ``table`` as it is used."""
    whole = bool(mask.all())

    def column(name: str) -> Any:
        return table.pop(name) if whole else table.pop(name)[mask]

    def seconds(name: str) -> Any:
        values = column(name)
        return np.divide(values, NS, out=values)

    ids, scheduled = column("request_id"), seconds("scheduled_ns")
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.lexsort((ids, scheduled))] = np.arange(len(ids))
    times = ("sent", "finished", "first_gap", "decode", "max_gap")
    same = ("input_tokens", "cached_tokens", "output_tokens", "error", "chunks", "stated_tokens")
    return Rows(
        request_id=ids,
        rank=rank,
        planned_input_tokens=floats(plan.column("input_tokens"))[ids],
        planned_output_tokens=floats(plan.column("output_tokens"))[ids],
        scheduled_s=scheduled,
        **{f"{name}_s": seconds(f"{name}_ns") for name in times},
        **{name: column(name) for name in same},
    )
