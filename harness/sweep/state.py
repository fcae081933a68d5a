"""A sweep on disk: how far it is, and what it takes to go on after anything that ended it.

``sweeps/<UTC time>-<name>/`` is the whole of it::

    sweep.json            `SweepState`: what was asked, every point with its state, every rental with its price
    plans/                one plan for each load level and repeat, shared by all tiers of a model
    servers/<pair>/       logs of the servers that the points of one model and tier shared
    <point>/              one run directory per point (`harness.record.manifest`)
    <point>.aborted-<n>/  what a crash, a Ctrl-C or a spent budget left of a point that was then done again

``sweep.json`` is replaced in one step before and after every point, so whatever ends a sweep leaves a whole one. Which
points are kept when it goes on is not decided by it but by their rows (`verify`): it may be older than they are.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import msgspec

from harness.errors import ResultsError, UsageError
from harness.record.manifest import Tier, create_run_dir, read_json, write_json
from harness.sweep.spec import Pair, Point, SweepSpec, slug

SCHEMA_VERSION = "1"
STATE = "sweep.json"
ANSWER = "capacity.json"
LOCK = ".lock"
ADJUSTABLE = ("trace", "budget_usd", "budget_hours", "on_failure")
"""What may differ when a sweep is resumed: it changes no point. (Of the trace its content counts, not its path.)"""


@dataclass(slots=True, kw_only=True)
class Rental:
    """Servers of one pair from their start to their end, and what an hour of them costs."""

    pair: int
    replicas: int
    tier: Tier | None
    """With its dated price; null: no price."""
    started_s: float
    """Wall clock, Unix time."""
    ended_s: float | None = None
    """Null while they are up."""
    crashed: bool = False
    """The harness died meanwhile: the end is that of the last sign of life on disk."""

    @property
    def usd_per_hour(self) -> float:
        """Of all replicas; 0 without a price."""
        return self.tier.usd_per_hour * self.replicas if self.tier else 0.0

    def hours(self, now_s: float) -> float:
        return max(0.0, (self.ended_s if self.ended_s is not None else now_s) - self.started_s) / 3600


@dataclass(slots=True, kw_only=True)
class SweepState:
    """A sweep: what was asked and how far it is."""

    schema_version: str = SCHEMA_VERSION
    name: str
    created: str
    """UTC, ISO 8601."""
    file: str
    """The sweep file; paths in ``spec.options`` count from its folder."""
    spec: SweepSpec
    trace_sha256: str
    pairs: list[Pair]
    points: list[Point]
    rentals: list[Rental] = field(default_factory=list)
    revision: int = 0
    writer: str = ""
    """Host, pid and time of the sitting that wrote it: two at work on one sweep never write the same step."""
    store_url: str | None = None
    """Where on S3 the folder is kept as well (`harness.store.copies`)."""

    def spent(self, now_s: float) -> tuple[float, float]:
        hours = [(rental.hours(now_s), rental.usd_per_hour) for rental in self.rentals]
        return sum(h * usd for h, usd in hours), sum(h for h, _ in hours)


def create_folder(root: Path, state: SweepState) -> Path:
    """A new folder ``<root>/<UTC time>-<name>`` with its ``sweep.json`` inside. Raises `ResultsError`."""
    folder = create_run_dir(root, slug(state.name) or "sweep").path
    try:
        write_state(folder, state)
    except BaseException:
        folder.rmdir()
        raise
    return folder


def write_state(folder: Path, state: SweepState) -> None:
    """Replace ``sweep.json`` in one step that survives a crash at any moment. Raises `ResultsError`."""
    write_json(folder / STATE, state)


def read_state(folder: Path) -> SweepState:
    """The state of a sweep folder. Raises `ResultsError` when there is none, or one of another schema."""
    file = folder / STATE
    state = read_json(file, SweepState, SCHEMA_VERSION, "sweep folder")
    for point in state.points:
        if Path(point.name).name != point.name or Path(point.plan).name != point.plan:
            raise ResultsError(f"{file}: point {point.name!r}: not a name inside the sweep folder")
        if not 0 <= point.pair < len(state.pairs):
            raise ResultsError(f"{file}: point {point.name!r}: there is no pair {point.pair}")
    return state


def find_folder(root: Path, name: str) -> Path:
    """The newest sweep of this name under ``root``. Raises `UsageError` when there is none."""
    found = sorted(path.parent for path in root.glob(f"*-{slug(name) or 'sweep'}*/{STATE}"))
    found = [folder for folder in found if read_state(folder).name == name]
    if not found:
        raise UsageError(f"{root}: no sweep named {name} to resume: leave --resume out, or say --resume FOLDER")
    return found[-1]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second harness out of this sweep; the kernel lets go when we die. Raises `UsageError` when it is taken."""
    try:
        file = (folder / LOCK).open("ab")
    except OSError as e:
        raise ResultsError(f"{folder}: cannot write there ({e.strerror})") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another harness is at work on this sweep") from None
        yield


def differences(before: SweepSpec, after: SweepSpec) -> list[str]:
    """What a changed sweep file changes in its points, key by key, as ``key: was -> is``; empty: nothing."""
    found: list[str] = []
    for name in (f.name for f in fields(SweepSpec) if f.name not in (*ADJUSTABLE, "options")):
        was, is_ = getattr(before, name), getattr(after, name)
        if was != is_:
            found.append(f"{name}: {_words(was)} -> {_words(is_)}")
    for name in sorted({*before.options, *after.options}):
        was, is_ = before.options.get(name), after.options.get(name)
        if (was or None) != (is_ or None):  # older folders lack options that came later and were not given
            found.append(f"{name}: {_words(was)} -> {_words(is_)}")
    return found


def _words(value: object) -> str:
    return "not given" if value in (None, []) else msgspec.json.encode(value).decode()


def set_aside(path: Path) -> Path | None:
    """Rename what is at ``path`` to ``<path>.aborted-<n>``, the first free n; null when nothing is there."""
    if not path.exists():
        return None
    n = 1
    while (aside := path.with_name(f"{path.name}.aborted-{n}")).exists():
        n += 1
    return path.rename(aside)


def close_rentals(folder: Path, state: SweepState) -> bool:
    """End rentals that a crash left open, at the last sign of life in the folder; whether there were any."""
    unclosed = [rental for rental in state.rentals if rental.ended_s is None]
    for rental in unclosed:
        seen = [p.stat().st_mtime for p in folder.rglob("*") if p.is_file()]
        rental.ended_s, rental.crashed = max([rental.started_s, *seen]), True
    return bool(unclosed)


def verify(folder: Path, point: Point) -> str | None:
    """Null when the run of a point is whole, else what is wrong with it: it says complete, its plan is the point's own,
    and every request has exactly one readable row.
    """
    import numpy as np

    from harness.errors import PlanError
    from harness.plan.file import plan_sha256, read_plan_info
    from harness.record.manifest import RunDir, read_manifest
    from harness.record.results import iter_results

    run = RunDir(folder / point.name)
    try:
        manifest = read_manifest(run.path)
        if manifest.status != "complete" and not manifest.lost:
            return f"its run is {manifest.status}"
        if point.plan_sha256 is None or manifest.plan_sha256 != point.plan_sha256:
            return "its manifest names another plan"
        if plan_sha256(run.plan) != point.plan_sha256:
            return "its plan.arrow is not the plan that was sent"
        planned = read_plan_info(run.plan).requests
        batches = (batch for file in run.all_results() for batch in iter_results(file))
        columns = [batch.column("request_id").to_numpy() for batch in batches]
    except (ResultsError, PlanError, ValueError) as e:
        return str(e).splitlines()[0]
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *columns])
    if not np.array_equal(np.sort(ids), np.arange(planned)):
        return f"{len(np.unique(ids))} of {planned} requests have a row, {len(ids)} rows in all"
    return None
