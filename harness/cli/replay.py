"""Trace -> plan -> servers -> load -> rows -> report, in one go: replay."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.cli.options import (
    ENVIRONMENT,
    EXIT_STATUS,
    LOAD_OPTIONS,
    OUT_OPTION,
    PLAN_OPTIONS,
    REPORT_OPTIONS,
    SERVER_OPTIONS,
    TRACE_ARGUMENT,
    attain_needs_slo,
)
from harness.cli.output import say
from harness.cli.report import report_runs
from harness.cli.runner.steps import execute, make_plan
from harness.cli.runner.targets import Target, choose_target
from harness.cli.verb import command
from harness.options import ReplayOptions
from harness.record.manifest import RunDir, create_run_dir
from harness.store.copies import split_out
from harness.store.follow import mirrored
from harness.trace.files import open_asked


@command(
    short_help="Plan, serve, run and report in one go.",
    epilog=f"""\b
Examples:
  harness replay trace.jsonl
  harness replay AzureLLMInferenceTrace_conv.csv --limit 60 --concurrency 8
  harness replay trace.jsonl --rate 8 --duration 5m --slo ttft=2s,tpot=100ms
  harness replay trace.jsonl --stages 2m@4,2m@4..8,5m@8 --repeat --warmup 1m
  harness replay trace.jsonl --base-url http://10.0.0.5:8000/v1 --model mistral-7b

{EXIT_STATUS}
{ENVIRONMENT}""",
)
@TRACE_ARGUMENT
@PLAN_OPTIONS
@SERVER_OPTIONS
@LOAD_OPTIONS
@REPORT_OPTIONS
@OUT_OPTION
@attain_needs_slo
def replay(trace: tuple[Path, ...], out: Path, **asked: Any) -> int:
    """Plan, serve, run and report in one go.

    TRACE is a production trace in any format that 'harness trace inspect' names, plain or compressed, also several
    files, a folder, - (stdin) and s3://bucket/key; scenarios/traces/README.md has the fields. Without --base-url a
    vLLM server is started on the default tier (this machine's CPU) with a small model, and ended afterwards.

    Requests go out at the trace's own times (open loop) unless --concurrency is given (closed loop). Latency counts
    from the planned time, so a late client or a full queue shows.
    """
    options = ReplayOptions.of(asked)
    options.check()
    source = open_asked(trace, options.plan)
    target = choose_target(options)
    root, url = split_out(out)
    run = create_run_dir(root, f"{source.path.name.split('.')[0]}-{options.serve.label or target.label}")
    say(f"run directory: {run.path}")
    try:
        make_plan(source, run.plan, target, options)
    except BaseException:
        with suppress(OSError):
            run.path.rmdir()  # nothing is in it: no run was begun
        raise
    return run_and_report(run, target, options, url)


def run_and_report(run: RunDir, target: Target, options: ReplayOptions, url: str | None) -> int:
    """Send the plan of ``run`` to ``target``, write the record (also to ``url``), print the report."""
    with mirrored(url, run.path, say):
        execute(run, target, options)
    slo, shown = options.load.slo, options.report
    return report_runs([run.path], shown.format_, None if slo is None else dict(slo), shown.attain, shown.ratio)
