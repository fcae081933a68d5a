"""One run in figures: `summarise` puts metrics, intervals, verdict and price into a tree that JSON prints as it is.

The JSON shape (``harness.report/1``) is a stable interface; METRICS.md lists its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from analysis import metrics
from analysis.check import Check
from analysis.intervals import Distribution, Quantity, distribution, rate, share
from analysis.load import Floats, Run
from analysis.metrics import Counts, Tokens, Window
from analysis.price import DEFAULT_RATIO, Cost, check_ratio, cost
from analysis.validity import MISMATCH_BOUND, check_run, is_valid
from harness.errors import EXIT_INVALID, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.plan import PlanInfo
from harness.results import ERRORS
from harness.run import Host, Replica, RunSpec, Tier

SCHEMA = "harness.report/1"
DEFAULT_ATTAIN = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Latencies, s."""

    ttft: Distribution
    service_ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2e: Distribution
    lag: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Per second over the window; ``concurrency`` is requests in flight, time average."""

    request_rate: Quantity
    request_throughput: Quantity
    input_token_throughput: Quantity
    output_token_throughput: Quantity
    total_token_throughput: Quantity
    goodput: Quantity
    concurrency: Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Per-request limits (s), the share that met all of them, the share wanted, and whether it was reached."""

    limits: dict[str, float]
    attainment: Quantity
    attain: float
    met: bool


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
class Summary:
    """Everything a report says about one run; field names are the JSON keys."""

    schema: str
    run: str
    run_id: str
    created: str
    evidence: str
    verdict: str
    reasons: list[str]
    checks: list[Check]
    window: Window | None
    requests: Counts
    tokens: Tokens
    metrics: Metrics
    rates: Rates
    slo: Slo | None
    errors: list[ErrorCount]
    cost: Cost
    tier: Tier | None
    model: str
    engine: str
    server: Server
    host: Host
    load: RunSpec
    plan: PlanInfo
    plan_sha256: str
    versions: dict[str, str]
    git: str | None
    assumptions: list[str]


def summarise(
    run: Run,
    slo: Mapping[str, float] | None = None,
    ratio: float = DEFAULT_RATIO,
    attain: float = DEFAULT_ATTAIN,
) -> Summary:
    """All figures of a run. ``slo`` None: the limits the run was made with; {}: no limits.

    ``ratio``: what an output token costs in input tokens, for the split. ``attain``: share of requests that must meet
    the SLO. Raises `UsageError` on limits, ratio or share that make no sense; never on what the run contains.
    """
    manifest = run.manifest
    limits = dict(manifest.spec.slo if slo is None else slo)
    metrics.check_slo(limits)
    check_ratio(ratio)
    if not 0 < attain <= 1:
        raise UsageError(f"attain {attain}: the share of requests to meet the SLO is above 0 and at most 1")
    counts, window, tokens = metrics.count(run), metrics.window(run.rows), metrics.tokens(run.rows)
    checks = check_run(run, counts, window, limits)
    valid = is_valid(checks)
    judged = _slo(run, limits, counts, attain) if limits else None
    rates, weighted = _rates(run, window, tokens, counts, limits, ratio)
    return Summary(
        schema=SCHEMA,
        run=str(run.path).encode(errors="replace").decode(),  # a path may hold bytes that no JSON can
        run_id=manifest.run_id,
        created=manifest.created,
        evidence=run.evidence,
        verdict="VALID" if valid else "INVALID",
        reasons=[f"{c.name}: {c.observed} (wanted: {c.bound}); {c.advice}" for c in checks if c.gate and c.ok is False],
        checks=checks,
        window=window,
        requests=counts,
        tokens=tokens,
        metrics=_metrics(run),
        rates=rates,
        slo=judged,
        errors=_errors(run),
        cost=cost(
            manifest.tier,
            len(manifest.replicas) or len(manifest.spec.base_urls),
            window.duration_s if window else None,
            total_rate=rates.total_token_throughput,
            output_rate=rates.output_token_throughput,
            weighted_rate=weighted,
            ratio=ratio,
            reason=None if valid else "the run is INVALID",
            note=None if judged is None or judged.met else "at this load the SLO is missed: not a price to sell at",
        ),
        tier=manifest.tier,
        model=manifest.model,
        engine=manifest.engine,
        server=Server(
            version=manifest.engine_version,
            args=manifest.engine_args,
            model_facts=manifest.model_facts,
            replicas=manifest.replicas,
        ),
        host=manifest.host,
        load=manifest.spec,
        plan=manifest.plan,
        plan_sha256=manifest.plan_sha256,
        versions=manifest.versions,
        git=manifest.git,
        assumptions=_assumptions(run, tokens, ratio),
    )


def exit_code(summary: Summary) -> int:
    """0 valid, 3 INVALID, 4 when valid but fewer than the wanted share of requests met every limit of the SLO."""
    if summary.verdict != "VALID":
        return EXIT_INVALID
    return EXIT_SLO_MISSED if summary.slo is not None and not summary.slo.met else EXIT_VALID


def _metrics(run: Run) -> Metrics:
    rows = run.rows
    gaps = metrics.itl(rows)

    def per_request(values: Floats) -> Distribution:
        return distribution(values, owners=rows.rank, unit="s", evidence=run.evidence)

    return Metrics(
        ttft=per_request(metrics.ttft(rows)),
        service_ttft=per_request(metrics.service_ttft(rows)),
        tpot=per_request(metrics.tpot(rows)),
        itl=distribution(
            gaps.seconds, owners=rows.rank[gaps.row], weights=gaps.tokens, unit="s", evidence=run.evidence, noun="gaps"
        ),
        e2e=per_request(metrics.e2e(rows)),
        lag=per_request(metrics.lag(rows)),
    )


def _rates(
    run: Run, window: Window | None, tokens: Tokens, counts: Counts, limits: Mapping[str, float], ratio: float
) -> tuple[Rates, Quantity]:
    """The rates, and input / ratio + output tokens per second, the denominator of the price split."""
    rows, evidence = run.rows, run.evidence
    asked = metrics.planned_rate(run)
    request_rate = Quantity(
        value=asked,
        n=len(run.planned_scheduled_s),
        unit="req/s",
        note="planned arrivals over their own span" if asked is not None else "no planned times",
        evidence="plan",
    )

    def blank(unit: str, why: str, n: int = 0) -> Quantity:
        return Quantity(value=None, n=n, unit=unit, note=why, evidence=evidence)

    if window is None:
        request, token = (blank(unit, "nothing was sent and ended") for unit in ("req/s", "tokens/s"))
        in_flight = blank("requests", "nothing was sent and ended")
        return Rates(
            request_rate=request_rate, request_throughput=request, input_token_throughput=token,
            output_token_throughput=token, total_token_throughput=token, goodput=request, concurrency=in_flight,
        ), token  # fmt: skip

    def per_second(times: Floats, amounts: Floats | None, unit: str, n: int, note: str | None = None) -> Quantity:
        binned = metrics.binned(times, amounts, window)
        return rate(binned, window.bin_s, n=n, unit=unit, evidence=evidence, note=note)

    good = metrics.meets_slo(rows, limits)
    out, into = metrics.output_token_events(rows), metrics.input_token_events(rows)
    both = tuple(np.concatenate(pair) for pair in zip(out, into, strict=True))
    scale = np.concatenate((np.ones(len(out[0])), np.full(len(into[0]), 1 / ratio)))
    n = counts.succeeded
    too_few = tokens.missing > MISMATCH_BOUND * n
    note = f"usage missing on {tokens.missing} of {n} requests" if tokens.missing else None

    def token_rate(total: int | None, times: Floats, amounts: Floats) -> Quantity:
        if total is None or too_few:
            return blank("tokens/s", note or "no request succeeded", n)
        return per_second(times, amounts, "tokens/s", n, note)

    busy_s = metrics.in_flight(rows, window) * window.bin_s
    all_known = None if tokens.input is None or tokens.output is None else tokens.input + tokens.output
    return Rates(
        request_rate=request_rate,
        request_throughput=per_second(rows.finished_s[rows.success], None, "req/s", n),
        input_token_throughput=token_rate(tokens.input, *into),
        output_token_throughput=token_rate(tokens.output, *out),
        total_token_throughput=token_rate(all_known, *both),
        goodput=per_second(rows.finished_s[good], None, "req/s", int(good.sum()))
        if limits
        else blank("req/s", "no SLO given (--slo)"),
        concurrency=rate(busy_s, window.bin_s, n=counts.sent, unit="requests", evidence=evidence),
    ), token_rate(all_known, both[0], both[1] * scale)


def _slo(run: Run, limits: dict[str, float], counts: Counts, attain: float) -> Slo:
    """Attainment over every request that was offered: failed, unfinished and lost ones did not meet it."""
    rows = run.rows
    met = np.zeros(len(rows), dtype=np.bool_)
    met[rows.rank] = metrics.meets_slo(rows, limits)
    due = np.ones(len(rows), dtype=np.bool_)
    due[rows.rank] = ~metrics.not_offered(run)
    flags = np.concatenate((met[due], np.zeros(counts.lost, dtype=np.bool_)))
    attainment = share(flags, unit="share of requests", evidence=run.evidence)
    return Slo(
        limits=limits,
        attainment=attainment,
        attain=attain,
        met=attainment.value is not None and attainment.value >= attain,
    )


def _errors(run: Run) -> list[ErrorCount]:
    """Error classes of the measured rows, most frequent first; lost requests last."""
    found = []
    skipped = int(metrics.not_due(run).sum())
    for item in pc.value_counts(run.rows.error).to_pylist():
        name, count = item["values"], item["counts"]
        if name == "unsent":
            count -= skipped
        if name is None or count <= 0:
            continue
        at = pc.index(run.rows.error, name).as_py()
        meaning = ERRORS.get(name, "an error class this harness does not know")
        found.append(ErrorCount(error=name, count=count, meaning=meaning, example=run.rows.detail[at].as_py()))
    found.sort(key=lambda e: (-e.count, e.error))
    if run.lost:
        found.append(
            ErrorCount(error="lost", count=run.lost, meaning="planned, but there is no usable row of it", example=None)
        )
    return found


def _assumptions(run: Run, tokens: Tokens, ratio: float) -> list[str]:
    said = [
        "one replica is one whole instance, paid from the first scheduled request to the last finish; idle hours, "
        "standby and start-up are not in the price",
        f"the split declares an output token to cost {ratio:g} input tokens; only the sum is measured",
        "latencies are those of successful requests; intervals are 95 %, for another run of this length and load",
    ]
    if tokens.cached_input:
        said.append(f"{tokens.cached_input:,} input tokens came from the prefix cache and are priced like the rest")
    if tokens.wasted_output is None:
        said.append("failed requests had output of unknown length: paid for, not counted as sold")
    elif tokens.wasted_output:
        said.append(f"failed requests had {tokens.wasted_output:,} output tokens: paid for, not counted as sold")
    unknown = metrics.itl(run.rows).unknown
    if unknown:
        said.append(f"itl: {unknown} requests did not say how many tokens a chunk holds; one sample per chunk there")
    return said + [f"plan: {note}" for note in run.manifest.plan.notes]
