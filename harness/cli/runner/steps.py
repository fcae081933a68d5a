"""The steps between a trace and a run directory: plan, load, record."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from harness import cache_dir
from harness.calibration import Calibration, demand, read_calibration, size_workers
from harness.cli.machines import hot_path
from harness.cli.output import say
from harness.cli.runner.live import shown
from harness.cli.runner.seen import note_sent, warn_of_sent
from harness.cli.runner.slow import slowed, stretched
from harness.cli.runner.targets import LocalTarget, Servers, Target, UrlTarget, VirtualTarget
from harness.console import LoadProgress, console
from harness.errors import HarnessError, PlanError, ResultsError, ServerError, UsageError
from harness.options import LoadOptions, ReplayOptions
from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, plan_sha256, read_plan_columns, read_plan_info
from harness.plan.prompts import Vocabulary
from harness.plan.spec import asked_plan, drawn_seed
from harness.record.answers import PROMPTS, Counted, count_answers, count_prompts, take_said
from harness.record.host import describe_host
from harness.record.manifest import RunDir, RunManifest, new_manifest, write_manifest
from harness.record.run_spec import BATCH_READS_FROM, Endpoint, RunSpec
from harness.record.samples import ServerMetrics
from harness.server import probe
from harness.server.access import Access, from_environment, parse_header_env, parse_headers
from harness.server.counters import count_after, count_before, pages_of
from harness.server.probe import ASK_AGAIN_S, SILENT_S, Silence
from harness.server.warmup import first_request, warm_up
from harness.terminal import hung_up
from harness.trace.io import Trace
from harness.trace.survey import Content

HEALTH_EVERY_S = 2.0


def make_plan(
    trace: Trace,
    out: Path,
    target: Target,
    options: ReplayOptions,
    tell: Callable[[str], None] = say,
    note: Callable[[str], None] | None = None,
) -> PlanInfo:
    """Build the plan file, with prompts as the target counts them; ``tell`` hears what is in it, ``note`` its notes
    (by default ``tell``, too).
    """
    if isinstance(target, VirtualTarget):
        from harness.cli.simulation import make_bare_plan

        return make_bare_plan(trace, out, options, tell, note)
    asked = options.plan

    def choose(content: Content) -> tuple[Vocabulary | None, bool]:
        chat = asked.endpoint == "chat" or (asked.endpoint == "auto" and content.messages > 0)
        if isinstance(target, LocalTarget):
            target.check_prompts(chat=chat, text=content.text > 0)
        if not content.lengths_only:
            return None, chat
        if asked.tokenizer:
            return Vocabulary.from_tokenizer(asked.tokenizer), chat
        if chat and isinstance(target, UrlTarget):
            raise UsageError("chat takes text, and text of an exact length needs a tokenizer: give --tokenizer FOLDER")
        return target.vocabulary(), chat

    started = time.monotonic()
    drawn = asked.seed is None
    seeded = replace(asked, seed=drawn_seed()) if drawn else asked
    info = build_plan(trace, out, asked_plan(seeded, closed=options.load.closed), choose=choose)
    rate = f", {info.planned_rate:.4g} req/s" if info.planned_rate else ""
    tell(f"plan: {info.requests} requests from {info.trace_format} trace{rate} ({time.monotonic() - started:.1f} s)")
    if drawn and info.tokenizer is not None:
        tell(f"  seed {info.seed}, drawn: prompts that no server has seen; --seed {info.seed} makes them again")
    note = note or tell
    for words in [*info.notes, *too_long(out, target.max_model_len)]:
        note(f"  note: {words}")
    return info


def too_long(plan: Path, max_model_len: int | None) -> list[str]:
    """A warning when the server will refuse some of these requests for their length."""
    import pyarrow.compute as pc

    if max_model_len is None:
        return []
    lengths = read_plan_columns(plan, ["input_tokens", "output_tokens"])
    total = pc.add(lengths.column("input_tokens"), pc.fill_null(lengths.column("output_tokens"), 1))
    over = pc.sum(pc.greater(total, max_model_len)).as_py()
    words = f"{over} requests are longer than the {max_model_len} tokens of this server: they will be rejected"
    return [words] if over else []


def copy_plan(source: Path, target: Path) -> None:
    """Hard link when the file system allows (a plan can be gigabytes), else copy."""
    import shutil

    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as e:
            raise PlanError(f"{target}: cannot copy {source} ({e.strerror})") from e


def choose_endpoint(wanted: Literal["auto"] | Endpoint, plan: Path) -> Endpoint:
    """The API for this plan: chat if any request has messages and nothing else was asked for."""
    if wanted != "auto":
        return wanted
    messages = read_plan_columns(plan, ["messages"]).column("messages")
    return "chat" if messages.null_count < len(messages) else "completions"


def choose_workers(plan: Path, asked: LoadOptions, calibration: Calibration | None, tell: Callable[[str], None]) -> int:
    """Load workers: as asked, else as many as the plan's busiest time needs at half of each one's ceiling; says why."""
    in_flight = asked.concurrency or asked.max_concurrency
    requests = read_plan_info(plan).requests
    sizing = size_workers(
        demand(plan, asked.concurrency), calibration, cores=describe_host().cores, asked=asked.workers,
        most=min(requests, in_flight or requests),
    )  # fmt: skip
    tell(sizing.words)
    if sizing.warning:
        tell(f"warning: {sizing.warning}")
    return sizing.workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When a point must end whatever is left of it, and why."""

    at_s: float
    """On the monotonic clock of this process."""
    why: str


def execute_point(
    run: RunDir,
    servers: Servers,
    options: ReplayOptions,
    *,
    stop: StopRequest | None = None,
    deadline: Deadline | None = None,
    lost: Callable[[Mapping[str, object]], str | None] | None = None,
    tell: Callable[[str], None] = say,
    warm: bool = False,
) -> RunManifest:
    """Send the plan of ``run`` to servers that are up, and leave them up; the manifest always tells how it ended.

    ``stop``: tells the caller afterwards whether the user asked for the end. ``deadline``: then all that is in flight
    is ended at once; every request still has its row and the manifest says "stopped". ``lost``: says, from the counts
    so far, why there is no point in going on; the manifest then says so too. ``tell``: hears how many load workers were
    chosen and why. ``warm``: servers that are still cold are warmed up first. Many points may share
    the servers: each manifest has server records of its own.
    """
    if servers.virtual is not None:
        return servers.virtual(run, options, tell)
    from harness.cluster.deploy.load_workers import LoadWorkers

    info = read_plan_info(run.plan)
    stop = stop or StopRequest()
    if servers.restarting() and (died := settle(servers)):
        raise ServerError("; ".join(f"replica {index} is gone: {how}" for index, how in died.items()))
    replicas = [
        replace(r, exit=None, counters_before=None, counters_after=None, several_servers=False)
        for r in servers.replicas
    ]
    asked, calibration = options.load, read_calibration(cache_dir())
    spec = RunSpec(
        mode="closed" if asked.closed else "open",
        concurrency=asked.concurrency or asked.max_concurrency,
        duration_s=options.plan.duration_s if asked.closed else None,
        timeout_s=asked.timeout_s, stall_s=asked.stall_s,
        endpoint=choose_endpoint(options.plan.endpoint, run.plan),
        model=servers.model, base_urls=servers.base_urls,
        workers=choose_workers(run.plan, asked, calibration, tell),
        slo=dict(asked.slo or {}), min_requests=asked.min_requests,
        extra_body={**({} if asked.no_stream else servers.extra_body), **asked.extra_body},
        headers=parse_headers(asked.headers), header_env=parse_header_env(asked.header_env),
        key_header=asked.key_header, length_field=asked.length_field, output_lengths=asked.lengths,
        stream=not asked.no_stream, capture=asked.capture, balance=asked.balance, retries=asked.retries,
        busy_retries=asked.busy_retries, ramp_s=asked.ramp_s,
        warmup_s=options.plan.warmup_s if asked.closed else None,
        tls_ca=str(asked.tls_ca.resolve()) if asked.tls_ca else None,
        batch_reads_from=calibration.batch_reads_from if calibration else BATCH_READS_FROM,
        counters=not asked.no_counters,
    )  # fmt: skip
    access = Access(
        api_key=servers.api_key, key_header=spec.key_header, headers=spec.headers,
        secret_headers=from_environment(spec.header_env), patience=servers.patience,
    )  # fmt: skip
    manifest = new_manifest(
        run.path.name, spec, info, plan_sha256(run.plan), servers, replicas=replicas, label=options.serve.label,
        restarts_before=servers.restarts,
    )  # fmt: skip
    manifest.load_shares_server_host, manifest.load_shares_server_cores = servers.shares_host, servers.shared_cores
    manifest.versions["hot path"] = hot_path()
    write_manifest(run, manifest)
    told = stretched(spec, servers.slow)
    warn_of_sent(manifest, tell)
    try:
        if servers.patience is not None and not servers.asked:  # do servers that are not ours answer?
            first_request(spec, access, run.plan, tell)
            servers.asked = True
        if warm and not servers.warm:
            warm_up(spec, access, run.plan, tell)
            servers.warm = True
        with ExitStack() as stack:
            stack.enter_context(slowed(run, manifest, servers.slow))
            load = stack.enter_context(LoadWorkers(told, run, api_key=servers.api_key, launch=servers.launch))
            if spec.counters:
                count_before(replicas, access, tell)
            stack.enter_context(stop)  # only now: what comes before is simply broken off
            manifest.status, manifest.start_unix_ns = "running", load.start()
            write_manifest(run, manifest)
            note_sent(manifest)
            sampling = sample_servers(servers, run, manifest.start_unix_ns, access, counters=spec.counters)
            span_s = None if info.span_s is None else info.span_s * servers.slow
            attain, seen = options.report.attain, replace(info, span_s=span_s)
            with (
                sampling as sampled,
                shown(asked.live, run, told, seen, attain, sampled, manifest.start_unix_ns) as live,
            ):
                progress = LoadProgress(
                    console(), total=info.requests, span_s=span_s, slo=told.slo, attain=attain,
                    also=live.update if live else None,
                )  # fmt: skip
                silence = Silence(lambda k: probe.answers(spec.base_urls[k], access, ASK_AGAIN_S))
                cut, manifest.lost = watch(load, servers, stop, progress, deadline, lost, silence, run.manifest.exists)
            manifest.workers, manifest.end_ns, gone = load.workers, load.end_ns, load.lost
            if not run.manifest.exists():
                raise ResultsError(f"{run.path}: was deleted or moved while the run went on; its rows are lost")
        manifest.answers = counted_sample(run, spec, options.plan.tokenizer or servers.tokenizer)
        died = servers.check()
        for r in replicas:
            r.exit = died.get(r.index)
        count_after(replicas, died, access)
        manifest.restarts = servers.restarts[len(manifest.restarts_before) :]
        manifest.status, manifest.reason = "complete", None
        if cut or stop.asked:
            manifest.status, manifest.reason = "stopped", cut or "stopped by the user"
        elif gone:
            manifest.status, manifest.reason = "lost", gone
    except (HarnessError, KeyboardInterrupt) as e:
        manifest.status, manifest.reason = "failed", (str(e) or "stopped by the user").splitlines()[0]
        raise
    finally:
        if run.path.exists():
            write_manifest(run, manifest)
    return manifest


def counted_sample(run: RunDir, spec: RunSpec, tokenizer: Path | None) -> list[Counted]:
    """The answers that the load workers kept, counted; their texts are deleted. Without tokenizer not in tokens."""
    said = take_said(run.answers(worker) for worker in range(spec.workers))
    if not said:
        return []
    counts = None
    try:  # the load is over: a run is not lost for it
        if tokenizer is not None:
            from harness.plan.tokenizers import load_tokenizer

            counts = load_tokenizer(tokenizer)
        every = -(-len(said) // PROMPTS)
        return count_answers(said, counts, count_prompts(run.plan, (one.request_id for one in said[::every]), counts))
    except PlanError as e:
        say(f"note: answers and prompts are not counted in tokens: {e}")
        return count_answers(said)


def settle(servers: Servers) -> dict[int, str]:
    """Wait until no dead server is being started again; those that are gone for good, index -> how."""
    while True:  # a restart has a deadline of its own: then it is among the dead
        died = servers.check()
        if died or not servers.restarting():
            return died
        time.sleep(0.5)


@contextmanager
def sample_servers(
    servers: Servers, run: RunDir, start_unix_ns: int, access: Access, *, counters: bool = True
) -> Iterator[list[ServerMetrics]]:
    """Every server's own metrics, each second, beside the results; the hosts' alone without ``counters``."""
    with ExitStack() as stack:
        sampled: list[ServerMetrics] = []
        for r in servers.replicas if counters else []:
            pages = [(url, access.hurried().at(url, r.base_url)) for url in pages_of(r)]
            sampled.append(stack.enter_context(ServerMetrics(pages, run.server_metrics(r.index), start_unix_ns)))
        stack.enter_context(servers.sample_hosts(run, start_unix_ns))
        yield sampled
    for metrics in sampled:
        if metrics.trouble:
            say(f"server metrics: {metrics.trouble}")


def watch(
    load: Any, servers: Servers, stop: StopRequest, progress: LoadProgress, deadline: Deadline | None = None,
    lost: Callable[[Mapping[str, object]], str | None] | None = None, silence: Silence | None = None,
    there: Callable[[], bool] = lambda: True,
) -> tuple[str | None, bool]:  # fmt: skip
    """Follow the load to its end: show progress, notice dead servers, pass on Ctrl-C.

    (null, or why it was cut; whether that was because it is ``lost``)
    """
    looked, told, dead = time.monotonic(), 0, set[int]()
    cut: list[str] = []

    def end(why: str, words: str | None = None, silent: int | None = None) -> None:
        """At once; the first reason is the run's."""
        if not cut:
            cut.append(why)
            say(words or f"{why}: stopping at once")
            load.stop(at_once=True, silent=silent)

    given_up = False
    with progress:
        while not load.done:
            counts = load.poll(0.5)
            progress.update(counts)
            if lost and not cut and (why := lost(counts)):
                given_up = True
                cut.append(why)
                load.stop(at_once=True)
            quiet = counts.get("quiet_s")
            waited = quiet if isinstance(quiet, dict) else {}
            if silence and not cut and not servers.restarting() and (k := silence.look(waited)) is not None:
                words = f"no byte on any request for {SILENT_S:g} s, and no answer to a question"
                end(f"replica {k} is silent: {words}", silent=k)
            if deadline and time.monotonic() >= deadline.at_s:
                end(deadline.why)
            if stop.asked > told:
                told = stop.asked
                say("stopping: no new requests; waiting for those in flight (Ctrl-C again: at once)" if told == 1
                    else "stopping at once")  # fmt: skip
                load.stop(at_once=told > 1)
            if time.monotonic() - looked > HEALTH_EVERY_S:
                looked = time.monotonic()
                if not there():
                    end("the run directory is gone")
                for index, how in servers.check().items():
                    if index not in dead:
                        dead.add(index)
                        say(f"replica {index} is gone: {how}")
                        end(f"replica {index} is gone: {how}", "stopping at once: half a deployment has no price")
    return (cut[0] if cut else None), given_up


class StopRequest:
    """Counts SIGINT, SIGTERM, SIGHUP while load runs, so that the run ends in order. Before and after, they raise."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            hung_up()
        self.asked += 1
