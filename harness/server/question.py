"""One question over HTTP to a server that nobody vouches for.

Every request to a server except the load itself is made by `ask`, so that these rules are kept everywhere. A question
takes a bounded time in all (`http.client` alone bounds each read, so a byte a second lasts for ever) and a bounded
number of bytes, follows no redirect, since the API key would go along, and heeds no proxy of the environment: a load
test must know where its questions go, as it does for its load. Ctrl-C is heard at any moment.

Source: of ``Retry-After`` RFC 9110 section 10.2.3 (seconds, or a date).
"""

from __future__ import annotations

import contextlib
import http.client
import io
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from harness.errors import ServerError, UsageError

MOST_BYTES = 1 << 24
"""Of an answer; none of those asked for is near it."""
HEARING_S = 0.25
"""The longest single wait. A signal that arrives just before a system call starts does not interrupt it, and Python
hears of it only when the call returns."""
PORTS = {"http": 80, "https": 443}
"""Where a URL of each scheme leads that names no port."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What came back, whatever its status."""

    status: int
    reason: str
    body: bytes
    location: str | None
    """Where a redirect points, as it was said."""
    retry_after: str | None = None
    """When to come back, as it was said."""


def split_url(text: str, what: str) -> SplitResult:
    """The parts of an http or https URL with a host; ``what`` names it in messages. Raises `UsageError`."""
    advice = "expected something like http://127.0.0.1:8000"
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError as e:  # of a bracket or port that is none; a host name that cannot be one (UnicodeError)
        raise UsageError(f"{what} {text!r}: {e}; {advice}") from e
    if parts.scheme not in PORTS or not host or port == 0 or not text.isprintable() or " " in text:
        raise UsageError(f"{what} {text!r}: {advice}")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{what}: no user or password in the URL; put the API key into HARNESS_API_KEY")
    return parts


def ask(
    url: str,
    *,
    headers: Mapping[str, str],
    body: bytes | None = None,
    deadline_s: float,
    most_bytes: int = MOST_BYTES,
    tls: ssl.SSLContext | None = None,
) -> HttpAnswer:
    """The whole answer to a GET, or to a POST of ``body``, within ``deadline_s`` from now.

    Raises `UsageError` for no URL, `ServerError` when there is no whole answer of at most ``most_bytes`` by then.
    """
    parts = split_url(url, "URL")
    end = time.monotonic() + deadline_s
    try:
        with contextlib.closing(_connected(parts, end, tls)) as sock:
            return _asked(parts, sock, end, headers, body, most_bytes)
    except TimeoutError as e:
        raise ServerError(
            f"{url}: no answer within {deadline_s:g} s; is the server up, and is the address right?"
        ) from e
    except (OSError, ValueError, http.client.HTTPException) as e:  # the last: it died in the middle of its answer
        raise ServerError(f"{url}: cannot be reached: {e}; is the server up, and is the address right?") from e


def _asked(
    parts: SplitResult, sock: socket.socket, end: float, headers: Mapping[str, str], body: bytes | None, most_bytes: int
) -> HttpAnswer:
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or PORTS[parts.scheme])
    if parts.scheme == "https":
        connection.default_port = PORTS["https"]  # the Host header leaves it out
    connection.sock = cast(Any, _Bounded(sock, end))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request("GET" if body is None else "POST", target, body, {"Connection": "close", **headers})
    with connection.getresponse() as response:
        found = bytes(response.read(most_bytes + 1))
        if len(found) > most_bytes:
            raise ServerError(f"{parts.geturl()}: the answer is larger than {most_bytes / 2**20:g} MiB")
        if response.length:  # `read` with a number does not say so: half a page of counters is no book
            raise http.client.IncompleteRead(found, response.length)
        said = response.getheader
        return HttpAnswer(response.status, response.reason, found, said("Location"), said("Retry-After"))


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connected(parts: SplitResult, end: float, tls: ssl.SSLContext | None) -> socket.socket:
    host = parts.hostname or ""
    addresses = _addresses(host, parts.port or PORTS[parts.scheme], end)
    for k, (family, address) in enumerate(addresses):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(end) / (len(addresses) - k))
            sock.connect(address)
            sock.settimeout(_left(end))
            if parts.scheme == "https":
                return (tls or ssl.create_default_context()).wrap_socket(sock, server_hostname=host)
            return sock
        except BaseException as e:
            sock.close()
            if not isinstance(e, OSError) or isinstance(e, ssl.SSLError) or k == len(addresses) - 1:
                raise
    raise OSError("its name has no address")


def _addresses(host: str, port: int, end: float) -> list[tuple[int, Any]]:
    """Resolved in a thread: the system's resolver heeds neither our deadline nor Ctrl-C."""
    found: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as e:  # whatever it is, it is raised where it was asked for
            found.put(e)

    threading.Thread(target=resolve, name=f"resolve {host}", daemon=True).start()
    while True:
        with contextlib.suppress(queue.Empty):
            answer = found.get(timeout=min(_left(end), HEARING_S))
            break
    if isinstance(answer, Exception):
        raise answer
    return [(family, address) for family, _, _, _, address in answer]


class _Bounded:
    """What `http.client` uses of a socket, every wait of it within what is left until ``end``."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._end))
        self._sock.sendall(data)  # its timeout is one for the whole

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Received(self._sock, self._end))

    def close(self) -> None:
        """Left to the owner of the socket: an answer may still be read."""


class _Received(io.RawIOBase):
    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            left = _left(self._end)
            self._sock.settimeout(min(left, HEARING_S))
            with contextlib.suppress(TimeoutError):
                return self._sock.recv_into(buffer)


_SECONDS = re.compile(r"\d{1,9}(?:\.\d{1,9})?")


def retry_after_s(said: str | None, now_unix_s: float | None = None) -> float | None:
    """Seconds from now, 0 for a date that has passed; null when nothing was said that can be read.

    Fractions are no part of the standard, but some gateways send them.
    """
    said = (said or "").strip()
    if _SECONDS.fullmatch(said):
        return float(said)
    try:
        when = parsedate_to_datetime(said).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, when - (time.time() if now_unix_s is None else now_unix_s))
