"""The bill divided into input, cached input and output, by three methods. Every division adds back to the bill exactly.

It is an answer only when the data can carry it; else "not identifiable", with the reason. Methods and rules: PRICES.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa

from harness.analysis.arrays import Floats
from harness.analysis.metrics import Window
from harness.analysis.rows.read import Run
from harness.analysis.stats.intervals import Evidence, Quantity, at_list_price
from harness.analysis.stats.nonnegative import NonNegativeFit, fit_non_negative
from harness.analysis.validity.counters import shared_addresses

NANO = 10**9
LARGEST_CONDITION = 30.0
"""Above this, columns are one and the same. Source: Belsley, Kuh, Welsch, Regression Diagnostics, 1980."""
LARGEST_RESIDUAL = 0.25
LARGEST_SHARED = 0.5
LARGEST_OVERLAP = 1.1
"""Request seconds per engine second up to which the one may stand for the other."""
SMALLEST_ROWS = 8
"""With fewer intervals that of the division covers too seldom; with so many it does (`tests/test_split.py`)."""
GROUP_S = 5.0
"""Servers count a prompt when its last part is read, so single seconds put it into the wrong one."""
BUSY_SHARE = 0.9
COUNTERS = (
    "prompt_tokens_total", "generation_tokens_total", "prompt_tokens_cached_total", "prefix_cache_hits_total",
    "engine_steps_total", "prefill_request_s_total", "decode_request_s_total",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMix:
    """Tokens that were served; ``cached_input`` None: the server did not say, all input counts as uncached."""

    uncached_input: float
    cached_input: float | None
    output: float

    @property
    def input(self) -> float:
        """Cached and uncached."""
        return self.uncached_input + (self.cached_input or 0)

    @property
    def total(self) -> float:
        """All of them."""
        return self.input + self.output


def token_mix(input_tokens: int, cached_input: int | None, output: int) -> TokenMix:
    """What was served; ``cached_input`` of ``input_tokens`` came from a cache."""
    cached = None if cached_input is None else min(input_tokens, cached_input)
    return TokenMix(uncached_input=input_tokens - (cached or 0), cached_input=cached, output=output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A bill as the sum of its parts, in whole billionths of a USD (``nusd``), and the price of each part.

    ``usd_per_1m_input`` is the price of uncached input tokens when ``usd_per_1m_cached_input`` is known, else of all
    input tokens. Parts and prices are None when there is no bill or ``reason`` says why it cannot be divided.
    """

    method: str
    ratio: float | None = None
    """What an output token costs in (uncached) input tokens, declared or found."""
    usd_per_1m_input: Quantity
    usd_per_1m_cached_input: Quantity
    usd_per_1m_output: Quantity
    bill_nusd: int | None = None
    input_nusd: int | None = None
    cached_input_nusd: int | None = None
    output_nusd: int | None = None
    reason: str | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind it, also when the answer is "not identifiable"."""


def divide(usd: float, weights: Sequence[float]) -> list[int]:
    """``usd`` in billionths of a USD, divided in proportion to ``weights``: integers that add up to round(usd x 1e9).

    Each part is rounded down and the last one with weight gets the rest. Raises ValueError without a positive weight.
    """
    total, shares = round(Fraction(usd) * NANO), [Fraction(w) for w in weights]
    whole = sum(shares)
    if whole <= 0 or min(shares) < 0:
        raise ValueError(f"weights {list(weights)}: none may be negative, one must be positive")
    parts = [math.floor(total * share / whole) for share in shares]
    last = max(k for k, share in enumerate(shares) if share)
    parts[last] += total - sum(parts)
    return parts


def by_ratio(
    usd: float, usage: TokenMix, ratio: float, *, evidence: Evidence, cached_ratio: float | None = None, n: int = 0
) -> Split:
    """Declared: an output token costs ``ratio`` input tokens, a cached one ``cached_ratio`` of an uncached one.

    Without ``cached_ratio`` cached input tokens are priced like the rest. An opinion, not a measurement.
    Source: Google GKE Inference Quickstart, ratio 4.
    """
    return _split("declared ratio", usd, usage, (1.0, cached_ratio, ratio), evidence=evidence, n=n)


def by_phase_time(
    usd: float, usage: TokenMix, prefill_s: float, decode_s: float, *, evidence: Evidence, busy_s: float | None = None,
    cached_ratio: float | None = None, n: int = 0,
) -> Split:  # fmt: skip
    """By the seconds that engines spent on prompts and on output.

    ``busy_s``: engine seconds there were. A server's request counters add up over overlapping requests: when they hold
    more than 1.1 times that, they weigh decode by its batch and are no engine time. None: the seconds are engine time
    (prefill and decode on servers of their own), as in DeepSeek's published day.
    """
    method = "phase time"
    if not (prefill_s > 0 and decode_s > 0 and usage.uncached_input > 0 and usage.output > 0):
        return not_identifiable(method, "no time was counted in one of the phases", evidence=evidence, n=n)
    facts = {"prefill_s": prefill_s, "decode_s": decode_s, "prefill_share": prefill_s / (prefill_s + decode_s)}
    if busy_s is not None:
        overlap = (prefill_s + decode_s) / busy_s if busy_s > 0 else math.inf
        facts |= {"overlap": overlap} if math.isfinite(overlap) else {}
        if overlap > LARGEST_OVERLAP:
            why = (
                f"the server adds up the time of requests, and {overlap:.1f} of them ran at once: that is no engine "
                "time; --split step-model reads the same servers' token counters instead"
            )
            return not_identifiable(method, why, evidence=evidence, n=n, facts=facts)
    if cached_ratio is None:
        charged, cached = usage.input, None
    else:
        charged = usage.uncached_input + cached_ratio * (usage.cached_input or 0.0)
        cached = cached_ratio * prefill_s / charged
    weights = (prefill_s / charged, cached, decode_s / usage.output)
    return _split(method, usd, usage, weights, evidence=evidence, n=n, facts=facts)


def by_step_model(usd: float, usage: TokenMix, samples: Samples, *, evidence: Evidence) -> Split:
    """By a fitted model of engine time: seconds = a x uncached input + b x output (+ c x steps + d x cached input).

    Non-negative least squares over intervals of about 5 s, all busy. With steps counted, c is the time that both share
    (reading the weights); it follows a : b. Without, only intervals near the largest batch are used, where c hides in a
    and b. Intervals: moving-block bootstrap, 95 %, of the division; the bill is taken as it is.
    """
    rows = busy_rows(samples)
    return by_fit(usd, usage, rows, evidence=evidence, block=max(1, round(len(rows.seconds) / 10)))


def split_bill(
    usd: float | None, usage: TokenMix | None, samples: Samples | None, *, evidence: Evidence,
    cached_ratio: float | None = None, n: int = 0,
) -> list[Split]:  # fmt: skip
    """The bill of one run by what its servers counted: phase time and step model. The declared split is `cost`'s own.

    ``usd`` or ``usage`` None: no price is allowed or known, and every method says so.
    """
    if usd is None:
        why: str | None = "there is no bill to divide"
    elif usage is None or not (usd > 0 and usage.input > 0 and usage.output > 0):
        why = "tokens were not counted"
    else:
        why = "the servers were not sampled" if samples is None else samples.trouble
    if why or usd is None or usage is None or samples is None:
        return [not_identifiable(m, why or "", evidence=evidence, n=n) for m in ("phase time", "step model")]
    if (prefill_s := samples.prefill_request_s) is None or (decode_s := samples.decode_request_s) is None:
        phase = not_identifiable("phase time", "the servers do not count time by phase", evidence=evidence, n=n)
    else:
        busy_s = float(samples.seconds[samples.running > 0].sum())
        phase = by_phase_time(
            usd, usage, prefill_s, decode_s, evidence=evidence, busy_s=busy_s, cached_ratio=cached_ratio, n=n
        )
    return [phase, by_step_model(usd, usage, samples, evidence=evidence)]


def by_fit(usd: float, usage: TokenMix, rows: Samples, *, evidence: Evidence, block: int) -> Split:
    """The step model from rows of a busy engine: fit, judge whether the data carry it, and price."""
    method, n = "step model", len(rows.seconds)
    if rows.trouble:
        return not_identifiable(method, rows.trouble, evidence=evidence, n=0)
    columns = {"input": rows.uncached_input, "output": rows.output}
    if rows.cached_input is not None and usage.cached_input and float(rows.cached_input.std()) > 0:
        columns["cached_input"] = rows.cached_input
    if rows.steps is not None:
        columns["steps"] = rows.steps
    # a part only needs its own row to be known, so fewer rows than twice the unknowns say nothing
    if n < max(SMALLEST_ROWS, 2 * len(columns)):
        return not_identifiable(method, f"{n} rows for {len(columns)} unknowns", evidence=evidence, n=n)
    fit = fit_non_negative(rows.seconds, np.column_stack(list(columns.values())), block=block)
    per_token = dict(zip(columns, fit.coefficients.tolist(), strict=True))
    facts = {"rows": float(n), "residual": fit.residual}
    facts |= {"condition": fit.condition} if math.isfinite(fit.condition) else {}
    spent = {name: per_token[name] * float(column.sum()) for name, column in columns.items()}
    if "steps" in spent and sum(spent.values()) > 0:
        facts["shared_share"] = spent["steps"] / sum(spent.values())
    facts |= {f"per_{name}": seconds for name, seconds in per_token.items()}
    if trouble := _trouble(fit, facts):
        return not_identifiable(method, trouble, evidence=evidence, n=n, facts=facts)
    weights = (per_token["input"], per_token.get("cached_input"), per_token["output"])
    split = _split(method, usd, usage, weights, evidence=evidence, n=n, facts=facts)
    if weights[1] == 0.0:
        free = replace(split.usd_per_1m_cached_input, value=None, note="not told from nothing: the others carry it")
        split = replace(split, usd_per_1m_cached_input=free)
    return _with_intervals(split, usd, usage, fit, dict(zip(columns, fit.draws.T, strict=True)))


def _trouble(fit: NonNegativeFit, facts: Mapping[str, float]) -> str | None:
    if not fit.condition <= LARGEST_CONDITION:
        return f"the mix hardly varies (condition number {fit.condition:.0f}, at most {LARGEST_CONDITION:.0f})"
    if fit.residual > LARGEST_RESIDUAL:
        return f"the fitted times are {fit.residual:.0%} off the measured ones, and {LARGEST_RESIDUAL:.0%} is the most"
    for name, value, (low, high) in zip(("input", "output"), fit.coefficients, fit.spread.T, strict=False):
        if value <= 0:
            return f"{name} comes out at its bound, 0: the data do not tell its cost from that of the rest"
        if float(high - low) > value:
            return f"the interval of {name} is wider than its value"
    if (shared := facts.get("shared_share", 0.0)) > LARGEST_SHARED:
        return (
            f"{shared:.0%} of the time is shared by both (each step reads the weights): any division of that is a "
            "rule, not a measurement"
        )
    return None


def _with_intervals(
    split: Split, usd: float, usage: TokenMix, fit: NonNegativeFit, draws: Mapping[str, Floats]
) -> Split:
    """Price intervals: the same division by each resample's own coefficients."""
    apart = "cached_input" in draws
    cached = draws["cached_input"] * (usage.cached_input or 0.0) if apart else 0.0
    whole = draws["input"] * (usage.uncached_input if apart else usage.input) + cached + draws["output"] * usage.output
    kept, note = whole > 0, "interval of the division; the bill is taken as it is"
    changed: dict[str, Any] = {}
    for field_ in ("usd_per_1m_input", "usd_per_1m_cached_input", "usd_per_1m_output"):
        q: Quantity = getattr(split, field_)
        if q.value is not None:
            drawn = draws[field_.removeprefix("usd_per_1m_")]
            low, high = fit.ends(drawn[kept] / whole[kept] * usd * 1e6, q.value)
            changed[field_] = replace(q, low=low, high=high, note=note)
    return replace(split, **changed)


def _split(
    method: str, usd: float, usage: TokenMix, per_token: tuple[float, float | None, float], *, evidence: Evidence,
    n: int, facts: Mapping[str, float] | None = None,
) -> Split:  # fmt: skip
    """Parts and prices from what one uncached input, cached input (None: like the rest) and output token weigh."""
    into, cached, out = per_token
    apart = cached is not None and usage.cached_input is not None
    weights = (
        into * (usage.uncached_input if apart else usage.input),
        (cached or 0.0) * (usage.cached_input or 0.0) if apart else 0.0,
        out * usage.output,
    )
    parts = divide(usd, weights)
    scale = usd / sum(weights) * 1e6
    why = "cached input tokens were not counted" if usage.cached_input is None else "priced like the rest of the input"
    return Split(
        method=method,
        ratio=float(out / into) if into > 0 else None,
        usd_per_1m_input=_price(into * scale, "uncached input" if apart else "input", n, evidence),
        usd_per_1m_cached_input=_price((cached or 0.0) * scale, "cached input", n, evidence) if apart
        else _price(None, "cached input", n, evidence, why),
        usd_per_1m_output=_price(out * scale, "output", n, evidence),
        bill_nusd=sum(parts), input_nusd=parts[0], cached_input_nusd=parts[1], output_nusd=parts[2],
        facts=facts or {},
    )  # fmt: skip


def not_identifiable(
    method: str, reason: str, *, evidence: Evidence, n: int, facts: Mapping[str, float] | None = None
) -> Split:
    """Not identifiable from this data, with the reason and the numbers behind it."""
    into, cached, out = (_price(None, kind, n, evidence, reason) for kind in ("input", "cached input", "output"))
    return Split(
        method=method, usd_per_1m_input=into, usd_per_1m_cached_input=cached, usd_per_1m_output=out, reason=reason,
        facts=facts or {},
    )  # fmt: skip


def _price(value: float | None, kind: str, n: int, evidence: Evidence, note: str | None = None) -> Quantity:
    known = None if value is None else float(value)  # a numpy number has no JSON
    return Quantity(value=known, n=n, unit=f"USD per 1M {kind} tokens", note=note, evidence=at_list_price(evidence))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What servers counted, per interval of one server in time order; arrays of one length, ``None``: not counted."""

    seconds: Floats
    uncached_input: Floats
    cached_input: Floats | None
    output: Floats
    steps: Floats | None
    running: Floats
    """Smallest number of requests in the batch at either end of the interval."""
    prefill_request_s: float | None = None
    """Sum over finished requests of the time from their place in the batch to their first token."""
    decode_request_s: float | None = None
    trouble: str | None = None
    """Why there are none; None: there are."""


def _none(trouble: str) -> Samples:
    no = np.zeros(0)
    return Samples(seconds=no, uncached_input=no, cached_input=None, output=no, steps=None, running=no, trouble=trouble)


def run_samples(run: Run, within: Window) -> Samples:
    """What the servers of a run counted in its window."""
    if shared_addresses(run):
        return _none("several servers answer at one address, so their counters are no book")
    tables = run.server_tables()
    return _none("a server was not sampled") if tables is None else server_samples(tables, within.start_s, within.end_s)


def server_samples(tables: Sequence[pa.Table], start_s: float, end_s: float) -> Samples:
    """Differences of the counters in ``server-metrics-<replica>.arrows`` between ``start_s`` and ``end_s``.

    A column that a file does not have, or that is null, was not counted. A counter that falls, or a server that started
    again, is ``trouble``: its books are void.
    """
    inside = []
    for table in tables:
        t_s = table.column("t_ns").to_numpy() / 1e9
        inside.append(table.filter((t_s >= start_s) & (t_s <= end_s)))
    if not inside or any(len(table) < 2 for table in inside):
        return _none("a server was not sampled twice in the window")

    def columns(name: str) -> list[Floats]:
        return [
            t.column(name).to_numpy().astype(np.float64) if name in t.column_names else np.full(len(t), np.nan)
            for t in inside
        ]

    # a server without a clock of its start tells of no restart; nan differs from nan and would
    restarted = any(np.diff(np.nan_to_num(start)).any() for start in columns("process_start_s"))
    if restarted or any((np.diff(column) < 0).any() for name in COUNTERS for column in columns(name)):
        return _none("a server started again during the run")

    def moved(name: str) -> Floats | None:
        values = np.concatenate([np.diff(column) for column in columns(name)])
        return values if np.isfinite(values).all() else None

    prompt, output, prompt_hits, hits, steps, prefill, decode = (moved(name) for name in COUNTERS)
    if prompt is None or output is None:
        return _none("the servers do not count tokens")
    # hits are counted when a request is admitted, the other counter with the prompt itself
    cached = hits if prompt_hits is None else prompt_hits
    return Samples(
        seconds=np.concatenate([np.diff(t_ns / 1e9) for t_ns in columns("t_ns")]),
        uncached_input=prompt if cached is None else np.maximum(0.0, prompt - cached),
        cached_input=cached, output=output, steps=steps,
        running=np.concatenate([np.minimum(held[1:], held[:-1]) for held in columns("running")]),
        prefill_request_s=None if prefill is None else float(prefill.sum()),
        decode_request_s=None if decode is None else float(decode.sum()),
    )  # fmt: skip


def busy_rows(samples: Samples) -> Samples:
    """Samples of a busy engine in groups of `GROUP_S`, or why there are none."""
    if samples.trouble:
        return samples
    running = np.nan_to_num(samples.running)
    busy = running >= (1.0 if samples.steps is not None else max(1.0, BUSY_SHARE * float(running.max(initial=0.0))))
    # a group ends with its seconds, or where the engine was not busy
    group = np.zeros(len(busy), dtype=np.int64)
    held_s, current = 0.0, 0
    for k in range(len(busy)):
        if held_s >= GROUP_S or (k and busy[k] != busy[k - 1]):
            current, held_s = current + 1, 0.0
        group[k] = current
        held_s += float(samples.seconds[k])
    whole = np.bincount(group[busy], weights=samples.seconds[busy], minlength=current + 1) >= GROUP_S / 2
    if (n := int(whole.sum())) < SMALLEST_ROWS:
        wanted = f"{SMALLEST_ROWS} ({SMALLEST_ROWS * GROUP_S:g} s with requests in the batch)"
        return _none(f"{n} busy intervals of {GROUP_S:g} s, needs {wanted}")

    def total(values: Floats) -> Floats:
        return np.bincount(group[busy], weights=values[busy], minlength=current + 1)[whole].astype(np.float64)

    return replace(
        samples, seconds=total(samples.seconds), uncached_input=total(samples.uncached_input),
        cached_input=None if samples.cached_input is None else total(samples.cached_input),
        output=total(samples.output), steps=None if samples.steps is None else total(samples.steps),
    )  # fmt: skip
