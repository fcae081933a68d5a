"""What one run tells a search for capacity: request by request beside its plan, and what was worked off in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from harness.analysis import metrics
from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.capacity.backlog import Demand, Worked
from harness.analysis.capacity.crossing import Evidence
from harness.analysis.fidelity.inputs import measured_reuse
from harness.analysis.rows.read import Rows, Run
from harness.analysis.stats.intervals import samples_needed
from harness.analysis.steady import only_grew
from harness.plan.file import read_plan_columns
from harness.record.manifest import RunDir
from harness.slo import Criterion

PLANNED = ["phase", "scheduled_ns", "after", "input_tokens", "output_tokens"]
RAMP = 0.1
"""Share of a closed loop at its beginning that is not counted as worked: its slots fill."""


def evidence_of(run: Run, criteria: Sequence[Criterion], rate: float, *, lost: bool) -> Evidence:
    """A probe in an open loop. ``lost``: it was ended early because its backlog only grew."""
    plan = _Planned(run.path)
    if lost:
        measured = np.zeros(len(plan.due_s), dtype=np.bool_)
        kept: tuple[Bools, ...] = tuple(measured[:0] for _ in criteria)
    else:
        measured, kept = _kept(run, criteria, plan.measured, float(plan.due_s.max(initial=0.0)))
    starts_s = [window.starts_s for window in run.manifest.plan.windows if window.starts_s is not None]
    window = window_of(plan.due_s[measured], starts_s)
    unstable = lost or _grew(run, plan)
    reuse = None if lost else measured_reuse(run)
    return Evidence(
        rate=rate, sent=plan.demand, measured=measured, kept=kept, window=window, unstable=unstable,
        cached_tokens=reuse.hit_tokens / reuse.prompts if reuse is not None and reuse.prompts else None,
    )  # fmt: skip


def worked_of(run: Run) -> Worked:
    """What was worked off while load came all the time, by planned lengths: from warm-up or ramp to the drain."""
    plan = _Planned(run.path)
    closed = run.manifest.spec.mode == "closed"
    sides = (run.rows, run.warmup)
    sent_s = np.concatenate([side.sent_s for side in sides])
    if not np.isfinite(sent_s).any():
        return Worked(seconds=0.0, requests=0, input_tokens=0.0, output_tokens=0.0)
    finished_s = np.concatenate([np.where(side.success, side.finished_s, np.nan) for side in sides])
    first_token_s = np.concatenate([side.sent_s + side.first_gap_s for side in sides])
    ids = np.concatenate([side.request_id for side in sides])
    last_s = float(np.nanmax(sent_s))
    first_s = RAMP * last_s if closed else float(plan.due_s[plan.measured].min(initial=last_s))
    return worked_between(
        first_s, last_s, first_token_s, finished_s, plan.demand.input_tokens[ids], plan.demand.output_tokens[ids]
    )


def worked_between(
    first_s: float, last_s: float, first_token_s: Floats, finished_s: Floats, inputs: Floats, outputs: Floats
) -> Worked:
    """What answers that ended (``finished_s``; NaN: not) got of [first_s, last_s): prompts that were read, and tokens,
    as if they came evenly from first to last. Whole answers alone would say too little where they are long: those that
    begin together at first are not counted at the other end.
    """
    ended = np.isfinite(finished_s)
    begun_s = np.where(np.isfinite(first_token_s), np.minimum(first_token_s, finished_s), finished_s)[ended]
    end_s, inputs, outputs = finished_s[ended], inputs[ended], outputs[ended]
    inside = (end_s >= first_s) & (end_s < last_s)
    took_s = end_s - begun_s
    overlap_s = np.minimum(end_s, last_s) - np.maximum(begun_s, first_s)
    share = np.where(took_s > 0, np.maximum(overlap_s, 0) / np.where(took_s > 0, took_s, 1), inside)
    return Worked(
        seconds=last_s - first_s, requests=int(inside.sum()),
        input_tokens=float(inputs[(begun_s >= first_s) & (begun_s < last_s)].sum()),
        output_tokens=float(outputs @ share),
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
        after = table.column("after").fill_null(-1).to_numpy().astype(np.int64)
        self.demand = Demand(
            arrival_s=self.due_s, input_tokens=lengths(table, "input_tokens"),
            output_tokens=lengths(table, "output_tokens"), after=after if (after >= 0).any() else None,
        )  # fmt: skip


def _grew(run: Run, plan: _Planned) -> bool:
    """Whether the backlog only grew from the end of the warm-up on, its requests among it."""
    finished_s = np.concatenate([run.rows.finished_s, run.warmup.finished_s])
    first_s = float(plan.due_s[plan.measured].min(initial=np.inf))
    return only_grew(plan.due_s, finished_s, first_s, float(plan.due_s.max(initial=0.0)))


def _kept(run: Run, criteria: Sequence[Criterion], planned: Bools, last_s: float) -> tuple[Bools, tuple[Bools, ...]]:
    """Which planned requests were offered and measured, and which of those kept each criterion; lost ones did not.

    Turns that became due after the plan's last, because they waited for an answer, met a server with less and less to
    do: they are not measured.
    """
    offered = planned.copy()
    rows: Rows = run.rows
    offered[rows.request_id[metrics.not_offered(run)]] = False
    if run.turns is not None:
        offered[rows.request_id[rows.scheduled_s > last_s]] = False
    kept = []
    for criterion in criteria:
        met = np.zeros(len(planned), dtype=np.bool_)
        met[rows.request_id] = metrics.meets_slo(rows, criterion.limits)
        kept.append(met[offered])
    return offered, tuple(kept)


def window_of(due_s: Floats, starts_s: Sequence[float]) -> Ints:
    """Which window each request is of, by when the windows begin; four equal parts where there are fewer than two."""
    if len(starts_s) < 2:
        starts_s = np.linspace(0.0, float(due_s.max(initial=0.0)) + 1e-9, 4, endpoint=False).tolist()
    found: Ints = np.searchsorted(np.sort(starts_s), due_s, side="right") - 1
    return np.maximum(found, 0)


def limit_used(run: Run, criteria: Sequence[Criterion]) -> float:
    """Largest share of a limit that the wanted share of offered requests used, over the criteria; inf: not answered.

    Steers the search only: no figure of a report, so no sample is too small for it.
    """
    worst = 0.0
    offered = ~metrics.not_offered(run)
    for criterion in criteria:
        used = np.sort(
            np.concatenate((metrics.slo_ratio(run.rows, criterion.limits)[offered], np.full(run.lost, np.inf)))
        )
        if len(used):
            worst = max(worst, float(used[max(0, math.ceil(criterion.wanted * len(used) - 1e-9) - 1)]))
    return worst


def requests_needed(criteria: Sequence[Criterion]) -> int:
    """Requests that a probe must offer to judge every criterion (`intervals.samples_needed`)."""
    return max(samples_needed(min(criterion.wanted, 0.999)) for criterion in criteria)
