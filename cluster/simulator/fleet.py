"""Engines in virtual time: a workload in, the time of every token out.

A request that comes while a step runs is seen when that step ends (with asynchronous scheduling, when the step after it
ends); one that comes to an idle engine begins a step.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.cluster.simulator.alone import serve_alone
from harness.cluster.simulator.routing import Router as Router
from harness.cluster.simulator.routing import Routing
from harness.cluster.simulator.scheduler import Limits, Scheduler, Sequence
from harness.cluster.simulator.step_time import Chunk, StepTime, many_steps

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COUNTED: Ints = np.arange(4096)
"""Steps that are skipped at once, at most."""
FEW = 4
"""So many steps are sooner gone through one by one."""


class SimulatedReplica:
    """One engine and its clock: a step begins, and later it ends."""

    def __init__(self, limits: Limits, step_time: StepTime) -> None:
        self.scheduler = Scheduler(limits)
        self.step_time = step_time
        self.next_s = math.inf
        """When the step in progress ends, or else the next can begin; inf: there is nothing to do."""
        self.step_end_s = array("d")
        """When each step ended."""
        self._in_step = False
        self._plans_ahead = limits.async_scheduling
        self._ahead: tuple[list[Chunk], int, int] | None = None
        """What the step after the one in progress works on, where it is planned while that runs."""
        self._many = many_steps(step_time)
        self._took_s = 0.0
        """By the step in progress."""

    def submit(self, sequence: Sequence, at_s: float) -> None:
        """A request comes. What is to happen before ``at_s`` must have happened; the step that begins then sees it."""
        self.scheduler.add(sequence)
        if self.next_s == math.inf:
            self.next_s = at_s

    def advance(self) -> list[Sequence]:
        """What happens at ``next_s``: a step begins, or it ends; the sequences that ended with it."""
        scheduler = self.scheduler
        if not self._in_step:
            self._in_step = True
            self._took_s = self.step_time(*(self._ahead or scheduler.begin()))
            self.next_s += self._took_s
            if self._plans_ahead:
                chunks, decoding, context = scheduler.begin()
                self._ahead = (chunks, decoding, context) if chunks or decoding else None
            return []
        self._in_step = False
        self.step_end_s.append(self.next_s)
        done = scheduler.end()
        if done and not scheduler.in_flight:
            self.next_s = math.inf
        return done

    def skip(self, before_s: float) -> None:
        """What `advance` does in steps in which nothing changes but lengths, as far as they end before ``before_s``.

        The same to the last bit, and much faster: steps are laid end to end by NumPy.
        """
        scheduler, ahead = self.scheduler, self._ahead
        if not self._in_step or self.next_s >= before_s or (ahead is not None and ahead[0]):
            return
        steps = scheduler.steady()
        if steps < FEW:
            return
        steps = int(min(steps, len(COUNTED), (before_s - self.next_s) / max(self._took_s, 1e-9) + 2))
        decoding = len(scheduler.decoding)
        context = scheduler.context if ahead is None else ahead[2]
        if self._many is None:
            done = 0
            while done < steps and self.next_s < before_s:
                self.step_end_s.append(self.next_s)
                self._took_s = self.step_time((), decoding, context + decoding * done)
                self.next_s += self._took_s
                done += 1
        else:
            ends = np.empty(steps + 1)
            ends[0] = self.next_s
            ends[1:] = self._many(decoding, context + decoding * COUNTED[:steps])
            self._took_s = float(ends[-1])
            np.add.accumulate(ends, out=ends)
            done = int(np.searchsorted(ends[:-1], before_s))
            self.step_end_s.frombytes(ends[:done].tobytes())
            self.next_s = float(ends[done])
        scheduler.skip(done)
        if ahead is not None:
            self._ahead = ahead[0], decoding, context + decoding * done


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests, each array of one length."""

    arrival_s: Floats
    """When each comes, in order. Of one that waits (``after``) not earlier than this. Ignored in a closed loop."""
    input_tokens: Ints
    output_tokens: Ints
    after: Ints | None = None
    """Index of the request whose end each waits for, below its own; -1: none. None: nobody waits."""
    think_s: Floats | None = None
    """Between that end and this request; None: 0."""
    delay_s: Floats | None = None
    """From when a request comes until the engine has it: HTTP, tokenizer, processes. None: 0."""
    keys: Items[Items[Hashable]] | None = None
    """Of each request, for its full blocks of prompt and answer that others may share (`blocks.block_keys`)."""
    session: Ints | None = None
    """Number of the session of each request; for a router that keeps them together."""

    def __len__(self) -> int:
        return len(self.input_tokens)


class Sample(NamedTuple):
    """The state of a replica at one moment."""

    at_s: float
    running: int
    waiting: int
    kv_free: int | None
    """Blocks; None: nobody counts them."""
    preemptions: int
    """So far."""
    steps: int
    """That have ended so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What became of each request of a workload. NaN: it did not come so far."""

    due_s: Floats
    """When it came: its arrival, the end of its predecessor and its think time, or when its slot was free."""
    first_token_s: Floats
    finished_s: Floats
    replica: Ints
    """Who served it; -1: it never came."""
    first_step: Ints
    """Of its replica; -1: it had no token."""
    step_end_s: Items[Floats]
    """When each step of each replica ended."""
    resumed: Mapping[int, Items[tuple[int, int]]] = field(default_factory=dict)
    """Of each request that was thrown out and went on, each time: tokens it had, and the step that gave the next."""

    cached_tokens: Ints | None = None
    """Of each prompt, in the KV cache when it was first admitted; -1: it never was. None: nothing is shared."""
    samples: Items[Items[Sample]] = ()
    """Of each replica, where they were asked for."""

    def token_s(self, request: int, output_tokens: int) -> Floats:
        """When each token of a request came; those up to the end of the simulation."""
        first = int(self.first_step[request])
        if first < 0:
            return np.zeros(0)
        ends = self.step_end_s[int(self.replica[request])]
        parts = [(0, first), *self.resumed.get(request, ()), (output_tokens, 0)]
        return np.concatenate([ends[step : step + until - had] for (had, step), (until, _) in pairwise(parts)])


def simulate(
    workload: Workload,
    limits: Limits,
    step_times: Items[StepTime],
    *,
    router: Router | Ints = "round robin",
    concurrency: int | None = None,
    until_s: float = math.inf,
    sample_s: float | None = None,
    stale_s: float = 0.0,
) -> Outcomes:
    """Serve ``workload`` on as many replicas as there are step times (one of its own each, for those with state).

    ``router``: or the replica of each request, in an open loop where nobody waits. ``concurrency``: a closed loop of so
    many slots, which take the requests in order. ``until_s``: what ends or comes later does not. ``sample_s``: how far
    apart replicas are sampled, from that time on until they are idle for good; None: they are not. ``stale_s``: how far
    apart the router asks replicas how many they have; 0: it always knows.

    Raises ValueError for a workload that is out of order.
    """
    beforehand = concurrency is None and workload.after is None
    if not isinstance(router, str) and not beforehand:
        raise ValueError("who serves a request cannot be said beforehand where requests wait for others")
    plain = limits.is_plain and sample_s is None and workload.delay_s is None
    if beforehand and plain and (not isinstance(router, str) or router == "round robin"):
        owner = np.arange(len(workload)) % len(step_times) if isinstance(router, str) else router
        return _each_alone(workload, limits, step_times, owner, until_s)
    fleet = _Fleet(workload, limits, step_times, router, concurrency, sample_s, stale_s)
    fleet.run(until_s)
    return fleet.outcome()


def _each_alone(
    workload: Workload, limits: Limits, step_times: Items[StepTime], owner: Ints, until_s: float
) -> Outcomes:  # fmt: skip
    """Replicas whose requests are known beforehand, one after the other: the same as `_Fleet`, faster."""
    _check_open(workload)
    n = len(workload)
    came = workload.arrival_s < until_s
    finished_s, first_step, ends = np.full(n, np.nan), np.full(n, -1, dtype=np.int64), []
    for r, step_time in enumerate(step_times):
        mine = np.flatnonzero(came & (owner == r))
        outputs = workload.output_tokens[mine]
        found = serve_alone(
            workload.arrival_s[mine].tolist(), workload.input_tokens[mine].tolist(), outputs.tolist(), limits,
            step_time, until_s,
        )  # fmt: skip
        end_s, first = np.array(found[0], dtype=np.float64), np.array(found[1], dtype=np.int64)
        last = first + outputs - 1
        done = (first >= 0) & (last < len(end_s))
        finished_s[mine[done]] = end_s[last[done]]
        first_step[mine] = first
        ends.append(end_s)
    return Outcomes(
        due_s=np.where(came, workload.arrival_s, np.nan), first_token_s=_first_token_s(owner, first_step, ends),
        finished_s=finished_s, replica=np.where(came, owner, -1), first_step=first_step, step_end_s=ends,
    )  # fmt: skip


def _check_open(workload: Workload) -> None:
    if np.any(np.diff(workload.arrival_s) < 0):
        raise ValueError("arrivals must be in order")
    if len(bad := np.flatnonzero((workload.output_tokens < 1) | (workload.input_tokens < 0))):
        k = bad[0]
        raise ValueError(f"request {k}: {workload.input_tokens[k]} in, {workload.output_tokens[k]} out")


def _first_token_s(owner: Ints, first_step: Ints, ends: Items[Floats]) -> Floats:
    first_s = np.full(len(owner), np.nan)
    for r, end_s in enumerate(ends):
        mine = (owner == r) & (first_step >= 0)
        first_s[mine] = end_s[first_step[mine]]
    return first_s


class _Fleet:
    """Replicas, what is still to come to them, and what became of what came."""

    def __init__(
        self, workload: Workload, limits: Limits, step_times: Items[StepTime], router: Router | Ints,
        concurrency: int | None, sample_s: float | None = None, stale_s: float = 0.0,
    ) -> None:  # fmt: skip
        n = len(workload)
        self.sample_s = sample_s
        self.samples: list[list[Sample]] = [[] for _ in step_times]
        self.replicas = [SimulatedReplica(limits, step_time) for step_time in step_times]
        self.said = None if isinstance(router, str) else router
        self.routing = Routing(
            router if isinstance(router, str) else "round robin", [one.scheduler for one in self.replicas],
            sessions=None if workload.session is None else workload.session.tolist(), keys=workload.keys,
            stale_s=stale_s,
        )  # fmt: skip
        self.closed = concurrency is not None
        waits = workload.after is not None and not self.closed
        if not self.closed and not waits:
            _check_open(workload)
        self.dynamic = waits or self.closed
        self.due_s, self.finished_s = np.full(n, np.nan), np.full(n, np.nan)
        self.owner, self.first_step = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
        self.keys = workload.keys
        self.cached = np.full(n, -1, dtype=np.int64) if limits.prefix_cache else None
        self.resumed: dict[int, Items[tuple[int, int]]] = {}
        self.inputs, self.outputs = workload.input_tokens.tolist(), workload.output_tokens.tolist()
        self.earliest_s = [0.0] * n if self.closed else workload.arrival_s.tolist()
        self.think_s = [0.0] * n if workload.think_s is None else workload.think_s.tolist()
        self.followers = _followers(workload) if waits else {}
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
            over = not self.coming and all(replica.next_s == math.inf for replica in self.replicas)
            limit_s = until_s
            if self.sample_s is not None and not (over and sampled > 1):
                limit_s = min(until_s, sampled * self.sample_s)
            if self.dynamic:
                self._advance_together(limit_s)
            else:
                self._advance_apart(min(self.coming[0][0], limit_s) if self.coming else limit_s)
            if self.coming and self.coming[0][0] < limit_s:
                self._send()
            elif limit_s < until_s:
                self._sample(limit_s)
                sampled += 1
            else:
                return

    def _send(self) -> None:
        at_s, k = heapq.heappop(self.coming)
        chosen = self.routing.choose(k, at_s) if self.said is None else int(self.said[k])
        self.owner[k] = chosen
        keys = () if self.keys is None else self.keys[k]
        self.replicas[chosen].submit(Sequence(k, self.inputs[k], self.outputs[k], keys=keys), at_s)

    def _sample(self, at_s: float) -> None:
        for replica, samples in zip(self.replicas, self.samples, strict=True):
            one = replica.scheduler
            samples.append(Sample(at_s, len(one.running), len(one.waiting), one.kv_free, one.preemptions, one.step))

    def _advance_apart(self, end_s: float) -> None:
        for replica in self.replicas:
            while replica.next_s < end_s:
                replica.skip(end_s)
                if (now_s := replica.next_s) < end_s and (done := replica.advance()):
                    self._ended(done, now_s)

    def _advance_together(self, until_s: float) -> None:
        """Up to the next request; whoever is earliest goes first, since an end there may send a request anywhere."""
        while True:
            replica = min(self.replicas, key=lambda one: one.next_s)
            end = min(self.coming[0][0], until_s) if self.coming else until_s
            if replica.next_s >= end:
                return
            replica.skip(min([end, *(one.next_s for one in self.replicas if one is not replica)]))
            if (now_s := replica.next_s) < end:
                self._ended(replica.advance(), now_s)

    def _ended(self, done: Items[Sequence], now_s: float) -> None:
        for sequence in done:
            k = sequence.number
            self.finished_s[k], self.first_step[k] = now_s, sequence.first_step
            if self.cached is not None:
                self.cached[k] = sequence.cached
            if sequence.resumed:
                self.resumed[k] = sequence.resumed
            if (following := next(self.queued, None)) is not None:
                self._due(following, now_s)
            for follower in self.followers.get(k, ()):
                self._due(follower, max(now_s + self.think_s[follower], self.earliest_s[follower]))

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
        first_s = _first_token_s(self.owner, self.first_step, ends)
        return Outcomes(
            due_s=self.due_s, first_token_s=first_s, finished_s=self.finished_s, replica=self.owner,
            first_step=self.first_step, step_end_s=ends, resumed=self.resumed, cached_tokens=self.cached,
            samples=self.samples if self.sample_s is not None else (),
        )  # fmt: skip


def _followers(workload: Workload) -> dict[int, list[int]]:
    """Who waits for each request. Raises ValueError for one that waits for a later one or for itself."""
    found: dict[int, list[int]] = {}
    assert workload.after is not None
    for k, before in enumerate(workload.after.tolist()):
        if before >= k:
            raise ValueError(f"request {k} waits for request {before}, which does not come before it")
        if before >= 0:
            found.setdefault(before, []).append(k)
    return found
