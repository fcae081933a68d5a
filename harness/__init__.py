"""Load-test LLM serving on a production trace and turn the result into a price per million tokens.

The flow is files between steps: trace -> plan -> run -> rows -> report. Start with ``ARCHITECTURE.md``.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

__version__ = "0.2.0"


class _NoPandas:
    """Finds pandas, whether installed or not, and refuses to import it: `importlib.util.find_spec` raises nothing.

    (None in `sys.modules` is not enough: code compiled by Cython takes that for the module.)
    """

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "pandas" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        raise ModuleNotFoundError("this process does without pandas", name=spec.name)

    def exec_module(self, module: object) -> None:
        """Never come to."""


def forgo_pandas() -> None:
    """Arrow imports pandas with its first array if it is installed: 0.4 s and 40 MB for nothing we use."""
    if "pandas" not in sys.modules and not any(isinstance(finder, _NoPandas) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NoPandas())


def cache_dir() -> Path:
    """What can be had again: weights, calibration, copies from a store. HARNESS_CACHE, else as XDG has it."""
    if own := os.environ.get("HARNESS_CACHE"):
        return Path(own).expanduser()
    return _xdg("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """What is running or rented now. As XDG has it."""
    return _xdg("XDG_STATE_HOME", ".local/state")


def _xdg(variable: str, default: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "harness"
