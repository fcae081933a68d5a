"""A value and how far to trust it: sample-size rules, order statistics, block bootstrap. Everything is 95 %.

Requests that follow each other are alike (they share a queue), so n requests hold less news than n independent ones.
All intervals allow for that in one way: sums over blocks of a tenth of the run show how much the data really vary.
Source: batch means with 10 to 30 batches, Schmeiser, Operations Research 30(3), 1982; moving blocks, Kuensch, Annals
of Statistics 17(3), 1989.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ALPHA = 0.05
Z = 1.959963984540054
RESAMPLES = 1000
BLOCKS = 10
MAX_UNITS = 1000
MIN_SAMPLES = 5
"""Below this many samples a mean or rate has no interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure: value in ``unit`` with its 95 % interval [low, high] from ``n`` samples.

    None is "not known", never 0; ``note`` then says why. ``evidence`` says where it comes from: measured, simulated,
    list price.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    unit: str
    note: str | None = None
    evidence: str

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"a quantity in {self.unit} is {number}; not known must be None")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles of one metric."""

    unit: str
    mean: Quantity
    p50: Quantity
    p90: Quantity
    p95: Quantity
    p99: Quantity


def samples_needed(p: float) -> int:
    """Samples before percentile ``p`` (0.5 <= p < 1) is reported: ceil(ln 0.05 / ln p), so 5, 29, 59, 299.

    With that many, the largest sample lies above the true percentile with 95 % probability; with fewer, the "p99" of a
    sample is simply its maximum. Source: Wilks, Annals of Mathematical Statistics 12(1), 1941; MLPerf Inference sizes
    its runs by the same binomial argument (with a narrower margin).
    """
    return math.ceil(math.log(ALPHA) / math.log(p))


def distribution(
    values: Floats, *, unit: str, evidence: str, owners: Ints, weights: Floats | None = None, noun: str = "requests"
) -> Distribution:
    """Mean and percentiles of ``values``, NaN left out, each with interval.

    ``owners`` gives the place in time of the request each value belongs to; values of one request are kept together
    when spread is judged. ``weights``: a value counts as that many equal samples. A percentile is an observed value:
    the smallest with at least the share p of all samples at or below it.
    """
    known = np.isfinite(values)
    values, owners = values[known], owners[known]
    weights = np.ones(len(values)) if weights is None else weights[known]
    n = round(float(weights.sum()))
    blank = Quantity(value=None, n=n, unit=unit, evidence=evidence, note=f"no {noun} to measure")
    if not n:
        return Distribution(unit=unit, mean=blank, p50=blank, p90=blank, p95=blank, p99=blank)
    order = np.argsort(values, kind="stable")
    ranked, cumulative = values[order], np.cumsum(weights[order])
    count = np.bincount(owners, weights=weights).astype(np.float64)
    present = count > 0

    def per_owner(amounts: Floats) -> Floats:
        return np.bincount(owners, weights=amounts).astype(np.float64)[present]

    def percentile(p: float) -> Quantity:
        needed = samples_needed(p)
        if n < needed:
            return replace(blank, note=f"needs {needed} {noun}, has {n}")
        value = _quantile(ranked, cumulative, p)
        above = per_owner(weights * ((values <= value) - p))
        low, high = _rank_shares(_effective_n(above - above.mean(), p, n), p)
        return replace(
            blank,
            value=value,
            low=None if low is None else _quantile(ranked, cumulative, low),
            high=None if high is None else _quantile(ranked, cumulative, high),
            note=None if low is not None and high is not None else f"too few independent {noun} for both ends",
        )

    total = per_owner(weights * values)
    mean = float(total.sum() / count.sum())
    low, high = bootstrap(total, count[present])
    note = None if low is not None else f"interval needs {MIN_SAMPLES} requests"
    return Distribution(
        unit=unit,
        mean=replace(blank, value=mean, low=low, high=high, note=note),
        p50=percentile(0.50), p90=percentile(0.90), p95=percentile(0.95), p99=percentile(0.99),
    )  # fmt: skip


def rate(per_bin: Floats, bin_s: float, *, n: int, unit: str, evidence: str, note: str | None = None) -> Quantity:
    """Events or tokens per second over equal time bins of ``bin_s``, with interval; ``n`` events were counted.

    The interval says what another run of the same length and shape could have shown, ramp and drain as in this one.
    """
    value = float(per_bin.sum() / (bin_s * len(per_bin)))
    low, high = bootstrap(per_bin, np.full(len(per_bin), bin_s)) if n >= MIN_SAMPLES else (None, None)
    if low is None:
        note = "; ".join(filter(None, (note, f"interval needs {MIN_SAMPLES} requests")))
    return Quantity(value=value, low=low, high=high, n=n, unit=unit, note=note, evidence=evidence)


def share(flags: npt.NDArray[np.bool_], *, unit: str, evidence: str) -> Quantity:
    """Share of True among ``flags`` (in time order), Wilson interval at the effective sample size.

    Source: Wilson, Journal of the American Statistical Association 22(158), 1927. It stays honest at 0 % and 100 %,
    where a bootstrap would claim certainty.
    """
    n = len(flags)
    if not n:
        return Quantity(value=None, n=0, unit=unit, evidence=evidence, note="no requests")
    p = float(flags.mean())
    size = _effective_n(flags.astype(np.float64) - p, p, n) if 0 < p < 1 else float(n)
    centre = (p + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(p * (1 - p) / size + Z**2 / (4 * size**2))
    # the ends are exact at 0 and 1, where rounding could put them past the value
    low, high = (min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))
    return Quantity(value=p, low=low, high=high, n=n, unit=unit, evidence=evidence)


def bootstrap(numerator: Floats, denominator: Floats, seed: int = 0) -> tuple[float | None, float | None]:
    """95 % interval of sum(numerator) / sum(denominator) of a non-negative series in time order, by moving blocks.

    Circular blocks of a tenth of the series (one unit below 15 units), 1,000 resamples, percentile method, widened by
    Student's t for the number of blocks: ten blocks know their own spread only roughly. (None, None) below
    `MIN_SAMPLES` units or without a denominator.
    """
    if len(numerator) > MAX_UNITS:
        edges = np.linspace(0, len(numerator), MAX_UNITS, endpoint=False).astype(np.int64)
        numerator, denominator = np.add.reduceat(numerator, edges), np.add.reduceat(denominator, edges)
    units, total = len(numerator), float(denominator.sum())
    if units < MIN_SAMPLES or total <= 0:
        return None, None
    length = max(1, round(units / BLOCKS))
    blocks = math.ceil(units / length)
    starts = np.random.default_rng(seed).integers(units, size=(RESAMPLES, blocks))
    above = _moving_sums(np.concatenate((numerator, numerator[: length - 1])), length)[starts].sum(axis=1)
    below = _moving_sums(np.concatenate((denominator, denominator[: length - 1])), length)[starts].sum(axis=1)
    estimates = above[below > 0] / below[below > 0]
    value = float(numerator.sum()) / total
    low, high = (float(q) for q in np.quantile(estimates, (ALPHA / 2, 1 - ALPHA / 2)))
    widen = math.sqrt(blocks / (blocks - 1)) * _student_t(blocks - 1) / Z
    return max(0.0, min(value, value - (value - low) * widen)), max(value, value + (high - value) * widen)


def _moving_sums(values: Floats, length: int) -> Floats:
    running: Floats = np.concatenate(([0.0], np.cumsum(values)))
    sums: Floats = running[length:] - running[:-length]
    return sums


def _student_t(degrees: int) -> float:
    """97.5 % quantile of Student's t, within 0.5 % from 4 degrees up. Source: Abramowitz and Stegun 26.7.5."""
    z = Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _effective_n(deviations: Floats, p: float, n: int) -> float:
    """Independent samples that would give a share ``p`` the spread that block sums of ``deviations`` show; at most n.

    ``deviations``: per request in time order, summing to zero. Below 20 requests blocks tell nothing and it is n.
    """
    count = len(deviations)
    if count < 2 * BLOCKS:
        return float(n)
    length = count // BLOCKS
    sums = _moving_sums(deviations, length)
    # (1 - length / count): block sums about the sample's own mean vary that much too little
    variance = float((sums**2).mean()) * count / length / (1 - length / count)
    if variance <= 0:
        return float(n)
    return min(float(n), max(1.0, p * (1 - p) * n**2 / variance))


def _rank_shares(size: float, p: float) -> tuple[float | None, float | None]:
    """Shares of the ordered sample that bracket percentile ``p`` with 95 %, by the binomial law of ``size`` samples.

    Equal tails where they exist; near the smallest supported sample the upper end is the maximum and the lower tail
    gets what is left of the 5 %. None: that end does not exist.
    Source: distribution-free intervals, David and Nagaraja, Order Statistics, section 7.1.
    """
    n = max(1, int(size))
    beyond_all = p**n
    tail_high = max(ALPHA / 2, beyond_all)
    tail_low = ALPHA - tail_high if tail_high <= ALPHA else ALPHA / 2
    centre, reach = n * p, 12 * math.sqrt(n * p * (1 - p)) + 20
    k = np.arange(max(0, int(centre - reach)), min(n, math.ceil(centre + reach)) + 1)
    steps = np.log((n - k[:-1]) / (k[:-1] + 1)) + math.log(p / (1 - p))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    mass = np.exp(logs - logs.max())
    mass /= mass.sum()
    at_most = np.cumsum(mass)
    at_least = np.cumsum(mass[::-1])[::-1]
    # x_(l) > percentile happens when fewer than l samples lie below it, x_(u) < percentile when at least u do
    fits_low = k[at_most <= tail_low] + 1
    fits_high = k[at_least <= tail_high * (1 + 1e-9)]
    low = float(fits_low[-1]) / n if len(fits_low) else None
    high = float(fits_high[0]) / n if len(fits_high) and beyond_all <= ALPHA else None
    return low, high


def _quantile(ranked: Floats, cumulative: Floats, p: float) -> float:
    """Smallest value with at least the share ``p`` of all weight at or below it."""
    target = float(cumulative[-1]) * p
    return float(ranked[min(len(ranked) - 1, int(np.searchsorted(cumulative, target * (1 - 1e-12))))])
