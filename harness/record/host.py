"""What machines did, each second while load runs, on the run's clock: was one of them short of something?

Columns of `HOST_SCHEMA` (file ``host-<node>.arrows``, Arrow IPC *stream*, flushed at every sample; null: not measured):

=================  =============  =====================================================================================
column             type           meaning
=================  =============  =====================================================================================
t_ns               int64          end of the interval, ns after the common start (negative: before it)
cpu_share          float64        busy processor time of the whole host in the interval, 1.0 is all of its processors
cpu_count          int32          processors of the host
memory_used_bytes  int64          main memory that is not available to new processes
memory_bytes       int64          main memory in all
net_sent_bytes     int64          bytes sent in the interval, loopback included
net_received_bytes int64          bytes received in the interval
gpu_util           list<float64>  share of the interval in which a kernel ran, 0 to 1, by accelerator (NVML)
gpu_memory_bytes   list<int64>    memory in use, by accelerator
gpu_power_w        list<float64>  power drawn, W, by accelerator
gpu_temperature_c  list<float64>  temperature, degrees Celsius, by accelerator
=================  =============  =====================================================================================

The accelerators' columns need NVIDIA's driver and the Python package ``pynvml`` (nvidia-ml-py) on the host; without
them they are null, and a counter that one accelerator does not have is null in its list.

What a server's processes ran, and waited for a processor, are the columns of `PROCESSOR_SCHEMA` (file
``server-processor-<replica>.arrows``, one for each part of a server that spans hosts; flushed every few seconds):

==============  =====  ================================================================================================
column          type   meaning
==============  =====  ================================================================================================
t_ns            int64  end of the interval, ns after the common start (negative: before it)
length_ns       int64  its length; where the server was being started again there is none
threads         int32  threads of the server's processes at its end
run_ns          int64  processor time of all of them in the interval
delay_ns        int64  time in which they were ready to run and had no processor, added up over threads (run delay). It
                       holds the time in which the quota of their group (cgroup) was used up
work_run_ns     int64  of ``run_ns``, what threads with work ran: those that ran or waited for a tenth of the interval.
                       The others wake up now and then, and mostly for nothing
work_delay_ns   int64  of ``delay_ns``, what these waited
host_busy_ns    int64  processor time of everything on their host
host_stolen_ns  int64  processor time that was due to their host, a virtual machine, and went to others (steal). A
                       thread that it is taken from neither runs nor waits by its own kernel's count
==============  =====  ================================================================================================

That file has no rows where the kernel does not count (no ``/proc/PID/task/TID/schedstat``).
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pyarrow as pa

from harness.record.results import read_stream

HOST_SCHEMA_VERSION = "1"
EVERY_S = 1.0

HOST_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("cpu_share", pa.float64()),
        pa.field("cpu_count", pa.int32()),
        pa.field("memory_used_bytes", pa.int64()),
        pa.field("memory_bytes", pa.int64()),
        pa.field("net_sent_bytes", pa.int64()),
        pa.field("net_received_bytes", pa.int64()),
        pa.field("gpu_util", pa.list_(pa.float64())),
        pa.field("gpu_memory_bytes", pa.list_(pa.int64())),
        pa.field("gpu_power_w", pa.list_(pa.float64())),
        pa.field("gpu_temperature_c", pa.list_(pa.float64())),
    ],
    metadata={"harness.host_metrics": HOST_SCHEMA_VERSION},
)


def host_file(run_dir: Path, node: str) -> Path:
    """``host-<node>.arrows`` of a run directory; ``node`` is a name or an address."""
    return run_dir / f"host-{re.sub(r'[^A-Za-z0-9._-]+', '-', node)}.arrows"


class Gpus:
    """The accelerators of this host as NVML sees them; none without driver or package."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return  # no driver here
        self._nvml = nvml

    def sample(self) -> dict[str, list[float | None] | None]:
        """The columns of the accelerators."""
        nvml = self._nvml
        if nvml is None:
            return dict.fromkeys(("gpu_util", "gpu_memory_bytes", "gpu_power_w", "gpu_temperature_c"))
        return {
            "gpu_util": self._each(lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100),
            "gpu_memory_bytes": self._each(lambda h: int(nvml.nvmlDeviceGetMemoryInfo(h).used)),
            "gpu_power_w": self._each(lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1000),
            "gpu_temperature_c": self._each(
                lambda h: float(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU))
            ),
        }

    def memory_gib(self) -> list[float]:
        """Memory of each accelerator as its driver reports it; none where there is no driver."""
        nvml = self._nvml
        sizes = self._each(lambda h: nvml.nvmlDeviceGetMemoryInfo(h).total / 2**30) if nvml is not None else []
        return [size for size in sizes if size is not None]

    def _each(self, read: Callable[[Any], float]) -> list[float | None]:
        values: list[float | None] = []
        for handle in self._handles:
            try:
                values.append(read(handle))
            except self._nvml.NVMLError:
                values.append(None)  # this card does not have it
        return values

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()


class HostMetrics:
    """Samples this host into a file from a thread of its own, for the length of a ``with`` block.

    Sampling never disturbs the run: a full disk ends it and is told by ``trouble`` afterwards.
    """

    def __init__(self, path: Path, start_unix_ns: int) -> None:
        self._path = path
        # One reading of both clocks, so that a wall clock that is set during the run moves nothing.
        self._start_mono_ns = time.monotonic_ns() + start_unix_ns - time.time_ns()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host metrics", daemon=True)
        self.trouble: str | None = None

    def __enter__(self) -> HostMetrics:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        gpus = Gpus()
        try:
            with pa.OSFile(str(self._path), "wb") as sink, pa.ipc.new_stream(sink, HOST_SCHEMA) as stream:
                before, net = psutil.cpu_times(), psutil.net_io_counters()
                due = time.monotonic() + EVERY_S
                while not self._stop.wait(max(0.0, due - time.monotonic())):
                    now, net_now, memory = psutil.cpu_times(), psutil.net_io_counters(), psutil.virtual_memory()
                    row = {
                        "t_ns": time.monotonic_ns() - self._start_mono_ns,
                        "cpu_share": busy_share(before, now),
                        "cpu_count": psutil.cpu_count(),
                        "memory_used_bytes": memory.total - memory.available,
                        "memory_bytes": memory.total,
                        "net_sent_bytes": net_now.bytes_sent - net.bytes_sent if net_now and net else None,
                        "net_received_bytes": net_now.bytes_recv - net.bytes_recv if net_now and net else None,
                        **gpus.sample(),
                    }
                    stream.write_batch(pa.RecordBatch.from_pylist([row], schema=HOST_SCHEMA))
                    sink.flush()
                    before, net = now, net_now
                    due = max(due + EVERY_S, time.monotonic())
        except OSError as e:
            self.trouble = f"{self._path}: cannot write ({e.strerror or e})"
        finally:
            gpus.close()


def busy_share(before: Any, now: Any) -> float | None:
    """Share of all processor time between two readings of `psutil.cpu_times` in which something ran; null: no time."""
    # What guests use is counted as user time as well.
    names = [name for name in now._fields if not name.startswith("guest")]
    spent: dict[str, float] = {name: max(0.0, getattr(now, name) - getattr(before, name)) for name in names}
    total = sum(spent.values())
    if total <= 0:
        return None
    return 1.0 - (spent["idle"] + spent.get("iowait", 0.0)) / total


def read_host_metrics(path: Path) -> pa.Table:
    """Rows of one file; every complete batch of one that was cut short, none of an empty one.

    Raises `ResultsError` when it is missing or does not begin as a stream of this schema version.
    """
    return read_stream(path, HOST_SCHEMA, b"harness.host_metrics", HOST_SCHEMA_VERSION, "host metrics")


PROCESSOR_SCHEMA_VERSION = "1"

PROCESSOR_SCHEMA = pa.schema(
    [
        pa.field("t_ns", pa.int64(), nullable=False),
        pa.field("length_ns", pa.int64(), nullable=False),
        pa.field("threads", pa.int32(), nullable=False),
        pa.field("run_ns", pa.int64(), nullable=False),
        pa.field("delay_ns", pa.int64(), nullable=False),
        pa.field("work_run_ns", pa.int64(), nullable=False),
        pa.field("work_delay_ns", pa.int64(), nullable=False),
        pa.field("host_busy_ns", pa.int64()),
        pa.field("host_stolen_ns", pa.int64()),
    ],
    metadata={"harness.server_processor": PROCESSOR_SCHEMA_VERSION},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSecond:
    """One row of `PROCESSOR_SCHEMA`."""

    t_ns: int
    length_ns: int
    threads: int
    run_ns: int
    delay_ns: int
    work_run_ns: int
    work_delay_ns: int
    host_busy_ns: int | None = None
    host_stolen_ns: int | None = None


assert PROCESSOR_SCHEMA.names == [field.name for field in fields(ProcessorSecond)]


class ProcessorSeconds:
    """Writes such a file. A full disk ends it and is told by ``trouble``: it must not stop a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble: str | None = None
        try:
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_stream(self._sink, PROCESSOR_SCHEMA)
        except OSError as e:
            self._fail(e)

    def write(self, rows: Sequence[ProcessorSecond]) -> None:
        """Append ``rows``: whole up to there whatever comes next."""
        if not rows or self.trouble:
            return
        columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in PROCESSOR_SCHEMA]
        try:
            self._writer.write_batch(pa.record_batch(columns, schema=PROCESSOR_SCHEMA))
            self._sink.flush()
        except OSError as e:
            self._fail(e)

    def close(self) -> None:
        """End the stream."""
        if self.trouble:
            return
        try:
            self._writer.close()
            self._sink.close()
        except OSError as e:
            self._fail(e)

    def _fail(self, e: OSError) -> None:
        self.trouble = f"{self._path}: cannot write ({e.strerror or e})"


def read_server_processor(path: Path) -> pa.Table:
    """Rows of one file; every complete batch of one that was cut short, none of an empty one.

    Raises `ResultsError` when it is missing or does not begin as a stream of this schema version.
    """
    return read_stream(path, PROCESSOR_SCHEMA, b"harness.server_processor", PROCESSOR_SCHEMA_VERSION, "processor times")
