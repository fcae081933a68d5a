"""Keeps the text of answers: for a later turn of the same session, or for a sample that is checked after the run."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial

import msgspec

from harness.record.answers import SAMPLE, Said
from harness.record.results import Result
from scenarios.client.completion import Answer
from scenarios.client.fast_path import Template
from scenarios.client.http1 import Response
from scenarios.client.outcome import Secret

OnAnswer = Callable[[Result, Answer], None]
"""Called with the row of a request that ended, and the text received until then."""

_decode_texts = msgspec.json.Decoder(list[str]).decode


def both(first: OnAnswer, second: OnAnswer | None) -> OnAnswer:
    """Call the first, then the second, if there is one."""
    if second is None:
        return first

    def call(result: Result, answer: Answer) -> None:
        first(result, answer)
        second(result, answer)

    return call


class CapturingResponse(Response):
    """A `Response` that also keeps the text.

    Plain events are recognised as usual; their texts, which are the insides of JSON strings, are decoded together, at
    the time when they would have been parsed anyway.
    """

    __slots__ = ("answer", "on_answer")
    captures = True

    def __init__(self, secret: Secret, on_answer: OnAnswer) -> None:
        super().__init__(secret)
        self.on_answer = on_answer
        self.answer = Answer()
        self._completion.answer = self.answer

    def feed_plain(self, template: Template, stamps: array[int], texts: list[bytes] | None) -> bool:
        """Take plain events by their texts."""
        plain = super().feed_plain(template, stamps, texts)
        if plain and texts:  # otherwise the full parser has taken them
            parts = self.answer.parts if template.said else self.answer.reasoning
            parts += _decode_texts(b'["%b"]' % b'","'.join(texts))
        return plain


class Sampler:
    """Keeps the text of at most ``most`` answers, evenly spread however many there are, for `harness.record.answers`.

    Every answer at first, then every second one, every fourth, and so on.
    """

    def __init__(self, most: int = SAMPLE) -> None:
        self._most, self._seen, self._stride = max(1, most), 0, 1
        self._kept: dict[int, Said] = {}

    def next(self) -> OnAnswer | None:
        """What to call with the answer of the next request; None when it is not in the sample."""
        n = self._seen
        self._seen += 1
        return None if n % self._stride else partial(self._take, n)

    def _take(self, n: int, result: Result, answer: Answer) -> None:
        if result.error is not None or n % self._stride:
            return
        self._kept[n] = Said(
            request_id=result.request_id, text=answer.parts, reasoning=answer.reasoning, blanks=answer.blanks,
            ids=len(answer.token_ids), other=answer.other,
        )  # fmt: skip
        if len(self._kept) > self._most:
            self._stride *= 2
            self._kept = {k: said for k, said in self._kept.items() if not k % self._stride}

    def said(self) -> list[Said]:
        """The sample, in the order of the requests."""
        return [self._kept[n] for n in sorted(self._kept)]
