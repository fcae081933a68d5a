"""Ideal prefix reuse of a trace: what an unlimited prefix cache would have found in rows that come one after the other.

A block is its own id and all ids before it in its request, so every block that is not new is a hit. A *different* block
costs 8 bytes, up to `MAX_BLOCKS`; beyond that blocks are sampled by their hash, and the figures say so.

Of rows that say lengths only, a turn *continues* its session when its input is at least as long as the prompt of the
row before it of that session and its answer together: it finds the whole blocks of that prompt. The answers before it
are not found, as a replay makes them up and a server meets them for the first time. A shorter turn shares nothing, and
a conversation begins with it. Other rows of lengths find nothing. Rows of text are not counted: their tokens are the
server's.

All prompts of a conversation are the beginning of one endless stream of tokens, that of its first request, so nothing
of them has to be kept.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.trace.formats.record import TraceRecord
from harness.trace.spool import Sessions
from harness.trace.stats import PrefixStats

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

MAX_BLOCKS = 2**24
"""Different blocks that are remembered exactly (128 MiB, and as much again while new ones are merged in)."""
_BATCH_BLOCKS = 2**20


class PrefixCache:
    """Counts blocks seen before. A block is its own id and all ids before it, so: blocks - different blocks = hits."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self.sampled = 1
        self.rows = self.blocks = self.tokens = 0
        self._missed_blocks = self._missed_tokens = 0
        self._seen: Hashes = np.empty(0, dtype=np.uint64)
        self._ids = array("q")
        self._requests = array("q")
        """blocks, block_tokens, input_tokens of each request waiting."""

    def add(self, ids: tuple[int, ...], block_tokens: int, input_tokens: int) -> None:
        self.rows += 1
        self._ids.extend(ids)
        self._requests.extend((len(ids), block_tokens, input_tokens))
        self.sizes.add(block_tokens)
        if len(self._ids) >= _BATCH_BLOCKS:
            self._merge()

    def add_many(self, ids: Hashes, counts: Ints, block_tokens: int, inputs: Ints) -> None:
        """Requests: their blocks one after the other, how many blocks each has, and how many input tokens."""
        self.rows += len(counts)
        self._ids.frombytes(ids.astype(np.uint64).tobytes())
        requests = np.stack([counts, np.full_like(counts, block_tokens), inputs], axis=1)
        self._requests.frombytes(requests.astype(np.int64).tobytes())
        self.sizes.add(block_tokens)
        if len(self._ids) >= _BATCH_BLOCKS:
            self._merge()

    def hits(self) -> tuple[int, int]:
        self._merge()
        return max(self.blocks - self._missed_blocks, 0), max(self.tokens - self._missed_tokens, 0)

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
        self.blocks += len(ids)
        self.tokens += int(tokens.sum())
        kept = (hashes & np.uint64(self.sampled - 1)) == 0
        distinct, first = np.unique(hashes[kept], return_index=True)
        at = np.searchsorted(self._seen, distinct)
        known = at < len(self._seen)
        known[known] = self._seen[at[known]] == distinct[known]
        self._missed_blocks += self.sampled * int((~known).sum())
        self._missed_tokens += self.sampled * int(tokens[kept][first[~known]].sum())
        self._seen = np.insert(self._seen, at[~known], distinct[~known])
        while len(self._seen) > MAX_BLOCKS:
            # What was counted so far stays exact; from here on one block in so many stands for the others.
            self.sampled *= 2
            self._seen = self._seen[(self._seen & np.uint64(self.sampled - 1)) == 0]


def _chained(ids: Hashes, place: Ints, size: Ints, starts: Ints, counts: Ints) -> Hashes:
    """A 64-bit hash of each block's id and of all ids before it in its request.

    Sums of mixed (id, place) pairs: the place makes the order count, and a running sum is one pass over all requests.
    """
    mixed = _mix(ids + _mix(place.astype(np.uint64) + np.uint64(1)))
    running = np.cumsum(mixed, dtype=np.uint64)
    before = (running - mixed)[starts[counts > 0]]
    return _mix(running - np.repeat(before, counts[counts > 0]) + size.astype(np.uint64))


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: Hashes) -> Hashes:
    return mix(values * GOLDEN)


def mix(values: Hashes) -> Hashes:
    """64 random bits of each value, in place: the output function of SplitMix64 (Steele, Lea, Flood 2014)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


BLOCK_TOKENS = 16
"""What a conversation shares is counted in blocks of vLLM's own size: only whole ones are found again."""


class Turn(NamedTuple):
    """A row in its conversation."""

    first: int
    """Number of the row that its conversation began with: itself, if it continues nothing."""
    before_tokens: int
    """Input tokens of the turn it continues, 0 without."""
    before: tuple[int, ...]
    """Input and output tokens of each turn before it in its conversation, one after the other, where they are kept."""


def accumulates(record: TraceRecord) -> bool:
    """Whether the row's prompt is made up as a turn of its session: its text and its prefixes are not given."""
    return (
        record.session_id is not None
        and record.prefix_ids is None
        and record.text is None
        and record.messages is None
        and record.input_tokens is not None
    )


class _Last(NamedTuple):
    first: int
    input_tokens: int
    output_tokens: int
    lengths: tuple[int, ...]
    """Those of its conversation so far, where they are kept."""


class Turns:
    """Follows the sessions of a trace, row by row."""

    def __init__(self, *, room: int = 0, lengths: bool = False, in_turn: bool = False) -> None:
        """``room``: tokens that a turn must have beyond the conversation before it (a chat template's own);
        ``lengths``: keep those of all turns of a conversation; ``in_turn``: as `Sessions` has it.
        """
        self.continued = self.independent = 0
        """Turns, beyond the first of their session, that do and do not continue."""
        self._room, self._keep = room, lengths
        self._last = Sessions(_Last, in_turn=in_turn)

    def place(self, session: Hashable, number: int, tokens: int, output_tokens: int | None) -> Turn:
        """The next row of a session that `accumulates`: its number among all rows, its input and output tokens."""
        output = output_tokens or 0
        last, turn = self._last.get(session), Turn(number, 0, ())
        if last is not None:
            goes_on = tokens >= last.input_tokens + last.output_tokens + self._room
            self.continued += goes_on
            self.independent += not goes_on
            turn = Turn(last.first, last.input_tokens, last.lengths) if goes_on else turn
        lengths = (*turn.before, tokens, output) if self._keep else ()
        self._last.set(session, _Last(turn.first, tokens, output, lengths))
        return turn


class IdealReuse:
    """What an unlimited prefix cache would have found in rows that come one after the other."""

    def __init__(self) -> None:
        self._cache = PrefixCache()
        self._turns = Turns()
        self._in_sessions = False
        self._alone: Counter[int] = Counter()
        self._rows = self._blocks = self._hit_blocks = self._tokens = 0

    def add(self, record: TraceRecord) -> None:
        tokens = record.input_tokens
        if not tokens:
            return
        if record.prefix_ids is not None and record.block_tokens:
            self._cache.add(record.prefix_ids, record.block_tokens, tokens)
        elif accumulates(record):
            self._in_sessions = True
            turn = self._turns.place(record.session_id, self._rows, tokens, record.output_tokens)
            self._rows += 1
            self._blocks += -(-tokens // BLOCK_TOKENS)
            self._tokens += tokens
            self._hit_blocks += turn.before_tokens // BLOCK_TOKENS
        elif record.text is None and record.messages is None:
            self._alone[tokens] += 1

    def result(self) -> PrefixStats | None:
        """The figures so far; None when the trace states neither prefixes nor sessions."""
        if not self._cache.rows and not self._in_sessions:
            return None
        hit_blocks, hit_tokens = self._cache.hits()
        hit_blocks += self._hit_blocks
        hit_tokens += self._hit_blocks * BLOCK_TOKENS
        sizes = {*self._cache.sizes, *([BLOCK_TOKENS] if self._in_sessions else [])}
        alone = self._alone.items()
        blocks = self._cache.blocks + self._blocks + sum(-(-n // min(sizes)) * rows for n, rows in alone)
        tokens = self._cache.tokens + self._tokens + sum(n * rows for n, rows in alone)
        return PrefixStats(
            block_tokens=sorted(sizes), rows=self._cache.rows + self._rows + self._alone.total(),
            blocks=blocks, hit_blocks=hit_blocks, hit_rate_blocks=hit_blocks / max(blocks, 1),
            tokens=tokens, hit_tokens=hit_tokens, hit_rate_tokens=hit_tokens / max(tokens, 1),
            sampled=self._cache.sampled,
            continued_turns=self._turns.continued if self._in_sessions else None,
            independent_turns=self._turns.independent if self._in_sessions else None,
        )  # fmt: skip
