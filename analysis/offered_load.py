"""What load was offered to the servers: which kind it was, at which rate requests went out, how many sessions began.

Of three kinds. In an *open loop* requests go out at times of their own, whatever the server does. In a *closed loop* a
fixed number is in flight, and a slow server slows its own load. *Sessions that wait* begin at times of their own, but
each turn waits for the answer before it (``--sessions wait``, ``--conversation live``): a slow server slows the load
within every session, so requests per second are an outcome, and the load is the rate of sessions started.

In an open loop the load is given, and so are throughput and cost at it: the tokens of an idle server are dear on any
hardware. So such a price is shown with how full the servers were (`Fullness`), by their own metrics each second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from analysis.arrays import Floats
from analysis.metrics import Window
from analysis.rows.run import LoadKind as LoadKind
from analysis.rows.run import Run
from analysis.stats.intervals import Quantity
from harness.record.manifest import RunDir
from harness.record.samples import read_server_metrics

SLOTS = "--max-num-seqs"
GIVEN = "the load is given"
"""Why throughput and cost of an open loop have no interval: they follow from a load that was chosen and estimate
nothing. In a closed loop and at capacity they say what the servers can do, and have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullness:
    """How full all servers together were over the window; None is not known."""

    in_flight: float | None
    """Requests in flight at the client, time average."""
    running: float | None
    """Requests in the running batches, time average of what the servers said each second."""
    slots: int | None
    """Requests that the batches can hold: ``--max-num-seqs`` x replicas, where the engine's arguments say it."""
    slots_busy: float | None
    """``running`` / ``slots``."""
    engine_busy: float | None
    """Share of those seconds in which a server had any request in its batch, mean over servers."""
    kv_cache: float | None
    """Share of the KV cache in use, mean over seconds and servers."""

    @property
    def words(self) -> str:
        """The best that is known, in words."""
        if self.slots_busy is not None:
            return f"{self.slots_busy:.0%} of {self.slots} slots busy"
        if self.engine_busy is not None and self.running is not None:
            return f"engines at work {self.engine_busy:.0%} of the time, {self.running:.3g} requests in their batches"
        if self.in_flight is not None:
            return f"{self.in_flight:.3g} requests in flight on average"
        return "how full they were is not known"


def fullness(run: Run, window: Window | None, in_flight: float | None) -> Fullness:
    """How full the servers of a run were in its window; ``in_flight``: time average at the client."""
    slots = _slots(run)
    samples = None if window is None else _samples(run, window)
    running = engine_busy = kv_cache = None
    if samples is not None:
        batches = [found["running"] for found in samples]
        if all(np.isfinite(batch).all() for batch in batches):
            running = float(sum(batch.mean() for batch in batches))
            engine_busy = float(np.mean([(batch > 0).mean() for batch in batches]))
        caches = [found["kv_cache_usage"] for found in samples]
        if all(np.isfinite(cache).all() for cache in caches):
            kv_cache = float(np.mean([cache.mean() for cache in caches]))
    return Fullness(
        in_flight=in_flight, running=running, slots=slots,
        slots_busy=running / slots if running is not None and slots else None,
        engine_busy=engine_busy, kv_cache=kv_cache,
    )  # fmt: skip


def given_load_note(full: Fullness) -> str:
    """What a reader of a price must know where the load was given."""
    return (
        f"the cost at this load, which was given ({full.words}): not what a token costs on full servers, which "
        "harness capacity measures"
    )


def _slots(run: Run) -> int | None:
    words = [word for arg in run.manifest.engine_args for word in arg.split("=", 1)]
    if SLOTS not in words[:-1]:
        return None
    said = words[words.index(SLOTS) + 1]
    return int(said) * max(1, len(run.manifest.replicas)) if said.isdigit() and int(said) else None


def _samples(run: Run, window: Window) -> list[dict[str, Floats]] | None:
    """Gauges of each server in the window; None where a server was not sampled there."""
    made = []
    for replica in run.manifest.replicas:
        table = read_server_metrics(RunDir(run.path).server_metrics(replica.index))
        if table is None:
            return None
        time_s = table.column("t_ns").to_numpy() / 1e9
        inside = (time_s >= window.start_s) & (time_s <= window.end_s)
        if not inside.any():
            return None
        names = ("running", "kv_cache_usage")
        made.append({name: table.column(name).to_numpy().astype(np.float64)[inside] for name in names})
    return made or None


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
