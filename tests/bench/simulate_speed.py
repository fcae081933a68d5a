"""How fast requests are simulated and their rows written: ``python -m tests.bench.simulate_speed [--requests N]``.

Requests of 1,000 input and 200 output tokens come at random to one replica with vLLM's own limits on an H100: as many
as it can serve, and as many as make a million in a day. Times are those of the processor, on one core, so that other
work on the machine weighs little. It prints one line of JSON for each rate.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import simulated_engine
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.step_time import LinearStep
from harness.record.simulated import SimulatedRows, write_rows

STEP = LinearStep(0.006, 0.00005, 0.00002, 2e-8)
DAY_RATE = 1e6 / 86_400


def measure(n: int, rate: float, step: LinearStep | None, folder: Path) -> dict[str, float]:
    """Processor seconds of serving ``n`` requests that come at ``rate``, and of writing their rows."""
    rng = np.random.default_rng(1)
    load = Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate, n)), input_tokens=np.full(n, 1000), output_tokens=np.full(n, 200)
    )  # fmt: skip
    engine = simulated_engine(get_model("llama-3.1-8b-instruct"), get_tier("aws-p5.4xlarge"), step)
    began = time.process_time()
    found = simulate(load, engine.limits, [engine.step_time], sample_s=1.0)
    served = time.process_time()
    rows = SimulatedRows(
        request_id=np.arange(n), due_ns=np.rint(found.due_s * 1e9).astype(np.int64), replica=found.replica,
        first_step=found.first_step, input_tokens=load.input_tokens, output_tokens=load.output_tokens,
        cached_tokens=None, step_end_ns=[np.rint(ends * 1e9).astype(np.int64) for ends in found.step_end_s],
        resumed=found.resumed,
    )  # fmt: skip
    write_rows(folder / "rows.arrows", rows)
    written = time.process_time()
    return {
        "requests": n, "rate": rate, "steps_per_request": round(len(found.step_end_s[0]) / n, 2),
        "serve_s": round(served - began, 1), "write_s": round(written - served, 1),
        "requests_per_minute": round(n / (written - began) * 60),
        "file_mb": round((folder / "rows.arrows").stat().st_size / 1e6),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }  # fmt: skip


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, action="append", help="req/s; default: 30, and a million a day")
    parser.add_argument("--known", action="store_true", help="step times that are known of the chip, not linear ones")
    asked = parser.parse_args()
    for rate in asked.rate or (30.0, DAY_RATE):
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(asked.requests, rate, None if asked.known else STEP, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
