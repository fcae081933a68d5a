"""Extra HTTP headers of requests: what may be one, and what must not be in a file that people share.

Source: RFC 9110 section 5 (field names and values).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from harness.errors import UsageError

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = {
    "accept", "accept-encoding", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te",
    "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
_SECRET_NAME = re.compile(r"auth|cookie|secret|token|password|credential|signature|(api|access)[-_]?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\s*(?:Bearer|Basic|Digest|Negotiate)\s|.*\bsk-[A-Za-z0-9_-]{8}", re.IGNORECASE)


def parse_headers(lines: Iterable[str]) -> dict[str, str]:
    """Headers from lines like ``Name: value``. Raises `UsageError`; see `check_headers`."""
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.strip()
        if not colon:
            raise UsageError("a header is written 'Name: value'")
        if name.lower() in (known.lower() for known in headers):
            raise UsageError(f"header {name!r} is given twice")
        headers[name] = value.strip()
    check_headers(headers)
    return headers


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise `UsageError` for a header that cannot be sent, that the client sets itself, or that holds a secret.

    Headers are written into the manifest; a message about one never shows its value.
    """
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise UsageError(f"header {name[:60]!r}: not a header name (letters, digits and -)")
        if _SECRET_NAME.search(name) or _SECRET_VALUE.match(value):
            raise UsageError(
                f"header {name!r} looks like a secret, and headers are written into the run's manifest: put the key "
                "into HARNESS_API_KEY, which is sent as 'Authorization: Bearer' and written nowhere"
            )
        if name.lower() in _OURS:
            raise UsageError(f"header {name!r} is set by the client itself")
        if not (value.isascii() and (value.isprintable() or not value)):
            raise UsageError(f"header {name!r}: its value must be printable ASCII on one line")
