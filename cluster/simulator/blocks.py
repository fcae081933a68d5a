"""The KV cache of one engine: blocks in use, free and free but still good for a prefix, as vLLM v1 keeps them.

A block that is full is known by its key, which stands for all tokens up to its end (`block_keys`). One that nobody uses
stays known until it is taken for something else: those without a key go first, then the least recently used.
Only whole blocks are shared. Source: vLLM 0.32 ``v1/core/block_pool.py``, ``v1/core/single_type_kv_cache_manager.py``.
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


class KVCache:
    """Which blocks are free, and which hold what. Blocks without a key are alike: they are only counted."""

    def __init__(self, blocks: int | None) -> None:
        """``blocks``: how many there are (vLLM's ``num_gpu_blocks`` less one, its null block); None: no end of them."""
        self._plain = ENDLESS if blocks is None else blocks
        self._idle: OrderedDict[Block, None] = OrderedDict()
        """With a key and without a user, the least recently used first."""
        self._known: dict[Hashable, Block] = {}
        self._twins: dict[Hashable, list[Block]] = {}
        """More blocks of a key that is known already, in the order in which they were filled."""

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return self._plain + len(self._idle)

    def find(self, keys: Iterable[Hashable]) -> list[Block]:
        """The blocks of the longest prefix that is here."""
        found = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[Block]) -> None:
        """One more uses these."""
        for block in blocks:
            if not block.users:
                del self._idle[block]
            block.users += 1

    def take(self, count: int) -> None:
        """``count`` free blocks, of which there must be enough, for new tokens."""
        self._plain -= count
        while self._plain < 0:
            self._forget(self._idle.popitem(last=False)[0])
            self._plain += 1

    def remember(self, key: Hashable) -> Block:
        """A block in use is full now."""
        block = Block(key)
        if key in self._known:
            self._twins.setdefault(key, []).append(block)
        else:
            self._known[key] = block
        return block

    def give_back(self, plain: int, known: Sequence[Block]) -> None:
        """A sequence leaves: ``plain`` blocks without a key, and those with one in the order of its tokens."""
        self._plain += plain
        for block in reversed(known):  # its end is forgotten before its beginning
            block.users -= 1
            if not block.users:
                self._idle[block] = None

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
