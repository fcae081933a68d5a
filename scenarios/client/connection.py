"""One keep-alive connection on gevent's event loop: connect, TLS handshake, write, and what to do with received bytes.

It works by callbacks: a greenlet per connection would cost a switch per read. Connections without TLS are read by
`scenarios.client.reader`, the hot path; those with TLS read themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Protocol

import gevent.monkey

from harness.scenarios.client.endpoint import Endpoint
from harness.scenarios.client.in_flight import InFlight
from harness.scenarios.client.reader import ANCILLARY_SIZE, COMPILED, READ_SIZE, SO_TIMESTAMPNS, Reader, arrived_ns

if TYPE_CHECKING:
    import socket

# Locust patches the socket module to switch greenlets; the hot path is driven by callbacks and needs the real one.
_socket: Any = gevent.monkey.get_original("socket", "socket")

_READ, _WRITE = 1, 2
_PROTO_TCP, _NODELAY, _SOL_SOCKET, _SO_ERROR = 6, 1, 1, 4


class Owner(Protocol):
    """The client that owns a connection."""

    loop: Any
    reader: Reader
    retries: int
    tls_reads: int
    tls_unstamped: int

    def idle(self, connection: Connection) -> None:
        """Return a connection whose answer has ended to the pool."""

    def drop(self, connection: Connection, trouble: str = "") -> None:
        """Forget a connection that carried no request when it ended."""

    def end(self, stream: InFlight, stamp: int) -> None:
        """Note that a request ended, with or without success."""

    def resend(self, stream: InFlight, stamp: int) -> bool:
        """Send a request once more if the connection was being closed when it was sent; whether it was."""


class Connection:
    """A TCP or TLS connection to one server; carries one request at a time, or none while idle."""

    __slots__ = (
        "_address", "_bio_in", "_bio_out", "_last_ns", "_out", "_reader", "_tls", "_writer", "client", "endpoint",
        "fd", "idle_ns", "ready", "recvmsg", "reused", "sock", "stream", "used",
    )  # fmt: skip

    def __init__(self, client: Owner, endpoint: Endpoint) -> None:
        self.client = client
        self.endpoint = endpoint
        self.stream: InFlight | None = None
        self.ready = False
        self.used = False
        self.reused = False  # not opened for the request that it carries
        self.idle_ns = 0
        self.sock: socket.socket | None = None
        self.fd = -1
        self._address = 0  # number of the server's addresses tried
        self._reader: Any = None
        self._writer: Any = None
        self.recvmsg: Any = None
        self._last_ns = 0  # with TLS: stamp of the last read
        self._out: bytes | memoryview = b""
        self._tls: ssl.SSLObject | None = None
        self._bio_in: ssl.MemoryBIO | None = None
        self._bio_out: ssl.MemoryBIO | None = None

    # -- opening ------------------------------------------------------------------------------------------------------

    def open(self, stream: InFlight | None) -> None:
        """Start to connect; then ``stream`` is sent or, without one, the connection joins the pool."""
        self.stream = stream
        if stream is not None:
            stream.connection = self
        self._try_next("")

    def _try_next(self, trouble: str) -> None:
        """Try the server's next address. Nothing was sent yet, so this is not a retry of the request."""
        while self._address < len(self.endpoint.addresses):
            family, address = self.endpoint.addresses[self._address]
            self._address += 1
            try:
                sock = _socket(family, 1)  # SOCK_STREAM
            except OSError as e:
                self._refused(f"{os.strerror(e.errno or 0)} (raise the limit of open files)")
                return
            sock.setblocking(False)
            # Acknowledgements are left to the kernel: to delay them (TCP_QUICKACK off) would save us CPU, but hold back
            # the tokens of a server that keeps Nagle's algorithm on, and so change what is measured.
            sock.setsockopt(_PROTO_TCP, _NODELAY, 1)
            with contextlib.suppress(OSError):  # without it the stamp is the time of the read
                sock.setsockopt(_SOL_SOCKET, SO_TIMESTAMPNS, 1)
            code = sock.connect_ex(address)
            if code in (0, errno.EINPROGRESS):
                self.sock, self.fd = sock, sock.fileno()
                self._writer = self.client.loop.io(self.fd, _WRITE)
                self._writer.start(self._connected)
                return
            trouble = os.strerror(code)
            sock.close()
        self._refused(trouble)

    def _refused(self, trouble: str) -> None:
        # In a callback: a closed loop would otherwise fail its whole plan within one iteration of the event loop.
        self.client.loop.run_callback(self._fail, "connect", f"{self.endpoint.authority}: {trouble}")

    def _connected(self) -> None:
        assert self.sock is not None
        self._writer.stop()
        code = self.sock.getsockopt(_SOL_SOCKET, _SO_ERROR)
        if code:
            self._release()
            self._try_next(os.strerror(code))
            return
        self.endpoint.prefer(self._address - 1)
        self.recvmsg = self.sock.recvmsg
        self.client.reader.add(self.fd, self, self.endpoint.tls is None)
        if self.endpoint.tls is None:
            self._opened()
            return
        self._reader = self.client.loop.io(self.fd, _READ)
        self._bio_in, self._bio_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = self.endpoint.tls.wrap_bio(self._bio_in, self._bio_out, server_hostname=self.endpoint.host)
        self._reader.start(self._read_tls)
        self._shake_hands()

    def _shake_hands(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush_tls()
        except (ssl.SSLError, ValueError) as e:
            self._flush_tls()  # the alert that tells the server why
            self._fail("tls", f"{self.endpoint.authority}: {getattr(e, 'verify_message', '') or e}")
        else:
            self._flush_tls()
            self._opened()

    @property
    def shaking_hands(self) -> bool:
        """True during the TLS handshake."""
        return self._tls is not None and not self.ready

    def _opened(self) -> None:
        self.ready = True
        if self.stream is None:
            self.client.idle(self)
        else:
            self._write(self.stream)

    # -- writing ------------------------------------------------------------------------------------------------------

    def send(self, stream: InFlight) -> None:
        """Send a request on this idle connection."""
        self.stream = stream
        self.reused = True
        stream.connection = self
        self._write(stream)

    def _write(self, stream: InFlight) -> None:
        self.used = True
        head, payload = self.endpoint.head, stream.payload
        if not (self.client.retries or self.reused):
            stream.payload = b""  # ten thousand streams may be open
        if stream.shape is not None and stream.shape.opening:
            self.client.reader.store(self.fd, stream.buffer, stream.shape.pattern, True)
        if self._tls is None:
            self._send_now(head, payload)
            return
        try:
            self._tls.write(head + payload)
        except ssl.SSLError as e:
            self.lost(f"TLS failed ({e.reason})")
            return
        self._flush_tls()

    def _flush_tls(self) -> None:
        assert self._bio_out is not None
        if self._bio_out.pending:
            data = self._bio_out.read()
            if self._out:
                self._out = bytes(self._out) + data
            else:
                self._send_now(data)

    def _send_now(self, *parts: bytes) -> None:
        """Send once; the rest follows when the socket is writable. Errors are left to reading: an answer may exist."""
        assert self.sock is not None
        try:
            sent = self.sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return
        rest = sum(len(part) for part in parts) - sent
        if rest:
            self._out = memoryview(b"".join(parts))[sent:]
            self._writer.start(self._writable)

    def _writable(self) -> None:
        assert self.sock is not None
        try:
            sent = self.sock.send(self._out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            sent = len(self._out)  # see _send_now
        self._out = self._out[sent:]
        if not self._out:
            self._writer.stop()

    # -- reading: the hot path ----------------------------------------------------------------------------------------

    def received(self, data: bytes, stamp: int) -> None:
        """Parse bytes that the reader does not store, until it can."""
        stream = self.stream
        if stream is None:
            self.lost(None)  # bytes without a request: the connection is out of sync
            return
        if stream.shape is None and stream.seen == b"" and self.endpoint.shape is not None and self._tls is None:
            # The shape was not known when this was sent; now it is, so that of the first wave only a few are parsed.
            stream.shape = self.endpoint.shape
            self.client.reader.store(self.fd, stream.buffer, stream.shape.pattern, True)
            self.client.reader.take(self.fd, data, stamp)
            return
        stream.feed(data, stamp)
        response = stream.response
        if response.done:
            self._end(stream, stream.last_ns, keep=response.keep_alive)
        elif COMPILED and response.begun and response.at_an_event:
            self._store(stream)

    def unmatched(self, data: bytes, stamp: int) -> None:
        """Parse what was stored, then bytes that do not match the pattern."""
        assert self.stream is not None
        self.stream.parse()
        if self.stream.buffer.line_end_missing:
            self.stream.response.misframed()  # this is not the line end that the last chunk lacked
        self.received(data, stamp)

    def ended(self, stamp: int) -> None:
        """The stored answer is complete: end the request now. Parsing waits until the loop is idle, since the answers
        of a batch end together and other requests may be due.
        """
        stream = self.stream
        assert stream is not None
        self._end(stream, stamp, keep=stream.buffer.opening_matched or stream.response.keep_alive)

    def _store(self, stream: InFlight) -> None:
        self.client.reader.store(self.fd, stream.buffer, stream.learn().pattern, False)

    def failed(self, code: int) -> None:
        """Receiving failed."""
        if code not in (errno.EAGAIN, errno.EINTR):
            self.lost(os.strerror(code).lower())

    def look(self, stream: InFlight) -> None:
        """Parse what is stored now, and learn the shape from it if it is more than texts."""
        chunks = stream.buffer.chunk_bytes
        stream.parse()
        if stream.response.done:
            self._end(stream, stream.heard_ns, keep=stream.response.keep_alive)
        elif chunks:
            self._store(stream)

    def _end(self, stream: InFlight, stamp: int, *, keep: bool) -> None:
        self.stream = stream.connection = None
        if (idle_s := stream.response.head.idle_s) is not None:
            self.endpoint.idle_s = idle_s
        if keep and not self._out:
            self.client.reader.stop_storing(self.fd)
            self.client.idle(self)
        else:
            self.close()
        self.client.end(stream, stamp)

    def _read_tls(self) -> None:
        assert self._bio_in is not None
        assert self._tls is not None
        try:
            data, ancillary, _, _ = self.recvmsg(READ_SIZE, ANCILLARY_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as e:
            self.lost(os.strerror(e.errno or 0).lower())
            return
        self._last_ns = stamp = arrived_ns(ancillary, self._last_ns)
        self.client.tls_reads += 1
        self.client.tls_unstamped += not ancillary
        if data:
            self._bio_in.write(data)
        else:
            self._bio_in.write_eof()
        if not self.ready:
            if data:
                self._shake_hands()
            else:
                self._fail("tls", f"{self.endpoint.authority}: the server closed the connection in the TLS handshake")
        if self.ready:
            self._decrypt(stamp, ended=not data)

    def _decrypt(self, stamp: int, *, ended: bool) -> None:
        """Pass on all decrypted bytes as one read: what stays in OpenSSL would wait for the next packet."""
        assert self._tls is not None
        parts, trouble = [], None
        while True:
            try:
                part = self._tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError as e:
                ended = True
                if not isinstance(e, ssl.SSLZeroReturnError | ssl.SSLEOFError):
                    trouble = f"TLS failed ({e.reason})"
                break
            if not part:
                ended = True
                break
            parts.append(part)
        self._flush_tls()
        if parts:
            self.client.reader.take(self.fd, b"".join(parts), stamp)
        if ended and self.sock is not None:
            self.lost(trouble)

    # -- ending -------------------------------------------------------------------------------------------------------

    def lost(self, trouble: str | None) -> None:
        """The connection ended, with or without a request on it."""
        stamp = monotonic_ns()
        stream, self.stream = self.stream, None
        self.close()
        if stream is None:
            self.client.drop(self)
            return
        stream.connection = None
        if self.reused and stream.payload and self.client.resend(stream, stamp):
            return
        stream.parse(over=True)
        stream.response.eof(trouble)
        self.client.end(stream, stamp)

    def _fail(self, error: str, detail: str) -> None:
        """Connecting failed."""
        stream, self.stream = self.stream, None
        self.close()
        if stream is None:
            self.client.drop(self, detail)
            return
        stream.connection = None
        stream.error = (error, detail)
        self.client.end(stream, monotonic_ns())

    def _release(self) -> None:
        for watcher in (self._reader, self._writer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._reader = self._writer = self.recvmsg = None
        if self.sock is not None:
            self.client.reader.remove(self.fd)
            self.sock.close()
            self.sock = None

    def close(self) -> None:
        """Close the socket and the watchers: they refer to this object, and no garbage collector runs. Safe twice."""
        self.ready = False
        self._release()
        self._tls = self._bio_in = self._bio_out = None
