"""The laboratory's workloads as traces, and its engine as a server: for `harness replay` and `capacity` in real time.

``python -m tests.lab.traces FOLDER`` writes a trace of each kind and prints what to run against the server
``python -m harness.cluster.engines.fake.server --step 20,1.5,0.02 --slots 8 --log FILE``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.cluster.simulator.fleet import Workload
from tests.lab.processes import LIMITS, PROCESSES, STEP, serve, sessions, workload

ROOT = Path(__file__).resolve().parents[2]
ENGINE = (
    "--step", f"{STEP.base_s * 1e3:g},{STEP.per_sequence_s * 1e3:g},{STEP.per_prompt_token_s * 1e3:g}",
    "--slots", str(LIMITS.max_num_seqs),
)  # fmt: skip
"""Arguments of `cluster.engines.fake.server` that make it the laboratory's engine."""


def write_trace(path: Path, load: Workload) -> Path:
    """JSON Lines as README.md describes them, one row a request, in order of arrival.

    Sessions (``load.after``) get the arrivals that the laboratory's engine would have recorded, their turns and the
    time from the previous answer.
    """
    arrival_s = load.arrival_s if load.after is None else serve(load).due_s
    session, turn = np.full(len(load), -1), np.zeros(len(load), dtype=np.int64)
    for k, before in enumerate([] if load.after is None else load.after.tolist()):
        session[k], turn[k] = (k, 0) if before < 0 else (session[before], turn[before] + 1)
    with path.open("w") as file:
        for k in np.argsort(arrival_s, kind="stable").tolist():
            row: dict[str, object] = {
                "arrival_s": round(float(arrival_s[k]), 6), "input_tokens": int(load.input_tokens[k]),
                "output_tokens": int(load.output_tokens[k]),
            }  # fmt: skip
            if session[k] >= 0:
                row |= {"session_id": f"s{session[k]}", "turn": int(turn[k])}
                if turn[k] and load.think_s is not None:
                    row["think_s"] = round(float(load.think_s[k]), 6)
            file.write(json.dumps(row) + "\n")
    return path


def write_all(folder: Path, requests: int, seed: int) -> dict[str, Path]:
    """A trace of each process and one of sessions, by name."""
    loads = {**{process: workload(process, requests, seed) for process in PROCESSES}}
    loads["sessions"] = sessions(requests, seed)
    return {name: write_trace(folder / f"{name}.jsonl", load) for name, load in loads.items()}


@contextmanager
def engine_server(log: Path) -> Iterator[str]:
    """The laboratory's engine as a server in real time; its URL. ``log``: its own account of every answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.cluster.engines.fake.server", "--log", str(log), *ENGINE],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready, _, url = process.stdout.readline().strip().partition(" ")
        if ready != "ready":
            raise RuntimeError(f"the server did not start (exit {process.poll()})")
        yield url
    finally:
        process.kill()
        process.wait(120)


def main(folder: Path) -> None:
    """Write the traces and say what to run."""
    folder.mkdir(parents=True, exist_ok=True)
    print("python -m harness.cluster.engines.fake.server --port 8123", *ENGINE)
    for name, path in write_all(folder, 2000, 15).items():
        more = " --sessions wait" if name == "sessions" else ""
        print(f"harness capacity {path} --base-url http://127.0.0.1:8123/v1 --slo ttft_p95=500ms{more}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
