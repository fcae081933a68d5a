"""What each verb does: trace -> plan -> servers -> load -> rows -> report, one function a step.

Only this module and `harness.cli` see all four packages, and only inside functions, so that a replay against an
existing server loads neither Ray nor vLLM.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from harness import doctor as examination
from harness import probe
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, ServerError, UsageError
from harness.plan import PlanInfo, build_plan, plan_sha256, read_plan_columns, read_plan_info
from harness.progress import LoadProgress, console
from harness.prompts import Vocabulary
from harness.run import (
    PLAN,
    Replica,
    RunDir,
    RunManifest,
    RunSpec,
    Tier,
    create_run_dir,
    describe_host,
    git_commit,
    installed_versions,
    now_utc,
    write_manifest,
)
from harness.trace import Trace, open_trace

if TYPE_CHECKING:
    from cluster.load import Launch
    from cluster.models import Model

API_KEY = "HARNESS_API_KEY"
HEALTH_EVERY_S = 2.0


def say(words: str) -> None:
    """One line for the person, on stderr."""
    console().print(words, markup=False)


@dataclass(slots=True, kw_only=True)
class Servers:
    """Where the load goes, whoever started it."""

    engine: str
    model: str
    """The name to send."""
    replicas: list[Replica]
    tier: Tier | None
    api_key: str | None
    engine_version: str | None = None
    engine_args: list[str] = field(default_factory=list)
    model_facts: dict[str, str] = field(default_factory=dict)
    tokenizer: Path | None = None
    shares_host: bool | None = None
    launch: Launch | None = None
    """How load workers are started; None: as children of this process."""
    check: Callable[[], dict[int, str]] = dict
    """Replicas that died, index -> how."""

    @property
    def base_urls(self) -> list[str]:
        """One per replica."""
        return [r.base_url for r in self.replicas]


# --- verbs ---------------------------------------------------------------------------------------------------------


def replay(trace: Path, out: Path, **options: Any) -> int:
    """Plan, serve, run, report."""
    closed = check_load_options(options)
    source = open_trace(trace, format=options["trace_format"], skip_bad=options["skip_bad"])
    target = choose_target(options)
    run = create_run_dir(out, f"{trace.name.split('.')[0]}-{target.label}")
    say(f"run directory: {run.path}")
    make_plan(source, run.plan, target, closed=closed, options=options)
    return run_and_report(run, target, options)


def plan(trace: Path, output: Path, format_: str, **options: Any) -> int:
    """Trace -> plan file."""
    source = open_trace(trace, format=options["trace_format"], skip_bad=options["skip_bad"])
    options.setdefault("tier", None)
    closed = check_load_options(options)
    info = make_plan(source, output, choose_target(options), closed=closed, options=options)
    if format_ == "json":
        print_json(info)
    else:
        print(output)
    return EXIT_VALID


def run(plan: Path, out: Path, **options: Any) -> int:
    """Plan file -> run directory and report."""
    info = read_plan_info(plan)
    if info.arrivals == "closed" and not options["concurrency"]:
        raise UsageError(f"{plan} is planned for a closed loop, without times: say --concurrency N")
    check_load_options({**options, "speed": None, "rate": None})
    target = choose_target(options)
    run_dir = create_run_dir(out, f"{plan.stem}-{target.label}")
    say(f"run directory: {run_dir.path}")
    copy_plan(plan, run_dir.path / PLAN)
    return run_and_report(run_dir, target, options)


def serve(out: Path, **options: Any) -> int:
    """Start servers, keep them until asked to stop."""
    target = choose_target({**options, "base_urls": ()})
    run_dir = create_run_dir(out, f"serve-{target.label}")
    stop = StopRequest()
    with target.open(run_dir) as servers, stop:
        if os.environ.get(API_KEY):
            say(f"API key: as in {API_KEY}")
        elif servers.api_key:
            key_file = run_dir.path / "api-key"
            key_file.touch(mode=0o600)
            key_file.write_text(servers.api_key)
            say(f"API key: export {API_KEY}=$(cat {key_file})")
        say(f"model {servers.model}; logs in {run_dir.path}; Ctrl-C ends the servers")
        for url in servers.base_urls:
            print(url, flush=True)
        while not stop.asked:
            time.sleep(0.5)
            for index, how in servers.check().items():
                log = Path(servers.replicas[index].log or "")
                raise ServerError(f"replica {index} is gone: {how}; see {log}")
    say("servers ended")
    return EXIT_VALID


def report(run: Path, format_: str, slo: dict[str, float] | None, attain: float, ratio: float) -> int:
    """Run directory -> report on stdout."""
    from analysis.load import read_run
    from analysis.report import render_json, render_markdown, render_text
    from analysis.summary import exit_code, summarise

    summary = summarise(read_run(run), slo=slo, ratio=ratio, attain=attain)
    if format_ == "json":
        print(render_json(summary))
    elif format_ == "md":
        print(render_markdown(summary))
    else:
        from rich.console import Console

        render_text(summary, Console(highlight=False))
    return exit_code(summary)


def doctor(format_: str) -> int:
    """Findings about this machine."""
    from cluster.weights import cache_dir

    findings = examination.examine(cache_dir())
    can = examination.abilities(findings)
    if format_ == "json":
        print_json({"findings": findings, "can": can})
    else:
        marks = {"ok": "ok     ", "limit": "limit  ", "missing": "missing"}
        for f in findings:
            print(f"{marks[f.level]}  {f.name}: {f.found}" + (f"\n         -> {f.advice}" if f.advice else ""))
        print("\nThis machine can:")
        for what, possible in can.items():
            print(f"  {'yes' if possible else 'no '}  {what}")
    return EXIT_VALID if any(can.values()) else EXIT_FAILURE


def tiers(format_: str) -> int:
    """The tiers with their prices."""
    from cluster.tiers import list_tiers

    known = list_tiers()
    if format_ == "json":
        print_json(known)
        return EXIT_VALID
    columns = ("tier", "accelerators", "vCPU", "GiB", "USD/h", "bought", "region", "date")
    print_table(
        columns,
        [
            (
                t.name,
                f"{t.accelerator_count} x {t.accelerator}" if t.accelerator else "-",
                str(t.vcpu),
                f"{t.memory_gib:g}",
                f"{t.usd_per_hour:g}",
                t.purchase,
                t.region,
                t.date,
            )
            for t in known
        ],
    )
    print("Price sources:")
    for t in known:
        print(f"  {t.name}: {t.source}")
    return EXIT_VALID


def models(fetch: str | None, format_: str) -> int:
    """The models, or the weights of one."""
    from cluster.models import get_model, list_models
    from cluster.weights import ensure_weights

    if fetch:
        print(ensure_weights(get_model(fetch), say=say))
        return EXIT_VALID
    known = list_models()
    if format_ == "json":
        print_json(known)
        return EXIT_VALID
    print_table(
        ("model", "parameters", "dtype", "longest", "weights", "licence"),
        [
            (
                m.name,
                f"{m.parameters / 1e6:,.0f} M" if m.parameters else "-",
                m.dtype,
                str(m.max_model_len),
                m.source + (" (gated)" if m.gated else ""),
                m.licence,
            )
            for m in known
        ],
    )
    for m in known:
        print(f"  {m.name}: {m.note}")
    return EXIT_VALID


# --- targets: a server that is there, or servers to start ---------------------------------------------------------


class UrlTarget:
    """Servers that are there already. Nothing is started but load workers."""

    def __init__(self, base_urls: list[str], model: str | None, tier: Tier | None) -> None:
        self._key = os.environ.get(API_KEY) or None
        self._urls = [probe.normalise_base_url(url) for url in base_urls]
        found = probe.find_model(self._urls[0], self._key, model)
        self._model, self._longest = found.id, found.max_model_len
        for url in self._urls[1:]:
            probe.find_model(url, self._key, self._model)
        self._tier = tier
        self.label = self._model.rsplit("/", 1)[-1]

    @property
    def max_model_len(self) -> int | None:
        """Longest input plus output, tokens; null when the server does not say."""
        return self._longest

    def vocabulary(self) -> Vocabulary:
        """Ordinary token ids, as this server counts them."""
        ids = probe.ordinary_token_ids(self._urls[0], self._key, self._model)
        return Vocabulary.from_ids(ids, name=f"{self._model} at the server")

    @contextmanager
    def open(self, run: RunDir) -> Iterator[Servers]:
        """The servers, as they are."""
        replicas = [Replica(index=i, base_url=url) for i, url in enumerate(self._urls)]
        version = probe.engine_version(self._urls[0], self._key)
        yield Servers(
            engine="url",
            model=self._model,
            replicas=replicas,
            tier=self._tier,
            api_key=self._key,
            engine_version=version,
        )


class LocalTarget:
    """Servers that a Ray cluster starts for this run: this machine's own, or the one RAY_ADDRESS names."""

    def __init__(self, model: Model, tier: Tier, replicas: int) -> None:
        self._model, self._tier, self._replicas = model, tier, replicas
        self._weights: Path | None = None
        self.label = model.name.rsplit("/", 1)[-1]

    def weights(self) -> Path:
        """The weights' folder, fetched on first use."""
        from cluster.weights import ensure_weights

        if self._weights is None:
            self._weights = ensure_weights(self._model, say=say)
        return self._weights

    @property
    def max_model_len(self) -> int | None:
        """Longest input plus output it is served with, tokens."""
        return self._model.max_model_len

    def vocabulary(self) -> Vocabulary:
        """The model's own tokenizer."""
        return Vocabulary.from_tokenizer(self.weights())

    @contextmanager
    def open(self, run: RunDir) -> Iterator[Servers]:
        """Start the servers; end them whatever happens inside."""
        from cluster.deployment import Deployment

        key = os.environ.get(API_KEY) or secrets.token_urlsafe(24)
        with Deployment(
            model=self._model, weights=self.weights(), tier=self._tier, replicas=self._replicas, run_dir=run.path,
            api_key=key, say=say,
        ) as d:  # fmt: skip
            yield Servers(
                engine=d.engine, model=self._model.name, replicas=d.replicas, tier=self._tier, api_key=key,
                engine_version=d.engine_version, engine_args=d.engine_args, model_facts=d.model_facts,
                shares_host=d.shares_host, launch=d.launch, check=d.check,
            )  # fmt: skip


Target = UrlTarget | LocalTarget


def choose_target(options: dict[str, Any]) -> Target:
    """Existing servers when --base-url is given, else servers to start. Raises `UsageError` on unknown names."""
    from cluster.tiers import DEFAULT_TIER, get_tier

    if options["base_urls"]:
        tier = get_tier(options["tier"]) if options["tier"] else None
        return UrlTarget(list(options["base_urls"]), options["model"], tier)
    from cluster.models import DEFAULT_MODEL, get_model

    return LocalTarget(
        get_model(options["model"] or DEFAULT_MODEL),
        get_tier(options["tier"] or DEFAULT_TIER),
        options.get("replicas", 1),
    )


# --- steps ---------------------------------------------------------------------------------------------------------


def check_load_options(options: dict[str, Any]) -> bool:
    """Whether the loop is closed. Raises `UsageError` on options that exclude each other."""
    closed = bool(options.get("concurrency"))
    given = [name for name in ("speed", "rate", "max_concurrency") if options.get(name)]
    if closed and given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"--concurrency is a closed loop, where a free slot decides when to send: drop it or {flag}")
    if options.get("speed") and options.get("rate"):
        raise UsageError("--speed and --rate both rescale the trace's clock: give one")
    return closed


def make_plan(trace: Trace, out: Path, target: Target, *, closed: bool, options: dict[str, Any]) -> PlanInfo:
    """Build the plan file, with prompts as the target counts them."""
    has_messages = has_lengths_only = False
    for record in islice(trace, options["limit"]):
        has_messages |= record.messages is not None
        has_lengths_only |= record.messages is None and record.text is None
    chat = options["endpoint"] == "chat" or (options["endpoint"] == "auto" and has_messages)
    vocabulary: Vocabulary | None = None
    if has_lengths_only:
        if options["tokenizer"]:
            vocabulary = Vocabulary.from_tokenizer(options["tokenizer"])
        elif chat and isinstance(target, UrlTarget):
            raise UsageError("chat takes text, and text of an exact length needs the tokenizer: give --tokenizer FILE")
        else:
            vocabulary = target.vocabulary()
    started = time.monotonic()
    info = build_plan(
        trace, out, closed=closed, speed=options["speed"], rate=options["rate"], limit=options["limit"],
        duration_s=None if closed else options["duration_s"], seed=options["seed"], vocabulary=vocabulary, as_text=chat,
    )  # fmt: skip
    rate = f", {info.planned_rate:.2f} req/s" if info.planned_rate else ""
    say(f"plan: {info.requests} requests from {info.trace_format} trace{rate} ({time.monotonic() - started:.1f} s)")
    for note in [*info.notes, *too_long(out, target.max_model_len)]:
        say(f"  note: {note}")
    return info


def too_long(plan: Path, max_model_len: int | None) -> list[str]:
    """A warning when the server will refuse some of these requests for their length."""
    import pyarrow.compute as pc

    if max_model_len is None:
        return []
    lengths = read_plan_columns(plan, ["input_tokens", "output_tokens"])
    total = pc.add(lengths.column("input_tokens"), pc.fill_null(lengths.column("output_tokens"), 1))
    over = pc.sum(pc.greater(total, max_model_len)).as_py()
    return (
        [f"{over} requests are longer than the {max_model_len} tokens of this server: they will be rejected"]
        if over
        else []
    )


def copy_plan(source: Path, target: Path) -> None:
    """Hard link when the file system allows (a plan can be gigabytes), else copy."""
    import shutil

    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def choose_endpoint(wanted: str, plan: Path) -> str:
    """The API for this plan: chat if any request has messages and nothing else was asked for."""
    if wanted != "auto":
        return wanted
    messages = read_plan_columns(plan, ["messages"]).column("messages")
    return "chat" if messages.null_count < len(messages) else "completions"


def choose_workers(asked: int | None, requests: int, concurrency: int | None) -> int:
    """Load workers: as asked, else one per core as far as there is work for them."""
    if asked:
        return min(asked, requests, concurrency or requests)
    cores = describe_host().cores
    return max(1, min(cores, requests // 500 + 1, concurrency or requests))


def run_and_report(run: RunDir, target: Target, options: dict[str, Any]) -> int:
    """Send the plan of ``run`` to ``target``, write the record, print the report."""
    execute(run, target, options)
    return report(run.path, options["format_"], options["slo"], options["attain"], options["ratio"])


def execute(run: RunDir, target: Target, options: dict[str, Any]) -> None:
    """Send the plan of ``run`` to ``target``; the manifest always tells how it ended."""
    from cluster.load import LoadWorkers

    info = read_plan_info(run.plan)
    stop = StopRequest()
    with target.open(run) as servers:
        spec = RunSpec(
            mode="closed" if options["concurrency"] else "open",
            concurrency=options["concurrency"] or options["max_concurrency"],
            duration_s=options.get("duration_s") if options["concurrency"] else None,
            timeout_s=options["timeout_s"], stall_s=options["stall_s"],
            endpoint=choose_endpoint(options["endpoint"], run.plan),
            model=servers.model, base_urls=servers.base_urls,
            workers=choose_workers(options["workers"], info.requests, options["concurrency"]),
            slo=options["slo"] or {}, extra_body=options["extra_body"],
        )  # fmt: skip
        manifest = describe(run, spec, info, servers)
        write_manifest(run, manifest)
        try:
            with LoadWorkers(spec, run, api_key=servers.api_key, launch=servers.launch) as load, stop:
                count_before(servers)
                manifest.status, manifest.start_unix_ns = "running", load.start()
                write_manifest(run, manifest)
                watch(load, servers, stop, LoadProgress(console(), total=info.requests, span_s=info.span_s))
                manifest.workers, manifest.end_ns = load.workers, load.end_ns
            count_after(servers)
            manifest.status, manifest.reason = ("stopped", "stopped by the user") if stop.asked else ("complete", None)
        except (HarnessError, KeyboardInterrupt) as e:
            manifest.status, manifest.reason = "failed", (str(e) or "stopped by the user").splitlines()[0]
            raise
        finally:
            write_manifest(run, manifest)


def describe(run: RunDir, spec: RunSpec, info: PlanInfo, servers: Servers) -> RunManifest:
    """The manifest before the first request."""
    return RunManifest(
        run_id=run.path.name, created=now_utc(), spec=spec, plan=info, plan_sha256=plan_sha256(run.plan),
        tier=servers.tier, engine=servers.engine, engine_version=servers.engine_version,
        engine_args=servers.engine_args,
        model=servers.model, model_facts=servers.model_facts, replicas=servers.replicas, host=describe_host(),
        load_shares_server_host=servers.shares_host, versions=installed_versions(), git=git_commit(),
    )  # fmt: skip


def count_before(servers: Servers) -> None:
    """Read every server's own counters just before the load."""
    for r in servers.replicas:
        r.counters_before = probe.counters(r.base_url, servers.api_key)


def count_after(servers: Servers) -> None:
    """Read them again just after, where the server is still there; say which replicas died."""
    died = servers.check()
    for r in servers.replicas:
        r.exit = died.get(r.index)
        if r.counters_before is not None and r.exit is None:
            r.counters_after = settled_counters(r.base_url, servers.api_key)


def settled_counters(base_url: str, api_key: str | None) -> dict[str, float] | None:
    """The counters once they stand still: vLLM books a request a moment after its client has the last byte."""
    deadline = time.monotonic() + 5.0
    last = probe.counters(base_url, api_key)
    while time.monotonic() < deadline:
        time.sleep(0.3)
        now = probe.counters(base_url, api_key)
        if now == last:
            break
        last = now
    return last


def watch(load: Any, servers: Servers, stop: StopRequest, progress: LoadProgress) -> None:
    """Follow the load to its end: show progress, notice dead servers, pass on Ctrl-C."""
    looked, told, dead = time.monotonic(), 0, set[int]()
    with progress:
        while not load.done:
            progress.update(load.poll(0.5))
            if stop.asked > told:
                told = stop.asked
                say("stopping: no new requests; waiting for those in flight (Ctrl-C again: at once)" if told == 1
                    else "stopping at once")  # fmt: skip
                load.stop(at_once=told > 1)
            if time.monotonic() - looked > HEALTH_EVERY_S:
                looked = time.monotonic()
                for index, how in servers.check().items():
                    if index not in dead:
                        dead.add(index)
                        say(f"replica {index} is gone: {how}; its requests fail from here on")


class StopRequest:
    """Counts SIGINT and SIGTERM while load runs, so that the run ends in order. Before and after, they raise."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1


# --- small things --------------------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Into a pipe there is no width to fit: never cut what a script or a pager will read.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)
