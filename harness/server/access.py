"""What every request to a server carries besides its question, and where the pages of a server are.

The load and the questions before and after it carry the same: a gateway that asks for a header asks for it everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from harness.errors import UsageError
from harness.server.headers import AUTHORIZATION, looks_secret
from harness.server.question import split_url

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
        """All headers of a request, the key among them."""
        headers = {**self.headers, **self.secret_headers}
        if self.api_key is None:
            return headers
        bearer = self.key_header.lower() == AUTHORIZATION.lower()
        return {**headers, self.key_header: f"Bearer {self.api_key}" if bearer else self.api_key}

    def hurried(self) -> Access:
        """The same, waiting for nobody: while a load runs."""
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
