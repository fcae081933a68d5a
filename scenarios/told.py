"""An answer whose words are wanted: a later turn of its session will carry them (`scenarios.conversation`).

`ToldResponse` is a `Response` that also keeps what was said. Plain events go on being recognised, and their texts,
which are the insides of JSON strings, are decoded together, at the time when they would have been parsed anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from harness.results import Result
from scenarios.completion import Answer, Completion
from scenarios.hot_path import Kept
from scenarios.plain import Template
from scenarios.response import Response

Answered = Callable[[Result, Answer], None]
"""Gets the row of a request that ended, and what was said until then."""

_BY_THE_BOOK = 3  # so many reads at a time a response decodes; of more it would only count the plain ones
_decode_text = msgspec.json.Decoder(str).decode


class ToldResponse(Response):
    """One answer, as `Response`, and what it said."""

    __slots__ = ("_said", "_spoken", "answer", "answered")

    def __init__(self, secret: str | None, answered: Answered) -> None:
        super().__init__(secret)
        self.answered = answered
        self.answer = Answer()
        self._completion.told = self.answer
        self._spoken: Template | None = None  # the last template that was asked whether its texts are said
        self._said = False

    def feed(self, reads: list[bytes], stamps: list[int]) -> None:
        """Take reads in order, each event decoded."""
        self._template(reads)  # learn from all of them, once, as ever
        for at in range(0, len(reads), _BY_THE_BOOK):
            super().feed(reads[at : at + _BY_THE_BOOK], stamps[at : at + _BY_THE_BOOK])

    def feed_kept(self, template: Template, kept: Kept, since_ns: int) -> None:
        """Take plain events by their texts."""
        if self._at_an_event and template.fits(kept):  # else they are taken by the book, which tells
            if template is not self._spoken:
                self._spoken, self._said = template, _is_said(template)
            if self._said:
                # Each is the inside of a JSON string by itself, so together they are one, too.
                self.answer.parts.append(_decode_text(b'"%b"' % b"".join(kept.texts())))
        super().feed_kept(template, kept, since_ns)


def _is_said(template: Template) -> bool:
    """Whether the texts of these events are part of what is said; reasoning is not."""
    probe = Completion()
    probe.told = Answer()
    probe.read_event(template.whole(b"?").partition(b"\r\n")[2], 0)
    return probe.told.text == "?"
