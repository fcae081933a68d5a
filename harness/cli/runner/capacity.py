"""A search for capacity from here to its end: points of a sweep that are chosen one by one, on servers started once."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.output import say
from harness.cli.runner.steps import settle
from harness.cli.runner.sweep import Session
from harness.cli.runner.targets import Target, choose_target
from harness.errors import HarnessError
from harness.options import PlanOptions, ReplayOptions, SearchOptions
from harness.plan.file import Windows
from harness.record.manifest import Tier, now_utc
from harness.slo import criteria
from harness.sweep.cost import start_s, usd_per_hour
from harness.sweep.spec import Level, Point, point_seed, slug
from harness.sweep.state import SweepState
from harness.trace.io import Trace

if TYPE_CHECKING:
    from harness.analysis.arrays import Floats
    from harness.analysis.capacity.backlog import Demand
    from harness.analysis.capacity.search import Probe, ProbeRow, Step
    from harness.analysis.capacity.search_answer import Answer
    from harness.analysis.capacity.serving_config import ServingConfig
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary

WINDOWS = 3
"""A probe joins so many windows from different parts of the trace."""
SHORTEST_WINDOW_S = 15.0
"""A burst that the end of a window cuts is not a burst: probes that are short have fewer windows."""
ANSWERS = 10.0
"""A probe is at least so many times as long as an answer takes alone: a server begins empty and settles in answers."""
WARMUP = 0.15
"""Of a probe in an open loop comes on top at its beginning and is not judged: the server starts empty."""
RUNG = 0.5
"""A rung of the ladder takes this share of a probe."""
DECIDE = 5
"""So many probes decide together, so each offers a fifth of the requests that its percentile needs."""
LOST = 4.0
"""A probe is lost when what waits takes the server so many times the longest limit."""
PACE_S = 0.05
"""No server answers a request faster than this, as far as the size of a closed-loop plan goes."""
SPARE = 1.5
"""A rung's plan holds this many times what the rung below lets expect."""
LEAD_S = 2.0
"""From the order to begin a probe until its clock runs, about."""
STARTS = 3
"""Servers are started so often in one search; a server that dies under load for the third time will again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityReport:
    """``harness.capacity/1``: the answer, how it was found and what that cost."""

    schema: str
    made: str
    folder: str
    sentence: str
    ended: str
    narrow: bool
    """The interval is as narrow as was asked for."""
    answer: Answer | None
    """What all probes say together; None before one in an open loop proved anything."""
    probes: Sequence[ProbeRow]
    systems: Sequence[ServingConfig]
    hours: float
    usd: float | None


class CapacitySession(Session):
    """One sitting of a search. Every probe is a point of a sweep: its folder, budget and resumption are a sweep's."""

    def __init__(
        self, folder: Path, state: SweepState, options: ReplayOptions, trace: Trace, tiers: Sequence[Tier | None],
        search: SearchOptions,
    ) -> None:  # fmt: skip
        super().__init__(folder, state, options, trace, tiers)
        self.search, self.asked = search, options
        self.criteria = criteria(options.load.slo or {}, options.report.attain)
        self.demand = demand_of(trace, options.plan)
        self.probes: dict[str, Probe] = {}
        self.summaries: dict[str, Summary] = {}
        self.ended: Step | None = None

    def work(self) -> None:
        """Probe until the answer is as narrow as was asked for, the budget is spent or nothing more can be learnt."""
        for point in self.state.points:
            if point.state == "done" and point.name not in self.summaries:
                self.judge(point)
            if point.state == "skipped":
                point.state = "pending"
        target = choose_target(self.serving_options(self.state.pairs[0]))
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
        self.make_plans(target, [point])
        return self.affordable(point, start)

    def _next(self) -> Point | None:
        """The point to do now: one that was left half done, else what the search asks for; None at its end."""
        from harness.analysis.capacity.search import next_load

        left = next((point for point in self.state.points if point.state == "pending"), None)
        if left is None:
            probes = [self._probe(point) for point in self.state.points]
            step = next_load(probes, self.criteria, self.search.tolerance, self.demand)
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
            seed=point_seed(self.state.spec.seed or 0, level, repeat), plan=f"{run}.arrow",
        )  # fmt: skip
        points.append(point)
        return point

    def _of(self, point: Point) -> ReplayOptions:
        options = in_loop(self.asked, closed=point.level.concurrency is not None)
        if point.level.request_rate is None:
            return replace(options, plan=self._rung(options.plan, point.level.concurrency or 1))
        opened = [p.name for p in self.state.points if p.level.concurrency is None]
        draw = opened.index(point.name)
        return replace(options, plan=self._open(options, point.level.request_rate, draw))

    def _rung(self, plan: PlanOptions, concurrency: int) -> PlanOptions:
        """A closed loop's share of a probe, with requests enough for a server as fast as the rung below lets expect."""
        pace = concurrency / PACE_S
        below = [p for p in self.probes.values() if p.concurrency and p.point and p.concurrency < concurrency]
        if below:
            last = max(below, key=lambda p: p.concurrency or 0)
            assert last.point is not None and last.concurrency is not None
            done = last.point.rates["request_throughput"].value or pace
            pace = min(pace, done * concurrency / last.concurrency)
        seconds = RUNG * self.search.probe_s
        windows = Windows(count=WINDOWS, draw=len(self.probes), busiest=self.search.busiest)
        limit = math.ceil(SPARE * pace * seconds) + concurrency
        return replace(plan, windows=windows, warmup=None, duration_s=seconds, limit=limit, repeat=True)

    def _open(self, options: ReplayOptions, rate: float, draw: int) -> PlanOptions:
        """A probe at a rate: longer than asked for where that has too few requests or ends with the first answers."""
        from harness.analysis.capacity.probes import requests_needed

        least = options.load.min_requests
        judged = math.ceil(least + 3 * math.sqrt(least))  # the count of arrivals in a window varies
        needed = max(judged, requests_needed(self.criteria) / DECIDE)
        seconds = max(self.search.probe_s, (needed + 1) / rate, ANSWERS * self._answer_s())
        asked_s = options.plan.warmup_s
        warmup = asked_s if asked_s is not None else max(WARMUP * seconds, self._settles_s())
        if seconds > self.search.probe_s:
            self.tell_once(
                f"  {seconds:.0f} s at {rate:g} req/s: less has too few requests, or ends with the first answers"
            )
        if rate * (seconds + warmup) > self.survey.rows:
            self.tell_once(
                f"  the trace has {self.survey.rows} requests: it is repeated, with new prompts where they are made"
            )
        count = window_count(seconds, waits=self.asked.plan.waits)
        windows = Windows(count=count, draw=draw, busiest=self.search.busiest)
        return replace(options.plan, windows=windows, warmup=warmup, duration_s=seconds + warmup, repeat=True)

    def _settles_s(self) -> float:
        """How long the server takes to fill; where sessions wait, also until turns come as late as they will."""
        from harness.analysis.capacity.search import settling_s

        turns = self.demand.requests_per_session if self.asked.plan.waits else 0.0
        return max(settling_s(list(self.probes.values())), turns * self._answer_s())

    def _answer_s(self) -> float:
        """How long an answer takes one request at a time, s; 0 before that is known."""
        alone = [p.point for p in self.probes.values() if p.concurrency == 1 and p.point is not None]
        return (alone[-1].rates["e2e_mean_s"].value or 0.0) if alone else 0.0

    def lost_when(self, point: Point) -> Callable[[Mapping[str, object]], str | None] | None:
        """A probe is lost when what waits would take the server several times the longest limit to work off."""
        limits = [limit for criterion in self.criteria for limit in criterion.limits.values()]
        rungs = [p for p in self.probes.values() if p.concurrency is not None and p.point is not None]
        if point.level.concurrency is not None or not rungs or not limits:
            return None
        best = max(rungs, key=lambda p: p.worked.requests / max(p.worked.seconds, 1e-9) if p.worked else 0.0)
        if best.worked is None or not best.worked.requests or best.concurrency is None:
            return None
        pace = best.worked.requests / best.worked.seconds
        most = 2 * best.concurrency + LOST * max(*limits, 1.0) * pace
        from_s = time.monotonic() + LEAD_S + (WARMUP + 0.25) * self.search.probe_s

        def lost(counts: Mapping[str, object]) -> str | None:
            waiting = counts.get("in_flight")
            if not isinstance(waiting, int) or waiting <= most or time.monotonic() < from_s:
                return None
            return f"lost: {waiting} requests in flight, and the server gets {pace:.3g} req/s done: ended early"

        return lost

    def learn(self, point: Point, run: Run, found: Summary) -> None:
        """What the search goes on from. A rung that is TOO SMALL steers too: it guides, and no figure comes from it."""
        from harness.analysis.capacity.probes import evidence_of, limit_used, worked_of
        from harness.analysis.capacity.search import Probe
        from harness.analysis.capacity.serving_config import point_of
        from harness.analysis.check import MIN_REQUESTS
        from harness.analysis.validity.prefix_cache import NAME as WARM

        self.summaries[point.name] = found
        failed = {c.name for c in found.checks if (c.gate or c.name == WARM) and c.ok is False}
        rate, lost = point.level.request_rate, run.manifest.lost
        steers = not failed or (failed == {MIN_REQUESTS} and rate is None)
        self.probes[point.name] = Probe(
            rate=rate, concurrency=point.level.concurrency, point=point_of(found) if steers else None,
            used=limit_used(run, self.criteria), worked=worked_of(run) if steers or lost else None,
            evidence=evidence_of(run, self.criteria, rate, lost=lost) if rate and (steers or lost) else None,
        )  # fmt: skip

    def _probe(self, point: Point) -> Probe:
        from harness.analysis.capacity.search import Probe

        blank = Probe(rate=point.level.request_rate, concurrency=point.level.concurrency, point=None)
        return self.probes.get(point.name, blank)

    def end(self, point: Point, state: Any, reason: str | None) -> None:
        """Write down how a probe ended, and say it with what it cost."""
        point.state, point.reason = state, reason
        self.write()
        row = self._record(point)
        kept = zip(row.attainment, self.criteria, strict=False)
        words = [
            row.verdict,
            *(f"{share:.2%} {criterion.name}" for share, criterion in kept if share is not None),
            "" if row.request_throughput is None else f"{row.request_throughput:.3g} req/s done",
            "" if row.seconds is None else f"{row.seconds:.0f} s",
            "" if row.usd is None else f"{row.usd:.4f} USD",
            (reason or "")[:200],
        ]
        say(f"probe {self.state.points.index(point) + 1}: {row.load}: {' · '.join(filter(None, words))}")

    def _record(self, point: Point) -> ProbeRow:
        from harness.analysis.capacity.search import ProbeRow

        found = self.summaries.get(point.name)
        tier = self.state.rentals[-1].tier if self.state.rentals else None
        usd = None
        if tier is not None and point.took_s is not None:
            usd = usd_per_hour(self.state.pairs[0], tier) * point.took_s / 3600
        known = self.probes.get(point.name)
        unstable = known is not None and known.evidence is not None and known.evidence.unstable
        lost = known is not None and known.point is None and known.evidence is not None
        return ProbeRow(
            run=str(self.folder / point.name), load=point.level.words, requests=point.requests,
            verdict="LOST" if lost else point.verdict or point.state,
            attainment=tuple(one.attainment.value for one in found.slo.criteria) if found and found.slo else (),
            request_throughput=found.rates.request_throughput.value if found else None,
            seconds=point.took_s, usd=usd, why=point.reason, unstable=unstable,
        )  # fmt: skip

    def _answer(self) -> Answer | None:
        from harness.analysis.capacity.search import estimate, keeps
        from harness.analysis.capacity.search_answer import Answer, capacity_from

        probes = [self._probe(point) for point in self.state.points]
        shown = [p.evidence for p in probes if p.evidence is not None]
        names = [n for n, p in self.probes.items() if p.rate is not None and p.point is not None]
        summaries = [self.summaries[name] for name in names]
        if not shown:
            return None
        now = estimate(probes, self.criteria, self.demand)
        found = capacity_from(
            now, shown, summaries, self.demand, unit="sessions/s" if self.asked.plan.waits else "req/s",
            sessions_per_request=1 / self.demand.requests_per_session if self.asked.plan.waits else None,
            reached=any(keeps(p.point, self.criteria) for p in probes if p.rate is not None and p.point),
        )  # fmt: skip
        return Answer(
            criteria=tuple(c.name for c in self.criteria), runs=tuple(names), capacity=found,
            trace_share=self._trace_share(), seconds=now.seconds if now else 0.0,
        )  # fmt: skip

    def _trace_share(self) -> float:
        """Share of the trace's rows that some probe in an open loop replayed."""
        rows = len(self.demand)
        seen: set[int] = set()
        for name, probe in self.probes.items():
            if probe.rate is None or probe.evidence is None:
                continue
            for window in self.summaries[name].plan.windows:
                if window.requests >= rows:
                    return 1.0
                seen.update((window.first_row + k) % rows for k in range(window.requests))  # it may run over the end
        return len(seen) / max(1, rows)

    def report(self) -> CapacityReport:
        """The answer from all probes so far."""
        from harness.analysis.capacity.serving_config import SCHEMA, serving_configs
        from harness.analysis.report.capacity_text import sentence

        usd, hours = self.state.spent(time.time())
        answer_of_all = self._answer()
        told = [s for s in self.summaries.values() if s.verdict != "TOO SMALL" or s.load.mode == "open"]
        found = serving_configs(told, answer=answer_of_all)
        answer = next((one for one in found if one.loop != "closed"), None)
        ended = self.ended.why if self.ended else self.over or "ended"
        return CapacityReport(
            schema=SCHEMA, made=now_utc(), folder=str(self.folder),
            sentence=sentence(answer) if answer else "Capacity is not known: no run in an open loop was VALID.",
            ended=ended, narrow=self.ended is not None and self.ended.narrow, answer=answer_of_all,
            probes=[self._record(point) for point in self.state.points], systems=found, hours=hours,
            usd=usd if any(rental.tier for rental in self.state.rentals) else None,
        )  # fmt: skip


def window_count(seconds: float, *, waits: bool) -> int:
    """Windows of a probe that long. Sessions that wait (``waits``) get one: the first turn that a window leaves of a
    session is found in no prefix cache, and only those of the probe's start-up are not judged.
    """
    return 1 if waits else max(1, min(WINDOWS, int(seconds / SHORTEST_WINDOW_S)))


def in_loop(asked: ReplayOptions, *, closed: bool) -> ReplayOptions:
    """The options of a replay in this kind of loop: a ladder draws no arrivals and rescales nothing."""
    if not closed:
        return asked
    return replace(
        asked, load=replace(asked.load, max_concurrency=None),
        plan=replace(asked.plan, arrivals=None, burstiness=None, sessions="trace", spread=False),
    )  # fmt: skip


def demand_of(trace: Trace, asked: PlanOptions) -> Demand:
    """The whole trace as arrivals and lengths; arrivals that are to be drawn are drawn here at 1 req/s."""
    import numpy as np

    from harness.analysis.capacity.backlog import Demand
    from harness.plan.arrivals import arrival_times, constant_stage

    flat = array("d")
    sessions: dict[str | None, tuple[float, int]] = {}  # its start, and its last row so far
    for k, record in enumerate(trace):
        said = (record.arrival_s, record.input_tokens, record.output_tokens)
        at, into, out = (math.nan if value is None else value for value in said)
        start_s, last = sessions.get(record.session_id, (at, -1))
        if record.session_id is not None and asked.waits:
            sessions[record.session_id] = start_s, k
        flat.extend((at, into, out, at - start_s, last))
    arrival_s, inputs, outputs, into_session_s, after = np.frombuffer(flat).reshape(-1, 5).T.copy()
    if asked.drawn and asked.arrivals is not None:
        stages = constant_stage(1.0, None)
        drawn = arrival_times(asked.arrivals, stages, burstiness=asked.burstiness or 1.0, seed=0, most=len(after))
        arrival_s = np.asarray(drawn, dtype=np.float64) / 1e9

    def known(values: Floats, absent: float) -> Floats:
        said = np.isfinite(values)
        return np.where(said, values, float(values[said].mean()) if said.any() else absent)

    return Demand(
        arrival_s=arrival_s, input_tokens=known(inputs, 0.0), output_tokens=known(outputs, 1.0),
        into_session_s=into_session_s if asked.waits and not asked.drawn else None,
        after=after.astype(np.int64) if asked.waits else None,
    )  # fmt: skip
