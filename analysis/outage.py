"""Stretches in which a server answered nobody and was not there, seen from the client alone: it was started again.

A server that is only overloaded goes on with some of what it has in flight. One whose process ended loses all of it at
once, refuses connections until it is back, and then answers again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.arrays import Bools, Floats
from analysis.load import Rows, Run

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
