"""Result rows for other tools: flat columns with units in their names, a run at a time, a batch in memory at a time.

Columns: those of the result row as they are (`harness.record.results`), before them which run, after them what is
derived.

=====================  =======  ======================================================================================
column                 type     meaning
=====================  =======  ======================================================================================
run, model, tier,      string   of the run; ``tier`` is null when none was stated, ``evidence`` measured or simulated
engine, evidence
measured               bool     the row counts in the run's figures; false: warm-up, or left out (duplicate, impossible)
planned_input_tokens,  int32    as the plan has them; null when it does not say
planned_output_tokens
ttft_s, tpot_s, e2e_s, float64  as METRICS.md defines them; null where they do not exist and in rows not measured
service_ttft_s, lag_s
max_itl_s              float64  longest gap between two chunks
=====================  =======  ======================================================================================
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.labels import FORMULA, label_runs
from harness.analysis.rows.read import Rows, Run, read_run
from harness.errors import ResultsError, UsageError
from harness.record.results import SCHEMA as ROW

DERIVED: dict[str, Callable[[Rows], Floats]] = {
    "ttft_s": metrics.ttft,
    "service_ttft_s": metrics.service_ttft,
    "tpot_s": metrics.tpot,
    "e2e_s": metrics.e2e,
    "lag_s": metrics.lag,
    "max_itl_s": metrics.itl_max,
}
PLANNED = ("planned_input_tokens", "planned_output_tokens")
NAMED = ("run", "model", "tier", "engine", "evidence")
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in NAMED),
        pa.field("measured", pa.bool_()),
        *(field.with_nullable(True) for field in ROW),
        *(pa.field(name, pa.int32()) for name in PLANNED),
        *(pa.field(name, pa.float64()) for name in DERIVED),
    ]
)
GROUP_ROWS, GROUP_CHUNKS = 100_000, 4_000_000
"""Rows or chunks, whichever comes first, of one row group of Parquet."""


def export_runs(paths: Sequence[Path], out: Path, tell: Callable[[str], None] | None = None) -> int:
    """Write the rows of run directories into one file and return their number; an earlier file is replaced in one step.

    The ending decides: ``.parquet``; ``.csv`` (lists as numbers with spaces between; text that a spreadsheet would take
    for a formula gets a ' before it); ``.jsonl`` (one object a line). ``tell`` gets a line for
    all that makes the rows of a run less than the whole of it: stopped early, rows lost, files that cannot be read.

    Raises `UsageError` for another ending or a run named twice, `ResultsError` when a file cannot be read or written.
    """
    write = WRITERS.get(out.suffix.lower())
    if write is None:
        raise UsageError(f"{out}: the ending says the format, and it is none of {', '.join(WRITERS)}")
    labels = label_runs(paths)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    counted = _Counted(_all_batches(paths, labels, tell or (lambda _: None)))
    try:
        write(temporary, counted)
        temporary.replace(out)
    except OSError as e:
        raise ResultsError(f"{out}: cannot write ({e.strerror or e}); choose another -o") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return counted.rows


def run_table(run: Run, label: str | None = None) -> pa.Table:
    """All rows of one run as a table of `SCHEMA`, in file order."""
    return pa.Table.from_batches(iter_batches(run, label), schema=SCHEMA)


def iter_batches(run: Run, label: str | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of `SCHEMA`, in file order; ``label`` names the run (default: its directory)."""
    manifest = run.manifest
    tier = manifest.tier.name if manifest.tier is not None else None
    named = (label or label_runs([run.path])[0], manifest.model, tier, manifest.engine, run.evidence)
    for batch, keep, rows in run.batches():
        arrays: list[Any] = [
            pa.array([value], pa.string()).take(pa.array(np.zeros(len(batch), int))) for value in named
        ]
        arrays += [pa.array(keep), *batch.columns]
        arrays += [pc.cast(_spread(keep, getattr(rows, name)), pa.int32()) for name in PLANNED]
        arrays += [_spread(keep, metric(rows)) for metric in DERIVED.values()]
        yield pa.record_batch(arrays, schema=SCHEMA)


def _spread(keep: Any, values: Floats) -> pa.Array:
    """Values of the measured rows at their places among all rows; null elsewhere and where not known."""
    found = np.full(len(keep), np.nan)
    found[keep] = values
    return pa.array(found, mask=~np.isfinite(found))


def _all_batches(paths: Sequence[Path], labels: Sequence[str], tell: Callable[[str], None]) -> Iterator[pa.RecordBatch]:
    for path, label in zip(paths, labels, strict=True):
        run = read_run(path)
        if run.manifest.status != "complete":
            tell(f"{path}: the run is {run.manifest.status}, not complete: it is INVALID")
        if lost := metrics.count(run).lost:
            tell(f"{path}: {lost:,} measured requests have no row: it is INVALID")
        for problem in run.problems:
            tell(f"{path}: {problem}")
        yield from iter_batches(run, label)


class _Counted:
    """Batches, with a count of their rows as they go by."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self.rows = batches, 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += len(batch)
            yield batch


def _write_parquet(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(str(path), SCHEMA, compression="zstd") as writer:
        for group in _grouped(batches):
            writer.write_table(group, row_group_size=max(1, group.num_rows))


def _grouped(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    chunks = 0
    for batch in batches:
        held.append(batch)
        chunks += len(pc.list_flatten(batch.column("chunk_gap_ns")))
        if chunks >= GROUP_CHUNKS or sum(map(len, held)) >= GROUP_ROWS:
            yield pa.Table.from_batches(held)
            held, chunks = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _write_csv(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    from pyarrow import csv

    flat = pa.schema([pa.field(f.name, pa.string() if pa.types.is_list(f.type) else f.type) for f in SCHEMA])
    with csv.CSVWriter(str(path), flat) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch([_cell(column) for column in batch.columns], schema=flat))


def _cell(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        return pc.binary_join(pc.cast(column, pa.list_(pa.string())), " ")
    if pa.types.is_string(column.type):
        return pc.replace_substring_regex(column, FORMULA, r"'\1")
    return column


def _write_lines(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with path.open("wb") as file:
        for batch in batches:
            file.writelines(msgspec.json.encode(row) + b"\n" for row in batch.to_pylist())


WRITERS = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_lines}
