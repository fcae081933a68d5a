"""What a person sees while something long is going on: words and one live line on stderr; data stays on stdout."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

PLAIN_EVERY_S = 5.0
"""Without a terminal a line is printed this often."""


def console() -> Console:
    """The console for words: stderr, no colour codes into a file."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class LoadProgress:
    """The live line of a run: done, rate, in flight, errors, TTFT, time left."""

    def __init__(self, out: Console, *, total: int, span_s: float | None) -> None:
        self._out, self._total, self._span_s = out, total, span_s
        self._ttft_s: deque[float] = deque(maxlen=500)
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._started = time.monotonic()
        self._printed = self._started
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[words]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=out,
        )  # fmt: skip
        self._task = self._bar.add_task("replay", total=total, words="")
        self._live: Live | None = None

    def __enter__(self) -> LoadProgress:
        if self._out.is_terminal:
            self._live = Live(self._bar, console=self._out, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, counts: Mapping[str, object]) -> None:
        """Show the newest merged counts of all load workers (keys: sent, done, failed, in_flight, ttft_s)."""
        now = time.monotonic()
        done = _int(counts.get("done"))
        samples = counts.get("ttft_s")
        if isinstance(samples, list):
            self._ttft_s.extend(samples)
        self._recent.append((now, done))
        words = self._words(now, done, _int(counts.get("in_flight")), _int(counts.get("failed")))
        if self._live:
            self._bar.update(self._task, completed=done, words=words)
        elif now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            print(f"  {done}/{self._total}  {words}", file=sys.stderr, flush=True)

    def _words(self, now: float, done: int, in_flight: int, failed: int) -> str:
        then, before = self._recent[0]
        rate = (done - before) / (now - then) if now > then else 0.0
        words = [f"{rate:.1f} req/s", f"{in_flight} in flight", f"{failed} failed"]
        if self._ttft_s:
            words.append(f"ttft p50 {statistics.median(self._ttft_s) * 1000:.0f} ms")
        left = self._left_s(now, done, rate)
        if left is not None:
            words.append(f"{left:.0f} s left")
        return " · ".join(words)

    def _left_s(self, now: float, done: int, rate: float) -> float | None:
        """Open loop: what the plan still holds. Closed loop: at the present rate."""
        if done >= self._total:
            return None
        if self._span_s is not None and now - self._started < self._span_s:
            return self._span_s - (now - self._started)
        return (self._total - done) / rate if rate > 0 else None


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
