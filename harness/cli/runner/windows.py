"""What a search for capacity takes from its trace: the whole of it as a demand, and the windows of a probe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.options import PlanOptions, ReplayOptions
from harness.trace.io import Trace

if TYPE_CHECKING:
    import numpy as np

    from analysis.capacity.backlog import Demand

WINDOWS = 3
"""A probe joins so many windows from different parts of the trace."""
SHORTEST_WINDOW_S = 15.0
"""A burst that is cut by the end of a window is no burst: probes that are short have fewer windows."""


def window_count(seconds: float, *, waits: bool) -> int:
    """Windows of a probe that long. Sessions that wait (``waits``) get one: the first turn that a window leaves of a
    session is found in no prefix cache, and only those of the probe's start-up are not judged.
    """
    return 1 if waits else max(1, min(WINDOWS, int(seconds / SHORTEST_WINDOW_S)))


def in_loop(asked: ReplayOptions, *, closed: bool) -> ReplayOptions:
    """The options of a replay in this kind of loop: a ladder draws no arrivals and rescales nothing."""
    if not closed:
        return asked
    return replace(
        asked, load=replace(asked.load, max_concurrency=None),
        plan=replace(asked.plan, arrivals=None, burstiness=None, sessions="trace", spread=False),
    )  # fmt: skip


def demand_of(trace: Trace, asked: PlanOptions) -> Demand:
    """The whole trace as arrivals and lengths; arrivals that are to be drawn are drawn here at 1 req/s."""
    import numpy as np

    from analysis.capacity.backlog import Demand
    from harness.plan.arrivals import arrival_times, constant_stage

    times, inputs, outputs, starts, after = [], [], [], [], []
    begun: dict[str, float] = {}
    last: dict[str, int] = {}
    waits = asked.waits
    for record in trace:
        times.append(np.nan if record.arrival_s is None else record.arrival_s)
        if waits:
            session = record.session_id
            starts.append(times[-1] if session is None else begun.setdefault(session, times[-1]))
            after.append(-1 if session is None else last.get(session, -1))
            if session is not None:
                last[session] = len(times) - 1
        inputs.append(np.nan if record.input_tokens is None else record.input_tokens)
        outputs.append(np.nan if record.output_tokens is None else record.output_tokens)
    arrival_s = np.array(times, dtype=np.float64)
    into_session_s = arrival_s - np.array(starts) if waits else None
    waits_for = np.array(after, dtype=np.int64) if waits else None
    if asked.arrivals is not None and asked.arrivals != "trace":
        stages = constant_stage(1.0, None)
        drawn = arrival_times(asked.arrivals, stages, burstiness=asked.burstiness or 1.0, seed=0, most=len(times))
        arrival_s, into_session_s = np.asarray(drawn, dtype=np.float64) / 1e9, None

    def known(values: list[float], absent: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        found = np.array(values, dtype=np.float64)
        said = np.isfinite(found)
        return np.where(said, found, float(found[said].mean()) if said.any() else absent)

    return Demand(
        arrival_s=arrival_s, input_tokens=known(inputs, 0.0), output_tokens=known(outputs, 1.0),
        into_session_s=into_session_s, after=waits_for,
    )  # fmt: skip
