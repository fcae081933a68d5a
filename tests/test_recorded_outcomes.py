"""The simulator's outcomes where only seats and tokens bound an engine: they stay what they were, to the last bit."""

from __future__ import annotations

import json

from tests.simulator_cases import RECORDED, digest, outcomes


def test_outcomes_are_those_that_were_recorded() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert [digest(outcomes(case)) for case in range(len(recorded))] == recorded
