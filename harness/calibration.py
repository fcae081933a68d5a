"""What one load worker on this kind of machine can carry, and how many workers a plan needs.

``harness calibrate`` measures it and writes ``<cache>/calibration.json``; until then cautious defaults hold. A worker
is given at most half of its ceiling: up to there its figures were compared with the truth, beyond it they drift first
and break later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from harness.errors import ResultsError
from harness.plan.file import read_plan_columns
from harness.record.host import Host, describe_host
from harness.record.manifest import read_json, write_json
from harness.record.run_spec import BATCH_READS_FROM

SCHEMA_VERSION = "1"
FILE = "calibration.json"
SHARE = 0.5
DEFAULT_EVENTS_PER_S, DEFAULT_REQUESTS_PER_S = 40_000.0, 2_000.0
"""Ceilings of one worker where nothing was measured: cautious ones, which `harness calibrate` replaces."""
FASTEST_ITL_S = 0.005
"""A closed loop's pace is the server's: assume each stream makes a token this often, as small models on a GPU do."""
BUSY_S = 10.0
"""An open loop is sized for its busiest stretch of this length."""
SAID_TOKENS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What one worker was measured to carry here. Times are s; errors are ours less the server's truth."""

    schema_version: str = SCHEMA_VERSION
    created: str
    """UTC, ISO 8601."""
    host: Host
    versions: dict[str, str]
    events_per_s: float
    """Server-sent events (tokens) of paced streams with which the worker kept up."""
    events_at_least: bool
    """True: the server was the limit, or none was met; the worker may carry more."""
    events_cpu_share: float
    """The worker's processor at that rate, of one core."""
    requests_per_s: float
    requests_at_least: bool
    lag_p50_s: float
    """Sent less scheduled: Poisson arrivals at 500 requests/s."""
    lag_p99_s: float
    timing_events_per_s: float
    """Rate at which the errors below were taken: about half of the ceiling."""
    ttft_error_p50_s: float
    """Median TTFT as the client saw it, less the server's own, which begins when its kernel has the request."""
    ttft_error_p99_s: float
    """99th percentile of one less 99th percentile of the other."""
    itl_error_p50_s: float
    itl_error_p99_s: float
    cpu_us_per_event: float
    """Processor time of the worker for one event, microseconds, at that rate."""
    batch_reads_from: int = BATCH_READS_FROM
    """Events per read interval from which reading in batches costs less than reading as bytes arrive."""
    took_s: float
    notes: list[str] = field(default_factory=list)


def write_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write it into ``folder`` in one step; returns the file. Raises `ResultsError` when that cannot be done."""
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, calibration)
    except (OSError, ResultsError) as e:
        raise ResultsError(f"{path}: cannot write the calibration ({e}); set HARNESS_CACHE") from e
    return path


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in ``folder``; None when there is none, it cannot be read, or it is another machine's."""
    try:
        found = read_json(folder / FILE, Calibration, SCHEMA_VERSION, "cache")
    except ResultsError:
        return None
    here = describe_host()
    ours = (found.host.cpu, found.host.cores) == (here.cpu, here.cores)
    return found if ours and min(found.events_per_s, found.requests_per_s) > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorDemand:
    """What a plan asks of the load generator at its busiest."""

    tokens_per_s: float
    requests_per_s: float
    assumed: bool
    """True in a closed loop: the server sets the pace, so a fast one is assumed."""


def demand(plan: Path, concurrency: int | None) -> GeneratorDemand:
    """Output tokens and requests per second of a plan: of its busiest 10 s, or with ``concurrency`` in flight.

    Closed loop: every slot streams a token each 5 ms, and begins its next request at once.
    """
    columns = read_plan_columns(plan, ["scheduled_ns", "output_tokens"])
    tokens = pc.fill_null(columns.column("output_tokens"), SAID_TOKENS).to_numpy().astype(np.float64)
    if concurrency is not None:
        pace = min(concurrency, len(tokens)) / FASTEST_ITL_S
        return GeneratorDemand(tokens_per_s=pace, requests_per_s=pace / max(1.0, float(tokens.mean())), assumed=True)
    known = columns.column("scheduled_ns").is_valid().to_numpy()
    at_s = pc.fill_null(columns.column("scheduled_ns"), 0).to_numpy()[known] / 1e9
    if not len(at_s):
        return GeneratorDemand(tokens_per_s=0.0, requests_per_s=0.0, assumed=False)
    order = np.argsort(at_s, kind="stable")
    at_s, running = at_s[order], np.concatenate(([0.0], np.cumsum(tokens[known][order])))
    first = np.searchsorted(at_s, at_s - BUSY_S, side="right")
    last = np.arange(1, len(at_s) + 1)
    # a plan shorter than the stretch is as busy as its own length says, but no shorter than a second
    stretch_s = min(BUSY_S, max(1.0, float(at_s[-1] - at_s[0])))
    busiest = float((running[last] - running[first]).max()) / stretch_s
    return GeneratorDemand(tokens_per_s=busiest, requests_per_s=float((last - first).max()) / stretch_s, assumed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """How many workers, and what to say about it."""

    workers: int
    words: str
    warning: str | None


def size_workers(
    wanted: GeneratorDemand, calibration: Calibration | None, *, cores: int, asked: int | None, most: int
) -> Sizing:
    """Workers for ``wanted`` at no more than half of each worker's ceiling; ``most``: more cannot share the work.

    ``asked`` is obeyed; the warning then speaks of that number.
    """
    events = calibration.events_per_s if calibration else DEFAULT_EVENTS_PER_S
    requests = calibration.requests_per_s if calibration else DEFAULT_REQUESTS_PER_S
    needed = max(1, math.ceil(max(wanted.tokens_per_s / (SHARE * events), wanted.requests_per_s / (SHARE * requests))))
    workers = max(1, min(asked or min(needed, cores), most))
    source = f"calibrated {calibration.created[:10]}" if calibration else "not calibrated: `harness calibrate`"
    words = (
        f"{workers} load worker{'s' if workers > 1 else ''}: {'up to ' if wanted.assumed else ''}"
        f"{wanted.tokens_per_s:,.0f} tokens/s and {wanted.requests_per_s:,.0f} requests/s at the busiest, "
        f"{SHARE * events:,.0f} and {SHARE * requests:,.0f} a worker ({source})"
    )
    warning = None
    if needed > min(workers, cores):
        have = f"{workers} of them" if workers < cores else f"{cores} cores"
        warning = (
            f"this load needs {needed} workers on a core each, and there are {have}: expect late requests and an "
            "INVALID run; use more or larger machines for the load, a lower rate, or calibrate this one"
        )
        if wanted.assumed:
            warning = (
                f"if the server streams a token each {FASTEST_ITL_S * 1e3:g} ms to every slot, {needed} workers are "
                f"needed and there are {have}: watch generator_cpu in the verdict"
            )
    return Sizing(workers=workers, words=words, warning=warning)
