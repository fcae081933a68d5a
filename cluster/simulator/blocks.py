"""The KV cache of one engine: blocks in use, free and free but still good for a prefix, as vLLM v1 keeps them.

A block that is full is known by its key, which stands for all tokens up to its end (`block_keys`). One that nobody uses
stays known until it is taken for something else: those without a key go first, then the least recently used.
Only whole blocks are shared. Full blocks that no other sequence can have, those after the last key, are counted as one
(`Own`): they come back to a sequence that was thrown out, from its beginning on, and are forgotten from its end on.
Source: vLLM 0.32 ``v1/core/block_pool.py``, ``v1/core/single_type_kv_cache_manager.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

ENDLESS = 1 << 62


def block_keys(tokens: Sequence[Hashable], block_size: int) -> list[int]:
    """Keys of the whole blocks of a text: chained hashes, so that one key means that all before it is equal, too."""
    keys: list[int] = []
    parent = 0
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = hash((parent, *tokens[end - block_size : end]))
        keys.append(parent)
    return keys


class Block:
    """A full block that has a key."""

    __slots__ = ("key", "users")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.users = 1


class Own:
    """Full blocks of one sequence that is not running, after those that others may share."""

    __slots__ = ("count", "number")

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count


class KVCache:
    """Which blocks are free, and which hold what. Blocks without a key are alike: they are only counted."""

    def __init__(self, blocks: int | None) -> None:
        """``blocks``: how many there are (vLLM's ``num_gpu_blocks`` less one, its null block); None: no end of them."""
        self._plain = ENDLESS if blocks is None else blocks
        self._idle: OrderedDict[Block | Own, None] = OrderedDict()
        """Without a user but still known, the least recently used first."""
        self._idle_blocks = 0
        self._known: dict[Hashable, Block] = {}
        self._twins: dict[Hashable, list[Block]] = {}
        """More blocks of a key that is known already, in the order in which they were filled."""
        self._own: dict[int, Own] = {}
        """By number of the sequence."""

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return self._plain + self._idle_blocks

    def find(self, keys: Iterable[Hashable]) -> list[Block]:
        """The blocks of the longest prefix that is here."""
        found = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def find_own(self, number: int) -> int:
        """How many of a sequence's own blocks are still here, from the first on."""
        own = self._own.get(number)
        return 0 if own is None else own.count

    def hold(self, blocks: Iterable[Block]) -> None:
        """One more uses these."""
        for block in blocks:
            if not block.users:
                del self._idle[block]
                self._idle_blocks -= 1
            block.users += 1

    def hold_own(self, number: int, count: int) -> None:
        """A sequence goes on with the first ``count`` of its own blocks that are still here."""
        own = self._own.pop(number)
        own.count -= count
        self._idle_blocks -= count
        if not own.count:
            del self._idle[own]

    def take(self, count: int) -> None:
        """``count`` free blocks, of which there must be enough, for new tokens."""
        self._plain -= count
        while self._plain < 0:
            oldest = next(iter(self._idle))
            if isinstance(oldest, Block):
                del self._idle[oldest]
                self._forget(oldest)
                taken = 1
            else:
                taken = min(oldest.count, -self._plain)
                oldest.count -= taken
                if not oldest.count:
                    del self._idle[oldest]
                    if self._own.get(oldest.number) is oldest:
                        del self._own[oldest.number]
            self._plain += taken
            self._idle_blocks -= taken

    def remember(self, key: Hashable) -> Block:
        """A block in use is full now."""
        block = Block(key)
        if key in self._known:
            self._twins.setdefault(key, []).append(block)
        else:
            self._known[key] = block
        return block

    def give_back(self, plain: int, known: Sequence[Block], own: int = 0, number: int = -1) -> None:
        """A sequence leaves: ``plain`` blocks without a key, those with one in the order of its tokens, and its own."""
        self._plain += plain
        if own:
            self._own[number] = entry = Own(number, own)
            self._idle[entry] = None
            self._idle_blocks += own
        for block in reversed(known):  # its end is forgotten before its beginning
            block.users -= 1
            if not block.users:
                self._idle[block] = None
                self._idle_blocks += 1

    def _forget(self, block: Block) -> None:
        twins = self._twins.get(block.key)
        if twins is None:
            del self._known[block.key]
        elif self._known[block.key] is block:
            self._known[block.key] = twins.pop(0)
        else:
            twins.remove(block)
        if not twins and twins is not None:
            del self._twins[block.key]
