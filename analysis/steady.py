"""The part of a run in which load and speed stay what they are: without ramp, without drain, without drift.

Ramp and drain move a price: what they do to that of a measured run is in tests/test_steady.py. In an open loop requests
in flight that grow are a queue; one that only grows is a backlog whose end no finite run sees (`only_grew`).

The error of a series that drifts must not hold the drift, or the drift hides itself: blocks of a tenth about one mean,
or about two, still see a ramp, a step up and down again, or a peak as noise. Straight lines between the two largest
changes take all of these out, and leave noise nearly as it was (`without_trend`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.check import Check, limit
from harness.analysis.metrics import Window
from harness.analysis.rows.read import Run
from harness.analysis.stats.autocorrelation import long_run_variance
from harness.analysis.stats.intervals import Evidence, Quantity, holding_both, rate

CHANGES = 2
SHORTEST = 0.1
"""Share of the series between two changes, at least."""
FEWEST = 3


def without_trend(values: Floats) -> Floats:
    """The series less its least-squares lines, one before, between and after its `CHANGES` largest changes.

    Changes are found one by one, each where it takes most off the squares that are left (binary segmentation,
    Vostrikova, Soviet Mathematics Doklady 24, 1981).
    """
    series = values - values.mean()  # sums of squares stay small
    least = max(FEWEST, round(SHORTEST * len(series)))
    cuts = [0, len(series)]
    for _ in range(CHANGES):
        found = [_change(series[a:b], least) for a, b in itertools.pairwise(cuts)]
        gain, k = max((gain, k) for k, (gain, _) in enumerate(found))
        if gain <= 0:
            break
        cuts.insert(k + 1, cuts[k] + found[k][1])
    return np.concatenate([_beyond_line(series[a:b]) for a, b in itertools.pairwise(cuts)])


def _change(part: Floats, least: int) -> tuple[float, int]:
    """(what two lines take off the squares about one, how many values the first has); (0, 0) when it is too short."""
    n = len(part)
    if n < 2 * least:
        return 0.0, 0
    before, after = _squares(part), _squares(part[::-1])[::-1]
    both = before[least - 1 : n - least] + after[least : n - least + 1]
    at = int(both.argmin())
    return float(before[-1] - both[at]), least + at


def _squares(part: Floats) -> Floats:
    """Sum of squares about the line through the first 1, 2, 3 ... values."""
    k, x = np.arange(1.0, len(part) + 1), np.arange(float(len(part)))
    sum_x, sum_y = np.cumsum(x), np.cumsum(part)
    xx = np.cumsum(x * x) - sum_x**2 / k
    xy = np.cumsum(x * part) - sum_x * sum_y / k
    explained = np.divide(xy**2, xx, out=np.zeros(len(part)), where=xx > 0)
    squares: Floats = np.cumsum(part * part) - sum_y**2 / k - explained
    return squares


def _beyond_line(part: Floats) -> Floats:
    x = np.arange(len(part)) - (len(part) - 1) / 2
    slope = float(x @ part) / max(1.0, float(x @ x))
    beyond: Floats = part - part.mean() - slope * x
    return beyond


LARGEST_DRAIN = 0.1
"""Of the window: more of it moves a price by more than most intervals admit."""


def steady_part(run: Run, window: Window | None) -> Steady | None:
    """Where requests in flight and tokens stay what they are; None without a window."""
    if window is None:
        return None
    work = run.chunks.output_tokens + metrics.binned(*metrics.input_token_events(run.rows), window)
    return steady_window(metrics.in_flight(run.rows, window), work, start_s=window.start_s, bin_s=window.bin_s)


def steady_check(run: Run, steady: Steady | None) -> Check:
    """Load and speed stayed what they were for a good part of the run: else figures are those of a ramp or queue."""
    bound = "a part without ramp, drain and drift"
    if steady is None:
        return limit("steady_state", None, "nothing was sent and ended", bound, "nothing to do")
    if steady.found and steady.start_s is not None and steady.end_s is not None:
        observed = f"from {steady.start_s:.0f} s to {steady.end_s:.0f} s"
    else:
        observed = steady.reason or "none"
    longer = "let it run longer"
    advice = longer if run.manifest.spec.mode == "closed" else f"{longer}, or at a rate that the server keeps up with"
    return limit("steady_state", steady.found, observed, bound, advice)


def drain_check(run: Run, window: Window | None) -> Check:
    """Open loop: how much of the window lies after the last request was due, when the servers empty and are paid for.

    A short run of long answers is drain to a large part: its tokens/s are below what the same load gives for hours.
    """
    bound = f"at most {LARGEST_DRAIN:.0%} of the window after the last request was due"
    if run.manifest.spec.mode != "open" or window is None:
        return limit("drain", None, "closed loop or no window", bound, "nothing to do")
    sent = np.isfinite(run.rows.sent_s)
    last_s = float(run.rows.scheduled_s.max(where=sent, initial=-np.inf))
    drain_s = max(0.0, window.end_s - last_s)
    advice = (
        "no request came in that time and it is paid for: tokens/s come out low and the price high, by up to that "
        "share; a longer run (a longer trace, a higher --limit)"
    )
    share = drain_s / window.duration_s
    observed = f"{drain_s:.1f} of {window.duration_s:.1f} s ({share:.0%}) after the last request was due"
    return limit("drain", share <= LARGEST_DRAIN, observed, bound, advice)


def steady_rates(
    run: Run, window: Window | None, steady: Steady | None, total: Quantity, output: Quantity
) -> tuple[Quantity, Quantity]:
    """Tokens/s and output tokens/s of the steady part; ``total`` and ``output`` are those of the whole run, not known
    where they are not. None of arrivals: what is quiet there is the traffic's own, and to leave it out would sell hours
    that are paid for.
    """
    arrive = run.manifest.spec.mode != "closed"
    if window is None or steady is None or not steady.found or arrive:
        why = "nothing was sent and ended" if steady is None else steady.reason
        why = "not a closed loop: its quiet stretches are part of the load" if arrive else why
        none = [
            q if q.value is None else replace(q, value=None, low=None, high=None, note=why) for q in (total, output)
        ]
        return none[0], none[1]
    part, bin_s = slice(steady.first, steady.last), window.bin_s

    def within(whole: Quantity, per_bin: Floats) -> Quantity:
        if whole.value is None:
            return whole
        return steady_rate(per_bin[part], bin_s, n=whole.n, unit=whole.unit, evidence=whole.evidence, note=whole.note)

    into = metrics.binned(*metrics.input_token_events(run.rows), window)
    return within(total, run.chunks.output_tokens + into), within(output, run.chunks.output_tokens)


BEGINNING = 0.1
"""Of the steady part of a closed loop."""


def steady_rate(
    per_bin: Floats, bin_s: float, *, n: int, unit: str, evidence: Evidence, note: str | None = None
) -> Quantity:
    """Events or tokens per second over the steady part of a closed loop, as `analysis.stats.intervals.rate`.

    Its slots begin all at once, none in the middle of a long answer, so at first more requests come and fewer tokens
    are written than later (3 % and 0.2 % of a run of 60 s whose answers have a heavy tail). The interval holds with and
    without the beginning.
    """
    whole, later = (
        rate(part, bin_s, n=n, unit=unit, evidence=evidence, note=note)
        for part in (per_bin, per_bin[round(BEGINNING * len(per_bin)) :])
    )
    return holding_both(whole, later)


GROWN = 0.05
"""Of what was due in the stretch: a smaller growth is nothing that a minute can tell from chance."""


def only_grew(due_s: Floats, finished_s: Floats, start_s: float, end_s: float) -> bool:
    """Whether what was due and not finished grew from the first third of [start_s, end_s] to the last, beyond overlap.

    ``due_s`` and ``finished_s`` of every request, NaN where it never finished. The backlog counts what waits anywhere:
    at the server, in the client, behind the turn before it. Unstable: its lowest of the last third lies above its
    highest of the first, and it grew by more than `GROWN` of what was due.
    """
    if not len(due_s) or end_s <= start_s:
        return False
    at = np.linspace(start_s, end_s, 121)
    due = np.searchsorted(np.sort(due_s), at, side="right")
    done = np.searchsorted(np.sort(finished_s[np.isfinite(finished_s)]), at, side="right")
    backlog = due - done
    first, last = backlog[:41], backlog[-41:]
    return bool(last.min() > first.max() and backlog[-1] - backlog[0] > GROWN * (due[-1] - due[0]))


def backlog_grew(run: Run) -> bool | None:
    """`only_grew` of a run's measured requests, by their planned times; None in a closed loop, which has no backlog."""
    due_s = run.planned_scheduled_s
    if run.manifest.spec.mode != "open" or not len(due_s):
        return None
    return only_grew(due_s, run.rows.finished_s, float(due_s[0]), float(due_s[-1]))


def backlog_check(run: Run) -> Check:
    """Open loop: the server kept up. Where its backlog only grew, latencies say how long the run was, no more."""
    grew = backlog_grew(run)
    observed = {None: "closed loop or nothing due", True: "it only grew", False: "it did not only grow"}[grew]
    advice = "more came than was done, so any latency is reached in time: no SLO is kept at this load; send less"
    return limit("backlog", None if grew is None else not grew, observed, "no backlog that only grows", advice)


PLATEAU = 0.9
"""Share of the level that counts as being at it."""
NOISE = 2.0
FEWEST_BINS = 20
SHORTEST_S = 10.0
SMALLEST_PART = 0.25
"""Of the run: a shorter plateau is a peak."""
DRIFT_BLOCK, DRIFT_CRITICAL = 0.1, 3.75
"""99 % point of the largest partial sum over its error, for 100 bins or more without drift whose neighbours are alike
(correlation 0.5); measured again by tests/test_steady.py. High, since lines between changes also take out noise."""
DRIFT_LEVEL = 0.01
LARGEST_DRIFT = 0.10
"""A change that is real but smaller than this is said, and no reason to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steady:
    """Where a run is steady, or why it is not.

    ``first`` and ``last`` are bins: the window is ``bins[first:last]``. ``drift`` is the largest change between thirds
    of the window, as a share of its mean, by series; ``drifting`` names the series whose change is beyond chance
    (`DRIFT_LEVEL`) and beyond `LARGEST_DRIFT`.
    """

    start_s: float | None
    end_s: float | None
    first: int
    last: int
    level: float | None
    """Requests in flight on the plateau."""
    drift: dict[str, float]
    drifting: list[str]
    reason: str | None

    @property
    def found(self) -> bool:
        """A steady window exists."""
        return self.reason is None

    @property
    def duration_s(self) -> float | None:
        """Length of the window; None without one."""
        return None if self.start_s is None or self.end_s is None else self.end_s - self.start_s


def steady_window(in_flight: Floats, tokens: Floats, *, start_s: float, bin_s: float) -> Steady:
    """The steady window of a run in equal bins of ``bin_s`` from ``start_s`` on.

    ``in_flight``: requests in flight, time average per bin (or a server's running batch). ``tokens``: output tokens per
    bin (or any work done). The level is the median of ``in_flight`` as requests see it (each bin weighted by its
    requests), so a long ramp or drain does not lower it. The window reaches from the first to the last bin within 10 %
    of the level, or within twice the noise of the plateau where that is more. Then neither series may drift: the
    largest partial sum of deviations (OLS-CUSUM, Ploberger and Kraemer, Econometrica 60(2), 1992) over its batch-means
    error about the trend (`without_trend`), at the 1 % level. With drift the window is still given, beside the reason.
    """
    total = len(in_flight)
    if total != len(tokens):
        raise ValueError(f"{total} bins of requests in flight, {len(tokens)} of tokens")
    whole = float(in_flight.sum()) if total else 0.0
    if not (whole > 0 and math.isfinite(whole) and np.isfinite(tokens).all()):
        return _none("nothing was in flight")
    level = _level(in_flight)
    at_level = np.flatnonzero(in_flight >= min(PLATEAU * level, level - NOISE * _noise(in_flight, level)))
    first, last = int(at_level[0]), int(at_level[-1]) + 1
    bins, seconds = last - first, (last - first) * bin_s
    if bins < FEWEST_BINS or seconds < SHORTEST_S:
        return _none(f"too short: {seconds:.3g} s at its level, needs {SHORTEST_S:g} s and {FEWEST_BINS} bins", level)
    if bins < SMALLEST_PART * total:
        return _none(f"only {bins / total:.0%} of the run is at its level: a peak", level)
    changes = {name: _drift(values[first:last]) for name, values in (("in_flight", in_flight), ("tokens", tokens))}
    drifting = [name for name, (size, beyond) in changes.items() if beyond and size > LARGEST_DRIFT]
    said = " and ".join(f"{name.replace('_', ' ')} by {changes[name][0]:.0%}" for name in drifting)
    return Steady(
        start_s=start_s + first * bin_s,
        end_s=start_s + last * bin_s,
        first=first,
        last=last,
        level=level,
        drift={name: size for name, (size, _) in changes.items()},
        drifting=drifting,
        reason=f"drift within the window: {said}" if drifting else None,
    )


def _level(in_flight: Floats) -> float:
    """Median of the requests in flight, each bin weighted by its requests."""
    order = np.argsort(in_flight, kind="stable")
    cumulative = np.cumsum(in_flight[order])
    return float(in_flight[order][np.searchsorted(cumulative, cumulative[-1] / 2)])


def _noise(in_flight: Floats, level: float) -> float:
    """Spread of the bins on the plateau: from the bins above the level, which ramp and drain cannot reach."""
    above = in_flight[in_flight >= level] - level
    return 1.4826 * float(np.median(above)) if len(above) else 0.0


def _drift(values: Floats) -> tuple[float, bool]:
    """(largest change between thirds as a share of the mean, whether the series changes beyond chance)."""
    mean = float(values.mean())
    if mean <= 0:
        return 0.0, False
    thirds = [float(part.mean()) for part in np.array_split(values, 3)]
    deviations = values - mean
    largest = float(np.abs(np.cumsum(deviations)).max())
    error = math.sqrt(long_run_variance(without_trend(values), DRIFT_BLOCK))
    return (max(thirds) - min(thirds)) / mean, largest > max(DRIFT_CRITICAL * error, 1e-9 * mean * len(values))


def _none(reason: str, level: float | None = None) -> Steady:
    return Steady(
        start_s=None, end_s=None, first=0, last=0, level=level, drift={}, drifting=[], reason=reason
    )  # fmt: skip
