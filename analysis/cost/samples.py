"""What servers counted of their own work, interval by interval: the data that a bill is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from analysis.arrays import Floats
from analysis.metrics import Window
from analysis.rows.read import Run
from analysis.validity.counters import shared_addresses
from harness.record.manifest import RunDir
from harness.record.samples import read_server_metrics

SMALLEST_ROWS = 8
"""With fewer intervals that of the division covers too seldom; with so many it does (`tests/test_split.py`)."""
GROUP_S = 5.0
"""Servers count a prompt when its last part is read, so single seconds put it into the wrong one."""
BUSY_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What servers counted, per interval of one server in time order; arrays of one length, ``None``: not counted."""

    seconds: Floats
    uncached_input: Floats
    cached_input: Floats | None
    output: Floats
    steps: Floats | None
    """Engine steps."""
    running: Floats
    """Smallest number of requests in the batch at either end of the interval."""
    prefill_request_s: float | None
    """Sum over finished requests of the time from their place in the batch to their first token."""
    decode_request_s: float | None
    trouble: str | None = None


COUNTERS = (
    "prompt_tokens_total", "generation_tokens_total", "prefix_cache_hits_total", "engine_steps_total",
    "prefill_request_s_total", "decode_request_s_total", "prompt_tokens_cached_total", "process_start_s",
)  # fmt: skip


def run_samples(run: Run, within: Window) -> Samples:
    """What the servers of a run counted in its window."""
    if shared_addresses(run):
        return _no_samples("several servers answer at one address, so their counters are no book")
    tables = [read_server_metrics(RunDir(run.path).server_metrics(r.index)) for r in run.manifest.replicas]
    found = [table for table in tables if table is not None]
    if len(found) < len(tables):
        return _no_samples("a server was not sampled")
    return server_samples(found, within.start_s, within.end_s)


def server_samples(tables: Sequence[pa.Table], start_s: float, end_s: float) -> Samples:
    """Differences of the counters in ``server-metrics-<replica>.arrows`` between ``start_s`` and ``end_s``.

    A column that a file does not have, or that is null, was not counted. A counter that falls, or a server that started
    again, is ``trouble``: its books are void.
    """
    read = [_counters(table, start_s, end_s) for table in tables]
    if not read or any(len(c["t_s"]) < 2 for c in read):
        return _no_samples("a server was not sampled twice in the window")
    for counters in read:
        falls = [name for name in COUNTERS[:-1] if (np.diff(counters[name]) < 0).any()]
        if falls or (np.diff(counters["process_start_s"]) != 0).any():
            return _no_samples("a server started again during the run")

    def moved(name: str) -> Floats:
        return np.concatenate([np.diff(c[name]) for c in read])

    def known(name: str) -> Floats | None:
        values = moved(name)
        return values if np.isfinite(values).all() else None

    prompt, output = known("prompt_tokens_total"), known("generation_tokens_total")
    # hits are counted when a request is admitted, the other counter with the prompt itself
    hits = known("prompt_tokens_cached_total")
    hits = known("prefix_cache_hits_total") if hits is None else hits
    if prompt is None or output is None:
        return _no_samples("the servers do not count tokens")
    prefill, decode = known("prefill_request_s_total"), known("decode_request_s_total")
    return Samples(
        seconds=moved("t_s"),
        uncached_input=np.maximum(0.0, prompt - hits) if hits is not None else prompt,
        cached_input=hits,
        output=output,
        steps=known("engine_steps_total"),
        running=np.concatenate([np.minimum(c["running"][1:], c["running"][:-1]) for c in read]),
        prefill_request_s=None if prefill is None else float(prefill.sum()),
        decode_request_s=None if decode is None else float(decode.sum()),
    )


def _counters(table: pa.Table, start_s: float, end_s: float) -> dict[str, Floats]:
    time = table.column("t_ns").to_numpy() / 1e9
    inside = (time >= start_s) & (time <= end_s)
    found = {"t_s": time[inside]}
    for name in (*COUNTERS, "running"):
        has = name in table.column_names
        values = table.column(name).to_numpy() if has else np.full(len(time), np.nan)
        found[name] = values.astype(np.float64)[inside]
    # a server without this clock tells of no restart; nan differs from nan and would
    found["process_start_s"] = np.nan_to_num(found["process_start_s"])
    return found


def _no_samples(trouble: str) -> Samples:
    none = np.zeros(0)
    return Samples(
        seconds=none, uncached_input=none, cached_input=None, output=none, steps=None, running=none,
        prefill_request_s=None, decode_request_s=None, trouble=trouble,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkRows:
    """The rows of a regression."""

    spent: Floats
    uncached_input: Floats
    cached_input: Floats | None
    output: Floats
    steps: Floats | None


def busy_rows(samples: Samples) -> tuple[WorkRows | None, str | None]:
    """Samples of a busy engine in groups of `GROUP_S`, or why there are none."""
    if samples.trouble:
        return None, samples.trouble
    running = np.nan_to_num(samples.running)
    least = 1.0 if samples.steps is not None else max(1.0, BUSY_SHARE * float(running.max(initial=0.0)))
    busy = running >= least
    # a group ends with its seconds, or where the engine was not busy
    group = np.zeros(len(busy), dtype=np.int64)
    held, current = 0.0, 0
    for k in range(len(busy)):
        if held >= GROUP_S or (k and busy[k] != busy[k - 1]):
            current, held = current + 1, 0.0
        group[k] = current
        held += float(samples.seconds[k])

    def total(values: Floats) -> Floats:
        sums = np.bincount(group[busy], weights=values[busy], minlength=current + 1)
        return sums.astype(np.float64)

    seconds = total(samples.seconds)
    whole = seconds >= GROUP_S / 2
    if (n := int(whole.sum())) < SMALLEST_ROWS:
        wanted = f"{SMALLEST_ROWS} ({SMALLEST_ROWS * GROUP_S:g} s with requests in the batch)"
        return None, f"{n} busy intervals of {GROUP_S:g} s, needs {wanted}"
    return WorkRows(
        spent=seconds[whole],
        uncached_input=total(samples.uncached_input)[whole],
        cached_input=None if samples.cached_input is None else total(samples.cached_input)[whole],
        output=total(samples.output)[whole],
        steps=None if samples.steps is None else total(samples.steps)[whole],
    ), None
