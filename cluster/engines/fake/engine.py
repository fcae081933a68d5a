"""The laboratory's engine in real time: when the fake server's tokens are due, with ``--step``.

The scheduler and the step time are those of `cluster.simulator`. Each step ends at the end of the one before plus its
own time, however late this process gets to it: lateness delays what is written and never what comes after. A request
counts from when the kernel had it and is seen when the running step ends, so that `cluster.simulator.fleet`, given
``came_ns`` of every request, ends its steps at the same times.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from harness.cluster.simulator.blocks import block_keys
from harness.cluster.simulator.scheduler import Limits, Scheduler, Sequence
from harness.cluster.simulator.step_time import Chunk, LinearStep, StepTime

POLLS = 5
"""Turns of the event loop between two steps: a request on a new connection takes four to be accepted and read."""
SPIN_S = 0.001
"""The event loop's timer is up to 1 ms late; the last of the wait is spent turning it."""


class PacedAnswer(Protocol):
    """What the engine paces: `cluster.engines.fake.answers.AnswerStream`."""

    received_ns: int
    """When the kernel had the request."""
    came_ns: int
    """From when the engine counts it; the engine says."""
    prompt_tokens: int
    tokens: int

    def words(self) -> Items[Hashable]:
        """The prompt, token by token."""

    def token(self, given: int, due_ns: int) -> None:
        """The engine has given so many tokens, the last at ``due_ns``."""


@dataclass(slots=True, eq=False, kw_only=True)
class PacedRequest(Sequence):
    """An answer as the engine sees it."""

    answer: PacedAnswer
    came_ns: int
    """When the kernel had the request, or when it was read, if a step had begun in between."""


@dataclass(frozen=True, slots=True)
class SlowStep:
    """Another step time, each step ``slow`` times as long."""

    step_time: StepTime
    slow: float

    def __call__(self, chunks: Items[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        return self.slow * self.step_time(chunks, decoding, context)


class PacingEngine:
    """Paces answers by steps on the event loop's clock (CLOCK_MONOTONIC)."""

    def __init__(
        self, limits: Limits, step_time: StepTime, loop: asyncio.AbstractEventLoop, *, longest: int | None = None,
        arrival_s: float = 0.0, arrival_per_token_s: float = 0.0,
    ) -> None:  # fmt: skip
        """``longest``: input and output tokens of a request; None: any. ``arrival_s``, ``arrival_per_token_s``: from
        when the kernel has a request until the engine has it, at all and for each token of its prompt.
        """
        self.scheduler = Scheduler(limits)
        self.step_time, self.loop = step_time, loop
        self.longest = longest
        self._arrival_s, self._arrival_per_token_s = arrival_s, arrival_per_token_s
        self.prompt_tokens = self.generation_tokens = self.cached_tokens = 0
        """Of prompts read to their end, and of tokens given, so far; of the prompts, what was in the prefix cache."""
        self._requests: dict[PacedAnswer, PacedRequest] = {}
        self._coming: list[PacedRequest] = []
        """Not seen yet, since a step is running."""
        self._number = 0
        self._busy = False
        self._ahead: tuple[list[Chunk], int, int] | None = None
        """What the step after the one in progress works on, where it is planned while that runs."""
        self._begin_s, self._end_s = -math.inf, -math.inf
        """Of the last step that was begun."""

    @property
    def waiting(self) -> int:
        """Requests that no step has worked on."""
        return len(self._coming) + len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.scheduler.running)

    @property
    def kv_usage(self) -> float | None:
        """Share of the KV cache that is in use; None: it has no end."""
        blocks = self.scheduler.limits.kv_blocks
        return None if blocks is None else 1 - (self.scheduler.kv_free or 0) / blocks

    @property
    def steps(self) -> int:
        """Steps that have ended."""
        return self.scheduler.step

    def submit(self, answer: PacedAnswer) -> None:
        """A request was read."""
        came_ns = answer.received_ns
        came_ns += round((self._arrival_s + self._arrival_per_token_s * answer.prompt_tokens) * 1e9)
        if came_ns / 1e9 <= self._begin_s:
            came_ns = round(self.loop.time() * 1e9)
        request = PacedRequest(
            number=self._number, input_tokens=answer.prompt_tokens, output_tokens=max(1, answer.tokens), answer=answer,
            came_ns=came_ns,
        )  # fmt: skip
        if self.scheduler.limits.prefix_cache:
            request.keys = block_keys(answer.words(), self.scheduler.limits.block_size)
        self._number += 1
        answer.came_ns = came_ns
        self._requests[answer] = request
        self._coming.append(request)
        if not self._busy:
            self._busy = True
            self._after_polls(POLLS, self._begin)

    def leave(self, answer: PacedAnswer) -> None:
        """An answer is over: the engine forgets it if it has not had its last token, as after a hang-up."""
        request = self._requests.pop(answer, None)
        if request is None:
            return
        if request in self._coming:
            self._coming.remove(request)
        else:
            self.scheduler.drop(request)

    def _after_polls(self, polls: int, then: Callable[[], None]) -> None:
        """Read what has come, then go on."""
        if polls:
            self.loop.call_soon(self._after_polls, polls - 1, then)
        else:
            then()

    def _begin(self) -> None:
        """The next step begins where the last ended, or when the first request came to an idle engine."""
        begin_s = self._end_s
        if not self.scheduler.in_flight:
            if not self._coming:
                self._busy = False
                return
            begin_s = max(begin_s, min(one.came_ns for one in self._coming) / 1e9)
        self._coming.sort(key=lambda one: one.came_ns)
        while self._coming and self._coming[0].came_ns / 1e9 <= begin_s:
            self.scheduler.add(self._coming.pop(0))
        self._begin_s, self._end_s = begin_s, begin_s + self.step_time(*(self._ahead or self.scheduler.begin()))
        self._ahead = None
        if self.scheduler.limits.async_scheduling:
            chunks, decoding, context = self.scheduler.begin()
            self._ahead = (chunks, decoding, context) if chunks or decoding else None
        self.loop.call_at(self._end_s - SPIN_S, self._end)

    def _end(self) -> None:
        """The step ends: everyone who decodes gets one token."""
        if self.loop.time() < self._end_s:
            self.loop.call_soon(self._end)
            return
        scheduler, step, due_ns = self.scheduler, self.scheduler.step, round(self._end_s * 1e9)
        given = [(one, tokens) for one, tokens in scheduler.tokens_given() if isinstance(one, PacedRequest)]
        self.generation_tokens += len(given)
        for request in scheduler.end():
            if isinstance(request, PacedRequest):
                self._requests.pop(request.answer, None)
        for request, tokens in sorted(given, key=lambda one: one[0].number):
            if request.first_step == step:
                self.prompt_tokens += request.input_tokens
                self.cached_tokens += max(0, request.cached)
            request.answer.token(tokens, due_ns)
        self._after_polls(POLLS, self._begin)


def engine_of(args: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> PacingEngine:
    """The engine that the server's command line asks for; ``--slots 0``: no limit."""
    step = None if args.step is None else LinearStep(*(ms / 1000 for ms in args.step))
    if args.simulate is not None:
        from harness.cluster.catalogue.models import get_model
        from harness.cluster.catalogue.tiers import get_tier
        from harness.cluster.engines.simulated import simulated_engine
        from harness.cluster.hardware.calibration import decode_model_calibration

        model, tier = get_model(args.simulate[0]), get_tier(args.simulate[1])
        own = None if args.calibration is None else decode_model_calibration(args.calibration)
        found = simulated_engine(model, tier, step, own)
        return PacingEngine(
            found.limits, SlowStep(found.step_time, args.slow), loop, longest=found.longest,
            arrival_s=args.slow * found.arrival_s, arrival_per_token_s=args.slow * found.arrival_per_token_s,
        )  # fmt: skip
    limits = Limits(
        max_num_seqs=args.slots or sys.maxsize, max_num_batched_tokens=args.max_num_batched_tokens,
        async_scheduling=args.async_scheduling,
    )  # fmt: skip
    assert step is not None
    return PacingEngine(limits, step, loop)
