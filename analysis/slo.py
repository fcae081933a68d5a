"""The SLO of a run, judged over every request that was offered: a failed or refused one met nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis import metrics
from analysis.arrays import Bools
from analysis.metrics import Counts
from analysis.rows.read import Rows, Run
from analysis.stats.intervals import Quantity, share
from analysis.stats.relaxation import Memory
from harness.slo import criteria


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One criterion of the SLO and what became of it."""

    name: str
    limits: dict[str, float]
    """Seconds by metric."""
    wanted: float
    """Share of offered requests that are to keep all its limits."""
    attainment: Quantity
    met: bool | None
    """None: not known, since a limit is on what was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """An SLO and how far it was met (`harness.slo` has the rules)."""

    limits: dict[str, float]
    """As it was asked for: seconds by key, ``ttft`` or ``ttft_p99``."""
    attainment: Quantity
    """Share of offered requests that were within every limit, each percentile's own among them: what goodput counts."""
    attain: float
    """Share wanted of the limits without a percentile."""
    met: bool | None
    """Every criterion was met; None: none was missed, and of some it is not known."""
    criteria: list[Judged]


def price_note(slo: Slo | None, served: str | None = None) -> str | None:
    """What the SLO says of a price at this load, and which answers it is the price of (``served``: other lengths than
    the plan's, in words).
    """
    said = [] if served is None else [f"the price of the answers that were served: {served}"]
    if slo is not None and slo.met is None:
        said.insert(0, "whether the SLO is kept at this load is not known")
    elif slo is not None and not slo.met:
        said.insert(0, "at this load the SLO is missed: not a price to sell at")
    return "; ".join(said) or None


def judge(run: Run, limits: dict[str, float], counts: Counts, attain: float, queue: Memory | None = None) -> Slo:
    """Attainment over every request that was offered: failed, unfinished and lost ones did not meet it."""
    rows = run.rows
    left_out = _in_time(rows, metrics.not_offered(run))

    def attained(within: Mapping[str, float]) -> Quantity:
        if why := metrics.unjudged(within, rows, counts):
            unit = "share of requests"
            return Quantity(value=None, n=counts.offered, unit=unit, note=why, evidence=run.evidence)
        met = np.zeros(counts.offered, np.bool_)  # lost ones last: they met nothing
        offered = _in_time(rows, metrics.meets_slo(rows, within))[~left_out]
        met[: len(offered)] = offered
        return share(met, unit="share of requests", evidence=run.evidence, queue=queue)

    judged = []
    for criterion in criteria(limits, attain):
        kept = attained(criterion.limits)
        met = None if kept.value is None and counts.offered else (kept.value or 0.0) >= criterion.wanted
        judged.append(
            Judged(
                name=criterion.name, limits=dict(criterion.limits), wanted=criterion.wanted, attainment=kept, met=met
            )
        )
    every = [one.met for one in judged]
    met = False if False in every else None if None in every else True
    return Slo(limits=limits, attainment=attained(limits), attain=attain, met=met, criteria=judged)


def _in_time(rows: Rows, flags: Bools) -> Bools:
    """Flags of the rows in the order they were due."""
    found = np.zeros(len(rows), np.bool_)
    found[rows.rank] = flags
    return found
