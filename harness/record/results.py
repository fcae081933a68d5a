"""The result row: one per planned request, written as it happens, readable after any crash.

A failure is a row; nothing is dropped. The file ``results-<worker>.arrows`` is an Arrow IPC *stream*, not an Arrow IPC
file: of a stream that was cut off every complete batch can still be read, of a file without its footer nothing.

Columns of `SCHEMA`:

==================  ============  =====================================================================================
column              type          meaning
==================  ============  =====================================================================================
request_id          int64         the plan's id
worker              int16         index of the load worker that sent it
replica             int16         index of the server it was sent to; null when it was never sent
scheduled_ns        int64         when it was due, ns after the common start. Open loop: from the plan. Closed loop: the
                                  moment its slot became free
sent_ns             int64         when the client began to send it (before any connection set-up); null: never sent
chunk_gap_ns        list<int64>   ns between chunks that carry output: the first from sent_ns, each other from the chunk
                                  before it. Gaps are service TTFT and ITL as they stand, and compress
                                  to half of absolute times (under five bytes a token).
                                  Empty when no output arrived, and when the answer was not streamed
chunk_tokens        list<int32>   output tokens in each of those chunks; null when the server did not let us know
finished_ns         int64         when the response ended or failed; null when never sent
input_tokens        int32         prompt tokens as the server counted them (``usage``); null when it did not say
cached_tokens       int32         of these, read from the prefix cache; null when it did not say
output_tokens       int32         completion tokens as the server counted them (``usage``); null when it did not say.
                                  Never the number of chunks: one may hold several tokens, or none
reasoning_tokens    int32         of these, spent on reasoning, streamed or not, as the server declared them
                                  (``completion_tokens_details``); null when it did not say
finish_reason       string        as the server said: stop, length, ...
http_status         int16         null when no status line arrived
error               string        null on success, else one of `ERRORS`
detail              string        a short human text (at most 300 characters) for a failure; on a success what of the
                                  answer was left out, as of no type that can be read; else null
retries             int16         how often it was sent again: once at most when the server closed a kept connection as
                                  it was used; after no connection, 429 or 503 only if the run asks for retries. sent_ns
                                  is the first try, so latencies hold the retries; the other columns are of the last
==================  ============  =====================================================================================

All times are one monotonic clock of the worker's host, zero at the common start of the run. Bytes arrive when the
kernel gets their packet; events that arrive between two reads of a socket have the time of the last.
"""

from __future__ import annotations

import contextlib
import io
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.errors import ResultsError
from harness.untrusted import open_arrow

ERRORS: dict[str, str] = {
    "connect": "no connection: refused, unreachable, or not accepted in time",
    "tls": "the TLS handshake or certificate check failed",
    "auth": "HTTP 401 or 403: the API key is missing or wrong",
    "not_found": "HTTP 404: no such path or model at this server",
    "rejected": "HTTP 4xx otherwise: the server refused this request",
    "overloaded": "HTTP 429 or 503: the server asks for less load",
    "server": "HTTP 5xx otherwise, or an error event inside the stream",
    "redirect": "HTTP 3xx: redirects are not followed, a load test must know where its load goes",
    "cut": "the connection ended before the response did",
    "protocol": "the answer is not an HTTP or OpenAI-compatible stream (for example an HTML page)",
    "incomplete": "the stream ended without [DONE] and without a finish reason",
    "empty": "the answer ended well, but without any output, and no usage says that there was any",
    "stall": "the server sent nothing for the stall timeout",
    "too_long": "the answer went on far beyond the tokens that were asked for, and was hung up on",
    "timeout": "the request was not finished within the request timeout",
    "cancelled": "the client hung up when the plan told it to: neither a success nor a failure of the server",
    "no_history": "never sent: an earlier turn of its live conversation failed, so it had nothing to go on from",
    "stopped": "in flight when the run was stopped",
    "unsent": "never sent: the run was stopped first",
}
"""The closed set of error classes, with what each means."""

FLUSH_S = 0.7
"""How often a worker writes its rows: with their parsing, less than a second of them is lost with its process."""
SCHEMA_VERSION = "3"
_BEFORE = {"2": ["reasoning_tokens"]}
"""Earlier schema version -> the columns it lacks: null in what is read of it."""
_PIECES = 1000

SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("worker", pa.int16(), nullable=False),
        pa.field("replica", pa.int16()),
        pa.field("scheduled_ns", pa.int64(), nullable=False),
        pa.field("sent_ns", pa.int64()),
        pa.field("chunk_gap_ns", pa.list_(pa.int64()), nullable=False),
        pa.field("chunk_tokens", pa.list_(pa.int32())),
        pa.field("finished_ns", pa.int64()),
        pa.field("input_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("reasoning_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("http_status", pa.int16()),
        pa.field("error", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("retries", pa.int16(), nullable=False),
    ],
    metadata={"harness.results": SCHEMA_VERSION},
)


@dataclass(slots=True)
class Result:
    """One row of `SCHEMA`. ``chunk_ns`` holds absolute stamps (run clock); the writer turns them into gaps."""

    request_id: int
    scheduled_ns: int
    replica: int | None = None
    sent_ns: int | None = None
    chunk_ns: Sequence[int] | None = None
    chunk_tokens: Sequence[int] | None = None
    finished_ns: int | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    finish_reason: str | None = None
    http_status: int | None = None
    error: str | None = None
    detail: str | None = None
    retries: int = 0


_SCALARS = [name for name in SCHEMA.names if name not in ("worker", "chunk_gap_ns", "chunk_tokens")]
_scalars = attrgetter(*_SCALARS)


class ResultWriter:
    """Appends rows in memory and writes them as one compressed Arrow batch on each `flush`.

    Call `flush` often: a process that dies loses at most what came after the last one. A disk that takes no more leaves
    the file whole up to there; what could not be written is kept, and tried again with the next call.
    """

    def __init__(self, path: Path, worker: int) -> None:
        self._worker = worker
        self._file = path.open("wb", buffering=0)
        self._bytes = io.BytesIO()  # not yet in the file
        self._written = 0
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._writer = pa.ipc.new_stream(self._bytes, SCHEMA, options=options)
        self.rows = 0
        self._encoded = 0
        self._clear()
        self._put()

    def _clear(self) -> None:
        self._rows: list[tuple[object, ...]] = []
        self._stamps = array("q")
        self._stamp_offsets = array("i", [0])
        self._tokens = array("i")
        self._token_offsets = array("i", [0])
        self._token_nulls: list[bool] = []

    def append(self, result: Result) -> None:
        self._rows.append(_scalars(result))
        if result.chunk_ns:
            assert result.sent_ns is not None
            self._stamps.extend(result.chunk_ns)
        self._stamp_offsets.append(len(self._stamps))
        if result.chunk_tokens is not None:
            self._tokens.extend(result.chunk_tokens)
        self._token_nulls.append(result.chunk_tokens is None)
        self._token_offsets.append(len(self._tokens))

    def flush(self) -> None:
        """Write what was appended since the last flush to the file, complete up to here even if we die next.

        Raises `OSError` when the disk does not take it.
        """
        if self._rows:
            self._encode()
        self._put()

    def _put(self) -> None:
        data = memoryview(self._bytes.getvalue())
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], self._written + done)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._written)
            raise
        self._written += len(data)
        self.rows += self._encoded
        self._encoded = 0
        self._bytes.seek(0)
        self._bytes.truncate()

    def _encode(self) -> None:
        rows, stamps, stamp_offsets = self._rows, self._stamps, self._stamp_offsets
        tokens, token_offsets, nulls = self._tokens, self._token_offsets, self._token_nulls
        self._clear()
        columns: dict[str, Sequence[Any]] = dict(zip(_SCALARS, zip(*rows, strict=True), strict=True))
        lists = {
            "chunk_gap_ns": (_gaps(stamps, stamp_offsets, columns["sent_ns"]), stamp_offsets, None),
            "chunk_tokens": (np.frombuffer(tokens, dtype=np.int32), token_offsets, pa.array(nulls)),
        }
        arrays: list[pa.Array] = []
        for field in SCHEMA:
            if field.name == "worker":
                arrays.append(pa.array(np.full(len(rows), self._worker, dtype=np.int16)))
            elif field.name in lists:
                values, offsets, mask = lists[field.name]
                starts = pa.array(np.frombuffer(offsets, dtype=np.int32))
                arrays.append(pa.ListArray.from_arrays(starts, pa.array(values), mask=mask))
            else:
                arrays.append(pa.array(columns[field.name], type=field.type))
        self._writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self._encoded += len(rows)

    def close(self) -> None:
        """Flush and end the stream. Safe to call twice."""
        if self._file.closed:
            return
        self.flush()
        self._writer.close()
        self._put()
        self._file.close()


def _gaps(stamps: array[int], offsets: array[int], sent_ns: Sequence[Any]) -> npt.NDArray[np.int64]:
    """Each stamp less the one before it; of each row's first, less the time it was sent."""
    times = np.frombuffer(stamps, dtype=np.int64)
    before = np.roll(times, 1)
    for sent, (first, end) in zip(sent_ns, pairwise(offsets), strict=True):
        if first < end:
            before[first] = sent
    gaps: npt.NDArray[np.int64] = times - before
    return gaps


def read_results(path: Path) -> pa.Table:
    """Rows of one result file; every complete batch of a file that was cut short. Raises `ResultsError`."""
    return read_stream(path, SCHEMA, "result", _BEFORE)


def iter_results(path: Path) -> Iterator[pa.RecordBatch]:
    """The same rows, batch by batch as they were written."""
    return iter_stream(path, SCHEMA, "result", _BEFORE)


def read_stream(
    path: Path, schema: pa.Schema, what: str, before: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> pa.Table:
    """Rows of an Arrow stream of ``what``, as `iter_stream` gives them; raises as that does."""
    table = whole_batches(iter_stream(path, schema, what, before), schema)
    try:
        table.validate(full=True)
    except pa.ArrowException as e:
        raise ResultsError(f"{path}: not a file of {what}s ({e})") from e
    return table


def iter_stream(
    path: Path, schema: pa.Schema, what: str, before: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Iterator[pa.RecordBatch]:
    """Batches of an Arrow stream of ``what``: every complete one of a stream that was cut short, none of an empty file.

    The metadata of ``schema`` is its version; ``before``: earlier versions, and the columns they lack, which are null.
    Raises `ResultsError` when the file is missing or does not begin as such a stream.
    """
    ((key, now),) = schema.metadata.items()
    try:
        with open_arrow(path) as source:
            if source.size() == 0:  # a worker that died before its first byte wrote nothing
                return
            reader = pa.ipc.open_stream(source)
            said = (reader.schema.metadata or {}).get(key, b"?").decode("utf-8", "replace")
            lacking = before.get(said, () if said == now.decode() else None)
            if lacking is None:
                raise ResultsError(f"{path}: {what} schema {said}, this harness reads {now.decode()}")
            if reader.schema != pa.schema([field for field in schema if field.name not in lacking]):
                raise ResultsError(f"{path}: the columns are not those of this {what} schema")
            for batch in _whole(reader):
                columns = [
                    pa.nulls(len(batch), field.type) if field.name in lacking else batch.column(field.name)
                    for field in schema
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
    except FileNotFoundError as e:
        raise ResultsError(f"{path}: no such file") from e
    except (pa.ArrowException, OSError) as e:
        raise ResultsError(f"{path}: not a file of {what}s ({e})") from e


def _whole(reader: pa.RecordBatchStreamReader) -> Iterator[pa.RecordBatch]:
    with contextlib.suppress(StopIteration, pa.ArrowException, OSError):  # a torn tail: what came before it is whole
        while True:
            yield reader.read_next_batch()


def whole_batches(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """Every complete batch of a stream in few pieces: a batch of one row takes kilobytes."""
    held: list[pa.RecordBatch] = []
    with contextlib.suppress(pa.ArrowException, OSError):
        for batch in batches:
            held.append(batch)
            if len(held) == _PIECES:
                held = pa.Table.from_batches(held).combine_chunks().to_batches()
    return pa.Table.from_batches(held, schema=schema)
