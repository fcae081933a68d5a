"""From the bytes of one HTTP answer and the time each read arrived, to the facts of a result row.

HTTP/1.1 framing (chunked, Content-Length, or until the connection closes), cut into server-sent events; `head` knows
what the headers say, `completion` what the events mean, `facts` what it all amounts to. No I/O and no clock: the client
stamps and keeps reads, and calls `Response.feed` when it has time. How reads were cut never changes the facts, only the
stamps they carry.

Sources: RFC 9112 (HTTP/1.1), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable

from scenarios.completion import Completion
from scenarios.facts import Facts, facts_of
from scenarios.head import read_head
from scenarios.hot_path import Kept
from scenarios.plain import Template

HEADER_LIMIT = 64 * 1024
EVENT_LIMIT = 16 * 2**20
_ERROR_BODY_LIMIT = 64 * 1024
_FEW = 4  # reads: to take them by the book is cheaper, be they plain or not
_BULK = 3  # how often a feed that holds other events, too, goes on with the many at once that are plain
_LESSONS = 4  # how often an answer is asked what its plain events look like


_USUAL_HEADS: dict[bytes, bool] = {}
"""Heads of streams that were parsed, and whether their connection is kept: most answers of a second have the same."""

_State = Callable[["Response", bytes, int, list[int], list[int]], int]


class Response:
    """One HTTP answer, fed in pieces of any size.

    After each `feed`: ``done`` (nothing more belongs to this answer), ``keep_alive`` (the connection may be used
    again), ``status`` (null before the status line), ``chunked`` (null before the headers ended). ``secret`` is cut out
    of every detail.
    """

    __slots__ = (
        "_body_kind", "_carry", "_chunk_left", "_completion", "_head", "_last_body_ns", "_left", "_lessons",
        "_location", "_plain", "_sample", "_secret", "_state", "chunked", "done", "keep_alive", "status",
    )  # fmt: skip

    def __init__(self, secret: str | None = None) -> None:
        self.done = False
        self.keep_alive = False
        self.status: int | None = None
        self.chunked: bool | None = None
        self._secret = secret
        # A plain function, not a bound method: no reference cycle, and the client runs with the garbage collector off.
        self._state: _State = Response._read_head
        self._head = b""  # bytes of an unfinished header block, chunk-size line or trailer
        self._left = 0  # Content-Length still to come
        self._chunk_left = 0  # of the chunk being read
        self._body_kind = ""  # "sse", "json" or "error"
        self._carry = b""  # an unfinished event, or the whole body when it is not a stream
        self._last_body_ns = 0
        self._location = ""
        self._completion = Completion()
        self._plain: Template | None = None
        self._lessons = _LESSONS
        self._sample = b""  # the last whole chunk that was taken by the book, to learn from

    # -- framing ------------------------------------------------------------------------------------------------------

    def feed(self, reads: list[bytes], stamps: list[int]) -> None:
        """Take reads in order with the time of each (any one clock, ns)."""
        template = self._template(reads)
        if template is None or len(reads) <= _FEW:
            self._feed(reads, stamps)
            return
        at, bulk = 0, _BULK
        while at < len(reads):
            if bulk:
                plain = template.count(reads[at:] if at else reads)
                self._take_plain(array("q", stamps[at : at + plain]))
                at += plain
                bulk -= 1
                if at < len(reads) and template.holds(reads[at]) > 1:
                    reads, stamps = template.cut(reads[at:], stamps[at:])
                    at = 0
                    continue
            odd = at
            while odd < len(reads) and not template.count(reads[odd : odd + 1]):
                odd += 1
            if odd > at:
                self._feed(reads[at:odd], stamps[at:odd])
                if odd < len(reads) and not self._at_an_event:
                    self._feed(reads[odd:], stamps[odd:])
                    return
                if odd - at == len(reads):
                    self._plain = None  # this answer has changed: learn again
            if odd < len(reads) and not bulk:
                self._take_plain(array("q", stamps[odd : odd + 1]))
                odd += 1
            at = odd

    def feed_kept(self, template: Template, kept: Kept, since_ns: int) -> None:
        """Take chunks of this template, each by its text alone, times counted from ``since_ns`` on."""
        stamps = array("q", kept.stamps(since_ns))
        if template.fits(kept) and self._at_an_event:
            self._take_plain(stamps)
        else:
            self.feed([template.whole(text) for text in kept.texts()], stamps.tolist())

    @property
    def plain(self) -> Template | None:
        """What plain events look like from here on; null while that is not known or nothing of the kind may follow.

        Asked after an event that was not plain. When that is what the answer's events look like now (its reasoning is
        over), it is learned anew; when nothing can be learned from it, what is known stays.
        """
        if not self._at_an_event:
            return None
        sample, self._sample = self._sample, b""
        if sample and self._lessons and not (self._plain and self._plain.count([sample])):
            self._learn(sample)
        return self._plain

    @property
    def begun(self) -> bool:
        """Whether there was an event with output or usage."""
        return not self._completion.empty

    @property
    def _at_an_event(self) -> bool:
        """Whether a chunk with an event may come next: nothing is half read, and events still count."""
        return (
            self._state is Response._read_chunk_size and not self._head and not self._carry
            and self._body_kind == "sse" and self._completion.open
        )  # fmt: skip

    def _template(self, reads: list[bytes]) -> Template | None:
        """What plain events look like here, once that is known and may be used.

        A template follows from the bytes of a read alone, wherever in the answer it stood, so one is learned from the
        middle, where plain events are.
        """
        if not self._at_an_event:
            return None
        if self._plain is None and self._lessons and len(reads) >= _FEW:
            self._learn(reads[len(reads) // 2])
        return self._plain

    def _remember(self, chunk: bytes) -> None:
        if self._lessons and self._state is Response._read_chunk_size:  # else more of it is still to come
            self._sample = chunk

    def _learn(self, read: bytes) -> None:
        self._lessons -= 1
        self._plain = Template.learn(read) or self._plain

    def _take_plain(self, stamps: array[int]) -> None:
        if stamps:
            self._completion.take_plain(stamps)
            self._last_body_ns = stamps[-1]

    def _feed(self, reads: list[bytes], stamps: list[int]) -> None:
        raw = reads[0] if len(reads) == 1 else b"".join(reads)
        if self._head:
            # Never part of the body, so the stamp of these bytes no longer matters: count them to the first read.
            offset = len(self._head)
            raw = self._head + raw
            self._head = b""
        else:
            offset = 0
        ends = []
        for read in reads:
            offset += len(read)
            ends.append(offset)
        pos = 0
        while pos < len(raw) and not self.done:
            before = (pos, self._state)
            pos = self._state(self, raw, pos, ends, stamps)
            if (pos, self._state) == before:
                self._head = raw[pos:]
                break
        if self.done and pos < len(raw):
            self.keep_alive = False  # bytes nobody asked for: this connection is out of step

    def eof(self, trouble: str | None = None) -> None:
        """The connection ended, with ``trouble`` if not in good order. Without ``done`` this answer is cut, unless its
        end was to be marked that way.
        """
        if self.done:
            return
        self.keep_alive = False
        if self._state is Response._read_until_close and trouble is None:
            self._finish("cut")
            return
        self.done = True
        where = "before the answer began" if self.status is None else "before the answer ended"
        self._completion.fail("cut", f"{trouble or 'the server closed the connection'} {where}")

    def _broken(self, detail: str) -> None:
        """Not HTTP or not an event stream: nothing after this can be trusted."""
        self._completion.fail("protocol", detail)
        self.done, self.keep_alive = True, False

    def _finish(self, torn: str = "incomplete") -> None:
        """The body is over. An event without its blank line counts if it is whole; else the stream is ``torn``."""
        self.done = True
        completion, carry = self._completion, self._carry
        if self._body_kind == "json":
            self._carry = b""
            completion.read_json(carry, self._last_body_ns)
        elif self._body_kind == "sse":
            completion.read_event(carry, self._last_body_ns, torn)

    def _read_head(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        end = raw.find(b"\r\n\r\n", pos)
        if not raw.startswith(b"HTTP/1."[: len(raw) - pos], pos):
            self._broken("the answer is not HTTP/1.1 (is this the right port, and http or https as it should be?)")
            return len(raw)
        if (end if end >= 0 else len(raw)) - pos > HEADER_LIMIT:
            self._broken(f"more than {HEADER_LIMIT // 1024} KiB of headers")
            return len(raw)
        if end < 0:
            return pos
        self._take_head(raw[pos:end])
        return end + 4

    def _take_head(self, head: bytes) -> None:
        keep_alive = _USUAL_HEADS.get(head)
        if keep_alive is not None:
            self.status, self.keep_alive, self.chunked, self._body_kind = 200, keep_alive, True, "sse"
            self._state = Response._read_chunk_size
            return
        self._parse_head(head)
        if self._state is Response._read_chunk_size and (self.status, self._body_kind) == (200, "sse"):
            if len(_USUAL_HEADS) > 64:
                _USUAL_HEADS.clear()
            _USUAL_HEADS[head] = self.keep_alive

    def _parse_head(self, raw: bytes) -> None:
        head = read_head(raw)
        if head is None:
            return
        self.status, self.keep_alive, self.chunked = head.status, head.keep_alive, head.framing == "chunked"
        self._body_kind, self._left, self._location = head.body, head.length, head.location
        if head.problem:
            self._broken(head.problem)
        elif head.framing == "chunked":
            self._state = Response._read_chunk_size
        elif head.framing == "close":
            self._state = Response._read_until_close
        elif head.length:
            self._state = Response._read_length
        else:
            self._finish()

    def _read_length(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        end = min(len(raw), pos + self._left)
        self._left -= end - pos
        self._take_body(raw, [(pos, end)], ends, stamps)
        if not self._left and not self.done:
            self._finish()
        return end

    def _read_until_close(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        self._take_body(raw, [(pos, len(raw))], ends, stamps)
        return len(raw)

    def _read_chunk_size(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        """Every whole chunk of ``raw`` in one go, up to an unfinished one or the last."""
        spans: list[tuple[int, int]] = []
        at = pos  # of the last chunk
        find, end = raw.find, len(raw)
        problem = ""
        while True:
            line_end = find(b"\r\n", pos)
            if line_end < 0:
                if end - pos > 1024:
                    problem = "a chunk-size line without end"
                break
            try:
                size = int(raw[pos:line_end].partition(b";")[0], 16)
            except ValueError:
                size = -1
            if size < 0:
                problem = "a chunk size that is not a number"
                break
            if size == 0:
                self._state = Response._read_trailer
                pos = line_end + 2
                break
            start = line_end + 2
            stop = start + size
            if stop + 2 > end:  # the chunk, or the line end behind it, is still to come
                if start < end:
                    spans.append((start, min(stop, end)))
                self._chunk_left = max(stop - end, 0)
                self._state = Response._read_chunk
                pos = min(stop, end)
                break
            at = pos
            spans.append((start, stop))  # whatever follows: it may not be there yet, and reads must not matter
            if raw[stop : stop + 2] != b"\r\n":
                problem = "a chunk that is longer than its size"
                break
            pos = stop + 2
        if spans:
            self._take_body(raw, spans, ends, stamps)
            self._remember(raw[at:pos])
        if problem and not self.done:
            self._broken(f"bad chunked framing: {problem}")
        return pos

    def _read_chunk(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        """The rest of a chunk that began in an earlier feed, and its line end."""
        if self._chunk_left:
            end = min(len(raw), pos + self._chunk_left)
            self._chunk_left -= end - pos
            self._take_body(raw, [(pos, end)], ends, stamps)
            return end
        if len(raw) - pos < 2:
            return pos
        if raw[pos : pos + 2] != b"\r\n":
            self._broken("bad chunked framing: a chunk that is longer than its size")
            return pos
        self._state = Response._read_chunk_size
        return pos + 2

    def _read_trailer(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        line_end = raw.find(b"\r\n", pos)
        if line_end < 0:
            if len(raw) - pos > HEADER_LIMIT:
                self._broken("a trailer without end")
            return pos
        if line_end == pos:
            self._finish()
        return line_end + 2

    # -- body to events ----------------------------------------------------------------------------------------------

    def _take_body(self, raw: bytes, spans: list[tuple[int, int]], ends: list[int], stamps: list[int]) -> None:
        """Body bytes: ``spans`` of ``raw``, whose reads end at ``ends`` and arrived at ``stamps``."""
        if self._body_kind == "sse":
            if self._completion.error is None:
                self._take_events(raw, spans, ends, stamps)
        elif self._body_kind == "json" or len(self._carry) < _ERROR_BODY_LIMIT:
            self._carry += b"".join([raw[a:b] for a, b in spans])
            if len(self._carry) > EVENT_LIMIT:
                self._broken(f"more than {EVENT_LIMIT // 2**20} MiB in one answer")
        last = spans[-1][1]
        read = len(ends) - 1
        while read and ends[read - 1] >= last:
            read -= 1
        self._last_body_ns = stamps[read]

    def _take_events(self, raw: bytes, spans: list[tuple[int, int]], ends: list[int], stamps: list[int]) -> None:
        carried = len(self._carry)
        body = raw[spans[0][0] : spans[0][1]] if len(spans) == 1 else b"".join([raw[a:b] for a, b in spans])
        text = self._carry + body if carried else body
        if b"\r" in text:
            cuts = [match.end() for match in re.finditer(rb"\n\r?\n", text)]
            parts = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
            self._carry = text[cuts[-1] :] if cuts else text
        else:
            parts = text.split(b"\n\n")
            self._carry = parts.pop()
            cuts, at = [], 0
            for part in parts:
                at += len(part) + 2
                cuts.append(at)
        if len(self._carry) > EVENT_LIMIT:
            self._broken(f"an event of more than {EVENT_LIMIT // 2**20} MiB")
            return
        if not parts:
            return
        times = _arrivals(cuts, carried, spans, ends, stamps)
        completion = self._completion
        if not completion.read_plain(text[: cuts[-1]], times):
            for part, stamp in zip(parts, times, strict=True):
                completion.read_event(part, stamp)
        if completion.error is not None and completion.error[0] == "protocol":
            self.done, self.keep_alive = True, False

    def facts(self) -> Facts:
        """The facts so far; final once ``done``."""
        return facts_of(
            self._completion, status=self.status, done=self.done, body=self._carry, location=self._location,
            secret=self._secret,
        )  # fmt: skip


def _arrivals(
    cuts: list[int], carried: int, spans: list[tuple[int, int]], ends: list[int], stamps: list[int]
) -> list[int]:
    """The stamp of the read that held the last byte of each event.

    ``cuts`` are event ends in (carried bytes + spans joined), ascending; an event always ends in the new bytes.
    """
    times = []
    span = read = 0
    first, last = spans[0]
    shift = carried - first  # joined offset = offset in raw + shift, within the current span
    end = ends[0]
    for cut in cuts:
        while cut - shift > last:
            shift += last
            span += 1
            first, last = spans[span]
            shift -= first
        at = cut - shift
        while at > end:
            read += 1
            end = ends[read]
        times.append(stamps[read])
    return times
