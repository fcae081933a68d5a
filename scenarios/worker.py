"""The load worker process: ``python -m harness.scenarios.worker SPEC.json``.

SPEC.json is a `harness.record.run_spec.WorkerSpec`; the API key comes from the environment variable HARNESS_API_KEY
only. `scenarios.worker_protocol` says what goes over stdin and stdout; messages for people go to stderr. At the end
every request of the worker's slice has exactly one row. Exit codes are those of `harness.errors`.
"""

from __future__ import annotations

import harness.scenarios.lean_imports  # noqa: F401  # isort: skip  # first: Locust patches the standard library

import fcntl
import gc
import logging
import os
import platform
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from time import monotonic_ns
from typing import Any

import gevent
import gevent.monkey
import locust.env
import pyarrow as pa
from gevent.event import Event

from harness import forgo_pandas
from harness.errors import EXIT_FAILURE, EXIT_VALID, HarnessError, UsageError, WorkerError, sentence
from harness.record.answers import KEY_BYTES, KEY_VARIABLE, SAMPLE, CapturedWriter, write_said
from harness.record.results import FLUSH_S, Result, ResultWriter
from harness.record.run_spec import WorkerSpec
from harness.record.samples import WORKER_SCHEMA, Observation, ObservationWriter
from harness.scenarios.client.client import Client, raise_fd_limit
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.in_flight import AnswerSampler
from harness.scenarios.client.timers import WakeTimer
from harness.scenarios.dispatch import Dispatcher, slot_starts
from harness.scenarios.locust_user import API_KEY
from harness.scenarios.observer import Observer
from harness.scenarios.plan_reader import PlanReader
from harness.scenarios.replay import Replay
from harness.scenarios.saturate import Saturate
from harness.scenarios.schedule import Schedule
from harness.scenarios.worker_protocol import Commands, read_spec, say, start_ns
from harness.server.access import from_environment

_OPEN_LOOP_CONNECTIONS = 64  # opened ahead when no cap says how many there can be
_PROGRESS_S = 0.5
_SAMPLES = 200
_UNSENT = 10_000  # rows held in memory when a run is stopped
_SOCKETS = 65536  # made room for before the start


class LoadWorker:
    """One run of one slice."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.trouble: str | None = None
        self._done = self._failed = self._output_tokens = 0
        self._samples: list[tuple[float, float, float | None]] = []  # ttft, e2e, tpot of what ended since the last line
        self._flushing = self._full = False
        self._held: list[Result] = []  # rows that arrived during a flush
        self._flushed = Event()
        self._stops = 0  # stop commands received
        self._told_to_stop = False  # also by the end of stdin, which does not shorten the drain
        self._fail_on_bugs()
        fd_limit = raise_fd_limit()
        _grow_fd_table(fd_limit)
        try:
            self._writer = ResultWriter(Path(spec.results), spec.worker)
            self._seen = None if spec.observations is None else ObservationWriter(Path(spec.observations))
            self._captured = _captured_writer(spec)
        except OSError as e:
            raise WorkerError(f"{spec.results}: cannot write results ({e.strerror or e})") from e
        self.end_ns: int | None = None
        self.rows = 0
        self._sampler = None if spec.answers is None else AnswerSampler(SAMPLE // spec.workers)
        self._client = Client(
            spec, self._record, api_key=os.environ.get(API_KEY), secret_headers=from_environment(spec.header_env),
            sampler=self._sampler, capture=None if self._captured is None else self._capture,
        )  # fmt: skip
        closed = spec.mode == "closed"
        self._plan_reader = PlanReader(Path(spec.plan), spec, spec.worker)
        self.requests = self._plan_reader.requests
        schedule = Schedule.of(self._plan_reader)
        slots = spec.concurrency or 1
        starts = slot_starts(spec.ramp_s, slots, spec.worker, spec.workers) if closed else ()
        self._dispatcher = Dispatcher(schedule, self._client, None if closed else spec.concurrency, slots, starts)
        self.observer = Observer(self._client, self._dispatcher, lambda: self._done)
        self._open_connections(None)
        _warm_up()
        self._runner = self._start_user(Saturate if closed else Replay)
        self.fd_limit = fd_limit
        # Only now: up to here SIGTERM simply ends a process that has sent nothing.
        self.commands = Commands()

    def _open_connections(self, timeout_s: float | None) -> None:
        wanted = min(self.spec.concurrency or _OPEN_LOOP_CONNECTIONS, self.requests)
        trouble = self._client.open_connections(wanted, timeout_s)
        if trouble:
            print(f"warning: connections could not be opened ahead: {trouble}", file=sys.stderr)

    def _start_user(self, user: type) -> Any:
        """The one user of this worker, waiting for the start."""
        logging.getLogger("locust").setLevel(logging.ERROR)
        environment = locust.env.Environment(user_classes=[user], catch_exceptions=False)
        environment.dispatcher = self._dispatcher
        runner = environment.create_local_runner()
        runner.start(1, spawn_rate=1)
        deadline = monotonic_ns() + 30_000_000_000
        while self.requests and not runner.user_count:
            if monotonic_ns() > deadline:
                raise WorkerError("Locust did not start its user in 30 s")
            gevent.sleep(0.01)
        return runner

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, start_unix_ns: int) -> None:
        """From the common start until every request has its row in the file."""
        start = monotonic_ns() + (start_unix_ns - time.time_ns())
        spare_s = (start - monotonic_ns()) / 1e9 - 0.05
        if spare_s > 0:
            self._open_connections(spare_s)  # the server may have closed some while we waited
        # How long a thread that writes rows may hold the interpreter: with the default of 5 ms reads would be that late
        # at each flush.
        sys.setswitchinterval(0.0005)
        # What exists by now lives until the end, and the hot path makes no cycles: a collection would only pause it.
        gc.collect()
        gc.freeze()
        gc.disable()
        commander = gevent.spawn(self._obey)
        timer = WakeTimer()
        while (now := monotonic_ns()) < start and not self._dispatcher.stopping:
            timer.wait_until(min(start, now + 100_000_000))
        timer.close()
        self._dispatcher.begin(start)
        self.observer.begin()
        watchers = [commander, gevent.spawn(self._report), gevent.spawn(self._fill)]
        flusher = gevent.spawn(self._flush_rows)
        self._dispatcher.finished.wait(self.spec.duration_s)
        self._dispatcher.stop()
        self._drain()
        self.end_ns = self._dispatcher.now_ns()
        self._client.parse_queue.settle()
        self.observer.end()
        gevent.killall(watchers)
        self._finish(flusher)

    def abandon(self) -> None:
        """Stopped before the start: nothing is sent, and every request gets its row."""
        self._dispatcher.begin(monotonic_ns())
        self._dispatcher.stop()
        self._finish(None)

    def _drain(self) -> None:
        """Wait for requests in flight: for ``drain_s`` after a stop or ``duration_s``. Once the whole plan was sent,
        until each ends or times out, since cutting off slow requests would flatter the server.
        """
        deadline: int | None = None
        while self._client.in_flight and self._stops < 2:
            if deadline is None and (self._told_to_stop or self._dispatcher.schedule.left):
                deadline = monotonic_ns() + int(self.spec.drain_s * 1e9)
            if deadline is not None and monotonic_ns() >= deadline:
                break
            gevent.sleep(0.005)
        self._client.abort("stopped", "in flight when the run was stopped")

    def _obey(self) -> None:
        """Commands during the run."""
        while True:
            line = self.commands.next(None)
            if line == "stop":
                self._stops += 1
            elif line is not None and line.startswith("silent "):
                self._stop_sending()
                self._client.abort("stall", "no request had a byte, and the server answered no question", int(line[7:]))
                continue
            elif line == "eof":
                pass  # the harness is gone, or done talking: no reason to hurry
            else:
                print(f"warning: not a command now: {line!r}", file=sys.stderr)
                continue
            self._stop_sending()

    def _stop_sending(self) -> None:
        self._told_to_stop = True
        self._dispatcher.stop()
        self._dispatcher.finished.set()

    def _fill(self) -> None:
        """Read and prepare the plan ahead of its time."""
        try:
            self._dispatcher.fill()
        except HarnessError as e:
            self._give_up(str(e))

    def _fail_on_bugs(self) -> None:
        """An uncaught exception in a callback or a user must fail the run."""
        hub = gevent.get_hub()
        report = hub.handle_error

        def handle_error(context: object, kind: type, value: BaseException, trace: object) -> None:
            report(context, kind, value, trace)
            if not issubclass(kind, hub.NOT_ERROR):
                self._give_up(f"internal error: {kind.__name__}: {value} (see the worker's log)")

        hub.handle_error = handle_error

    def _give_up(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
        self._stop_sending()

    def _finish(self, flusher: Any | None) -> None:
        """Every request has one row, and all rows are in the file."""
        self._client.close()
        now = self._dispatcher.now_ns()
        unsent = [(planned.request_id, planned.scheduled_ns) for planned in self._dispatcher.schedule.rest()]
        for n, (request_id, due) in enumerate(chain(unsent, self._plan_reader.unread()), 1):
            self._record(Result(request_id, now if due is None else due, error="unsent"))
            if n % _UNSENT == 0:
                gevent.sleep(0)  # the flush may have its turn: a plan of millions was stopped
                if not self._flushing and not self._full:
                    self._check(_attempt(self._writer.flush))
        self._flushed.set()
        if flusher is not None:
            flusher.join(timeout=30)
        if self._flushing:
            self.trouble = f"{self.spec.results}: the disk took no rows for 30 s"
        else:
            self._check(_attempt(self._close_files))  # of a full disk once more: there may be room by now
        self.rows = self._writer.rows

    # -- rows ---------------------------------------------------------------------------------------------------------

    def _record(self, result: Result) -> None:
        if result.error != "unsent":
            self._done += 1
            self._failed += result.error is not None
            self._output_tokens += result.output_tokens or 0
            if result.chunk_ns and result.error is None:
                self._samples.append(_latencies(result, result.chunk_ns))
        if self._flushing:
            self._held.append(result)
        else:
            self._writer.append(result)

    def _capture(self, result: Result, answer: StreamedAnswer) -> None:
        assert self._captured is not None
        if result.error is None:
            self._captured.append(result.request_id, answer.text, answer.logprobs)

    def _flush_rows(self) -> None:
        """Write rows in a thread: a slow disk must not delay reads."""
        pool = gevent.get_hub().threadpool
        while not self._flushed.wait(FLUSH_S) and not self._full:
            self._flushing = True
            self._check(pool.apply(_attempt, (self._write,)))
            self._flushing = False
            held, self._held = self._held, []
            for result in held:
                self._writer.append(result)

    def _check(self, failure: Exception | None) -> None:
        if failure is not None:
            self._full, self._stops = True, 2  # rows from now on might be lost, so end what is in flight
            self._give_up(f"{self.spec.results}: cannot write results ({failure})")

    def _write(self) -> None:
        self._writer.flush()
        if self._seen is not None:
            self._seen.write(self.observer.take())
        if self._captured is not None:
            self._captured.flush()

    def _close_files(self) -> None:
        self._write()
        self._writer.close()
        if self._seen is not None:
            self._seen.close()
        if self._captured is not None:
            self._captured.close()
        if self._sampler is not None and self.spec.answers is not None:
            write_said(Path(self.spec.answers), self._sampler.said())

    # -- progress -----------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        while True:
            gevent.sleep(_PROGRESS_S)
            samples = self._samples[:: len(self._samples) // _SAMPLES + 1]
            quiet_s, heard = self._client.quiet_s()
            told = say(
                "progress", must=False, t_s=round(self._dispatcher.now_ns() / 1e9, 3), sent=self._dispatcher.sent,
                done=self._done, failed=self._failed, in_flight=self._client.in_flight,
                output_tokens=self._output_tokens,
                ttft_s=[round(ttft, 4) for ttft, _, _ in samples], e2e_s=[round(e2e, 4) for _, e2e, _ in samples],
                tpot_s=[round(tpot, 5) for _, _, tpot in samples if tpot is not None], quiet_s=quiet_s, heard=heard,
            )  # fmt: skip
            if told or len(self._samples) > 100_000:
                self._samples.clear()


def _latencies(result: Result, chunk_ns: Sequence[int]) -> tuple[float, float, float | None]:
    """Approximate ttft and e2e (from the planned time) and tpot (null below two tokens) for the progress line, s."""
    first, last = chunk_ns[0], chunk_ns[-1]
    after = (result.output_tokens or 0) - 1
    tpot = (last - first) / after / 1e9 if after > 0 and last > first else None
    return (first - result.scheduled_ns) / 1e9, (last - result.scheduled_ns) / 1e9, tpot


def _captured_writer(spec: WorkerSpec) -> CapturedWriter | None:
    if spec.capture == "off" or spec.captured is None:
        return None
    given = os.environ.pop(KEY_VARIABLE, "")
    key = bytes.fromhex(given) if given else secrets.token_bytes(KEY_BYTES)
    return CapturedWriter(Path(spec.captured), key, keep_text=spec.capture == "text", sealed=spec.capture == "sealed")


def _warm_up() -> None:
    """Write one batch: Arrow's first takes far longer than the next ones, and must not delay streams."""
    writer = ResultWriter(Path(os.devnull), 0)
    writer.append(Result(0, 0, sent_ns=0, chunk_ns=[0], chunk_tokens=[1]))
    writer.close()
    seen = ObservationWriter(Path(os.devnull))
    seen.write([Observation(**dict.fromkeys(WORKER_SCHEMA.names, 0))])
    seen.close()


def _grow_fd_table(limit: int) -> None:
    """Grow the descriptor table now: Linux pauses a process with threads each time it doubles."""
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, min(limit, _SOCKETS) - 1))
    except (OSError, ValueError) as e:
        print(f"warning: cannot make room for {min(limit, _SOCKETS)} sockets ahead ({e})", file=sys.stderr)


def _attempt(write: Callable[[], None]) -> Exception | None:
    """Write, and return the error: gevent reports whatever is raised in its threads as a bug."""
    try:
        write()
    except (OSError, pa.ArrowException) as e:
        return e
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    end: dict[str, Any] = dict.fromkeys(["cpu_share", "loop_lag_p99_s", "unstamped_share", "exit", "end_ns"])
    end["rows"] = 0
    code = EXIT_VALID
    forgo_pandas()
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -m harness.scenarios.worker SPEC.json")
        worker = LoadWorker(read_spec(Path(arguments[0])))
        say("ready", requests=worker.requests, fd_limit=worker.fd_limit, host=platform.node())
        start = start_ns(worker.commands)
        if start is None:
            worker.abandon()
        else:
            worker.run(start)
        end.update(
            rows=worker.rows, cpu_share=worker.observer.cpu_share, loop_lag_p99_s=worker.observer.loop_lag_p99_s,
            unstamped_share=worker.observer.unstamped_share, exit=worker.trouble, end_ns=worker.end_ns,
        )  # fmt: skip
        code = EXIT_FAILURE if worker.trouble else EXIT_VALID
    except HarnessError as e:
        print(f"error: {e}", file=sys.stderr)
        end["exit"], code = str(e), e.exit_code
    except Exception as e:  # a bug outside of the event loop: the harness needs the last line, too
        if isinstance(e, OSError | MemoryError | ImportError):  # the machine's limits
            print(f"error: {sentence(e)}", file=sys.stderr)
            end["exit"], code = sentence(e), EXIT_FAILURE
        else:
            traceback.print_exc()
            end["exit"], code = f"internal error: {type(e).__name__}: {e} (see the worker's log)", EXIT_FAILURE
    say("end", **end)
    return code


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # do not wait for Locust's users and the thread pool
