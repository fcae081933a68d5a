"""A series without its trend: what is left about straight lines between its largest changes.

The error of a series that drifts must not hold the drift, or the drift hides itself: blocks of a tenth about one mean,
or about two, still see a ramp, a step up and down again, or a peak as noise. Lines between two changes take all of
these out, and leave noise nearly as it was.
"""

from __future__ import annotations

import itertools

import numpy as np

from analysis.arrays import Floats

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
