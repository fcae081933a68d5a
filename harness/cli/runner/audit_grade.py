"""``harness audit grade``: the kept answers of an audit held against other checks, once its results are known."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from harness.audit.asked import SCHEMA_VERSION, STATE, AuditState
from harness.audit.grades import FILE, grades_of, read_grades
from harness.audit.records import AuditedRecord, order, read_records
from harness.checks.grade import Grader
from harness.checks.spec import Check, decode_check, parse_check
from harness.cli.documents import AuditGrades, Regraded
from harness.cli.output import print_json, print_table, say
from harness.errors import EXIT_VALID, UsageError
from harness.options import PlanOptions
from harness.record.manifest import RunDir, read_json
from harness.sweep.state import read_state
from harness.trace.io import open_asked

if TYPE_CHECKING:
    from harness.analysis.arrays import Floats
    from harness.analysis.quality.paired import Paired


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherCheck:
    """A check for the records with these tags; for all where there are none."""

    when: Mapping[str, str]
    text: str
    """JSON."""

    def is_for(self, record: AuditedRecord) -> bool:
        """Whether the record has all the tags."""
        return self.when.items() <= dict(record.source.tags or ()).items()


def read_checks(path: Path) -> list[OtherCheck]:
    """``[[check]]`` tables of a TOML file, each a check and, in ``when``, the tags of the records that it is for.

    Raises `UsageError`.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as TOML ({e})") from e
    tables = document.get("check")
    tables = [tables] if isinstance(tables, dict) else tables
    if set(document) != {"check"} or not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise UsageError(f'{path}: write [[check]] tables with a type, like type = "contains", and nothing else')
    found = []
    for table in tables:
        when = table.pop("when", {})
        if not isinstance(when, dict) or not all(isinstance(value, str) for value in when.values()):
            raise UsageError(f'{path}: when: write the tags, like when = {{ task = "sums" }}')
        text = msgspec.json.encode(table, enc_hook=str).decode()
        decode_check(text)
        found.append(OtherCheck(when=when, text=text))
    return found


def regraded(folder: Path, checks: Path, format_: str) -> int:
    """All of ``harness audit grade``; the exit status. Raises `UsageError` for an audit that kept no text."""
    state = read_json(folder / STATE, AuditState, SCHEMA_VERSION, "folder of an audit")
    if not state.asked.get("keep_text"):
        raise UsageError(f"{folder}: kept no answers: an audit with --keep-text does")
    others = read_checks(checks)
    source = open_asked(Path(state.trace), PlanOptions())
    if source.sha256 != state.trace_sha256:
        raise UsageError(f"{source.path}: is not the trace that {folder} asked")
    default = state.asked.get("check")
    known = {one.source.line: one for one in read_records(source, default if isinstance(default, str) else None, None)}
    sweep = read_state(folder / "quality")
    before: dict[int, list[pa.Table]] = {}
    after: dict[int, list[pa.Table]] = {}
    graded: list[AuditedRecord] = []
    for point in sweep.points:
        run = RunDir(folder / "quality" / point.name)
        if point.state != "done" or not (run.path / FILE).exists():
            continue
        old = read_grades(run.path)
        rows, lines = (old.column(name).to_pylist() for name in ("record", "line"))
        graded = [
            replace(known[line], row=row, check=_other(known[line], others))
            for row, line in zip(rows, lines, strict=True)
        ]
        before.setdefault(point.pair, []).append(old)
        new = grades_of(run, order(graded, state.seed, point.repeat), Grader(), sealed=False)
        after.setdefault(point.pair, []).append(_unless_same(new, old))
    if not before.get(0):
        raise UsageError(f"{folder}: the current model has no graded answers there")
    repeats = len(before[0]) // 2 or 1
    before[0], after[0] = before[0][:repeats], after[0][:repeats]
    rows_ = [
        Regraded(
            model=pair.name, accepted=_share(after[k], graded), accepted_before=_share(before[k], graded),
            difference=_difference(after[0], after[k], graded) if k else None,
            difference_before=_difference(before[0], before[k], graded) if k else None,
        )
        for k, pair in enumerate(sweep.pairs)
        if k in before
    ]  # fmt: skip
    _print(rows_, state, format_)
    return EXIT_VALID


def _unless_same(new: pa.Table, old: pa.Table) -> pa.Table:
    """Grades of ``old`` where the check is still that: a judge is not asked again."""
    same = pc.equal(new.column("check_sha256"), old.column("check_sha256"))
    accepted = pc.if_else(same, old.column("accepted"), new.column("accepted"))
    return new.set_column(new.schema.get_field_index("accepted"), new.schema.field("accepted"), accepted)


def _other(record: AuditedRecord, others: Sequence[OtherCheck]) -> Check | None:
    for one in others:
        if one.is_for(record):
            try:
                return parse_check(one.text, record.source.expected)
            except UsageError as e:
                raise UsageError(f"line {record.source.line}: {e}") from e
    return record.check


def _grades(tables: Sequence[pa.Table]) -> Floats:
    import numpy as np

    each = [[np.nan if x is None else float(x) for x in table.column("accepted").to_pylist()] for table in tables]
    found: Floats = np.mean(np.array(each), axis=0)
    return found


def _paired(one: Sequence[pa.Table], other: Sequence[pa.Table], graded: Sequence[AuditedRecord]) -> Paired | None:
    import numpy as np

    from harness.analysis.quality.paired import paired

    return paired(
        _grades(one), _grades(other), np.array([record.session for record in graded], np.int64),
        np.array([record.source.weight or 1.0 for record in graded], np.float64),
    )  # fmt: skip


def _share(tables: Sequence[pa.Table], graded: Sequence[AuditedRecord]) -> float | None:
    found = _paired(tables, tables, graded)
    return None if found is None else found.current


def _difference(
    one: Sequence[pa.Table], other: Sequence[pa.Table], graded: Sequence[AuditedRecord]
) -> tuple[float, float, float] | None:
    found = _paired(one, other, graded)
    return None if found is None else (found.difference, *found.interval())


def _print(rows: Sequence[Regraded], state: AuditState, format_: str) -> None:
    if format_ == "json":
        print_json(AuditGrades(margin=state.margin, models=rows))
        return

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    def points(value: tuple[float, float, float] | None) -> str:
        return "-" if value is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in value))

    print_table(
        ("model", "accepted", "before", "difference, points", "before"),
        [(row.model, share(row.accepted), share(row.accepted_before), points(row.difference),
          points(row.difference_before)) for row in rows],
    )  # fmt: skip
    say(
        "these checks were chosen after the results, so they decide nothing: begin an audit with them to decide "
        f"(its margin was {100 * state.margin:g} points)"
    )
