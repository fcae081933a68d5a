"""Load workers as processes: started together, started at one instant, followed to their end, whatever they do.

A worker is ``python -m harness.scenarios.worker SPEC.json`` (its module says what the lines hold). It prints JSON lines
with an ``event`` (ready, progress, end) and reads ``start <unix_ns>`` and ``stop``. The end of its stdin means stop.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import msgspec

from harness.cluster.process.process import GRACE_S, NO_SECRETS, Process, describe_exit
from harness.errors import UsageError, WorkerError
from harness.record.answers import KEY_BYTES, KEY_VARIABLE, PROCESS_KEY
from harness.record.manifest import RunDir, Worker
from harness.record.run_spec import RunSpec, WorkerSpec
from harness.server.access import from_environment

READY_S = 300.0
"""Reading a large plan takes a worker this long at most."""
LEAD_S = 0.3
"""Between the order to start and the common start: every worker on this host must have it before."""
FAR_LEAD_S = 1.0
"""The same where workers hear through a cluster."""
SILENCE_S = 30.0
"""Workers report about twice a second; one that says nothing for this long hangs."""
EXIT_S = 10.0
"""From a worker's last words to the end of its process."""
AT_ONCE_S = 5.0
"""To write the last rows when nothing in flight is waited for."""
SLACK_S = 30.0
"""Above what a worker was told to need."""
PIECE_BYTES = 4 << 20
"""Of a file that travels."""
POLL_S = 0.1
GARBAGE_LINES = 10

WORKER = (sys.executable, "-m", "harness.scenarios.worker")


READS, WRITES = ("plan", "tls_ca"), ("results", "observations", "answers", "captured")
"""Fields of a worker's spec that name files it reads, and files it writes."""


class Child(Protocol):
    """A running process with pipes: `cluster.process.process.Process`, or one on another host."""

    @property
    def host(self) -> str: ...
    @property
    def trouble(self) -> str | None: ...
    def poll(self) -> int | None: ...
    def stop(self, grace_s: float = GRACE_S) -> int | None: ...
    def lines(self) -> list[str]: ...
    def write_line(self, line: str) -> bool: ...
    def tail(self, n: int = 20) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A load worker to start: ``argv`` and the path of its spec file are its command line."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str | None]
    spec: WorkerSpec
    """With absolute paths of this host."""
    spec_file: Path
    log: Path

    def files(self, fields: Sequence[str]) -> dict[str, Path]:
        """Files of the spec, by field."""
        return {field: Path(name) for field in fields if (name := getattr(self.spec, field))}

    def spec_in(self, folder: str) -> bytes:
        """The spec with its files in a folder of another host."""
        moved = {field: f"{folder}/{file.name}" for field, file in self.files(READS + WRITES).items()}
        return msgspec.json.encode({**msgspec.to_builtins(self.spec), **moved})


Launch = Callable[[Job], Child]
"""Starts a job; `start_here` and `Deployment.launch` are two."""


def start_here(job: Job, cpus: Sequence[int] | None = None) -> Process:
    """Start it as a child of this process, on these processors only if any are named. Raises `WorkerError`."""
    try:
        job.spec_file.write_bytes(msgspec.json.encode(job.spec))
    except OSError as e:
        raise WorkerError(f"{job.spec_file}: cannot write ({e.strerror})") from e
    command = [*job.argv, str(job.spec_file)]
    return Process.start(command, name=job.name, env=job.env, log=job.log, pipes=True, cpus=cpus)


class _Ready(msgspec.Struct, tag="ready", tag_field="event"):
    requests: int | None = None


class _Progress(msgspec.Struct, tag="progress", tag_field="event"):
    sent: int = 0
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    output_tokens: int = 0
    ttft_s: list[float] = []
    tpot_s: list[float] = []
    e2e_s: list[float] = []
    quiet_s: dict[int, float] = {}
    heard: list[int] = []


class _End(msgspec.Struct, tag="end", tag_field="event"):
    rows: int | None = None
    cpu_share: float | None = None
    loop_lag_p99_s: float | None = None
    unstamped_share: float | None = None
    exit: str | None = None
    end_ns: int | None = None


_DECODER = msgspec.json.Decoder(_Ready | _Progress | _End)


@dataclass(slots=True)
class _State:
    """One worker as far as its lines tell."""

    child: Child
    heard: float
    """When it last said anything that makes sense."""
    ready: _Ready | None = None
    progress: _Progress = field(default_factory=_Progress)
    end: _End | None = None
    lost: bool = False
    """It was killed, or its host is gone, with the rows of its last second."""
    over: str | None = None
    """How it ended in the end, once it has; empty when as it should."""
    garbage: list[str] = field(default_factory=list)
    """Other lines it printed; they explain a death."""

    def read(self) -> list[_Progress]:
        """Take in its new lines; those that say how far it is."""
        found: list[_Progress] = []
        for line in self.child.lines():
            try:
                event = _DECODER.decode(line)
            except msgspec.DecodeError:
                self.garbage = [*self.garbage, line[:400]][-GARBAGE_LINES:]
                continue
            self.heard = time.monotonic()
            if isinstance(event, _Progress):
                self.progress = event
                found.append(event)
            elif isinstance(event, _Ready):
                self.ready = event
            else:
                self.end = event
        return found


class LoadWorkers:
    """All load workers of one run; a context manager that leaves none behind.

    Entering starts them and waits until every one has read its slice of the plan; it raises `WorkerError` when one does
    not get ready. `start` sets them off together; call `poll` until `done`. ``workers`` and ``end_ns`` then hold what
    they said of themselves. A worker lost on the way is a fact in ``workers``, not an exception: its rows are kept.
    """

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        *,
        api_key: str | None,
        launch: Launch | None = None,
        worker: Sequence[str] = WORKER,
        ready_s: float = READY_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        if spec.concurrency is not None and spec.concurrency < spec.workers:
            raise UsageError(f"{spec.workers} workers cannot share {spec.concurrency} in flight: use fewer --workers")
        self._spec, self._run, self._api_key = spec, run, api_key
        self._launch: Launch = launch or start_here
        self._worker, self._ready_s, self._silence_s = worker, ready_s, silence_s
        self._capture_key = PROCESS_KEY.hex() if spec.capture == "sealed" else secrets.token_hex(KEY_BYTES)
        self._states: list[_State] = []
        self._deadline: float | None = None
        self._why_late = ""

    def __enter__(self) -> LoadWorkers:
        try:
            for index in range(self._spec.workers):
                self._states.append(self._spawn(index))
            deadline = time.monotonic() + self._ready_s
            while not all(state.ready for state in self._states):
                for index, state in enumerate(self._states):
                    code = state.child.poll()  # before the lines: all of them are there once it has ended
                    state.read()
                    if state.ready is None and code is not None:
                        how = state.child.trouble or describe_exit(code)
                        raise self._failure(index, f"ended before it was ready ({how})")
                    if state.ready is None and time.monotonic() > deadline:
                        raise self._failure(index, f"was not ready after {self._ready_s:.0f} s")
                time.sleep(POLL_S / 2)
        except BaseException:  # Ctrl-C as well: leave nothing running
            self._kill("not started")
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill("ended with the harness")

    def _spawn(self, index: int) -> _State:
        # A worker on another host has none of this environment.
        values = from_environment(self._spec.header_env)
        secret = {variable: values[name] for name, variable in self._spec.header_env.items()}
        if self._spec.capture != "off":
            secret[KEY_VARIABLE] = self._capture_key
        job = Job(
            name=f"load worker {index}", argv=self._worker,
            env={**NO_SECRETS, **secret, "HARNESS_API_KEY": self._api_key},
            spec=worker_spec(self._spec, self._run, index),
            spec_file=self._run.path.resolve() / f"worker-{index}.json", log=self._run.worker_log(index),
        )  # fmt: skip
        return _State(self._launch(job), time.monotonic())

    def _failure(self, index: int, problem: str) -> WorkerError:
        state = self._states[index]
        # Of a traceback the last line says what happened; the whole is in the log.
        words = [line for line in (*state.garbage, *state.child.tail(12)) if not line.startswith((" ", "Traceback"))]
        log = self._run.worker_log(index)
        return WorkerError("\n  ".join([f"load worker {index} {problem}; its log: {log}", *words]))

    def start(self) -> int:
        """Give the common start, a moment from now; returns it, ns of the wall clock."""
        lead_s = LEAD_S if self._launch is start_here else FAR_LEAD_S
        start_ns = time.time_ns() + int(lead_s * 1e9)
        for state in self._states:
            state.heard = time.monotonic() + lead_s
            state.child.write_line(f"start {start_ns}")  # one that died meanwhile shows in poll
        if self._spec.duration_s is not None:
            self._limit(lead_s + self._spec.duration_s + self._spec.drain_s + SLACK_S, "did not end in time")
        return start_ns

    def stop(self, at_once: bool = False, silent: int | None = None) -> None:
        """Ask for an end: no new requests, those in flight may finish. ``at_once``: they may not. ``silent``: a server
        whose requests have stalled.

        Workers write a row for every request either way; keep calling `poll` until `done`.
        """
        for state in self._states:
            if silent is not None:
                state.child.write_line(f"silent {silent}")
            for _ in range(2 if at_once else 1):  # a second "stop" cuts short what is in flight
                state.child.write_line("stop")
        self._limit(AT_ONCE_S if at_once else self._spec.drain_s + SLACK_S, "did not stop when asked to")

    def _limit(self, seconds: float, why: str) -> None:
        """From then on workers that still run are ended, for this reason."""
        deadline = time.monotonic() + seconds
        if self._deadline is None or deadline < self._deadline:
            self._deadline, self._why_late = deadline, why

    def poll(self, timeout_s: float) -> dict[str, object]:
        """Merged counts of all workers after ``timeout_s`` (sooner when all have ended).

        Keys: sent, done, failed, in_flight, output_tokens: totals since the start. ttft_s, tpot_s, e2e_s: samples since
        the last call. quiet_s: how long requests have waited for a byte, by server, of those from which no worker has
        heard of late.
        """
        until = time.monotonic() + timeout_s
        new: list[_Progress] = []
        while True:
            for state in self._states:
                if state.over is None:
                    new += self._follow(state)
            left = until - time.monotonic()
            if self.done or left <= 0:
                break
            time.sleep(min(POLL_S, left))
        names = ("sent", "done", "failed", "in_flight", "output_tokens")
        counts = {name: sum(getattr(state.progress, name) for state in self._states) for name in names}
        samples = {name: [s for line in new for s in getattr(line, name)] for name in ("ttft_s", "tpot_s", "e2e_s")}
        running = [state.progress for state in self._states if state.over is None]
        heard = {k for progress in running for k in progress.heard}
        quiet: dict[int, float] = {}
        for k, waited_s in (item for progress in running for item in progress.quiet_s.items() if item[0] not in heard):
            quiet[k] = max(waited_s, quiet.get(k, 0.0))
        return {**counts, **samples, "quiet_s": quiet}

    def _follow(self, state: _State) -> list[_Progress]:
        """Read one worker's lines and settle whether and how it ended."""
        code = state.child.poll()  # before the lines: all of them are there once it has ended
        new = state.read()
        now = time.monotonic()
        if state.end is not None and (code is not None or now - state.heard > EXIT_S):
            state.over = state.end.exit or ("" if code in (0, None) else f"{describe_exit(code)} after its last row")
            wanted = (state.ready.requests if state.ready else None) or 0
            state.lost = (state.end.rows or 0) < wanted  # as on a full disk
        elif code is not None and state.child.trouble:
            state.lost, state.over = True, f"lost: {state.child.trouble}"
        elif code is not None:
            said = [*state.garbage, *state.child.tail(1)]
            state.lost = code < 0
            state.over = ("lost: " if state.lost else "") + describe_exit(code) + (f": {said[-1]}" if said else "")
        elif self._deadline is not None and now > self._deadline:
            state.over = self._why_late
        elif state.end is None and now - state.heard > self._silence_s:
            state.over = f"hung: said nothing for {self._silence_s:.0f} s"
        if state.over is not None:
            state.progress.in_flight = 0
            if code is None:
                state.child.stop(1.0)
        return new

    @property
    def done(self) -> bool:
        """Every worker has ended."""
        return all(state.over is not None for state in self._states)

    @property
    def lost(self) -> str | None:
        """Which workers lost rows, killed in the middle or for want of room, and how; null when none did."""
        gone = [f"load worker {k} {state.over}" for k, state in enumerate(self._states) if state.lost]
        return "; ".join(gone) or None

    @property
    def workers(self) -> list[Worker]:
        """What is known of each worker, for the manifest."""
        ends = [(state, state.end or _End()) for state in self._states]
        return [
            Worker(
                index=index, host=state.child.host or None, exit=state.over or None, rows=end.rows,
                cpu_share=end.cpu_share, loop_lag_p99_s=end.loop_lag_p99_s, unstamped_share=end.unstamped_share,
            )
            for index, (state, end) in enumerate(ends)
        ]  # fmt: skip

    @property
    def end_ns(self) -> int | None:
        """When the last worker was done, ns after the common start; null when none said so."""
        ends = [state.end.end_ns for state in self._states if state.end and state.end.end_ns is not None]
        return max(ends, default=None)

    def _kill(self, why: str) -> None:
        for state in self._states:
            if state.over is None:
                state.over = why
                state.child.stop(1.0)


def share(concurrency: int | None, workers: int, index: int) -> int | None:
    """A worker's part of the requests in flight; the parts add up to ``concurrency``. Null stays null: no cap."""
    if concurrency is None:
        return None
    return concurrency // workers + (index < concurrency % workers)


def worker_spec(spec: RunSpec, run: RunDir, index: int) -> WorkerSpec:
    """What a load worker is started with."""
    asked = {f.name: getattr(spec, f.name) for f in fields(RunSpec)}
    asked["concurrency"] = share(spec.concurrency, spec.workers, index)
    return WorkerSpec(
        **asked, worker=index, plan=str(run.plan.resolve()), results=str(run.results(index).resolve()),
        observations=str(run.observations(index).resolve()),
        answers=None if spec.capture == "sealed" else str(run.answers(index).resolve()),  # they lie open for a moment
        captured=None if spec.capture == "off" else str(run.captured(index).resolve()),
    )  # fmt: skip


def read_piece(file: Path, offset: int) -> bytes:
    """What the file holds from ``offset``, at most `PIECE_BYTES`; nothing when it is not there (yet)."""
    try:
        with file.open("rb") as source:
            source.seek(offset)
            return source.read(PIECE_BYTES)
    except OSError:
        return b""
