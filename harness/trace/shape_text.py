"""A trace's shape in words and bars, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from harness.trace.formats.record import safe
from harness.trace.shape import TokenLengths, TraceShape

_BARS = " ▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_MODELS = 12
"""Models that are listed."""
_BURST = 5
"""Fewest requests that are called a burst."""


def described(facts: dict[str, Any], shape: TraceShape) -> str:
    """The whole of ``harness trace inspect``."""
    dropped = "".join(f"; {count} {reason}" for reason, count in sorted(facts["rows_dropped"].items()))
    failed = ""
    if facts["rows_failed"] and facts["rows_failed"] not in facts["rows_dropped"].values():
        failed = f"; {facts['rows_failed']} failed calls of the source in all"
    lines = [
        f"{facts['file']}: {facts['format']}",
        f"rows      {facts['rows_read']} read, {facts['rows_kept']} kept{dropped}{failed}",
        f"clock     {facts['clock']}" if facts["clock"] else "",
        f"blocks    {facts['blocks']}" if facts["blocks"] else "",
        *_times(shape, facts["grid_s"]),
        *_tokens("input", shape.input_tokens),
        *_tokens("output", shape.output_tokens),
        *_joint(shape),
        *_sessions(shape),
        _prefix(shape),
        _recorded(shape),
        *_models(shape),
        *_unread(facts),
        *(f"note      {note}" for note in facts["notes"]),
    ]
    return "\n".join(line.rstrip() for line in lines if line)


def compared(before: TraceShape | None, after: TraceShape) -> str:
    """A few figures of a trace, beside those of the one it was made from."""

    def row(name: str, pick: Any, form: str) -> str:
        values = [pick(shape) for shape in ([before] if before else []) + [after]]
        if all(value is None for value in values):
            return ""
        return f"{name:28}" + " -> ".join("not known" if v is None else format(v, form) for v in values)

    rows = [
        row("requests", lambda s: s.rows, "d"),
        row("span, s", lambda s: s.span_s, ".1f"),
        row("mean rate, req/s", lambda s: s.mean_rate, ".4g"),
        *(row(f"burstiness at {w}", lambda s, w=w: s.burstiness[w], ".2f") for w in ("1s", "10s", "60s")),
        row("worst minute / mean", lambda s: s.worst_minute and s.worst_minute["ratio_to_mean"], ".2f"),
        row("mean input tokens", lambda s: s.input_tokens and s.input_tokens.mean, ".1f"),
        row("mean output tokens", lambda s: s.output_tokens and s.output_tokens.mean, ".1f"),
        row("sessions", lambda s: s.sessions and s.sessions.sessions, "d"),
        row("ideal prefix hit, blocks", lambda s: s.prefix and s.prefix.hit_rate_blocks, ".1%"),
    ]
    return "\n".join(filter(None, rows))


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
    for name, worst in (("second", shape.worst_second), ("minute", shape.worst_minute)):
        if worst and worst["requests"] >= _BURST:  # of two requests in one second nothing follows
            lines.append(
                f"          worst {name}: {worst['requests']} requests, {worst['ratio_to_mean']:.3g} times the mean, "
                f"at {_duration(worst['start_s'])}"
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


def _joint(shape: TraceShape) -> list[str]:
    if shape.joint is None or shape.rank_correlation is None:
        return []
    table: Any = shape.joint["rows"]
    inputs: Any = shape.joint["input_from"]
    outputs: Any = shape.joint["output_from"]
    top = max(max(row) for row in table)
    lines = [
        f"joint     rank correlation of input and output {shape.rank_correlation:+.2f}; requests by input (down) and "
        "output tokens (across), from:",
        f"{'':19}{''.join(f'{_short(start):<5}' for start in outputs)}",
    ]
    for start, row in zip(inputs, table, strict=True):
        lines.append(f"{_short(start):>18} {''.join(_SHADES[-(-4 * count // top)] * 5 for count in row)}")
    return lines


def _short(tokens: int) -> str:
    return str(tokens) if tokens < 1000 else f"{tokens // 1024}k" if tokens < 2**20 else f"{tokens // 2**20}M"


def _sessions(shape: TraceShape) -> list[str]:
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
    """What production found in its own cache."""
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


def _unread(facts: dict[str, Any]) -> list[str]:
    """Rows that cannot be read, which a plan refuses."""
    examples: dict[str, str] = facts["examples"]
    if not examples:
        return []
    count = sum(facts["rows_dropped"][reason] for reason in examples)
    return [
        f"unread    {count} rows cannot be read, and a plan refuses them (--skip-bad drops them); the first of each:",
        *(f"          {safe(example, 300)}" for example in examples.values()),
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
