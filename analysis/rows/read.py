"""Read a run directory into NumPy columns: result rows joined to the plan by request_id.

`analysis.rows.columns` reduces the stamps to a dozen numbers a request as they are read; what needs each stamp reads
them a part at a time (`Run.parts`). So memory grows with the requests (about 0.5 KB each), never with their tokens.
A sound run is decompressed once: its facts without the stamps say which rows count and when, so that all stamps can be
reduced and pooled as they pass by. Where anything is odd it is read the long way, which says what.

Nothing is repaired. What cannot be read or cannot be true is left out, counted, and makes the run INVALID later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.rows.columns import (
    CHUNKS,
    COUNTS,
    RowColumns,
    Table,
    bools,
    chunk_arrays,
    floats,
    plan_column,
    plan_size,
    read_facts,
    read_parts,
    reduce_chunks,
)
from harness.analysis.rows.itl_histogram import pool_chunks
from harness.analysis.rows.run import ChunkRows as ChunkRows
from harness.analysis.rows.run import (
    LoopStalls,
    TurnRows,
    columns_of,
    load_kind,
    own_times,
    read_again,
    read_worker_samples,
)
from harness.analysis.rows.run import Rows as Rows
from harness.analysis.rows.run import Run as Run
from harness.errors import ResultsError, listed
from harness.plan.file import plan_sha256
from harness.record.manifest import RunDir, RunManifest, read_manifest

NS = 1e9
EARLY_NS = 1_000_000
"""A timer may fire this much before the due time; a row sent earlier than that breaks its own plan."""


def read_run(path: Path) -> Run:
    """Read a run directory: manifest, plan columns (no prompts), all result files, the workers' own observations.

    Measured are the requests of phase "measured", less those sent in the first ``warmup_s`` of the run, if it has any.

    A result file that is missing, torn or foreign becomes an entry of `Run.problems`; complete batches before a tear
    are kept. Raises `ResultsError` without a readable manifest or with a plan that does not number its requests
    0..n-1, `PlanError` without a readable plan: without a plan nobody knows what is missing.
    """
    manifest = read_manifest(path)
    directory = RunDir(path)
    plan = _read_plan(directory)
    problems: list[str] = []
    if manifest.plan.requests != plan.requests:
        problems.append(f"plan.arrow holds {plan.requests} requests, the manifest says {manifest.plan.requests}")
    if plan_sha256(directory.plan) != manifest.plan_sha256:
        problems.append("plan.arrow is not the plan of this run: its SHA-256 is not the manifest's")
    files = _result_files(directory, manifest.spec.workers, problems)
    run = _read_through(directory, manifest, plan, files, problems)
    if run is None:
        columns = RowColumns()
        sources = _read_rows(files, columns, problems)
        run, _ = _join(directory, manifest, plan, columns, sources, problems)
        run = replace(run, chunks=pool_chunks(run.rows, run.parts()))
    return run


def _read_through(
    directory: RunDir, manifest: RunManifest, plan: _Plan, files: list[Path], problems: list[str]
) -> Run | None:
    """The run with its chunks pooled already; None when anything is odd."""
    columns, sources = RowColumns(), []
    try:
        for path in files:
            before = columns.rows
            for batch in read_facts(path):
                columns.add(batch)
            sources.append((path, columns.rows - before))
        run, keep = _join(directory, manifest, plan, columns, sources, list(problems))
        run = replace(run, chunks=pool_chunks(run.rows, _reduce(run, keep)))
    except (ResultsError, pa.ArrowException, OSError):
        return None
    problems += run.problems[len(problems) :]
    return run


def _reduce(run: Run, keep: Bools) -> Iterator[ChunkRows]:
    """Read the chunks of a run that has none yet: fill in its columns, and give the measured rows as `Run.parts` does.

    ``keep``: all rows that count, warm-up among them. Raises `ResultsError` when one of them cannot be true.
    """
    sides, at = [(run.rows, 0), (run.warmup, 0)], 0
    for path, count in run.sources:
        for batch in read_again(path, count):
            here, measured = keep[at : at + len(batch)], run.measured[at : at + len(batch)]
            at += len(batch)
            found = reduce_chunks(batch)
            if not found.pop("possible")[here].all():
                raise ResultsError(f"{path}: a row contradicts itself")
            begin = sides[0][1]
            for k, which in enumerate((measured, here & ~measured)):
                rows, start = sides[k]
                sides[k] = rows, start + int(np.count_nonzero(which))
                part = slice(start, sides[k][1])
                for name, values in found.items():
                    if name.endswith("_ns"):
                        getattr(rows, f"{name[:-3]}_s")[part] = values[which] / NS
                    else:
                        getattr(rows, name)[part] = values[which]
            chosen = batch if measured.all() else batch.filter(pa.array(measured))
            yield ChunkRows(**columns_of(run.rows, slice(begin, sides[0][1])), **chunk_arrays(chosen))


def _join(
    directory: RunDir, manifest: RunManifest, plan: _Plan, columns: RowColumns, sources: list[tuple[Path, int]],
    problems: list[str],
) -> tuple[Run, Bools]:  # fmt: skip
    """The rows joined to the plan, and which of all rows count, warm-up among them."""
    table = columns.take()
    ids, possible = table["request_id"], table.pop("possible")
    known = (ids >= 0) & (ids < plan.requests)
    first = _first_of_each(ids, known, plan.requests)
    if manifest.spec.mode == "open":  # a row that moved its own due time would hide its lag
        possible &= _due_as_planned(table, plan, known)
    keep, measured = first & possible, plan.measured.copy()
    if warmup_ns := (manifest.spec.warmup_s or 0.0) * NS:
        measured[ids[keep & (table["scheduled_ns"] < warmup_ns) & np.isfinite(table["sent_ns"])]] = False
    seen, row_measured = np.zeros(plan.requests, np.bool_), np.zeros(len(ids), np.bool_)
    seen[ids[keep]] = True
    row_measured[keep] = measured[ids[keep]]
    due_ns = plan.scheduled_ns[measured & np.isfinite(plan.scheduled_ns)]
    observed = read_worker_samples(directory, manifest.spec.workers, problems)
    held = LoopStalls(observed, manifest.workers)
    warmup_rows = _rows(dict(table), keep & ~row_measured, plan, held)
    rows = _rows(table, row_measured, plan, held)
    run = Run(
        path=directory.path,
        manifest=manifest,
        warmup=warmup_rows,
        rows=rows,
        planned=int(measured.sum()),
        planned_scheduled_s=np.sort(due_ns) / NS,
        lost=int(np.count_nonzero(~seen & measured)),
        lost_warmup=int(np.count_nonzero(~seen & ~measured)),
        duplicates=int((known & ~first).sum()),
        unknown=int((~known).sum()),
        impossible=int((first & ~possible).sum()),
        seconds=observed,
        errors=tuple(columns.names),
        examples=columns.examples,
        resent=columns.resent,
        remarked=columns.remarked,
        remark=columns.remark,
        sources=tuple(sources),
        measured=row_measured,
        chunks=pool_chunks(Rows(**columns_of(rows, slice(0))), ()),  # of none yet
        turns=_turns(rows, plan) if load_kind(manifest.spec, manifest.plan) == "sessions" else None,
        problems=problems,
    )
    return run, keep


def _turns(rows: Rows, plan: _Plan) -> TurnRows:
    """What sessions that wait make of the rows; where no request waits for another, each begins a session."""
    n = len(rows)
    if plan.after is None or plan.think_ns is None:
        return TurnRows(first=np.full(n, True), lag_s=np.full(n, np.nan))
    after, own = plan.after, own_times(plan.scheduled_ns, plan.after, plan.think_ns)
    ids, waits = rows.request_id, np.isfinite(after[rows.request_id])
    lag_s = np.where(waits & np.isfinite(rows.sent_s), np.maximum(0.0, rows.scheduled_s - own[ids] / NS), np.nan)
    return TurnRows(first=~waits, lag_s=lag_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What joining needs of the plan, one entry per request, by request id; not known is NaN."""

    measured: Bools
    scheduled_ns: Floats
    input_tokens: Floats
    output_tokens: Floats
    after: Floats | None
    think_ns: Floats | None

    @property
    def requests(self) -> int:
        return len(self.measured)


def _read_plan(directory: RunDir) -> _Plan:
    """The plan by request id, read a column at a time. Raises `ResultsError` unless the ids are 0..n-1."""
    n = plan_size(directory.plan)
    read = partial(plan_column, directory.plan, n=n)
    after = read("after", values=floats)
    waits = bool(np.isfinite(after).any())
    return _Plan(
        measured=read("phase", values=lambda chunk: bools(pc.equal(chunk, "measured")), dtype=np.bool_),
        after=after if waits else None,
        think_ns=read("think_ns", values=floats) if waits else None,
        **{name: read(name, values=floats) for name in ("scheduled_ns", "input_tokens", "output_tokens")},
    )


def _first_of_each(ids: Ints, known: Bools, requests: int) -> Bools:
    """Whether a row is the first of its request id; False for ids that are not ``known``."""
    at = np.full(requests, -1)
    places = np.flatnonzero(known)[::-1]
    at[ids[places]] = places  # of several the last assignment stays, which is the first row
    first = np.zeros(len(ids), np.bool_)
    first[at[at >= 0]] = True
    return first


def _due_as_planned(table: Table, plan: _Plan, known: Bools) -> Bools:
    """Not sent before it was due, and of the known rows: due when the plan says; a turn that waited for another, not
    before that one had ended.
    """
    ids, due = table["request_id"], table["scheduled_ns"]
    ok: Bools = ~(table["sent_ns"] < due - EARLY_NS)
    mine = ids[known]
    as_planned = due[known] == plan.scheduled_ns[mine]
    if plan.after is not None:
        ended = np.full(plan.requests, np.nan)
        ended[ids[known]] = table["finished_ns"][known]
        before = plan.after[mine]
        waited = np.isfinite(before)
        as_planned[waited] = ~(due[known][waited] < ended[before[waited].astype(np.int64)])
    ok[known] &= as_planned
    return ok


def _result_files(directory: RunDir, workers: int, problems: list[str]) -> list[Path]:
    try:
        paths = directory.all_results()
    except ValueError:  # a file named like ours that no worker wrote
        paths = sorted(p for p in directory.path.glob("results-*.arrows") if p.stem.removeprefix("results-").isdigit())
        problems.append("a results-*.arrows file without a worker number was left out")
    missing = [k for k in range(workers) if not directory.results(k).exists()]
    if missing:
        problems.append(f"no result file of worker {listed([str(k) for k in missing])}")
    return paths


def _read_rows(paths: list[Path], columns: RowColumns, problems: list[str]) -> list[tuple[Path, int]]:
    """Reduce all readable rows into ``columns``; the files, and how many rows were read of each."""
    sources = []
    for path in paths:
        before = columns.rows
        try:
            for batch in read_parts(path):
                columns.add(batch)
        except (ResultsError, pa.ArrowException, OSError) as e:
            rows, said = columns.rows - before, str(e).removeprefix(f"{path}: ")
            problems.append(f"{path.name}: {said}{f' (the {rows:,} rows before it are used)' if rows else ''}")
        sources.append((path, columns.rows - before))
    return sources


def _rows(table: Table, mask: Bools, plan: _Plan, held: LoopStalls) -> Rows:
    """The rows under ``mask`` as columns, times in seconds; each column is taken out of ``table`` as it is used."""
    whole = bool(mask.all())

    def column(name: str) -> Any:
        if name not in table:
            return np.empty(int(np.count_nonzero(mask)), CHUNKS[name])
        return table.pop(name) if whole else table.pop(name)[mask]

    def seconds(name: str) -> Any:
        values = column(name)
        return np.divide(values, NS, out=values)

    ids, scheduled = column("request_id"), seconds("scheduled_ns")
    sent, finished = seconds("sent_ns"), seconds("finished_ns")
    times = ("first_gap", "decode", "max_gap")
    same = (*COUNTS, "error", "replica", "retries", "chunks", "stated_tokens", "first_tokens", "shared")
    return Rows(
        request_id=ids,
        rank=_rank(ids, scheduled, plan.requests),
        planned_input_tokens=plan.input_tokens[ids],
        planned_output_tokens=plan.output_tokens[ids],
        scheduled_s=scheduled,
        sent_s=sent,
        finished_s=finished,
        held_s=held.between(sent, finished),
        **{f"{name}_s": seconds(f"{name}_ns") for name in times},
        **{name: column(name) for name in same},
    )


def _rank(ids: Ints, scheduled_s: Floats, requests: int) -> Ints:
    """Place of each row when ordered by (scheduled_s, id); by counting where ids follow the clock, as in most plans."""
    due = np.full(requests, np.nan)
    due[ids] = scheduled_s
    there = np.isfinite(due)
    if (np.diff(due[there]) < 0).any():
        rank = np.empty(len(ids), np.int64)
        rank[np.lexsort((ids, scheduled_s))] = np.arange(len(ids))
        return rank
    place: Ints = np.cumsum(there) - 1
    return place[ids]
