"""Time of `harness plan-fleet` on a day: ``python tests/bench/fleet_speed.py [REQUESTS]`` prints it, and the answer.

Default: 100,000 requests of a day that swings by 70 %, 200 tokens in and 250 out on average, and four runs of the
laboratory's engine (`tests/lab/fleet.py`), in a temporary folder. The command is a process of its own, so what it
loads and how much memory it takes counts as it would for a user; what it says on the way is printed with its time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
DAY_S, SWING, OUTPUT = 86_400.0, 0.7, 250


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from harness.cluster.simulator.fleet import Workload
    from tests.lab.fleet import measured_runs

    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    rng = np.random.default_rng(1)
    grid = np.linspace(0, DAY_S, 20_001)
    phase = 2 * np.pi * grid / DAY_S
    arrival_s = np.sort(np.interp(rng.random(n), (grid - SWING * np.sin(phase) * DAY_S / (2 * np.pi)) / DAY_S, grid))
    inputs = np.maximum(1, np.rint(rng.lognormal(np.log(150), 0.8, n))).astype(np.int64)
    outputs = np.maximum(1, np.rint(rng.lognormal(np.log(OUTPUT) - 0.7**2 / 2, 0.7, n))).astype(np.int64)
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        trace, runs = Path(folder, "day.jsonl"), Path(folder, "runs")
        with trace.open("w") as out:
            for at_s, i, o in zip(arrival_s.tolist(), inputs.tolist(), outputs.tolist(), strict=True):
                out.write(json.dumps({"arrival_s": round(at_s, 6), "input_tokens": i, "output_tokens": o}) + "\n")
        measured_runs(runs, Workload(arrival_s=arrival_s, input_tokens=inputs, output_tokens=outputs), 1)
        began = time.monotonic()
        asked = [sys.executable, "-m", "harness", "plan-fleet", str(trace), str(runs), "--start", "120s"]
        with subprocess.Popen(
            asked, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as plan:  # fmt: skip
            assert plan.stderr is not None and plan.stdout is not None
            for line in plan.stderr:
                print(f"{time.monotonic() - began:6.1f} s  {line.rstrip()}", flush=True)
            said = plan.stdout.read()
        seconds = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(said)
        print(
            f"{n:,} requests: {seconds:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of processor, "
            f"{used.ru_maxrss / 1024:.0f} MB at most"
        )
        sys.exit(plan.returncode)


if __name__ == "__main__":
    main()
