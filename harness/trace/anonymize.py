"""Traces without a word of their users: lengths, arrivals and shared prefixes stay, text goes.

Text is counted with a tokenizer. Of its token ids, and of the prefix ids a trace may have already, only hashes of
blocks stay: keyed with a random salt that is thrown away, so that nobody can test a guess of what a block said; they
still tell which requests share their beginning. Sessions, adapters and models are numbered in order of appearance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from harness.errors import TraceError, UsageError
from harness.plan.tokenizers import TextTokenizer
from harness.trace.io import TraceRecord
from harness.trace.spool import Sessions

BLOCK_TOKENS = 16
"""vLLM's own block size."""
_BATCH = 256


def _text(record: TraceRecord) -> str:
    """The prompt as one text: equal beginnings of conversations are equal beginnings of it."""
    if record.messages is None:
        return record.text or ""
    return "".join(f"{message['role']}\n{message['content']}\n" for message in record.messages)


def _encoded(
    records: Iterable[TraceRecord], tokenizer: TextTokenizer
) -> Iterator[tuple[TraceRecord, list[int] | None, int | None]]:
    """(record, token ids of its text if it has one, tokens of its answer if it has one)."""
    iterator = iter(records)
    while batch := list(islice(iterator, _BATCH)):
        prompts = tokenizer.encode([_text(r) for r in batch])
        answers = tokenizer.encode([r.answer or "" for r in batch])
        for record, prompt, answer in zip(batch, prompts, answers, strict=True):
            has_text = record.text is not None or record.messages is not None
            yield record, prompt if has_text else None, None if record.answer is None else len(answer)


def count_tokens(records: Iterable[TraceRecord], tokenizer: TextTokenizer) -> Iterator[TraceRecord]:
    """Records with the token counts of prompt and answer filled in where the trace has only the text."""
    for record, ids, answer_tokens in _encoded(records, tokenizer):
        yield record._replace(
            input_tokens=len(ids) if record.input_tokens is None and ids is not None else record.input_tokens,
            output_tokens=answer_tokens or None if record.output_tokens is None else record.output_tokens,
        )


def anonymize(
    records: Iterable[TraceRecord], *, salt: bytes, tokenizer: TextTokenizer | None, block_tokens: int = BLOCK_TOKENS
) -> Iterator[TraceRecord]:
    """Records without text, ids, names, tags, and what answers are checked by.

    Counts that the source gave are kept; where the text has fewer tokens (a chat template adds some), the blocks that
    are left over are shared with nobody, and where it has more, the ids end with the count. Messages are counted
    without a template. ``salt`` must be random and forgotten.

    Raises `UsageError` at the first record that has text when there is no tokenizer, `TraceError` for an empty prompt.
    """
    if not 16 <= len(salt) <= 64:
        raise UsageError("the salt must be 16 to 64 random bytes")
    sessions, adapters, models = _Numbers("session"), _Numbers("adapter"), _Numbers("model")
    for number, (record, ids, answer_tokens) in enumerate(_with_ids(records, tokenizer)):
        prefix_ids, size = record.prefix_ids, record.block_tokens
        input_tokens = record.input_tokens
        if ids is not None:
            if not ids:
                raise TraceError("trace", record.line, "a prompt without a token; leave it out first")
            input_tokens, size = input_tokens or len(ids), block_tokens
            prefix_ids = _text_blocks(ids, input_tokens, size, salt, number)
        elif prefix_ids is not None:
            prefix_ids = _keyed([i.to_bytes(8, "little", signed=True) for i in prefix_ids], salt)
        yield record._replace(
            input_tokens=input_tokens,
            output_tokens=answer_tokens or None if record.output_tokens is None else record.output_tokens,
            session_id=sessions.name(record.session_id),
            prefix_ids=prefix_ids,
            block_tokens=size if prefix_ids is not None else None,
            text=None,
            messages=None,
            answer=None,
            adapter=adapters.name(record.adapter),
            model=models.name(record.model),
            expected=None,
            check=None,
            gate=None,
            tags=None,
        )


def _with_ids(
    records: Iterable[TraceRecord], tokenizer: TextTokenizer | None
) -> Iterator[tuple[TraceRecord, list[int] | None, int | None]]:
    if tokenizer is not None:
        yield from _encoded(records, tokenizer)
        return
    for record in records:
        if record.text is not None or record.messages is not None:
            raise UsageError(
                f"line {record.line} has text: its length and prefix blocks can be kept only with --tokenizer FILE"
            )
        yield record, None, None


class _Numbers:
    """Numbers instead of names, in the order they come."""

    def __init__(self, what: str) -> None:
        self._what, self._count, self._known = what, 0, Sessions(int)

    def name(self, name: str | None) -> str | None:
        """The name it goes by."""
        if name is None:
            return None
        number = self._known.get(name)
        if number is None:
            self._count = number = self._count + 1
        self._known.set(name, number)
        return f"{self._what}-{number}"


def _text_blocks(ids: Sequence[int], tokens: int, size: int, salt: bytes, number: int) -> tuple[int, ...]:
    """One keyed hash per block of ``tokens``: whole blocks by what they say, the rest by the record's number."""
    blocks = [
        b"".join(i.to_bytes(4, "little") for i in ids[at : at + size]) for at in range(0, min(len(ids), tokens), size)
    ]
    # A partial block can be shared only by a prompt that ends there too, so its content may stand for it; what the
    # count has beyond the text is nobody else's.
    missing = -(-tokens // size) - len(blocks)
    if missing or len(ids) != tokens:
        whole = min(len(ids), tokens) // size
        rest = -(-tokens // size) - whole
        blocks = blocks[:whole] + [b"own" + number.to_bytes(8, "little")] * rest
    return _keyed(blocks, salt)


def _keyed(blocks: Sequence[bytes], salt: bytes) -> tuple[int, ...]:
    """Chained, keyed 63-bit hashes."""
    chain = hashlib.blake2b(key=salt, digest_size=8)
    found = []
    for block in blocks:
        chain.update(block)
        found.append(int.from_bytes(chain.digest(), "little") >> 1)
    return tuple(found)
