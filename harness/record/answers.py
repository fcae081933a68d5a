"""Answers of a run: a sample counted by ourselves, and, when asked for, what each request was answered.

**Counted** is what a server said, to hold against what it says it counted. Load workers keep the texts of some answers,
spread evenly over the run (`scenarios.client.in_flight`), in ``answers-<worker>.jsonl``; after the load they are
counted here, in bytes, words, chunks, and tokens where the model's tokenizer is at hand. The counts go into the
manifest, the texts are deleted. `analysis.validity.tokens` compares.

Text that a tokenizer encodes again may differ from what the model emitted: by -1 to +1 tokens in prose, tables and code
of up to 200 tokens (SmolLM2's tokenizer), by 4.6 % in the mean and 29 % at most of random ids, which no model emits. So
single answers prove nothing, and a pooled sample does.

**Captured** answers are off by default, and stand by request id beside the result rows. ``answers-<worker>.arrows``
(Arrow IPC stream, readable by its owner alone, never sent to a store) has these columns:

============  ===========  ============================================================================================
column        type         meaning
============  ===========  ============================================================================================
request_id    int64        as in the result rows; answers that failed are left out
hmac          binary(32)   HMAC-SHA256 of the answer's text (UTF-8, without reasoning). The key is random and never
                           written: equal answers of one run are equal here, and nothing can be looked up
text          string       the text itself, with ``--keep-text`` alone; encrypted where it is sealed; otherwise null
mean_logprob  double       of the answer's tokens, where the server gave their log-probabilities; otherwise null
min_logprob   double       the least of them
============  ===========  ============================================================================================

**Sealed** text can be read by the process that asked, until it ends: the key is that process's own (`PROCESS_KEY`), so
what a crash leaves on disk says nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa

from harness.record.results import read_stream

if TYPE_CHECKING:
    from harness.plan.tokenizers import TextTokenizer


SAMPLE = 96
PROMPTS = 32
"""Of these, at most so many with their prompts: a plan is read a batch at a time."""

_LETTERS = r"[^\W\d_\u0e00-\U0010ffff]+"
# As tokenizers cut text before they look for tokens (OpenAI's cl100k, which Llama 3 and Qwen follow), but digits, and
# letters of scripts without spaces, one by one: what is one piece here may be several tokens, never the reverse.
_PIECE = re.compile(rf"(?:[^\r\n\w]|_)?{_LETTERS}| ?[^\W_]| ?(?:[^\s\w]|_)+[\r\n]*|\s+")
_WORD = re.compile(rf"{_LETTERS}\S*")
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


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One text, counted."""

    bytes: int = 0
    """Of UTF-8. A token has one at least."""
    words: int = 0
    """Stretches with a letter between spaces. Hardly a tokenizer has tokens of more than one."""
    chunks: int = 0
    crowded: int = 0
    """Of these, chunks that need not be a single token: of more than one piece."""
    pieces: int = 0
    tokens: int | None = 0
    """By the model's tokenizer; null without one, or where the text has broken characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedPrompt:
    """What was sent with one request, counted."""

    bytes: int
    """Of its text; of messages, of the JSON that holds them."""
    words: int
    messages: int = 0
    """0: text alone."""
    tokens: int | None = None
    """By the model's tokenizer, of messages as its chat template makes a prompt of them; null without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """One answer of the sample, counted, and what it answers."""

    request_id: int
    text: Text
    reasoning: Text
    prompt: CountedPrompt | None = None
    """Null where the plan has its length already, and of what is not all text."""
    blanks: int = 0
    ids: int = 0
    other: bool = False


def count_answers(
    said: Iterable[Said], tokenizer: TextTokenizer | None = None, prompts: Mapping[int, CountedPrompt] | None = None
) -> list[Counted]:
    """The same answers, counted; in tokens where there is a tokenizer."""
    return [
        Counted(
            request_id=one.request_id, text=_count(one.text, tokenizer), reasoning=_count(one.reasoning, tokenizer),
            prompt=(prompts or {}).get(one.request_id), blanks=one.blanks, ids=one.ids, other=one.other,
        )
        for one in said
    ]  # fmt: skip


def count_prompts(plan: Path, ids: Iterable[int], tokenizer: TextTokenizer | None = None) -> dict[int, CountedPrompt]:
    """Prompts of these requests whose length the plan does not know, counted. Raises `PlanError`."""
    from harness.plan.file import find_requests

    found = {}
    for request in find_requests(plan, ids):
        if request.input_tokens is None and not request.continues:
            prompt = _prompt(request.prompt_text, request.messages, tokenizer)
            if prompt is not None:
                found[request.request_id] = prompt
    return found


def _prompt(text: str | None, messages: str | None, tokenizer: TextTokenizer | None) -> CountedPrompt | None:
    if messages is None:
        if text is None:
            return None
        tokens = None if tokenizer is None else len(tokenizer.encode([text])[0])
        return CountedPrompt(bytes=_bytes(text), words=len(_WORD.findall(text)), tokens=tokens)
    try:
        turns = msgspec.json.decode(messages, type=list[_Message])
    except msgspec.DecodeError:
        return None  # parts that are no text, tool calls: bytes say little of them
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    ids = None if tokenizer is None else tokenizer.chat_ids(said)
    return CountedPrompt(
        bytes=_bytes(messages), words=sum(len(_WORD.findall(turn.content)) for turn in turns), messages=len(turns),
        tokens=None if ids is None else len(ids),
    )  # fmt: skip


def _bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def _count(chunks: Sequence[str], tokenizer: TextTokenizer | None) -> Text:
    if not chunks:
        return Text()
    text = "".join(chunks)
    pieces = [len(_PIECE.findall(chunk)) for chunk in chunks]
    countable = tokenizer is not None and _BROKEN not in text
    return Text(
        bytes=_bytes(text), words=len(_WORD.findall(text)), chunks=len(chunks),
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


CAPTURED_SCHEMA_VERSION = "2"
KEY_VARIABLE = "HARNESS_CAPTURE_KEY"
"""Environment variable by which all load workers of a run get the same key, in hexadecimal digits."""
KEY_BYTES = 32
CAPTURED_SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("hmac", pa.binary(hashlib.sha256().digest_size), nullable=False),
        pa.field("text", pa.string()),
        pa.field("mean_logprob", pa.float64()),
        pa.field("min_logprob", pa.float64()),
    ],
    metadata={"harness.answers": CAPTURED_SCHEMA_VERSION},
)
PROCESS_KEY = secrets.token_bytes(KEY_BYTES)
"""Of this process, never written: of its sealed texts, and of their HMACs."""
_NONCE_BYTES = 16


def seal(text: str, key: bytes) -> str:
    """Encrypted by a key stream of SHAKE-256 over the key and a nonce, in Base64."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return base64.b64encode(nonce + _xor(text.encode("utf-8", "replace"), key + nonce)).decode()


def unseal(sealed: str, key: bytes) -> str:
    """What was sealed with this key; with another, garbage. Raises `ValueError` for what was not sealed."""
    data = base64.b64decode(sealed, validate=True)
    return _xor(data[_NONCE_BYTES:], key + data[:_NONCE_BYTES]).decode("utf-8", "replace")


def _xor(data: bytes, key: bytes) -> bytes:
    stream = hashlib.shake_256(b"harness.answers" + key).digest(len(data))
    return (int.from_bytes(data) ^ int.from_bytes(stream)).to_bytes(len(data))


class CapturedWriter:
    """Writes captured answers as one Arrow batch per `flush`. Raises `OSError` when the file cannot be made."""

    def __init__(self, path: Path, key: bytes, *, keep_text: bool, sealed: bool = False) -> None:
        self._key, self._keep_text, self._sealed = key, keep_text, sealed
        self._rows: list[tuple[int, bytes, str | None, float | None, float | None]] = []
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
        self._writer = pa.ipc.new_stream(self._file, CAPTURED_SCHEMA)

    def append(self, request_id: int, text: str, logprobs: Sequence[float] = ()) -> None:
        digest = hmac.digest(self._key, text.encode("utf-8", "replace"), "sha256")
        kept = text if self._keep_text else seal(text, self._key) if self._sealed else None
        mean, least = (sum(logprobs) / len(logprobs), min(logprobs)) if logprobs else (None, None)
        self._rows.append((request_id, digest, kept, mean, least))

    def flush(self) -> None:
        """Write what was appended; from any thread, one at a time."""
        rows, self._rows = self._rows, []
        if rows:
            columns = [
                pa.array(values, type=f.type)
                for values, f in zip(zip(*rows, strict=True), CAPTURED_SCHEMA, strict=True)
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=CAPTURED_SCHEMA))
            self._file.flush()

    def close(self) -> None:
        """Flush, and end the stream. Safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._writer.close()
            self._file.close()


def read_captured(path: Path) -> pa.Table:
    """The captured answers of one worker; every complete batch of a file that was cut short, none of an empty one.

    Raises `ResultsError` when it is missing or not a file of captured answers.
    """
    return read_stream(path, CAPTURED_SCHEMA, "captured answer", {"1": ["mean_logprob", "min_logprob"]})
