"""A demand and measured capacities in, fleets out. Nothing is measured here."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.commands.output import print_json, say
from harness.errors import EXIT_FAILURE, EXIT_INVALID, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.run import now_utc
from harness.traces.reading import open_asked

if TYPE_CHECKING:
    from analysis.sizing.fleet import Demand
    from analysis.sizing.fleet_plan import FleetPlan


def plan_fleet(
    trace: Path,
    measured: Sequence[str],
    *,
    trace_format: str | None,
    skip_bad: bool,
    grow: float,
    headroom: float,
    availability: float | None,
    node_availability: float,
    start_s: float | None,
    replicas_per_instance: int | None,
    slo: Sequence[dict[str, float]],
    attain: float,
    format_: str,
) -> int:
    """Print the plan; 0: there is a fleet. Without one 4: a tier misses the promise; 3: runs are INVALID; 1: else."""
    from analysis.sizing.at_slo import systems
    from analysis.sizing.fleet_plan import Wanted, grown, plan_fleets
    from harness.commands.found import find_runs, read_summaries

    if availability is not None and not availability < 1:
        raise UsageError("--availability 100%: no number of machines that can fail is always enough; ask for less")
    requests, tokens = read_demand(trace, trace_format, skip_bad)
    wanted = Wanted(
        requests=requests, tokens=tokens, headroom=headroom, availability=availability,
        node_availability=node_availability, start_s=start_s, replicas_per_instance=replicas_per_instance,
    )  # fmt: skip
    runs = [path for text in measured for path in find_runs(text)]
    promises: list[dict[str, float] | None] = [*slo] or [None]
    summaries = [read_summaries(runs, promise, attain) for promise in promises]
    judged = [systems(found) for found in summaries]
    refused = [(s.run, f"INVALID: {'; '.join(s.reasons)}") for s in summaries[0] if s.verdict != "VALID"]
    plan = plan_fleets(
        judged[0], grown(wanted, grow), made=now_utc(), trace=str(trace),
        others=[one for found in judged[1:] for one in found], refused=refused,
    )  # fmt: skip
    _print(plan, format_)
    if plan.tiers:
        return EXIT_VALID
    if any(one.capacity is not None and one.capacity.state == "not reached" for one in judged[0]):
        return EXIT_SLO_MISSED
    return EXIT_INVALID if refused else EXIT_FAILURE


def read_demand(path: Path, trace_format: str | None, skip_bad: bool) -> tuple[Demand, Demand | None]:
    """Requests/s of a trace, and tokens/s where every row says both its lengths. Raises `UsageError` without times."""
    import numpy as np

    from analysis.sizing.fleet import demand

    trace = open_asked(path, {"trace_format": trace_format, "skip_bad": skip_bad}, arrivals_only=True)
    arrivals, tokens, silent = array("d"), array("d"), 0
    for record in trace:
        if record.arrival_s is None:
            raise UsageError(f"{trace.path}:{record.line}: no arrival time, and a demand is requests over time")
        arrivals.append(record.arrival_s)
        known = record.input_tokens is not None and record.output_tokens is not None
        tokens.append((record.input_tokens or 0) + (record.output_tokens or 0) if known else math.nan)
        silent += not known
    times = np.frombuffer(arrivals)
    if silent:
        say(f"{trace.path}: {silent} of {len(times)} rows do not say their token lengths: planned by requests alone")
    return demand(times), None if silent else demand(times, np.frombuffer(tokens))


def _print(plan: FleetPlan, format_: str) -> None:
    from analysis.show.fleet_text import fleet_blocks, fleet_csv
    from harness.commands.output import print_blocks

    if format_ == "json":
        print_json(plan)
    elif format_ == "csv":
        print(fleet_csv(plan), end="")
    else:
        print_blocks(fleet_blocks(plan), format_)
