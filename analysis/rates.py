"""What load was offered, what was served per second over the window, and which share of requests kept the SLO.

Load is of three kinds. In an *open loop* requests go out at times of their own, whatever the server does. In a *closed
loop* a fixed number is in flight, and a slow server slows its own load. *Sessions that wait* begin at times of their
own, but each turn waits for the answer before it (``--sessions wait``, ``--conversation live``): a slow server slows
the load within every session, so requests per second are an outcome, and the load is the rate of sessions started.

In an open loop the load is given, and so are throughput and cost at it: the tokens of an idle server are dear on any
hardware. So such a price is shown with how full the servers were (`Fullness`), by their own metrics each second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Bools, Floats
from harness.analysis.metrics import Counts, Tokens, Window
from harness.analysis.rows.run import LoadKind as LoadKind
from harness.analysis.rows.run import Rows, Run
from harness.analysis.stats.intervals import Quantity, rate, share, without_interval
from harness.analysis.stats.relaxation import ClosedLoop, Memory, relaxation
from harness.slo import criteria

SLOTS = "--max-num-seqs"
GIVEN = "the load is given"
"""Why throughput and cost of an open loop have no interval: they follow from a load that was chosen and estimate
nothing. In a closed loop and at capacity they say what the servers can do, and have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullness:
    """How full all servers together were over the window; None is not known."""

    in_flight: float | None
    running: float | None
    """Requests in the running batches, time average of what the servers said each second."""
    slots: int | None
    """Requests that the batches can hold: ``--max-num-seqs`` x replicas, where the engine's arguments say it."""
    slots_busy: float | None
    """``running`` / ``slots``."""
    engine_busy: float | None
    """Share of those seconds in which a server had any request in its batch, mean over servers."""
    kv_cache: float | None
    """Share of the KV cache in use, mean over seconds and servers."""

    @property
    def words(self) -> str:
        """The best that is known, in words."""
        if self.slots_busy is not None:
            return f"{self.slots_busy:.0%} of {self.slots} slots busy"
        if self.engine_busy is not None and self.running is not None:
            return f"engines at work {self.engine_busy:.0%} of the time, {self.running:.3g} requests in their batches"
        if self.in_flight is not None:
            return f"{self.in_flight:.3g} requests in flight on average"
        return "how full they were is not known"


def fullness(run: Run, window: Window | None, in_flight: float | None) -> Fullness:
    """How full the servers of a run were in its window; ``in_flight``: time average at the client."""
    slots = _slots(run, window)
    running, busy = _gauge(run, window, "running"), None
    at_once = None if running is None else float(sum(batch.mean() for batch in running))
    if running is not None:
        busy = float(np.mean([(batch > 0).mean() for batch in running]))
    caches = _gauge(run, window, "kv_cache_usage")
    return Fullness(
        in_flight=in_flight, running=at_once, slots=slots,
        slots_busy=at_once / slots if at_once is not None and slots else None, engine_busy=busy,
        kv_cache=None if caches is None else float(np.mean([cache.mean() for cache in caches])),
    )  # fmt: skip


def _gauge(run: Run, window: Window | None, name: str) -> list[Floats] | None:
    """A gauge of each server in the window; None where a server was not sampled there, or said no number."""
    made: list[Floats] = []
    if window is None:
        return None
    for table in run.server_tables() or ():
        time_s = table.column("t_ns").to_numpy() / 1e9
        inside = (time_s >= window.start_s) & (time_s <= window.end_s)
        values = table.column(name).to_numpy().astype(np.float64)[inside]
        if not len(values) or not np.isfinite(values).all():
            return None
        made.append(values)
    return made or None


def given_load_note(full: Fullness) -> str:
    """What a reader of a price must know where the load was given."""
    return (
        f"the cost at this load, which was given ({full.words}): not what a token costs on full servers, which "
        "harness capacity measures"
    )


def _slots(run: Run, window: Window | None) -> int | None:
    words = [word for arg in run.manifest.engine_args for word in arg.split("=", 1)]
    if SLOTS not in words[:-1]:
        return None
    said = words[words.index(SLOTS) + 1]
    if not said.isdigit() or not int(said):
        return None
    servers: float = len(run.manifest.replicas)
    if window is not None and run.manifest.lives:
        servers = run.manifest.rented(window.start_s, window.end_s)
    return round(int(said) * max(1, servers))


KIND_WORDS: dict[LoadKind, str] = {"open": "open loop", "closed": "closed loop", "sessions": "sessions that wait"}
LOAD_UNIT: dict[LoadKind, str] = {"open": "req/s", "closed": "in flight", "sessions": "sessions/s"}
"""What a load of each kind is counted in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """What was really offered, of the measured requests. Rates are known exactly and have no interval."""

    kind: LoadKind
    sent_rate: Quantity
    """req/s: (n - 1) / (last - first time sent). Null below two requests, or when all were sent at one instant."""
    session_rate: Quantity
    """Sessions started per second: (n - 1) / (last - first planned time) of the first turns that were sent. Null but
    for sessions that wait. A plan of windows cuts sessions, and what is left of one begins none: there it is planned
    requests/s over the trace's requests for each session."""
    requests_per_session: float | None
    """Requests that were planned over sessions that were; null but for sessions that wait. With ``session_rate`` it is
    the rate of requests that a server asks for that keeps up."""


def offered_load(run: Run) -> OfferedLoad:
    """What was offered to the servers of a run."""
    kind = run.load_kind
    rows, evidence = run.rows, run.evidence
    sent = np.isfinite(rows.sent_s)

    def rate(times_s: Floats, unit: str, why: str) -> Quantity:
        n = len(times_s)
        span_s = float(times_s.max() - times_s.min()) if n else 0.0
        value = (n - 1) / span_s if span_s > 0 else None
        return Quantity(value=value, n=n, unit=unit, note=None if value is not None else why, evidence=evidence)

    starts = per_session = None
    if run.turns is not None:
        first = run.turns.first
        starts = rows.scheduled_s[sent & first]
        begun = int(np.count_nonzero(first))
        per_session = len(rows) / begun if begun else None
    why = "nothing is a session that waits" if starts is None else "fewer than two sessions were started"
    session_rate = rate(np.zeros(0) if starts is None else starts, "sessions/s", why)
    plan = run.manifest.plan
    if starts is not None and plan.windows and plan.source is not None and plan.planned_rate:
        per_session = plan.source.requests_per_session
        session_rate = replace(session_rate, value=plan.planned_rate / per_session, note=None)
    return OfferedLoad(
        kind=kind,
        sent_rate=rate(rows.sent_s[sent], "req/s", "fewer than two requests were sent"),
        session_rate=session_rate,
        requests_per_session=per_session,
    )


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


def queue_of(run: Run, window: Window | None) -> Memory | None:
    """The memory of the run: of a closed loop its slots, of an open loop what its series show. None without a window.

    Work is output tokens, or requests where too many of these are not known.
    """
    if window is None:
        return None
    if run.manifest.spec.mode != "open":
        return ClosedLoop(concurrency=run.manifest.spec.concurrency or 1)
    rows = run.rows
    sent = metrics.was_sent(rows)
    sent_s = rows.sent_s[sent]
    came = metrics.binned(sent_s, None, window)
    sold = rows.output_tokens[sent]
    known = np.isfinite(sold)
    if known.sum() < (1 - metrics.MISMATCH_BOUND) * rows.success[sent].sum():
        finished_s = rows.finished_s[sent]
        work_came, work_done = came, metrics.binned(finished_s[np.isfinite(finished_s)], None, window)
    else:
        sold_then = known & rows.success[sent]
        work_came = metrics.binned(sent_s[sold_then], sold[sold_then], window)
        work_done = np.asarray(run.chunks.output_tokens, dtype=np.float64)
    return relaxation(
        in_flight=metrics.in_flight(rows, window), came=came, work_came=work_came, work_done=work_done,
        bin_s=window.bin_s,
    )  # fmt: skip


def served_rates(
    run: Run,
    window: Window | None,
    tokens: Tokens,
    counts: Counts,
    limits: Mapping[str, float],
    ratio: float,
    queue: Memory | None,
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
        request, token, flying = (
            blank(unit, "nothing was sent and ended") for unit in ("req/s", "tokens/s", "requests")
        )
        return Rates(
            request_rate=request_rate, request_throughput=request, input_token_throughput=token,
            output_token_throughput=token, total_token_throughput=token, goodput=request, concurrency=flying,
        ), token  # fmt: skip

    def requests(which: Bools) -> Quantity:
        ended = metrics.binned(rows.finished_s[which], None, window)
        return rate(ended, window.bin_s, n=int(which.sum()), unit="req/s", evidence=evidence)

    unknown, short = metrics.unjudged(limits, rows, counts), None if queue is None else queue.note
    out, into = run.chunks.output_tokens, metrics.binned(*metrics.input_token_events(rows), window)
    n = counts.succeeded
    too_few = tokens.missing > metrics.MISMATCH_BOUND * n
    note = f"usage missing on {tokens.missing} of {n} requests" if tokens.missing else None

    def token_rate(total: int | None, per_bin: Floats) -> Quantity:
        if total is None or too_few:
            return blank("tokens/s", note or "no request succeeded", n)
        return rate(per_bin, window.bin_s, n=n, unit="tokens/s", evidence=evidence, note=note)

    busy_s = metrics.in_flight(rows, window) * window.bin_s
    flying = rate(busy_s, window.bin_s, n=counts.sent, unit="requests", evidence=evidence)
    all_known = None if tokens.input is None or tokens.output is None else tokens.input + tokens.output
    good = requests(metrics.meets_slo(rows, limits)) if limits else blank("req/s", "no SLO given (--slo)")
    return Rates(
        request_rate=request_rate,
        request_throughput=requests(rows.success),
        input_token_throughput=token_rate(tokens.input, into),
        output_token_throughput=token_rate(tokens.output, out),
        total_token_throughput=token_rate(all_known, out + into),
        goodput=blank("req/s", unknown, n) if unknown else good,
        concurrency=without_interval(flying, short),
    ), token_rate(all_known, out + into / ratio)


def given(rates: Rates) -> Rates:
    """The rates at a load that was given: how fast it was served is the load's own."""
    served = [f.name for f in fields(rates) if f.name not in ("request_rate", "concurrency")]
    return replace(rates, **{name: given_rate(getattr(rates, name)) for name in served})


def given_rate(q: Quantity) -> Quantity:
    """A rate at a load that was given, which has no interval."""
    return q if q.value is None else replace(q, low=None, high=None, note=q.note or GIVEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One criterion of the SLO and what became of it."""

    name: str
    limits: dict[str, float]
    wanted: float
    """Share of offered requests that are to keep all its limits."""
    attainment: Quantity
    met: bool | None
    """None: not known, since a limit is on what was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """An SLO and how far it was met (`harness.slo` has the rules)."""

    limits: dict[str, float]
    attainment: Quantity
    """Share of offered requests that were within every limit, each percentile's own among them: what goodput counts."""
    attain: float
    """Share wanted of the limits without a percentile."""
    met: bool | None
    """Every criterion was met; None: none was missed, and of some it is not known."""
    criteria: list[Judged]


def price_note(slo: Slo | None, served: str | None = None) -> str | None:
    """What the SLO says of a price at this load, and which answers it is the price of (``served``: other lengths than
    the plan's, in words).
    """
    said = [] if served is None else [f"the price of the answers that were served: {served}"]
    if slo is not None and slo.met is None:
        said.insert(0, "whether the SLO is kept at this load is not known")
    elif slo is not None and not slo.met:
        said.insert(0, "at this load the SLO is missed: not a price to sell at")
    return "; ".join(said) or None


def judge(run: Run, limits: dict[str, float], counts: Counts, attain: float, queue: Memory | None = None) -> Slo:
    """Attainment over every request that was offered: failed, unfinished and lost ones did not meet it."""
    rows = run.rows
    left_out = _in_time(rows, metrics.not_offered(run))

    def attained(within: Mapping[str, float]) -> Quantity:
        if why := metrics.unjudged(within, rows, counts):
            unit = "share of requests"
            return Quantity(value=None, n=counts.offered, unit=unit, note=why, evidence=run.evidence)
        met = np.zeros(counts.offered, np.bool_)  # lost ones last: they met nothing
        offered = _in_time(rows, metrics.meets_slo(rows, within))[~left_out]
        met[: len(offered)] = offered
        return share(met, unit="share of requests", evidence=run.evidence, queue=queue)

    judged = []
    for one in criteria(limits, attain):
        kept = attained(one.limits)
        met = None if kept.value is None and counts.offered else (kept.value or 0.0) >= one.wanted
        judged.append(Judged(name=one.name, limits=dict(one.limits), wanted=one.wanted, attainment=kept, met=met))
    every = [one.met for one in judged]
    met = False if False in every else None if None in every else True
    return Slo(limits=limits, attainment=attained(limits), attain=attain, met=met, criteria=judged)


def _in_time(rows: Rows, flags: Bools) -> Bools:
    found = np.zeros(len(rows), np.bool_)
    found[rows.rank] = flags
    return found
