"""Trace -> plan: how many requests, and when. Everything random is drawn before the clock starts, from one seed.

The trace is read twice, in constant memory: once to count it and learn its times (`_survey`), once to write its
requests (`harness.batches`).
"""

from __future__ import annotations

import contextlib
import math
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.arrivals import Stage, Times, arrival_times, check_process, constant_stage
from harness.batches import Batches
from harness.errors import PlanError, UsageError
from harness.plan import SCHEMA_VERSION, PlanInfo, PlanSpec, write_plan
from harness.prompts import Vocabulary
from harness.trace import Trace


def build_plan(trace: Trace, out: Path, spec: PlanSpec, vocabulary: Vocabulary | None = None) -> PlanInfo:
    """Write the plan of ``trace`` to ``out`` and say what is in it. Equal arguments write equal bytes.

    Request i is row i of the trace, whatever decides its time.

    Prompts: text and messages of the trace are sent as they are, recorded answers of earlier turns included. Of rows
    that say lengths only, prompts of exactly that length are made from ``vocabulary`` and depend on (seed, request_id)
    alone, or on (seed, prefix ids) where the trace has them; requests that share leading ids share those tokens.

    Sessions stay whole (one ``slice``). With ``sessions="wait"`` a turn waits for the row before it of its session, and
    for ``think_s`` where the trace has it; a turn number that goes back is refused.

    Raises `UsageError` for options that exclude each other, need times the trace lacks, or more requests than it has;
    `PlanError` when the file exists or cannot be written or prompts cannot be made; `TraceError` from reading.
    """
    _check(spec)
    if out.exists():
        raise PlanError(f"{out}: exists already; plans are never overwritten, choose another name")
    stages = (spec.stages or constant_stage(spec.rate or 0.0, spec.duration_s)) if spec.drawn else ()
    survey, scheduled = _drawn(trace, spec, stages, vocabulary) if spec.drawn else _own(trace, spec, vocabulary)
    n = survey.requests if scheduled is None else len(scheduled)
    if spec.closed and spec.repeat and spec.limit is not None:
        n = spec.limit
    warmup = _warmup(spec, scheduled, n)
    cancelled = _choose(spec, n)
    own_rate = _rate(survey.arrivals)
    info = PlanInfo(
        schema_version=SCHEMA_VERSION,
        trace=trace.path.name,
        trace_format=trace.format,
        trace_sha256=trace.sha256,
        rows_read=survey.requests + sum(trace.rows_dropped.values()),
        rows_kept=survey.requests,
        rows_dropped=dict(trace.rows_dropped),
        arrivals="closed" if spec.closed else spec.arrivals,
        speed=None if spec.closed or spec.drawn else survey.speed,
        source_rate=own_rate,
        planned_rate=None if scheduled is None else _rate(scheduled),
        seed=spec.seed,
        tokenizer=vocabulary.name if vocabulary is not None and survey.lengths_only else None,
        requests=n,
        span_s=None if scheduled is None else int(scheduled[-1] - scheduled[0]) / 1e9,
        notes=_notes(trace, spec, survey, scheduled, cancelled),
        burstiness=spec.burstiness,
        stages=list(stages),
        cycles=-(-n // survey.requests),
        warmup_requests=warmup,
        sessions=spec.sessions,
    )
    write_plan(out, info, Batches(trace, spec, vocabulary, survey.requests, scheduled, warmup, cancelled).of(n))
    return info


def _check(spec: PlanSpec) -> None:
    for name, value in (
        ("speed", spec.speed), ("rate", spec.rate), ("duration", spec.duration_s), ("warm-up", spec.warmup_s),
        ("cancel time", spec.cancel_after_s),
    ):  # fmt: skip
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value:g}, must be a number above 0")
    for name, count in (
        ("limit", spec.limit), ("max output tokens", spec.max_output_tokens), ("warm-up", spec.warmup_requests)
    ):  # fmt: skip
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, must be at least 1")
    if spec.sessions not in ("trace", "wait"):
        raise UsageError(f"sessions {spec.sessions!r}: valid: trace, wait")
    if not 0 <= spec.cancel_share <= 1 or (spec.cancel_share > 0 and spec.cancel_after_s is None):
        raise UsageError(f"cancel share {spec.cancel_share:g}: must be 0 to 1, with a time to hang up after")
    if spec.warmup_s is not None and spec.warmup_requests is not None:
        raise UsageError("warm-up by time and by requests exclude each other: give one")
    _check_times(spec)


def _check_times(spec: PlanSpec) -> None:
    """What decides the times must be one thing."""
    given = [
        name
        for name, on in (
            ("closed loop", spec.closed), ("speed", spec.speed is not None), ("rate", spec.rate is not None),
            ("stages", bool(spec.stages)),
        )
        if on
    ]  # fmt: skip
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: each decides when requests are sent; give one")
    if spec.closed:
        if spec.arrivals != "trace":
            raise UsageError(f"a closed loop has no arrivals: drop {spec.arrivals} arrivals, or the concurrency")
        if spec.duration_s is not None or spec.warmup_s is not None:
            what = "duration" if spec.duration_s is not None else "warm-up time"
            raise UsageError(f"a closed loop has no planned times to cut by: give the {what} to the run instead")
    if spec.drawn:
        check_process(spec.arrivals, spec.burstiness)
        if spec.speed is not None or not (spec.stages or spec.rate is not None):
            raise UsageError(f"{spec.arrivals} arrivals need a request rate (--rate or --stages), and no speed")
        if spec.arrivals == "gamma" and spec.burstiness is None:
            raise UsageError("gamma arrivals need a burstiness: 1 is Poisson, 0.25 has twice its spread")
    elif spec.burstiness is not None or spec.stages:
        what = "burstiness" if spec.burstiness is not None else "stages"
        raise UsageError(f"{what} needs arrivals that are drawn: add --arrivals poisson, constant or gamma")
    if spec.stages and spec.duration_s is not None:
        raise UsageError("stages have their own durations: drop the duration")
    if spec.repeat and spec.limit is None and spec.duration_s is None and not spec.stages:
        raise UsageError("repeating the trace needs an end: a limit, a duration or stages")


# --- times -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Survey:
    """What one reading of the trace found: an integer per request, never the requests."""

    requests: int
    arrivals: Times
    """ns from the first; empty when the trace has no times."""
    lengths_only: int
    longest_output: int
    open_ended: int
    """Rows that do not say how many tokens to generate."""
    hang_ups: int
    adapters: tuple[str, ...]
    """Models or adapters that rows ask for, the first few."""
    ended_early: bool
    speed: float = 1.0
    """Factor on the trace's clock."""


_ADAPTERS_LISTED = 8


def _survey(
    trace: Trace, limit: int | None, timed: bool, vocabulary: Vocabulary | None, cut_ns: float | None = None
) -> _Survey:
    """Read the trace up to ``limit`` rows or the first at or after ``cut_ns`` (trace clock)."""
    arrivals = array("q")
    requests = lengths_only = longest_output = open_ended = hang_ups = 0
    adapters: dict[str, None] = {}
    ended_early = False
    with contextlib.closing(iter(trace)) as records:
        for record in records:
            if record.arrival_s is not None:
                arrival_ns = round(record.arrival_s * 1e9)
                if cut_ns is not None and arrival_ns >= cut_ns:
                    ended_early = True
                    break
                arrivals.append(arrival_ns)
            elif timed:
                raise UsageError(
                    f"{trace.path}: the trace has no arrival times, so there is nothing to replay in time; "
                    "use --concurrency for a closed loop, or --arrivals poisson --rate R"
                )
            requests += 1
            if record.text is None and record.messages is None:
                lengths_only += 1
                if vocabulary is None:
                    raise PlanError(
                        f"{trace.path}:{record.line}: the row has lengths but no text, so a prompt must be made; give "
                        "the tokenizer of the model (--tokenizer FILE), or name a server to learn its token ids from"
                    )
            longest_output = max(longest_output, record.output_tokens or 0)
            open_ended += record.output_tokens is None
            hang_ups += record.cancel_after_s is not None
            if record.adapter is not None and len(adapters) <= _ADAPTERS_LISTED:
                adapters[record.adapter] = None
            if requests == limit:
                ended_early = True
                break
    return _Survey(
        requests=requests, arrivals=np.array(arrivals, dtype=np.int64), lengths_only=lengths_only,
        longest_output=longest_output, open_ended=open_ended, hang_ups=hang_ups,
        adapters=tuple(adapters), ended_early=ended_early,
    )  # fmt: skip


def _drawn(
    trace: Trace, spec: PlanSpec, stages: tuple[Stage, ...], vocabulary: Vocabulary | None
) -> tuple[_Survey, Times]:
    """Times from an arrival process; the trace has to have as many rows, or be repeated."""

    def draw(most: int | None) -> Times:
        return arrival_times(spec.arrivals, stages, burstiness=spec.burstiness or 1.0, seed=spec.seed, most=most)

    if stages[-1].duration_s is None:
        survey = _survey(trace, spec.limit, False, vocabulary)
        return survey, draw(spec.limit if spec.repeat else survey.requests)
    scheduled = draw(spec.limit)
    needed = len(scheduled)
    if not needed:
        raise UsageError("not one arrival falls into the stages: a longer time, a higher rate or another seed")
    survey = _survey(trace, needed, False, vocabulary)
    if survey.requests < needed and not spec.repeat:
        raise UsageError(
            f"{trace.path}: {needed} requests arrive in the {sum(s.duration_s or 0 for s in stages):g} s asked for, "
            f"the trace has {survey.requests}: ask for less, or begin the trace again when it runs out (--repeat)"
        )
    return survey, scheduled


def _own(trace: Trace, spec: PlanSpec, vocabulary: Vocabulary | None) -> tuple[_Survey, Times | None]:
    """The trace's own times on a faster or slower clock; none in a closed loop."""
    rows, cut_ns = spec.limit, None
    if spec.rate is not None and spec.duration_s is not None:
        # Rounded first: 0.1 x 30 must be 3 rows, not 4.
        asked = math.ceil(round(spec.rate * spec.duration_s, 6))
        rows = asked if rows is None else min(asked, rows)
    elif spec.duration_s is not None:
        cut_ns = spec.duration_s * 1e9 * (spec.speed or 1.0)  # on the trace's clock
    survey = _survey(trace, rows, not spec.closed, vocabulary, cut_ns)
    if spec.closed:
        return survey, None
    arrivals = _cycled(trace, survey.arrivals, rows, cut_ns) if spec.repeat else survey.arrivals
    speed = _speed(trace, arrivals, spec)
    return replace(survey, speed=speed), _rescale(arrivals, speed)


def _cycled(trace: Trace, arrivals: Times, rows: int | None, cut_ns: float | None) -> Times:
    """Arrivals of a trace that begins again, one mean gap after its last row, up to ``rows`` or ``cut_ns``."""
    n, span = len(arrivals), int(arrivals[-1])
    if not span:
        raise UsageError(f"{trace.path}: all rows arrive at one instant: there is no time to begin it again")
    period = span + max(span // (n - 1), 1)
    cycles = min(
        math.inf if rows is None else -(-rows // n), math.inf if cut_ns is None else math.ceil(cut_ns / period)
    )
    if cycles * period >= 2**63:
        raise UsageError("the trace would be repeated for more than 292 years: a lower limit or duration")
    times: Times = (np.arange(max(int(cycles), 1), dtype=np.int64)[:, None] * period + arrivals).ravel()[:rows]
    return times if cut_ns is None else times[times < cut_ns]


def _rate(arrivals: Times) -> float | None:
    """Mean arrival rate, req/s: (n - 1) / span; None below two rows or when all arrive at one instant.

    n - 1, because n arrivals have n - 1 gaps: k requests a second apart arrive at 1 req/s, not at k / (k - 1).
    """
    if len(arrivals) < 2 or arrivals[-1] == arrivals[0]:
        return None
    return (len(arrivals) - 1) * 1e9 / int(arrivals[-1] - arrivals[0])


def _speed(trace: Trace, arrivals: Times, spec: PlanSpec) -> float:
    if spec.rate is None:
        return 1.0 if spec.speed is None else spec.speed
    own = _rate(arrivals)
    if own is None:
        what = "only one row is" if len(arrivals) == 1 else f"all {len(arrivals)} rows are"
        raise UsageError(
            f"{trace.path}: {what} kept at one instant, which no change of clock turns into {spec.rate:g} requests/s; "
            "keep more rows (--limit, --duration), or use --concurrency or --arrivals poisson"
        )
    return spec.rate / own


def _rescale(arrivals: Times, speed: float) -> Times:
    if speed == 1.0:
        return arrivals  # exact: no float in between
    scheduled = np.rint(arrivals / speed)
    if scheduled[-1] >= 2**63:
        raise UsageError(f"speed {speed:g} stretches the trace beyond 292 years; speed above 1 is faster")
    return scheduled.astype(np.int64)


def _warmup(spec: PlanSpec, scheduled: Times | None, n: int) -> int:
    """How many of the first requests are warm-up."""
    warmup = spec.warmup_requests or 0
    if spec.warmup_s is not None and scheduled is not None:
        warmup = int(np.searchsorted(scheduled, spec.warmup_s * 1e9))
    if warmup >= n:
        raise UsageError(f"all {n} requests would be warm-up: nothing is left to be measured; shorten it")
    return warmup


def _choose(spec: PlanSpec, n: int) -> npt.NDArray[np.bool_]:
    """Which requests' clients hang up."""
    generator = np.random.Generator(np.random.PCG64([spec.seed & (2**64 - 1), *b"cancel"]))
    chosen: npt.NDArray[np.bool_] = generator.random(n) < spec.cancel_share
    return chosen


def _draw_note(spec: PlanSpec, scheduled: Times) -> list[str]:
    """What a short draw did to the rate that was asked for."""
    if spec.limit is not None and spec.stages:
        return []
    until_s = spec.duration_s or int(scheduled[-1]) / 1e9
    expected = sum(s.requests for s in spec.stages) if spec.stages else (spec.rate or 0.0) * until_s
    n = len(scheduled)
    if abs(n - expected) <= max(1.0, 0.05 * expected):
        return []
    return [f"{n} arrivals were drawn in a time for {expected:.0f}: that is chance; more requests come closer to it"]


def _notes(
    trace: Trace, spec: PlanSpec, survey: _Survey, scheduled: Times | None, cancelled: npt.NDArray[np.bool_]
) -> list[str]:
    notes = list(trace.notes)
    n = len(cancelled)
    if spec.drawn and scheduled is not None:
        notes += _draw_note(spec, scheduled)
    if survey.ended_early:
        notes.append(f"reading stopped after {survey.requests} usable rows (limit or duration)")
    elif scheduled is not None and spec.duration_s is not None and scheduled[-1] < 0.95e9 * spec.duration_s:
        notes.append(f"the trace ends at {int(scheduled[-1]) / 1e9:.1f} s of the {spec.duration_s:g} s asked for")
    if n > survey.requests:
        texts = survey.requests - survey.lengths_only
        notes.append(
            f"the trace's {survey.requests} rows are sent {n / survey.requests:.3g} times over; "
            + ("texts repeat word for word, so a prefix cache knows them" if texts else "prompts are new each time")
        )
    if spec.max_output_tokens is not None and survey.longest_output > spec.max_output_tokens:
        notes.append(
            f"output lengths capped at {spec.max_output_tokens} tokens, the longest is {survey.longest_output}: "
            "the load is lighter than the trace's"
        )
    if cancelled.any():
        notes.append(f"{int(cancelled.sum())} of {n} clients hang up {spec.cancel_after_s:g} s after they sent")
    if survey.hang_ups:
        notes.append(f"{survey.hang_ups} rows of the trace record a client that hung up: it does so again")
    if survey.adapters:
        more = " and more" if len(survey.adapters) > _ADAPTERS_LISTED else ""
        notes.append(f"rows ask for their own model: {', '.join(survey.adapters[:_ADAPTERS_LISTED])}{more}")
    if survey.open_ended and spec.max_output_tokens is None:
        notes.append(
            f"{survey.open_ended} rows do not say how many tokens to generate: the server decides "
            "(vLLM's completions end after 16 tokens)"
        )
    return notes
