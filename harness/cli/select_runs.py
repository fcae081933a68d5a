"""Which runs are meant, and reading them: of what a person names, the run directories, their summaries, their rows."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.cli.output import say
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_VALID, ResultsError, UsageError

if TYPE_CHECKING:
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary
    from harness.sweep.state import SweepState

Made = TypeVar("Made")


def find_runs(*names: str | Path) -> list[Path]:
    """Run directories that these name: one itself, those in a folder, the done points of a sweep or a search, those of
    a pattern like 'runs/*-a', each also on S3. Raises `ResultsError` for a name without any.
    """
    from harness.store.copies import local_copy

    return [run for name in names for run in _runs_of(local_copy(name, say))]


def _runs_of(path: Path) -> list[Path]:
    from harness.record.manifest import MANIFEST

    if (path / MANIFEST).is_file():
        return [path]
    if sweep_at(path):
        return done_points(path)
    if path.exists() and not path.is_dir():
        raise ResultsError(f"{path}: not a run directory, nor a folder of runs")
    inside = [file.parent for file in path.glob(f"*/{MANIFEST}")]
    matching = [] if path.exists() else [Path(name) for name in glob.glob(str(path))]  # noqa: PTH207 - absolute ones too
    folders = [one for one in matching if (one / MANIFEST).is_file() or any(one.glob(f"*/{MANIFEST}"))]
    if not (found := sorted(inside) or [run for one in sorted(folders) for run in _runs_of(one)]):
        raise ResultsError(f"{path}: not a run directory, and no folder or pattern of any (a run holds {MANIFEST})")
    return found


def done_points(folder: Path) -> list[Path]:
    """The runs of a sweep or a search that are done. Raises `ResultsError` when none is.

    A search probes a load again whose run was not VALID: once that is VALID, the first says nothing more.
    """
    if (state := sweep_at(folder)) is None:
        raise ResultsError(f"{folder}: not a sweep folder")
    points = state.points
    done = [point for point in points if point.state == "done"]
    if not done:
        raise ResultsError(f"{folder}: no point of this sweep is done; go on with: harness sweep --resume {folder}")
    if len(done) < len(points):
        say(f"{folder}: {len(points) - len(done)} of {len(points)} points are not done and left out")
    if state.spec.is_search:
        sound = [point.level for point in done if point.verdict == "VALID"]
        again = [point for point in done if point.verdict != "VALID" and point.level in sound]
        if again:
            say(f"{folder}: {', '.join(p.name for p in again)}: not VALID, and probed again since: left out")
        rungs = [p for p in done if p.verdict == "TOO SMALL" and p.level.concurrency is not None]  # they only guided it
        done = [point for point in done if point not in again and point not in rungs] or done
    return [folder / point.name for point in done]


def sides_of_sweep(text: str) -> tuple[list[Path], list[Path]]:
    """The runs of the first system of a sweep of two, and those of the second. Raises `UsageError` for another one."""
    folder = Path(text)
    if (state := sweep_at(folder)) is None:
        raise UsageError(f"{text}: compare needs two sides, A and B; alone stands only the folder of a sweep of two")
    if len(state.pairs) != 2:
        raise UsageError(f"{text}: is a sweep of {len(state.pairs)} systems; name the runs of two of them as A and B")
    which = {point.name: point.pair for point in state.points}
    done = done_points(folder)
    first, second = ([path for path in done if which[path.name] == k] for k in (0, 1))
    if not first or not second:
        raise ResultsError(f"{text}: no point of {state.pairs[0 if not first else 1].name} is done")
    return first, second


def sweep_at(path: Path) -> SweepState | None:
    """How far the sweep or the search in this folder is; null when it is not one. Raises `ResultsError`."""
    from harness.sweep.state import STATE, read_state

    return read_state(path) if (path / STATE).is_file() else None


def refused_exit(verdicts: Iterable[str | None]) -> int:
    """What the runs that are not VALID make of the exit status: 3 when one is INVALID, else 5 when one is TOO SMALL."""
    found = set(verdicts)
    if "INVALID" in found:
        return EXIT_INVALID
    return EXIT_NOT_DECIDED if "TOO SMALL" in found else EXIT_VALID


def judged(paths: Sequence[Path], use: Callable[[Run, Summary], Made], **judge: Any) -> list[Made]:
    """What is made of each run and its summary (``judge``: as `analysis.summary.summarise` takes it), one run in memory
    at a time. Raises `UsageError` when one is named twice.
    """
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import summarise

    def one(run: Run) -> Made:
        return use(run, summarise(run, **judge))

    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice: it would count twice")
    return [one(read_run(path)) for path in paths]
