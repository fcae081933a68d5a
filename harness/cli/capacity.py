"""The highest load that keeps an SLO, found by runs that are chosen one by one: capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from harness.cli.options import (
    ATTAIN_OPTION,
    ENVIRONMENT,
    ONE_TRACE_ARGUMENT,
    SWEEPS_OPTION,
    format_option,
    html_option,
    resume_option,
)
from harness.cli.output import print_json, print_sections, say
from harness.cli.replay import replay
from harness.cli.report import page_of
from harness.cli.runner.capacity import CapacityReport, CapacitySession, Search
from harness.cli.runner.windows import in_loop
from harness.cli.select_runs import expand, refused_exit
from harness.cli.sweep import LOCAL_SWEEPS, begun, check
from harness.cli.types import DURATION, POSITIVE, SHARE, SLO
from harness.cli.verb import command
from harness.errors import EXIT_FAILURE, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.options import PlanOptions, ReplayOptions
from harness.record.manifest import now_utc
from harness.slo import criteria
from harness.store.objects import as_url, is_url
from harness.sweep.spec import Loads, SweepSpec, pairs, seeded
from harness.sweep.state import ANSWER as FILE
from harness.sweep.state import SweepState, create_folder, differences, lock, read_state
from harness.trace.files import open_asked
from harness.trace.io import Trace

NEWEST = ""
"""--resume without a folder."""

DECIDED = frozenset({"rate", "speed", "concurrency", "stages", "duration_s", "limit", "repeat", "rescale", "grow",
                     "slo", "attain", "ratio", "format_", "out"})  # fmt: skip
"""Options of replay that the search decides itself, or has of its own."""


def replay_options() -> list[click.Option]:
    """The options of ``harness replay`` that a search takes as they are."""
    return [p for p in replay.params if isinstance(p, click.Option) and p.name not in DECIDED]


@command(
    short_help="Find the highest load that keeps an SLO, in few runs.",
    epilog=f"""\b
Examples:
  harness capacity trace.jsonl --slo ttft_p99=2s,tpot_p95=80ms --max-usd 5
  harness capacity trace.jsonl --slo ttft=2s,tpot=100ms --base-url http://10.0.0.5:8000/v1 --tier aws-g6.xlarge
  harness report sweeps/20261122T021500Z-capacity-trace --html report.html

\b
Exit status:
  0  capacity was found, or lies beyond what could be sent
  1  something failed; the message says what
  2  the command line is wrong
  3  no run was VALID
  5  no run was VALID or INVALID: all were TOO SMALL
  4  not even the lowest load keeps the SLO
  130  stopped by Ctrl-C; --resume goes on
{ENVIRONMENT}""",
)
@ONE_TRACE_ARGUMENT
@click.option(
    "--slo",
    type=SLO,
    required=True,
    metavar="KEY=TIME,...",
    help="The SLO: ttft_p99=2s,tpot_p95=80ms, or ttft=2s,tpot=100ms with --attain (also e2e, itl_max).",
)
@ATTAIN_OPTION
@click.option("--max-usd", type=POSITIVE, help="Stop when this much is spent on servers, their start among it.")
@click.option("--max-hours", type=POSITIVE, help="Stop when servers were up for this long.")
@click.option(
    "--probe",
    "probe_s",
    type=DURATION,
    default=60.0,
    show_default="60s",
    help="Length of a probe; longer by itself where it would send too few requests.",
)
@click.option(
    "--tolerance",
    type=SHARE,
    default="10%",
    show_default=True,
    help="Stop when the 95 % interval reaches this far to either side of capacity.",
)
@click.option("--busiest", is_flag=True, help="Probe the busiest stretch of TRACE instead of all its parts.")
@resume_option(
    "Go on with the search in FOLDER (default: the newest of TRACE): say the rest of the command again.", NEWEST
)
@SWEEPS_OPTION
@html_option("the probes, compared,")
@format_option("text", "md", "json")
def capacity(
    trace: Path, out: Path, max_usd: float | None, max_hours: float | None, probe_s: float, tolerance: float,
    busiest: bool, resume: str | None, html: Path | None, **asked: Any,
) -> int:  # fmt: skip
    """Find the highest request rate at which the SLO is kept, and what a million tokens costs there.

    Servers are started once. A closed-loop ladder (1, 4, 16 ... in flight) finds the ceiling; then windows from all
    parts of TRACE, other ones in each probe, are replayed at one rate after the other, until the interval is narrow
    enough. A probe whose backlog only grows keeps no SLO. Every probe has prompts of its own, is printed with its
    verdict and cost, and is kept as a run in one sweep folder.
    """
    if str(trace) == "-":
        raise UsageError("a search reads its trace many times: name a file instead of standard input")
    options = ReplayOptions.of(asked)
    slo, attain = dict(options.load.slo or {}), options.report.attain
    ask = Search(criteria=tuple(criteria(slo, attain)), probe_s=probe_s, tolerance=tolerance, busiest=busiest)
    spec = _spec(trace, ask, max_usd, max_hours, options)
    tiers = check(spec, in_loop(options, closed=True))
    source = open_asked(trace, options.plan)
    _check_times(source, options.plan)
    root, url = (LOCAL_SWEEPS, as_url(out)) if is_url(out) else (out, None)
    if resume is not None:
        folder = begun(Path(resume) if resume else None, root, _name(trace))
        state = _take_over(folder, spec, source)
    else:
        spec = seeded(spec)
        state = SweepState(
            name=_name(trace), created=now_utc(), file=str(trace), spec=spec, trace_sha256=source.sha256,
            pairs=pairs(spec), points=[],
        )  # fmt: skip
        folder = create_folder(root, state)
        state.store_url = f"{url}/{folder.name}" if url else None
    with lock(folder):
        say(f"sweep folder: {folder}")
        session = CapacitySession(folder, state, options, source, tiers, ask)
        try:
            session.run()
        except KeyboardInterrupt:
            say(f"go on with the same command and --resume {folder}")
            raise
        report = session.report()
        try:
            (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
            session.send(folder / FILE)
        except OSError as e:  # it can be made again from the runs
            say(f"{folder / FILE}: cannot write ({e.strerror})")
    _print(report, ask, options.report.format_)
    if html is not None and report.probes:
        page_of(expand([folder]), html, slo=slo, attain=attain, min_requests=options.load.min_requests)
    return _exit(report)


capacity.params[1:1] = [p for p in replay_options() if p.name not in {q.name for q in capacity.params}]


def _check_times(trace: Trace, asked: PlanOptions) -> None:
    """Refuse before anything is rented a trace that cannot be replayed in an open loop."""
    if not asked.drawn and next(iter(trace)).arrival_s is None:
        raise UsageError(
            f"{trace.path}: the trace has no arrival times to rescale: say --arrivals poisson (or gamma, --burstiness)"
        )


def _spec(
    trace: Path, ask: Search, max_usd: float | None, max_hours: float | None, options: ReplayOptions
) -> SweepSpec:
    from cluster.catalogue.models import DEFAULT_MODEL
    from cluster.catalogue.tiers import DEFAULT_TIER

    own = ("base_urls", "model", "tier", "replicas", "seed", "ratio", "format_")
    asked = options.serve
    urls = list(asked.base_urls)
    model = asked.model or (None if urls else DEFAULT_MODEL)
    tier = asked.tier or (None if urls else DEFAULT_TIER)
    plain = {name: _plain(value) for name, value in options.by_name().items() if name not in own}
    return SweepSpec(
        trace=str(trace), loads=Loads(concurrency=[1]), models=[model] if model else [], tiers=[tier] if tier else [],
        base_url=urls or None, replicas=asked.replicas or 1, seed=options.plan.seed, order="given",
        budget_usd=max_usd, budget_hours=max_hours,
        options={
            **plain, "probe_s": ask.probe_s, "tolerance": ask.tolerance, "busiest": ask.busiest, "search": "capacity",
        },
    )  # fmt: skip


def _plain(value: object) -> object:
    """An option as it comes back from a JSON file."""
    return msgspec.json.decode(msgspec.json.encode(value, enc_hook=str), type=object)


def _name(trace: Path) -> str:
    return f"capacity-{trace.name.split('.')[0]}"


def _take_over(folder: Path, spec: SweepSpec, trace: Trace) -> SweepState:
    """Go on with the search in ``folder``. Raises `UsageError` when it was asked something else."""
    state = read_state(folder)
    if not state.spec.is_search:
        raise UsageError(f"{folder}: is a sweep, not a search for capacity: harness sweep --resume {folder}")
    spec = seeded(spec, state.spec)
    if changed := differences(state.spec, spec):
        raise UsageError(
            f"{folder}: was asked something else:\n  " + "\n  ".join(changed)
            + "\nask the same again (--max-usd and --max-hours may change), or begin anew without --resume"
        )  # fmt: skip
    if trace.sha256 != state.trace_sha256:
        raise UsageError(f"{trace.path}: is not the trace this search began with: put that one back, or begin anew")
    state.spec = spec
    return state


def _print(report: CapacityReport, ask: Search, format_: str) -> None:
    from analysis.report.capacity_text import capacity_sections, probe_section
    from analysis.report.document import Section

    if format_ == "json":
        print_json(report)
        return
    cost = f", {report.usd:.4f} USD" if report.usd is not None else ""
    took = f"The search took {len(report.probes)} probes and {report.hours:.2f} h of servers{cost}."
    lines = (report.sentence, f"{took} It ended: {report.ended}.")
    sections = [
        Section(title="Capacity", lines=lines),
        probe_section(report.probes, ask.criteria),
        *capacity_sections(report.systems),
    ]
    print_sections(sections, format_)
    if format_ != "md":
        print(f"\nsweep folder: {report.folder}")


def _exit(report: CapacityReport) -> int:
    answer = next((one for one in report.systems if one.loop != "closed"), None)
    if answer is None or answer.capacity is None:
        return refused_exit(p.verdict for p in report.probes) or EXIT_FAILURE
    return {"found": EXIT_VALID, "beyond": EXIT_VALID, "not reached": EXIT_SLO_MISSED}.get(
        answer.capacity.state, EXIT_FAILURE
    )
