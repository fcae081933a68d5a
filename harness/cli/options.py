"""Parameter types and option stacks that several verbs share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from harness.errors import UsageError
from harness.slo import split_key

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
    """Seconds from ``90``, ``90s``, ``1.5m``, ``2h`` or ``3d`` (also ``150ms``)."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The value in seconds; fails with what is accepted."""
        if isinstance(value, float):
            return value
        seconds = parse_duration(str(value))
        if seconds is None or not 0 < seconds < 1e8:
            self.fail(f"{value!r} is no duration: write 90, 90s, 1.5m, 2h, 3d or 150ms", param, ctx)
        return seconds


class Window(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Begin and end in seconds of trace time from ``10m:20m``."""

    name = "window"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        """(begin, end); fails with what is accepted."""
        if isinstance(value, tuple):
            return value
        begin, _, end = str(value).partition(":")
        begin_s, end_s = parse_duration(begin or "0"), parse_duration(end)
        if begin_s is None or end_s is None or not begin_s < end_s < 1e10:
            self.fail(f"{value!r} is no window: write its begin and end, like 10m:20m or 0:90s", param, ctx)
        return begin_s, end_s


class Slo(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """Limits in seconds by key from ``ttft=2s,tpot=100ms`` or ``ttft_p99=2s,tpot_p95=80ms`` (`harness.slo`)."""

    name = "slo"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        """Metric, with a percentile or without -> limit in seconds."""
        if isinstance(value, dict):
            return value
        limits: dict[str, float] = {}
        for part in str(value).split(","):
            key, _, limit = part.strip().partition("=")
            try:
                split_key(key)
            except UsageError as e:
                self.fail(str(e), param, ctx)
            seconds = parse_duration(limit)
            if seconds is None or seconds <= 0 or key in limits:
                self.fail(f"{part.strip()!r}: write each limit once, with a unit, like ttft=2s,tpot=100ms", param, ctx)
            limits[key] = seconds
        return limits


class Share(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A share from ``99%`` or ``0.99``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share, above 0 and at most 1; a bare number above 1 is refused, for nobody knows what it means."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", str(value).strip())
        share = float(match[1]) / (100 if match[2] else 1) if match else 2.0
        if not 0 < share <= 1:
            self.fail(f"{value!r}: write a share like 99% or 0.99", param, ctx)
        return round(share, 12)


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


class Growth(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """A factor on the demand from ``3x``, ``+200%`` or ``-20%``."""

    name = "growth"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The factor."""
        from harness.traces.rescale import parse_growth

        if isinstance(value, float):
            return value
        try:
            return parse_growth(str(value))
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", text.strip())
    if not match:
        return None
    return float(match[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}[match[2] or "s"]


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
    click.option("--sort", is_flag=True, help="Put rows in order of arrival."),
    click.option(
        "--part",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of a file with several recordings (time goes back between them), only the Nth.",
    ),
    click.option(
        "--input-tokens", metavar="DIST", help="Of a log that has arrivals only: lengths, like lognormal:mean=800,cv=1."
    ),
    click.option("--output-tokens", metavar="DIST", help="Output lengths, the same way."),
    click.option("--speed", type=positive, help="Play the trace's clock this many times faster."),
    click.option(
        "--rate", type=positive, help="Mean requests/s, reached as --rescale says; or the rate of --arrivals."
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
        type=Growth(),
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
    click.option(
        "--on-replica-death",
        type=click.Choice(["fail", "restart"]),
        default="fail",
        show_default=True,
        help="When a server dies during a run: stop the run now, or start it again and mark the run.",
    ),
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
    click.option(
        "--slo",
        type=Slo(),
        metavar="KEY=TIME,...",
        help="Latency promised: ttft=2s,tpot=100ms of each request, or ttft_p99=2s,tpot_p95=80ms (also e2e, itl_max).",
    ),
)

REPORT_OPTIONS = stack(
    click.option(
        "--attain",
        type=Share(),
        default="99%",
        show_default=True,
        help="Share of requests that must keep the limits of --slo that name no percentile.",
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
