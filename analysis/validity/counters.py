"""What the servers counted, against what the rows say: other users, restarts, wrong usage.

Counters add up only within one process. Where several processes answer at one address (a load balancer), that is
detected and reported as a limit, and nothing is concluded from the counters: not checked is not INVALID.

Restarts are also detected from the client alone (`outages`). A server that is only overloaded goes on with some of what
it has in flight. One whose process ended loses all of it at once, refuses connections until it is back, and then
answers again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.arrays import Bools, Floats
from harness.analysis.check import Check, check, limit
from harness.analysis.rows.read import Rows, Run
from harness.errors import listed
from harness.record.manifest import Replica, RunDir
from harness.record.samples import read_server_metrics, samples_of_no_number
from harness.server.counters import several_processes
from harness.terminal import printable

LEAST = 3
"""Fewer than that may have had a reason of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """One server that was away for a while."""

    replica: int
    since_s: float
    """The first request that met it so,"""
    until_s: float
    """and the last."""
    requests: int


def outages(run: Run) -> list[Outage]:
    """Those of each server, in time order.

    In it at least one request to this server failed unconnected or was cut, one found no connection or (``--retries``)
    had to be sent again, to whichever server, and no answer of this one that went well was under way. There were such
    answers before and after.
    """
    codes: dict[str, int] = {name: run.errors.index(name) for name in ("connect", "cut") if name in run.errors}
    return [one for replica in range(len(run.manifest.spec.base_urls)) for one in _outages_of(run, replica, codes)]


def _outages_of(run: Run, replica: int, codes: dict[str, int]) -> list[Outage]:
    def failed(rows: Rows, *names: str) -> Bools:
        which = [codes[name] for name in names if name in codes]
        return np.asarray((rows.replica == replica) & np.isin(rows.error, which))

    def again(rows: Rows) -> Bools:
        return np.asarray((rows.error < 0) & (rows.retries > 0) & bool(run.manifest.spec.retries))

    def good(rows: Rows) -> Bools:
        return np.asarray((rows.replica == replica) & (rows.error < 0))

    lost = _kept(run, "finished_s", lambda rows: failed(rows, "connect", "cut"))
    if not len(lost):
        return []
    resent = _kept(run, "sent_s", again)
    refused = {*_kept(run, "finished_s", lambda rows: failed(rows, "connect")).tolist(), *resent.tolist()}
    # When the last try of what was sent again began is not known: its end alone shows that the server was there.
    once = _kept(run, "sent_s", lambda rows: good(rows) & ~again(rows))
    late = _kept(run, "finished_s", lambda rows: good(rows) & again(rows))
    began, ended = np.sort(np.concatenate((once, late))), np.sort(_kept(run, "finished_s", good))
    found: dict[int, list[float]] = {}
    for at in np.sort(np.concatenate((lost, resent))).tolist():
        before, under_way = np.searchsorted(ended, at, side="right"), np.searchsorted(began, at)
        if 0 < before == under_way < len(ended):
            found.setdefault(int(before), []).append(at)
    own = set(lost.tolist())
    return [
        Outage(replica=replica, since_s=one[0], until_s=one[-1], requests=len(one))
        for one in found.values()
        if len(one) >= LEAST and refused.intersection(one) and own.intersection(one)
    ]


def _kept(run: Run, name: str, where: Callable[[Rows], Bools]) -> Floats:
    """A column of the rows, those of the warm-up among them, that ``where`` says."""
    return np.concatenate([getattr(rows, name)[where(rows)] for rows in (run.rows, run.warmup)])


BOOKS_BOUND = 0.005
ANY = 1e15
"""More tokens than any run has: what a request may have used of which nothing is known."""
INPUT_COUNTER = "vllm:prompt_tokens_total"
OUTPUT_COUNTER = "vllm:generation_tokens_total"
REQUEST_COUNTER = "vllm:request_success_total"
START_TIME = "process_start_time_seconds"
SAMPLED = {
    "process_start_s": START_TIME, "prompt_tokens_total": INPUT_COUNTER, "generation_tokens_total": OUTPUT_COUNTER
}  # fmt: skip
"""Column of ``server-metrics-<replica>.arrows`` -> the counter, of those that tell one process from another."""


def shared_addresses(run: Run) -> list[str]:
    """Base URLs behind which several servers answer in turn, so that counters read there belong to none of them.

    Never one of ours: a port that we hold has one process, and what it started anew is a restart.
    """
    if run.manifest.engine != "url":
        return []
    return [r.base_url for r in run.manifest.replicas if r.several_servers or _sampled_several(run, r)]


def _sampled_several(run: Run, replica: Replica) -> bool:
    """Whether the readings of each second, with those before and after the load, came from several processes."""
    if len(replica.metrics_urls) > 1:  # added up, and each page was looked at before and after
        return False
    return several_processes(_readings(run, replica))


def _readings(run: Run, replica: Replica) -> list[Mapping[str, float]]:
    """What was read of a server's counters, in time order: before the load, each second of it, and after it."""
    table = read_server_metrics(RunDir(run.path).server_metrics(replica.index))
    rows = [] if table is None else table.select([*SAMPLED]).to_pylist()
    sampled = [{SAMPLED[c]: v for c, v in row.items() if v is not None} for row in rows]
    before, after = (
        [] if read is None else [{name: value for name, value in read.items() if value is not None}]
        for read in (replica.counters_before, replica.counters_after)
    )
    return [*before, *sampled, *after]


def server_counters(run: Run, shared: Sequence[str]) -> Check:
    """One process answered wherever counters were read, so that they are a book."""
    bound = "one server behind each address that was read"
    if shared:
        observed = f"several servers answer at {', '.join(shared)}: counters and restarts not checked"
        advice = "name the /metrics page of each server with --metrics-url (repeat), or say --no-counters"
        return limit("server_counters", False, observed, bound, advice)
    read = [r for r in run.manifest.replicas if r.counters_before is not None]
    if not read:
        return limit("server_counters", None, _unread(run, shared), bound, "nothing to do")
    if lost := _not_numbers(run):
        observed = f"not measured, as what the servers said was no number: {listed(lost)}"
        advice = "what needs them is not checked: see the servers' /metrics"
        return limit("server_counters", False, observed, bound, advice)
    pages = sum(len(r.metrics_urls) or 1 for r in read)
    return limit("server_counters", True, f"{pages} read", bound, "")


def _not_numbers(run: Run) -> list[str]:
    """Counters and samples that some server stated as NaN or infinity."""
    found: dict[str, None] = {}
    for r in run.manifest.replicas:
        for counters in (r.counters_before, r.counters_after):
            found |= {printable(name): None for name, value in (counters or {}).items() if value is None}
        sampled = samples_of_no_number(RunDir(run.path).server_metrics(r.index))
        found |= {f"{column} (each second)": None for column in sampled}
    return list(found)


def _unread(run: Run, shared: Sequence[str]) -> str:
    """Why there is nothing to check."""
    if not run.manifest.spec.counters:
        return "counters not read, as asked"
    return "several servers answer here" if shared else "the server has no counters"


def server_restarts(run: Run, shared: Sequence[str]) -> Check:
    """No server began anew between the first request and the last: its start time is the same, no counter fell, and it
    was there all the time.
    """
    restarted = [f"replica {r.replica} died ({r.how}), up again: {r.ready or 'never'}" for r in run.manifest.restarts]
    several = len(run.manifest.replicas) > 1
    where = {r.index: f" ({r.base_url})" for r in run.manifest.replicas if several}
    compared = 0
    for r in run.manifest.replicas:
        readings = _readings(run, r)
        if len(readings) < 2 or r.base_url in shared:
            continue
        compared += 1
        if (how := _began_anew(readings)) is not None:
            restarted.append(f"replica {r.index}{where.get(r.index, '')}{how}")
    for one in outages(run):
        whose = f"replica {one.replica}{where[one.replica]} " if one.replica in where else ""
        restarted.append(
            f"{whose}from {one.since_s:.1f} to {one.until_s:.1f} s no connection came about and all in flight was lost "
            f"({one.requests} requests), then answers came again"
        )
    ok = None if not compared and not restarted else not restarted
    observed = "; ".join(restarted) or (f"{compared} kept running" if compared else _unread(run, shared))
    if earlier := run.manifest.restarts_before:
        observed += f"; before this run: {'; '.join(restart.words for restart in earlier)}"
    advice = "the server restarted during the run, so caches and queues began empty: see its log, then run again"
    return check("server_restarts", ok, observed, "none", advice)


def _began_anew(readings: Sequence[Mapping[str, float]]) -> str | None:
    """How a later reading shows that the process is another one than before: its start time, or a counter that fell."""
    last: dict[str, float] = {}
    fell = False
    for reading in readings:
        for name, value in reading.items():
            if name.startswith(START_TIME):
                if last.get(name, value) != value:
                    return " started again"
            elif value < last.get(name, value):
                fell = True
        last.update(reading)
    return ": its counters fell" if fell else None


def token_books(run: Run, shared: Sequence[str]) -> Check:
    """The servers' own counters (tokens, requests) moved by what the rows say, plus what the others may have used."""
    sides = {"input": INPUT_COUNTER, "output": OUTPUT_COUNTER, "requests": REQUEST_COUNTER}
    moved = {side: None if shared else moved_by(run, counter) for side, counter in sides.items()}
    bound = f"within {BOOKS_BOUND:.1%}, or what failed requests used"
    if moved["input"] is None or moved["output"] is None:
        return check("token_books", None, _unread(run, shared), bound, "nothing to do")
    free = run.manifest.spec.output_lengths == "free"
    booked = [_booked(r, free=free) for r in (run.rows, run.warmup)]
    words, ok = [], True
    for side, server in moved.items():
        if server is None:  # not every server counts requests
            continue
        known, slack = (sum(part[side][i] for part in booked) for i in (0, 1))
        room = BOOKS_BOUND * max(known, 1.0)
        ok &= known - room <= server <= known + slack + room
        room_for = f"{slack:,.0f}" if slack < ANY else "any number"
        words.append(f"{side}: server {server:,.0f}, rows {known:,.0f}" + (f" (+{room_for} failed)" if slack else ""))
    advice = "someone else used the server, or it restarted, or its usage is wrong: run again on a server of your own"
    return check("token_books", ok, "; ".join(words), bound, advice)


def moved_by(run: Run, counter: str) -> float | None:
    """How far one counter moved over all replicas; None when any of them does not have it."""
    total = 0.0
    for replica in run.manifest.replicas:
        before, after = replica.counters_before, replica.counters_after
        if before is None or after is None:
            return None
        start, end = before.get(counter, 0.0), after.get(counter)
        if start is None or end is None:
            return None
        total += end - start
    return total if run.manifest.replicas and math.isfinite(total) else None


def _booked(rows: Rows, *, free: bool) -> dict[str, tuple[float, float]]:
    """(known, possible beyond) of input and output tokens, from ``usage``, and of requests that the server served.

    A request that was sent and has no usage can have used anything up to what was planned for it, or whatever it liked
    where lengths were ``free``; the server may have finished what failed or was cancelled here.
    """
    sent = np.isfinite(rows.sent_s)
    sides = {
        "input": (rows.input_tokens, rows.planned_input_tokens),
        "output": (rows.output_tokens, rows.planned_output_tokens * (np.nan if free else 1.0)),
        "requests": (np.where(rows.success, 1.0, np.nan), np.ones(len(rows))),
    }
    booked = {}
    for side, (got, planned) in sides.items():
        known = np.isfinite(got)
        # no plan for it (text, free length): anything is possible, so the books cannot show an excess
        beyond = np.nan_to_num(planned[sent & ~known], nan=ANY).sum()
        booked[side] = float(got.sum(where=known)), min(float(beyond), ANY)
    return booked
