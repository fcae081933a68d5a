"""Where load goes: servers that are there already, or servers to start for this run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import say
from harness.errors import UsageError
from harness.options import LoadOptions, ReplayOptions, ServeOptions
from harness.plan.prompts import Vocabulary
from harness.record.host import cpu_flags
from harness.record.manifest import (
    OnReplicaDeath,
    Replica,
    Restart,
    RunDir,
    RunManifest,
    ServedBy,
    Tier,
)
from harness.server import probe
from harness.server.access import (
    Access,
    AccessLike,
    Patience,
    access_of,
    check_key_header,
    from_environment,
    normalise_base_url,
    parse_header_env,
    parse_headers,
)
from harness.server.counters import check_metrics_urls

if TYPE_CHECKING:
    from harness.cluster.catalogue.models import Model
    from harness.cluster.deploy.load_workers import Launch
    from harness.cluster.hardware.calibration import ModelCalibration


API_KEY = "HARNESS_API_KEY"
OTHER_KEY = "OPENAI_API_KEY"
"""Read where ours is unset, for servers that are there already."""
DUMMY_BODY: dict[str, object] = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
"""Dummy weights come without a tokenizer, so chunks have no text: the server counts their tokens for us."""


@contextmanager
def sample_here(run: RunDir, start_unix_ns: int) -> Iterator[None]:
    """The counters of this machine alone, each second, beside the results."""
    from harness.record.samples import HostMetrics, host_file

    with HostMetrics(host_file(run.path, "local"), start_unix_ns) as metrics:
        yield
    if metrics.trouble:
        say(f"host metrics: {metrics.trouble}")


@dataclass(slots=True, kw_only=True)
class Servers(ServedBy):
    """Where the load goes, whoever started it; ``model`` is the name to send."""

    replicas: list[Replica]
    api_key: str | None
    patience: Patience | None = None
    """For what is asked before a load begins; null: they are ours, and ready."""
    asked: bool = False
    warm: bool = False
    extra_body: dict[str, object] = field(default_factory=dict)
    """Fields of every streamed request that this server needs."""
    tokenizer: Path | None = None
    """The model's own, where it is at hand."""
    shares_host: bool | None = None
    launch: Launch | None = None
    """How load workers are started; None: as children of this process."""
    check: Callable[[], dict[int, str]] = dict
    """Replicas that died, index -> how: the run is to be stopped. One that is being started again is not among them."""
    restarts: list[Restart] = field(default_factory=list)
    restarting: Callable[[], bool] = bool
    shared_cores: bool | None = None
    """True when load workers may run on processors that a server runs on; null when not known."""
    slow: float = 1.0
    """Times as long as everything takes, clients among it; what a run's files say is scaled back."""
    virtual: Callable[[RunDir, ReplayOptions, Callable[[str], None]], RunManifest] | None = None
    """Serves a plan in virtual time and writes its run; None: there are servers."""
    sample_hosts: Callable[[RunDir, int], AbstractContextManager[None]] = sample_here
    """Samples the counters of the hosts of servers and load (`harness.record.samples`) while a run lasts."""

    @property
    def base_urls(self) -> list[str]:
        """One per replica."""
        return [r.base_url for r in self.replicas]


class UrlTarget:
    """Servers that are there already. Nothing is started but load workers."""

    def __init__(
        self, base_urls: Sequence[str], model: str | None, tier: Tier | None, metrics_urls: Sequence[str] = (),
        access: AccessLike = None,
    ) -> None:  # fmt: skip
        self.base_urls = [normalise_base_url(url) for url in base_urls]
        self._access, self._tier = access_of(access), tier
        found = probe.find_model(self.base_urls[0], self._access, model, say)
        self.model = found.id
        self.max_model_len = found.max_model_len
        """Longest input plus output, tokens; null when the server does not say."""
        self.label = self.model.rsplit("/", 1)[-1]
        for url in self.base_urls[1:]:
            probe.find_model(url, self._access, self.model, say)
        self._pages = check_metrics_urls(metrics_urls, self.base_urls, self._access)

    def vocabulary(self) -> Vocabulary:
        """Ordinary token ids, as this server counts them."""
        ids = probe.ordinary_token_ids(self.base_urls[0], self._access, self.model)
        return Vocabulary.from_ids(ids, name=f"{self.model} at the server")

    @contextmanager
    def open(self, run: RunDir) -> Iterator[Servers]:
        """The servers, as they are."""
        from harness.cluster.process.registry import name_orphans

        name_orphans(say)
        yield Servers(
            engine="url", model=self.model, tier=self._tier, api_key=self._access.api_key,
            replicas=[
                Replica(index=i, base_url=url, metrics_urls=pages)
                for i, (url, pages) in enumerate(zip(self.base_urls, self._pages, strict=True))
            ],
            patience=self._access.patience, engine_version=probe.engine_version(self.base_urls[0], self._access),
        )  # fmt: skip


class LocalTarget:
    """Servers that a Ray cluster starts for this run: this machine's own, or the one RAY_ADDRESS names."""

    def __init__(
        self, model: Model, tier: Tier, replicas: int, on_replica_death: OnReplicaDeath, facts: Mapping[str, str]
    ) -> None:
        self._model, self._tier, self._replicas, self._facts = model, tier, replicas, facts
        self._on_replica_death = on_replica_death
        self.max_model_len: int | None = model.max_model_len
        """Longest input plus output it is served with, tokens."""
        self.label = model.name.rsplit("/", 1)[-1]

    @cache  # noqa: B019 - a target lives as long as its command
    def weights(self) -> Path:
        """The weights' folder, fetched on first use."""
        from harness.cluster.catalogue.weights import ensure_weights

        return ensure_weights(self._model, say=say)

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
        from harness.cluster.deploy.deployment import Deployment
        from harness.cluster.engines.vllm import hosts_per_replica
        from harness.cluster.process.registry import name_orphans

        name_orphans(say)
        key = os.environ.get(API_KEY) or secrets.token_urlsafe(24)
        with Deployment(
            model=self._model, weights=self.weights(), tier=self._tier, replicas=self._replicas, run_dir=run.path,
            api_key=key, say=say, on_replica_death=self._on_replica_death,
        ) as d:  # fmt: skip
            yield Servers(
                engine=d.engine, evidence=d.evidence, model=self._model.name, replicas=d.replicas, api_key=key,
                tier=rented(self._tier, hosts_per_replica(self._model, self._tier)),
                engine_version=d.engine_version, engine_args=d.engine_args,
                model_facts={**d.model_facts, **self._facts}, shares_host=d.shares_host, shared_cores=d.shared_cores,
                launch=d.launch, check=d.check, tokenizer=None if self._model.dummy else self.weights(),
                restarts=d.restarts, restarting=lambda: d.restarting, sample_hosts=d.sample_hosts,
                extra_body=DUMMY_BODY if self._model.dummy else {},
            )  # fmt: skip


class SimulatedTarget(LocalTarget):
    """Servers that answer as vLLM with a model on a tier would, in real time, on machines that need not be of it."""

    def __init__(
        self, model: Model, tier: Tier, replicas: int, on_replica_death: OnReplicaDeath,
        step: tuple[float, ...] | None, calibration: ModelCalibration | None, slow: float = 1.0,
    ) -> None:  # fmt: skip
        from harness.cluster.catalogue.models import for_tier
        from harness.cluster.engines.simulated import SimulatedServer

        super().__init__(for_tier(model, tier.accelerator), tier, replicas, on_replica_death, {})
        self._engine = SimulatedServer(model=model, tier=tier, step=step, calibration=calibration, slow=slow)
        self.label = f"{model.name.rsplit('/', 1)[-1]}-on-{tier.name}-simulated"
        _ = self._engine.found  # what cannot be simulated is refused now

    def vocabulary(self) -> Vocabulary:
        """Any ids: there is no tokenizer."""
        return Vocabulary.from_ids(range(self._model.vocab_size or 32_000), name=f"{self._model.name}, simulated")

    def check_prompts(self, *, chat: bool, text: bool) -> None:
        """Raises `UsageError` for prompts whose tokens only a tokenizer can count."""
        if chat or text:
            raise UsageError(
                "a simulated server counts no tokens of texts: use a trace of lengths, without messages or text, and "
                "the completions endpoint ('harness trace anonymize' makes lengths of texts)"
            )

    @contextmanager
    def open(self, run: RunDir) -> Iterator[Servers]:
        """Start the servers; end them whatever happens inside."""
        from harness.cluster.deploy.deployment import Deployment
        from harness.cluster.process.registry import name_orphans

        name_orphans(say)
        key = os.environ.get(API_KEY) or secrets.token_urlsafe(24)
        here = replace(
            self._tier, accelerator=None, accelerator_count=0, accelerator_memory_gib=None, vcpu=1, memory_gib=1.0
        )
        with Deployment(
            model=self._model, weights=Path(), tier=here, replicas=self._replicas, run_dir=run.path, api_key=key,
            say=say, engine=self._engine, on_replica_death=self._on_replica_death,
        ) as d:  # fmt: skip
            yield Servers(
                engine=d.engine, evidence=d.evidence, model=self._model.name, replicas=d.replicas, api_key=key,
                tier=self._tier, engine_version=d.engine_version, engine_args=d.engine_args, model_facts=d.model_facts,
                shares_host=d.shares_host, shared_cores=d.shared_cores, launch=d.launch, check=d.check,
                restarts=d.restarts, restarting=lambda: d.restarting, sample_hosts=d.sample_hosts,
                slow=self._engine.slow,
            )  # fmt: skip


class VirtualTarget(SimulatedTarget):
    """The same in virtual time: nothing is started, and a run takes as long as it takes to compute."""

    @contextmanager
    def open(self, run: RunDir) -> Iterator[Servers]:
        """What serves a plan."""
        from harness.cli.simulation import Subject, simulate_plan

        tier, replicas, engine = self._tier, self._replicas, self._engine

        def serve(run: RunDir, options: ReplayOptions, tell: Callable[[str], None]) -> RunManifest:
            subject = Subject(
                model=engine.model, tier=tier, replicas=replicas, engine=engine.found, router=options.load.balance
            )
            return simulate_plan(run, subject, options, tell)

        yield Servers(
            engine=engine.name, evidence=engine.evidence, model=self._model.name, tier=tier, api_key=None,
            replicas=[Replica(index=k, base_url=f"simulated://{k}") for k in range(replicas)], virtual=serve,
        )  # fmt: skip


Target = UrlTarget | LocalTarget


def access_to(asked: LoadOptions) -> Access:
    """What every request to servers that are there already carries. Raises `UsageError`."""
    headers, secret = parse_headers(asked.headers), from_environment(parse_header_env(asked.header_env))
    check_key_header(asked.key_header, {**headers, **secret})
    if not (key := os.environ.get(API_KEY)) and (key := os.environ.get(OTHER_KEY)):
        say(f"API key: {OTHER_KEY}, since {API_KEY} is not set")
    return Access(
        api_key=key or None, key_header=asked.key_header, headers=headers, secret_headers=secret,
        patience=Patience(say),
    )  # fmt: skip


def rented(tier: Tier, hosts: int) -> Tier:
    """What one replica rents: the tier, or ``hosts`` of it as one, at their price together."""
    if hosts == 1:
        return tier
    return replace(
        tier, name=f"{hosts} x {tier.name}", instance=f"{hosts} x {tier.instance}", vcpu=hosts * tier.vcpu,
        accelerator_count=hosts * tier.accelerator_count, memory_gib=hosts * tier.memory_gib,
        usd_per_hour=hosts * tier.usd_per_hour, ownership=None,
        note="; ".join(filter(None, (tier.note, f"one replica spans {hosts} machines"))),
    )  # fmt: skip


def _simulated_target(asked: ServeOptions) -> SimulatedTarget:
    from harness.cluster.catalogue.models import DEFAULT_MODEL, get_model
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.deploy.placement import check_ray

    if asked.base_urls:
        raise UsageError("--engine simulated starts its servers: drop --base-url")
    if asked.tier is None:
        raise UsageError("which hardware is simulated? --tier NAME ('harness tiers' lists them)")
    if asked.clock == "virtual" and asked.slow is not None:
        raise UsageError("--slow: virtual time takes what it takes to compute: drop it or --clock virtual")
    if asked.clock != "virtual":
        check_ray()
    model, tier = get_model(asked.model or DEFAULT_MODEL), get_tier(asked.tier)
    kind = VirtualTarget if asked.clock == "virtual" else SimulatedTarget
    calibration = asked_calibration(asked)
    return kind(model, tier, asked.replicas, asked.on_replica_death, asked.step, calibration, asked.slow or 1.0)


def asked_calibration(asked: ServeOptions) -> ModelCalibration | None:
    """What own runs say of a simulated step. Raises `UsageError` for a file that is none, or beside --step."""
    from harness.cluster.hardware.calibration import read_model_calibration

    if asked.calibration is None:
        return None
    if asked.step is not None:
        raise UsageError("--step and --calibration both say what a step takes: drop one")
    return read_model_calibration(asked.calibration)


def choose_target(options: ReplayOptions, *, start: bool = True) -> Target:
    """Existing servers when --base-url is given, else servers to ``start`` (or whose model alone is wanted). Raises
    `UsageError` on unknown names.
    """
    from harness.cluster.catalogue.tiers import DEFAULT_TIER, get_tier

    asked = options.serve
    if asked.engine == "simulated":
        return _simulated_target(asked)
    if (asked.step, asked.clock, asked.calibration, asked.slow) != (None, None, None, None):
        raise UsageError("--step, --clock, --slow and --calibration are of a simulated engine: add --engine simulated")
    if asked.base_urls:
        if options.load.tls_ca:
            probe.trust(options.load.tls_ca)
        tier = get_tier(asked.tier) if asked.tier else None
        return UrlTarget(asked.base_urls, asked.model, tier, asked.metrics_urls, access_to(options.load))
    from harness.cluster.catalogue.models import DEFAULT_MODEL, for_tier, get_model
    from harness.cluster.deploy.placement import check_can_serve
    from harness.cluster.engines.vllm import check_fit, for_processor

    model, tier = get_model(asked.model or DEFAULT_MODEL), get_tier(asked.tier or DEFAULT_TIER)
    facts: dict[str, str] = {}
    if start:
        check_fit(model, tier)
        check_can_serve(tier)
        own = model.on.get("cpu")
        model = for_tier(model, tier.accelerator)
        here = not tier.accelerator_count and not os.environ.get("RAY_ADDRESS")
        if here and (own is None or own.dtype is None):
            model, why = for_processor(model, tier, cpu_flags())
            if why:
                facts["dtype_reason"] = why
                say(f"note: {model.name} is served in {why}")
    return LocalTarget(model, tier, asked.replicas, asked.on_replica_death, facts)
