"""The order in which a worker's requests are sent, and when each is due.

The plan sets every time before the run starts; a late request never delays a later one.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError, PlanError
from harness.scenarios.plan_reader import Planned, PlanReader


@dataclass(frozen=True, slots=True)
class _Ahead:
    """How far ahead a plan is read: until both the time and the number are reached, or the bytes."""

    ns: int = 10_000_000_000
    requests: int = 2000
    bytes: int = 64 * 2**20
    least_ns: int = 1_000_000_000
    """At least so far, however large requests are,"""
    least: int = 64
    """and so many requests,"""
    most_bytes: int = 256 * 2**20
    """but never more bytes than this."""


AHEAD = _Ahead()


class Schedule:
    """The order of one worker's requests, each handed out once.

    Timed (open loop): by the plan's times. Otherwise in the order of the plan, one whenever asked. A turn that waits
    for another (``after``) is due ``think_ns`` after that one finished, with or without success, but not before its own
    time. So waiting for the server is not lag: lag is the generator's alone.

    ``planned`` yields ``requests`` of them and is read as needed, `AHEAD` ahead; ``awaited`` holds the ids that others
    wait for, ascending. In a closed loop, where only the order matters, a turn that was not read yet is sent when
    reading gets there; in an open loop it is not due before.
    """

    def __init__(
        self, planned: Iterable[Planned], *, timed: bool, requests: int, awaited: npt.NDArray[np.int64]
    ) -> None:
        self._timed = timed
        self._free: deque[tuple[int, Planned]] = deque()
        self._waiting: dict[int, list[Planned]] = {}
        self._released: list[tuple[int, int, Planned]] = []
        self._ends: dict[int, int] = {}  # when requests ended whose next turns were not read yet
        self._planned = iter(planned)
        self._awaited = awaited
        self._shared = len(np.unique(awaited)) < len(awaited)  # several wait for the same
        self._now_ns = self._read_ns = 0  # the run clock, as last given; the planned time of the last request read
        self._bytes = 0
        self._out = 0  # handed out and not finished
        self.prepared = 0
        """Number of requests read and not handed out."""
        self.all_read = False
        self.trouble: HarnessError | None = None
        """Why reading failed, if it did."""
        self.left = requests

    @classmethod
    def of(cls, plan: PlanReader) -> Schedule:
        """The schedule of these requests, those of the first seconds prepared."""
        schedule = cls(plan, timed=plan.timed, requests=plan.requests, awaited=plan.awaited)
        while schedule.wants_more(0) and schedule.read_more():
            pass
        return schedule

    # -- reading the plan ---------------------------------------------------------------------------------------------

    def wants_more(self, now_ns: int) -> bool:
        """Whether less is prepared than `AHEAD` asks for."""
        self._now_ns = now_ns
        if self.all_read:
            return False
        ahead_ns = self._read_ns - now_ns if self._timed else AHEAD.ns
        count = self.prepared if self._timed else len(self._free) + len(self._released)
        if self._bytes >= AHEAD.bytes:
            # Waiting turns must not fill the memory while there is something that can release them.
            moving = self._out or self._free or self._released
            return (count < AHEAD.least or ahead_ns < AHEAD.least_ns) and not (
                moving and self._bytes >= AHEAD.most_bytes
            )
        return count < AHEAD.requests or ahead_ns < AHEAD.ns

    @property
    def well_prepared(self) -> bool:
        """Whether more than half of `AHEAD` is prepared."""
        return self.prepared > AHEAD.requests // 2

    def read_more(self) -> bool:
        """Prepare one more; False when there is none. Raises what reading the plan does."""
        found = self._read_one()
        if self.trouble is not None:
            raise self.trouble
        return found

    def _read_one(self) -> bool:
        try:
            one = next(self._planned, None)
            if one is not None and self._timed and one.scheduled_ns is None:
                raise PlanError(f"request {one.request_id} has no time: this plan is for a closed loop; run it as one")
        except HarnessError as e:
            self.trouble, one = e, None
        if one is None:
            self.all_read = True
            return False
        self.prepared += 1
        self._bytes += one.size
        self._read_ns = one.scheduled_ns or 0
        if one.after is None:
            self._free.append((self._read_ns if self._timed else 0, one))
        elif one.after in self._ends:
            self._release(one, self._ends[one.after] if self._shared else self._ends.pop(one.after))
        else:
            self._waiting.setdefault(one.after, []).append(one)
        return True

    def _is_awaited(self, request_id: int) -> bool:
        at = int(np.searchsorted(self._awaited, request_id))
        return at < len(self._awaited) and self._awaited[at] == request_id

    # -- handing out --------------------------------------------------------------------------------------------------

    def next_due(self) -> int | None:
        """When the next request is due, ns of the run clock; None while all of them wait for an answer.

        When nothing prepared is left, more is prepared now; the time this takes shows as lag.
        """
        while not self._free and not self.all_read and self.wants_more(self._now_ns):
            self._read_one()
        return self.known_due()

    def known_due(self) -> int | None:
        """Like `next_due`, without preparing more."""
        free, released = self._free, self._released
        if free and released:
            return min(free[0][0], released[0][0])
        return free[0][0] if free else released[0][0] if released else None

    def take(self, now_ns: int) -> tuple[Planned, int]:
        """The next request and when it was due: the one due first, also when all are late. (Were later turns to go
        first, a late worker would hold back new sessions for as long as it is late, since some turn is always due.)
        Where new sessions have no time (closed loop), turns whose time has come go before them.
        """
        self.left -= 1
        self.prepared -= 1
        self._out += 1
        self._now_ns = now_ns
        released = self._released
        if released and (not self._free or released[0][0] <= (self._free[0][0] if self._timed else now_ns)):
            due, _, planned = heapq.heappop(released)
        else:
            due, planned = self._free.popleft()
        self._bytes -= planned.size
        return planned, due

    def finished(self, request_id: int, finished_ns: int) -> bool:
        """Note that a request ended; True if that released another."""
        self._out -= 1
        turns = self._waiting.pop(request_id, ())
        for turn in turns:
            self._release(turn, finished_ns)
        if not self.all_read and (self._shared or not turns) and self._is_awaited(request_id):
            self._ends[request_id] = finished_ns
        return bool(turns)

    def _release(self, turn: Planned, finished_ns: int) -> None:
        due = max(finished_ns + turn.think_ns, turn.scheduled_ns or 0 if self._timed else 0)
        heapq.heappush(self._released, (due, turn.request_id, turn))

    def _all(self) -> Iterator[Planned]:
        yield from (one for _, one in self._free)
        yield from (replace(one, scheduled_ns=due) if self._timed else one for due, _, one in self._released)
        yield from (one for turns in self._waiting.values() for one in turns)

    def rest(self) -> list[Planned]:
        """Remove and return what was read and not handed out, by id; released timed turns have the time when they were
        due. Nothing more is read.
        """
        rest = sorted(self._all(), key=lambda one: one.request_id)
        self._free.clear()
        self._released.clear()
        self._waiting.clear()
        self.left = self.prepared = self._bytes = 0
        self.all_read = True
        return rest
