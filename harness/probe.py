"""Questions to an OpenAI-compatible server before and after the load: what does it serve, how does it count?

Plain, blocking, with deadlines; nothing here runs while requests are being timed.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlunsplit

import msgspec

from harness.errors import ServerError, UsageError, listed, unknown_name
from harness.prometheus import read_samples, total
from harness.question import ask, split_url
from harness.untrusted import DECODE_ERRORS

DEADLINE_S = 15.0
START_TIME = "process_start_time_seconds"
"""Prometheus clients' own gauge: when the server process began."""
CACHE_INFO = "vllm:cache_config_info"
"""Its labels are the cache's settings. Kept: "vllm:cache_config_info block_size" (tokens in a block of the KV cache)
and "vllm:cache_config_info num_gpu_blocks" (blocks it holds, on whatever device)."""
CACHE_SETTINGS = ("block_size", "num_gpu_blocks")
_WHOLE = re.compile(r"[0-9]{1,15}")

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
        _TLS = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as e:
        raise UsageError(f"{ca}: not a file of trusted certificates ({e})") from e


def normalise_base_url(url: str) -> str:
    """``url`` as scheme://host[:port]/...; adds ``/v1`` when there is no path. Raises `UsageError` for no URL."""
    parts = split_url(url, "--base-url")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))


def server_root(base_url: str) -> str:
    """The server's address without ``/v1``: where vLLM keeps /metrics, /version and /tokenize."""
    return base_url.removesuffix("/v1")


def fetch(url: str, api_key: str | None, body: object = None, *, deadline_s: float = DEADLINE_S) -> bytes:
    """The body of a GET, or of a POST of ``body`` as JSON. Raises `ServerError` that says what to do."""
    headers = {"Accept": "*/*", "Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else msgspec.json.encode(body)
    answer = ask(url, headers=headers, body=data, deadline_s=deadline_s, tls=_TLS)
    if 200 <= answer.status < 300:
        return answer.body
    if 300 <= answer.status < 400 and answer.location:
        raise RedirectError(
            f"{url}: HTTP {answer.status}: it points to {answer.location[:_SAID]}. Redirects are not followed, since "
            "the API key would go along: if that address is right, give it instead"
        )
    if answer.status in (401, 403):
        advice = "the API key is wrong" if api_key else "it wants an API key: put it into HARNESS_API_KEY"
        raise ServerError(f"{url}: HTTP {answer.status}: {advice}")
    said = answer.body[: 4 * _SAID].decode("utf-8", "replace").strip()
    if api_key:
        said = said.replace(api_key, "[api key]")
    raise ServerError(f"{url}: HTTP {answer.status}: {said[:_SAID] or answer.reason[:_SAID]}")


class RedirectError(ServerError):
    """The server sends whoever asks elsewhere; the message says where to."""


class ServedModel(msgspec.Struct, frozen=True):
    """A model as /v1/models lists it."""

    id: str
    max_model_len: int | None = None
    """Longest input plus output, tokens; vLLM says so, others may not."""


class _Models(msgspec.Struct):
    data: list[ServedModel]


def find_model(base_url: str, api_key: str | None, wanted: str | None) -> ServedModel:
    """The model to ask for: ``wanted`` if it is served, else the only one there is.

    Raises `ServerError` when the server cannot be asked, `UsageError` when the name does not settle it.
    """
    url = f"{base_url}/models"
    try:
        served = {m.id: m for m in msgspec.json.decode(fetch(url, api_key), type=_Models).data}
    except DECODE_ERRORS as e:
        raise ServerError(
            f"{url}: not an OpenAI-compatible answer ({e}); is the base URL right (it ends in /v1)?"
        ) from e
    if wanted is None:
        if len(served) == 1:
            return next(iter(served.values()))
        names = listed([name[:_SAID] for name in list(served)[:8]])
        raise UsageError(f"{base_url} serves {len(served):,} models ({names}): choose one with --model")
    if wanted not in served:
        raise unknown_name(f"model at {base_url}", wanted, served)
    return served[wanted]


class _Tokens(msgspec.Struct):
    tokens: list[int]


def ordinary_token_ids(base_url: str, api_key: str | None, model: str) -> list[int]:
    """Token ids that stand for ordinary words at this server (vLLM's /tokenize), at least 50 of them.

    Raises `ServerError` when it does not tell: then a tokenizer file must be given.
    """
    advice = "give the model's tokenizer.json with --tokenizer FILE"
    try:
        answer = fetch(f"{server_root(base_url)}/tokenize", api_key, {"model": model, "prompt": _WORDS})
        ids = sorted(set(msgspec.json.decode(answer, type=_Tokens).tokens))
    except ServerError as e:
        raise ServerError(f"the trace has lengths only and the server does not tell its tokens: {advice}\n  {e}") from e
    except DECODE_ERRORS as e:
        raise ServerError(f"{base_url}: /tokenize gave no token ids ({e}): {advice}") from e
    if len(ids) < 50:
        raise ServerError(f"{base_url}: /tokenize gave only {len(ids)} different ids for 100 words: {advice}")
    return ids


def engine_version(base_url: str, api_key: str | None) -> str | None:
    """What the server calls its version (vLLM's /version); null when it does not say."""
    try:
        answer: Any = msgspec.json.decode(fetch(f"{server_root(base_url)}/version", api_key, deadline_s=5.0))
    except (ServerError, *DECODE_ERRORS):
        return None
    version = answer.get("version") if isinstance(answer, dict) else None
    return version if isinstance(version, str) else None


def counters(base_url: str, api_key: str | None) -> dict[str, float] | None:
    """The server's own counters (``vllm:*_total``, summed over labels) and its start time; null when it has none."""
    return page_counters(f"{server_root(base_url)}/metrics", api_key)


def page_counters(url: str, api_key: str | None) -> dict[str, float] | None:
    """The same of one page of Prometheus text, wherever it is. Raises `RedirectError` when it is elsewhere."""
    try:
        text = fetch(url, api_key).decode("utf-8", "replace")
    except RedirectError:
        raise
    except ServerError:
        return None
    return parse_counters(text) or None


def parse_counters(text: str) -> dict[str, float]:
    """Prometheus text -> {name: value} for ``vllm:`` counters and sums, each summed over its labels.

    Also, when there are counters beside it, ``process_start_time_seconds``, which tells a restart, and of several
    engines the last one's settings of its cache (`CACHE_INFO`). A counter of which any part is no number is left out:
    nothing is known of its sum.
    """
    parts: dict[str, list[float]] = {}
    beside: dict[str, float] = {}
    for sample in read_samples(text, _is_counted):
        if sample.name == CACHE_INFO:
            settings = {key: sample.labels.get(key, "") for key in CACHE_SETTINGS}
            beside |= {f"{CACHE_INFO} {key}": float(n) for key, n in settings.items() if _WHOLE.fullmatch(n)}
        else:
            parts.setdefault(sample.name, []).append(sample.value)
    totals = {name: summed for name, values in parts.items() if (summed := total(values)) is not None}
    return totals | beside if totals.keys() - {START_TIME} else {}


def _is_counted(name: str) -> bool:
    return name in (START_TIME, CACHE_INFO) or (
        name.startswith("vllm:") and name.endswith(("_total", "_sum", "_count"))
    )
