"""Our client and every rival that is installed, on the same work in one run: ``make bench``.

Each figure is measured against `fast_server.py`, on cores of its own; what they mean is in README.md beside this file.
Figures are ratios of one machine in one hour, not a test: nothing fails here because a number is bad.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measure import ROOT, Client, ClientError, Cores, FastServer, Measured, Meter, Truth, Work, fast_server, measure
from peers import RIVALS, Floor, Harness
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(ROOT))
from harness.cli.machines import hot_path
from harness.record.manifest import describe_host, git_commit, installed_versions, now_utc

TTFT_S, ITL_S = 0.02, 0.01  # 100 tokens/s per stream
FIRST_STREAMS = {"harness": 500, "vllm-rs bench serve": 500, "vllm bench serve": 150, "inference-perf": 100}
SHORT_REQUESTS = {
    "harness": 250_000, "vllm-rs bench serve": 250_000, "vllm bench serve": 40_000, "inference-perf": 15_000,
    Floor.name: 500_000,
}  # fmt: skip
"""About what each sends in ten seconds: prompts are made before, so more would only cost time."""
MODERATE_STREAMS, BUSY_STREAMS = 200, 1000
SHORT_STREAMS = 64
QUIET = 0.1
"""Share of the client's core that others may use before a measurement is made again."""

words = Console(stderr=True, highlight=False)


@dataclasses.dataclass(slots=True)
class Figures:
    """All measurements of one client; ``failures`` says which could not be made and why."""

    ladder: list[Measured] = dataclasses.field(default_factory=list)
    moderate: list[Measured] = dataclasses.field(default_factory=list)
    busy: list[Measured] = dataclasses.field(default_factory=list)
    short: list[Measured] = dataclasses.field(default_factory=list)
    half: list[Measured] = dataclasses.field(default_factory=list)
    lag: list[Measured] = dataclasses.field(default_factory=list)
    lag_poisson: list[Measured] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def ceiling(self) -> Measured | None:
        """The most streams it kept up with."""
        kept = [one for one in self.ladder if one.kept_up]
        return max(kept, key=lambda one: one.events_per_s) if kept else None

    @property
    def saturated_by_server(self) -> bool:
        """True when it never fell behind for reasons of its own."""
        return not any(not one.kept_up and not one.server_bound for one in self.ladder)


class Bench:
    """One run of the benchmark."""

    def __init__(self, repeats: int, seconds: float, growth: float, looks: int) -> None:
        self.cores = Cores.split()
        os.sched_setaffinity(0, self.cores.server)
        self.repeats, self.seconds, self.growth, self.looks = repeats, seconds, growth, looks
        self.all: dict[str, Figures] = {}
        self.busy_streams = BUSY_STREAMS
        self.server: FastServer

    def run(self, client: Client, into: str, work: Work, **options: Any) -> Measured | None:
        """Measure once; a failure is said and noted."""
        figures = self.all.setdefault(client.name, Figures())
        what = f"{work.streams} streams" if work.streams is not None else f"{work.rate:g} requests/s"
        try:
            one = measure(client, work, self.server, self.cores, **options)
        except (ClientError, TimeoutError) as e:
            figures.failures.append(f"{into}, {what}: {e}")
            words.print(f"[red]{client.name}: {into}, {what}: {e}[/red]", markup=True)
            return None
        getattr(figures, into).append(one)
        words.print(
            f"{client.name:20} {into:12} {what:18} {one.events_per_s:9,.0f} events/s {one.requests_per_s:8,.0f} req/s  "
            f"{one.cpu_us_per_event:7.2f} us/event  core {one.cpu_share:4.0%} (others {one.foreign_share:3.0%}, server "
            f"{one.server_cpu_share:3.0%})  {'kept up' if one.kept_up else 'BEHIND'}",
            soft_wrap=True,
        )
        return one

    def quietly(self, client: Client, into: str, work: Work, **options: Any) -> None:
        """Measure; again when something else used the client's core."""
        for _ in range(self.looks):
            one = self.run(client, into, work, **options)
            if one is None or one.foreign_share < QUIET:
                break

    def closed(self, streams: int) -> Work:
        """``streams`` in flight, 128 tokens in and out, for the time asked."""
        waves = max(self.seconds / self.server.answer_s(Work("", 0)), 1) + 2
        return Work(self.server.url, requests=round(streams * waves), streams=streams)

    # -- what is measured of every client -----------------------------------------------------------------------------

    def climb(self, client: Client, limit: int = 4500) -> None:
        """More and more streams until it falls behind, then half-way back."""
        self.server.pace(TTFT_S, ITL_S)
        streams, kept = FIRST_STREAMS.get(client.name, 30), 0
        while streams <= limit and self.keeps_up(client, streams):
            kept, streams = streams, round(streams * self.growth)
        if kept:
            self.keeps_up(client, (kept + min(streams, limit)) // 2)
        while not kept and streams > 10:
            streams //= 2
            kept = self.keeps_up(client, streams)

    def keeps_up(self, client: Client, streams: int) -> bool:
        """One step of the ladder; a second look when other work on the machine may have been the reason."""
        for _ in range(self.looks):
            one = self.run(client, "ladder", self.closed(streams), deadline_s=2 * self.seconds + 6)
            if one is None or one.kept_up or (one.foreign_share < QUIET and not one.server_bound):
                break
        return one is not None and one.kept_up

    def moderate(self, client: Client) -> None:
        """CPU of the same moderate load; of less where that is beyond the client."""
        self.server.pace(TTFT_S, ITL_S)
        if limit := self.limit(client):
            self.run(client, "moderate", self.closed(min(MODERATE_STREAMS, limit)))

    def busy(self, client: Client) -> None:
        """CPU of 100,000 events/s, or of the most that the two best kept up with; nothing where that is beyond it."""
        self.server.pace(TTFT_S, ITL_S)
        if self.limit(client) >= self.busy_streams > MODERATE_STREAMS:
            self.quietly(client, "busy", self.closed(self.busy_streams))

    def limit(self, client: Client) -> int:
        """Most streams it kept up with."""
        if isinstance(client, Floor):
            return BUSY_STREAMS
        ceiling = self.all[client.name].ceiling
        return (ceiling.streams or 0) if ceiling is not None else 0

    def short(self, client: Client) -> None:
        """Requests of four tokens, as many as it can."""
        self.server.pace(0, 0)
        requests = round(SHORT_REQUESTS.get(client.name, 5000) * self.seconds / 10)
        work = Work(self.server.url, requests, streams=SHORT_STREAMS, input_tokens=8, output_tokens=4)
        self.run(client, "short", work, deadline_s=self.seconds + 5)

    def half(self, client: Client) -> None:
        """TTFT and ITL against the truth at half of its own ceiling, Poisson arrivals."""
        self.server.pace(TTFT_S, ITL_S)
        ceiling = self.all[client.name].ceiling
        if ceiling is None or ceiling.streams is None:
            return
        rate = round(ceiling.streams / 2 / self.server.answer_s(Work("", 0)), 1)
        work = Work(self.server.url, max(round(rate * self.seconds), 20), rate=rate)
        self.quietly(client, "half", work, deadline_s=2 * self.seconds + 10)

    def lag(self, client: Client, *, poisson: bool) -> None:
        """How well 500 requests/s keep to their schedule."""
        self.server.pace(TTFT_S, ITL_S)
        work = Work(
            self.server.url, round(500 * self.seconds), rate=500, poisson=poisson, input_tokens=16, output_tokens=4
        )
        self.quietly(client, "lag_poisson" if poisson else "lag", work, deadline_s=2 * self.seconds + 10)

    def compare(self, clients: Sequence[Client]) -> None:
        """Everything of every client; what is repeated is repeated in turns, so that a slow minute hits all."""
        for client in clients:
            self.climb(client)
        best = sorted((self.limit(client) for client in clients), reverse=True)
        self.busy_streams = min([BUSY_STREAMS, *best[:2]])
        everyone = [*clients, *([] if Floor().missing() else [Floor()])]
        for _ in range(self.repeats):
            for step in (self.moderate, self.busy, self.short):
                for client in everyone:
                    step(client)
        for client in clients:
            self.half(client)
            self.lag(client, poisson=False)
        self.lag(clients[0], poisson=True)

    # -- what is measured of ours alone -------------------------------------------------------------------------------

    def scale(self) -> dict[str, float]:
        """CPU per event of two workers over that of one, each worker under the same load."""
        self.server.pace(TTFT_S, ITL_S)
        ratios = []
        for _ in range(self.repeats):
            one = self.run(Harness(), "moderate", self.closed(MODERATE_STREAMS))
            two = self.run(Harness(2), "moderate", self.closed(2 * MODERATE_STREAMS))
            if one is not None and two is not None:
                ratios.append(two.cpu_us_per_event / one.cpu_us_per_event)
        return {"CPU per event over that of one, median": statistics.median(ratios)} if ratios else {}

    def many(self, streams: int = 10_000) -> dict[str, float]:
        """Streams of 5 tokens/s from two workers."""
        self.server.pace(TTFT_S, 0.2)
        work = Work(self.server.url, 4 * streams, streams=streams, output_tokens=50)
        seen: dict[str, float] = {}

        def watch(meter: Meter, truth: Truth) -> dict[str, float]:
            seen["most_open"] = float(max(rows[:, 4].max() for rows in truth.series))
            seen["dropped"] = float(truth.dropped)
            seen["rss_mb_per_worker"] = meter.peak(2) / 2**20 / 2
            return seen

        one = self.run(Harness(2), "ladder", work, deadline_s=90, watch=watch)
        return {} if one is None else {
            **seen, "failed": float(one.failed or 0), "cpu_us_per_event": one.cpu_us_per_event,
            "stretch_p99": one.stretch_p99 or 0.0,
        }  # fmt: skip

    def long(self, requests: int) -> dict[str, float]:
        """Memory over a long run of short requests: growth after the first third, and its peak."""
        self.server.pace(0, 0)
        seen: dict[str, float] = {}

        def watch(meter: Meter, truth: Truth) -> dict[str, float]:
            first, last = int(truth.arrival_ns[0]), int(truth.arrival_ns[-1])
            times = np.linspace(first + (last - first) * 0.33, last, 50).astype(np.int64)
            done = truth.at(3, times)
            seen["rss_mb_per_100k_requests"] = float(np.polyfit(done, meter.at(2, times), 1)[0]) * 1e5 / 2**20
            seen["rss_mb_start"], seen["rss_mb_peak"] = float(meter.at(2, times[:1])[0]) / 2**20, meter.peak(2) / 2**20
            return seen

        work = Work(self.server.url, requests, streams=SHORT_STREAMS, input_tokens=8, output_tokens=4)
        one = self.run(Harness(), "short", work, deadline_s=300, watch=watch)
        return {**seen, "requests": float(requests)} if one is not None else {}


# -- the table --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str) -> str:
    """Median, and the least and most of several."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def pair(values: tuple[float, float] | None) -> str:
    """p50 / p99 of an error."""
    return "-" if values is None else f"{values[0]:+.2f} / {values[1]:+.2f}"


def table(all_figures: dict[str, Figures], first: str) -> Table:
    """One row per figure, one column per client; ratios are to ours."""
    out = Table(title="load generators on one core, same server, same work", title_justify="left")
    out.add_column("")
    for name in all_figures:
        out.add_column(name, justify="right")

    def row(label: str, cell: Callable[[Figures], str]) -> None:
        out.add_row(label, *(cell(figures) for figures in all_figures.values()))

    def ceiling(f: Figures) -> str:
        if f.ceiling is None:
            return "-"
        return f"{'at least ' if f.saturated_by_server else ''}{f.ceiling.events_per_s:,.0f}"

    def best(measured: list[Measured], cell: Callable[[Measured], str]) -> str:
        return cell(min(measured, key=lambda one: one.foreign_share)) if measured else "-"

    def ratio(value: Callable[[Figures], list[float]]) -> Callable[[Figures], str]:
        ours = value(all_figures[first])

        def cell(f: Figures) -> str:
            theirs = value(f)
            return f"{min(theirs) / min(ours):.2f}" if ours and theirs else "-"  # noise only ever adds

        return cell

    def moderate(f: Figures) -> list[float]:
        return [one.cpu_us_per_event for one in f.moderate]

    def busy(f: Figures) -> list[float]:
        return [one.cpu_us_per_event for one in f.busy]

    def above(value: Callable[[Figures], list[float]]) -> Callable[[Figures], list[float]]:
        bottom = all_figures.get(Floor.name)
        floor = value(bottom) if bottom is not None else []
        return lambda f: [one - min(floor) for one in value(f)] if floor and f is not bottom else []

    def arrival_lag(f: Figures) -> str:
        return best(f.lag, lambda m: "-" if m.arrival_lag_p99_ms is None else f"{m.arrival_lag_p99_ms:.2f}")

    row("events/s kept up with, 100 tokens/s a stream", ceiling)
    row("  streams", lambda f: "-" if f.ceiling is None else str(f.ceiling.streams))
    row("  CPU, us per event there", lambda f: "-" if f.ceiling is None else f"{f.ceiling.cpu_us_per_event:.2f}")
    row(f"CPU, us per event, {MODERATE_STREAMS} streams", lambda f: spread(moderate(f), ".2f"))
    row("  streams", lambda f: best(f.moderate, lambda m: str(m.streams)))
    row("  least over our least", ratio(moderate))
    row("  the same, of what is above the floor", ratio(above(moderate)))
    row("CPU, us per event, busy", lambda f: spread(busy(f), ".2f"))
    row("  streams", lambda f: best(f.busy, lambda m: str(m.streams)))
    row("  least over our least", ratio(busy))
    row("  the same, of what is above the floor", ratio(above(busy)))
    row("requests/s, 4 tokens", lambda f: spread([m.requests_per_s for m in f.short], ",.0f"))
    row("  CPU, us per request", lambda f: spread([m.cpu_us_per_request for m in f.short], ",.0f"))
    row("TTFT error at half its ceiling, ms p50 / p99", lambda f: best(f.half, lambda m: pair(m.ttft_error_ms)))
    row("ITL error there, ms p50 / p99", lambda f: best(f.half, lambda m: pair(m.itl_error_ms)))
    row("lag p99 at 500 even requests/s, ms (server's clock)", arrival_lag)
    row("memory, MB (processes)", lambda f: best(f.moderate, lambda m: f"{m.peak_rss_mb:,.0f} ({m.processes})"))
    row("start-up, s", lambda f: spread([m.start_up_s for m in f.moderate], ".1f"))
    return out


def others_share(all_figures: dict[str, Figures]) -> float:
    """Median share of the client's core that something else used."""
    shares = [
        one.foreign_share
        for f in all_figures.values()
        for one in (*f.ladder, *f.moderate, *f.busy, *f.short, *f.half, *f.lag)
    ]
    return statistics.median(shares) if shares else 0.0


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="our client only, under a minute")
    parser.add_argument("--only", action="append", help="only this rival (may be repeated)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    options = parser.parse_args()
    bench = Bench(1, 2.0, 2.0, 1) if options.quick else Bench(options.repeats, options.seconds, 1.5, 3)
    ours = Harness()
    clients: list[Client] = [ours]
    for rival in () if options.quick else RIVALS:
        missing = rival.missing()
        if missing is None and (not options.only or rival.name in options.only):
            clients.append(rival)
        else:
            words.print(f"{rival.name}: left out ({missing or 'not asked for'})")
    alone: dict[str, dict[str, float]] = {}
    processes = max(len(bench.cores.server), 1)
    with fast_server(bench.cores, ttft_s=TTFT_S, itl_s=ITL_S, processes=processes) as bench.server:
        bench.compare(clients)
        compared = dict(bench.all)
        bench.all = {}
        if not options.quick:
            alone = {"two workers": bench.scale(), "10,000 streams": bench.many(), "long run": bench.long(1_000_000)}
    console = Console(width=max(60 + 24 * len(compared), 100), highlight=False)
    console.print(table(compared, ours.name))
    for name, values in alone.items():
        console.print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in values.items()))
    poisson = compared[ours.name].lag_poisson
    if poisson:
        lag_ms = min(one.lag_p99_ms or 0.0 for one in poisson)
        console.print(f"lag p99 of ours at 500 Poisson requests/s, ms, by its rows: {lag_ms:.3f}")
    sizes = [one.detail["bytes_per_token"] for one in compared[ours.name].ladder if "bytes_per_token" in one.detail]
    if sizes:
        console.print(f"bytes per streamed token on disk, at most: {max(sizes):.2f}")
    console.print(
        f"client on core {sorted(bench.cores.client)}, server on {sorted(bench.cores.server)}; other work used "
        f"{others_share(compared):.0%} of the client's core (median of all measurements)",
        soft_wrap=True,
    )
    if options.json is not None:
        document = {
            "date": now_utc(), "git": git_commit(), "host": dataclasses.asdict(describe_host()),
            "versions": installed_versions() | {"hot path": hot_path()}, "python": platform.python_version(),
            "memory_gib": psutil.virtual_memory().total / 2**30,
            "clients": {name: dataclasses.asdict(figures) for name, figures in compared.items()},
            "harness alone": alone,
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1, default=float) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
