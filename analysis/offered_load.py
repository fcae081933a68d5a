"""What load was offered to the servers: which kind it was, at which rate requests went out, how many sessions began.

Of three kinds. In an *open loop* requests go out at times of their own, whatever the server does. In a *closed loop* a
fixed number is in flight, and a slow server slows its own load. *Sessions that wait* begin at times of their own, but
each turn waits for the answer before it (``--sessions wait``, ``--conversation live``): a slow server slows the load
within every session, so requests per second are an outcome, and the load is the rate of sessions started.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from analysis.arrays import Floats
from analysis.intervals import Quantity
from analysis.rows import LoadKind as LoadKind
from analysis.rows import Run

KIND_WORDS: dict[LoadKind, str] = {
    "open": "open loop",
    "closed": "closed loop",
    "sessions": "sessions that wait",
}
LOAD_UNIT: dict[LoadKind, str] = {"open": "req/s", "closed": "in flight", "sessions": "sessions/s"}
"""What a load of each kind is counted in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """What was really offered, of the measured requests. Rates are known exactly and have no interval."""

    kind: LoadKind
    sent_rate: Quantity
    """req/s: (n - 1) / (last - first time sent). Null below two requests, or when all were sent at one instant."""
    session_rate: Quantity
    """Sessions started per second: (n - 1) / (last - first planned time) of the first turns that were sent. Null but
    for sessions that wait. A plan of windows cuts sessions, and what is left of one begins none: there it is planned
    requests/s over the trace's requests for each session."""
    requests_per_session: float | None
    """Requests that were planned over sessions that were; null but for sessions that wait. With ``session_rate`` it is
    the rate of requests that a server asks for that keeps up."""


def offered_load(run: Run) -> OfferedLoad:
    """What was offered to the servers of a run."""
    kind = run.load_kind
    rows, evidence = run.rows, run.evidence
    sent = np.isfinite(rows.sent_s)

    def rate(times_s: Floats, unit: str, why: str) -> Quantity:
        n = len(times_s)
        span_s = float(times_s.max() - times_s.min()) if n else 0.0
        value = (n - 1) / span_s if span_s > 0 else None
        return Quantity(value=value, n=n, unit=unit, note=None if value is not None else why, evidence=evidence)

    starts = per_session = None
    if run.turns is not None:
        first = run.turns.first
        starts = rows.scheduled_s[sent & first]
        begun = int(np.count_nonzero(first))
        per_session = len(rows) / begun if begun else None
    why = "nothing is a session that waits" if starts is None else "fewer than two sessions were started"
    session_rate = rate(np.zeros(0) if starts is None else starts, "sessions/s", why)
    plan = run.manifest.plan
    if starts is not None and plan.windows and plan.source is not None and plan.planned_rate:
        per_session = plan.source.requests_per_session
        session_rate = replace(session_rate, value=plan.planned_rate / per_session, note=None)
    return OfferedLoad(
        kind=kind,
        sent_rate=rate(rows.sent_s[sent], "req/s", "fewer than two requests were sent"),
        session_rate=session_rate,
        requests_per_session=per_session,
    )
