"""Bursts of arrivals: in how many stretches of a run more came than in the rest, beyond what single arrivals explain.

The counts are cut into blocks of one rate each: the cut that makes them most likely as Poisson counts, each block at a
price. Source: optimal partition, Jackson et al., IEEE Signal Processing Letters 12(2), 2005; Scargle et al.,
Astrophysical Journal 764, 2013 (Bayesian blocks).
"""

from __future__ import annotations

import numpy as np

from analysis.arrays import Floats, Ints

PRICE = 5.0
"""Logarithm of how much likelier the counts must be for one block more. Of Poisson runs 6 % are cut at all."""


def bursts_seen(came: Floats) -> int:
    """Stretches of equal bins in which requests came faster than in the mean of the run; 0 for an even run.

    ``came``: requests in each bin. A stretch is of one block or several; one at an end of the run counts.
    """
    edges = _blocks(came)
    if len(edges) <= 2:
        return 0
    passed = np.concatenate(([0.0], np.cumsum(came)))
    fast = np.diff(passed[edges]) / np.diff(edges) > came.mean()
    return int(fast[0]) + int((~fast[:-1] & fast[1:]).sum())


def _blocks(came: Floats) -> Ints:
    """Edges of the blocks, from 0 to the number of bins."""
    n = len(came)
    passed, at = np.concatenate(([0.0], np.cumsum(came))), np.arange(n + 1.0)
    best, start = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        count = passed[end] - passed[:end]
        gain = best[:end] + count * np.log(np.maximum(count, 1e-9) / (end - at[:end])) - PRICE
        start[end] = int(gain.argmax())
        best[end] = gain[start[end]]
    edges = [n]
    while edges[-1] > 0:
        edges.append(int(start[edges[-1]]))
    return np.array(edges[::-1])
