"""Ideal prefix reuse: what an unlimited prefix cache would have found in requests that come one after the other.

A block is its own id and all ids before it in its request, so every block that is not new is a hit. A *different* block
costs 8 bytes, up to `MAX_BLOCKS`; beyond that blocks are sampled by their hash, and the figures say so.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

MAX_BLOCKS = 2**24
"""Different blocks that are remembered exactly (128 MiB, and as much again while new ones are merged in)."""
_BATCH_BLOCKS = 2**20


@dataclass(frozen=True, slots=True)
class Prefix:
    """What an unlimited prefix cache would have found."""

    block_tokens: list[int]
    rows: int
    """Rows counted."""
    blocks: int
    hit_blocks: int
    hit_rate_blocks: float
    tokens: int
    hit_tokens: int
    hit_rate_tokens: float
    sampled: int
    """1: every block was counted; k: one in k, chosen by hash, and counts are multiplied by k."""
    continued_turns: int | None = None
    """Turns of sessions that continue the one before them (`harness.trace.turns`); null without such sessions."""
    independent_turns: int | None = None
    """Later turns of sessions that do not."""


class PrefixCache:
    """Counts blocks seen before. A block is its own id and all ids before it, so: blocks - different blocks = hits."""

    def __init__(self) -> None:
        self._seen: Hashes = np.empty(0, dtype=np.uint64)
        self._ids = array("q")
        self._requests = array("q")
        """blocks, block_tokens, input_tokens of each request waiting."""
        self._sampled = 1
        self._sizes: set[int] = set()
        self._rows = self._blocks = self._tokens = self._missed_blocks = self._missed_tokens = 0

    def add(self, ids: tuple[int, ...], block_tokens: int, input_tokens: int) -> None:
        """One request."""
        self._rows += 1
        self._ids.extend(ids)
        self._requests.extend((len(ids), block_tokens, input_tokens))
        self._sizes.add(block_tokens)
        if len(self._ids) >= _BATCH_BLOCKS:
            self._merge()

    def add_many(self, ids: Hashes, counts: Ints, block_tokens: int, inputs: Ints) -> None:
        """Requests: their blocks one after the other, how many blocks each has, and how many input tokens."""
        self._rows += len(counts)
        self._ids.frombytes(ids.astype(np.uint64).tobytes())
        requests = np.stack([counts, np.full_like(counts, block_tokens), inputs], axis=1)
        self._requests.frombytes(requests.astype(np.int64).tobytes())
        self._sizes.add(block_tokens)
        if len(self._ids) >= _BATCH_BLOCKS:
            self._merge()

    def result(self) -> Prefix:
        """The figures so far."""
        self._merge()
        missed_blocks, missed_tokens = min(self._missed_blocks, self._blocks), min(self._missed_tokens, self._tokens)
        return Prefix(
            block_tokens=sorted(self._sizes),
            rows=self._rows,
            blocks=self._blocks,
            hit_blocks=self._blocks - missed_blocks,
            hit_rate_blocks=1 - missed_blocks / max(self._blocks, 1),
            tokens=self._tokens,
            hit_tokens=self._tokens - missed_tokens,
            hit_rate_tokens=1 - missed_tokens / max(self._tokens, 1),
            sampled=self._sampled,
        )

    def _merge(self) -> None:
        if not self._ids:
            return
        counts, sizes, inputs = np.array(self._requests, dtype=np.int64).reshape(-1, 3).T
        ids = np.array(self._ids, dtype=np.int64).view(np.uint64)
        self._ids, self._requests = array("q"), array("q")
        starts = np.cumsum(counts) - counts
        place = np.arange(len(ids)) - np.repeat(starts, counts)
        size = np.repeat(sizes, counts)
        hashes = _chained(ids, place, size, starts, counts)
        tokens = np.minimum(size, np.repeat(inputs, counts) - place * size)
        self._blocks += len(ids)
        self._tokens += int(tokens.sum())
        kept = (hashes & np.uint64(self._sampled - 1)) == 0
        distinct, first = np.unique(hashes[kept], return_index=True)
        at = np.searchsorted(self._seen, distinct)
        known = at < len(self._seen)
        known[known] = self._seen[at[known]] == distinct[known]
        self._missed_blocks += self._sampled * int((~known).sum())
        self._missed_tokens += self._sampled * int(tokens[kept][first[~known]].sum())
        self._seen = np.insert(self._seen, at[~known], distinct[~known])
        while len(self._seen) > MAX_BLOCKS:
            # What was counted so far stays exact; from here on one block in so many stands for the others.
            self._sampled *= 2
            self._seen = self._seen[(self._seen & np.uint64(self._sampled - 1)) == 0]


def _chained(ids: Hashes, place: Ints, size: Ints, starts: Ints, counts: Ints) -> Hashes:
    """A 64-bit hash of each block's id and of all ids before it in its request.

    Sums of mixed (id, place) pairs: the place makes the order count, and a running sum is one pass over all requests.
    """
    mixed = _mix(ids + _mix(place.astype(np.uint64) + np.uint64(1)))
    running = np.cumsum(mixed, dtype=np.uint64)
    before = (running - mixed)[starts[counts > 0]]
    return _mix(running - np.repeat(before, counts[counts > 0]) + size.astype(np.uint64))


def _mix(values: Hashes) -> Hashes:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
