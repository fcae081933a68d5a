"""The rows of rows.csv as engines and loads, and what a simulation makes of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.hardware.kernels import Constants, KernelStep, Tables
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.vllm_limits import graph_sizes
from tests.accuracy.replay import serve

HERE = Path(__file__).parent
GIB = 2**30
STEP_TOKENS = 8192
MEMORY_SHARE = 0.9
RUNTIME_GIB = 1.5
"""As InferenceX starts vLLM: ``--max-num-batched-tokens 8192 --gpu-memory-utilization 0.9 --max-num-seqs CONCURRENCY``,
without a prefix cache, with asynchronous scheduling."""
REFUSED_MODELS = {
    "openai/gpt-oss-120b": "half its layers see a window",
    "moonshotai/Kimi-K2.5": "INT4 experts, or a format that the catalogue does not have",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured run."""

    id: str
    chip: str
    model: str
    precision: str
    tensor_parallel: int
    expert_parallel: int
    inputs: int
    outputs: int
    concurrency: int
    ttft_ms: float
    tpot_ms: float
    package_ttft_ms: float
    package_tpot_ms: float
    tables: int
    date: str

    @property
    def refused(self) -> str | None:
        """Why the product simulates no such engine; None: it does."""
        if self.expert_parallel > 1:
            return "expert parallelism"
        return REFUSED_MODELS.get(self.model)

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Tokens of prompts and answers: 10 for each slot, uniform in [0.8 L, L], as InferenceX draws them."""
        n, draw = min(10 * self.concurrency, 1280), np.random.default_rng(1)
        tokens = [draw.integers(int(0.8 * size), size + 1, n).tolist() for size in (self.inputs, self.outputs)]
        return tokens[0], tokens[1]


def rows() -> list[Row]:
    """Every row that was kept."""
    kinds = Row.__annotations__
    with (HERE / "rows.csv").open(newline="") as file:
        make: Mapping[str, Any] = {"int": int, "float": float, "str": str}
        return [Row(**{k: make[kinds[k]](v) for k, v in row.items()}) for row in csv.DictReader(file)]


@cache
def _tables() -> tuple[npt.NDArray[np.float32], list[dict[str, Any]]]:
    with np.load(HERE / "silicon.npz") as file:
        return file["values"], json.loads((HERE / "index.json").read_text())["tables"]


def engine_of(row: Row, constants: Constants) -> HardwareEngine:
    """The engine that the row was measured on."""
    values, index = _tables()
    facts = index[row.tables]
    memory = facts["memory_gib"]
    used = memory["weights"] + memory["activations"] + memory["nccl"] + RUNTIME_GIB
    blocks = max(64, int((facts["device_gib"] * MEMORY_SHARE - used) * GIB / facts["kv_bytes_per_token"] / 16))
    limits = Limits(
        max_num_seqs=row.concurrency, max_num_batched_tokens=max(STEP_TOKENS, row.concurrency), kv_blocks=blocks,
        async_scheduling=True,
    )  # fmt: skip
    graphs = graph_sizes(limits, compute_capability=10 if row.chip[:2] in ("b2", "b3") else 9)
    return HardwareEngine(
        step_time=KernelStep(Tables.of_array(values[row.tables], facts["layers"]), graphs, constants),
        limits=limits, source="kernels", chip=row.chip, tensor_parallel=row.tensor_parallel,
        arrival_s=constants.arrival_s, arrival_per_token_s=constants.arrival_per_token_s,
    )  # fmt: skip


def simulated(row: Row, constants: Constants) -> tuple[float, float]:
    """Mean TTFT and mean TPOT, ms: what InferenceX prints."""
    inputs, outputs = row.lengths
    ttft_s, tpot_s, _ = serve(engine_of(row, constants), inputs, outputs, concurrency=row.concurrency)
    return float(ttft_s.mean() * 1e3), float(tpot_s.mean() * 1e3)
