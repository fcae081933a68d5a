"""Every server's own gauges and counters, sampled each second while load runs, on the run's clock.

Columns of `SCHEMA` (file ``server-metrics-<replica>.arrows``, Arrow IPC *stream*, flushed at every sample):

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
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc

from harness.errors import ServerError
from harness.record.results import whole_batches
from harness.server import probe
from harness.server.access import AccessLike
from harness.server.prometheus import mean, read_samples, total
from harness.untrusted import open_arrow

SCHEMA_VERSION = "2"
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

SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("took_ns", pa.int64(), nullable=False),
        *(pa.field(column, pa.float64()) for column in GAUGES),
    ],
    metadata={"harness.server_metrics": SCHEMA_VERSION},
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
            with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as stream:
                due = time.monotonic()
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    row = self._sample()
                    if row is not None:
                        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
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
    """Samples of one server with the columns of `SCHEMA`, null where the file is older and has none, and for what is no
    number (older runs wrote that down); None: no samples.

    A torn tail is left out: what came before it is whole.
    """
    table = _read(path)
    if table is None:
        return None
    for column in GAUGES:
        at, values = table.schema.get_field_index(column), table.column(column)
        table = table.set_column(at, SCHEMA.field(column), pc.if_else(pc.is_finite(values), values, None))
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
            if not {"t_ns", "took_ns"} <= set(schema.names) <= set(SCHEMA.names):
                return None
            table = whole_batches(reader)
        table.validate(full=True)
        for field in SCHEMA:
            if field.name not in schema.names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(SCHEMA.names).cast(SCHEMA)
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
