"""What load workers saw of themselves and servers say of themselves, each second, beside the result rows.

Columns of `WORKER_SCHEMA` (file ``worker-<worker>.arrows``, Arrow IPC *stream*, flushed every two seconds):

==================  ============  =====================================================================================
column              type          meaning
==================  ============  =====================================================================================
t_ns                int64         end of this interval, ns of the run clock; the first begins at the common start, each
                                  other where the one before it ended. About 1 s, shorter at the end, longer in a stall
loop_lag_max_ns     int64         longest lateness of a 10 ms tick of the event loop that carries the stamps
loop_lag_p99_ns     int64         its 99th percentile over the interval's ticks; null: no tick
cpu_share           float64       CPU time of the process, all threads, per wall time; 1.0 is one full core
gc_pause_ns         int64         time inside the garbage collector (it is off while a run lasts, so this should be 0)
events              int64         events of answers that were read, with output or without: HTTP chunks, as servers send
                                  one in each; of answers that are unlike others of their server the reads
bytes               int64         bytes of those reads
sent                int64         requests sent
done                int64         answers that ended and have their row
in_flight           float64       requests in flight, mean over the ticks; null: no tick
backlog             int64         answers and parts of answers that wait to be parsed at t_ns
rss_bytes           int64         resident memory at t_ns
prepared            int64         requests read from the plan and not sent at t_ns; 0 before the plan's end: lag is that
                                  of reading it. Null in files of version 1
==================  ============  =====================================================================================

``events``, ``bytes``, ``sent`` and ``done`` are counts within the interval.

Every server's own gauges and counters, on the run's clock: columns of `SERVER_SCHEMA` (file
``server-metrics-<replica>.arrows``, Arrow IPC *stream*, flushed at every sample):

==========================  =======  =================================================================================
column                      type     meaning (vLLM's metric; null: this server does not have it)
==========================  =======  =================================================================================
t_ns                        int64    when the answer arrived, ns after the common start (negative: before it)
took_ns                     int64    how long the server took to answer; a server that is short of CPU answers late
running                     float64  requests in the running batch (``vllm:num_requests_running``)
waiting                     float64  requests in the queue (``vllm:num_requests_waiting``)
kv_cache_usage              float64  share of the KV cache in use, 0 to 1 (``vllm:kv_cache_usage_perc``): of several
                                     engines the mean
preemptions_total           float64  requests thrown out of the batch so far (``vllm:num_preemptions_total``)
prefix_cache_queries_total  float64  input tokens looked up in the prefix cache so far
prefix_cache_hits_total     float64  of these, found
prompt_tokens_total         float64  input tokens so far, cached ones included
generation_tokens_total     float64  output tokens so far
prompt_tokens_cached_total  float64  of the input tokens so far, those taken from the prefix cache
engine_steps_total          float64  steps of the engine so far (``vllm:iteration_tokens_total_count``)
prefill_request_s_total     float64  time of finished requests until their first token, added up over requests, s
decode_request_s_total      float64  the same from first to last token, s
process_start_s             float64  Unix time the server process began (``process_start_time_seconds``): a change is a
                                     restart
==========================  =======  =================================================================================

A second without a row is one in which the server did not answer in time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from harness.errors import ResultsError, ServerError
from harness.record.results import whole_batches
from harness.server import probe
from harness.server.access import AccessLike
from harness.server.probe import mean, read_samples, total
from harness.untrusted import open_arrow

WORKER_SCHEMA_VERSION = "2"
_BEFORE = {"1": ["prepared"]}
"""Older versions that are read, and the columns they lack."""

WORKER_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("loop_lag_max_ns", pa.int64()),
        pa.field("loop_lag_p99_ns", pa.int64()),
        pa.field("cpu_share", pa.float64(), nullable=False),
        pa.field("gc_pause_ns", pa.int64(), nullable=False),
        pa.field("events", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sent", pa.int64(), nullable=False),
        pa.field("done", pa.int64(), nullable=False),
        pa.field("in_flight", pa.float64()),
        pa.field("backlog", pa.int64(), nullable=False),
        pa.field("rss_bytes", pa.int64(), nullable=False),
        pa.field("prepared", pa.int64()),
    ],
    metadata={"harness.observations": WORKER_SCHEMA_VERSION},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One row of `WORKER_SCHEMA`."""

    t_ns: int
    loop_lag_max_ns: int | None
    loop_lag_p99_ns: int | None
    cpu_share: float
    gc_pause_ns: int
    events: int
    bytes: int
    sent: int
    done: int
    in_flight: float | None
    backlog: int
    rss_bytes: int
    prepared: int | None = None


_NAMES = [field.name for field in fields(Observation)]
assert WORKER_SCHEMA.names == _NAMES


class ObservationWriter:
    """Writes observations as one Arrow batch per call of `write`; whole up to there even if the process dies next."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, WORKER_SCHEMA)

    def write(self, rows: list[Observation]) -> None:
        """Append ``rows`` to the file."""
        if rows:
            columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in WORKER_SCHEMA]
            self._writer.write_batch(pa.record_batch(columns, schema=WORKER_SCHEMA))
            self._sink.flush()

    def close(self) -> None:
        """End the stream. Safe to call twice."""
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()


def read_observations(path: Path) -> pa.Table:
    """Rows of one file; every complete batch of one that was cut short, none of an empty one.

    Raises `ResultsError` when it is missing or does not begin as a stream of this schema version.
    """
    try:
        with open_arrow(path) as source:
            if source.size() == 0:
                return WORKER_SCHEMA.empty_table()
            reader = pa.ipc.open_stream(source)
            version = (reader.schema.metadata or {}).get(b"harness.observations", b"?").decode("utf-8", "replace")
            lacking = [] if version == WORKER_SCHEMA_VERSION else _BEFORE.get(version, WORKER_SCHEMA.names)
            if reader.schema.names != [name for name in WORKER_SCHEMA.names if name not in lacking]:
                raise ResultsError(f"{path}: observation schema {version}, this harness reads {WORKER_SCHEMA_VERSION}")
            table = whole_batches(reader)
        for name in lacking:
            table = table.append_column(
                WORKER_SCHEMA.field(name), pa.nulls(table.num_rows, WORKER_SCHEMA.field(name).type)
            )
        table = table.replace_schema_metadata(WORKER_SCHEMA.metadata)
        table.validate(full=True)
        return table
    except FileNotFoundError as e:
        raise ResultsError(f"{path}: no such file") from e
    except (pa.ArrowException, OSError) as e:
        raise ResultsError(f"{path}: not a file of observations ({e})") from e


SERVER_SCHEMA_VERSION = "2"
EVERY_S = 1.0
ANSWER_S = 5.0

GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
    "preemptions_total": "vllm:num_preemptions_total",
    "prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
    "prompt_tokens_total": "vllm:prompt_tokens_total",
    "generation_tokens_total": "vllm:generation_tokens_total",
    "prompt_tokens_cached_total": "vllm:prompt_tokens_cached_total",
    "engine_steps_total": "vllm:iteration_tokens_total_count",
    "prefill_request_s_total": "vllm:request_prefill_time_seconds_sum",
    "decode_request_s_total": "vllm:request_decode_time_seconds_sum",
    "process_start_s": "process_start_time_seconds",
}
"""Column -> the server's metric, summed over its labels."""
SHARES = frozenset({"kv_cache_usage"})
"""Columns that are averaged instead: what several engines have together is not a share."""

SERVER_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("took_ns", pa.int64(), nullable=False),
        *(pa.field(column, pa.float64()) for column in GAUGES),
    ],
    metadata={"harness.server_metrics": SERVER_SCHEMA_VERSION},
)


class ServerMetrics:
    """Samples one server, or all behind one address, into a file from a thread of its own, as long as a ``with`` block.

    Sampling never disturbs the run: a server without /metrics gives an empty file, a full disk ends the sampling and
    is told by ``trouble`` afterwards.
    """

    def __init__(self, pages: Sequence[tuple[str, AccessLike]], path: Path, start_unix_ns: int) -> None:
        """``pages``: where the metrics are and how to ask for them; those of several processes are added up."""
        self._pages, self._path = pages, path
        # One reading of both clocks, so that a wall clock that is set during the run moves nothing.
        self._start_mono_ns = time.monotonic_ns() + start_unix_ns - time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"metrics {pages[0][0]}", daemon=True)
        self.trouble: str | None = None

    def __enter__(self) -> ServerMetrics:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=ANSWER_S + 1)

    def _run(self) -> None:
        try:
            with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as stream:
                due = time.monotonic()
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    row = self._sample()
                    if row is not None:
                        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=SERVER_SCHEMA))
                        sink.flush()
                    due = max(due + EVERY_S, time.monotonic())
        except OSError as e:
            self.trouble = f"{self._path}: cannot write ({e.strerror or e})"

    def _sample(self) -> dict[str, float | None] | None:
        asked = time.monotonic_ns()
        end = time.monotonic() + ANSWER_S  # for all pages
        try:
            pages = [
                probe.fetch(url, access, deadline_s=end - time.monotonic()).decode("utf-8", "replace")
                for url, access in self._pages
            ]
        except ServerError:
            return None
        now = time.monotonic_ns()
        return {"t_ns": now - self._start_mono_ns, "took_ns": now - asked, **read_gauges(*pages)}


def read_server_metrics(path: Path) -> pa.Table | None:
    """Samples of one server with the columns of `SERVER_SCHEMA`, null where the file is older and has none, and for
    what is no number (older runs wrote that down); None: no samples.

    A torn tail is left out: what came before it is whole.
    """
    table = _read(path)
    if table is None:
        return None
    for column in GAUGES:
        at, values = table.schema.get_field_index(column), table.column(column)
        table = table.set_column(at, SERVER_SCHEMA.field(column), pc.if_else(pc.is_finite(values), values, None))
    return table


def samples_of_no_number(path: Path) -> list[str]:
    """Columns in which a file has NaN or infinity."""
    table = _read(path)
    if table is None:
        return []
    return [column for column in GAUGES if pc.any(pc.invert(pc.is_finite(table.column(column)))).as_py()]


def _read(path: Path) -> pa.Table | None:
    try:
        with open_arrow(path) as source, pa.ipc.open_stream(source) as reader:
            schema = reader.schema
            if not {"t_ns", "took_ns"} <= set(schema.names) <= set(SERVER_SCHEMA.names):
                return None
            table = whole_batches(reader)
        table.validate(full=True)
        for field in SERVER_SCHEMA:
            if field.name not in schema.names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(SERVER_SCHEMA.names).cast(SERVER_SCHEMA)
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table if len(table) else None


def read_gauges(*pages: str) -> dict[str, float | None]:
    """The columns of `GAUGES` from pages of Prometheus text; null for what is not there, or in part no number.

    Summed over labels and pages, but of several engines the mean share of the cache in use. Start times are added up
    too, so that any restart changes the sum.
    """
    columns = {name: column for column, name in GAUGES.items()}
    found: dict[str, list[float]] = {column: [] for column in GAUGES}
    for page in pages:
        for sample in read_samples(page, columns.__contains__):
            found[columns[sample.name]].append(sample.value)
    return {column: (mean if column in SHARES else total)(values) for column, values in found.items()}
