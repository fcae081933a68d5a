"""Prompts that a server has had before: a prefix cache may know them, and then answers come too soon."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from harness.run import MANIFEST, RunDir, RunManifest

LOOKED_AT = 200
"""Runs, the newest: there may be many."""


class _Plan(msgspec.Struct):
    trace_sha256: str
    seed: int


class _Spec(msgspec.Struct):
    base_urls: list[str]


class _Manifest(msgspec.Struct):
    """What of a manifest is asked for."""

    plan: _Plan
    spec: _Spec
    start_unix_ns: int | None = None


def seen_before(run: RunDir, manifest: RunManifest) -> str | None:
    """What to say of an earlier run beside this one that sent prompts of the same trace and seed to one of its servers.

    Only of servers that were there already: those started for a run begin with an empty cache.
    """
    if manifest.engine != "url":
        return None
    for path in _newest(run.path.parent.iterdir()):
        if path == run.path or not (path / MANIFEST).is_file():
            continue
        try:
            other = msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Manifest)
        except (OSError, msgspec.DecodeError):
            continue
        same = (other.plan.trace_sha256, other.plan.seed) == (manifest.plan.trace_sha256, manifest.plan.seed)
        if same and other.start_unix_ns is not None and set(other.spec.base_urls) & set(manifest.spec.base_urls):
            return (
                f"this server has had prompts of the same trace and seed before ({path.name}): a prefix cache may know "
                f"them; --seed {manifest.plan.seed + 1} makes up others (texts of the trace itself stay the same)"
            )
    return None


def _newest(paths: Iterable[Path]) -> list[Path]:
    """Run directories are named by the time of their beginning."""
    return sorted((path for path in paths if path.is_dir()), reverse=True)[:LOOKED_AT]
