"""One measurement: a client works against the fast server while a meter watches both; figures come from the server.

What a client says of itself is used only where that is the question (its TTFT and ITL). How much it carried, how long
its streams took and when its requests came is what the server saw; CPU and memory are those of its whole process tree.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
METER_S = 0.2
KEPT_UP = 0.95

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cores:
    """Which processors the client and the server may use: never the same ones, if there are two."""

    client: frozenset[int]
    server: frozenset[int]

    @classmethod
    def split(cls) -> Cores:
        """One core for the client, the others for the server."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(frozenset(usable[:1]), frozenset(usable[1:] or usable))


@dataclass(frozen=True, slots=True)
class Truth:
    """What the server saw since its mark, all processes together."""

    events: int
    requests: int
    finished: int
    dropped: int
    """Streams whose client went away before the end."""
    arrival_ns: Ints
    ttft_ns: Ints
    itl_ns: Ints
    stretch: npt.NDArray[np.float64]
    """Duration of each finished stream over its nominal one."""
    late_ns: Ints
    series: list[Ints]
    """Of each process: rows of time, CPU ns, events, requests, open streams."""

    def at(self, column: int, times_ns: Ints) -> npt.NDArray[np.float64]:
        """A column of the series (1 CPU, 2 events, 3 requests, 4 open streams) at these times, over all processes."""
        columns = [np.interp(times_ns, rows[:, 0], rows[:, column]) for rows in self.series if len(rows)]
        return np.asarray(np.sum(columns, axis=0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Work:
    """What a client is asked to do: ``streams`` in flight (closed loop), or ``rate`` requests/s (open loop)."""

    url: str
    requests: int
    streams: int | None = None
    rate: float | None = None
    poisson: bool = True
    """Open loop: Poisson arrivals; else evenly spaced."""
    input_tokens: int = 128
    output_tokens: int = 128
    seed: int = 1


class FastServer:
    """`fast_server.py` processes on one port, pinned to the server's cores; they end with us, however we end."""

    def __init__(self, cores: Cores, *, ttft_s: float = 0.02, itl_s: float = 0.01, processes: int = 1) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        port = "0"
        for _ in range(processes):
            process = subprocess.Popen(
                [sys.executable, HERE / "fast_server.py", f"--port={port}", f"--ttft={ttft_s}", f"--itl={itl_s}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            self.processes.append(process)
            os.sched_setaffinity(process.pid, cores.server)
            port = self._line(process).split()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.ttft_s, self.itl_s = ttft_s, itl_s

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], 30)[0]:
            raise TimeoutError("the fast server did not answer in 30 s")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the fast server died: see its words above")
        return line

    def tell(self, command: str) -> list[dict[str, int]]:
        """Give every process a command; their answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(command.replace("{pid}", str(process.pid)) + "\n")
            process.stdin.flush()
        return [json.loads(self._line(process)) for process in self.processes]

    def pace(self, ttft_s: float, itl_s: float) -> None:
        """New times, once no stream is open."""
        self.tell(f"pace {ttft_s} {itl_s}")
        self.ttft_s, self.itl_s = ttft_s, itl_s

    def mark(self, work: Work) -> None:
        """Forget what was seen; get the streams of a closed loop out of step."""
        share = (work.streams or 0) // len(self.processes)
        self.tell(f"mark {share} {self.answer_s(work)}" if share and self.itl_s else "mark")

    def answer_s(self, work: Work) -> float:
        """How long an answer takes."""
        return self.ttft_s + (work.output_tokens - 1) * self.itl_s

    def wait_closed(self, limit_s: float = 10.0) -> None:
        """Wait until the streams of a client that is gone were dropped."""
        deadline = time.monotonic() + limit_s
        while sum(one["open"] for one in self.tell("count")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"streams still open after {limit_s:g} s")
            time.sleep(0.05)

    def truth(self) -> Truth:
        """What was seen since the mark."""
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name) / str(process.pid) for process in self.processes]
            for folder in folders:
                folder.mkdir()
            said = self.tell(f"report {name}/{{pid}}")
            arrays = [{file.name: np.fromfile(file, dtype=np.int64) for file in folder.iterdir()} for folder in folders]
        total = {key: sum(one[key] for one in said) for key in ("events", "requests", "finished", "dropped")}
        joined = {key: np.concatenate([one[key] for one in arrays]) for key in arrays[0]}
        return Truth(
            **total,
            arrival_ns=np.sort(joined["arrival_ns"]),
            ttft_ns=joined["ttft_ns"],
            itl_ns=joined["itl_ns"],
            stretch=joined["duration_ns"] / joined["nominal_ns"],
            late_ns=joined["late_ns"],
            series=[one["series"].reshape(-1, 5) for one in arrays],
        )

    def close(self) -> None:
        """End every process."""
        for process in self.processes:
            process.kill()
            process.wait(10)


@dataclass(frozen=True, slots=True)
class Said:
    """What a client says of its run; null where it does not say."""

    requests: int | None = None
    failed: int | None = None
    ttft_ms: tuple[float, float] | None = None
    """p50 and p99, counted from the moment of sending."""
    itl_ms: tuple[float, float] | None = None
    lag_p99_ms: float | None = None
    detail: dict[str, float] = field(default_factory=dict)


class Client(Protocol):
    """One load generator."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot run here; null when it can."""

    def prepare(self, work: Work, folder: Path) -> None:
        """Write what it needs; not part of what is measured."""

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it; its words go to files in ``folder``."""

    def read(self, work: Work, folder: Path) -> Said:
        """What it says of its run, once it has ended."""


class Meter(threading.Thread):
    """Samples CPU seconds, resident memory and processes of some process trees, and how busy their cores are."""

    def __init__(self, roots: Sequence[int], cores: frozenset[int]) -> None:
        super().__init__(daemon=True)
        self.roots, self.cores = roots, cores
        self.rows: list[tuple[float, ...]] = []  # time_ns, cpu_s, rss, processes, busy_s of the cores
        self._over = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._over.wait(METER_S):
            self.rows.append(self._sample())

    def stop(self) -> None:
        """Take no more samples."""
        self._over.set()
        self.join(10)

    def _sample(self) -> tuple[float, ...]:
        cpu = rss = count = 0.0
        for root in self.roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(root)
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        cpu += sum(process.cpu_times()[:4])  # its own and those of children it waited for
                        rss += process.memory_info().rss
                        count += 1
        per_core = psutil.cpu_times(percpu=True)
        busy = sum(sum(per_core[core]) - per_core[core].idle - per_core[core].iowait for core in self.cores)
        return time.monotonic_ns(), cpu, rss, count, busy

    def at(self, column: int, times_ns: Ints) -> npt.NDArray[np.float64]:
        """A column at these times."""
        rows = np.array(self.rows)
        return np.asarray(np.interp(times_ns, rows[:, 0], rows[:, column]), dtype=np.float64)

    def peak(self, column: int) -> float:
        """The largest value of a column."""
        return max((row[column] for row in self.rows), default=0.0)


@dataclass(slots=True)
class Measured:
    """What one measurement found. Rates and CPU are those of the steady window; times are in ms."""

    client: str
    streams: int | None
    rate: float | None
    window_s: float
    events_per_s: float
    requests_per_s: float
    open_share: float | None
    """Closed loop: streams open at the server over those asked for, mean."""
    stretch_p99: float | None
    """Stream duration at the server over the nominal one."""
    kept_up: bool
    cpu_share: float
    cpu_us_per_event: float
    cpu_us_per_request: float
    foreign_share: float
    """Share of the client's cores that something else used."""
    server_cpu_share: float
    server_late_p99_ms: float
    server_bound: bool
    """True: the server was the limit, the client may be able to carry more."""
    start_up_s: float
    peak_rss_mb: float
    processes: int
    failed: int | None
    ttft_error_ms: tuple[float, float] | None
    """p50 and p99: what the client says less the server's own."""
    itl_error_ms: tuple[float, float] | None
    lag_p99_ms: float | None
    """As the client says, where it does."""
    arrival_lag_p99_ms: float | None
    """Evenly spaced open loop: how late requests came to the server, against the best grid of that rate."""
    killed: bool
    detail: dict[str, float]


Watch = Callable[[Meter, Truth], dict[str, float]]


def measure(
    client: Client, work: Work, server: FastServer, cores: Cores, *, deadline_s: float = 60.0,
    start_up_limit_s: float = 120.0, watch: Watch | None = None,
) -> Measured:  # fmt: skip
    """Run a client once. It is killed ``deadline_s`` after its first request; what the server saw until then counts.

    Raises `ClientError` when it ends with an error or sends nothing.
    """
    folder = Path(tempfile.mkdtemp(prefix="harness-bench-"))
    processes: Sequence[subprocess.Popen[bytes]] = []
    meter: Meter | None = None
    try:
        client.prepare(work, folder)
        server.mark(work)
        spawned_ns = time.monotonic_ns()
        os.sched_setaffinity(0, cores.client)  # inherited by what is started now
        processes = client.start(work, folder)
        os.sched_setaffinity(0, cores.server)
        meter = Meter([process.pid for process in processes], cores.client)
        meter.start()
        killed = _wait(processes, server, spawned_ns, deadline_s, start_up_limit_s)
        meter.stop()
        truth = server.truth()
        if not killed and any(process.returncode for process in processes):
            raise ClientError(client.name, folder, f"exit {[process.returncode for process in processes]}")
        if not truth.requests:
            raise ClientError(client.name, folder, "it sent nothing")
        said = Said() if killed else client.read(work, folder)
        return figures(client.name, work, server, truth, meter, said, spawned_ns, killed=killed, watch=watch)
    finally:
        os.sched_setaffinity(0, cores.server)
        if meter is not None:
            meter.stop()
        for process in processes:
            end_group(process)
        shutil.rmtree(folder, ignore_errors=True)
        server.wait_closed()


class ClientError(Exception):
    """A client did not do its work."""

    def __init__(self, name: str, folder: Path, what: str) -> None:
        words = [(folder / file).read_text(errors="replace")[-1500:] for file in ("stdout", "stderr")]
        super().__init__(f"{name}: {what}\n" + "\n".join(words))


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], server: FastServer, spawned_ns: int, deadline_s: float,
    start_up_limit_s: float,
) -> bool:  # fmt: skip
    """Wait for the client; True when it had to be killed."""
    first_ns: int | None = None
    looked_ns = spawned_ns
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        now = time.monotonic_ns()
        if first_ns is None and now - looked_ns > 1_000_000_000:
            looked_ns = now
            if sum(one["requests"] for one in server.tell("count")):
                first_ns = now
        limit_ns = spawned_ns + start_up_limit_s * 1e9 if first_ns is None else first_ns + deadline_s * 1e9
        if now > limit_ns:
            for process in processes:
                end_group(process)
            return True
    return False


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a client and what it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def spawn(argv: Sequence[str | Path], folder: Path, *, number: int = 0, env: dict[str, str] | None = None,
          stdin: int = subprocess.DEVNULL, cwd: Path | None = None) -> subprocess.Popen[bytes]:  # fmt: skip
    """Start a client in a session of its own; its output goes to files in ``folder``."""
    suffix = str(number) if number else ""
    with (folder / f"stdout{suffix}").open("wb") as out, (folder / f"stderr{suffix}").open("wb") as err:
        return subprocess.Popen(
            [str(one) for one in argv], cwd=cwd or folder, env={**os.environ, **(env or {})}, stdin=stdin, stdout=out,
            stderr=err, start_new_session=True,
        )  # fmt: skip


def _steady(work: Work, server: FastServer, truth: Truth) -> tuple[int, int]:
    """The window in which the load is what was asked: the first wave of streams is over, requests still come."""
    arrivals = truth.arrival_ns
    waves = 2 if work.streams is not None else 1  # the first is held back by up to an answer's length
    first = arrivals[min((work.streams or 1) - 1, len(arrivals) - 1)]
    start = int(first + waves * server.answer_s(work) * 1e9 + 0.2e9)
    return start, max(int(arrivals[-1]), start + 1)


def figures(
    client: str, work: Work, server: FastServer, truth: Truth, meter: Meter, said: Said, spawned_ns: int, *,
    killed: bool, watch: Watch | None = None,
) -> Measured:  # fmt: skip
    """Work out one measurement."""
    start, end = _steady(work, server, truth)
    ends = np.array([start, end])
    seconds = (end - start) / 1e9
    cpu, events, requests = (float(np.diff(x)[0]) for x in (meter.at(1, ends), truth.at(2, ends), truth.at(3, ends)))
    busy = float(np.diff(meter.at(4, ends))[0])
    server_cpu = float(np.diff(truth.at(1, ends))[0]) / 1e9 / seconds / len(server.processes)
    late_ms = float(np.percentile(truth.late_ns, 99)) / 1e6
    open_share = None
    if work.streams is not None and server.itl_s:
        grid = np.linspace(start, end, 200).astype(np.int64)
        open_share = float(truth.at(4, grid).mean()) / work.streams
    stretch = float(np.percentile(truth.stretch, 99)) if len(truth.stretch) else None
    kept_up = seconds > 1 and (open_share is None or open_share >= KEPT_UP) and (stretch is None or stretch < 1.05)
    arrival_lag = None
    if work.rate is not None and not work.poisson:
        drift = (truth.arrival_ns - truth.arrival_ns[0]) / 1e6 - np.arange(len(truth.arrival_ns)) * 1e3 / work.rate
        arrival_lag = float(np.percentile(drift - drift.min(), 99))
    return Measured(
        client=client, streams=work.streams, rate=work.rate, window_s=seconds, events_per_s=events / seconds,
        requests_per_s=requests / seconds, open_share=open_share, stretch_p99=stretch, kept_up=kept_up,
        cpu_share=cpu / seconds, cpu_us_per_event=cpu / max(events, 1) * 1e6,
        cpu_us_per_request=cpu / max(requests, 1) * 1e6, foreign_share=max(busy - cpu, 0.0) / seconds,
        server_cpu_share=server_cpu, server_late_p99_ms=late_ms,
        server_bound=server_cpu > 0.95 or (server.itl_s > 0 and late_ms > 5),
        start_up_s=(int(truth.arrival_ns[0]) - spawned_ns) / 1e9, peak_rss_mb=meter.peak(2) / 2**20,
        processes=int(meter.peak(3)), failed=said.failed, ttft_error_ms=_error(said.ttft_ms, truth.ttft_ns),
        itl_error_ms=_error(said.itl_ms, truth.itl_ns),
        lag_p99_ms=said.lag_p99_ms,
        arrival_lag_p99_ms=arrival_lag, killed=killed,
        detail={**said.detail, **(watch(meter, truth) if watch is not None else {})},
    )  # fmt: skip


def _error(said_ms: tuple[float, float] | None, truth_ns: Ints) -> tuple[float, float] | None:
    """p50 and p99 of what the client says, less those of the truth, ms."""
    if said_ms is None or not len(truth_ns):
        return None
    p50, p99 = np.percentile(truth_ns, [50, 99]) / 1e6
    return said_ms[0] - float(p50), said_ms[1] - float(p99)


@contextlib.contextmanager
def fast_server(cores: Cores, **options: float) -> Iterator[FastServer]:
    """A fast server for the length of a block."""
    server = FastServer(cores, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()
