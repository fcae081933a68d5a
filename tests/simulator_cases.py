"""Workloads whose outcomes on the simulator were recorded: ``python -m tests.simulator_cases`` prints their digests.

Drawn from whole numbers alone, and served by `LinearStep`, so that every float is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from harness.cluster.simulator.fleet import Outcomes, Router, Workload, simulate
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import LinearStep

RECORDED = Path(__file__).parent / "simulator_outcomes.json"
STEP = LinearStep(base_s=0.020, per_sequence_s=0.0015, per_prompt_token_s=0.00002, per_context_token_s=0.0000001)


def outcomes(case: int) -> Outcomes:
    """What becomes of 120 requests: arrivals, sessions or a closed loop on 1 to 3 replicas, with or without a bound."""
    rng = np.random.default_rng([case, 4])
    n = 120
    load = Workload(
        arrival_s=np.cumsum(rng.integers(0, 120, n) * rng.integers(0, 2, n)) / 1000,
        input_tokens=rng.integers(0, 500, n), output_tokens=rng.integers(1, 40, n),
        after=np.where(rng.integers(0, 2, n) == 1, np.arange(n) - 1, -1) if case % 3 == 1 else None,
        think_s=rng.integers(0, 300, n) / 1000 if case % 3 == 1 else None,
    )  # fmt: skip
    slots = int(rng.integers(1, 10))
    budget = None if case % 2 else int(rng.integers(slots, 256))
    router: Router = "least in flight" if case % 5 == 0 else "round robin"
    limits = Limits(max_num_seqs=slots, max_num_batched_tokens=budget)
    return simulate(
        load, limits, [STEP] * int(rng.integers(1, 4)), router=router,
        concurrency=int(rng.integers(1, 20)) if case % 3 == 2 else None, until_s=2.5 if case % 7 == 0 else float("inf"),
    )  # fmt: skip


def digest(found: Outcomes) -> str:
    """Of every number of it."""
    sha = hashlib.sha256()
    for array in (found.due_s, found.first_token_s, found.finished_s, found.replica, found.first_step):
        sha.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    for ends in found.step_end_s:
        sha.update(np.asarray(ends).astype("<f8").tobytes())
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps([digest(outcomes(case)) for case in range(60)], indent=0))
