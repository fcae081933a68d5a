"""What load workers, servers and machines did, each second while load runs, on the run's clock, beside the result rows.

Every file is an Arrow IPC *stream*, whole up to its last flush whatever comes next. ``t_ns`` is the end of the
interval, ns after the common start (negative: before it). Null: not measured.

``worker-<worker>.arrows``
    A load worker of itself: `Observation`.
``server-metrics-<replica>.arrows``
    A server's own gauges and counters, `SERVER_SCHEMA`: ``t_ns`` when the answer arrived, ``took_ns`` how long it took,
    and the columns of `GAUGES`, null for what this server does not have. A second without a row is one in which it did
    not answer in time.
``host-<node>.arrows``
    A machine: `HOST_SCHEMA`. The accelerators' columns are null without NVIDIA's driver and ``pynvml``.
``server-processor-<replica>.arrows``, one for each part of a server that spans hosts
    What a server's processes ran, and waited for a processor: `ProcessorSecond`. No rows where the kernel does not
    count (no ``/proc/PID/task/TID/schedstat``).
"""

from __future__ import annotations

import re
import threading
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import psutil
import pyarrow as pa

from harness.errors import ServerError
from harness.record.host import Gpus, busy_share
from harness.record.results import read_stream, whole_batches
from harness.server import probe
from harness.server.access import AccessLike
from harness.server.counters import mean, read_samples, total
from harness.untrusted import open_arrow

EVERY_S = 1.0
ANSWER_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A load worker's second: about 1 s, shorter at the end, longer in a stall; the first begins at the common start,
    each other where the one before it ended. ``events``, ``bytes``, ``sent`` and ``done`` are counts within it.
    """

    t_ns: int
    loop_lag_max_ns: int | None
    """Longest lateness of a 10 ms tick of the event loop that carries the stamps; null: no tick."""
    loop_lag_p99_ns: int | None
    cpu_share: float
    """CPU time of the process, all threads, per wall time; 1.0 is one full core."""
    gc_pause_ns: int
    """Time inside the garbage collector (it is off while a run lasts, so this should be 0)."""
    events: int
    """Events of answers that were read, with output or without: HTTP chunks, as servers send one in each; of answers
    that are unlike others of their server the reads."""
    bytes: int
    sent: int
    done: int
    in_flight: float | None
    """Requests in flight, mean over the ticks; null: no tick."""
    backlog: int
    """Answers and parts of answers that wait to be parsed at ``t_ns``."""
    rss_bytes: int
    prepared: int | None = None
    """Requests read from the plan and not sent at ``t_ns``; 0 before the plan's end: lag is that of reading it. Null in
    files of version 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSecond:
    """What all processes of a server ran and waited in an interval."""

    t_ns: int
    length_ns: int
    """Of the interval; where the server was being started again there is none."""
    threads: Annotated[int, pa.int32()]
    run_ns: int
    delay_ns: int
    """Time in which they were ready to run and had no processor, added up over threads (run delay). It holds the time
    in which the quota of their group (cgroup) was used up."""
    work_run_ns: int
    """Of ``run_ns``, what threads with work ran: those that ran or waited for a tenth of the interval. The others wake
    up now and then, and mostly for nothing."""
    work_delay_ns: int
    host_busy_ns: int | None = None
    host_stolen_ns: int | None = None
    """Processor time that was due to their host, a virtual machine, and went to others (steal). A thread that it is
    taken from neither runs nor waits by its own kernel's count."""


def _schema(row: type, key: str, version: str) -> pa.Schema:
    """The columns of a dataclass: ``int`` is int64, ``float`` float64; what may be None may be null."""
    columns = []
    for name, hint in typing.get_type_hints(row, include_extras=True).items():
        kinds = typing.get_args(hint) or (hint,)
        arrow = next((k for k in kinds if isinstance(k, pa.DataType)), pa.int64() if int in kinds else pa.float64())
        columns.append(pa.field(name, arrow, nullable=type(None) in kinds))
    return pa.schema(columns, metadata={key: version})


WORKER_SCHEMA = _schema(Observation, "harness.observations", "2")
PROCESSOR_SCHEMA = _schema(ProcessorSecond, "harness.server_processor", "1")

HOST_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("cpu_share", pa.float64()),  # busy processor time of the whole host; 1.0: all of its processors
        pa.field("cpu_count", pa.int32()),
        pa.field("memory_used_bytes", pa.int64()),  # not available to new processes
        pa.field("memory_bytes", pa.int64()),
        pa.field("net_sent_bytes", pa.int64()),  # in the interval, loopback included
        pa.field("net_received_bytes", pa.int64()),
        # By accelerator, as NVML says:
        pa.field("gpu_util", pa.list_(pa.float64())),  # share of the interval in which a kernel ran, 0 to 1
        pa.field("gpu_memory_bytes", pa.list_(pa.int64())),  # in use
        pa.field("gpu_power_w", pa.list_(pa.float64())),
        pa.field("gpu_temperature_c", pa.list_(pa.float64())),  # degrees Celsius
    ],
    metadata={"harness.host_metrics": "1"},
)

GAUGES = {
    "running": "vllm:num_requests_running",  # requests in the running batch
    "waiting": "vllm:num_requests_waiting",  # requests in the queue
    "kv_cache_usage": "vllm:kv_cache_usage_perc",  # share of the KV cache in use, 0 to 1
    "preemptions_total": "vllm:num_preemptions_total",  # requests thrown out of the batch so far
    "prefix_cache_queries_total": "vllm:prefix_cache_queries_total",  # input tokens looked up in the prefix cache
    "prefix_cache_hits_total": "vllm:prefix_cache_hits_total",  # of these, found
    "prompt_tokens_total": "vllm:prompt_tokens_total",  # input tokens so far, cached ones included
    "generation_tokens_total": "vllm:generation_tokens_total",  # output tokens so far
    "prompt_tokens_cached_total": "vllm:prompt_tokens_cached_total",  # of the input tokens, those from the prefix cache
    "engine_steps_total": "vllm:iteration_tokens_total_count",  # steps of the engine so far
    # Time of finished requests until their first token, and from first to last, added up over requests:
    "prefill_request_s_total": "vllm:request_prefill_time_seconds_sum",
    "decode_request_s_total": "vllm:request_decode_time_seconds_sum",
    "process_start_s": "process_start_time_seconds",  # Unix time; a change is a restart
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
    metadata={"harness.server_metrics": "2"},
)


def host_file(run_dir: Path, node: str) -> Path:
    """``host-<node>.arrows`` of a run directory; ``node`` is a name or an address."""
    return run_dir / f"host-{re.sub(r'[^A-Za-z0-9._-]+', '-', node)}.arrows"


class ObservationWriter:
    """Writes rows of a dataclass as one Arrow batch per call of `write`; whole up to there even if the process dies
    next. Raises `OSError`.
    """

    schema = WORKER_SCHEMA

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self.schema)

    def write(self, rows: Sequence[Any]) -> None:
        if rows:
            columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in self.schema]
            self._writer.write_batch(pa.record_batch(columns, schema=self.schema))
            self._sink.flush()

    def close(self) -> None:
        """End the stream. Safe to call twice."""
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()


class ProcessorSeconds(ObservationWriter):
    """The same of `ProcessorSecond`. A full disk ends it and is told by ``trouble``: it must not stop a run."""

    schema = PROCESSOR_SCHEMA

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble: str | None = None
        self._guarded(lambda: super(ProcessorSeconds, self).__init__(path))

    def write(self, rows: Sequence[ProcessorSecond]) -> None:
        self._guarded(lambda: super(ProcessorSeconds, self).write(rows))

    def close(self) -> None:
        self._guarded(super().close)

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.trouble is None:
            try:
                work()
            except OSError as e:
                self.trouble = f"{self._path}: cannot write ({e.strerror or e})"


class Sampler:
    """Writes what `sample` returns into a file each second, from a thread of its own, as long as a ``with`` block.

    Sampling never disturbs the run: a full disk ends it and is told by ``trouble`` afterwards.
    """

    def __init__(self, path: Path, schema: pa.Schema, start_unix_ns: int, *, first_s: float) -> None:
        """``start_unix_ns``: the common start by this host's clock. ``first_s``: from now to the first sample."""
        self._path, self._schema, self._first_s = path, schema, first_s
        # One reading of both clocks, so that a wall clock that is set during the run moves nothing.
        self._start_mono_ns = time.monotonic_ns() + start_unix_ns - time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=path.stem, daemon=True)
        self.trouble: str | None = None
        self.latest: dict[str, object] | None = None
        """The newest row, for whoever watches."""

    def sample(self) -> dict[str, object] | None:
        """One row but its ``t_ns``; null: none this time."""
        raise NotImplementedError

    def begin(self) -> None:
        """Get what `sample` needs, in the thread."""

    def end(self) -> None:
        """Let go of it."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=ANSWER_S + 1)

    def _run(self) -> None:
        self.begin()
        try:
            with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_stream(sink, self._schema) as stream:
                due = time.monotonic() + self._first_s
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    if (row := self.sample()) is not None:
                        row["t_ns"] = time.monotonic_ns() - self._start_mono_ns
                        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=self._schema))
                        sink.flush()
                        self.latest = row
                    due = max(due + EVERY_S, time.monotonic())
        except OSError as e:
            self.trouble = f"{self._path}: cannot write ({e.strerror or e})"
        finally:
            self.end()


class ServerMetrics(Sampler):
    """Of one server, or all behind one address. A server without /metrics gives an empty file."""

    def __init__(self, pages: Sequence[tuple[str, AccessLike]], path: Path, start_unix_ns: int) -> None:
        """``pages``: where the metrics are and how to ask for them; those of several processes are added up."""
        super().__init__(path, SERVER_SCHEMA, start_unix_ns, first_s=0.0)
        self._pages = pages

    def sample(self) -> dict[str, object] | None:
        """`GAUGES` now."""
        asked = time.monotonic_ns()
        end = time.monotonic() + ANSWER_S  # for all pages
        try:
            pages = [
                probe.fetch(url, access, deadline_s=end - time.monotonic()).decode("utf-8", "replace")
                for url, access in self._pages
            ]
        except ServerError:
            return None
        return {"took_ns": time.monotonic_ns() - asked, **read_gauges(*pages)}


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


class HostMetrics(Sampler):
    """Of this host."""

    def __init__(self, path: Path, start_unix_ns: int) -> None:
        super().__init__(path, HOST_SCHEMA, start_unix_ns, first_s=EVERY_S)

    def begin(self) -> None:
        self._gpus = Gpus()
        self._cpu, self._net = psutil.cpu_times(), psutil.net_io_counters()

    def end(self) -> None:
        self._gpus.close()

    def sample(self) -> dict[str, object]:
        """What it did since the last call."""
        before, net = self._cpu, self._net
        now, net_now = self._cpu, self._net = psutil.cpu_times(), psutil.net_io_counters()
        memory = psutil.virtual_memory()
        return {
            "cpu_share": busy_share(before, now),
            "cpu_count": psutil.cpu_count(),
            "memory_used_bytes": memory.total - memory.available,
            "memory_bytes": memory.total,
            "net_sent_bytes": net_now.bytes_sent - net.bytes_sent if net_now and net else None,
            "net_received_bytes": net_now.bytes_recv - net.bytes_recv if net_now and net else None,
            **self._gpus.sample(),
        }


# --- reading ---------------------------------------------------------------------------------------------------------


def read_observations(path: Path) -> pa.Table:
    """Rows of one file; every complete batch of one that was cut short. Raises `ResultsError`, as the next two do."""
    return read_stream(path, WORKER_SCHEMA, "observation", {"1": ["prepared"]})


def read_host_metrics(path: Path) -> pa.Table:
    """The same of a machine."""
    return read_stream(path, HOST_SCHEMA, "host metric")


def read_server_processor(path: Path) -> pa.Table:
    """The same of a server's processor times."""
    return read_stream(path, PROCESSOR_SCHEMA, "processor time")


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
        found = values.to_numpy()  # null: NaN
        table = table.set_column(at, SERVER_SCHEMA.field(column), pa.array(found, mask=~np.isfinite(found)))
    return table


def samples_of_no_number(path: Path) -> list[str]:
    """Columns in which a file has NaN or infinity."""
    table = _read(path)
    if table is None:
        return []
    return [name for name in GAUGES if not np.isfinite(table.column(name).drop_null().to_numpy()).all()]


def _read(path: Path) -> pa.Table | None:
    try:
        with open_arrow(path) as source, pa.ipc.open_stream(source) as reader:
            schema = reader.schema
            if not {"t_ns", "took_ns"} <= set(schema.names) <= set(SERVER_SCHEMA.names):
                return None
            table = whole_batches(reader, schema)
        table.validate(full=True)
        for field in SERVER_SCHEMA:
            if field.name not in schema.names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        table = table.select(SERVER_SCHEMA.names).cast(SERVER_SCHEMA)
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table if len(table) else None
