"""What tiers can carry and what that costs, by simulation: capacity at an SLO, and an order of tiers by cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from harness.cluster.catalogue.models import Model, for_tier, model_config, tensor_parallel_sizes
from harness.cluster.engines.vllm import misfit
from harness.cluster.hardware.engine import HardwareEngine, engine_for
from harness.cluster.hardware.error import cost_range
from harness.cluster.simulator.fleet import Workload, simulate
from harness.errors import UsageError
from harness.record.manifest import Tier
from harness.slo import Criterion
from harness.trace.formats.record import TraceRecord

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SPLITS = (1, 2, 4, 8)
TIE = 1.10
"""Tiers whose costs are closer than this are not told apart: chips were, in 94 of 100 pairs that differ by more."""
CLOSE = 0.05
"""Of a capacity, relative."""
REQUESTS, SPAN_S = 1000, 40.0
"""So many requests, and for so long, are simulated of each rate at least; a shorter trace is repeated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A trace: when requests came and how long they were."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints

    def kept(self, most: int) -> Demand:
        """Those requests that a model of so many tokens of context serves."""
        good = (self.input_tokens + self.output_tokens <= most) & (self.output_tokens > 0)
        if not good.any():
            raise UsageError(f"no request of the trace fits into {most} tokens")
        return Demand(
            arrival_s=self.arrival_s[good], input_tokens=self.input_tokens[good], output_tokens=self.output_tokens[good]
        )  # fmt: skip

    def repeated(self, requests: int) -> Demand:
        """The same, again and again until there are so many requests."""
        times = -(-requests // len(self.arrival_s))
        length_s = (self.arrival_s[-1] - self.arrival_s[0]) * (1 + 1 / max(1, len(self.arrival_s) - 1))
        start_s = np.repeat(np.arange(times) * length_s, len(self.arrival_s))
        return Demand(
            arrival_s=np.tile(self.arrival_s - self.arrival_s[0], times) + start_s,
            input_tokens=np.tile(self.input_tokens, times), output_tokens=np.tile(self.output_tokens, times),
        )  # fmt: skip


def demand_of(trace: Iterable[TraceRecord]) -> Demand:
    """The requests of a trace. Raises `UsageError` where one does not say how long it was, or fewer than two came."""
    rows = [(r.arrival_ns, r.input_tokens, r.output_tokens) for r in trace]
    if len(rows) < 2 or any(None in row for row in rows):
        raise UsageError("a trace of at least two requests that all say when they came and how long they were")
    whole = np.array(rows, dtype=np.int64)
    return Demand(arrival_s=(whole[:, 0] - whole[0, 0]) / 1e9, input_tokens=whole[:, 1], output_tokens=whole[:, 2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model on a tier, split as is cheapest there."""

    model: str
    tier: Tier
    engine: HardwareEngine
    replicas: int
    """On one instance."""
    requests_per_s: float
    """Most of one instance that keep the SLO."""
    usd_per_1m_output: float
    """Of a full instance, prompts included."""
    error: tuple[float, float]
    """The model's own: what the cost may be at least and at most as a multiple of that, in 9 of 10 cases."""
    served: float
    """Share of the trace's requests that fit into the model's context."""

    @property
    def is_bound(self) -> bool:
        """The cost is a limit from below, no estimate: never ranked."""
        return self.engine.source == "bound"


def keeps(engine: HardwareEngine, demand: Demand, rate: float, criteria: Sequence[Criterion]) -> bool:
    """Whether one replica keeps every criterion at ``rate`` requests/s of the trace's shape."""
    span_s = demand.arrival_s[-1] * rate / (len(demand.arrival_s) - 1)
    arrival_s = demand.arrival_s / max(span_s, 1e-12)
    load = Workload(
        arrival_s=arrival_s, input_tokens=demand.input_tokens, output_tokens=demand.output_tokens,
        delay_s=np.asarray(engine.arrival_s + engine.arrival_per_token_s * demand.input_tokens, dtype=np.float64),
    )  # fmt: skip
    found = simulate(load, engine.limits, [engine.step_time])
    gaps = np.maximum(demand.output_tokens - 1, 1)
    metrics: Mapping[str, Floats] = {
        "ttft": found.first_token_s - arrival_s, "e2e": found.finished_s - arrival_s,
        "tpot": np.where(demand.output_tokens > 1, (found.finished_s - found.first_token_s) / gaps, 0.0),
    }  # fmt: skip
    for one in criteria:
        met = np.ones(len(demand.arrival_s), dtype=np.bool_)
        for metric, limit_s in one.limits.items():
            if metric not in metrics:
                raise UsageError(f"SLO {metric} is not simulated here: ttft, tpot and e2e are")
            met &= metrics[metric] <= limit_s
        if met.mean() < one.wanted:
            return False
    return True


def capacity(engine: HardwareEngine, demand: Demand, criteria: Sequence[Criterion]) -> float:
    """The highest rate of one replica that keeps the criteria, requests/s, to `CLOSE`; 0: none does."""
    low, high, rate = 0.0, np.inf, 1.0
    while not (low > 0 and high / low <= 1 + CLOSE):
        if keeps(engine, demand.repeated(max(REQUESTS, round(SPAN_S * rate))), rate, criteria):
            low = rate
        else:
            high = rate
        if high < 0.005:
            return 0.0
        rate = low * 4 if high == np.inf else high / 4 if low == 0 else float(np.sqrt(low * high))
    return low


def offers(
    models: Iterable[Model], tiers: Iterable[Tier], demand: Demand, criteria: Sequence[Criterion],
    own: Callable[[Model, Tier, int | None], HardwareEngine | None] = lambda model, tier, parts: None,
) -> Iterator[Offer | tuple[Model, Tier, str]]:  # fmt: skip
    """For every model and tier the cheapest split, or why there is none. Equal hardware is simulated once.

    ``own``: the engine of a model on a tier, split so (None: on CPUs), by runs of one's own; None: there are none.
    """
    found: dict[tuple[str, str, float | None, int], float] = {}
    tiers = list(tiers)
    for model in models:
        for tier in tiers:
            best: Offer | None = None
            why = "none of its splits keeps the SLO at any rate"
            served = for_tier(model, tier.accelerator)
            mine = demand.kept(served.max_model_len)
            for parts in splits(served, tier) if tier.accelerator_count else [None]:
                try:
                    engine = own(model, tier, parts) or engine_for(model, tier, tensor_parallel=parts)
                except UsageError as e:
                    why = str(e)
                    continue
                key = (model.name, engine.chip if parts else tier.name, tier.accelerator_memory_gib, parts or 0)
                if key not in found:
                    limits = replace(engine.limits, prefix_cache=False)  # a trace of lengths shares no text
                    found[key] = capacity(replace(engine, limits=limits), mine, criteria)
                if found[key]:
                    offer = _offer(model, tier, engine, found[key], mine, len(demand.arrival_s))
                    if best is not None and offer.usd_per_1m_output >= best.usd_per_1m_output:
                        break  # more of a split that does not pay
                    best = offer
            yield best or (model, tier, misfit(model, tier) or why)


def splits(model: Model, tier: Tier) -> list[int]:
    """Numbers of accelerators for one replica that are tried on a tier; none on CPUs."""
    config = model_config(model)
    if config is None or not tier.accelerator_count:
        return []
    good = tensor_parallel_sizes(config, model.quantization, tier.accelerator_count)
    return [parts for parts in SPLITS if parts in good]


def _offer(model: Model, tier: Tier, engine: HardwareEngine, rate: float, demand: Demand, asked: int) -> Offer:
    replicas = tier.accelerator_count // engine.tensor_parallel if engine.tensor_parallel else 1
    tokens_per_s = rate * replicas * float(demand.output_tokens.mean())
    return Offer(
        model=model.name, tier=tier, engine=engine, replicas=replicas, requests_per_s=rate * replicas,
        usd_per_1m_output=tier.usd_per_hour / 3600 / tokens_per_s * 1e6,
        error=engine.cost_within or cost_range(engine.source, engine.chip, engine.facts),
        served=len(demand.arrival_s) / asked,
    )  # fmt: skip


def ranked(found: Sequence[Offer]) -> list[list[Offer]]:
    """Offers by cost, cheapest first, in groups of which no one is more than `TIE` dearer than its first; no bounds."""
    groups: list[list[Offer]] = []
    for offer in sorted((one for one in found if not one.is_bound), key=lambda one: one.usd_per_1m_output):
        if groups and offer.usd_per_1m_output <= groups[-1][0].usd_per_1m_output * TIE:
            groups[-1].append(offer)
        else:
            groups.append([offer])
    return groups


def to_measure(groups: Sequence[Sequence[Offer]]) -> list[Offer]:
    """Which two to measure: the cheapest, and the cheapest on another chip."""
    offers = [offer for group in groups for offer in group]
    other = next((one for one in offers if one.engine.chip != offers[0].engine.chip), None)
    return [one for one in (offers[0] if offers else None, other) if one is not None]
