"""Prefix reuse of a plan's own prompts: token for token, and of the trace's own texts in bytes.

Token ids are taken as they are. Of made-up texts and messages each word is one token (`harness.plan.prompts`), so it
stands for one, and the template's own tokens are put where the plan says it puts them; where that does not add up to
each row's ``input_tokens``, only the server knows the tokens. What two texts share in tokens they share in bytes, so
bytes bound what a prefix cache can find.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from harness.plan.file import TemplateTokens, iter_plan_columns
from harness.trace.prefix import Hashes, Ints, PrefixCache

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
        return self.hit_tokens / self.tokens if self.tokens else 0.0


Ids = npt.NDArray[np.int32]
_COLUMNS = ["input_tokens", "prompt_token_ids", "prompt_text", "messages"]


class _PlannedMessage(msgspec.Struct):
    content: Any = None


_MESSAGES = msgspec.json.Decoder(list[_PlannedMessage])


class UnknownTokensError(Exception):
    """A prompt's tokens cannot be told from its words."""


def plan_prompts(
    path: Path, template: TemplateTokens | None = None, *, shared_head: bool = True
) -> Iterator[tuple[Ids, Ints]]:
    """Prompts of the plan ``path`` a batch at a time: all ids one after the other, and how many each prompt has.

    Ids of words stand for them. Texts of the trace itself are left out. ``shared_head``: what the template puts before
    each chat is the same to all, as it is to a server; else to a conversation alone, because no trace says it.

    Raises `PlanError`, and `UnknownTokensError` when a prompt's words are not its tokens.
    """
    for batch in iter_plan_columns(path, _COLUMNS):
        batch = batch.filter(pc.is_valid(batch.column("input_tokens")))
        if not batch.num_rows:
            continue
        prompts = batch.column("prompt_token_ids")
        if prompts.null_count:
            columns = (batch.column(name).to_pylist() for name in ("prompt_text", "messages"))
            texts = [
                text if text is not None else _spelled(messages, template, shared_head)
                for text, messages in zip(*columns, strict=True)
            ]
            prompts = _words(texts)
        lengths = np.diff(prompts.offsets.to_numpy()).astype(np.int64)
        if (lengths != batch.column("input_tokens").to_numpy()).any():
            raise UnknownTokensError
        yield prompts.flatten().to_numpy(), lengths


def _spelled(messages: str | None, template: TemplateTokens | None, shared_head: bool) -> str:
    """A chat as words, those of the template among them; no message has such words."""
    if messages is None or template is None:
        raise UnknownTokensError
    stays = [f"\0s{i}" for i in range(template.stays)]
    between = stays + [f"\0b{i}" for i in range((template.room or 0) - template.stays)]
    contents = [message.content for message in _MESSAGES.decode(messages)]
    whose = "" if shared_head else ".".join(contents[0].split(" ", 4)[:4])  # a conversation's first words are its own
    words = [f"\0h{i}.{whose}" for i in range(template.head)]
    for i, content in enumerate(contents):
        words.append(content.strip().partition(" ")[2])
        if i % 2 == 0 and i < len(contents) - 1:
            words += between
    words += stays + [f"\0c{i}" for i in range(template.closing - template.stays)]
    return " ".join(word for word in words if word)


def _words(texts: list[str]) -> pa.Array:
    """Lists of ids, one for each word. Words are told apart by 32 bits of a hash."""
    lists = pc.split_pattern(pc.utf8_trim(pa.array(texts, pa.large_string()), " "), " ")
    words = lists.flatten().dictionary_encode()
    ids = np.array([zlib.crc32(word.encode()) for word in words.dictionary.to_pylist()], dtype=np.uint32)
    return pa.ListArray.from_arrays(lists.offsets.cast(pa.int32()), pa.array(ids.view(np.int32)).take(words.indices))


def prompt_reuse(prompts: Iterable[tuple[Ids, Ints]], block_tokens: int, *, partial: bool = False) -> Reuse:
    """Reuse among ``prompts`` (ids one after the other, and how many each prompt has) in blocks of ``block_tokens``.

    Counted as vLLM counts: whole blocks only, and never the block of a prompt's last token, which has to be computed to
    get an answer at all. ``partial``: counted as a trace does, the last block too, however short. Beyond
    `harness.trace.prefix.MAX_BLOCKS` different blocks the hits are an estimate.
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
    return Reuse(block_tokens=block_tokens, prompts=count, tokens=total, hit_tokens=cache.hits()[1])


def _hashes(ids: npt.NDArray[np.int32], lengths: Ints, blocks: Ints, weights: Hashes) -> Hashes:
    width = len(weights)
    padded = np.zeros(int(blocks.sum()) * width, dtype=np.uint64)
    gaps = np.cumsum(blocks * width) - blocks * width - (np.cumsum(lengths) - lengths)  # padding before each prompt
    padded[np.arange(len(ids)) + np.repeat(gaps, lengths)] = ids.astype(np.uint64) + np.uint64(1)
    mixed = padded.reshape(-1, width) * weights
    mixed ^= mixed >> np.uint64(29)
    hashes: Hashes = mixed.sum(axis=1, dtype=np.uint64)
    return hashes


BLOCK_BYTES = 16
"""Finer than any server's block of tokens, so that nothing it may find is missed but less than this of each prompt."""


def text_reuse(path: Path) -> Reuse:
    """What an unlimited cache finds in the texts of plan ``path``; "tokens" of it are bytes. Raises `PlanError`."""

    def pieces() -> Iterator[tuple[Ids, Ints]]:
        for _, texts, messages in _texts(path):
            held = [(m or text or "").encode(errors="replace") for text, m in zip(texts, messages, strict=True)]
            lengths = np.array([len(each) for each in held], dtype=np.int64)
            yield np.frombuffer(b"".join(held), dtype=np.uint8).astype(np.int32), lengths

    return prompt_reuse(pieces(), BLOCK_BYTES)


def text_words(path: Path, requests: int) -> npt.NDArray[np.float64]:
    """Words of each request's text, by its id: no prompt has fewer tokens. NaN where it has no text of the trace.

    Raises `PlanError`.
    """
    found = np.full(requests, np.nan)
    for columns in _texts(path):
        for request_id, text, messages in zip(*columns, strict=True):
            if 0 <= request_id < requests:
                said: list[Any] = [text or ""]
                if messages is not None:
                    with contextlib.suppress(msgspec.DecodeError):
                        said = [message.content for message in _MESSAGES.decode(messages)]
                found[request_id] = sum(len(each.split()) for each in said if isinstance(each, str))
    return found


def _texts(path: Path) -> Iterator[tuple[list[int], list[str | None], list[str | None]]]:
    """Requests whose length the plan does not know, a batch at a time: ids, texts, and messages as JSON."""
    for batch in iter_plan_columns(path, ["request_id", "input_tokens", "prompt_text", "messages"]):
        either = pc.or_(pc.is_valid(batch.column("prompt_text")), pc.is_valid(batch.column("messages")))
        batch = batch.filter(pc.and_(pc.is_null(batch.column("input_tokens")), either))
        ids, texts, messages = (batch.column(name).to_pylist() for name in ("request_id", "prompt_text", "messages"))
        yield ids, texts, messages
