"""Closed loop: a fixed number of requests in flight, the next one sent when one ends.

Also a plain locustfile, in which each Locust user is one slot:
``locust -f scenarios/saturate.py --headless -u 8 -r 8 --host http://127.0.0.1:8000 --plan plan.arrow``
"""

from __future__ import annotations

import heapq

from harness.record.results import Result
from harness.scenarios.client.timers import WakeTimer
from harness.scenarios.dispatch import Dispatcher
from harness.scenarios.locust_user import PlanUser, run_as_locustfile


class Saturate(PlanUser):
    """Slots: each joins at its time, then takes the next request of the plan, in its order, when its last has ended.

    A request is due the moment its slot became free, so the client's own slowness shows as lag. All slots of a load
    worker share one user: ten thousand greenlets would take 16 KiB of stack each, and a switch per request.
    """

    def send_all(self, dispatcher: Dispatcher, timer: WakeTimer, joined_ns: int) -> None:
        """Keep a request in flight on each slot."""
        free = [max(joined_ns, dispatcher.next_start()) for _ in range(dispatcher.slots)]
        heapq.heapify(free)

        def ended(result: Result) -> None:
            assert result.finished_ns is not None
            heapq.heappush(free, result.finished_ns)
            dispatcher.ended(result)
            timer.wake()

        def send() -> None:
            slot = heapq.heappop(free)
            if not dispatcher.send_next(ended, slot):
                heapq.heappush(free, slot)

        self.send_when_due(dispatcher, timer, lambda: free[0] if free else None, send)


run_as_locustfile(timed=False)
