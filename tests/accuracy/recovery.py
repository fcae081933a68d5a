"""Whether `harness.cluster.hardware.fit` finds numbers that are known: ``python -m tests.accuracy.recovery``.

Closed loops of an engine whose steps are noisy (5 % each) around a known linear step, of lengths that differ from seed
to seed. Of every number the error over its standard error; 95 of 100 should be within 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.cluster.hardware.calibrating import linear_numbers
from harness.cluster.hardware.calibration import with_numbers
from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.hardware.fit import Load, fit, serve
from harness.cluster.simulator.limits import Limits
from harness.cluster.simulator.step_time import NoisyStep

TRUTH = {
    "base_s": 0.018, "per_sequence_s": 2e-3, "per_prompt_token_s": 4e-4, "per_context_token_s": 1e-6, "arrival_s": 8e-3
}  # fmt: skip
LIMITS = Limits(max_num_seqs=128, max_num_batched_tokens=2048, kv_blocks=4000, block_size=128)
SPREAD = 0.05


def engine(numbers: Mapping[str, float]) -> HardwareEngine:
    """A CPU's, with these numbers."""
    bare = HardwareEngine(step_time=lambda *_: 1.0, limits=LIMITS, source="fitted", chip="CPU", tensor_parallel=0)
    return with_numbers(bare, "linear", numbers)


def measured(slots: int, requests: int, seed: int, truth: HardwareEngine, spread: float = SPREAD) -> Load:
    """A closed loop on the engine of the truth."""
    draw, nothing = np.random.default_rng((seed, slots)), np.zeros(requests)
    inputs = np.clip(draw.lognormal(np.log(300), 0.8, requests), 10, 1500).astype(np.int64)
    outputs = np.clip(draw.lognormal(np.log(60), 0.6, requests), 2, 300).astype(np.int64)
    load = Load(
        name=f"seed {seed}, {slots} in flight", sent_s=nothing, input_tokens=inputs, output_tokens=outputs,
        concurrency=slots, ttft_s=nothing, decode_s=nothing, finished_s=nothing,
    )  # fmt: skip
    found = serve(load, replace(truth, step_time=NoisyStep(truth.step_time, spread, 1000 * seed + slots)))
    return replace(
        load, sent_s=found.due_s, ttft_s=found.ttft_s, decode_s=found.decode_s, finished_s=found.finished_s
    )  # fmt: skip


def misses(seed: int, loads: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Of each number that is told its error over its standard error; ``loads``: slots and requests of each."""
    truth = engine(TRUTH)
    drawn = [measured(slots, requests, seed, truth) for slots, requests in loads]
    found = fit(drawn, engine, linear_numbers(drawn))
    return {name: float(np.log(found.values[name] / TRUTH[name])) / found.errors[name] for name in found.errors}


LOADS = (((1, 60), (4, 80)), ((1, 60), (16, 200)), ((1, 60), (4, 80), (8, 120)))
"""Slots and requests of each load of one fit."""
FOUND = Path(__file__).with_name("recovery.json")


def main(seeds: int) -> None:
    """Write how often each number was found."""
    lines = []
    for loads in LOADS:
        found = [misses(seed, loads) for seed in range(seeds)]
        for name in TRUTH:
            mine = np.array([one[name] for one in found if name in one])
            lines.append({
                "loads": [slots for slots, _ in loads], "number": name, "seeds": seeds, "told": len(mine),
                "within_2": round(float(np.mean(np.abs(mine) < 2)), 3), "mean": round(float(mine.mean()), 2),
                "spread": round(float(mine.std()), 2),
            })  # fmt: skip
            print(lines[-1])
    FOUND.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
