"""Plain events: of most streams nearly all events differ in their text alone. Learn one, then recognise the others.

An answer's events repeat everything but the text: id, model, indices, nulls. `Template.learn` takes one chunk of the
answer apart at its text and proves, by the decoder of `completion` itself, that such an event is nothing but some more
output. Whatever begins and ends so is then the same event with another text, if that is the inside of a JSON string: no
other reading of it is left. So it need not be decoded, and what is not exactly that is taken by the book.

Answers of one server, too, differ in little: in ids, in times, in headers that mean nothing to us. So how an answer
begins, up to its first output, and what its events look like are a `Shape`, by which the next one is recognised.
No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import msgspec

from scenarios.client.completion import Answer, Completion
from scenarios.client.head import MEANS, is_usual
from scenarios.client.reader import Pattern

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)" ?: ?"')
# What no fact is read from, so that any other value of the same length means the same: strings of letters and digits,
# and numbers but for their first digit.
_LOOSE = re.compile(rb'"id" ?: ?"(?P<w>[\w-]+)"|"created" ?: ?[1-9](?P<d>[0-9]+)[,}]')
_HEADER = re.compile(rb"\r\n([\w-]+): ?([^\r\n\0]*)(?=\r\n)")
_SIZE, _BLANK_LINE = re.compile(rb"([1-9a-fA-F][0-9a-fA-F]{0,5})\r\n"), re.compile(rb"\n\r?\n")
_PROBES, _NOTHING = [b"?", b"!"], [b"", b""]
_TEMPLATES = 4  # that a shape has at most: the oldest is forgotten
_LONG, _TRIES = 16384, 8  # bytes of a plain event, and texts in it that are tried: each costs two decodes
_SAME = ord("=")
_decode_text = msgspec.json.Decoder(str).decode


@dataclass(frozen=True, slots=True)
class Template:
    """What a plain event looks like around its text, from ``data:`` on; ``loose`` as in `reading.Pattern`."""

    before: bytes
    loose: bytes
    after: bytes
    said: bool
    """Whether its text is part of what is said; reasoning is not."""

    @classmethod
    def learn(cls, content: bytes) -> Template | None:
        """From the content of an HTTP chunk with one plain event; null when it is anything else."""
        end = b"\r\n\r\n" if content.endswith(b"\r\n\r\n") else b"\n\n"
        event = content.removesuffix(end)
        if not (content.endswith(end) and event.startswith(b"data:")) or b"\n" in event or b"\r" in event:
            return None  # several lines: what they mean together is for the book
        if len(event) > _LONG:
            return None
        for found in islice(_TEXT.finditer(event), _TRIES):
            before, after = event[: found.end()], event[event.find(b'"', found.end()) :]
            told = [_told(before + text + after) for text in _PROBES]
            if told in (_PROBES, _NOTHING):
                loose = _loose_in(before)
                return cls(_filled(before, loose), loose, after + end, told == _PROBES)
        return None

    def whole(self, text: bytes) -> bytes:
        """The event that this is the text of, as it was read but for what is loose."""
        return self.before + text + self.after


def _told(event: bytes) -> bytes | None:
    """What is said by an event that is some output, and nothing else; null for any other."""
    probe = Completion()
    probe.answer = Answer()
    probe.read_event(event, 0)
    return probe.answer.text.encode() if probe.is_plain else None


def fit(texts: list[bytes]) -> bool:
    """Whether each is the inside of a JSON string."""
    try:  # a space between two, so that no half of a character or escape meets its other half in the next
        _decode_text(b'"%b"' % b" ".join(texts))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Shape:
    """How answers of one server begin, up to their first output (empty: not known), and their plain events."""

    opening: bytes
    templates: tuple[Template, ...]
    pattern: Pattern
    """The same, as the hot path has it."""

    @classmethod
    def of(cls, opening: bytes, templates: tuple[Template, ...]) -> Shape:
        """The shape of these."""
        templates = templates[-_TEMPLATES:]
        head, blank, events = opening.partition(b"\r\n\r\n")
        loose = _loose_in_head(head) + b"=" * len(blank) + _loose_in(events)
        opening = _filled(opening, loose)
        return cls(opening, templates, Pattern(opening, loose, tuple((t.before, t.loose, t.after) for t in templates)))

    @classmethod
    def learn(cls, seen: bytes, known: Shape | None) -> Shape:
        """From all that came of an answer up to its first output or beyond it, and what was known of others."""
        opening, template = _opening_of(seen)
        known = known or cls.of(b"", ())
        if opening:
            shape = cls.of(opening, known.templates)
            known = known if shape.opening == known.opening else shape
        return known.with_one(template)

    def with_one(self, template: Template | None) -> Shape:
        """The same with a template that may be new."""
        if template is None or template in self.templates:
            return self
        return Shape.of(self.opening, (*self.templates, template))


def _opening_of(seen: bytes) -> tuple[bytes, Template | None]:
    """How an answer begins, up to its first output (empty: the next one is not to be known by it); and its events."""
    head, blank, body = seen.partition(b"\r\n\r\n")
    known = bool(blank) and is_usual(head)
    said, at = Completion(), 0
    while line := _SIZE.match(body, at):
        end = line.end() + int(line[1], 16) + 2
        content = body[line.end() : end - 2]
        for event in _BLANK_LINE.split(content):
            said.read_event(event, 0)
        if not said.blank or not content.endswith((b"\n\n", b"\n\r\n")) or body[end - 2 : end] != b"\r\n":
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
    """The same with a 0, which may be anywhere, wherever it is loose: what is alike is equal."""
    return bytes(one if may == _SAME else ord("0") for one, may in zip(data, loose, strict=True))
