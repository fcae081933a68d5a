"""Who of several replicas gets the next request."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

from harness.cluster.simulator.scheduler import Scheduler

Router = Literal["round robin", "least in flight", "session", "prefix"]
"""Each in turn; the one with the fewest (of equal ones the first); all of a session to one; or the one that was sent
the longest part of the prompt before, and where nobody was, the one with the fewest."""


class Routing:
    """A router and what it knows: who is ready, whom it sent what, and how many were in flight when it last asked."""

    def __init__(
        self, router: Router, *, sessions: Sequence[int] | None = None,
        keys: Sequence[Sequence[Hashable]] | None = None, stale_s: float = 0.0,
    ) -> None:  # fmt: skip
        """``sessions``, ``keys``: of each request. ``stale_s``: how far apart it asks replicas; 0: it always knows.

        Raises ValueError for sessions that are not given.
        """
        if router == "session" and sessions is None:
            raise ValueError("nobody says which requests are of one session")
        self.router: Router = "least in flight" if router == "prefix" and keys is None else router
        self.ready: list[int] = []
        """Numbers of the replicas that take requests, in the order in which they came to be."""
        self.sessions, self.keys, self.stale_s = sessions, keys, stale_s
        self._schedulers: dict[int, Scheduler] = {}
        self._turn = 0
        self._asked_s = -math.inf
        self._in_flight: dict[int, int] = {}
        self._of_session: dict[int, int] = {}
        self._sent: dict[Hashable, int] = {}
        """Key of a block -> who was sent it last."""

    def join(self, number: int, scheduler: Scheduler) -> None:
        """A replica is ready."""
        self.ready.append(number)
        self._schedulers[number] = scheduler

    def leave(self, number: int) -> None:
        """A replica takes no more requests, if it ever did."""
        if self._schedulers.pop(number, None) is not None:
            self.ready.remove(number)
            self._in_flight.pop(number, None)

    def asks(self, k: int, at_s: float) -> bool:
        """Whether the answer to `choose` depends on what replicas do up to ``at_s``."""
        if self.router in ("round robin", "session") or (self.router == "prefix" and self._known(k) is not None):
            return False
        return at_s >= self._asked_s + self.stale_s

    def choose(self, k: int, at_s: float) -> int:
        """Who gets request ``k``, which comes at ``at_s``, not before the ones that came so far; one must be ready."""
        if self.router == "round robin":
            self._turn += 1
            return self.ready[(self._turn - 1) % len(self.ready)]
        if self.router == "session":
            assert self.sessions is not None
            session = self.sessions[k]
            if self._of_session.get(session) not in self._schedulers:
                self._of_session[session] = self.ready[session % len(self.ready)]
            return self._of_session[session]
        if self.router == "least in flight":
            return self._fewest(at_s)
        assert self.keys is not None
        known = self._known(k)
        chosen = self._fewest(at_s) if known is None else known
        self._sent.update(dict.fromkeys(self.keys[k], chosen))
        return chosen

    def _known(self, k: int) -> int | None:
        """Who was sent most of a prompt before, and is still there."""
        assert self.keys is not None
        found = (self._sent.get(key) for key in reversed(self.keys[k]))
        return next((one for one in found if one in self._schedulers), None)

    def _fewest(self, at_s: float) -> int:
        if not self.stale_s:
            return min(self.ready, key=lambda r: self._schedulers[r].in_flight)
        if at_s >= self._asked_s + self.stale_s:
            # it asks on a clock of its own; what happened since its last tick is seen a little too soon
            self._asked_s = at_s // self.stale_s * self.stale_s
            self._in_flight = {r: one.in_flight for r, one in self._schedulers.items()}
        return min(self.ready, key=lambda r: self._in_flight.get(r, 0))
