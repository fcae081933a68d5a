"""The shape of a trace: what `harness trace inspect` says. Columns of numbers, never the requests.

A record costs a few numbers, and a session a few, in files where they are many (`harness.trace.spool`), and work goes
by blocks: memory does not grow with the trace. For prefix ids see `harness.trace.prefix`.

==========================  ==========================================================================================
burstiness                  variance / mean of the number of arrivals in windows of 1, 10 and 60 s, laid from the first
                            arrival to the last, the rest of a window at the end left out. Poisson arrivals have 1
worst minute                most arrivals in any 60 s (begun by an arrival), and that over the mean of the whole trace
mean rate                   (n - 1) / span, requests/s
ideal prefix-cache hit      share of blocks, and of input tokens, that led some request before, token for token: what an
                            unlimited cache at the trace's own block size would have found. Of sessions that say
                            lengths only: what their made-up prompts share (`harness.trace.prefix`)
==========================  ==========================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from harness.trace.io import TraceRecord
from harness.trace.prefix import IdealReuse, Prefix
from harness.trace.spool import Column, blocks, empty
from harness.trace.spool import Sessions as Kept
from harness.trace.stats import (
    WINDOWS_S,
    CacheCount,
    RecordedCache,
    counts_between,
    dispersion,
    mean_rate,
    worst,
)

Ints = npt.NDArray[np.int64]
Lens = npt.NDArray[np.int32]

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 60


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Token lengths of one side."""

    rows: int
    """Rows that say it."""
    total: int
    mean: float
    minimum: int
    maximum: int
    quantiles: dict[str, float]
    """"p50" -> tokens."""
    histogram: dict[str, int]
    """Power of two -> rows with lengths from it to below the next."""


@dataclass(frozen=True, slots=True)
class ConversationShape:
    """Conversations, by their id."""

    sessions: int
    rows: int
    """Rows that belong to one."""
    turns_mean: float
    turns_max: int
    turns_quantiles: dict[str, float]
    gap_quantiles_s: dict[str, float] | None
    """Between the arrivals of a session's turns; null without times or second turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceShape:
    """All that is said of a trace; null where it does not say, or is too short to."""

    rows: int
    span_s: float | None
    mean_rate: float | None
    instants: int | None
    """Different arrival times."""
    longest_gap_s: float | None
    burstiness: dict[str, float | None]
    """"1s", "10s", "60s" -> variance / mean of counts; null below ten windows."""
    worst_second: dict[str, float] | None
    worst_minute: dict[str, float] | None
    """requests, start_s and ratio_to_mean."""
    rate_over_time: dict[str, list[float]] | None
    """start_s and rate (requests/s) of equal windows."""
    input_tokens: TokenLengths | None
    output_tokens: TokenLengths | None
    rank_correlation: float | None
    """Spearman's, of input and output lengths: 1 when longer prompts get longer answers."""
    joint: dict[str, list[list[int]] | list[int]] | None
    """rows by power of four of the input (down) and output tokens (across)."""
    sessions: ConversationShape | None
    prefix: Prefix | None
    recorded_cache: RecordedCache | None
    """What production's prompt cache found; null where no row says it."""
    rows_with_text: int
    models: tuple[ModelShare, ...]
    """By rows, the most first; empty where no row says its model."""


def measure(records: Iterable[TraceRecord]) -> TraceShape:
    """The shape of ``records``, which come in order of arrival."""
    columns = RowColumns()
    for record in records:
        columns.add(record)
    return columns.shape()


@dataclass(slots=True)
class ModelShare:
    """The rows of one model, by the source's name for it."""

    model: str | None
    """null: rows that do not say it; `OTHER_MODELS`: those beyond the first `MODELS_HELD`."""
    rows: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


OTHER_MODELS = "(other models)"
MODELS_HELD = 1000


class Models:
    """Rows and tokens by model."""

    def __init__(self) -> None:
        self._found: dict[str | None, ModelShare] = {}

    def add(self, record: TraceRecord) -> None:
        """The next record."""
        name = record.model
        if name not in self._found and len(self._found) >= MODELS_HELD:
            name = OTHER_MODELS
        share = self._found.setdefault(name, ModelShare(name))
        share.rows += 1
        share.input_tokens += record.input_tokens or 0
        share.output_tokens += record.output_tokens or 0

    def shares(self) -> tuple[ModelShare, ...]:
        """The most first."""
        if not self._found.keys() - {None}:
            return ()
        return tuple(sorted(self._found.values(), key=lambda share: (-share.rows, share.model or "")))


class _SessionSoFar(NamedTuple):
    """A session so far."""

    rows: int
    arrival_ns: int | None


@dataclass(slots=True)
class RowColumns:
    """What is kept of each record until the shape is asked for."""

    arrival_ns: Column = field(default_factory=lambda: Column("q"))
    input_tokens: Column = field(default_factory=lambda: Column("i"))
    output_tokens: Column = field(default_factory=lambda: Column("i"))
    """-1 where not given."""
    gap_ns: Column = field(default_factory=lambda: Column("q"))
    """Between the turns of a session."""
    rows: int = 0
    with_text: int = 0
    reuse: IdealReuse = field(default_factory=IdealReuse)
    cache: CacheCount = field(default_factory=CacheCount)
    models: Models = field(default_factory=Models)
    _last: Kept[_SessionSoFar] = field(default_factory=lambda: Kept(_SessionSoFar))
    _turns: Counter[int] = field(default_factory=Counter)
    """Turns so far -> sessions that have so many."""

    def add(self, record: TraceRecord) -> None:
        """The next record."""
        self.rows += 1
        arrival_ns = None if record.arrival_s is None else round(record.arrival_s * 1e9)
        if arrival_ns is not None:
            self.arrival_ns.append(arrival_ns)
        self.input_tokens.append(-1 if record.input_tokens is None else record.input_tokens)
        self.output_tokens.append(-1 if record.output_tokens is None else record.output_tokens)
        if record.session_id is not None:
            self._turn(record.session_id, arrival_ns)
        self.with_text += record.text is not None or record.messages is not None
        self.reuse.add(record)
        self.cache.add(record.input_tokens, record.cached_tokens)
        self.models.add(record)

    def _turn(self, session: str, arrival_ns: int | None) -> None:
        last = self._last.get(session) or _SessionSoFar(0, None)
        self._last.set(session, _SessionSoFar(last.rows + 1, arrival_ns))
        self._turns[last.rows + 1] += 1
        if last.rows:
            self._turns[last.rows] -= 1
        if last.arrival_ns is not None and arrival_ns is not None:
            self.gap_ns.append(arrival_ns - last.arrival_ns)

    def shape(self) -> TraceShape:
        """The shape of all records added."""
        times, into, out = self.arrival_ns.whole(), self.input_tokens.whole(), self.output_tokens.whole()
        pairs = _Pairs(into, out)
        rate = mean_rate(times)
        instants, longest_gap_s = _gaps(times)
        return TraceShape(
            rows=self.rows,
            span_s=int(times[-1] - times[0]) / 1e9 if len(times) else None,
            mean_rate=rate,
            instants=instants,
            longest_gap_s=longest_gap_s,
            burstiness={f"{w}s": dispersion(times, w) for w in WINDOWS_S},
            worst_second=_worst(times, 1, rate),
            worst_minute=_worst(times, 60, rate),
            rate_over_time=_rate_over_time(times),
            input_tokens=_lengths(into),
            output_tokens=_lengths(out),
            rank_correlation=pairs.rank_correlation(),
            joint=pairs.joint(),
            sessions=self._sessions(),
            prefix=self.reuse.result(),
            recorded_cache=self.cache.result(),
            rows_with_text=self.with_text,
            models=self.models.shares(),
        )

    def _sessions(self) -> ConversationShape | None:
        sessions = self._turns.total()
        if not sessions:
            return None
        turns = {rows: count for rows, count in sorted(self._turns.items()) if count}
        rows = sum(each * count for each, count in turns.items())
        gaps = _quantiles(self.gap_ns.whole()) if len(self.gap_ns) else None
        return ConversationShape(
            sessions=sessions,
            rows=rows,
            turns_mean=rows / sessions,
            turns_max=max(turns),
            turns_quantiles=_quantiles(np.repeat(list(turns), list(turns.values()))),
            gap_quantiles_s=None if gaps is None else {name: gap / 1e9 for name, gap in gaps.items()},
        )


# --- arrivals ------------------------------------------------------------------------------------------------------


def _gaps(times: Ints) -> tuple[int | None, float | None]:
    """Different arrivals, and the longest gap between two, s."""
    if not len(times):
        return None, None
    instants, longest = 1, 0
    for part in blocks(len(times) - 1):
        gaps = np.diff(times[part.start : part.stop + 1])
        instants, longest = instants + int(np.count_nonzero(gaps)), max(longest, int(gaps.max()))
    return instants, longest / 1e9 if len(times) > 1 else None


def _worst(times: Ints, window_s: int, rate: float | None) -> dict[str, float] | None:
    found = worst(times, window_s)
    if found is None or rate is None:
        return None
    requests, at = found
    return {
        "requests": requests,
        "start_s": int(times[at] - times[0]) / 1e9,
        "ratio_to_mean": requests / (rate * window_s),
    }


def _rate_over_time(times: Ints) -> dict[str, list[float]] | None:
    if len(times) < 2 or times[-1] == times[0]:
        return None
    span_ns, bins = int(times[-1] - times[0]), min(_BINS, len(times))
    counts = counts_between(times, int(times[0]), span_ns, bins)
    width_s = span_ns / 1e9 / bins
    return {"start_s": [i * width_s for i in range(bins)], "rate": (counts / width_s).tolist()}


# --- lengths and sessions ------------------------------------------------------------------------------------------


def _quantiles(values: npt.NDArray[np.generic]) -> dict[str, float]:
    """Of ``values``, which are sorted in place."""
    values.sort()
    places = np.array(QUANTILES) * (len(values) - 1)
    below = values[np.floor(places).astype(np.int64)].astype(np.float64)
    above = values[np.ceil(places).astype(np.int64)].astype(np.float64)
    found = below + (above - below) * (places % 1)
    return {f"p{q * 100:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _lengths(column: Lens) -> TokenLengths | None:
    """Of what is given and not 0."""
    tokens, rows, total = empty(len(column), np.int32), 0, 0
    powers = np.zeros(32, dtype=np.int64)
    for part in blocks(len(column)):
        some = column[part][column[part] > 0]
        tokens[rows : rows + len(some)] = some
        rows, total = rows + len(some), total + int(some.sum(dtype=np.int64))
        powers += np.bincount(_power(some), minlength=32)
    if not rows:
        return None
    tokens = tokens[:rows]
    quantiles = _quantiles(tokens)
    return TokenLengths(
        rows=rows,
        total=total,
        mean=total / rows,
        minimum=int(tokens[0]),
        maximum=int(tokens[-1]),
        quantiles=quantiles,
        histogram={str(2**power): count for power, count in enumerate(powers.tolist()) if count},
    )


def _power(tokens: Lens) -> Ints:
    """Of two, at or below each length."""
    return np.frexp(tokens.astype(np.float64))[1].astype(np.int64) - 1


class _Pairs:
    """Input and output lengths of the rows that say both."""

    def __init__(self, into: Lens, out: Lens) -> None:
        self._into, self._out = into, out
        self.rows = sum(len(a) for a, _ in self)

    def __iter__(self) -> Iterator[tuple[Lens, Lens]]:
        for part in blocks(len(self._into)):
            a, b = self._into[part], self._out[part]
            both = (a > 0) & (b > 0)
            yield a[both], b[both]

    def rank_correlation(self) -> float | None:
        """Spearman's; equal lengths share the mean of their ranks. null below three rows or without a spread."""
        if self.rows < 3:
            return None
        ranks = [_Ranks((pair[side] for pair in self), self.rows) for side in (0, 1)]
        products = sum(float((ranks[0].of(a) * ranks[1].of(b)).sum()) for a, b in self)
        spread = ranks[0].squares * ranks[1].squares
        return products / math.sqrt(spread) if spread else None

    def joint(self) -> dict[str, list[list[int]] | list[int]] | None:
        """Rows by power of four."""
        if not self.rows:
            return None
        table = np.zeros((16, 16), dtype=np.int64)
        for a, b in self:
            np.add.at(table, (_power(a) // 2, _power(b) // 2), 1)
        down, across = (np.flatnonzero(table.any(axis=axis)).tolist() for axis in (1, 0))
        return {
            "input_from": [4**i for i in range(down[0], down[-1] + 1)],
            "output_from": [4**i for i in range(across[0], across[-1] + 1)],
            "rows": table[down[0] : down[-1] + 1, across[0] : across[-1] + 1].tolist(),
        }


class _Ranks:
    """Ranks of lengths, less the mean rank."""

    def __init__(self, parts: Iterable[Lens], rows: int) -> None:
        found: Counter[int] = Counter()
        for part in parts:
            values, counts = np.unique(part, return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self._values = np.array(sorted(found))
        equal = np.array([found[int(value)] for value in self._values])
        self._middles = np.cumsum(equal) - (equal - 1) / 2 - (rows + 1) / 2
        self.squares = float((equal * self._middles**2).sum())

    def of(self, lengths: Lens) -> npt.NDArray[np.float64]:
        """The rank of each."""
        found: npt.NDArray[np.float64] = self._middles[np.searchsorted(self._values, lengths)]
        return found
