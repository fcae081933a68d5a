"""Parses one HTTP answer from its bytes and the time of each read: the head, the framing, the events of the body.

No I/O and no clock: the client stamps and stores reads, and calls `Response.feed` when it has time. How the bytes were
split into reads changes only the stamps.

Sources: RFC 9112 (HTTP/1.1), WHATWG HTML section 9.2 (server-sent events).
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from harness.record.results import Result
from harness.scenarios.client.completion import Completion, Secret, StreamedAnswer, fill
from harness.scenarios.client.events import BOM, decode_texts, is_text

MEANS = frozenset(["connection", "content-encoding", "content-length", "content-type", "location", "transfer-encoding"])
"""Headers that are read; whatever others say changes nothing."""
_TIMEOUT = re.compile(r"(?:^|,)\s*timeout\s*=\s*\"?(\d{1,6})\b", re.IGNORECASE)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9]\d\d)(?: |$)")

HEADER_LIMIT = 64 * 1024
EVENT_LIMIT = 16 * 2**20
_ERROR_BODY_LIMIT = 64 * 1024
_FIELDS = b"deir:"  # first bytes of the lines of an event stream: data, event, id, retry, and comments
_BLANK = 4096  # most white space before the body, bytes
# Two line ends, each CR, LF or CR LF; of the second the first byte is enough: an event does not wait for an LF.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)[\r\n]")
_END = 3  # bytes of the longest end of an event, without the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a status line and headers say. ``problem``: why nothing after them can be trusted, if so."""

    status: int | None = None
    keep_alive: bool = False
    body: str = ""
    """"sse", "json" or "error"."""
    framing: str = ""
    """"none" (there is no body), "chunked", "length" or "close" (until the connection ends)."""
    length: int = 0
    location: str = ""
    idle_s: float | None = None
    """How long the server keeps an idle connection (``Keep-Alive: timeout``); null: it does not say."""
    retry_after: str = ""
    problem: str | None = None


USUAL = Head(status=200, keep_alive=True, body="sse", framing="chunked")
"""Of an event stream in chunks, on a connection that is kept."""


def read_head(head: bytes) -> Head | None:
    """What a head says, given without its blank line; null for an interim one, which the real one follows."""
    lines = head.decode("latin-1").split("\r\n")
    match = _STATUS_LINE.match(lines[0])
    if match is None:
        return Head(problem="the status line is not HTTP")
    status = int(match[2])
    if 100 <= status < 200 and status != 101:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name == "content-length" and headers.get(name, value) != value:
            return Head(status=status, problem="two different Content-Length headers")
        headers[name] = f"{headers[name]}, {value}" if name in headers and name != "content-length" else value
    connection, media = headers.get("connection", "").lower(), headers.get("content-type", "").lower()
    keep_alive = "close" not in connection and (match[1] == "1" or "keep-alive" in connection)
    framing, length, problem = _framing(status, headers)
    if framing == "close" or (framing == "chunked" and "content-length" in headers):
        keep_alive = False
    body = "error" if status != 200 else "json" if "json" in media else "sse"
    if status == 200 and headers.get("content-encoding", "identity").lower() != "identity":
        problem = f"a compressed answer ({headers['content-encoding']}) to a request that forbade it"
    elif status == 200 and "html" in media:
        problem = "an HTML page with status 200: this is not the model server's API"
    idle = _TIMEOUT.search(headers.get("keep-alive", ""))
    return Head(
        status=status, keep_alive=keep_alive, body=body, framing=framing, length=length,
        location=headers.get("location", ""), idle_s=float(idle[1]) if idle else None,
        retry_after=headers.get("retry-after", ""), problem=problem,
    )  # fmt: skip


def _framing(status: int, headers: dict[str, str]) -> tuple[str, int, str | None]:
    """Where the body ends, and its length if that was said; what is wrong with it, if anything."""
    coding, length = headers.get("transfer-encoding", "").lower(), headers.get("content-length")
    if status in (101, 204, 304):
        return "none", 0, None
    if coding:
        return ("chunked", 0, None) if coding == "chunked" else ("", 0, f"unknown Transfer-Encoding {coding!r}")
    if length is None:
        return "close", 0, None
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        return "", 0, "Content-Length is not a number"
    return "length", int(length), None


_State = Callable[["Response", bytes, int, int], int]  # parses bytes from a place on, with their time; how far it got


class Response:
    """One HTTP answer, fed in pieces of any size; ``secret`` is removed from every detail.

    After each `feed`: ``done`` (the answer is complete), ``keep_alive`` (the connection may be reused) and ``head``.
    ``answer`` collects the text; null: only times are kept.
    """

    __slots__ = (
        "_body_kind", "_carry", "_completion", "_held", "_last_body_ns", "_left", "_sample", "_secret", "_size",
        "_state", "_unsure", "done", "head", "keep_alive",
    )  # fmt: skip

    def __init__(self, secret: Secret = None, answer: StreamedAnswer | None = None) -> None:
        self.done = self.keep_alive = False
        self.head = Head()
        self._secret = secret
        # A plain function, not a bound method: no reference cycle, and the client runs with the garbage collector off.
        self._state: _State = Response._read_head
        self._held = b""  # bytes of an unfinished header block, chunk-size line or trailer
        self._left = 0  # bytes of the body, or of the chunk being read, that are still to come
        self._body_kind = ""  # as in `Head.body`
        self._unsure = True  # whether the body matches its Content-Type
        # An incomplete event, or the whole body if it is not a stream; contiguous, so that each byte is copied once.
        self._carry: bytes | bytearray = b""
        self._last_body_ns = self._size = 0
        self._completion = Completion(answer)
        self._sample = b""  # content of the last whole chunk

    @property
    def answer(self) -> StreamedAnswer | None:
        """The text so far; null unless it is collected."""
        return self._completion.answer

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
        """Whether the next byte begins a chunk with a new event, and the stream goes on."""
        between = self._state is Response._read_chunk_size and not self._held and not self._carry
        return between and self._body_kind == "sse" and self._completion.open

    @property
    def sample(self) -> bytes:
        """The content of the last chunk that was fed, if the next byte begins another event."""
        return self._sample if self.at_an_event else b""

    def fill(self, result: Result) -> Result:
        """Put what the answer amounts to into a row, which is returned; final once ``done``."""
        return fill(
            result, self._completion, status=self.head.status, done=self.done, body=bytes(self._carry),
            location=self.head.location, secret=self._secret,
        )  # fmt: skip

    # -- framing ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Skip the head, known to be that of a chunked event stream on a keep-alive connection."""
        self._unsure = False
        self._take_head(USUAL)

    def feed(self, read: bytes, stamp: int) -> None:
        """Parse one read, with its time (any one clock, ns)."""
        raw, self._held = self._held + read, b""
        pos = 0
        while pos < len(raw) and not self.done:
            before = (pos, self._state)
            pos = self._state(self, raw, pos, stamp)
            if (pos, self._state) == before:
                self._held = raw[pos:]
                break
        if self.done and pos < len(raw):
            self.keep_alive = False  # bytes after the answer: the connection is out of sync

    def feed_plain(
        self, whole: Callable[[bytes], bytes], said: bool, stamps: array[int], texts: list[bytes] | None
    ) -> bool:
        """Add plain events by their texts (null: ASCII), of which ``whole`` makes the chunks again; ``said``: these are
        part of the answer. False: not all were plain events.
        """
        if not (self.at_an_event and (texts is None or is_text(texts))):
            self.feed_chunks([whole(text) for text in texts or [b"?"] * len(stamps)], stamps)
            return False
        self._completion.take_plain(stamps)
        self._last_body_ns = stamps[-1]
        if self.answer is not None and texts:
            parts = self.answer.parts if said else self.answer.reasoning
            parts += decode_texts(texts)
        return True

    def feed_chunks(self, contents: list[bytes], stamps: Sequence[int]) -> None:
        """Parse the contents of whole chunks of an event stream, each with its time; the last chunk's is empty."""
        if self.done:
            self.keep_alive = False
            return
        if body := b"".join(contents):
            self._take_body(body, list(accumulate(map(len, contents))), stamps)
        self._sample = contents[-1]
        if not contents[-1] and not self.done:
            self._finish()

    def eof(self, trouble: str | None = None) -> None:
        """The connection ended, with ``trouble`` unless in order. What is neither ``done`` nor to end so is cut."""
        if self.done:
            return
        self.keep_alive = False
        if self._state is Response._read_until_close and trouble is None:
            self._finish("cut")
            return
        self.done = True
        where = "before the answer began" if self.head.status is None else "before the answer ended"
        self._completion.fail("cut", f"{trouble or 'the server closed the connection'} {where}")

    def misframed(self, problem: str = "a chunk that is longer than its size") -> None:
        """The framing is broken: the last chunk was not followed by its line end."""
        if not self.done:
            self._broken(f"bad chunked framing: {problem}")

    def _broken(self, detail: str) -> None:
        self._completion.fail("protocol", detail)
        self.done, self.keep_alive = True, False

    def _finish(self, torn: str = "incomplete") -> None:
        """A last event without its blank line counts if it is complete; else it is ``torn``."""
        self.done = True
        completion, carry = self._completion, bytes(self._carry)
        if self._body_kind == "json":
            self._carry = b""
            completion.read_json(carry, self._last_body_ns)
        elif self._body_kind == "sse":
            completion.read_event(carry, self._last_body_ns, torn)

    def _read_head(self, raw: bytes, pos: int, stamp: int) -> int:
        end = raw.find(b"\r\n\r\n", pos)
        if not raw.startswith(b"HTTP/1."[: len(raw) - pos], pos):
            self._broken("the answer is not HTTP/1.1 (is this the right port, and http or https as it should be?)")
        elif (end if end >= 0 else len(raw)) - pos > HEADER_LIMIT:
            self._broken(f"more than {HEADER_LIMIT // 1024} KiB of headers")
        elif end < 0:
            return pos
        elif head := read_head(raw[pos:end]):
            self._take_head(head)
        return len(raw) if self.done and end < 0 else end + 4

    def _take_head(self, head: Head) -> None:
        self.head = head
        self.keep_alive, self._body_kind, self._left = head.keep_alive, head.body, head.length
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

    def _read_length(self, raw: bytes, pos: int, stamp: int) -> int:
        """A body, or the rest of a chunk, of known length."""
        part = raw[pos : pos + self._left]
        self._left -= len(part)
        self._take_body(part, [len(part)], [stamp])
        if not self._left and not self.done:
            if self.head.framing == "chunked":
                self._state = Response._read_chunk_end
            else:
                self._finish()
        return pos + len(part)

    def _read_until_close(self, raw: bytes, pos: int, stamp: int) -> int:
        self._take_body(raw[pos:], [len(raw) - pos], [stamp])
        return len(raw)

    def _read_chunk_size(self, raw: bytes, pos: int, stamp: int) -> int:
        """Every complete chunk of ``raw``, up to an incomplete one or the last."""
        parts: list[bytes] = []
        problem = ""
        while self._state is Response._read_chunk_size and not problem:
            line_end = raw.find(b"\r\n", pos)
            if line_end < 0:
                problem = "a chunk-size line without end" if len(raw) - pos > 1024 else ""
                break
            try:
                size = int(raw[pos:line_end].partition(b";")[0], 16)
            except ValueError:
                size = -1
            if size < 0:
                problem = "a chunk size that is not a number"
                break
            pos = line_end + 2
            if size == 0:
                self._state = Response._read_trailer
                break
            parts.append(raw[pos : pos + size])  # before its line end is checked: where reads were cut must not matter
            pos += len(parts[-1])
            self._left = size - len(parts[-1])
            if self._left or len(raw) - pos < 2:
                self._state = Response._read_length if self._left else Response._read_chunk_end
            elif raw[pos : pos + 2] == b"\r\n":
                pos += 2
            else:
                problem = "a chunk that is longer than its size"
        if body := b"".join(parts):
            self._take_body(body, [len(body)], [stamp])
            self._sample = parts[-1] if self._state is Response._read_chunk_size else b""
        if problem:
            self.misframed(problem)
        return pos

    def _read_chunk_end(self, raw: bytes, pos: int, stamp: int) -> int:
        if len(raw) - pos < 2:
            return pos
        self._state = Response._read_chunk_size
        if raw[pos : pos + 2] != b"\r\n":
            self.misframed()
        return pos + 2

    def _read_trailer(self, raw: bytes, pos: int, stamp: int) -> int:
        line_end = raw.find(b"\r\n", pos)
        if line_end < 0:
            if len(raw) - pos > HEADER_LIMIT:
                self._broken("a trailer without end")
            return pos
        if line_end == pos:
            self._finish()
        return line_end + 2

    # -- body to events -----------------------------------------------------------------------------------------------

    def _take_body(self, body: bytes, ends: list[int], stamps: Sequence[int]) -> None:
        """Parse bytes of the body, whose parts end at ``ends`` and arrived at ``stamps``."""
        if self._unsure and self._body_kind in ("sse", "json"):
            self._look_at_body(body)
        if self._body_kind == "sse":
            if self._completion.error is None:
                self._take_events(body, ends, stamps)
        elif self._body_kind == "json" or len(self._carry) < _ERROR_BODY_LIMIT:
            self._hold(body)
            if len(self._carry) > EVENT_LIMIT:
                self._broken(f"more than {EVENT_LIMIT // 2**20} MiB in one answer")
        self._size += len(body)
        self._last_body_ns = stamps[bisect_left(ends, len(body))]

    def _look_at_body(self, body: bytes) -> None:
        """Tell a JSON object from an event stream by the first byte, whatever Content-Type says."""
        seen = self._carry[:_BLANK] + body
        begin = seen.removeprefix(BOM).lstrip()
        if (not begin or BOM.startswith(begin)) and len(seen) < _BLANK:
            return  # still to come
        self._unsure = False
        if begin.startswith(b"{"):
            self._body_kind = "json"
        elif begin and begin[0] in _FIELDS:
            self._body_kind = "sse"

    def _take_events(self, body: bytes, ends: list[int], stamps: Sequence[int]) -> None:
        carried = len(self._carry)
        looked = max(carried - _END, 0)  # no event ends before this
        if carried:
            self._hold(body)
        cuts = [match.end() for match in _BLANK_LINE.finditer(self._carry if carried else body, looked)]
        if cuts or not carried:
            text = bytes(self._carry) if carried else body
            # Without empty lines, and the LF of a CR LF that ended the last event.
            self._carry = text[cuts[-1] :].lstrip(b"\r\n") if cuts else text.lstrip(b"\r\n")
        if len(self._carry) > EVENT_LIMIT:
            self._broken(f"an event of more than {EVENT_LIMIT // 2**20} MiB")
            return
        if not cuts:
            return
        times = [stamps[bisect_left(ends, cut - carried)] for cut in cuts]
        completion = self._completion
        if not completion.read_plain(text[: cuts[-1]], times):
            for start, end, stamp in zip([0, *cuts], cuts, times, strict=False):
                completion.read_event(text[start:end], stamp)
        if completion.error is not None and completion.error[0] == "protocol":
            self.done, self.keep_alive = True, False

    def _hold(self, body: bytes) -> None:
        if not isinstance(self._carry, bytearray):
            self._carry = bytearray(self._carry)
        self._carry += body
