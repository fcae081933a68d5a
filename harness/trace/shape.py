"""The shape of a trace: what `harness trace inspect` says, in figures and in words. Never the requests.

For what the figures of arrivals are see `harness.trace.stats` (burstiness is their dispersion), for those of prefixes
`harness.trace.prefix`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.trace.formats.record import safe
from harness.trace.io import Trace, TraceRecord
from harness.trace.stats import Ints, PrefixStats, RecordedCache, arrival_stats, counts_between, worst
from harness.trace.survey import ModelShare, Survey

_BARS = " ▁▂▃▄▅▆▇█"
_MODELS = 12
_BURST = 5
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_BINS = 60


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Token lengths of one side."""

    rows: int
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
    rate_over_time: dict[str, list[float]] | None
    """start_s and rate (requests/s) of equal windows."""
    input_tokens: TokenLengths | None
    output_tokens: TokenLengths | None
    rank_correlation: float | None
    """Spearman's, of input and output lengths: 1 when longer prompts get longer answers."""
    sessions: ConversationShape | None
    prefix: PrefixStats | None
    recorded_cache: RecordedCache | None
    """What production's prompt cache found; null where no row says it."""
    rows_with_text: int
    models: tuple[ModelShare, ...]
    """By rows, the most first; empty where no row says its model."""


def measure(records: Iterable[TraceRecord]) -> TraceShape:
    """The shape of ``records``, which come in order of arrival."""
    found = Survey()
    for record in records:
        found.add(record)
    return shape_of(found)


def shape_of(found: Survey) -> TraceShape:
    """The shape of what was seen."""
    times = found.arrivals
    arrivals, rate, over_time = arrival_stats(times), None, None
    instants = longest_gap_s = None
    if arrivals is not None:
        rate, gaps = arrivals.rate, np.diff(times)
        if arrivals.span_s:
            bins = min(_BINS, len(times))
            width_s = arrivals.span_s / bins
            counts = counts_between(times, int(times[0]), int(times[-1] - times[0]), bins)
            over_time = {"start_s": [i * width_s for i in range(bins)], "rate": (counts / width_s).tolist()}
        instants, longest_gap_s = 1 + int(np.count_nonzero(gaps)), int(gaps.max()) / 1e9 if len(gaps) else None
    return TraceShape(
        rows=found.requests,
        span_s=arrivals.span_s if arrivals else None,
        mean_rate=rate,
        instants=instants,
        longest_gap_s=longest_gap_s,
        burstiness=arrivals.dispersion if arrivals else dict.fromkeys(("1s", "10s", "60s")),
        worst_second=_worst(times, 1, rate),
        worst_minute=_worst(times, 60, rate),
        rate_over_time=over_time,
        input_tokens=_lengths(found.inputs + found.input_lengths),
        output_tokens=_lengths(found.outputs),
        rank_correlation=_rank_correlation(found),
        sessions=_sessions(found),
        prefix=found.reuse.result(),
        recorded_cache=found.recorded_cache,
        rows_with_text=found.texts + found.messages,
        models=found.models,
    )


def _worst(times: Ints, window_s: int, rate: float | None) -> dict[str, float] | None:
    found = worst(times, window_s)
    if found is None or rate is None:
        return None
    requests, at = found
    start_s = int(times[at] - times[0]) / 1e9
    return {"requests": requests, "start_s": start_s, "ratio_to_mean": requests / (rate * window_s)}


def _sessions(found: Survey) -> ConversationShape | None:
    turns = +found.turns
    sessions = turns.total()
    if not sessions:
        return None
    rows, gap_ns = sum(each * count for each, count in turns.items()), np.sort(np.array(found.gap_ns))
    return ConversationShape(
        sessions=sessions,
        rows=rows,
        turns_mean=rows / sessions,
        turns_max=max(turns),
        turns_quantiles=_counted_quantiles(turns),
        gap_quantiles_s=_quantiles(lambda places: gap_ns[places] / 1e9, len(gap_ns)) if len(gap_ns) else None,
    )


def _quantiles(at: Callable[[Ints], npt.NDArray[np.generic]], n: int) -> dict[str, float]:
    places = np.array(QUANTILES) * (n - 1)
    below, above = (at(end(places).astype(np.int64)).astype(np.float64) for end in (np.floor, np.ceil))
    found = below + (above - below) * (places % 1)
    return {f"p{q * 100:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}


def _counted_quantiles(counts: Mapping[int, int]) -> dict[str, float]:
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[int(value)] for value in values])
    return _quantiles(lambda places: values[np.searchsorted(reached, places, side="right")], int(reached[-1]))


def _lengths(counts: Mapping[int, int]) -> TokenLengths | None:
    counts = {length: rows for length, rows in counts.items() if length > 0}
    if not counts:
        return None
    rows, total = sum(counts.values()), sum(length * rows for length, rows in counts.items())
    powers: Counter[int] = Counter()
    for length, some in counts.items():
        powers[length.bit_length() - 1] += some
    return TokenLengths(
        rows=rows,
        total=total,
        mean=total / rows,
        minimum=min(counts),
        maximum=max(counts),
        quantiles=_counted_quantiles(counts),
        histogram={str(2**power): powers[power] for power in sorted(powers)},
    )


def _rank_correlation(found: Survey) -> float | None:
    """Spearman's; equal lengths share the mean of their ranks. None below three rows or without a spread."""
    into, out = (np.array(side) for side in found.pairs)
    both = (into > 0) & (out > 0)
    n = int(both.sum())
    if n < 3:
        return None
    ranks, squares = [], 1.0
    for lengths in (into[both], out[both]):  # ranks less the mean rank
        _, places, equal = np.unique(lengths, return_inverse=True, return_counts=True)
        rank = np.cumsum(equal) - (equal - 1) / 2 - (n + 1) / 2
        squares *= float((equal * rank**2).sum())
        ranks.append(rank[places])
    return float((ranks[0] * ranks[1]).sum()) / math.sqrt(squares) if squares else None


# --- in words --------------------------------------------------------------------------------------------------------


def described(trace: Trace, shape: TraceShape) -> str:
    """The whole of ``harness trace inspect``, of a trace that was read."""
    dropped = "".join(f"; {count} {reason}" for reason, count in sorted(trace.rows_dropped.items()))
    if trace.rows_failed and trace.rows_failed not in trace.rows_dropped.values():
        dropped += f"; {trace.rows_failed} failed calls of the source in all"
    correlation = shape.rank_correlation
    lines = [
        f"{trace.sources.name}: {trace.format}",
        f"rows      {trace.rows_read} read, {trace.rows_kept} kept{dropped}",
        f"clock     {trace.clock}" if trace.clock else "",
        f"blocks    {trace.blocks}" if trace.blocks else "",
        *_times(shape, trace.grid_s),
        *_tokens("input", shape.input_tokens),
        *_tokens("output", shape.output_tokens),
        "" if correlation is None else f"joint     rank correlation of input and output {correlation:+.2f}",
        *_turns(shape),
        _prefix(shape),
        _recorded(shape),
        *_models(shape),
        *_unread(trace),
        *(f"note      {note}" for note in trace.notes),
    ]
    return "\n".join(line.rstrip() for line in lines if line)


def _bars(values: Sequence[float]) -> str:
    top = max(values, default=0)
    return "".join(_BARS[math.ceil(8 * v / top) if top else 0] for v in values)


def _times(shape: TraceShape, grid_s: float | None) -> list[str]:
    if shape.span_s is None:
        return ["times     none: send it in a closed loop (--concurrency) or at drawn times (--arrivals poisson)"]
    rate = f", {shape.mean_rate:.4g} requests/s" if shape.mean_rate else ""
    lines = [f"span      {_duration(shape.span_s)}{rate}; {shape.instants} different instants"]
    if grid_s is not None:
        lines.append(f"grid      {grid_s:g} s: the source rounded its clock")
    if shape.rate_over_time:
        rates = shape.rate_over_time["rate"]
        window = _duration(shape.span_s / len(rates))
        lines.append(f"rate      {_bars(rates)}  up to {max(rates):.3g}/s ({window} each)")
    bursts = [f"{value:.3g} at {name}" for name, value in shape.burstiness.items() if value is not None]
    if bursts:
        lines.append(f"bursts    variance/mean of counts {', '.join(bursts)} (Poisson: 1)")
    for name, most in (("second", shape.worst_second), ("minute", shape.worst_minute)):
        if most and most["requests"] >= _BURST:  # of two requests in one second nothing follows
            lines.append(
                f"          worst {name}: {most['requests']} requests, {most['ratio_to_mean']:.3g} times the mean, "
                f"at {_duration(most['start_s'])}"
            )
    if shape.longest_gap_s and shape.span_s and shape.longest_gap_s > 0.05 * shape.span_s:
        share = shape.longest_gap_s / shape.span_s
        lines.append(f"          longest gap: {_duration(shape.longest_gap_s)}, {share:.0%} of the span")
    return lines


def _tokens(side: str, lengths: TokenLengths | None) -> list[str]:
    if lengths is None:
        return [f"{side:9} tokens not given"]
    q = lengths.quantiles
    starts = range(int(min(lengths.histogram, key=int)).bit_length() - 1, lengths.maximum.bit_length())
    counts = [lengths.histogram.get(str(2**i), 0) for i in starts]
    return [
        f"{side:9} {lengths.mean:.1f} tokens on average; p10 {q['p10']:g}, p50 {q['p50']:g}, p90 {q['p90']:g}, "
        f"p99 {q['p99']:g}; {lengths.minimum} to {lengths.maximum}",
        f"          {_bars(counts)}  by powers of two from {2 ** starts[0]}",
    ]


def _turns(shape: TraceShape) -> list[str]:
    if shape.sessions is None:
        return ["sessions  none"]
    s = shape.sessions
    alone = f", {shape.rows - s.rows} requests without" if s.rows < shape.rows else ""
    gap = f"; median gap between turns {_duration(s.gap_quantiles_s['p50'])}" if s.gap_quantiles_s else ""
    return [f"sessions  {s.sessions}{alone}; {s.turns_mean:.2f} turns on average, up to {s.turns_max}{gap}"]


def _prefix(shape: TraceShape) -> str:
    if shape.prefix is None:
        how = " (--tokenizer FILE finds it in the text)" if shape.rows_with_text else ""
        return f"prefix    reuse not known{how}"
    p = shape.prefix
    sampled = f"; estimated from 1 in {p.sampled} blocks" if p.sampled > 1 else ""
    sizes = "/".join(map(str, p.block_tokens))
    text = f"; {shape.rows_with_text} rows of text not counted" if shape.rows_with_text else ""
    turns = ""
    if p.continued_turns is not None:
        turns = (
            f", if turns go on from the one before them: {p.continued_turns} are long enough to, {p.independent_turns} "
            "are not"
        )
    return (
        f"prefix    ideal cache hit {p.hit_rate_blocks:.1%} of blocks of {sizes} tokens, {p.hit_rate_tokens:.1%} of "
        f"tokens{sampled}{turns}{text}"
    )


def _recorded(shape: TraceShape) -> str:
    found = shape.recorded_cache
    if found is None:
        return ""
    tokens = f"{found.cached_tokens:,} of {found.input_tokens:,} tokens"
    return f"cached    {found.share:.1%} of input: {tokens} on the {found.rows:,} of {shape.rows:,} rows that say it"


def _models(shape: TraceShape) -> list[str]:
    if not shape.models:
        return []
    lines = [f"models    {len(shape.models)} (--where model=NAME chooses):"]
    for share in shape.models[:_MODELS]:
        name = safe(share.model, 60) if share.model is not None else "(not said)"
        tokens = f"{share.input_tokens:,} input and {share.output_tokens:,} output tokens"
        lines.append(f"          {name}: {share.rows:,} rows, {tokens}")
    if len(shape.models) > _MODELS:
        lines.append(f"          and {len(shape.models) - _MODELS} more")
    return lines


def _unread(trace: Trace) -> list[str]:
    if not trace.examples:
        return []
    count = sum(trace.rows_dropped[reason] for reason in trace.examples)
    return [
        f"unread    {count} rows cannot be read, and a plan refuses them (--skip-bad drops them); the first of each:",
        *(f"          {safe(example, 300)}" for example in trace.examples.values()),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
