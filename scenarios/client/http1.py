"""Parses one HTTP answer from its bytes and the time of each read.

HTTP/1.1 framing (chunked, Content-Length, or until the connection closes) and server-sent events; `head` parses the
headers, `completion` the events, and `outcome` makes the figures of a result row. No I/O and no clock: the client
stamps and stores reads, and calls `Response.feed` when it has time. How the bytes were split into reads changes only
the stamps.

Sources: RFC 9112 (HTTP/1.1), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from itertools import accumulate

from scenarios.client.completion import Completion
from scenarios.client.events import BOM
from scenarios.client.fast_path import Template, fit
from scenarios.client.head import read_head
from scenarios.client.outcome import Outcome, Secret, outcome_of

HEADER_LIMIT = 64 * 1024
EVENT_LIMIT = 16 * 2**20
_ERROR_BODY_LIMIT = 64 * 1024

_FIELDS = b"deir:"  # first bytes of the lines of an event stream: data, event, id, retry, and comments
_BLANK = 4096  # most white space before the body, bytes
_END = 3  # bytes of the longest end of an event, without the last
# Two line ends, each CR, LF or CR LF; of the second the first byte is enough: an event does not wait for an LF.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)[\r\n]")

_State = Callable[["Response", bytes, int, list[int], list[int]], int]


class Response:
    """One HTTP answer, fed in pieces of any size.

    After each `feed`: ``done`` (the answer is complete), ``keep_alive`` (the connection may be reused), ``status``
    (null before the status line), ``idle_s`` and ``retry_after`` (as in `head.Head`). ``secret`` is removed from every
    detail.
    """

    __slots__ = (
        "_body_kind", "_carry", "_chunk_left", "_completion", "_head", "_last_body_ns", "_left", "_location", "_sample",
        "_secret", "_size", "_state", "_unsure", "done", "idle_s", "keep_alive", "retry_after", "status",
    )  # fmt: skip
    captures = False
    """Whether the text of events is captured, not only their times."""

    def __init__(self, secret: Secret = None) -> None:
        self.done = False
        self.keep_alive = False
        self.status: int | None = None
        self.idle_s: float | None = None
        self.retry_after = ""
        self._secret = secret
        # A plain function, not a bound method: no reference cycle, and the client runs with the garbage collector off.
        self._state: _State = Response._read_head
        self._head = b""  # bytes of an unfinished header block, chunk-size line or trailer
        self._left = 0  # Content-Length still to come
        self._chunk_left = 0  # of the chunk being read
        self._body_kind = ""  # "sse", "json" or "error"
        self._unsure = True  # whether the body matches its Content-Type
        # An incomplete event, or the whole body if it is not a stream; contiguous, so that each byte is copied once.
        self._carry: bytes | bytearray = b""
        self._last_body_ns = 0
        self._size = 0
        self._location = ""
        self._completion = Completion()
        self._sample = b""  # content of the last whole chunk

    # -- framing ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Skip the head, known to be that of a chunked event stream on a keep-alive connection."""
        self.status, self.keep_alive, self._body_kind, self._unsure = 200, True, "sse", False
        self._state = Response._read_chunk_size

    def feed(self, reads: list[bytes], stamps: list[int]) -> None:
        """Parse reads in order, with the time of each (any one clock, ns)."""
        raw = reads[0] if len(reads) == 1 else b"".join(reads)
        if self._head:
            # Never part of the body, so the stamp of these bytes does not matter: add them to the first read.
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
            self.keep_alive = False  # bytes after the answer: the connection is out of sync

    def feed_plain(self, template: Template, stamps: array[int], texts: list[bytes] | None) -> bool:
        """Add chunks of this template, given by their texts (None: plain ASCII). False: not all were plain events."""
        if self.at_an_event and (texts is None or fit(texts)):
            self._completion.take_plain(stamps)
            self._last_body_ns = stamps[-1]
            return True
        self.feed_chunks([template.whole(text) for text in texts or [b"?"] * len(stamps)], stamps.tolist())
        return False

    def feed_chunks(self, contents: list[bytes], stamps: list[int]) -> None:
        """Parse the contents of whole chunks of an event stream, each with its time; the last chunk's is empty."""
        if self.done:
            self.keep_alive = False
            return
        body = b"".join(contents)
        if body:
            self._take_body(body, [(0, len(body))], list(accumulate(map(len, contents))), stamps)
        self._sample = contents[-1]
        if not contents[-1] and not self.done:
            self._finish()

    def learn(self) -> Template | None:
        """The template of plain events, if the last chunk that was fed is one."""
        return Template.learn(self._sample) if self.at_an_event else None

    @property
    def taken(self) -> tuple[int, int]:
        """Events with output, and bytes of the body without those of plain events."""
        return self._completion.outputs, self._size

    @property
    def begun(self) -> bool:
        """Whether there was an event with output or usage."""
        return not self._completion.empty

    @property
    def at_an_event(self) -> bool:
        """Whether the next byte begins a chunk with a new event: nothing is half parsed, and the stream goes on."""
        return (
            self._state is Response._read_chunk_size and not self._head and not self._carry
            and self._body_kind == "sse" and self._completion.open
        )  # fmt: skip

    def eof(self, trouble: str | None = None) -> None:
        """The connection ended, with ``trouble`` unless it was closed in order. An answer that is not ``done`` is cut,
        unless it was to end with the connection.
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

    def misframed(self) -> None:
        """The last chunk was not followed by its line end."""
        if not self.done:
            self._broken("bad chunked framing: a chunk that is longer than its size")

    def _broken(self, detail: str) -> None:
        """Fail: not HTTP, or not an event stream."""
        self._completion.fail("protocol", detail)
        self.done, self.keep_alive = True, False

    def _finish(self, torn: str = "incomplete") -> None:
        """The body is over. A last event without its blank line counts if it is complete; else it is ``torn``."""
        self.done = True
        completion, carry = self._completion, bytes(self._carry)
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

    def _take_head(self, raw: bytes) -> None:
        head = read_head(raw)
        if head is None:
            return
        self.status, self.keep_alive = head.status, head.keep_alive
        self._body_kind, self._left, self._location = head.body, head.length, head.location
        self.idle_s, self.retry_after = head.idle_s, head.retry_after
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
        """Every complete chunk of ``raw``, up to an incomplete one or the last."""
        spans: list[tuple[int, int]] = []
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
            if stop + 2 > end:  # the chunk or its line end is incomplete
                if start < end:
                    spans.append((start, min(stop, end)))
                self._chunk_left = max(stop - end, 0)
                self._state = Response._read_chunk
                pos = min(stop, end)
                break
            spans.append((start, stop))  # before its line end is checked: where reads were cut must not matter
            if raw[stop : stop + 2] != b"\r\n":
                problem = "a chunk that is longer than its size"
                break
            pos = stop + 2
        if spans:
            self._take_body(raw, spans, ends, stamps)
            start, stop = spans[-1]
            self._sample = raw[start:stop] if self._state is Response._read_chunk_size else b""
        if problem and not self.done:
            self._broken(f"bad chunked framing: {problem}")
        return pos

    def _read_chunk(self, raw: bytes, pos: int, ends: list[int], stamps: list[int]) -> int:
        """The rest of a chunk from an earlier feed, and its line end."""
        if self._chunk_left:
            end = min(len(raw), pos + self._chunk_left)
            self._chunk_left -= end - pos
            self._take_body(raw, [(pos, end)], ends, stamps)
            return end
        if len(raw) - pos < 2:
            return pos
        if raw[pos : pos + 2] != b"\r\n":
            self.misframed()
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
        """Parse body bytes: ``spans`` of ``raw``, whose reads end at ``ends`` and arrived at ``stamps``."""
        if self._unsure and self._body_kind in ("sse", "json"):
            self._look_at_body(raw, spans)
        if self._body_kind == "sse":
            if self._completion.error is None:
                self._take_events(raw, spans, ends, stamps)
        elif self._body_kind == "json" or len(self._carry) < _ERROR_BODY_LIMIT:
            self._hold(b"".join([raw[a:b] for a, b in spans]))
            if len(self._carry) > EVENT_LIMIT:
                self._broken(f"more than {EVENT_LIMIT // 2**20} MiB in one answer")
        self._size += sum(b - a for a, b in spans)
        last = spans[-1][1]
        read = len(ends) - 1
        while read and ends[read - 1] >= last:
            read -= 1
        self._last_body_ns = stamps[read]

    def _look_at_body(self, raw: bytes, spans: list[tuple[int, int]]) -> None:
        """Tell a JSON object from an event stream by the first byte, whatever Content-Type says."""
        seen = self._carry[:_BLANK] + b"".join([raw[a:b] for a, b in spans])
        begin = seen.removeprefix(BOM).lstrip()
        if (not begin or BOM.startswith(begin)) and len(seen) < _BLANK:
            return  # still to come
        self._unsure = False
        if begin.startswith(b"{"):
            self._body_kind = "json"
        elif begin and begin[0] in _FIELDS:
            self._body_kind = "sse"

    def _take_events(self, raw: bytes, spans: list[tuple[int, int]], ends: list[int], stamps: list[int]) -> None:
        carried = len(self._carry)
        body = raw[spans[0][0] : spans[0][1]] if len(spans) == 1 else b"".join([raw[a:b] for a, b in spans])
        looked = max(carried - _END, 0)  # no event ends before this
        if carried:
            self._hold(body)
            if not _BLANK_LINE.search(self._carry, looked):
                if len(self._carry) > EVENT_LIMIT:
                    self._broken(f"an event of more than {EVENT_LIMIT // 2**20} MiB")
                return
        text = bytes(self._carry) if carried else body
        if b"\r" in text:
            cuts = [match.end() for match in _BLANK_LINE.finditer(text, looked)]
            parts = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
            rest = text[cuts[-1] :] if cuts else text
        else:
            first, *parts = text[looked:].split(b"\n\n")
            parts.insert(0, text[:looked] + first)
            rest = parts.pop()
            cuts, at = [], 0
            for part in parts:
                at += len(part) + 2
                cuts.append(at)
        self._carry = rest.lstrip(b"\r\n")  # empty lines, and the LF of a CR LF that ended the last event
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

    def _hold(self, body: bytes) -> None:
        if not isinstance(self._carry, bytearray):
            self._carry = bytearray(self._carry)
        self._carry += body

    def outcome(self) -> Outcome:
        """The outcome so far; final once ``done``."""
        return outcome_of(
            self._completion, status=self.status, done=self.done, body=bytes(self._carry), location=self._location,
            secret=self._secret,
        )  # fmt: skip


def _arrivals(
    cuts: list[int], carried: int, spans: list[tuple[int, int]], ends: list[int], stamps: list[int]
) -> list[int]:
    """The stamp of the read with the last byte of each event.

    ``cuts`` are the ends of events in the carried bytes and the spans, joined, ascending; all are in the new bytes.
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
