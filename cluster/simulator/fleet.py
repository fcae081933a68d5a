"""Replicas in virtual time: a workload in, the time of every token out.

Replicas go on apart from each other: each is taken up to a moment only when somebody asks it, so that a fleet costs
hardly more than its requests. Where the end of a request sends another one (sessions that wait, a closed loop), they go
on together, whoever is earliest first.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence as Items
from typing import Literal

import numpy as np

from harness.cluster.simulator.clock import SimulatedReplica
from harness.cluster.simulator.elastic import Autoscaler, Elastic, PlannedReplicas
from harness.cluster.simulator.routing import Router as Router
from harness.cluster.simulator.routing import Routing
from harness.cluster.simulator.scheduler import Limits, Sequence
from harness.cluster.simulator.step_time import StepTime
from harness.cluster.simulator.workload import Outcomes as Outcomes
from harness.cluster.simulator.workload import ReplicaLife, Sample
from harness.cluster.simulator.workload import Workload as Workload

Event = Literal["ready", "fail", "resize", "decide"]


def simulate(
    workload: Workload,
    limits: Limits,
    step_times: Items[StepTime],
    *,
    router: Router = "round robin",
    concurrency: int | None = None,
    until_s: float = math.inf,
    sample_s: float | None = None,
    stale_s: float = 0.0,
    elastic: Elastic | None = None,
) -> Outcomes:
    """Serve ``workload`` on as many replicas as there are step times (one of its own each, for those with state).

    ``concurrency``: a closed loop of so many slots, which take the requests in order. ``until_s``: what ends or comes
    later does not. ``sample_s``: how far apart replicas are sampled, from that time on until they are idle for good;
    None: they are not. ``stale_s``: how far apart the router asks replicas how many they have; 0: it always knows.
    ``elastic``: how replicas come and go, None: they do not; one that is started then takes the step times in turn. Who
    is ready the router knows at once.

    Raises ValueError for a workload that is out of order.
    """
    fleet = _Fleet(workload, limits, step_times, router, concurrency, sample_s, stale_s, elastic)
    fleet.run(until_s)
    return fleet.outcome()


class _Fleet:
    """Replicas, what is still to come to them, and what became of what came."""

    def __init__(
        self, workload: Workload, limits: Limits, step_times: Items[StepTime], router: Router,
        concurrency: int | None, sample_s: float | None, stale_s: float, elastic: Elastic | None,
    ) -> None:  # fmt: skip
        n = len(workload)
        self.sample_s, self.elastic = sample_s, elastic
        self.limits, self.step_times = limits, step_times
        self.replicas: list[SimulatedReplica] = []
        self.lives: list[ReplicaLife] = []
        self.samples: list[list[Sample]] = []
        self.routing = Routing(
            router, sessions=None if workload.session is None else workload.session.tolist(), keys=workload.keys,
            stale_s=stale_s,
        )  # fmt: skip
        self.going: dict[int, SimulatedReplica] = {}
        """Those that answer or drain, by number."""
        self.happening: list[tuple[float, int, Event, int]] = []
        """What is to happen to the fleet: when, a number that orders what happens at once, what, and to which replica
        (to resize: how many there shall be)."""
        self.planned = 0
        self.decided: deque[tuple[float, int]] = deque()
        for _ in step_times:
            self._launch(0.0, start_s=0.0)
        self._expect()
        self.closed = concurrency is not None
        waits = workload.after is not None and not self.closed
        if not self.closed and not waits:
            workload.check_open()
        self.dynamic = waits or self.closed
        self.due_s, self.finished_s = np.full(n, np.nan), np.full(n, np.nan)
        self.owner, self.first_step = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
        self.keys = workload.keys
        self.cached = np.full(n, -1, dtype=np.int64) if limits.prefix_cache else None
        self.resumed: dict[int, Items[tuple[int, int]]] = {}
        self.lost_s: dict[int, float] = {}
        self.inputs, self.outputs = workload.input_tokens.tolist(), workload.output_tokens.tolist()
        self.earliest_s = [0.0] * n if self.closed else workload.arrival_s.tolist()
        self.think_s = [0.0] * n if workload.think_s is None else workload.think_s.tolist()
        self.followers = workload.followers() if waits else {}
        self.queued = iter(range(min(concurrency or 0, n), n)) if self.closed else iter(())
        first = range(min(concurrency, n)) if concurrency is not None else range(n)
        free = [k for k in first if not waits or workload.after is None or workload.after[k] < 0]
        self.delay_s = None if workload.delay_s is None else workload.delay_s.tolist()
        self.coming: list[tuple[float, int]] = []
        """When the engine gets each that is due."""
        for k in free:
            self._due(k, self.earliest_s[k])

    def _due(self, k: int, due_s: float) -> None:
        self.due_s[k] = due_s
        heapq.heappush(self.coming, (due_s if self.delay_s is None else due_s + self.delay_s[k], k))

    def run(self, until_s: float) -> None:
        """Everything that happens before ``until_s``."""
        sampled = 1
        while True:
            over = not self.coming and all(one.next_s == math.inf for one in self.going.values())
            sample_s = until_s
            if self.sample_s is not None and not (over and sampled > 1):
                sample_s = min(until_s, sampled * self.sample_s)
            happens_s = self.happening[0][0] if self.happening and not over else math.inf
            limit_s = min(sample_s, happens_s)
            if self.dynamic:
                self._advance_together(limit_s)
            if self.coming and self.coming[0][0] < limit_s:
                self._send()
                continue
            if not self.dynamic:
                self._advance_all(limit_s)
            if happens_s <= sample_s and happens_s < until_s:
                at_s, _, what, number = heapq.heappop(self.happening)
                self._happen(at_s, what, number)
            elif sample_s < until_s:
                self._sample(sample_s)
                sampled += 1
            else:
                return

    def _send(self) -> None:
        at_s, k = heapq.heappop(self.coming)
        if not self.routing.ready:
            self._lose(k, at_s)
            return
        if self.routing.asks(k, at_s) and not self.dynamic:
            self._advance_all(at_s)
        chosen = self.routing.choose(k, at_s)
        replica = self.replicas[chosen]
        if not self.dynamic:
            self._advance(replica, chosen, at_s)
        self.owner[k] = chosen
        keys = () if self.keys is None else self.keys[k]
        replica.submit(Sequence(k, self.inputs[k], self.outputs[k], keys=keys), at_s)

    def _sample(self, at_s: float) -> None:
        for life, replica, samples in zip(self.lives, self.replicas, self.samples, strict=True):
            one = replica.scheduler
            if life.ended_s is None:
                samples.append(Sample(at_s, len(one.running), len(one.waiting), one.kv_free, one.preemptions, one.step))
            else:
                samples.append(Sample(at_s, 0, 0, self.limits.kv_blocks, one.preemptions, one.step))

    def _advance_all(self, end_s: float) -> None:
        for number, replica in self.going.items():
            if replica.next_s < end_s:
                self._advance(replica, number, end_s)

    def _advance(self, replica: SimulatedReplica, number: int, end_s: float) -> None:
        while done := replica.run(end_s):
            self._ended(done, replica.step_end_s[-1], number)

    def _advance_together(self, until_s: float) -> None:
        """Up to the next request; whoever is earliest goes first, since an end there may send a request anywhere."""
        while self.going:
            number, replica = min(self.going.items(), key=lambda one: one[1].next_s)
            end = min(self.coming[0][0], until_s) if self.coming else until_s
            if replica.next_s >= end:
                return
            replica.skip(min([end, *(one.next_s for one in self.going.values() if one is not replica)]))
            if (now_s := replica.next_s) < end:
                self._ended(replica.advance(), now_s, number)

    def _ended(self, done: Items[Sequence], now_s: float, number: int) -> None:
        for sequence in done:
            k = sequence.number
            self.finished_s[k], self.first_step[k] = now_s, sequence.first_step
            if self.cached is not None:
                self.cached[k] = sequence.cached
            if sequence.resumed:
                self.resumed[k] = sequence.resumed
            if self.dynamic:
                self._follow(k, now_s)
        if done and self.lives[number].drains_s is not None and not self.replicas[number].scheduler.in_flight:
            self.lives[number].ended_s = now_s

    def _follow(self, k: int, now_s: float) -> None:
        """A request has ended, well or not: who waited for that is due."""
        if (following := next(self.queued, None)) is not None:
            self._due(following, now_s)
        for follower in self.followers.get(k, ()):
            self._due(follower, max(now_s + self.think_s[follower], self.earliest_s[follower]))

    def _lose(self, k: int, now_s: float) -> None:
        self.lost_s[k] = now_s
        self._follow(k, now_s)

    def _expect(self) -> None:
        """What happens to the fleet whatever becomes of it."""
        if self.elastic is None:
            return
        for at_s, number in self.elastic.failures.at_s:
            self._plan(at_s, "fail", number)
        scaling = self.elastic.scaling
        if isinstance(scaling, PlannedReplicas):
            for at_s, replicas in zip(scaling.at_s, scaling.replicas, strict=True):
                self._plan(at_s, "resize", replicas)
        elif scaling is not None:
            self._plan(scaling.every_s, "decide", 0)

    def _plan(self, at_s: float, what: Event, number: int) -> None:
        self.planned += 1
        heapq.heappush(self.happening, (at_s, self.planned, what, number))

    def _happen(self, at_s: float, what: Event, number: int) -> None:
        if what == "ready":
            self._ready(number, at_s)
        elif what == "fail":
            self._fail(number, at_s)
        elif what == "resize":
            self._resize(number, at_s)
        else:
            assert self.elastic is not None and isinstance(self.elastic.scaling, Autoscaler)
            scaling = self.elastic.scaling
            ready = [self.replicas[k].scheduler for k in self.routing.ready]
            total = sum(len(one.waiting) if scaling.gauge == "waiting" else one.in_flight for one in ready)
            self._resize(scaling.wanted(at_s, total, len(self._staying()), self.decided), at_s)
            self._plan(at_s + scaling.every_s, "decide", 0)

    def _launch(self, asked_s: float, start_s: float) -> None:
        number = len(self.replicas)
        self.replicas.append(SimulatedReplica(self.limits, self.step_times[number % len(self.step_times)]))
        self.lives.append(ReplicaLife(asked_s=asked_s, ready_s=asked_s + start_s))
        before = self.samples[0] if self.samples else []
        self.samples.append([Sample(one.at_s, 0, 0, self.limits.kv_blocks, 0, 0) for one in before])
        if start_s:
            self._plan(asked_s + start_s, "ready", number)
        else:
            self._ready(number, asked_s)

    def _ready(self, number: int, at_s: float) -> None:
        if self.lives[number].ended_s is not None:
            return
        self.going[number] = self.replicas[number]
        self.routing.join(number, self.replicas[number].scheduler)
        lives_s = math.inf if self.elastic is None else self.elastic.failures.after_s(number)
        if lives_s < math.inf:
            self._plan(at_s + lives_s, "fail", number)

    def _fail(self, number: int, at_s: float) -> None:
        """All that it has is lost, and another is started unless this one was to be given back."""
        if number >= len(self.lives) or self.lives[number].ended_s is not None:
            return
        life, replica = self.lives[number], self.replicas[number]
        life.ended_s, life.failed = at_s, True
        self._leave(number)
        replica.next_s = math.inf
        for sequence in list(replica.scheduler.sequences()):
            if self.cached is not None:
                self.cached[sequence.number] = sequence.cached
            self._lose(sequence.number, at_s)
        if life.drains_s is None:
            assert self.elastic is not None
            self._launch(at_s, self.elastic.start_s)

    def _resize(self, replicas: int, at_s: float) -> None:
        """Ask for more, or give the newest back: they finish what they have, and those that still start go at once."""
        staying = self._staying()
        assert self.elastic is not None
        for _ in range(replicas - len(staying)):
            self._launch(at_s, self.elastic.start_s)
        for number in staying[replicas:]:
            self.lives[number].drains_s = at_s
            if not self.replicas[number].scheduler.in_flight:
                self.lives[number].ended_s = at_s
            self._leave(number)

    def _staying(self) -> list[int]:
        """Replicas that answer or start, the oldest first."""
        return [k for k, life in enumerate(self.lives) if life.ended_s is None and life.drains_s is None]

    def _leave(self, number: int) -> None:
        self.routing.leave(number)
        self.going = {k: one for k, one in self.going.items() if self.lives[k].ended_s is None}

    def outcome(self) -> Outcomes:
        """What became of each request so far."""
        for _, k in self.coming:
            self.due_s[k] = np.nan
        for replica in self.replicas:
            for sequence in replica.scheduler.sequences():
                if sequence.first_step < len(replica.step_end_s):
                    self.first_step[sequence.number] = sequence.first_step
                self.resumed |= {sequence.number: sequence.resumed} if sequence.resumed else {}
        ends = [np.array(replica.step_end_s, dtype=np.float64) for replica in self.replicas]
        first_s = np.full(len(self.owner), np.nan)
        for number, end_s in enumerate(ends):
            mine = (self.owner == number) & (self.first_step >= 0)
            first_s[mine] = end_s[self.first_step[mine]]
        return Outcomes(
            due_s=self.due_s, first_token_s=first_s, finished_s=self.finished_s, replica=self.owner,
            first_step=self.first_step, step_end_s=ends, resumed=self.resumed, cached_tokens=self.cached,
            samples=self.samples if self.sample_s is not None else (), lost_s=self.lost_s, lives=self.lives,
        )  # fmt: skip
