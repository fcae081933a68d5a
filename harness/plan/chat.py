"""Made-up chats whose prompt has exactly the planned number of tokens, as the server counts it behind its template.

How many tokens a template puts around messages is measured: chats of one, three and five messages, each with two
contents of different lengths. Where it adds a constant to each message (and words stay single tokens), a turn of a
session is the real conversation before it, user and assistant by turns, and its own message. Else each prompt is one
user message, fitted until the count is right. Every message begins with the same word, so that a template that strips
spaces changes no count.

A turn of a **live conversation** *goes on* from the row before it of its session when its prompt is that row's prompt,
then an answer, then something new. Only what is new is planned; what goes before it is known when the turn is sent
(`scenarios.dispatch`). A turn that does not go on is sent whole, as it was recorded, and counted by reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from harness.errors import PlanError
from harness.plan.file import TemplateTokens
from harness.plan.prompts import Ids, Vocabulary
from harness.plan.tokenizers import Messages, TextTokenizer
from harness.trace.io import TraceRecord
from harness.trace.spool import Sessions

_PROBE_KEY = 2**64 - 1
_ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One prompt to be made: a request and the conversation before it."""

    ids: Ids
    """The stream of the conversation: at least as many ids as the prompt has tokens."""
    tokens: int
    before: tuple[int, ...] = ()


class Chat:
    """Makes the messages of made-up prompts."""

    def __init__(self, vocabulary: Vocabulary, tokenizer: TextTokenizer) -> None:
        """Measure the template. Raises `PlanError` when it refuses a message of a user."""
        self._vocabulary, self._tokenizer = vocabulary, tokenizer
        self._start = vocabulary.render([vocabulary.token_ids(1, _PROBE_KEY)])[0].strip()
        self.shortest = self._counted([(self._start,)])[0]
        """Tokens of the shortest prompt: the template's own and one word."""
        self.room: int | None = None
        """Tokens that the template adds to each further turn; null: not a constant, so turns do not become messages."""
        if vocabulary.words:
            first, second, third = (self._overhead(messages) for messages in (1, 3, 5))
            if first == self.shortest and second is not None and third == 2 * second - first:
                self.room = second - first
        self.template = self._template()

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Chat | None:
        """None where no chat template is known. Raises `PlanError` when there is one that cannot be used."""
        tokenizer = vocabulary.tokenizer
        if tokenizer is None or tokenizer.chat_ids([{"role": "user", "content": "a"}]) is None:
            return None
        return cls(vocabulary, tokenizer)

    def messages(self, prompts: Sequence[Made]) -> list[Messages]:
        """Chat messages, one list for each prompt; no prompt may ask for less than `shortest`.

        One in 64 is rendered and counted to prove the length (all, where words are not proved to stay apart).

        Raises `PlanError` when no messages of that length are found.
        """
        if self.room is None:
            return [self._fitted((), made.ids[: made.tokens - self.shortest + 1], made.tokens) for made in prompts]
        pieces: list[Ids] = []
        ends: list[int] = []
        for made in prompts:
            pieces += self._pieces(made)
            ends.append(len(pieces))
        texts = [f"{self._start} {text}" if text else self._start for text in self._joined(pieces)]
        chats = [tuple(texts[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        lengths = self._vocabulary.lengths(chats, [made.tokens for made in prompts], self._counted)
        return [
            _messages(chat) if length == made.tokens else self._fitted(chat[:-1], pieces[end - 1], made.tokens)
            for chat, made, end, length in zip(chats, prompts, ends, lengths, strict=True)
        ]

    def _pieces(self, made: Made) -> list[Ids]:
        """The words of each message, beside the one it begins with: user and assistant by turns, the user last."""
        assert self.room is not None
        pieces: list[Ids] = []
        used, own = 0, self.shortest
        for tokens, output in zip(made.before[::2], made.before[1::2], strict=True):
            for words in (tokens - own - used, output - 1):
                pieces.append(made.ids[used : used + max(words, 0)])
                used += len(pieces[-1])
            own += self.room
        return [*pieces, made.ids[used : used + max(made.tokens - own - used, 0)]]

    def _joined(self, pieces: Sequence[Ids]) -> list[str]:
        return [text.strip() for text in self._vocabulary.render(pieces)]

    def _overhead(self, messages: int) -> int | None:
        """Tokens beside the words of so many messages; None when they depend on these or the template refuses them."""
        found = []
        for key in (_PROBE_KEY - 1, _PROBE_KEY - 2):
            pieces = [self._vocabulary.token_ids(5 + 7 * i + key % 5, key - 8 * i) for i in range(messages)]
            chat = tuple(f"{self._start} {text}" for text in self._joined(pieces))
            try:
                found.append(self._counted([chat])[0] - sum(len(piece) for piece in pieces))
            except PlanError:
                return None
        return found[0] if found[0] == found[1] else None

    def _template(self) -> TemplateTokens | None:
        """Where the template's own tokens stand; None where words are no single tokens."""
        if not self._vocabulary.words:
            return None
        words = self._vocabulary.token_ids(3, _PROBE_KEY - 3)
        chat = tuple(f"{self._start} {text}" for text in self._joined([words[:1], words[1:2], words[2:]]))
        first = self._rendered(chat[:1])
        head = _alike(first, self._rendered(chat[1:2]))
        stays = 0 if self.room is None else _alike(first, self._rendered(chat)) - head - 1
        return TemplateTokens(head=head, closing=self.shortest - head, stays=stays, room=self.room)

    def _rendered(self, chat: tuple[str, ...]) -> Sequence[int]:
        return self._tokenizer.chat_ids(_messages(chat)) or ()

    def _counted(self, chats: Sequence[tuple[str, ...]]) -> list[int]:
        return [len(self._rendered(chat)) for chat in chats]

    def _fitted(self, before: tuple[str, ...], ids: Ids, tokens: int) -> Messages:
        """Messages whose last one is fitted, word by word, until the whole has the wanted length."""
        start = f"{self._start} " if self._vocabulary.words else ""

        def count(texts: Sequence[str]) -> list[int]:
            return self._counted([(*before, (start + text.strip()).strip()) for text in texts])

        text = self._vocabulary.fitted(ids, tokens, count)
        return _messages((*before, (start + text.strip()).strip()))


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _messages(chat: Sequence[str]) -> Messages:
    return [{"role": _ROLES[i % 2], "content": text} for i, text in enumerate(chat)]


OTHER_FORM = "another form of prompt than the turn before"
OTHER_START = "the prompt does not begin with the one before it"
NO_ANSWER = "no answer stands between the prompt before it and what is new"
UNKNOWN_END = "the trace does not say the answer before it (answer), so nobody can tell where that ends in the text"
MADE_UP_TEXT = "a made-up text does not show where an answer ends: give the model's folder, with its chat template"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a request sends: one of messages, text and ids."""

    messages: Messages | None = None
    text: str | None = None
    ids: Ids | None = None
    tokens: int | None = None
    """How many it has for the server; null where only that knows."""

    @property
    def said(self) -> Messages | str | Ids:
        return next(part for part in (self.messages, self.text, self.ids) if part is not None)

    def digest(self, size: int) -> bytes:
        said = self.said[:size]
        raw = said.encode() if isinstance(said, str) else said.tobytes() if isinstance(said, np.ndarray) else None
        return hashlib.blake2b(
            msgspec.json.encode(said, order="sorted") if raw is None else raw, digest_size=16
        ).digest()

    def after(self, at: int) -> Prompt:
        messages = None if self.messages is None else self.messages[at:]
        text, ids = None if self.text is None else self.text[at:], None if self.ids is None else self.ids[at:]
        return replace(self, messages=messages, text=text, ids=ids)


@dataclass(frozen=True, slots=True)
class _Before:
    """A session's last row, as far as the next one is held against it."""

    form: str
    size: int
    shared: int
    """So much of it the next prompt begins with, if it goes on: all, or whole blocks of prefix ids."""
    digest: bytes
    answer: tuple[int, bytes] | None
    """Length and digest of the recorded answer to a text."""
    output_tokens: int


class Live:
    """Follows the sessions of a plan, row by row."""

    def __init__(self, *, in_turn: bool = False) -> None:
        self.continued = 0
        self.whole: Counter[str] = Counter()
        """Why turns, beyond the first of their session, do not go on from the one before them -> how many."""
        self._last = Sessions(_Before, in_turn=in_turn)

    def new(self, copy: int, record: TraceRecord, prompt: Prompt) -> Prompt | None:
        """What is new in the next row of copy ``copy``; None when it goes on from nothing."""
        if record.session_id is None:
            return None
        session = (copy, record.session_id)
        before = self._last.get(session)
        form = "messages" if prompt.messages is not None else "token ids" if prompt.text is None else "text"
        if form == "text" and record.text is None:
            form = "made-up text"
        size = shared = len(prompt.said)
        if prompt.ids is not None and record.prefix_ids is not None and record.block_tokens:
            shared -= size % record.block_tokens
        answer = None
        if prompt.text is not None and record.answer:
            answer = len(record.answer), Prompt(text=record.answer).digest(len(record.answer))
        now = _Before(form, size, shared, prompt.digest(shared), answer, record.output_tokens or 0)
        self._last.set(session, now)
        if before is None:
            return None
        at = _starts(before, form, prompt)
        if isinstance(at, str):
            self.whole[at] += 1
            return None
        self.continued += 1
        return prompt.after(at)


def _starts(before: _Before, form: str, prompt: Prompt) -> int | str:
    size = len(prompt.said)
    if form != before.form:
        return OTHER_FORM
    if form == "made-up text":
        return MADE_UP_TEXT
    if size < before.size or prompt.digest(before.shared) != before.digest:
        return OTHER_START
    if prompt.messages is not None:
        answer, new = prompt.messages[before.size : before.size + 1], prompt.messages[before.size + 1 :]
        goes_on = answer and new and answer[0]["role"] == "assistant" and new[0]["role"] != "assistant"
        return before.size + 1 if goes_on else NO_ANSWER
    if prompt.ids is not None:
        at = before.size + before.output_tokens
        return at if at <= size else NO_ANSWER
    if before.answer is None:
        return UNKNOWN_END
    length, digest = before.answer
    at = before.size + length
    return at if size > at and prompt.after(before.size).digest(length) == digest else NO_ANSWER


def live_notes(live: Live) -> list[str]:
    """What a reader of the results must know."""
    said = [
        f"live conversation: {live.continued} turns carry what the server really answers to the turns before them, so "
        "their input lengths follow from the run"
    ]
    if live.whole:
        said.append(f"{live.whole.total()} later turns are sent as recorded: {reasons(live)}")
    return said


def reasons(live: Live) -> str:
    """Why turns do not go on, with how many."""
    return "; ".join(f"{count} x {why}" for why, count in live.whole.most_common())
