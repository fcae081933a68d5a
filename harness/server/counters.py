"""A server's own counters before and after the load: from one page or several, and whether one process answers there.

A page (``/metrics``, Prometheus text) holds the counters of one process. Behind a load balancer each reading may come
from another one, so differences of its counters mean nothing; that is detected by their start times, and recorded
(`Replica.several_servers`). Each page named with ``--metrics-url`` is one server, and one that is paid for.

Both forms of Prometheus text are read: the text format 0.0.4 and OpenMetrics 1.0, which ends in ``# EOF`` and may add
an exemplar to a sample. A line that is neither is left out, and costs no other line; timestamps and exemplars are read
over.

Source: Prometheus "Exposition formats"; OpenMetrics 1.0; quoted names as of Prometheus 3.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from harness.errors import ServerError, UsageError
from harness.record.manifest import Replica
from harness.server.access import AccessLike, access_of, page_beside
from harness.server.probe import RedirectError, fetch
from harness.server.question import split_url

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


START_TIME = "process_start_time_seconds"
"""Prometheus clients' own gauge: when the server process began."""
CACHE_INFO = "vllm:cache_config_info"
"""Its labels are the cache's settings. Kept: "vllm:cache_config_info block_size" (tokens in a block of the KV cache)
and "vllm:cache_config_info num_gpu_blocks" (blocks it holds, on whatever device)."""
CACHE_SETTINGS = ("block_size", "num_gpu_blocks")
_WHOLE = re.compile(r"[0-9]{1,15}")
Counters = dict[str, float | None]
"""Name -> value; null: what the server said was no number."""

READINGS = 4
"""In quick succession before the load: a balancer that takes turns is seen for certain, one that draws mostly."""
SETTLE_S = 5.0
EVERY_S = 0.3
_COUNTS = ("_total", "_sum", "_count")

Reading = Mapping[str, float | None]


def check_metrics_urls(urls: Sequence[str], base_urls: Sequence[str], access: AccessLike) -> list[list[str]]:
    """The pages of each base URL; none given: the server's own. Raises `UsageError`, or `ServerError` for a page
    without counters.
    """
    if not urls:
        return [[] for _ in base_urls]
    for url in urls:
        split_url(url, "--metrics-url")
    if len(base_urls) == 1:
        pages = [list(dict.fromkeys(urls))]
    elif len(base_urls) == len(urls):
        pages = [[url] for url in urls]
    else:
        raise UsageError(
            f"{len(urls)} --metrics-url for {len(base_urls)} --base-url: give one for each, in the same order, or one "
            f"--base-url with the pages of all servers behind it"
        )
    for base_url, own in zip(base_urls, pages, strict=True):
        for url in own:
            if page_counters(url, access_of(access).at(url, base_url)) is None:
                raise ServerError(f"--metrics-url {url}: no counters of a vLLM server there; is it a /metrics page?")
    return pages


def pages_of(replica: Replica) -> list[str]:
    """Where a server's counters are read."""
    return replica.metrics_urls or [page_beside(replica.base_url, "/metrics")]


def several_processes(readings: Sequence[Reading], *, at_once: bool = False) -> bool:
    """Whether readings of one page, in time order, came from different processes that take turns.

    A process that began anew never comes back: a start time that returns, or a counter that falls twice, is another
    process. Read ``at_once`` (faster than a server starts) any change of the start time and any fall is one.
    """
    starts = [start for r in readings if (start := r.get(START_TIME)) is not None]
    changes = sum(a != b for a, b in pairwise(starts))
    falls = sum(
        any(
            name.endswith(_COUNTS) and value is not None and (later := after.get(name)) is not None and later < value
            for name, value in before.items()
        )
        for before, after in pairwise(readings)
    )
    if at_once:
        return changes + falls > 0
    return changes > len(set(starts)) - 1 if starts else falls > 1


def summed(pages: Sequence[Reading]) -> Counters:
    """One reading of several processes: their counters added up, each one's start time under a name of its own."""
    if len(pages) == 1:
        return dict(pages[0])
    total: Counters = {}
    for k, page in enumerate(pages):
        for name, value in page.items():
            if name == START_TIME:
                total[f"{name} {k}"] = value
            elif name.endswith((*_COUNTS, " num_gpu_blocks")):
                so_far = total.get(name, 0.0)
                total[name] = None if value is None or so_far is None else so_far + value
            else:
                total.setdefault(name, value)
    size = f"{CACHE_INFO} block_size"
    if len({page.get(size) for page in pages}) > 1:  # blocks of different sizes cannot be counted together
        total.pop(size, None)
    return total


def count_before(
    replicas: Sequence[Replica], access: AccessLike, tell: Callable[[str], None] = lambda words: None
) -> None:
    """Read every server's counters just before the load; ``tell`` hears why there are none where they are elsewhere."""
    for r in replicas:
        try:
            _count(r, access, lambda _: READINGS, "counters_before")
        except RedirectError as e:
            r.counters_before = None
            tell(f"no counters of replica {r.index}: {e}")


def count_after(replicas: Sequence[Replica], died: Mapping[int, str], access: AccessLike) -> None:
    """Read them again just after, where the server is still there, once they stand still."""
    for r in replicas:
        if r.counters_before is not None and r.index not in died:
            with suppress(RedirectError):  # it was there before
                _count(r, access, _until_settled(), "counters_after")


def _count(replica: Replica, access: AccessLike, wanted: Callable[[Sequence[Reading]], int], field: str) -> None:
    pages: list[Reading] = []
    for url in pages_of(replica):
        here = access_of(access).at(url, replica.base_url)
        seen: list[Reading] = []
        while (found := page_counters(url, here)) is not None:
            seen.append(found)
            if several_processes(seen, at_once=True):
                replica.several_servers, replica.counters_before, replica.counters_after = True, None, None
                return
            if len(seen) >= wanted(seen):
                break
        if not seen or found is None:
            setattr(replica, field, None)  # half a book is none
            return
        pages.append(seen[-1])
    setattr(replica, field, summed(pages))


def _until_settled() -> Callable[[Sequence[Reading]], int]:
    """VLLM books a request a moment after its client has the last byte: read until two readings are the same."""
    deadline = time.monotonic() + SETTLE_S

    def wanted(seen: Sequence[Reading]) -> int:
        if time.monotonic() >= deadline or (len(seen) > 1 and seen[-1] == seen[-2]):
            return len(seen)
        time.sleep(EVERY_S)
        return len(seen) + 1

    return wanted


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
    """Prometheus text -> {name: value} for ``vllm:`` counters and sums, summed over labels; null where a part is none.
    Beside counters also ``process_start_time_seconds`` and the last engine's settings of its cache.
    """
    parts: dict[str, list[float]] = {}
    beside: Counters = {}
    for sample in read_samples(
        text, lambda name: name in (START_TIME, CACHE_INFO) or (name.startswith("vllm:") and name.endswith(_COUNTS))
    ):
        if sample.name == CACHE_INFO:
            settings = {key: sample.labels.get(key, "") for key in CACHE_SETTINGS}
            beside |= {f"{CACHE_INFO} {key}": float(n) for key, n in settings.items() if _WHOLE.fullmatch(n)}
        else:
            parts.setdefault(sample.name, []).append(sample.value)
    totals = {name: total(values) for name, values in parts.items()}
    return totals | beside if totals.keys() - {START_TIME} else {}
