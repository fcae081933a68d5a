"""Locust without what a load worker has no use for: a third of its start-up time.

Import it before anything else. Where Locust is there already, as under plain ``locust -f``, it changes nothing.
"""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType


def import_locust() -> None:
    """Import Locust, which patches the standard library, without its web page and with one search for gevent's plugins.

    The page (Flask) is part of Locust's `Environment` and imported with its first name. gevent looks through all
    installed packages for plugins each time it patches a module, some twenty times.
    """
    if "locust" in sys.modules:
        return
    page = ModuleType("locust.web")
    page.WebUI = object  # type: ignore[attr-defined]
    sys.modules["locust.web"] = page
    search, installed = metadata.entry_points, metadata.entry_points()
    metadata.entry_points = installed.select
    try:
        import locust  # noqa: F401
    finally:
        metadata.entry_points = search


import_locust()
