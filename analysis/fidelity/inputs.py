"""What `analysis.fidelity.questions` asks of a run, read from its directory."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.fidelity.answer import Plan, Served
from analysis.load import Floats, Run
from harness.plan import iter_prompt_ids, read_plan_columns
from harness.run import RunDir
from harness.server_metrics import read_server_metrics
from harness.traces.reuse import Reuse, prompt_reuse

QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"
BLOCK_TOKENS = 16
"""vLLM's on a GPU."""
CPU_BLOCK_TOKENS = 128
"""vLLM's on a CPU."""


def read_plan(run: Run) -> Plan:
    """The plan's columns in the order of its requests. Raises `PlanError`."""
    names = ["request_id", "scheduled_ns", "slice", "after", "input_tokens", "output_tokens"]
    table = read_plan_columns(RunDir(run.path).plan, names)
    table = table.take(pa.array(np.argsort(table.column("request_id").to_numpy(), kind="stable")))
    scheduled = table.column("scheduled_ns")
    return Plan(
        scheduled_ns=None if scheduled.null_count else scheduled.to_numpy(),
        slice=table.column("slice").to_numpy(),
        waits=np.asarray(pc.is_valid(table.column("after")).to_numpy(), dtype=np.bool_),
        input_tokens=_floats(table, "input_tokens"),
        output_tokens=_floats(table, "output_tokens"),
    )


def read_reuse(run: Run) -> tuple[Reuse | None, Reuse | None]:
    """Prefix reuse of the plan's prompts: in the trace's blocks, and in the server's.

    None where nobody states any, and of live conversations, whose prompts are whole only when they are sent.
    """
    source = run.manifest.plan.source
    if source is None or source.prefix is None or run.manifest.plan.conversation == "live":
        return None, None
    plan = RunDir(run.path).plan
    own = prompt_reuse(iter_prompt_ids(plan), min(source.prefix.block_tokens), partial=True)
    counts = _moved(run, HITS) is not None or bool(np.isfinite(run.rows.cached_tokens).any())
    return own, prompt_reuse(iter_prompt_ids(plan), block_tokens(run)) if counts else None


def block_tokens(run: Run) -> int:
    """Tokens in a block of the server's prefix cache: as it was started, else as vLLM has it."""
    found = re.search(r"--block-size[= ](\d+)", " ".join(run.manifest.engine_args))
    if found:
        return max(1, int(found[1]))
    return CPU_BLOCK_TOKENS if run.manifest.engine == "vllm-cpu" else BLOCK_TOKENS


def read_served(run: Run) -> Served:
    """What the servers' own counters and gauges say of their prefix caches."""
    replicas = run.manifest.replicas
    return Served(
        replicas=len(replicas),
        queried_tokens=_moved(run, QUERIES),
        hit_tokens=_moved(run, HITS),
        fullest=max((f for r in replicas if (f := _fullest(run, r.index)) is not None), default=None),
    )


def _moved(run: Run, counter: str) -> float | None:
    """How far a counter moved over all replicas; None when any of them does not have it."""
    total = 0.0
    for replica in run.manifest.replicas:
        before, after = replica.counters_before, replica.counters_after
        if before is None or after is None or counter not in after:
            return None
        total += after[counter] - before.get(counter, 0.0)
    return total if run.manifest.replicas else None


def _fullest(run: Run, replica: int) -> float | None:
    """Largest share of the KV cache that was in use, as sampled; None without a sample."""
    table = read_server_metrics(RunDir(run.path).server_metrics(replica))
    return None if table is None else pc.max(table.column("kv_cache_usage")).as_py()


def _floats(table: Any, name: str) -> Floats:
    """A column as floats, null as NaN."""
    return np.asarray(
        pc.fill_null(pc.cast(table.column(name), pa.float64()), float("nan")).to_numpy(), dtype=np.float64
    )
