"""The plan: every request, its prompt and its time, fixed before the clock starts. `harness.plan.build` makes it.

A plan file (``plan.arrow``, Arrow IPC file, zstd) holds one row per request, ordered by scheduled time, then id:

==================  ============  =====================================================================================
column              type          meaning
==================  ============  =====================================================================================
request_id          int64         0, 1, 2 ... in trace order, dense
phase               string        "measured" or "warmup"
scheduled_ns        int64         when to send, ns after the common start; null in a closed loop (a free slot decides)
slice               int64         requests of one session share it: 0, 1, 2 ... by first request; worker k of n takes
                                  rows with slice % n == k
after               int64         request_id of the session's previous turn when this one must wait for it, else null
think_ns            int64         wait after that turn finished; null without ``after``. Such a turn is due at the later
                                  of ``scheduled_ns`` and that turn's end + ``think_ns``
cancel_after_ns     int64         the client hangs up this long after it sent the request; null: it does not
timeout_ns          int64         the request fails when it is not finished this long after it was sent; null: the
                                  limit of the run
continues           bool          live conversation: the prompt is what is new in this turn, and before it go, when it
                                  is sent, the prompt of ``after`` as that was sent and what the server answered to it.
                                  null: the prompt is whole
model               string        model or LoRA adapter to ask for; null: the run's
input_tokens        int32         prompt tokens this request should have, with all that goes before them; null for
                                  text: the server counts
output_tokens       int32         tokens to be generated, forced on the server; null when the trace does not say
prompt_token_ids    list<int32>   the prompt as token ids, or null
prompt_text         string        the prompt as text, or null
messages            string        the chat messages as JSON text, or null
==================  ============  =====================================================================================

Exactly one of the last three is set. The file's metadata holds ``harness.plan.file`` (JSON of `PlanInfo`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa

from harness.errors import PlanError, UsageError, unknown_name
from harness.plan.arrivals import Stage
from harness.trace.stats import ArrivalStats, TraceStats
from harness.untrusted import check_regular, open_arrow

SCHEMA_VERSION = "2"
_STEP_ROWS = 32
NO_PROMPTS = "lengths alone, to be simulated"
"""`PlanInfo.tokenizer` of a plan that cannot be sent."""
INFO_KEY = b"harness.plan"
"""Key of the `PlanInfo` JSON in the file's schema metadata."""

SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("scheduled_ns", pa.int64()),
        pa.field("slice", pa.int64(), nullable=False),
        pa.field("after", pa.int64()),
        pa.field("think_ns", pa.int64()),
        pa.field("cancel_after_ns", pa.int64()),
        pa.field("timeout_ns", pa.int64()),
        pa.field("continues", pa.bool_()),
        pa.field("model", pa.string()),
        pa.field("input_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("prompt_token_ids", pa.list_(pa.int32())),
        pa.field("prompt_text", pa.string()),
        pa.field("messages", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A plan joins stretches from different parts of its trace (`harness.plan.windows`), not its first rows."""

    count: int
    """So many, of equal length; one where they would overlap because the trace is short."""
    draw: int
    """0, 1, 2 ...: which draw of a search this is. Each takes other parts of the trace, between those before it."""
    busiest: bool = False


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
    cancel_after_ns: int | None = None
    timeout_ns: int | None = None
    continues: bool | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTokens:
    """Tokens a chat template puts around made-up messages (`harness.plan.chat`), the word each begins with among
    them.
    """

    head: int
    """Up to that word of the first message: the same for all prompts."""
    closing: int
    """After the last message, up to where the answer begins."""
    stays: int
    """Of ``closing``, what is still there, at its place, when the conversation goes on."""
    room: int | None
    """Around an answer and the message after it; null: a constant is not known, each prompt is one message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWindow:
    """A stretch of the trace in a plan of several."""

    first_row: int
    """Of the trace, from 0."""
    last_row: int
    """The last of it; before ``first_row`` where the window runs over the trace's end or is empty."""
    starts_s: float | None
    """Planned time at which it begins (drawn arrivals: of its first request); null in a closed loop."""
    requests: int
    lasts_s: float | None = None
    """Planned time that it takes; null where the times are not the trace's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInfo:
    """What a plan was made from and how; stored in the plan file and copied into the manifest. Fields with a default
    may be missing in plans of older versions.
    """

    schema_version: str
    trace: str
    trace_format: str
    trace_sha256: str
    rows_read: int
    rows_kept: int
    rows_dropped: dict[str, int]
    """Reason -> rows not replayed; rows_read == rows_kept + sum of these."""
    arrivals: Literal["trace", "constant", "poisson", "gamma", "closed"]
    """"trace": its own times; "closed": none, a free slot decides; the others are drawn."""
    speed: float | None
    """Factor on the trace's clock that was applied; null when its times are not used."""
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
    burstiness: float | None = None
    """Shape of gamma gaps; null for other arrivals."""
    stages: list[Stage] = field(default_factory=list)
    """Request rate over time that arrivals were drawn for; empty when they were not drawn."""
    cycles: int = 1
    """How often the trace was begun; above 1 its rows are sent more than once."""
    warmup_requests: int = 0
    """Requests of phase "warmup", the first of the plan."""
    sessions: Literal["trace", "wait"] = "trace"
    """"trace": each turn at its own time; "wait": a turn waits for the one before it."""
    conversation: Literal["recorded", "live"] = "recorded"
    """Whose answers later turns of a session carry: the trace's or the server's own."""
    rescale: Literal["compress", "thin", "superpose"] | None = None
    """"compress": another clock; "thin", "superpose": another demand on the same clock; null: neither."""
    grow: float | None = None
    """Demand as a multiple of the trace's, when it was thinned or superposed."""
    spread_s: float | None = None
    """Step of the trace's clock that arrivals were spread within; null: they were not."""
    max_output_tokens: int | None = None
    """Cap on output lengths, of plans of older versions."""
    template: TemplateTokens | None = None
    """Of the chat template that prompts were made for; null where they were not."""
    cut: bool = False
    """A limit cut off requests that were thinned or superposed: the plan ends before the trace does."""
    source: TraceStats | None = None
    """The rows that were read, as the trace records them, so that a run can be compared with its trace when the trace
    file is gone (`analysis.fidelity`)."""
    planned: ArrivalStats | None = None
    """Arrivals of the plan, on its own clock; null in a closed loop."""
    windows: list[PlannedWindow] = field(default_factory=list)
    """In the order of the plan; empty when it follows the trace from its beginning."""
    busiest: bool = False
    trace_share: float | None = None
    """Share of the trace's rows that the plan sends at least once; null without windows."""


def write_plan(out: Path, info: PlanInfo, batches: Iterator[pa.RecordBatch]) -> None:
    """Write batches of `SCHEMA` as the plan file ``out``: beside it, then renamed, so a plan is whole or not there.

    Raises `PlanError` when the file exists or cannot be written.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    schema = SCHEMA.with_metadata({INFO_KEY: msgspec.json.encode(info)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        temporary.touch(mode=0o600)  # it holds the prompts of users
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
    batches = list(iter_plan_columns(path, columns))
    return pa.Table.from_batches(batches, pa.schema([SCHEMA.field(name) for name in columns]))


def iter_plan_columns(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The same, a batch in memory at a time. Raises `PlanError`."""
    for name in columns:
        if name not in SCHEMA.names:
            raise unknown_name("plan column", name, SCHEMA.names)
    for batch in _batches(path, columns):
        yield batch.select(columns).replace_schema_metadata(None)


def iter_requests(path: Path, worker: int = 0, workers: int = 1) -> Iterator[Request]:
    """Requests of worker ``worker`` (0 to ``workers`` - 1) in the order of the file, a batch at a time. Raises
    `PlanError` for a file that is no plan or damaged, `UsageError` for a worker that does not exist.
    """
    for batch in iter_batches(path, worker, workers):
        yield from requests_in(batch)


def iter_batches(path: Path, worker: int = 0, workers: int = 1) -> Iterator[pa.RecordBatch]:
    """The same rows as batches of `SCHEMA`, none empty; each was checked, so `requests_in` cannot fail on it.

    Nearly all of the work is Arrow's own, which lets other threads run. Raises as `iter_requests` does.
    """
    if not 0 <= worker < workers:
        raise UsageError(f"worker {worker} of {workers}: must be 0 to {workers - 1}")
    for batch in _batches(path):
        mine = np.flatnonzero(batch.column("slice").to_numpy() % workers == worker)
        if len(mine):
            yield batch if len(mine) == batch.num_rows else batch.take(pa.array(mine))


def find_requests(path: Path, ids: Iterable[int]) -> Iterator[Request]:
    """The requests with these ids; batches without any of them are not read. Raises `PlanError`."""
    wanted = np.array([*ids], dtype=np.int64)
    found = [np.isin(batch.column(0).to_numpy(), wanted) for batch in iter_plan_columns(path, ["request_id"])]
    which = [i for i, mine in enumerate(found) if mine.any()]
    for i, batch in zip(which, _batches(path, which=which), strict=True):
        yield from requests_in(batch.filter(pa.array(found[i])))


def _batches(
    path: Path, columns: list[str] | None = None, which: Iterable[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Checked batches, of these columns in the order of `SCHEMA` and these numbers, or all."""
    fields = sorted(SCHEMA.get_field_index(name) for name in columns or SCHEMA.names)
    with _open(path, columns and pa.ipc.IpcReadOptions(included_fields=fields)) as reader:
        _info(path, reader.schema, pa.schema([SCHEMA.field(i) for i in fields]))
        for i in range(reader.num_record_batches) if which is None else which:
            batch = reader.get_batch(i)
            batch.validate(full=True)  # Arrow trusts offsets: a damaged file would read outside its memory
            yield batch


def plan_sha256(path: Path) -> str:
    """SHA-256 of a plan file, hex. Raises `PlanError` when it cannot be read."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise PlanError(f"{path}: cannot read the plan ({e.strerror})") from e


@contextlib.contextmanager
def _open(path: Path, options: pa.ipc.IpcReadOptions | None = None) -> Iterator[pa.ipc.RecordBatchFileReader]:
    """A reader of a plan file; whatever Arrow says of it while it is open becomes a `PlanError`."""
    try:
        with open_arrow(path) as source, pa.ipc.open_file(source, options=options) as reader:
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


def requests_in(batch: pa.RecordBatch) -> Iterator[Request]:
    """The rows of a checked batch of `SCHEMA`; each step is a small one, so that others may have a turn in between."""
    names = [name for name in SCHEMA.names if name != "prompt_token_ids"]
    prompts = batch.column("prompt_token_ids")
    # Through numpy: Arrow's own conversion makes an object per token on the way.
    values, offsets = prompts.values.to_numpy(zero_copy_only=False), prompts.offsets.to_numpy()
    missing = prompts.is_null().to_numpy(zero_copy_only=False)
    for at in range(0, batch.num_rows, _STEP_ROWS):
        part = batch.slice(at, _STEP_ROWS)
        for i, row in enumerate(zip(*(part.column(name).to_pylist() for name in names), strict=True), at):
            ids = None if missing[i] else values[offsets[i] : offsets[i + 1]].tolist()
            yield Request(**dict(zip(names, row, strict=True)), prompt_token_ids=ids)
