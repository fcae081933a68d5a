"""Run directories: verdict and price (report), rows (export), A against B (compare), a folder as pages (open)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

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
    UsageError,
    sentence,
)
from harness.option_types import COUNT, NEW_FILE, PATH, opt
from harness.options import JudgeOptions, ReportOptions
from harness.terminal import Verbosity, verbosity

if TYPE_CHECKING:
    from analysis.capacity.serving_config import ServingConfig
    from analysis.report.browse import Results
    from analysis.summary import Summary


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
        from analysis.capacity.serving_config import serving_configs
        from analysis.summary import exit_code

        summaries = write_page_of(
            paths, asked.html, ratio=asked.ratio, slo=asked.slo, attain=asked.attain, min_requests=asked.min_requests
        )
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
    from analysis.report.run import render_json, render_markdown, render_text
    from analysis.rows.read import read_run
    from analysis.summary import exit_code, summarise
    from harness.console import Console

    summary = summarise(read_run(path), slo=slo, ratio=shown.ratio, attain=shown.attain, min_requests=min_requests)
    whole = verbosity() is Verbosity.VERBOSE
    if shown.format_ == "text":
        render_text(summary, Console(highlight=False), whole)
    else:
        print(render_json(summary) if shown.format_ == "json" else render_markdown(summary, whole))
    return exit_code(summary)


def _report_variant(path: Path, name: str, format_: str) -> int:
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


def write_page_of(runs: Sequence[Path], html: Path, **judge: Any) -> list[Summary]:
    """Write the page of these runs; their summaries."""
    from analysis.labels import label_runs
    from analysis.report.page import write_page
    from analysis.report.view import view_run

    labels = iter(label_runs(runs))
    views = judged(runs, lambda run, found: view_run(run, found, next(labels)), **judge)
    say_page(html, write_page(html, views))
    return [view.summary for view in views]


def _report_several(paths: Sequence[Path], asked: RunsReport) -> int:
    from analysis.capacity.serving_config import SCHEMA, serving_configs
    from analysis.report.capacity_text import capacity_sections, sentence
    from analysis.report.document import Section
    from harness.record.manifest import now_utc

    judge = {"slo": asked.slo, "attain": asked.attain, "min_requests": asked.min_requests}
    summaries = judged(paths, lambda _, found: found, **judge)
    found = serving_configs(summaries)
    left_out = {verdict: [s.run for s in summaries if s.verdict == verdict] for verdict in ("INVALID", "TOO SMALL")}
    sentences = [sentence(one) for one in found if one.loop != "closed"] or [sentence(one) for one in found]
    lines = sentences or ["No run is VALID, so there is no capacity and no cost."]
    sections = [Section(title="Capacity", lines=tuple(lines)), *capacity_sections(found)]
    sections += [
        Section(title=f"{verdict} and left out", notes=tuple(runs)) for verdict, runs in left_out.items() if runs
    ]
    document = {"schema": SCHEMA, "made": now_utc(), "sentences": sentences, "systems": found,
                "invalid": left_out["INVALID"], "too_small": left_out["TOO SMALL"]}  # fmt: skip
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

One line a request, of all runs: run, model, tier, the row as it was written (times in ns, lists of gaps), and
ttft_s, tpot_s, e2e_s, lag_s. The ending of the file says the format: .parquet, .csv, .jsonl.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--output", required=True, type=NEW_FILE, help="File to write; an earlier one is replaced.")
def export(runs: Sequence[Path], output: Path) -> int:
    """Write the rows of run directories into one file that DuckDB, Polars, pandas and spreadsheets read as it is."""
    from analysis.report.export import export_runs

    rows = export_runs(find_runs(*runs), output, say)
    say(f"{output}: {rows:,} rows, {output.stat().st_size / 1e6:.1f} MB")
    print(output)
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
@takes(JudgeOptions)
@html_option("the comparison")
@format_option("text", "md", "json")
def compare(a: str, b: str | None, fail_if: Sequence[str], format_: str, html: Path | None, asked: JudgeOptions) -> int:
    """A against B, each a run directory, a folder of repeats or a quoted pattern; or A alone, a sweep of two systems.

    Same trace, load, seed, SLO and evidence, or there is no comparison. Tier, price, model, engine and its arguments
    may differ and are named. Requests are paired by id, repeats by seed.
    """
    from analysis.compare import compare as paired
    from analysis.compare.paired import observe
    from analysis.report.decisions import comparison_sections

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
  harness open sweeps/azure --port 8200

Only this machine can reach it (127.0.0.1), nothing is written, and Ctrl-C ends it. From another machine:
  ssh -L 8200:127.0.0.1:8200 HOST harness open runs --port 8200""",
)
@click.argument("folder", metavar="RESULTS", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (default: one that is free).")
def open_(folder: Path, port: int) -> int:
    """Serve a folder of runs as pages: a list to sort, a page for each run, several runs side by side."""
    with serve(folder, port) as server:
        print(server.url, flush=True)
        say(f"{folder}: open {server.url} in a browser on this machine; Ctrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("closed")
    return EXIT_VALID


ADDRESS = "127.0.0.1"
ANSWER_WITHIN_S = 30.0
"""A browser that says nothing for so long is hung up on."""
FIRST_LOOK_S = 2.0
"""The list waits so long for figures, so that a small folder is complete at once."""


def serve(folder: Path, port: int = 0) -> ResultsServer:
    """A server of the pages of ``folder`` on the loopback address, listening; port 0: one that is free.

    Raises `ResultsError` when it is not a folder, `UsageError` when the port cannot be had.
    """
    from analysis.report.browse import Results

    results = Results(folder)
    try:
        return ResultsServer(results, port)
    except OSError as e:
        raise UsageError(f"port {port}: {e.strerror}; give another --port, or none for one that is free") from e


class ResultsServer(ThreadingHTTPServer):
    """Serves pages; whoever looks at the list has the runs analysed in the background, newest first."""

    daemon_threads = True

    def __init__(self, results: Results, port: int) -> None:
        self.results, self._closing = results, False
        self._analysing = threading.Thread()
        super().__init__((ADDRESS, port), Handler)
        self.port = int(self.server_address[1])
        self.url = f"http://{ADDRESS}:{self.port}/"

    def list_page(self) -> str:
        """The list of runs, with the figures that are known within `FIRST_LOOK_S`."""
        if not self._analysing.is_alive():
            self._analysing = threading.Thread(target=self._analyse, daemon=True)
            self._analysing.start()
        self._analysing.join(FIRST_LOOK_S)
        return self.results.list_page()

    def server_close(self) -> None:
        """Stop listening, and do not begin another run."""
        self._closing = True
        super().server_close()

    def _analyse(self) -> None:
        for key in self.results.waiting():
            with suppress(HarnessError):  # the list says what is wrong with it
                if not self._closing:
                    self.results.view(key)


class Handler(BaseHTTPRequestHandler):
    """GET of the list, a run, a comparison. Nothing is written, and no path is built from what was asked for."""

    server: ResultsServer
    timeout = ANSWER_WITHIN_S
    server_version = "harness"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with a page."""
        from analysis.report.browse import problem_page

        # A name that an attacker points at this address arrives with that name here: DNS rebinding ends at this line.
        if self.headers.get("Host") not in (f"{ADDRESS}:{self.server.port}", f"localhost:{self.server.port}"):
            self._answer(421, problem_page("Wrong address", f"This is {self.server.url} and answers to no other name."))
            return
        try:
            page = self._page()
            self._answer(200 if page else 404, page or problem_page("Not found", "There is no such page."))
        except UsageError as e:
            self._answer(400, problem_page("Not like this", str(e)))
        except HarnessError as e:
            self._answer(404, problem_page("Not readable", str(e)))
        except Exception as e:  # the others can still be looked at
            self._answer(500, problem_page("Not readable", sentence(e)))

    def _page(self) -> str | None:
        asked, results = urlsplit(self.path), self.server.results
        if asked.path == "/":
            return self.server.list_page()
        if asked.path == "/compare":
            return results.compare_page(parse_qs(asked.query).get("run", []))
        if asked.path.startswith("/run/"):
            return results.run_page(unquote(asked.path.removeprefix("/run/"), errors="surrogateescape"))
        return None

    def _answer(self, status: int, page: str) -> None:
        body = page.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body))),
            # what else a page may do stands in the page itself (analysis/report/page.py); these a page cannot say
            ("Content-Security-Policy", "frame-ancestors 'none'"), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        """Say nothing: the terminal belongs to whoever typed the command."""
