"""Prefix reuse of a plan's own prompts, token for token: what the requests are, not what the trace said of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.traces.prefix import Hashes, Ints, PrefixCache

_WEIGHT_SEED = 20231116


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Input tokens that an unlimited cache would have found, requests taken one after the other."""

    block_tokens: int
    prompts: int
    tokens: int
    hit_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of all input tokens."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0


def prompt_reuse(
    prompts: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]], block_tokens: int, *, partial: bool = False
) -> Reuse:
    """Reuse among ``prompts`` (ids one after the other, and how many each prompt has) in blocks of ``block_tokens``.

    Counted as vLLM counts: whole blocks only, and never the block of a prompt's last token, which has to be computed to
    get an answer at all. ``partial``: counted as a trace does, the last block too, however short. Beyond
    `harness.traces.prefix.MAX_BLOCKS` different blocks the hits are an estimate.
    """
    weights = np.random.Generator(np.random.PCG64(_WEIGHT_SEED)).integers(2**63, size=block_tokens, dtype=np.uint64)
    weights = weights * np.uint64(2) + np.uint64(1)
    cache = PrefixCache()
    total = count = 0
    for ids, lengths in prompts:
        started = -(-lengths // block_tokens)
        hashes = _hashes(ids, lengths, started, weights)
        total += len(ids)
        count += len(lengths)
        if partial:
            cache.add_many(hashes, started, block_tokens, lengths)
            continue
        blocks = np.maximum(lengths - 1, 0) // block_tokens
        place = np.arange(len(hashes)) - np.repeat(np.cumsum(started) - started, started)
        cache.add_many(hashes[place < np.repeat(blocks, started)], blocks, block_tokens, blocks * block_tokens)
    return Reuse(block_tokens=block_tokens, prompts=count, tokens=total, hit_tokens=cache.result().hit_tokens)


def _hashes(ids: npt.NDArray[np.int32], lengths: Ints, blocks: Ints, weights: Hashes) -> Hashes:
    """64 bits for each block: its tokens, each times its place's own odd number."""
    width = len(weights)
    padded = np.zeros(int(blocks.sum()) * width, dtype=np.uint64)
    gaps = np.cumsum(blocks * width) - blocks * width - (np.cumsum(lengths) - lengths)  # padding before each prompt
    padded[np.arange(len(ids)) + np.repeat(gaps, lengths)] = ids.astype(np.uint64) + np.uint64(1)
    mixed = padded.reshape(-1, width) * weights
    mixed ^= mixed >> np.uint64(29)
    hashes: Hashes = mixed.sum(axis=1, dtype=np.uint64)
    return hashes
