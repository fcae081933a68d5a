"""The engine that stands for vLLM with a model on a tier, where there is no such tier: limits, step times, facts.

Limits are those that vLLM chooses for the device, and the KV cache that its memory leaves; arguments of the model's own
that change them are obeyed, and those for what the simulator does not do are refused. A step takes what
`cluster.hardware` knows of it, or what the user says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.catalogue.models import DTYPE_BYTES, Model, for_tier, kv_bytes_per_token, model_config
from cluster.engines.vllm import check_fit, cpu_kv_cache_gib, pipeline_parallel_size
from cluster.hardware.engine import HardwareEngine, engine_for
from cluster.simulator.scheduler import VLLM, Limits
from cluster.simulator.step_time import LinearStep
from cluster.simulator.vllm_limits import GIB, cpu_limits
from harness.errors import UsageError
from harness.record.manifest import Tier

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
INTEGERS = {
    "--max-num-seqs": "max_num_seqs", "--max-num-batched-tokens": "max_num_batched_tokens",
    "--block-size": "block_size", "--num-gpu-blocks-override": "kv_blocks",
}  # fmt: skip
FLAGS = {"--enable-prefix-caching": "prefix_cache", "--async-scheduling": "async_scheduling"}


def simulated_engine(model: Model, tier: Tier, step: LinearStep | None = None) -> HardwareEngine:
    """One replica of ``model`` on ``tier``, as vLLM would be started there. ``step``: what the user says a step takes.

    Raises `UsageError` for what does not fit, is not simulated, or has no known step time.
    """
    check_fit(model, tier)
    args = for_tier(model, tier.accelerator).engine_args
    _refuse(model, tier, args)
    if tier.accelerator_count:
        engine = engine_for(model, tier)
    elif step is None:
        raise UsageError(f"tier {tier.name}: no step times are known of a CPU; say what a step takes with --step")
    else:
        engine = HardwareEngine(
            step_time=step, limits=_cpu_limits(model, tier), source="fitted", chip="CPU", tensor_parallel=0
        )
    limits = changed(engine.limits, args)
    said = {"simulated": f"vLLM {VLLM}'s scheduler, proved against its own"}
    if step is None:
        return replace(engine, limits=limits, facts={**said, **engine.facts})
    given = {**said, "step_source": "given", "step": repr(step)}
    return replace(engine, limits=limits, facts=given, step_time=step, arrival_s=0.0, arrival_per_token_s=0.0)


def limit_args(limits: Limits) -> list[str]:
    """The limits as arguments of vLLM, for the manifest."""
    said = [f"{flag}={getattr(limits, name)}" for flag, name in INTEGERS.items() if getattr(limits, name) is not None]
    return said + [flag if getattr(limits, name) else f"--no-{flag[2:]}" for flag, name in FLAGS.items()]


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
    config = model_config(model)
    if config and config.get("sliding_window") and config.get("use_sliding_window") is not False:
        raise UsageError(
            f"model {model.name}: layers that see only a window keep less of the KV cache, which is not simulated"
        )


def _cpu_limits(model: Model, tier: Tier) -> Limits:
    model = for_tier(model, None)
    config = model_config(model)
    if config is None:
        raise UsageError(f"model {model.name}: its architecture is not known, so neither is its KV cache")
    block = CPU_BLOCK * kv_bytes_per_token(config, DTYPE_BYTES.get(model.dtype, 2))
    blocks = cpu_kv_cache_gib(model) * GIB // block - 1
    return replace(cpu_limits(), kv_blocks=blocks, block_size=CPU_BLOCK, async_scheduling=True)
