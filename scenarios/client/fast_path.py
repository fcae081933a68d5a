"""Recognises plain events without decoding them. No I/O.

In most streams events differ in their text alone: id, model, indices and nulls repeat. `Template.learn` splits an event
at its text and checks with the decoder of `completion` that it is output and nothing else. Another event with the same
bytes around the inside of a JSON string then needs no decoding. All others are parsed by the full parser.

Answers of one server also begin alike, but for ids, times and headers that are not read. The beginning up to the first
output and the templates of the events make up a `AnswerShape`, by which the next answer is recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from harness.scenarios.client.completion import Completion, StreamedAnswer
from harness.scenarios.client.http1 import MEANS, USUAL, read_head
from harness.scenarios.client.reader import Pattern

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)" ?: ?"')
# Values that are never read, so that any other of the same length means the same: strings of letters and digits, and
# numbers after their first digit.
_LOOSE = re.compile(rb'"id" ?: ?"(?P<w>[\w-]+)"|"created" ?: ?[1-9](?P<d>[0-9]+)[,}]')
_HEADER = re.compile(rb"\r\n([\w-]+): ?([^\r\n\0]*)(?=\r\n)")
_SIZE, _BLANK_LINE = re.compile(rb"([1-9a-fA-F][0-9a-fA-F]{0,5})\r\n"), re.compile(rb"\n\r?\n")
_PROBES, _NOTHING = [b"?", b"!"], [b"", b""]
_TEMPLATES = 4  # most of a shape: the oldest is dropped
_LONG, _TRIES = 16384, 8  # most bytes of a plain event, and most strings in it to try: each costs two decodes
_SAME = ord("=")


@dataclass(frozen=True, slots=True)
class Template:
    """A plain event around its text, from ``data:`` on; ``loose`` as in `reader.PythonPattern`."""

    before: bytes
    loose: bytes
    after: bytes
    said: bool
    """Whether its text is part of the answer; reasoning is not."""

    @classmethod
    def learn(cls, content: bytes) -> Template | None:
        """From the content of an HTTP chunk with one plain event; None if it is anything else."""
        end = b"\r\n\r\n" if content.endswith(b"\r\n\r\n") else b"\n\n"
        event = content.removesuffix(end)
        if not (content.endswith(end) and event.startswith(b"data:")) or b"\n" in event or b"\r" in event:
            return None  # several lines are for the full parser
        if len(event) > _LONG:
            return None
        for found in islice(_TEXT.finditer(event), _TRIES):
            before, after = event[: found.end()], event[event.find(b'"', found.end()) :]
            found_texts = [_plain_text(before + text + after) for text in _PROBES]
            if found_texts in (_PROBES, _NOTHING):
                loose = _loose_in(before)
                return cls(_filled(before, loose), loose, after + end, found_texts == _PROBES)
        return None

    def whole(self, text: bytes) -> bytes:
        """The event with this text, as it was read except for loose bytes."""
        return self.before + text + self.after


def _plain_text(event: bytes) -> bytes | None:
    """The text of an event that is output and nothing else; None for any other."""
    probe = Completion(answer := StreamedAnswer())
    probe.read_event(event, 0)
    return answer.text.encode() if probe.is_plain and not answer.logprobs else None


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How answers of a server begin, up to the first output (empty: unknown), and the templates of their events."""

    opening: bytes
    templates: tuple[Template, ...]
    pattern: Pattern
    """The same for the reader."""

    @classmethod
    def of(cls, opening: bytes, templates: tuple[Template, ...]) -> AnswerShape:
        """The shape with this opening and these templates."""
        templates = templates[-_TEMPLATES:]
        head, blank, events = opening.partition(b"\r\n\r\n")
        loose = _loose_in_head(head) + b"=" * len(blank) + _loose_in(events)
        opening = _filled(opening, loose)
        return cls(opening, templates, Pattern(opening, loose, tuple((t.before, t.loose, t.after) for t in templates)))

    @classmethod
    def learn(cls, seen: bytes, known: AnswerShape | None) -> AnswerShape:
        """From the bytes of an answer up to its first output or beyond, and the known shape of others."""
        opening, template = _opening_of(seen)
        known = known or cls.of(b"", ())
        if opening:
            shape = cls.of(opening, known.templates)
            known = known if shape.opening == known.opening else shape
        return known.with_one(template)

    def with_one(self, template: Template | None) -> AnswerShape:
        """The same shape with the template added, if it is new."""
        if template is None or template in self.templates:
            return self
        return AnswerShape.of(self.opening, (*self.templates, template))


def _opening_of(seen: bytes) -> tuple[bytes, Template | None]:
    """The beginning of an answer up to its first output (empty: not usable), and the template of its events."""
    head, blank, body = seen.partition(b"\r\n\r\n")
    found = read_head(head) if blank else None
    known = found is not None and replace(found, location="", idle_s=None, retry_after="") == USUAL
    said, at = Completion(), 0
    while line := _SIZE.match(body, at):
        end = line.end() + int(line[1], 16) + 2
        content = body[line.end() : end - 2]
        for event in _BLANK_LINE.split(content):
            said.read_event(event, 0)
        if (
            not (said.ordinary and said.empty)
            or not content.endswith((b"\n\n", b"\n\r\n"))
            or body[end - 2 : end] != b"\r\n"
        ):
            return (head + blank + body[:at] if known else b""), Template.learn(content)
        at = end
    return b"", None


def _loose_in(event: bytes) -> bytes:
    return _marked(event, ((found.span(found.lastgroup or 0), found.lastgroup) for found in _LOOSE.finditer(event)))


def _loose_in_head(head: bytes) -> bytes:
    found = _HEADER.finditer(head + b"\r\n")
    return _marked(head, ((one.span(2), "v") for one in found if one[1].decode().lower() not in MEANS))


def _marked(data: bytes, spans: Iterable[tuple[tuple[int, int], str | None]]) -> bytes:
    loose = bytearray(b"=" * len(data))
    for (start, end), kind in spans:
        loose[start:end] = (kind or "=").encode() * (end - start)
    return bytes(loose)


def _filled(data: bytes, loose: bytes) -> bytes:
    """``data`` with a 0 for each loose byte, so that equal shapes compare equal."""
    return bytes(one if may == _SAME else ord("0") for one, may in zip(data, loose, strict=True))
