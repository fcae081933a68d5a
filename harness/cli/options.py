"""Parameter types and option stacks that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from harness.cli.types import CANCEL, COLUMNS, DURATION, GROWTH, JSON_OBJECT, POSITIVE, SHARE, SLO, STAGES, WARMUP
from harness.errors import UsageError
from harness.record.run_spec import DEFAULTS, Balance, OutputLengths

EXIT_STATUS = """\b
Exit status:
  0  the run is VALID (and met its SLO, when one was given)
  1  something failed; the message says what, where and what to do
  2  the command line is wrong
  3  the run is INVALID: its figures prove nothing and have no price
  4  the run is VALID and missed its SLO
  5  the run is TOO SMALL: below --min-requests there is no verdict and no price
"""

ENVIRONMENT = """\b
Environment (HARNESS_BASE_URL and the like: any option's default, as in a file harness.toml here):
  HARNESS_API_KEY  the servers' API key; never given on a command line, never written down (at --base-url
                   OPENAI_API_KEY where this is unset)
  HARNESS_CACHE    where model weights are kept (default: ~/.cache/harness)
  HARNESS_TIERS    your own tiers file, added to the shipped one; HARNESS_MODELS: of models
  HARNESS_TRACEBACK 1: show the whole of an error that nobody foresaw
  RAY_ADDRESS      use this Ray cluster instead of starting Ray on this machine
"""


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def stack(*options: Decorator, group: str = "Options") -> Decorator:
    """Several options as one decorator, first on top; ``group`` is their heading in the full help."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
            for param in getattr(function, "__click_params__", ()):
                if not hasattr(param, "group"):
                    param.group = group
        return function

    return apply


def format_option(*kinds: str) -> Decorator:
    """``--format`` with these kinds, the first of them by default."""
    return click.option(
        "--format", "format_", type=click.Choice(kinds), default=kinds[0], show_default=True, help="How to print it."
    )


def html_option(what: str) -> Decorator:
    """``--html FILE``: ``what`` as one page that stands alone."""
    return click.option(
        "--html",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Write {what} as one page that stands alone, too; an earlier one is replaced.",
    )


def resume_option(what: str, newest: str) -> Decorator:
    """``--resume`` with a folder or without, which is ``newest``."""
    return click.option("--resume", is_flag=False, flag_value=newest, metavar="[FOLDER]", help=what)


READ_OPTIONS = stack(
    click.option("--trace-format", metavar="NAME", help="Force the trace format instead of detecting it by content."),
    click.option(
        "--skip-bad", is_flag=True, help="Leave out lines that cannot be read; they are counted and reported."
    ),
    click.option("--sort", is_flag=True, help="Put rows in order of arrival."),
    click.option(
        "--part",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of a file with several recordings (time goes back between them), only the Nth.",
    ),
    click.option(
        "--map",
        "columns",
        type=COLUMNS,
        metavar="ROLE=COLUMN,...",
        help="Columns of a table (CSV, JSON Lines, Parquet) by what they are: arrival=ts,input=p,output=c,session=s,"
        "model=m. Those not named are found by common names.",
    ),
    click.option(
        "--time-unit", type=click.Choice(["s", "ms", "us", "ns"]), help="Unit of its times, where nothing shows it."
    ),
    click.option(
        "--where",
        multiple=True,
        metavar="FIELD=PATTERN",
        help="Only rows that match: model=llama-3*, session=a|b, adapter=...; repeat: all must.",
    ),
    group="Trace",
)

PLAN_OPTIONS = stack(
    READ_OPTIONS,
    click.option(
        "--input-tokens", metavar="DIST", help="Of a log that has arrivals only: lengths, like lognormal:mean=800,cv=1."
    ),
    click.option("--output-tokens", metavar="DIST", help="Output lengths, the same way."),
    click.option("--speed", type=POSITIVE, help="Play the trace's clock this many times faster."),
    click.option(
        "--rate", type=POSITIVE, help="Mean requests/s, reached as --rescale says; or the rate of --arrivals."
    ),
    click.option(
        "--rescale",
        type=click.Choice(["compress", "thin", "superpose"]),
        default="compress",
        show_default=True,
        help="How --rate is reached: play the clock faster or slower (the same users, sooner), or keep the clock and "
        "have fewer users (thin) or more (superpose). Sessions stay whole.",
    ),
    click.option(
        "--grow",
        type=GROWTH,
        metavar="3x|+200%|-20%",
        help="A forecast: this many times the users on the same clock; sessions stay whole.",
    ),
    click.option("--spread", is_flag=True, help="Lay arrivals of a coarse clock (3 s steps) evenly within its steps."),
    click.option(
        "--arrivals",
        type=click.Choice(["trace", "constant", "poisson", "gamma"]),
        help="When requests are sent: at the trace's own times, or drawn (the trace gives the content). "
        "Default: trace; poisson with --stages.",
    ),
    click.option(
        "--burstiness", type=POSITIVE, help="Shape of gamma arrivals, as vLLM has it: 1 is Poisson, below 1 burstier."
    ),
    click.option(
        "--stages", type=STAGES, metavar="TIME@RATE,...", help="Rate over time: 2m@4,5m@8. 2m@4..8 climbs evenly."
    ),
    click.option(
        "--repeat", is_flag=True, help="Begin the trace again when it runs out (made-up prompts are new each time)."
    ),
    click.option(
        "--warmup",
        type=WARMUP,
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
        "--conversation",
        type=click.Choice(["recorded", "live"]),
        default="recorded",
        show_default=True,
        help="Whose answers later turns of a session carry: the trace's own, or what the server really answers "
        "(live; turns then wait for each other, and input lengths follow from the answers).",
    ),
    click.option("--cancel", type=CANCEL, metavar="SHARE@TIME", help="Clients that hang up: 0.05@2s is 5 % after 2 s."),
    click.option("--limit", type=click.IntRange(min=1), help="Only the first N requests of the trace."),
    click.option("--duration", "duration_s", type=DURATION, help="Only this much of the planned time, e.g. 5m."),
    click.option(
        "--seed",
        type=int,
        help="Seed of all that is drawn. Default: the same load each time (0), with made-up prompts that no server has "
        "seen; the number that gives them again is printed.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(exists=True, path_type=Path),
        help="Model folder (with its chat template), or its tokenizer.json, to make prompts of an exact length with. "
        "Default: the model's own.",
    ),
    click.option(
        "--endpoint",
        type=click.Choice(["auto", "completions", "chat"]),
        default="auto",
        show_default=True,
        help="API to use. auto: chat when the trace has messages, else completions.",
    ),
    group="Plan",
)

SERVER_OPTIONS = stack(
    click.option(
        "--base-url",
        "base_urls",
        multiple=True,
        metavar="URL",
        help="Use the server that is already there (several: repeat). Then neither Ray nor vLLM is needed.",
    ),
    click.option(
        "--metrics-url",
        "metrics_urls",
        multiple=True,
        metavar="URL",
        help="Page of a server's own counters (repeat: one for each --base-url, or those of all servers behind one, "
        "added up). Default: /metrics of --base-url.",
    ),
    click.option("--model", metavar="NAME", help="Model to serve ('harness models'), or the name at --base-url."),
    click.option(
        "--tier",
        metavar="NAME",
        help="Hardware tier and its price ('harness tiers'). With --base-url: what it runs on.",
    ),
    click.option(
        "--label",
        metavar="NAME",
        help="What this system is called in reports. Systems of two labels, or at two --base-url, never count as one.",
    ),
    click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Servers to start."),
    click.option(
        "--on-replica-death",
        type=click.Choice(["fail", "restart"]),
        default="fail",
        show_default=True,
        help="When a server dies during a run: stop the run now, or start it again and mark the run.",
    ),
    group="Servers",
)

MIN_REQUESTS_HELP = "Below so many measured requests a run has no verdict but TOO SMALL, and no price."

ACCESS_OPTIONS = stack(
    click.option(
        "--header",
        "headers",
        multiple=True,
        metavar="'NAME: VALUE'",
        help="Extra HTTP header of every request, also those for models and metrics; never a secret; repeat.",
    ),
    click.option(
        "--header-env",
        multiple=True,
        metavar="NAME=VARIABLE",
        help="Extra HTTP header whose value, which may be secret, is in this environment variable; repeat.",
    ),
    click.option(
        "--key-header",
        metavar="NAME",
        default=DEFAULTS.key_header,
        show_default=True,
        help="Header with the API key. Authorization carries 'Bearer' and the key, any other (api-key) the key alone.",
    ),
    group="Servers",
)

LOAD_OPTIONS = stack(
    ACCESS_OPTIONS,
    click.option(
        "--output-lengths",
        type=click.Choice(get_args(OutputLengths)),
        help="Planned lengths of answers: forced (ignore_eos, which vLLM and SGLang know), at most so many tokens, or "
        "not sent. Default: forced; cap with --length-field max_completion_tokens.",
    ),
    click.option(
        "--length-field",
        default=DEFAULTS.length_field,
        show_default=True,
        metavar="NAME",
        help="Field of the body that carries them. With max_completion_tokens no temperature is sent either: models "
        "that want the one refuse the other.",
    ),
    click.option(
        "--min-requests",
        type=click.IntRange(min=1),
        default=DEFAULTS.min_requests,
        show_default=True,
        help=MIN_REQUESTS_HELP,
    ),
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
        "--timeout",
        "timeout_s",
        type=DURATION,
        default=DEFAULTS.timeout_s,
        show_default="10m",
        help="Limit for one request.",
    ),
    click.option(
        "--stall",
        "stall_s",
        type=DURATION,
        default=DEFAULTS.stall_s,
        show_default="2m",
        help="Limit for a server that sends nothing.",
    ),
    click.option(
        "--extra-body", type=JSON_OBJECT, default="{}", help="JSON object whose fields are added to every request."
    ),
    click.option("--ramp", "ramp_s", type=DURATION, help="Closed loop: fill up evenly over this time."),
    click.option("--no-stream", is_flag=True, help="Disable streaming. Then there is no ttft, tpot or itl."),
    click.option("--capture-answers", is_flag=True, help="Store an HMAC of each answer, by request id."),
    click.option("--keep-text", is_flag=True, help="Store the text of each answer, too (0600)."),
    click.option(
        "--balance",
        type=click.Choice(get_args(Balance)),
        default=DEFAULTS.balance,
        show_default=True,
        help="With several servers: least in flight, in turn, or all turns of a session to one.",
    ),
    click.option(
        "--retries",
        type=click.IntRange(min=0, max=100),
        default=DEFAULTS.retries,
        show_default=True,
        help="Send again after no connection, 429 or 503. Counted, and latency still counts from the planned time.",
    ),
    click.option(
        "--tls-ca",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Certificates to trust instead of the system's. Certificates and host names are always verified.",
    ),
    click.option(
        "--no-counters",
        is_flag=True,
        help="Do not read the servers' own counters: token books and restarts are then not checked.",
    ),
    click.option(
        "--slo",
        type=SLO,
        metavar="KEY=TIME,...",
        help="Latency promised: ttft=2s,tpot=100ms of each request, or ttft_p99=2s,tpot_p95=80ms (also e2e, itl_max).",
    ),
    group="Load",
)


def attain_needs_slo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses --attain where there is no --slo for it to judge."""

    @functools.wraps(function)
    def checked(**options: Any) -> Any:
        given = click.get_current_context().get_parameter_source("attain") is not ParameterSource.DEFAULT
        if given and not options["slo"]:
            raise UsageError("--attain is the share of requests that must keep --slo: add --slo, like ttft=2s")
        return function(**options)

    return checked


ATTAIN_OPTION = click.option(
    "--attain",
    type=SHARE,
    default="99%",
    show_default=True,
    help="Share of requests that must keep the limits of --slo that name no percentile.",
)
JUDGE_OPTIONS = stack(
    click.option(
        "--slo", type=SLO, metavar="KEY=TIME,...", help="Judge against this SLO instead of the one of the runs."
    ),
    ATTAIN_OPTION,
    group="Report",
)

REPORT_OPTIONS = stack(
    ATTAIN_OPTION,
    click.option(
        "--ratio",
        type=POSITIVE,
        default=4.0,
        show_default=True,
        help="What one output token is taken to cost against one input token when the bill is split.",
    ),
    format_option("text", "md", "json"),
    group="Report",
)

OUT_OPTION = click.option(
    "-o",
    "--output",
    "--out",
    "out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder for run directories; never overwritten.",
)
ONE_TRACE_ARGUMENT = click.argument("trace", type=click.Path(path_type=Path))
TRACE_ARGUMENT = click.argument("trace", type=click.Path(path_type=Path), nargs=-1, required=True)
"""Files of one trace: also folders, patterns, archives, - and s3://."""
JSON_OPTION = format_option("text", "json")
SWEEPS_OPTION = click.option(
    "-o",
    "--output",
    "--out",
    "out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("sweeps"),
    show_default=True,
    help="Folder for sweep folders; never overwritten.",
)
