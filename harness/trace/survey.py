"""One reading of a trace: how many rows, when they arrive, and what they look like. For plans and for `trace inspect`.

A few numbers a row are held (its arrival and lengths; where rows are to be drawn or copied, when its session began);
a few for each session lie in a file where they are many (`harness.trace.spool`). Prefix ids: `harness.trace.prefix`.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from harness.errors import PlanError, UsageError
from harness.plan.arrivals import Times, Units
from harness.trace.io import Trace, TraceRecord
from harness.trace.prefix import IdealReuse
from harness.trace.spool import Sessions
from harness.trace.stats import RecordedCache, TraceStats, arrival_stats, length_stats, part_sd

_ADAPTERS = 8
OTHER_MODELS = "(other models)"
MODELS_HELD = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Rows by what they say of their prompt."""

    messages: int
    text: int
    lengths_only: int


@dataclass(slots=True)
class ModelShare:
    """The rows of one model, by the source's name for it."""

    model: str | None
    """null: rows that do not say it; `OTHER_MODELS`: those beyond the first `MODELS_HELD`."""
    rows: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


def place(record: TraceRecord, seed: int) -> int:
    """64 random bits that depend on the seed and the session (or the line) alone."""
    unit = f"line {record.line}" if record.session_id is None else f"session {record.session_id}"
    digest = hashlib.blake2b(f"{seed} {unit}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _Session(NamedTuple):
    rows: int
    start_ns: int
    last_ns: int | None


class Survey:
    """What the rows seen so far are; `add` each in order of arrival."""

    def __init__(self, units_seed: int | None = None) -> None:
        """``units_seed``: also say what rows belong together, and a number to draw each unit by."""
        self.requests = 0
        self.texts = self.messages = 0
        self.inputs: Counter[int] = Counter()
        """Input tokens -> rows of text or messages that say so many."""
        self.input_lengths: Counter[int] = Counter()
        """Input tokens -> rows that say lengths only."""
        self.outputs: Counter[int] = Counter()
        self.pairs = array("i"), array("i")
        """Input and output tokens of each row; -1 where not given."""
        self.turns: Counter[int] = Counter()
        self.gap_ns = array("q")
        self.open_ended = 0
        """Rows that do not say how many tokens to generate."""
        self.hang_ups = 0
        self.timeouts = 0
        self.adapters: list[str] = []
        """Models or adapters that rows ask for, the first few and one more."""
        self.reuse = IdealReuse()
        self.ended_early = False
        self.grid_s: float | None = None
        self._seed = units_seed
        self._arrival_ns, self._starts, self._places = array("q"), array("q"), array("Q")
        self._lengths = array("i"), array("i")
        self._begun = Sessions(_Session)
        self._models: dict[str | None, ModelShare] = {}
        self._cached = [0, 0, 0]

    def add(self, record: TraceRecord) -> None:
        into, out, arrival_ns = record.input_tokens, record.output_tokens, record.arrival_ns
        self.requests += 1
        if arrival_ns is not None:
            self._arrival_ns.append(arrival_ns)
        if record.text is None and record.messages is None:
            self.input_lengths[into or 0] += 1
            self._lengths[0].append(into or 0)
        else:
            self.texts += record.messages is None
            self.messages += record.messages is not None
            if into is not None:
                self.inputs[into] += 1
        if out is None:
            self.open_ended += 1
        else:
            self.outputs[out] += 1
            self._lengths[1].append(out)
        self.pairs[0].append(-1 if into is None else into)
        self.pairs[1].append(-1 if out is None else out)
        start_ns = arrival_ns or 0
        if record.session_id is not None:
            rows, start_ns, last_ns = self._begun.get(record.session_id) or _Session(0, start_ns, None)
            self._begun.set(record.session_id, _Session(rows + 1, start_ns, arrival_ns))
            self.turns[rows + 1] += 1
            if rows:
                self.turns[rows] -= 1
            if last_ns is not None and arrival_ns is not None:
                self.gap_ns.append(arrival_ns - last_ns)
        if self._seed is not None:
            self._starts.append(start_ns)
            self._places.append(place(record, self._seed))
        self.reuse.add(record)
        if into is not None and record.cached_tokens is not None:
            self._cached = [a + b for a, b in zip(self._cached, (1, into, record.cached_tokens), strict=True)]
        name = record.model if record.model in self._models or len(self._models) < MODELS_HELD else OTHER_MODELS
        share = self._models.setdefault(name, ModelShare(name))
        share.rows += 1
        share.input_tokens += into or 0
        share.output_tokens += out or 0
        self.hang_ups += record.cancel_after_s is not None
        self.timeouts += record.timeout_s is not None
        if record.adapter is not None and record.adapter not in self.adapters and len(self.adapters) <= _ADAPTERS:
            self.adapters.append(record.adapter)

    @cached_property
    def arrivals(self) -> Times:
        """Ns from the first; empty when the trace has no times."""
        return np.array(self._arrival_ns, dtype=np.int64)

    @cached_property
    def units(self) -> Units | None:
        return None if self._seed is None else Units(np.array(self._starts), np.array(self._places))

    @property
    def content(self) -> Content:
        return Content(messages=self.messages, text=self.texts, lengths_only=self.input_lengths.total())

    @property
    def models(self) -> tuple[ModelShare, ...]:
        """That answered in production, the most rows first; empty where no row says its model."""
        if not self._models.keys() - {None}:
            return ()
        return tuple(sorted(self._models.values(), key=lambda share: (-share.rows, share.model or "")))

    @property
    def recorded_cache(self) -> RecordedCache | None:
        """What production's prompt cache found; None where no row says it."""
        rows, into, cached = self._cached
        return RecordedCache(rows=rows, input_tokens=into, cached_tokens=cached) if rows else None

    @cached_property
    def stats(self) -> TraceStats:
        turns = [(each, count) for each, count in self.turns.items() if count]
        rows, texts = sum(each * count for each, count in turns), self.texts + self.messages
        tokens = sum(length * count for length, count in self.inputs.items())
        return TraceStats(
            requests=self.requests,
            arrivals=arrival_stats(self.arrivals),
            input_tokens=length_stats(self.input_lengths, part_sd(self._lengths[0])),
            output_tokens=length_stats(self.outputs, part_sd(self._lengths[1])),
            sessions=self.turns.total(),
            session_rows=rows,
            most_turns=max((each for each, _ in turns), default=0),
            unit_rows=(sum(each**2 * count for each, count in turns) + self.requests - rows) / max(self.requests, 1),
            prefix=self.reuse.result(),
            grid_s=self.grid_s,
            recorded_cache=self.recorded_cache,
            text_tokens=tokens / texts if tokens and self.inputs.total() == texts else None,
        )


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
    raises `PlanError`. ``units_seed``: see `Survey`.
    """
    found = Survey(units_seed)
    with contextlib.closing(iter(trace)) as records:
        for record in records:
            if record.arrival_ns is None and timed:
                raise UsageError(
                    f"{trace.path}: the trace has no arrival times, so there is nothing to replay in time; "
                    "use --concurrency for a closed loop, or --arrivals poisson --rate R"
                )
            if cut_ns is not None and record.arrival_ns is not None and record.arrival_ns >= cut_ns:
                found.ended_early = True
                break
            found.add(record)
            if found.input_lengths and not made_up:
                raise PlanError(
                    f"{trace.path}:{record.line}: the row has lengths but no text, so a prompt must be made; "
                    "give the tokenizer of the model (--tokenizer FILE), or name a server to learn its token ids from"
                )
            if found.requests == limit:
                found.ended_early = True
                break
    found.grid_s = trace.grid_s
    return found
