"""A server's own counters before and after the load: from one page or several, and whether one process answers there.

A page (``/metrics``, Prometheus text) holds the counters of one process. Behind a load balancer each reading may come
from another one, so differences of its counters mean nothing; that is detected by their start times, and recorded
(`Replica.several_servers`). Each page named with ``--metrics-url`` is one server, and one that is paid for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

from harness.errors import ServerError, UsageError
from harness.record.manifest import Replica
from harness.server import probe
from harness.server.access import AccessLike, access_of, page_beside
from harness.server.question import split_url

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
            if probe.page_counters(url, access_of(access).at(url, base_url)) is None:
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
    starts = [start for r in readings if (start := r.get(probe.START_TIME)) is not None]
    changes = sum(a != b for a, b in pairwise(starts))
    falls = sum(_fell(a, b) for a, b in pairwise(readings))
    if at_once:
        return changes + falls > 0
    return changes > len(set(starts)) - 1 if starts else falls > 1


def _fell(before: Reading, after: Reading) -> bool:
    return any(
        value is not None and (later := after.get(name)) is not None and later < value
        for name, value in before.items()
        if name.endswith(_COUNTS)
    )


def summed(pages: Sequence[Reading]) -> probe.Counters:
    """One reading of several processes: their counters added up, each one's start time under a name of its own."""
    if len(pages) == 1:
        return dict(pages[0])
    total: probe.Counters = {}
    for k, page in enumerate(pages):
        for name, value in page.items():
            if name == probe.START_TIME:
                total[f"{name} {k}"] = value
            elif name.endswith((*_COUNTS, " num_gpu_blocks")):
                so_far = total.get(name, 0.0)
                total[name] = None if value is None or so_far is None else so_far + value
            else:
                total.setdefault(name, value)
    size = f"{probe.CACHE_INFO} block_size"
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
        except probe.RedirectError as e:
            r.counters_before = None
            tell(f"no counters of replica {r.index}: {e}")


def count_after(replicas: Sequence[Replica], died: Mapping[int, str], access: AccessLike) -> None:
    """Read them again just after, where the server is still there, once they stand still."""
    for r in replicas:
        if r.counters_before is not None and r.index not in died:
            with suppress(probe.RedirectError):  # it was there before
                _count(r, access, _until_settled(), "counters_after")


def _count(replica: Replica, access: AccessLike, wanted: Callable[[Sequence[Reading]], int], field: str) -> None:
    pages: list[Reading] = []
    for url in pages_of(replica):
        here = access_of(access).at(url, replica.base_url)
        seen: list[Reading] = []
        while (found := probe.page_counters(url, here)) is not None:
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
