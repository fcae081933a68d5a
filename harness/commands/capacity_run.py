"""A search for capacity from here to its end: points of a sweep that are chosen one by one, on servers started once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.commands.output import say
from harness.commands.steps import settle
from harness.commands.sweep_run import Session
from harness.commands.targets import Target, choose_target
from harness.errors import HarnessError
from harness.records import Trace
from harness.run import Tier, now_utc
from harness.slo import Criterion
from harness.sweep import Level, Point, point_seed, slug
from harness.sweep_cost import start_s, usd_per_hour
from harness.sweep_state import SweepState

if TYPE_CHECKING:
    from analysis.load import Run
    from analysis.sizing.at_slo import System
    from analysis.sizing.search import Probe, ProbeRow, Step
    from analysis.summary import Summary

PACE_S = 0.05
"""No server answers a request faster than this, as far as the size of a closed-loop plan goes."""
SPARE = 1.5
"""A rung's plan holds this many times what the rung below lets expect."""
STARTS = 3
"""Servers are started so often in one search; a server that dies under load for the third time will again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search is asked for, beyond the options of a replay."""

    criteria: tuple[Criterion, ...]
    probe_s: float
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityReport:
    """``harness.capacity/1``: the answer, how it was found and what that cost."""

    schema: str
    made: str
    folder: str
    sentence: str
    ended: str
    """Why the search ended."""
    narrow: bool
    """The bracket is as narrow as was asked for."""
    probes: Sequence[ProbeRow]
    systems: Sequence[System]
    hours: float
    """Of servers, their start among them."""
    usd: float | None


class CapacitySession(Session):
    """One sitting of a search. Every probe is a point of a sweep: its folder, budget and resumption are a sweep's."""

    def __init__(
        self, folder: Path, state: SweepState, options: dict[str, Any], trace: Trace, tiers: Sequence[Tier | None],
        ask: Search,
    ) -> None:  # fmt: skip
        super().__init__(folder, state, options, trace, tiers)
        self.ask, self.asked = ask, options
        self.probes: dict[str, Probe] = {}
        """By the name of the point."""
        self.summaries: dict[str, Summary] = {}
        self.ended: Step | None = None

    def work(self) -> None:
        """Probe until the answer is as narrow as was asked for, the budget is spent or nothing more can be learnt."""
        for point in self.state.points:
            if point.state == "done" and point.name not in self.summaries:
                self.judge(point)
            if point.state == "skipped":
                point.state = "pending"
        target = choose_target({**self.options, **self._where()})
        for _ in range(STARTS):
            if self.over or (first := self._next()) is None:
                return
            try:
                self._rent_and_probe(target, first)
            except HarnessError as e:
                say(str(e))
                self.over = str(e).splitlines()[0]
        if self.ended is None and not self.over:
            self.over = f"servers died under load {STARTS} times"

    def _where(self) -> dict[str, Any]:
        pair = self.state.pairs[0]
        return {"base_urls": pair.base_urls, "model": pair.model, "tier": pair.tier, "replicas": pair.replicas}

    def _rent_and_probe(self, target: Target, first: Point) -> None:
        """Servers for as many probes as they live, from ``first`` on."""
        if not self._can_pay(target, first, start_s(self.state.pairs[0], self.tiers[0])):
            return
        point: Point | None = first
        with self.serving(0, target) as servers:
            while point is not None and self._can_pay(target, point, 0.0):
                self.do(point, servers)
                if died := settle(servers):
                    say(f"replica {', '.join(map(str, died))} died; the servers are started anew")
                    return
                point = None if self.over else self._next()

    def _can_pay(self, target: Target, point: Point, start: float) -> bool:
        """Make the plan of the point and hold its estimate against what is left."""
        self.make_plans(target, [point])
        return self.affordable(point, start)

    def _next(self) -> Point | None:
        """The point to do now: one that was left half done, else what the search asks for; None at its end."""
        from analysis.sizing.search import next_load

        left = next((point for point in self.state.points if point.state == "pending"), None)
        if left is None:
            probes = [self._probe(point) for point in self.state.points]
            step = next_load(probes, self.ask.criteria, self.ask.tolerance)
            if step.rate is None and step.concurrency is None:
                self.ended = step
                return None
            left = self._add(Level(request_rate=step.rate, concurrency=step.concurrency), step.why)
        self.options = self._of(left)
        return left

    def _add(self, level: Level, why: str) -> Point:
        points, pair = self.state.points, self.state.pairs[0]
        repeat = 1 + sum(point.level == level for point in points)
        run = f"{level.label}-r{repeat}"
        say(f"next: {level.words} ({why})")
        point = Point(
            name=f"{len(points) + 1:03d}-{slug(pair.name)}-{run}", pair=0, level=level, repeat=repeat,
            seed=point_seed(self.state.spec.seed, level, repeat), plan=f"{run}.arrow",
        )  # fmt: skip
        points.append(point)
        return point

    def _of(self, point: Point) -> dict[str, Any]:
        """The options of this probe: how long, and how many requests."""
        level, closed = point.level, point.level.concurrency is not None
        options = in_loop(self.asked, closed=closed)
        warmup = options["warmup"]
        warmup_s = warmup if isinstance(warmup, float) else 0.0
        if level.concurrency is not None:
            pace = level.concurrency / PACE_S
            below = [p for p in self.probes.values() if p.concurrency and p.point and p.concurrency < level.concurrency]
            if below:
                last = max(below, key=lambda p: p.concurrency or 0)
                assert last.point is not None and last.concurrency is not None
                done = last.point.rates["request_throughput"].value or pace
                pace = min(pace, done * level.concurrency / last.concurrency)
            seconds = self.ask.probe_s + warmup_s
            limit = math.ceil(SPARE * pace * seconds) + level.concurrency
            return {**options, "duration_s": seconds, "limit": limit, "repeat": True}
        rate = level.request_rate
        assert rate is not None
        from analysis.sizing.search import requests_needed

        least = options["min_requests"]
        judged = math.ceil(least + 3 * math.sqrt(least))  # the count of arrivals in a window varies
        needed = max(judged, requests_needed(self.ask.criteria)) + (warmup if isinstance(warmup, int) else 0)
        seconds = max(self.ask.probe_s, (needed + 1) / rate) + warmup_s
        if seconds > self.ask.probe_s + warmup_s:
            say(f"  {seconds:.0f} s at {rate:g} req/s: fewer than {needed} requests cannot judge it")
        if rate * seconds > self.survey.rows:
            self.tell_once(
                f"  the trace has {self.survey.rows} requests: it is repeated, with new prompts where they are made"
            )
        return {**options, "duration_s": seconds, "repeat": True}

    def learn(self, point: Point, run: Run, found: Summary) -> None:
        """What the search goes on from. A rung that is TOO SMALL steers too: it guides, and no figure comes from it."""
        from analysis.check import MIN_REQUESTS
        from analysis.sizing.at_slo import point_of
        from analysis.sizing.search import Probe, limit_used

        self.summaries[point.name] = found
        failed = {c.name for c in found.checks if c.gate and c.ok is False}
        steers = not failed or (failed == {MIN_REQUESTS} and point.level.concurrency is not None)
        self.probes[point.name] = Probe(
            rate=point.level.request_rate, concurrency=point.level.concurrency,
            point=point_of(found) if steers else None,
            used=limit_used(run, self.ask.criteria),
        )  # fmt: skip

    def _probe(self, point: Point) -> Probe:
        from analysis.sizing.search import Probe

        blank = Probe(rate=point.level.request_rate, concurrency=point.level.concurrency, point=None)
        return self.probes.get(point.name, blank)

    def end(self, point: Point, state: Any, reason: str | None) -> None:
        """Write down how a probe ended, and say it with what it cost."""
        point.state, point.reason = state, reason
        self.write()
        row = self._record(point)
        words = [
            row.verdict,
            *(f"{x:.2%} {c.name}" for x, c in zip(row.attainment, self.ask.criteria, strict=False) if x is not None),
        ]
        if row.request_throughput is not None:
            words.append(f"{row.request_throughput:.3g} req/s done")
        if row.seconds is not None:
            words.append(f"{row.seconds:.0f} s")
        if row.usd is not None:
            words.append(f"{row.usd:.4f} USD")
        if reason:
            words.append(reason[:200])
        say(f"probe {self.state.points.index(point) + 1}: {row.load}: {' · '.join(words)}")

    def _record(self, point: Point) -> ProbeRow:
        from analysis.sizing.search import ProbeRow

        found = self.summaries.get(point.name)
        tier = self.state.rentals[-1].tier if self.state.rentals else None
        usd = None
        if tier is not None and point.took_s is not None:
            usd = usd_per_hour(self.state.pairs[0], tier) * point.took_s / 3600
        return ProbeRow(
            run=str(self.folder / point.name), load=point.level.words, requests=point.requests,
            verdict=point.verdict or point.state,
            attainment=tuple(one.attainment.value for one in found.slo.criteria) if found and found.slo else (),
            request_throughput=found.rates.request_throughput.value if found else None,
            seconds=point.took_s, usd=usd, why=point.reason,
        )  # fmt: skip

    def report(self) -> CapacityReport:
        """The answer from all probes so far."""
        from analysis.show.capacity_text import sentence
        from analysis.sizing.at_slo import SCHEMA, systems

        usd, hours = self.state.spent(time.time())
        found = systems([s for s in self.summaries.values() if s.verdict != "TOO SMALL" or s.load.mode == "open"])
        answer = next((one for one in found if one.loop == "open"), None)
        ended = self.ended.why if self.ended else self.over or "ended"
        return CapacityReport(
            schema=SCHEMA, made=now_utc(), folder=str(self.folder),
            sentence=sentence(answer) if answer else "Capacity is not known: no run in an open loop was VALID.",
            ended=ended, narrow=self.ended is not None and self.ended.narrow,
            probes=[self._record(point) for point in self.state.points], systems=found, hours=hours,
            usd=usd if any(rental.tier for rental in self.state.rentals) else None,
        )  # fmt: skip


def in_loop(options: dict[str, Any], *, closed: bool) -> dict[str, Any]:
    """The options of a replay in this kind of loop: a ladder draws no arrivals and rescales nothing."""
    if not closed:
        return options
    defaults = {"arrivals": None, "burstiness": None, "max_concurrency": None, "sessions": "trace", "spread": False}
    return {**options, **{name: value for name, value in defaults.items() if name in options}}
