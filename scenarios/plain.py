"""Plain events: of most streams nearly all events differ in their text alone. Learn one, then recognise many in bulk.

An answer's events repeat everything but the text: id, model, indices, nulls. `Template.learn` takes one chunk of the
answer apart at its text and proves, by the decoder of `completion` itself, that such an event is nothing but some more
output. Whatever begins and ends so, byte for byte, in an HTTP chunk of the right size, with a text that is the inside
of a JSON string, is then the same event with another text: no other reading of it is left. So it need not be decoded,
and what is not exactly that is taken by the book. No I/O; nothing is remembered but a guess, `_Usual`.
"""

from __future__ import annotations

import re
from itertools import repeat

import msgspec

from scenarios.completion import Completion
from scenarios.hot_path import Kept

_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)" ?: ?"')
_ID, _WORD = re.compile(rb'"id" ?: ?"([\w-]+)"'), re.compile(rb"[\w-]+")
_CLOSING = 4  # reads at the end of most answers: the last token, usage, [DONE], the last chunk
_decode_text = msgspec.json.Decoder(str).decode


class _Usual:
    """What the answer before this one looked like: most answers of a server differ in their id alone."""

    head = b"%x"
    """The case of the last chunk size that showed one: 9F is no 9f, and 81 does not tell which the server writes."""
    template: Template | None = None


class Template:
    """What a plain event of one answer looks like, around its text."""

    __slots__ = ("_end", "_head", "_id", "_tail", "after", "before", "starts", "upper")

    def __init__(self, before: bytes, after: bytes, end: bytes, head: bytes) -> None:
        self.before = before
        """What is before the text, from behind the line with the chunk's size."""
        self._head = head
        self.upper = head == b"%X"
        """How that size is written: 1F, not 1f."""
        self._end = end + b"\r\n"
        self.after = after + self._end
        """How a chunk with a plain event ends."""
        self._tail = after
        found = _ID.search(before)
        self._id = found.span(1) if found else (0, 0)
        self.starts = _Starts(before, len(self.after), head)
        """How it must begin, and the length of its text, by its size."""

    @classmethod
    def learn(cls, read: bytes) -> Template | None:
        """From a read that is one whole HTTP chunk with one plain event; null when it is anything else."""
        size, _, rest = read.partition(b"\r\n")
        if _Usual.template is not None and (like := _Usual.template._like(size, rest)):
            return like
        payload = rest[:-2]
        heads = [head for head in (b"%x", b"%X") if head % len(payload) == size]
        end = b"\r\n\r\n" if payload.endswith(b"\r\n\r\n") else b"\n\n"
        event = payload.removesuffix(end)
        if not (heads and rest.endswith(b"\r\n") and payload.endswith(end) and event.startswith(b"data:")):
            return None
        if b"\n" in event or b"\r" in event:
            return None  # several lines: what they mean together is for the book
        for found in _TEXT.finditer(event):
            before, after = event[: found.end()], event[event.find(b'"', found.end()) :]
            if _is_output(before + b"?" + after):
                if len(heads) == 1:
                    _Usual.head = heads[0]
                _Usual.template = cls(before, after, end, _Usual.head)
                return _Usual.template
        return None

    def _like(self, size: bytes, rest: bytes) -> Template | None:
        """The template that a chunk of ``size`` is of, when that is this one, with this or another id."""
        before, (start, end) = rest[: len(self.before)], self._id
        text = len(rest) - len(before) - len(self.after)
        if text < 1 or not rest.endswith(self.after) or size != self._head % (len(rest) - 2):
            return None
        if before == self.before:
            return self
        if before[:start] != self.before[:start] or before[end:] != self.before[end:]:
            return None
        # Letters and digits for letters and digits, in a string that is no output: the proof holds for these, too.
        if not _WORD.fullmatch(before, start, end):
            return None
        return Template(before, self._tail, self._end[:-2], self._head)

    def count(self, reads: list[bytes]) -> int:
        """How many of the first ``reads`` are a whole chunk with one plain event each."""
        if reads[-1].endswith(self._end) and self._all(reads):
            return len(reads)
        least, most = 0, len(reads) - 1
        if most > _CLOSING and self._all(reads[:-_CLOSING]):
            least = len(reads) - _CLOSING
        while least < most:
            middle = (least + most + 1) // 2
            if self._all(reads[least:middle]):
                least = middle
            else:
                most = middle - 1
        return least

    def holds(self, read: bytes) -> int:
        """How many events end in a read, plain or not."""
        return read.count(self._end)

    def cut(self, reads: list[bytes], stamps: list[int]) -> tuple[list[bytes], list[int]]:
        """The same reads cut behind each event, with the stamps that the parts then have."""
        parts: list[bytes] = []
        times: list[int] = []
        for read, stamp in zip(reads, stamps, strict=True):
            *events, rest = read.split(self._end)
            parts += [event + self._end for event in events]
            if rest:
                parts.append(rest)
            times += [stamp] * (len(parts) - len(times))
        return parts, times

    def _all(self, reads: list[bytes]) -> bool:
        starts, lengths = zip(*map(self.starts.__getitem__, map(len, reads)), strict=True)
        texts = list(map(bytes.removesuffix, map(bytes.removeprefix, reads, starts), repeat(self.after)))
        # What lacks its start or its end is longer than it would be without it.
        return tuple(map(len, texts)) == lengths and self.fit(b" ".join(texts))

    @staticmethod
    def fit(texts: bytes) -> bool:
        """Whether each is the inside of a JSON string; ``texts`` has a space between two of them, so that no half of a
        character or escape meets its other half in the next event.
        """
        try:
            _decode_text(b'"%b"' % texts)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        return True

    @classmethod
    def fits(cls, kept: Kept) -> bool:
        """Whether all texts that were kept are that."""
        return kept.simple or cls.fit(kept.joined())

    def whole(self, text: bytes) -> bytes:
        """The chunk that this is the text of, as it was read."""
        event = len(self.before) + len(text) + len(self.after) - 2
        return self._head % event + b"\r\n" + self.before + text + self.after


class _Starts(dict[int, tuple[bytes, int]]):
    """Size of a read -> how it must begin to be a chunk with a plain event, and how long its text then is."""

    def __init__(self, before: bytes, after: int, head: bytes) -> None:
        self._before, self._after, self._head = before, after, head

    def __missing__(self, size: int) -> tuple[bytes, int]:
        start, text = b"?", -1  # no chunk begins so
        for digits in range(1, 6):
            event = size - digits - 4
            head = self._head % max(event, 0)
            if len(head) == digits and event + 2 > len(self._before) + self._after:
                start, text = head + b"\r\n" + self._before, event + 2 - len(self._before) - self._after
        self[size] = start, text
        return start, text


def _is_output(event: bytes) -> bool:
    """Whether an event says that there is some output, and nothing else."""
    probe = Completion()
    probe.read_event(event, 0)
    return probe.is_plain
