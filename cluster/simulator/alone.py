"""One replica to which requests come at times of their own, in one loop: the steps of `replica.Replica`, several times
as fast.

Only for an engine that seats and tokens alone bound (`Limits.is_plain`). Nothing that happens on other replicas can
change what comes to it, so its whole life is run through at once. The same result to the last bit
(tests/test_simulator.py): whoever changes that part of `scheduler.Scheduler` changes this, too.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import Chunk, LinearStep, StepTime

NO_CHUNKS: Sequence[Chunk] = ()
NOBODY: Sequence[int] = ()
NO_BOUND = 1 << 62


def serve_alone(
    arrival_s: Sequence[float], inputs: Sequence[int], outputs: Sequence[int], limits: Limits, step_time: StepTime,
    until_s: float,
) -> tuple[array[float], list[int]]:  # fmt: skip
    """When each step ended, before ``until_s``, and the step that gave each request its first token; -1: none did.

    Requests in order of their arrival, each with 1 output token at least.
    """
    n, most = len(arrival_s), limits.max_num_seqs
    end_s, first_step = array("d"), [-1] * n
    step = decoding = context = 0
    prompts = _Waiting(inputs, limits.max_num_batched_tokens)
    leaving: dict[int, tuple[int, int]] = {}
    """By step: how many sequences end with it, and the sum of their lengths."""
    coming_s = [*arrival_s, math.inf]
    now_s = next_s = coming_s[0]
    plain_s = _plain_s(step_time, most)
    while now_s < until_s:
        while next_s <= now_s:
            prompts.come += 1
            next_s = coming_s[prompts.come]
        ready = NOBODY
        if prompts.reading or (decoding < most and prompts.begun < prompts.come):
            chunks, ready = prompts.next(decoding, most)
            now_s += step_time(chunks, decoding, context)
        elif plain_s is not None:
            now_s += plain_s[decoding]
        else:
            now_s += step_time(NO_CHUNKS, decoding, context)
        if now_s >= until_s:
            break
        end_s.append(now_s)
        context += decoding
        for k in ready:
            first_step[k] = step
            decoding += 1
            context += inputs[k] + 1
            last = step + outputs[k] - 1
            count, length = leaving.get(last, (0, 0))
            leaving[last] = count + 1, length + inputs[k] + outputs[k]
        if step in leaving:
            count, length = leaving.pop(step)
            decoding -= count
            context -= length
            if not decoding and not prompts.reading and prompts.begun == prompts.come:
                now_s = max(now_s, next_s)
        step += 1
    return end_s, first_step


def _plain_s(step_time: StepTime, most: int) -> list[float] | None:
    """What a step of decoding alone takes, by the number of sequences; None where it depends on more than that."""
    if isinstance(step_time, LinearStep) and step_time.per_context_token_s == 0:
        return [step_time(NO_CHUNKS, decoding, 0) for decoding in range(most + 1)]
    return None


class _Waiting:
    """What waits for its first token: the first ``come`` requests have come, the first ``begun`` were admitted."""

    __slots__ = ("begun", "come", "inputs", "read", "reading", "room")

    def __init__(self, inputs: Sequence[int], room: int | None) -> None:
        self.inputs, self.room = inputs, room
        self.come = self.begun = 0
        self.reading: list[int] = []
        self.read: dict[int, int] = {}
        """Tokens read so far of those that were cut."""

    def next(self, decoding: int, most: int) -> tuple[Sequence[Chunk], Sequence[int]]:
        """The chunks of the next step, and whose prompts are read to their end with it."""
        seats = most - decoding - len(self.reading)
        asked, begun = self.reading, self.begun
        if seats > 0 and begun < self.come:
            asked = [*asked, *range(begun, min(self.come, begun + seats))]
        left = NO_BOUND if self.room is None else max(0, self.room - decoding)
        chunks: list[Chunk] = []
        ready: list[int] = []
        cut: list[int] = []
        for place, k in enumerate(asked):
            if left == 0:
                cut += [one for one in asked[place:] if one < begun]  # those not admitted yet wait on
                break
            begun = max(begun, k + 1)
            done = self.read.get(k, 0)
            new = min(self.inputs[k] - done, left)
            left -= new
            chunks.append(Chunk(new, done))
            if done + new == self.inputs[k]:
                ready.append(k)
            else:
                self.read[k] = done + new
                cut.append(k)
        self.reading, self.begun = cut, begun
        return chunks, ready
