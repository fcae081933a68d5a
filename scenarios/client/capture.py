"""An answer whose words are wanted: a later turn of its session will carry them (`scenarios.conversation`).

`ToldResponse` is a `Response` that also keeps what was said. Plain events go on being recognised, and their texts,
which are the insides of JSON strings, are decoded together, at the time when they would have been parsed anyway.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import msgspec

from harness.results import Result
from scenarios.client.completion import Answer, Secret
from scenarios.client.fast_path import Template
from scenarios.client.http1 import Response

Answered = Callable[[Result, Answer], None]
"""Gets the row of a request that ended, and what was said until then."""

_decode_texts = msgspec.json.Decoder(list[str]).decode


class ToldResponse(Response):
    """One answer, as `Response`, and what it said."""

    __slots__ = ("answer", "answered")
    told = True

    def __init__(self, secret: Secret, answered: Answered) -> None:
        super().__init__(secret)
        self.answered = answered
        self.answer = Answer()
        self._completion.told = self.answer

    def feed_plain(self, template: Template, stamps: array[int], texts: list[bytes] | None) -> bool:
        """Take plain events by their texts."""
        plain = super().feed_plain(template, stamps, texts)
        if plain and texts:  # else they were taken by the book, which tells
            said = self.answer.parts if template.said else self.answer.reasoning
            said += _decode_texts(b'["%b"]' % b'","'.join(texts))
        return plain
