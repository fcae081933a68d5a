"""Words and tables of an audit: the answer first, then quality, money, slices and claims. No arithmetic."""

from __future__ import annotations

import math

from harness.analysis.audit.model import ModelRow
from harness.analysis.audit.report import AuditReport, CandidateAnswer
from harness.analysis.quality.claims import Claim
from harness.analysis.quality.estimate import Bounded
from harness.analysis.quality.paired import FEWEST_SESSIONS
from harness.analysis.quality.slices import UNSEEN
from harness.analysis.quality.verdict import SliceVerdict
from harness.analysis.report.document import Cell, Section, Table
from harness.analysis.report.figures import figure
from harness.slo import seconds


def audit_sections(report: AuditReport) -> list[Section]:
    """The whole page."""
    slo = ", ".join(f"{key} {seconds(limit)}" for key, limit in report.slo.items())
    asked = (
        f"{report.graded:,} graded records of {report.trace} in {report.sessions:,} sessions; a candidate may lose "
        f"{100 * report.margin:g} points; SLO {slo}; {figure(report.requests_per_s)} requests/s."
    )
    if all(row.evidence == "simulated" for row in report.models):
        asked = (
            f"Simulated, not measured: {report.records:,} records of {report.trace}, none of them graded; SLO {slo}; "
            f"{figure(report.requests_per_s)} requests/s."
        )
    sections = [Section(title="Audit", lines=(*(answer.sentence for answer in report.answers), asked))]
    sections += [*_quality(report), *_money(report)]
    for row, answer in zip(report.models[1:], report.answers, strict=True):
        asked_it = [] if row.evidence == "simulated" else [_slices(answer)]
        sections += [*asked_it, _ratios(answer, row), *_cascade(answer)]
    return [*sections, _trust(report)]


def _quality(report: AuditReport) -> list[Section]:
    heads = ("Model", "Verdict", "Accepted", "Difference", "Harmful / helpful")
    rows = []
    for row, answer in zip(report.models, [None, *report.answers], strict=True):
        pair = None if answer is None else answer.verdict.paired
        rows.append((
            _name(row), Cell("today" if answer is None else answer.verdict.word, mark=_mark(answer)),
            _points(row.accepted), "-" if answer is None else _points(answer.difference, sign=True),
            "-" if pair is None else f"{100 * pair.harmful:.1f} / {100 * pair.helpful:.1f} %",
        ))  # fmt: skip
    answers = [
        (_name(row), _figure(row.output_tokens), _percent(row.cut), _percent(row.failed), _percent(row.ungraded))
        for row in report.models
    ]
    return [
        Section(
            title="Quality", table=Table(heads, rows, right=(2, 3, 4)),
            notes=("Accepted and difference in points of 100, with 95 % intervals by session; harmful: right before, "
                   "wrong now.",),
        ),
        Section(
            title="Answers", table=Table(("Model", "Tokens per answer", "Cut", "Failed", "Ungraded"), answers),
            notes=("A request that a candidate's server failed is a rejected answer; one that today's failed is not "
                   "graded.",),
        ),
    ]  # fmt: skip


def _mark(answer: CandidateAnswer | None) -> str | None:
    if answer is None:
        return None
    if answer.verdict.switches:
        return "good"
    return "bad" if answer.verdict.word.startswith(("do not", "INVALID")) else "warn"


def _money(report: AuditReport) -> list[Section]:
    heads = ("Model", "SLO", "USD per 1,000 requests", "USD per 1,000 accepted", "Instances")
    rows = [
        (_name(row), _met(row), _usd(row, row.usd_per_request), _usd(row, row.usd_per_accepted),
         _least(row, row.instances))
        for row in report.models
    ]  # fmt: skip
    more = ("Model", "Requests/s of one", "Per 1,000 requests, full", "Per 1,000 accepted, full", "Per 1M tokens")
    full = [
        (_name(row), _most(row), _usd(row, row.usd_per_request_full), _usd(row, row.usd_per_accepted_full),
         _least(row, row.usd_per_1m))
        for row in report.models
    ]  # fmt: skip
    notes = [
        *(
            f"{_name(row)}: {row.calls:.3g} calls per request, {row.escalated:.1%} end with today's model."
            for row in report.models
            if row.calls is not None and row.escalated is not None and (row.calls != 1 or row.escalated)
        ),
        f"Whole instances at {figure(report.requests_per_s)} requests/s, with each model's own answer lengths; "
        "review and failures as far as they were stated.",
        *(f"{_name(row)}: {row.load}" for row in report.models if row.load),
    ]
    if any(row.evidence == "simulated" for row in report.models):
        notes.append("Of simulated models intervals hold the simulator's own error, in 9 of 10 cases "
                     "(docs/ACCURACY.md); no latency is claimed of them but that the SLO is kept.")  # fmt: skip
    return [
        Section(title="Money", table=Table(heads, rows, right=(2, 3, 4)), notes=notes),
        Section(
            title="Money, other units", table=Table(more, full),
            notes=("USD. Full: of an instance at its capacity, at any volume. Per 1M tokens: of today's model for "
                   "the same requests, since tokenizers differ.",),
        ),
    ]  # fmt: skip


def _name(row: ModelRow) -> str:
    """A model as every line names it, with what its figures are where they are not measured."""
    return f"{row.name}, simulated" if row.evidence == "simulated" else row.name


def _least(row: ModelRow, found: Bounded | None) -> str:
    """A cost, or a number of instances: of a bound its lower end."""
    return f"at least {figure(found.low)}" if row.at_least and found is not None else _figure(found)


def _usd(row: ModelRow, found: Bounded | None) -> str:
    """Of 1,000 requests or answers."""
    return _least(row, _thousand(found))


def _most(row: ModelRow) -> str:
    """The capacity: of a bound its upper end."""
    return f"at most {figure(row.capacity.high)}" if row.at_least and row.capacity else _figure(row.capacity)


def _met(row: ModelRow) -> str:
    return "not judged" if row.slo_met is None else "met" if row.slo_met else "missed"


def _slices(answer: CandidateAnswer) -> Section:
    heads = ("Slice", "State", "Difference", "Share", "Records", "Records missing")
    rows = [
        (
            part.name, Cell(part.state, mark={"worse": "bad", "not worse": "good"}.get(part.state, "quiet")),
            _points(_around(part), sign=True), f"{part.share:.0%}", f"{part.paired.n:,}",
            "-" if part.missing is None else f"{part.missing:,}",
        )
        for part in answer.verdict.slices
    ]  # fmt: skip
    note = "Intervals are not adjusted, states are (Holm over the slices of a candidate)."
    return Section(
        title=f"Slices of {answer.verdict.candidate}", table=Table(heads, rows, right=(2, 3, 4, 5)) if rows else None,
        notes=(note,) if rows else ("None is large enough.",),
    )  # fmt: skip


def _cascade(answer: CandidateAnswer) -> list[Section]:
    """The candidate first, today's model where the candidate seems unsure."""
    found = answer.cascade
    if found is None:
        return []
    heads = ("Half", "Threshold", "Kept", "Difference where tuned", "Difference on the other half")
    rows = [
        (name, figure(half.threshold), f"{half.kept:.0%}", f"{100 * half.tuned.difference:+.1f}",
         f"{100 * half.held_out.difference:+.1f}")
        for name, half in zip(("first", "second"), found.halves, strict=True)
    ]  # fmt: skip
    low, high = found.held_out.interval()
    slo = {None: "not judged", True: "met", False: "missed"}[found.slo_met]
    return [Section(
        title=f"Cascade: {answer.verdict.candidate} first, today's model where it is unsure",
        table=Table(heads, rows, right=range(1, len(heads))),
        notes=(
            f"Each half is judged by the threshold of the other: {100 * found.held_out.difference:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}] in all. At {figure(found.threshold)} it keeps {found.kept:.0%} and "
            f"costs {_times(found.bill)}; SLO {slo} (an answer is shown once it is whole).",
            f"Accepted at random as often {found.random:.1%}, by an oracle {found.oracle:.1%}; both models are wrong "
            f"on {found.both_wrong:.1%}.",
        ),
    )]  # fmt: skip


def _ratios(answer: CandidateAnswer, row: ModelRow) -> Section:
    stamp = "simulated: " if row.evidence == "simulated" else ""
    facts: list[tuple[str, object]] = [
        ("USD per request", _times(answer.usd_per_request)),
        ("USD per accepted answer", _times(answer.usd_per_accepted)),
        ("tokens per answer", _times(answer.output_tokens)),
    ]
    if answer.depth_slope is not None:
        facts.append(("points per turn of a conversation", _points(answer.depth_slope, sign=True)))
    if answer.sessions_hit is not None:
        facts.append(("points, sessions with a rejected answer", _points(answer.sessions_hit, sign=True)))
    if answer.judged is not None:
        facts.append(("accepted, corrected by the judge's errors", _points(answer.judged)))
    facts += [
        (f"points, {part.name} (not seen before)", _points(_around(part), sign=True))
        for part in answer.verdict.slices
        if part.name in UNSEEN
    ]
    even = answer.break_even
    if even is not None:
        given: list[tuple[str, Bounded | None]] = [
            ("false above wrong answers that go out, share", even.failure_rate),
            ("false above review minutes per wrong answer more", even.minutes_per_failure),
            ("false below requests per month", even.requests_per_month),
        ]
        facts += [(name, _figure(value)) for name, value in given if value is not None]
    return Section(
        title=f"{_name(row)} over today's model", facts=(("Ratios", [(stamp + name, said) for name, said in facts]),),
        notes=[stamp + _claim(claim) for claim in answer.claims],
    )  # fmt: skip


def _around(part: SliceVerdict) -> Bounded:
    low, high = part.paired.interval()
    return Bounded(part.paired.difference, min(low, part.paired.difference), max(high, part.paired.difference))


def _claim(claim: Claim) -> str:
    said = f"{claim.text}: {claim.outcome}"
    if not claim.unit:
        return said
    if claim.false_above is None:
        return f"{said}; " + ("threshold not measured" if claim.cost is None else "nothing that was measured turns it")
    if claim.false_above.value <= 0:
        return f"{said}; false at any: there is no saving to spend on it"
    return f"{said}; false above {_figure(claim.false_above)} {claim.unit}"


def _trust(report: AuditReport) -> Section:
    lines = []
    if report.noise is None:
        lines.append("Noise floor: not measured.")
    else:
        lines.append(
            f"Noise floor: today's model against itself in another order differs in {report.noise.discordance:.1%} of "
            f"grades, {_points(report.noise_difference, sign=True)} points."
        )
    lines += [
        f"{answer.verdict.candidate}: differs no more than another run of today's model."
        for answer in report.answers
        if answer.like_another_run
    ]
    lines += [
        f"{answer.verdict.candidate}: judge on {answer.judge.labels} labels: kappa {_figure(answer.judge.kappa)}, "
        f"kinder to it by {_points(answer.judge.kinder, sign=True)} points"
        + (f"; not believed: {', '.join(answer.judge.faults)}." if answer.judge.faults else ".")
        for answer in report.answers
        if answer.judge is not None
    ]
    notes = [
        f"Checks, fixed before anybody was asked: SHA-256 {report.checks_sha256 or 'none'}.",
        f"Not worse: Tango's score test by session at 2.5 %, Holm over candidates, from {FEWEST_SESSIONS} sessions on.",
        *report.notes,
        f"Folder: {report.folder}",
    ]
    return Section(title="Trust", lines=lines, notes=notes)


def _ends(low: str, high: str) -> str:
    return f" [{low}, {high}]"


def _figure(found: Bounded | None) -> str:
    if found is None:
        return "-"
    if found.low <= 0 and math.isinf(found.high):
        return f"{figure(found.value)}, no interval"
    given = found.low == found.value == found.high
    return figure(found.value) + ("" if given else _ends(figure(found.low), figure(found.high)))


def _points(found: Bounded | None, *, sign: bool = False) -> str:
    if found is None:
        return "-"
    low, value, high = (f"{100 * x:+.1f}" if sign else f"{100 * x:.1f}" for x in (found.low, found.value, found.high))
    return value + _ends(low, high)


def _times(found: Bounded | None) -> str:
    return "not measured" if found is None else f"x{found.value:.3g}{_ends(f'{found.low:.3g}', f'{found.high:.3g}')}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _thousand(found: Bounded | None) -> Bounded | None:
    return None if found is None else found.times(1000)
