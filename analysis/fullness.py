"""How full the servers were at the load of a run, from what they said of themselves each second.

In an open loop the load is given, and so are throughput and cost at it: an idle server's tokens are dear, and would be
on any hardware. What makes such a price readable is how much of the servers it kept busy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.arrays import Floats
from analysis.load import Run
from analysis.metrics import Window
from harness.run import RunDir
from harness.server_metrics import read_server_metrics

SLOTS = "--max-num-seqs"
GIVEN = "the load is given"
"""Why throughput and cost of an open loop have no interval."""


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
