"""One run in figures: `summarise` puts metrics, intervals, verdict and price into a tree that JSON prints as it is.

The JSON shape (``harness.report/1``) is a stable interface; METRICS.md lists its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.check import Check, Verdict, verdict
from harness.analysis.cost import simulated
from harness.analysis.cost.cost import DEFAULT_RATIO, Cost, bill_usd, check_ratio, cost, paid_replicas, paid_words
from harness.analysis.cost.split import Split, run_samples, split_bill, token_mix
from harness.analysis.fidelity.inputs import Fidelity
from harness.analysis.fidelity.questions import fidelity
from harness.analysis.flat import Framed
from harness.analysis.metrics import Counts, Tokens, Window
from harness.analysis.rates import (
    Fullness,
    OfferedLoad,
    Slo,
    fullness,
    given,
    given_load_note,
    given_rate,
    judge,
    offered_load,
    price_note,
    queue_of,
    served_rates,
)
from harness.analysis.rates import Rates as Rates
from harness.analysis.rows.read import Rows, Run
from harness.analysis.stats.intervals import Distribution, Quantity, distribution
from harness.analysis.stats.relaxation import Memory
from harness.analysis.steady import Steady, backlog_check, drain_check, steady_check, steady_part, steady_rates
from harness.analysis.validity.checks import check_run
from harness.analysis.validity.counters import shared_addresses
from harness.analysis.validity.prefix_cache import REASON, CacheShares, cache_shares, warm_cache
from harness.analysis.validity.tokens import served_lengths
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.plan.file import PlanInfo
from harness.record.host import Host
from harness.record.manifest import Evidence, Replica, RunManifest, Tier
from harness.record.results import ERRORS
from harness.record.run_spec import RunSpec
from harness.slo import check_slo

SCHEMA = "harness.report/1"
DEFAULT_ATTAIN = 0.99
CAUTION_DUMMY = (
    "Dummy weights: the model's answers are meaningless. Only performance was measured, nothing of their quality."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Latencies, s."""

    ttft: Distribution
    service_ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    lag: Distribution
    session_lag: Distribution
    """How much later than the plan itself allows turns were due, since the answer before them had not ended
    (`analysis.rows.run`); null but for sessions that wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState:
    """The steady part and its figures; ``window`` says where it is, or why there is none. No figures without one, nor
    of arrivals (`analysis.steady.steady_rates`).
    """

    window: Steady | None
    total_token_throughput: Quantity
    output_token_throughput: Quantity
    usd_per_1m_total: Quantity
    usd_per_1m_output_only: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCount:
    """One error class: how often, what it means, one example."""

    error: str
    count: int
    meaning: str
    example: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What served."""

    version: str | None
    args: list[str]
    model_facts: dict[str, str]
    replicas: list[Replica]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(Framed):
    """Everything a report says about one run; field names are the JSON keys."""

    schema: str
    run: str
    run_id: str
    created: str
    evidence: Evidence
    verdict: Verdict
    reasons: list[str]
    checks: list[Check]
    window: Window | None
    requests: Counts
    tokens: Tokens
    metrics: Metrics
    rates: Rates
    """Throughput has an interval in a closed loop alone: elsewhere the load is given, and tokens/s are its own."""
    sampled: Rates
    """The same with the interval of another run of this length, whatever the loop: what capacity is interpolated with.
    No claim of a report, so JSON leaves it out."""
    offered: OfferedLoad
    fullness: Fullness
    slo: Slo | None
    errors: list[ErrorCount]
    cost: Cost
    steady: SteadyState
    fidelity: list[Fidelity]
    cache: CacheShares
    tier: Tier | None
    model: str
    label: str | None
    engine: str
    server: Server
    host: Host
    load: RunSpec
    plan: PlanInfo
    plan_sha256: str
    versions: dict[str, str]
    git: str | None
    assumptions: list[str]

    @property
    def dummy(self) -> bool:
        """Whether the weights were random."""
        return _dummy(self.server.model_facts)

    @property
    def costs_at_least(self) -> bool:
        """Whether steps took what a chip does at best, so that every cost is a lower bound."""
        return simulated.is_bound(self.server.model_facts)

    @property
    def caution(self) -> str | None:
        """What a reader must know before any figure; None when there is nothing."""
        return CAUTION_DUMMY if _dummy(self.server.model_facts) else simulated.words(self.server.model_facts)


def summarise(
    run: Run,
    slo: Mapping[str, float] | None = None,
    ratio: float = DEFAULT_RATIO,
    attain: float = DEFAULT_ATTAIN,
    min_requests: int | None = None,
) -> Summary:
    """All figures of a run. ``slo`` None: the limits the run was made with; {}: no limits.

    ``ratio``: what an output token costs in input tokens, for the split. ``attain``: share of requests that must meet
    the SLO. ``min_requests``: how many a verdict needs; None: as the run was made. Raises `UsageError` on limits, ratio
    or share that make no sense; never on what the run contains.
    """
    manifest = run.manifest
    limits = dict(manifest.spec.slo if slo is None else slo)
    check_slo(limits)
    check_ratio(ratio)
    if not 0 < attain <= 1:
        raise UsageError(f"attain {attain}: the share of requests to meet the SLO is above 0 and at most 1")
    counts, window, tokens = metrics.count(run), metrics.window(run.rows), metrics.tokens(run.rows)
    steady = steady_part(run, window)
    checks = [
        *check_run(run, counts, window, limits, min_requests),
        steady_check(run, steady),
        drain_check(run, window),
        backlog_check(run),
        (warm := warm_cache(run)),
    ]
    said = verdict(checks)
    queue = queue_of(run, window)
    judged = judge(run, limits, counts, attain, queue) if limits else None
    sampled, weighted = served_rates(run, window, tokens, counts, limits, ratio, queue)
    offered = offered_load(run)
    full = fullness(run, window, sampled.concurrency.value)
    note = (
        "; ".join(filter(None, (price_note(judged, served_lengths(run)), simulated.error_words(manifest.model_facts))))
        or None
    )
    rates = sampled
    if offered.kind != "closed":
        rates, weighted = given(sampled), given_rate(weighted)
        note = "; ".join(filter(None, (note, given_load_note(full))))
    reason = None if said == "VALID" else f"the run is {said}"
    if reason is None and shared_addresses(run):
        reason = "several servers answer at one address, so how many are paid for is not known (--metrics-url)"
    if reason is None and warm.ok is False:
        reason = REASON
    within = simulated.own_error(manifest.model_facts)
    price = partial(cost, manifest.tier, ratio=ratio, reason=reason, within=within)
    return Summary(
        schema=SCHEMA,
        run=str(run.path).encode(errors="replace").decode(),  # a path may hold bytes that no JSON can
        run_id=manifest.run_id,
        created=manifest.created,
        evidence=run.evidence,
        verdict=said,
        reasons=[f"{c.name}: {c.observed} (wanted: {c.bound}); {c.advice}" for c in checks if c.gate and c.ok is False],
        checks=checks,
        window=window,
        requests=counts,
        tokens=tokens,
        metrics=_metrics(run, queue),
        rates=rates,
        sampled=sampled,
        offered=offered,
        fullness=full,
        slo=judged,
        errors=_errors(run),
        cost=price(
            *_paid(run, window),
            total_rate=rates.total_token_throughput,
            output_rate=rates.output_token_throughput,
            weighted_rate=weighted,
            splits=measured_splits(run, window, tokens, counts.succeeded),
            note=note,
        ),
        steady=_steady_state(run, window, steady, rates, price),
        fidelity=fidelity(run),
        cache=cache_shares(run),
        tier=manifest.tier,
        model=manifest.model,
        label=manifest.label,
        engine=manifest.engine,
        server=_server(manifest),
        host=manifest.host,
        load=manifest.spec,
        plan=manifest.plan,
        plan_sha256=manifest.plan_sha256,
        versions=manifest.versions,
        git=manifest.git,
        assumptions=_assumptions(run, tokens, ratio),
    )


def _server(m: RunManifest) -> Server:
    return Server(version=m.engine_version, args=m.engine_args, model_facts=m.model_facts, replicas=m.replicas)


def _steady_state(
    run: Run, window: Window | None, steady: Steady | None, rates: Rates, price: Callable[..., Cost]
) -> SteadyState:
    """Throughput and price of the steady part, the same bins for tokens and for the bill."""
    total, output = steady_rates(run, window, steady, rates.total_token_throughput, rates.output_token_throughput)
    paid = price(*_paid(run, steady), total_rate=total, output_rate=output, weighted_rate=output, note=None)
    return SteadyState(
        window=steady, total_token_throughput=total, output_token_throughput=output,
        usd_per_1m_total=paid.usd_per_1m_total, usd_per_1m_output_only=paid.usd_per_1m_output_only,
    )  # fmt: skip


def claims(summary: Summary) -> dict[str, object]:
    """The summary as JSON has it: field by field, without what a report does not claim (`Summary.sampled`)."""
    return {f.name: getattr(summary, f.name) for f in fields(summary) if f.name != "sampled"}


def _dummy(model_facts: Mapping[str, str]) -> bool:
    return model_facts.get("source") == "dummy"


def exit_code(summary: Summary) -> int:
    """0 valid, 3 INVALID, 4 when valid but fewer than the wanted share of requests met every limit of the SLO, 5 TOO
    SMALL, or valid and the SLO could not be judged.
    """
    if summary.verdict == "INVALID":
        return EXIT_INVALID
    if summary.verdict == "TOO SMALL" or (summary.slo is not None and summary.slo.met is None):
        return EXIT_NOT_DECIDED
    return EXIT_SLO_MISSED if summary.slo is not None and not summary.slo.met else EXIT_VALID


def _metrics(run: Run, queue: Memory | None) -> Metrics:
    rows, chunks, none = run.rows, run.chunks, np.zeros(0)
    lag_s, turns = (none, none.astype(np.int64)) if run.turns is None else (run.turns.lag_s, rows.rank)
    waiting = "turns that wait for an answer"

    def per_request(
        metric: Callable[[Rows], Floats], queue: Memory | None = queue, waits: bool = False
    ) -> Distribution:
        values = metric(rows)
        return distribution(values, owners=rows.rank, unit="s", evidence=run.evidence, queue=queue, waits=waits)

    return Metrics(
        ttft=per_request(metrics.ttft, waits=True),
        service_ttft=per_request(metrics.service_ttft, waits=True),
        tpot=per_request(metrics.tpot),
        itl=distribution(
            chunks.gap_s,
            owners=chunks.gap_owner,
            weights=chunks.gap_tokens,
            unit="s",
            evidence=run.evidence,
            noun="gaps",
            queue=queue,
        ),
        e2e=per_request(metrics.e2e),
        lag=per_request(metrics.lag, None),  # of the client: it waits in no queue of the server
        session_lag=distribution(lag_s, owners=turns, unit="s", evidence=run.evidence, noun=waiting),
    )


def measured_splits(
    run: Run, window: Window | None, tokens: Tokens, n: int, cached_ratio: float | None = None
) -> list[Split]:
    """The bill divided by what the servers counted; each says so when it cannot be."""
    tier = run.manifest.tier
    usd = usage = samples = None
    if window is not None and tier is not None:
        usd = bill_usd(tier.usd_per_hour, _paid(run, window)[0], window.duration_s)
        samples = run_samples(run, window)
    if tokens.input is not None and tokens.output is not None and not tokens.missing:
        usage = token_mix(tokens.input, tokens.cached_input, tokens.output)
    return split_bill(usd, usage, samples, evidence=run.evidence, cached_ratio=cached_ratio, n=n)


def _paid(run: Run, span: Window | Steady | None) -> tuple[float, float | None]:
    """Servers that are paid for over a time, and its length, s."""
    start_s, end_s, duration_s = (None, None, None) if span is None else (span.start_s, span.end_s, span.duration_s)
    return paid_replicas(run.manifest, start_s, end_s), duration_s


def _errors(run: Run) -> list[ErrorCount]:
    found = []
    skipped = int(metrics.not_due(run).sum())
    for name, count in metrics.by_error(run)[1].items():
        if name == "unsent":
            count -= skipped
        if count <= 0:
            continue
        meaning = ERRORS.get(name, "an error class this harness does not know")
        found.append(ErrorCount(error=name, count=count, meaning=meaning, example=run.examples[name]))
    found.sort(key=lambda e: (-e.count, e.error))
    if run.lost:
        found.append(
            ErrorCount(error="lost", count=run.lost, meaning="planned, but there is no usable row of it", example=None)
        )
    return found


def _assumptions(run: Run, tokens: Tokens, ratio: float) -> list[str]:
    facts = run.manifest.model_facts
    said = [
        *filter(None, (CAUTION_DUMMY if _dummy(facts) else None, simulated.words(facts))),
        paid_words(run.manifest),
        f"the split is declared: an output token costs {ratio:g} input tokens",
        "latencies are of successful requests; intervals: 95 %, of another such run",
    ]
    if tokens.cached_input:
        said.append(f"{tokens.cached_input:,} input tokens came from the prefix cache and are priced like the rest")
    if tokens.wasted_output is None:
        said.append("failed requests had output of unknown length: paid for, not counted as sold")
    elif tokens.wasted_output:
        said.append(f"failed requests had {tokens.wasted_output:,} output tokens: paid for, not counted as sold")
    if unknown := metrics.untold(run.rows):
        said.append(f"itl: {unknown} requests did not say how many tokens a chunk holds; one sample per chunk there")
    return said + [f"plan: {note}" for note in run.manifest.plan.notes]
