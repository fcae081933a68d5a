"""Was the load generator good enough to judge a server by? Its schedule, its processor, its clock, its own count.

A late client sends late, and shifts every figure that the kernel did not stamp for it; nothing in the rows says so: the
checks here use what the workers saw of themselves beside the rows. Bounds come from what is measured: an SLO, the gaps
between tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.check import Check, check, limit, ms
from harness.analysis.rows.read import Run
from harness.analysis.rows.run import NS
from harness.record.run_spec import BATCH_READS_EVERY_NS, BATCH_READS_FROM
from harness.slo import strictest

CPU_BOUND = 0.9
ALONE_FROM = 6
"""With 1 % late, one or more of n are late with 1 - 0.99^n: below 5 % up to five requests, where one is evidence."""
ALONE_MEAN = 0.1
"""Of the lag bound: what a single late request may add to the mean of lag, and so of TTFT."""
UNSTAMPED_BOUND = 0.01
"""Share of reads without the kernel's stamp that no p99 sees, however late they are."""
SHARED_BOUND = 0.05
"""Share of chunks with the stamp of the chunk before; beyond it, who brought them together decides on p95 of itl."""
LITTLE_BOUND = 0.05
LAG_OF_TTFT = 0.05
"""Lag is counted into TTFT, so it may use up at most this share of the TTFT limit."""
LAG_FLOOR_S = 0.002
"""What this generator keeps at half of its ceiling; a TTFT limit below 40 ms cannot be judged more finely."""
STAMPS_FLOOR_S, STAMPS_OF_ITL = 0.001, 0.1
"""A loop as late as this changes no figure that is printed: a tenth of a gap, or below what a network does anyway."""
LOOP_FLOOR_S = 0.02
"""Stamps this late are 5 % of the strictest TTFT limit in MLPerf Inference (450 ms, Llama-2-70B interactive)."""
MOVED_BOUND = 0.05
GAP_BOUND, GAP_FLOOR_S = 0.1, 0.005
"""Arrivals closer together than one engine step (5 ms on the fastest) reach the scheduler together in any case."""
MIN_ARRIVALS = 20
TICK_S = 0.01
"""In flight is sampled this often by the workers."""
LITTLE_FROM_S = 1.0
"""Of a shorter run there are too few samples: one late turn of the loop is a large part of it."""
READS_CHOSEN_S = 0.1
"""So often a worker chooses whether it reads in batches, by the events of that time."""


def lag_bound_s(run: Run, slo: Mapping[str, float]) -> float:
    """How late a request may be sent, s: the run's own bound, or 5 % of the TTFT limit where that is less."""
    bound = run.manifest.spec.lag_bound_s
    limit = strictest(slo, "ttft")
    return bound if limit is None else min(bound, max(LAG_FLOOR_S, LAG_OF_TTFT * limit))


def checks(run: Run, bound_s: float) -> list[Check]:
    """All of these; ``bound_s``: how late a request may be sent."""
    return [
        lag(run, bound_s), arrival_process(run), generator_cpu(run), generator_lag(run, bound_s), littles_law(run),
        stamps(run), generator_stall(run, bound_s),
    ]  # fmt: skip


def lag(run: Run, bound_s: float) -> Check:
    """Requests went out when planned, in an open loop: at most 1 % of them later than the bound.

    Below 100 requests a single late one is no evidence of more than 1 % (`ALONE_FROM`), and no percentile that is
    printed moves by more than one rank for it, however late it was. The mean moves by its lag / n, which must stay
    below a tenth of the bound.
    """
    values = metrics.lag(run.rows)
    values = values[np.isfinite(values)]
    n = len(values)
    if not n or run.manifest.spec.mode != "open":
        return check("lag", None, "closed loop" if n else "nothing sent", ms(bound_s), "nothing to do")
    late = values > bound_s
    over, moved_s = int(late.sum()), float((values - bound_s).sum(where=late)) / n
    ok = over == 0 or (over == 1 and n >= ALONE_FROM and moved_s <= ALONE_MEAN * bound_s)
    wanted = f"at most {ms(bound_s)}"
    if n >= 100:
        worst, which = _worst(values)
        ok, observed = worst <= bound_s, f"{which} {ms(worst)}"
    else:
        observed = f"max {ms(float(values.max()))}"
        if over:
            observed += f", {over} of {n} late"
            wanted += f", a single one aside that moves the mean by at most {ms(ALONE_MEAN * bound_s)}"
    advice = "the generator could not keep the plan's times: more --workers, a lower rate, or a higher concurrency cap"
    return check("lag", ok, observed, wanted, advice)


def _worst(values: Floats) -> tuple[float, str]:
    """99th percentile, or the largest of fewer than 100. Reorders the values."""
    if len(values) < 100:
        return float(values.max()), "max"
    return float(np.quantile(values, 0.99, method="inverted_cdf", overwrite_input=True)), "p99"


def arrival_process(run: Run) -> Check:
    """What was sent has the planned shape in time: gaps between requests, and requests in each second.

    Gaps: mean distance of the sorted gaps (Wasserstein-1), which unlike Kolmogorov-Smirnov does not take the jitter of
    an even rate for another distribution. Seconds: share of requests that fell into another second than planned; the
    seconds begin half a second before the first arrival, so that times on a grid of whole seconds lie in the middle.
    """
    sent = metrics.was_sent(run.rows)
    due, went = np.sort(run.rows.scheduled_s[sent]), np.sort(run.rows.sent_s[sent])
    if run.manifest.spec.mode != "open" or len(due) < MIN_ARRIVALS:
        why = "closed loop" if run.manifest.spec.mode != "open" else f"fewer than {MIN_ARRIVALS} requests"
        return check("arrival_process", None, why, "as planned", "nothing to do")
    off_s = float(np.abs(np.sort(np.diff(due)) - np.sort(np.diff(went))).mean())
    mean_s = float(due[-1] - due[0]) / (len(due) - 1)
    bound_s = max(GAP_BOUND * mean_s, GAP_FLOOR_S)
    seconds = np.arange(due[0] - 0.5, max(due[-1], went[-1]) + 1.0)
    planned, got = (np.histogram(times, bins=seconds)[0] for times in (due, went))
    moved = float(np.abs(planned - got).sum()) / 2 / len(due)
    return check(
        "arrival_process",
        off_s <= bound_s and moved <= MOVED_BOUND,
        f"gaps {ms(off_s)} off in the mean, {moved:.1%} of requests in another second",
        f"gaps at most {ms(bound_s)} off, at most {MOVED_BOUND:.0%} in another second",
        "the generator bunched or stretched the planned arrivals: more --workers, a lower rate, or no concurrency cap",
    )


def generator_cpu(run: Run) -> Check:
    """No load worker was short of processor, in the mean and in its worst second (p99 of seconds from 100 on)."""
    shares = [w.cpu_share for w in run.manifest.workers if w.cpu_share is not None]
    seconds = run.seconds.cpu_share[run.seconds.whole & np.isfinite(run.seconds.cpu_share)]
    words = [f"busiest worker {max(shares):.0%} of a core"] if shares else []
    if len(seconds):
        worst, which = _worst(seconds)
        words.append(f"{which} second {worst:.0%}")
        shares.append(worst)
    ok = max(shares) < CPU_BOUND if shares else None
    advice = "the generator was the bottleneck: more --workers or a lower rate"
    return check("generator_cpu", ok, ", ".join(words) or "not measured", f"below {CPU_BOUND:.0%}", advice)


def _loop_bound_s(run: Run, bound_s: float) -> float:
    """Latest that stamps may be before the figures are the generator's: a whole gap, or what TTFT can bear."""
    return min(bound_s, max(LOOP_FLOOR_S, run.chunks.median_itl_s or 0.0))


def generator_lag(run: Run, bound_s: float) -> Check:
    """A late event loop moved no figure: p99 lateness of the loops, where it reaches a stamp.

    The kernel stamps packets when they come, however late they are read, so TTFT and gaps are right. Lateness is in a
    figure only where the kernel gave no stamp (a worker with more than 1 % of such reads, or that does not say), and
    where events came together between two reads and share a stamp: beyond a whole gap ITL is then the client's rhythm,
    or the server's, and nobody can tell which.
    """
    late = {w.index: w.loop_lag_p99_s for w in run.manifest.workers if w.loop_lag_p99_s is not None}
    bound_s = _loop_bound_s(run, bound_s)
    wanted = f"at most {ms(bound_s)} where the kernel gave no stamp or stamps are shared"
    if not late:
        return check("generator_lag", None, "not measured", wanted, "nothing to do")
    worst_s = max(late.values())
    observed = f"p99 {ms(worst_s)}"
    if worst_s <= bound_s:
        return check("generator_lag", True, observed, wanted, "")
    bare = {w.index: 1.0 if w.unstamped_share is None else w.unstamped_share for w in run.manifest.workers}
    unstamped = max((bare[k] for k, late_s in late.items() if late_s > bound_s), default=0.0)
    shared = run.chunks.shared_stamps or 0.0
    observed += f", {min(unstamped, 1.0):.1%} of reads not stamped by the kernel, {shared:.1%} of chunks share a stamp"
    advice = "the tail of itl may be the client's rhythm"
    if unstamped > UNSTAMPED_BOUND:
        advice = "what the kernel did not stamp was stamped late, so its latencies are too long"
    advice += ": more --workers, or load workers on a machine of their own"
    ok = unstamped <= UNSTAMPED_BOUND and shared <= SHARED_BOUND
    return check("generator_lag", ok, observed, wanted, advice)


def littles_law(run: Run) -> Check:
    """Requests in flight as the workers saw them = request rate x mean time in flight as the rows say, over the run.

    The two come from different places: a row that is missing, made up or has a wrong time breaks the law. To a worker
    an answer is in flight until its loop has read the end, at busy times a read interval later; in its row until the
    end came.
    Source: Little, Operations Research 9(3), 1961.
    """
    seconds, bound = run.seconds, f"within {LITTLE_BOUND:.0%}"
    known = np.isfinite(seconds.in_flight)
    if seconds.unwatched or not known.any():
        return check("littles_law", None, "the workers did not watch themselves", bound, "nothing to do")
    end_s = float(seconds.t_s.max())
    if end_s < LITTLE_FROM_S:
        return check("littles_law", None, f"in flight sampled for {end_s:.2f} s only", bound, "nothing to do")
    begun, time_s = 0, 0.0
    for rows in (run.rows, run.warmup):
        within = np.isfinite(rows.sent_s) & (rows.sent_s < end_s)
        begun += int(within.sum())
        time_s += float(np.maximum(0.0, np.minimum(rows.finished_s, end_s) - rows.sent_s)[within].sum())
    if not begun:
        return check("littles_law", None, "nothing sent", bound, "nothing to do")
    seen = float((seconds.in_flight * seconds.length_s)[known].sum()) / end_s
    rate, mean_s = begun / end_s, time_s / begun
    late_s = max((w.loop_lag_p99_s or 0.0 for w in run.manifest.workers), default=0.0)
    # each request is sampled to a tick at both ends
    room = LITTLE_BOUND * max(seen, rate * mean_s) + 3 * TICK_S * math.sqrt(begun) / end_s + rate * late_s
    unread_s = _unread_s(run)
    observed = f"rows: {rate:.3g} req/s x {ms(mean_s)} = {rate * mean_s:.3g}; workers saw {seen:.3g} in flight"
    if unread_s:
        observed += f", ends read up to {ms(unread_s)} late"
    advice = "rows and workers contradict each other: rows were lost or their times are wrong; run again"
    return check("littles_law", -room <= seen - rate * mean_s <= room + rate * unread_s, observed, bound, advice)


def _unread_s(run: Run) -> float:
    """How much later than it came a worker may have noticed the end of an answer, s; 0 where none read in batches."""
    every_s = BATCH_READS_EVERY_NS / NS
    fewest = (run.manifest.spec.batch_reads_from or BATCH_READS_FROM) * READS_CHOSEN_S / every_s
    return every_s if bool((run.seconds.events >= fewest).any()) else 0.0


def stamps(run: Run) -> Check:
    """Stamps were fine enough for the gaps that were timed: p99 lateness of the event loop against the median itl."""
    late = [w.loop_lag_p99_s for w in run.manifest.workers if w.loop_lag_p99_s is not None]
    bound_s = max(STAMPS_FLOOR_S, STAMPS_OF_ITL * (run.chunks.median_itl_s or 0.0))
    observed = f"p99 {ms(max(late))} late" if late else "not measured"
    shares = [w.unstamped_share for w in run.manifest.workers]
    known = [share for share in shares if share is not None]
    if (unstamped := min(max(known, default=0.0), 1.0)) > 0:
        observed += f"; the kernel stamped {1 - unstamped:.1%} of the reads"
    if not late or max(late) <= bound_s:
        return limit("stamps", True if late else None, observed, f"at most {ms(bound_s)}", "nothing to do")
    shared = run.chunks.shared_stamps or 0.0
    if len(known) == len(shares) and unstamped <= UNSTAMPED_BOUND and shared <= UNSTAMPED_BOUND:
        observed += f"; no figure is moved: the kernel stamped the reads, and {shared:.1%} of chunks share a stamp"
        return limit("stamps", True, observed, f"at most {ms(bound_s)}, or stamped by the kernel one by one", "")
    if shared > 0:
        observed += f"; {shared:.1%} of chunks share a stamp"
    advice = "the tail of itl may be the generator's: load workers on cores of their own, or more --workers"
    return limit("stamps", False, observed, f"at most {ms(bound_s)}", advice)


def generator_stall(run: Run, bound_s: float) -> Check:
    """No load worker stood still: the longest stall of an event loop."""
    stalls = run.seconds.loop_lag_max_s[np.isfinite(run.seconds.loop_lag_max_s)]
    bound_s = _loop_bound_s(run, bound_s)
    observed = f"longest {ms(float(stalls.max()))}" if len(stalls) else "not measured"
    ok = bool(stalls.max() <= bound_s) if len(stalls) else None
    advice = "what was due in that time went out late (worker-*.arrows says when): free cores for the load workers"
    return limit("generator_stall", ok, observed, f"at most {ms(bound_s)}", advice)
