"""What the fidelity report asks, what an answer is, and what is read of a run's directory for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.rows.columns import bools, floats, plan_column, plan_size
from harness.analysis.rows.read import Run
from harness.analysis.validity.counters import moved_by
from harness.analysis.validity.prefix_cache import HITS, block_tokens
from harness.errors import PlanError
from harness.plan.reuse import Ids, Reuse, UnknownTokensError, plan_prompts, prompt_reuse
from harness.record.manifest import RunDir

EXACT = 0.01
"""What is not drawn may differ by this much: rounding to nanoseconds, arrivals on the edge of a window."""
LENGTH_BOUND = 0.02
POINTS_BOUND = 0.02
"""Prefix reuse may differ by two points."""
MIN_REQUESTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One question and its answer. ``ok`` None: not comparable, and ``said`` is why."""

    name: str
    ok: bool | None
    observed: str
    bound: str
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Columns of a plan, in the order of its requests; not given is NaN."""

    scheduled_ns: Ints | None
    """null in a closed loop."""
    slice: Ints
    waits: Bools
    """Turns that are due when the one before them has ended."""
    input_tokens: Floats
    output_tokens: Floats


def not_comparable(name: str, why: str, observed: str = "not comparable") -> Fidelity:
    """An answer that is none, and why."""
    return Fidelity(name=name, ok=None, observed=observed, bound="", said=why)


def judged(name: str, ok: bool, observed: str, bound: str, wrong: str) -> Fidelity:
    """An answer; ``wrong`` is what is said where it is not ok."""
    ok = bool(ok)  # NumPy's own kind of truth is not JSON
    return Fidelity(name=name, ok=ok, observed=observed, bound=bound, said="" if ok else wrong)


def number(value: float | None) -> str:
    """Three digits, or that there is none."""
    return "not known" if value is None else f"{value:.3g}"


def ks_distance(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> float:
    """Kolmogorov-Smirnov distance of two samples, or of two lists of equally many quantiles."""
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate((a, b))
    shares = [np.searchsorted(x, at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max(initial=0.0))


def backwards(slices: Ints, times: Ints | Floats | None) -> int:
    """Requests that come before the one before them in their slice."""
    if times is None or not len(slices):
        return 0
    order = np.argsort(slices, kind="stable")
    which, time = slices[order], times[order]
    return int(np.count_nonzero((which[1:] == which[:-1]) & (time[1:] < time[:-1])))


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


def on_trace_clock(scheduled_ns: Ints, speed: float) -> Ints:
    """Planned times laid back onto the trace's clock, ns; the rounding of the faster clock is taken out again."""
    if speed == 1.0:
        return scheduled_ns
    step = 10 ** max(3, math.ceil(math.log10(speed)) + 1)
    found: Ints = (np.rint(scheduled_ns * (speed / step)) * step).astype(np.int64)
    return found


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
