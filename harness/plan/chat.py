"""Made-up chats whose prompt has exactly the planned number of tokens, as the server counts it behind its template.

A template puts tokens of its own around messages. How many is measured, not assumed: chats of one, three and five
messages, each with two contents of different lengths. Where the template adds a constant to each message (and words
stay single tokens, see `Vocabulary.words`), a turn of a session is the real conversation before it, user and assistant
by turns, and its own message. Else each prompt is one user message, fitted until the count is right; a session's grows.

Every message begins with the same word, so that a template that strips spaces changes no count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from harness.errors import PlanError
from harness.plan.file import TemplateTokens
from harness.plan.prompts import Ids, Vocabulary
from harness.plan.tokenizers import TextTokenizer

_PROVED_EVERY = 64  # one prompt in so many is rendered and counted again, whatever was measured before
_PROBE_KEY = 2**64 - 1
_ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One prompt to be made: a request and the conversation before it."""

    ids: Ids
    """The stream of the conversation: at least as many ids as the prompt has tokens."""
    tokens: int
    before: tuple[int, ...] = ()
    """Input and output tokens of the turns before it."""


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
            if None not in (first, second, third) and first == self.shortest:
                assert first is not None and second is not None and third is not None
                if second - first == third - second:
                    self.room = second - first
        self.template = self._template()

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Chat | None:
        """None where no chat template is known. Raises `PlanError` when there is one that cannot be used."""
        tokenizer = vocabulary.tokenizer
        if tokenizer is None or tokenizer.chat_ids([{"role": "user", "content": "a"}]) is None:
            return None
        return cls(vocabulary, tokenizer)

    def messages(self, prompts: Sequence[Made]) -> list[str]:
        """Chat messages as JSON, one list for each prompt; no prompt may ask for less than `shortest`.

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
        every = _PROVED_EVERY if self._vocabulary.apart else 1
        lengths = self._counted(chats[::every])
        if every > 1 and lengths != [made.tokens for made in prompts[::every]]:
            every, lengths = 1, self._counted(chats)
        if every > 1:
            return [_json(chat) for chat in chats]
        return [
            _json(chat) if length == made.tokens else self._fitted(chat[:-1], pieces[end - 1], made.tokens)
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
        """Tokens of the prompt that a server makes of each chat."""
        return [len(self._rendered(chat)) for chat in chats]

    def _fitted(self, before: tuple[str, ...], ids: Ids, tokens: int) -> str:
        """Messages as JSON whose last one is fitted, word by word, until the whole has the wanted length."""
        start = f"{self._start} " if self._vocabulary.words else ""

        def count(texts: Sequence[str]) -> list[int]:
            return self._counted([(*before, (start + text.strip()).strip()) for text in texts])

        text = self._vocabulary.fitted(ids, tokens, count)
        return _json((*before, (start + text.strip()).strip()))


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading tokens that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _json(chat: Sequence[str]) -> str:
    return msgspec.json.encode(_messages(chat)).decode()


def _messages(chat: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": _ROLES[i % 2], "content": text} for i, text in enumerate(chat)]
