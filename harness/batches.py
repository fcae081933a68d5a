"""Trace records -> batches of plan rows: prompts, sessions, hang-ups. `harness.build` decides how many and when."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import compress, islice

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.arrivals import Times
from harness.errors import PlanError
from harness.plan import SCHEMA, PlanSpec
from harness.prompts import Ids, Vocabulary
from harness.trace import Trace, TraceRecord
from harness.traces.rescale import Arrangement

# Batches are bounded in rows and in tokens or characters, so that memory is, whatever the trace holds.
_BATCH_ROWS = 1024
_BATCH_SIZE = 2_000_000

Copied = tuple[int, TraceRecord]
"""A row and which copy of the trace it is of: a trace can be begun again, or be laid over itself."""


@dataclass(slots=True)
class Batches:
    """Reads the trace a second time and turns it into batches of `SCHEMA`."""

    trace: Trace
    spec: PlanSpec
    vocabulary: Vocabulary | None
    rows: int
    """Of the trace, before it begins again."""
    scheduled: Times | None
    warmup: int
    cancelled: npt.NDArray[np.bool_]
    arrangement: Arrangement | None = None
    """null: the rows in trace order, from the beginning again where ``rows`` are too few."""

    def of(self, n: int) -> Iterator[pa.RecordBatch]:
        """The first ``n`` requests. Raises `PlanError` when the trace is no longer what it was."""
        done, sessions = (
            0,
            _Sessions(self.trace, wait=self.spec.sessions == "wait", overlap=self.arrangement is not None),
        )
        with contextlib.closing(self._copied(n) if self.arrangement is None else self._arranged(n)) as rows:
            for chunk in _chunks(rows):
                yield self._batch(chunk, done, sessions)
                done += len(chunk)
        if done != n:
            raise PlanError(f"{self.trace.path}: {n} requests before, now {done}: it changed while it was read")

    def _copied(self, n: int) -> Generator[Copied, None, None]:
        """Rows in trace order."""
        for copy in range(-(-n // self.rows)):
            with contextlib.closing(iter(self.trace)) as records:
                read = 0
                for record in islice(records, min(self.rows, n - copy * self.rows)):
                    read += 1
                    yield copy, record
            if read < min(self.rows, n - copy * self.rows):
                return

    def _arranged(self, n: int) -> Generator[Copied, None, None]:
        """Rows as arranged: each part is a reading of its own, so that none need be held."""
        assert self.arrangement is not None
        parts = self.arrangement.parts
        with contextlib.ExitStack() as open_:
            readings = [
                compress(open_.enter_context(contextlib.closing(iter(self.trace))), part.rows) for part in parts
            ]
            for start in range(0, n, _BATCH_ROWS):
                for part in self.arrangement.part[start : min(start + _BATCH_ROWS, n)].tolist():
                    record = next(readings[part], None)
                    if record is None:
                        return
                    yield parts[part].copy, record

    def _batch(self, rows: list[Copied], first: int, sessions: _Sessions) -> pa.RecordBatch:
        n = len(rows)
        chunk = [record for _, record in rows]
        ids, texts = self._prompts(rows, first)
        slices, after, think_ns = sessions.place(rows, first)
        columns = {
            "request_id": pa.array(np.arange(first, first + n, dtype=np.int64)),
            "phase": pa.array(["warmup" if i < self.warmup else "measured" for i in range(first, first + n)]),
            "scheduled_ns": None if self.scheduled is None else pa.array(self.scheduled[first : first + n]),
            "slice": pa.array(slices, pa.int64()),
            "after": pa.array(after, pa.int64()),
            "think_ns": pa.array(think_ns, pa.int64()),
            "cancel_after_ns": pa.array(
                [self._cancel_after_ns(record, i) for i, record in enumerate(chunk, first)], pa.int64()
            ),
            "model": pa.array([record.adapter for record in chunk], pa.string()),
            # Of a text, the trace's count is another tokenizer's: only the server knows.
            "input_tokens": pa.array(
                [None if r.text is not None or r.messages is not None else r.input_tokens for r in chunk], pa.int32()
            ),
            "output_tokens": pa.array([self._output_tokens(r.output_tokens) for r in chunk], pa.int32()),
            "prompt_token_ids": _id_lists(ids),
            "prompt_text": pa.array(
                [r.text if r.text is not None else t for r, t in zip(chunk, texts, strict=True)], pa.string()
            ),
            "messages": pa.array(
                [None if r.messages is None else msgspec.json.encode(r.messages).decode() for r in chunk], pa.string()
            ),
        }
        nulls = {field.name: pa.nulls(n, field.type) for field in SCHEMA if columns.get(field.name) is None}
        return pa.record_batch([(columns | nulls)[name] for name in SCHEMA.names], schema=SCHEMA)

    def _prompts(self, rows: list[Copied], first: int) -> tuple[list[Ids | None], list[str | None]]:
        """Token ids and texts, one of each per record: at most one is set, neither where the trace has its own."""
        seeds = {copy: _seed_of(self.spec.seed, copy) for copy in {copy for copy, _ in rows}}
        ids: list[Ids | None] = []
        for request_id, (copy, record) in enumerate(rows, first):
            if record.text is not None or record.messages is not None:
                ids.append(None)
                continue
            assert self.vocabulary is not None and record.input_tokens is not None
            ids.append(
                self.vocabulary.token_ids(
                    record.input_tokens,
                    request_id,
                    seed=seeds[copy],
                    prefix_ids=record.prefix_ids,
                    block_tokens=record.block_tokens,
                )
            )
        if not self.spec.as_text or self.vocabulary is None:
            return ids, [None] * len(ids)
        texts = iter(self.vocabulary.texts([prompt for prompt in ids if prompt is not None]))
        return [None] * len(ids), [None if prompt is None else next(texts) for prompt in ids]

    def _cancel_after_ns(self, record: TraceRecord, i: int) -> int | None:
        if record.cancel_after_s is not None:
            return round(record.cancel_after_s * 1e9)
        return round((self.spec.cancel_after_s or 0.0) * 1e9) if self.cancelled[i] else None

    def _output_tokens(self, traced: int | None) -> int | None:
        most = self.spec.max_output_tokens
        if traced is None or most is None:
            return traced if most is None else most
        return min(traced, most)


class _Sessions:
    """Which slice each request belongs to, and which turn it waits for."""

    def __init__(self, trace: Trace, *, wait: bool, overlap: bool) -> None:
        self._trace, self._wait, self._overlap = trace, wait, overlap
        self._slices = self._copy = 0
        self._last: dict[tuple[int, str], tuple[int, int, int | None]] = {}
        """(copy, session) -> slice, request_id and turn of its last row."""

    def place(self, rows: list[Copied], first: int) -> tuple[list[int], list[int | None], list[int | None]]:
        """slice, after and think_ns of each row."""
        slices: list[int] = []
        after: list[int | None] = []
        think_ns: list[int | None] = []
        for request_id, (copy, record) in enumerate(rows, first):
            if copy != self._copy and not self._overlap:
                self._last.clear()  # the copy before is over, and so are its sessions
            self._copy = copy
            session = None if record.session_id is None else (copy, record.session_id)
            last = None if session is None else self._last.get(session)
            if last is None:
                slices.append(self._slices)
                self._slices += 1
            else:
                slices.append(last[0])
            waits = self._wait and last is not None
            after.append(last[1] if waits and last is not None else None)
            think_ns.append(round((record.think_s or 0.0) * 1e9) if waits else None)
            if session is not None:
                if waits and last is not None and (last[2] or 0) > (record.turn if record.turn is not None else 2**31):
                    raise PlanError(
                        f"{self._trace.path}:{record.line}: turn {record.turn} of session {record.session_id!r} comes "
                        f"after its turn {last[2]}: a turn cannot wait for a later one; put the rows in order"
                    )
                self._last[session] = (slices[-1], request_id, record.turn)
        return slices, after, think_ns


def _seed_of(seed: int, copy: int) -> int:
    """The seed of a copy's prompts: shared prefixes of one pass over the trace must be unknown to the next."""
    if not copy:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {copy}".encode(), digest_size=8).digest(), "little")


def _chunks(rows: Iterator[Copied]) -> Iterator[list[Copied]]:
    chunk: list[Copied] = []
    size = 0
    for row in rows:
        chunk.append(row)
        record = row[1]
        if record.messages is not None:
            size += sum(len(message["content"]) for message in record.messages)
        else:
            size += len(record.text) if record.text is not None else record.input_tokens or 0
        if len(chunk) == _BATCH_ROWS or size >= _BATCH_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _id_lists(prompts: list[Ids | None]) -> pa.Array:
    offsets = np.cumsum([0] + [0 if ids is None else len(ids) for ids in prompts], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype=np.int32), *(ids for ids in prompts if ids is not None)])
    missing = pa.array([ids is None for ids in prompts])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)
