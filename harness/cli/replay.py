"""Trace -> plan -> servers -> load -> rows -> report: replay does it in one go, plan, serve and run step by step."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import print_json, say
from harness.cli.verb import (
    ENVIRONMENT,
    EXIT_STATUS,
    JSON_OPTION,
    TRACE_ARGUMENT,
    command,
    out_option,
    takes,
)
from harness.errors import EXIT_VALID, ServerError, UsageError
from harness.option_types import NEW_FILE, PATH, options_of
from harness.options import AccessOptions, LoadOptions, PlanOptions, ReplayOptions, ReportOptions, ServeOptions

if TYPE_CHECKING:
    from harness.cli.runner.targets import Target
    from harness.record.manifest import RunDir

OUT_OPTION = out_option("runs", "run directories")


@command(
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
@takes(ReplayOptions)
@OUT_OPTION
def replay(trace: tuple[Path, ...], out: Path, asked: ReplayOptions) -> int:
    """Plan, serve, run and report in one go.

    TRACE is a production trace in any format that 'harness trace inspect' names, plain or compressed, also several
    files, a folder, - (stdin), s3://bucket/key and hf://datasets/ORG/NAME:SPLIT; scenarios/traces/README.md has the
    fields. Without --base-url a vLLM server is started on the default tier (this machine's CPU) with a small model, and
    ended afterwards.

    Requests go out at the trace's own times (open loop) unless --concurrency is given (closed loop). Latency counts
    from the planned time, so a late client or a full queue shows.
    """
    from harness.cli.runner.steps import make_plan
    from harness.cli.runner.targets import choose_target
    from harness.trace.io import open_asked

    asked.check()
    source = open_asked(trace, asked.plan)
    target = choose_target(asked)
    run, url = _new_run(out, source.path.name.split(".")[0], target, asked)
    try:
        make_plan(source, run.plan, target, asked)
    except BaseException:
        with suppress(OSError):
            run.path.rmdir()  # nothing is in it: no run was begun
        raise
    return _run_and_report(run, target, asked, url)


@command(
    epilog="""\b
Examples:
  harness plan trace.jsonl --rate 8 -o plan.arrow
  harness plan trace.jsonl --concurrency 64 --model smollm2-135m -o plan.arrow
""",
)
@TRACE_ARGUMENT
@takes(
    ReplayOptions,
    options_of(PlanOptions),
    options_of(LoadOptions, concurrency="Plan a closed loop: trace order, no times."),
    options_of(
        ServeOptions,
        base_urls="Learn ordinary token ids from this server.",
        model="Model whose tokenizer the prompts are made for.",
    ),
    options_of(AccessOptions),
)
@click.option(
    "-o", "--output", type=NEW_FILE, default=Path("plan.arrow"), show_default=True,
    help="The plan file; never overwritten.",
)  # fmt: skip
@JSON_OPTION
def plan(trace: tuple[Path, ...], output: Path, format_: str, asked: ReplayOptions) -> int:
    """Turn a trace into a plan: every request, its prompt and its time, fixed in a file before anything is started."""
    from harness.cli.runner.steps import make_plan
    from harness.cli.runner.targets import choose_target
    from harness.store.copies import output_file
    from harness.store.objects import as_url, is_url
    from harness.trace.io import open_asked

    asked.check_plan()
    source = open_asked(trace, asked.plan)
    with output_file(output) as path:
        info = make_plan(source, path, choose_target(asked, start=False), asked)
    if format_ == "json":
        from harness.cli.documents import numbered

        print_json(numbered("harness.plan/2", info))
    else:
        print(as_url(output) if is_url(output) else output)
    return EXIT_VALID


@command()
@takes(ReplayOptions, options_of(ServeOptions))
@OUT_OPTION
def serve(out: Path, asked: ReplayOptions) -> int:
    """Start servers and keep them until Ctrl-C.

    Prints one base URL per replica on stdout. The API key is HARNESS_API_KEY if that is set, else a new one, written to
    a file only you can read.
    """
    from harness.cli.runner.steps import StopRequest
    from harness.cli.runner.targets import API_KEY, choose_target
    from harness.record.manifest import create_run_dir

    if asked.serve.base_urls:
        raise UsageError("harness serve starts servers: it takes no --base-url")
    asked.check()
    target = choose_target(asked)
    run_dir = create_run_dir(out, f"serve-{target.label}")
    stop = StopRequest()
    with target.open(run_dir) as servers, stop:
        if os.environ.get(API_KEY):
            say(f"API key: as in {API_KEY}")
        elif servers.api_key:
            key_file = run_dir.path / "api-key"
            key_file.touch(mode=0o600)
            key_file.write_text(servers.api_key)
            say(f"API key: export {API_KEY}=$(cat {key_file})")
        say(f"model {servers.model}; logs in {run_dir.path}; Ctrl-C ends the servers")
        for url in servers.base_urls:
            print(url, flush=True)
        while not stop.asked:
            time.sleep(0.5)
            for index, how in servers.check().items():
                log = Path(servers.replicas[index].log or "")
                raise ServerError(f"replica {index} is gone: {how}; see {log}")
    say("servers ended")
    return EXIT_VALID


@command(
    epilog=f"""\b
Examples:
  harness run plan.arrow --base-url http://127.0.0.1:8000/v1
  harness run plan.arrow --concurrency 64

{EXIT_STATUS}""",
)
@click.argument("plan", type=PATH)
@takes(
    ReplayOptions,
    options_of(ServeOptions),
    options_of(LoadOptions),
    options_of(
        PlanOptions,
        endpoint="API to use. auto: chat when the plan has messages, else completions.",
        tokenizer="Model folder, or its tokenizer.json, to count a sample of answers with. Default: the model's own.",
        warmup={
            "help": "Closed loop: keep requests of the first TIME out of every figure. (Otherwise it is part of the "
            "plan.)",
            "metavar": "TIME",
        },
    ),
    options_of(ReportOptions),
)
@OUT_OPTION
def run(plan: Path, out: Path, asked: ReplayOptions) -> int:
    """Send a plan and report; starts the servers first unless --base-url is given."""
    from harness.cli.runner.steps import copy_plan
    from harness.cli.runner.targets import choose_target
    from harness.plan.file import NO_PROMPTS, read_plan_info
    from harness.record.manifest import PLAN
    from harness.store.copies import local_copy

    plan = local_copy(plan, say)
    info = read_plan_info(plan)
    if info.tokenizer == NO_PROMPTS:
        raise UsageError(f"{plan}: made to be simulated, without prompts: plan the trace anew with harness plan")
    asked.check_run(plan, planned_closed=info.arrivals == "closed")
    target = choose_target(asked)
    run_dir, url = _new_run(out, plan.stem, target, asked)
    copy_plan(plan, run_dir.path / PLAN)
    return _run_and_report(run_dir, target, asked, url)


def _new_run(out: Path, name: str, target: Target, asked: ReplayOptions) -> tuple[RunDir, str | None]:
    """A new run directory, and where on S3 it is to be followed."""
    from harness.record.manifest import create_run_dir
    from harness.store.copies import split_out

    root, url = split_out(out)
    run = create_run_dir(root, f"{name}-{asked.serve.label or target.label}")
    say(f"run directory: {run.path}")
    return run, url


def _run_and_report(run: RunDir, target: Target, asked: ReplayOptions, url: str | None) -> int:
    from harness.cli.results import report_run
    from harness.cli.runner.live import live_page
    from harness.cli.runner.steps import execute_point
    from harness.store.follow import mirrored

    live_page(asked.load.live)
    with mirrored(url, run.path, say), target.open(run) as servers:
        execute_point(run, servers, asked)
    return report_run(run.path, asked.report, asked.load.slo)
