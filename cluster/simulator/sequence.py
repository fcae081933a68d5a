"""One request as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from harness.cluster.simulator.blocks import Block


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. What it asks for comes first; the rest is the scheduler's."""

    number: int
    input_tokens: int
    output_tokens: int
    """At least 1."""
    read: int = 0
    """Tokens of its prompt (after it was thrown out: and of its answer) in the KV cache, before it decodes."""
    first_step: int = -1
    """Number of the step that gives the first token; -1: not planned yet."""
    keys: Items[Hashable] = ()
    """Of the full blocks of prompt and answer (`blocks.block_keys`), as many as are shared with others."""
    to_read: int = 0
    """Tokens to read before it decodes: the prompt and what was ``given``."""
    given: int = 0
    """Tokens that it had when it was last thrown out."""
    since: int = -1
    """Number of the step that gave, or gives, the first token after that."""
    resumed: tuple[tuple[int, int], ...] = ()
    """For each time that it went on after it was thrown out: tokens it had, and the step that gave the next."""
    known: list[Block] | None = None
    """Its blocks that have one of ``keys``; the first ones. None: nobody remembers blocks."""
    cached: int = -1
    """Tokens of its prompt that were in the KV cache when it was first admitted; -1: it was not, or nobody looked."""

    @property
    def last_step(self) -> int:
        """Number of the step that gives the last token, if it is not thrown out."""
        return self.since + self.output_tokens - self.given - 1
