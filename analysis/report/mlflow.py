"""Runs in MLflow: what was asked as parameters, figures as metrics, the verdict as a tag, manifest and page as files.

Where is said by MLflow's own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME). Prompts and rows stay here.
"""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from harness.analysis.flat import figures
from harness.analysis.report.page import write_page
from harness.analysis.report.view import view_run
from harness.analysis.rows.read import Run
from harness.analysis.summary import Summary, claims
from harness.errors import HarnessError, sentence
from harness.install import require
from harness.record.manifest import MANIFEST

EXPERIMENT = "harness"
METRICS_AT_ONCE = 500
"""More in one call are refused by its servers."""


class MlflowExporter:
    """Sends runs; a context manager. Raises `HarnessError` where MLflow is missing, or its server refuses."""

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a load test calls nobody
        self._mlflow: Any = require("mlflow", extra="mlflow")
        with _Explained():
            self._client = self._mlflow.MlflowClient()
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(name)

    def __enter__(self) -> MlflowExporter:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is held open."""

    def send(self, run: Run, summary: Summary, label: str) -> int:
        """One run; the number of runs that are new there: 0 where it is already."""
        with _Explained():
            same = f"tags.`harness.run_id` = '{summary.run_id}'"
            if self._client.search_runs([self._experiment], same, max_results=1):
                return 0
            began = run.manifest.start_unix_ns
            began_ms = (
                int(datetime.fromisoformat(summary.created).timestamp() * 1e3) if began is None else began // 10**6
            )
            made = self._client.create_run(self._experiment, began_ms, tags=_tags(summary), run_name=label)
            self._log(made.info.run_id, run, summary, label, began_ms)
            self._client.set_terminated(
                made.info.run_id, "FAILED" if summary.verdict == "INVALID" else "FINISHED",
                began_ms + (run.manifest.end_ns or 0) // 10**6,
            )  # fmt: skip
        return 1

    def _log(self, to: str, run: Run, summary: Summary, label: str, at_ms: int) -> None:
        entities = self._mlflow.entities
        params = [entities.Param(name, str(value)) for name, value in _params(summary).items() if value is not None]
        metrics = [] if summary.verdict == "INVALID" else _metrics(summary)  # else they prove nothing
        self._client.log_batch(to, params=params)
        for k in range(0, len(metrics), METRICS_AT_ONCE):
            some = [entities.Metric(name, value, at_ms, 0) for name, value in metrics[k : k + METRICS_AT_ONCE]]
            self._client.log_batch(to, metrics=some)
        with tempfile.TemporaryDirectory(prefix="harness-") as folder:
            page, report = Path(folder) / "report.html", Path(folder) / "report.json"
            write_page(page, [view_run(run, summary, label)])
            report.write_bytes(msgspec.json.encode(claims(summary)))
            for file in (page, report, run.path / MANIFEST):
                self._client.log_artifact(to, str(file))


class _Explained:
    """What MLflow raises, as one sentence."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, HarnessError):
            where = os.environ.get("MLFLOW_TRACKING_URI", "its default, as MLFLOW_TRACKING_URI is not set")
            raise HarnessError(f"MLflow at {where}: {sentence(error)}") from error


def _tags(s: Summary) -> dict[str, str]:
    tags = {"verdict": s.verdict, "evidence": s.evidence, "run_id": s.run_id, "trace": s.plan.trace, "engine": s.engine}
    if s.slo is not None and s.slo.met is not None:
        tags["slo_met"] = str(s.slo.met).lower()
    return {f"harness.{name}": value for name, value in tags.items()}


def _params(s: Summary) -> dict[str, object]:
    return {
        "model": s.model, "label": s.label, "tier": s.tier.name if s.tier else None, "engine_version": s.server.version,
        "mode": s.load.mode, "max_in_flight": s.load.concurrency, "planned_rate": s.plan.planned_rate,
        "seed": s.plan.seed, "requests": s.plan.requests, "trace_sha256": s.plan.trace_sha256,
        "plan_sha256": s.plan_sha256, **{f"slo_{key}": limit for key, limit in s.load.slo.items()},
    }  # fmt: skip


def _metrics(s: Summary) -> list[tuple[str, float]]:
    """Values and the ends of their intervals."""
    found = []
    for name, q in figures(s).items():
        ends = ((name, q.value), (f"{name}_low", q.low), (f"{name}_high", q.high))
        found += [(key, float(value)) for key, value in ends if value is not None]
    return found
