"""What a load worker saw of itself, one row a second: the generator's own evidence, beside its result rows.

Columns of `SCHEMA` (file ``worker-<worker>.arrows``, Arrow IPC *stream*, flushed every two seconds):

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
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa

from harness.errors import ResultsError
from harness.record.results import whole_batches
from harness.untrusted import open_arrow

SCHEMA_VERSION = "2"
_BEFORE = {"1": ["prepared"]}
"""Older versions that are read, and the columns they lack."""

SCHEMA = pa.schema(
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
    metadata={"harness.observations": SCHEMA_VERSION},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One row of `SCHEMA`."""

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
assert SCHEMA.names == _NAMES


class ObservationWriter:
    """Writes observations as one Arrow batch per call of `write`; whole up to there even if the process dies next."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, SCHEMA)

    def write(self, rows: list[Observation]) -> None:
        """Append ``rows`` to the file."""
        if rows:
            columns = [pa.array([getattr(row, f.name) for row in rows], type=f.type) for f in SCHEMA]
            self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
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
                return SCHEMA.empty_table()
            reader = pa.ipc.open_stream(source)
            version = (reader.schema.metadata or {}).get(b"harness.observations", b"?").decode("utf-8", "replace")
            lacking = [] if version == SCHEMA_VERSION else _BEFORE.get(version, SCHEMA.names)
            if reader.schema.names != [name for name in SCHEMA.names if name not in lacking]:
                raise ResultsError(f"{path}: observation schema {version}, this harness reads {SCHEMA_VERSION}")
            table = whole_batches(reader)
        for name in lacking:
            table = table.append_column(SCHEMA.field(name), pa.nulls(table.num_rows, SCHEMA.field(name).type))
        table = table.replace_schema_metadata(SCHEMA.metadata)
        table.validate(full=True)
        return table
    except FileNotFoundError as e:
        raise ResultsError(f"{path}: no such file") from e
    except (pa.ArrowException, OSError) as e:
        raise ResultsError(f"{path}: not a file of observations ({e})") from e
