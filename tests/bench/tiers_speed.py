"""A day on every tier with accelerators, summaries only: ``python -m tests.bench.tiers_speed [--requests N]``.

The day is what ``harness trace synth --like`` makes of the Azure conversation slice, busy in the afternoon. Each tier
serves it with one instance, without rows: the share of requests that kept the SLO, and what 1M output tokens cost at
this volume. Tiers are spread over two processes; every one is simulated, also where two have the same hardware. Prints
a line of JSON for each tier and one for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier, list_tiers
from harness.cluster.engines.simulated import simulated_engine
from harness.cluster.hardware.advice import Demand, demand_of
from harness.cluster.simulator.fleet import Workload, simulate
from harness.errors import UsageError
from harness.trace.io import open_trace
from harness.trace.synth import daily, drawn_like, parse_arrivals, synthesize

LIKE = Path(__file__).parents[2] / "scenarios" / "traces" / "azure-conv-2023.csv"
DAY_S, PEAK, SLO_TTFT_S, SLO_TPOT_S = 86_400.0, 1.6, 2.0, 0.1


def day(requests: int) -> Demand:
    """So many requests, about, over a day."""
    return demand_of(synthesize(
        gaps=parse_arrivals("poisson", requests / DAY_S), lengths=drawn_like(open_trace(LIKE)), requests=None,
        duration_s=DAY_S, seed=1, warp=daily(PEAK),
    ))  # fmt: skip


def served(tier: str, model: str, demand: Demand) -> dict[str, object]:
    """What became of the day on one instance."""
    began, found = time.process_time(), get_tier(tier)
    try:
        engine = simulated_engine(get_model(model), found)
    except UsageError as e:
        return {"tier": tier, "refused": str(e)[:100], "cpu_s": time.process_time() - began}
    mine = demand.kept(engine.longest)
    load = Workload(
        arrival_s=mine.arrival_s, input_tokens=mine.input_tokens, output_tokens=mine.output_tokens,
        delay_s=engine.arrival_s + engine.arrival_per_token_s * mine.input_tokens,
    )  # fmt: skip
    replicas = max(1, found.accelerator_count // max(1, engine.tensor_parallel))
    out = simulate(load, engine.limits, [engine.step_time] * replicas)
    ttft = out.first_token_s - mine.arrival_s
    tpot = (out.finished_s - out.first_token_s) / np.maximum(mine.output_tokens - 1, 1)
    tokens = float(mine.output_tokens.sum())
    return {
        "tier": tier, "step_times": engine.source, "requests": len(mine.arrival_s),
        "kept_slo": round(float(np.mean((ttft <= SLO_TTFT_S) & (tpot <= SLO_TPOT_S))), 4),
        "usd_per_1m_output": round(found.usd_per_hour * 24 / tokens * 1e6, 3),
        "cpu_s": round(time.process_time() - began, 2),
    }  # fmt: skip


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--model", default="mistral-7b-instruct-v0.3")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    demand, tiers = day(args.requests), [tier.name for tier in list_tiers() if tier.accelerator]
    made_s = time.monotonic() - began
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(partial(served, model=args.model, demand=demand), tiers))
    for row in rows:
        print(json.dumps(row))
    total = {
        "tiers": len(tiers), "simulated": sum("refused" not in row for row in rows), "made_s": round(made_s, 1),
        "cpu_s": round(sum(float(str(row["cpu_s"])) for row in rows), 1), "wall_s": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(json.dumps(total), file=sys.stdout)


if __name__ == "__main__":
    main()
