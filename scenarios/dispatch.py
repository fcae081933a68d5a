"""Sends what is due: the state that all users of a process share, and the history of live conversations.

Nothing here knows Locust.

In a live conversation each turn carries what the server really answered to the turns before it. The plan says which
turns continue another (``continues``) and holds what is new in each. An answer is kept from its end until the next turn
takes it, so memory is bounded by the open sessions. It is parsed and encoded when the event loop is idle, during the
think time, or else when the next turn is due. A turn whose predecessor failed has nothing to continue: neither it nor
the rest of its session is sent (as in vLLM's multi-turn benchmark), and each has a row of class ``no_history``. When
the client hung up as planned, the session continues from what had been received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic_ns

import gevent
from gevent.event import Event

from harness.record.results import Result
from harness.scenarios.client.client import Client
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.in_flight import InFlight
from harness.scenarios.client.timers import WakeTimer
from harness.scenarios.plan_reader import Draft, Planned
from harness.scenarios.schedule import Schedule

NO_HISTORY = "no_history"
"""Error class of a turn that was not sent because an earlier one failed."""
BURST = 16
"""Late requests sent in a row before the loop may read answers again."""
_FILL_S, _FULL_S = 0.01, 0.05  # between two checks, while too little is prepared and when enough is
_FILL_NS, _HURRY_NS = 500_000, 3_000_000  # spent at a time on preparing requests; reads wait meanwhile


class Conversations:
    """What was said in sessions that go on."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._open: dict[int, InFlight] = {}  # sent, and a turn waits for the answer
        self._said: dict[int, bytes | str] = {}  # request -> history for the turn after it, or why there is none

    def history(self, planned: Planned) -> bytes | str:
        """What goes before the new part of this turn, or why that is not known. It is forgotten here."""
        if not planned.continues:
            return b""
        assert planned.after is not None
        stream = self._open.get(planned.after)
        if stream is not None:
            self._client.parse_queue.hand_over(stream)
        return self._said.pop(planned.after, f"request {planned.after}, the turn before it, has not ended")

    def send(self, planned: Planned, result: Result, history: bytes, ended: Callable[[Result], None] | None) -> None:
        """Send a turn with its history, and keep what is answered for the next one, if there is one."""
        draft = planned.draft
        assert draft is not None
        on_answer = partial(self._answered, draft, history) if planned.kept else None
        stream = self._client.send(
            result, draft.payload(history), ended, session=planned.slice,
            cancel_after_ns=planned.cancel_after_ns, timeout_ns=planned.timeout_ns, on_answer=on_answer,
            most_tokens=planned.most_tokens,
        )  # fmt: skip
        if planned.kept and planned.request_id not in self._said:
            self._open[planned.request_id] = stream

    def drop(self, planned: Planned, why: str) -> None:
        """Note that a turn is not sent, so that none can go on from it."""
        if planned.kept:
            self._said[planned.request_id] = why

    def _answered(self, draft: Draft, history: bytes, result: Result, answer: StreamedAnswer) -> None:
        self._open.pop(result.request_id, None)
        if result.error not in (None, "cancelled"):
            said: bytes | str | None = f"request {result.request_id} of its session failed ({result.error})"
        else:
            said = draft.history(history, answer)
        if said is None:
            said = f"the server gave no token ids with request {result.request_id} (return_token_ids)"
        self._said[result.request_id] = said


def slot_starts(ramp_s: float | None, slots: int, worker: int = 0, workers: int = 1) -> list[int]:
    """When each slot of a worker joins a closed loop, ns of the run clock: evenly over ``ramp_s``, the first at once.

    The slots of all workers take turns, so that the whole load climbs evenly, too.
    """
    return [round((ramp_s or 0.0) * 1e9 * (slot + worker / workers) / slots) for slot in range(slots)]


class Dispatcher:
    """What all users of one process share: the schedule, the client, the start, and the wish to stop.

    ``cap``: most requests in flight (open loop). ``slots``: requests that each user keeps in flight (closed loop), and
    ``starts`` when each of them joins (default: at once).
    """

    def __init__(
        self, schedule: Schedule, client: Client, cap: int | None = None, slots: int = 1, starts: Iterable[int] = ()
    ) -> None:
        self.schedule = schedule
        self.client = client
        self.conversations = Conversations(client)
        self.cap = cap
        self.slots = slots
        self._starts = deque(starts)
        self.stopping = False
        self.sent = 0
        self.started = Event()
        self.finished = Event()
        """Set when the last user has left: nothing more will be sent."""
        self._timers: list[WakeTimer] = []
        if not schedule.left:
            self.finished.set()

    def begin(self, start_mono_ns: int) -> None:
        """The clock starts; call it at that moment."""
        self.client.start_mono_ns = start_mono_ns
        self.started.set()

    def now_ns(self) -> int:
        """The run clock."""
        return monotonic_ns() - self.client.start_mono_ns

    def join(self) -> WakeTimer:
        """A user comes to wait; returns what to wait on."""
        timer = WakeTimer()
        self._timers.append(timer)
        return timer

    def next_start(self) -> int:
        """When the next slot joins, ns of the run clock; each call is another slot."""
        return self._starts.popleft() if self._starts else 0

    def leave(self, timer: WakeTimer) -> None:
        """A user has nothing more to send."""
        self._timers.remove(timer)
        timer.close()
        if not self._timers:
            self.finished.set()

    @property
    def over(self) -> bool:
        """True when nothing may or need be sent any more."""
        return self.stopping or not self.schedule.left

    def send_next(self, ended: Callable[[Result], None], free_ns: int | None = None) -> bool:
        """Send the next request. It was due at its own time or, in a closed loop, when its slot was free.

        False when it was not sent: a turn of a live conversation that has nothing to go on from.
        """
        planned, due = self.schedule.take(self.now_ns())
        result = Result(planned.request_id, max(due, free_ns or 0))
        sent = planned.draft is None or self._converse(planned, result, ended)
        if planned.draft is None:
            self.client.send(
                result, planned.payload, ended, session=planned.slice, cancel_after_ns=planned.cancel_after_ns,
                timeout_ns=planned.timeout_ns, most_tokens=planned.most_tokens,
            )  # fmt: skip
        self.sent += sent
        if not self.schedule.left:
            self._wake_all()  # that was the last: nobody has anything to wait for
        return sent

    def _converse(self, planned: Planned, result: Result, ended: Callable[[Result], None]) -> bool:
        history = self.conversations.history(planned)
        if isinstance(history, bytes):
            self.conversations.send(planned, result, history, ended)
            return True
        self.conversations.drop(planned, history)
        result.error, result.detail = NO_HISTORY, history
        self.client.refuse(result)
        if self.schedule.finished(planned.request_id, result.scheduled_ns):
            self._wake_all()
        return False

    def ended(self, result: Result) -> None:
        """An answer ended: its session's next turn may now have a time, and under a cap there is room."""
        assert result.finished_ns is not None
        if self.schedule.finished(result.request_id, result.finished_ns) or self.cap is not None:
            self._wake_all()

    def fill(self) -> None:
        """Keep requests prepared, a few at a time, until the whole plan is read; for a greenlet of its own.

        Raises what reading the plan does.
        """
        schedule = self.schedule
        while not (self.stopping or schedule.all_read):
            gevent.sleep(_FILL_S if schedule.wants_more(self.now_ns()) else _FULL_S)
            due, now = schedule.known_due(), monotonic_ns()
            end = now + (_FILL_NS if schedule.well_prepared else _HURRY_NS)
            while schedule.wants_more(self.now_ns()) and monotonic_ns() < end and schedule.read_more():
                pass
            if schedule.known_due() != due:
                self._wake_all()
        if schedule.trouble is not None:  # a user found it, who ran out of prepared requests
            raise schedule.trouble

    def stop(self) -> None:
        """Send nothing more; what is in flight goes on."""
        self.stopping = True
        self.started.set()
        self._wake_all()

    def _wake_all(self) -> None:
        for timer in self._timers:
            timer.wake()
