"""Receives bytes and stamps each read: the hot path, compiled in `_reader.c` where that could be built.

`Reader` polls all descriptors with one epoll, and the event loop watches that one: a watcher for each connection would
cost a dispatch by the event loop for each read. The compiled one recognises what the answers of a server have in common
(`Pattern`, learned by `scenarios.client.fast_path`) and stores chunks in a `ReceiveBuffer` without calling into Python
until the answer ends; anything unexpected is passed on, and parsed by the full parser. The Python fallback passes
everything on.

A stamp is the kernel's: when the packet arrived, however late it was read. Only events that arrived between two reads
of the same descriptor share one, that of the last.

When to read (`ReadPacer`): as soon as bytes arrive or, while very many tokens arrive, in batches at fixed intervals. A
wake-up costs as much as several reads, and stamps do not depend on when bytes are read. So a busy client reads four
times between two tokens of a stream, and at least every 2.5 ms. Sends are not held back, but the client learns that
much later that an answer has ended, which a closed loop reports as lag. Batches pay off from `BATCH_READS_FROM` events
per interval; ``harness calibrate`` measures whether on this machine they do so only later, and nothing is tried out
during a measured run. When it is no longer rare that two events of a stream arrive between two reads, the interval
shrinks; without kernel stamps there is none.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Any, Protocol

import gevent
import gevent.monkey

from harness.record.run_spec import BATCH_READS_EVERY_NS, BATCH_READS_FROM
from harness.scenarios.client.timers import Ticker

_epoll: Any = gevent.monkey.get_original("select", "epoll")

READ_SIZE = 65536
SO_TIMESTAMPNS = 35
"""Socket option, and control message type, of the kernel's receive time on Linux; Python has no name for it."""
ANCILLARY_SIZE = 64
_SOL_SOCKET, _TIMESPEC = 1, struct.Struct("qq")
_EPOLLIN, _BATCH = 1, 64
MAX_INTERVAL_NS, _MIN_INTERVAL_NS = BATCH_READS_EVERY_NS, 500_000
_READS_PER_TOKEN = 4
_WINDOW_S = 0.1
_SHARED_LIMIT = 500  # one event in so many may share its stamp: far from what a 99th percentile of ITL would show
_GROWTH_NS = MAX_INTERVAL_NS // 16  # of the longest interval, per window in which sharing was rare


class Source(Protocol):
    """The owner of a descriptor, and what it is told."""

    recvmsg: Any

    def received(self, data: bytes, stamp: int) -> None:
        """Take bytes that arrived at ``stamp``, monotonic ns, and are not stored."""

    def unmatched(self, data: bytes, stamp: int) -> None:
        """Take bytes that do not fit the pattern, after those that were stored; whatever follows is passed on."""

    def ended(self, stamp: int) -> None:
        """The last chunk of a stored answer arrived at ``stamp``; whatever follows is passed on."""

    def lost(self, trouble: str | None) -> None:
        """The connection ended."""

    def failed(self, code: int) -> None:
        """Receiving failed with this errno."""


class PythonPattern:
    """What the answers of a server have in common: how they begin, and the bytes around the text of a plain event.

    ``events`` holds (before, loose, after) of at most 15 kinds. ``loose`` is as long as what it describes; each byte
    says what may stand there: "=" the same byte, "w" any letter, digit, _ or -, "d" any digit, "v" anything but CR, LF
    and 0.
    """

    __slots__ = ()

    def __init__(self, opening: bytes, loose: bytes, events: tuple[tuple[bytes, bytes, bytes], ...]) -> None:
        pass


class PythonReceiveBuffer:
    """What has arrived of an answer, in order, each chunk with its stamp (monotonic ns), until it is parsed."""

    __slots__ = ()
    opening_matched = False  # whether the answer began with the opening of its pattern
    line_end_missing = 0  # bytes still missing of the last chunk's line end
    last_ns = 0  # when something was last stored; 0 for never
    chunk_bytes = 0  # of whole chunks
    size = 0  # bytes of everything

    def __len__(self) -> int:
        return 0

    def clear(self) -> None:
        """Drop everything but an incomplete chunk."""

    def take_partial(self) -> bytes:
        """Remove and return the bytes of an incomplete chunk."""
        return b""

    def runs(self, since_ns: int, texts: bool) -> list[tuple[int, bytes, list[bytes] | None]]:
        """Everything stored, in runs of one kind: kind, stamps and parts.

        Kind 0 is whole chunks (the last chunk of an answer is empty), others the text of plain events of that kind.
        Stamps count from ``since_ns`` (int64, native byte order). Parts of other kinds are None, unless ``texts``, when
        all are printable ASCII without quote or backslash: the inside of a JSON string beyond doubt.
        """
        return []


class PythonReader:
    """Receives and stamps bytes, for every descriptor that has some, and passes all of them on."""

    __slots__ = ("_epoll", "_last_ns", "_polled", "_sources", "bytes", "events", "reads", "shared", "unstamped")

    def __init__(self) -> None:
        self.events = 0
        """Events (chunks with content) that were stored, and reads that were passed on."""
        self.bytes = 0
        self.shared = 0
        """Plain events that arrived after another in the same read, and share its stamp."""
        self.reads = 0
        self.unstamped = 0
        """Reads for which the kernel gave no time."""
        self._epoll: Any = _epoll()
        self._sources: dict[int, Source] = {}
        self._polled: set[int] = set()
        self._last_ns: dict[int, int] = {}

    def fileno(self) -> int:
        """A descriptor that is readable while there is work."""
        return int(self._epoll.fileno())

    def add(self, fd: int, source: Source, polled: bool) -> None:
        """Read from this descriptor from now on; unless ``polled``, ``source`` does that and calls `take`."""
        if fd in self._sources:
            raise ValueError(f"descriptor {fd} cannot be added")
        self._epoll.register(fd, _EPOLLIN)  # raises for what is not an open socket
        if polled:
            self._polled.add(fd)
        else:
            self._epoll.unregister(fd)
        self._sources[fd], self._last_ns[fd] = source, monotonic_ns()

    def store(self, fd: int, buffer: PythonReceiveBuffer, pattern: PythonPattern | None, opening: bool) -> None:
        """Store the answer that arrives on this descriptor; ``opening``: from its first byte on, if it begins as the
        pattern says. Otherwise the next byte must begin a chunk. Without a pattern no event is plain.
        """

    def stop_storing(self, fd: int) -> None:
        """Pass on whatever arrives from now on."""

    def remove(self, fd: int) -> None:
        """Stop reading; call it before the descriptor is closed. One that was never added is no error."""
        if self._sources.pop(fd, None) is not None and fd in self._polled:
            self._polled.discard(fd)
            self._epoll.unregister(fd)

    def read(self) -> bool:
        """Read what has bytes, without waiting; True when there may be more."""
        ready = self._epoll.poll(0, _BATCH)
        for fd, _ in ready:
            if (source := self._sources.get(fd)) is not None:  # else another in this batch closed it
                self._receive(fd, source)
        return len(ready) == _BATCH

    def _receive(self, fd: int, source: Source) -> None:
        try:
            data, ancillary, _, _ = source.recvmsg(READ_SIZE, ANCILLARY_SIZE)
        except OSError as e:
            source.failed(e.errno or 0)
            return
        if not data:
            source.lost(None)
            return
        stamp = self._last_ns[fd] = arrived_ns(ancillary, self._last_ns[fd])
        self.reads += 1
        self.unstamped += not ancillary
        self.bytes += len(data)
        self.events += 1
        source.received(data, stamp)

    def take(self, fd: int, data: bytes, stamp: int) -> None:
        """Take bytes that arrived at ``stamp``, monotonic ns, on a descriptor that is not polled."""
        if (source := self._sources.get(fd)) is not None:
            self.bytes += len(data)
            self.events += 1
            source.received(data, stamp)

    def close(self) -> None:
        """Stop; every connection is closed by its owner."""
        self._sources.clear()
        self._epoll.close()


_Ancillary = Sequence[tuple[int, int, bytes]]


def arrived_ns(ancillary: _Ancillary, after_ns: int) -> int:
    """When the kernel received the last of the bytes read, monotonic ns; now, where ``ancillary`` does not say.

    The kernel stamps in wall-clock time. Whatever was done to that clock meanwhile: never before ``after_ns``, the
    previous stamp.
    """
    wall = time_ns()  # first: interrupted in between, stamps are late and never early
    now = monotonic_ns()
    for level, kind, value in ancillary:
        if (level, kind, len(value)) == (_SOL_SOCKET, SO_TIMESTAMPNS, _TIMESPEC.size):
            seconds, ns = _TIMESPEC.unpack(value)
            arrived = int(seconds) * 1_000_000_000 + int(ns) - wall + now
            return min(now, max(after_ns, arrived))
    return now


COMPILED = False
"""Whether the reader is the compiled one; the environment variable HARNESS_INTERPRETED turns it off."""
Pattern = PythonPattern
ReceiveBuffer = PythonReceiveBuffer
Reader = PythonReader
if not TYPE_CHECKING and not os.environ.get("HARNESS_INTERPRETED"):
    try:
        from harness.scenarios.client import _reader
    except ImportError:
        pass  # there was no C compiler when this was installed
    else:
        COMPILED, Pattern, ReceiveBuffer, Reader = True, _reader.Pattern, _reader.ReceiveBuffer, _reader.Reader


class ReadPacer:
    """Calls ``reader.read`` on gevent's event loop when it is due. ``streams`` returns how many answers are open;
    ``batch_from`` is the number of events per interval from which reads are batched.
    """

    def __init__(self, reader: Reader, streams: Callable[[], int], batch_from: int = BATCH_READS_FROM) -> None:
        self._reader = reader
        self._streams = streams
        self._batch_from = batch_from
        loop: Any = gevent.get_hub().loop
        self._ready: Any = loop.io(reader.fileno(), 1)
        self._ready.start(reader.read)  # level-triggered: it is called again while reads are left over
        self._ticker = Ticker(reader.read)
        self._interval_ns = 0  # 0: read as bytes arrive
        self._max_ns = MAX_INTERVAL_NS
        # At the start of the window: time, events, events that share a stamp, reads without a kernel stamp.
        self._window = monotonic_ns(), 0, 0, 0
        self._timer: Any = loop.timer(_WINDOW_S, _WINDOW_S)
        self._timer.start(self._adapt)

    def _adapt(self) -> None:
        """Choose the interval for the next window from what arrived in the last one."""
        reader = self._reader
        since, seen, shared, unstamped = self._window
        now, events = monotonic_ns(), reader.events
        self._window = now, events, reader.shared, reader.unstamped
        if (reader.shared - shared) * _SHARED_LIMIT > events - seen:
            self._max_ns = max(self._max_ns // 2, _MIN_INTERVAL_NS // 2)
        else:
            self._max_ns = min(self._max_ns + _GROWTH_NS, MAX_INTERVAL_NS)
        ns_per_event = (now - since) / max(events - seen, 1)
        interval_ns = min(self._max_ns, int(ns_per_event * self._streams() / _READS_PER_TOKEN))
        pays_off = interval_ns >= max(_MIN_INTERVAL_NS, self._batch_from * ns_per_event)
        possible = self._ticker.precise and reader.unstamped == unstamped
        self._set_interval(interval_ns if pays_off and possible else 0)

    def _set_interval(self, interval_ns: int) -> None:
        if interval_ns == self._interval_ns:
            return
        self._interval_ns = interval_ns
        if interval_ns:
            self._ready.stop()
            self._ticker.every(interval_ns)
        else:
            self._ticker.stop()
            self._ready.start(self._reader.read)

    def close(self) -> None:
        """Stop reading; the owner closes the reader."""
        for watcher in (self._ready, self._timer):
            watcher.stop()
            watcher.close()
        self._ticker.close()
