"""The hot path, in Python: receive, stamp and keep, for every descriptor that has bytes.

A stamp is the kernel's: when the packet came, however late it was read. Only events that came between two reads of the
same descriptor share one, that of the last.

`_reading.c` is the same compiled, and what is used where it could be built; this file says what it does, is used where
it could not, and is what it is tested against.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from time import monotonic_ns, time_ns
from typing import Any, Protocol

import gevent.monkey

_epoll: Any = gevent.monkey.get_original("select", "epoll")

READ_SIZE = 65536
_SMALL_SIZE = 470
"""A usual event fits, and Python keeps objects of this size in pools: read into 64 KiB and cut down, what ten thousand
streams hold would leave the memory full of holes. What is larger takes a second call."""
SO_TIMESTAMPNS = 35
"""Socket option, and kind of message, by which Linux says when a packet came; Python has no name for it."""
SAID_SIZE = 64
_SOL_SOCKET, _TIMESPEC = 1, struct.Struct("qq")
_EPOLLIN = 1
_DIGITS = 5  # of the size of a chunk with a plain event
_BATCH, _ROUNDS, _MANY = 256, 4, 16
_SIMPLE = re.compile(rb"[ !#-\[\]-~]*")


class Source(Protocol):
    """Whose bytes are read: what it is told of those that are no plain event."""

    recvmsg: Any

    def received(self, data: bytes, stamp: int) -> None:
        """Take bytes that arrived at ``stamp``, monotonic ns."""

    def other(self, data: bytes, stamp: int) -> None:
        """The same, where only texts were kept until now."""

    def lost(self, trouble: str | None) -> None:
        """The connection ended."""

    def failed(self, code: int) -> None:
        """Receiving failed with this errno."""


class Around(Protocol):
    """What stands around the text of a plain event (`scenarios.plain.Template`)."""

    before: bytes
    after: bytes
    upper: bool

    @property
    def starts(self) -> Mapping[int, tuple[bytes, int]]:
        """How such a chunk begins, and the length of its text, by the chunk's size."""


class Kept:
    """Texts of plain events, in order, and when each arrived (monotonic ns)."""

    __slots__ = ("_stamps", "_texts")

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._stamps: list[int] = []

    def __len__(self) -> int:
        return len(self._texts)

    def clear(self) -> None:
        """Hold nothing."""
        self._texts.clear()
        self._stamps.clear()

    def texts(self) -> list[bytes]:
        """Each text."""
        return list(self._texts)

    def joined(self) -> bytes:
        """All texts with a space between two."""
        return b" ".join(self._texts)

    def stamps(self, since_ns: int) -> bytes:
        """When each arrived, counted from ``since_ns`` on: int64, native byte order."""
        return array("q", [stamp - since_ns for stamp in self._stamps]).tobytes()

    @property
    def simple(self) -> bool:
        """Whether all are printable ASCII without quote or backslash: the inside of a JSON string beyond doubt."""
        return _SIMPLE.fullmatch(self.joined()) is not None

    @property
    def last_ns(self) -> int:
        """When the last arrived; 0 for none."""
        return self._stamps[-1] if self._stamps else 0


_Said = Sequence[tuple[int, int, bytes]]
_Receive = Callable[[int, int], tuple[bytes, _Said, int, object]]
_Lane = tuple[
    Mapping[int, tuple[bytes, int]], bytes, _Receive, Callable[[bytes], None], Callable[[int], None], Source, Around,
]  # fmt: skip
"""How plain events begin and end, recvmsg of the socket, append of what is kept, whose it is, and the template."""


def arrived_ns(said: _Said, after_ns: int) -> int:
    """When the kernel got the last of the bytes that came with ``said``, monotonic ns; now, where it did not say.

    It stamps in the time of the wall clock. However that was set meanwhile: not before ``after_ns``, the last read.
    """
    wall = time_ns()  # first: held up in between, stamps come out late and never early
    now = monotonic_ns()
    for level, kind, value in said:
        if (level, kind, len(value)) == (_SOL_SOCKET, SO_TIMESTAMPNS, _TIMESPEC.size):
            seconds, ns = _TIMESPEC.unpack(value)
            came = int(seconds) * 1_000_000_000 + int(ns) - wall + now
            return min(now, max(after_ns, came))
    return now


class Reader:
    """Receives, stamps and keeps, for every descriptor that has bytes."""

    __slots__ = ("_epoll", "_lanes", "_read_ns", "_sources", "bytes", "events")

    def __init__(self) -> None:
        self.events = 0
        """How many plain events, and other reads, were read."""
        self.bytes = 0
        self._epoll: Any = _epoll()
        self._sources: dict[int, Source] = {}
        self._lanes: dict[int, _Lane] = {}
        self._read_ns: dict[int, int] = {}  # when each was last read: what is read next came later

    def fileno(self) -> int:
        """A descriptor that is readable while there is work."""
        return int(self._epoll.fileno())

    def add(self, fd: int, source: Source) -> None:
        """Read from this descriptor from now on."""
        if fd in self._sources:
            raise ValueError(f"descriptor {fd} cannot be added")
        self._epoll.register(fd, _EPOLLIN)
        self._sources[fd] = source
        self._read_ns[fd] = monotonic_ns()

    def keep_texts(self, fd: int, kept: Kept, around: Around) -> None:
        """Of plain events that arrive on this descriptor, keep the text alone."""
        source = self._sources.get(fd)
        if source is not None:
            keep, note = kept._texts.append, kept._stamps.append
            self._lanes[fd] = (around.starts, around.after, source.recvmsg, keep, note, source, around)

    def keep_all(self, fd: int) -> None:
        """Hand on whatever arrives again."""
        self._lanes.pop(fd, None)

    def remove(self, fd: int) -> None:
        """Read from it no more; call it before the descriptor is closed. One that was never added is no error."""
        self._lanes.pop(fd, None)
        self._read_ns.pop(fd, None)
        if self._sources.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def read(self) -> None:
        """Read whatever has bytes, without waiting."""
        poll, lane_of, read_ns, now = self._epoll.poll, self._lanes.get, self._read_ns, monotonic_ns
        for _ in range(_ROUNDS):
            ready = poll(0, _BATCH)
            for fd, _ in ready:
                lane = lane_of(fd)
                if lane is None:
                    self._read_any(fd)
                    continue
                starts, after, receive, keep, note, source, around = lane
                try:
                    data, said, _, _ = receive(_SMALL_SIZE, SAID_SIZE)
                except OSError as e:
                    source.failed(e.errno or 0)
                    continue
                size = len(data)
                if size == _SMALL_SIZE:
                    data, said = _with_rest(data, said, receive)
                    size = len(data)
                stamp = arrived_ns(said, read_ns[fd])
                read_ns[fd] = now()
                self.bytes += size
                start, length = starts[size]
                text = data.removeprefix(start).removesuffix(after)
                if len(text) == length:  # it had both, and nothing else: a plain event, if the text is one
                    keep(text)
                    note(stamp)
                    self.events += 1
                elif size:
                    at = 0  # several events, or none
                    while at < size and (one := _plain_event(data[at:], around)):
                        keep(one[0])
                        note(stamp)
                        at += one[1]
                        self.events += 1
                    if at < size:
                        self.events += 1
                        source.other(data[at:], stamp)
                else:
                    source.lost(None)
            if len(ready) < _MANY:
                break  # the loop's own turn costs less than to look in vain

    def _read_any(self, fd: int) -> None:
        source = self._sources.get(fd)
        if source is None:
            return  # closed by what came before it in this round
        try:
            data, said, _, _ = source.recvmsg(READ_SIZE, SAID_SIZE)
        except OSError as e:
            source.failed(e.errno or 0)
            return
        stamp = arrived_ns(said, self._read_ns[fd])
        self._read_ns[fd] = monotonic_ns()
        if data:
            self.events += 1
            self.bytes += len(data)
            source.received(data, stamp)
        else:
            source.lost(None)

    def close(self) -> None:
        """Stop; every connection is closed by its owner."""
        self._lanes.clear()
        self._sources.clear()
        self._epoll.close()


def _with_rest(data: bytes, said: _Said, receive: _Receive) -> tuple[bytes, _Said]:
    """And what else is there. An end or an error that shows here shows again, as an end, at the next turn."""
    try:
        more, said_of_more, _, _ = receive(READ_SIZE - _SMALL_SIZE, SAID_SIZE)
    except OSError:
        return data, said
    return (data + more, said_of_more) if more else (data, said)


def _plain_event(data: bytes, around: Around) -> tuple[bytes, int] | None:
    """The text of the plain event that ``data`` begins with, and the length of its HTTP chunk."""
    digits = data[: _DIGITS + 2].partition(b"\r\n")[0]
    try:
        size = int(digits, 16)
    except ValueError:
        return None
    whole = data[: len(digits) + 2 + size + 2] if len(digits) <= _DIGITS else b""
    start, length = around.starts[len(whole)]
    text = whole.removeprefix(start).removesuffix(around.after)
    return (text, len(whole)) if len(text) == length else None
