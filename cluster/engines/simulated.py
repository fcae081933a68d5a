"""The engine that stands for vLLM with a model on a tier, where there is no such tier: limits, step times, facts.

Limits are those that vLLM chooses for the device, and the KV cache that its memory leaves; arguments of the model's own
that change them are obeyed, and those for what the simulator does not do are refused. A step takes what
`cluster.hardware` knows of it, or what the user says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from harness.cluster.catalogue.models import DTYPE_BYTES, Model, for_tier, kv_bytes_per_token, model_config
from harness.cluster.engines.protocol import WHOLE, Command, Part, State, port_taken
from harness.cluster.engines.vllm import check_fit, cpu_kv_cache_gib, pipeline_parallel_size
from harness.cluster.hardware.calibration import ModelCalibration, calibrated
from harness.cluster.hardware.engine import HardwareEngine, engine_for, refuse_windows
from harness.cluster.process.process import Cause
from harness.cluster.simulator.scheduler import VLLM, Limits
from harness.cluster.simulator.step_time import LinearStep
from harness.cluster.simulator.vllm_limits import GIB, cpu_limits
from harness.errors import UsageError
from harness.record.manifest import Evidence, Tier

NAME = "simulated"
"""Of the kind of engine, in manifests."""
CPU_BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""
NOT_SIMULATED: Mapping[str, str] = {
    "--speculative-config": "speculative decoding",
    "--kv-transfer-config": "disaggregated prefill",
    "--enable-lora": "LoRA",
    "--enable-expert-parallel": "expert parallelism, which nobody has calibrated",
    "--data-parallel-size": "data parallelism inside a server, where experts wait for each other",
}
"""Argument of vLLM -> what it asks for."""
NO_STEP = LinearStep(1.0, 0.0, 0.0)
"""In place of one that is not known."""
INTEGERS = {
    "--max-num-seqs": "max_num_seqs", "--max-num-batched-tokens": "max_num_batched_tokens",
    "--block-size": "block_size", "--num-gpu-blocks-override": "kv_blocks",
}  # fmt: skip
FLAGS = {"--enable-prefix-caching": "prefix_cache", "--async-scheduling": "async_scheduling"}


def simulated_engine(
    model: Model, tier: Tier, step: LinearStep | None = None, calibration: ModelCalibration | None = None
) -> HardwareEngine:  # fmt: skip
    """One replica of ``model`` on ``tier``, as vLLM would be started there. ``step``: what the user says a step takes;
    or a ``calibration``: what runs of one's own say.

    Raises `UsageError` for what does not fit, is not simulated, or has no known step time.
    """
    engine = _bare(model, tier)
    windows = None if tier.accelerator_count else _windows(model)
    said = {"simulated": f"vLLM {VLLM}'s scheduler, proved against its own"}
    if calibration is not None:
        if why := calibration.fits(model.name, tier.name, engine):
            raise UsageError(f"calibration {calibration.sha256[:12]}: {why}")
        engine = calibrated(engine, calibration)
        return replace(engine, facts={**said, **engine.facts, **(windows or {})})
    if windows is not None:
        refuse_windows(model, model_config(for_tier(model, None)) or {})
    if step is not None:
        given = {**said, "step_source": "given", "step": repr(step)}
        return replace(
            engine, source="given", facts=given, step_time=step, arrival_s=0.0, arrival_per_token_s=0.0
        )  # fmt: skip
    if not tier.accelerator_count:
        raise UsageError(
            f"tier {tier.name}: no step times are known of a CPU; say what a step takes with --step, or --calibration"
        )
    return replace(engine, facts={**said, **engine.facts})


def measured_engine(model: Model, tier: Tier, args: Sequence[str]) -> HardwareEngine:
    """The engine that runs were of, started with ``args``, as it is known without them. On CPUs its step time is none.

    Raises `UsageError` for what is not simulated.
    """
    engine = _bare(model, tier)
    return replace(engine, limits=changed(engine.limits, args))


def _bare(model: Model, tier: Tier) -> HardwareEngine:
    check_fit(model, tier)
    args = for_tier(model, tier.accelerator).engine_args
    _refuse(model, tier, args)
    if tier.accelerator_count:
        engine = engine_for(model, tier)
    else:
        engine = HardwareEngine(
            step_time=NO_STEP, limits=_cpu_limits(model), source="given", chip="CPU", tensor_parallel=0,
            longest=for_tier(model, None).max_model_len,
        )  # fmt: skip
    limits = changed(engine.limits, args)
    longest = engine.longest
    if limits.kv_blocks is not None:
        longest = min(longest, limits.kv_blocks * limits.block_size)
    return replace(engine, limits=limits, longest=longest)


def _windows(model: Model) -> dict[str, str] | None:
    """What to say of layers that see only a window, where runs of the model itself say what its steps take."""
    config = model_config(for_tier(model, None)) or {}
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return None
    return {"windows": "its KV cache is counted as if no layer had a window, so it holds less than the real one"}


def args_of(engine: HardwareEngine) -> list[str]:
    """The limits and the split as arguments of vLLM, and what steps take: what tells two systems apart in manifests."""
    limits = engine.limits
    said = [f"{flag}={getattr(limits, name)}" for flag, name in INTEGERS.items() if getattr(limits, name) is not None]
    said += [flag if getattr(limits, name) else f"--no-{flag[2:]}" for flag, name in FLAGS.items()]
    said += [f"--tensor-parallel-size={engine.tensor_parallel}"] if engine.tensor_parallel > 1 else []
    return [*said, f"--step-times={engine.source}"]


def changed(limits: Limits, args: Sequence[str]) -> Limits:
    """The limits as arguments of vLLM change them. Raises `UsageError` for one that is not a number."""
    words = [part for word in args for part in word.split("=", 1)]
    changes: dict[str, Any] = {}
    for k, word in enumerate(words):
        if word in INTEGERS:
            value = words[k + 1] if k + 1 < len(words) else ""
            if not value.isdigit():
                raise UsageError(f"{word} {value!r}: not a number")
            changes[INTEGERS[word]] = int(value) - (word == "--num-gpu-blocks-override")  # one is vLLM's null block
        elif (flag := word.replace("--no-", "--", 1)) in FLAGS:
            changes[FLAGS[flag]] = flag == word
    return replace(limits, **changes)


def _refuse(model: Model, tier: Tier, args: Sequence[str]) -> None:
    for word in args:
        if what := NOT_SIMULATED.get(word.partition("=")[0]):
            raise UsageError(f"model {model.name}: {what} is not simulated ({word})")
    if pipeline_parallel_size(model, tier) > 1:
        raise UsageError(f"model {model.name} on tier {tier.name}: pipeline stages are not simulated")


def _cpu_limits(model: Model) -> Limits:
    model = for_tier(model, None)
    config = model_config(model)
    if config is None:
        raise UsageError(f"model {model.name}: its architecture is not known, so neither is its KV cache")
    block = CPU_BLOCK * kv_bytes_per_token(config, DTYPE_BYTES.get(model.dtype, 2))
    blocks = cpu_kv_cache_gib(model) * GIB // block - 1
    return replace(cpu_limits(), kv_blocks=blocks, block_size=CPU_BLOCK, async_scheduling=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """The engine behind the fake server, in real time (`cluster.engines.protocol.Engine`)."""

    model: Model
    tier: Tier
    """That is simulated; the server itself runs anywhere."""
    step: tuple[float, ...] | None = None
    """What the user says a step takes (`LinearStep`)."""
    calibration: ModelCalibration | None = None
    """What runs of one's own say of it."""
    slow: float = 1.0
    """Everything takes so many times as long, and is scaled back in the files of a run."""
    name: str = NAME
    evidence: Evidence = "simulated"
    hosts: int = 1
    memory_gib: float | None = 0.5

    @property
    def found(self) -> HardwareEngine:
        """What is simulated."""
        step = None if self.step is None else LinearStep(*self.step)
        return simulated_engine(self.model, self.tier, step, self.calibration)

    @property
    def served_model(self) -> str:
        """The model's name."""
        return self.model.name

    @property
    def args(self) -> list[str]:
        """The limits, the split and what steps take."""
        return args_of(self.found)

    def misfit(self, tier: Tier) -> str | None:
        """It runs on any machine."""
        return None

    def facts(self) -> dict[str, str]:
        """Where the figures come from."""
        pace = f"real time, {self.slow:g} times as slow and scaled back" if self.slow != 1 else "real time"
        return {**self.found.facts, "clock": pace}

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing to fetch."""

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        """The fake server."""
        argv = [
            sys.executable, "-m", "harness.cluster.engines.fake.server", "--host", host, "--port", str(port), "--model",
            self.model.name, "--simulate", self.model.name, self.tier.name, "--serves-version", VLLM,
        ]  # fmt: skip
        if self.slow != 1:
            argv += ["--slow", str(self.slow)]
        if self.step is not None:
            argv += ["--step", ",".join(str(1000 * seconds) for seconds in self.step)]
        if self.calibration is not None:
            argv += ["--calibration", msgspec.json.encode(self.calibration).decode()]
        return Command(argv=argv, env={"FAKE_SERVER_API_KEY": api_key})

    def state(self, line: str) -> State | None:
        """It is ready at once."""
        return "ready" if line.startswith("ready ") else None

    def explain(self, lines: Sequence[str]) -> Cause | None:
        """The last line of an error, if any."""
        return port_taken(lines)
