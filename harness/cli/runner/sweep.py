"""A sweep from here to its end: servers are rented, points are run, the budget is held, every step is written down."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.output import say
from harness.cli.runner.live import live_page
from harness.cli.runner.steps import Deadline, StopRequest, copy_plan, execute_point, make_plan, settle
from harness.cli.runner.targets import Servers, Target, choose_target
from harness.errors import HarnessError, PlanError
from harness.options import ReplayOptions
from harness.plan.file import plan_sha256, read_plan_info
from harness.record.manifest import PRIVATE, RunDir, Tier
from harness.store.copies import SweepStore
from harness.sweep.cost import TraceLoad, expect, start_s, survey, usd_per_hour
from harness.sweep.spec import Pair, Point, levels, slug
from harness.sweep.state import Rental, SweepState, close_rentals, set_aside, verify, write_state
from harness.trace.io import Trace

if TYPE_CHECKING:
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary

STOPPED = "stopped by the user"


class Session:
    """One sitting of a sweep: from its start or its resumption to its end. ``state`` is on disk before every step."""

    def __init__(
        self, folder: Path, state: SweepState, options: ReplayOptions, trace: Trace, tiers: Sequence[Tier | None],
        found: TraceLoad | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.state, self.options, self.trace, self.tiers = folder, state, options, trace, tiers
        self.survey = found or survey(trace, levels(state.spec), options.plan)
        self._began_ns = time.time_ns()
        self.store = SweepStore(folder, state.store_url, say)
        self.over: str | None = None
        self._told: set[str] = set()

    def run(self) -> None:
        """Do every point that is not done. Raises KeyboardInterrupt after Ctrl-C, with everything written down."""
        live_page(self.options.load.live)
        self.store.begin(self.state)
        try:
            self._look_back()
            self.work()
        finally:
            self.store.close(self.state)

    def work(self) -> None:
        """The points that are to be done, once what an earlier sitting left was looked at."""
        pending = [p for p in self.state.points if p.state == "pending"]
        for k, turn in itertools.groupby(pending, key=lambda point: point.pair):
            points, pair = list(turn), self.state.pairs[k]
            if not self.over:
                say(f"{pair.name} x {pair.replicas}: {len(points)} point{'s' if len(points) > 1 else ''}")
                self._pair(k, points)

    def _look_back(self) -> None:
        """Keep what is whole, whatever its state says; everything else is to be done (again)."""
        if close_rentals(self.folder, self.state):
            say("the harness died the last time: its servers count as rented until the last sign of life in the folder")
        for point in self.state.points:
            there = (self.folder / point.name).exists()
            if point.state != "done" and not there:
                point.state, point.reason = "pending", None
                continue
            problem = verify(self.folder, point) if there else "its run directory is gone"
            problem = problem or self.again(point)
            if problem is None and point.state != "done":
                problem = self.judge(point)
            if problem is None:
                say(f"{point.name}: kept, {point.verdict}")
                continue
            say(f"{point.name}: to be done again: {problem}")
            point.state, point.reason = "pending", problem
            point.verdict, point.slo_met, point.took_s, point.figures = None, None, None, {}
        self.write()

    def _pair(self, k: int, points: list[Point]) -> None:
        left = deque(points)
        pair = self.state.pairs[k]
        try:
            target = choose_target(self.serving_options(pair))
            self.make_plans(target, points)
            while left and not self.over:
                if not self.affordable(left[0], start_s(pair, self.tiers[k])):
                    left.popleft()
                    continue
                with self.serving(k, target) as servers:
                    self._points(left, servers)
        except (HarnessError, OSError) as e:
            say(f"{pair.name}: {e}")
            for point in left:
                self.end(point, "failed", str(e).splitlines()[0])
            self._stop_if_asked()

    def _points(self, left: deque[Point], servers: Servers) -> None:
        while left and not self.over:
            if not self.affordable(left[0], 0.0):
                left.popleft()
                continue
            self.do(left.popleft(), servers)
            if died := settle(servers):
                say(f"replica {', '.join(map(str, died))} died; the servers are started anew for the points left")
                return

    @contextmanager
    def serving(self, k: int, target: Target) -> Iterator[Servers]:
        """Servers of the ``k``-th pair, rented (and paid) from the order to start them until they have ended."""
        pair = self.state.pairs[k]
        path = self.folder / "servers" / f"{k:02d}-{slug(pair.name)}"
        path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        rental = Rental(pair=k, replicas=pair.replicas or 1, tier=self.tiers[k], started_s=time.time())
        self.state.rentals.append(rental)
        self.write()
        try:
            with target.open(RunDir(path)) as servers:
                rental.tier = servers.tier if servers.evidence == "measured" else None  # else nothing is paid for
                yield servers
        finally:
            rental.ended_s = time.time()
            self.write()

    def make_plans(self, target: Target, points: list[Point]) -> None:
        """Every plan of these points, before anything is rented."""
        (self.folder / "plans").mkdir(exist_ok=True, mode=PRIVATE)
        for point in points:
            path = self.folder / "plans" / point.plan
            notes: list[str] = []
            if point.plan_sha256 is not None and path.exists() and plan_sha256(path) != point.plan_sha256:
                set_aside(path)
                say(f"{path}: is damaged; it is made again")
            if not path.exists():
                make_plan(self.trace, path, target, self._options(point), tell=lambda _: None, note=notes.append)
            found, info = plan_sha256(path), read_plan_info(path)
            if point.plan_sha256 not in (None, found):
                raise PlanError(f"{path}: comes out otherwise than before (another harness?); begin a new sweep")
            point.plan_sha256, point.requests = found, info.requests
            if info.tokenizer is None:
                notes.append("  note: prompts are the trace's own text, the same in every point: a warm prefix cache "
                             "knows them from the second point on")  # fmt: skip
            for note in notes:
                self.tell_once(note)
        self.write()

    def do(self, point: Point, servers: Servers) -> None:
        """Run one point on servers that are up, and judge it."""
        run = RunDir(self.folder / point.name)
        stop, began = StopRequest(), time.monotonic()
        try:
            if aside := set_aside(run.path):
                say(f"{point.name}: what an earlier try left is in {aside.name}")
                self.store.set_aside(point.name)
            run.path.mkdir(mode=PRIVATE)
            copy_plan(self.folder / "plans" / point.plan, run.plan)
            point.state, point.reason = "running", None
            self.write()
            began, deadline = time.monotonic(), self._deadline(point)
            manifest = execute_point(
                run, servers, self._options(point), stop=stop, deadline=deadline, lost=self.lost_when(point),
                tell=self.tell_once, warm=True,
            )  # fmt: skip
            point.took_s = time.monotonic() - began
            if stop.asked:
                raise KeyboardInterrupt
            broken_off = manifest.status == "stopped" and not manifest.lost
            if broken_off and deadline is not None and time.monotonic() >= deadline.at_s:
                self.end(point, "failed", f"budget: {manifest.reason}; the rows this far are kept")
                self.over = "budget"
                for later in (one for one in self.state.points if one.state == "pending"):
                    later.state, later.reason = "skipped", "budget: it is spent"
                self.write()
            elif broken_off or manifest.status == "lost":
                self.end(point, "failed", manifest.reason)
            else:
                problem = self.judge(point)
                self.end(point, "failed" if problem else "done", problem or point.reason)
        except KeyboardInterrupt:
            point.state, point.reason = "pending", STOPPED
            self.write()
            raise
        except (HarnessError, OSError) as e:
            point.took_s = time.monotonic() - began
            self.end(point, "failed", str(e).splitlines()[0])
            say(str(e))
        if point.verdict not in ("VALID", "TOO SMALL"):
            self._stop_if_asked()

    def lost_when(self, point: Point) -> Callable[[Mapping[str, object]], str | None] | None:
        """What says, from a run's counts so far, that there is no point in going on with it; a sweep never does."""
        return None

    def _stop_if_asked(self) -> None:
        if self.state.spec.on_failure == "stop":
            self.over = self.over or "on_failure"
            say("on_failure = stop: no further point is begun")

    def judge(self, point: Point) -> str | None:
        """Read the run and write its verdict and figures into the point; null, or why that cannot be done."""
        from harness.analysis.rows.read import read_run
        from harness.analysis.summary import summarise

        try:
            run = read_run(self.folder / point.name)
            found = summarise(run, slo=self.options.load.slo, attain=self.options.report.attain)
        except HarnessError as e:
            return str(e).splitlines()[0]
        if point.took_s is None and run.manifest.end_ns is not None:
            point.took_s = run.manifest.end_ns / 1e9
        words = [*found.reasons]
        if before := run.manifest.restarts_before:
            words.append(f"on a server that died before it: {'; '.join(r.words for r in before)}")
        if found.costs_at_least:
            words.append("simulated by a data sheet: costs and latencies are lower bounds")
        point.state, point.verdict, point.reason = "done", found.verdict, "; ".join(words) or None
        point.slo_met = found.slo.met if found.slo else None
        point.figures = {
            "request_throughput": found.rates.request_throughput.value,
            "output_token_throughput": found.rates.output_token_throughput.value,
            "ttft_p50_s": found.metrics.ttft.p50.value,
            "tpot_p50_s": found.metrics.tpot.p50.value,
            "e2e_p50_s": found.metrics.e2e.p50.value,
            "slo_attainment": found.slo.attainment.value if found.slo else None,
            "usd_per_1m_total": found.cost.usd_per_1m_total.value,
        }
        self.learn(point, run, found)
        return None

    def again(self, point: Point) -> str | None:
        """Why a point that is whole is done again all the same; a sweep keeps it, also when it is INVALID."""
        return None

    def learn(self, point: Point, run: Run, found: Summary) -> None:
        """What else a session keeps of a run that was read and judged; a sweep nothing."""

    def end(self, point: Point, state: Any, reason: str | None) -> None:
        """Write down how a point ended, and say it with what is left."""
        point.state, point.reason = state, reason
        self.write()
        usd, hours = self.state.spent(time.time())
        spec, points = self.state.spec, self.state.points
        words = [
            point.verdict or state.upper(),
            "" if point.slo_met is None else "SLO met" if point.slo_met else "SLO missed",
            "" if point.took_s is None else f"{point.took_s:.0f} s",
            (reason or "")[:160],
            f"spent {usd:.4g}{f' of {spec.budget_usd:g}' if spec.budget_usd else ''} USD" if any(self.tiers) else "",
            f"{hours:.3g} of {spec.budget_hours:g} h" if spec.budget_hours else "",
        ]
        if left := [p for p in points if p.state == "pending"]:
            expected = expect(points, self.options.plan, self.survey)
            starts = (start_s(self.state.pairs[k], self.tiers[k]) for k in {p.pair for p in left} - {point.pair})
            seconds = sum(expected[p.name].seconds for p in left) + sum(starts)
            words.append(f"{len(left)} left, about {seconds / 60:.1f} min")
        say(f"[{points.index(point) + 1}/{len(points)}] {point.name}: {' · '.join(filter(None, words))}")

    def _budgets(self, point: Point) -> list[tuple[str, float, float, float]]:
        """(unit, budget, spent so far, spent in an hour on the servers of this point) of each budget."""
        spec = self.state.spec
        usd, hours = self.state.spent(time.time())
        rate = usd_per_hour(self.state.pairs[point.pair], self.tiers[point.pair])
        every = (("USD", spec.budget_usd, usd, rate), ("h", spec.budget_hours, hours, 1.0))
        return [(unit, budget, spent, per_hour) for unit, budget, spent, per_hour in every if budget is not None]

    def affordable(self, point: Point, start: float) -> bool:
        """Whether the estimate of this point fits into what is left; if not, it is skipped."""
        more_h = (expect(self.state.points, self.options.plan, self.survey)[point.name].seconds + start) / 3600
        problems = [
            f"{spent:.4g} of {budget:g} {unit} are spent and it needs {more_h * per_hour:.4g}"
            for unit, budget, spent, per_hour in self._budgets(point)
            if spent + more_h * per_hour > budget
        ]
        if problems:
            self.end(point, "skipped", f"budget: {'; '.join(problems)}")
            if not any(point.state == "pending" for point in self.state.points):
                self.over = "budget"
        return not problems

    def _deadline(self, point: Point) -> Deadline | None:
        """When this point has spent what is left, at the prices of its servers; null without a budget."""
        ends = [
            ((budget - spent) / per_hour, f"the budget of {budget:g} {unit} is spent")
            for unit, budget, spent, per_hour in self._budgets(point)
            if per_hour > 0
        ]
        if not ends:
            return None
        left_h, why = min(ends)
        return Deadline(at_s=time.monotonic() + left_h * 3600, why=why)

    def serving_options(self, pair: Pair) -> ReplayOptions:
        """The options of ``harness replay`` on the servers of this pair."""
        serve = replace(
            self.options.serve, base_urls=pair.base_urls, model=pair.model, tier=pair.tier, replicas=pair.replicas or 1,
            label=pair.label or self.options.serve.label,
        )  # fmt: skip
        return replace(self.options, serve=serve)

    def _options(self, point: Point) -> ReplayOptions:
        here = self.serving_options(self.state.pairs[point.pair])
        at = here.at(rate=point.level.request_rate, concurrency=point.level.concurrency)
        return replace(at, plan=replace(at.plan, seed=point.seed))

    def tell_once(self, words: str) -> None:
        """A line that many points have in common."""
        if words not in self._told:
            self._told.add(words)
            say(words)

    def write(self) -> None:
        """Put the state on disk, as another revision of it."""
        self.state.revision += 1
        self.state.writer = f"{platform.node()} {os.getpid()} {self._began_ns}"
        write_state(self.folder, self.state)
        self.store.state(self.state)
