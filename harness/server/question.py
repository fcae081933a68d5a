"""One question over HTTP to a server that nobody vouches for.

Every request to a server except the load itself is made by `ask`, so that these rules are kept everywhere. A question
takes a bounded time in all (`http.client` alone bounds each read, so a byte a second lasts for ever) and a bounded
number of bytes, follows no redirect, since the API key would go along, and heeds no proxy of the environment: a load
test must know where its questions go, as it does for its load. A thread asks, since neither the system's resolver nor a
read heeds our deadline or Ctrl-C, which is heard at any moment.

Source: of ``Retry-After`` RFC 9110 section 10.2.3 (seconds, or a date).
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
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
    retry_after: str | None = None


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
    host = parts.hostname or ""
    if parts.scheme == "https":
        context = tls or ssl.create_default_context()
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, parts.port, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port)
    heard: queue.SimpleQueue[HttpAnswer | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            heard.put(_asked(parts, connection, deadline_s, headers, body, most_bytes))
        except Exception as e:  # whatever it is, it is raised where it was asked for
            heard.put(e)
        finally:
            connection.close()

    threading.Thread(target=work, name=f"ask {host}", daemon=True).start()
    try:
        answer = _waited(heard, time.monotonic() + deadline_s)
    except BaseException:  # nobody waits for the answer any more: its thread has nothing left to read
        with contextlib.suppress(OSError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)
        raise
    if isinstance(answer, HttpAnswer):
        return answer
    if isinstance(answer, TimeoutError):
        raise ServerError(f"{url}: no answer within {deadline_s:g} s; is the server up, and is the address right?")
    if isinstance(answer, OSError | ValueError | http.client.HTTPException):  # the last: it died in its answer
        raise ServerError(f"{url}: cannot be reached: {answer}; is the server up, and is the address right?")
    raise answer


def _waited(heard: queue.SimpleQueue[HttpAnswer | Exception], end: float) -> HttpAnswer | Exception:
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            return heard.get(timeout=min(left, HEARING_S))
    return TimeoutError()


def _asked(
    parts: SplitResult, connection: http.client.HTTPConnection, deadline_s: float, headers: Mapping[str, str],
    body: bytes | None, most_bytes: int,
) -> HttpAnswer:  # fmt: skip
    connection.timeout = deadline_s / 2  # of each of its addresses: one that says nothing leaves time for the next
    connection.connect()
    connection.sock.settimeout(deadline_s)
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
