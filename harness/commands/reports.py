"""Run directories -> verdict, figures, price; as text, Markdown, JSON or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.commands.output import print_json, print_table, say
from harness.errors import EXIT_VALID, ResultsError


def report(
    runs: Sequence[Path],
    format_: str,
    slo: dict[str, float] | None,
    attain: float,
    ratio: float,
    html: Path | None = None,
    variant: str | None = None,
) -> int:
    """Run directory -> report on stdout; several, or a sweep's -> capacity and cost at the SLO, or a page."""
    from analysis.load import read_run
    from analysis.show.report import render_json, render_markdown, render_text
    from analysis.summary import exit_code, summarise

    runs = expand(runs)
    if html is not None:
        return report_page(runs, html, slo=slo, attain=attain, ratio=ratio)
    if len(runs) > 1:
        from harness.commands.capacity import report_sweep

        return report_sweep(runs, format_, slo, attain)
    if variant is not None:
        return report_variant(runs[0], variant, format_)
    summary = summarise(read_run(runs[0]), slo=slo, ratio=ratio, attain=attain)
    if format_ == "json":
        print(render_json(summary))
    elif format_ == "md":
        print(render_markdown(summary))
    else:
        from rich.console import Console

        render_text(summary, Console(highlight=False))
    return exit_code(summary)


def report_variant(path: Path, name: str, format_: str) -> int:
    """Run directory -> its figures as another tool defines them. They carry no verdict and no interval of ours."""
    from analysis.against.variants import variant_of
    from analysis.load import read_run
    from analysis.show.report import figure

    found = variant_of(name, read_run(path))
    if format_ == "json":
        print_json(found)
        return EXIT_VALID
    shares = next((list(f.percentiles) for f in found.values() if f.percentiles), [])
    print_table(
        (f"{name} (s, or per s)", "n", "mean", *(f"p{share}" for share in shares)),
        [
            (metric, f"{f.n:,}", figure(f.mean), *(figure(f.percentiles.get(share)) for share in shares))
            for metric, f in found.items()
        ],
    )
    return EXIT_VALID


def expand(paths: Sequence[Path]) -> list[Path]:
    """Run directories, a sweep folder standing for those of its points that are done.

    Raises `ResultsError` for a sweep of which no point is done.
    """
    from harness.store import local_copy
    from harness.sweep_state import STATE

    found: list[Path] = []
    for path in [local_copy(path, say) for path in paths]:
        if not (path / STATE).exists():
            found.append(path)
            continue
        found += done_points(path)
    return found


def done_points(folder: Path) -> list[Path]:
    """The runs of a sweep or a search that are done. Raises `ResultsError` when none is.

    A search probes a load again whose run was INVALID: once that is VALID, the first says nothing more.
    """
    from harness.sweep_state import read_state

    state = read_state(folder)
    points = state.points
    done = [point for point in points if point.state == "done"]
    if not done:
        raise ResultsError(f"{folder}: no point of this sweep is done; go on with: harness sweep --resume {folder}")
    if len(done) < len(points):
        say(f"{folder}: {len(points) - len(done)} of {len(points)} points are not done and left out")
    if state.spec.options.get("search") == "capacity":
        sound = [point.level for point in done if point.verdict == "VALID"]
        again = [point for point in done if point.verdict != "VALID" and point.level in sound]
        if again:
            say(f"{folder}: {', '.join(p.name for p in again)}: INVALID, and probed again since: left out")
        done = [point for point in done if point not in again]
    return [folder / point.name for point in done]


def report_page(runs: Sequence[Path], html: Path, **options: Any) -> int:
    """Run directories -> one page; its path on stdout. One run is in memory at a time."""
    from analysis.labels import label_runs
    from analysis.load import read_run
    from analysis.show.page import write_page
    from analysis.show.view import view_run
    from analysis.sizing.at_slo import systems
    from analysis.summary import exit_code, summarise
    from harness.commands.capacity import exit_of

    views = []
    for path, label in zip(runs, label_runs(runs), strict=True):
        run = read_run(path)
        views.append(view_run(run, summarise(run, **options), label))
        del run
    size = write_page(html, views)
    say(f"{html}: {size / 1e6:.2f} MB, stands alone; open it in a browser")
    print(html)
    if len(views) == 1:
        return exit_code(views[0].summary)
    summaries = [view.summary for view in views]
    return exit_of(systems(summaries), [s.run for s in summaries if s.verdict != "VALID"])
