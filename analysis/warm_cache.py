"""Whether the servers found more of the prompts in their prefix caches than the plan's own repetition explains.

A cache that is cold when a run begins finds no more than what prompts of the run share with those before them. More
was there already: the same plan was sent before, or somebody else sends it. Then times to first token and costs are
those of prompts that were mostly not read.
"""

from __future__ import annotations

import numpy as np

from analysis.check import Check, limit
from analysis.fidelity.inputs import block_tokens, read_served
from analysis.load import Run
from harness.errors import PlanError
from harness.run import RunDir
from harness.traces.reuse import Reuse, UnknownTokensError, plan_prompts, prompt_reuse

NAME = "prefix_cache"
POINTS = 0.02
"""Of input tokens: so much more is found where requests overlap in another order."""
FINEST = 16
"""Tokens in a block where nobody knows; a smaller one finds up to so many more of each prompt."""
HEAD = 64
"""Tokens that an unknown chat template may put before every prompt, the same for all."""
UNKNOWN = "times to first token may be of a warm cache; restart the servers before the run to be sure"
REASON = "the prefix cache knew more of the prompts than a cold one can"


def warm_cache(run: Run) -> Check:
    """The share of input tokens found in the servers' caches is at most that of an unlimited one that began empty."""
    found = _found(run)
    bound = "what the plan's own prompts share"
    advice = (
        "the servers had these prompts before, or others send them, so latencies and costs are of a warm cache: "
        "replay with another --seed, restart the servers, or reset their cache"
    )
    if found is None:
        return limit(NAME, None, "the servers count no prefix-cache hits", bound, UNKNOWN)
    if found <= POINTS:
        return limit(NAME, True, f"{found:.1%} of input tokens found", bound, advice)
    ideal = _ideal(run)
    if ideal is None:
        observed = f"{found:.1%} of input tokens found; the prompts' own share is the server's tokenizer's to count"
        return limit(NAME, None, observed, bound, UNKNOWN)
    most = ideal.hit_rate + POINTS + _spare(run) * ideal.prompts / ideal.tokens
    observed = f"{found:.1%} of input tokens found, {ideal.hit_rate:.1%} in a cold unlimited cache"
    return limit(NAME, found <= most, observed, bound, advice)


def _found(run: Run) -> float | None:
    """Share of input tokens found in caches: by the servers' counters, else by the usage of every answer."""
    served = read_served(run)
    if served.queried_tokens and served.hit_tokens is not None:
        return served.hit_tokens / served.queried_tokens
    sides = (run.rows, run.warmup)
    cached, inputs = (
        np.concatenate([getattr(side, name) for side in sides]) for name in ("cached_tokens", "input_tokens")
    )
    known = np.concatenate([side.success for side in sides]) & np.isfinite(inputs)
    if not known.any() or not bool(np.isfinite(cached[known]).all()):
        return None
    tokens, cached = float(inputs[known].sum()), float(cached[known].sum())
    return cached / tokens if tokens else None


def _ideal(run: Run) -> Reuse | None:
    """What a cold unlimited cache finds in the plan's prompts; None where their tokens are not known."""
    info = run.manifest.plan
    if info.conversation == "live":
        return None
    try:
        reuse = prompt_reuse(plan_prompts(RunDir(run.path).plan, info.template), block_tokens(run) or FINEST)
    except (UnknownTokensError, PlanError):
        return None
    return reuse if reuse.tokens and reuse.prompts == info.requests else None


def _spare(run: Run) -> int:
    """Tokens of each prompt that may be found beyond that."""
    chat = run.manifest.spec.endpoint == "chat" and run.manifest.plan.template is None
    return (HEAD if chat else 0) + (FINEST if block_tokens(run) is None else 0)
