"""What the load workers saw of themselves, a row a second each, and how long their loops stood still meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from analysis.arrays import Bools, Floats, Ints
from analysis.rows.columns import floats
from harness.errors import ResultsError
from harness.record.manifest import RunDir, Worker
from harness.record.samples import WORKER_SCHEMA, read_observations


class LoopStalls:
    """Longest stall of any worker's loop, by time, s; of workers that did not watch themselves, what they said last."""

    def __init__(self, seconds: WorkerSamples, workers: list[Worker]) -> None:
        said = [w.loop_lag_p99_s for w in workers if w.loop_lag_p99_s is not None]
        known = np.isfinite(seconds.loop_lag_max_s) & np.isfinite(seconds.t_s)
        ends, lags = np.maximum(0.0, seconds.t_s[known]), seconds.loop_lag_max_s[known]
        begins = np.maximum(0.0, ends - seconds.length_s[known])
        worst = np.zeros(int(ends.max(initial=0.0)) + 1) if len(ends) else np.full(1, max(said, default=0.0))
        for at in (begins, (begins + ends) / 2, ends):  # a row covers a second: at most two of ours
            np.maximum.at(worst, at.astype(np.int64), lags)
        # Longest of 1, 2, 4 ... seconds from each on: two of these cover any stretch.
        longest = [worst]
        while (step := 1 << (len(longest) - 1)) < len(worst):
            last = longest[-1]
            longest.append(np.maximum(last, np.append(last[step:], np.zeros(step))))
        self._longest: Floats = np.stack(longest)

    def between(self, start_s: Floats, end_s: Floats) -> Floats:
        """Longest stall that ended in each stretch of time; 0 where there is no time."""
        there = np.isfinite(start_s) & np.isfinite(end_s)
        last = self._longest.shape[1] - 1
        first = np.clip(np.where(there, start_s, 0.0), 0, last).astype(np.int64)
        final = np.maximum(first, np.clip(np.where(there, end_s, 0.0), 0, last).astype(np.int64))
        level = np.log2(final - first + 1).astype(np.int64)
        found = np.maximum(self._longest[level, first], self._longest[level, final - (1 << level) + 1])
        return np.where(there, found, 0.0)


NS = 1e9
SHORTEST_SECOND_S = 0.5
"""Of the workers' own rows, one that covers less than this says nothing about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSamples:
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


def read_worker_samples(directory: RunDir, workers: int, problems: list[str]) -> WorkerSamples:
    """Observations of all workers; a run of before there were any has none, a file that cannot be read is a problem."""
    tables, owners, lengths, unwatched = [], [], [], []
    for k in range(workers):
        path, table = directory.observations(k), WORKER_SCHEMA.empty_table()
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
    table = pa.concat_tables(tables) if tables else WORKER_SCHEMA.empty_table()
    return WorkerSamples(
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
