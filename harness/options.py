"""What a command line asks for: typed, frozen, made once, with every rule about what may be asked for together.

A field made by `opt` is an option of the command line too; its help says what it means. A verb makes its object from
Click's parameters (`harness.option_types.made`), and `ReplayOptions.check` refuses what excludes each other before
anything is read, downloaded, started or rented. A sweep and a search for capacity replace what differs from point to
point. What a plan itself cannot be is in `harness.plan.spec`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import click

from harness.errors import UsageError
from harness.option_types import (
    ADDRESS,
    CANCEL,
    COLUMNS,
    COUNT,
    EXISTING,
    FILE,
    GROWTH,
    JSON_OBJECT,
    NEW_FILE,
    POSITIVE,
    SHARE,
    STAGES,
    STEP,
    WARMUP,
    opt,
)
from harness.record.run_spec import DEFAULTS, Balance, Capture, OutputLengths
from harness.server.access import check_apart, parse_header_env, parse_headers
from harness.slo import metrics_of

if TYPE_CHECKING:
    from harness.plan.arrivals import Stage
    from harness.plan.file import Windows
    from harness.record.manifest import OnReplicaDeath
    from harness.trace.formats.record import Role, TimeUnit

OutputFormat = Literal["text", "md", "json", "csv"]
Rescale = Literal["compress", "thin", "superpose"]
Arrivals = Literal["trace", "constant", "poisson", "gamma"]
Sessions = Literal["trace", "wait"]
Conversation = Literal["recorded", "live"]
AnyEndpoint = Literal["auto", "completions", "chat"]
EngineName = Literal["vllm", "simulated"]
ClockName = Literal["real", "virtual"]
RouterName = Literal["least", "round-robin", "session", "prefix"]
"""Of servers that are simulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a trace is read."""

    heading: ClassVar = "Trace"
    trace_format: str | None = opt("Force the trace format instead of detecting it by content.", metavar="NAME")
    skip_bad: bool = opt("Leave out lines that cannot be read; they are counted and reported.", False)
    sort: bool = opt("Put rows in order of arrival.", False)
    part: int | None = opt(
        "Of a file with several recordings (time goes back between them), only the Nth.", kind=COUNT, metavar="N"
    )
    columns: Mapping[Role, str] | None = opt(
        "Columns of a table (CSV, JSON Lines, Parquet) by what they are: arrival=ts,input=p,output=c,session=s,"
        "model=m. Those not named are found by common names.",
        kind=COLUMNS, flag="--map", metavar="ROLE=COLUMN,...",
    )  # fmt: skip
    time_unit: TimeUnit | None = opt("Unit of its times, where nothing shows it.", kind=Literal["s", "ms", "us", "ns"])
    where: Sequence[str] = opt(
        "Only rows that match: model=llama-3*, session=a|b, adapter=...; repeat: all must.", (), metavar="FIELD=PATTERN"
    )
    input_tokens: str | None = None
    """A distribution, for logs that have arrivals only; with ``output_tokens``."""
    output_tokens: str | None = None
    seed: int | None = None
    """Of the lengths, and of a plan; null: none was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(ReadOptions):
    """What is sent, and when."""

    heading: ClassVar = "Plan"
    input_tokens: str | None = opt(
        "Of a log that has arrivals only: lengths, like lognormal:mean=800,cv=1.", metavar="DIST"
    )
    output_tokens: str | None = opt("Output lengths, the same way.", metavar="DIST")
    speed: float | None = opt("Play the trace's clock this many times faster.", kind=POSITIVE)
    rate: float | None = opt("Mean requests/s, reached as --rescale says; or the rate of --arrivals.", kind=POSITIVE)
    rescale: Rescale = opt(
        "How --rate is reached: play the clock faster or slower (the same users, sooner), or keep the clock and have "
        "fewer users (thin) or more (superpose). Sessions stay whole.", "compress", kind=Rescale,
    )  # fmt: skip
    grow: float | None = opt(
        "A forecast: this many times the users on the same clock; sessions stay whole.",
        kind=GROWTH, metavar="3x|+200%|-20%",
    )  # fmt: skip
    spread: bool = opt("Lay arrivals of a coarse clock (3 s steps) evenly within its steps.", False)
    arrivals: Arrivals | None = opt(
        "When requests are sent: at the trace's own times, or drawn (the trace gives the content). Default: trace; "
        "poisson with --stages.", kind=Arrivals,
    )  # fmt: skip
    burstiness: float | None = opt(
        "Shape of gamma arrivals, as vLLM has it: 1 is Poisson, below 1 burstier.", kind=POSITIVE
    )
    stages: Sequence[Stage] | None = opt(
        "Rate over time: 2m@4,5m@8. 2m@4..8 climbs evenly.", kind=STAGES, metavar="TIME@RATE,..."
    )
    repeat: bool = opt("Begin the trace again when it runs out (made-up prompts are new each time).", False)
    warmup: int | float | None = opt(
        "Keep the first N requests, or those of the first TIME, out of every figure.", kind=WARMUP, metavar="N|TIME"
    )
    """An int is a number of requests, a float is seconds."""
    sessions: Sessions = opt(
        "Turns of a session: each at its own time, or not before the turn before it has ended (and think_s).",
        "trace", kind=Sessions,
    )  # fmt: skip
    conversation: Conversation = opt(
        "Whose answers later turns of a session carry: the trace's own, or what the server really answers (live; turns "
        "then wait for each other, and input lengths follow from the answers).", "recorded", kind=Conversation,
    )  # fmt: skip
    cancel: tuple[float, float] | None = opt(
        "Clients that hang up: 0.05@2s is 5 % after 2 s.", kind=CANCEL, metavar="SHARE@TIME"
    )
    """(share of requests, seconds after which these clients hang up)."""
    limit: int | None = opt("Only the first N requests of the trace.", kind=COUNT)
    duration_s: float | None = opt("Only this much of the planned time, e.g. 5m.")
    seed: int | None = opt(
        "Seed of all that is drawn. Default: the same load each time (0), with made-up prompts that no server has "
        "seen; the number that gives them again is printed.", kind=int,
    )  # fmt: skip
    tokenizer: Path | None = opt(
        "Model folder (with its chat template), or its tokenizer.json, to make prompts of an exact length with. "
        "Default: the model's own.", kind=EXISTING,
    )  # fmt: skip
    endpoint: AnyEndpoint = opt(
        "API to use. auto: chat when the trace has messages, else completions.", "auto", kind=AnyEndpoint
    )
    windows: Windows | None = None
    """Of a search for capacity; not an option of the command line."""

    @property
    def waits(self) -> bool:
        return self.sessions == "wait" or self.conversation == "live"

    @property
    def drawn(self) -> bool:
        return self.arrivals not in (None, "trace")

    @property
    def warmup_s(self) -> float | None:
        """Warm-up in seconds; null where it is none, or a number of requests."""
        return self.warmup if isinstance(self.warmup, float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where it is sent: servers that are there already (``base_urls``), or servers to start."""

    heading: ClassVar = "Servers"
    base_urls: Sequence[str] = opt(
        "Use the server that is already there (several: repeat). Then neither Ray nor vLLM is needed.",
        (),
        metavar="URL",
    )
    metrics_urls: Sequence[str] = opt(
        "Page of a server's own counters (repeat: one for each --base-url, or those of all servers behind one, added "
        "up). Default: /metrics of --base-url.", (), metavar="URL",
    )  # fmt: skip
    model: str | None = opt("Model to serve ('harness models'), or the name at --base-url.", metavar="NAME")
    tier: str | None = opt(
        "Hardware tier and its price ('harness tiers'). With --base-url: what it runs on.", metavar="NAME"
    )
    label: str | None = opt(
        "What this system is called in reports. Systems of two labels, or at two --base-url, never count as one.",
        metavar="NAME",
    )
    replicas: int = opt("Servers to start.", 1)
    engine: EngineName | None = opt(
        "Servers to start: vLLM (default), or ones that answer as vLLM on --tier would, on any machine, whose every "
        "figure is simulated.", kind=EngineName,
    )  # fmt: skip
    clock: ClockName | None = opt(
        "Of a simulated engine: answer over HTTP as time passes (real, the default), or serve the plan at once, in "
        "virtual time, without servers or Ray.", kind=ClockName,
    )  # fmt: skip
    slow: float | None = opt(
        "Of a simulated engine over HTTP: it and its clients are this many times as slow, so that this machine keeps "
        "up; every time in the run is scaled back.", kind=POSITIVE,
    )  # fmt: skip
    step: tuple[float, ...] | None = opt(
        "What a step of a simulated engine takes, ms: base, for each sequence, each prompt token and, if given, each "
        "context token. Default: what is known of the model on the tier.", kind=STEP, metavar="BASE,SEQ,TOKEN",
    )  # fmt: skip
    calibration: Path | None = opt(
        "What 'harness calibrate-model' fitted to own runs, in place of --step: for a simulated engine.", kind=FILE
    )
    on_replica_death: OnReplicaDeath = opt(
        "When a server dies during a run: stop the run now, or start it again and mark the run.",
        "fail", kind=Literal["fail", "restart"],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessOptions:
    """What every request to the servers carries."""

    heading: ClassVar = "Servers"
    headers: Sequence[str] = opt(
        "Extra HTTP header of every request, also those for models and metrics; never a secret; repeat.",
        (), metavar="'NAME: VALUE'",
    )  # fmt: skip
    header_env: Sequence[str] = opt(
        "Extra HTTP header whose value, which may be secret, is in this environment variable; repeat.",
        (), metavar="NAME=VARIABLE",
    )  # fmt: skip
    key_header: str = opt(
        "Header with the API key. Authorization carries 'Bearer' and the key, any other (api-key) the key alone.",
        DEFAULTS.key_header, metavar="NAME",
    )  # fmt: skip
    tls_ca: Path | None = opt(
        "Certificates to trust instead of the system's. Certificates and host names are always verified.", kind=FILE
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(AccessOptions):
    """How it is sent, and its SLO; fields that `harness.record.run_spec.RunSpec` has mean the same."""

    heading: ClassVar = "Load"
    output_lengths: OutputLengths | None = opt(
        "Planned lengths of answers: forced (ignore_eos, which vLLM and SGLang know), at most so many tokens, or not "
        "sent. Default: forced; cap with --length-field max_completion_tokens.", kind=OutputLengths,
    )  # fmt: skip
    length_field: str = opt(
        "Field of the body that carries them. With max_completion_tokens no temperature is sent either: models that "
        "want the one refuse the other.", DEFAULTS.length_field, metavar="NAME",
    )  # fmt: skip
    min_requests: int = opt(
        "Below so many measured requests a run has no verdict but TOO SMALL, and no price.", DEFAULTS.min_requests
    )
    concurrency: int | None = opt("Closed loop: this many in flight, in trace order.", kind=COUNT)
    max_concurrency: int | None = opt(
        "Open loop: never more than this many in flight. Waiting for a free place shows up as lag.", kind=COUNT
    )
    workers: int | None = opt("Load worker processes. Default: one per core, as far as useful.", kind=COUNT)
    timeout_s: float = opt("Limit for one request.", DEFAULTS.timeout_s)
    stall_s: float = opt("Limit for a server that sends nothing.", DEFAULTS.stall_s)
    extra_body: Mapping[str, object] = opt("JSON object whose fields are added to every request.", {}, kind=JSON_OBJECT)
    ramp_s: float | None = opt("Closed loop: fill up evenly over this time.")
    no_stream: bool = opt("Disable streaming. Then there is no ttft, tpot or itl.", False)
    capture_answers: bool = opt("Store an HMAC of each answer, by request id.", False)
    keep_text: bool = opt("Store the text of each answer, too (0600).", False)
    balance: Balance = opt(
        "With several servers: least in flight, in turn, or all turns of a session to one.",
        DEFAULTS.balance, kind=Balance,
    )  # fmt: skip
    retries: int = opt(
        "Send again after no connection, 429 or 503. Counted, and latency still counts from the planned time.",
        DEFAULTS.retries, kind=click.IntRange(0, 100),
    )  # fmt: skip
    busy_retries: int = 0
    """After 429 and 503 alone; not an option of the command line."""
    sealed: bool = False
    """Store texts encrypted, for this process alone; not an option of the command line."""
    no_counters: bool = opt(
        "Do not read the servers' own counters: token counts and restarts are then not checked.", False
    )
    live: str | None = opt(
        "Show the test as it runs, with /metrics for Prometheus, at http://127.0.0.1:9464 or this address.",
        kind=ADDRESS, bare="127.0.0.1:9464", metavar="[[HOST:]PORT]",
    )  # fmt: skip
    slo: Mapping[str, float] | None = opt(
        "The SLO: ttft=2s,tpot=100ms of each request, or ttft_p99=2s,tpot_p95=80ms (also e2e, itl_max).",
        metavar="KEY=TIME,...",
    )

    @property
    def closed(self) -> bool:
        return self.concurrency is not None

    @property
    def capture(self) -> Capture:
        return "text" if self.keep_text else "sealed" if self.sealed else "hmac" if self.capture_answers else "off"

    @property
    def lengths(self) -> OutputLengths:
        """What planned lengths are to the server. Hosted APIs, whose field is not vLLM's, cannot be forced."""
        return self.output_lengths or ("forced" if self.length_field == DEFAULTS.length_field else "cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttainOption:
    """The share of an SLO."""

    heading: ClassVar = "Report"
    attain: float = opt(
        "Share of requests that must keep the limits of --slo that name no percentile.", 0.99, kind=SHARE
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions(AttainOption):
    """How results are judged."""

    slo: Mapping[str, float] | None = opt("Judge against this SLO instead of that of the runs.", metavar="KEY=TIME,...")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions(AttainOption):
    """How the result of a run is judged and printed."""

    ratio: float = opt(
        "What one output token is taken to cost against one input token when the bill is split.", 4.0, kind=POSITIVE
    )
    format_: OutputFormat = opt("How to print it.", "text", kind=Literal["text", "md", "json"])
    junit: Path | None = opt("Write the verdict as JUnit XML for CI, too: a case for each limit.", kind=NEW_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search is asked for, beyond the options of a replay."""

    max_usd: float | None = opt("Stop when this much is spent on servers, their start among it.", kind=POSITIVE)
    max_hours: float | None = opt("Stop when servers were up for this long.", kind=POSITIVE)
    probe_s: float = opt("Length of a probe; longer by itself where it would send too few requests.", 60.0)
    tolerance: float = opt("Stop when the 95 % interval reaches this far to either side of capacity.", 0.1, kind=SHARE)
    busiest: bool = opt("Probe the busiest stretch of TRACE instead of all its parts.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """All that ``harness replay`` takes, in its groups; plan, run, serve, sweep and capacity take parts of it."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    report: ReportOptions = field(default_factory=ReportOptions)

    def by_name(self) -> dict[str, object]:
        groups = (self.plan, self.serve, self.load, self.report)
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.metadata}

    def at(self, *, rate: float | None, concurrency: int | None) -> Self:
        return replace(self, plan=replace(self.plan, rate=rate), load=replace(self.load, concurrency=concurrency))

    def check(self) -> None:
        """Raise `UsageError` for options that exclude each other."""
        plan, serve, load = self.plan, self.serve, self.load
        deciding = {
            "--speed": plan.speed, "--rate": plan.rate, "--grow": plan.grow, "--arrivals": plan.drawn,
            "--stages": plan.stages, "--max-concurrency": load.max_concurrency,
        }  # fmt: skip
        given = [flag for flag, value in deciding.items() if value]
        untimed = load.no_stream and {"ttft", "tpot", "itl_max"} & metrics_of(dict(load.slo or {}))
        theirs = "is for a server that is there already (--base-url): ours"
        for found, problem in (
            (load.closed and given,
             f"--concurrency is a closed loop, where a free slot decides when to send: drop it or {(*given, '')[0]}"),
            (plan.speed and plan.rate, "--speed and --rate both rescale the trace's clock: give one"),
            (load.ramp_s and not load.closed,
             "--ramp is how a closed loop fills up: add --concurrency; in an open loop --stages can climb"),
            ("stream" in load.extra_body,
             "--extra-body must not say stream: use --no-stream, which knows what it cannot time then"),
            (self.report.attain != ReportOptions().attain and not load.slo,
             "--attain is the share of requests that must keep --slo: add --slo, like ttft=2s"),
            (untimed, "--no-stream answers have no ttft, tpot or itl_max: give an SLO on e2e, or stream"),
            (not re.fullmatch(r"[A-Za-z_]\w*", load.length_field),
             f"--length-field {load.length_field!r}: not the name of a field, like max_tokens"),
            (load.live and serve.clock == "virtual", "--live shows a test as time passes: in virtual time none does"),
            (serve.metrics_urls and not serve.base_urls, f"--metrics-url {theirs} are known"),
            (serve.metrics_urls and load.no_counters,
             "--metrics-url says where the counters are, --no-counters not to read them: give one"),
            (load.key_header != DEFAULTS.key_header and not serve.base_urls, f"--key-header {theirs} take a bearer"),
        ):  # fmt: skip
            if found:
                raise UsageError(problem)
        check_apart(parse_headers(load.headers), parse_header_env(load.header_env))

    def check_plan(self) -> None:
        self.check()
        if self.load.closed and self.plan.warmup_s is not None:
            raise UsageError("a closed loop has no planned times: say --warmup N requests, or the time to harness run")

    def check_run(self, plan: Path, *, planned_closed: bool) -> None:
        """The rules of ``harness run``, whose plan was made before: for a closed loop, or with times."""
        if planned_closed and not self.load.closed:
            raise UsageError(f"{plan} is planned for a closed loop, without times: say --concurrency N")
        if self.plan.warmup and not (self.plan.warmup_s and self.load.closed):
            raise UsageError(
                "--warmup is part of the plan (harness plan); here it is a time in a closed loop, like 30s"
            )
        self.check()
