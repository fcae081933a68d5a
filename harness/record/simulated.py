"""The files of a run that was simulated: rows and server metrics of the same schemas, written from whole columns.

Every token of a replica comes at the end of one of its steps, so that the gaps of a request are a slice of the gaps
between steps: a million requests are written in seconds, a batch in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.record.results import SCHEMA
from harness.record.samples import GAUGES, SERVER_SCHEMA

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BATCH_TOKENS = 4_000_000
NOT_SERVED = -1
"""`SimulatedRows.replica` of a request that no engine took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What became of a request that no server answered to the end."""

    at_ns: int
    """When its client knew."""
    cut: bool
    """Whether it was cut off; else there was nobody to send it to."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRows:
    """Columns of one length, an entry a request; times in ns after the common start."""

    request_id: Ints
    due_ns: Ints
    """When it was due and sent: a simulated client is never late."""
    replica: Ints
    first_step: Ints
    """Of its replica, that gave the first token."""
    input_tokens: Ints
    output_tokens: Ints
    """Of one that was lost: those that it had."""
    cached_tokens: Ints | None
    step_end_ns: Sequence[Ints]
    """When each step of each replica ended."""
    resumed: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """By index: of a request that was thrown out and went on, tokens it had and the step that gave the next, each
    time."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """By index: why no engine took it."""
    unsent: frozenset[int] = frozenset()
    """Indices of those that never went out, since the run was over."""
    lost: Mapping[int, Lost] = field(default_factory=dict)
    """By index."""

    def __len__(self) -> int:
        return len(self.request_id)


def write_rows(path: Path, rows: SimulatedRows) -> None:
    """One row for each request, in the order of ``rows``. Raises OSError."""
    ends = np.concatenate([np.zeros(0, dtype=np.int64), *rows.step_end_ns])
    gaps = np.diff(ends, prepend=0)
    base = np.concatenate(([0], np.cumsum([len(one) for one in rows.step_end_ns])))[:-1]
    served = rows.replica != NOT_SERVED
    tokens = np.where(served, rows.output_tokens, 0)
    first = np.where(tokens > 0, rows.first_step + base[rows.replica], 0)
    last = first + tokens - 1
    for k, times in rows.resumed.items():
        had, step = times[-1]
        last[k] = base[rows.replica[k]] + step + rows.output_tokens[k] - had - 1
    finished = np.where(tokens > 0, ends[np.maximum(last, 0)] if len(ends) else 0, rows.due_ns)
    for k, lost in rows.lost.items():
        finished[k] = lost.at_ns
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA, options=options) as stream:
        for part in _parts(tokens):
            count, start = tokens[part], first[part]
            offsets = np.concatenate(([0], np.cumsum(count)))
            steps = np.repeat(start - offsets[:-1], count)
            steps += np.arange(offsets[-1])
            for k in rows.resumed.keys() & range(part.start, part.stop):
                begin = offsets[k - part.start]
                for had, step in rows.resumed[k]:
                    steps[begin + had : offsets[k - part.start + 1]] = (
                        base[rows.replica[k]] + step + np.arange(rows.output_tokens[k] - had)
                    )
            own = gaps[steps]
            for k in rows.resumed.keys() & range(part.start, part.stop):
                begin, end = offsets[k - part.start], offsets[k - part.start + 1]
                own[begin + 1 : end] = np.diff(ends[steps[begin:end]])
            some = count > 0
            own[offsets[:-1][some]] = ends[start[some]] - rows.due_ns[part][some]
            stream.write_batch(_batch(rows, part, own, offsets, finished[part]))


def _parts(tokens: Ints) -> Iterator[slice]:
    """Rows of about `BATCH_TOKENS` together."""
    sums = np.cumsum(tokens)
    begin, n = 0, len(tokens)
    while begin < n:
        before = int(sums[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(sums, before + BATCH_TOKENS)))
        end = min(end, begin + BATCH_TOKENS, n)
        yield slice(begin, end)
        begin = end


def _batch(rows: SimulatedRows, part: slice, gaps: Ints, offsets: Ints, finished_ns: Ints) -> pa.RecordBatch:
    n = part.stop - part.start
    details: list[str | None] = [rows.refused.get(k) for k in range(part.start, part.stop)]
    sent = rows.replica[part] != NOT_SERVED
    ok = sent.copy()
    errors: list[str | None] = [None if why is None else "rejected" for why in details]
    for k in rows.lost.keys() & range(part.start, part.stop):
        ok[k - part.start] = False
        errors[k - part.start], details[k - part.start] = "cut" if rows.lost[k].cut else "connect", rows.lost[k].why
    for k in rows.unsent & frozenset(range(part.start, part.stop)):
        errors[k - part.start] = "unsent"
    unsent = np.array([error == "unsent" for error in errors])
    known = {
        "request_id": rows.request_id[part], "worker": np.zeros(n, dtype=np.int16),
        "replica": pa.array(rows.replica[part].astype(np.int16), mask=~sent), "scheduled_ns": rows.due_ns[part],
        "sent_ns": pa.array(rows.due_ns[part], mask=unsent), "finished_ns": pa.array(finished_ns, mask=unsent),
        "input_tokens": pa.array(rows.input_tokens[part].astype(np.int32), mask=unsent),
        "output_tokens": pa.array(rows.output_tokens[part].astype(np.int32), mask=~ok),
        "retries": np.zeros(n, dtype=np.int16),
        "finish_reason": pa.array(np.where(ok, "length", ""), mask=~ok),
        "error": errors, "detail": details,
        "chunk_gap_ns": pa.ListArray.from_arrays(offsets.astype(np.int32), gaps),
        "chunk_tokens": pa.ListArray.from_arrays(offsets.astype(np.int32), np.ones(len(gaps), dtype=np.int32)),
    }  # fmt: skip
    if rows.cached_tokens is not None:
        cached = rows.cached_tokens[part]
        known["cached_tokens"] = pa.array(cached.astype(np.int32), mask=cached < 0)
    arrays = [_column(known[f.name], f.type) if f.name in known else pa.nulls(n, f.type) for f in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)


def _column(values: object, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSamples:
    """What one replica said of itself, an entry a sample; columns of `harness.record.samples.GAUGES`."""

    t_ns: Ints
    gauges: Mapping[str, Floats]


def counters_at(rows: SimulatedRows, replica: int, steps: Ints) -> dict[str, Floats]:
    """A replica's token counters after so many of its steps. Tokens of prompts count when they gave the first token."""
    mine = np.flatnonzero((rows.replica == replica) & (rows.first_step >= 0))
    n = len(rows.step_end_ns[replica]) + 1
    first = rows.first_step[mine]
    change = np.zeros(n + 1)
    plain = mine[~np.isin(mine, [*rows.resumed])] if rows.resumed else mine
    np.add.at(change, rows.first_step[plain], 1)
    np.add.at(change, rows.first_step[plain] + rows.output_tokens[plain], -1)
    for k in set(rows.resumed) & set(mine.tolist()) if rows.resumed else ():
        begins = [(0, int(rows.first_step[k])), *rows.resumed[k], (int(rows.output_tokens[k]), 0)]
        for (had, step), (until, _) in pairwise(begins):
            change[step] += 1
            change[step + until - had] -= 1
    given = np.concatenate(([0.0], np.cumsum(np.cumsum(change))))[steps]
    found = {"generation_tokens_total": given, "engine_steps_total": steps.astype(np.float64)}
    sums = {"prompt_tokens_total": rows.input_tokens}
    if rows.cached_tokens is not None:
        hits = np.maximum(rows.cached_tokens, 0)
        sums |= {"prompt_tokens_cached_total": hits, "prefix_cache_hits_total": hits}
        sums |= {"prefix_cache_queries_total": rows.input_tokens}
    for name, values in sums.items():
        by_step = np.bincount(first, weights=values[mine], minlength=n)
        found[name] = np.concatenate(([0.0], np.cumsum(by_step)))[steps]
    return found


def write_server_metrics(path: Path, server: ServerSamples) -> None:
    """The samples as `harness.record.samples.ServerMetrics` writes those of a real server. Raises OSError."""
    n = len(server.t_ns)
    columns: dict[str, pa.Array] = {"t_ns": pa.array(server.t_ns), "took_ns": pa.array(np.zeros(n, dtype=np.int64))}
    for name in GAUGES:
        columns[name] = pa.array(server.gauges[name]) if name in server.gauges else pa.nulls(n, pa.float64())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as stream:
        stream.write_batch(pa.record_batch([columns[f.name] for f in SERVER_SCHEMA], schema=SERVER_SCHEMA))
