"""Questions to an OpenAI-compatible server before and after the load: what does it serve, how does it count?

Plain, blocking, with deadlines; nothing here runs while requests are being timed.

Of Prometheus text, which servers show at ``/metrics``, both forms are read: the text format 0.0.4 and OpenMetrics 1.0,
which ends in ``# EOF`` and may add an exemplar to a sample. A line that is neither is left out, and costs no other
line. Timestamps and exemplars are read over.

Source: Prometheus "Exposition formats"; OpenMetrics 1.0; quoted names as of Prometheus 3.
"""

from __future__ import annotations

import math
import queue
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec

from harness import __version__
from harness.errors import HarnessError, ServerError, UsageError, listed, unknown_name
from harness.server.access import Access, AccessLike, access_of, page_beside, page_under
from harness.server.question import HttpAnswer, ask, retry_after_s
from harness.untrusted import DECODE_ERRORS, check_regular

_STRING = r'"(?:[^"\\]|\\.)*+"'
_NAME = re.compile(rf"[ \t]*(?:([a-zA-Z_:][\w:]*)|\{{[ \t]*({_STRING})[ \t]*[,}}])")
_LABELS = re.compile(rf"[ \t]*\{{((?:[^\"}}]|{_STRING})*+)\}}")
_LABEL = re.compile(rf"([a-zA-Z_][\w]*|{_STRING})[ \t]*=[ \t]*({_STRING})")
_REST = re.compile(r"[ \t]*(\S+)(?:[ \t]+[-+.\deE]+)?[ \t]*(?:#[ \t].*)?$")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One line: a series and its value, which may be infinite or not a number."""

    name: str
    labels: dict[str, str]
    value: float


def read_samples(text: str, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[MetricSample]:
    """The samples of one page, in order, of the series whose name is ``wanted``."""
    for line in text.split("\n"):
        if line.startswith("# EOF"):
            return
        name = _NAME.match(line)
        if name is None:
            continue
        bare, quoted = name.groups()
        called = bare or _unquoted(quoted)
        if wanted(called) and (sample := _sample(called, line, name.end() if bare else 0)) is not None:
            yield sample


def _sample(name: str, line: str, at: int) -> MetricSample | None:
    labels = _LABELS.match(line, at)
    rest = _REST.match(line.rstrip("\r"), at if labels is None else labels.end())
    try:
        value = float(rest[1]) if rest is not None else None
    except ValueError:
        value = None
    if value is None:
        return None
    found = _LABEL.findall(labels[1]) if labels is not None else []
    return MetricSample(name, {_unquoted(key): _unquoted(said) for key, said in found}, value)


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text[1:-1])


def total(values: Iterable[float]) -> float | None:
    """Their sum; null when any of them is no number, or there is none."""
    found = list(values)
    return sum(found) if found and all(map(math.isfinite, found)) else None


def mean(values: Iterable[float]) -> float | None:
    """The same of their mean."""
    found = list(values)
    summed = total(found)
    return None if summed is None else summed / len(found)


DEADLINE_S = 15.0
QUESTION = "harness-question"
"""How a server's log tells questions from load, which is of "harness"."""
START_TIME = "process_start_time_seconds"
"""Prometheus clients' own gauge: when the server process began."""
CACHE_INFO = "vllm:cache_config_info"
"""Its labels are the cache's settings. Kept: "vllm:cache_config_info block_size" (tokens in a block of the KV cache)
and "vllm:cache_config_info num_gpu_blocks" (blocks it holds, on whatever device)."""
CACHE_SETTINGS = ("block_size", "num_gpu_blocks")
_WHOLE = re.compile(r"[0-9]{1,15}")
Counters = dict[str, float | None]
"""Name -> value; null: what the server said was no number."""

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
    """What to say of an answer that is none."""
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
    except RefusalError as e:
        if e.status == 401:
            raise
        if wanted is None:
            raise ServerError(f"{e}\n  it does not say which models it serves: choose one with --model") from e
        tell(f"note: {e}: going on with model {wanted}, as --model says")
        return ServedModel(wanted)
    except DECODE_ERRORS as e:
        said = f"{url}: not an OpenAI-compatible answer ({e})"
        if wanted is None:
            raise ServerError(
                f"{said}; is the base URL right (it ends in /v1)? Else choose a model with --model"
            ) from e
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


def counters(base_url: str, access: AccessLike) -> Counters | None:
    """The server's own counters (``vllm:*_total``, summed over labels) and its start time; null when it has none."""
    return page_counters(page_beside(base_url, "/metrics"), access)


def page_counters(url: str, access: AccessLike) -> Counters | None:
    """The same of one page of Prometheus text, wherever it is. Raises `RedirectError` when it is elsewhere."""
    try:
        text = fetch(url, access).decode("utf-8", "replace")
    except RedirectError:
        raise
    except ServerError:
        return None
    return parse_counters(text) or None


def parse_counters(text: str) -> Counters:
    """Prometheus text -> {name: value} for ``vllm:`` counters and sums, each summed over its labels.

    Also, when there are counters beside it, ``process_start_time_seconds``, which tells a restart, and of several
    engines the last one's settings of its cache (`CACHE_INFO`). A counter of which any part is no number is null:
    nothing is known of its sum.
    """
    parts: dict[str, list[float]] = {}
    beside: Counters = {}
    for sample in read_samples(text, _is_counted):
        if sample.name == CACHE_INFO:
            settings = {key: sample.labels.get(key, "") for key in CACHE_SETTINGS}
            beside |= {f"{CACHE_INFO} {key}": float(n) for key, n in settings.items() if _WHOLE.fullmatch(n)}
        else:
            parts.setdefault(sample.name, []).append(sample.value)
    totals = {name: total(values) for name, values in parts.items()}
    return totals | beside if totals.keys() - {START_TIME} else {}


def _is_counted(name: str) -> bool:
    return name in (START_TIME, CACHE_INFO) or (
        name.startswith("vllm:") and name.endswith(("_total", "_sum", "_count"))
    )
