"""How long one step of an engine takes, by what the step works on."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class Chunk(NamedTuple):
    """A part of one prompt that a step reads."""

    new: int
    """Tokens read in this step."""
    done: int
    """Tokens of the same prompt read before."""


class StepTime(Protocol):
    """Seconds that one step takes."""

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """``chunks``: prompts read in this step; ``decoding``: sequences that get one more token each; ``context``: the
        sum of the lengths that those have so far, tokens.
        """


ManySteps = Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.float64]]
"""Seconds of steps that only decode, from the sequences of each and the context of every one. To the last bit what a
step time says of each alone."""


def many_steps(step_time: StepTime) -> ManySteps | None:
    """The method ``decode_s`` of a step time that has it; None: its steps are asked for one by one."""
    if isinstance(step_time, PaddedStep) and many_steps(step_time.step_time) is None:
        return None
    return getattr(step_time, "decode_s", None)


@dataclass(frozen=True, slots=True)
class LinearStep:
    """base + per_sequence x sequences + per_prompt_token x prompt tokens + per_context_token x context, s."""

    base_s: float
    per_sequence_s: float
    per_prompt_token_s: float
    per_context_token_s: float = 0.0

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        step_s = self.base_s + self.per_sequence_s * (decoding + len(chunks)) + self.per_context_token_s * context
        for chunk in chunks:
            step_s += self.per_prompt_token_s * chunk.new
        return step_s

    def decode_s(self, decoding: int, contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds of steps that only decode (`ManySteps`)."""
        return np.asarray(self.base_s + self.per_sequence_s * decoding + self.per_context_token_s * contexts)


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """Another step time, where a step that only decodes takes what one of the next graph's size takes.

    The padding has no context. A step that reads prompts is left as it is.
    """

    step_time: StepTime
    sizes: Sequence[int]
    """Sequences of the graphs, ascending (`vllm_limits.graph_sizes`)."""

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        return self.step_time(chunks, decoding if chunks else self._padded(decoding), context)

    def decode_s(self, decoding: int, contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds of steps that only decode (`ManySteps`); for `many_steps` to call."""
        many = many_steps(self.step_time)
        assert many is not None
        return many(self._padded(decoding), contexts)

    def _padded(self, decoding: int) -> int:
        return decoding if decoding > self.sizes[-1] else self.sizes[bisect_left(self.sizes, decoding)]


class NoisyStep:
    """Another step time, each step times a lognormal factor of mean 1: steps of a real engine are never alike."""

    def __init__(self, step_time: StepTime, spread: float, seed: int) -> None:
        """``spread``: standard deviation of the factor's logarithm."""
        self._step_time = step_time
        self._factor = _factors(spread, seed).__next__

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        return self._step_time(chunks, decoding, context) * self._factor()


def _factors(spread: float, seed: int) -> Iterator[float]:
    """Noise factors, exp of what `random.Random.gauss` gives, two at once and so faster (Box and Muller 1958)."""
    draw, mean = random.Random(seed).random, -(spread**2) / 2
    while True:
        angle = draw() * math.tau
        radius = math.sqrt(-2.0 * math.log(1.0 - draw()))
        yield math.exp(mean + math.cos(angle) * radius * spread)
        yield math.exp(mean + math.sin(angle) * radius * spread)
