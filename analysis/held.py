"""How long a load worker's event loop stood still while an answer was under way: what it can have read together."""

from __future__ import annotations

import numpy as np

from analysis.arrays import Floats
from analysis.seconds import Seconds
from harness.run import Worker


class Held:
    """Longest stall of any worker's loop, by time, s; of workers that did not watch themselves, what they said last."""

    def __init__(self, seconds: Seconds, workers: list[Worker]) -> None:
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
