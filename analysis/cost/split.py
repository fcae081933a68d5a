"""The bill divided into input, cached input and output, by three methods. Every division adds back to the bill exactly.

A division is an answer only when the data can carry it: a mix that hardly varies, a part at zero or an interval wider
than the price itself is "not identifiable", with the reason and the numbers behind it. Methods and rules: PRICES.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from analysis.arrays import Floats
from analysis.cost.samples import SMALLEST_ROWS, Samples, WorkRows, busy_rows
from analysis.stats.intervals import Quantity
from analysis.stats.nonnegative import Fit, fit_non_negative

NANO = 10**9
LARGEST_CONDITION = 30.0
"""Above this, columns are one and the same. Source: Belsley, Kuh, Welsch, Regression Diagnostics, 1980."""
LARGEST_RESIDUAL = 0.25
LARGEST_SHARED = 0.5
LARGEST_OVERLAP = 1.1
"""Request seconds per engine second up to which the one may stand for the other."""


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
    """What was served of ``input_tokens``, of which ``cached_input`` came from a cache, and output tokens."""
    cached = None if cached_input is None else min(input_tokens, cached_input)
    return TokenMix(uncached_input=input_tokens - (cached or 0), cached_input=cached, output=output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A bill as the sum of its parts, in whole billionths of a USD (``nusd``), and the price of each part.

    ``usd_per_1m_input`` is the price of uncached input tokens when ``usd_per_1m_cached_input`` is known, else of all
    input tokens. Parts and prices are None when there is no bill or ``reason`` says why it cannot be divided.
    """

    method: str
    ratio: float | None
    """What an output token costs in (uncached) input tokens, declared or found."""
    usd_per_1m_input: Quantity
    usd_per_1m_cached_input: Quantity
    usd_per_1m_output: Quantity
    bill_nusd: int | None = None
    input_nusd: int | None = None
    cached_input_nusd: int | None = None
    output_nusd: int | None = None
    reason: str | None = None
    facts: dict[str, float] = field(default_factory=dict)
    """The numbers behind it, also when the answer is "not identifiable"."""


# ------------------------------------------------------------------------------------------------- exact division


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


# ------------------------------------------------------------------------------------------------ the three methods


def by_ratio(
    usd: float, usage: TokenMix, ratio: float, *, evidence: str, cached_ratio: float | None = None, n: int = 0
) -> Split:
    """Declared: an output token costs ``ratio`` input tokens, a cached one ``cached_ratio`` of an uncached one.

    Without ``cached_ratio`` cached input tokens are priced like the rest. An opinion, not a measurement.
    Source: Google GKE Inference Quickstart, ratio 4.
    """
    return _split("declared ratio", usd, usage, (1.0, cached_ratio, ratio), evidence=evidence, n=n)


def by_phase_time(
    usd: float,
    usage: TokenMix,
    prefill_s: float,
    decode_s: float,
    *,
    evidence: str,
    busy_s: float | None = None,
    cached_ratio: float | None = None,
    n: int = 0,
) -> Split:
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
        facts["overlap"] = (prefill_s + decode_s) / busy_s if busy_s > 0 else math.inf
        if facts["overlap"] > LARGEST_OVERLAP:
            return not_identifiable(
                method,
                f"the server adds up the time of requests, and {facts['overlap']:.1f} of them ran at once: "
                "that is no engine time; --split step-model reads the same servers' token counters instead",
                evidence=evidence, n=n, facts={k: v for k, v in facts.items() if math.isfinite(v)},
            )  # fmt: skip
    charged = usage.uncached_input + (0.0 if cached_ratio is None else cached_ratio) * (usage.cached_input or 0.0)
    charged = usage.input if cached_ratio is None else charged
    weights = (prefill_s / charged, None if cached_ratio is None else cached_ratio * prefill_s / charged)
    return _split(method, usd, usage, (*weights, decode_s / usage.output), evidence=evidence, n=n, facts=facts)


def by_step_model(usd: float, usage: TokenMix, samples: Samples, *, evidence: str, seed: int = 0) -> Split:
    """By a fitted model of engine time: seconds = a x uncached input + b x output (+ c x steps + d x cached input).

    Non-negative least squares over intervals of about 5 s, all busy. With steps counted, c is the time that both share
    (reading the weights); it follows a : b. Without, only intervals near the largest batch are used, where c hides in a
    and b. Intervals: moving-block bootstrap, 95 %, of the division; the bill is taken as it is.
    """
    method = "step model"
    rows, trouble = busy_rows(samples)
    if trouble or rows is None:
        return not_identifiable(method, trouble or "no samples", evidence=evidence, n=0)
    return by_fit(method, usd, usage, rows, evidence=evidence, block=max(1, round(len(rows.spent) / 10)), seed=seed)


def split_bill(
    usd: float | None,
    usage: TokenMix | None,
    samples: Samples | None,
    *,
    evidence: str,
    cached_ratio: float | None = None,
    n: int = 0,
) -> list[Split]:
    """The bill of one run by what its servers counted: phase time and step model. The declared split is `cost`'s own.

    ``usd`` or ``usage`` None: no price is allowed or known, and every method says so.
    """
    if usd is None or usage is None or not (usd > 0 and usage.input > 0 and usage.output > 0):
        why = "there is no bill to divide" if usd is None else "tokens were not counted"
        return [not_identifiable(m, why, evidence=evidence, n=n) for m in ("phase time", "step model")]
    if samples is None or samples.trouble:
        why = samples.trouble if samples and samples.trouble else "the servers were not sampled"
        return [not_identifiable(m, why, evidence=evidence, n=n) for m in ("phase time", "step model")]
    if samples.prefill_request_s is None or samples.decode_request_s is None:
        phase = not_identifiable("phase time", "the servers do not count time by phase", evidence=evidence, n=n)
    else:
        busy = float(samples.seconds[samples.running > 0].sum())
        phase = by_phase_time(
            usd, usage, samples.prefill_request_s, samples.decode_request_s,
            evidence=evidence, busy_s=busy, cached_ratio=cached_ratio, n=n,
        )  # fmt: skip
    return [phase, by_step_model(usd, usage, samples, evidence=evidence)]


# ------------------------------------------------------------------------------------------------- behind the methods


def by_fit(method: str, usd: float, usage: TokenMix, rows: WorkRows, *, evidence: str, block: int, seed: int) -> Split:
    """Fit, judge whether the data carry it, and price."""
    n = len(rows.spent)
    names, columns = ["input", "output"], [rows.uncached_input, rows.output]
    with_cached = rows.cached_input is not None and bool(usage.cached_input) and float(rows.cached_input.std()) > 0
    if with_cached and rows.cached_input is not None:
        names, columns = [*names, "cached_input"], [*columns, rows.cached_input]
    if rows.steps is not None:
        names, columns = [*names, "steps"], [*columns, rows.steps]
    # a part only needs its own row to be known, so fewer rows than twice the unknowns say nothing
    if n < max(SMALLEST_ROWS, 2 * len(names)):
        return not_identifiable(method, f"{n} rows for {len(names)} unknowns", evidence=evidence, n=n)
    fit = fit_non_negative(rows.spent, np.column_stack(columns), block=block, seed=seed)
    facts = _facts(fit, names, columns)
    trouble = _trouble(fit, names, facts)
    if trouble:
        return not_identifiable(method, trouble, evidence=evidence, n=n, facts=facts)
    per_token = dict(zip(names, fit.coefficients.tolist(), strict=True))
    cached = per_token.get("cached_input")
    weights = (per_token["input"], cached, per_token["output"])
    split = _split(method, usd, usage, weights, evidence=evidence, n=n, facts=facts)
    if cached == 0.0:
        free = replace(split.usd_per_1m_cached_input, value=None, note="not told from nothing: the others carry it")
        split = replace(split, usd_per_1m_cached_input=free)
    return _with_intervals(split, usd, usage, fit, names, cached is not None)


def _facts(fit: Fit, names: Sequence[str], columns: Sequence[Floats]) -> dict[str, float]:
    spent = {name: float(c * column.sum()) for name, c, column in zip(names, fit.coefficients, columns, strict=True)}
    total = sum(spent.values())
    facts = {"rows": float(len(columns[0])), "residual": fit.residual}
    if math.isfinite(fit.condition):
        facts["condition"] = fit.condition
    if "steps" in spent and total > 0:
        facts["shared_share"] = spent["steps"] / total
    return facts | {f"per_{name}": float(c) for name, c in zip(names, fit.coefficients, strict=True)}


def _trouble(fit: Fit, names: Sequence[str], facts: dict[str, float]) -> str | None:
    """Why the fit is no answer, or None."""
    if not fit.condition <= LARGEST_CONDITION:
        return f"the mix hardly varies (condition number {fit.condition:.0f}, at most {LARGEST_CONDITION:.0f})"
    if fit.residual > LARGEST_RESIDUAL:
        return f"the fitted times are {fit.residual:.0%} off the measured ones, and {LARGEST_RESIDUAL:.0%} is the most"
    for name, value, spread in zip(names, fit.coefficients, fit.spread.T, strict=True):
        if name not in ("input", "output"):
            continue
        if value <= 0:
            return f"{name} comes out at its bound, 0: the data do not tell its cost from that of the rest"
        if float(spread[1] - spread[0]) > value:
            return f"the interval of {name} is wider than its value"
    if facts.get("shared_share", 0.0) > LARGEST_SHARED:
        return (
            f"{facts['shared_share']:.0%} of the time is shared by both (each step reads the weights): "
            "any division of that is a rule, not a measurement"
        )
    return None


def _with_intervals(
    split: Split, usd: float, usage: TokenMix, fit: Fit, names: Sequence[str], with_cached: bool
) -> Split:
    """Price intervals: the same division by each resample's own coefficients."""
    draws = dict(zip(names, fit.draws.T, strict=True))
    cached = draws["cached_input"] * (usage.cached_input or 0.0) if with_cached else 0.0
    base = usage.uncached_input if with_cached else usage.input
    whole = draws["input"] * base + cached + draws["output"] * usage.output
    kept = whole > 0

    def quantity(name: str, q: Quantity) -> Quantity:
        if q.value is None:
            return q
        prices = draws[name][kept] / whole[kept] * usd * 1e6
        low, high = fit.ends(prices, q.value)
        return replace(q, low=low, high=high, note="interval of the division; the bill is taken as it is")

    return replace(
        split,
        usd_per_1m_input=quantity("input", split.usd_per_1m_input),
        usd_per_1m_output=quantity("output", split.usd_per_1m_output),
        usd_per_1m_cached_input=quantity("cached_input", split.usd_per_1m_cached_input),
    )


def _split(
    method: str,
    usd: float,
    usage: TokenMix,
    per_token: tuple[float, float | None, float],
    *,
    evidence: str,
    n: int,
    facts: dict[str, float] | None = None,
) -> Split:
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
        usd_per_1m_cached_input=_price(cached * scale, "cached input", n, evidence)
        if apart and cached is not None
        else _price(None, "cached input", n, evidence, why),
        usd_per_1m_output=_price(out * scale, "output", n, evidence),
        bill_nusd=sum(parts),
        input_nusd=parts[0],
        cached_input_nusd=parts[1],
        output_nusd=parts[2],
        facts={name: float(number) for name, number in (facts or {}).items()},
    )


def not_identifiable(
    method: str, reason: str, *, evidence: str, n: int, facts: dict[str, float] | None = None
) -> Split:
    """The answer "not identifiable from this data", with the reason and the numbers behind it."""
    none = {kind: _price(None, kind.replace("_", " "), n, evidence, reason) for kind in ("input", "cached_input")}
    return Split(
        method=method,
        ratio=None,
        usd_per_1m_input=none["input"],
        usd_per_1m_cached_input=none["cached_input"],
        usd_per_1m_output=_price(None, "output", n, evidence, reason),
        reason=reason,
        facts={name: float(number) for name, number in (facts or {}).items()},
    )


def _price(value: float | None, kind: str, n: int, evidence: str, note: str | None = None) -> Quantity:
    known = None if value is None else float(value)  # a numpy number has no JSON
    return Quantity(value=known, n=n, unit=f"USD per 1M {kind} tokens", note=note, evidence=f"{evidence} x list price")
