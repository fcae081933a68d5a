"""A small read-only HTTP server for what a running test says of itself: threads of this process, on 127.0.0.1.

Only GET and HEAD of fixed paths; nothing that a client sends is stored, run or looked up. Other sites that the reader
has open must not read it through their browser: a name that was pointed at 127.0.0.1 (DNS rebinding) is known by its
Host header and refused, and no answer may be embedded or read across origins. There is no token, since there is nothing
to protect that /metrics, which a scraper must read without one, does not hold: figures, and no prompt, answer or key.
On another address than this machine's own only ``public`` paths are answered to other machines.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from harness.errors import UsageError

Page = Callable[[], tuple[str, str]]
"""(content type, text) as of now; called from several threads."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
AT_ONCE = 16
"""Answers in the making; more clients than this are hung up on, and ask again a second later."""
IDLE_S = 10.0
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveServer:
    """Serves ``pages`` by path from the moment it is made until `close`, or the end of the process.

    ``address``: host, IP address or empty (every interface), and port (0: any that is free). Raises `UsageError` where
    it cannot listen.
    """

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Page], public: Collection[str] = ()) -> None:
        host, port = address
        try:
            self._server = _Server((host, port), pages, public)
        except OSError as e:
            raise UsageError(
                f"--live {host}:{port}: cannot listen there ({e.strerror or e}); --live 0 takes any free port"
            ) from e
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="live page", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where this machine finds it."""
        return f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(IDLE_S)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = AT_ONCE

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Page], public: Collection[str]) -> None:
        self.pages, self.public = pages, frozenset(public)
        self._free = threading.BoundedSemaphore(AT_ONCE)
        super().__init__(address, _Handler)
        self.local = _is_loopback(str(self.server_address[0]))

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's concern, and a run's terminal is not the place for tracebacks."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = IDLE_S
    server_version, sys_version = "harness", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path)
        if page is None:
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", f"not here; {' '.join(self.server.pages)}\n")
        if not self._allowed(path):
            return self._answer(
                HTTPStatus.FORBIDDEN, "text/plain",
                "only as http://localhost or 127.0.0.1: use a tunnel (ssh -L, kubectl port-forward)\n",
            )  # fmt: skip
        try:
            kind, text = page()
        except Exception as e:  # a fault of ours must not end the run that is shown
            return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{type(e).__name__}\n")
        return self._answer(HTTPStatus.OK, kind, text)

    do_HEAD = do_GET  # noqa: N815

    def _allowed(self, path: str) -> bool:
        if path in self.server.public and not self.server.local:
            return True
        name = re.sub(r":\d*$", "", self.headers.get("Host", "")).strip("[]").lower()
        return name in LOOPBACK_NAMES and _is_loopback(str(self.client_address[0]))

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name for it
        """Not to the terminal of a run."""


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
