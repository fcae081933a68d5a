"""The one window of every rate of a run, and its equal bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.arrays import Bools, Floats, Ints
from analysis.rows.run import Rows

WINDOW_RULE = "whole run, ramp and drain included"
BINS = 200


def was_sent(rows: Rows) -> Bools:
    """Rows that went out."""
    return np.isfinite(rows.sent_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The one window of every rate, in seconds after the common start, and its rule in words."""

    rule: str
    start_s: float
    end_s: float
    duration_s: float

    @property
    def bin_s(self) -> float:
        """Width of one of the `BINS` equal bins, s."""
        return self.duration_s / BINS


def window(rows: Rows) -> Window | None:
    """From the first scheduled to the last finish of any sent request, failed ones too; None when there is no time."""
    sent = was_sent(rows)
    if not sent.any():
        return None
    start = float(rows.scheduled_s.min(where=sent, initial=np.inf))
    end = float(rows.finished_s.max(where=sent, initial=-np.inf))
    if end <= start:
        return None
    return Window(rule=WINDOW_RULE, start_s=start, end_s=end, duration_s=end - start)


def binned(times_s: Floats, amounts: Floats | None, within: Window) -> Floats:
    """Sum of ``amounts`` (None: count) per bin of the window, shape (BINS,). Every time must lie in the window."""
    return np.bincount(bin_of(times_s, within), weights=amounts, minlength=BINS).astype(np.float64)


def bin_of(times_s: Floats, within: Window) -> Ints:
    """Which of the `BINS` bins of the window each time lies in; what is outside lies in the bin at that end."""
    place = (times_s - within.start_s) / within.bin_s
    return np.clip(place, 0, BINS - 1, out=place).astype(np.int64)
