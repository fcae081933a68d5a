"""Open loop: every request goes out at its planned time, whatever became of the earlier ones.

Also a plain locustfile:
``locust -f scenarios/replay.py --headless -u 1 --host http://127.0.0.1:8000 --plan plan.arrow``
"""

from __future__ import annotations

from harness.scenarios.client.timers import WakeTimer
from harness.scenarios.dispatch import Dispatcher
from harness.scenarios.locust_user import PlanUser, run_as_locustfile


class Replay(PlanUser):
    """One user walks the plan on its absolute schedule: lateness never moves a later request, it shows as lag.

    With a cap on requests in flight a request waits for room; that wait is lag, too.
    """

    def send_all(self, dispatcher: Dispatcher, timer: WakeTimer, joined_ns: int) -> None:
        """Send each request when it is due."""

        def free_ns() -> int | None:
            full = dispatcher.cap is not None and dispatcher.client.in_flight >= dispatcher.cap
            return None if full else 0

        self.send_when_due(dispatcher, timer, free_ns, lambda: dispatcher.send_next(dispatcher.ended))


run_as_locustfile(timed=True)
