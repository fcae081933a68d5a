"""A demand and measured capacities in, fleets out. Nothing is measured here."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import print_json, say
from harness.errors import EXIT_FAILURE, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.options import ReadOptions
from harness.record.manifest import now_utc
from harness.trace.files import open_asked

if TYPE_CHECKING:
    from analysis.arrays import Ints
    from analysis.capacity.fitted_engine import FittedEngine, Requests, ServedTimes
    from analysis.capacity.fleet import Kept, Schedule, TrafficDemand
    from analysis.capacity.fleet_plan import FleetPlan
    from analysis.capacity.serving_config import ServingConfig
    from analysis.capacity.simulated_fleet import SimulatedFleet


def plan_fleet(
    trace: Path,
    measured: Sequence[str],
    reading: ReadOptions,
    *,
    grow: float,
    headroom: float,
    availability: float | None,
    node_availability: float,
    start_s: float | None,
    replicas_per_instance: int | None,
    slo: Sequence[dict[str, float]],
    attain: float,
    format_: str,
    html: Path | None = None,
) -> int:
    """Print the plan; 0: there is a fleet. Without one 4: a tier misses the promise; 3: runs are INVALID; 1: else."""
    from analysis.capacity.fleet_plan import Wanted, grown, plan_fleets
    from analysis.capacity.serving_config import serving_configs
    from harness.cli.select_runs import find_runs, read_summaries, refused_exit

    if availability is not None and not availability < 1:
        raise UsageError("--availability 100%: no number of machines that can fail is always enough; ask for less")
    asked = read_demand(trace, reading)
    wanted = Wanted(
        requests=asked.requests, tokens=asked.tokens, headroom=headroom, availability=availability,
        node_availability=node_availability, start_s=start_s, replicas_per_instance=replicas_per_instance,
    )  # fmt: skip
    runs = [path for text in measured for path in find_runs(text)]
    promises: list[dict[str, float] | None] = [*slo] or [None]
    summaries = [read_summaries(runs, promise, attain) for promise in promises]
    judged = [serving_configs(found) for found in summaries]
    refused = [(s.run, f"{s.verdict}: {'; '.join(s.reasons)}") for s in summaries[0] if s.verdict != "VALID"]
    folders = {s.run: path for s, path in zip(summaries[0], runs, strict=True)}

    plan = plan_fleets(
        judged[0], grown(wanted, grow), made=now_utc(), trace=str(trace),
        others=[one for found in judged[1:] for one in found], refused=refused,
        replays=_Replays(asked.replayable, folders),
    )  # fmt: skip
    _print(plan, format_, html)
    if plan.tiers:
        return EXIT_VALID
    if any(one.capacity is not None and one.capacity.state == "not reached" for one in judged[0]):
        return EXIT_SLO_MISSED
    return refused_exit(s.verdict for s in summaries[0]) or EXIT_FAILURE


@dataclass(frozen=True, slots=True)
class _Replays:
    """The demand, replayed on engines fitted to runs (`analysis.capacity.fleet_plan.Replays`)."""

    demand: Requests | None
    folders: Mapping[str, Path]
    """Of the runs, by name."""

    def fleet(self, system: ServingConfig, factor: float, likely: int) -> SimulatedFleet:
        """The smallest that keeps the promise of a system."""
        from analysis.capacity.fitted_engine import NotFittedError, observe
        from analysis.capacity.simulated_fleet import size_fleet
        from analysis.rows.read import read_run

        if self.demand is None:
            raise NotFittedError("the trace does not say all token lengths, so it cannot be replayed")
        say(f"{system.name}: replaying {len(self.demand):,} requests in virtual time")
        observed = [observe(read_run(self.folders[run]), system.replicas) for run in system.runs]
        return size_fleet(
            observed, self.demand, factor, system.criteria, simulated_engine, likely,
            progress=lambda words: say(f"{system.name}: {words}"),
        )  # fmt: skip

    def scaled(
        self, system: ServingConfig, fitted: FittedEngine, factor: float, plan: Schedule, spares: int, per_instance: int
    ) -> Kept:
        """How a fleet that follows the demand keeps the promise."""
        from analysis.capacity.simulated_fleet import follow

        assert self.demand is not None, "an engine was fitted to replay it"
        return follow(
            fitted, self.demand, factor, system.criteria, simulated_engine, plan, spares=spares,
            per_instance=per_instance,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A trace as a demand."""

    requests: TrafficDemand
    tokens: TrafficDemand | None
    """None where not every row says both its lengths."""
    replayable: Requests | None
    """The requests themselves; None for the same reason."""


def read_demand(path: Path, reading: ReadOptions) -> Asked:
    """Requests/s of a trace, and what else its rows say.

    Raises `UsageError` without times.
    """
    import numpy as np

    from analysis.capacity.fitted_engine import Requests
    from analysis.capacity.fleet import demand

    trace = open_asked(path, reading, arrivals_only=True)
    arrivals, inputs, outputs, silent = array("d"), array("q"), array("q"), 0
    for record in trace:
        if record.arrival_s is None:
            raise UsageError(f"{trace.path}:{record.line}: no arrival time, and a demand is requests over time")
        arrivals.append(record.arrival_s)
        silent += record.input_tokens is None or record.output_tokens is None
        inputs.append(record.input_tokens or 0)
        outputs.append(record.output_tokens or 0)
    times = np.frombuffer(arrivals)
    if silent:
        say(f"{trace.path}: {silent} of {len(times)} rows do not say their token lengths: planned by requests alone")
        return Asked(requests=demand(times), tokens=None, replayable=None)
    lengths = np.frombuffer(inputs, dtype=np.int64), np.frombuffer(outputs, dtype=np.int64)
    tokens = demand(times, (lengths[0] + lengths[1]).astype(np.float64))
    order = np.argsort(times, kind="stable")
    replayable = Requests(
        arrival_s=times[order], input_tokens=lengths[0][order], output_tokens=np.maximum(1, lengths[1][order])
    )  # fmt: skip
    return Asked(requests=demand(times), tokens=tokens, replayable=replayable)


def simulated_engine(fitted: FittedEngine, requests: Requests, replicas: int, owner: Ints | None = None) -> ServedTimes:
    """The project's own engine with the fitted step (`analysis.capacity.fitted_engine.Engine`)."""
    from analysis.capacity.fitted_engine import ServedTimes
    from cluster.simulator.replica import Workload, simulate
    from cluster.simulator.scheduler import Limits
    from cluster.simulator.step_time import LinearStep

    step = LinearStep(fitted.base_s, fitted.per_sequence_s, fitted.per_prompt_token_s)
    load = Workload(
        arrival_s=requests.arrival_s, input_tokens=requests.input_tokens, output_tokens=requests.output_tokens
    )  # fmt: skip
    limits = Limits(max_num_seqs=fitted.max_num_seqs, max_num_batched_tokens=fitted.max_num_batched_tokens)
    done = simulate(load, limits, [step] * replicas, router="round robin" if owner is None else owner)
    return ServedTimes(first_token_s=done.first_token_s, finished_s=done.finished_s)


def _print(plan: FleetPlan, format_: str, html: Path | None) -> None:
    from analysis.show.fleet_text import fleet_csv, fleet_sections
    from harness.cli.output import print_sections, write_sections

    if html is not None:
        write_sections(html, "plan-fleet", fleet_sections(plan))
    if format_ == "json":
        print_json(plan)
    elif format_ == "csv":
        print(fleet_csv(plan), end="")
    else:
        print_sections(fleet_sections(plan), format_)
