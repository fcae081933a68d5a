"""What starting and watching servers costs: ``python tests/bench/supervise.py [--replicas 64] [--seconds 30]``.

``--repeat 3`` measures either so many times; ``--only overhead`` or ``--only supervision`` leaves the other out. Two
figures, with the known-truth server in place of an engine:

- overhead: from the command line to the common start of the load, less the server's own start-up (cold, Ray included);
- supervision: processor time per second of everything but the servers and the load (driver, Ray, actors, guards) while
  N replicas are watched as a run watches them: health, deaths, logs, and each second every server's metrics and the
  host's counters. Idle Ray actors were most of it when every replica had its own (each wakes a hundred times a
  second); now those of one host share one, and most of the rest is asking 64 servers for their metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def measure_overhead(folder: Path) -> dict[str, float]:
    """Seconds from the command line to the start of the load."""
    trace = folder / "trace.jsonl"
    lines = [{"arrival_s": i / 10, "input_tokens": 20, "output_tokens": 10} for i in range(20)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"PYTHONPATH": f"{ROOT}/tests:{ROOT}", "HARNESS_CACHE": str(folder / "cache")}
    out = folder / "runs"
    before = time.time()
    subprocess.run(
        [sys.executable, "-m", "hosts.driver", "replay", str(trace), "--out", str(out), "--workers", "1"],
        cwd=ROOT, env=env, check=False, capture_output=True, timeout=180,
    )  # fmt: skip
    (run,) = out.iterdir()
    manifest = json.loads((run / "run.json").read_text())
    total = manifest["start_unix_ns"] / 1e9 - before
    server = max(replica["ready_s"] for replica in manifest["replicas"])
    return {"to_load_s": round(total, 2), "server_s": round(server, 2), "overhead_s": round(total - server, 2)}


def supervisors(replicas: int) -> dict[int, tuple[str, psutil.Process]]:
    """Every process below this one but the servers, with what it is."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "harness.cluster.engines.fake.server" in words and not any("guard.py" in word for word in words):
            continue
        found[process.pid] = (process.name(), process)
    return found


def cpu_s(process: psutil.Process) -> float:
    """Processor time it has used, s."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def measure_supervision(folder: Path, replicas: int, seconds: float) -> dict[str, object]:
    """Share of one core that watching takes."""
    from hosts.driver import ENGINE

    from harness.cluster.catalogue.models import get_model
    from harness.cluster.catalogue.tiers import get_tier
    from harness.cluster.deploy.deployment import Deployment
    from harness.record.manifest import create_run_dir
    from harness.record.samples import ServerMetrics, read_server_metrics
    from harness.server.access import page_beside

    run = create_run_dir(folder, "supervise")
    began = time.monotonic()
    with Deployment(
        model=get_model("smollm2-135m"), weights=folder, tier=get_tier("aws-m7a.large"), replicas=replicas,
        run_dir=run.path, api_key="key", engine=ENGINE,
    ) as deployment, ExitStack() as stack:  # fmt: skip
        up_s = time.monotonic() - began
        start = time.time_ns()
        stack.enter_context(deployment.sample_hosts(run, start))
        for replica in deployment.replicas:
            file = run.server_metrics(replica.index)
            stack.enter_context(ServerMetrics([(page_beside(replica.base_url, "/metrics"), "key")], file, start))
        time.sleep(5)
        watched = supervisors(replicas)
        before = {pid: cpu_s(process) for pid, (_, process) in watched.items()}
        asked, since = 0.0, time.monotonic()
        while time.monotonic() - since < seconds:
            at = time.monotonic()
            if died := deployment.check():
                raise SystemExit(f"servers died, so this measures nothing: {died}")
            asked = max(asked, time.monotonic() - at)
            time.sleep(2)
        elapsed = time.monotonic() - since
        shares: dict[str, float] = {}
        for pid, (name, process) in watched.items():
            shares[name] = shares.get(name, 0.0) + (cpu_s(process) - before[pid]) / elapsed
    samples = [read_server_metrics(run.server_metrics(replica.index)) for replica in deployment.replicas]
    return {
        "replicas": replicas, "all_ready_s": round(up_s, 1), "core_share": round(sum(shares.values()), 3),
        "longest_check_s": round(asked, 3),
        "fewest_samples_per_s": round(min(len(rows) if rows else 0 for rows in samples) / (elapsed + 5), 2),
        "by_process": {name: round(share, 3) for name, share in sorted(shares.items(), key=lambda x: -x[1])[:6]},
    }  # fmt: skip


def main() -> None:
    """Print both as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=("overhead", "supervision"))
    options = parser.parse_args()
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
            if options.only != "supervision":
                (Path(folder) / "a").mkdir()
                print(json.dumps({"overhead": measure_overhead(Path(folder) / "a")}), flush=True)
            if options.only != "overhead":
                found = measure_supervision(Path(folder), options.replicas, options.seconds)
                print(json.dumps({"supervision": found}), flush=True)


if __name__ == "__main__":
    main()
