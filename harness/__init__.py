"""Load-test LLM serving on a production trace and turn the result into a price per million tokens.

The flow is files between steps: trace -> plan -> run -> rows -> report. Start with ``ARCHITECTURE.md``.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"


def load(run: str | os.PathLike[str]) -> Any:
    """Open a run directory for a notebook: an `analysis.api.LoadedRun` with ``table()``, ``summary()``, ``manifest``.

    Raises `harness.errors.ResultsError` or `harness.errors.PlanError` when it is none.
    """
    # By name and only when called: nothing in this package depends on the analysis, and importing it stays light.
    return importlib.import_module("analysis.api").load(run)
