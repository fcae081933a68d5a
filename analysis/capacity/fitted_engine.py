"""An engine fitted to measured runs: what one step takes and how many sequences it holds, from the runs' rows alone.

A request of k + 1 tokens lives through k steps between its first token and its last. In those the replica gave T tokens
and read P prompt tokens, so that time is k x base + T x per sequence + P x per prompt token: one linear equation for
each request, solved by non-negative least squares over runs of several loads. How many sequences run at most is the
largest number seen between first and last token while others waited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Bools, Floats, Ints
from harness.analysis.rows.run import Run
from harness.analysis.stats.nonnegative import solve_non_negative
from harness.slo import Criterion

FEWEST_REQUESTS = 100
"""Of which the steps are told, over all runs."""
LARGEST_FAILED = 0.01
LARGEST_CACHED = 0.01
"""Of the input tokens: what a cache saves is not in the engine."""
LARGEST_RESIDUAL = 0.10
"""Median, over requests, of how far the fitted decode time is from the measured one."""
LARGEST_CONDITION = 30.0
"""Of the columns, each scaled to length 1 (Belsley, Kuh, Welsch 1980), as for every fit here."""
LARGEST_SPEED_ERROR = 0.03
"""A run's measured share must lie between its shares when replayed on engines so much slower and faster."""
SHARE_NOISE = 0.01
MOST_REPLAYED = 5000
"""Requests of each run that are replayed to check the engine."""
PROMPT_CHUNKS = (None, 8192, 4096, 2048, 1024, 512, 256, 128)
LONG_WAIT_STEPS = 5
"""A request waits for a place when it has no token after so many steps; before, its prompt may be being read."""
HELD = 0.01
"""A level of the batch counts as reached when it was held for this share of the time in which others waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedEngine:
    """One replica: base + per_sequence x sequences + per_prompt_token x prompt tokens, for each step, s."""

    base_s: float
    per_sequence_s: float
    per_prompt_token_s: float
    max_num_seqs: int
    max_num_batched_tokens: int | None
    """Of a step; longer prompts are read in chunks. That one of `PROMPT_CHUNKS` with which replays of the runs have the
    measured times to first token; None: every prompt is read in one step."""
    limit_seen: bool
    """Others waited at that number of sequences. False: it is the most that was seen, and the server may hold more."""
    overhead_s: float
    """What a first token takes beyond its steps: network, HTTP, tokenizing. Median over the run of the lightest load,
    against its replay."""
    residual: float
    """Median, over requests, of |fitted / measured decode time - 1|."""
    requests: int
    """That it was fitted to."""

    def slower(self, factor: float) -> FittedEngine:
        """The same engine, every step so many times as long."""
        return replace(
            self, base_s=self.base_s * factor, per_sequence_s=self.per_sequence_s * factor,
            per_prompt_token_s=self.per_prompt_token_s * factor,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests in order of their arrival."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    """At least 1."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def chosen(self, which: Bools | Ints) -> Requests:
        """Some of them."""
        return Requests(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTimes:
    """When each request had its first token and its last, on the clock of the arrivals; NaN: its replica failed."""

    first_token_s: Floats
    finished_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How many replicas there shall be from each moment on, on the clock of the arrivals."""

    at_s: Floats
    """Ascending; before the first there are as many as from then on."""
    replicas: Ints
    start_s: float
    """Until what is new answers."""
    fails_s: float | None = None
    """Mean time between failures of a replica that answers, which lose its requests; None: none fails."""


Engine = Callable[[FittedEngine, Requests, int | Changes], ServedTimes]
"""What so many replicas, which take requests in turn, make of them in virtual time.

`analysis` does not import the simulator: the command line hands it in.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedRun:
    """The successful requests of one run, in order of their sending."""

    run: str
    replicas: int
    replica: Ints
    sent_s: Floats
    first_s: Floats
    last_s: Floats
    """Last chunk."""
    finished_s: Floats
    input_tokens: Ints
    output_tokens: Ints
    cached_tokens: float
    """Of all of them; 0 when the server did not say."""
    failed: int
    """Requests without the times of their tokens, those that came in clumps among them."""

    def __len__(self) -> int:
        return len(self.sent_s)

    @property
    def requests(self) -> Requests:
        """What was asked of the servers."""
        return Requests(arrival_s=self.sent_s, input_tokens=self.input_tokens, output_tokens=self.output_tokens)

    @property
    def served(self) -> ServedTimes:
        """What was measured."""
        return ServedTimes(first_token_s=self.first_s, finished_s=self.finished_s)

    def part(self, which: Bools | slice) -> ObservedRun:
        """Some of its requests."""
        arrays = [f.name for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)]
        return replace(self, **{name: getattr(self, name)[which] for name in arrays})


class NotFittedError(Exception):
    """No engine can be told from the runs; the words say why."""


def observe(run: Run, replicas: int) -> ObservedRun:
    """What a fit needs of a run: of each streamed success who served it, and when."""
    rows = run.rows
    served_by = [np.zeros(0)]
    for batch, keep, _ in run.batches():
        found = batch.column("replica").fill_null(-1).to_numpy(zero_copy_only=False)
        served_by.append(found[keep])
    known = np.isfinite(rows.sent_s) & np.isfinite(rows.first_gap_s) & (rows.error < 0)
    known &= np.isfinite(rows.input_tokens) & (rows.output_tokens >= 1) & ~metrics.clumped(rows)
    order = np.flatnonzero(known)[np.argsort(rows.sent_s[known], kind="stable")]
    first_s = rows.sent_s[order] + rows.first_gap_s[order]
    return ObservedRun(
        run=str(run.path), replicas=replicas, replica=np.concatenate(served_by)[order].astype(np.int64),
        sent_s=rows.sent_s[order], first_s=first_s, last_s=first_s + rows.decode_s[order],
        finished_s=rows.finished_s[order], input_tokens=rows.input_tokens[order].astype(np.int64),
        output_tokens=rows.output_tokens[order].astype(np.int64),
        cached_tokens=float(np.nansum(rows.cached_tokens[order])), failed=len(rows) - len(order) + run.lost,
    )  # fmt: skip


def fit_engine(runs: Sequence[ObservedRun]) -> FittedEngine:
    """The engine that explains the runs of one system best. Raises `NotFittedError` where it cannot be told."""
    asked = sum(len(run) + run.failed for run in runs)
    if not asked or sum(run.failed for run in runs) > LARGEST_FAILED * asked:
        raise NotFittedError(f"more than {LARGEST_FAILED:.0%} of the requests failed or were not streamed by token")
    if sum(run.cached_tokens for run in runs) > LARGEST_CACHED * sum(float(run.input_tokens.sum()) for run in runs):
        raise NotFittedError("the servers read part of the prompts from their prefix cache, which no step time shows")
    for run in runs:
        if len(np.unique(run.replica)) != run.replicas:
            raise NotFittedError(f"{run.run}: its rows do not say which of {run.replicas} replicas served a request")
    parts = [run.part(run.replica == r) for run in runs for r in np.unique(run.replica)]
    columns, decode_s = (np.concatenate(both) for both in zip(*(_equations(part) for part in parts), strict=True))
    if len(decode_s) < FEWEST_REQUESTS:
        raise NotFittedError(f"{len(decode_s)} answers of several tokens, at least {FEWEST_REQUESTS} are needed")
    weight = 1 / np.sqrt(columns[:, 0])  # the noise of k steps adds up to sqrt(k) of one
    weighted = columns * weight[:, None]
    condition = float(np.linalg.cond(weighted / np.maximum(np.linalg.norm(weighted, axis=0), 1e-300)))
    if condition > LARGEST_CONDITION:
        raise NotFittedError(
            f"the runs' loads are too much alike to tell a step's parts apart (condition number {condition:.0f}, at "
            f"most {LARGEST_CONDITION:.0f}): measure a light load and one near capacity"
        )
    base_s, sequence_s, prompt_s = (float(x) for x in solve_non_negative(decode_s * weight, weighted))
    if base_s + sequence_s <= 0:
        raise NotFittedError("no step time explains the answers")
    residual = float(np.median(np.abs(columns @ [base_s, sequence_s, prompt_s] / decode_s - 1)))
    if residual > LARGEST_RESIDUAL:
        raise NotFittedError(
            f"steps of a linear engine are {residual:.0%} off the measured answers, at most {LARGEST_RESIDUAL:.0%}"
        )
    held, waited = zip(*(_most_held(part) for part in parts), strict=True)
    return FittedEngine(
        base_s=base_s, per_sequence_s=sequence_s, per_prompt_token_s=prompt_s, max_num_seqs=max(1, *held),
        max_num_batched_tokens=None,
        limit_seen=any(w and h == max(held) for h, w in zip(held, waited, strict=True)),
        overhead_s=0.0, residual=residual, requests=len(decode_s),
    )  # fmt: skip


def confirmed(
    fitted: FittedEngine, engine: Engine, runs: Sequence[ObservedRun], criteria: Sequence[Criterion]
) -> FittedEngine:
    """The fitted engine with prompt chunks, and at a speed, that give the measured runs again when replayed on it.

    Raises `NotFittedError` when other shares of their requests keep the limits then.
    """
    runs = [run.part(slice(MOST_REPLAYED)) for run in runs]
    best, least = fitted, np.inf
    for chunk in PROMPT_CHUNKS:
        one = replace(fitted, max_num_batched_tokens=chunk, overhead_s=0.0)
        replayed = [engine(one, run.requests, run.replicas) for run in runs]
        # of the lightest load, where hardly anyone waits for others
        beyond = [run.first_s - served.first_token_s for run, served in zip(runs, replayed, strict=True)]
        light = int(np.argmin([(run.first_s - run.sent_s).mean() for run in runs]))
        overhead_s = max(0.0, float(np.median(beyond[light])))
        off = sum(_first_token_error(r, delayed(s, overhead_s)) for r, s in zip(runs, replayed, strict=True))
        if off < least:
            best, least = replace(one, overhead_s=overhead_s), off
    best = _at_measured_speed(best, engine, runs)
    ends = [best.slower(1 + LARGEST_SPEED_ERROR), best.slower(1 - LARGEST_SPEED_ERROR)]
    for run in runs:
        replayed = [delayed(engine(one, run.requests, run.replicas), best.overhead_s) for one in ends]
        for criterion in criteria:
            share = float(within(run.requests, run.served, criterion).mean())
            low, high = (float(within(run.requests, served, criterion).mean()) for served in replayed)
            reach = SHARE_NOISE + 2 * np.sqrt(share * (1 - share) / len(run))
            if not low - reach <= share <= high + reach:
                raise NotFittedError(
                    f"{run.run}: {share:.1%} of the requests kept {criterion.name}; replayed on engines "
                    f"{LARGEST_SPEED_ERROR:.0%} slower and faster than the fitted one {low:.1%} and {high:.1%} do"
                )
    return best


def _at_measured_speed(fitted: FittedEngine, engine: Engine, runs: Sequence[ObservedRun]) -> FittedEngine:
    """The engine whose replays decode for as long as the runs did, all answers together.

    The equations know neither the steps in which a prompt that is read in chunks is a sequence without a token, nor how
    tokens fell within an answer: they are 1 % off where the server is full, and in a backlog that is several of a
    share.
    """

    def decode_s(served: Sequence[ServedTimes]) -> float:
        return sum(float((one.finished_s - one.first_token_s).sum()) for one in served)

    factors = (1 - LARGEST_SPEED_ERROR, 1.0, 1 + LARGEST_SPEED_ERROR)
    took_s = [
        decode_s([engine(fitted.slower(factor), run.requests, run.replicas) for run in runs])
        for factor in factors
    ]  # fmt: skip
    measured_s = sum(float((run.last_s - run.first_s).sum()) for run in runs)
    return fitted.slower(float(np.interp(measured_s, np.maximum.accumulate(took_s), factors)))


def _first_token_error(run: ObservedRun, served: ServedTimes) -> float:
    """How far the mean time to first token of a replay is from the measured one, as a logarithm."""
    means = [float((first_s - run.sent_s).mean()) for first_s in (served.first_token_s, run.first_s)]
    return float(abs(np.log(means[0] / means[1]))) if min(means) > 0 else np.inf


def delayed(served: ServedTimes, by_s: float) -> ServedTimes:
    """The same, everything later."""
    return ServedTimes(first_token_s=served.first_token_s + by_s, finished_s=served.finished_s + by_s)


def within(requests: Requests, served: ServedTimes, criterion: Criterion) -> Bools:
    """Which requests keep all limits of a criterion. Raises `NotFittedError` for a limit that is not simulated."""
    kept: Bools = np.ones(len(requests), dtype=np.bool_)
    for metric, limit_s in criterion.limits.items():
        if metric == "ttft":
            kept &= served.first_token_s - requests.arrival_s <= limit_s
        elif metric == "e2e":
            kept &= served.finished_s - requests.arrival_s <= limit_s
        elif metric == "tpot":
            steps = np.maximum(1, requests.output_tokens - 1)  # of one token: nothing to miss
            kept &= served.finished_s - served.first_token_s <= limit_s * steps + 1e-12
        else:
            raise NotFittedError(f"a limit on {metric} is not simulated")
    return kept


def _equations(part: ObservedRun) -> tuple[Floats, Floats]:
    """Of each answer of several tokens: steps, tokens of all, prompt tokens of all between its first and last token;
    and that time, s.
    """
    several = (part.output_tokens > 1) & (part.last_s > part.first_s)
    first_s, last_s = part.first_s[several], part.last_s[several]
    steps = (part.output_tokens[several] - 1).astype(np.float64)
    by_first = np.argsort(part.first_s, kind="stable")
    starts_s = part.first_s[by_first]
    prompts = np.concatenate(([0], np.cumsum(part.input_tokens[by_first])))
    # later tokens come evenly between first and last: cumulated, they bend where an answer begins or ends
    bends_s = np.concatenate((first_s, last_s))
    order = np.argsort(bends_s, kind="stable")
    slope = np.concatenate((steps / (last_s - first_s), -steps / (last_s - first_s)))[order]
    bends_s = bends_s[order]
    later = np.concatenate(([0.0], np.cumsum(np.cumsum(slope)[:-1] * np.diff(bends_s))))

    def between(cumulated: Floats | Ints) -> Floats:
        ends = [np.searchsorted(starts_s, at, side="right") for at in (last_s, first_s)]
        return np.asarray(cumulated[ends[0]] - cumulated[ends[1]], dtype=np.float64)

    tokens = np.interp(last_s, bends_s, later) - np.interp(first_s, bends_s, later)
    tokens += between(np.arange(len(starts_s) + 1))
    return np.column_stack((steps, tokens, between(prompts))), last_s - first_s


def _most_held(part: ObservedRun) -> tuple[int, bool]:
    """The most sequences between first and last token, and whether others waited for as long as counts."""
    n = len(part.sent_s)
    several = part.output_tokens > 1
    step_s = float(np.median((part.last_s - part.first_s)[several] / (part.output_tokens[several] - 1)))
    due_s = np.minimum(part.sent_s + LONG_WAIT_STEPS * step_s, part.first_s)
    times = np.concatenate((due_s, part.first_s, part.last_s))
    running = np.concatenate((np.zeros(n), np.ones(n), -np.ones(n)))
    waiting = np.concatenate((np.ones(n), -np.ones(n), np.zeros(n)))
    order = np.argsort(times, kind="stable")
    length_s = np.diff(times[order], append=times[order][-1:])
    level = np.cumsum(running[order]).astype(np.int64)
    busy = np.cumsum(waiting[order]) >= 1
    most = int(level[length_s > 0].max(initial=1))
    queued_s = float(length_s[busy].sum())
    held_s = np.bincount(np.maximum(level[busy], 0), weights=length_s[busy], minlength=1)
    from_top = np.cumsum(held_s[::-1])[::-1]
    long = np.flatnonzero(from_top >= HELD * queued_s) if queued_s > 0 else np.zeros(0, dtype=np.int64)
    if not len(long) or long[-1] < 1:
        return most, False
    # waiting while the batch was smaller than elsewhere is no limit
    return (int(long[-1]), True) if long[-1] >= most - 1 else (most, False)
