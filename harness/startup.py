"""What a process of ours does without, from its start on."""

from __future__ import annotations

import importlib.abc
import sys
from importlib.machinery import ModuleSpec


class _Forgone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds pandas, whether installed or not, and refuses to import it: `importlib.util.find_spec` raises nothing."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "pandas" else None

    def create_module(self, spec: ModuleSpec) -> None:
        raise ModuleNotFoundError("this process does without pandas", name=spec.name)

    def exec_module(self, module: object) -> None:
        """Never come to."""


def forgo_pandas() -> None:
    """Arrow imports pandas with its first array if it is installed: 0.4 s and 40 MB for nothing we use."""
    if "pandas" not in sys.modules and not any(isinstance(finder, _Forgone) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Forgone())
