"""An audit from its command line to its page: what is asked is written down, then every pass, then the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.audit.asked import (
    QUICK_RECORDS,
    SCHEMA_VERSION,
    STATE,
    AuditOptions,
    AuditState,
    parse_price,
)
from harness.audit.judge import JudgeTrial
from harness.audit.pairs import check_pairs
from harness.audit.records import (
    AuditedRecord,
    check_gates,
    checks_sha256,
    read_records,
    sampled,
    shares_prefix,
    without_seen,
)
from harness.checks.grade import Grader
from harness.checks.lint import LintGroup, LintRecord, lint
from harness.checks.sandbox import LinuxSandbox, refusal
from harness.cli.output import as_json, present, say
from harness.cli.runner.audit import LoadPass, QualityPass, check_models, load, no_hardware, origins_of, quality, tried
from harness.cli.runner.audit_judge import (
    doubts_of,
    family,
    judge_of,
    labels_of,
    place_note,
    place_problem,
    trial_of,
    trust_of,
)
from harness.cli.runner.audit_plan import blind_records, dry_run
from harness.cli.runner.targets import Servers
from harness.cli.verb import NEWEST
from harness.errors import (
    EXIT_INVALID,
    EXIT_NOT_DECIDED,
    EXIT_SLO_MISSED,
    EXIT_VALID,
    HarnessError,
    UsageError,
)
from harness.options import ReplayOptions, SearchOptions
from harness.record.manifest import PRIVATE, create_run_dir, now_utc, read_json, write_json
from harness.sweep.spec import Pair
from harness.sweep.state import lock
from harness.trace.io import Trace, open_asked

if TYPE_CHECKING:
    import pyarrow as pa

    from harness.analysis.audit.model import MeasuredModel, TokenPrice
    from harness.analysis.audit.report import AuditReport
    from harness.analysis.quality.bill import Stated
    from harness.analysis.quality.slices import RecordFacts

REPORT = "report.json"


def audited(
    trace: Path, out: Path, resume: str | None, html: Path | None, asked: ReplayOptions, want: AuditOptions,
    search: SearchOptions,
) -> int:  # fmt: skip
    """All of ``harness audit``; the exit status."""
    want.refuse()
    models, seed = want.models, asked.plan.seed or 0
    prices, dated = prices_of(want, models)
    if want.run_code and (why := refusal()) is not None:
        raise UsageError(f"--run-code: this machine cannot make the sandbox ({why})")
    source = open_asked(trace, asked.plan)
    records = read_records(source, want.check, asked.plan.limit)
    rate = asked.plan.rate or _rate(source, records)
    origins, seen = origins_of(models)
    origins += dated
    checked = sum(record.check is not None for record in records)
    records = without_seen(records, seen)
    if dropped := checked - sum(record.check is not None for record in records):
        origins.append(f"{dropped:,} records are not graded: a model has seen them, or others of their sessions.")
    if want.quick:
        records = sampled(records, QUICK_RECORDS, seed)
    graded = [record for record in records if record.check is not None]
    if not graded:
        say(f"{source.path}: quality not measured: no record has a check (or 'expected', with --check)")
        return EXIT_NOT_DECIDED
    check_models(want, asked)
    check_gates(graded, str(source.path), decide=want.tries > 1 or want.escalate)
    check_pairs(graded, keep_text=asked.load.keep_text)
    labels, judge = labels_of(want), judge_of(want)
    faults = _lint(graded, want)
    for group in faults:
        say(f"note: the checks are not sound: {group.name}: {', '.join(group.faults)} (harness audit lint says more)")
    if want.dry_run:
        return dry_run(graded, want, models, asked, search, rate)
    state = AuditState(
        created=now_utc(), trace=str(source.path), trace_sha256=source.sha256, checks_sha256=checks_sha256(records),
        models=[want.current, *want.candidates], margin=want.margin, slo=dict(asked.load.slo or {}),
        records=len(records), seed=seed, asked=asked_words(asked, want, search, rate),
    )  # fmt: skip
    folder = folder_of(out, trace, resume, state)
    grader = Grader(sandbox=LinuxSandbox() if want.run_code else None, judge=judge)
    with lock(folder):
        say(f"audit folder: {folder}")
        (folder / "traces").mkdir(mode=PRIVATE, exist_ok=True)
        try:
            loaded: dict[int, LoadPass] = {}

            def load_now(k: int, passes: Sequence[Sequence[QualityPass]], servers: Servers | None) -> None:
                loaded[k] = _settled(k, want, graded, faults, passes, asked, trial) or _load(
                    folder, k, models, passes, asked, records, None if want.quick else search, rate, seed, servers, want
                )

            trial = None if judge is None else trial_of(judge, graded, labels)
            doubts = None if trial is None else doubts_of(trial, want)
            if doubts is None:
                passes = quality(folder, want, asked, graded, seed, grader, load_now)
            else:  # before anything is rented
                passes = [[QualityPass(problem=doubts, grades=None)] for _ in models]
            for k in range(len(models)):
                if k not in loaded:
                    load_now(k, passes, None)
            loads = [loaded[k] for k in range(len(models))]
        except (HarnessError, KeyboardInterrupt):
            say(f"go on with the same command and --resume {folder}")
            raise
        report = _report(folder, state, want, graded, faults, passes, loads, prices, rate, origins, asked, trial)
        (folder / REPORT).write_bytes(as_json(report))
    from harness.analysis.report.audit import audit_sections

    present(report, audit_sections(report), asked.report.format_, html=html, verb="audit")
    return exit_status(report, want)


def prices_of(want: AuditOptions, models: Sequence[Pair]) -> tuple[dict[str, TokenPrice], list[str]]:
    """List prices by model, stated or of the shipped map where it has the very name; and of which day each is."""
    from harness.analysis.audit.model import TokenPrice
    from harness.analysis.pricing.list_prices import read_list_prices

    book = read_list_prices()
    known = book.prices
    found = {
        one.model: TokenPrice(input=p.usd_per_1m_input, output=p.usd_per_1m_output, cached=p.usd_per_1m_cached_input)
        for one in models
        if one.model is not None and (p := known.get(one.model)) is not None
    }
    for text in want.list_prices:
        name, into, output, cached = parse_price(text)
        if name not in [one.model for one in models]:
            raise UsageError(f"--list-price {text}: {name} is neither --current nor a --candidate")
        found[name] = TokenPrice(input=into, output=output, cached=cached)
    stated = {parse_price(text)[0] for text in want.list_prices}
    day = now_utc()[:10]
    return found, [
        f"{one.name}: {found[one.model].input:g} and {found[one.model].output:g} USD per 1M tokens in and out, "
        + (f"as stated on {day}." if one.model in stated else f"the list price of {book.date} ({book.source}).")
        for one in models
        if one.tier is None and one.model in found
    ]


def _rate(source: Trace, records: Sequence[AuditedRecord]) -> float:
    times = [record.source.arrival_s for record in records]
    if not times or times[0] is None or times[-1] is None or times[-1] <= times[0]:
        raise UsageError(f"{source.path}: has no arrival times, so its volume is not known: say --rate, in requests/s")
    return (len(times) - 1) / (times[-1] - times[0])


def asked_words(asked: ReplayOptions, want: AuditOptions, search: SearchOptions, rate: float) -> dict[str, object]:
    """What changes a figure, as it comes back from a file."""
    import msgspec

    money = ("wage", "review_minutes", "review_share", "failure_usd", "engineering_hours", "months", "list_prices")
    later = (*money, "gate_usd", "fail_if", "dry_run", "judge_time_s", "load_all")
    own = {name: value for name, value in asdict(want).items() if name not in later}
    sent = {name: getattr(asked.load, name) for name in ("output_lengths", "length_field", "extra_body", "keep_text")}
    said = {**own, **sent, "rate": rate, "attain": asked.report.attain, "probe_s": search.probe_s}
    found: dict[str, object] = msgspec.json.decode(msgspec.json.encode(said, enc_hook=str))
    return found


def folder_of(out: Path, trace: Path, resume: str | None, state: AuditState) -> Path:
    """A new folder with its ``audit.json``, or the one to go on with. Raises `UsageError` for another question."""
    name = f"audit-{trace.name.split('.')[0]}"
    if resume is None:
        folder = create_run_dir(out, name).path
        write_json(folder / STATE, state)
        return folder
    found = sorted(path.parent for path in out.glob(f"*-{name}*/{STATE}")) if resume == NEWEST else [Path(resume)]
    if not found:
        raise UsageError(f"{out}: no audit of {trace} to resume: leave --resume out, or say --resume FOLDER")
    before = read_json(found[-1] / STATE, AuditState, SCHEMA_VERSION, "folder of an audit")
    fresh = replace(state, created=before.created, trace=before.trace)
    if fresh != before:
        changed = [name for name, value in asdict(fresh).items() if value != asdict(before)[name]]
        raise UsageError(f"{found[-1]}: was asked something else: {', '.join(changed)} differ; begin anew")
    return found[-1]


def _settled(
    k: int, want: AuditOptions, graded: Sequence[AuditedRecord], faults: Sequence[LintGroup],
    passes: Sequence[Sequence[QualityPass]], asked: ReplayOptions, trial: JudgeTrial | None,
) -> LoadPass | None:  # fmt: skip
    """Of a model ``k`` that need not be loaded, since its quality has decided; None: it is to be loaded."""
    from harness.analysis.audit.report import settled_by_quality
    from harness.analysis.quality.bill import Policy

    if k == 0 or want.load_all:
        return None
    unmeasurable, blind = blind_records(graded, faults, passes[0][0])
    current, one = (_measured(j, want, passes[j], LoadPass(slo_met=None), {}, trial) for j in (0, k))
    word = settled_by_quality(
        _facts(graded, passes[0][0]), current, one, margin=want.margin, family=len(want.candidates),
        slo=asked.load.slo or {}, unmeasurable=unmeasurable, blind=blind,
        policy=Policy(tries=want.tries, escalate=want.escalate), attain=asked.report.attain,
    )  # fmt: skip
    if word is None:
        return None
    why = "not loaded" if word == "INVALID" else "not loaded: its quality is worse"
    say(f"{want.models[k].name}: {why}")
    return LoadPass(slo_met=None, words=why)


def _load(
    folder: Path, k: int, models: Sequence[Pair], passes: Sequence[Sequence[QualityPass]], asked: ReplayOptions,
    records: Sequence[AuditedRecord], search: SearchOptions | None, rate: float, seed: int, servers: Servers | None,
    want: AuditOptions,
) -> LoadPass:  # fmt: skip
    """The load pass of model ``k``, on ``servers`` that are up; a search where it has a tier and one is asked for."""
    found = passes[k][0]
    if passes[0][0].problem or found.problem or found.grades is None:
        why = None if found.problem else no_hardware(models[k])
        return LoadPass(
            slo_met=None,
            words=f"not measured here: {why} (--engine simulated says what it may cost)" if why else "not loaded",
        )
    rows, tokens = (found.grades.column(name).to_pylist() for name in ("record", "output_tokens"))
    lengths = {row: length for row, length in zip(rows, tokens, strict=True) if length is not None}
    say(f"load: {models[k].name}")
    try:
        return load(
            folder, k, models[k], asked, records, lengths, want, rate=rate,
            search=search if models[k].tier else None, seed=seed, servers=servers,
        )  # fmt: skip
    except UsageError:
        raise
    except HarnessError as e:
        return tried(models[k].name, e)


def _report(
    folder: Path, state: AuditState, want: AuditOptions, graded: Sequence[AuditedRecord],
    faults: Sequence[LintGroup], passes: Sequence[Sequence[QualityPass]],
    loads: Sequence[LoadPass], prices: Mapping[str, TokenPrice], rate: float, origins: Sequence[str],
    asked: ReplayOptions, trial: JudgeTrial | None,
) -> AuditReport:  # fmt: skip
    from harness.analysis.audit.report import audit_report
    from harness.analysis.quality.bill import Policy

    unmeasurable, blind = blind_records(graded, faults, passes[0][0])
    notes = [f"The checks are not sound: {group.name}: {', '.join(group.faults)}." for group in faults]
    notes += origins
    uncapped = sum(record.source.max_tokens is None for record in graded)
    if uncapped:
        notes.append(f"{uncapped:,} records have no max_tokens: their answers were cut at {want.max_answer}.")
    if state.asked["keep_text"]:
        notes.append("The text of every answer is in the folders of the quality passes (--keep-text), for their owner.")
    if want.quick:
        notes.append("--quick: one load level for each model, so no capacity is claimed.")
    if len({record.session for record in graded}) == len(graded):
        notes.append("No session has two records: each counts as a session of its own.")
    if want.repeats > 1 and "temperature" not in asked.load.extra_body:
        notes.append("--repeats at temperature 0: they differ by the noise of the server alone.")
    if trial is not None and want.judge_model:
        notes.append(f"Judge: {want.judge_model}. Canaries: {trial.canaries}, {trial.accepted} accepted.")
        notes += [note for pair, several in zip(want.models, passes, strict=True)
                  if (note := place_note(pair.name, _tables(several)))]  # fmt: skip
        notes += [f"The judge {want.judge_model} has a name like {pair.model}: a judge may favour its own family."
                  for pair in want.models if family(pair.model or "") == family(want.judge_model)]  # fmt: skip
    measured = [
        _measured(k, want, several, loaded, prices, trial)
        for k, (several, loaded) in enumerate(zip(passes, loads, strict=True))
    ]
    return audit_report(
        _facts(graded, passes[0][0]), measured, margin=state.margin, slo=state.slo, requests_per_s=rate,
        stated=stated_by(want), unmeasurable=unmeasurable, blind=blind,
        made=now_utc(), folder=str(folder), trace=Path(state.trace).name,
        records=state.records, checks_sha256=state.checks_sha256, notes=notes,
        policy=Policy(tries=want.tries, escalate=want.escalate), attain=asked.report.attain,
    )  # fmt: skip


def _lint(graded: Sequence[AuditedRecord], want: AuditOptions) -> list[LintGroup]:
    """Kinds of check and tags whose checks do not tell right from wrong."""
    records = (
        LintRecord(
            line=record.source.line, check=record.source.check, gate=record.source.gate,
            expected=record.source.expected, answer=record.source.answer, prompt=record.prompt,
            tags=record.source.tags or (),
        )
        for record in graded
    )  # fmt: skip
    return [group for group in lint(records, Grader(), want.check).groups if group.faults]


def _measured(
    k: int, want: AuditOptions, passes: Sequence[QualityPass], loaded: LoadPass, prices: Mapping[str, TokenPrice],
    trial: JudgeTrial | None,
) -> MeasuredModel:  # fmt: skip
    from harness.analysis.audit.model import MeasuredModel
    from harness.analysis.quality.bill import Rented
    from harness.analysis.quality.estimate import Bounded
    from harness.analysis.quality.judging import sharpness

    pair, own, again = want.models[k], passes[: want.repeats], passes[want.repeats :]
    problem = next((one.problem for one in own if one.problem), None)
    trusted = None if trial is None or k == 0 else trust_of(trial, want.candidates[k - 1], want.margin)
    if problem is None and trusted is not None and trusted.faults:
        problem = f"the judge is not to be believed: {', '.join(trusted.faults)}"
    problem = problem or place_problem(_tables(own)) or (loaded.problem if k else None)
    fleet = None
    if loaded.tier is not None and loaded.rate is not None:
        ends = (min(loaded.low or 0.0, loaded.rate), max(loaded.high or float("inf"), loaded.rate))
        fleet = Rented(usd_per_hour=loaded.tier.usd_per_hour, capacity=Bounded(loaded.rate, *ends))
    return MeasuredModel(
        name=pair.name, grades=_tables(own), again=() if any(one.problem for one in again) else _tables(again),
        problem=problem, evidence=next((one.evidence for one in own if one.evidence != "measured"), "measured"),
        judge=trusted, sharpness=1.0 if trusted is None else sharpness(trusted),
        slo_met=loaded.slo_met, price=None if pair.tier else prices.get(pair.model or ""), fleet=fleet,
        capacity_searched=loaded.searched, load=loaded.words,
    )  # fmt: skip


def _tables(passes: Sequence[QualityPass]) -> tuple[pa.Table, ...]:
    """All of them or none."""
    found = tuple(one.grades for one in passes if one.grades is not None)
    return found if len(found) == len(passes) else ()


def _facts(graded: Sequence[AuditedRecord], first: QualityPass) -> RecordFacts:
    import numpy as np

    from harness.analysis.quality.slices import RecordFacts

    turns: dict[str, int] = {}
    last: dict[str, int | None] = {}
    turn = []
    for record in graded:
        said, messages = record.source.turn, record.source.messages or ()
        key = f"\0{record.row}" if record.source.session_id is None else record.source.session_id
        later = said is None or said != last.get(key)  # records of one turn are equally deep
        turns[key], last[key] = turns.get(key, 0) + later, said
        turn.append(max(turns[key], sum(one["role"] == "user" for one in messages)))
    tokens = [None] * len(graded) if first.grades is None else first.grades.column("input_tokens").to_pylist()
    return RecordFacts(
        tags=[dict(record.source.tags or ()) for record in graded], kinds=[record.kind for record in graded],
        input_tokens=np.array([np.nan if n is None else n for n in tokens], np.float64),
        turn=np.array(turn, np.int64), shares_prefix=np.array(shares_prefix(graded), np.bool_),
        session=np.array([record.session for record in graded], np.int64),
        weight=np.array([record.source.weight or 1.0 for record in graded], np.float64),
        gated=np.array([record.gate is not None for record in graded], np.bool_),
    )  # fmt: skip


def stated_by(want: AuditOptions) -> Stated:
    """What the user said of money."""
    from harness.analysis.quality.bill import Stated

    return Stated(
        wage_usd_per_hour=want.wage, review_minutes=want.review_minutes, review_share=want.review_share,
        failure_usd=want.failure_usd, gate_usd=want.gate_usd or 0.0,
        engineering_hours=want.engineering_hours or 0.0, months=want.months,
    )  # fmt: skip


def exit_status(report: AuditReport, want: AuditOptions) -> int:
    """What the verdicts make of it; one candidate that is decided is enough for 0."""
    words = [answer.verdict.word for answer in report.answers]
    if report.models[0].slo_met is False:
        return EXIT_SLO_MISSED
    if report.models[0].problem is not None or all(word == "INVALID" for word in words):
        return EXIT_INVALID
    if want.fail_if == "not-switch" and not any(answer.verdict.switches for answer in report.answers):
        return EXIT_SLO_MISSED
    open_ = ("not decided", "quality not measured")
    if any(word not in (*open_, "INVALID") for word in words):
        return EXIT_VALID
    return EXIT_INVALID if "INVALID" in words else EXIT_NOT_DECIDED
