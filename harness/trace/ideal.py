"""Ideal prefix reuse of a trace's rows, by what the trace says: ids of prefix blocks, or turns of sessions.

Rows with prefix ids are counted at the trace's own blocks (`harness.trace.prefix`). Of rows that say lengths only, a
turn that continues its session (`harness.trace.turns`) finds the whole blocks of the prompt before it. The answers
before it are not counted as found: a replay cannot know what production answered, so it makes them up, and a server
meets them for the first time. Other rows of lengths find nothing. Rows of text are not counted: their tokens are the
server's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from harness.trace.io import TraceRecord
from harness.trace.prefix import Prefix, PrefixCache
from harness.trace.turns import BLOCK_TOKENS, Turns, accumulates


class IdealReuse:
    """What an unlimited prefix cache would have found in rows that come one after the other."""

    def __init__(self) -> None:
        self._cache: PrefixCache | None = None
        self._turns = Turns()
        self._in_sessions = False
        self._alone: Counter[int] = Counter()
        """Input tokens of rows that find nothing -> how many."""
        self._rows = self._blocks = self._hit_blocks = self._tokens = self._hit_tokens = 0

    def add(self, record: TraceRecord) -> None:
        """The next row."""
        tokens = record.input_tokens
        if not tokens:
            return
        if record.prefix_ids is not None and record.block_tokens:
            self._cache = self._cache or PrefixCache()
            self._cache.add(record.prefix_ids, record.block_tokens, tokens)
            return
        if record.text is not None or record.messages is not None:
            return
        if not accumulates(record):
            self._alone[tokens] += 1
            return
        self._in_sessions = True
        turn = self._turns.place(record.session_id, self._rows, tokens, record.output_tokens)
        hits = turn.before_tokens // BLOCK_TOKENS
        self._rows += 1
        self._blocks += -(-tokens // BLOCK_TOKENS)
        self._tokens += tokens
        self._hit_blocks += hits
        self._hit_tokens += hits * BLOCK_TOKENS

    def result(self) -> Prefix | None:
        """The figures so far; None when the trace states neither prefixes nor sessions."""
        if self._cache is None and not self._in_sessions:
            return None
        found = (self._cache or PrefixCache()).result()
        sizes = {*found.block_tokens, *([BLOCK_TOKENS] if self._in_sessions else [])}
        blocks = found.blocks + self._blocks + sum(-(-n // min(sizes)) * rows for n, rows in self._alone.items())
        tokens = found.tokens + self._tokens + sum(n * rows for n, rows in self._alone.items())
        hit_blocks, hit_tokens = found.hit_blocks + self._hit_blocks, found.hit_tokens + self._hit_tokens
        return replace(
            found, block_tokens=sorted(sizes), rows=found.rows + self._rows + self._alone.total(),
            blocks=blocks, hit_blocks=hit_blocks, hit_rate_blocks=hit_blocks / max(blocks, 1),
            tokens=tokens, hit_tokens=hit_tokens, hit_rate_tokens=hit_tokens / max(tokens, 1),
            continued_turns=self._turns.continued if self._in_sessions else None,
            independent_turns=self._turns.independent if self._in_sessions else None,
        )  # fmt: skip
