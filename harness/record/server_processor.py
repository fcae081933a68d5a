"""What a server's processes ran, and waited for a processor, each second while load runs, on the run's clock.

Columns of `SCHEMA` (file ``server-processor-<replica>.arrows``, one for each part of a server that spans hosts; Arrow
IPC *stream*, flushed every few seconds; null: not measured):

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

The file has no rows where the kernel does not count (no ``/proc/PID/task/TID/schedstat``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa

from harness.record.results import read_stream

SCHEMA_VERSION = "1"

SCHEMA = pa.schema(
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
    metadata={"harness.server_processor": SCHEMA_VERSION},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSecond:
    """One row of `SCHEMA`."""

    t_ns: int
    length_ns: int
    threads: int
    run_ns: int
    delay_ns: int
    work_run_ns: int
    work_delay_ns: int
    host_busy_ns: int | None = None
    host_stolen_ns: int | None = None


assert SCHEMA.names == [field.name for field in fields(ProcessorSecond)]


class ProcessorSeconds:
    """Writes such a file. A full disk ends it and is told by ``trouble``: it must not stop a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trouble: str | None = None
        try:
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        except OSError as e:
            self._fail(e)

    def write(self, rows: Sequence[ProcessorSecond]) -> None:
        """Append ``rows``: whole up to there whatever comes next."""
        if not rows or self.trouble:
            return
        columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in SCHEMA]
        try:
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
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
    return read_stream(path, SCHEMA, b"harness.server_processor", SCHEMA_VERSION, "processor times")
