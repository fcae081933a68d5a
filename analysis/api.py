"""The Python API: ``from harness.analysis.api import load`` opens a run directory for a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa

from harness.analysis.compare.variants import MetricFigures, variant_of
from harness.analysis.cost.cost import DEFAULT_RATIO
from harness.analysis.report.export import run_table
from harness.analysis.rows.read import Run, read_run
from harness.analysis.summary import DEFAULT_ATTAIN, Summary, claims, summarise
from harness.record.manifest import RunManifest


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """One run: its rows as a table, its figures, what was asked."""

    run: Run
    """The run as the analysis sees it."""

    @property
    def manifest(self) -> RunManifest:
        """What was asked and what happened (``run.json``)."""
        return self.run.manifest

    def table(self) -> pa.Table:
        """Every result row with ttft_s, tpot_s, e2e_s, lag_s ... beside it (columns: `analysis.report.export`).

        Rows with ``measured`` false are warm-up or count in no figure. Takes memory for all stamps; a run too big for
        that is read in batches from the file that ``harness export`` writes.
        """
        return run_table(self.run)

    def summary(
        self, slo: Mapping[str, float] | None = None, *, attain: float = DEFAULT_ATTAIN, ratio: float = DEFAULT_RATIO
    ) -> Summary:
        """All figures, as ``harness report``: verdict, latency, rates, price, each with its interval.

        ``slo``: limits by metric, s, instead of those of the run. Raises `UsageError` on limits that make no sense.
        """
        return summarise(self.run, slo=slo, attain=attain, ratio=ratio)

    def as_dict(
        self, slo: Mapping[str, float] | None = None, *, attain: float = DEFAULT_ATTAIN, ratio: float = DEFAULT_RATIO
    ) -> dict[str, object]:
        """`summary` as plain dicts and lists: what ``harness report --format json`` prints."""
        plain: dict[str, object] = msgspec.to_builtins(claims(self.summary(slo, attain=attain, ratio=ratio)))
        return plain

    def variant(self, name: str) -> dict[str, MetricFigures]:
        """The run's figures as another tool defines them: ``vllm-bench``, ``guidellm``, ``aiperf``
        (METRICS.md has the formulas). Raises `UsageError` on other names.
        """
        return variant_of(name, self.run)

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.run.path)!r}, {len(self.run.rows):,} measured requests)"


def load(run: str | os.PathLike[str]) -> LoadedRun:
    """Open a run directory. Raises `ResultsError` or `PlanError` when it is none, or not a whole one."""
    return LoadedRun(read_run(Path(run)))
