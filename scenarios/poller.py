"""The hot path: receive, stamp and keep, for every connection that has bytes. All else waits for an idle loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import gevent.monkey

if TYPE_CHECKING:
    from scenarios.connection import Connection
    from scenarios.plain import Template
    from scenarios.stream import Stream

_epoll: Any = gevent.monkey.get_original("select", "epoll")

READ_SIZE = 65536
_SMALL_SIZE = 470
"""A usual event fits, and Python keeps objects of this size in pools: read into 64 KiB and cut down, what ten thousand
streams hold would leave the memory full of holes. What is larger takes a second call."""
_READ, _EPOLLIN = 1, 1
_BATCH, _ROUNDS, _MANY = 256, 4, 16
_Lane = tuple[
    Mapping[int, tuple[bytes, int]], bytes, Callable[[int], bytes], Callable[[bytes], None], Callable[[int], None],
    "Connection",
]  # fmt: skip
"""How plain events of an answer begin and end, recv of its socket, append of the two lists of its stream, itself."""


class Poller:
    """Reads every plain connection that has bytes, in one callback of gevent's loop.

    gevent watches one epoll instance of ours (which is readable when one of its sockets is): a watcher of its own for
    each socket costs a call through the hub per read, which is more than all the rest of a read.
    """

    __slots__ = ("_connections", "_epoll", "_lanes", "_watcher")

    def __init__(self, loop: Any) -> None:
        self._epoll: Any = _epoll()
        self._connections: dict[int, Connection] = {}
        self._lanes: dict[int, _Lane] = {}
        self._watcher: Any = loop.io(self._epoll.fileno(), _READ)
        self._watcher.start(self._read)

    def add(self, connection: Connection, fd: int) -> None:
        """Read from this connection from now on."""
        self._connections[fd] = connection
        self._epoll.register(fd, _EPOLLIN)

    def keep_texts(self, connection: Connection, stream: Stream, template: Template) -> None:
        """Of plain events that arrive on this connection, keep the text alone."""
        assert connection.sock is not None
        fd = connection.sock.fileno()
        if self._connections.get(fd) is connection:
            keep, note = stream.texts.append, stream.text_stamps.append
            self._lanes[fd] = (template.starts, template.after, connection.recv, keep, note, connection)

    def keep_all(self, fd: int) -> None:
        """Keep whatever arrives as it is again."""
        self._lanes.pop(fd, None)

    def remove(self, fd: int) -> None:
        """Read from it no more; call it before the descriptor is closed. One that was never added is no error."""
        self._lanes.pop(fd, None)
        if self._connections.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _read(self) -> None:
        poll, lane_of, now = self._epoll.poll, self._lanes.get, monotonic_ns
        for _ in range(_ROUNDS):
            ready = poll(0, _BATCH)
            for fd, _ in ready:
                lane = lane_of(fd)
                if lane is None:
                    self._read_any(fd)
                    continue
                starts, after, recv, keep, note, connection = lane
                try:
                    data = recv(_SMALL_SIZE)
                except OSError as e:
                    _failed(connection, e)
                    continue
                size = len(data)
                if size == _SMALL_SIZE:
                    data += _rest(recv)
                    size = len(data)
                stamp = now()
                start, length = starts[size]
                text = data.removeprefix(start).removesuffix(after)
                if len(text) == length:  # it had both, and nothing else: a plain event, if the text is one
                    keep(text)
                    note(stamp)
                elif size:
                    connection.other(data, stamp)
                else:
                    connection.lost(None)
            if len(ready) < _MANY:
                break  # the loop's own turn costs less than to look in vain

    def _read_any(self, fd: int) -> None:
        connection = self._connections.get(fd)
        if connection is None:
            return  # closed by what came before it in this round
        try:
            data = connection.recv(READ_SIZE)
        except OSError as e:
            _failed(connection, e)
            return
        stamp = monotonic_ns()
        if data:
            connection.received(data, stamp)
        else:
            connection.lost(None)

    def close(self) -> None:
        """Stop; every connection is closed by its owner."""
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()


def _rest(recv: Callable[[int], bytes]) -> bytes:
    """What else is there. An end or an error that shows here shows again, as an end, at the next turn."""
    try:
        return recv(READ_SIZE)
    except OSError:
        return b""


def _failed(connection: Connection, e: OSError) -> None:
    if not isinstance(e, BlockingIOError | InterruptedError):
        connection.lost(os.strerror(e.errno or 0).lower())
