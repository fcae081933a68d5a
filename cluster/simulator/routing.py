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
    """A router and what it knows: whom it sent what, and how many were in flight when it last asked."""

    def __init__(
        self, router: Router, schedulers: Sequence[Scheduler], *, sessions: Sequence[int] | None = None,
        keys: Sequence[Sequence[Hashable]] | None = None, stale_s: float = 0.0,
    ) -> None:  # fmt: skip
        """``sessions``, ``keys``: of each request. ``stale_s``: how far apart it asks replicas; 0: it always knows.

        Raises ValueError for sessions that are not given.
        """
        if router == "session" and sessions is None:
            raise ValueError("nobody says which requests are of one session")
        self.router, self.schedulers = router, schedulers
        self.sessions, self.keys, self.stale_s = sessions, keys, stale_s
        self._turn = 0
        self._asked_s = -math.inf
        self._in_flight: list[int] = []
        self._sent: dict[Hashable, int] = {}
        """Key of a block -> who was sent it last."""

    def choose(self, k: int, at_s: float) -> int:
        """Who gets request ``k``, which comes at ``at_s``, not before the ones that came so far."""
        n = len(self.schedulers)
        if self.router == "round robin":
            self._turn += 1
            return (self._turn - 1) % n
        if self.router == "session":
            assert self.sessions is not None
            return self.sessions[k] % n
        if self.router == "least in flight" or self.keys is None:
            return self._fewest(at_s)
        keys = self.keys[k]
        known = next((self._sent[key] for key in reversed(keys) if key in self._sent), None)
        chosen = self._fewest(at_s) if known is None else known
        self._sent.update(dict.fromkeys(keys, chosen))
        return chosen

    def _fewest(self, at_s: float) -> int:
        if not self.stale_s:
            return min(range(len(self.schedulers)), key=lambda r: self.schedulers[r].in_flight)
        if at_s >= self._asked_s + self.stale_s:
            # it asks on a clock of its own; what happened since its last tick is seen a little too soon
            self._asked_s = at_s // self.stale_s * self.stale_s
            self._in_flight = [one.in_flight for one in self.schedulers]
        return min(range(len(self.schedulers)), key=self._in_flight.__getitem__)
