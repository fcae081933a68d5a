"""Closed loop: a fixed number of requests in flight, the next one sent when one ends.

Each Locust user is one slot. Also a plain locustfile:
``locust -f scenarios/saturate.py --headless -u 8 -r 8 --host http://127.0.0.1:8000 --plan plan.arrow``
"""

from __future__ import annotations

from harness.results import Result
from scenarios.schedule import Alarm, Load
from scenarios.user import PlanUser, run_as_locustfile


class Saturate(PlanUser):
    """One slot: joins at its time, then takes the next request of the plan, in its order, when the previous has ended.

    A request is due the moment its slot became free, so the client's own slowness shows as lag.
    """

    def send_all(self, load: Load, alarm: Alarm, joined_ns: int) -> None:
        """Keep one request in flight."""
        free_ns, busy = max(joined_ns, load.next_start()), False
        while not load.over and free_ns > load.now_ns():
            alarm.wait_until(load.client.start_mono_ns + free_ns)

        def ended(result: Result) -> None:
            nonlocal free_ns, busy
            assert result.finished_ns is not None
            free_ns, busy = result.finished_ns, False
            load.ended(result)
            alarm.ring()

        while not load.over:
            due = load.schedule.next_due()
            if due is None or due > load.now_ns():
                alarm.wait_until(None if due is None else load.client.start_mono_ns + due)
                continue
            busy = True
            load.send_next(ended, free_ns)
            while busy and not load.over:
                alarm.wait_until(None)


run_as_locustfile(timed=False)
