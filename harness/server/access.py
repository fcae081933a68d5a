"""What every request to a server carries besides its question, and where the pages of a server are.

The load and the questions before and after it carry the same: a gateway that asks for a header asks for it everywhere.
Of extra headers is checked what may be one, and what must not be in a file that people share.

Source: RFC 9110 section 5 (field names and values).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from harness.errors import UsageError
from harness.record.run_spec import AUTHORIZATION
from harness.server.question import split_url

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
    headers = _pairs(lines, ":", "a header is written 'Name: value'")
    check_headers(headers)
    return headers


def parse_header_env(lines: Iterable[str]) -> dict[str, str]:
    """Header -> environment variable from words like ``Name=VARIABLE``. Raises `UsageError`; see `from_environment`."""
    how = "--header-env is written NAME=VARIABLE: a header and an environment variable with its value"
    wanted = _pairs(lines, "=", how)
    if not all(_NAME.fullmatch(name) and _VARIABLE.fullmatch(variable) for name, variable in wanted.items()):
        raise UsageError(how)
    from_environment(wanted)
    return wanted


def _pairs(lines: Iterable[str], sign: str, how: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines:
        name, there, value = line.partition(sign)
        if not there:
            raise UsageError(how)
        if name.strip().lower() in (known.lower() for known in found):
            raise UsageError(f"header {name.strip()!r} is given twice")
        found[name.strip()] = value.strip()
    return found


def from_environment(wanted: Mapping[str, str]) -> dict[str, str]:
    """These headers with their values, which may be secret. Raises `UsageError` for one that cannot be sent."""
    found = {}
    for name, variable in wanted.items():
        found[name] = os.environ.get(variable, "").strip()
        if not found[name]:
            raise UsageError(f"--header-env {name}={variable}: the environment has no {variable}")
        _check(name, found[name])
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


START_UP_S = 300.0
"""A server that asks to be left alone (``Retry-After``) is waited for so long in all before a load begins."""
LEAST_WAIT_S = 1.0
_QUERY_KEYS = frozenset({"key", "code", "sig", "subscription-key"})
_ENDPOINTS = ("/chat/completions", "/completions", "/models")


@dataclass(slots=True)
class Patience:
    """How long a server that says when to come back is waited for; ``tell`` hears of each wait."""

    tell: Callable[[str], None]
    left_s: float = START_UP_S
    sleep: Callable[[float], None] = time.sleep

    def wait(self, who: str, wait_s: float | None) -> bool:
        """Wait as asked; False, at once, when nothing was asked or that is longer than there is time for."""
        if wait_s is None or wait_s > self.left_s:
            return False
        wait_s = max(wait_s, LEAST_WAIT_S)  # or a server that says 0 is asked for ever
        self.left_s -= wait_s
        self.tell(f"{who}: asks to come back in {wait_s:.3g} s (Retry-After): waiting")
        self.sleep(wait_s)
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The API key and how it is sent, and the headers that were asked for."""

    api_key: str | None = field(default=None, repr=False)
    key_header: str = AUTHORIZATION
    """Authorization carries "Bearer" and the key, any other header the key alone."""
    headers: Mapping[str, str] = field(default_factory=dict)
    secret_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    patience: Patience | None = None
    """null: a server that asks to come back later is not waited for."""

    def lines(self) -> dict[str, str]:
        headers = {**self.headers, **self.secret_headers}
        if self.api_key is None:
            return headers
        bearer = self.key_header.lower() == AUTHORIZATION.lower()
        return {**headers, self.key_header: f"Bearer {self.api_key}" if bearer else self.api_key}

    def hurried(self) -> Access:
        return replace(self, patience=None)

    def at(self, page: str, base_url: str) -> Access:
        """What a page gets: secrets go to the server that they are for, and to no other address."""
        same = urlsplit(page)[:2] == urlsplit(base_url)[:2]
        return self if same else replace(self, api_key=None, secret_headers={})


AccessLike = Access | str | None
"""Or the key alone, as bearer; null: no key."""


def access_of(access: AccessLike) -> Access:
    """The same in full."""
    return access if isinstance(access, Access) else Access(api_key=access)


def normalise_base_url(url: str) -> str:
    """``url`` as scheme://host[:port]/path[?query]: without the endpoint, if that of a request was given; adds ``/v1``
    when there is no path. The query stays, and goes with every request. Raises `UsageError` for no URL.
    """
    parts = split_url(url, "--base-url")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if looks_secret(name, value) or name.lower() in _QUERY_KEYS:
            raise UsageError(
                f"--base-url: {name!r} in its query looks like a secret, and URLs are written into the run's manifest: "
                "put the key into HARNESS_API_KEY (--key-header NAME sends it in a header of that name)"
            )
    path = parts.path.rstrip("/")
    endpoint = next((end for end in _ENDPOINTS if path.endswith(end)), "")
    path = path.removesuffix(endpoint) if endpoint else path or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def page_under(base_url: str, page: str) -> str:
    """The URL of ``/models``, say, of this API."""
    parts = urlsplit(base_url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + page, parts.query, ""))


def page_beside(base_url: str, page: str) -> str:
    """The same beside ``/v1``, where vLLM keeps /metrics, /version, /health and /tokenize."""
    parts = urlsplit(base_url)
    root = parts.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, root + page, parts.query, ""))
