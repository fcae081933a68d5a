"""The head of an HTTP answer: what its body is, and where that ends. Pure, no I/O.

Source: RFC 9112 (HTTP/1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MEANS = frozenset(["connection", "content-encoding", "content-length", "content-type", "location", "transfer-encoding"])
"""Headers that are read; whatever others say changes nothing."""
_TIMEOUT = re.compile(r"(?:^|,)\s*timeout\s*=\s*\"?(\d{1,6})\b", re.IGNORECASE)
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9]\d\d)(?: |$)")


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
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection and (match[1] == "1" or "keep-alive" in connection)
    body, problem = _body(status, headers)
    framing, length, unframed = _framing(status, headers)
    if framing == "close" or (framing == "chunked" and "content-length" in headers):
        keep_alive = False
    return Head(
        status=status, keep_alive=keep_alive, body=body, framing=framing, length=length,
        location=headers.get("location", ""), idle_s=_idle_s(headers.get("keep-alive", "")),
        retry_after=headers.get("retry-after", ""), problem=problem or unframed,
    )  # fmt: skip


def _idle_s(said: str) -> float | None:
    found = _TIMEOUT.search(said)
    return float(found[1]) if found else None


def is_usual(head: bytes) -> bool:
    """Whether it is that of an event stream in chunks, on a connection that is kept."""
    said = read_head(head)
    return (
        said is not None and said.problem is None and said.keep_alive
        and (said.status, said.framing, said.body) == (200, "chunked", "sse")
    )  # fmt: skip


def _body(status: int, headers: dict[str, str]) -> tuple[str, str | None]:
    """How the body is read; what is wrong with it, if anything."""
    media = headers.get("content-type", "").lower()
    if status != 200:
        return "error", None
    if headers.get("content-encoding", "identity").lower() != "identity":
        return "", f"a compressed answer ({headers['content-encoding']}) to a request that forbade it"
    if "html" in media:
        return "", "an HTML page with status 200: this is not the model server's API"
    return "json" if "json" in media else "sse", None


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
