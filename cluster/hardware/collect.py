"""Read step times out of NVIDIA's package aiconfigurator-core: runs in an environment of its own, which has it.

`build` starts it: jobs as JSON lines on standard input, a result each on standard output. Nothing else of this project
is imported. API of version 0.12.0.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any, cast

import aiconfigurator_core
import numpy as np
from aiconfigurator_core.sdk.backends.factory import get_backend
from aiconfigurator_core.sdk.config import RuntimeConfig
from aiconfigurator_core.sdk.config_builders import build_model_config
from aiconfigurator_core.sdk.engine import EngineHandle, build_engine_spec_json
from aiconfigurator_core.sdk.models import get_model
from aiconfigurator_core.sdk.models.helpers import resolve_context_fmha_by_data, resolve_nvfp4_for_system
from aiconfigurator_core.sdk.perf_database import get_database_view

Job = dict[str, Any]
PAGE = 16
_databases: dict[str, Any] = {}


def _compile(job: Job) -> tuple[Any, Any, EngineHandle]:
    system = job["system"]
    if system not in _databases:
        _databases[system] = get_database_view(
            system, "vllm", "current", allow_missing_data=True, database_mode="HYBRID"
        )  # fmt: skip
    database = _databases[system]
    config = build_model_config(job["tp"], 1, 1, job["moe_tp"], job["moe_ep"], **job["modes"])
    with contextlib.suppress(Exception):
        resolve_context_fmha_by_data(config, job["model"], database, "vllm", is_context_role=True)
    resolve_nvfp4_for_system(config, system, job["model"])
    model = get_model(job["model"], config, "vllm")
    spec = build_engine_spec_json(
        model, model_path=job["model"], system=system, backend="vllm", backend_version=database.version,
        kv_block_size=PAGE, systems_path=None, nextn=0, database=database,
    )  # fmt: skip
    return model, database, EngineHandle(aiconfigurator_core.engine_spec_bincode_from_json(spec))


def _is_attention(op: Any) -> bool:
    words = f"{type(op).__name__} {op._name}".lower()
    return any(word in words for word in ("attention", "mla", "dsa")) and "gemm" not in words.split()[1]


def _is_communication(name: str) -> bool:
    return any(word in name.lower() for word in ("_ar", "allreduce", "p2p", "dispatch", "a2a"))


class _Sums:
    """Seconds of groups of operations, and where the package says that they are from."""

    def __init__(self, handle: EngineHandle) -> None:
        self.handle = handle
        self.seconds_by_origin: dict[str, float] = {}

    def _sum(self, rows: Iterable[tuple[str, float, object, str]]) -> float:
        whole_s = 0.0
        for _, milliseconds, _, origin in rows:
            whole_s += milliseconds / 1e3
            self.seconds_by_origin[origin] = self.seconds_by_origin.get(origin, 0.0) + milliseconds / 1e3
        return whole_s

    def context(self, ops: list[int], new: float, done: float = 0) -> float:
        if not ops:
            return 0.0
        rows = self.handle.evaluate_context_ops(ops, batch_size=1, s=int(new), prefix=int(done), x=int(new))
        return self._sum(rows)

    def generation(self, ops: list[int], sequences: float, length: float = 1024) -> float:
        if not ops:
            return 0.0
        return self._sum(self.handle.evaluate_generation_ops(ops, batch_size=int(sequences), s=int(length)))


def tabulate(job: Job) -> Job:
    """Every table of `cluster.hardware.kernels.Tables`, s, on the job's grid."""
    model, database, handle = _compile(job)
    grid = {name: np.array(values) for name, values in job["grid"].items()}
    context, generation = [op._name for op in model.context_ops], [op._name for op in model.generation_ops]
    read = [i for i, op in enumerate(model.context_ops) if _is_attention(op)]
    decode = [i for i, op in enumerate(model.generation_ops) if _is_attention(op)]
    head = [i for i, name in enumerate(context) if "logits" in name]
    read_rest = [i for i in range(len(context)) if i not in read and i not in head]
    decode_rest = [i for i in range(len(generation)) if i not in decode]
    logits = [i for i, name in enumerate(generation) if "logits" in name]
    sums = _Sums(handle)
    tables = {
        "read_s": [sums.context(read_rest, x) for x in grid["tokens"]],
        "decode_s": [sums.generation(decode_rest, x) for x in grid["tokens"]],
        "logits_s": [sums.generation(logits, x) for x in grid["tokens"]],
        "read_link_s": [
            sums.context([i for i in read_rest if _is_communication(context[i])], x) for x in grid["tokens"]
        ],
        "decode_link_s": [
            sums.generation([i for i in decode_rest if _is_communication(generation[i])], x) for x in grid["tokens"]
        ],
        "read_attention_s": [[sums.context(read, new, done) for done in grid["done"]] for new in grid["new"]],
        "decode_attention_s": [
            [sums.generation(decode, n, size) for size in grid["length"]] for n in grid["sequences"]
        ],
    }
    whole = sum(sums.seconds_by_origin.values())
    return {
        "tables": tables, "layers": model._num_layers, "vllm": database.version,
        "origin": {name: seconds / whole for name, seconds in sums.seconds_by_origin.items()},
        "memory_gib": get_backend("vllm")._get_memory_usage(model, database, 1, 1, 1024, 1, num_tokens=8192),
        "device_gib": database.system_spec["gpu"]["mem_capacity"] / 2**30,
        "kv_bytes_per_token": float(model.get_kvcache_bytes_per_sequence(1024) / 1024),
    }  # fmt: skip


def estimate(job: Job) -> Job:
    """The package's own TTFT and TPOT, ms, of each (concurrency, input, output), its tokens of a step as asked."""
    model, database, _ = _compile(job)
    found = []
    for concurrency, inputs, outputs in job["loads"]:
        runtime = RuntimeConfig(batch_size=concurrency, beam_width=1, isl=inputs, osl=outputs)
        result = (
            get_backend("vllm")
            .run_agg(model, database, runtime, ctx_tokens=min(inputs, job["step_tokens"]))
            .get_result_dict()
        )
        found.append(None if result is None else (result["ttft"], result["tpot"]))
    return {"estimates": found}


def main() -> None:
    """Answer every job; what the package cannot do is an answer, too."""
    logging.disable(logging.CRITICAL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the package prints
    for line in sys.stdin:
        job = cast(Job, json.loads(line))
        try:
            result = tabulate(job) if "grid" in job else estimate(job)
        except Exception as e:
            result = {"problem": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps({"key": job["key"], **result}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
