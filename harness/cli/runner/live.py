"""--live: the page and the metrics of the test that runs now, one server for all the tests of this process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.cli.output import say
from harness.live import LiveServer
from harness.plan.file import PlanInfo, read_plan_columns
from harness.record.manifest import RunDir
from harness.record.run_spec import RunSpec
from harness.record.samples import ServerMetrics

if TYPE_CHECKING:
    from harness.analysis.report.live import LiveRun

NOTHING_YET = "no test has begun yet; this page comes by itself\n"
TEXT = "text/plain; charset=utf-8"


class LivePage:
    """What the server shows: the newest test, also after its end, for as long as the process lives."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.run: LiveRun | None = None
        pages = {"/": self._page, "/live.json": self._json, "/metrics": self._metrics}
        self._server = LiveServer((host, int(port)), pages, public=("/metrics",))
        self.url = self._server.url
        say(f"live: {self.url} (and {self.url}metrics)")
        if host not in ("127.0.0.1", "localhost"):
            say(f"  on {host} other machines can read /metrics; the page is for this one alone (ssh -L, port-forward)")

    def _page(self) -> tuple[str, str]:
        if self.run is None:
            return "text/html; charset=utf-8", f'<meta http-equiv="refresh" content="1">{NOTHING_YET}'
        from harness.analysis.report.page import render_live

        return "text/html; charset=utf-8", render_live(self.run)

    def _json(self) -> tuple[str, str]:
        if self.run is None:
            return TEXT, NOTHING_YET
        from harness.analysis.report.page import live_json

        return "application/json", live_json(self.run)

    def _metrics(self) -> tuple[str, str]:
        from harness.analysis.report.exposition import CONTENT_TYPE

        return CONTENT_TYPE, self.run.metrics() if self.run else ""


_PAGES: dict[str, LivePage] = {}


def live_page(address: str | None) -> LivePage | None:
    """The page at this address, served from now on. Raises `UsageError` where that cannot be: ask before anything is
    started.
    """
    if address is not None and address not in _PAGES:
        _PAGES[address] = LivePage(address)
    return _PAGES.get(address or "")


@contextmanager
def shown(
    address: str | None, run: RunDir, spec: RunSpec, info: PlanInfo, attain: float, sampled: Sequence[ServerMetrics],
    start_unix_ns: int,
) -> Iterator[LiveRun | None]:  # fmt: skip
    """The test that begins at ``start_unix_ns``, on its page; its `update` wants the counts of the load workers."""
    page = live_page(address)
    if page is None:
        yield None
        return
    from harness.analysis.report.live import LiveRun, LiveTest

    scheduled = None
    if spec.mode == "open":
        scheduled = read_plan_columns(run.plan, ["scheduled_ns"]).column("scheduled_ns").drop_null().to_numpy() / 1e9

    def servers() -> list[Mapping[str, object] | None]:
        return [metrics.latest for metrics in sampled]

    page.run = live = LiveRun(
        LiveTest(
            run=run.path.name, model=spec.model or "", requests=info.requests,
            span_s=spec.duration_s if info.span_s is None else info.span_s, scheduled_s=scheduled,
            slo=spec.slo, attain=attain, servers=servers,
        ),
        starts_in_s=(start_unix_ns - time.time_ns()) / 1e9,
    )  # fmt: skip
    try:
        yield live
    finally:
        live.end("Ended: harness report has the figures")
