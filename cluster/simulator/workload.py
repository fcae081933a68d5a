"""What comes to a simulated fleet, and what became of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


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

    def check_open(self) -> None:
        """Raise ValueError unless arrivals are in order and every request asks for output."""
        if np.any(np.diff(self.arrival_s) < 0):
            raise ValueError("arrivals must be in order")
        if len(bad := np.flatnonzero((self.output_tokens < 1) | (self.input_tokens < 0))):
            k = bad[0]
            raise ValueError(f"request {k}: {self.input_tokens[k]} in, {self.output_tokens[k]} out")

    def followers(self) -> dict[int, list[int]]:
        """Who waits for each request. Raises ValueError for one that waits for a later one or for itself."""
        found: dict[int, list[int]] = {}
        for k, before in enumerate([] if self.after is None else self.after.tolist()):
            if before >= k:
                raise ValueError(f"request {k} waits for request {before}, which does not come before it")
            if before >= 0:
                found.setdefault(before, []).append(k)
        return found


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


@dataclass(slots=True, kw_only=True)
class ReplicaLife:
    """From when a replica was asked for until it is given back; it is paid for from the one to the other."""

    asked_s: float
    ready_s: float
    """When it answers first, if it lives so long."""
    drains_s: float | None = None
    """From when on it takes no new requests; None: to the end it does."""
    ended_s: float | None = None
    """None: it is there at the end of the simulation."""
    failed: bool = False
    """Whether that was a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What became of each request of a workload. NaN: it did not come so far."""

    due_s: Floats
    """When it came: its arrival, the end of its predecessor and its think time, or when its slot was free."""
    first_token_s: Floats
    finished_s: Floats
    replica: Ints
    """Who served it; -1: it never came, or nobody was there."""
    first_step: Ints
    """Of its replica; -1: it had no token."""
    step_end_s: Items[Floats]
    """When each step of each replica ended."""
    resumed: Mapping[int, Items[tuple[int, int]]] = field(default_factory=dict)
    """Of each request that was thrown out and went on, each time: tokens it had, and the step that gave the next."""

    cached_tokens: Ints | None = None
    """Of each prompt, in the KV cache when it was first admitted; -1: it never was. None: nothing is shared."""
    samples: Items[Items[Sample]] = ()
    """Of each replica, where they were asked for: all at the same moments, with nothing in it while it is not there."""
    lost_s: Mapping[int, float] = field(default_factory=dict)
    """When each request was lost with its replica, or came while no replica was ready (`replica` is -1 then)."""
    lives: Items[ReplicaLife] = ()
    """Of each replica."""

    def token_s(self, request: int, output_tokens: int) -> Floats:
        """When each token of a request came; those up to the end of the simulation, or of its replica."""
        first = int(self.first_step[request])
        if first < 0:
            return np.zeros(0)
        ends = self.step_end_s[int(self.replica[request])]
        parts = [(0, first), *self.resumed.get(request, ()), (output_tokens, 0)]
        return np.concatenate([ends[step : step + until - had] for (had, step), (until, _) in pairwise(parts)])
