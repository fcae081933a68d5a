"""Runs of strangers under Poisson load, which nothing was fitted to.

vllm-0.19-h100-a100.csv: pChitral/vllm-cost-meter, data/master_results.csv, commit 3f308c0, MIT; arXiv:2606.11690; six
of its configurations. Random prompts of 512 tokens, answers of 256, no prefix cache. 500 requests: what the runs at 1
request/s took says so. vllm-0.8.5-h100pcie-rtx4090.csv: IOG-Foundation/llm-inference-benchmarks, results/, commit
4990a80, Apache-2.0; 200 ShareGPT prompts of which only the sums of tokens are known; chips without kernels, so
they hold the bound.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harness.cluster.catalogue.models import architecture, get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.hardware.bound import bound_step
from harness.cluster.hardware.chips import chips
from harness.cluster.hardware.engine import HardwareEngine, engine_for
from harness.cluster.simulator.scheduler import Limits
from harness.errors import UsageError
from tests.accuracy.replay import serve

HERE = Path(__file__).parent
REQUESTS, INPUTS, OUTPUTS, DRAWS = 500, 512, 256, 3
MODELS = {
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "float16"): "llama-3.1-8b-instruct",
    ("Qwen/Qwen3-30B-A3B-Instruct-2507", "float16"): "qwen3-30b-a3b",
    ("Qwen/Qwen3-30B-A3B-Instruct-2507", "fp8"): "qwen3-30b-a3b-fp8",
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", "float16"): "mixtral-8x7b-instruct-v0.1",
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", "fp8"): "mixtral-8x7b-instruct-v0.1-fp8",
}
TIERS = {"A100_80GB_PCIe": "azure-nc24ads-a100-v4", "H100": "aws-p5.4xlarge"}
"""Hardware as the source names it ("H100-80GB SXM", "A100-80GB PCIe"); the price is the row's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One rate of one configuration; simulated figures are None where the product refuses."""

    config: str
    hardware: str
    model: str
    precision: str
    rate: float
    saturated: bool
    """Beyond 0.8 of the most that this configuration served."""
    measured: tuple[float, float, float]
    """USD per 1M output tokens, median TPOT and TTFT in ms."""
    simulated: tuple[float, float, float] | None
    why: str | None


def engine_of(row: dict[str, str]) -> HardwareEngine:
    """What the row was measured on. Raises `UsageError` where there are no kernels."""
    tier = get_tier(TIERS[row["hardware"]])
    parts = int(row["gpus"])
    model = replace(get_model(MODELS[row["model"], row["precision"]]), max_model_len=4096)
    tier = replace(tier, accelerator_count=max(tier.accelerator_count, parts))
    engine = engine_for(model, tier, tensor_parallel=parts, source="kernels")
    return replace(engine, limits=replace(engine.limits, prefix_cache=False))


def compare() -> list[Compared]:
    """Every row of vllm-0.19-h100-a100.csv."""
    with (HERE / "vllm-0.19-h100-a100.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    most = {
        config: max(float(r["request_throughput"]) for r in found if r["config"] == config)
        for config in {r["config"] for r in found}
    }
    return [_compare(row, most[row["config"]]) for row in found]


def _compare(row: dict[str, str], most: float) -> Compared:
    simulated, why = None, None
    try:
        engine = engine_of(row)
    except UsageError as e:
        why = str(e)
    else:
        draws = [_draw(engine, row, seed) for seed in range(DRAWS)]
        cost, tpot, ttft = np.mean(draws, axis=0).tolist()
        simulated = (cost, tpot, ttft)
    measured = float(row["c_eff_per_mtok"]), float(row["tpot_p50_ms"]), float(row["ttft_p50_ms"])
    return Compared(
        config=row["config"], hardware=row["hardware"], model=row["model"], precision=row["precision"],
        rate=float(row["rps"]), saturated=float(row["rps"]) > 0.8 * most, measured=measured, simulated=simulated,
        why=why,
    )  # fmt: skip


def _draw(engine: HardwareEngine, row: dict[str, str], seed: int) -> tuple[float, float, float]:
    rate = float(row["rps"])
    sent_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, REQUESTS))
    sent_s *= REQUESTS / rate / sent_s[-1]
    ttft_s, tpot_s, ended_s = serve(
        engine, [INPUTS] * REQUESTS, [OUTPUTS] * REQUESTS, sent_s=(sent_s - sent_s[0]).tolist()
    )
    usd = float(row["gpu_cost_hr"]) / 3600 * ended_s.max()
    return usd / (REQUESTS * OUTPUTS / 1e6), float(np.median(tpot_s) * 1e3), float(np.median(ttft_s) * 1e3)


QWEN: dict[str, dict[str, int]] = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip
"""Qwen 2.5. Source: their config.json."""
BOUNDED: dict[str, tuple[str | None, str | None]] = {
    "Qwen/QwQ-32B-Preview": ("32B", None),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (None, "llama-3.1-8b"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("1.5B", None),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("14B", None),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": ("32B", None),
    "meta-llama/Meta-Llama-3-70B-Instruct": (None, "llama-3.1-70b"),
    "neuralmagic/Llama-3.1-Nemotron-70B-Instruct-HF-FP8-dynamic": (None, "llama-3.1-70b"),
    "nvidia/AceMath-7B-Instruct": ("7B", None),
}
CHIPS = {"NVIDIA-H100-PCIe": "H100-PCIe", "NVIDIA-GeForce-RTX-4090": "RTX-4090"}
FREE = Limits(max_num_seqs=256, max_num_batched_tokens=8192)


def over_bound() -> list[tuple[str, str, int, float, float]]:
    """Of every run on chips without kernels: model, chip, rate, and TPOT and duration over those of the roofline."""
    with (HERE / "vllm-0.8.5-h100pcie-rtx4090.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["model_id"] in BOUNDED]
    return [_over_bound(row) for row in found]


def _over_bound(row: dict[str, str]) -> tuple[str, str, int, float, float]:
    qwen, known = BOUNDED[row["model_id"]]
    config = QWEN[qwen] if qwen is not None else architecture(str(known))
    quantization = "fp8" if "FP8" in row["model_id"] else None
    chip, n, rate = chips()[CHIPS[row["gpu_name"]]], int(row["completed"]), int(row["request_rate"])
    step = bound_step(config, chip, quantization=quantization, tensor_parallel=int(row["gpu_count"]))
    engine = HardwareEngine(
        step_time=step, limits=FREE, source="bound", chip=chip.name, tensor_parallel=int(row["gpu_count"])
    )  # fmt: skip
    tokens = [round(int(row[name]) / n) for name in ("total_input_tokens", "total_output_tokens")]
    sent_s = (np.arange(n) / n * (n / rate)).tolist()
    _, tpot_s, ended_s = serve(engine, [tokens[0]] * n, [tokens[1]] * n, sent_s=sent_s)
    over = float(row["mean_tpot_ms"]) / 1e3 / float(np.mean(tpot_s)), float(row["duration"]) / float(ended_s.max())
    return row["model_id"], chip.name, rate, over[0], over[1]
