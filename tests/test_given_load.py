"""In an open loop the load is given: what was sold and paid at it is no estimate of what the server can do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_files import SPEC, S, good, write_run

from analysis.load import read_run
from analysis.show.report import render_markdown
from analysis.summary import summarise


def run_of(path, *, mode="open", busy=400, quiet=0, **spec):
    """Answers of 0.53 s: ``busy`` of them begun each 50 ms, then ``quiet`` ones, one a second."""
    at = [*(k * 0.05 for k in range(busy)), *(busy * 0.05 + k for k in range(quiet))]
    rows = [good(k, round(t * S), ttft_ms=500) for k, t in enumerate(at)]
    return write_run(path, rows, spec=replace(SPEC, mode=mode, concurrency=11 if mode == "closed" else None, **spec))


@pytest.mark.parametrize(("mode", "known"), [("open", False), ("closed", True)])
def test_quiet_traffic_is_left_out_of_no_open_loop(tmp_path, mode, known):
    """The steady part of a closed loop is the server without ramp and drain; of arrivals it would be the busy hours
    alone, sold at their price, while the quiet ones are paid for, too.
    """
    s = summarise(read_run(run_of(tmp_path / "run", mode=mode, quiet=20)))
    assert s.steady.window is not None and s.steady.window.found
    assert s.steady.window.duration_s < 0.55 * s.window.duration_s
    assert (s.steady.usd_per_1m_total.value is not None) is known
    assert (s.steady.total_token_throughput.value is not None) is known
    if not known:
        assert s.steady.usd_per_1m_total.note == "not a closed loop: its quiet stretches are part of the load"
        assert "without ramp and drain" not in render_markdown(s)
