"""Windows of a trace whose sessions wait: another rate moves when sessions begin, not the pace within one.

A user who comes twice as often does not think twice as fast. So on a clock ``speed`` times as fast sessions begin
``speed`` times as often, and each of their turns stays as long after the beginning as in the trace. With that the
requests/s of a window are those asked for, from its first second on and at any rate: it holds the turns that are due in
it, those of sessions that began before it among them. These go on from a turn that is not sent, so they wait for
nothing and come at their own time.

The trace is taken for periodic, as in `harness.trace.windows`: turns that are due after its end are so at its
beginning. In memory are about 50 bytes a row while the plan is made.
"""

from __future__ import annotations

import numpy as np

from harness.plan.arrivals import Times
from harness.plan.file import PlannedWindow, Windows
from harness.trace.rescale import Arrangement, Part
from harness.trace.windows import Joined, period_of, stretches_in_time


def session_windows(
    arrivals: Times, starts: Times, asked: Windows, *, lasts_ns: float, speed: float, trace_sha256: str, seed: int,
    most: int | None,
) -> Joined:  # fmt: skip
    """Windows as `windows_in_time` makes them, of turns at their session's own pace.

    ``starts``: of each row, when its session's first arrived, ns. Rows of a window (`PlannedWindow`) are counted in the
    order in which turns are due at this speed. Raises `UsageError` as `windows_in_time` does.
    """
    n, period = len(arrivals), period_of(arrivals)
    due = starts + np.rint((arrivals - starts) * speed).astype(np.int64)
    order = np.argsort(due % period, kind="stable")
    times, late = due[order] % period, due[order] // period
    stretches, shifts, length = stretches_in_time(
        times, period, asked, lasts_ns=lasts_ns, trace_sha256=trace_sha256, seed=seed, most=most
    )
    parts: list[Part] = []
    scheduled, part_of, rows = [], [], []
    for which, (stretch, shift) in enumerate(zip(stretches, shifts, strict=True)):
        places = np.arange(stretch.first, stretch.end)
        taken = order[places % n]
        scheduled.append(places // n * period + times[places % n] + shift)
        begun = places // n - late[places % n]  # in which pass over the trace its session began
        passes, group = np.unique(begun, return_inverse=True)
        part_of.append(len(parts) + group)
        rows.append(taken)
        for k, pass_ in enumerate(passes.tolist()):
            repeats = pass_ - int(passes[0]) if stretch.end - stretch.first > n else 0
            again = which * (2 + int(passes[-1] - passes[0])) if asked.busiest else 0
            parts.append(Part(len(parts), _mask(taken[group == k]), prompts=repeats + again))
    lasts_s, every = length / speed / 1e9, np.concatenate(rows)
    return Joined(
        Arrangement(
            np.concatenate(scheduled), np.concatenate(part_of).astype(np.uint32), parts, overlap=True, rows=every
        ),
        [
            PlannedWindow(
                first_row=s.first % n, last_row=(s.end - 1) % n, starts_s=at * lasts_s, requests=s.end - s.first,
                lasts_s=lasts_s,
            )
            for at, s in enumerate(stretches)
        ],
        len(np.unique(every)) / n,
        max(-(-(s.end - s.first) // n) for s in stretches) * (len(stretches) if asked.busiest else 1),
    )  # fmt: skip


def _mask(rows: Times) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each row of the trace is among these; it ends with the last of them."""
    taken = np.zeros(int(rows.max()) + 1, dtype=np.bool_)
    taken[rows] = True
    return taken
