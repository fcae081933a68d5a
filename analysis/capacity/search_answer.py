"""The answer of a search for capacity: from its estimate to `Capacity`, and back from the file that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from harness.analysis.arrays import Floats
from harness.analysis.capacity.backlog import Demand
from harness.analysis.capacity.crossing import NEAR, Evidence
from harness.analysis.capacity.search import SUSTAINED, Estimate
from harness.analysis.capacity.sweep import Capacity, State
from harness.analysis.fidelity.inputs import POINTS_BOUND
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import Summary
from harness.record.manifest import MOST_BYTES
from harness.slo import Criterion
from harness.sweep.state import ANSWER as FILE
from harness.trace.stats import TraceStats
from harness.untrusted import DECODE_ERRORS, read_regular

MIX_BOUND = 0.05
"""Mean lengths of the probes that decide lie so near to the trace's, or within two standard errors."""
CACHED_BOUND = POINTS_BOUND
"""Of input tokens: cached ones may differ by so many, too, since 5 % of few are nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a search says of one SLO; kept in `FILE`."""

    criteria: tuple[str, ...]
    """By name."""
    runs: tuple[str, ...]
    """Names of the VALID runs in an open loop that it was made from."""
    capacity: Capacity
    trace_share: float
    """Of the trace's requests that the probes replayed, each counted once."""
    seconds: float
    """Of measured load that decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Mean length of one kind of token: of the probes that decide, and of the trace."""

    kind: str
    probes: float
    trace: float
    error: float
    """Standard error of ``probes``."""
    least: float = 0.0
    """Tokens that it may be off, at least."""

    @property
    def fits(self) -> bool:
        """Within `MIX_BOUND` or two standard errors, whichever is wider."""
        return abs(self.probes - self.trace) <= max(self.bound, 2 * self.error) if self.trace else True

    @property
    def bound(self) -> float:
        """Tokens that it may be off, chance apart."""
        return max(MIX_BOUND * self.trace, self.least)

    def advice(self, minutes: float) -> str:
        """What to do about it, after so many minutes."""
        if self.kind == "cached" and self.probes < self.trace:
            times = (self.trace - self.probes) / self.bound
            return f"windows cut conversations and shared prefixes: probes about {times:.1f} times as long (--probe)"
        more = minutes * ((2 * self.error / self.bound) ** 2 - 1)
        return f"measure about {more:.0f} minutes longer" if more >= 1 else "measure again with another seed"


def mixes(probes: Sequence[Evidence], near: float, demand: Demand, source: TraceStats | None = None) -> list[Mix]:
    """Mean input and output tokens of the probes near a rate, pooled, beside the trace's; and cached ones, where
    ``source`` states what an unlimited prefix cache finds in it.
    """
    deciding = [p for p in probes if p.measured.any() and abs(math.log(p.rate / near)) <= NEAR]
    if not deciding:
        return []
    found = []
    for kind in ("input", "output"):
        total, size = np.concatenate([_by_window(p, getattr(p.sent, f"{kind}_tokens")) for p in deciding], axis=1)
        mean, n = float(total.sum() / size.sum()), len(size)
        beyond = total - mean * size
        error = math.sqrt(float(beyond @ beyond) * n / (n - 1)) / float(size.sum()) if n > 1 else math.inf
        found.append(Mix(kind=kind, probes=mean, trace=_mean(demand, kind), error=error))
    known = np.array([p.cached_tokens for p in deciding if p.cached_tokens is not None])
    if source is not None and source.prefix is not None and source.input_tokens is not None and len(known):
        inputs = source.input_tokens.mean
        error = float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.inf
        trace = source.prefix.hit_rate_tokens * inputs
        found.append(
            Mix(kind="cached", probes=float(known.mean()), trace=trace, error=error, least=CACHED_BOUND * inputs)
        )
    return found


def _by_window(probe: Evidence, tokens: Floats) -> Floats:
    """Tokens of the measured requests of each window, and how many requests it has; shape (2, windows)."""
    place = probe.window - probe.window.min()
    sums = np.array([np.bincount(place, weights=tokens[probe.measured]), np.bincount(place)], dtype=np.float64)
    return sums[:, sums[1] > 0]


def _mean(demand: Demand, kind: str) -> float:
    tokens: Floats = getattr(demand, f"{kind}_tokens")
    return float(tokens.mean())


def capacity_from(
    now: Estimate | None, shown: Sequence[Evidence], summaries: Sequence[Summary], demand: Demand,
    *, unit: str, sessions_per_request: float | None, reached: bool,
) -> Capacity:  # fmt: skip
    """The answer as every report prints it. ``sessions_per_request``: the load is sessions/s, not requests/s.

    ``reached``: some probe met the SLO.
    """
    per = 1.0 if sessions_per_request is None else sessions_per_request
    blank = Quantity(
        value=None, n=sum(int(p.measured.sum()) for p in shown), unit=unit,
        evidence=summaries[0].evidence if summaries else "measured",
    )  # fmt: skip

    def none(
        state: State, note: str, low: float | None = None, high: float | None = None, limit: Criterion | None = None
    ) -> Capacity:
        ends = [None if end is None else end * per for end in (low, high)]
        load = replace(blank, low=ends[0], high=ends[1], note=note)
        return Capacity(state=state, load=load, limit=limit, rates={})

    if now is None:
        return none("unknown", "no VALID run in an open loop")
    top, lowest = max(p.rate for p in shown), min(p.rate for p in shown)
    if not now.missed:
        return none("beyond", f"beyond the highest load: at {top * per:.4g} {unit} it is kept", low=top)
    if not reached and now.rate < 0.9 * lowest:
        note = f"not reached: at {lowest * per:.4g} {unit}, the lowest load that was measured, it is missed"
        return none("not reached", note, high=lowest, limit=now.limit)
    for mix in mixes(shown, now.rate, demand, summaries[0].plan.source if summaries else None):
        if not mix.fits:
            whose = " that a prefix cache would find" if mix.kind == "cached" else ""
            return none(
                "unknown",
                f"the probes' requests had {mix.probes:,.0f} {mix.kind} tokens{whose} in the mean, the trace's have "
                f"{mix.trace:,.0f}: {mix.advice(now.seconds / 60)}",
            )
    value, low, high = (None if x is None else x * per for x in (now.rate, now.low, now.high))
    load = replace(blank, value=value, low=low, high=high, note=_width_words(now))
    return Capacity(state="found", load=load, limit=now.limit, rates=_rates(now, shown, summaries, demand, blank))


CORRECTED = (
    "capacity is that of the whole trace: bursts and long answers that the probes met by chance, more or fewer than "
    "the trace has, are taken out by the curve of its planned load (analysis/PRICES.md)"
)


def _width_words(now: Estimate) -> str:
    """How long a narrower interval takes."""
    minutes, width = now.seconds / 60, now.half_width
    if now.short:
        said = "no interval: the probes are too short to see a burst through; --probe 60s"
    elif width is None:
        said = f"no interval yet: {now.probes} probes decide; measure longer"
    else:
        said = (
            f"from {minutes:.0f} minutes of load near it, +/- {width:.0%}; half that width takes about "
            f"{3 * minutes:.0f} minutes more (--tolerance {width / 2:.0%})"
        )
    return said if now.limit is SUSTAINED else f"{said}; {CORRECTED}"


def _rates(
    now: Estimate, shown: Sequence[Evidence], summaries: Sequence[Summary], demand: Demand, blank: Quantity
) -> Mapping[str, Quantity]:
    """Requests and tokens per second at that load: tokens as served per request, in the mix of the whole trace."""
    valid = [s for s in summaries if s.requests.succeeded]
    really, succeeded = _sent_of_planned(valid), sum(s.requests.succeeded for s in valid)

    def rate(per_request: float | None, unit: str = "tokens/s") -> Quantity:
        ends = (now.rate, now.low, now.high)
        value, low, high = (None if x is None or per_request is None else x * per_request * really for x in ends)
        note = None if per_request is not None else "tokens were not counted at every load"
        return replace(blank, value=value, low=low, high=high, n=succeeded, unit=unit, note=note)

    def each(kind: str) -> float | None:
        counts = [getattr(s.tokens, kind) for s in valid]
        if not succeeded or any(count is None for count in counts) or any(s.tokens.missing for s in valid):
            return None
        planned = [getattr(p.sent, f"{kind}_tokens")[p.measured] for p in shown if p.measured.any()]
        mean = float(np.concatenate(planned).mean()) if planned else 0.0
        return float(sum(counts) / succeeded * (_mean(demand, kind) / mean if mean > 0 else 1.0))

    into, out = each("input"), each("output")
    total = None if into is None or out is None else into + out
    tokens = {"input": into, "output": out, "total": total}
    found = {name: rate(1.0, "req/s") for name in ("request_rate", "request_throughput", "sent_rate")}
    return found | {
        f"{kind}_token_throughput": rate(each_)
        for kind, each_ in tokens.items()
        if kind == "total" or each_ is not None
    }


def _sent_of_planned(summaries: Sequence[Summary]) -> float:
    """Share of the planned requests/s that sessions which wait really sent; 1 for loads that send what is due."""
    known = [
        (sent, s.plan.planned_rate)
        for s in summaries
        if s.offered.kind == "sessions" and (sent := s.offered.sent_rate.value) is not None and s.plan.planned_rate
    ]
    return min(1.0, sum(sent for sent, _ in known) / sum(rate for _, rate in known)) if known else 1.0


class _File(msgspec.Struct):
    answer: Answer | None = None


def kept_answer(runs: Sequence[Summary], criteria: Sequence[Criterion]) -> Answer | None:
    """What the search in whose folder these runs lie found for this SLO; None where there was none, or another."""
    folder, *more = {Path(s.run).parent for s in runs}
    try:
        found = msgspec.json.decode(read_regular(folder / FILE, MOST_BYTES), type=_File).answer
    except (OSError, *DECODE_ERRORS):
        return None
    if more or found is None or set(found.criteria) != {c.name for c in criteria}:
        return None
    return found if set(found.runs) == {Path(s.run).name for s in runs} else None
