"""Whether the servers found more of the prompts in their prefix caches than the plan's own repetition explains.

A cache that is cold when a run begins finds no more than what prompts of the run share with those before them. If it
found more, that was cached already: the same plan was sent before, or someone else sends it. Then TTFT and costs are
those of prompts that were mostly not computed.

Also how much of the input a prompt cache held: in production, as the trace records it, and in the replay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc

from harness.analysis.check import Check, limit
from harness.analysis.rows.read import Run
from harness.analysis.validity.counters import moved_by, shared_addresses
from harness.errors import PlanError
from harness.plan.reuse import BLOCK_BYTES, UnknownTokensError, plan_prompts, prompt_reuse, text_reuse, text_words
from harness.record.manifest import RunDir
from harness.record.samples import read_server_metrics


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


QUERIES = "vllm:prefix_cache_queries_total"
HITS = "vllm:prefix_cache_hits_total"
BLOCK_SIZE = "vllm:cache_config_info block_size"
BLOCKS = "vllm:cache_config_info num_gpu_blocks"
"""What the server says of its cache, beside its counters."""
OWN_BLOCK_TOKENS = {"vllm": 16, "vllm-cpu": 128}
"""Engines that were started without a block size -> the one they take."""
NAME = "prefix_cache"
POINTS = 0.02
"""Of input tokens: so much more is found where requests overlap in another order."""
FINEST = 16
"""Tokens in a block where nobody knows; a smaller one finds up to so many more of each prompt."""
HEAD = 64
"""Tokens that an unknown chat template may put before every prompt, the same for all."""
DENSER = 2.0
"""Texts that prompts share may have so many more tokens a byte than the others."""
UNKNOWN = "times to first token may be of a warm cache; restart the servers before the run to be sure"
REASON = "the prefix cache knew more of the prompts than a cold one can"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounters:
    """What servers said of their prefix caches."""

    replicas: int
    queried_tokens: float | None
    """null when no server counts them."""
    hit_tokens: float | None
    fullest: float | None = None
    """Largest share of the KV cache in use."""
    cache_tokens: float | None = None
    """What the caches hold; null when the servers do not say."""


def warm_cache(run: Run) -> Check:
    """The share of input tokens found in the servers' caches is at most that of an unlimited one that began empty."""
    found, _ = hit_share(run)
    bound = "what the plan's own prompts share"
    advice = (
        "the servers had these prompts before, or others send them, so latencies and costs are of a warm cache: "
        "replay with another --seed, restart the servers, or reset their cache"
    )
    if found is None:
        return limit(NAME, None, "the servers count no prefix-cache hits", bound, UNKNOWN)
    if found <= POINTS:
        return limit(NAME, True, f"{found:.1%} of input tokens found", bound, advice)
    cold = _cold(run)
    if cold is None:
        observed = f"{found:.1%} of input tokens found; the prompts' own share is the server's tokenizer's to count"
        return limit(NAME, None, observed, bound, UNKNOWN)
    observed = f"{found:.1%} of input tokens found, {cold.share:.1%} in a cold unlimited cache"
    if cold.text:
        observed += f" by the bytes of their text, {cold.most:.1%} at most"
        advice = advice.replace("replay with another --seed, restart", "restart")  # which leaves texts as they are
    return limit(NAME, found <= cold.most, observed, bound, advice)


HitSource = Literal["counters", "usage"]


def hit_share(run: Run) -> tuple[float | None, HitSource | None]:
    """Share of input tokens found in caches, and who says so: the servers' counters, else the usage of every answer."""
    served = read_served(run)
    if served.queried_tokens and served.hit_tokens is not None:
        return served.hit_tokens / served.queried_tokens, "counters"
    sides = (run.rows, run.warmup)
    cached, inputs = (
        np.concatenate([getattr(side, name) for side in sides]) for name in ("cached_tokens", "input_tokens")
    )
    known = np.concatenate([side.success for side in sides]) & np.isfinite(inputs)
    if not known.any() or not bool(np.isfinite(cached[known]).all()):
        return None, None
    tokens, cached = float(inputs[known].sum()), float(cached[known].sum())
    return (cached / tokens, "usage") if tokens else (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """What an unlimited cache that begins empty finds, as a share of input tokens."""

    share: float
    most: float
    """With all that is not known of blocks, templates and tokens."""
    text: bool
    """Some prompts are text of the trace, whose tokens are the server's to count."""


def _cold(run: Run) -> Cold | None:
    """None where the prompts' tokens are not known."""
    info, path = run.manifest.plan, RunDir(run.path).plan
    if info.conversation == "live":
        return None
    try:
        made = prompt_reuse(plan_prompts(path, info.template), block_tokens(run) or FINEST)
        text = text_reuse(path)
        each = _text_tokens(run) if text.tokens else 0.0
        head = _head(run, path) if text.tokens else 0.0
    except (UnknownTokensError, PlanError):
        return None
    if made.prompts + text.prompts != info.requests or each is None:
        return None
    of_text = each * text.prompts
    tokens = made.tokens + of_text
    if not tokens:
        return None
    shared = text.hit_rate
    most_shared = DENSER * shared / (DENSER * shared + 1 - shared)
    spare = _spare(run) * made.prompts + head * text.prompts
    if text.tokens:
        spare += BLOCK_BYTES * text.prompts * of_text / text.tokens
    return Cold(
        share=(made.hit_tokens + shared * of_text) / tokens,
        most=(made.hit_tokens + most_shared * of_text + spare) / tokens + POINTS,
        text=bool(text.prompts),
    )


def _text_tokens(run: Run) -> float | None:
    """Mean input tokens of prompts of the trace's text, as the server counted them; None where it did not."""
    counted = [side.input_tokens[side.success & np.isnan(side.planned_input_tokens)] for side in (run.rows, run.warmup)]
    tokens = np.concatenate(counted)
    tokens = tokens[np.isfinite(tokens)]
    return float(tokens.mean()) if len(tokens) and tokens.sum() else None


def _head(run: Run, path: Path) -> float:
    """Tokens of each text that may be a chat template's, the same for all: what a prompt has beyond its words."""
    if run.manifest.spec.endpoint != "chat":
        return 0.0
    words = text_words(path, run.manifest.plan.requests)
    beyond = np.concatenate([side.input_tokens - words[side.request_id] for side in (run.rows, run.warmup)])
    known = beyond[np.isfinite(beyond)]
    return float(min(max(known.min(), 0.0), HEAD)) if len(known) else float(HEAD)


def _spare(run: Run) -> int:
    """Tokens of each made-up prompt that may be found beyond that."""
    chat = run.manifest.spec.endpoint == "chat" and run.manifest.plan.template is None
    return (HEAD if chat else 0) + (FINEST if block_tokens(run) is None else 0)


# ------------------------------------------------------------------------------------ what the servers say of theirs


def block_tokens(run: Run) -> int | None:
    """Tokens in a block of the servers' prefix caches: as they say, else as they were started; None: not known.

    Caches find whole blocks only, so what a plan repeats is counted in blocks of this size.
    """
    said = {int(size) for size in _said(run, BLOCK_SIZE) if size is not None and size >= 1}
    if said:
        return said.pop() if len(said) == 1 else None
    found = re.search(r"--block-size[= ](\d+)", " ".join(run.manifest.engine_args))
    return max(1, int(found[1])) if found else OWN_BLOCK_TOKENS.get(run.manifest.engine)


def read_served(run: Run) -> CacheCounters:
    """What the servers' own counters and gauges say of their prefix caches."""
    replicas = run.manifest.replicas
    shared = bool(shared_addresses(run))
    return CacheCounters(
        replicas=max(2 * shared, sum(len(r.metrics_urls) or 1 for r in replicas)),
        queried_tokens=None if shared else moved_by(run, QUERIES),
        hit_tokens=None if shared else moved_by(run, HITS),
        fullest=max((f for r in replicas if (f := _fullest(run, r.index)) is not None), default=None),
        cache_tokens=_cache_tokens(run),
    )


def _said(run: Run, name: str) -> list[float | None]:
    """A figure that each replica stated before the load."""
    return [(replica.counters_before or {}).get(name) for replica in run.manifest.replicas]


def _cache_tokens(run: Run) -> float | None:
    """Tokens that the caches of all replicas hold; None when any does not say."""
    held = [
        None if size is None or blocks is None else size * blocks
        for size, blocks in zip(_said(run, BLOCK_SIZE), _said(run, BLOCKS), strict=True)
    ]
    known = [tokens for tokens in held if tokens is not None]
    return sum(known) if known and len(known) == len(held) else None


def _fullest(run: Run, replica: int) -> float | None:
    """Largest share of the KV cache that was in use, as sampled; None without a sample."""
    table = read_server_metrics(RunDir(run.path).server_metrics(replica))
    return None if table is None else pc.max(table.column("kv_cache_usage")).as_py()
