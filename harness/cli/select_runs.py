"""Which runs are meant, and reading them: of what a person names, the run directories, their summaries, their rows."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import say
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_VALID, ResultsError, UsageError
from harness.record.manifest import MANIFEST

if TYPE_CHECKING:
    from analysis.compare.paired import PairedRun
    from analysis.rows.read import Run
    from analysis.summary import Summary


def expand(paths: Sequence[Path]) -> list[Path]:
    """Run directories: a sweep folder stands for those of its points that are done, a folder of runs for all of them.

    Raises `ResultsError` for a sweep of which no point is done.
    """
    from harness.store.copies import local_copy
    from harness.sweep.state import STATE

    found: list[Path] = []
    for path in [local_copy(path, say) for path in paths]:
        if (path / STATE).exists():
            found += done_points(path)
        elif (path / MANIFEST).exists():
            found.append(path)
        else:
            found += sorted(file.parent for file in path.glob(f"*/{MANIFEST}")) or [path]
    return found


def done_points(folder: Path) -> list[Path]:
    """The runs of a sweep or a search that are done. Raises `ResultsError` when none is.

    A search probes a load again whose run was not VALID: once that is VALID, the first says nothing more.
    """
    from harness.sweep.state import read_state

    state = read_state(folder)
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


def find_runs(text: str) -> list[Path]:
    """Run directories that ``text`` names: one itself, those in a folder, or those of a pattern like 'runs/*-a'.

    Of a sweep or a search those of its points that are done. Raises `ResultsError` when there is none.
    """
    from harness.sweep.state import STATE

    path = Path(text)
    if (path / MANIFEST).is_file():
        return [path]
    if (path / STATE).is_file():
        found = done_points(path)
    elif path.is_dir():
        found = sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
    elif path.exists():
        raise ResultsError(f"{text}: not a run directory, nor a folder of runs")
    else:
        named = sorted(Path(name) for name in glob.glob(text))  # noqa: PTH207  # absolute patterns too
        folders = [name for name in named if (name / MANIFEST).is_file() or any(name.glob(f"*/{MANIFEST}"))]
        found = [run for name in folders for run in find_runs(str(name))]
    if not found:
        raise ResultsError(f"{text}: not a run directory, and no folder or pattern of any (a run holds {MANIFEST})")
    return found


def sides_of_sweep(text: str) -> tuple[list[Path], list[Path]]:
    """The runs of the first system of a sweep of two, and those of the second. Raises `UsageError` for another one."""
    from harness.sweep.state import STATE, read_state

    folder = Path(text)
    if not (folder / STATE).is_file():
        raise UsageError(f"{text}: compare needs two sides, A and B; alone stands only the folder of a sweep of two")
    state = read_state(folder)
    if len(state.pairs) != 2:
        raise UsageError(f"{text}: is a sweep of {len(state.pairs)} systems; name the runs of two of them as A and B")
    which = {point.name: point.pair for point in state.points}
    done = done_points(folder)
    first, second = ([path for path in done if which[path.name] == k] for k in (0, 1))
    if not first or not second:
        raise ResultsError(f"{text}: no point of {state.pairs[0 if not first else 1].name} is done")
    return first, second


def refused_exit(verdicts: Iterable[str | None]) -> int:
    """What the runs that are not VALID make of the exit status: 3 when one is INVALID, else 5 when one is TOO SMALL."""
    found = set(verdicts)
    if "INVALID" in found:
        return EXIT_INVALID
    return EXIT_NOT_DECIDED if "TOO SMALL" in found else EXIT_VALID


def is_search(path: Path) -> bool:
    """Whether this is the folder of a search for capacity."""
    from harness.sweep.state import STATE, read_state

    return (path / STATE).is_file() and read_state(path).spec.is_search


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """That the bill of each run is to be divided by what its servers counted, too."""

    cached_ratio: float | None
    """What a cached input token weighs in uncached ones, where it must be declared."""


def read_summaries(
    paths: Sequence[Path], slo: dict[str, float] | None, attain: float, divided: Measured | None = None,
    min_requests: int | None = None,
) -> list[Summary]:  # fmt: skip
    """Summaries of runs, one run in memory at a time. Raises `UsageError` when one is named twice."""
    from analysis.rows.read import read_run
    from analysis.summary import summarise

    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("a run is named twice: it would count twice")
    found = []
    for path in paths:
        run = read_run(path)
        s = summarise(run, slo=slo, attain=attain, min_requests=min_requests)
        found.append(s if divided is None else with_splits(run, s, divided.cached_ratio))
    return found


def with_splits(run: Run, s: Summary, cached_ratio: float | None) -> Summary:
    """The summary with its bill divided by every method that this run allows."""
    from analysis.cost.split import run_samples, split_bill, token_mix

    usage = None
    if s.tokens.input is not None and s.tokens.output is not None:
        usage = token_mix(s.tokens.input, s.tokens.cached_input, s.tokens.output)
    bill = s.cost.bill_usd if s.cost.usd_per_1m_total.value is not None else None
    splits = split_bill(
        bill, usage, run_samples(run, s.window) if s.window else None, evidence=s.evidence,
        cached_ratio=cached_ratio, n=s.requests.succeeded,
    )  # fmt: skip
    return replace(s, cost=replace(s.cost, splits=splits))


def observe_run(path: Path, slo: dict[str, float] | None, attain: float) -> PairedRun:
    """What a comparison needs of one run directory."""
    from analysis.compare.paired import observe
    from analysis.rows.read import read_run
    from analysis.summary import summarise

    run = read_run(path)
    return observe(run, summarise(run, slo=slo, attain=attain))
