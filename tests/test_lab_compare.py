"""A small draw of the study of comparisons; the large one is in `tests/lab`."""

from __future__ import annotations

from tests.lab.compare import closed_rows


def test_one_system_against_itself_shows_hardly_a_difference_and_another_does():
    for row in closed_rows(draws=8, seed=3, jobs=1):
        assert row.holds, row
