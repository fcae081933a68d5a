"""A run in slow motion (``--slow N``): servers and clients take N times as long, and the files say what N = 1 would.

A simulated server in real time must end its steps when they are due. A laptop that cannot do so at the pace of the
hardware can at a slower one: the plan, every limit of the run and every step are stretched alike, and what was stamped
is divided again once the load is over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from harness.record.manifest import RunDir, RunManifest
from harness.record.run_spec import RunSpec
from harness.untrusted import open_arrow

SECONDS = frozenset({"prefill_request_s_total", "decode_request_s_total"})
"""Columns of durations whose names end in no ``_ns``."""
LIMITS = ("duration_s", "drain_s", "timeout_s", "stall_s", "lag_bound_s", "ramp_s", "warmup_s")


def stretched(spec: RunSpec, slow: float) -> RunSpec:
    """What load workers are told: every limit of the run ``slow`` times as long."""
    said = {name: getattr(spec, name) for name in LIMITS}
    longer = {name: value * slow for name, value in said.items() if value is not None}
    return replace(spec, **longer, slo={name: limit * slow for name, limit in spec.slo.items()})


@contextmanager
def slowed(run: RunDir, manifest: RunManifest, slow: float) -> Iterator[None]:
    """The plan stretched while a load lasts; then it is as before, and all that was stamped is at its pace."""
    if slow == 1:
        yield
        return
    kept = run.plan.with_name(f".{run.plan.name}.kept")
    os.link(run.plan, kept)
    try:
        scale(run.plan, slow)
        yield
    finally:
        kept.replace(run.plan)
        for path in sorted(run.path.glob("*.arrows")):
            scale(path, 1 / slow)
        if manifest.end_ns is not None:
            manifest.end_ns = round(manifest.end_ns / slow)
        for worker in manifest.workers:
            if worker.loop_lag_p99_s is not None:
                worker.loop_lag_p99_s /= slow


def scale(path: Path, factor: float) -> None:
    """Multiply every time in a file of Arrow batches (a plan or a stream), which is replaced in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open_arrow(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        batches, schema = _batches(source, is_file=is_file)
        new = pa.ipc.new_file if is_file else pa.ipc.new_stream
        with new(str(temporary), schema) as sink:
            for batch in batches:
                columns = [_scaled(name, column, factor) for name, column in _columns(batch).items()]
                sink.write_batch(pa.record_batch(columns, schema=schema))
    temporary.replace(path)


def _batches(source: object, *, is_file: bool) -> tuple[Iterator[pa.RecordBatch], pa.Schema]:
    if is_file:
        whole = pa.ipc.open_file(source)
        return (whole.get_batch(k) for k in range(whole.num_record_batches)), whole.schema
    stream = pa.ipc.open_stream(source)
    return _whole(stream), stream.schema


def _whole(stream: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The batches up to where a stream was torn, if it was."""
    with suppress(pa.ArrowException, OSError):
        yield from stream


def _columns(batch: pa.RecordBatch) -> Mapping[str, pa.Array]:
    return dict(zip(batch.schema.names, batch.columns, strict=True))


def _scaled(name: str, column: pa.Array, factor: float) -> pa.Array:
    if not name.endswith("_ns") and name not in SECONDS:
        return column
    if pa.types.is_list(column.type):
        whole = pa.ListArray.from_arrays(column.offsets, _times(column.values, factor))
        assert column.null_count == 0
        return whole.cast(column.type)
    return _times(column, factor, up=name == "finished_ns")


def _times(values: pa.Array, factor: float, *, up: bool = False) -> pa.Array:
    """Rounded down, so that gaps add up to no more than what they are of; that is rounded ``up``."""
    missing = np.asarray(values.is_null())
    found = np.asarray(values.fill_null(0)).astype(np.float64) * factor
    if pa.types.is_integer(values.type):
        found = (np.ceil(found) if up else np.floor(found)).astype(np.int64)
    return pa.array(found, type=values.type, mask=missing if missing.any() else None)
