"""A server that is silent: no request has had a byte from it for a while, and it answers no question either.

One that only queues, or whose prompts are long, answers questions: for it the stall limit of each request counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread

SILENT_S = 30.0
"""Without a byte on any request; then a server that has not answered a question either is silent."""
ASK_AFTER_S = 15.0
"""Of that time have passed when it is asked: a server that is short of processors answers late, and lives."""
ASK_AGAIN_S = 15.0
"""From an answer to the next question, while no request has a byte."""


class Silence:
    """Looks, from how long each server's requests have waited for a byte, for one that is silent.

    ``answers``: whether server k answers a question; it may take its time, and is asked in a thread.
    """

    def __init__(
        self,
        answers: Callable[[int], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] = lambda work: Thread(target=work, daemon=True).start(),
    ) -> None:
        self._answers, self._clock, self._start = answers, clock, start
        self._asked: dict[int, tuple[float, Future[bool]]] = {}

    def look(self, quiet_s: Mapping[int, float]) -> int | None:
        """The server that is silent, if one is. ``quiet_s``: how long requests have waited for a byte, by server."""
        for k in self._asked.keys() - quiet_s.keys():
            del self._asked[k]
        now = self._clock()
        for k, waited_s in quiet_s.items():
            asked = self._asked.get(k)
            if asked is None:
                if waited_s >= ASK_AFTER_S:
                    self._ask(k, now)
                continue
            then, answer = asked
            if not answer.done():
                continue
            if answer.result():
                if now - then >= ASK_AGAIN_S:
                    self._ask(k, now)
            elif waited_s >= SILENT_S:
                return k
        return None

    def _ask(self, k: int, now: float) -> None:
        answer: Future[bool] = Future()

        def work() -> None:
            try:
                answer.set_result(self._answers(k))
            except Exception:  # what cannot be asked has not answered
                answer.set_result(False)

        self._asked[k] = now, answer
        self._start(work)
