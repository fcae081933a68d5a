"""The simulator's scheduler against vLLM's own, step by step, on random workloads (`tests.vllm_oracle`)."""

from __future__ import annotations

import json
import subprocess
import sys

from harness.cluster.simulator.scheduler import VLLM
from tests.lab.table import Row


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """How many workloads are identical; one process, since importing vLLM takes longer than 50 of them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_oracle", "--draws", str(draws), "--seed", str(1000 * seed)],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        Row(
            item="13", claim="the simulator schedules as vLLM does, with and without asynchronous scheduling",
            truth=f"vLLM {found['vllm']}'s own Scheduler and AsyncScheduler on the same requests, every step of them",
            claimed=f"{found['identical']} of {found['workloads']} workloads identical in every step and token time "
            f"({found['asynchronous']} asynchronous; {found['with preemptions']} with preemptions, "
            f"{found['with prefix hits']} with prefix hits, {found['with both']} with both; {found['steps']:,} steps)",
            draws=draws,
            holds=found["identical"] == found["workloads"]
            and not found["limits that differ"]
            and found["vllm"] == VLLM,
        )
    ]  # fmt: skip
