"""One server to send to: its addresses, the head of every request to it, its certificates."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import gevent.monkey

from harness import __version__
from harness.errors import UsageError
from harness.record.run_spec import AUTHORIZATION
from harness.scenarios.client.fast_path import AnswerShape
from harness.server.access import Access, check_key_header
from harness.server.question import PORTS, split_url

_getaddrinfo: Any = gevent.monkey.get_original("socket", "getaddrinfo")
_SSLContext: Any = gevent.monkey.get_original("ssl", "SSLContext")

ENDPOINTS = {"completions": "/completions", "chat": "/chat/completions"}
IDLE_LIMIT_S = 4.0
"""A connection idle for longer is not used again where the server does not say how long it keeps one: uvicorn closes at
5 s, and a request sent into a close is lost."""
IDLE_SHARE, MOST_IDLE_S = 0.8, 60.0
"""Of the time that a server says, so much is used: its clock began earlier than ours."""


class Endpoint:
    """One server: where it is, the head of every request to it, and what is known of it.

    Names are resolved here, once. Raises `UsageError` for a URL that is none or a host without an address.
    """

    def __init__(
        self,
        index: int,
        base_url: str,
        endpoint: str,
        api_key: str | None,
        tls: ssl.SSLContext | None,
        *,
        headers: Mapping[str, str] | None = None,
        key_header: str = AUTHORIZATION,
        stream: bool = True,
    ) -> None:
        url = split_url(base_url, "base URL")
        port = url.port or PORTS[url.scheme]
        self.index = index
        self.host = url.hostname or ""
        self.authority = url.netloc
        self.tls = tls if url.scheme == "https" else None
        self.in_flight = 0
        self.waiting_ns: int | None = None
        """Since when requests have been waiting without a byte from it; null: none does."""
        self.shape: AnswerShape | None = None
        """What its answers look like, once one has shown it."""
        self.idle_s: float | None = None
        """How long it keeps an idle connection, as it said last."""
        try:
            found = _getaddrinfo(self.host, port, 0, 1)  # SOCK_STREAM
        except OSError as e:
            raise UsageError(f"{base_url}: no address for {self.host!r} ({e.strerror})") from e
        self.addresses = [(family, address) for family, _, _, _, address in found]
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
            raise UsageError("HARNESS_API_KEY holds characters that cannot be in an HTTP header")
        check_key_header(key_header, headers or {})
        access = Access(api_key=api_key, key_header=key_header, headers=headers or {})
        path = url.path.rstrip("/") + ENDPOINTS[endpoint] + (f"?{url.query}" if url.query else "")
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self.authority}",
            f"User-Agent: harness/{__version__}",
            f"Accept: {'text/event-stream' if stream else 'application/json'}",
            "Accept-Encoding: identity",
            "Content-Type: application/json",
            *(f"{name}: {value}" for name, value in access.lines().items()),
        ]
        self.head = "".join(f"{line}\r\n" for line in lines).encode("ascii")

    def heard(self, at_ns: int) -> None:
        """A byte came."""
        if self.waiting_ns is None or at_ns > self.waiting_ns:
            self.waiting_ns = at_ns if self.in_flight else None

    def prefer(self, index: int) -> None:
        """Try the address that just accepted first from now on."""
        if index:
            self.addresses.insert(0, self.addresses.pop(index))

    @property
    def idle_limit_s(self) -> float:
        """A connection idle for longer is not used again."""
        return IDLE_LIMIT_S if self.idle_s is None else min(IDLE_SHARE * self.idle_s, MOST_IDLE_S)


def tls_context(ca: str | None) -> ssl.SSLContext:
    """Trust in the system's certificates or those in the file ``ca``; certificate and host name are always verified.

    Raises `UsageError` for a file that holds none.
    """
    context: ssl.SSLContext = _SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"{ca}: not a file of trusted certificates ({e})") from e
    return context
