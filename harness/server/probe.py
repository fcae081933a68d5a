"""Questions to an OpenAI-compatible server before, beside and after the load: what does it serve, does it answer?

Plain, blocking, with deadlines; nothing here times a request.
"""

from __future__ import annotations

import queue
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec

from harness import __version__
from harness.errors import HarnessError, ServerError, UsageError, listed, unknown_name
from harness.server import QUESTION
from harness.server.access import Access, AccessLike, access_of, page_beside, page_under
from harness.server.question import HttpAnswer, ask, retry_after_s
from harness.untrusted import DECODE_ERRORS, check_regular

DEADLINE_S = 15.0
_TLS: ssl.SSLContext | None = None
"""Whose certificates are trusted; None: the system's."""
_SAID = 300  # characters of a refusal that are shown

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education"
)
"""Common English words: what a server makes of them are ordinary token ids."""


def trust(ca: Path) -> None:
    """From now on trust the certificates in the file ``ca`` instead of the system's. Raises `UsageError`."""
    global _TLS
    try:
        check_regular(ca)
        _TLS = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"{ca}: not a file of trusted certificates ({e})") from e


def fetch(url: str, access: AccessLike, body: object = None, *, deadline_s: float = DEADLINE_S) -> bytes:
    """The body of a GET, or of a POST of ``body`` as JSON. Raises `ServerError` that says what to do."""
    access = access_of(access)
    headers = {
        "Accept": "*/*", "Content-Type": "application/json", "User-Agent": f"{QUESTION}/{__version__}", **access.lines()
    }  # fmt: skip
    data = None if body is None else msgspec.json.encode(body)
    while True:
        begun = time.monotonic()
        answer = ask(url, headers=headers, body=data, deadline_s=deadline_s, tls=_TLS)
        if access.patience is not None:
            access.patience.left_s -= time.monotonic() - begun
        if 200 <= answer.status < 300:
            return answer.body
        wait_s = retry_after_s(answer.retry_after) if answer.status in (429, 503) else None
        if access.patience is None or not access.patience.wait(url, wait_s):
            raise _refusal(url, answer, access, wait_s)


def _refusal(url: str, answer: HttpAnswer, access: Access, wait_s: float | None) -> ServerError:
    if 300 <= answer.status < 400 and answer.location:
        return RedirectError(
            f"{url}: HTTP {answer.status}: it points to {answer.location[:_SAID]}. Redirects are not followed, since "
            "the API key would go along: if that address is right, give it instead"
        )
    said = answer.body[: 4 * _SAID].decode("utf-8", "replace").strip()
    for secret in filter(None, (access.api_key, *access.secret_headers.values())):
        said = said.replace(secret, "[api key]")
    said = said[:_SAID] or answer.reason[:_SAID]
    if answer.status == 401:
        said = "the API key is wrong" if access.api_key else "it wants an API key: put it into HARNESS_API_KEY"
    elif answer.status == 403:
        said += "; the API key may not do this" if access.api_key else "; if it wants an API key: HARNESS_API_KEY"
    elif wait_s is not None and access.patience is not None:
        said += f"; it asks to come back in {wait_s:.3g} s (Retry-After), later than a start may take: run again then"
    return RefusalError(f"{url}: HTTP {answer.status}: {said}", answer.status, wait_s)


def answers(base_url: str, access: Access, deadline_s: float) -> bool:
    """Whether a server answers any question (models, health, metrics), whatever it says, asked all at once."""
    heard: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def one(url: str, access: Access) -> None:
        try:
            headers = {"User-Agent": f"{QUESTION}/{__version__}", **access.lines()}
            ask(url, headers=headers, deadline_s=deadline_s, tls=_TLS)
            heard.put(True)
        except HarnessError:
            heard.put(False)

    urls = [page_under(base_url, "/models"), page_beside(base_url, "/health"), page_beside(base_url, "/metrics")]
    for url in urls:
        Thread(target=one, args=(url, access), daemon=True).start()
    return any(heard.get() for _ in urls)


class RefusalError(ServerError):
    """The server answered, and not with what was asked for. ``wait_s``: when it wants to be asked again, if it said."""

    def __init__(self, message: str, status: int, wait_s: float | None) -> None:
        self.status, self.wait_s = status, wait_s
        super().__init__(message)


class RedirectError(ServerError):
    """The server sends whoever asks elsewhere; the message says where to."""


class _Models(msgspec.Struct):
    data: list[Any]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as /v1/models lists it."""

    id: str
    max_model_len: int | None = None
    """Longest input plus output, tokens; vLLM says so, others may not."""


def find_model(
    base_url: str, access: AccessLike, wanted: str | None, tell: Callable[[str], None] = lambda words: None
) -> ServedModel:
    """The model to ask for: ``wanted``, else the only one there is.

    A list of models is advice: where it is missing, or does not name the one that is wanted, ``tell`` hears so. Raises
    `ServerError` when the server cannot be asked or takes no such key, `UsageError` when only a name could settle it.
    """
    url = page_under(base_url, "/models")
    try:
        served = {model.id: model for model in _models_in(fetch(url, access))}
    except (RefusalError, *DECODE_ERRORS) as e:
        if isinstance(e, RefusalError) and e.status == 401:
            raise
        said = e if isinstance(e, RefusalError) else f"{url}: not an OpenAI-compatible answer ({e})"
        if wanted is None:
            advice = "is the base URL right (it mostly ends in /v1)? Else choose one of its models with --model"
            raise ServerError(f"{said}\n  it does not say which models it serves: {advice}") from e
        tell(f"note: {said}: going on with model {wanted}, as --model says")
        return ServedModel(wanted)
    if wanted is None:
        if len(served) == 1:
            return next(iter(served.values()))
        if not served:
            raise ServerError(f"{url}: not an OpenAI-compatible answer: it names no model; choose one with --model")
        names = listed([name[:_SAID] for name in list(served)[:8]])
        raise UsageError(f"{base_url} serves {len(served):,} models ({names}): choose one with --model")
    if wanted not in served:
        tell(f"note: {unknown_name(f'model at {base_url}', wanted, served)}; going on, as --model says")
    return served.get(wanted, ServedModel(wanted))


def _models_in(body: bytes) -> list[ServedModel]:
    """The models of a list, bare or under ``data``; of entries that are none nothing is made."""
    found = msgspec.json.decode(body, type=_Models | list[Any])
    made = []
    for entry in found.data if isinstance(found, _Models) else found:
        if isinstance(entry, dict) and isinstance(name := entry.get("id"), str):
            longest = entry.get("max_model_len")
            made.append(ServedModel(name, longest if type(longest) is int and longest > 0 else None))
    return made


class _Tokens(msgspec.Struct):
    tokens: list[int]


def ordinary_token_ids(base_url: str, access: AccessLike, model: str) -> list[int]:
    """Token ids that stand for ordinary words at this server (vLLM's /tokenize), at least 50 of them.

    Raises `ServerError` when it does not tell: then a tokenizer file must be given.
    """
    advice = "give the model's tokenizer.json with --tokenizer FILE"
    try:
        answer = fetch(page_beside(base_url, "/tokenize"), access, {"model": model, "prompt": _WORDS})
        ids = sorted(set(msgspec.json.decode(answer, type=_Tokens).tokens))
    except ServerError as e:
        raise ServerError(f"the trace has lengths only and the server does not tell its tokens: {advice}\n  {e}") from e
    except DECODE_ERRORS as e:
        raise ServerError(f"{base_url}: /tokenize gave no token ids ({e}): {advice}") from e
    if len(ids) < 50:
        raise ServerError(f"{base_url}: /tokenize gave only {len(ids)} different ids for 100 words: {advice}")
    return ids


def engine_version(base_url: str, access: AccessLike) -> str | None:
    """What the server calls its version (vLLM's /version); null when it does not say."""
    try:
        answer: Any = msgspec.json.decode(fetch(page_beside(base_url, "/version"), access, deadline_s=5.0))
    except (ServerError, *DECODE_ERRORS):
        return None
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) else None


SILENT_S = 30.0
"""Without a byte on any request; then a server that has not answered a question either is silent."""
ASK_AFTER_S = 15.0
"""Of that time have passed when it is asked: a server that is short of processors answers late, and lives."""
ASK_AGAIN_S = 15.0
"""From an answer to the next question, while no request has a byte."""


class Silence:
    """Looks, from how long each server's requests have waited for a byte, for one that is silent.

    ``answers``: whether server k answers a question; it may take its time, and is asked in a thread.
    """

    def __init__(
        self,
        answers: Callable[[int], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] = lambda work: Thread(target=work, daemon=True).start(),
    ) -> None:
        self._answers, self._clock, self._start = answers, clock, start
        self._asked: dict[int, tuple[float, Future[bool]]] = {}

    def look(self, quiet_s: Mapping[int, float]) -> int | None:
        """The server that is silent, if one is. ``quiet_s``: how long requests have waited for a byte, by server."""
        for k in self._asked.keys() - quiet_s.keys():
            del self._asked[k]
        now = self._clock()
        for k, waited_s in quiet_s.items():
            asked = self._asked.get(k)
            if asked is None:
                if waited_s >= ASK_AFTER_S:
                    self._ask(k, now)
                continue
            then, answer = asked
            if not answer.done():
                continue
            if answer.result():
                if now - then >= ASK_AGAIN_S:
                    self._ask(k, now)
            elif waited_s >= SILENT_S:
                return k
        return None

    def _ask(self, k: int, now: float) -> None:
        answer: Future[bool] = Future()

        def work() -> None:
            try:
                answer.set_result(self._answers(k))
            except Exception:  # what cannot be asked has not answered
                answer.set_result(False)

        self._asked[k] = now, answer
        self._start(work)
