"""The passes of an audit, each a sweep in a folder of its own: who is asked, with what, and what is kept of it.

Quality and load are apart (grading under overload grades timeouts); load is sent with the lengths that quality found.
Every pass salts the prefix cache anew, since all send the same prompts. A pass that is whole is not done again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from harness.audit.asked import AuditOptions
from harness.audit.grades import FILE, death, grade_run, kept_answers, read_grades
from harness.audit.judge import AT_ONCE
from harness.audit.pairs import has_pairs
from harness.audit.records import AuditedRecord, cap, order, write_load_trace, write_quality_trace
from harness.checks.grade import Grader
from harness.cli import sweep
from harness.cli.output import as_json, say
from harness.cli.runner.capacity import CapacityReport, CapacitySession
from harness.cli.runner.steps import settle
from harness.cli.runner.sweep import Session
from harness.cli.runner.targets import Servers, Target
from harness.errors import HarnessError, ResultsError, ServerError
from harness.options import PlanOptions, ReplayOptions, ReportOptions, SearchOptions
from harness.record.manifest import PRIVATE, RunDir, RunManifest, Tier
from harness.record.run_spec import DEFAULTS
from harness.sweep.spec import Loads, Pair, Point, SweepSpec, slug
from harness.sweep.state import ANSWER, STATE, SweepState, read_state, write_state
from harness.trace.io import Trace, open_asked

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.analysis.quality.verdict import Evidence
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary

BROKEN = frozenset({"status", "files", "rows", "success", "workers", "replicas", "server_restarts"})
"""Gates of a run without which its answers are not those of the model; the others are about times."""
MOST_BUSY = 100
"""Times that a request is sent again to a server that says 429 or 503: a rate limit is obeyed, within --timeout, and
the wait is part of the answer's time."""
UNKNOWN_TOKENS = 16
"""Length of an answer where no model said one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityPass:
    """One model asked every graded record once."""

    problem: str | None
    """Why it proves nothing; None: it is whole."""
    grades: pa.Table | None
    """None: there are none."""
    evidence: Evidence = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPass:
    """One model under load."""

    slo_met: bool | None
    """None: not judged."""
    rate: float | None = None
    """Requests/s that one server carries at the SLO: measured, or with one load level the one that it kept."""
    low: float | None = None
    high: float | None = None
    """Ends of its interval; None: nothing bounds it there."""
    searched: bool = False
    """It is a capacity; else only what was sent."""
    tier: Tier | None = None
    words: str = ""
    problem: str | None = None
    """Its server died under it: what was measured proves nothing."""


@dataclass(frozen=True, slots=True)
class _Up:
    """A target whose servers are up already, and stay up."""

    servers: Servers

    def open(self, run: RunDir) -> AbstractContextManager[Servers]:
        return nullcontext(self.servers)


class Salted(Session):
    """A session whose points all send the same prompts, to a prefix cache that must know none of them."""

    shared: Servers | None = None
    """Servers of another pass; None: it has its own."""

    @contextmanager
    def serving(self, k: int, target: Target) -> Iterator[Servers]:
        """Its own servers, or those that another pass has up, until they die."""
        if self.shared is not None and (died := settle(self.shared)):
            raise ServerError("; ".join(f"replica {index} is gone: {how}" for index, how in died.items()))
        with super().serving(k, target if self.shared is None else cast(Target, _Up(self.shared))) as servers:
            yield servers

    def _options(self, point: Point) -> ReplayOptions:
        options = super()._options(point)
        if self.state.pairs[point.pair].tier is not None:  # ours, whatever the field of an API beside it
            options = replace(options, load=replace(options.load, length_field=DEFAULTS.length_field))
        elif options.load.length_field != DEFAULTS.length_field:
            return options  # a hosted API, which refuses what it does not know
        salt = {"cache_salt": secrets.token_hex(16)}
        return replace(options, load=replace(options.load, extra_body={**salt, **options.load.extra_body}))


class QualitySession(Salted):
    """Every model asks the graded records once, the current one twice; each pass in another order."""

    def __init__(
        self, folder: Path, state: SweepState, options: ReplayOptions, orders: Sequence[Sequence[AuditedRecord]],
        traces: Sequence[Trace], grader: Grader, want: AuditOptions,
    ) -> None:  # fmt: skip
        super().__init__(folder, state, options, traces[0], sweep.check(state.spec, options))
        self._orders, self._traces, self._grader, self._want = orders, traces, grader, want
        self._chat = any(record.source.messages is not None for record in orders[0])
        self.then: Callable[[int, Servers], None] | None = None
        """What else is asked of the servers that were started for a model, by its number, before they are ended."""

    @contextmanager
    def serving(self, k: int, target: Target) -> Iterator[Servers]:
        """The servers of a model; those started for it also for what comes after its points."""
        with super().serving(k, target) as servers:
            yield servers
            whole = all(point.state == "done" for point in self.state.points if point.pair == k)
            if self.then and whole and not self.state.pairs[k].base_urls and not settle(servers):
                self.then(k, servers)

    def _options(self, point: Point) -> ReplayOptions:
        options = super()._options(point)
        if not (self._want.cascade and point.pair):
            return options
        chat = self._chat if options.plan.endpoint == "auto" else options.plan.endpoint == "chat"
        more = {"logprobs": True if chat else 1}
        return replace(options, load=replace(options.load, extra_body={**more, **options.load.extra_body}))

    def make_plans(self, target: Target, points: list[Point]) -> None:
        """Each point's plan from the trace in its own order."""
        for point in points:
            self.trace = self._traces[point.repeat - 1]
            super().make_plans(target, [point])

    def judge(self, point: Point) -> str | None:
        """As of a sweep; answers that only a process that is gone could read are asked again."""
        try:
            return super().judge(point)
        except ResultsError as e:
            return str(e)

    def again(self, point: Point) -> str | None:
        """A pass whose server died is asked again, as a whole."""
        return death(RunDir(self.folder / point.name))

    def learn(self, point: Point, run: Run, found: Summary) -> None:
        """Grade the answers and forget their text."""
        grade_run(
            RunDir(run.path), self._orders[point.repeat - 1], self._grader, keep_text=self.options.load.keep_text,
            at_once=AT_ONCE if self._want.judge else 1, others=self._others(point),
        )  # fmt: skip

    def _others(self, point: Point) -> dict[int, str | None] | None:
        """The current model's answers that this pass is compared with; None: it is one of these, or none is."""
        if not has_pairs(self._orders[0]) or (point.pair == 0 and point.repeat <= self._want.repeats):
            return None
        repeat = (point.repeat - 1) % self._want.repeats + 1
        first = next(one for one in self.state.points if (one.pair, one.repeat) == (0, repeat))
        return kept_answers(RunDir(self.folder / first.name), self._orders[repeat - 1])


class LoadSession(Salted):
    """One model at one load level."""

    def again(self, point: Point) -> str | None:
        """A level that proved nothing is measured again."""
        return f"it was INVALID ({point.reason})" if point.verdict == "INVALID" else None


class CapacityOf(Salted, CapacitySession):
    """The search for one model's capacity."""


def check_models(want: AuditOptions, asked: ReplayOptions) -> None:
    """Refuse, before anything is written or rented, models and tiers that are unknown or do not fit."""
    spec = SweepSpec(trace="", loads=Loads(concurrency=[want.in_flight]), pair=want.models)
    sweep.check(spec, asked)


def origins_of(models: Sequence[Pair]) -> tuple[list[str], set[str]]:
    """What is known of weights that the harness serves itself, for the page, and the records that they have seen."""
    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.quantise import read_quantised

    words: list[str] = []
    seen: set[str] = set()
    for pair in models:
        if pair.base_urls or pair.model is None:
            continue
        model = get_model(pair.model)
        if (made := read_quantised(Path(model.path)) if model.path else None) is not None:
            seen.update(made.seen)
        if note := made.words if made else model.note:
            words.append(f"{pair.name}: {note}.")
    return words, seen


def no_hardware(pair: Pair) -> str | None:
    """Why servers of this model cannot be started from here, where another machine could; None: they can."""
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.deploy.placement import check_can_serve

    if pair.base_urls or pair.tier is None:
        return None
    try:
        check_can_serve(get_tier(pair.tier))
    except HarnessError as e:
        return str(e).splitlines()[0]
    return None


def quality(
    folder: Path, want: AuditOptions, asked: ReplayOptions, graded: Sequence[AuditedRecord], seed: int, grader: Grader,
    then: Callable[[int, Sequence[Sequence[QualityPass]], Servers], None],
) -> list[list[QualityPass]]:  # fmt: skip
    """The quality passes of each model, ``repeats`` of them, and as many again of the current one, which is first.

    ``then`` is called with a model's number, the passes so far and its servers, where these were started for it. Raises
    what a sweep does.
    """
    passes = 2 * want.repeats
    orders = [order(graded, seed, again) for again in range(1, passes + 1)]
    traces = []
    for again, one in enumerate(orders, 1):
        path = folder / "traces" / f"order-{again}.jsonl"
        write_quality_trace(path, one, want.max_answer)
        traces.append(open_asked(path, PlanOptions(trace_format="jsonl")))
    spec = SweepSpec(
        trace=str(traces[0].path), loads=Loads(concurrency=[want.in_flight]), pair=want.models, repeats=passes,
        order="given", seed=seed, options={"lengths": "cap"},
    )  # fmt: skip
    state = sweep.new_state("quality", folder, spec)
    absent = {k for k, pair in enumerate(state.pairs) if k and no_hardware(pair)}
    state.points = [p for p in state.points if p.pair == 0 or (p.repeat <= want.repeats and p.pair not in absent)]
    state = begun(folder / "quality", state, traces[0])
    load = replace(
        asked.load, output_lengths="cap", sealed=True, slo=None, min_requests=1, concurrency=None,
        busy_retries=MOST_BUSY,
    )  # fmt: skip
    plan = PlanOptions(endpoint=asked.plan.endpoint, tokenizer=asked.plan.tokenizer)
    options = ReplayOptions(plan=plan, load=load, report=ReportOptions())
    session = QualitySession(folder / "quality", state, options, orders, traces, grader, want)

    def found() -> list[list[QualityPass]]:
        asked_of = [[point for point in state.points if point.pair == k] for k in range(len(state.pairs))]
        nobody = QualityPass(problem=None, grades=None)
        return [[_passed(session.folder, point) for point in points] or [nobody] for points in asked_of]

    session.then = lambda k, servers: then(k, found(), servers)
    session.run()
    return found()


def _passed(folder: Path, point: Point) -> QualityPass:
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import summarise

    path = folder / point.name
    if point.state != "done" or not (path / FILE).exists():
        return QualityPass(problem=point.reason or "its quality pass has no answers", grades=None)
    run = read_run(path)
    failed = [c for c in summarise(run).checks if c.gate and c.ok is False and c.name in BROKEN]
    problem = death(RunDir(path)) or ("; ".join(f"{c.name}: {c.observed}" for c in failed) or None)
    return QualityPass(problem=problem, grades=read_grades(path), evidence=evidence_of(run.manifest))


def evidence_of(manifest: RunManifest) -> Evidence:
    """Whose answers they are: of made-up weights nobody's, whatever engine served them."""
    return "dummy" if manifest.model_facts.get("source") == "dummy" else manifest.evidence


def load(
    folder: Path, number: int, pair: Pair, asked: ReplayOptions, records: Sequence[AuditedRecord],
    lengths: Mapping[int, int], want: AuditOptions,
    *, rate: float, search: SearchOptions | None, seed: int, servers: Servers | None,
) -> LoadPass:  # fmt: skip
    """The load pass of one model with its own answer lengths, by row of the record (of a ``MODEL@URL`` as they come),
    on ``servers`` that are up or on its own.

    ``search``: for capacity; None: one level at ``rate``. Records that were not graded take the lengths of others.
    """
    path = folder / "traces" / f"load-{number}.jsonl"
    known = [max(1, one) for one in lengths.values()] or [UNKNOWN_TOKENS]
    drawn = np.random.default_rng(seed).choice(known, len(records)).tolist()
    forced = [max(1, lengths.get(r.row, d)) for r, d in zip(records, drawn, strict=True)]
    caps = [cap(record, want.max_answer) for record in records]
    write_load_trace(path, records, forced if pair.tier else caps)
    trace = open_asked(path, PlanOptions(trace_format="jsonl"))
    timed = records[0].source.arrival_s is not None
    plan = PlanOptions(
        endpoint=asked.plan.endpoint, tokenizer=asked.plan.tokenizer, arrivals=None if timed else "poisson", seed=seed
    )
    sent = replace(asked.load, keep_text=False, capture_answers=False)
    if pair.tier:  # lengths are forced there
        body = {name: value for name, value in asked.load.extra_body.items() if name != "stop"}
        sent = replace(sent, extra_body=body)
    else:
        sent = replace(sent, output_lengths="cap", busy_retries=MOST_BUSY)
    options = replace(asked, plan=plan, load=sent)
    where = folder / f"load-{number}-{slug(pair.name)}"
    spec = SweepSpec(
        trace=str(path), loads=Loads(request_rate=[rate]) if search is None else Loads(concurrency=[1]), pair=[pair],
        order="given", seed=seed, options={} if search is None else {"search": "capacity", "probe_s": search.probe_s},
        budget_usd=search.max_usd if search else None, budget_hours=search.max_hours if search else None,
    )  # fmt: skip
    state = begun(where, sweep.new_state(where.name, folder, spec, search=search is not None), trace)
    tiers = sweep.check(spec, options)
    if search is not None:
        session = CapacityOf(where, state, options, trace, tiers, search)
        session.shared = servers
        session.run()
        report = session.report()
        (where / ANSWER).write_bytes(as_json(report))
        failed = next((point.reason for point in session.state.points if point.state == "failed"), None)
        return searched(report, tiers[0], failed)
    level = LoadSession(where, state, options, trace, tiers)
    level.shared = servers
    level.run()
    return level_of(where, state.points[0], tiers[0], rate)


def level_of(folder: Path, point: Point, tier: Tier | None, rate: float) -> LoadPass:
    """What one load level told of a model."""
    judged = point.slo_met if point.state == "done" and point.verdict == "VALID" else None
    words = f"{rate:.4g} req/s: {point.verdict or point.state}"
    if point.reason:
        words += f" ({point.reason[:200]})"
    kept = rate if judged else None
    died = death(RunDir(folder / point.name)) if point.state == "done" else point.reason
    return LoadPass(
        slo_met=judged, rate=kept, low=kept, high=kept, tier=tier, words=words,
        problem=f"under load: {died}" if died else None,
    )  # fmt: skip


def searched(report: CapacityReport, tier: Tier | None, failed: str | None = None) -> LoadPass:
    """What a search for capacity told of a model. ``failed``: why it could not be done."""
    found = report.answer.capacity if report.answer is not None else None
    if found is None or found.state == "unknown":
        problem = f"under load: {failed}" if failed else None
        return LoadPass(slo_met=None, tier=tier, words=report.sentence, searched=True, problem=problem)
    met = found.state != "not reached"
    rate = (found.load.low if found.load.value is None else found.load.value) if met else None
    return LoadPass(
        slo_met=met, rate=rate, low=found.load.low, high=found.load.high, searched=True, tier=tier,
        words=report.sentence,
    )  # fmt: skip


def begun(folder: Path, fresh: SweepState, trace: Trace) -> SweepState:
    """The state in the folder, if it was begun with the same words, else the fresh one, written there."""
    if (folder / STATE).is_file():
        state = read_state(folder)
        sweep.take_over(state, fresh.spec, folder)
    else:
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        state = fresh
    sweep.same_trace(state, trace.sha256, trace.path)
    write_state(folder, state)
    return state


def tried(words: str, problem: HarnessError) -> LoadPass:
    """A load pass that could not be done."""
    say(f"{words}: {problem}")
    why = str(problem).splitlines()[0]
    return LoadPass(slo_met=None, words=why, problem=why if isinstance(problem, ServerError) else None)
