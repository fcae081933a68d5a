"""Which sequences an engine works on in each step: continuous batching, first come first served, no clock of its own.

A driver asks for the next step (`Scheduler.begin`), lets its time pass on whatever clock it has, and ends it
(`Scheduler.end`). A prompt that is read to its end in a step has its first token at the end of that step; each later
step gives one more.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from cluster.simulator.step_time import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a step may hold; vLLM's names."""

    max_num_seqs: int
    max_num_batched_tokens: int | None = None
    """Tokens of a step: one for each decoding sequence, the rest for prompts, of which the last is cut to fit. None: no
    bound, every prompt is read in one step."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine."""

    number: int
    input_tokens: int
    output_tokens: int
    """At least 1."""
    read: int = 0
    """Prompt tokens read so far."""
    first_step: int = -1
    """Number of the step that gave the first token; -1 before."""

    @property
    def last_step(self) -> int:
        """Number of the step that gives the last token."""
        return self.first_step + self.output_tokens - 1


class Scheduler:
    """The state of one engine between steps."""

    def __init__(self, limits: Limits) -> None:
        if limits.max_num_seqs < 1 or (limits.max_num_batched_tokens or 1) < 1:
            raise ValueError(f"an engine that may hold nothing never ends: {limits}")
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.reading: list[Sequence] = []
        """Admitted, prompt not read to its end."""
        self.decoding: set[Sequence] = set()
        self.context = 0
        """Sum of the lengths of the decoding sequences, tokens."""
        self.step = 0
        """Number of the step that comes next."""
        self._ends: list[tuple[int, int, Sequence]] = []
        self._chunks: list[tuple[Sequence, int]] = []

    @property
    def in_flight(self) -> int:
        """Sequences that wait or run."""
        return len(self.waiting) + len(self.reading) + len(self.decoding)

    def add(self, sequence: Sequence) -> None:
        """A request has come. Raises ValueError for one that asks for no output."""
        if sequence.output_tokens < 1 or sequence.input_tokens < 0:
            raise ValueError(f"request {sequence.number}: {sequence.input_tokens} in, {sequence.output_tokens} out")
        self.waiting.append(sequence)

    def begin(self) -> tuple[list[Chunk], int, int]:
        """Admit what fits and say what the next step works on: prompt chunks, decoding sequences, their context."""
        if not self.waiting and not self.reading:
            return [], len(self.decoding), self.context
        room = self.limits.max_num_batched_tokens
        left = None if room is None else max(0, room - len(self.decoding))
        seats = self.limits.max_num_seqs - len(self.decoding) - len(self.reading)
        chunks: list[Chunk] = []
        for sequence in self.reading:
            if left == 0:
                break
            left = self._read(sequence, left, chunks)
        while seats > 0 and self.waiting and left != 0:
            sequence = self.waiting.popleft()
            seats -= 1
            self.reading.append(sequence)
            left = self._read(sequence, left, chunks)
        return chunks, len(self.decoding), self.context

    def _read(self, sequence: Sequence, left: int | None, chunks: list[Chunk]) -> int | None:
        """Take a chunk of a prompt into the step; tokens left of its bound."""
        new = sequence.input_tokens - sequence.read
        if left is not None:
            new = min(new, left)
            left -= new
        chunks.append(Chunk(new, sequence.read))
        self._chunks.append((sequence, new))
        return left

    def end(self) -> list[Sequence]:
        """The step that was begun has passed; the sequences that had their last token in it."""
        step = self.step
        self.step = step + 1
        self.context += len(self.decoding)
        for sequence, new in self._chunks:
            sequence.read += new
            if sequence.read >= sequence.input_tokens:
                sequence.first_step = step
                self.reading.remove(sequence)
                self.decoding.add(sequence)
                self.context += sequence.input_tokens + 1
                heapq.heappush(self._ends, (sequence.last_step, sequence.number, sequence))
        self._chunks.clear()
        done: list[Sequence] = []
        while self._ends and self._ends[0][0] <= step:
            sequence = heapq.heappop(self._ends)[2]
            if sequence in self.decoding:  # not dropped meanwhile
                self._leave(sequence)
                done.append(sequence)
        return done

    def drop(self, sequence: Sequence) -> None:
        """The client has hung up: forget the sequence, between steps."""
        if sequence in self.decoding:
            self._leave(sequence)
        elif sequence in self.reading:
            self.reading.remove(sequence)
            self._chunks = [pair for pair in self._chunks if pair[0] is not sequence]
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.decoding.discard(sequence)
        self.context -= sequence.input_tokens + self.step - sequence.first_step
