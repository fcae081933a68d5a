"""The plan: every request, its prompt and its time, fixed before the clock starts.

A plan file (``plan.arrow``, Arrow IPC file, zstd) holds one row per request, ordered by scheduled time, then id:

==================  ============  =====================================================================================
column              type          meaning
==================  ============  =====================================================================================
request_id          int64         0, 1, 2 ... in trace order, dense
phase               string        "measured" or "warmup"
scheduled_ns        int64         when to send, ns after the common start; null in a closed loop (a free slot decides)
slice               int64         requests of one session share it; worker k of n takes rows with slice % n == k
after               int64         request_id of the session's previous turn when this one must wait for it, else null
think_ns            int64         wait after that turn finished; null without ``after``
input_tokens        int32         prompt tokens this request should have; null for text whose length only the server
knows output_tokens       int32         tokens to be generated, forced on the server; null when the trace does not say
prompt_token_ids    list<int32>   the prompt as token ids, or null
prompt_text         string        the prompt as text, or null
messages            string        the chat messages as JSON text, or null
==================  ============  =====================================================================================

Exactly one of the last three is set. The file's metadata holds ``harness.plan`` (JSON of `PlanInfo`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from harness.errors import PlanError, UsageError, unknown_name
from harness.prompts import Ids, Vocabulary
from harness.trace import Trace, TraceRecord

SCHEMA_VERSION = "1"
INFO_KEY = b"harness.plan"
"""Key of the `PlanInfo` JSON in the file's schema metadata."""

# Batches are bounded in rows and in tokens or characters, so that memory is, whatever the trace holds.
_BATCH_ROWS = 1024
_BATCH_SIZE = 2_000_000

SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("scheduled_ns", pa.int64()),
        pa.field("slice", pa.int64(), nullable=False),
        pa.field("after", pa.int64()),
        pa.field("think_ns", pa.int64()),
        pa.field("input_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        pa.field("prompt_text", pa.string()),
        pa.field("messages", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row of a plan; see the module docstring for each field."""

    request_id: int
    phase: str
    scheduled_ns: int | None
    slice: int
    after: int | None
    think_ns: int | None
    input_tokens: int | None
    output_tokens: int | None
    prompt_token_ids: list[int] | None
    prompt_text: str | None
    messages: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInfo:
    """What a plan was made from and how; stored in the plan file and copied into the manifest."""

    schema_version: str
    trace: str
    trace_format: str
    trace_sha256: str
    rows_read: int
    rows_kept: int
    rows_dropped: dict[str, int]
    """Reason -> rows not replayed; rows_read == rows_kept + sum of these."""
    arrivals: str
    """"trace" (own times), "closed" (a free slot decides)."""
    speed: float | None
    """Factor on the trace's clock that was applied; null in a closed loop."""
    source_rate: float | None
    """Mean arrival rate of the kept trace rows as recorded, req/s; null when the trace has no times or one instant."""
    planned_rate: float | None
    """Mean arrival rate of the plan, req/s; null in a closed loop."""
    seed: int
    tokenizer: str | None
    requests: int
    span_s: float | None
    """Planned time from the first to the last arrival; null in a closed loop."""
    notes: list[str]
    """What a reader of the results must know: a coarse time grid, dropped rows, guessed nothing."""


def build_plan(
    trace: Trace,
    out: Path,
    *,
    closed: bool,
    speed: float | None = None,
    rate: float | None = None,
    limit: int | None = None,
    duration_s: float | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    as_text: bool = False,
    max_output_tokens: int | None = None,
) -> PlanInfo:
    """Write the plan of ``trace`` to ``out`` and say what is in it. Equal arguments write equal bytes.

    Open loop: the trace's own arrivals, the first at 0, on a clock ``speed`` times as fast (default 1). ``rate`` picks
    the speed for which the mean arrival rate of the plan, (n - 1) / span of its n requests, is ``rate`` requests/s;
    bursts keep their shape. Closed loop: no times.

    ``limit`` keeps the first rows. ``duration_s`` keeps what is due before that planned time; with ``rate`` that is the
    first rate x duration_s rows, so that the rate is met inside the duration whatever the rest of the trace does.

    Prompts: text and messages of the trace are sent as they are. Of rows that say lengths only, prompts of exactly that
    length are made from ``vocabulary`` as token ids (``as_text``: as text) and depend on (``seed``, request_id) alone,
    or on (``seed``, prefix ids) where the trace has them; requests that share leading ids share those tokens.

    ``max_output_tokens`` caps output lengths, and is the length where the trace says none.

    Sessions stay whole (one ``slice``), but their turns are planned by arrival time alone; ``after`` and ``think_ns``
    are null.

    Raises `UsageError` for options that exclude each other or need times the trace lacks, `PlanError` when the file
    exists or cannot be written or prompts cannot be made, `TraceError` from reading.
    """
    _check_options(closed, speed, rate, limit, duration_s, max_output_tokens)
    if out.exists():
        raise PlanError(f"{out}: exists already; plans are never overwritten, choose another name")
    if rate is not None and duration_s is not None:
        # Rounded first: 0.1 x 30 must be 3 rows, not 4.
        rows = math.ceil(round(rate * duration_s, 6))
        limit = rows if limit is None else min(rows, limit)
    survey = _survey(trace, limit, closed, vocabulary, None if rate is not None else _cut_ns(duration_s, speed))
    source_rate = _rate(survey.arrivals)
    scheduled = None
    if not closed:
        speed = _speed(trace, survey.arrivals, speed, rate, source_rate)
        scheduled = _rescale(survey.arrivals, speed)
    n = survey.requests
    info = PlanInfo(
        schema_version=SCHEMA_VERSION,
        trace=trace.path.name,
        trace_format=trace.format,
        trace_sha256=trace.sha256,
        rows_read=n + sum(trace.rows_dropped.values()),
        rows_kept=n,
        rows_dropped=dict(trace.rows_dropped),
        arrivals="closed" if closed else "trace",
        speed=speed,
        source_rate=source_rate,
        planned_rate=None if scheduled is None else _rate(scheduled),
        seed=seed,
        tokenizer=vocabulary.name if vocabulary is not None and survey.lengths_only else None,
        requests=n,
        span_s=None if scheduled is None else int(scheduled[-1]) / 1e9,
        notes=_notes(trace, survey, scheduled, duration_s, max_output_tokens),
    )
    prompts = _Prompts(vocabulary, seed, as_text)
    _write(out, info, _batches(trace, n, scheduled, prompts, max_output_tokens))
    return info


def _check_options(
    closed: bool,
    speed: float | None,
    rate: float | None,
    limit: int | None,
    duration_s: float | None,
    max_output_tokens: int | None,
) -> None:
    given = [
        name for name, on in (("closed loop", closed), ("speed", speed is not None), ("rate", rate is not None)) if on
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: each decides when requests are sent; give one")
    if closed and duration_s is not None:
        raise UsageError("a closed loop has no planned times to cut by duration: give the duration to the run instead")
    for name, value in (("speed", speed), ("rate", rate), ("duration", duration_s)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value:g}, must be a number above 0")
    for name, count in (("limit", limit), ("max output tokens", max_output_tokens)):
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, must be at least 1")


@dataclass(slots=True)
class _Survey:
    """What one reading of the trace found: an integer per request, never the requests."""

    requests: int
    arrivals: npt.NDArray[np.int64]
    """ns from the first; empty when the trace has no times."""
    lengths_only: int
    longest_output: int
    ended_early: bool


def _survey(
    trace: Trace, limit: int | None, closed: bool, vocabulary: Vocabulary | None, cut_ns: float | None
) -> _Survey:
    """Read the trace up to ``limit`` rows or the first at or after ``cut_ns`` (trace clock)."""
    arrivals = array("q")
    requests = lengths_only = longest_output = 0
    ended_early = False
    with contextlib.closing(iter(trace)) as records:
        for record in records:
            if record.arrival_s is not None:
                arrival_ns = round(record.arrival_s * 1e9)
                if cut_ns is not None and arrival_ns >= cut_ns:
                    ended_early = True
                    break
                arrivals.append(arrival_ns)
            elif not closed:
                raise UsageError(
                    f"{trace.path}: the trace has no arrival times, so there is nothing to replay in time; "
                    "use --concurrency for a closed loop"
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
            if requests == limit:
                ended_early = True
                break
    return _Survey(requests, np.array(arrivals, dtype=np.int64), lengths_only, longest_output, ended_early)


def _cut_ns(duration_s: float | None, speed: float | None) -> float | None:
    """Where ``duration_s`` of planned time ends on the trace's own clock."""
    return None if duration_s is None else duration_s * 1e9 * (1.0 if speed is None else speed)


def _rate(arrivals: npt.NDArray[np.int64]) -> float | None:
    """Mean arrival rate, req/s: (n - 1) / span; None below two rows or when all arrive at one instant.

    n - 1, because n arrivals have n - 1 gaps: k requests a second apart arrive at 1 req/s, not at k / (k - 1).
    """
    if len(arrivals) < 2 or arrivals[-1] == arrivals[0]:
        return None
    return (len(arrivals) - 1) * 1e9 / int(arrivals[-1] - arrivals[0])


def _speed(
    trace: Trace,
    arrivals: npt.NDArray[np.int64],
    speed: float | None,
    rate: float | None,
    source_rate: float | None,
) -> float:
    if rate is None:
        return 1.0 if speed is None else speed
    if source_rate is None:
        what = "only one row is" if len(arrivals) == 1 else f"all {len(arrivals)} rows are"
        raise UsageError(
            f"{trace.path}: {what} kept at one instant, which no change of clock turns into {rate:g} requests/s; "
            "keep more rows (--limit, --duration), or use --concurrency"
        )
    return rate / source_rate


def _rescale(arrivals: npt.NDArray[np.int64], speed: float) -> npt.NDArray[np.int64]:
    if speed == 1.0:
        return arrivals  # exact: no float in between
    scheduled = np.rint(arrivals / speed)
    if scheduled[-1] >= 2**63:
        raise UsageError(f"speed {speed:g} stretches the trace beyond 292 years; speed above 1 is faster")
    return scheduled.astype(np.int64)


def _notes(
    trace: Trace,
    survey: _Survey,
    scheduled: npt.NDArray[np.int64] | None,
    duration_s: float | None,
    max_output_tokens: int | None,
) -> list[str]:
    notes = list(trace.notes)
    if survey.ended_early:
        notes.append(f"reading stopped after {survey.requests} usable rows (limit or duration)")
    elif scheduled is not None and duration_s is not None and scheduled[-1] < 0.95e9 * duration_s:
        notes.append(f"the trace ends at {int(scheduled[-1]) / 1e9:.1f} s of the {duration_s:g} s asked for")
    if max_output_tokens is not None and survey.longest_output > max_output_tokens:
        notes.append(
            f"output lengths capped at {max_output_tokens} tokens, the longest is {survey.longest_output}: "
            "the load is lighter than the trace's"
        )
    return notes


@dataclass(frozen=True, slots=True)
class _Prompts:
    """How prompts are made for rows that have none."""

    vocabulary: Vocabulary | None
    seed: int
    as_text: bool

    def make(self, records: Sequence[TraceRecord], first_id: int) -> tuple[list[Ids | None], list[str | None]]:
        """Token ids and texts, one of each per record: at most one is set, neither where the trace has its own."""
        ids: list[Ids | None] = []
        for request_id, record in enumerate(records, first_id):
            if record.text is not None or record.messages is not None:
                ids.append(None)
                continue
            assert self.vocabulary is not None and record.input_tokens is not None
            ids.append(
                self.vocabulary.token_ids(
                    record.input_tokens,
                    request_id,
                    seed=self.seed,
                    prefix_ids=record.prefix_ids,
                    block_tokens=record.block_tokens,
                )
            )
        if not self.as_text or self.vocabulary is None:
            return ids, [None] * len(ids)
        texts = iter(self.vocabulary.texts([prompt for prompt in ids if prompt is not None]))
        return [None] * len(ids), [None if prompt is None else next(texts) for prompt in ids]


def _batches(
    trace: Trace,
    n: int,
    scheduled: npt.NDArray[np.int64] | None,
    prompts: _Prompts,
    max_output_tokens: int | None,
) -> Iterator[pa.RecordBatch]:
    """Read the trace a second time and turn its first ``n`` records into batches of `SCHEMA`."""
    first_of_session: dict[str, int] = {}
    done = 0
    with contextlib.closing(iter(trace)) as records:
        for chunk in _chunks(islice(records, n)):
            ids, texts = prompts.make(chunk, done)
            request_ids = range(done, done + len(chunk))
            columns = {
                "request_id": pa.array(np.arange(done, done + len(chunk), dtype=np.int64)),
                "phase": pa.array(["measured"] * len(chunk)),
                "scheduled_ns": None if scheduled is None else pa.array(scheduled[done : done + len(chunk)]),
                "slice": pa.array(
                    i if record.session_id is None else first_of_session.setdefault(record.session_id, i)
                    for i, record in zip(request_ids, chunk, strict=True)
                ),
                # Of a text, the trace's count is another tokenizer's: only the server knows.
                "input_tokens": pa.array(
                    [None if r.text is not None or r.messages is not None else r.input_tokens for r in chunk],
                    pa.int32(),
                ),
                "output_tokens": pa.array(
                    [_output_tokens(r.output_tokens, max_output_tokens) for r in chunk], pa.int32()
                ),
                "prompt_token_ids": _id_lists(ids),
                "prompt_text": pa.array(
                    [r.text if r.text is not None else t for r, t in zip(chunk, texts, strict=True)], pa.string()
                ),
                "messages": pa.array(
                    [None if r.messages is None else msgspec.json.encode(r.messages).decode() for r in chunk],
                    pa.string(),
                ),
            }
            nulls = {
                field.name: pa.nulls(len(chunk), field.type) for field in SCHEMA if columns.get(field.name) is None
            }
            yield pa.record_batch([(columns | nulls)[name] for name in SCHEMA.names], schema=SCHEMA)
            done += len(chunk)
    if done != n:
        raise PlanError(f"{trace.path}: had {n} usable rows, now {done}: it changed while it was read")


def _chunks(records: Iterator[TraceRecord]) -> Iterator[list[TraceRecord]]:
    chunk: list[TraceRecord] = []
    size = 0
    for record in records:
        chunk.append(record)
        if record.messages is not None:
            size += sum(len(message["content"]) for message in record.messages)
        else:
            size += len(record.text) if record.text is not None else record.input_tokens or 0
        if len(chunk) == _BATCH_ROWS or size >= _BATCH_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _output_tokens(traced: int | None, most: int | None) -> int | None:
    if traced is None or most is None:
        return traced if most is None else most
    return min(traced, most)


def _id_lists(prompts: Sequence[Ids | None]) -> pa.Array:
    offsets = np.cumsum([0] + [0 if ids is None else len(ids) for ids in prompts], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype=np.int32), *(ids for ids in prompts if ids is not None)])
    missing = pa.array([ids is None for ids in prompts])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)


def _write(out: Path, info: PlanInfo, batches: Iterator[pa.RecordBatch]) -> None:
    """Write beside ``out`` and rename: a plan is whole or not there."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    schema = SCHEMA.with_metadata({INFO_KEY: msgspec.json.encode(info)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        if out.exists():
            raise PlanError(f"{out}: exists already; plans are never overwritten, choose another name")
        temporary.replace(out)
    except OSError as e:
        raise PlanError(f"{out}: cannot write the plan ({e.strerror or e})") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_plan_info(path: Path) -> PlanInfo:
    """The `PlanInfo` of a plan file; prompts are not touched. Raises `PlanError` when it is no readable plan."""
    with _open(path) as reader:
        return _info(path, reader.schema)


def read_plan_columns(path: Path, columns: list[str]) -> pa.Table:
    """The named columns of a plan file; others, such as prompts, are not even read. Raises `PlanError`."""
    for name in columns:
        if name not in SCHEMA.names:
            raise unknown_name("plan column", name, SCHEMA.names)
    fields = sorted(SCHEMA.get_field_index(name) for name in columns)
    with _open(path, pa.ipc.IpcReadOptions(included_fields=fields)) as reader:
        _info(path, reader.schema, pa.schema([SCHEMA.field(i) for i in fields]))
        table = reader.read_all()
        table.validate(full=True)
        return table.select(columns).replace_schema_metadata(None)


def iter_requests(path: Path, worker: int = 0, workers: int = 1) -> Iterator[Request]:
    """Requests of worker ``worker`` (0 to ``workers`` - 1) in the order of the file, a batch in memory at a time.

    The slices of all workers are the plan, each request exactly once.

    Raises `PlanError` for a file that is no plan or damaged, `UsageError` for a worker that does not exist.
    """
    if not 0 <= worker < workers:
        raise UsageError(f"worker {worker} of {workers}: must be 0 to {workers - 1}")
    with _open(path) as reader:
        _info(path, reader.schema)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            batch.validate(full=True)  # Arrow trusts offsets: a damaged file would read outside its memory
            mine = np.flatnonzero(batch.column("slice").to_numpy() % workers == worker)
            if len(mine):
                yield from _rows(batch.take(pa.array(mine)))


def plan_sha256(path: Path) -> str:
    """SHA-256 of a plan file, hex. Raises `PlanError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise PlanError(f"{path}: cannot read the plan ({e.strerror})") from e


@contextlib.contextmanager
def _open(path: Path, options: pa.ipc.IpcReadOptions | None = None) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A reader of a plan file; whatever Arrow says of it while it is open becomes a `PlanError`."""
    try:
        with pa.OSFile(str(path), "rb") as source, pa.ipc.open_file(source, options=options) as reader:
            yield reader
    except FileNotFoundError as e:
        raise PlanError(f"{path}: no such plan") from e
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise PlanError(f"{path}: not a whole plan file ({e}); make it again from its trace") from e


def _info(path: Path, schema: pa.Schema, expected: pa.Schema = SCHEMA) -> PlanInfo:
    raw = (schema.metadata or {}).get(INFO_KEY)
    if raw is None:
        raise PlanError(f"{path}: an Arrow file, but not a plan")
    try:
        version = msgspec.json.decode(raw, type=dict[str, object]).get("schema_version")
        if version != SCHEMA_VERSION:
            raise PlanError(f"{path}: plan schema {version}, this harness reads {SCHEMA_VERSION}; make the plan again")
        info = msgspec.json.decode(raw, type=PlanInfo)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise PlanError(f"{path}: damaged plan description ({e})") from e
    if not schema.equals(expected):
        raise PlanError(f"{path}: the columns are not those of plan schema {SCHEMA_VERSION}; make the plan again")
    return info


def _rows(batch: pa.RecordBatch) -> Iterator[Request]:
    names = [name for name in SCHEMA.names if name != "prompt_token_ids"]
    prompts = batch.column("prompt_token_ids")
    # Through numpy: Arrow's own conversion makes an object per token on the way.
    values, offsets = prompts.values.to_numpy(zero_copy_only=False), prompts.offsets.to_numpy()
    missing = prompts.is_null().to_numpy(zero_copy_only=False)
    for i, row in enumerate(zip(*(batch.column(name).to_pylist() for name in names), strict=True)):
        ids = None if missing[i] else values[offsets[i] : offsets[i + 1]].tolist()
        yield Request(**dict(zip(names, row, strict=True)), prompt_token_ids=ids)
