"""Grades of one pass, a row a record: ``grades.arrow`` in the folder of its run. No text of an answer is in it.

=============  =======  ===============================================================================================
column         type     meaning
=============  =======  ===============================================================================================
record         int64    row of the audit's records
line           int64    of the trace file
check_sha256   string   of the check
accepted       bool     by the check; null: could not be graded. A failure of the server is false: the user saw it
reason         string   from a closed set (`harness.checks.grade.Reason`), or the error of the request; with one of
                        `harness.checks.grade.HALF` the null beside it is half a right answer
gate           bool     what production's own test said; null: the record has none, or it could not be graded
input_tokens   int32    as the server counted, as all tokens; null when it did not say
cached_tokens  int32
output_tokens  int32
finish_reason  string   as the server said
mean_logprob   double   of the answer's tokens; null where the server gave none
ttft_s         double   from when the request was sent; null without a stream
e2e_s          double   null for a request that failed
=============  =======  ===============================================================================================
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from harness.audit.records import AuditedRecord
from harness.checks.grade import Grader
from harness.checks.spec import Prefer
from harness.errors import ResultsError
from harness.record.answers import CAPTURED_SCHEMA, PROCESS_KEY, read_captured, unseal
from harness.record.manifest import RunDir
from harness.record.results import iter_results
from harness.untrusted import open_arrow

FILE = "grades.arrow"
SCHEMA = pa.schema(
    [
        pa.field("record", pa.int64(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("check_sha256", pa.string(), nullable=False),
        pa.field("accepted", pa.bool_()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("gate", pa.bool_()),
        pa.field("input_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("mean_logprob", pa.float64()),
        pa.field("ttft_s", pa.float64()),
        pa.field("e2e_s", pa.float64()),
    ],
    metadata={"harness.grades": "2"},
)
GONE = ("connect", "cut", "server", "stall", "timeout", "stopped", "unsent")
"""Errors of a request whose server may be no more."""
NO_LONGER = 5
"""So many of them after the last answer, to the end of the pass, and the server was no more."""
NOT_ASKED = ("unsent", "stopped", "cancelled", "no_history", "auth", "tls", "redirect")
"""Errors that say nothing of the model: the request was not sent, or not with a key that the server takes. They could
not be graded. (429 and 503 are asked again for as long as a request may take: what is left of them failed.)"""


def grade_run(
    run: RunDir, asked: Sequence[AuditedRecord], grader: Grader, *, keep_text: bool, at_once: int = 1,
    others: Mapping[int, str | None] | None = None,
) -> None:  # fmt: skip
    """Grade the captured answers of a run and delete their text, unless it is to be kept.

    Request k of the run asked ``asked[k]``. Grades that are there already stay. Text that is not to be kept is sealed:
    raises `ResultsError` for that of another process. ``at_once``: answers that are graded beside each other.
    ``others``: by row of the record, the current model's answers, which its own are the other side of; None: these are
    they.
    """
    if not (run.path / FILE).exists():
        _write(run.path / FILE, grades_of(run, asked, grader, sealed=not keep_text, at_once=at_once, others=others))
    if not keep_text:
        for file in _captured(run):
            _forget(file)


def grades_of(
    run: RunDir, asked: Sequence[AuditedRecord], grader: Grader, *, sealed: bool, at_once: int = 1,
    others: Mapping[int, str | None] | None = None,
) -> pa.Table:  # fmt: skip
    """The grades of a run's captured answers, in order of records. Raises `ResultsError`."""
    texts: dict[int, str | None] = {}
    scores: dict[int, float | None] = {}
    for file in _captured(run):
        table = read_captured(file)
        ids = table.column("request_id").to_pylist()
        texts.update(zip(ids, _opened(table, sealed=sealed), strict=True))
        scores.update(zip(ids, table.column("mean_logprob").to_pylist(), strict=True))
    results = [row for file in run.all_results() for row in _rows(file)]
    with ThreadPoolExecutor(at_once) as pool:
        rows = list(pool.map(lambda row: _graded(row, asked, texts, scores, grader, others), results))
    return pa.Table.from_pylist(rows, SCHEMA).sort_by("record")


def kept_answers(run: RunDir, asked: Sequence[AuditedRecord]) -> dict[int, str | None]:
    """The kept text of each answer of a run, by row of the record. Raises `ResultsError`."""
    found: dict[int, str | None] = {}
    for file in _captured(run):
        table = read_captured(file)
        for request, text in zip(table.column("request_id").to_pylist(), table.column("text").to_pylist(), strict=True):
            found[asked[request].row] = text
    return found


def _captured(run: RunDir) -> list[Path]:
    return sorted(run.path.glob("answers-*.arrows"))


def read_grades(folder: Path) -> pa.Table:
    """The grades of a run, in order of records. Raises `ResultsError`."""
    try:
        with open_arrow(folder / FILE) as source, pa.ipc.open_file(source) as reader:
            table = reader.read_all()
    except (OSError, pa.ArrowException) as e:
        raise ResultsError(f"{folder / FILE}: not a whole file of grades ({e})") from e
    if not table.schema.equals(SCHEMA):
        raise ResultsError(f"{folder / FILE}: the columns are not those of grades of this harness")
    return table


def death(run: RunDir) -> str | None:
    """Why the answers of this run say that its server died, after how many requests; None: they do not."""
    rows = [row for file in run.all_results() for row in _rows(file)]
    rows.sort(key=lambda row: int(str(row["finished_ns"] or 0)))
    good = [k for k, row in enumerate(rows) if row["error"] is None]
    after = rows[good[-1] + 1 :] if good else rows
    if not after or any(row["error"] not in GONE for row in after):
        return None
    refused = any(row["error"] == "connect" for row in after)
    if len(after) < NO_LONGER and not refused:
        return None
    return f"its server was no more after {len(good):,} of {len(rows):,} answers"


def _rows(file: Path) -> list[dict[str, object]]:
    names = ["request_id", "sent_ns", "chunk_gap_ns", "finished_ns", "input_tokens", "cached_tokens", "output_tokens",
             "finish_reason", "error"]  # fmt: skip
    return [row for batch in iter_results(file) for row in batch.select(names).to_pylist()]


def _graded(
    row: Mapping[str, object],
    asked: Sequence[AuditedRecord],
    texts: Mapping[int, str | None],
    scores: Mapping[int, float | None],
    grader: Grader,
    others: Mapping[int, str | None] | None,
) -> dict[str, object]:
    request = int(str(row["request_id"]))
    record = asked[request]
    error, sent, finished = row["error"], row["sent_ns"], row["finished_ns"]
    gaps = row["chunk_gap_ns"]
    accepted: bool | None
    gate: bool | None = None
    if error is not None:
        accepted, reason = (None if error in NOT_ASKED else False), str(error)
        gate = False if record.gate is not None and accepted is False else None
    elif (text := texts.get(request)) is None or record.check is None:
        accepted, reason = None, "no text"
    elif isinstance(record.check, Prefer) and others is None:
        accepted, reason = None, "compared"
    else:
        found = grader.grade(record.check, text, record.prompt, (others or {}).get(record.row))
        accepted, reason = found.accepted, found.reason
        gate = None if record.gate is None else grader.grade(record.gate, text, record.prompt).accepted
    return {
        "record": record.row, "line": record.source.line, "check_sha256": record.sha256, "accepted": accepted,
        "reason": reason, "gate": gate,
        **{name: row[name] for name in ("input_tokens", "cached_tokens", "output_tokens", "finish_reason")},
        "mean_logprob": scores.get(request),
        "ttft_s": gaps[0] / 1e9 if isinstance(gaps, list) and gaps else None,
        "e2e_s": (finished - sent) / 1e9
        if error is None and isinstance(finished, int) and isinstance(sent, int) else None,
    }  # fmt: skip


def _opened(table: pa.Table, *, sealed: bool) -> list[str | None]:
    texts: list[str | None] = table.column("text").to_pylist()
    if not sealed:
        return texts
    found: list[str | None] = []
    for text, said in zip(texts, table.column("hmac").to_pylist(), strict=True):
        try:
            one = None if text is None else unseal(text, PROCESS_KEY)
        except ValueError:
            one = ""
        if one is not None and hmac.digest(PROCESS_KEY, one.encode("utf-8", "replace"), "sha256") != said:
            raise ResultsError("its answers are sealed with the key of a process that is gone, so must be asked again")
        found.append(one)
    return found


def _forget(file: Path) -> None:
    """Replace a file of captured answers by one without their text."""
    table = read_captured(file)
    if table.column("text").null_count == len(table):
        return
    place = table.schema.get_field_index("text")
    _write(file, table.set_column(place, CAPTURED_SCHEMA.field("text"), pa.nulls(len(table), pa.string())), stream=True)


def _write(file: Path, table: pa.Table, *, stream: bool = False) -> None:
    """In one step, for its owner alone."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            schema = CAPTURED_SCHEMA if stream else SCHEMA
            with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, schema) as writer:
                writer.write_table(table.replace_schema_metadata(schema.metadata))
        temporary.replace(file)
    except OSError as e:
        raise ResultsError(f"{file}: cannot write ({e.strerror})") from e
