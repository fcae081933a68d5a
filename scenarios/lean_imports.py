"""Locust without what a load worker has no use for: half of its start-up time.

Import it before anything else. Where Locust is there already, as under plain ``locust -f``, it changes nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableSequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

UNUSED = (
    "geventhttpclient", "locust.clients", "locust.contrib", "locust.rpc", "locust.web", "requests", "urllib3",
)  # fmt: skip
"""Locust's page, HTTP users and distributed mode: nothing of them runs in a load worker."""


class _Placeholder(ModuleType):
    """A module whose every name is a class to inherit from and to catch."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 - as the base class has it

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Exception,), {})
        setattr(self, name, made)
        return made


class _Placeholders:
    """The finder and loader of what is unused."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.startswith(UNUSED) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is in it."""


def import_locust() -> None:
    """Import Locust, which patches the standard library, with placeholders for `UNUSED`, and with one search for
    gevent's plugins: gevent looks through all installed packages each time it patches a module, some twenty times.
    """
    if "locust" in sys.modules:
        return
    search, installed = metadata.entry_points, metadata.entry_points()
    metadata.entry_points = installed.select
    placeholders, skip = _Placeholders(), "LOCUST_SKIP_URLLIB3_PATCH"
    sys.meta_path.insert(0, placeholders)
    os.environ[skip] = "1"
    try:
        import locust.env  # noqa: F401
    finally:
        metadata.entry_points = search
        sys.meta_path.remove(placeholders)
        del os.environ[skip]
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Placeholder)]:
            del sys.modules[name]  # whoever wants the real one later gets it


import_locust()
