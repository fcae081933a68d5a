"""How much of the input a prompt cache held: in production, as the trace records it, and in the replay."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.load import Run
from analysis.warm_cache import HitSource, hit_share


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShares:
    """Shares of input tokens. They may differ for good reasons: production's cache served other users, too."""

    recorded_share: float | None
    """Of the rows of the trace that state it; null where none does, and of plans of older versions."""
    recorded_rows: int | None
    replay_share: float | None
    """null where neither the servers' counters nor the usage of every answer says it."""
    replay_source: HitSource | None


def cache_shares(run: Run) -> CacheShares:
    """Of the trace a run was planned from, and of the run."""
    source = run.manifest.plan.source
    recorded = None if source is None else source.recorded_cache
    replay_share, replay_source = hit_share(run)
    return CacheShares(
        recorded_share=None if recorded is None else recorded.share,
        recorded_rows=None if recorded is None else recorded.rows,
        replay_share=replay_share,
        replay_source=replay_source,
    )
