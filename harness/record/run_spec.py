"""What is asked of a run, and of each of its load workers: one class, one set of defaults, for every way to start one.

The command line, plain ``locust -f``, `scenarios.client.Client` and the tests take their defaults from here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Loop = Literal["open", "closed"]
"""open: requests go out at their planned times; closed: a fixed number is in flight."""
Endpoint = Literal["completions", "chat"]
Balance = Literal["least", "round-robin", "session"]
"""Which base URL a request goes to: least in flight (as its worker sees it), in turn, or all of a slice to one."""
Capture = Literal["off", "hmac", "text", "sealed"]
"""What is kept of each answer (`harness.record.answers`): nothing, an HMAC of its text, or also the text."""
OutputLengths = Literal["forced", "cap", "free"]
"""forced: exactly as many tokens (``ignore_eos``); cap: at most so many; free: nothing is said of them."""
AUTHORIZATION = "Authorization"
"""Carries the API key, unless another header is named."""
BATCH_READS_FROM = 30
"""Events per read interval from which reading in batches saves CPU, or costs nothing, on most machines."""
BATCH_READS_EVERY_NS = 2_500_000
"""Longest such interval: a worker learns of the end of an answer up to so much later than its stamp says."""
NO_TEMPERATURE = "max_completion_tokens"
"""Models that want their lengths in this field refuse a temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """What was asked. All that changes the load or the verdict is here, and no default of it is anywhere else."""

    mode: Loop
    concurrency: int | None = None
    """Closed loop: requests in flight over all workers. Open loop: cap on requests in flight, null = no cap."""
    duration_s: float | None = None
    """Stop sending after this long; null: until the plan is done."""
    drain_s: float = 60.0
    """A run that is stopped, or cut by ``duration_s``, waits so long for what is in flight, then marks it ``stopped``.
    A plan that was sent whole waits for every answer, as long as the request's own timeouts allow."""
    timeout_s: float = 600.0
    """A request not finished this long after it was sent fails with ``timeout``."""
    stall_s: float = 120.0
    """A request whose server sends nothing for this long fails with ``stall``."""
    endpoint: Endpoint = "completions"
    model: str
    base_urls: list[str]
    """One per replica, of the API (it mostly ends in /v1); a query goes with every request."""
    workers: int = 1
    slo: dict[str, float] = field(default_factory=dict)
    """Per-request limits in seconds by metric (ttft, tpot, e2e), e.g. {"ttft": 2.0}."""
    lag_bound_s: float = 0.1
    """The run is INVALID when the 99th percentile of lag (or the largest, below 100 requests) exceeds this."""
    min_requests: int = 30
    """Below so many measured requests the run has no verdict but "TOO SMALL"."""
    extra_body: dict[str, object] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    """Added to every request; never a secret (`harness.server.access`)."""
    header_env: dict[str, str] = field(default_factory=dict)
    """Header -> environment variable that holds its value, which may be secret and is written nowhere."""
    key_header: str = AUTHORIZATION
    length_field: str = "max_tokens"
    """Field of the body that says how many tokens to generate."""
    output_lengths: OutputLengths = "forced"
    stream: bool = True
    """False: one JSON answer, of which only the end is timed."""
    balance: Balance = "least"
    retries: int = 0
    """How often a request is sent again when there was no connection or the server said 429 or 503. No other
    failure is retried, because the server may already have worked on the request. Off by default: latency counts from
    the first try, so it includes the pauses. (Not counted here: a request that met a kept connection just as the server
    closed it is always sent once more.)"""
    busy_retries: int = 0
    """The same for 429 and 503 alone, where these may be tried more often: a rate limit is obeyed, not measured."""
    capture: Capture = "off"
    ramp_s: float | None = None
    """Closed loop: slots join evenly over this time; null: all at once."""
    warmup_s: float | None = None
    """Closed loop: requests scheduled before this time are warm-up. (In an open loop the plan's phase says it.)"""
    tls_ca: str | None = None
    """File of certificates to trust instead of the system's."""
    batch_reads_from: int | None = None
    """Load workers read in batches from so many events per interval on (`scenarios.client.reader`); ``harness
    calibrate`` measures it. None, as in runs that do not say: the client's own rule, now `BATCH_READS_FROM`."""
    counters: bool = True
    """False: the servers' own counters were not to be read (``--no-counters``)."""


DEFAULTS = RunSpec(mode="open", model="", base_urls=[])


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec(RunSpec):
    """What one load worker does: the run's spec, with its own share of ``concurrency``, and its files."""

    worker: int
    """From 0; ``workers`` says of how many."""
    plan: str
    results: str
    observations: str | None = None
    """File to write what the worker sees of itself to, a row a second; null: none."""
    captured: str | None = None
    """File to write captured answers to, unless ``capture`` is off."""
    answers: str | None = None
    """File to write a sample of the answers to (`harness.record.answers`); null: none are kept."""
