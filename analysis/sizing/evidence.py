"""What one run tells a search for capacity: request by request beside its plan, and what was worked off in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from analysis import metrics
from analysis.arrays import Bools, Floats, Ints
from analysis.load import Rows, Run
from analysis.sizing.backlog import Demand
from analysis.sizing.crossing import Evidence
from analysis.sizing.search import Worked
from analysis.stability import only_grew
from harness.plan import read_plan_columns
from harness.run import RunDir
from harness.slo import Criterion

PLANNED = ["phase", "scheduled_ns", "input_tokens", "output_tokens"]
RAMP = 0.1
"""Share of a closed loop at its beginning that is not counted as worked: its slots fill."""


def evidence_of(run: Run, criteria: Sequence[Criterion], rate: float, *, lost: bool) -> Evidence:
    """A probe in an open loop. ``lost``: it was ended early because its backlog only grew."""
    plan = _Planned(run.path)
    if lost:
        measured = np.zeros(len(plan.due_s), dtype=np.bool_)
        kept: tuple[Bools, ...] = tuple(measured[:0] for _ in criteria)
    else:
        measured, kept = _kept(run, criteria, plan.measured)
    window = _windows(run, plan.due_s[measured])
    unstable = lost or _grew(run, plan)
    return Evidence(rate=rate, sent=plan.demand, measured=measured, kept=kept, window=window, unstable=unstable)


def worked_of(run: Run) -> Worked:
    """What ended while load came all the time, by its planned lengths: after the warm-up or ramp, before the drain."""
    plan = _Planned(run.path)
    closed = run.manifest.spec.mode == "closed"
    sides = (run.rows, run.warmup)
    sent_s = np.concatenate([side.sent_s for side in sides])
    finished_s = np.concatenate([np.where(side.success, side.finished_s, np.nan) for side in sides])
    ids = np.concatenate([side.request_id for side in sides])
    if not np.isfinite(sent_s).any():
        return Worked(seconds=0.0, requests=0, input_tokens=0.0, output_tokens=0.0)
    last_s = float(np.nanmax(sent_s))
    first_s = RAMP * last_s if closed else float(plan.due_s[plan.measured].min(initial=last_s))
    done = (finished_s >= first_s) & (finished_s < last_s)
    which = ids[done]
    return Worked(
        seconds=last_s - first_s, requests=int(done.sum()),
        input_tokens=float(plan.demand.input_tokens[which].sum()),
        output_tokens=float(plan.demand.output_tokens[which].sum()),
    )  # fmt: skip


def lengths(table: pa.Table, name: str) -> Floats:
    """A column of lengths, tokens; what is not said is the mean of what is, or 1 where nothing is."""
    found: Floats = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
    known = np.isfinite(found)
    return np.where(known, found, float(found[known].mean()) if known.any() else 1.0)


class _Planned:
    """The plan of a run."""

    def __init__(self, path: Path) -> None:
        table = read_plan_columns(RunDir(path).plan, PLANNED)
        due = table.column("scheduled_ns").to_numpy(zero_copy_only=False).astype(np.float64) / 1e9
        self.due_s: Floats = np.nan_to_num(due, nan=0.0)
        self.measured: Bools = np.array([phase == "measured" for phase in table.column("phase").to_pylist()])
        self.demand = Demand(
            arrival_s=self.due_s, input_tokens=lengths(table, "input_tokens"),
            output_tokens=lengths(table, "output_tokens"),
        )  # fmt: skip


def _grew(run: Run, plan: _Planned) -> bool:
    """Whether the backlog only grew from the end of the warm-up on, its requests among it."""
    finished_s = np.concatenate([run.rows.finished_s, run.warmup.finished_s])
    first_s = float(plan.due_s[plan.measured].min(initial=np.inf))
    return only_grew(plan.due_s, finished_s, first_s, float(plan.due_s.max(initial=0.0)))


def _kept(run: Run, criteria: Sequence[Criterion], planned: Bools) -> tuple[Bools, tuple[Bools, ...]]:
    """Which planned requests were offered and measured, and which of those kept each criterion; lost ones did not."""
    offered = planned.copy()
    rows: Rows = run.rows
    offered[rows.request_id[metrics.not_offered(run)]] = False
    kept = []
    for criterion in criteria:
        met = np.zeros(len(planned), dtype=np.bool_)
        met[rows.request_id] = metrics.meets_slo(rows, criterion.limits)
        kept.append(met[offered])
    return offered, tuple(kept)


def _windows(run: Run, due_s: Floats) -> Ints:
    """Which window of the trace each request is of; four equal parts where the plan has none."""
    starts = [window.starts_s for window in run.manifest.plan.windows if window.starts_s is not None]
    if len(starts) < 2:
        starts = np.linspace(0.0, float(due_s.max(initial=0.0)) + 1e-9, 4, endpoint=False).tolist()
    found: Ints = np.searchsorted(np.sort(starts), due_s, side="right") - 1
    return np.maximum(found, 0)
