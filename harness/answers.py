"""A sample of answers counted by ourselves, to hold what a server says it counted against what it said.

Load workers keep the texts of some answers, spread evenly over the run (`scenarios.sampling`), and write them to
``answers-<worker>.jsonl`` when the load is over. Then they are counted here, off the clock: in bytes, in words, in the
chunks that carried them, and in tokens where the model's tokenizer is at hand. The counts go into the manifest, the
texts are deleted. `analysis.usage_check` compares.

Text that a tokenizer encodes again may differ from what the model emitted. Measured with SmolLM2's tokenizer on 200
pieces each of 5, 24 and 200 tokens: prose, tables, Python and C by -1 to +1 tokens, ids drawn at random (which no model
emits) by 4.6 % in the mean and 29 % at most. So single answers prove nothing, and a pooled sample does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from harness.tokenizer import TextTokenizer

SAMPLE = 96
"""Answers of a run that are counted, at most."""

_LETTERS = r"[^\W\d_\u0e00-\U0010ffff]+"
# As tokenizers cut text before they look for tokens (OpenAI's cl100k, which Llama 3 and Qwen follow), but digits, and
# letters of scripts without spaces, one by one: what is one piece here may be several tokens, never the reverse.
_PIECE = re.compile(rf"(?:[^\r\n\w]|_)?{_LETTERS}| ?[^\W_]| ?(?:[^\s\w]|_)+[\r\n]*|\s+")
_WORD = re.compile(_LETTERS)
_BROKEN = "\ufffd"


class Said(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one answer said, chunk by chunk."""

    request_id: int
    text: list[str]
    reasoning: list[str] = []
    blanks: int = 0
    """Chunks that may be a token without text: a special one, half a character."""
    ids: int = 0
    """Token ids that came with the chunks; 0 when the server gives none."""
    other: bool = False
    """There was output that is neither, such as a tool call: its text is not all that was generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text, counted."""

    bytes: int = 0
    """Of UTF-8. A token has one at least."""
    words: int = 0
    """Runs of letters between other characters. Hardly a tokenizer has tokens of more than one."""
    chunks: int = 0
    """That carried it."""
    crowded: int = 0
    """Of these, chunks that need not be a single token: of more than one piece."""
    pieces: int = 0
    """Pieces of all chunks, each of one token or more."""
    tokens: int | None = 0
    """By the model's tokenizer; null without one, or where the text has broken characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One answer of the sample, counted."""

    request_id: int
    text: Text
    reasoning: Text
    blanks: int = 0
    ids: int = 0
    other: bool = False


def count_answers(said: Iterable[Said], tokenizer: TextTokenizer | None = None) -> list[Counted]:
    """The same answers, counted; in tokens where there is a tokenizer."""
    return [
        Counted(
            request_id=one.request_id, text=_count(one.text, tokenizer), reasoning=_count(one.reasoning, tokenizer),
            blanks=one.blanks, ids=one.ids, other=one.other,
        )
        for one in said
    ]  # fmt: skip


def _count(chunks: Sequence[str], tokenizer: TextTokenizer | None) -> Text:
    if not chunks:
        return Text()
    text = "".join(chunks)
    pieces = [len(_PIECE.findall(chunk)) for chunk in chunks]
    countable = tokenizer is not None and _BROKEN not in text
    return Text(
        bytes=len(text.encode(errors="replace")), words=len(_WORD.findall(text)), chunks=len(chunks),
        crowded=sum(n > 1 for n in pieces), pieces=sum(max(n, 1) for n in pieces),
        tokens=len(tokenizer.encode([text])[0]) if tokenizer is not None and countable else None,
    )  # fmt: skip


def write_said(file: Path, said: Sequence[Said]) -> None:
    """Write answers, one JSON object a line. Raises `OSError`."""
    file.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in said))


def take_said(files: Iterable[Path]) -> list[Said]:
    """Read the answers of all files that are there, and delete the files; what cannot be read is left out."""
    found: list[Said] = []
    for file in files:
        try:
            lines = file.read_bytes().splitlines()
            file.unlink()
        except OSError:
            continue
        for line in lines:
            try:
                found.append(msgspec.json.decode(line, type=Said))
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
    return found
