"""A plan served in virtual time, and the run directory of it; imported when something is simulated."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.cli.output import say
from harness.cluster.catalogue.models import Model
from harness.cluster.engines.simulated import NAME, args_of
from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.simulator.blocks import block_keys
from harness.cluster.simulator.elastic import Autoscaler, Elastic
from harness.cluster.simulator.fleet import Outcomes, Router, Workload, simulate
from harness.cluster.simulator.scheduler import VLLM, Limits
from harness.cluster.simulator.workload import Sample
from harness.errors import UsageError
from harness.options import ReplayOptions, RouterName
from harness.plan.build import build_plan
from harness.plan.file import NO_PROMPTS, PlanInfo, plan_sha256, read_plan_columns, read_plan_info
from harness.plan.prompts import Vocabulary
from harness.plan.spec import asked_plan
from harness.record.manifest import (
    Life,
    Replica,
    RunDir,
    RunManifest,
    ServedBy,
    Tier,
    Worker,
    new_manifest,
    write_manifest,
)
from harness.record.run_spec import RunSpec
from harness.record.simulated import (
    NOT_SERVED,
    Lost,
    ServerSamples,
    SimulatedRows,
    counters_at,
    write_rows,
    write_server_metrics,
)
from harness.trace.io import Trace

Ints = npt.NDArray[np.int64]
COLUMNS = [
    "request_id", "scheduled_ns", "slice", "after", "think_ns", "cancel_after_ns", "timeout_ns", "continues", "model",
    "input_tokens", "output_tokens",
]  # fmt: skip
SAMPLE_S = 1.0
IDS = 65_536
"""Made-up tokens; which they are matters to nobody, but who shares them with whom."""
ROUTERS: dict[str, Router] = {
    "least": "least in flight", "round-robin": "round robin", "session": "session", "prefix": "prefix"
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is simulated."""

    model: Model
    tier: Tier
    replicas: int
    """At the beginning."""
    engine: HardwareEngine
    """Of each replica."""
    router: RouterName = "least"
    """One of `ROUTERS`."""
    stale_s: float = 0.0
    """How far apart the router asks replicas how many requests they have."""
    elastic: Elastic | None = None
    """How replicas come and go; None: there are always as many, and the same."""


def make_bare_plan(
    trace: Trace, out: Path, asked: ReplayOptions, tell: Callable[[str], None] = say,
    note: Callable[[str], None] | None = None,
) -> PlanInfo:  # fmt: skip
    """The plan as a replay makes it, without prompts that nobody would read."""
    spec = replace(asked_plan(asked.plan, closed=asked.load.closed), bare=True)
    vocabulary = Vocabulary(np.arange(IDS, dtype=np.int32), NO_PROMPTS)
    started = time.monotonic()
    info = build_plan(trace, out, spec, vocabulary)
    rate = f", {info.planned_rate:.4g} req/s" if info.planned_rate else ""
    tell(f"plan: {info.requests} requests from {info.trace_format} trace{rate} ({time.monotonic() - started:.1f} s)")
    for words in info.notes:
        (note or tell)(f"  note: {words}")
    return info


def simulate_plan(
    run: RunDir, subject: Subject, asked: ReplayOptions, tell: Callable[[str], None] = say
) -> RunManifest:  # fmt: skip
    """Serve the plan of ``run`` and write all files of the run. Raises `UsageError` for what is not simulated."""
    info, engine = read_plan_info(run.plan), subject.engine
    load = asked.load
    duration_s = asked.plan.duration_s if load.closed else None
    table = read_plan_columns(run.plan, COLUMNS)
    _check(table, asked)
    started = time.monotonic()
    requests = _requests(table, subject)
    keys = _shared_keys(run, info, engine.limits)
    serve = partial(
        simulate, limits=engine.limits, step_times=[engine.step_time] * subject.replicas,
        router=ROUTERS[subject.router], stale_s=subject.stale_s, concurrency=load.concurrency, elastic=subject.elastic,
    )  # fmt: skip
    if duration_s is not None:  # who is sent in that time does not depend on who comes after it
        sent = np.isfinite(serve(requests.workload(engine, keys), until_s=duration_s).due_s)
        requests = requests.cut(int(sent.sum()), duration_s)
    found = serve(requests.workload(engine, keys), sample_s=SAMPLE_S)
    rows = requests.rows(found)
    took_s = time.monotonic() - started
    write_rows(run.results(0), rows)
    counters = []
    for k, samples in enumerate(found.samples):
        server, last = _server(rows, k, samples, engine.limits)
        write_server_metrics(run.server_metrics(k), server)
        counters.append(last)
    steps = sum(map(len, found.step_end_s))
    end_s = max((float(ends[-1]) for ends in found.step_end_s if len(ends)), default=0.0)
    size = f"{len(found.lives)} servers," if subject.elastic is not None else f"{subject.replicas} x"
    tell(f"simulated {end_s:,.0f} s of {size} {subject.tier.name}: {steps:,} steps in {took_s:.1f} s")
    for words in _unfailed(subject, found):
        tell(f"  note: {words}")
    system = ServedBy(
        engine=NAME, evidence="simulated", model=subject.model.name, tier=subject.tier, engine_version=VLLM,
        engine_args=args_of(engine), model_facts=_facts(subject),
    )  # fmt: skip
    spec = _spec(subject, asked, len(found.lives))
    replicas = [
        Replica(
            index=k, base_url=url, counters_before=dict.fromkeys(last, 0.0),
            counters_after=None if life.failed else last,  # who has failed says nothing any more
            life=None if subject.elastic is None else Life(**asdict(life)),
        )
        for k, (url, last, life) in enumerate(zip(spec.base_urls, counters, found.lives, strict=True))
    ]  # fmt: skip
    manifest = new_manifest(
        run.path.name, spec, info, plan_sha256(run.plan), system, replicas=replicas, label=asked.serve.label
    )
    manifest.workers = [Worker(index=0, rows=len(rows))]
    manifest.status, manifest.start_unix_ns, manifest.end_ns = "complete", time.time_ns(), round(end_s * 1e9)
    write_manifest(run, manifest)
    return manifest


def _facts(subject: Subject) -> dict[str, str]:
    """Where the figures come from."""
    facts = {**subject.engine.facts, "clock": "virtual"}
    if subject.elastic is not None:
        facts["servers"] = _elastic_words(subject.elastic, subject.replicas)
    if subject.replicas > 1 or subject.elastic is not None:
        knows = f", as of up to {subject.stale_s:g} s before" if subject.stale_s else ""
        facts["router"] = ROUTERS[subject.router] + knows
    return facts


def _elastic_words(elastic: Elastic, replicas: int) -> str:
    scaling, failures, said = elastic.scaling, elastic.failures, f"{replicas}"
    if isinstance(scaling, Autoscaler):
        said = (
            f"{scaling.least} to {scaling.most}, as HPA scales on {scaling.target:g} requests {scaling.gauge} a server "
            f"every {scaling.every_s:g} s and down after {scaling.hold_s:g} s"
        )
    if failures.mean_s is not None:
        said += f"; each fails every {failures.mean_s:g} s on average"
    stated = ", ".join(f"{number} at {at_s:g} s" for at_s, number in failures.at_s)
    return f"{said}; {f'failed: {stated}; ' if stated else ''}start-up {elastic.start_s:g} s, an assumption"


def _unfailed(subject: Subject, found: Outcomes) -> Iterator[str]:
    """Stated failures that came to nothing."""
    for at_s, number in () if subject.elastic is None else subject.elastic.failures.at_s:
        life = found.lives[number] if number < len(found.lives) else None
        if life is None or not life.failed or life.ended_s != at_s:
            yield f"server {number} did not fail at {at_s:g} s: it was not there"


def _spec(subject: Subject, asked: ReplayOptions, replicas: int) -> RunSpec:
    load = asked.load
    return RunSpec(
        mode="closed" if load.closed else "open", concurrency=load.concurrency, model=subject.model.name,
        base_urls=[f"simulated://{k}" for k in range(replicas)], slo=dict(load.slo or {}),
        min_requests=load.min_requests, balance="least" if subject.router == "prefix" else subject.router,
        warmup_s=asked.plan.warmup_s if load.closed else None,
        duration_s=asked.plan.duration_s if load.closed else None,
    )  # fmt: skip


def _check(table: pa.Table, asked: ReplayOptions) -> None:
    """Refuse, in words, what is not simulated. Raises `UsageError`."""
    for column, what in (
        ("cancel_after_ns", "clients that hang up are"), ("timeout_ns", "time limits of single requests are"),
        ("continues", "live conversations are"), ("model", "LoRA adapters and other models of single requests are"),
    ):  # fmt: skip
        if table.column(column).null_count < len(table):
            raise UsageError(f"{what} not simulated: leave them out of the trace")
    if table.column("output_tokens").null_count:
        raise UsageError("requests without a number of output tokens are not simulated: a trace that says them all")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Requests:
    """The rows of a plan."""

    request_id: Ints
    scheduled_ns: Ints | None
    after: Ints | None
    """Index of the row that each waits for; -1: none."""
    think_ns: Ints
    input_tokens: Ints
    output_tokens: Ints
    session: Ints
    refused: dict[int, str]
    """By index."""
    served: Ints
    """The others, and not ``unsent``."""
    unsent: frozenset[int] = frozenset()
    over_s: float = 0.0
    """When those would have been due."""

    def cut(self, sent: int, over_s: float) -> _Requests:
        """Only the first ``sent`` of a closed loop go out."""
        return replace(self, served=self.served[:sent], unsent=frozenset(self.served[sent:].tolist()), over_s=over_s)

    def workload(self, engine: HardwareEngine, keys: Sequence[Sequence[Hashable]] | None) -> Workload:
        """Of what is served."""
        mine, inputs = self.served, self.input_tokens[self.served]
        due_s = np.zeros(len(mine)) if self.scheduled_ns is None else self.scheduled_ns[mine] / 1e9
        delays = engine.arrival_s or engine.arrival_per_token_s
        return Workload(
            arrival_s=due_s, input_tokens=inputs, output_tokens=self.output_tokens[mine], after=self._after(),
            think_s=None if self.after is None else self.think_ns[mine] / 1e9,
            delay_s=np.asarray(engine.arrival_s + engine.arrival_per_token_s * inputs) if delays else None,
            keys=None if keys is None else [keys[k] for k in mine], session=self.session[mine],
        )  # fmt: skip

    def _after(self) -> Ints | None:
        """Places among the served; whoever waits for one that is refused waits for what that waited for."""
        if self.after is None:
            return None
        after = self.after.copy()
        for k in sorted(self.refused):
            after[after == k] = after[k]
        place = np.full(len(after) + 1, -1, dtype=np.int64)
        place[self.served] = np.arange(len(self.served))
        found: Ints = place[after[self.served]]
        return found

    def rows(self, found: Outcomes) -> SimulatedRows:
        """What became of all."""
        n, mine = len(self.request_id), self.served

        def spread(values: npt.NDArray[np.generic], missing: int) -> Ints:
            whole = np.full(n, missing, dtype=np.int64)
            whole[mine] = values
            return whole

        due = spread(np.rint(found.due_s * 1e9).astype(np.int64), 0)
        for k in self.refused:
            due[k] = self.scheduled_ns[k] if self.scheduled_ns is not None else due[k - 1] if k else 0
        due[[*self.unsent]] = round(self.over_s * 1e9)
        cached = None if found.cached_tokens is None else spread(found.cached_tokens, -1)
        outputs, lost, resumed = self.output_tokens.copy(), {}, dict(found.resumed)
        for k, at_s in found.lost_s.items():
            outputs[mine[k]] = had = len(found.token_s(k, int(self.output_tokens[mine[k]])))
            words = "its server failed" if found.replica[k] >= 0 else "no server was there"
            lost[int(mine[k])] = Lost(at_ns=round(at_s * 1e9), cut=found.replica[k] >= 0, why=words)
            if k in resumed:
                resumed[k] = [one for one in resumed[k] if one[0] < had]
        return SimulatedRows(
            request_id=self.request_id, due_ns=due, replica=spread(found.replica, NOT_SERVED),
            first_step=spread(found.first_step, -1), input_tokens=self.input_tokens, output_tokens=outputs,
            cached_tokens=cached, step_end_ns=[np.rint(ends * 1e9).astype(np.int64) for ends in found.step_end_s],
            resumed={int(mine[k]): times for k, times in resumed.items() if times}, refused=self.refused,
            unsent=self.unsent, lost=lost,
        )  # fmt: skip


def _requests(table: pa.Table, subject: Subject) -> _Requests:
    def ints(name: str, missing: int = -1) -> Ints:
        return np.asarray(pc.fill_null(table.column(name), missing).to_numpy(), dtype=np.int64)

    ids, inputs, outputs = ints("request_id"), ints("input_tokens"), ints("output_tokens")
    after = None
    if table.column("after").null_count < len(table):
        place = np.full(len(ids) + 1, -1, dtype=np.int64)
        place[ids] = np.arange(len(ids))
        after = place[ints("after")]
    most = subject.engine.longest
    words = f"input and output are longer than the {most} tokens of this server"
    bad = (inputs + outputs > most) | (outputs < 1) | (inputs < 1)
    refused = {
        int(k): words if inputs[k] + outputs[k] > most else "no input, or no output" for k in np.flatnonzero(bad)
    }
    if len(refused) == len(ids):
        raise UsageError(f"every request is refused: {next(iter(refused.values()))}")
    closed = table.column("scheduled_ns").null_count == len(table)
    return _Requests(
        request_id=ids, scheduled_ns=None if closed else ints("scheduled_ns"), after=after,
        think_ns=ints("think_ns", 0), session=ints("slice"), input_tokens=inputs, output_tokens=outputs,
        refused=refused, served=np.flatnonzero(~bad),
    )  # fmt: skip


def _shared_keys(run: RunDir, info: PlanInfo, limits: Limits) -> list[list[int]] | None:
    """Of each prompt, the keys of its blocks up to the last that another has, too; None: none is shared."""
    if not limits.prefix_cache:
        return None
    prompts = read_plan_columns(run.plan, ["prompt_token_ids"]).column("prompt_token_ids")
    if prompts.null_count == info.requests:
        return None
    keys = [block_keys(ids.tolist(), limits.block_size) for ids in _ids(prompts)]
    seen = Counter(key for one in keys for key in one)
    shared = [[key for key in one if seen[key] > 1] for one in keys]  # chained: those are the first
    return shared if any(shared) else None


def _ids(prompts: pa.ChunkedArray) -> Sequence[npt.NDArray[np.int32]]:
    none = np.zeros(0, dtype=np.int32)
    return [none if one.values is None else one.values.to_numpy() for one in prompts]


def _server(
    rows: SimulatedRows, replica: int, samples: Sequence[Sample], limits: Limits
) -> tuple[ServerSamples, dict[str, float | None]]:
    """What a replica said of itself, and its counters at the end."""
    column = partial(np.fromiter, count=len(samples), dtype=np.float64)
    steps = column(one.steps for one in samples).astype(np.int64)
    counted = counters_at(rows, replica, steps)
    gauges = {
        "running": column(one.running for one in samples), "waiting": column(one.waiting for one in samples),
        "preemptions_total": column(one.preemptions for one in samples), **counted,
    }  # fmt: skip
    if limits.kv_blocks is not None:
        gauges["kv_cache_usage"] = 1 - column(one.kv_free or 0 for one in samples) / limits.kv_blocks
    t_ns = np.rint(column(one.at_s for one in samples) * 1e9).astype(np.int64)
    end = counters_at(rows, replica, np.array([len(rows.step_end_ns[replica])]))
    last: dict[str, float | None] = {
        f"vllm:{name}": float(end[name][0]) for name in ("prompt_tokens_total", "generation_tokens_total")
    }
    return ServerSamples(t_ns=t_ns, gauges=gauges), last
