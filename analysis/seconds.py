"""What the load workers saw of themselves, a row a second each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from analysis.arrays import Bools, Floats, Ints
from analysis.columns import floats
from harness.errors import ResultsError
from harness.observations import SCHEMA, read_observations
from harness.run import RunDir

NS = 1e9
SHORTEST_SECOND_S = 0.5
"""Of the workers' own rows, one that covers less than this says nothing about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What the load workers saw of themselves, all workers' rows in one; not measured is NaN."""

    worker: Ints
    t_s: Floats
    """End of the interval."""
    length_s: Floats
    loop_lag_max_s: Floats
    cpu_share: Floats
    in_flight: Floats
    unwatched: list[int]
    """Workers without a single row."""

    @property
    def whole(self) -> Bools:
        """Intervals long enough that a share of them means something."""
        return self.length_s >= SHORTEST_SECOND_S


def read_seconds(directory: RunDir, workers: int, problems: list[str]) -> Seconds:
    """Observations of all workers; a run of before there were any has none, a file that cannot be read is a problem."""
    tables, owners, lengths, unwatched = [], [], [], []
    for k in range(workers):
        path, table = directory.observations(k), SCHEMA.empty_table()
        if path.exists():
            try:
                table = read_observations(path)
            except ResultsError as e:
                problems.append(str(e))
        if not table.num_rows:
            unwatched.append(k)
        tables.append(table)
        owners.append(np.full(table.num_rows, k))
        lengths.append(np.diff(floats(table.column("t_ns")), prepend=0.0) / NS)
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return Seconds(
        worker=np.concatenate([np.zeros(0, dtype=np.int64), *owners]).astype(np.int64),
        t_s=floats(table.column("t_ns")) / NS,
        length_s=np.concatenate([np.zeros(0), *lengths]),
        loop_lag_max_s=floats(table.column("loop_lag_max_ns")) / NS,
        cpu_share=_finite(floats(table.column("cpu_share"))),
        in_flight=_finite(floats(table.column("in_flight"))),
        unwatched=unwatched,
    )


def _finite(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)
