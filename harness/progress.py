"""What a person sees while something long is going on: words and one live line on stderr; data stays on stdout."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

import numpy as np
from rich.live import Live
from rich.text import Text

from harness.console import Console
from harness.slo import split_key
from harness.verbosity import Verbosity, verbosity

PLAIN_EVERY_S = 5.0
"""Without a terminal a line is printed this often."""


def console() -> Console:
    """The console for words: stderr, no colour codes into a file; silent with -q."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=verbosity() is Verbosity.QUIET)


QUIET_S = 5.0
"""From then on is said how long the server has sent nothing."""
LINE = 80
"""Columns that the line of a run fits, wherever it goes."""
LIVE = ("ttft", "tpot", "e2e")
"""Metrics that load workers sample while they run."""


class LoadProgress:
    """The live line of a run: done, rate, in flight, errors, the latency that the SLO is about, time left."""

    def __init__(
        self,
        out: Console,
        *,
        total: int,
        span_s: float | None,
        slo: Mapping[str, float] | None = None,
        attain: float = 0.99,
    ) -> None:
        self._out, self._total, self._span_s = out, total, span_s
        self._limits = [
            (metric, attain if share is None else share, limit)
            for key, limit in (slo or {}).items()
            for metric, share in [split_key(key)]
            if metric in LIVE
        ]
        self._samples: dict[str, deque[float]] = {metric: deque(maxlen=500) for metric in LIVE}
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._started = time.monotonic()
        self._printed = self._started
        self._live: Live | None = None

    def __enter__(self) -> LoadProgress:
        if self._out.is_terminal and not self._out.quiet:
            self._live = Live("", console=self._out, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def update(self, counts: Mapping[str, object]) -> None:
        """Show the newest merged counts of all load workers (sent, done, failed, in_flight, and `LIVE` in ``*_s``)."""
        now = time.monotonic()
        done = _int(counts.get("done"))
        for metric, seen in self._samples.items():
            if isinstance(samples := counts.get(f"{metric}_s"), list):
                seen.extend(samples)
        self._recent.append((now, done))
        if self._live:
            self._live.update(Text(self.line(counts, now, self._out.width), no_wrap=True, overflow="crop"))
        elif not self._out.quiet and now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            print(self.line(counts, now, LINE), file=sys.stderr, flush=True)

    def line(self, counts: Mapping[str, object], now: float, width: int) -> str:
        """These counts in at most ``width`` columns: what matters least is left out first."""
        done, failed = _int(counts.get("done")), _int(counts.get("failed"))
        then, before = self._recent[0] if self._recent else (now, done)
        rate = (done - before) / (now - then) if now > then else 0.0
        left_s = self._left_s(now, done, rate)
        quiet = counts.get("quiet_s")
        waited_s = max(quiet.values(), default=0.0) if isinstance(quiet, dict) else 0.0
        words = {
            "done": f"  {done}/{self._total}",
            "waits": f"no byte for {waited_s:.0f} s" if waited_s >= QUIET_S else "",
            "rate": f"{rate:.1f} req/s",
            "in flight": f"{_int(counts.get('in_flight'))} in flight",
            "failed": f"{failed} failed",
            "latency": self._latency(),
            "left": f"{left_s:.0f} s left" if left_s is not None else "",
        }
        for name in ("in flight", "rate", "left", "latency", "failed"):
            if len(text := " · ".join(filter(None, words.values()))) <= width:
                return text
            del words[name]
        return words["done"][:width]

    def _latency(self) -> str:
        """The latency of the SLO that is farthest along towards its limit, else the median TTFT."""
        found = [
            (float(np.quantile(self._samples[metric], share)) / limit, metric, share, limit)
            for metric, share, limit in self._limits
            if self._samples[metric]
        ]
        if found:
            part, metric, share, limit = max(found)
            return f"{metric} p{share * 100:g} {_duration(part * limit)} of {_duration(limit)}"
        if self._samples["ttft"]:
            return f"ttft p50 {_duration(float(np.median(self._samples['ttft'])))}"
        return ""

    def _left_s(self, now: float, done: int, rate: float) -> float | None:
        """Open loop: what the plan still holds. Closed loop: at the present rate."""
        if done >= self._total:
            return None
        if self._span_s is not None and now - self._started < self._span_s:
            return self._span_s - (now - self._started)
        return (self._total - done) / rate if rate > 0 else None


def _duration(seconds: float) -> str:
    """Three digits: ``87.5 ms``, ``1.2 s``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
