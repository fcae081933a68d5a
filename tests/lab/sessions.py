"""The search for the capacity of sessions that wait: the rate of sessions at which enough requests keep the SLO.

Sessions of five turns begin as a Poisson process; a turn is due when the answer before it has ended and its user has
thought, 2 s in the mean, and its latency counts from then. What it waited behind that answer is session lag.
"""

from __future__ import annotations

from tests.lab.capacity import CASES, row
from tests.lab.processes import TURNS
from tests.lab.table import Row


def rows(draws: int, seed: int, jobs: int) -> list[Row]:
    """Lines of the table."""
    claim = "capacity of a search, sessions that wait"
    return [row("6", claim, CASES["sessions"], draws, seed, jobs, per=1 / TURNS, unit="sessions/s")]
