"""Did the servers have a processor whenever they wanted one?

Waiting for a processor is not the speed of the hardware, so a run whose servers waited too long is INVALID and has no
price. Measured as the time that server threads waited over the time that they ran, by the kernel's own count
(`harness.record.samples`). Only threads with work count: those that just wake up now and then wait many times
what they run, on an idle machine too, and slow nothing. An engine's threads also make each other wait, which is not a
fault of the measurement: `OWN_WAIT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.check import Check, check, limit
from analysis.metrics import Window
from analysis.rows.columns import floats
from analysis.rows.read import Run
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
    found = [(r, waits_of(file, window)) for r in run.manifest.replicas for file in _files(run, r)]
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


def _files(run: Run, replica: Replica) -> list[Path]:
    directory = RunDir(run.path)
    return directory.server_processors(replica.index) or [directory.server_processor(replica.index)]


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
