"""What `analysis.fidelity.questions` asks of a run, read from its directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow.compute as pc

from analysis.columns import bools, floats, plan_column, plan_size
from analysis.counters import moved_by
from analysis.fidelity.answer import Plan
from analysis.load import Run
from analysis.warm_cache import HITS, block_tokens
from harness.errors import PlanError
from harness.run import RunDir
from harness.traces.prefix import Ints
from harness.traces.reuse import Ids, Reuse, UnknownTokensError, plan_prompts, prompt_reuse


def read_plan(run: Run) -> Plan:
    """The plan's columns in the order of its requests. Raises `PlanError`."""
    path = RunDir(run.path).plan
    n = plan_size(path)
    read = partial(plan_column, path, n=n)
    slices = read("slice", values=lambda chunk: chunk.to_numpy(), dtype=np.int64)
    if slices.min(initial=0) < 0 or slices.max(initial=0) >= n:
        raise PlanError(f"{path}: slices are not numbered 0, 1, 2 ...; build the plan again")
    scheduled = read("scheduled_ns", values=lambda chunk: pc.fill_null(chunk, -1).to_numpy(), dtype=np.int64)
    return Plan(
        scheduled_ns=None if scheduled.min(initial=0) < 0 else scheduled,
        slice=slices,
        waits=read("after", values=lambda chunk: bools(pc.is_valid(chunk)), dtype=np.bool_),
        input_tokens=read("input_tokens", values=floats),
        output_tokens=read("output_tokens", values=floats),
    )


def read_reuse(run: Run) -> tuple[Reuse | None, Reuse | str]:
    """Prefix reuse of the plan's prompts: in the trace's blocks, and in the server's, or why that is not known."""
    source = run.manifest.plan.source
    if run.manifest.plan.conversation == "live":
        return None, "live conversations: prompts are whole only when they are sent"
    if source is None or source.prefix is None:
        return None, "the trace states no prefixes and no sessions"
    plan, template = RunDir(run.path).plan, run.manifest.plan.template
    try:
        prompts = plan_prompts(plan, template, shared_head=False)
        own = prompt_reuse(prompts, min(source.prefix.block_tokens), partial=True)
    except UnknownTokensError:
        return None, "prompts are text of several tokens a word: their tokens are the server's"
    if not own.tokens:
        return own, "prompts are text: their tokens are the server's"
    if moved_by(run, HITS) is None and not bool(np.isfinite(run.rows.cached_tokens).any()):
        return own, "the server counts no prefix-cache hits"
    size = block_tokens(run)
    if size is None:
        return own, "the server does not say how large the blocks of its prefix cache are"
    return own, prompt_reuse(plan_prompts(plan, template), size)


def measured_reuse(run: Run) -> Reuse | None:
    """What measured prompts find in an unlimited cache that has those of the warm-up, in the trace's blocks.

    None where the trace states no reuse, or a prompt's tokens are the server's to count. Raises `PlanError`.
    """
    info = run.manifest.plan
    if info.conversation == "live" or info.source is None or info.source.prefix is None:
        return None
    size = min(info.source.prefix.block_tokens)

    def of_first(n: int) -> Reuse:
        prompts = plan_prompts(RunDir(run.path).plan, info.template, shared_head=False)
        return prompt_reuse(_first(prompts, n), size, partial=True)

    try:
        whole, warmup = of_first(info.requests), of_first(info.warmup_requests)
    except UnknownTokensError:
        return None
    if whole.prompts < info.requests or not whole.tokens:
        return None
    return Reuse(
        block_tokens=size, prompts=whole.prompts - warmup.prompts, tokens=whole.tokens - warmup.tokens,
        hit_tokens=whole.hit_tokens - warmup.hit_tokens,
    )  # fmt: skip


def _first(prompts: Iterable[tuple[Ids, Ints]], n: int) -> Iterator[tuple[Ids, Ints]]:
    """The first ``n`` of prompts that come many at a time."""
    for ids, lengths in prompts:
        if n <= 0:
            return
        lengths = lengths[:n]
        yield ids[: int(lengths.sum())], lengths
        n -= len(lengths)
