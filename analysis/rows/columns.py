"""Result files -> one number per request and column, a batch in memory at a time.

The stamps of a request are reduced where they are read; what stays of them is their count, the first gap, the time from
the first chunk to the last, the longest gap between, and the tokens they say they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.analysis.arrays import Bools, Floats, Ints
from harness.errors import ResultsError
from harness.plan.file import iter_plan_columns
from harness.record.results import SCHEMA, iter_results
from harness.untrusted import open_arrow

PART_CHUNKS = 200_000
"""Chunks that are worked on at a time: what a step needs beside them stays in tens of megabytes."""
PART_ROWS = 100_000
LONGEST_NS = 2**53
"""104 days: no run is longer, and times within it are exact as floats."""
MOST_CLASSES = 1000
"""Error classes told apart; a file that claims more is not ours."""
LISTS = {"chunk_gap_ns", "chunk_tokens"}
COUNTS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
NUMBERS = ("scheduled_ns", "sent_ns", "finished_ns", *COUNTS)

Table = dict[str, npt.NDArray[Any]]
"""Columns of one length by name."""


def read_facts(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a whole result file as they were written, without their lists, which are not even decompressed.

    Raises `ResultsError`, an Arrow error or OSError at anything odd, a torn end among it.
    """
    wanted = [i for i, name in enumerate(SCHEMA.names) if name not in LISTS]
    options, schema = pa.ipc.IpcReadOptions(included_fields=wanted), pa.schema([SCHEMA.field(i) for i in wanted])
    with open_arrow(path) as source:
        for batch in pa.ipc.open_stream(source, options=options):
            if not batch.schema.equals(schema):
                raise ResultsError("the columns are not those of this result schema")
            batch.validate(full=True)
            yield batch


def read_parts(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a result file in batches of about `PART_CHUNKS` chunks, in file order, checked.

    Raises `ResultsError` or an Arrow error at the first batch that is damaged or of other columns, after those before.
    """
    held: list[pa.RecordBatch] = []
    chunks = rows = 0
    trouble: Exception | None = None
    try:
        for batch in iter_results(path):
            if not batch.schema.equals(SCHEMA):
                raise ResultsError("the columns are not those of this result schema")
            batch.validate(full=True)  # Arrow trusts offsets: a damaged file would be read outside its memory
            held.append(batch)
            rows, chunks = rows + len(batch), chunks + len(pc.list_flatten(batch.column("chunk_gap_ns")))
            if chunks >= PART_CHUNKS or rows >= PART_ROWS:
                yield from _cut(held)
                held, chunks, rows = [], 0, 0
    except (ResultsError, pa.ArrowException, OSError) as e:
        trouble = e
    yield from _cut(held)
    if trouble is not None:
        raise trouble


def _cut(held: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches joined into one, or one that is too long in several."""
    if not held:
        return
    for batch in [held[0]] if len(held) == 1 else pa.Table.from_batches(held).combine_chunks().to_batches():
        offsets = lists(batch.column("chunk_gap_ns"))[1]
        start = 0
        while start < len(batch):
            end = int(np.searchsorted(offsets, offsets[start] + 2 * PART_CHUNKS, side="right")) - 1
            end = min(max(end, start + 1), start + 2 * PART_ROWS, len(batch))
            yield batch.slice(start, end - start)
            start = end


def plan_size(path: Path) -> int:
    """How many requests a plan has. Raises `ResultsError` unless their ids are 0..n-1 in any order, `PlanError`."""
    n = sum(len(batch) for batch in iter_plan_columns(path, ["request_id"]))
    seen = np.zeros(n, np.bool_)
    for batch in iter_plan_columns(path, ["request_id"]):
        ids = batch.column(0).to_numpy()
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= n:
            break
        seen[ids] = True
    if not seen.all():
        raise ResultsError(f"{path}: request ids are not 0..{n - 1}; build the plan again")
    return n


def plan_column(
    path: Path, name: str, n: int, values: Callable[[Any], Any], dtype: npt.DTypeLike = np.float64
) -> npt.NDArray[Any]:
    """A column of a plan of ``n`` requests by request id, read a batch at a time. Raises `PlanError`."""
    made = np.empty(n, dtype)
    for batch in iter_plan_columns(path, ["request_id", name]):
        made[batch.column(0).to_numpy()] = values(batch.column(1))
    return made


@dataclass(slots=True)
class RowColumns:
    """Per-request columns of all batches so far; not measured is NaN. Batches without lists have none of `CHUNKS`."""

    names: list[str] = field(default_factory=list)
    """Error classes, in the order met; column ``error`` is an index into it, -1 for none."""
    examples: dict[str, str | None] = field(default_factory=dict)
    """Error class -> the first detail that was written with it."""
    resent: int = 0
    """Rows that were sent more than once."""
    remarked: int = 0
    """Successes with a detail: something in the answer was left out."""
    remark: str | None = None
    """The first of those details."""
    rows: int = 0
    _parts: list[Table] = field(default_factory=list)

    def add(self, batch: pa.RecordBatch) -> None:
        """Reduce one batch. Raises `ResultsError` for rows of too many error classes."""
        part: Table = {name: floats(batch.column(name)) for name in NUMBERS}
        part["request_id"] = np.asarray(batch.column("request_id").to_numpy(), dtype=np.int64)
        part["error"] = self._codes(batch)
        for name in ("replica", "retries"):
            part[name] = pc.fill_null(batch.column(name), -1).to_numpy()
        self._remarks(batch)
        self.resent += pc.sum(pc.greater(batch.column("retries"), 0)).as_py() or 0
        part["possible"] = possible(part)
        if LISTS.issubset(batch.schema.names):
            chunks = reduce_chunks(batch)
            part["possible"] &= chunks.pop("possible")
            part |= chunks
        self._parts.append(part)
        self.rows += len(batch)

    def take(self) -> Table:
        """Name -> column over all batches; they are forgotten here."""
        if not self._parts:
            self.add(pa.record_batch([pa.array([], f.type) for f in SCHEMA], schema=SCHEMA))
        parts, self._parts = self._parts, []
        return {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}

    def _remarks(self, batch: pa.RecordBatch) -> None:
        detail, error = batch.column("detail"), batch.column("error")
        if detail.null_count < len(batch):
            said = detail.filter(pc.and_(pc.is_null(error), pc.is_valid(detail)))
            self.remarked += len(said)
            if self.remark is None and len(said):
                self.remark = said[0].as_py()

    def _codes(self, batch: pa.RecordBatch) -> npt.NDArray[np.int16]:
        column = batch.column("error")
        codes = np.full(len(batch), -1, dtype=np.int16)
        if column.null_count == len(batch):
            return codes
        words = column.dictionary_encode()
        code = []
        for word in words.dictionary.to_pylist():
            if word not in self.examples:
                if len(self.names) >= MOST_CLASSES:
                    raise ResultsError(f"more than {MOST_CLASSES} error classes")
                self.names.append(word)
                self.examples[word] = batch.column("detail")[pc.index(column, word).as_py()].as_py()
            code.append(self.names.index(word))
        failed = bools(pc.is_valid(column))
        codes[failed] = np.array(code)[np.asarray(words.indices.drop_null().to_numpy())]
        return codes


CHUNKS: dict[str, type] = dict.fromkeys(
    ("first_gap_ns", "decode_ns", "max_gap_ns", "stated_tokens", "first_tokens"), np.float64
)
CHUNKS |= dict.fromkeys(("chunks", "shared"), np.int32)
"""What `reduce_chunks` makes, and of which type."""


def reduce_chunks(batch: pa.RecordBatch) -> Table:
    """What stays of each row's chunks: ``chunks``, ``first_gap_ns``, ``decode_ns`` (first chunk to last),
    ``max_gap_ns`` (longest after the first), ``stated_tokens``, ``first_tokens`` (of these, in the first chunk),
    ``shared`` (chunks with the time of the one before), and ``possible``: False where they contradict each other or
    the times of their row.
    """
    gaps, offsets = lists(batch.column("chunk_gap_ns"))
    counts = np.diff(offsets)
    some = counts > 0
    starts = offsets[:-1][some]
    shared = np.zeros(len(batch), dtype=np.int32)
    first, decode, longest = (np.full(len(batch), np.nan) for _ in range(3))
    ok = np.ones(len(batch), dtype=np.bool_)
    if len(starts):
        first[some] = gaps[starts]
        decode[some] = np.add.reduceat(gaps, starts) - gaps[starts]
        later = gaps.copy()
        later[starts] = 0
        longest[some] = np.maximum.reduceat(later, starts)
        longest[counts < 2] = np.nan
        together = gaps == 0
        together[starts] = False
        shared[some] = np.add.reduceat(together, starts, dtype=np.int32)
        if gaps.min() < 0 or gaps.max() > LONGEST_NS:
            ok[some] = (np.minimum.reduceat(gaps, starts) >= 0) & (np.maximum.reduceat(gaps, starts) <= LONGEST_NS)
    tokens, token_offsets = lists(batch.column("chunk_tokens"))
    told = bools(pc.is_valid(batch.column("chunk_tokens")))
    ok &= ~told | (np.diff(token_offsets) == counts)
    stated, head = np.where(some, np.nan, 0.0), np.full(len(batch), np.nan)
    begins = token_offsets[:-1][np.diff(token_offsets) > 0]
    if len(tokens) and tokens.min() == tokens.max() == 1:
        stated = np.where(told, np.diff(token_offsets), stated)
        head[told & some] = 1.0
    elif len(begins):
        rows = np.diff(token_offsets) > 0
        stated[rows], head[rows] = np.add.reduceat(tokens, begins), tokens[begins]
        if tokens.min() < 1:  # a count below one makes it no division of the answer
            unclear = np.flatnonzero(rows)[np.minimum.reduceat(tokens, begins) < 1]
            stated[unclear] = head[unclear] = np.nan
    sent, finished = floats(batch.column("sent_ns")), floats(batch.column("finished_ns"))
    ok &= np.where(some, finished >= sent + np.nan_to_num(first) + np.nan_to_num(decode), True)
    return {
        "chunks": counts.astype(np.int32), "first_gap_ns": first, "decode_ns": decode, "max_gap_ns": longest,
        "stated_tokens": stated, "first_tokens": head, "shared": shared, "possible": ok,
    }  # fmt: skip


def possible(part: Table) -> Bools:
    """False for rows that contradict themselves: a row that cannot be true is no evidence of anything."""
    sent, finished = part["sent_ns"], part["finished_ns"]
    was_sent = np.isfinite(sent)
    ok: Bools = ~was_sent | (np.isfinite(finished) & (finished >= sent))
    ok &= was_sent | (part["error"] >= 0)  # nothing succeeds unsent
    for name in ("scheduled_ns", "sent_ns", "finished_ns"):
        ok &= ~(np.abs(part[name]) > LONGEST_NS)
    ok &= part["scheduled_ns"] >= 0
    for name in COUNTS:
        ok &= ~(part[name] < 0)
    return ok


def chunk_arrays(batch: pa.RecordBatch) -> Table:
    """Every chunk of a batch: ``offsets``, ``gap_s``, ``chunk_s``, ``chunk_tokens``."""
    gaps, offsets = lists(batch.column("chunk_gap_ns"))
    counts = np.diff(offsets)
    running = np.cumsum(gaps)  # integers: exact however long the run
    before = np.concatenate(([0], running))[offsets[:-1]]
    sent = np.nan_to_num(floats(batch.column("sent_ns"))).astype(np.int64)
    return {
        "offsets": offsets, "gap_s": gaps / 1e9,
        "chunk_s": (running + np.repeat(sent - before, counts)) / 1e9,
        "chunk_tokens": _chunk_tokens(batch.column("chunk_tokens"), counts),
    }  # fmt: skip


def _chunk_tokens(column: Any, chunks: Ints) -> Floats:
    """Tokens per chunk; NaN for a whole row when unknown or when a count below one makes it no division."""
    values, _ = lists(column)
    if column.null_count == 0 and len(values) and values.min() >= 1:
        return np.broadcast_to(1.0, len(values)) if values.max() == 1 else values.astype(np.float64)
    chunk_row = np.repeat(np.arange(len(chunks)), chunks)
    tokens = np.full(len(chunk_row), np.nan)
    tokens[bools(pc.is_valid(column))[chunk_row]] = values
    unclear = np.zeros(len(chunks), dtype=np.bool_)
    unclear[chunk_row[tokens < 1]] = True
    tokens[unclear[chunk_row]] = np.nan
    return tokens


def lists(column: Any) -> tuple[npt.NDArray[Any], Ints]:
    """A list column as flat integers and offsets (length rows + 1); a null list has no values, a null value is -1."""
    lengths = pc.list_value_length(column)
    flat = pc.list_flatten(column)
    if lengths.null_count:
        lengths = pc.fill_null(lengths, 0)
    if flat.null_count:
        flat = pc.fill_null(flat, -1)
    return np.asarray(flat.to_numpy()), np.concatenate(([0], np.cumsum(lengths.to_numpy(), dtype=np.int64)))


def floats(column: Any) -> Floats:
    """A column as floats, null as NaN. Nanoseconds stay exact up to 104 days."""
    return np.asarray(pc.fill_null(pc.cast(column, pa.float64(), safe=False), float("nan")).to_numpy())


def bools(array: Any) -> Bools:
    """A boolean Arrow array as NumPy."""
    return np.asarray(array.to_numpy(zero_copy_only=False) if isinstance(array, pa.Array) else array.to_numpy())
