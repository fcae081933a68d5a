"""What a command line asks for: typed, frozen, made once, with every rule about what may be asked for together.

A verb makes its object from Click's parameters (`taken`, `ReplayOptions.of`), and `ReplayOptions.check` refuses what
excludes each other before anything is read, downloaded, started or rented. A sweep and a search for capacity replace
what differs from point to point. What a plan itself cannot be is in `harness.plan.spec`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

from harness.errors import UsageError
from harness.record.run_spec import DEFAULTS, Balance, Capture, Endpoint, OutputLengths
from harness.server.access import check_apart, parse_header_env, parse_headers
from harness.slo import metrics_of

if TYPE_CHECKING:
    from harness.plan.arrivals import Stage
    from harness.plan.file import Windows
    from harness.record.manifest import OnReplicaDeath
    from harness.trace.formats.record import Role, TimeUnit

OutputFormat = Literal["text", "md", "json", "csv"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How a trace is read."""

    trace_format: str | None = None
    skip_bad: bool = False
    sort: bool = False
    part: int | None = None
    columns: Mapping[Role, str] | None = None
    time_unit: TimeUnit | None = None
    where: Sequence[str] = ()
    input_tokens: str | None = None
    """A distribution, for logs that have arrivals only; with ``output_tokens``."""
    output_tokens: str | None = None
    seed: int | None = None
    """Of the lengths, and of a plan; null: none was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(ReadOptions):
    """What is sent, and when."""

    speed: float | None = None
    rate: float | None = None
    """Mean requests/s."""
    rescale: Literal["compress", "thin", "superpose"] = "compress"
    grow: float | None = None
    spread: bool = False
    arrivals: Literal["trace", "constant", "poisson", "gamma"] | None = None
    """Null: the trace's own times, or poisson with ``stages``."""
    burstiness: float | None = None
    stages: Sequence[Stage] | None = None
    repeat: bool = False
    warmup: int | float | None = None
    """An int is a number of requests, a float is seconds."""
    sessions: Literal["trace", "wait"] = "trace"
    conversation: Literal["recorded", "live"] = "recorded"
    cancel: tuple[float, float] | None = None
    """(share of requests, seconds after which these clients hang up)."""
    limit: int | None = None
    duration_s: float | None = None
    tokenizer: Path | None = None
    endpoint: Literal["auto"] | Endpoint = "auto"
    windows: Windows | None = None
    """Of a search for capacity; no option of the command line."""

    @property
    def waits(self) -> bool:
        """Whether turns of a session wait for each other."""
        return self.sessions == "wait" or self.conversation == "live"

    @property
    def drawn(self) -> bool:
        """Whether arrivals are drawn, and not the trace's own."""
        return self.arrivals not in (None, "trace")

    @property
    def warmup_s(self) -> float | None:
        """Warm-up in seconds; null where it is none, or a number of requests."""
        return self.warmup if isinstance(self.warmup, float) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where it is sent: servers that are there already (``base_urls``), or servers to start."""

    base_urls: Sequence[str] = ()
    metrics_urls: Sequence[str] = ()
    model: str | None = None
    tier: str | None = None
    label: str | None = None
    replicas: int | None = None
    """Null: none is started; only the model's tokenizer is wanted."""
    on_replica_death: OnReplicaDeath = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How it is sent, and what is promised; fields that `harness.record.run_spec.RunSpec` has mean the same."""

    headers: Sequence[str] = ()
    """"NAME: VALUE"."""
    header_env: Sequence[str] = ()
    """"NAME=VARIABLE"."""
    key_header: str = DEFAULTS.key_header
    tls_ca: Path | None = None
    output_lengths: OutputLengths | None = None
    length_field: str = DEFAULTS.length_field
    min_requests: int = DEFAULTS.min_requests
    concurrency: int | None = None
    """Closed loop: requests in flight; null: an open loop."""
    max_concurrency: int | None = None
    """Open loop: the most requests in flight."""
    workers: int | None = None
    timeout_s: float = DEFAULTS.timeout_s
    stall_s: float = DEFAULTS.stall_s
    extra_body: Mapping[str, object] = field(default_factory=dict)
    ramp_s: float | None = None
    no_stream: bool = False
    balance: Balance = DEFAULTS.balance
    retries: int = DEFAULTS.retries
    no_counters: bool = False
    capture_answers: bool = False
    keep_text: bool = False
    slo: Mapping[str, float] | None = None

    @property
    def closed(self) -> bool:
        """Whether the loop is closed."""
        return self.concurrency is not None

    @property
    def capture(self) -> Capture:
        """What is kept of the answers."""
        return "text" if self.keep_text else "hmac" if self.capture_answers else "off"

    @property
    def lengths(self) -> OutputLengths:
        """What planned lengths are to the server. Hosted APIs, whose field is not vLLM's, cannot be forced."""
        return self.output_lengths or ("forced" if self.length_field == DEFAULTS.length_field else "cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How the result is judged and printed."""

    attain: float = 0.99
    ratio: float = 4.0
    format_: OutputFormat = "text"


Group = TypeVar("Group", ReadOptions, PlanOptions, ServeOptions, LoadOptions, ReportOptions)


def taken(group: type[Group], params: Mapping[str, object]) -> Group:
    """The options of one group out of the parameters of a verb; those that the verb does not have keep their defaults.

    Click has checked every value by the option's own type.
    """
    found = {f.name: params[f.name] for f in fields(group) if f.name in params}
    return group(**found)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """All that ``harness replay`` takes, in its groups; plan, run, serve, sweep and capacity take parts of it."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    serve: ServeOptions = field(default_factory=ServeOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    report: ReportOptions = field(default_factory=ReportOptions)

    @classmethod
    def of(cls, params: Mapping[str, object]) -> Self:
        """From the parameters of a verb, every one of which is one of these."""
        groups = (PlanOptions, ServeOptions, LoadOptions, ReportOptions)
        known = {f.name for group in groups for f in fields(group)}
        assert params.keys() <= known, f"no group has {', '.join(params.keys() - known)}"
        return cls(
            plan=taken(PlanOptions, params), serve=taken(ServeOptions, params), load=taken(LoadOptions, params),
            report=taken(ReportOptions, params),
        )  # fmt: skip

    def by_name(self) -> dict[str, object]:
        """Every option of the command line with its value."""
        groups = (self.plan, self.serve, self.load, self.report)
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if f.name != "windows"}

    def at(self, *, rate: float | None, concurrency: int | None) -> Self:
        """The same at another load."""
        return replace(self, plan=replace(self.plan, rate=rate), load=replace(self.load, concurrency=concurrency))

    def check(self) -> None:
        """Raise `UsageError` for options that exclude each other."""
        plan, serve, load = self.plan, self.serve, self.load
        deciding = {
            "--speed": plan.speed, "--rate": plan.rate, "--grow": plan.grow, "--arrivals": plan.drawn,
            "--stages": plan.stages, "--max-concurrency": load.max_concurrency,
        }  # fmt: skip
        given = [flag for flag, value in deciding.items() if value]
        if load.closed and given:
            raise UsageError(
                f"--concurrency is a closed loop, where a free slot decides when to send: drop it or {given[0]}"
            )
        if plan.speed and plan.rate:
            raise UsageError("--speed and --rate both rescale the trace's clock: give one")
        if load.ramp_s and not load.closed:
            raise UsageError(
                "--ramp is how a closed loop fills up: add --concurrency; in an open loop --stages can climb"
            )
        if "stream" in load.extra_body:
            raise UsageError("--extra-body must not say stream: use --no-stream, which knows what it cannot time then")
        if load.no_stream and {"ttft", "tpot", "itl_max"} & metrics_of(dict(load.slo or {})):
            raise UsageError("--no-stream answers have no ttft, tpot or itl_max to promise: an SLO on e2e, or stream")
        check_apart(parse_headers(load.headers), parse_header_env(load.header_env))
        if not re.fullmatch(r"[A-Za-z_]\w*", load.length_field):
            raise UsageError(f"--length-field {load.length_field!r}: not the name of a field, like max_tokens")
        if serve.metrics_urls and not serve.base_urls:
            raise UsageError("--metrics-url is for a server that is there already (--base-url): ours are known")
        if serve.metrics_urls and load.no_counters:
            raise UsageError("--metrics-url says where the counters are, --no-counters not to read them: give one")
        if load.key_header != DEFAULTS.key_header and not serve.base_urls:
            raise UsageError("--key-header is for a server that is there already (--base-url): ours take a bearer")

    def check_plan(self) -> None:
        """The rules of ``harness plan``, which sends nothing."""
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
