"""Open loop: every request goes out at its planned time, whatever became of the earlier ones.

Also a plain locustfile:
``locust -f scenarios/replay.py --headless -u 1 --host http://127.0.0.1:8000 --plan plan.arrow``
"""

from __future__ import annotations

import gevent

from scenarios.client.timers import WakeTimer
from scenarios.dispatch import BURST, Dispatcher
from scenarios.locust_user import PlanUser, run_as_locustfile


class Replay(PlanUser):
    """One user walks the plan on its absolute schedule: lateness never moves a later request, it shows as lag.

    With a cap on requests in flight a request waits for room; that wait is lag, too.
    """

    precise = True

    def send_all(self, dispatcher: Dispatcher, timer: WakeTimer, joined_ns: int) -> None:
        """Send each request when it is due."""
        sent = 0
        while not dispatcher.over:
            due = dispatcher.schedule.next_due()
            full = dispatcher.cap is not None and dispatcher.client.in_flight >= dispatcher.cap
            if due is None or full:
                timer.wait_until(None)
            elif due > dispatcher.now_ns():
                timer.wait_until(dispatcher.client.start_mono_ns + due)
                sent = 0
            else:
                dispatcher.send_next(dispatcher.ended)
                sent += 1
                if sent % BURST == 0:
                    gevent.sleep(0)


run_as_locustfile(timed=True)
