"""The highest load that keeps an SLO, found by runs that are chosen one by one: capacity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import as_json, present, say
from harness.cli.select_runs import refused_exit
from harness.cli.verb import (
    ENVIRONMENT,
    EXIT_STATUS,
    ONE_TRACE_ARGUMENT,
    command,
    out_option,
    resume_option,
    takes,
)
from harness.errors import EXIT_FAILURE, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.option_types import options_of
from harness.options import AttainOption, LoadOptions, ReplayOptions, ReportOptions, SearchOptions

if TYPE_CHECKING:
    from harness.cli.runner.capacity import CapacityReport
    from harness.slo import Criterion
    from harness.sweep.spec import SweepSpec

DECIDED = frozenset({"rate", "speed", "concurrency", "stages", "duration_s", "limit", "repeat", "rescale", "grow",
                     "slo", "attain", "ratio", "format_", "junit"})  # fmt: skip
"""Options of replay that the search decides itself, or has of its own."""


@command(
    epilog=f"""\b
Examples:
  harness capacity trace.jsonl --slo ttft_p99=2s,tpot_p95=80ms --max-usd 5
  harness capacity trace.jsonl --slo ttft=2s,tpot=100ms --base-url http://10.0.0.5:8000/v1 --tier aws-g6.xlarge
  harness report sweeps/20261122T021500Z-capacity-trace --html report.html

{EXIT_STATUS}
{ENVIRONMENT}""",
)
@ONE_TRACE_ARGUMENT
@takes(
    ReplayOptions,
    options_of(
        LoadOptions,
        slo={
            "help": "The SLO: ttft_p99=2s,tpot_p95=80ms, or ttft=2s,tpot=100ms with --attain (also e2e, itl_max).",
            "required": True,
        },
    ),
    options_of(AttainOption),
    [option for option in options_of(ReplayOptions) if option.name not in DECIDED],
    options_of(ReportOptions, "format_"),
)
@takes(SearchOptions, to="search")
@resume_option("Go on with the search in FOLDER (default: the newest of TRACE): say the rest of the command again.")
@out_option("sweeps", "sweep folders")
def capacity(trace: Path, out: Path, resume: str | None, asked: ReplayOptions, search: SearchOptions) -> int:
    """Find the highest request rate at which the SLO is kept, and what a million tokens costs there.

    Servers are started once. A closed-loop ladder (1, 4, 16 ... in flight) finds the ceiling; then windows from all
    parts of TRACE, other ones in each probe, are replayed at one rate after the other, until the interval is narrow
    enough. A probe whose backlog only grows keeps no SLO. Every probe has prompts of its own, is printed with its
    verdict and cost, and is kept as a run in one sweep folder.
    """
    from harness.cli import sweep
    from harness.cli.runner.capacity import CapacitySession, in_loop
    from harness.sweep.spec import seeded
    from harness.sweep.state import ANSWER, lock, read_state
    from harness.trace.io import open_asked

    if str(trace) == "-":
        raise UsageError("a search reads its trace many times: name a file instead of standard input")
    spec = _spec(trace, search, asked)
    tiers = sweep.check(spec, in_loop(asked, closed=True))
    source = open_asked(trace, asked.plan)
    if not asked.plan.drawn and next(iter(source)).arrival_s is None:
        raise UsageError(
            f"{source.path}: the trace has no arrival times to rescale: say --arrivals poisson (or gamma, --burstiness)"
        )
    root, url = sweep.sweeps_root(out)
    name = f"capacity-{trace.name.split('.')[0]}"
    if resume is not None:
        folder = sweep.begun(resume, root, name)
        state = read_state(folder)
        if not state.spec.is_search:
            raise UsageError(f"{folder}: is a sweep, not a search for capacity: harness sweep --resume {folder}")
        sweep.take_over(state, seeded(spec, state.spec), folder)
        sweep.same_trace(state, source.sha256, source.path)
    else:
        state = sweep.new_state(name, trace, seeded(spec), search=True)
        sweep.same_trace(state, source.sha256, source.path)
        folder = sweep.new_folder(root, url, state)
    with lock(folder):
        say(f"sweep folder: {folder}")
        session = CapacitySession(folder, state, asked, source, tiers, search)
        try:
            session.run()
        except KeyboardInterrupt:
            say(f"go on with the same command and --resume {folder}")
            raise
        report = session.report()
        try:
            (folder / ANSWER).write_bytes(as_json(report))
            session.store.send(folder / ANSWER)
        except OSError as e:  # it can be made again from the runs
            say(f"{folder / ANSWER}: cannot write ({e.strerror})")
    _print(report, session.criteria, asked.report.format_)
    return _exit(report)


def _spec(trace: Path, search: SearchOptions, options: ReplayOptions) -> SweepSpec:
    import msgspec

    from harness.cluster.catalogue.models import DEFAULT_MODEL
    from harness.cluster.catalogue.tiers import DEFAULT_TIER
    from harness.sweep.spec import Loads, SweepSpec

    own = ("base_urls", "model", "tier", "replicas", "seed", "ratio", "format_", "live", "junit")
    asked = options.serve
    urls = list(asked.base_urls)
    model = asked.model or (None if urls else DEFAULT_MODEL)
    tier = asked.tier or (None if urls else DEFAULT_TIER)
    said = {name: value for name, value in options.by_name().items() if name not in own}
    said |= {"probe_s": search.probe_s, "tolerance": search.tolerance, "busiest": search.busiest, "search": "capacity"}
    return SweepSpec(
        trace=str(trace), loads=Loads(concurrency=[1]), models=[model] if model else [], tiers=[tier] if tier else [],
        base_url=urls or None, replicas=asked.replicas, seed=options.plan.seed, order="given",
        budget_usd=search.max_usd, budget_hours=search.max_hours,
        options=msgspec.json.decode(msgspec.json.encode(said, enc_hook=str)),  # as they come back from a file
    )  # fmt: skip


def _print(report: CapacityReport, criteria: Sequence[Criterion], format_: str) -> None:
    from harness.analysis.report.capacity_text import capacity_sections, probe_section
    from harness.analysis.report.document import Section

    cost = f", {report.usd:.4f} USD" if report.usd is not None else ""
    took = f"The search took {len(report.probes)} probes and {report.hours:.2f} h of servers{cost}."
    lines = (report.sentence, f"{took} It ended: {report.ended}.")
    sections = [
        Section(title="Capacity", lines=lines),
        probe_section(report.probes, criteria),
        *capacity_sections(report.systems),
    ]
    present(report, sections, format_)
    if format_ == "text":
        print(f"\nsweep folder: {report.folder}")


def _exit(report: CapacityReport) -> int:

    answer = next((one for one in report.systems if one.loop != "closed"), None)
    if answer is None or answer.capacity is None:
        return refused_exit(p.verdict for p in report.probes) or EXIT_FAILURE
    exits = {"found": EXIT_VALID, "beyond": EXIT_VALID, "not reached": EXIT_SLO_MISSED}
    return exits.get(answer.capacity.state, EXIT_FAILURE)
