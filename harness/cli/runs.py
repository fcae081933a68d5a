"""The same step by step: plan, serve, run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from harness.cli.options import (
    ACCESS_OPTIONS,
    EXIT_STATUS,
    JSON_OPTION,
    LOAD_OPTIONS,
    OUT_OPTION,
    PLAN_OPTIONS,
    REPORT_OPTIONS,
    SERVER_OPTIONS,
    TRACE_ARGUMENT,
    attain_needs_slo,
)
from harness.cli.output import print_json, say
from harness.cli.replay import run_and_report
from harness.cli.runner.steps import StopRequest, copy_plan, make_plan
from harness.cli.runner.targets import API_KEY, choose_target
from harness.cli.types import WARMUP
from harness.cli.verb import command
from harness.errors import EXIT_VALID, ServerError, UsageError
from harness.options import ReplayOptions, ServeOptions, taken
from harness.plan.file import read_plan_info
from harness.record.manifest import PLAN, create_run_dir
from harness.store.copies import local_copy, output_file, split_out
from harness.store.objects import as_url, is_url
from harness.trace.files import open_asked

ENDPOINT_OPTION = click.option(
    "--endpoint",
    type=click.Choice(["auto", "completions", "chat"]),
    default="auto",
    show_default=True,
    help="API to use. auto: chat when the plan has messages, else completions.",
)


@command(
    short_help="Turn a trace into a plan file: requests, prompts, times.",
    epilog="""\b
Examples:
  harness plan trace.jsonl --rate 8 -o plan.arrow
  harness plan trace.jsonl --concurrency 64 --model smollm2-135m -o plan.arrow
""",
)
@TRACE_ARGUMENT
@PLAN_OPTIONS
@click.option("--concurrency", type=click.IntRange(min=1), help="Plan a closed loop: trace order, no times.")
@click.option(
    "--base-url", "base_urls", multiple=True, metavar="URL", help="Learn ordinary token ids from this server."
)
@click.option("--model", metavar="NAME", help="Model whose tokenizer the prompts are made for.")
@ACCESS_OPTIONS
@click.option(
    "--tls-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Certificates to trust instead of the system's.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("plan.arrow"),
    show_default=True,
    help="The plan file; never overwritten.",
)
@JSON_OPTION
def plan(trace: tuple[Path, ...], output: Path, **asked: Any) -> int:
    """Turn a trace into a plan: every request, its prompt and its time, fixed in a file before anything is started."""
    options = ReplayOptions.of(asked)
    options.check_plan()
    source = open_asked(trace, options.plan)
    with output_file(output) as path:
        info = make_plan(source, path, choose_target(options), options)
    if options.report.format_ == "json":
        print_json(info)
    else:
        print(as_url(output) if is_url(output) else output)
    return EXIT_VALID


@command(short_help="Start servers and keep them until Ctrl-C.")
@SERVER_OPTIONS
@OUT_OPTION
def serve(out: Path, **asked: Any) -> int:
    """Start servers and keep them until Ctrl-C.

    Prints one base URL per replica on stdout. The API key is HARNESS_API_KEY if that is set, else a new one, written to
    a file only you can read.
    """
    given = taken(ServeOptions, asked)
    if given.base_urls:
        raise UsageError("harness serve starts servers: it takes no --base-url")
    wanted = ReplayOptions(serve=given)
    wanted.check()
    target = choose_target(wanted)
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
    short_help="Send a plan and report.",
    epilog=f"""\b
Examples:
  harness run plan.arrow --base-url http://127.0.0.1:8000/v1
  harness run plan.arrow --concurrency 64

{EXIT_STATUS}""",
)
@click.argument("plan", type=click.Path(path_type=Path))
@SERVER_OPTIONS
@LOAD_OPTIONS
@ENDPOINT_OPTION
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="Model folder, or its tokenizer.json, to count a sample of the answers with. Default: the model's own.",
)
@click.option(
    "--warmup",
    type=WARMUP,
    metavar="TIME",
    help="Closed loop: keep requests of the first TIME out of every figure. (Otherwise it is part of the plan.)",
)
@REPORT_OPTIONS
@OUT_OPTION
@attain_needs_slo
def run(plan: Path, out: Path, **asked: Any) -> int:
    """Send a plan and report; starts the servers first unless --base-url is given."""
    options = ReplayOptions.of(asked)
    plan = local_copy(plan, say)
    info = read_plan_info(plan)
    options.check_run(plan, planned_closed=info.arrivals == "closed")
    target = choose_target(options)
    root, url = split_out(out)
    run_dir = create_run_dir(root, f"{plan.stem}-{options.serve.label or target.label}")
    say(f"run directory: {run_dir.path}")
    copy_plan(plan, run_dir.path / PLAN)
    return run_and_report(run_dir, target, options, url)
