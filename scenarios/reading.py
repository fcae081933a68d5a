"""The hot path, in Python: receive, stamp and keep, for every descriptor that has bytes.

Of an answer that begins as the others of its server did (its opening), nothing is handed on before its end: its chunks
are kept as they are, and of plain events only the text. Whatever is not as expected is handed on, to be taken by the
book.

A stamp is the kernel's: when the packet came, however late it was read. Only events that came between two reads of the
same descriptor share one, that of the last.

`_reading.c` is the same compiled, and what is used where it could be built; this file says what it does, is used where
it could not, and is what it is tested against.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Sequence
from itertools import groupby
from time import monotonic_ns, time_ns
from typing import Any, Protocol

import gevent.monkey

_epoll: Any = gevent.monkey.get_original("select", "epoll")

READ_SIZE = 65536
PARTIAL = 16384
"""A chunk that is not whole is held up to this size, bytes."""
SO_TIMESTAMPNS = 35
"""Socket option, and kind of message, by which Linux says when a packet came; Python has no name for it."""
SAID_SIZE = 64
_SOL_SOCKET, _TIMESPEC = 1, struct.Struct("qq")
_EPOLLIN = 1
_DIGITS = 5  # of the size of a chunk; larger ones are for the book
_BATCH, _MANY, _KINDS = 64, 16, 15
_LONG_NS = 300_000  # after so long a round of reading ends: a request may be due
_LINE_END = b"\r\n"
_SIMPLE = re.compile(rb"[ !#-\[\]-~]*")
_SIZE = re.compile(rb"(?:0|[1-9a-fA-F][0-9a-fA-F]{0,%d})\r\n" % (_DIGITS - 1))
_BEGUN = re.compile(rb"(?:0|[1-9a-fA-F][0-9a-fA-F]{0,%d})\r?" % (_DIGITS - 1))
_MAY_BE = {ord("w"): rb"[\w-]", ord("d"): rb"[0-9]", ord("v"): rb"[^\r\n\0]"}


class Source(Protocol):
    """Whose bytes are read: what it is told."""

    recvmsg: Any

    def received(self, data: bytes, stamp: int) -> None:
        """Take bytes that arrived at ``stamp``, monotonic ns."""

    def other(self, data: bytes, stamp: int) -> None:
        """The same: they are not as expected, and from now on whatever arrives is handed on."""

    def ended(self, stamp: int) -> None:
        """The last chunk of what is kept arrived at ``stamp``; from now on whatever arrives is handed on."""

    def lost(self, trouble: str | None) -> None:
        """The connection ended."""

    def failed(self, code: int) -> None:
        """Receiving failed with this errno."""


class Pattern:
    """What the answers of a server look like: how they begin, and the content of a chunk around a plain event's text.

    ``events``: (before, loose, after) of at most 15 kinds. In ``loose``, as long as what it is about, a byte says what
    may be there: "=" the same, "w" any of letters, digits, _ and -, "d" any digit, "v" anything but CR, LF and 0.
    """

    __slots__ = ("events", "opening", "size")

    def __init__(self, opening: bytes, loose: bytes, events: tuple[tuple[bytes, bytes, bytes], ...]) -> None:
        if len(events) > _KINDS:
            raise ValueError(f"more than {_KINDS} kinds of events")
        self.size = len(opening)
        self.opening = [re.compile(one, re.DOTALL) for one in _bytewise(opening, loose)]
        self.events = [
            (re.compile(b"".join(_bytewise(before, may)), re.DOTALL), len(before), after)
            for before, may, after in events
        ]

    def is_opening(self, data: bytes) -> bool:
        """Whether this is an opening, or how one begins."""
        return all(one.match(data, at) for at, one in enumerate(self.opening[: len(data)]))

    def text(self, content: bytes) -> tuple[int, bytes]:
        """The kind of plain event that this content of a chunk is, and its text; 0 when it is none."""
        for kind, (before, size, after) in enumerate(self.events, 1):
            text = content[size : len(content) - len(after)]
            if len(content) > size + len(after) and before.match(content) and content.endswith(after):
                return kind, text
        return 0, b""


def _bytewise(expected: bytes, loose: bytes) -> list[bytes]:
    if len(expected) != len(loose):
        raise ValueError(f"{len(expected)} bytes, and {len(loose)} that say which may differ")
    return [_MAY_BE.get(may, re.escape(bytes([one]))) for one, may in zip(expected, loose, strict=True)]


class Kept:
    """What has arrived of an answer, in order, and when (monotonic ns): texts of plain events, other chunks."""

    __slots__ = ("_entries", "first", "inside", "last_ns", "opened", "opening", "owed", "partial", "raw", "size")

    def __init__(self) -> None:
        self.opening = False  # still to come
        self.first = False  # the first event after it is still to come
        self.opened = False
        """Whether the answer began with the opening of its pattern."""
        self.inside = False  # the last chunk did not end with an event
        self.owed = 0
        """Bytes of the last chunk's line end that lack; when others came, they never will."""
        self.partial = b""  # of a chunk that is not whole
        self.last_ns = 0
        """When something arrived last; 0 for never."""
        self.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Hold nothing but what is not whole."""
        self._entries: list[tuple[int, int, bytes]] = []
        self.raw = 0
        """Bytes held of contents of chunks."""
        self.size = 0
        """Bytes held."""

    def add(self, kind: int, stamp: int, part: bytes) -> None:
        """Keep the text of an event of this kind (from 1 on), or the content of any other chunk (0)."""
        self._entries.append((kind, stamp, part))
        self.size += len(part)
        self.raw += 0 if kind else len(part)

    def rest(self) -> bytes:
        """Take the bytes of a chunk that is not whole."""
        rest, self.partial = self.partial, b""
        return rest

    def runs(self, since_ns: int, whole: bool) -> list[tuple[int, bytes, list[bytes] | None]]:
        """What is kept, in stretches of one kind: the kind; when each part arrived, from ``since_ns`` on (int64, native
        byte order); and the parts, of kind 0 contents of chunks, of which that of the last is empty, of others texts.

        Texts are null, unless ``whole``, when all that are kept are printable ASCII without quote or backslash: the
        insides of JSON strings beyond doubt.
        """
        whole = whole or not all(_SIMPLE.fullmatch(part) for kind, _, part in self._entries if kind)
        runs: list[tuple[int, bytes, list[bytes] | None]] = []
        for kind, group in groupby(self._entries, lambda entry: entry[0]):
            entries = list(group)
            stamps = array("q", [stamp - since_ns for _, stamp, _ in entries]).tobytes()
            runs.append((kind, stamps, [part for _, _, part in entries] if whole or not kind else None))
        return runs


_Said = Sequence[tuple[int, int, bytes]]


def arrived_ns(said: _Said, after_ns: int) -> int:
    """When the kernel got the last of the bytes that came with ``said``, monotonic ns; now, where it did not say.

    It stamps in the time of the wall clock. However that was set meanwhile: not before ``after_ns``, when what was read
    last came.
    """
    wall = time_ns()  # first: held up in between, stamps come out late and never early
    now = monotonic_ns()
    for level, kind, value in said:
        if (level, kind, len(value)) == (_SOL_SOCKET, SO_TIMESTAMPNS, _TIMESPEC.size):
            seconds, ns = _TIMESPEC.unpack(value)
            came = int(seconds) * 1_000_000_000 + int(ns) - wall + now
            return min(now, max(after_ns, came))
    return now


class _Lane:
    """One descriptor: whose it is, and what is kept of the answer that arrives on it, if anything is."""

    __slots__ = ("came_ns", "kept", "pattern", "polled", "source")

    def __init__(self, source: Source, polled: bool) -> None:
        self.source = source
        self.polled = polled
        self.came_ns = monotonic_ns()  # when what was last read came: what is read next came later
        self.kept: Kept | None = None
        self.pattern: Pattern | None = None


class Reader:
    """Receives, stamps and keeps, for every descriptor that has bytes."""

    __slots__ = ("_epoll", "_lanes", "bytes", "events", "reads", "shared", "unstamped")

    def __init__(self) -> None:
        self.events = 0
        """How many events (chunks with content) were kept, and reads handed on."""
        self.bytes = 0
        self.shared = 0
        """How many plain events came with another before them in one read, and share its stamp."""
        self.reads = 0
        """How often bytes were received."""
        self.unstamped = 0
        """How often the kernel gave no time for them."""
        self._epoll: Any = _epoll()
        self._lanes: dict[int, _Lane] = {}

    def fileno(self) -> int:
        """A descriptor that is readable while there is work."""
        return int(self._epoll.fileno())

    def add(self, fd: int, source: Source, polled: bool) -> None:
        """Read from this descriptor from now on; unless ``polled``, ``source`` does that and calls `take`."""
        if fd in self._lanes:
            raise ValueError(f"descriptor {fd} cannot be added")
        self._epoll.register(fd, _EPOLLIN)
        if not polled:
            self._epoll.unregister(fd)  # it is a socket, and open: that was the question
        self._lanes[fd] = _Lane(source, polled)

    def keep(self, fd: int, kept: Kept, pattern: Pattern | None, opening: bool) -> None:
        """Keep the answer that arrives on this descriptor; ``opening``: from its first byte on, if it has that of the
        pattern. Else a chunk must be what comes next. Without a pattern no event is plain.
        """
        lane = self._lanes.get(fd)
        if lane is not None:
            lane.kept, lane.pattern = kept, pattern
            kept.opening = opening
            if opening:
                lane.came_ns = monotonic_ns()  # what came before the request is no answer to it

    def keep_all(self, fd: int) -> None:
        """Hand on whatever arrives again."""
        lane = self._lanes.get(fd)
        if lane is not None:
            lane.kept = lane.pattern = None

    def remove(self, fd: int) -> None:
        """Read from it no more; call it before the descriptor is closed. One that was never added is no error."""
        lane = self._lanes.pop(fd, None)
        if lane is not None and lane.polled:
            self._epoll.unregister(fd)

    def read(self) -> bool:
        """Read what has bytes, without waiting; True when there may be more, as this took a while."""
        end_ns, more = monotonic_ns() + _LONG_NS, True
        while more:
            ready = self._epoll.poll(0, _BATCH)
            for fd, _ in ready:
                lane = self._lanes.get(fd)
                if lane is not None:  # else it was closed by what came before it in this round
                    self._read_one(fd, lane)
            more = len(ready) >= _MANY  # else the loop's own turn costs less than to look in vain
            if monotonic_ns() > end_ns:
                break
        return more

    def _read_one(self, fd: int, lane: _Lane) -> None:
        try:
            data, said, _, _ = lane.source.recvmsg(READ_SIZE, SAID_SIZE)
        except OSError as e:
            lane.source.failed(e.errno or 0)
            return
        if data:
            lane.came_ns = arrived_ns(said, lane.came_ns)
            self.reads += 1
            self.unstamped += not said
            self.bytes += len(data)
            self._take(lane, data, lane.came_ns)
        else:
            lane.source.lost(None)

    def take(self, fd: int, data: bytes, stamp: int) -> None:
        """Take bytes that arrived at ``stamp``, monotonic ns: of a descriptor that is not polled, or handed on."""
        lane = self._lanes.get(fd)
        if lane is None:
            return
        if lane.polled:
            self.events -= 1  # counted when it was handed on, as its bytes were
        else:
            self.bytes += len(data)
        self._take(lane, data, stamp)

    def _take(self, lane: _Lane, data: bytes, stamp: int) -> None:
        kept, source = lane.kept, lane.source
        if kept is None:
            self.events += 1
            source.received(data, stamp)
            return
        rest, last = self._keep(kept, lane.pattern, kept.rest() + data, stamp)
        if rest is None or not (rest or last):
            return
        lane.kept = lane.pattern = None
        if rest:
            self.events += 1
            source.other(rest, stamp)
        else:
            source.ended(stamp)

    def _keep(self, kept: Kept, pattern: Pattern | None, data: bytes, stamp: int) -> tuple[bytes | None, bool]:
        """Keep what is as expected; the rest of it, null when more is to come; and whether it had the last chunk."""
        kept.last_ns = stamp
        at = end = 0
        last, plain = False, 0
        while kept.owed and at < len(data):
            if data[at] != _LINE_END[-kept.owed]:
                return data[at:], False
            kept.owed -= 1
            at += 1
        if kept.opening:
            if pattern is None or not pattern.size or not pattern.is_opening(data[: pattern.size]):
                return data, False
            if len(data) < pattern.size:
                return self._hold(kept, data), False
            at = pattern.size
            kept.opening, kept.opened, kept.first = False, True, True
            self.events += 1
        while at < len(data) and not last:
            content, end = _chunk(data, at)
            if content is None:
                break
            kind, text = (0, b"") if pattern is None or kept.inside else pattern.text(content)
            if not kind and kept.first:  # its events are of no kind that is known: to be learned now, not at the end
                return data[at:], False
            kept.first = False
            kept.add(kind, stamp, text if kind else content)
            self.events += bool(content)
            if kind:
                self.shared += plain > 0
                plain += 1
            else:
                last = not content
                kept.inside = not content.endswith((b"\n\n", b"\n\r\n"))
            at = end
        else:
            end = at
        if at > len(data):
            kept.owed = at - len(data)  # of its line end: it is checked when it comes
        if end < 0 or last or at >= len(data):
            return data[at:], last
        return self._hold(kept, data[at:]), last

    @staticmethod
    def _hold(kept: Kept, rest: bytes) -> bytes | None:
        if len(rest) > PARTIAL or (not kept.opening and (b"\n\n" in rest or b"\n\r\n" in rest)):
            return rest  # an event in a chunk that is not whole came before the chunk does
        kept.partial = rest
        return None

    def close(self) -> None:
        """Stop; every connection is closed by its owner."""
        self._lanes.clear()
        self._epoll.close()


def _chunk(data: bytes, at: int) -> tuple[bytes | None, int]:
    """Content of the HTTP chunk at ``at`` (the last has none), and where it ends; null and 0 when more of it may come;
    null and -1 when it is for the book. Its line end may lack: the content came without.
    """
    line = _SIZE.match(data, at)
    if line is None:
        return None, 0 if _BEGUN.fullmatch(data, at) else -1
    start, size = line.end(), int(line[0], 16)
    stop = start + size
    if not _LINE_END.startswith(data[stop : stop + 2]):
        return None, -1
    if len(data) < stop + (0 if size else 2):
        return None, 0
    return data[start:stop], stop + 2
