"""The verbs that make and send a plan: replay, plan, serve, run, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import (
    ACCESS_OPTIONS,
    ENVIRONMENT,
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
from harness.cli.types import WARMUP
from harness.cli.verb import command
from harness.errors import UsageError
from harness.options import ReplayOptions, ServeOptions, taken

ENDPOINT_OPTION = click.option(
    "--endpoint",
    type=click.Choice(["auto", "completions", "chat"]),
    default="auto",
    show_default=True,
    help="API to use. auto: chat when the plan has messages, else completions.",
)


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
def replay(trace: tuple[Path, ...], out: Path, **options: Any) -> int:
    """Plan, serve, run and report in one go.

    TRACE is a production trace in any format that 'harness trace inspect' names, plain or compressed, also several
    files, a folder, - (stdin) and s3://bucket/key; scenarios/traces/README.md has the fields. Without --base-url a
    vLLM server is started on the default tier (this machine's CPU) with a small model, and ended afterwards.

    Requests go out at the trace's own times (open loop) unless --concurrency is given (closed loop). Latency counts
    from the planned time, so a late client or a full queue shows.
    """
    from harness.commands import flow

    return flow.replay(trace, out, ReplayOptions.of(options))


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
def plan(trace: tuple[Path, ...], output: Path, **options: Any) -> int:
    """Turn a trace into a plan: every request, its prompt and its time, fixed in a file before anything is started."""
    from harness.commands import flow

    return flow.plan(trace, output, ReplayOptions.of(options))


@command(short_help="Start servers and keep them until Ctrl-C.")
@SERVER_OPTIONS
@OUT_OPTION
def serve(out: Path, **options: Any) -> int:
    """Start servers and keep them until Ctrl-C.

    Prints one base URL per replica on stdout. The API key is HARNESS_API_KEY if that is set, else a new one, written to
    a file only you can read.
    """
    from harness.commands import flow

    asked = taken(ServeOptions, options)
    if asked.base_urls:
        raise UsageError("harness serve starts servers: it takes no --base-url")
    return flow.serve(out, asked)


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
def run(plan: Path, out: Path, **options: Any) -> int:
    """Send a plan and report; starts the servers first unless --base-url is given."""
    from harness.commands import flow

    return flow.run(plan, out, ReplayOptions.of(options))


@command(short_help="Measure what the load generator can carry on this machine.")
@JSON_OPTION
def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, in under a minute.

    Drives a server whose timing is exactly known: requests and streamed events a second, how late requests are sent,
    and how far TTFT and ITL are from the truth at half of the ceiling. The result is kept in the cache; runs are then
    given as many load workers as their plan needs, and a plan that this machine cannot carry is said before it starts.
    """
    from harness.commands import proof

    return proof.calibrate(format_)
