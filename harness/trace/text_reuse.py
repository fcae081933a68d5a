"""Prefix reuse among prompts of the trace's own text, in bytes: their tokens are the server's to count.

What two prompts share in tokens they share in bytes, so bytes bound what a prefix cache can find. A chat counts as the
JSON of its messages, whose turns begin as the turn before them did.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from harness.plan.file import iter_plan_columns
from harness.trace.prefix import Ints
from harness.trace.reuse import Ids, Reuse, prompt_reuse

BLOCK_BYTES = 16
"""Finer than any server's block of tokens, so that nothing it may find is missed but less than this of each prompt."""
_PIECE = 2**22  # bytes that are worked on at a time, or one prompt


class _Message(msgspec.Struct):
    content: Any = None


_MESSAGES = msgspec.json.Decoder(list[_Message])


def text_reuse(path: Path) -> Reuse:
    """What an unlimited cache finds in the texts of plan ``path``; "tokens" of it are bytes. Raises `PlanError`."""
    return prompt_reuse(_pieces(path), BLOCK_BYTES)


def _pieces(path: Path) -> Iterator[tuple[Ids, Ints]]:
    """All texts, some together: their bytes one after the other, and how many each has."""
    held: list[bytes] = []
    size = 0
    for _, text, messages in _texts(path):
        held.append((text if messages is None else messages).encode(errors="replace"))
        size += len(held[-1])
        if size >= _PIECE:
            yield _joined(held)
            held, size = [], 0
    if held:
        yield _joined(held)


def _joined(texts: list[bytes]) -> tuple[Ids, Ints]:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int32), lengths


def text_words(path: Path, requests: int) -> npt.NDArray[np.float64]:
    """Words of each request's text, by its id: no prompt has fewer tokens. NaN where it has no text of the trace.

    Raises `PlanError`.
    """
    found = np.full(requests, np.nan)
    for request_id, text, messages in _texts(path):
        if 0 <= request_id < requests:
            found[request_id] = len(text.split()) if messages is None else _words(messages)
    return found


def _words(messages: str) -> int:
    try:
        contents = [message.content for message in _MESSAGES.decode(messages)]
    except msgspec.DecodeError:
        return 0
    return sum(len(content.split()) for content in contents if isinstance(content, str))


def _texts(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Requests whose length the plan does not know: id, text, and messages as JSON."""
    for batch in iter_plan_columns(path, ["request_id", "input_tokens", "prompt_text", "messages"]):
        batch = batch.filter(pc.is_null(batch.column("input_tokens")))
        columns = (batch.column(name).to_pylist() for name in ("request_id", "prompt_text", "messages"))
        for request_id, text, messages in zip(*columns, strict=True):
            if text is not None or messages is not None:
                yield request_id, text or "", messages
