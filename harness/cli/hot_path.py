"""Which of its two readers a load worker of this installation uses."""

from __future__ import annotations

import os


def hot_path() -> str:
    """How load workers of this installation read: "compiled", or "python" where that could not be built."""
    try:
        import scenarios.client._reader  # type: ignore  # noqa: F401
    except ImportError:
        return "python"
    return "python" if os.environ.get("HARNESS_INTERPRETED") else "compiled"
