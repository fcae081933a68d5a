"""95 % intervals cover the truth in 93 to 97 % of runs whose truth is known; where they do not, the list says so.

Truths are exact where the law is known, else from two million requests of the same process. Latencies are costly: here
200 runs of each process are held against what the luck of 200 allows, and all of them together against one point either
way, which a rule that is a tenth too narrow or too wide misses. `make study` holds 3,000 runs to 93 to 97 % each, in
three draws that count together, since of 55 latencies up to four lie outside by the luck of one draw: that on which the
rules were first tuned, and the first two on which the present ones were checked and not tuned. More of them:
`python tests/test_coverage.py 7 201 202 203 204 205`.
"""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest

from harness.analysis.cost.cost import usd_per_1m
from harness.analysis.stats.intervals import Quantity, distribution, rate, ratio_interval, share
from harness.analysis.stats.replicates import over_replicates

RUNS = 1000
FEW = 200
DRAWS = (7, 201, 202)
FIGURES = {"mean": None, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def alike(rng, runs, n, phi):
    """Normal values whose neighbours correlate by ``phi``, shape (runs, n)."""
    steps = rng.standard_normal((runs, n))
    values = np.empty((runs, n))
    values[:, 0] = steps[:, 0]
    for k in range(1, n):
        values[:, k] = phi * values[:, k - 1] + math.sqrt(1 - phi**2) * steps[:, k]
    return values


def queue(rng, runs, n, busy, warmup=500, exponential=False):
    """Latency of a single server at ``busy`` with lognormal or exponential service: bursts of slow requests."""
    size = (runs, n + warmup)
    service = rng.exponential(1, size) if exponential else np.exp(0.5 * rng.standard_normal(size) - 0.125)
    gap = rng.exponential(1 / busy, (runs, n + warmup))
    wait = np.zeros((runs, n + warmup))
    for k in range(1, n + warmup):
        wait[:, k] = np.maximum(0.0, wait[:, k - 1] + service[:, k - 1] - gap[:, k])
    return (wait + service)[:, warmup:]


def regimes(rng, runs, n):
    """Latency that is 2.5 times as long in a fifth of the time, in stretches of 25 requests on average."""
    slow, values = rng.random(runs) < 0.2, np.empty((runs, n))
    for k in range(n):
        slow ^= rng.random(runs) < np.where(slow, 0.04, 0.01)
        values[:, k] = np.exp(0.4 * rng.standard_normal(runs)) * np.where(slow, 2.5, 1.0)
    return values


PROCESSES = {
    "independent 300": lambda rng, runs, n=300: np.exp(0.5 * rng.standard_normal((runs, n))),
    "independent 1000": lambda rng, runs, n=1000: np.exp(0.5 * rng.standard_normal((runs, n))),
    "heavy tail 600": lambda rng, runs, n=600: 1 + rng.pareto(2.5, (runs, n)),
    "alike 0.5, 1000": lambda rng, runs, n=1000: np.exp(0.5 * alike(rng, runs, n, 0.5)),
    "alike 0.8, 1000": lambda rng, runs, n=1000: np.exp(0.5 * alike(rng, runs, n, 0.8)),
    "alike 0.9, 2000": lambda rng, runs, n=2000: np.exp(0.5 * alike(rng, runs, n, 0.9)),
    "bursts, half busy, 1000": lambda rng, runs, n=1000: queue(rng, runs, n, 0.5),
    "bursts, 0.7 busy, 2000": lambda rng, runs, n=2000: queue(rng, runs, n, 0.7),
    "bursts, M/M/1 0.6 busy, 1500": lambda rng, runs, n=1500: queue(rng, runs, n, 0.6, exponential=True),
    "bursts, M/M/1 0.8 busy, 4000": lambda rng, runs, n=4000: queue(rng, runs, n, 0.8, exponential=True),
    "two regimes, 1500": lambda rng, runs, n=1500: regimes(rng, runs, n),
}

OUTSIDE = {("two regimes, 1500", "p95"): 0.979}
"""Figures that are not brought in, with what they cover: too wide where slow requests come from another regime, so that
those at 95 % are less alike than those at 60 to 90 %. See INTERVALS.md."""


@functools.cache
def truths(process):
    values = PROCESSES[process](np.random.default_rng(99), 100, 20_000).ravel()
    return {name: float(values.mean() if p is None else np.quantile(values, p)) for name, p in FIGURES.items()}


@functools.cache
def covered(process, draws=DRAWS, runs=RUNS):
    """The mean over draws of `covered_in`."""
    each = [covered_in(process, draw, runs) for draw in draws]
    return {name: float(np.mean([found[name] for found in each])) for name in FIGURES}


def covered_in(process, draw, runs):
    """Figure -> share of the intervals given that hold the truth; an end that is not known excludes nothing.

    A percentile that is refused is no interval; one that is refused in most runs covers nothing: nan.
    """
    data, truth = PROCESSES[process](np.random.default_rng(draw), runs), truths(process)
    owners = np.arange(data.shape[1])
    given: dict[str, list[bool]] = {name: [] for name in FIGURES}
    for row in data:
        found = distribution(row, unit="s", evidence="simulated", owners=owners)
        for name in FIGURES:
            q = getattr(found, name)
            if q.value is not None:
                given[name].append(holds(q, truth[name]))
    return {name: float(np.mean(held)) if len(held) > runs / 2 else math.nan for name, held in given.items()}


def holds(q: Quantity, truth: float) -> bool:
    return (q.low is None or q.low <= truth) and (q.high is None or truth <= q.high)


def in_band(found, runs):
    """93 to 97 %, and three standard errors of that many runs either way."""
    low, high = (end + sign * 3 * math.sqrt(end * (1 - end) / runs) for end, sign in ((0.93, -1), (0.97, 1)))
    return low <= found <= high


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("process", PROCESSES)
def test_latencies(process, name):
    assert in_band(covered(process, DRAWS[:1], FEW)[name], FEW)


def test_latencies_together():
    each = [found for process in PROCESSES for found in covered(process, DRAWS[:1], FEW).values()]
    assert 0.946 <= np.mean(each) <= 0.966


def bins(rng, spread, phi):
    """Tokens per second of a run of 200 bins of 0.5 s, in waves."""
    return rng.poisson(500 * np.exp(spread * alike(rng, 1, 200, phi)[0] - spread**2 / 2)).astype(float)


@pytest.mark.parametrize(("spread", "phi"), [(0.1, 0.0), (0.3, 0.5), (0.3, 0.8), (0.6, 0.7)])
def test_rates_and_prices(spread, phi):
    """Tokens per second, and the price that is one over it: the same runs cover, since the ends turn over with it."""
    rates = prices = 0
    for seed in range(RUNS):
        tokens = bins(np.random.default_rng(seed), spread, phi)
        found = rate(tokens, 0.5, n=1000, unit="tokens/s", evidence="simulated")
        rates += holds(found, 1000.0)
        prices += usd_per_1m(0.001, found.high) <= usd_per_1m(0.001, 1000.0) <= usd_per_1m(0.001, found.low)
    assert 0.93 <= rates / RUNS <= 0.97
    assert prices == rates


@pytest.mark.parametrize("n", [100, 400])
def test_ratios_of_two_sums(n):
    """Seconds per output token over requests whose lengths differ: a ratio of means, not a mean of ratios."""
    hits = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        tokens = rng.geometric(1 / 100, n).astype(float)
        seconds = tokens * 0.02 * np.exp(0.3 * alike(rng, 1, n, 0.5)[0] - 0.045)
        low, high = ratio_interval(seconds, tokens)
        hits += low <= 0.02 <= high
    assert 0.93 <= hits / RUNS <= 0.97


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_ratios_of_short_runs(spread):
    """Engine seconds per token of 60 requests, few of which have long outputs and carry the bill."""
    truth, hits, ends = (0.2 * math.exp(0.32) + math.exp(spread**2 / 2)), 0, []
    truth /= math.exp(0.32) + math.exp(spread**2 / 2)
    for seed in range(RUNS):
        rng = np.random.default_rng([60, seed])
        into, out = np.exp(0.8 * rng.standard_normal(60)), np.exp(spread * rng.standard_normal(60))
        low, high = ratio_interval(0.2 * into + out, into + out)
        hits += low <= truth <= high
        ends.append(high * (into + out).sum() / (0.2 * into + out).sum())
    assert 0.93 <= hits / RUNS <= 0.97
    assert np.quantile(ends, 0.95) < 1.4  # times the value


def short_run(rng, spread, n=60):
    """Tokens per bin (inputs at a quarter) and seconds per bin of an open loop with its ramp and drain."""
    sent = np.cumsum(rng.exponential(1, n))
    length, into = np.minimum(np.exp(spread * rng.standard_normal(n)), 30), 75 * np.exp(0.8 * rng.standard_normal(n))
    first = sent - sent[0] + 0.3
    edges = np.linspace(0, (first + 3 * length).max(), 201)
    made = (np.clip((edges[:, None] - first) / (3 * length), 0, 1) * 100 * length).sum(axis=1)
    return np.diff(made) + np.histogram(first, edges, weights=into)[0], edges[1]


@pytest.mark.parametrize(("spread", "furthest"), [(0.8, 2.2), (1.2, 3.5)])
def test_prices_of_short_runs(spread, furthest):
    """The price of 60 requests is known to a factor of 2 to 3 from where it was found, not to one of 12."""
    runs = [short_run(np.random.default_rng([99, seed]), spread) for seed in range(4 * RUNS)]
    truth = usd_per_1m(sum(200 * bin_s for _, bin_s in runs), sum(tokens.sum() for tokens, _ in runs))
    hits, ends = 0, []
    for seed in range(RUNS):
        found = rate(*short_run(np.random.default_rng([60, seed]), spread), n=60, unit="tokens/s", evidence="simulated")
        hits += usd_per_1m(1, found.high) <= truth <= usd_per_1m(1, found.low)
        ends.append(found.value / found.low)
    assert 0.93 <= hits / RUNS <= 0.97
    assert np.quantile(ends, 0.95) < furthest


def test_gaps_that_belong_to_requests():
    """200 requests of 50 gaps, half of the spread between requests."""
    owners, hits = np.repeat(np.arange(200), 50), {"mean": 0, "p50": 0, "p95": 0}
    truth = {"mean": math.exp(0.25), "p50": 1.0, "p95": math.exp(1.6448536 * math.sqrt(0.5))}
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        values = np.exp(0.5 * np.repeat(rng.standard_normal(200), 50) + 0.5 * rng.standard_normal(10_000))
        found = distribution(values, unit="s", evidence="simulated", owners=owners)
        for name in hits:
            hits[name] += holds(getattr(found, name), truth[name])
    assert all(0.93 <= hits[name] / RUNS <= 0.97 for name in ("p50", "p95")), hits
    assert 0.93 <= hits["mean"] / RUNS <= 0.98  # a mean always takes its neighbours for alike: a little wide here


@pytest.mark.parametrize("p", [0.9, 0.99])
def test_shares(p):
    """Attainment of requests that meet their limits or miss them together with their neighbours."""
    threshold, hits = {0.9: 1.2815516, 0.99: 2.3263479}[p], 0
    for row in alike(np.random.default_rng(3), RUNS, 2000, 0.6):
        hits += holds(share(row < threshold, unit="share", evidence="simulated"), p)
    assert 0.93 <= hits / RUNS <= 0.97


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_repeats(runs):
    """Runs that differ by more than their own intervals know: only the spread between them covers."""
    alone = together = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        values = 100 + 5 * rng.standard_normal(runs) + rng.standard_normal(runs)
        quantities = [
            Quantity(value=v, low=v - 2, high=v + 2, n=100, unit="req/s", evidence="simulated") for v in values
        ]
        together += holds(over_replicates(quantities), 100.0)
        alone += holds(quantities[0], 100.0)
    assert 0.93 <= together / RUNS <= 0.97
    assert alone / RUNS < 0.5


def study(draws):
    """Print what each process covers in ``draws``; the figures that are not as said."""
    amiss = []
    for process in PROCESSES:
        found = covered(process, draws)
        print(f"{process:30}", *(f"{name} {100 * held:5.1f}" for name, held in found.items()), sep="  ", flush=True)
        for name, held in found.items():
            known = OUTSIDE.get((process, name))
            # What is outside is said openly, and held: not worse, and taken off the list when it is mended.
            as_said = abs(held - known) <= 0.006 and not 0.93 <= held <= 0.97 if known else 0.93 <= held <= 0.97
            amiss += [] if as_said else [f"{process}, {name}: {held:.1%}"]
    return amiss


if __name__ == "__main__":
    if amiss := study(tuple(int(draw) for draw in sys.argv[1:]) or DRAWS):
        sys.exit("not as said: " + "; ".join(amiss))
