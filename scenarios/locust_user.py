"""`PlanUser`, the Locust user that sends a plan, and what makes its scenarios plain locustfiles.

In a load worker users report to nobody: a Locust event per request would cost more than reading its answer, and the
rows hold more. Run by Locust itself (``locust -f scenarios/replay.py``), they also fire Locust's own statistics.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns
from typing import Any

import gevent
from locust import User, events, task
from locust.exception import StopUser
from locust.runners import LocalRunner

from harness.errors import EXIT_FAILURE, EXIT_USAGE, HarnessError, UsageError
from harness.record.results import Result, ResultWriter
from harness.record.run_spec import DEFAULTS, RunSpec
from harness.scenarios.client.client import Client, raise_fd_limit
from harness.scenarios.client.endpoint import ENDPOINTS
from harness.scenarios.client.timers import WakeTimer
from harness.scenarios.dispatch import BURST, Dispatcher
from harness.scenarios.plan_reader import PlanReader
from harness.scenarios.schedule import Schedule

API_KEY = "HARNESS_API_KEY"
"""Environment variable with the API key; there is no other way to give it, so that it is in no file and no argument."""


class PlanUser(User):  # type: ignore[misc]  # Locust ships no types
    """Sends what `Dispatcher` of its environment holds, in a way its subclass says."""

    abstract = True

    @task  # type: ignore[untyped-decorator]
    def play(self) -> None:
        """Send until the plan is done or the run stops; then this user is gone."""
        dispatcher: Dispatcher | None = getattr(self.environment, "dispatcher", None)
        if dispatcher is not None and not dispatcher.over:
            timer = dispatcher.join()
            try:
                joined_ns = dispatcher.now_ns() if dispatcher.started.is_set() else 0
                dispatcher.started.wait()
                self.send_all(dispatcher, timer, joined_ns)
            finally:
                dispatcher.leave(timer)
        raise StopUser

    def send_all(self, dispatcher: Dispatcher, timer: WakeTimer, joined_ns: int) -> None:
        """Send requests until it is over; this user was there from ``joined_ns`` of the run clock on."""
        raise NotImplementedError

    @staticmethod
    def send_when_due(
        dispatcher: Dispatcher, timer: WakeTimer, free_ns: Callable[[], int | None], send: Callable[[], object]
    ) -> None:
        """Call ``send`` for each request when it is due, and not before ``free_ns``: when there is or was room for
        another, on the run clock; null: not before something ends.
        """
        sent = 0
        while not dispatcher.over:
            due, free = dispatcher.schedule.next_due(), free_ns()
            if due is None or free is None:
                timer.wait_until(None)
            elif max(due, free) > dispatcher.now_ns():
                timer.wait_until(dispatcher.client.start_mono_ns + max(due, free))
                sent = 0
            else:
                send()
                sent += 1
                if sent % BURST == 0:
                    gevent.sleep(0)


def run_as_locustfile(*, timed: bool) -> None:
    """Let plain ``locust -f`` run this scenario: add its options, build its load when the test starts."""
    events.init_command_line_parser.add_listener(_add_options)
    run: list[_LocustRun] = []

    @events.test_start.add_listener  # type: ignore[untyped-decorator]
    def start(environment: Any, **_: object) -> None:
        try:
            run.append(_LocustRun(environment, timed=timed))
            run[-1].begin()
        except (HarnessError, OSError) as e:
            print(f"error: {e}", file=sys.stderr)
            environment.process_exit_code = EXIT_USAGE
            gevent.spawn(environment.runner.quit)  # it ends the greenlet we are in

    @events.test_stop.add_listener  # type: ignore[untyped-decorator]
    def stop(**_: object) -> None:
        while run:
            run.pop().close()


def _add_options(parser: Any) -> None:
    group = parser.add_argument_group("harness")
    group.add_argument("--plan", required=True, help="plan file made by `harness plan`")
    group.add_argument("--model", default="default", help="model name as the server knows it")
    group.add_argument("--endpoint", default=DEFAULTS.endpoint, choices=[*ENDPOINTS], help="default: completions")
    group.add_argument("--results", default="", help="also write one Arrow row per request to this file")


def asked(options: Any, host: str, *, timed: bool) -> RunSpec:
    """What Locust's own command line asks for; the rest is as in every run."""
    base = host.rstrip("/")
    return RunSpec(
        mode="open" if timed else "closed", model=options.model, endpoint=options.endpoint,
        base_urls=[base if base.endswith("/v1") else f"{base}/v1"],
    )  # fmt: skip


class _LocustRun:
    """One test run by Locust itself, on one process."""

    def __init__(self, environment: Any, *, timed: bool) -> None:
        if not isinstance(environment.runner, LocalRunner):
            raise UsageError("several Locust processes would each send the whole plan: use `harness run --workers`")
        options = environment.parsed_options
        if not environment.host:
            raise UsageError("say where to send it: --host http://127.0.0.1:8000")
        self._environment = environment
        self._name = ENDPOINTS[options.endpoint]
        raise_fd_limit()
        spec = asked(options, environment.host, timed=timed)
        self._client = Client(spec, self._record, api_key=os.environ.get(API_KEY))
        self._plan_reader = PlanReader(Path(options.plan), spec)
        self._dispatcher = environment.dispatcher = Dispatcher(Schedule.of(self._plan_reader), self._client)
        self._writer = ResultWriter(Path(options.results), 0) if options.results else None
        self._connections = 32 if timed else options.num_users or 1
        self._watcher: Any = None
        self._closed = False

    def begin(self) -> None:
        """Open connections, then start the clock, unless Locust stopped the test meanwhile."""
        self._client.open_connections(self._connections)
        if self._closed:
            self._client.close()
            return
        self._dispatcher.begin(monotonic_ns())
        self._watcher = gevent.spawn(self._watch)
        gevent.spawn(self._fill)

    def _fill(self) -> None:
        """Read and prepare the plan ahead of its time."""
        try:
            self._dispatcher.fill()
        except HarnessError as e:
            print(f"error: {e}", file=sys.stderr)
            self._environment.process_exit_code = EXIT_FAILURE
            self._dispatcher.stop()

    def _watch(self) -> None:
        """Flush rows, and end the test when the plan is done."""
        while not self._dispatcher.over or self._client.in_flight:
            gevent.sleep(0.5)
            if self._writer is not None:
                self._writer.flush()
        self._client.parse_queue.settle()
        self._environment.runner.quit()

    def _record(self, result: Result) -> None:
        if self._writer is not None:
            self._writer.append(result)
        if result.error == "unsent":
            return
        fail = None if result.error is None else RuntimeError(f"{result.error}: {result.detail}")
        if result.chunk_ns:
            self._fire("TTFT", result.chunk_ns[0] - result.scheduled_ns, 0, None)
        # A turn that has nothing to go on from is not sent: a failure without a time.
        e2e_ns = None if result.finished_ns is None else result.finished_ns - result.scheduled_ns
        self._fire("POST", e2e_ns, result.output_tokens or 0, fail)

    def _fire(self, kind: str, time_ns: int | None, length: int, fail: Exception | None) -> None:
        self._environment.events.request.fire(
            request_type=kind, name=self._name, response_time=None if time_ns is None else time_ns / 1e6,
            response_length=length, exception=fail, context={},
        )  # fmt: skip

    def close(self) -> None:
        """One row for every request, also those that were stopped."""
        self._closed = True
        if self._watcher is None:
            self._dispatcher.begin(monotonic_ns())
        elif gevent.getcurrent() is not self._watcher:
            self._watcher.kill(block=False)
        self._dispatcher.stop()
        self._client.abort("stopped", "in flight when the test was stopped")
        self._client.parse_queue.settle()
        now = self._dispatcher.now_ns()
        unsent = [(planned.request_id, planned.scheduled_ns) for planned in self._dispatcher.schedule.rest()]
        for request_id, due in (*unsent, *self._plan_reader.unread()):
            self._record(Result(request_id, now if due is None else due, error="unsent"))
        if self._watcher is not None:
            self._client.close()
        if self._writer is not None:
            self._writer.close()
