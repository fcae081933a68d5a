"""The engine that would serve a model on a tier: what its steps take, what it may hold, and how far that is known."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

from harness.cluster.catalogue.models import (
    DTYPE_BYTES,
    Model,
    for_tier,
    kv_bytes_per_token,
    model_config,
    model_weight_bytes,
)
from harness.cluster.engines.vllm import tensor_parallel_size
from harness.cluster.hardware.bound import bound_step
from harness.cluster.hardware.chips import Chip, chip_of, chips
from harness.cluster.hardware.error import Source, cost_range
from harness.cluster.hardware.kernels import Constants, Entry, KernelStep, entries, key_of, scaled
from harness.cluster.simulator.scheduler import VLLM, Limits
from harness.cluster.simulator.step_time import StepTime
from harness.cluster.simulator.vllm_limits import GIB, gpu_limits, graph_sizes
from harness.errors import UsageError
from harness.record.manifest import Tier

MEMORY_SHARE = 0.92
"""Of a device's memory that vLLM takes (its default since 0.22)."""
RUNTIME_GIB = 1.5
"""Of CUDA, its graphs and communication on each device."""

PCIE_GB_PER_S = 64
"""Of links that are none but PCIe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareEngine:
    """One replica, for `cluster.simulator.fleet.simulate`."""

    step_time: StepTime
    limits: Limits
    source: Source
    chip: str
    tensor_parallel: int
    longest: int = sys.maxsize
    """Input and output tokens that a request may have."""
    arrival_s: float = 0.0
    """From the client's call until the scheduler sees the request."""
    arrival_per_token_s: float = 0.0
    """On top of that for each token of the prompt."""
    cost_within: tuple[float, float] | None = None
    """What a cost may be at least and at most as a multiple of the simulated one, where the step time is fitted; None:
    as `error.cost_range` has it."""
    facts: dict[str, str] = field(default_factory=dict)
    """Where the step time is from, for the manifest and for every page that shows a figure of it."""


def engine_for(
    model: Model, tier: Tier, *, tensor_parallel: int | None = None,
    source: Literal["kernels", "bound"] | None = None,
) -> HardwareEngine:  # fmt: skip
    """The engine for ``model`` (its ``quantization`` says the number format) on ``tier``.

    ``tensor_parallel``: accelerators of one replica; None: as `tensor_parallel_size` has it. ``source``: None is the
    best there is. Raises `UsageError` when the model does not fit, cannot be split so, or there is no such source.
    """
    model, chip = for_tier(model, tier.accelerator), chip_of(tier)
    parts = tensor_parallel or tensor_parallel_size(model, tier)
    if parts > tier.accelerator_count:
        raise UsageError(f"tier {tier.name} has {tier.accelerator_count} accelerators, not {parts}")
    config = model_config(model)
    if config is not None:
        refuse_windows(model, config)
    limits = limits_for(model, tier, chip, parts)
    assert config is not None
    facts = {"step_source": "bound", "chip": chip.name, "chip_source": chip.source, "scheduler": f"vLLM {VLLM}"}
    entry, why = _tables(model, chip, parts)
    if source == "kernels" and why is not None:
        raise UsageError(f"model {model.name} on tier {tier.name}: {why}")
    least = partial(bound_step, config, quantization=model.quantization, tensor_parallel=parts)
    if entry is None or entry.tables is None or source == "bound":
        facts |= {"not_kernels": why} if why else {}
        return HardwareEngine(
            step_time=least(chip), limits=limits, source="bound", chip=chip.name, tensor_parallel=parts,
            longest=model.max_model_len, facts=facts,
        )  # fmt: skip
    constants = Constants()
    facts |= {
        "step_source": "kernels", "tables": entry.source, "silicon_share": f"{entry.silicon_share:.0%}",
        "constants": " ".join(f"{name}={value:g}" for name, value in asdict(constants).items()),
    }  # fmt: skip
    if parts > 1 and chip.link_gb_per_s <= PCIE_GB_PER_S:
        facts["uncalibrated"] = "several accelerators over PCIe: 25 to 35 % off in the one run that was compared"
    tables = entry.tables
    if chip.sister is not None:
        tables = scaled(tables, least(chips()[chip.sister]), least(chip))
        facts["scaled"] = f"kernels of {chip.sister}, scaled to {chip.name} by the two data sheets"
    low, high = cost_range("kernels", chip.name, facts)
    facts["cost_range"] = f"{low:.2f} to {high:.2f}"
    graphs = graph_sizes(limits, compute_capability=int(chip.compute_capability))
    return HardwareEngine(
        step_time=KernelStep(tables, graphs, constants), limits=limits, source="kernels", chip=chip.name,
        tensor_parallel=parts, longest=model.max_model_len, arrival_s=constants.arrival_s,
        arrival_per_token_s=constants.arrival_per_token_s,
        facts=facts,
    )  # fmt: skip


def refuse_windows(model: Model, config: Mapping[str, Any]) -> None:
    """Raise `UsageError` for layers that see only a window: they keep less of the KV cache."""
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        raise UsageError(f"model {model.name}: layers with a sliding window are not simulated")


def _tables(model: Model, chip: Chip, parts: int) -> tuple[Entry | None, str | None]:
    """Measured kernels, or why there are none."""
    system = chip.kernels if chip.sister is None else chips()[chip.sister].kernels
    if system is None:
        return None, f"NVIDIA publishes no kernels of {chip.name}"
    entry = entries(system).get(key_of(str(model.architecture), model.quantization, parts))
    if entry is None:
        form = model.quantization or model.dtype
        return None, f"no kernels of {model.architecture or 'this model'} in {form} on {parts} x {chip.name}"
    return entry, entry.refused


def limits_for(model: Model, tier: Tier, chip: Chip, parts: int) -> Limits:
    """What vLLM lets an engine hold there: its defaults for the device, and the memory left beside the weights.

    The peak of a profiling step is taken as its widest activations and the logits of all seats. Raises `UsageError`
    when not even one request of ``max_model_len`` fits.
    """
    config, weights, memory = model_config(model), model_weight_bytes(model), tier.accelerator_memory_gib
    if config is None or weights is None or memory is None:
        raise UsageError(f"model {model.name} on tier {tier.name}: sizes are not known, so it cannot be simulated")
    limits = gpu_limits(round(memory * GIB), chip.name)
    tokens = limits.max_num_batched_tokens or 0
    wide = max(2 * config["intermediate_size"] // parts, 2 * config["hidden_size"]) + 2 * config["hidden_size"]
    peak = 2 * tokens * wide + 4 * limits.max_num_seqs * config["vocab_size"]
    free = memory * GIB * MEMORY_SHARE - weights / parts - peak - RUNTIME_GIB * GIB
    per_token = kv_bytes_per_token(config, DTYPE_BYTES.get(model.dtype, 2), parts)
    blocks = int(free / per_token / limits.block_size)
    if blocks * limits.block_size < model.max_model_len:
        raise UsageError(
            f"model {model.name} does not fit tier {tier.name} on {parts} of its accelerators: weights take "
            f"{weights / parts / GIB:.1f} GiB of {memory:g} on each, and a request of {model.max_model_len} tokens "
            f"{per_token * model.max_model_len / GIB:.1f}"
        )
    return replace(limits, kv_blocks=blocks)
