"""What an audit can prove: hours and power before it is begun, and the records whose checks tell nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.audit.asked import AuditOptions
from harness.audit.records import AuditedRecord, cap
from harness.checks.grade import Grader
from harness.checks.lint import GARBAGE, LintGroup
from harness.cli.output import print_json, print_table
from harness.errors import EXIT_VALID
from harness.options import ReplayOptions, SearchOptions
from harness.sweep.cost import BETWEEN_S, ITL_S, start_s, usd_per_hour
from harness.sweep.spec import Pair

if TYPE_CHECKING:
    from harness.analysis.arrays import Bools
    from harness.cli.runner.audit import QualityPass

PROBES = 8
"""Probes that a search for capacity is assumed to take."""
CANDIDATE_PSI = (0.05, 0.1, 0.2)
"""Shares of grades that may differ between two models, for which the power is told."""


def blind_records(
    graded: Sequence[AuditedRecord], faults: Sequence[LintGroup], first: QualityPass
) -> tuple[frozenset[str], Bools]:
    """(slices, records) whose checks tell nothing: garbage passes, or the current model is not surely better there than
    one constant answer; ``first``: its answers.
    """
    import numpy as np

    from harness.analysis.quality.estimate import mean

    grader = Grader()
    blind = np.array([
        record.check is not None and any(grader.grade(record.check, one).accepted for one in GARBAGE)
        for record in graded
    ], np.bool_)  # fmt: skip
    said = [None] * len(graded) if first.grades is None else first.grades.column("accepted").to_pylist()
    right = np.array([np.nan if one is None else float(one) for one in said], np.float64)
    session = np.array([record.session for record in graded], np.int64)
    names = set[str]()
    for group in faults:
        if "a constant answer passes" not in group.faults or group.constant is None:
            continue
        mask = np.array([group.name in _groups(record) for record in graded], np.bool_)
        known = mask & np.isfinite(right)
        if not known.any() or mean(right[known], session[known], np.ones(int(known.sum()))).low <= group.constant:
            names.add(group.name)
            blind |= mask
    return frozenset(names), blind


def _groups(record: AuditedRecord) -> set[str]:
    tags = (f"{name} {value}".strip() for name, value in record.source.tags or ())
    return {f"check {record.kind}", *tags}


def dry_run(
    graded: Sequence[AuditedRecord], want: AuditOptions, models: Sequence[Pair], asked: ReplayOptions,
    search: SearchOptions,
    rate: float,
) -> int:  # fmt: skip
    """What would be asked, how long that takes and what it costs, and what so many records can prove."""
    from harness.analysis.quality.paired import ALPHA
    from harness.analysis.quality.power import provable_margin, records_needed
    from harness.cli.documents import AuditPlan, AuditPower, PlannedModel
    from harness.cluster.catalogue.tiers import get_tier

    n, sessions = len(graded), len({record.session for record in graded})
    tokens = sum(cap(record, want.max_answer) for record in graded)
    rows: list[PlannedModel] = []
    for k, pair in enumerate(models):
        tier = get_tier(pair.tier) if pair.tier else None
        searched = tier is not None and not want.quick
        load_s = PROBES * (search.probe_s + BETWEEN_S) if searched else n / rate + BETWEEN_S
        passes = want.repeats * (2 if k == 0 else 1)
        hours = (2 * start_s(pair, tier) + passes * (tokens * ITL_S / want.in_flight + BETWEEN_S) + load_s) / 3600
        usd = hours * usd_per_hour(pair, tier) if tier else None
        rows.append(PlannedModel(model=pair.name, requests=passes * n, hours=hours, usd=usd))
    alpha = ALPHA / max(1, len(models) - 1)
    power = [
        AuditPower(
            discordance=psi, provable_margin=provable_margin(n, psi, alpha=alpha, sessions=sessions),
            records_needed=records_needed(psi, want.margin, alpha=alpha, per_session=n / sessions),
        )
        for psi in CANDIDATE_PSI
    ]  # fmt: skip
    if asked.report.format_ == "json":
        print_json(AuditPlan(records=n, sessions=sessions, margin=want.margin, models=rows, power=power))
        return EXIT_VALID
    print_table(
        ("model", "graded requests", "about hours", "USD"),
        [(row.model, f"{row.requests:,}", f"{row.hours:.2f}", "-" if row.usd is None else f"{row.usd:.4f}")
         for row in rows],
    )  # fmt: skip
    print(f"{n:,} graded records in {sessions:,} sessions. Where both models are equally good, with 80 % power:")
    for one in power:
        margin = one.provable_margin
        needed = "more than can be said" if one.records_needed is None else f"about {one.records_needed:,}"
        proves = "prove no margin" if margin is None else f"prove a margin of {100 * margin:.1f} points"
        print(
            f"  {100 * one.discordance:g} % of grades differ: {n:,} records {proves}; "
            f"{100 * want.margin:g} points need {needed}"
        )
    print("Records of a session that are alike are worth less: the audit measures by how much. Hours assume "
          f"{1 / ITL_S:.0f} tokens/s per request and answers as long as their caps.")  # fmt: skip
    return EXIT_VALID
