"""Series in equal bins of one simulated run, as `analysis.metrics` makes them of a run's rows."""

from __future__ import annotations

import numpy as np

from harness.cluster.simulator.fleet import Outcomes, Workload
from tests.lab.processes import Floats, Ints

BINS = 200


def binned(times_s: Floats, amounts: Floats | Ints | None, edges: Floats) -> Floats:
    """Sum of ``amounts`` (None: count) per bin; what is at the last edge lies in the last bin."""
    place = ((times_s - edges[0]) / (edges[1] - edges[0])).astype(np.int64)
    return np.bincount(np.minimum(place, BINS - 1), weights=amounts, minlength=BINS).astype(np.float64)


def in_flight(due_s: Floats, finished_s: Floats, edges: Floats) -> Floats:
    """Requests in flight, time average per bin."""

    def passed(events_s: Floats) -> Floats:
        ordered = np.sort(events_s)
        count = np.searchsorted(ordered, edges, side="right")
        return edges * count - np.concatenate(([0.0], np.cumsum(ordered)))[count]

    return np.maximum(0.0, np.diff(passed(due_s) - passed(finished_s)) / (edges[1] - edges[0]))


def tokens_of_steps(load: Workload, outcome: Outcomes) -> tuple[Floats, Ints]:
    """(end, s; output tokens) of each step of the first replica."""
    ends_s = np.asarray(outcome.step_end_s[0])
    begun = np.bincount(outcome.first_step, minlength=len(ends_s) + 1)
    over = np.bincount(outcome.first_step + load.output_tokens, minlength=len(ends_s) + 1)
    return ends_s, np.cumsum(begun[: len(ends_s)] - over[: len(ends_s)])
