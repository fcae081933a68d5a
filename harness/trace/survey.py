"""The first reading of a trace for a plan: how many rows, when they arrive, and what they look like.

Eight bytes a row are kept (its arrival; three times that where rows are to be drawn or copied) and a few numbers for
each session, in files where they are many (`harness.trace.spool`), and for prefix ids what `harness.trace.prefix` says.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.errors import PlanError, UsageError
from harness.plan.arrivals import Times
from harness.trace.edit import Units, place
from harness.trace.io import Trace, TraceRecord
from harness.trace.prefix import IdealReuse
from harness.trace.shape import Models, ModelShare
from harness.trace.spool import Column, Sessions
from harness.trace.stats import CacheCount, PartMeans, PrefixStats, TraceStats, arrival_stats, length_stats

_ADAPTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Rows by what they say of their prompt."""

    messages: int
    text: int
    lengths_only: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one reading of the trace found."""

    requests: int
    arrivals: Times
    """ns from the first; empty when the trace has no times."""
    units: Units | None
    """Only when asked for."""
    content: Content
    input_lengths: Mapping[int, int]
    """Input tokens -> rows that say lengths only."""
    longest_output: int
    open_ended: int
    """Rows that do not say how many tokens to generate."""
    hang_ups: int
    timeouts: int
    """Rows that bring a time limit of their own."""
    adapters: tuple[str, ...]
    """Models or adapters that rows ask for, the first few and one more."""
    models: tuple[ModelShare, ...]
    """That answered in production, the most rows first."""
    ended_early: bool
    stats: TraceStats


def survey(
    trace: Trace,
    *,
    limit: int | None = None,
    cut_ns: float | None = None,
    timed: bool = True,
    made_up: bool = False,
    units_seed: int | None = None,
) -> Survey:
    """Read the trace up to ``limit`` rows or the first at or after ``cut_ns`` (trace clock).

    ``timed``: a row without a time raises `UsageError`. ``made_up``: prompts can be made; else a row with lengths only
    raises `PlanError`. ``units_seed``: also say what rows belong together, and a number to draw each unit by.
    """
    look = _Look(trace, made_up, units_seed)
    ended_early = False
    with contextlib.closing(iter(trace)) as records:
        for record in records:
            if record.arrival_s is not None:
                arrival_ns = round(record.arrival_s * 1e9)
                if cut_ns is not None and arrival_ns >= cut_ns:
                    ended_early = True
                    break
                look.arrivals.append(arrival_ns)
            elif timed:
                raise UsageError(
                    f"{trace.path}: the trace has no arrival times, so there is nothing to replay in time; "
                    "use --concurrency for a closed loop, or --arrivals poisson --rate R"
                )
            look.at(record)
            if look.requests == limit:
                ended_early = True
                break
    return look.result(ended_early)


class _Begun(NamedTuple):
    """A session so far."""

    start_ns: int
    rows: int


class _Look:
    """Counts what passes."""

    def __init__(self, trace: Trace, made_up: bool, units_seed: int | None) -> None:
        self.requests = 0
        self.arrivals = Column("q")
        self._trace, self._made_up, self._seed = trace, made_up, units_seed
        self._starts, self._places = Column("q"), Column("Q")
        self._inputs: Counter[int] = Counter()
        self._outputs: Counter[int] = Counter()
        self._input_parts, self._output_parts = PartMeans(), PartMeans()
        self._begun = Sessions(_Begun)
        self._sessions = self._session_rows = self._squares = self._most_turns = 0
        """Their number, rows, sum of squared rows, most rows."""
        self._reuse = IdealReuse()
        self._cache = CacheCount()
        self._text_tokens: int | None = 0
        self._texts = self._open_ended = self._hang_ups = self._timeouts = 0
        self._adapters: dict[str, None] = {}
        self._models = Models()

    def at(self, record: TraceRecord) -> None:
        """The next row, its arrival noted already."""
        self.requests += 1
        if record.text is None and record.messages is None:
            if not self._made_up:
                raise PlanError(
                    f"{self._trace.path}:{record.line}: the row has lengths but no text, so a prompt must be made; "
                    "give the tokenizer of the model (--tokenizer FILE), or name a server to learn its token ids from"
                )
            self._inputs[record.input_tokens or 0] += 1
            self._input_parts.add(record.input_tokens or 0)
        else:
            self._texts += record.messages is None
            counted = record.input_tokens is not None and self._text_tokens is not None
            self._text_tokens = (self._text_tokens or 0) + (record.input_tokens or 0) if counted else None
        if record.output_tokens is None:
            self._open_ended += 1
        else:
            self._outputs[record.output_tokens] += 1
            self._output_parts.add(record.output_tokens)
        if record.session_id is not None or self._seed is not None:
            self._unit(record)
        self._reuse.add(record)
        self._cache.add(record.input_tokens, record.cached_tokens)
        self._models.add(record)
        self._hang_ups += record.cancel_after_s is not None
        self._timeouts += record.timeout_s is not None
        if record.adapter is not None and len(self._adapters) <= _ADAPTERS:
            self._adapters[record.adapter] = None

    def _unit(self, record: TraceRecord) -> None:
        start_ns = round((record.arrival_s or 0.0) * 1e9)
        if record.session_id is not None:
            start_ns, rows = self._begun.get(record.session_id) or _Begun(start_ns, 0)
            self._begun.set(record.session_id, _Begun(start_ns, rows + 1))
            self._sessions += not rows
            self._session_rows += 1
            self._squares += 2 * rows + 1
            self._most_turns = max(self._most_turns, rows + 1)
        if self._seed is not None:
            self._starts.append(start_ns)
            self._places.append(place(record, self._seed))

    def result(self, ended_early: bool) -> Survey:
        """All that was counted."""
        arrivals = self.arrivals.whole()
        prefix = self._reuse.result()
        return Survey(
            requests=self.requests,
            arrivals=arrivals,
            units=None if self._seed is None else Units(self._starts.whole(), self._places.whole()),
            content=Content(
                messages=self.requests - self._texts - self._inputs.total(), text=self._texts,
                lengths_only=self._inputs.total(),
            ),
            input_lengths=self._inputs,
            longest_output=max(self._outputs, default=0),
            open_ended=self._open_ended,
            hang_ups=self._hang_ups,
            timeouts=self._timeouts,
            adapters=tuple(self._adapters),
            models=self._models.shares(),
            ended_early=ended_early,
            stats=TraceStats(
                requests=self.requests,
                arrivals=arrival_stats(arrivals),
                input_tokens=length_stats(self._inputs, self._input_parts.sd()),
                output_tokens=length_stats(self._outputs, self._output_parts.sd()),
                sessions=self._sessions,
                session_rows=self._session_rows,
                most_turns=self._most_turns,
                unit_rows=(self._squares + self.requests - self._session_rows) / max(self.requests, 1),
                prefix=None if prefix is None else PrefixStats(
                    block_tokens=prefix.block_tokens, rows=prefix.rows, hit_rate_blocks=prefix.hit_rate_blocks,
                    hit_rate_tokens=prefix.hit_rate_tokens, sampled=prefix.sampled,
                    continued_turns=prefix.continued_turns, independent_turns=prefix.independent_turns,
                ),
                grid_s=self._trace.grid_s,
                recorded_cache=self._cache.result(),
                text_tokens=self._text_tokens / (self.requests - self._inputs.total()) if self._text_tokens else None,
            ),
        )  # fmt: skip
