"""Extra HTTP headers of requests: what may be one, and what must not be in a file that people share.

Source: RFC 9110 section 5 (field names and values).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from harness.errors import UsageError

AUTHORIZATION = "Authorization"
"""Carries the API key, unless another header is named."""
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = {
    "accept", "accept-encoding", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "te",
    "trailer", "transfer-encoding", "upgrade",
}  # fmt: skip
_SECRET_NAME = re.compile(
    r"auth|cookie|secret|token|password|passwd|credential|signature|jwt|(?<!idempotency)[-_]key\b|apikey|accesskey",
    re.IGNORECASE,
)
# What keys look like, whatever header they are in: schemes of Authorization; keys of OpenAI, Anthropic, Hugging Face,
# AWS, Google, GitHub, GitLab, Slack, Groq, NVIDIA and others; JSON Web Tokens; names and passwords in URLs.
_SECRET_VALUE = re.compile(
    r"^\s*(?:Bearer|Basic|Digest|Negotiate|ApiKey|Token)\s|\bsk-[A-Za-z0-9_-]{8}|\bhf_[A-Za-z0-9]{8}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12}|\bAIza[\w-]{20}|\bgh[opsur]_\w{16}|\bgithub_pat_\w{16}|\bglpat-[\w-]{12}"
    r"|\bxox[a-z]-[\w-]{8}|\bgsk_\w{16}|\bnvapi-[\w-]{16}|\br8_\w{16}|\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*|://[^/\s:@]+:[^/\s@]+@",
    re.IGNORECASE,
)


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


def parse_header_env(lines: Iterable[str]) -> dict[str, str]:
    """Header -> environment variable from words like ``Name=VARIABLE``. Raises `UsageError`; see `from_environment`."""
    wanted: dict[str, str] = {}
    for line in lines:
        name, _, variable = line.partition("=")
        name = name.strip()
        if not _NAME.fullmatch(name) or not _VARIABLE.fullmatch(variable.strip()):
            raise UsageError(
                "--header-env is written NAME=VARIABLE: a header and an environment variable with its value"
            )
        if name.lower() in (known.lower() for known in wanted):
            raise UsageError(f"header {name!r} is given twice")
        wanted[name] = variable.strip()
    from_environment(wanted)
    return wanted


def from_environment(wanted: Mapping[str, str]) -> dict[str, str]:
    """These headers with their values, which may be secret. Raises `UsageError` for one that cannot be sent."""
    found = {}
    for name, variable in wanted.items():
        value = os.environ.get(variable)
        if not value:
            raise UsageError(f"--header-env {name}={variable}: the environment has no {variable}")
        _check(name, value.strip())
        found[name] = value.strip()
    return found


def check_apart(headers: Mapping[str, str], others: Iterable[str]) -> None:
    """Raise `UsageError` for a header of both kinds."""
    known = {name.lower() for name in headers}
    if twice := [name for name in others if name.lower() in known]:
        raise UsageError(f"header {twice[0]!r} is given twice, by --header and by --header-env")


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise `UsageError` for a header that cannot be sent, that the client sets itself, or that holds a secret.

    Headers are written into the manifest; a message about one never shows its value.
    """
    for name, value in headers.items():
        if _NAME.fullmatch(name) and looks_secret(name, value):
            raise UsageError(
                f"header {name!r} looks like a secret, and headers are written into the run's manifest. Put the API "
                "key into HARNESS_API_KEY, which is sent as 'Authorization: Bearer'; any other secret into an "
                f"environment variable, and say --header-env {name}=VARIABLE. Neither is written anywhere"
            )
        _check(name, value)


def _check(name: str, value: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"header {name[:60]!r}: not a header name (letters, digits and -)")
    if name.lower() in _OURS:
        raise UsageError(f"header {name!r} is set by the client itself")
    if not (value.isascii() and (value.isprintable() or not value)):
        raise UsageError(f"header {name!r}: its value must be printable ASCII on one line")


def looks_secret(name: str, value: str) -> bool:
    """Whether a header, or a part of a URL's query, had better not be written down."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def check_key_header(name: str, headers: Mapping[str, str]) -> None:
    """Raise `UsageError` for a name that no header with the API key can have beside these ``headers``."""
    if not _NAME.fullmatch(name) or name.lower() in _OURS:
        raise UsageError(f"--key-header {name[:60]!r}: not the name of a header that can carry a key")
    if name.lower() in (other.lower() for other in headers):
        raise UsageError(f"--header and --key-header both set {name!r}: give one")
