"""Run directories: verdict and price (report), rows (export), A against B (compare), a folder as pages (open)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from harness.cli.output import present, print_json, print_table, say, say_page
from harness.cli.select_runs import find_runs, judged, refused_exit, sides_of_sweep, sweep_at
from harness.cli.verb import EXIT_STATUS, command, format_option, html_option, takes
from harness.errors import (
    EXIT_FAILURE,
    EXIT_NOT_DECIDED,
    EXIT_SLO_MISSED,
    EXIT_VALID,
    HarnessError,
    ResultsError,
    UsageError,
    sentence,
)
from harness.option_types import COUNT, NEW_FILE, PATH, opt
from harness.options import JudgeOptions, ReportOptions
from harness.terminal import Verbosity, verbosity

if TYPE_CHECKING:
    from harness.analysis.capacity.serving_config import ServingConfig
    from harness.analysis.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsReport(ReportOptions):
    """What ``harness report`` takes."""

    slo: dict[str, float] | None = opt("Judge against this SLO instead of that of the run.", metavar="KEY=TIME,...")
    min_requests: int | None = opt(
        "Below so many measured requests a run has no verdict but TOO SMALL, and no price. Default: as the run was "
        "made, which is 30.", kind=COUNT,
    )  # fmt: skip
    html: Path | None = opt("Write one self-contained page instead; several runs are compared in it.", kind=NEW_FILE)
    variant: str | None = opt(
        "This run's figures by another tool's definitions: vllm-bench, guidellm, aiperf.", metavar="TOOL"
    )


@command(
    epilog=f"""\b
Examples:
  harness report runs/20261121T234654Z-trace-smollm2-135m
  harness report runs/20261121T234654Z-trace-smollm2-135m --html report.html
  harness report runs/*-sweep-* --slo ttft=2s --html sweep.html

{EXIT_STATUS}
Of several runs the worst counts: INVALID, then TOO SMALL.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@takes(RunsReport)
def report(runs: Sequence[Path], asked: RunsReport) -> int:
    """Report on a run directory: verdict, price, latency under load, throughput, errors."""
    paths = find_runs(*runs)
    if asked.html is not None:
        from harness.analysis.capacity.serving_config import serving_configs
        from harness.analysis.summary import exit_code

        summaries = write_page_of(
            paths, asked.html, ratio=asked.ratio, slo=asked.slo, attain=asked.attain, min_requests=asked.min_requests
        )
        _write_junit(asked.junit, summaries)
        print(asked.html)
        return exit_code(summaries[0]) if len(summaries) == 1 else exit_of(serving_configs(summaries), summaries)
    if len(paths) > 1:
        return _report_several(paths, asked)
    if asked.variant is not None:
        return _report_variant(paths[0], asked.variant, asked.format_)
    return report_run(paths[0], asked, asked.slo, asked.min_requests)


def report_run(
    path: Path, shown: ReportOptions, slo: Mapping[str, float] | None, min_requests: int | None = None
) -> int:
    """Run directory -> report on stdout."""
    from harness.analysis.report.run import render_json, render_markdown, render_text
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import exit_code, summarise
    from harness.console import Console

    summary = summarise(read_run(path), slo=slo, ratio=shown.ratio, attain=shown.attain, min_requests=min_requests)
    _write_junit(shown.junit, [summary])
    whole = verbosity() is Verbosity.VERBOSE
    if shown.format_ == "text":
        render_text(summary, Console(highlight=False), whole)
    else:
        print(render_json(summary) if shown.format_ == "json" else render_markdown(summary, whole))
    return exit_code(summary)


def _write_junit(path: Path | None, summaries: Sequence[Summary]) -> None:
    if path is not None:
        from harness.analysis.report.junit import suite_of_run, write_junit

        write_junit(path, map(suite_of_run, summaries))


def _report_variant(path: Path, name: str, format_: str) -> int:
    """Run directory -> its figures as another tool defines them. They carry no verdict and no interval of ours."""
    from harness.analysis.compare.variants import variant_of
    from harness.analysis.report.figures import figure
    from harness.analysis.rows.read import read_run
    from harness.cli.documents import VariantReport

    found = variant_of(name, read_run(path))
    if format_ == "json":
        print_json(VariantReport(tool=name, metrics=found))
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


def write_page_of(runs: Sequence[Path], html: Path, **judge: Any) -> list[Summary]:
    """Write the page of these runs; their summaries."""
    from harness.analysis.labels import label_runs
    from harness.analysis.report.page import write_page
    from harness.analysis.report.view import view_run

    labels = iter(label_runs(runs))
    views = judged(runs, lambda run, found: view_run(run, found, next(labels)), **judge)
    say_page(html, write_page(html, views))
    return [view.summary for view in views]


def _report_several(paths: Sequence[Path], asked: RunsReport) -> int:
    from harness.analysis.capacity.serving_config import serving_configs
    from harness.analysis.report.capacity_text import capacity_sections, sentence
    from harness.analysis.report.document import Section
    from harness.cli.documents import RunsReport
    from harness.record.manifest import now_utc

    judge = {"slo": asked.slo, "attain": asked.attain, "min_requests": asked.min_requests}
    summaries = judged(paths, lambda _, found: found, **judge)
    _write_junit(asked.junit, summaries)
    found = serving_configs(summaries)
    left_out = {verdict: [s.run for s in summaries if s.verdict == verdict] for verdict in ("INVALID", "TOO SMALL")}
    sentences = [sentence(one) for one in found if one.loop != "closed"] or [sentence(one) for one in found]
    lines = sentences or ["No run is VALID, so there is no capacity and no cost."]
    sections = [Section(title="Capacity", lines=tuple(lines)), *capacity_sections(found)]
    sections += [
        Section(title=f"{verdict} and left out", notes=tuple(runs)) for verdict, runs in left_out.items() if runs
    ]
    document = RunsReport(
        made=now_utc(), sentences=sentences, systems=found, invalid=left_out["INVALID"],
        too_small=left_out["TOO SMALL"],
    )  # fmt: skip
    present(document, sections, asked.format_)
    return exit_of(found, summaries)


def exit_of(found: Sequence[ServingConfig], summaries: Sequence[Summary]) -> int:
    """Status of several runs together. A load beyond capacity misses the SLO: that alone is a result, not a failure."""
    if refused := refused_exit(s.verdict for s in summaries):
        return refused
    kept = [one.capacity is None or one.capacity.state in ("found", "beyond") for one in found]
    return EXIT_VALID if any(kept) else EXIT_SLO_MISSED


@command(
    epilog="""\b
Examples:
  harness export runs/20261121T234654Z-trace-smollm2-135m -o results.parquet
  harness export runs/*-sweep-* -o rows.csv
  OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 harness export runs/*-sweep-* --to otel
  MLFLOW_TRACKING_URI=http://mlflow:5000 harness export runs/*-sweep-* --to mlflow

One line a request, of all runs: run, model, tier, the row as it was written (times in ns, lists of gaps), and
ttft_s, tpot_s, e2e_s, lag_s. The ending of the file says the format: .parquet, .csv, .jsonl.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--output", type=NEW_FILE, help="File to write; an earlier one is replaced.")
@click.option(
    "--to", type=click.Choice(["otel", "mlflow"]),
    help="Instead of a file: spans of requests over OTLP (OTEL_EXPORTER_OTLP_ENDPOINT), or parameters, figures and the "
    "report to MLflow (MLFLOW_TRACKING_URI).",
)  # fmt: skip
def export(runs: Sequence[Path], output: Path | None, to: Literal["otel", "mlflow"] | None) -> int:
    """Write the rows of run directories into one file that DuckDB, Polars, pandas and spreadsheets read as it is, or
    send runs to another system.
    """
    if (output is None) == (to is None):
        raise UsageError("say where to: -o FILE, --to otel or --to mlflow")
    if output is None:
        return _send(runs, to)
    from harness.analysis.report.export import export_runs

    rows = export_runs(find_runs(*runs), output, say)
    say(f"{output}: {rows:,} rows, {output.stat().st_size / 1e6:.1f} MB")
    print(output)
    return EXIT_VALID


def _send(runs: Sequence[Path], to: Literal["otel", "mlflow"] | None) -> int:
    from harness.analysis.labels import label_runs
    from harness.analysis.report.mlflow import MlflowExporter
    from harness.analysis.report.otel import OtelExporter

    paths = find_runs(*runs)
    labels = iter(label_runs(paths))
    with MlflowExporter() if to == "mlflow" else OtelExporter() as there:
        counts = judged(paths, lambda run, summary: there.send(run, summary, next(labels)))
    if to == "mlflow":
        known = counts.count(0)
        say(f"{sum(counts)} runs sent" + (f", {known} were there already" if known else ""))
    else:
        say(f"{sum(counts):,} spans sent, of {len(counts)} runs")
    return EXIT_VALID


@command(
    epilog=f"""\b
Examples:
  harness compare runs/20261121T234654Z-h100 runs/20261121T235904Z-l40s
  harness compare 'runs/*-before' 'runs/*-after' --fail-if 'cost > +5%' --fail-if 'ttft_p99 > +20ms'
  harness compare sweeps/20261122T021500Z-ab

\b
Figures: cost, throughput, goodput, attainment, error_rate, ttft_p50 _p95 _p99, tpot_p50 ..., e2e_p50 ...
From three pairs of runs on (repeats of each, paired by seed) figures are judged; fewer are shown. Make the
pairs in turns, A B B A: a sweep file with A and B, order = "abba" and repeats = 3. Cost and throughput of an
open loop are the load's own and not judged: compare capacity (harness capacity, harness price) instead.
A condition fails only when the whole 95 % interval of the change lies beyond the bound. An interval on
both sides of it is undecided and does not fail: more repeats would decide.

{EXIT_STATUS}""",
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--fail-if", multiple=True, metavar="'FIGURE > +5%'", help="End with status 4 when B is that much worse; repeat."
)
@click.option("--junit", type=NEW_FILE, help="Write the conditions as JUnit XML for CI, too: a case for each.")
@takes(JudgeOptions)
@html_option("the comparison")
@format_option("text", "md", "json")
def compare(
    a: str, b: str | None, fail_if: Sequence[str], junit: Path | None, format_: str, html: Path | None,
    asked: JudgeOptions,
) -> int:  # fmt: skip
    """A against B, each a run directory, a folder of repeats or a quoted pattern; or A alone, a sweep of two systems.

    Same trace, load, seed, SLO and evidence, or there is no comparison. Tier, price, model, engine and its arguments
    may differ and are named. Requests are paired by id, repeats by seed.
    """
    from harness.analysis.compare import compare as paired
    from harness.analysis.compare.paired import observe
    from harness.analysis.report.decisions import comparison_sections

    gates = [paired.parse_gate(text) for text in fail_if]
    for text in filter(None, (a, b)):
        if (state := sweep_at(Path(text))) and state.spec.is_search:
            raise UsageError(
                f"{text}: a search for capacity chooses its own loads, so two of them have none in common; put them "
                "side by side with 'harness price A B', or compare two runs or sweeps of equal loads"
            )
    sides = sides_of_sweep(a) if b is None else (find_runs(a), find_runs(b))
    if {path.resolve() for path in sides[0]} & {path.resolve() for path in sides[1]}:
        raise UsageError(f"{a} and {b} share a run: a run is not compared with itself")
    side_a, side_b = (judged(side, observe, slo=asked.slo, attain=asked.attain) for side in sides)
    result = paired.compare(side_a, side_b, gates)
    if junit is not None:
        from harness.analysis.report.junit import suite_of_comparison, write_junit

        write_junit(junit, [suite_of_comparison(result)])
    present(result, comparison_sections(result), format_, html=html, verb="compare")
    if not result.comparable:
        both = refused_exit(one.summary.verdict for one in (*side_a, *side_b))
        return EXIT_NOT_DECIDED if both == EXIT_NOT_DECIDED else EXIT_FAILURE
    if result.failed:
        return EXIT_SLO_MISSED
    if result.unjudged:
        say(f"not judged: {'; '.join(result.unjudged)}")
        return EXIT_NOT_DECIDED
    return EXIT_VALID


@command(
    name="open",
    epilog="""\b
Examples:
  harness open runs
  harness open sweeps/azure --most 10""",
)
@click.argument("folder", metavar="RESULTS", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--most", type=COUNT, default=24, show_default=True, help="No more than so many runs, the newest.")
def open_(folder: Path, most: int) -> int:
    """Show a folder of runs in the browser: side by side in a table to sort and in pictures, and each by itself.

    They are one page that stands alone, in a file whose name is printed; 'harness report RUN... --html FILE' chooses
    the runs and the file. A run that cannot be read is named and left out.
    """
    import tempfile
    import webbrowser

    from harness.analysis.labels import label_runs
    from harness.analysis.report.page import write_page
    from harness.analysis.report.view import view_run
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import summarise
    from harness.record.manifest import MANIFEST

    found = sorted((file.parent for file in folder.rglob(MANIFEST)), key=lambda run: run.name, reverse=True)
    views = []
    for path, label in zip(found[:most], label_runs(found[:most]), strict=True):
        try:
            run = read_run(path)
            views.append(view_run(run, summarise(run), label))
        except Exception as e:  # the others can still be looked at
            say(str(e) if isinstance(e, HarnessError) else f"{path}: {sentence(e)}")
    if not views:
        raise ResultsError(f"{folder}: no run in it that can be read (a run holds {MANIFEST})")
    html = Path(tempfile.mkdtemp(prefix="harness-")) / "runs.html"
    say_page(html, write_page(html, views))
    webbrowser.open(html.as_uri())
    print(html)
    return EXIT_VALID
