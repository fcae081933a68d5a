"""One engine and its clock, in virtual time: a step begins, and later it ends.

A request that comes while a step runs is seen when that step ends (with asynchronous scheduling, when the step after it
ends); one that comes to an idle engine begins a step.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import numpy.typing as npt

from harness.cluster.simulator.scheduler import NOBODY, Limits, Scheduler, Sequence
from harness.cluster.simulator.step_time import Chunk, StepTime, many_steps

COUNTED: npt.NDArray[np.int64] = np.arange(4096)
"""Steps that are skipped at once, at most."""
FEW = 4
"""So many steps are sooner gone through one by one."""
MANY = 24
"""From so many on NumPy lays them end to end."""


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

    def run(self, before_s: float) -> list[Sequence]:
        """Go on until sequences end, which they do with the last of `step_end_s`; none: nobody does before then."""
        while self.next_s < before_s:
            if self._in_step and before_s - self.next_s > FEW * self._took_s:
                self.skip(before_s)
                if self.next_s >= before_s:
                    break
            if done := self.advance():
                return done
        return NOBODY

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
            return NOBODY
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
        if self._many is None or steps < MANY:
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
