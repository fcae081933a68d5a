"""Stretches in which a server answered nobody and was not there, seen from the client alone: it was started again.

A server that is only overloaded goes on with some of what it has in flight. One whose process ended loses all of it at
once, refuses connections until it is back, and then answers again.
"""

from __future__ import annotations

import numpy as np

from analysis import arrays
from analysis.arrays import Floats
from analysis.load import Rows, Run

LEAST = 3
"""Fewer failures than that may have had a reason of their own."""


def outages(run: Run) -> list[tuple[float, float, int]]:
    """Each as (its first failure, its last one, s, and how many failed), where one server was asked.

    In it requests failed unconnected or cut, at least one of them unconnected, and no answer that went well was under
    way; there were such answers before and after.
    """
    codes = {name: run.errors.index(name) for name in ("connect", "cut") if name in run.errors}
    if "connect" not in codes or len(run.manifest.spec.base_urls) > 1:
        return []
    sides = (run.rows, run.warmup)
    failed = np.concatenate([_ends(rows, *codes.values()) for rows in sides])
    refused = set(np.concatenate([_ends(rows, codes["connect"]) for rows in sides]).tolist())
    began, ended = (np.concatenate([_good(rows, name) for rows in sides]) for name in ("sent_s", "finished_s"))
    began.sort()
    ended.sort()
    found: list[list[float]] = []
    place = -1
    for at in np.sort(failed).tolist():
        before, under_way = np.searchsorted(ended, at, side="right"), np.searchsorted(began, at)
        if not 0 < before == under_way < len(ended):
            continue
        if before != place:
            found.append([])
        place = int(before)
        found[-1].append(at)
    return [(one[0], one[-1], len(one)) for one in found if len(one) >= LEAST and refused.intersection(one)]


def _ends(rows: Rows, *codes: int) -> Floats:
    """When the requests of these classes ended, s."""
    return arrays.kept(rows.finished_s, arrays.flags(len(rows), lambda part: np.isin(rows.error[part], codes)))


def _good(rows: Rows, name: str) -> Floats:
    return arrays.kept(getattr(rows, name), rows.success)
