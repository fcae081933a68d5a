"""How many instances carry a demand at an SLO, from runs that are there: plan-fleet."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.cli.output import present, say
from harness.cli.select_runs import find_runs, judged, refused_exit
from harness.cli.verb import EXIT_STATUS, ONE_TRACE_ARGUMENT, command, format_option, html_option, takes
from harness.errors import EXIT_FAILURE, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.option_types import COUNT, GROWTH, SHARE, opt
from harness.options import AttainOption, ReadOptions

if TYPE_CHECKING:
    from harness.analysis.capacity.fitted_engine import Changes, FittedEngine, Requests, ServedTimes
    from harness.analysis.capacity.fleet import Kept, Schedule, TrafficDemand
    from harness.analysis.capacity.serving_config import ServingConfig
    from harness.analysis.capacity.simulated_fleet import SimulatedFleet


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions(AttainOption):
    """What ``harness plan-fleet`` takes."""

    grow: float = opt("The forecast: this many times the trace.", 1.0, kind=GROWTH)
    headroom: float = opt(
        "Room for a forecast that is too low: the demand times this, on top of --grow. Bursts need none, they are "
        "replayed.", 1.0, kind=GROWTH,
    )  # fmt: skip
    availability: float | None = opt("Spare instances so that enough are up this share of the time.", kind=SHARE)
    node_availability: float = opt(
        "Share of the time one instance is up: an assumption, take it from your provider.", 0.995, kind=SHARE
    )
    start_s: float | None = opt("Start-up time of a replica instead of the measured one.")
    replicas_per_instance: int | None = opt(
        "Default: as many as the instance's accelerators hold, 1 without any.", kind=COUNT
    )
    slo: Sequence[dict[str, float]] = opt(
        "Judge by this SLO instead of the runs' own; repeat: the others show what another SLO costs.",
        (), flag="--slo", metavar="KEY=TIME,...",
    )  # fmt: skip


@command(
    epilog=f"""\b
Examples:
  harness plan-fleet trace.jsonl sweeps/20261122T021500Z-capacity-trace
  harness plan-fleet year.csv.gz sweeps/l4 sweeps/h100 --grow 3x --headroom 1.2 --availability 99.9%
  harness plan-fleet trace.jsonl sweeps/l4 --slo ttft_p99=2s --slo ttft_p99=1s --format csv

{EXIT_STATUS}""",
)
@ONE_TRACE_ARGUMENT
@click.argument("measured", nargs=-1, required=True, metavar="FOLDER...")
@takes(ReadOptions, to="reading")
@takes(FleetOptions)
@html_option("the plan")
@format_option("text", "md", "json", "csv")
def plan_fleet(
    trace: Path, measured: Sequence[str], format_: str, html: Path | None, reading: ReadOptions, asked: FleetOptions
) -> int:
    """How many whole instances of each measured tier carry the demand of TRACE, and what they cost.

    FOLDER is what 'harness capacity' or 'harness sweep' left (rates in an open loop, with an SLO and a tier). TRACE is
    replayed in virtual time on an engine fitted to those runs: the fleet is the smallest that keeps the SLO in
    every minute, and is marked as simulated. Beside it stands the fluid answer (worst minute over capacity), alone
    where no engine can be fitted. Spare instances for availability; fixed against autoscaled over the trace's own
    time; what another SLO changes; the cheapest tier and the runner-up.
    """
    from harness.analysis.capacity.fleet_plan import Wanted, grown, plan_fleets
    from harness.analysis.capacity.serving_config import serving_configs
    from harness.analysis.report.fleet import fleet_sections
    from harness.record.manifest import now_utc

    if asked.availability is not None and not asked.availability < 1:
        raise UsageError("--availability 100%: no number of machines that can fail is always enough; ask for less")
    demand = read_demand(trace, reading)
    wanted = Wanted(
        requests=demand.requests, tokens=demand.tokens, headroom=asked.headroom, availability=asked.availability,
        node_availability=asked.node_availability, start_s=asked.start_s,
        replicas_per_instance=asked.replicas_per_instance,
    )  # fmt: skip
    runs = find_runs(*measured)
    slos: list[dict[str, float] | None] = [*asked.slo] or [None]
    summaries = [judged(runs, lambda _, found: found, slo=slo, attain=asked.attain) for slo in slos]
    systems, *others = [serving_configs([s for s in found if not s.costs_at_least]) for found in summaries]
    bounds = [(s.run, "lower bounds, by the chip's data sheet") for s in summaries[0] if s.costs_at_least]
    plan = plan_fleets(
        systems, grown(wanted, asked.grow), made=now_utc(), trace=str(trace),
        others=[one for found in others for one in found],
        refused=[(s.run, f"{s.verdict}: {'; '.join(s.reasons)}") for s in summaries[0] if s.verdict != "VALID"]
        + bounds,
        replays=_Replays(demand.replayable, {s.run: path for s, path in zip(summaries[0], runs, strict=True)}),
    )  # fmt: skip
    present(plan, fleet_sections(plan), format_, html=html, verb="plan-fleet")
    if plan.tiers:
        return EXIT_VALID
    if any(one.capacity is not None and one.capacity.state == "not reached" for one in systems):
        return EXIT_SLO_MISSED
    return refused_exit(s.verdict for s in summaries[0]) or EXIT_FAILURE


@dataclass(frozen=True, slots=True)
class _Replays:
    """The demand, replayed on engines fitted to runs (`analysis.capacity.fleet_plan.Replays`)."""

    demand: Requests | None
    folders: Mapping[str, Path]

    def fleet(self, system: ServingConfig, factor: float, likely: int) -> SimulatedFleet:
        """The smallest that keeps the SLO of a system."""
        from harness.analysis.capacity.fitted_engine import NotFittedError, observe
        from harness.analysis.capacity.simulated_fleet import size_fleet
        from harness.analysis.rows.read import read_run
        from harness.cli.output import say

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
        """How a fleet that follows the demand keeps the SLO."""
        from harness.analysis.capacity.simulated_fleet import follow

        assert self.demand is not None, "an engine was fitted to replay it"
        return follow(
            fitted, self.demand, factor, system.criteria, simulated_engine, plan, spares=spares,
            per_instance=per_instance,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceDemand:
    """A trace as a demand."""

    requests: TrafficDemand
    tokens: TrafficDemand | None
    """None where not every row says both its lengths."""
    replayable: Requests | None


def read_demand(path: Path, reading: ReadOptions) -> TraceDemand:
    """Requests/s of a trace, and what else its rows say.

    Raises `UsageError` without times.
    """
    import numpy as np

    from harness.analysis.capacity.fitted_engine import Requests
    from harness.analysis.capacity.fleet import demand
    from harness.trace.io import open_asked

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
        return TraceDemand(requests=demand(times), tokens=None, replayable=None)
    lengths = np.frombuffer(inputs, dtype=np.int64), np.frombuffer(outputs, dtype=np.int64)
    tokens = demand(times, (lengths[0] + lengths[1]).astype(np.float64))
    order = np.argsort(times, kind="stable")
    replayable = Requests(
        arrival_s=times[order], input_tokens=lengths[0][order], output_tokens=np.maximum(1, lengths[1][order])
    )  # fmt: skip
    return TraceDemand(requests=demand(times), tokens=tokens, replayable=replayable)


def simulated_engine(fitted: FittedEngine, requests: Requests, replicas: int | Changes) -> ServedTimes:
    """The project's own engine with the fitted step (`harness.analysis.capacity.fitted_engine.Engine`)."""
    import numpy as np

    from harness.analysis.capacity.fitted_engine import ServedTimes
    from harness.cluster.simulator.elastic import Elastic, Failures, PlannedReplicas
    from harness.cluster.simulator.fleet import Workload, simulate
    from harness.cluster.simulator.scheduler import Limits
    from harness.cluster.simulator.step_time import LinearStep

    step = LinearStep(fitted.base_s, fitted.per_sequence_s, fitted.per_prompt_token_s)
    load = Workload(
        arrival_s=requests.arrival_s, input_tokens=requests.input_tokens, output_tokens=requests.output_tokens
    )  # fmt: skip
    limits = Limits(max_num_seqs=fitted.max_num_seqs, max_num_batched_tokens=fitted.max_num_batched_tokens)
    elastic = None
    if not isinstance(replicas, int):
        wanted = PlannedReplicas(at_s=replicas.at_s.tolist(), replicas=replicas.replicas.tolist())
        failures = Failures(mean_s=replicas.fails_s)
        elastic = Elastic(start_s=replicas.start_s, scaling=wanted, failures=failures)
        replicas = wanted.replicas[0]
    done = simulate(load, limits, [step] * replicas, elastic=elastic)
    lost = np.isnan(done.finished_s)  # whatever it had of an answer
    return ServedTimes(first_token_s=np.where(lost, np.nan, done.first_token_s), finished_s=done.finished_s)
