"""Documents that a verb prints as JSON and no other module defines. ``schema`` is name and version: their JSON Schemas
are in `harness/schemas`, and keep what they promise (`tests/test_schemas.py`). Not known is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from harness.analysis.capacity.serving_config import ServingConfig
    from harness.analysis.compare.variants import MetricFigures
    from harness.cluster.catalogue.models import ListedModel
    from harness.cluster.catalogue.tiers import ListedTier
    from harness.cluster.hardware.calibration import ModelCalibration
    from harness.cluster.process.registry import Identity
    from harness.record.manifest import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class TierList:
    """Of ``harness tiers``."""

    schema: Literal["harness.tiers/1"] = "harness.tiers/1"
    tiers: Sequence[ListedTier]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChange:
    """What a refresh did to one tier."""

    name: str
    before: Tier | None
    after: Tier | None
    problem: str | None
    change: float | None
    """New price over old, minus 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChanges:
    """Of ``harness tiers refresh``."""

    schema: Literal["harness.tier-changes/1"] = "harness.tier-changes/1"
    changes: Sequence[TierChange]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    """Of ``harness models``."""

    schema: Literal["harness.models/1"] = "harness.models/1"
    models: Sequence[ListedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class RentedCluster:
    """A cluster that was rented from this machine."""

    name: str
    region: str
    tier: str
    nodes: int
    running: int
    usd_so_far: float
    """An upper bound: as if all machines had run since they were asked for."""
    usd_per_hour: float
    ends: str
    price_date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterList:
    """Of ``harness cluster status``."""

    schema: Literal["harness.clusters/1"] = "harness.clusters/1"
    clusters: Sequence[RentedCluster]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRow:
    """One process group that the harness started."""

    id: str
    name: str
    place: str
    host: str
    started: float
    """Unix time, s."""
    owner: Identity
    guard: Identity
    command: Identity
    mark: str
    argv: Sequence[str]
    run_dir: str | None
    orphan: bool
    holds: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessList:
    """Of ``harness ps``."""

    schema: Literal["harness.processes/1"] = "harness.processes/1"
    processes: Sequence[ProcessRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvisedTier:
    """A model on a tier, simulated."""

    rank: str | None
    """Equal ranks are tied; null: a bound, which is never ranked."""
    model: str
    tier: str
    split: str | None
    """Accelerators of one replica x replicas; null without accelerators."""
    requests_per_s: float
    usd_per_1m_output: float
    low: float
    high: float | None
    step_times: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NotAdvised:
    """A model on a tier that cannot serve it or is not known well enough, and why."""

    model: str
    tier: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Of ``harness advise``."""

    schema: Literal["harness.advice/1"] = "harness.advice/1"
    evidence: Literal["simulated"] = "simulated"
    offers: Sequence[AdvisedTier]
    without: Sequence[NotAdvised]
    sweep: str | None
    """A sweep file that measures the best two."""
    calibrations: Sequence[ModelCalibration]
    """What one's own runs say of a model's steps (`harness calibrate-model`), where they were given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run of a sweep that is still to be done."""

    name: str
    model: str | None
    tier: str | None
    replicas: int | None
    request_rate: float | None
    concurrency: int | None
    repeat: int
    seed: int
    requests: int
    hours: float
    usd: float | None
    assumed: bool
    """The speed of the server is a guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPair:
    """All runs of one model on one tier."""

    model: str | None
    tier: str | None
    replicas: int | None
    runs: int
    start_up_hours: float
    hours: float
    usd_per_hour: float | None
    usd: float | None
    price_date: str | None
    price_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Of ``harness sweep --dry-run``."""

    schema: Literal["harness.sweep-plan/1"] = "harness.sweep-plan/1"
    name: str
    runs: Sequence[PlannedRun]
    pairs: Sequence[PlannedPair]
    hours: float
    usd: float | None
    spent_hours: float
    spent_usd: float | None
    budget_hours: float | None
    budget_usd: float | None
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """What an audit would ask of one model."""

    model: str
    requests: int
    hours: float
    usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPower:
    """What so many records can prove where both models are equally good, with 80 % power."""

    discordance: float
    """Share of the grades that differ."""
    provable_margin: float | None
    records_needed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPlan:
    """Of ``harness audit --dry-run``."""

    schema: Literal["harness.audit-plan/1"] = "harness.audit-plan/1"
    records: int
    sessions: int
    margin: float
    models: Sequence[PlannedModel]
    power: Sequence[AuditPower]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regraded:
    """One model before and after: shares accepted and, of a candidate, the difference with both ends."""

    model: str
    accepted: float | None
    accepted_before: float | None
    difference: tuple[float, float, float] | None
    difference_before: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditGrades:
    """Of ``harness audit grade``: kept answers held against other checks."""

    schema: Literal["harness.audit-grades/1"] = "harness.audit-grades/1"
    after_the_results: Literal[True] = True
    """The checks were chosen after the results, so they decide nothing."""
    margin: float
    models: Sequence[Regraded]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsReport:
    """Of ``harness report`` on several runs: the systems among them, their capacity and cost."""

    schema: Literal["harness.runs/1"] = "harness.runs/1"
    made: str
    """UTC, ISO 8601."""
    sentences: Sequence[str]
    systems: Sequence[ServingConfig]
    invalid: Sequence[str]
    """Runs that were left out."""
    too_small: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantReport:
    """Of ``harness report --variant``: a run's figures by another tool's definitions, s or per s."""

    schema: Literal["harness.variant/1"] = "harness.variant/1"
    tool: str
    metrics: Mapping[str, MetricFigures]


def numbered(schema: str, value: object) -> dict[str, object]:
    """A document of ``value`` with its schema's name and version in front."""
    import msgspec

    fields: dict[str, object] = msgspec.to_builtins(value)
    return {"schema": schema, **fields}
