"""Whether the backlog of a run only grew: a queue whose beginning a probe can see, and never its end."""

from __future__ import annotations

import numpy as np

from analysis.arrays import Floats
from analysis.check import Check, limit
from analysis.load import Run

GROWN = 0.05
"""Of what was due in the stretch: a smaller growth is nothing that a minute can tell from chance."""


def only_grew(due_s: Floats, finished_s: Floats, start_s: float, end_s: float) -> bool:
    """Whether what was due and not finished grew from the first third of [start_s, end_s] to the last, beyond overlap.

    ``due_s`` and ``finished_s`` of every request, NaN where it never finished. The backlog counts what waits anywhere:
    at the server, in the client, behind the turn before it. Unstable: its lowest of the last third lies above its
    highest of the first, and it grew by more than `GROWN` of what was due.
    """
    if not len(due_s) or end_s <= start_s:
        return False
    at = np.linspace(start_s, end_s, 121)
    due = np.searchsorted(np.sort(due_s), at, side="right")
    done = np.searchsorted(np.sort(finished_s[np.isfinite(finished_s)]), at, side="right")
    backlog = due - done
    first, last = backlog[:41], backlog[-41:]
    return bool(last.min() > first.max() and backlog[-1] - backlog[0] > GROWN * (due[-1] - due[0]))


def backlog_grew(run: Run) -> bool | None:
    """`only_grew` of a run's measured requests, by their planned times; None in a closed loop, which has no backlog."""
    due_s = run.planned_scheduled_s
    if run.manifest.spec.mode != "open" or not len(due_s):
        return None
    return only_grew(due_s, run.rows.finished_s, float(due_s[0]), float(due_s[-1]))


def backlog_check(run: Run) -> Check:
    """Open loop: the server kept up. Where its backlog only grew, latencies say how long the run was, no more."""
    grew = backlog_grew(run)
    observed = {None: "closed loop or nothing due", True: "it only grew", False: "it did not only grow"}[grew]
    advice = "more came than was done, so any latency is reached in time: no promise is kept at this load; send less"
    return limit("backlog", None if grew is None else not grew, observed, "no backlog that only grows", advice)
