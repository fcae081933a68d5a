"""The verbs: options, help and exit codes. What a verb does is in `harness.commands`, imported when the verb runs."""

from __future__ import annotations

import difflib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from harness import __version__
from harness.cli_trace import trace
from harness.errors import EXIT_VALID, HarnessError, UsageError

EXIT_STATUS = """\b
Exit status:
  0  the run is VALID (and met its SLO, when one was given)
  1  something failed; the message says what, where and what to do
  2  the command line is wrong
  3  the run is INVALID: its figures prove nothing and have no price
  4  the run is VALID and missed its SLO
"""

ENVIRONMENT = """\b
Environment:
  HARNESS_API_KEY  the servers' API key; never given on a command line, never written down
  HARNESS_CACHE    where model weights are kept (default: ~/.cache/harness)
  HARNESS_TIERS    your own tiers file, added to the shipped one
  RAY_ADDRESS      use this Ray cluster instead of starting Ray on this machine
"""


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Seconds from ``90``, ``90s``, ``1.5m`` or ``2h`` (also ``150ms``)."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The value in seconds; fails with what is accepted."""
        if isinstance(value, float):
            return value
        seconds = parse_duration(str(value))
        if seconds is None or not 0 < seconds < 1e8:
            self.fail(f"{value!r} is no duration: write 90, 90s, 1.5m, 2h or 150ms", param, ctx)
        return seconds


class Slo(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Per-request limits in seconds by metric from ``ttft=2s,tpot=100ms``."""

    name = "slo"
    metrics = ("ttft", "tpot", "e2e")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        """Metric -> limit in seconds."""
        if isinstance(value, dict):
            return value
        limits: dict[str, float] = {}
        for part in str(value).split(","):
            metric, _, limit = part.strip().partition("=")
            seconds = parse_duration(limit)
            if metric not in self.metrics:
                near = difflib.get_close_matches(metric, self.metrics, 1, 0.3)
                hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(self.metrics)}"
                self.fail(f"unknown metric {metric!r}: {hint}", param, ctx)
            if seconds is None or seconds <= 0 or metric in limits:
                self.fail(f"{part.strip()!r}: write each limit once, with a unit, like ttft=2s,tpot=100ms", param, ctx)
            limits[metric] = seconds
        return limits


class Stages(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Request rate over time from ``2m@4,5m@8``."""

    name = "stages"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of `harness.arrivals.Stage`."""
        from harness.arrivals import parse_stages

        if not isinstance(value, str):
            return value
        try:
            return parse_stages(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class Warmup(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A number of requests from ``20``, or a time from ``30s``."""

    name = "warmup"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """An integer of requests or a float of seconds."""
        if isinstance(value, int | float):
            return value
        number = int(value) if str(value).isascii() and str(value).isdigit() else parse_duration(str(value))
        if not number or (isinstance(number, float) and str(value).strip()[-1:].isdigit()):
            self.fail(f"{value!r}: write a number of requests like 20, or a time with its unit like 30s", param, ctx)
        return number


class Cancel(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Clients that hang up, from ``0.05@2s`` or ``5%@2s``."""

    name = "cancel"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """(share of requests, seconds after they were sent)"""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d*\.?\d+)(%?)@(.+)", str(value).strip())
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        after_s = parse_duration(match[3]) if match else None
        if not 0 < share <= 1 or not after_s:
            self.fail(f"{value!r}: write share@time, like 0.05@2s or 5%@2s", param, ctx)
        return share, after_s


class JsonObject(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """The object as a dict."""
        if isinstance(value, dict):
            return value
        try:
            decoded = json.loads(value)
        except ValueError as e:
            self.fail(f"not JSON: {e}", param, ctx)
        if not isinstance(decoded, dict):
            self.fail('expected a JSON object, like {"temperature": 0.7}', param, ctx)
        return decoded


def parse_duration(text: str) -> float | None:
    """Seconds; null when ``text`` is no duration."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", text.strip())
    if not match:
        return None
    return float(match[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}[match[2] or "s"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{EXIT_STATUS}\n{ENVIRONMENT}",
)
@click.version_option(__version__, prog_name="harness")
def cli() -> None:
    r"""Replay a production trace against LLM servers and learn what a million tokens costs.

    \b
    The whole job:        harness replay trace.jsonl
    Against your server:  harness replay trace.jsonl --base-url http://host:8000/v1 --model NAME
    Step by step:         harness plan -> harness serve -> harness run -> harness report

    Every step reads and writes files, so each can be repeated and looked at on its own. Data goes to stdout, words to
    stderr. Every verb that prints figures takes --format json.
    """


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def stack(*options: Decorator) -> Decorator:
    """Several options as one decorator, first on top."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


positive = click.FloatRange(min=0, min_open=True)

PLAN_OPTIONS = stack(
    click.option("--trace-format", metavar="NAME", help="Force the trace format instead of detecting it by content."),
    click.option(
        "--skip-bad", is_flag=True, help="Leave out lines that cannot be read; they are counted and reported."
    ),
    click.option("--speed", type=positive, help="Play the trace's clock this many times faster."),
    click.option(
        "--rate",
        type=positive,
        help="Mean requests/s: compress or stretch the trace's clock, burst shape kept; or the rate of --arrivals.",
    ),
    click.option(
        "--arrivals",
        type=click.Choice(["trace", "constant", "poisson", "gamma"]),
        help="When requests are sent: at the trace's own times, or drawn (the trace gives the content). "
        "Default: trace; poisson with --stages.",
    ),
    click.option(
        "--burstiness", type=positive, help="Shape of gamma arrivals, as vLLM has it: 1 is Poisson, below 1 burstier."
    ),
    click.option(
        "--stages", type=Stages(), metavar="TIME@RATE,...", help="Rate over time: 2m@4,5m@8. 2m@4..8 climbs evenly."
    ),
    click.option(
        "--repeat", is_flag=True, help="Begin the trace again when it runs out (made-up prompts are new each time)."
    ),
    click.option(
        "--warmup",
        type=Warmup(),
        metavar="N|TIME",
        help="Keep the first N requests, or those of the first TIME, out of every figure.",
    ),
    click.option(
        "--sessions",
        type=click.Choice(["trace", "wait"]),
        default="trace",
        show_default=True,
        help="Turns of a session: each at its own time, or not before the turn before it has ended (and think_s).",
    ),
    click.option(
        "--cancel", type=Cancel(), metavar="SHARE@TIME", help="Clients that hang up: 0.05@2s is 5 % after 2 s."
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first N requests of the trace."),
    click.option("--duration", "duration_s", type=Duration(), help="Only this much of the planned time, e.g. 5m."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is drawn."),
    click.option(
        "--tokenizer",
        type=click.Path(exists=True, path_type=Path),
        help="tokenizer.json (or its folder) to make prompts of an exact length with. Default: the model's own.",
    ),
    click.option(
        "--endpoint",
        type=click.Choice(["auto", "completions", "chat"]),
        default="auto",
        show_default=True,
        help="API to use. auto: chat when the trace has messages, else completions.",
    ),
)

SERVER_OPTIONS = stack(
    click.option(
        "--base-url",
        "base_urls",
        multiple=True,
        metavar="URL",
        help="Use the server that is already there (several: repeat). Then neither Ray nor vLLM is needed.",
    ),
    click.option("--model", metavar="NAME", help="Model to serve ('harness models'), or the name at --base-url."),
    click.option(
        "--tier",
        metavar="NAME",
        help="Hardware tier and its price ('harness tiers'). With --base-url: what it runs on.",
    ),
    click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Servers to start."),
)

LOAD_OPTIONS = stack(
    click.option("--concurrency", type=click.IntRange(min=1), help="Closed loop: this many in flight, in trace order."),
    click.option(
        "--max-concurrency",
        type=click.IntRange(min=1),
        help="Open loop: never more than this many in flight. Waiting for a free place shows up as lag.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Load worker processes. Default: one per core, as far as useful."
    ),
    click.option(
        "--timeout", "timeout_s", type=Duration(), default=600.0, show_default="10m", help="Limit for one request."
    ),
    click.option(
        "--stall",
        "stall_s",
        type=Duration(),
        default=120.0,
        show_default="2m",
        help="Limit for a server that sends nothing.",
    ),
    click.option(
        "--extra-body", type=JsonObject(), default="{}", help="JSON object whose fields are added to every request."
    ),
    click.option("--ramp", "ramp_s", type=Duration(), help="Closed loop: fill up evenly over this time."),
    click.option("--no-stream", is_flag=True, help="Ask for one JSON answer. Then there is no ttft, tpot or itl."),
    click.option(
        "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Extra HTTP header, never a secret; repeat."
    ),
    click.option(
        "--balance",
        type=click.Choice(["least", "round-robin", "session"]),
        default="least",
        show_default=True,
        help="With several servers: least in flight, in turn, or all turns of a session to one.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0, max=100),
        default=0,
        show_default=True,
        help="Send again after no connection, 429 or 503. Counted, and latency still counts from the planned time.",
    ),
    click.option(
        "--tls-ca",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Certificates to trust instead of the system's. Certificates and host names are always verified.",
    ),
    click.option("--slo", type=Slo(), help="Latency promised per request, e.g. ttft=2s,tpot=100ms (also e2e)."),
)

REPORT_OPTIONS = stack(
    click.option(
        "--attain",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.99,
        show_default=True,
        help="Share of requests that must meet the SLO.",
    ),
    click.option(
        "--ratio",
        type=positive,
        default=4.0,
        show_default=True,
        help="What one output token is taken to cost against one input token when the bill is split.",
    ),
    click.option(
        "--format",
        "format_",
        type=click.Choice(["text", "md", "json"]),
        default="text",
        show_default=True,
        help="How to print the report.",
    ),
)

OUT_OPTION = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder for run directories; never overwritten.",
)
TRACE_ARGUMENT = click.argument("trace", type=click.Path(path_type=Path))
JSON_OPTION = click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How to print it.",
)


@cli.command(
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
def replay(**options: Any) -> int:
    """Plan, serve, run and report in one go.

    TRACE is a production trace in any format that 'harness trace inspect' names, plain, gzip or zstd, also - (stdin)
    and s3://bucket/key; scenarios/traces/README.md has the fields. Without --base-url a vLLM server is started on the
    default tier (this machine's CPU) with a small
    model, and ended afterwards.

    Requests go out at the trace's own times (open loop) unless --concurrency is given (closed loop). Latency counts
    from the planned time, so a late client or a full queue shows.
    """
    from harness import commands

    return commands.replay(**options)


@cli.command(
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
def plan(**options: Any) -> int:
    """Turn a trace into a plan: every request, its prompt and its time, fixed in a file before anything is started."""
    from harness import commands

    return commands.plan(**options)


@cli.command(short_help="Start servers and keep them until Ctrl-C.")
@SERVER_OPTIONS
@OUT_OPTION
def serve(**options: Any) -> int:
    """Start servers and keep them until Ctrl-C.

    Prints one base URL per replica on stdout. The API key is HARNESS_API_KEY if that is set, else a new one, written to
    a file only you can read.
    """
    from harness import commands

    if options.pop("base_urls"):
        raise UsageError("harness serve starts servers: it takes no --base-url")
    return commands.serve(**options)


@cli.command(
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
@click.option(
    "--endpoint",
    type=click.Choice(["auto", "completions", "chat"]),
    default="auto",
    show_default=True,
    help="API to use. auto: chat when the plan has messages, else completions.",
)
@click.option(
    "--warmup",
    type=Warmup(),
    metavar="TIME",
    help="Closed loop: keep requests of the first TIME out of every figure. (Otherwise it is part of the plan.)",
)
@REPORT_OPTIONS
@OUT_OPTION
def run(**options: Any) -> int:
    """Send a plan and report; starts the servers first unless --base-url is given."""
    from harness import commands

    return commands.run(**options)


@cli.command(
    short_help="Report on a run directory; compare several in a page.",
    epilog=f"""\b
Examples:
  harness report runs/20261121T234654Z-trace-smollm2-135m
  harness report runs/20261121T234654Z-trace-smollm2-135m --html report.html
  harness report runs/*-sweep-* --slo ttft=2s --html sweep.html

{EXIT_STATUS}
Of several runs the worst counts, INVALID first.""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--slo", type=Slo(), help="Judge against this SLO instead of the one of the run.")
@REPORT_OPTIONS
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one self-contained page instead; several runs are compared in it.",
)
def report(**options: Any) -> int:
    """Report on a run directory: verdict, price, latency under load, throughput, errors."""
    from harness import commands

    return commands.report(**options)


@cli.command(short_help="Say what this machine can and cannot run, and why.")
@JSON_OPTION
def doctor(format_: str) -> int:
    """Say what this machine can and cannot run, and why."""
    from harness import commands

    return commands.doctor(format_)


@cli.command(
    short_help="Compare our figures with those of vLLM's own client.",
    epilog="""\b
Examples:
  harness crosscheck plan.arrow --base-url http://127.0.0.1:8000/v1
  harness crosscheck plan.arrow --base-url http://127.0.0.1:8000/v1 --concurrency 8 --repeats 5
""",
)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--repeats", type=click.IntRange(min=3), default=3, show_default=True, help="Runs of each client.")
@SERVER_OPTIONS
@LOAD_OPTIONS
@click.option("--endpoint", type=click.Choice(["auto", "completions"]), default="auto", help="API to use.")
@JSON_OPTION
@OUT_OPTION
def crosscheck(**options: Any) -> int:
    """Send one plan with our client and with vLLM's own, in turn, and show both sides' figures.

    Service TTFT, TPOT, ITL and throughput should agree within the noise of the repeats; where they differ, it says why.
    vLLM's client is `vllm bench serve` of the installed engine, given the plan's own prompts, lengths and times.
    """
    from harness import commands

    return commands.crosscheck(**options)


@cli.command(short_help="Measure what the load generator can carry on this machine.")
@JSON_OPTION
def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, in under a minute.

    Drives a server whose timing is exactly known: requests and streamed events a second, how late requests are sent,
    and how far TTFT and ITL are from the truth at half of the ceiling. The result is kept in the cache; runs are then
    given as many load workers as their plan needs, and a plan that this machine cannot carry is said before it starts.
    """
    from harness import commands

    return commands.calibrate(format_)


@cli.group(short_help="List hardware tiers and their prices, or read today's.", invoke_without_command=True)
@JSON_OPTION
@click.pass_context
def tiers(ctx: click.Context, format_: str) -> int:
    """List the hardware tiers with their prices, each with source and date."""
    from harness import commands

    return EXIT_VALID if ctx.invoked_subcommand else commands.tiers(format_)


@tiers.command(
    short_help="Read today's AWS prices into your own tiers file.",
    epilog="""\b
Examples:
  harness tiers refresh --dry-run
  harness tiers refresh --tier aws-p5.48xlarge --spot
  harness tiers refresh --tier aws-g6.xlarge --region eu-central-1
""",
)
@click.option("--tier", "names", multiple=True, metavar="NAME", help="This tier (several: repeat). Default: AWS's all.")
@click.option("--region", metavar="REGION", help="Price it here; another region becomes a tier NAME-REGION.")
@click.option("--spot", is_flag=True, help="Also a spot tier NAME-spot for each on-demand one.")
@click.option(
    "--spot-days",
    type=click.FloatRange(0, 90, min_open=True),
    default=7.0,
    show_default=True,
    help="Days of spot prices to take the mean of, each weighted by how long it held.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Tiers file to write. Default: HARNESS_TIERS, else ~/.config/harness/tiers.toml.",
)
@click.option("--dry-run", is_flag=True, help="Show old and new prices; write nothing.")
@JSON_OPTION
def refresh(**options: Any) -> int:
    """Read today's AWS prices into your own tiers file, whose entries replace the shipped ones.

    On-demand prices come from the AWS Price List API, spot prices from EC2's history, zone by zone. Needs AWS
    credentials (environment, profile or role) that may call pricing:GetProducts and ec2:DescribeSpotPriceHistory.
    The shipped prices are never changed; without credentials or network nothing is.
    """
    from harness import commands

    return commands.refresh_tiers(**options)


@cli.command(short_help="List models, or fetch the weights of one.")
@click.option(
    "--fetch", metavar="NAME", help="Get this model's weights now (checked and kept; a second time costs nothing)."
)
@JSON_OPTION
def models(fetch: str | None, format_: str) -> int:
    """List the models that can be served, or fetch the weights of one."""
    from harness import commands

    return commands.models(fetch, format_)


cli.add_command(trace)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: run a verb and end with its exit status."""
    # SIGTERM unwinds like Ctrl-C, so that everything started is ended in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = cli.main(args=list(argv) if argv is not None else None, prog_name="harness", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as e:
        e.show()
        code = e.exit_code
    except HarnessError as e:
        click.echo(f"harness: {e}", err=True)
        code = e.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("harness: stopped", err=True)
        code = 130
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): nothing to tell anyone; keep the interpreter from trying again.
        sys.stderr.close()
        code = EXIT_VALID
    sys.exit(code or EXIT_VALID)


if __name__ == "__main__":
    main()
