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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from harness import doctor as examination
from harness import probe
from harness.build import build_plan
from harness.errors import (
    EXIT_FAILURE,
    EXIT_INVALID,
    EXIT_SLO_MISSED,
    EXIT_VALID,
    HarnessError,
    ServerError,
    UsageError,
)
from harness.headers import parse_headers
from harness.plan import PlanInfo, PlanSpec, plan_sha256, read_plan_columns, read_plan_info
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
from harness.server_metrics import ServerMetrics
from harness.trace import Trace, open_trace

if TYPE_CHECKING:
    from cluster.load import Launch
    from cluster.models import Model

API_KEY = "HARNESS_API_KEY"
HEALTH_EVERY_S = 2.0
DUMMY_BODY: dict[str, object] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
"""Dummy weights come without a tokenizer, so chunks have no text: the server counts their tokens for us."""


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
    extra_body: dict[str, object] = field(default_factory=dict)
    """Fields of every streamed request that this server needs."""
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
    if closed and isinstance(options["warmup"], float):
        raise UsageError("a closed loop has no planned times: say --warmup N requests, or the time to harness run")
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
    if options["warmup"] and not (isinstance(options["warmup"], float) and options["concurrency"]):
        raise UsageError("--warmup is part of the plan (harness plan); here it is a time in a closed loop, like 30s")
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


def report(
    runs: Sequence[Path], format_: str, slo: dict[str, float] | None, attain: float, ratio: float,
    html: Path | None = None,
) -> int:
    """Run directory -> report on stdout; one or several -> a page."""
    from analysis.load import read_run
    from analysis.report import render_json, render_markdown, render_text
    from analysis.summary import exit_code, summarise

    if html is not None:
        return report_page(runs, html, slo=slo, attain=attain, ratio=ratio)
    if len(runs) > 1:
        raise UsageError(f"{len(runs)} runs are compared in a page: add --html report.html")
    summary = summarise(read_run(runs[0]), slo=slo, ratio=ratio, attain=attain)
    if format_ == "json":
        print(render_json(summary))
    elif format_ == "md":
        print(render_markdown(summary))
    else:
        from rich.console import Console

        render_text(summary, Console(highlight=False))
    return exit_code(summary)


def report_page(runs: Sequence[Path], html: Path, **options: Any) -> int:
    """Run directories -> one page; its path on stdout. One run is in memory at a time."""
    from analysis.compared import label_runs
    from analysis.load import read_run
    from analysis.page import write_page
    from analysis.summary import exit_code, summarise
    from analysis.view import view_run

    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("a run is named twice")
    views = []
    for path, label in zip(runs, label_runs(runs), strict=True):
        run = read_run(path)
        views.append(view_run(run, summarise(run, **options), label))
        del run
    size = write_page(html, views)
    say(f"{html}: {size / 1e6:.2f} MB, stands alone; open it in a browser")
    print(html)
    codes = {exit_code(view.summary) for view in views}
    return next((code for code in (EXIT_INVALID, EXIT_SLO_MISSED) if code in codes), EXIT_VALID)


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


def crosscheck(plan: Path, out: Path, repeats: int, format_: str, **options: Any) -> int:
    """The same plan with our client and with vLLM's, in turn, and both sides' figures."""
    from analysis.crosscheck import compare, our_figures, their_figures
    from analysis.load import read_run
    from analysis.summary import summarise
    from cluster.vllm_bench import check_can_run, run_vllm_bench

    check_can_run()
    info = read_plan_info(plan)
    if info.arrivals == "closed" and not options["concurrency"]:
        raise UsageError(f"{plan} is planned for a closed loop, without times: say --concurrency N")
    if choose_endpoint(options["endpoint"], plan) == "chat":
        raise UsageError(f"{plan} holds chat messages: the cross-check needs a plan for the completions endpoint")
    options.setdefault("warmup", None)
    check_load_options({**options, "speed": None, "rate": None})
    target = choose_target(options)
    if not isinstance(target, UrlTarget) or len(target.base_urls) != 1:
        raise UsageError("the cross-check sends to one server that is there: give its --base-url (see harness serve)")
    folder = create_run_dir(out, f"crosscheck-{target.label}").path
    say(f"folder: {folder}")
    ours, theirs, completed, notes = [], [], [], []

    def run_ours(name: str) -> Any:
        run = RunDir(folder / name)
        run.path.mkdir()
        copy_plan(plan, run.plan)
        execute(run, target, options)
        return summarise(read_run(run.path))

    say("first our client once, uncounted: it leaves the server's prefix cache as every later run finds it")
    run_ours("first")
    for k in range(repeats):
        found: dict[str, Any] = {}
        for side in ("harness", "vllm") if k % 2 == 0 else ("vllm", "harness"):  # neither always comes after the other
            say(f"repeat {k + 1} of {repeats}: {side}")
            if side == "harness":
                found[side] = run_ours(f"harness-{k}")
            else:
                found[side] = run_vllm_bench(
                    plan, folder / f"vllm-{k}.json", base_url=target.base_urls[0], model=target.model,
                    concurrency=options["concurrency"], extra_body=options["extra_body"], api_key=target.api_key,
                )  # fmt: skip
        summary, result = found["harness"], found["vllm"]
        ours.append(our_figures(summary))
        theirs.append(their_figures(result))
        completed.append((summary.requests.succeeded, int(result.get("completed", 0))))
        if summary.verdict != "VALID":
            notes.append(f"our run {k + 1} is INVALID: {'; '.join(summary.reasons)}")
    check = compare(ours, theirs, completed, notes)
    (folder / "crosscheck.json").write_bytes(msgspec.json.format(msgspec.json.encode(check), indent=2) + b"\n")
    if format_ == "json":
        print_json(check)
    else:
        print_table(
            ("figure", "unit", "harness", "vllm bench", "difference", "noise (95 %)", ""),
            [
                (f.name, f.unit, f"{f.ours:.3f}", f"{f.theirs:.3f}", f"{f.difference:+.3f}", f"{f.noise:.3f}",
                 f.verdict.upper() if f.verdict == "differ" else f.verdict)
                for f in check.figures
            ],
        )  # fmt: skip
        for why in dict.fromkeys(f.why for f in check.figures if f.why):
            names = ", ".join(f.name for f in check.figures if f.why == why)
            print(f"{names}: {why}")
        for note in check.notes:
            print(f"note: {note}")
        print(folder / "crosscheck.json")
    return EXIT_VALID


def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, and keep it for the planner."""
    from cluster.calibrate import calibrate as measure
    from cluster.weights import cache_dir
    from harness.calibration import write_calibration

    found = measure(say)
    path = write_calibration(cache_dir(), found)
    if format_ == "json":
        print_json(found)
        return EXIT_VALID
    least = {True: "at least ", False: ""}
    print_table(
        ("one load worker here", "figure", "how"),
        [
            ("events/s", f"{least[found.events_at_least]}{found.events_per_s:,.0f}",
             f"streams of 100 tokens/s, {found.events_cpu_share:.0%} of a core"),
            ("requests/s", f"{least[found.requests_at_least]}{found.requests_per_s:,.0f}", "closed loop, 4 tokens"),
            ("lag p50 / p99", f"{found.lag_p50_s * 1e3:.2f} / {found.lag_p99_s * 1e3:.2f} ms", "Poisson, 500 req/s"),
            ("TTFT error p50 / p99", f"{found.ttft_error_p50_s * 1e3:+.2f} / {found.ttft_error_p99_s * 1e3:+.2f} ms",
             f"against the server's truth, {found.timing_events_per_s:,.0f} events/s"),
            ("ITL error p50 / p99", f"{found.itl_error_p50_s * 1e3:+.2f} / {found.itl_error_p99_s * 1e3:+.2f} ms",
             "the same"),
            ("CPU per event", f"{found.cpu_us_per_event:.1f} us", "the same"),
        ],
    )  # fmt: skip
    for note in found.notes:
        print(f"note: {note}")
    if found.events_at_least or found.requests_at_least:
        print('"at least": the known-truth server, not the worker, was the limit, or no limit was met')
    print(f"{path} ({found.took_s:.0f} s)")
    return EXIT_VALID


def tiers(format_: str) -> int:
    """The tiers with their prices."""
    from cluster.tiers import full_note, list_tiers, price_age_days, price_note

    known = list_tiers()
    if format_ == "json":
        print_json(
            [
                {**msgspec.to_builtins(t), "note": full_note(t), "price_age_days": price_age_days(t),
                 "old": price_note(t) is not None}
                for t in known
            ]
        )  # fmt: skip
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
                t.date + (" old" if price_note(t) else ""),
            )
            for t in known
        ],
    )
    print("Price sources:")
    for t in known:
        note = full_note(t)
        print(f"  {t.name}: {t.source}" + (f"\n      {note}" if note else ""))
    return EXIT_VALID


def refresh_tiers(
    names: tuple[str, ...], region: str | None, spot: bool, spot_days: float, out: Path | None, dry_run: bool,
    format_: str,
) -> int:  # fmt: skip
    """Today's AWS prices into the user's own tiers file."""
    from cluster.prices import refresh
    from cluster.tiers import own_file, write_tiers

    file = out or own_file()
    changes = refresh(names, region=region, spot=spot, spot_days=spot_days, files=[own_file(), file])
    new = [change.after for change in changes if change.after is not None]
    if new and not dry_run:
        write_tiers(file, new)
    if format_ == "json":
        print_json([msgspec.to_builtins(c) | {"change": c.ratio} for c in changes])
    else:
        rows: list[tuple[str, ...]] = [
            (
                c.name,
                f"{c.before.usd_per_hour:g}" if c.before else "-",
                f"{c.after.usd_per_hour:g}" if c.after else "-",
                f"{c.ratio:+.1%}" if c.ratio is not None else "-",
                c.problem or (c.after.source if c.after else ""),
            )
            for c in changes
        ]
        print_table(("tier", "USD/h was", "now", "change", "source"), rows)
    where = "; nothing written (--dry-run)" if dry_run else f", in {file}" if new else ""
    say(f"{len(new)} of {len(changes)} prices read{where}")
    return EXIT_VALID if len(new) == len(changes) else EXIT_FAILURE


def models(fetch: str | None, format_: str) -> int:
    """The models, or the weights of one."""
    from cluster.models import get_model, list_models, model_config, model_kv_bytes_per_token, model_weight_bytes
    from cluster.weights import ensure_weights

    if fetch:
        print(ensure_weights(get_model(fetch), say=say))
        return EXIT_VALID
    known = list_models()
    if format_ == "json":
        facts = [
            {"weight_bytes": model_weight_bytes(m), "kv_bytes_per_token": model_kv_bytes_per_token(m),
             "config": model_config(m)}
            for m in known
        ]  # fmt: skip
        print_json([msgspec.to_builtins(m) | fact for m, fact in zip(known, facts, strict=True)])
        return EXIT_VALID

    def scaled(value: int | None, unit: float, digits: int) -> str:
        return "-" if value is None else f"{value / unit:,.{digits}f}"

    print_table(
        ("model", "parameters (1e9)", "format", "GiB", "KV KiB/token", "longest", "weights", "licence"),
        [
            (
                m.name,
                scaled(m.parameters, 1e9, 2),
                m.quantization or m.dtype,
                scaled(model_weight_bytes(m), 2**30, 1),
                scaled(model_kv_bytes_per_token(m), 1024, 1),
                str(m.max_model_len),
                m.source + (" (gated)" if m.gated else ""),
                m.licence,
            )
            for m in known
        ],
    )
    for m in known:
        print(f"  {m.name}: {m.note}")
    print("Any of them as NAME:dummy: the same architecture with random weights, nothing to download, speed only.")
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
    def base_urls(self) -> list[str]:
        """Where it is."""
        return self._urls

    @property
    def model(self) -> str:
        """The name to send."""
        return self._model

    @property
    def api_key(self) -> str | None:
        """The key of the environment; null when there is none."""
        return self._key

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
        """The model's own tokenizer; dummy weights have none, so any ids but the special ones."""
        if self._model.dummy:
            assert self._model.vocab_size is not None
            special = {self._model.bos_token_id, self._model.eos_token_id}
            return Vocabulary.from_ids(set(range(self._model.vocab_size)) - special, name=self._model.name)
        return Vocabulary.from_tokenizer(self.weights())

    def check_prompts(self, *, chat: bool, text: bool) -> None:
        """Raises `UsageError` for prompts that this model cannot be sent."""
        if self._model.dummy and (chat or text):
            raise UsageError(
                f"{self._model.name} has no tokenizer, so it takes token ids alone: use a trace of lengths, without "
                f"messages or text, and the completions endpoint"
            )

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
                extra_body=DUMMY_BODY if self._model.dummy else {},
            )  # fmt: skip


Target = UrlTarget | LocalTarget


def choose_target(options: dict[str, Any]) -> Target:
    """Existing servers when --base-url is given, else servers to start. Raises `UsageError` on unknown names."""
    from cluster.tiers import DEFAULT_TIER, get_tier

    if options["base_urls"]:
        if options.get("tls_ca"):
            probe.trust(options["tls_ca"])
        tier = get_tier(options["tier"]) if options["tier"] else None
        return UrlTarget(list(options["base_urls"]), options["model"], tier)
    from cluster.models import DEFAULT_MODEL, for_tier, get_model
    from cluster.vllm import check_fit

    model, tier = get_model(options["model"] or DEFAULT_MODEL), get_tier(options["tier"] or DEFAULT_TIER)
    if options.get("replicas"):  # `harness plan` starts nothing
        check_fit(model, tier)
        model = for_tier(model, tier.accelerator)
    return LocalTarget(model, tier, options.get("replicas", 1))


# --- steps ---------------------------------------------------------------------------------------------------------


def check_load_options(options: dict[str, Any]) -> bool:
    """Whether the loop is closed. Raises `UsageError` on options that exclude each other."""
    closed = bool(options.get("concurrency"))
    deciding = ("speed", "rate", "arrivals", "stages", "max_concurrency")
    given = [name for name in deciding if options.get(name) not in (None, 0, (), "trace")]
    if closed and given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"--concurrency is a closed loop, where a free slot decides when to send: drop it or {flag}")
    if options.get("speed") and options.get("rate"):
        raise UsageError("--speed and --rate both rescale the trace's clock: give one")
    if options.get("ramp_s") and not closed:
        raise UsageError("--ramp is how a closed loop fills up: add --concurrency; in an open loop --stages can climb")
    if "stream" in options.get("extra_body", {}):
        raise UsageError("--extra-body must not say stream: use --no-stream, which knows what it cannot time then")
    if options.get("no_stream") and {"ttft", "tpot"} & set(options.get("slo") or {}):
        raise UsageError("--no-stream answers have no ttft and no tpot to promise: an SLO on e2e, or stream")
    parse_headers(options.get("headers", ()))
    return closed


def make_plan(trace: Trace, out: Path, target: Target, *, closed: bool, options: dict[str, Any]) -> PlanInfo:
    """Build the plan file, with prompts as the target counts them."""
    has_messages = has_text = has_lengths_only = False
    for record in islice(trace, options["limit"]):
        has_messages |= record.messages is not None
        has_text |= record.text is not None
        has_lengths_only |= record.messages is None and record.text is None
    chat = options["endpoint"] == "chat" or (options["endpoint"] == "auto" and has_messages)
    if isinstance(target, LocalTarget):
        target.check_prompts(chat=chat, text=has_text)
    vocabulary: Vocabulary | None = None
    if has_lengths_only:
        if options["tokenizer"]:
            vocabulary = Vocabulary.from_tokenizer(options["tokenizer"])
        elif chat and isinstance(target, UrlTarget):
            raise UsageError("chat takes text, and text of an exact length needs the tokenizer: give --tokenizer FILE")
        else:
            vocabulary = target.vocabulary()
    started = time.monotonic()
    warmup = options["warmup"]
    share, after_s = options["cancel"] or (0.0, None)
    spec = PlanSpec(
        closed=closed, arrivals=options["arrivals"] or ("poisson" if options["stages"] else "trace"),
        burstiness=options["burstiness"], stages=options["stages"] or (), speed=options["speed"], rate=options["rate"],
        limit=options["limit"], duration_s=None if closed else options["duration_s"], repeat=options["repeat"],
        warmup_requests=warmup if isinstance(warmup, int) else None,
        warmup_s=warmup if isinstance(warmup, float) and not closed else None,
        sessions=options["sessions"], cancel_share=share, cancel_after_s=after_s, seed=options["seed"], as_text=chat,
    )  # fmt: skip
    info = build_plan(trace, out, spec, vocabulary)
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


def choose_workers(plan: Path, options: dict[str, Any]) -> int:
    """Load workers: as asked, else as many as the plan's busiest time needs at half of each one's ceiling; says why."""
    from cluster.weights import cache_dir
    from harness.calibration import demand, read_calibration, size_workers

    in_flight = options["concurrency"] or options["max_concurrency"]
    requests = read_plan_info(plan).requests
    sizing = size_workers(
        demand(plan, options["concurrency"]), read_calibration(cache_dir()), cores=describe_host().cores,
        asked=options["workers"], most=min(requests, in_flight or requests),
    )  # fmt: skip
    say(sizing.words)
    if sizing.warning:
        say(f"warning: {sizing.warning}")
    return sizing.workers


def run_and_report(run: RunDir, target: Target, options: dict[str, Any]) -> int:
    """Send the plan of ``run`` to ``target``, write the record, print the report."""
    execute(run, target, options)
    return report([run.path], options["format_"], options["slo"], options["attain"], options["ratio"])


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
            workers=choose_workers(run.plan, options),
            slo=options["slo"] or {},
            extra_body=({} if options["no_stream"] else servers.extra_body) | options["extra_body"],
            headers=parse_headers(options["headers"]), stream=not options["no_stream"], balance=options["balance"],
            retries=options["retries"], ramp_s=options["ramp_s"],
            warmup_s=options["warmup"] if isinstance(options["warmup"], float) and options["concurrency"] else None,
            tls_ca=str(options["tls_ca"].resolve()) if options["tls_ca"] else None,
        )  # fmt: skip
        manifest = describe(run, spec, info, servers)
        write_manifest(run, manifest)
        try:
            with LoadWorkers(spec, run, api_key=servers.api_key, launch=servers.launch) as load, stop:
                count_before(servers)
                manifest.status, manifest.start_unix_ns = "running", load.start()
                write_manifest(run, manifest)
                with sample_servers(servers, run, manifest.start_unix_ns):
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


@contextmanager
def sample_servers(servers: Servers, run: RunDir, start_unix_ns: int) -> Iterator[None]:
    """Every server's own metrics, each second, beside the results."""
    with ExitStack() as stack:
        sampled = [
            stack.enter_context(ServerMetrics(r.base_url, servers.api_key, run.server_metrics(r.index), start_unix_ns))
            for r in servers.replicas
        ]
        yield
    for metrics in sampled:
        if metrics.trouble:
            say(f"server metrics: {metrics.trouble}")


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
