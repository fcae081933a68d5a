"""Run directories -> verdict, figures, price; as text, Markdown, JSON or a page: report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import EXIT_STATUS, MIN_REQUESTS_HELP, REPORT_OPTIONS
from harness.cli.output import print_json, print_sections, print_table, say
from harness.cli.select_runs import expand, read_summaries, refused_exit
from harness.cli.types import SLO
from harness.cli.verb import command
from harness.errors import EXIT_SLO_MISSED, EXIT_VALID
from harness.record.manifest import now_utc
from harness.terminal import Verbosity, verbosity

if TYPE_CHECKING:
    from analysis.capacity.serving_config import ServingConfig
    from analysis.summary import Summary


@command(
    short_help="Report on a run directory; compare several in a page.",
    epilog=f"""\b
Examples:
  harness report runs/20261121T234654Z-trace-smollm2-135m
  harness report runs/20261121T234654Z-trace-smollm2-135m --html report.html
  harness report runs/*-sweep-* --slo ttft=2s --html sweep.html

{EXIT_STATUS}
Of several runs the worst counts: INVALID, then TOO SMALL.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--slo", type=SLO, metavar="KEY=TIME,...", help="Judge against this SLO instead of the one of the run.")
@click.option(
    "--min-requests", type=click.IntRange(min=1), help=f"{MIN_REQUESTS_HELP} Default: as the run was made, which is 30."
)
@REPORT_OPTIONS
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained page instead; several runs are compared in it.",
)
@click.option(
    "--variant",
    metavar="TOOL",
    help="This run's figures by another tool's definitions: vllm-bench, guidellm, aiperf.",
)
def report(**options: Any) -> int:
    """Report on a run directory: verdict, price, latency under load, throughput, errors."""
    return report_runs(**options)


def report_runs(
    runs: Sequence[Path],
    format_: str,
    slo: dict[str, float] | None,
    attain: float,
    ratio: float,
    html: Path | None = None,
    variant: str | None = None,
    min_requests: int | None = None,
) -> int:
    """Run directory -> report on stdout; several, or a sweep's -> capacity and cost at the SLO, or a page."""
    from analysis.report.run import render_json, render_markdown, render_text
    from analysis.rows.read import read_run
    from analysis.summary import exit_code, summarise

    runs = expand(runs)
    if html is not None:
        return report_page(runs, html, slo=slo, attain=attain, ratio=ratio, min_requests=min_requests)
    if len(runs) > 1:
        return report_sweep(runs, format_, slo, attain, min_requests)
    if variant is not None:
        return report_variant(runs[0], variant, format_)
    summary = summarise(read_run(runs[0]), slo=slo, ratio=ratio, attain=attain, min_requests=min_requests)
    whole = verbosity() is Verbosity.VERBOSE
    if format_ == "json":
        print(render_json(summary))
    elif format_ == "md":
        print(render_markdown(summary, whole))
    else:
        from harness.console import Console

        render_text(summary, Console(highlight=False), whole)
    return exit_code(summary)


def report_variant(path: Path, name: str, format_: str) -> int:
    """Run directory -> its figures as another tool defines them. They carry no verdict and no interval of ours."""
    from analysis.compare.variants import variant_of
    from analysis.report.figures import figure
    from analysis.rows.read import read_run

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


def report_page(runs: Sequence[Path], html: Path, **options: Any) -> int:
    """Run directories -> one page; its path on stdout."""
    from analysis.capacity.serving_config import serving_configs
    from analysis.summary import exit_code

    summaries = page_of(runs, html, **options)
    print(html)
    return exit_code(summaries[0]) if len(summaries) == 1 else exit_of(serving_configs(summaries), summaries)


def page_of(runs: Sequence[Path], html: Path, **options: Any) -> list[Summary]:
    """Write the page of these runs; their summaries. One run is in memory at a time."""
    from analysis.labels import label_runs
    from analysis.report.page import write_page
    from analysis.report.view import view_run
    from analysis.rows.read import read_run
    from analysis.summary import summarise

    views = []
    for path, label in zip(runs, label_runs(runs), strict=True):
        run = read_run(path)
        views.append(view_run(run, summarise(run, **options), label))
        del run
    size = write_page(html, views)
    say(f"{html}: {size / 1e6:.2f} MB, stands alone; open it in a browser")
    return [view.summary for view in views]


def report_sweep(
    paths: Sequence[Path], format_: str, slo: dict[str, float] | None, attain: float, min_requests: int | None = None
) -> int:
    """Several runs as capacity and cost at the SLO, a line per tier and model; 3: a run is INVALID, 5: TOO SMALL, 4:
    SLO not kept.
    """
    from analysis.capacity.serving_config import SCHEMA, serving_configs
    from analysis.report.capacity_text import capacity_sections, sentence
    from analysis.report.document import Section

    summaries = read_summaries(paths, slo, attain, min_requests=min_requests)
    found = serving_configs(summaries)
    invalid = [s.run for s in summaries if s.verdict == "INVALID"]
    small = [s.run for s in summaries if s.verdict == "TOO SMALL"]
    sentences = [sentence(one) for one in found if one.loop != "closed"] or [sentence(one) for one in found]
    if format_ == "json":
        print_json({"schema": SCHEMA, "made": now_utc(), "sentences": sentences, "systems": found, "invalid": invalid,
                    "too_small": small})  # fmt: skip
    else:
        lines = sentences or ["No run is VALID, so there is no capacity and no cost."]
        sections = [Section(title="Capacity", lines=tuple(lines)), *capacity_sections(found)]
        if invalid:
            sections.append(Section(title="INVALID and left out", notes=tuple(invalid)))
        if small:
            sections.append(Section(title="TOO SMALL and left out", notes=tuple(small)))
        print_sections(sections, format_)
    return exit_of(found, summaries)


def exit_of(found: Sequence[ServingConfig], summaries: Sequence[Summary]) -> int:
    """Status of several runs together. A load beyond capacity misses the SLO: that alone is a result, no failure."""
    if refused := refused_exit(s.verdict for s in summaries):
        return refused
    kept = [one.capacity is None or one.capacity.state in ("found", "beyond") for one in found]
    return EXIT_VALID if any(kept) else EXIT_SLO_MISSED
