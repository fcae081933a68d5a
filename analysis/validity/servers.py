"""Did the servers have a processor whenever they wanted one, and were the first answers those of a cold server?

Waiting for a processor is not the speed of the hardware, so a run whose servers waited too long is INVALID and has no
price. Measured as the time that server threads waited over the time that they ran, by the kernel's own count
(`harness.record.host`). Only threads with work count: those that just wake up now and then wait many times
what they run, on an idle machine too, and slow nothing. An engine's threads also make each other wait, which is not a
fault of the measurement: `OWN_WAIT`.

Engines compile, capture graphs and fill caches at first: the time to the first token (without streaming: to the end)
of answers in the order of sending shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Bools, Floats
from harness.analysis.check import Check, check, limit, ms
from harness.analysis.metrics import Window
from harness.analysis.rows.columns import floats
from harness.analysis.rows.read import Run
from harness.errors import ResultsError
from harness.record.manifest import Replica, RunDir
from harness.record.samples import read_server_processor

NS = 1e9
OWN_WAIT = 0.07
"""Of its processor time, what a server waits for its own threads and those of the load. Measured: vLLM 0.32 on two
idle cores, ``make replay`` (8 streams, two engine threads that are always busy, 71 others), in its undisturbed parts of
38 and 41 s: 0.065 and 0.069 (analysis/METRICS.md). Machines with more cores have less."""
STARVED_BOUND = 0.10
"""Of its processor time, what a server may wait beyond `OWN_WAIT`."""
SMALL_WAIT = 0.01
"""Of the window: waits that are no longer together slow nothing by more, however little the server ran."""
COVERED = 0.5
"""Share of the window that must have been watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """What a server ran and waited over a window; all in seconds."""

    run_s: float
    """Of threads with work, as all here."""
    delay_s: float
    """Ready to run without a processor, added up over threads."""
    stolen_s: float
    """Taken from it by the host of its virtual machine: its part, by processor time, of what the machine lost."""
    watched_s: float
    """Of the window."""

    @property
    def share(self) -> float:
        """Waited over run."""
        return (self.delay_s + self.stolen_s) / self.run_s if self.run_s > 0 else 0.0

    @property
    def starved(self) -> bool:
        """Whether that is more than a server on an idle machine waits, and enough to slow anything."""
        small = self.delay_s + self.stolen_s <= SMALL_WAIT * self.watched_s
        return not small and self.share > OWN_WAIT + STARVED_BOUND


def starved(run: Run, window: Window | None) -> Check:
    """No server waited for a processor for longer than `OWN_WAIT` + `STARVED_BOUND` of the processor time it used.

    The worst server decides, of one that spans several hosts the worst part. What cannot be read is a limit.
    """
    bound = f"at most {OWN_WAIT + STARVED_BOUND:.0%} of it, {OWN_WAIT:.0%} for its own threads"
    if run.manifest.engine == "url" or window is None or not run.manifest.replicas:
        why = "not checked: " + ("no window" if window is None else "the server was not started by us")
        return limit("starved", False, why, bound, "see that no other work runs on the server's processors")
    if run.manifest.engine == "simulated" and run.manifest.model_facts.get("clock") == "virtual":
        return limit("starved", None, "no server ran: it was simulated in virtual time", bound, "nothing to do")
    directory = RunDir(run.path)
    found = [
        (r, waits_of(file, window))
        for r in run.manifest.replicas
        for file in directory.server_processors(r.index) or [directory.server_processor(r.index)]
    ]
    known = [(r, waits) for r, waits in found if waits is not None]
    replica, worst = max(known, key=lambda one: one[1].share, default=(None, None))
    if replica is not None and worst is not None:
        observed = f"replica {replica.index} waited {worst.share:.0%} of the {worst.run_s:,.1f} s it ran"
        if worst.run_s > 0:
            delay, stolen = worst.delay_s / worst.run_s, worst.stolen_s / worst.run_s
            observed += f" ({delay:.0%} behind other threads, {stolen:.0%} stolen by its host)"
        if worst.starved:
            return check("starved", False, observed, bound, _advice(replica, worst))
        if len(known) == len(found):
            return check("starved", True, observed, bound, "")
    missing = ", ".join(str(k) for k in dict.fromkeys(r.index for r, waits in found if waits is None))
    why = f"not checked: the processor times of replica {missing} are not known"
    advice = "they need Linux (/proc/PID/task/TID/schedstat) and room on the disk; see what else ran on its processors"
    return limit("starved", False, why, bound, advice)


def _advice(replica: Replica, waits: Waits) -> str:
    what = "other work ran on its processors, so it is faster and cheaper than this: end that, or move it elsewhere"
    if waits.stolen_s > waits.delay_s:
        what = "its host gave its processors to other virtual machines: measure on one whose processors are its own"
    advice = f"{what}, and run again ({RunDir(Path()).server_processor(replica.index)} says when)"
    if replica.nice:
        advice += f"; it ran at nice {replica.nice}: start its Ray with RAY_worker_niceness=0"
    return advice


def waits_of(file: Path, window: Window) -> Waits | None:
    """What one file says of a window; None when less than `COVERED` of it is known, or nothing was counted."""
    try:
        table = read_server_processor(file)
    except ResultsError:
        return None
    end_s, length_s, all_s, run_s, delay_s, busy_s, stolen_s = (
        floats(table.column(f"{name}_ns")) / NS
        for name in ("t", "length", "run", "work_run", "work_delay", "host_busy", "host_stolen")
    )
    begin_s = end_s - length_s
    inside_s = np.clip(np.minimum(end_s, window.end_s) - np.maximum(begin_s, window.start_s), 0.0, None)
    counts = (length_s > 0) & (all_s >= 0) & (run_s >= 0) & (delay_s >= 0)
    weight = np.divide(inside_s, length_s, out=np.zeros_like(length_s), where=counts)
    its = np.divide(run_s, busy_s, out=np.zeros_like(run_s), where=busy_s > 0)
    watched_s = float((weight * length_s).sum())
    if (weight * all_s).sum() <= 0 or watched_s < COVERED * window.duration_s:
        return None
    stolen = np.maximum(np.nan_to_num(stolen_s * np.minimum(its, 1.0)), 0.0)
    run, delay, taken = (float((weight * times).sum()) for times in (run_s, delay_s, stolen))
    return Waits(run_s=run, delay_s=delay, stolen_s=taken, watched_s=watched_s)


# --------------------------------------------------------------------------------------------------------- cold start

LEAST = 20
SLOW = 2.0
"""An answer is slow when it takes so many times the median of those after the first wave."""
LARGEST = 0.25
"""A first wave is no larger a share of a run: what is larger is drift."""
CHANCE = 1e-3
"""By which so many slow answers in a row may be the first ones."""
FAR_LONGER = 2
"""And the run of slow ones must be so many times the longest later one: a queue makes runs, too."""
FEW, FAR = 3, 5.0
"""Fewer slow answers prove nothing by their number. Or each takes so many times the slowest of the others."""
ADVISED = 8
"""So many requests of warm-up are advised at least, and a power of two: a few more than were slow."""


def cold_start(run: Run) -> Check:
    """The first answers took no longer than those after them: a p95 that they decide is not the service's."""
    bound = "the first answers like the others"
    streamed = run.manifest.spec.stream
    took_s = (metrics.service_ttft if streamed else metrics.service_e2e)(run.rows)
    known = np.flatnonzero(np.isfinite(took_s))
    known = known[np.argsort(run.rows.sent_s[known], kind="stable")]
    took_s, tokens = took_s[known], run.rows.input_tokens[known]
    if len(took_s) < LEAST:
        return limit("cold_start", None, f"{len(took_s)} answers, too few to compare", bound, "nothing to do")
    first = first_wave(took_s, tokens)
    if not first:
        return limit("cold_start", True, "no slow first wave", bound, "")
    what = "to the first token" if streamed else "to the end"
    wave, rest = float(np.median(took_s[:first])), float(np.median(took_s[first:]))
    observed = f"the first {first} of {len(took_s)} answers took {ms(wave)} {what}, the others {ms(rest)} (medians)"
    advised = max(ADVISED, 1 << (first - 1).bit_length())
    advice = f"a server compiles and fills its caches at first: keep that out of every figure with --warmup {advised}"
    return limit("cold_start", False, observed, bound, advice)


def first_wave(took_s: Floats, tokens: Floats) -> int:
    """How many answers at the beginning are those of a cold server; 0 where they are like the others.

    ``tokens``: of their prompts, NaN where not known; a longer prompt takes longer and is no cold start.
    """
    n = len(took_s)
    slow = took_s > SLOW * np.median(took_s)
    first = n if slow.all() else int(np.argmin(slow))
    if not 0 < first <= LARGEST * n:
        return 0
    wave, rest = took_s[:first], took_s[first:]
    usual = float(np.median(rest))
    later = rest > SLOW * usual
    chance = ((later.sum() + 1) / (len(rest) + 1)) ** first
    by_number = first >= FEW and chance <= CHANCE and first > FAR_LONGER * _longest_run(later)
    if not by_number and wave.min() <= FAR * rest.max():
        return 0
    longer = float(tokens[:first].mean() / tokens[first:].mean())
    return first if np.median(wave) > SLOW * usual * (longer if longer > 1 else 1.0) else 0


def _longest_run(flags: Bools) -> int:
    """The most that are true in a row."""
    ends = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return int((ends[1::2] - ends[::2]).max()) if len(ends) else 0
