"""Trace -> plan: how many requests, and when. Everything random is drawn before the clock starts, from one seed.

The trace is read twice: once to count it and learn its times (`harness.trace.survey`), once to write its requests
(`harness.plan.batches`). In memory are one batch of prompts and a few numbers of every request (eight bytes for its
time, some more where another demand is made); sessions lie in a file where they are many (`harness.trace.spool`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from harness.errors import PlanError, UsageError
from harness.plan.arrivals import Arrangement, Stage, Times, arrange, arrival_times, constant_stage, period_of, spread
from harness.plan.batches import Batches
from harness.plan.chat import Chat, live_notes, reasons
from harness.plan.file import SCHEMA_VERSION, PlanInfo, Windows, write_plan
from harness.plan.notes import notes
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec, check_spec, load_seed
from harness.plan.windows import Joined, windows_in_time, windows_of_rows
from harness.trace.io import Trace
from harness.trace.stats import arrival_stats, mean_rate
from harness.trace.survey import Content, Survey, survey

Choose = Callable[[Content], tuple[Vocabulary | None, bool]]
"""From what the trace holds: what to make prompts from, if anything, and whether they go to a chat endpoint."""


def build_plan(
    trace: Trace, out: Path, spec: PlanSpec, vocabulary: Vocabulary | None = None, *, choose: Choose | None = None
) -> PlanInfo:
    """Write the plan of ``trace`` to ``out`` and say what is in it. Equal arguments write equal bytes.

    Text and messages of the trace are sent as they are, recorded answers of earlier turns included. Of rows that say
    lengths only, prompts of exactly that length are made from ``vocabulary``: each from (seed, request_id), or (seed,
    prefix ids) where the trace has them. A turn that continues its session (`harness.trace.prefix`) begins with the
    prompt before it and an answer made up for it. ``choose`` says the vocabulary and ``as_text`` once the trace was
    read. Sessions stay whole; with ``sessions="wait"`` a turn waits for the row before it of its session.

    Raises `UsageError` for options that exclude each other, need times the trace lacks, or more requests than it has;
    `PlanError` when the file exists or cannot be written or prompts cannot be made; `TraceError` from reading.
    """
    check_spec(spec)
    if out.exists():
        raise PlanError(f"{out}: exists already; plans are never overwritten, choose another name")
    made_up = vocabulary is not None or choose is not None
    stages = tuple(spec.stages or constant_stage(spec.rate or 0.0, spec.duration_s)) if spec.drawn else ()
    if spec.windows is not None:
        timed = _windowed(trace, spec, spec.windows, stages, made_up)
    elif spec.drawn:
        timed = _drawn(trace, spec, stages, made_up)
    elif spec.regrown:
        timed = _grown(trace, spec, made_up)
    else:
        timed = _own(trace, spec, made_up)
    found, scheduled, joined = timed.survey, timed.scheduled, timed.windows
    if choose is not None:
        vocabulary, as_text = choose(found.content)
        spec = replace(spec, as_text=as_text)
    vocabulary = vocabulary if found.content.lengths_only or spec.bare else None
    chat = Chat.of(vocabulary) if vocabulary is not None and spec.as_text else None
    if joined is not None:
        n = len(joined.arrangement.part)
    elif scheduled is not None:
        n = len(scheduled)
    else:
        n = spec.limit if spec.repeat and spec.limit is not None else found.requests
    warmup = _warmup(spec, scheduled, n)
    generator = np.random.Generator(np.random.PCG64([load_seed(spec.seed) & (2**64 - 1), *b"cancel"]))
    cancelled = generator.random(n) < (spec.cancel[0] if spec.cancel else 0.0)
    planned = None if scheduled is None else arrival_stats(scheduled)
    own_clock = scheduled is not None and not spec.drawn
    info = PlanInfo(
        schema_version=SCHEMA_VERSION,
        trace=trace.path.name,
        trace_format=trace.format,
        trace_sha256=trace.sha256,
        rows_read=found.requests + sum(trace.rows_dropped.values()),
        rows_kept=found.requests,
        rows_dropped=dict(trace.rows_dropped),
        arrivals="closed" if spec.closed else spec.arrivals,
        speed=timed.speed if own_clock else None,
        source_rate=mean_rate(found.arrivals),
        planned_rate=planned.rate if planned else None,
        seed=spec.seed,
        tokenizer=None if vocabulary is None else vocabulary.name,
        requests=n,
        span_s=planned.span_s if planned else None,
        notes=[],
        burstiness=spec.burstiness,
        stages=list(stages),
        cycles=joined.cycles if joined else -(-n // found.requests) if timed.arrangement is None else 1,
        warmup_requests=warmup,
        sessions=spec.sessions,
        conversation=spec.conversation,
        rescale=timed.rescale,
        grow=timed.grow,
        spread_s=timed.spread_s,
        template=None if chat is None else chat.template,
        cut=timed.cut,
        source=found.stats,
        planned=planned,
        windows=joined.windows if joined else [],
        busiest=spec.windows is not None and spec.windows.busiest,
        trace_share=joined.trace_share if joined else None,
    )
    batches = Batches(trace, spec, vocabulary, found.requests, scheduled, warmup, cancelled, chat, timed.arrangement)
    info.notes.extend(notes(trace, spec, info, found, scheduled, int(cancelled.sum()), chat))
    if spec.conversation == "live":
        info.notes.extend(_live_notes(trace, batches, n))
    write_plan(out, info, batches.of(n))
    return info


def _live_notes(trace: Trace, batches: Batches, n: int) -> list[str]:
    """What becomes of the conversations, which only a reading of all tells. Raises `UsageError` when none is live."""
    for _ in batches.of(n):
        pass
    assert batches.live is not None
    if not batches.live.continued:
        why = reasons(batches.live) or "no session has a second turn"
        raise UsageError(f"{trace.path}: no turn can carry the server's own answers (--conversation live): {why}")
    return live_notes(batches.live)


# --- times -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What was read, and when what of it is to be sent; see `PlanInfo` for what has the same name there."""

    survey: Survey
    scheduled: Times | None = None
    """null in a closed loop."""
    speed: float = 1.0
    arrangement: Arrangement | None = None
    grow: float | None = None
    spread_s: float | None = None
    cut: bool = False
    windows: Joined | None = None

    @property
    def rescale(self) -> Literal["compress", "thin", "superpose"] | None:
        if self.grow is not None:
            return "thin" if self.grow < 1 else "superpose"
        return None if self.speed == 1.0 else "compress"


def _draw(spec: PlanSpec, stages: tuple[Stage, ...], most: int | None) -> Times:
    times = arrival_times(
        spec.arrivals, stages, burstiness=spec.burstiness or 1.0, seed=load_seed(spec.seed), most=most
    )
    if not len(times):
        raise UsageError("not one arrival falls into the time: a longer one, a higher rate or another seed")
    return times


def _drawn(trace: Trace, spec: PlanSpec, stages: tuple[Stage, ...], made_up: bool) -> _Timed:
    """Times from an arrival process; the trace has to have as many rows, or be repeated."""
    if stages[-1].duration_s is None:
        found = survey(trace, limit=spec.limit, timed=False, made_up=made_up)
        return _Timed(survey=found, scheduled=_draw(spec, stages, spec.limit if spec.repeat else found.requests))
    scheduled = _draw(spec, stages, spec.limit)
    needed = len(scheduled)
    found = survey(trace, limit=needed, timed=False, made_up=made_up)
    if found.requests < needed and not spec.repeat:
        raise UsageError(
            f"{trace.path}: {needed} requests arrive in the {sum(s.duration_s or 0 for s in stages):g} s asked for, "
            f"the trace has {found.requests}: ask for less, or begin the trace again when it runs out (--repeat)"
        )
    return _Timed(survey=found, scheduled=scheduled)


def _own(trace: Trace, spec: PlanSpec, made_up: bool) -> _Timed:
    rows, cut_ns = spec.limit, None
    if spec.rate is not None and spec.duration_s is not None:
        # Rounded first: 1.1 x 10 must be 11 rows, not 12.
        asked = math.ceil(round(spec.rate * spec.duration_s, 6))
        rows = asked if rows is None else min(asked, rows)
    elif spec.duration_s is not None:
        cut_ns = spec.duration_s * 1e9 * (spec.speed or 1.0)  # on the trace's clock
    found = survey(trace, limit=rows, cut_ns=cut_ns, timed=not spec.closed, made_up=made_up)
    if spec.closed:
        return _Timed(survey=found)
    arrivals, spread_s = _spread(trace, spec, found.arrivals)
    if spec.repeat:
        arrivals = _cycled(arrivals, rows, cut_ns)
    speed = _speed(trace, arrivals, spec)
    return _Timed(survey=found, scheduled=_rescale(arrivals, speed), speed=speed, spread_s=spread_s)


def _windowed(trace: Trace, spec: PlanSpec, windows: Windows, stages: tuple[Stage, ...], made_up: bool) -> _Timed:
    own, seed = not spec.closed and not spec.drawn, load_seed(spec.seed)
    found = survey(trace, timed=own, made_up=made_up, units_seed=seed if own and spec.sessions == "wait" else None)
    if not own:
        requests, scheduled = spec.limit or found.requests, None
        if spec.drawn:
            scheduled = _draw(spec, stages, spec.limit if stages[-1].duration_s is not None else requests)
            requests = len(scheduled)
        joined = windows_of_rows(
            found.requests, requests, windows, arrivals=found.arrivals, scheduled=scheduled,
            trace_sha256=trace.sha256, seed=seed,
        )  # fmt: skip
        return _Timed(survey=found, scheduled=scheduled, arrangement=joined.arrangement, windows=joined)
    arrivals, spread_s = _spread(trace, spec, found.arrivals)
    speed = _speed(trace, arrivals, spec)
    lasts_ns = (spec.duration_s or 0.0) * 1e9 * speed
    joined = windows_in_time(
        arrivals, windows, starts=found.units.starts if found.units else None, lasts_ns=lasts_ns, speed=speed,
        trace_sha256=trace.sha256, seed=seed, most=spec.limit,
    )  # fmt: skip
    return _Timed(
        survey=found, scheduled=_rescale(joined.arrangement.scheduled, speed), speed=speed, spread_s=spread_s,
        arrangement=joined.arrangement, windows=joined,
    )  # fmt: skip


def _grown(trace: Trace, spec: PlanSpec, made_up: bool) -> _Timed:
    """Another demand on the trace's own clock, thinned or superposed; that clock may then run faster."""
    speed = spec.speed or 1.0
    cut_ns = None if spec.duration_s is None else spec.duration_s * 1e9 * speed
    found = survey(trace, cut_ns=cut_ns, made_up=made_up, units_seed=load_seed(spec.seed))
    arrivals, spread_s = _spread(trace, spec, found.arrivals)
    growth = _growth(trace, spec, found)
    assert found.units is not None
    arranged = arrange(arrivals, found.units, growth, load_seed(spec.seed))
    scheduled = _rescale(arranged.scheduled, speed)
    due = len(scheduled) if spec.duration_s is None else int(np.searchsorted(scheduled, spec.duration_s * 1e9))
    n = due if spec.limit is None else min(due, spec.limit)
    if not n:
        raise UsageError(f"{trace.path}: no request is left within the duration: a longer one, or another seed")
    return _Timed(
        survey=found, scheduled=scheduled[:n], speed=speed, arrangement=arranged, grow=growth, spread_s=spread_s,
        cut=n < due,
    )  # fmt: skip


def _growth(trace: Trace, spec: PlanSpec, found: Survey) -> float:
    if spec.rate is None:
        assert spec.grow is not None
        return spec.grow
    own = _own_rate(trace, found.arrivals, spec.rate)
    growth = spec.rate / own
    if (growth > 1) is (spec.rescale == "thin") and not math.isclose(growth, 1.0):
        other = "superpose" if growth > 1 else "thin"
        raise UsageError(
            f"{trace.path}: arrives at {own:.4g} requests/s, so {spec.rescale} cannot make {spec.rate:g} of it: "
            f"say {other} (or --grow {growth:.3g}x, which chooses)"
        )
    return growth


def _spread(trace: Trace, spec: PlanSpec, arrivals: Times) -> tuple[Times, float | None]:
    """Arrivals, spread within the steps of their clock where that is asked for and there are any."""
    grid_s = trace.grid_s if spec.spread else None
    return (arrivals, None) if grid_s is None else (spread(arrivals, grid_s, load_seed(spec.seed)), grid_s)


def _cycled(arrivals: Times, rows: int | None, cut_ns: float | None) -> Times:
    """Arrivals of a trace that begins again, one mean gap after its last row, up to ``rows`` or ``cut_ns``."""
    n, period = len(arrivals), period_of(arrivals)
    cycles = min(
        math.inf if rows is None else -(-rows // n), math.inf if cut_ns is None else math.ceil(cut_ns / period)
    )
    if cycles * period >= 2**63:
        raise UsageError("the trace would be repeated for more than 292 years: a lower limit or duration")
    total = max(int(cycles), 1) * n
    at = np.arange(total if rows is None else min(total, rows))
    times: Times = at // n * period + arrivals[at % n]
    return times if cut_ns is None else times[: np.searchsorted(times, cut_ns)]


def _speed(trace: Trace, arrivals: Times, spec: PlanSpec) -> float:
    return spec.speed or 1.0 if spec.rate is None else spec.rate / _own_rate(trace, arrivals, spec.rate)


def _own_rate(trace: Trace, arrivals: Times, wanted: float) -> float:
    """Mean rate of the trace, req/s."""
    own = mean_rate(arrivals)
    if own is None:
        what = "only one row is" if len(arrivals) == 1 else f"all {len(arrivals)} rows are"
        raise UsageError(
            f"{trace.path}: {what} kept at one instant, which no change of clock turns into {wanted:g} requests/s; "
            "keep more rows (--limit, --duration), or use --concurrency or --arrivals poisson"
        )
    return own


def _rescale(arrivals: Times, speed: float) -> Times:
    if speed == 1.0:
        return arrivals  # exact: no float in between
    if int(arrivals[-1]) / speed >= 2**63:
        raise UsageError(f"speed {speed:g} stretches the trace beyond 292 years; speed above 1 is faster")
    return np.rint(arrivals / speed).astype(np.int64)


def _warmup(spec: PlanSpec, scheduled: Times | None, n: int) -> int:
    warmup = spec.warmup if isinstance(spec.warmup, int) else 0
    if spec.warmup_s is not None and scheduled is not None:
        warmup = int(np.searchsorted(scheduled, spec.warmup_s * 1e9))
    if warmup >= n:
        raise UsageError(f"all {n} requests would be warm-up: nothing is left to be measured; shorten it")
    return warmup
