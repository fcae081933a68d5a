"""What rich prints: consoles that show texts of others as plain characters, tables, and the live line of a run.

Of a table that is too wide a column is folded between words, or moves below, and no figure is ever cut. Words and the
live line go to stderr; data stays on stdout.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import rich.console
from rich import box
from rich.cells import cell_len
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from harness.slo import split_key
from harness.terminal import Verbosity, printable, verbosity


class Console(rich.console.Console):
    """A console whose texts are `printable`; colours and layout are its own."""

    def render(self, renderable: Any, options: rich.console.ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


GAP = 2
NARROW, LONGEST_WORD = 12, 26
"""A column this narrow stays whole; a word longer than this (a name, a path) may be broken."""


def text_tables(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: Collection[int] | None = None
) -> Iterable[Table]:
    """A table for ``width`` columns, or several below each other that repeat the first column (as pandas does).

    ``right``: columns set right, all but the first unless stated. Line breaks stay only where the table is too wide.
    """
    right = range(1, len(heads)) if right is None else right
    joined = [[text.replace("\n", " ") for text in row] for row in rows]
    if sum(_natural(heads, joined)) + GAP * (len(heads) - 1) <= width:
        rows = joined
    columns = [[head, *(row[k] for row in rows)] for k, head in enumerate(heads)]
    natural = _natural(heads, rows)
    least = [_least(column, wide) for column, wide in zip(columns, natural, strict=True)]
    for group in _groups(least, width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
        for k, wide in zip(group, _widths(group, natural, least, width), strict=True):
            table.add_column(Text(heads[k]), justify="right" if k in right else "left", overflow="fold", width=wide)
        for row in rows:
            table.add_row(*(Text(row[k]) for k in group))
        yield table


def _natural(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(cell_len(line) for text in (head, *(row[k] for row in rows)) for line in text.split("\n"))
        for k, head in enumerate(heads)
    ]


def _least(column: Sequence[str], natural: int) -> int:
    longest = max((cell_len(word) for text in column for word in text.split()), default=0)
    return min(natural, max(NARROW, min(longest, LONGEST_WORD)))


def _groups(least: Sequence[int], width: int) -> list[list[int]]:
    groups = [[0]]
    for k in range(1, len(least)):
        if len(groups[-1]) > 1 and sum(least[j] + GAP for j in (*groups[-1], k)) - GAP > width:
            groups.append([0])
        groups[-1].append(k)
    return groups


def _widths(group: Sequence[int], natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    widths = [natural[k] for k in group]
    while sum(widths) + GAP * (len(group) - 1) > width:
        spare = [j for j, k in enumerate(group) if widths[j] > least[k]]
        if not spare:
            break
        widths[max(spare, key=lambda j: widths[j])] -= 1
    return widths


PLAIN_EVERY_S = 5.0


def console() -> Console:
    """The console for words: stderr, no colour codes into a file; silent with -q."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=verbosity() is Verbosity.QUIET)


QUIET_S = 5.0
"""From then on is said how long the server has sent nothing."""
LINE = 80
"""Columns that the line of a run fits, wherever it goes."""
LIVE = ("ttft", "tpot", "e2e")


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
        also: Callable[[Mapping[str, object]], None] | None = None,
    ) -> None:
        """``also``: hears the counts, too."""
        self._also = also
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
        if self._also is not None:
            self._also(counts)
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
        if done >= self._total:
            return None
        if self._span_s is not None and now - self._started < self._span_s:
            return self._span_s - (now - self._started)
        return (self._total - done) / rate if rate > 0 else None


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0
