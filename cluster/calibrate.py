"""What one load worker on this machine can carry: it is driven against the known-truth server and compared with it.

Five questions, about a minute: how many requests a second, how many streamed events a second, whether reading in
batches saves CPU at a moderate rate, how late it sends at 500 requests/s, and how far its TTFT and ITL are from the
truth at half of its ceiling. Streams are paced (a token each 10 ms, as a server makes them): a server that writes as
fast as it can flatters a client, whose reads then hold many events. Where there are two cores or more, the worker has
the first one and the servers the others.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from harness.calibration import Calibration
from harness.cluster.deploy.load_workers import Launch, LoadWorkers, start_here
from harness.cluster.process.process import Process, wait_ready
from harness.errors import ServerError, WorkerError
from harness.plan.build import build_plan
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.record.host import describe_host, installed_versions
from harness.record.manifest import RunDir, now_utc
from harness.record.results import read_results
from harness.record.run_spec import BATCH_READS_FROM, RunSpec
from harness.record.samples import read_observations
from harness.trace.io import open_trace

Floats = npt.NDArray[np.float64]

TTFT_S, ITL_S = 0.02, 0.01
INPUT_TOKENS = 32
START_S = 30.0
STEP_S = 60.0
"""No step takes longer than this, however slow the machine."""
FIRST_STREAMS, STREAM_TOKENS = 300, 350
STEPS = 4
KEPT = 1.05
"""A stream was kept up with when it took at most this much longer than the server's own schedule."""
FULL = 0.85
"""A process that uses this much of a core is the limit."""
LAG_RATE = 500.0
MODERATE_STREAMS, MODERATE_TOKENS = 200, 150
"""A rate at which it depends on the machine whether to read in batches: 50 events per interval of 2.5 ms."""
BATCH_READS_LATE, NEVER = 80, 10**9
"""Events per read interval from which reads are batched where that costs CPU at a moderate rate; or never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStep:
    """One load on the fake server, as both sides saw it; arrays in s."""

    requests: int
    failed: int
    took_s: float
    """From the first send to the last end."""
    lag_s: Floats
    ttft_s: Floats
    itl_s: Floats
    duration_s: Floats
    """From sent to the last chunk, of each request."""
    true_ttft_s: Floats
    true_itl_s: Floats
    true_duration_s: Floats
    events_per_s: float
    """Events with output that arrived at the client, median over quarter seconds of the run's middle half."""
    cpu_share: float
    """Of the worker: its busiest second."""
    loop_lag_s: float
    """Of the worker: 99th percentile in its worst second."""
    cpu_s: float
    """Of the worker, whole run."""
    server_share: float
    """Of the busiest server process, mean over the run."""

    @property
    def events(self) -> int:
        """Chunks with output that the client received."""
        return len(self.ttft_s) + len(self.itl_s)


class Bench:
    """Known-truth servers and a folder, for as long as the calibration lasts."""

    def __init__(self, folder: Path, servers: int) -> None:
        self._folder = folder
        self._servers = servers
        self._steps = 0
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        # Left alone the kernel puts two processes that wake each other on one core.
        self._worker_cpus: list[int] | None = cores[:1] if len(cores) > 1 else None
        self._server_cpus: list[int] | None = cores[1:] if len(cores) > 1 else None

    def step(
        self, arrivals_s: Floats | None, *, requests: int, tokens: int, itl_s: float = ITL_S, ttft_s: float = TTFT_S,
        concurrency: int | None = None, duration_s: float | None = None, batch_reads_from: int = BATCH_READS_FROM,
    ) -> LoadStep:  # fmt: skip
        """Send ``requests`` of ``tokens`` output tokens, at ``arrivals_s`` or ``concurrency`` at a time.

        Raises `ServerError` or `WorkerError` when either side does not do its part.
        """
        self._steps += 1
        run = RunDir(self._folder / f"step-{self._steps}")
        run.path.mkdir()
        _write_plan(run, arrivals_s, requests, tokens)
        logs = [run.path / f"truth-{i}.jsonl" for i in range(self._servers)]
        servers: list[Process] = []
        try:
            servers += [_start_server(run, log, ttft_s, itl_s, self._server_cpus) for log in logs]
            urls = [_url(server) for server in servers]
            spec = RunSpec(
                mode="open" if concurrency is None else "closed", concurrency=concurrency, duration_s=duration_s,
                drain_s=10.0, timeout_s=STEP_S, stall_s=STEP_S, model="fake", base_urls=urls,
                batch_reads_from=batch_reads_from,
            )  # fmt: skip
            launch: Launch = partial(start_here, cpus=self._worker_cpus)
            with LoadWorkers(spec, run, api_key=None, launch=launch) as load:
                load.start()
                began, cpu_s = time.monotonic(), [_cpu_s(server) for server in servers]
                while not load.done:
                    load.poll(0.5)
                    if time.monotonic() - began > STEP_S:
                        load.stop(at_once=True)
                worker = load.workers[0]
            if worker.exit is not None:
                raise WorkerError(f"calibration: the load worker ended with: {worker.exit}")
            spent = [_cpu_s(server) - before for server, before in zip(servers, cpu_s, strict=True)]
        finally:
            for server in servers:
                server.stop(2.0)
        return _read(run, logs, max(spent))


def _write_plan(run: RunDir, arrivals_s: Floats | None, requests: int, tokens: int) -> None:
    trace = run.path / "trace.jsonl"
    row = {"input_tokens": INPUT_TOKENS, "output_tokens": tokens}
    times = np.zeros(requests) if arrivals_s is None else arrivals_s
    trace.write_text("".join(json.dumps({"arrival_s": round(float(at), 6), **row}) + "\n" for at in times))
    words = Vocabulary.from_ids(range(1000, 1200), name="calibration")
    build_plan(open_trace(trace), run.plan, PlanSpec(closed=arrivals_s is None), words)


def _start_server(run: RunDir, log: Path, ttft_s: float, itl_s: float, cpus: list[int] | None) -> Process:
    # 150 bytes more than the shortest event: about as long as what vLLM sends for a token
    argv = [sys.executable, "-m", "harness.cluster.engines.fake.server", "--ttft", str(ttft_s), "--itl", str(itl_s)]
    return Process.start(
        [*argv, "--pad", "150", "--log", str(log)], name="known-truth server",
        log=run.path / f"{log.stem}.log", pipes=True, cpus=cpus,
    )  # fmt: skip


def _url(server: Process) -> str:
    found: list[str] = []

    def ready() -> bool:
        found.extend(line.partition(" ")[2] for line in server.lines() if line.startswith("ready "))
        return bool(found)

    wait_ready(ready, server, START_S, poll_s=0.05)
    return found[0]


def _cpu_s(server: Process) -> float:
    try:
        times = psutil.Process(server.pid).cpu_times()
    except psutil.Error as e:
        raise ServerError(f"calibration: the known-truth server is gone ({e})", server.tail()) from e
    return float(times.user + times.system)


def _read(run: RunDir, logs: list[Path], server_cpu_s: float) -> LoadStep:
    rows = read_results(run.results(0))
    sent = rows.column("sent_ns").drop_null().to_numpy()
    finished = rows.column("finished_ns").drop_null().to_numpy()
    if not len(sent):
        raise WorkerError("calibration: nothing was sent")
    good = rows.filter(rows.column("error").is_null()).to_pydict()
    gaps = [np.array(row, dtype=np.float64) / 1e9 for row in good["chunk_gap_ns"]]
    truth = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    stamps = [np.array(row["chunk_ns"], dtype=np.float64) for row in truth if row["chunk_ns"]]
    received = np.array([row["received_ns"] for row in truth if row["chunk_ns"]], dtype=np.float64)
    seen = read_observations(run.observations(0))
    lengths = np.diff(seen.column("t_ns").to_numpy(), prepend=0) / 1e9
    shares, lags = (seen.column(name).to_numpy(zero_copy_only=False) for name in ("cpu_share", "loop_lag_p99_ns"))
    whole = lengths > 0.5
    took_s = float(finished.max() - sent.min()) / 1e9
    tried = rows.filter(rows.column("sent_ns").is_valid())
    lag = (tried.column("sent_ns").to_numpy() - tried.column("scheduled_ns").to_numpy()) / 1e9
    return LoadStep(
        requests=len(gaps),
        failed=len(sent) - len(gaps),
        took_s=took_s,
        lag_s=lag,
        ttft_s=np.array([g[0] for g in gaps if len(g)]),
        itl_s=np.concatenate([np.zeros(0), *(g[1:] for g in gaps)]),
        duration_s=np.array([g.sum() for g in gaps]),
        true_ttft_s=np.array([s[0] for s in stamps]) / 1e9 - received / 1e9 if len(stamps) else np.zeros(0),
        true_itl_s=np.concatenate([np.zeros(0), *(np.diff(s) / 1e9 for s in stamps)]),
        true_duration_s=(np.array([s[-1] for s in stamps]) - received) / 1e9 if len(stamps) else np.zeros(0),
        events_per_s=_plateau(good["sent_ns"], gaps),
        cpu_share=float(shares[whole].max()) if whole.any() else float(shares.max(initial=0.0)),
        loop_lag_s=float(np.nanmax(lags[whole].astype(np.float64))) / 1e9 if whole.any() else 0.0,
        cpu_s=float((shares * lengths).sum()),
        server_share=server_cpu_s / max(took_s, 1e-9),
    )


def _plateau(sent_ns: list[int], gaps: list[Floats]) -> float:
    if not gaps:
        return 0.0
    stamps = np.concatenate([sent / 1e9 + np.cumsum(g) for sent, g in zip(sent_ns, gaps, strict=True)])
    edges = np.arange(stamps.min(), stamps.max(), 0.25)
    if len(edges) < 9:
        return len(stamps) / max(float(np.ptp(stamps)), 1e-9)
    counts = np.histogram(stamps, bins=edges)[0]
    return float(np.median(counts[len(counts) // 4 : -(len(counts) // 4)])) / 0.25


def kept_up(step: LoadStep) -> bool:
    """The client took every stream at its pace: none drawn out, and stamps no later than a gap is long."""
    if step.failed or not step.requests:
        return False
    nominal_s = TTFT_S + (STREAM_TOKENS - 1) * ITL_S
    return bool(np.quantile(step.duration_s, 0.95) <= KEPT * nominal_s) and step.loop_lag_s <= ITL_S


def server_was_the_limit(step: LoadStep) -> bool:
    """The known-truth server fell behind its own schedule, or had no processor left while the worker had."""
    nominal_s = TTFT_S + (STREAM_TOKENS - 1) * ITL_S
    behind = not len(step.true_duration_s) or bool(np.quantile(step.true_duration_s, 0.95) > KEPT * nominal_s)
    return behind or (step.server_share >= FULL and step.cpu_share < FULL)


def find_ceiling(
    drive: Callable[[int], LoadStep], say: Callable[[str], None], steps: int = STEPS
) -> tuple[LoadStep, bool]:
    """The most streams that the worker kept up with, in at most ``steps`` tries, and whether it may carry more.

    "At least" unless a try failed by the worker's own fault or took all of its core.
    Raises `WorkerError` when it kept up with none.
    """
    best: LoadStep | None = None
    low, high, streams, at_least = 0, 0, FIRST_STREAMS, True
    for _ in range(steps):
        step = drive(streams)
        kept = kept_up(step)
        limit = "" if kept else " by the server" if server_was_the_limit(step) else " by the worker"
        say(
            f"  {streams} streams: {step.events_per_s:,.0f} events/s, worker {step.cpu_share:.0%} of a core, server "
            f"{step.server_share:.0%}, stamps {step.loop_lag_s * 1e3:.1f} ms late: "
            + ("kept up" if kept else f"not kept up{limit}")
        )
        if kept:
            low, best = streams, step
            grow = min(2.5, max(1.15, 0.92 / max(step.cpu_share, 0.1)))
            streams = (low + high) // 2 if high else int(streams * grow)
        else:
            high = streams
            at_least &= server_was_the_limit(step)
            streams = (low + high) // 2
        if high and high - low < 0.1 * high:
            break
    if best is None:
        raise WorkerError(f"calibration: a load worker did not keep up with {streams} streams; is this machine busy?")
    return best, at_least and best.cpu_share < 0.9


def find_batch_threshold(drive: Callable[[int], LoadStep], say: Callable[[str], None]) -> int:
    """Events per read interval from which reads are batched here. ``drive`` runs a moderate load with a threshold.

    Both ways are measured twice, in turns: other work on the machine only ever adds, so the least of each counts.
    """
    found: dict[int, list[float]] = {BATCH_READS_FROM: [], NEVER: []}
    for threshold in (BATCH_READS_FROM, NEVER, NEVER, BATCH_READS_FROM):
        found[threshold].append(_cpu_us_per_event(drive(threshold)))
    batched, at_once = min(found[BATCH_READS_FROM]), min(found[NEVER])
    say(f"  CPU per event: {batched:.1f} us in batches, {at_once:.1f} us as bytes arrive")
    return BATCH_READS_FROM if batched <= at_once else BATCH_READS_LATE


def poisson(rate: float, duration_s: float, seed: int) -> Floats:
    """Arrival times of a Poisson process of ``rate`` per second, s, from 0 to ``duration_s``."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * duration_s * 2) + 10)
    times: Floats = np.cumsum(gaps)
    return times[times < duration_s]


def calibrate(say: Callable[[str], None], *, hot_path: str, seed: int = 0) -> Calibration:
    """Measure this machine, whose load workers read by this ``hot_path``.

    Raises `ServerError` or `WorkerError` when it cannot be measured.
    """
    began = time.monotonic()
    host = describe_host()
    with tempfile.TemporaryDirectory(prefix="harness-calibrate-") as folder:
        bench = Bench(Path(folder), servers=max(1, min(4, host.cores - 1)))
        say("requests a second: closed loop, 4-token answers")
        small = bench.step(None, requests=100_000, tokens=4, ttft_s=0.0, itl_s=0.0, concurrency=64, duration_s=4.0)
        say("events a second: paced streams, more of them each time")
        best, at_least = find_ceiling(lambda n: bench.step(_spread(n), requests=n, tokens=STREAM_TOKENS), say)
        ceiling = best.events_per_s
        say("reads: in batches or as bytes arrive")
        batch_reads_from = find_batch_threshold(partial(_moderate, bench), say)
        say(f"lag: Poisson arrivals at {LAG_RATE:g} requests/s")
        arrivals = poisson(LAG_RATE, 5.0, seed)
        late = bench.step(arrivals, requests=len(arrivals), tokens=16, itl_s=0.005)
        rate = ceiling / 2 / 128
        say(f"timing against the truth: {ceiling / 2:,.0f} events/s")
        arrivals = poisson(rate, 6.0, seed + 1)
        half = bench.step(arrivals, requests=len(arrivals), tokens=128)
    notes = []
    for name, step in (("requests", small), ("events", best), ("lag", late), ("timing", half)):
        if step.failed:
            notes.append(f"{name}: {step.failed} of {step.requests + step.failed} requests failed")
    if host.cores < 2:
        notes.append("one core for the worker and the server together: a worker alone carries more")
    return Calibration(
        created=now_utc(), host=host, versions=installed_versions() | {"hot path": hot_path},
        events_per_s=ceiling, events_at_least=at_least, events_cpu_share=best.cpu_share,
        requests_per_s=small.requests / small.took_s, requests_at_least=small.cpu_share < FULL,
        lag_p50_s=_quantile(late.lag_s, 0.5), lag_p99_s=_quantile(late.lag_s, 0.99),
        timing_events_per_s=half.events_per_s,
        ttft_error_p50_s=_error(half.ttft_s, half.true_ttft_s, 0.5),
        ttft_error_p99_s=_error(half.ttft_s, half.true_ttft_s, 0.99),
        itl_error_p50_s=_error(half.itl_s, half.true_itl_s, 0.5),
        itl_error_p99_s=_error(half.itl_s, half.true_itl_s, 0.99),
        cpu_us_per_event=_cpu_us_per_event(half), batch_reads_from=batch_reads_from,
        took_s=round(time.monotonic() - began, 1), notes=notes,
    )  # fmt: skip


def _moderate(bench: Bench, batch_reads_from: int) -> LoadStep:
    arrivals = _spread(MODERATE_STREAMS)
    return bench.step(arrivals, requests=len(arrivals), tokens=MODERATE_TOKENS, batch_reads_from=batch_reads_from)


def _cpu_us_per_event(step: LoadStep) -> float:
    return step.cpu_s / max(step.events, 1) * 1e6


def _spread(streams: int) -> Floats:
    """Arrivals in the first second, evenly but out of step with the tokens' rhythm, so that streams are, too."""
    times: Floats = np.arange(streams) / streams
    return times


def _quantile(values: Floats, p: float) -> float:
    return float(np.quantile(values, p)) if len(values) else math.nan


def _error(ours: Floats, truth: Floats, p: float) -> float:
    return _quantile(ours, p) - _quantile(truth, p)
