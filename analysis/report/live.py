"""A test while it runs: what its load workers say twice a second, as the charts of a report and as Prometheus metrics.

Latencies are those of the workers' samples: at most 400 a second from each, by planned time. The report counts all
requests, and takes its figures from the rows. Memory has one size: when the time axis is full, bins are joined by twos.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.analysis.arrays import Floats, Ints
from harness.analysis.report.charts import Limits, limits_of, share_chart, timeline
from harness.analysis.report.curves import SERVER_COLUMNS, Curves, cumulative
from harness.analysis.report.document import Chart, Mark, Section
from harness.analysis.report.exposition import Family, Histogram, exposition
from harness.analysis.report.figures import in_seconds
from harness.analysis.rows.itl_histogram import EDGES, count_in
from harness.analysis.rows.run import BINS, Window

FIRST_BIN_S = 1.0
COUNTS = ("sent", "failed", "done", "output_tokens")
LATENCIES = ("ttft", "tpot", "e2e")
RECENT_S = 10.0
Sample = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTest:
    """What is known of a test before it begins."""

    run: str
    """Name of its folder."""
    model: str
    requests: int
    """Of the plan."""
    span_s: float | None
    scheduled_s: Floats | None
    """Planned times since the start, in order; null in a closed loop."""
    slo: Mapping[str, float]
    attain: float
    servers: Callable[[], Sequence[Sample | None]] = tuple
    """What each server last said of itself (`harness.record.samples.SERVER_SCHEMA`)."""


class LiveRun:
    """Takes in the counts of a running test (`cluster.deploy.load_workers.LoadWorkers.poll`); safe between threads."""

    def __init__(
        self, test: LiveTest, *, starts_in_s: float = 0.0, now: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        """``starts_in_s``: from now to the common start of the load workers. ``now``: a clock, s."""
        self.test, self._now, self._lock = test, now, threading.Lock()
        self._began, self._began_unix_s = now() + starts_in_s, time.time() + starts_in_s
        self._bin_s = FIRST_BIN_S
        self._counts = {name: np.zeros(BINS) for name in COUNTS}
        self._means = {name: np.zeros((2, BINS)) for name in ("in_flight", *SERVER_COLUMNS)}  # sum, and of how many
        self._grids = {name: np.zeros((BINS, len(EDGES))) for name in LATENCIES}
        self._last: dict[str, int] = dict.fromkeys((*COUNTS, "in_flight"), 0)
        self._quiet_s: dict[str, float] = {}
        self._buckets = {name: Histogram(name) for name in LATENCIES}
        self._over: str | None = None

    def update(self, counts: Sample) -> None:
        """The newest merged counts of all load workers, and their latencies since the last call."""
        servers = self.test.servers()
        with self._lock:
            at = np.array([self._place()])
            for name in COUNTS:
                total = _count(counts.get(name))
                self._counts[name][at] += total - self._last[name]
                self._last[name] = total
            self._last["in_flight"] = _count(counts.get("in_flight"))
            self._mean("in_flight", float(self._last["in_flight"]), at)
            for name in LATENCIES:
                samples = counts.get(f"{name}_s")
                if isinstance(samples, list) and samples:
                    values = np.array(samples, dtype=np.float64)
                    count_in(self._grids[name], np.repeat(at, len(values)), values)
                    self._buckets[name].add(values)
            quiet = counts.get("quiet_s")
            self._quiet_s = {str(k): float(v) for k, v in quiet.items()} if isinstance(quiet, dict) else {}
            for column in SERVER_COLUMNS if servers else ():
                said = [value for one in servers if one and isinstance(value := one.get(column), float)]
                if len(said) == len(servers):
                    self._mean(column, max(said) if column == "kv_cache_usage" else sum(said), at)

    def end(self, words: str) -> None:
        """The test is over."""
        with self._lock:
            self._over = words

    def _mean(self, name: str, value: float, at: Ints) -> None:
        if np.isfinite(value):
            self._means[name][:, at] += np.array([[value], [1.0]])

    def _place(self) -> int:
        """The bin of this moment; there is one, whatever the time."""
        since = self._now() - self._began
        while since >= BINS * self._bin_s:
            self._bin_s *= 2
            arrays = (*self._counts.values(), *self._grids.values(), *self._means.values())
            for array, axis in zip(arrays, [0] * (len(COUNTS) + len(LATENCIES)) + [1] * len(self._means), strict=True):
                whole = np.moveaxis(array, axis, 0)
                joined = whole.reshape(BINS // 2, 2, *whole.shape[1:]).sum(axis=1)
                whole[: BINS // 2], whole[BINS // 2 :] = joined, 0.0
        return max(0, int(since / self._bin_s))

    # --- pictures ----------------------------------------------------------------------------------------------------

    def sections(self) -> list[Section]:
        """Latency and time line as in a report, of what is known now."""
        latency, time_ = self._charts()
        return [
            Section(title="Latency so far", id="latency", charts=latency, remark=_SAMPLED),
            Section(title="Over time", id="time", charts=time_),
        ]

    def _charts(self) -> tuple[list[Chart], list[Chart]]:
        with self._lock:
            known = max(1, self._place())
            found = self._curves(known)
            scale = BINS / known  # bins are joined by how much is in one
            sent, done = (int(self._last[name] * scale) for name in ("sent", "done"))
        limits = limits_of(self.test.slo, self.test.attain)
        latency = [
            chart
            for name, noun in (("ttft", "requests"), ("tpot", "requests"))
            for chart in share_chart(
                name.upper(), noun, {"so far": cumulative(found.grids[name])}, _marks(limits, name)
            )
        ]  # fmt: skip
        spoken = {name: f"median {_seconds(self._quantile(name, 0.5))}" for name in ("ttft", "tpot")}
        drawn = timeline(
            found, limits, "live", spoken, open_loop=self.test.scheduled_s is not None, sent=sent, succeeded=done
        )
        return latency, [_first(chart, known) for chart in drawn]

    def _curves(self, known: int) -> Curves:
        """All that is known, of ``known`` whole bins; NaN afterwards."""
        end = BINS * self._bin_s
        edges = np.linspace(0.0, end, BINS + 1)
        later = np.arange(BINS) >= known

        def rate(values: Floats) -> Floats:
            found: Floats = np.where(later, np.nan, values / self._bin_s)
            return found

        def mean(name: str) -> Floats:
            total, of = self._means[name]
            found: Floats = np.divide(total, of, out=np.full(BINS, np.nan), where=(of > 0) & ~later)
            return found

        planned = self.test.scheduled_s
        server = {name: mean(name) for name in SERVER_COLUMNS}
        return Curves(
            window=Window(rule="so far", start_s=0.0, end_s=end, duration_s=end),
            time_s=(edges[:-1] + edges[1:]) / 2,
            planned=rate(np.histogram(planned, edges)[0] if planned is not None else np.zeros(BINS)),
            sent=rate(self._counts["sent"]), failed=rate(self._counts["failed"]), in_flight=mean("in_flight"),
            input_tokens=np.full(BINS, np.nan), output_tokens=rate(self._counts["output_tokens"]),
            grids={name: grid.copy() for name, grid in self._grids.items()},
            server={name: values for name, values in server.items() if np.isfinite(values).any()}, loop_lag_s=None,
        )  # fmt: skip

    def _quantile(self, metric: str, share: float) -> float | None:
        """Of all samples, s; the upper edge of a bin 2.3 % wide. None without any."""
        counts = self._grids[metric].sum(axis=0)
        reached = np.flatnonzero(np.cumsum(counts) >= share * counts.sum() * (1 - 1e-12))
        return float(EDGES[reached[0]]) if counts.sum() else None

    # --- words -------------------------------------------------------------------------------------------------------

    def state(self) -> str:
        """In a few words."""
        return self._over or ("Running" if self._last["sent"] else "Starting")

    @property
    def over(self) -> bool:
        return self._over is not None

    def facts(self) -> list[tuple[str, str]]:
        """What a reader looks at first: name and figure. The names are the same throughout a test."""
        with self._lock:
            since = max(0.0, self._now() - self._began)
            here = self._place()
            recent = slice(max(0, here - max(1, round(RECENT_S / self._bin_s))), max(1, here))
            done = float(self._counts["done"][recent].mean()) / self._bin_s
            tokens = float(self._counts["output_tokens"][recent].mean()) / self._bin_s
            facts = [
                ("done", f"{self._last['done']:,} of {self.test.requests:,}"),
                ("in flight", f"{self._last['in_flight']:,}"),
                ("failed", f"{self._last['failed']:,}"),
                ("req/s", f"{done:.3g}"),
                ("output tokens/s", f"{tokens:,.0f}"),
                ("time", f"{since:.0f} s" + (f" of {self.test.span_s:.0f} s" if self.test.span_s else "")),
            ]
            limits: Limits = limits_of(self.test.slo, self.test.attain)
            for name in LATENCIES:
                share, limit = limits.get(name, (0.5, 0.0))
                value = _seconds(self._quantile(name, share))
                label = f"{name.upper()} p{share * 100:g}"
                if name in limits or (name == "ttft" and not limits):
                    facts.append((label, f"{value} of {in_seconds(limit)}" if limit else value))
            return facts

    # --- Prometheus --------------------------------------------------------------------------------------------------

    def metrics(self) -> str:
        """The page for Prometheus: text format 0.0.4. Names are vLLM's where it has them, under ``harness_``."""
        test = self.test
        with self._lock:
            last, since = dict(self._last), max(0.0, self._now() - self._began)
            done = {"succeeded": last["done"] - last["failed"], "failed": last["failed"]}
            families = [
                Family("run_info", "gauge", "The run, by its labels; always 1.", [({"model": test.model}, 1)]),
                Family("run_over", "gauge", "1 once the run has ended.", [({}, int(self._over is not None))]),
                Family("run_start_time_seconds", "gauge", "Unix time of the start.", [({}, self._began_unix_s)]),
                Family("run_elapsed_seconds", "gauge", "Time since the start.", [({}, since)]),
                Family("requests_planned", "gauge", "Requests of the plan.", [({}, test.requests)]),
                Family("requests_sent_total", "counter", "Requests sent.", [({}, last["sent"])]),
                Family("requests_total", "counter", "Requests ended, by outcome.",
                       [({"outcome": name}, value) for name, value in done.items()]),
                Family("num_requests_running", "gauge", "Requests in flight, as the client counts them.",
                       [({}, last["in_flight"])]),
                Family("generation_tokens_total", "counter", "Output tokens received.", [({}, last["output_tokens"])]),
                Family("slo_limit_seconds", "gauge", "Limits of the SLO, by its key.",
                       [({"slo": key}, limit) for key, limit in test.slo.items()]),
                Family("server_silence_seconds", "gauge", "How long requests have waited for any byte, by server.",
                       [({"server": k}, waited) for k, waited in self._quiet_s.items()]),
                *(bucket.family() for bucket in self._buckets.values()),
            ]  # fmt: skip
            return exposition(families, {"run": test.run})


_SAMPLED = (
    "Of a sample of the requests that have ended: at most 400 a second from each load worker. The report has all."
)


def _marks(limits: Limits, metric: str) -> list[Mark]:
    return [Mark("x", limits[metric][1], f"SLO p{limits[metric][0] * 100:g}")] if metric in limits else []


def _first(chart: Chart, n: int) -> Chart:
    """Only the first ``n`` points: nothing is known of later ones."""
    return replace(chart, x=chart.x[:n], lines=[replace(line, y=line.y[:n]) for line in chart.lines])


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _seconds(value: float | None) -> str:
    return "-" if value is None else in_seconds(value)
