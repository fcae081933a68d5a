"""Where the harness keeps things of its own on this machine."""

from __future__ import annotations

import os
from pathlib import Path


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
