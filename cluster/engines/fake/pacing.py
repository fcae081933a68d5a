"""When the fake server's tokens are due, at times fixed before; with ``--step`` see `cluster.engines.fake.engine`."""

from __future__ import annotations

import asyncio
import heapq
import math
from typing import Protocol

BURST = 64
"""Chunks written in a row before requests that came meanwhile are read."""


class Ticking(Protocol):
    """What the pacer calls: `cluster.engines.fake.answers.AnswerStream`."""

    def tick(self) -> None:
        """It is due."""


class Pacer:
    """Calls answers when they are due, all with one timer of the event loop, in the order of their times."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.due: list[tuple[float, int, Ticking]] = []
        self.number = 0
        self.timer: asyncio.Handle | None = None
        self.timer_at = math.inf

    def call_at(self, at: float, answer: Ticking) -> None:
        """Call ``answer.tick`` at this time of the loop's clock."""
        self.number += 1
        heapq.heappush(self.due, (at, self.number, answer))
        if at < self.timer_at:
            self.arm(at)

    def arm(self, at: float) -> None:
        """Wake up at this time, and not at the one that was set."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer_at = at
        self.timer = self.loop.call_at(at, self.run)

    def run(self) -> None:
        """Everything that is due."""
        due, now, pop = self.due, self.loop.time(), heapq.heappop
        self.timer, self.timer_at = None, -math.inf  # while we are here nobody need set it
        try:
            for _ in range(BURST):
                if not due or due[0][0] > now:
                    break
                pop(due)[2].tick()
        finally:
            if due and due[0][0] <= now:
                self.timer = self.loop.call_soon(self.run)
            else:
                self.timer_at = math.inf
                if due:
                    self.arm(due[0][0])


def step_ms(text: str) -> list[float]:
    """``BASE_MS,PER_SEQUENCE_MS,PER_PROMPT_TOKEN_MS[,PER_CONTEXT_TOKEN_MS]``. Raises ValueError for anything else, or a
    step of no time.
    """
    values = [float(one) for one in text.split(",")]
    if len(values) not in (3, 4) or not all(0 <= one < math.inf for one in values) or values[0] + values[1] <= 0:
        raise ValueError(text)
    return values
