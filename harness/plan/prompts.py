"""Prompts of an exact token length, each a pure function of a seed and a key.

A trace mostly says how long prompts were, not what they said. `Vocabulary` makes prompts of that length out of plain
tokens, drawn by a hash of (seed, key, position): no state, so neither order, limits nor slices change a prompt.
Requests whose leading prefix ids are equal get equal leading tokens, so a server's prefix cache works as it did in
production.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.errors import PlanError
from harness.plan.tokenizers import TextTokenizer, load_tokenizer
from harness.trace.prefix import GOLDEN, mix

Ids = npt.NDArray[np.int32]
T = TypeVar("T")

MIN_IDS = 16
"""Fewest usable ids: with 16, two random blocks of 16 tokens are equal once in 2**64."""

_MIN_WORDS = 256
_REPAIRS = 64
_PROVED_EVERY = 64
_MASK = 2**64 - 1


class Vocabulary:
    """Token ids that prompts are made of, and the tokenizer they belong to (if there is one).

    ``name`` identifies it for the plan: equal names make equal prompts.
    """

    def __init__(
        self, ids: Ids, name: str, tokenizer: TextTokenizer | None = None, glue: tuple[str, str] | None = None
    ) -> None:
        if len(ids) < MIN_IDS:
            raise PlanError(f"{name}: only {len(ids)} usable token ids, prompts that differ need at least {MIN_IDS}")
        self._ids, self._glue = ids, glue
        self.name = name
        self.tokenizer = tokenizer
        """What text is counted with; None where only ids are known."""
        self.words = glue is not None
        """Every id is a word that stays one token between spaces."""
        self.apart = False
        """Proved of each: the tokenizer cuts text into these words before it looks at any, so that none depends on its
        neighbours, and what holds for each word holds for every text of them."""
        self._place = np.zeros(int(ids.max()) + 1 if glue is not None else 0, dtype=np.int32)
        if glue is not None and tokenizer is not None:
            texts = tokenizer.decode([[int(i)] for i in ids])
            self._texts = pa.array([text.strip() for text in texts], pa.large_string())
            self._place[ids] = np.arange(len(ids))
            text = self.render([ids])[0]
            self.apart = tokenizer.parts(text) == len(ids) and tokenizer.encode([text])[0] == ids.tolist()

    def __len__(self) -> int:
        return len(self._ids)

    @classmethod
    def from_ids(cls, ids: Iterable[int], *, name: str = "ids") -> Vocabulary:
        """Vocabulary of ids learned elsewhere (``name`` says where); makes token ids, but no text.

        Raises `PlanError` for ids that are not token ids, or fewer than `MIN_IDS` different ones.
        """
        distinct = sorted(set(ids))
        if distinct and not 0 <= distinct[0] <= distinct[-1] < 2**31:
            raise PlanError(f"token ids from {distinct[0]} to {distinct[-1]}: expected 0 to {2**31 - 1}")
        usable = np.array(distinct, dtype=np.int32)
        digest = hashlib.sha256(usable.tobytes()).hexdigest()[:16]
        return cls(usable, f"{name} sha256:{digest} ({len(usable)} ids)")

    @classmethod
    def from_tokenizer(cls, path: Path) -> Vocabulary:
        """Vocabulary of a tokenizer: a model directory, or its ``tokenizer.json`` (see `harness.plan.tokenizers`).

        Only whole words are used where it has them, each one token wherever it stands between spaces: then ids and text
        are the same prompt, token for token. Else all plain tokens that decode to clean text. Raises `PlanError`.
        """
        tokenizer = load_tokenizer(path)
        clean = _clean_ids(tokenizer)
        words, glue = _word_ids(tokenizer, clean)
        usable = words if glue is not None else np.array(sorted(clean), dtype=np.int32)
        name = f"{tokenizer.label} ({len(usable)} of {tokenizer.size} tokens used)"
        return cls(usable, name, tokenizer, glue)

    def token_ids(
        self,
        n: int,
        key: int,
        *,
        seed: int = 0,
        prefix_ids: Sequence[int] | None = None,
        block_tokens: int | None = None,
    ) -> Ids:
        """Exactly ``n`` token ids of the request ``key``.

        With ``prefix_ids`` (which must cover ``n``), block i depends on ``seed`` and ``prefix_ids[:i + 1]`` alone:
        equal leading ids are equal leading tokens, in any request. Without, prompts of different keys share nothing.
        """
        if prefix_ids is None:
            starts, width = np.array([_hash64(b"request", seed, key)], dtype=np.uint64), n
        else:
            assert block_tokens is not None
            width = block_tokens
            starts = _block_starts(seed, prefix_ids[: -(-n // width)])
            assert len(starts) * width >= n, "prefix_ids do not cover the prompt"
        draws = mix(starts[:, None] + np.arange(width, dtype=np.uint64)[None, :] * GOLDEN)
        # Multiply and shift: 32 random bits onto [0, size) without the cost or the low-bit weakness of a modulo.
        at = (draws.ravel()[:n] >> np.uint64(32)) * np.uint64(len(self._ids)) >> np.uint64(32)
        drawn: Ids = self._ids[at.astype(np.intp)]
        return drawn

    def texts(self, prompts: Sequence[Ids]) -> list[str]:
        """Texts that this tokenizer encodes (without special tokens) to exactly as many tokens as the ids given.

        Every text is encoded again to prove it, or one in 64 where words are `apart`. Where a tokenizer merges across
        words, some are added or taken at the end: shared leading *text* stays shared, and tokens but for those at the
        first difference. Raises `PlanError` without a tokenizer, or when no text of that length is found.
        """
        texts, wanted = self.render(prompts), [len(ids) for ids in prompts]
        return [
            text if length == len(ids) else self.fitted(ids, len(ids), self._count)
            for text, length, ids in zip(texts, self.lengths(texts, wanted, self._count), prompts, strict=True)
        ]

    def lengths(self, made: Sequence[T], wanted: Sequence[int], count: Callable[[Sequence[T]], list[int]]) -> list[int]:
        """Tokens of each, as ``count`` finds them; of one in 64 where words are `apart` and those are as ``wanted``."""
        if self.apart and count(made[::_PROVED_EVERY]) == wanted[::_PROVED_EVERY]:
            return list(wanted)
        return count(made)

    def render(self, prompts: Sequence[Ids]) -> list[str]:
        """Each list of ids as text, as it falls: of whole words of a `words` vocabulary, that text is those ids.

        Raises `PlanError` without a tokenizer.
        """
        if self.tokenizer is None:
            raise PlanError(f"{self.name}: text prompts need a tokenizer; give a tokenizer.json or send token ids")
        if self._glue is None:
            return self.tokenizer.decode([ids.tolist() for ids in prompts])
        lead, space = self._glue
        # In Arrow: a Python object per token would be most of the time it takes to make a plan.
        at = self._place[np.concatenate([np.empty(0, dtype=np.int32), *prompts])]
        offsets = np.cumsum([0, *(len(ids) for ids in prompts)], dtype=np.int64)
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), self._texts.take(pa.array(at)))
        texts: list[str] = pc.binary_join(lists, pa.scalar(space, pa.large_string())).to_pylist()
        return [lead + text for text in texts] if lead else texts

    def _count(self, texts: Sequence[str]) -> list[int]:
        assert self.tokenizer is not None
        return [len(ids) for ids in self.tokenizer.encode(texts)]

    def fitted(self, wanted: Ids, target: int, count: Callable[[Sequence[str]], list[int]]) -> str:
        """Text that begins as ``wanted`` does and that ``count`` finds to be ``target`` long.

        Tokens are added or taken at the end until it is. Raises `PlanError` when no such text is found.
        """
        ids, length = wanted, -1
        for attempt in range(_REPAIRS + 1):
            text = self.render([ids])[0]
            length = count([text])[0]
            if length == target:
                return text
            # Take one more than is over: what is added next time is a new draw, so the search does not go in circles.
            keep = len(ids) - (length - target) - 1 if length > target else len(ids)
            missing = target - length if length < target else 1
            tail = self.token_ids(missing, _hash64(wanted.tobytes(), attempt, 0), seed=attempt)
            ids = np.concatenate([ids[: max(keep, 0)], tail])
        raise PlanError(
            f"{self.name}: no text of exactly {target} tokens found (last try: {length}); send token ids instead"
        )


def _int_bytes(value: int) -> bytes:
    return (value & _MASK).to_bytes(8, "little")


def _hash64(domain: bytes, seed: int, key: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(domain + _int_bytes(seed) + _int_bytes(key), digest_size=8).digest(), "little"
    )


def _block_starts(seed: int, prefix_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
    """One start value per block, a hash of the seed and of all ids up to the block's own."""
    chain = hashlib.blake2b(b"prefix" + _int_bytes(seed), digest_size=8)
    starts = bytearray()
    for prefix_id in prefix_ids:
        chain.update(_int_bytes(prefix_id))
        starts += chain.copy().digest()
    return np.frombuffer(bytes(starts), dtype="<u8").astype(np.uint64)


def _clean_ids(tokenizer: TextTokenizer) -> dict[int, str]:
    ids = tokenizer.plain_ids()
    texts = tokenizer.decode([[i] for i in ids])
    return {i: t for i, t in zip(ids, texts, strict=True) if t.strip() and t.isprintable() and "\ufffd" not in t}


def _word_ids(tokenizer: TextTokenizer, clean: dict[int, str]) -> tuple[Ids, tuple[str, str] | None]:
    """Ids of words that stay one token between other words, and (lead, space) to put before and between them.

    Byte-level tokenizers keep the space inside the token and need one before the first word too; others add it
    themselves. None instead of the pair when too few words are like that.
    """
    words = {i: text.strip() for i, text in clean.items() if text.strip().isalpha()}
    best: list[int] = []
    best_lead = ""
    for lead in (" ", ""):
        encodings = tokenizer.encode([f"{lead}{word} {word}" for word in words.values()])
        fit = [i for i, ids in zip(words, encodings, strict=True) if ids == [i, i]]
        if len(fit) > len(best):
            best, best_lead = fit, lead
    return np.array(best, dtype=np.int32), (best_lead, " ") if len(best) >= _MIN_WORDS else None
