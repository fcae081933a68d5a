"""Sessions whose turns wait for each other: which rows begin one, and what users waited behind a slow answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.arrays import Bools, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """One entry per measured row of a run whose sessions wait."""

    first: Bools
    """Whether the row begins a session; its time is the plan's, whatever the server does."""
    lag_s: Floats
    """Session lag, s: when a turn was due after its own time in the plan (`own_times`), because the answer before it
    had not ended. NaN for a row that begins a session and for one that was never sent."""


def own_times(scheduled: Floats, after: Floats, think: Floats) -> Floats:
    """The earliest time of each planned request, by id, that the plan itself allows: were every answer instant.

    A turn's own time is the planned one, but not before the own time of the turn it waits for (``after``, an id; NaN:
    none) plus ``think``. On the trace's own clock that is the planned time: there the next turn comes when the recorded
    answer ended and the user had thought. On a faster clock, which think times do not follow, it may be later.
    """
    own, waits = scheduled.copy(), np.isfinite(after)
    before, think = after[waits].astype(np.int64), np.nan_to_num(think[waits])
    while ((least := own[before] + think) > own[waits]).any():  # one level of turns at a time, at worst
        own[waits] = np.maximum(own[waits], least)
    return own
