"""An audit of models on hardware that is not there: what each carries at the SLO and costs, in virtual time.

Nobody is asked, so no answer is graded: answers are as long as those of the trace, for every model, and the verdict on
quality is always that it was not measured. What does not fit into a model's context is left out for that model, and
said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.audit.asked import AuditOptions, AuditState
from harness.cli import sweep
from harness.cli.output import as_json, present, say
from harness.cli.runner.audit import LoadPass, begun, check_models, level_of, searched
from harness.cli.runner.capacity import CapacitySession
from harness.cli.runner.sweep import Session
from harness.errors import HarnessError, UsageError
from harness.options import PlanOptions, ReplayOptions, SearchOptions
from harness.record.manifest import PRIVATE, now_utc
from harness.sweep.spec import Loads, Pair, SweepSpec, slug
from harness.sweep.state import ANSWER, lock
from harness.trace.edit import write_trace
from harness.trace.formats.record import TraceRecord
from harness.trace.io import Trace, open_asked

if TYPE_CHECKING:
    from harness.analysis.audit.model import MeasuredModel, TokenPrice
    from harness.analysis.quality.slices import RecordFacts
    from harness.cluster.hardware.engine import HardwareEngine

NEEDS_ANSWERS = {
    "tries": "--tries", "repeats": "--repeats", "escalate": "--escalate", "cascade": "--cascade", "judge": "--judge",
    "labelled": "--labelled", "failure_usd": "--failure-usd", "review_minutes": "--review-minutes",
    "gate_usd": "--gate-usd", "run_code": "--run-code", "check": "--check", "dry_run": "--dry-run",
}  # fmt: skip
"""Options that nothing comes of without answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Simulated:
    """One model and what was simulated of it."""

    pair: Pair
    engine: HardwareEngine | None
    """None: it has an address and a list price."""
    loaded: LoadPass


def refuse(want: AuditOptions) -> None:
    """Raise `UsageError` for what only answers can tell."""
    fresh = AuditOptions(current=want.current)
    for name, flag in NEEDS_ANSWERS.items():
        if getattr(want, name) != getattr(fresh, name):
            raise UsageError(f"{flag}: needs answers, and with --engine simulated nobody gives any")


def engine_of(pair: Pair) -> HardwareEngine | None:
    """What stands for a MODEL@TIER; None for a MODEL@URL. Raises `UsageError` for what cannot be simulated."""
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.engines.simulated import simulated_engine

    if pair.base_urls:
        if pair.tier:
            raise UsageError(f"{pair.name}: a server that is there is not simulated: say MODEL@TIER")
        return None
    return simulated_engine(get_model(pair.model or ""), get_tier(pair.tier or ""))


def simulated_audit(
    trace: Path, out: Path, resume: str | None, html: Path | None, asked: ReplayOptions, want: AuditOptions,
    search: SearchOptions,
) -> int:  # fmt: skip
    """All of ``harness audit --engine simulated``; the exit status."""
    from harness.analysis.audit.report import audit_report
    from harness.analysis.report.audit import audit_sections
    from harness.cli.runner.audit_run import REPORT, asked_words, exit_status, folder_of, prices_of, stated_by

    want.refuse()
    refuse(want)
    asked = replace(asked, serve=replace(asked.serve, clock="virtual"))
    models = want.models
    engines = [engine_of(pair) for pair in models]
    check_models(want, asked)
    prices, dated = prices_of(want, models)
    for pair, engine in zip(models, engines, strict=True):
        if engine is None and pair.model not in prices:
            raise UsageError(f"{pair.name}: nobody is asked, so say what it costs: --list-price {pair.model}=IN:OUT")
    source = open_asked(trace, asked.plan)
    records = lengths_of(source, asked.plan.limit)
    rate = asked.plan.rate or _rate(source, records)
    state = AuditState(
        created=now_utc(), trace=str(source.path), trace_sha256=source.sha256, checks_sha256="",
        models=[want.current, *want.candidates], margin=want.margin, slo=dict(asked.load.slo or {}),
        records=len(records), seed=asked.plan.seed or 0,
        asked={**asked_words(asked, want, search, rate), "engine": "simulated"},
    )  # fmt: skip
    folder = folder_of(out, trace, resume, state)
    notes = [
        "Simulated, not measured: nobody was asked, so no quality is known. Every model is given the answer lengths of "
        "the trace; its own may be longer or shorter.", *dated,
    ]  # fmt: skip
    with lock(folder):
        say(f"audit folder: {folder}")
        (folder / "traces").mkdir(mode=PRIVATE, exist_ok=True)
        found = []
        try:
            for k, (pair, engine) in enumerate(zip(models, engines, strict=True)):
                loaded = LoadPass(slo_met=None, words="not asked: its list price, at the lengths of the trace")
                if engine is not None:
                    say(f"simulating: {pair.name}")
                    mine = [one for one in records if _tokens(one) <= engine.longest]
                    if len(mine) < len(records):
                        share = 1 - len(mine) / len(records)
                        notes.append(f"{pair.name}, simulated: {share:.1%} of the requests do not fit into its context "
                                     f"of {engine.longest:,} tokens: they are not in its figures.")  # fmt: skip
                    loaded = _load(folder, k, pair, mine, asked, None if want.quick else search, rate, state.seed)
                found.append(_Simulated(pair=pair, engine=engine, loaded=loaded))
        except (HarnessError, KeyboardInterrupt):
            say(f"go on with the same command and --resume {folder}")
            raise
        if want.quick:
            notes.append("--quick: one load level for each model, so no capacity is claimed.")
        report = audit_report(
            _facts(records), [_model(one, records, prices) for one in found], margin=want.margin, slo=state.slo,
            requests_per_s=rate, stated=stated_by(want), unmeasurable=frozenset(), made=now_utc(), folder=str(folder),
            trace=trace.name, records=len(records), checks_sha256="", notes=notes, attain=asked.report.attain,
        )  # fmt: skip
        (folder / REPORT).write_bytes(as_json(report))
    present(report, audit_sections(report), asked.report.format_, html=html, verb="audit")
    return exit_status(report, want)


def lengths_of(trace: Trace, limit: int | None) -> list[TraceRecord]:
    """The first ``limit`` records without their words. Raises `UsageError` for one that does not say its lengths."""
    found = []
    for row, record in enumerate(trace):
        if row == limit:
            break
        if not record.input_tokens or not record.output_tokens:
            raise UsageError(
                f"{trace.path}:{record.line}: does not say how many tokens went in and came out, and a simulation "
                "counts none of texts: 'harness trace anonymize' makes lengths of texts"
            )
        found.append(record._replace(
            text=None, messages=None, answer=None, expected=None, check=None, gate=None, adapter=None, model=None,
            cancel_after_s=None, timeout_s=None, max_tokens=None,
        ))  # fmt: skip
    if len(found) < 2:
        raise UsageError(f"{trace.path}: has fewer than two requests")
    return found


def _tokens(record: TraceRecord) -> int:
    return (record.input_tokens or 0) + (record.output_tokens or 0)


def _rate(source: Trace, records: Sequence[TraceRecord]) -> float:
    first, last = records[0].arrival_ns, records[-1].arrival_ns
    if first is None or last is None or last <= first:
        raise UsageError(f"{source.path}: has no arrival times, so its volume is not known: say --rate, in requests/s")
    return (len(records) - 1) / ((last - first) / 1e9)


def _load(
    folder: Path, number: int, pair: Pair, records: Sequence[TraceRecord], asked: ReplayOptions,
    search: SearchOptions | None, rate: float, seed: int,
) -> LoadPass:  # fmt: skip
    """A search for the capacity of one model, or one level at ``rate``, as `harness capacity` and sweep do it."""
    path = folder / "traces" / f"load-{number}.jsonl"
    if not path.exists():
        write_trace(records, path)
    trace = open_asked(path, PlanOptions(trace_format="jsonl"))
    plan = PlanOptions(arrivals=None if records[0].arrival_ns is not None else "poisson", seed=seed)
    options = replace(asked, plan=plan)
    where = folder / f"load-{number}-{slug(pair.name)}"
    said = {} if search is None else {"search": "capacity", "probe_s": search.probe_s}
    spec = SweepSpec(
        trace=str(path), loads=Loads(request_rate=[rate]) if search is None else Loads(concurrency=[1]), pair=[pair],
        order="given", seed=seed, options={"engine": "simulated", **said},
    )  # fmt: skip
    state = begun(where, sweep.new_state(where.name, folder, spec, search=search is not None), trace)
    tiers = sweep.check(spec, options)
    if search is None:
        Session(where, state, options, trace, tiers).run()
        return level_of(where, state.points[0], tiers[0], rate)
    session = CapacitySession(where, state, options, trace, tiers, search)
    session.run()
    report = session.report()
    (where / ANSWER).write_bytes(as_json(report))
    return searched(report, tiers[0])


def _facts(records: Sequence[TraceRecord]) -> RecordFacts:
    from harness.analysis.quality.slices import RecordFacts

    names: dict[str, int] = {}
    session = [names.setdefault(f"\0{k}" if r.session_id is None else r.session_id, k) for k, r in enumerate(records)]
    n = len(records)
    return RecordFacts(
        tags=[{}] * n, kinds=[""] * n, input_tokens=np.array([r.input_tokens for r in records], np.float64),
        turn=np.ones(n, np.int64), shares_prefix=np.zeros(n, np.bool_), session=np.array(session, np.int64),
        weight=np.array([r.weight or 1.0 for r in records], np.float64),
    )  # fmt: skip


def _model(one: _Simulated, records: Sequence[TraceRecord], prices: dict[str, TokenPrice]) -> MeasuredModel:
    from harness.analysis.audit.model import Lengths, MeasuredModel
    from harness.analysis.quality.bill import Rented
    from harness.analysis.quality.estimate import Bounded
    from harness.cluster.hardware.error import cost_range

    engine, loaded = one.engine, one.loaded
    fleet = None
    if engine is not None and loaded.tier is not None and loaded.rate is not None:
        cheap, dear = engine.cost_within or cost_range(engine.source, engine.chip, engine.facts)
        low, high = min(loaded.low or 0.0, loaded.rate), max(loaded.high or float("inf"), loaded.rate)
        fleet = Rented(
            usd_per_hour=loaded.tier.usd_per_hour, capacity=Bounded(loaded.rate, low / dear, high / cheap)
        )  # fmt: skip
    return MeasuredModel(
        name=one.pair.name, evidence="simulated", slo_met=loaded.slo_met,
        price=prices.get(one.pair.model or "") if engine is None else None, fleet=fleet,
        capacity_searched=loaded.searched, load=loaded.words, at_least=engine is not None and engine.source == "bound",
        lengths=Lengths(
            input_tokens=np.array([r.input_tokens for r in records], np.float64),
            output_tokens=np.array([r.output_tokens for r in records], np.float64),
        ),
    )  # fmt: skip
